// Products of int8 and int4 matrices with a few vectors: weights are read once, stay packed in memory and are expanded
// in registers; activations are integers of 16 bits (activations.h), so sums are exact integers:
//
//     int8:  y[b][r] = scale[r] x_scale[b] sum_c w[r][c] code[b][c]
//     int4:  y[b][r] = x_scale[b] sum_g scale[r][g] sum_{c in g} (nibble[r][c] - 8) code[b][c]
//
// Sums are cut at every BLOCK_COLUMNS columns, where 32-bit lanes could overflow next; nothing depends on the batch or
// the row range.
#pragma once

#include "activations.h"
#include "bfloat16.h"
#include "kernels.h"
#include "prefetch.h"
#include "unroll.h"

namespace {

constexpr int64_t BLOCK_COLUMNS = 4096, ROWS_TOGETHER = 4, PAD = 64;

// Activations of a batch: codes (batch, stride), in the order of encode(), and a scale each.
struct Codes {
    const int16_t *codes;
    const float *scales;
    int64_t stride;
};

// Codes for an int4 matrix stand in blocks: INT4_BLOCK numbers of 16 bits for INT4_INPUTS inputs.
#if defined(__AVX512BW__)
constexpr int64_t INT4_INPUTS = 128, INT4_BLOCK = 160, MOST_TOGETHER = 8;
#elif defined(__AVX2__)
constexpr int64_t INT4_INPUTS = 64, INT4_BLOCK = 80, MOST_TOGETHER = 4;
#else
constexpr int64_t INT4_INPUTS = 64, INT4_BLOCK = 64, MOST_TOGETHER = 4;
#endif
static_assert(INT4_BLOCK * 4 <= oxl::MOST_CODES_PER_FOUR * INT4_INPUTS, "the library sizes the buffers");

// Numbers of 16 bits that codes of `columns` inputs of a matrix of that kind take.
inline int64_t code_length(int32_t kind, int64_t columns) {
    if (kind != oxl::WEIGHT_INT4) return oxl::round_up(columns, 64);
    return oxl::round_up(columns, INT4_INPUTS) / INT4_INPUTS * INT4_BLOCK;
}

#if defined(__AVX2__)

inline __m256i load16(const int16_t *p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p)); }
inline __m128i load_bytes(const void *p) { return _mm_loadu_si128(static_cast<const __m128i *>(p)); }


#endif

}  // namespace

#if defined(__AVX512BW__)
#include "quantized_avx512.h"
#endif

namespace {

#if defined(__AVX2__) && !defined(__AVX512BW__)

inline float sum_lanes(__m256 v) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// `to` + a times b. Written out because compilers reorder a batch of these until the sums leave the registers.
inline __m256i add_products(__m256i to, __m256i a, __m256i b) {
    __m256i product;
    __asm__("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0"
            : "+x"(to), "=&x"(product)
            : "x"(a), "x"(b));
    return to;
}

// Integer dot products of ROWS rows with BATCH vectors over n <= BLOCK_COLUMNS columns, as floats.
template <int ROWS, int BATCH>
inline void dot_int8(const int8_t *w, int64_t row_stride, const Codes &x, int64_t n, float (*out)[BATCH]) {
    __m256i total[ROWS][BATCH] = {};
    const auto add = [&](int64_t c, const int8_t *from, int64_t stride) __attribute__((always_inline)) {
        __m256i wide[ROWS];
        unrolled<ROWS>([&](auto r) { wide[r] = _mm256_cvtepi8_epi16(load_bytes(from + r * stride)); });
        unrolled<BATCH>([&](auto b) {
            const __m256i code = load16(x.codes + b * x.stride + c);
            unrolled<ROWS>([&](auto r) { total[r][b] = add_products(total[r][b], wide[r], code); });
        });
    };
    int64_t c = 0;
    for (; c + 64 <= n; c += 64) {
        unrolled<ROWS>([&](auto r) { prefetch(w + r * row_stride + c + WEIGHTS_AHEAD<BATCH>); });
        unrolled<4>([&](auto k) { add(c + 16 * k, w + c + 16 * k, row_stride); });
    }
    for (; c < n; c += 16) {  // beyond the row lies another row, or nothing: read no further
        int8_t rest[ROWS][16] = {};
        for (int r = 0; r < ROWS; ++r) __builtin_memcpy(rest[r], w + r * row_stride + c, n - c < 16 ? n - c : 16);
        add(c, rest[0], 16);
    }
    unrolled<ROWS>([&](auto r) {
        unrolled<BATCH>([&](auto b) { out[r][b] = sum_lanes(_mm256_cvtepi32_ps(total[r][b])); });
    });
}

// 64 codes in the order in which the four nibbles of 16-bit lanes meet them: 16 lanes are 32 bytes of the matrix, lane j
// holding inputs 2 j (+ 16 for j > 7), 16 more, and the two after those. Last, for each sum of 32 bits, -8 times the sum of
// its codes: nibbles stand for nibble - 8.
inline void arrange(const int16_t *plain, int16_t *to) {
    const __m256i order = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,  //
                                           0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
    __m256i part[4], all = {};
    unrolled<4>([&](auto k) { part[k] = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(load16(plain + 16 * k), order), 0xd8); });
    const __m256i arranged[4] = {
        _mm256_permute2x128_si256(part[0], part[2], 0x20), _mm256_permute2x128_si256(part[1], part[3], 0x20),
        _mm256_permute2x128_si256(part[0], part[2], 0x31), _mm256_permute2x128_si256(part[1], part[3], 0x31)};
    unrolled<4>([&](auto k) {
        all = _mm256_add_epi32(all, _mm256_madd_epi16(arranged[k], _mm256_set1_epi16(-8)));
        _mm256_storeu_si256(reinterpret_cast<__m256i *>(to + 16 * k), arranged[k]);
    });
    _mm256_storeu_si256(reinterpret_cast<__m256i *>(to + 64), all);
}

// Scaled dot products of one row with BATCH vectors over `halves` times 32 inputs; a group is GROUP inputs.
template <int GROUP, int BATCH>
inline void dot_int4(const uint8_t *w, const uint16_t *scales, const Codes &x, int64_t halves, float *out) {
    const __m256i mask = _mm256_set1_epi16(15), upper = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
    const __m256i shift = _mm256_setr_epi32(16, 16, 16, 16, 0, 0, 0, 0);
    __m256 total[BATCH] = {};
    const auto add = [&](const int16_t *codes, __m256i bytes, __m256i scale_bits) __attribute__((always_inline)) {
        const __m256 scale = _mm256_castsi256_ps(_mm256_and_si256(scale_bits, upper));
        const __m256i nibbles[4] = {_mm256_and_si256(bytes, mask), _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask),
                                    _mm256_and_si256(_mm256_srli_epi16(bytes, 8), mask), _mm256_srli_epi16(bytes, 12)};
        unrolled<BATCH>([&](auto b) {
            const int16_t *code = codes + b * x.stride;
            __m256i dot = load16(code + 64);
            unrolled<4>([&](auto k) { dot = _mm256_add_epi32(dot, _mm256_madd_epi16(nibbles[k], load16(code + 16 * k))); });
            total[b] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), scale, total[b]);
        });
    };
    const int16_t *codes = x.codes;
    for (; halves >= 2; halves -= 2, w += 32, codes += INT4_BLOCK) {
        prefetch(w + WEIGHTS_AHEAD<BATCH>);
        __m256i scale;
        if (GROUP == 64) {
            scale = _mm256_set1_epi16(static_cast<short>(*scales++));
        } else {  // the lower half of the lanes belongs to the first group
            int32_t two;
            __builtin_memcpy(&two, scales, sizeof two);
            scale = _mm256_sllv_epi32(_mm256_set1_epi32(two), shift);
            scales += 2;
        }
        add(codes, _mm256_loadu_si256(reinterpret_cast<const __m256i *>(w)), scale);
    }
    if (halves)
        add(codes, _mm256_zextsi128_si256(load_bytes(w)), _mm256_sllv_epi32(_mm256_set1_epi32(*scales), shift));
    unrolled<BATCH>([&](auto b) { out[b] = sum_lanes(total[b]); });
}

#elif !defined(__AVX2__)

typedef int8_t vb __attribute__((vector_size(OXL_WIDTH)));
typedef uint8_t vub __attribute__((vector_size(OXL_WIDTH)));

inline vf load16(const int16_t *p) {
    vs v;
    __builtin_memcpy(&v, p, sizeof v);
    return __builtin_convertvector(v, vf);
}
inline float from_bf16(uint16_t bits) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float v;
    __builtin_memcpy(&v, &wide, sizeof v);
    return v;
}

template <int ROWS, int BATCH>
inline void dot_int8(const int8_t *w, int64_t row_stride, const Codes &x, int64_t n, float (*out)[BATCH]) {
    vf total[ROWS][BATCH] = {};
    for (int64_t first = 0; first < n; first += 256) {  // short sums round less
        vf part[ROWS][BATCH] = {};
        const int64_t end = first + 256 < n ? first + 256 : n;
        for (int64_t c = first; c < end; c += W)
            for (int r = 0; r < ROWS; ++r) {
                vb bytes = {};
                __builtin_memcpy(&bytes, w + r * row_stride + c, n - c < W ? n - c : W);
                const vf wide = __builtin_convertvector(bytes, vf);
                for (int b = 0; b < BATCH; ++b) part[r][b] += wide * load16(x.codes + b * x.stride + c);
            }
        for (int r = 0; r < ROWS; ++r)
            for (int b = 0; b < BATCH; ++b) total[r][b] += part[r][b];
    }
    for (int r = 0; r < ROWS; ++r)
        for (int b = 0; b < BATCH; ++b) out[r][b] = sum(total[r][b]);
}

template <int GROUP, int BATCH>
inline void dot_int4(const uint8_t *w, const uint16_t *scales, const Codes &x, int64_t halves, float *out) {
    constexpr int HALVES = GROUP / 32;
    vf total[BATCH] = {};
    for (int64_t g = 0; g < halves / HALVES; ++g) {
        vf part[BATCH] = {};
        for (int64_t block = g * HALVES; block < (g + 1) * HALVES; ++block)
            for (int64_t j = 0; j < 16; j += W) {
                vub bytes;
                __builtin_memcpy(&bytes, w + block * 16 + j, sizeof bytes);
                const vf low = __builtin_convertvector(bytes & 15, vf) - 8.0f;
                const vf high = __builtin_convertvector(bytes >> 4, vf) - 8.0f;
                for (int b = 0; b < BATCH; ++b) {
                    const int16_t *code = x.codes + b * x.stride + block * 32 + j;
                    part[b] = part[b] + low * load16(code) + high * load16(code + 16);
                }
            }
        for (int b = 0; b < BATCH; ++b) total[b] += part[b] * from_bf16(scales[g]);
    }
    for (int b = 0; b < BATCH; ++b) out[b] = sum(total[b]);
}

#endif

// The codes of n inputs as a matrix of that kind meets them, code_length(kind, n) numbers, zeros beyond the inputs.
inline void encode(int32_t kind, const float *x, int64_t n, float factor, int16_t *codes) {
#if defined(__AVX2__)
    if (kind == oxl::WEIGHT_INT4) {
        for (int64_t c = 0; c < n; c += INT4_INPUTS, codes += INT4_BLOCK) {
            int16_t plain[INT4_INPUTS];
            round_activations(x + c, n - c < INT4_INPUTS ? n - c : INT4_INPUTS, INT4_INPUTS, factor, plain);
            arrange(plain, codes);
        }
        return;
    }
#endif
    round_activations(x, n, code_length(kind, n), factor, codes);
}

// a b + c, rounded once where the processor can: left to the compiler, it would differ from one batch size to the next.
inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

inline int64_t padded_columns(const oxl::Weight &w) {
    return w.kind == oxl::WEIGHT_INT8 ? w.columns : oxl::round_up(w.columns, w.group);
}

template <int BATCH>
void multiply_columns_batch(const oxl::Weight &w, int64_t begin, int64_t end, int64_t first, int64_t n, const Codes &x,
                          float *y, int64_t y_stride) {
    const auto put = [&](int64_t r, int b, float dot, float scale) {
        float *to = y + b * y_stride + r;
        *to = multiply_add(dot, scale, first ? *to : 0.0f);
    };
    if (w.kind == oxl::WEIGHT_INT8) {
        const float *scales = static_cast<const float *>(w.scales);
        const auto rows_of = [&](int64_t r) { return static_cast<const int8_t *>(w.data) + r * w.columns + first; };
        constexpr int ROWS = BATCH == 1 ? 1 : 2;  // two rows share the loading of the vectors
        int64_t r = begin;
        for (; r + ROWS <= end; r += ROWS) {
            float dot[ROWS][BATCH];
            dot_int8<ROWS, BATCH>(rows_of(r), w.columns, x, n, dot);
            for (int k = 0; k < ROWS; ++k)
                for (int b = 0; b < BATCH; ++b) put(r + k, b, dot[k][b], scales[r + k] * x.scales[b]);
        }
        for (; r < end; ++r) {
            float dot[1][BATCH];
            dot_int8<1, BATCH>(rows_of(r), w.columns, x, n, dot);
            for (int b = 0; b < BATCH; ++b) put(r, b, dot[0][b], scales[r] * x.scales[b]);
        }
        return;
    }
    const int64_t width = padded_columns(w), per_row = width / w.group, halves = oxl::round_up(n, w.group) / 32;
    for (int64_t r = begin; r < end; ++r) {
        const uint8_t *data = static_cast<const uint8_t *>(w.data) + (r * width + first) / 2;
        const uint16_t *scales = static_cast<const uint16_t *>(w.scales) + r * per_row + first / w.group;
        float dot[BATCH];
        if (w.group == 64)
            dot_int4<64, BATCH>(data, scales, x, halves, dot);
        else
            dot_int4<32, BATCH>(data, scales, x, halves, dot);
        for (int b = 0; b < BATCH; ++b) put(r, b, dot[b], x.scales[b]);
    }
}

// Columns first .. first + n - 1 of rows begin .. end - 1, the codes starting at column `first`; added to y if first > 0.
// A few rows at a time meet the whole batch, so that parts of the batch after the first find them in the cache.
void multiply_columns(const oxl::Weight &w, int64_t begin, int64_t end, int64_t first, int64_t n, const Codes &x,
                      int64_t batch, float *y, int64_t y_stride) {
    const int64_t step = batch == 1 ? end - begin : ROWS_TOGETHER;
    for (int64_t row = begin; row < end; row += step) {
        const int64_t next = row + step < end ? row + step : end;
        int64_t b = 0;
        const auto at = [&] { return Codes{x.codes + b * x.stride, x.scales + b, x.stride}; };
        for (; b + MOST_TOGETHER <= batch; b += MOST_TOGETHER)
            multiply_columns_batch<MOST_TOGETHER>(w, row, next, first, n, at(), y + b * y_stride, y_stride);
        if (MOST_TOGETHER > 4 && b + 4 <= batch) {
            multiply_columns_batch<4>(w, row, next, first, n, at(), y + b * y_stride, y_stride);
            b += 4;
        }
        for (; b + 2 <= batch; b += 2) multiply_columns_batch<2>(w, row, next, first, n, at(), y + b * y_stride, y_stride);
        if (b < batch) multiply_columns_batch<1>(w, row, next, first, n, at(), y + b * y_stride, y_stride);
    }
}

// Rows begin .. end - 1 of the product with vectors of codes, all columns.
void multiply_codes(const oxl::Weight &w, int64_t begin, int64_t end, const Codes &x, int64_t batch, float *y,
                    int64_t y_stride) {
    for (int64_t first = 0; first < w.columns; first += BLOCK_COLUMNS) {
        const int64_t n = w.columns - first < BLOCK_COLUMNS ? w.columns - first : BLOCK_COLUMNS;
        multiply_columns(w, begin, end, first, n, {x.codes + code_length(w.kind, first), x.scales, x.stride}, batch, y,
                         y_stride);
    }
}

// multiply_rows (products.h) of a quantised matrix: rounds the activations, a block of columns at a time.
void multiply_quantized(const oxl::Weight &w, int64_t begin, int64_t end, const float *x, int64_t x_stride,
                        int64_t batch, float *y, int64_t y_stride) {
    constexpr int64_t MOST = 8, ROWS = 128;
    int16_t codes[MOST * (BLOCK_COLUMNS / INT4_INPUTS * INT4_BLOCK + PAD)];
    float scales[MOST];
    const int64_t step = batch > MOST ? ROWS : end - begin;  // rows that several parts of a large batch meet in cache
    for (int64_t row = begin; row < end; row += step)
        for (int64_t b = 0; b < batch; b += MOST) {
            const int64_t part = batch - b < MOST ? batch - b : MOST;
            ActivationScale found[MOST];
            for (int64_t k = 0; k < part; ++k) {
                found[k] = activation_scale(x + (b + k) * x_stride, w.columns, 32767.0f);
                scales[k] = found[k].scale;
            }
            for (int64_t first = 0; first < w.columns; first += BLOCK_COLUMNS) {
                const int64_t n = w.columns - first < BLOCK_COLUMNS ? w.columns - first : BLOCK_COLUMNS;
                const int64_t stride = code_length(w.kind, n) + PAD;  // the rows of powers of two would share cache sets
                for (int64_t k = 0; k < part; ++k)
                    encode(w.kind, x + (b + k) * x_stride + first, n, found[k].factor, codes + k * stride);
                multiply_columns(w, row, row + step < end ? row + step : end, first, n, {codes, scales, stride}, part,
                                 y + b * y_stride, y_stride);
            }
        }
}

}  // namespace
