// Products of int8 matrices with many vectors rounded to bytes, the work of reading prompts with dynamic activations. One
// instruction multiplies four columns of 16 rows; it takes unsigned and signed bytes, so weights are shifted:
//
//     sum_c w[r][c] code[t][c] = sum_c (w[r][c] + 128) code[t][c] - 128 sum_c code[t][c]
//
// 32 rows are put in order once and meet all vectors, twelve at a time, from the nearest cache. Sums are exact integers.
#pragma once

#include "activations.h"
#include "bfloat16.h"
#include "kernels.h"
#include "quantized_products.h"

namespace {

constexpr int64_t BYTE_TOKENS = 12, BYTE_ROWS = 32;

inline bool by_bytes(const oxl::QuantizedProduct &a) {
#if defined(__AVX512VNNI__)
    return a.batch > 8 && a.weight.kind == oxl::WEIGHT_INT8 && a.limit <= 127.0f;
#else
    (void)a;
    return false;
#endif
}

// The numbers of a vector of activations, float32.
inline const float *activations(const oxl::QuantizedProduct &a, int64_t vector, float *scratch) {
    const int64_t columns = a.weight.columns;
    if (!a.bfloat16) return static_cast<const float *>(a.x) + vector * columns;
    const bf16 *x = static_cast<const bf16 *>(a.x) + vector * columns;
    for (int64_t c = 0; c < columns; c += W) store(scratch + c, load(x + c, columns - c), columns - c);
    return scratch;
}

#if defined(__AVX512VNNI__)

// Four bytes of each of 16 rows by four bytes: to[k] = bytes 4 k .. 4 k + 3 of all rows.
inline void transpose_groups(const __m512i (&row)[16], __m512i (&to)[16]) {
    __m512i two[16], four[16];
    unrolled<8>([&](auto i) OXL_INLINED {
        two[2 * i] = _mm512_unpacklo_epi32(row[2 * i], row[2 * i + 1]);
        two[2 * i + 1] = _mm512_unpackhi_epi32(row[2 * i], row[2 * i + 1]);
    });
    unrolled<4>([&](auto i) OXL_INLINED {
        unrolled<2>([&](auto k) OXL_INLINED {
            four[4 * i + 2 * k] = _mm512_unpacklo_epi64(two[4 * i + k], two[4 * i + 2 + k]);
            four[4 * i + 2 * k + 1] = _mm512_unpackhi_epi64(two[4 * i + k], two[4 * i + 2 + k]);
        });
    });
    unrolled<4>([&](auto j) OXL_INLINED {  // 128 bits of four[4 i + j] are group j of rows 4 i .. 4 i + 3
        const __m512i even = _mm512_shuffle_i32x4(four[j], four[4 + j], 0x88), odd = _mm512_shuffle_i32x4(four[j], four[4 + j], 0xdd);
        const __m512i even_too = _mm512_shuffle_i32x4(four[8 + j], four[12 + j], 0x88);
        const __m512i odd_too = _mm512_shuffle_i32x4(four[8 + j], four[12 + j], 0xdd);
        to[j] = _mm512_shuffle_i32x4(even, even_too, 0x88), to[8 + j] = _mm512_shuffle_i32x4(even, even_too, 0xdd);
        to[4 + j] = _mm512_shuffle_i32x4(odd, odd_too, 0x88), to[12 + j] = _mm512_shuffle_i32x4(odd, odd_too, 0xdd);
    });
}

// Rows of the matrix plus 128, in order: panel[(c / 4) * 128 + r * 4 + c % 4], any value beyond the matrix.
inline void pack_bytes(const int8_t *w, int64_t columns, int64_t rows, uint8_t *panel) {
    const __m512i shift = _mm512_set1_epi8(static_cast<char>(0x80));
    for (int64_t c = 0; c < columns; c += 64) {
        const __mmask64 inside = columns - c < 64 ? (1ull << (columns - c)) - 1 : ~0ull;
        for (int64_t half = 0; half < 2; ++half) {
            __m512i row[16], group[16];
            for (int64_t r = 0; r < 16; ++r) {
                const int64_t k = half * 16 + r;
                row[r] = k < rows ? _mm512_maskz_loadu_epi8(inside, w + k * columns + c) : _mm512_setzero_si512();
            }
            transpose_groups(row, group);
            for (int64_t k = 0; k < 16; ++k)
                _mm512_storeu_si512(panel + c * BYTE_ROWS + k * 4 * BYTE_ROWS + half * 64, _mm512_xor_si512(group[k], shift));
        }
    }
}

// Codes of `count` vectors in order, zeros for the missing ones: codes[(c / 4) * 48 + t * 4 + c % 4].
inline void encode_bytes(const oxl::QuantizedProduct &a, int64_t tile, float *scratch) {
    const int64_t columns = a.weight.columns, begin = tile * BYTE_TOKENS;
    int8_t *codes = reinterpret_cast<int8_t *>(a.codes) + begin * a.stride;
    for (int64_t t = 0; t < BYTE_TOKENS; ++t) {
        vi total = {};
        float factor = 0.0f;
        const float *x = scratch;
        if (begin + t < a.batch) {
            x = activations(a, begin + t, scratch);
            const ActivationScale found = activation_scale(x, columns, a.limit);
            a.scales[begin + t] = found.scale, factor = found.factor;
        }
        for (int64_t c = 0; c < a.stride; c += W) {
            const vf value = factor > 0.0f && c < columns ? load(x + c, columns - c) * factor : vf{};
            const vi code = nearest(value);
            total += code;
            const __m128i bytes = _mm512_cvtepi32_epi8((__m512i)code);
            int8_t *to = codes + c * BYTE_TOKENS + t * 4;
            const int32_t four[] = {_mm_cvtsi128_si32(bytes), _mm_extract_epi32(bytes, 1), _mm_extract_epi32(bytes, 2),
                                    _mm_extract_epi32(bytes, 3)};
            unrolled<4>([&](auto k) { __builtin_memcpy(to + k * 4 * BYTE_TOKENS, &four[k], 4); });
        }
        a.sums[begin + t] = _mm512_reduce_add_epi32((__m512i)total);
    }
}

inline __m512i add_byte_products(__m512i to, __m512i w, __m512i code) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(to) : "v"(w), "v"(code));
    return to;
}

// One panel for one tile of vectors.
OXL_INLINED inline void multiply_bytes(const uint8_t *panel, const int8_t *codes, int64_t groups, __m512i (&dot)[BYTE_TOKENS][2]) {
    for (int64_t g = 0; g < groups; ++g, panel += 4 * BYTE_ROWS, codes += 4 * BYTE_TOKENS) {
        const __m512i low = _mm512_loadu_si512(panel), high = _mm512_loadu_si512(panel + 64);
        unrolled<BYTE_TOKENS>([&](auto t) OXL_INLINED {
            int32_t four;
            __builtin_memcpy(&four, codes + 4 * t, 4);
            const __m512i code = _mm512_set1_epi32(four);
            dot[t][0] = add_byte_products(dot[t][0], low, code);
            dot[t][1] = add_byte_products(dot[t][1], high, code);
        });
    }
}

// Rows begin .. end - 1 for all vectors.
void multiply_many_bytes(const oxl::QuantizedProduct &a, int64_t begin, int64_t end, float *scratch) {
    const int64_t columns = a.weight.columns, groups = (columns + 3) / 4;
    const float *scales = static_cast<const float *>(a.weight.scales);
    uint8_t *panel = reinterpret_cast<uint8_t *>(scratch);
    for (int64_t row = begin; row < end; row += BYTE_ROWS) {
        const int64_t rows = end - row < BYTE_ROWS ? end - row : BYTE_ROWS;
        pack_bytes(static_cast<const int8_t *>(a.weight.data) + row * columns, columns, rows, panel);
        vf row_scale[2];
        for (int64_t half = 0; half < 2; ++half)
            row_scale[half] = rows > half * 16 ? load(scales + row + half * 16, rows - half * 16) : vf{};
        for (int64_t tile = 0; tile * BYTE_TOKENS < a.batch; ++tile) {
            const int64_t first = tile * BYTE_TOKENS, tokens = a.batch - first < BYTE_TOKENS ? a.batch - first : BYTE_TOKENS;
            __m512i dot[BYTE_TOKENS][2];
            unrolled<BYTE_TOKENS>([&](auto t) OXL_INLINED { dot[t][0] = dot[t][1] = _mm512_set1_epi32(-128 * a.sums[first + t]); });
            multiply_bytes(panel, reinterpret_cast<const int8_t *>(a.codes) + first * a.stride, groups, dot);
            unrolled<BYTE_TOKENS>([&](auto t) OXL_INLINED {
                if (t >= tokens) return;
                unrolled<2>([&](auto half) OXL_INLINED {
                    const int64_t left = rows - half * 16;
                    if (left <= 0) return;
                    const vf value = (vf)_mm512_cvtepi32_ps(dot[t][half]) * (row_scale[half] * a.scales[first + t]);
                    const int64_t at = (first + t) * a.weight.rows + row + half * 16;
                    if (a.bfloat16) store(static_cast<bf16 *>(a.y) + at, value, left);
                    else store(static_cast<float *>(a.y) + at, value, left);
                });
            });
        }
    }
}

#endif

}  // namespace
