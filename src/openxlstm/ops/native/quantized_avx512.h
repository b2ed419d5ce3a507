// Integer dot products of quantised rows for AVX-512; what they are stands in quantized_products.h.
#pragma once

#include "activations.h"
#include "unroll.h"

namespace {

inline __m512i load32(const int16_t *p) { return _mm512_loadu_si512(p); }

// `to` + sums of pairs of products of a and b. Written out because compilers reorder a batch of these until the sums leave
// the registers.
inline __m512i add_products(__m512i to, __m512i a, __m512i b) {
#if defined(__AVX512VNNI__)
    __asm__("vpdpwssd %2, %1, %0" : "+v"(to) : "v"(a), "v"(b));
#else
    __m512i product;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+v"(to), "=&v"(product) : "v"(a), "v"(b));
#endif
    return to;
}

inline float sum_lanes(__m512 v) { return sum((vf)v); }

#define OXL_INLINED __attribute__((always_inline))

// The codes of a batch at a column. Two pointers and multiples of the stride reach eight vectors; a pointer for each would
// not fit into the registers, and compilers make them if they can.
struct CodePointers {
    const int16_t *first, *fifth;
    int64_t stride;

    explicit CodePointers(const Codes &x) : first(x.codes), fifth(x.codes + 4 * x.stride), stride(x.stride) {}
    void advance(int64_t n) {
        first += n, fifth += n;
        __asm__("" : "+r"(first), "+r"(fifth));
    }
    OXL_INLINED const int16_t *of(int b) const { return b < 4 ? first + b * stride : fifth + (b - 4) * stride; }
};

// Sums of the lanes of eight vectors, each added in the order of sum_lanes.
inline __m256 sums_of_8(const __m512i *v) {
    __m512 a[4], b[2];
    unrolled<4>([&](auto k) OXL_INLINED {
        const __m512 one = _mm512_cvtepi32_ps(v[2 * k]), two = _mm512_cvtepi32_ps(v[2 * k + 1]);
        a[k] = _mm512_add_ps(_mm512_shuffle_f32x4(one, two, 0x44), _mm512_shuffle_f32x4(one, two, 0xee));
    });
    unrolled<2>([&](auto k) OXL_INLINED {  // 128 bits of each of four vectors
        b[k] = _mm512_add_ps(_mm512_shuffle_f32x4(a[2 * k], a[2 * k + 1], 0x88),
                             _mm512_shuffle_f32x4(a[2 * k], a[2 * k + 1], 0xdd));
    });
    const __m512 c = _mm512_add_ps(_mm512_shuffle_ps(b[0], b[1], 0x44), _mm512_shuffle_ps(b[0], b[1], 0xee));
    const __m512 sums = _mm512_add_ps(_mm512_shuffle_ps(c, c, 0x88), _mm512_shuffle_ps(c, c, 0xdd));
    return _mm512_castps512_ps256(  // 128 bits hold the sums of vectors k, k + 4, k, k + 4
        _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 0, 0, 0, 0, 0, 0, 0, 0), sums));
}

// Integer dot products of ROWS rows with BATCH vectors over n <= BLOCK_COLUMNS columns, as floats.
template <int ROWS, int BATCH>
inline void dot_int8(const int8_t *w, int64_t row_stride, const Codes &x, int64_t n, float (*out)[BATCH]) {
    __m512i total[ROWS * BATCH];
    unrolled<ROWS * BATCH>([&](auto k) OXL_INLINED { total[k] = _mm512_setzero_si512(); });
    CodePointers codes(x);
    const auto add = [&](int64_t c, const auto &bytes) OXL_INLINED {
        __m512i wide[ROWS];
        unrolled<ROWS>([&](auto r) OXL_INLINED { wide[r] = _mm512_cvtepi8_epi16(bytes(w + r * row_stride + c)); });
        unrolled<BATCH>([&](auto b) OXL_INLINED {
            const __m512i code = load32(codes.of(b) + c);
            unrolled<ROWS>([&](auto r) OXL_INLINED {
                total[r * BATCH + b] = add_products(total[r * BATCH + b], wide[r], code);
            });
        });
    };
    const auto whole = [](const int8_t *p) OXL_INLINED { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); };
    for (; n >= 64; n -= 64, w += 64, codes.advance(64)) {
        unrolled<ROWS>([&](auto r) OXL_INLINED { prefetch(w + r * row_stride + WEIGHTS_AHEAD<BATCH>); });
        add(0, whole), add(32, whole);
    }
    for (; n > 0; n -= 32, w += 32, codes.advance(32)) {  // beyond the row lies another row, or nothing: read no further
        const __mmask32 inside = n < 32 ? (1u << n) - 1 : ~0u;
        add(0, [&](const int8_t *p) OXL_INLINED { return _mm256_maskz_loadu_epi8(inside, p); });
    }
    if constexpr (BATCH == 8) {
        unrolled<ROWS>([&](auto r) OXL_INLINED { _mm256_storeu_ps(out[r], sums_of_8(total + r * BATCH)); });
    } else {
        unrolled<ROWS * BATCH>([&](auto k) OXL_INLINED { out[k / BATCH][k % BATCH] = sum_lanes(_mm512_cvtepi32_ps(total[k])); });
    }
}

// 128 codes in the order in which the four nibbles of 16-bit lanes meet them: 32 lanes are 64 bytes of the matrix, each
// 128 bits of them 32 inputs, lane j of 8 holding inputs 2 j, 2 j + 16, 2 j + 1 and 2 j + 17. Last, for each sum of 32
// bits, -8 times the sum of its codes: nibbles stand for nibble - 8.
inline void arrange(const int16_t *plain, int16_t *to) {
    alignas(64) int16_t order[32];
    for (int k = 0; k < 4; ++k)
        for (int j = 0; j < 8; ++j) order[8 * k + j] = static_cast<int16_t>(2 * j + k / 2 + k % 2 * 16);
    __m512i part[4], half[4], all = _mm512_setzero_si512();
    unrolled<4>([&](auto g) { part[g] = _mm512_permutexvar_epi16(load32(order), load32(plain + 32 * g)); });
    unrolled<2>([&](auto g) {
        half[g] = _mm512_shuffle_i32x4(part[2 * g], part[2 * g + 1], 0x44);
        half[2 + g] = _mm512_shuffle_i32x4(part[2 * g], part[2 * g + 1], 0xee);
    });
    unrolled<4>([&](auto k) {
        const __m512i nibble = _mm512_shuffle_i32x4(half[k / 2 * 2], half[k / 2 * 2 + 1], k % 2 ? 0xdd : 0x88);
        all = _mm512_add_epi32(all, _mm512_madd_epi16(nibble, _mm512_set1_epi16(-8)));
        _mm512_storeu_si512(to + 32 * k, nibble);
    });
    _mm512_storeu_si512(to + 128, all);
}

// Scaled dot products of one row with BATCH vectors over `halves` times 32 inputs; a group is GROUP inputs.
template <int GROUP, int BATCH>
inline void dot_int4(const uint8_t *w, const uint16_t *scales, const Codes &x, int64_t halves, float *out) {
    constexpr int GROUPS = 128 / GROUP;  // in 64 bytes
    const __m512i mask = _mm512_set1_epi16(15);
    // the scale of its group into the upper half of every lane of 32 bits
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i spread = _mm512_slli_epi32(_mm512_srli_epi32(lane, GROUP == 64 ? 3 : 2), 16);
    CodePointers codes(x);
    __m512 total[BATCH];
    unrolled<BATCH>([&](auto b) OXL_INLINED { total[b] = _mm512_setzero_ps(); });
    const auto add = [&](__m512i bytes, __m128i few) OXL_INLINED {
        const __m512 scale = _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, spread, _mm512_castsi128_si512(few)));
        const __m512i nibbles[4] = {_mm512_and_si512(bytes, mask), _mm512_and_si512(_mm512_srli_epi16(bytes, 4), mask),
                                    _mm512_and_si512(_mm512_srli_epi16(bytes, 8), mask), _mm512_srli_epi16(bytes, 12)};
        unrolled<BATCH>([&](auto b) OXL_INLINED {
            const int16_t *code = codes.of(b);
            __m512i dot = load32(code + 128);
            unrolled<4>([&](auto k) OXL_INLINED { dot = add_products(dot, nibbles[k], load32(code + 32 * k)); });
            total[b] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), scale, total[b]);
        });
    };
    for (; halves >= 4; halves -= 4, w += 64, codes.advance(INT4_BLOCK), scales += GROUPS) {
        prefetch(w + WEIGHTS_AHEAD<BATCH>);
        int64_t few = 0;
        __builtin_memcpy(&few, scales, GROUPS * sizeof *scales);
        add(_mm512_loadu_si512(w), _mm_cvtsi64_si128(few));
    }
    if (halves) {
        int64_t few = 0;
        __builtin_memcpy(&few, scales, halves * 32 / GROUP * sizeof *scales);
        add(_mm512_maskz_loadu_epi64((1u << (2 * halves)) - 1, w), _mm_cvtsi64_si128(few));
    }
    unrolled<BATCH>([&](auto b) OXL_INLINED { out[b] = sum_lanes(total[b]); });
}

}  // namespace
