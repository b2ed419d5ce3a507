// Products of quantised matrices with many vectors, the work of reading prompts: a tile of 16 rows is expanded to 16-bit
// integers once, in pairs of columns, and meets the codes of all vectors (activations.h) from the second-level cache.
//
//     acc[r] += panel[c][r] code[t][c] + panel[c + 1][r] code[t][c + 1]     one instruction for eight rows
//
// Twice the multiplications of float32 per instruction. Sums of a section of at most SECTION columns are exact
// integers; sections, or the groups of int4, are added in float32.
#pragma once

#include "byte_products.h"
#include "quantized_products.h"

namespace {

constexpr int64_t SECTION = 512, TILE_ROWS = 16, PANELS = 4;

#if defined(__AVX2__)

// 16 rows of 16 bytes as 16-bit pairs: panel[(c / 2) * 32 + r * 2 + c % 2].
inline void interleave(const __m128i *bytes, int16_t *panel) {
    for (int half = 0; half < 2; ++half, bytes += 8, panel += 16) {
        __m128i two[8], four[8];
        unrolled<4>([&](auto i) {
            two[i] = _mm_unpacklo_epi16(bytes[2 * i], bytes[2 * i + 1]);
            two[4 + i] = _mm_unpackhi_epi16(bytes[2 * i], bytes[2 * i + 1]);
        });
        unrolled<4>([&](auto i) {
            four[2 * i] = _mm_unpacklo_epi32(two[2 * i], two[2 * i + 1]);
            four[2 * i + 1] = _mm_unpackhi_epi32(two[2 * i], two[2 * i + 1]);
        });
        unrolled<8>([&](auto k) {  // columns 2 k and 2 k + 1 of eight rows
            const __m128i first = four[k / 4 * 4 + k / 2 % 2], second = four[k / 4 * 4 + k / 2 % 2 + 2];
            const __m128i pairs = k % 2 ? _mm_unpackhi_epi64(first, second) : _mm_unpacklo_epi64(first, second);
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(panel + k * 32), _mm256_cvtepi8_epi16(pairs));
        });
    }
}

// 16 rows x n columns, rows beyond `rows` and columns up to the next multiple of 16 being zero.
inline void expand_int8(const int8_t *w, int64_t row_stride, int64_t rows, int64_t n, int16_t *panel) {
    for (int64_t c = 0; c < n; c += 16) {
        __m128i bytes[TILE_ROWS] = {};
        for (int64_t r = 0; r < rows; ++r) {
            if (n - c >= 16)
                bytes[r] = load_bytes(w + r * row_stride + c);
            else
                __builtin_memcpy(&bytes[r], w + r * row_stride + c, n - c);
        }
        interleave(bytes, panel + c * TILE_ROWS);
    }
}

// The same for int4; n is a multiple of 32.
inline void expand_int4(const uint8_t *w, int64_t row_bytes, int64_t rows, int64_t n, int16_t *panel) {
    const __m128i mask = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
    for (int64_t c = 0; c < n; c += 32) {
        __m128i low[TILE_ROWS] = {}, high[TILE_ROWS] = {};
        for (int64_t r = 0; r < rows; ++r) {
            const __m128i bytes = load_bytes(w + r * row_bytes + c / 2);
            low[r] = _mm_sub_epi8(_mm_and_si128(bytes, mask), eight);
            high[r] = _mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(bytes, 4), mask), eight);
        }
        interleave(low, panel + c * TILE_ROWS);
        interleave(high, panel + (c + 16) * TILE_ROWS);
    }
}

// to += low, high times the pair of codes at p. Written out because compilers reorder twelve of these until the
// sums no longer fit into registers.
inline void add_pair(__m256i (&to)[2], __m256i low, __m256i high, const int16_t *p) {
    __m256i pair, product, to0 = to[0], to1 = to[1];  // copies: what an instruction writes to cannot be an array's element
    __asm__("vpbroadcastd %6, %2\n\tvpmaddwd %2, %4, %3\n\tvpaddd %3, %0, %0\n\tvpmaddwd %2, %5, %3\n\tvpaddd %3, %1, %1"
            : "+x"(to0), "+x"(to1), "=&x"(pair), "=&x"(product)
            : "x"(low), "x"(high), "m"(*reinterpret_cast<const int16_t(*)[2]>(p)));
    to[0] = to0, to[1] = to1;
}

// One panel for TOKENS vectors over n columns in groups of `group`; scales (groups, 16).
template <int TOKENS>
inline void multiply_panel(const int16_t *panel, const float *scales, int64_t n, int64_t group, const Codes &x,
                           float *y, int64_t y_stride, int64_t rows, bool add) {
    __m256 sum[TOKENS][2] = {};
    for (int64_t c = 0; c < n; scales += TILE_ROWS) {
        const int64_t end = c + group < n ? c + group : n;
        __m256i dot[TOKENS][2] = {};
        for (; c < end; c += 2) {
            const __m256i low = load16(panel + c * TILE_ROWS), high = load16(panel + c * TILE_ROWS + 16);
            unrolled<TOKENS>([&](auto t) { add_pair(dot[t], low, high, x.codes + t * x.stride + c); });
        }
        const __m256 scale[2] = {_mm256_loadu_ps(scales), _mm256_loadu_ps(scales + 8)};
        unrolled<TOKENS>([&](auto t) {
            sum[t][0] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[t][0]), scale[0], sum[t][0]);
            sum[t][1] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot[t][1]), scale[1], sum[t][1]);
        });
    }
    unrolled<TOKENS>([&](auto t) {
        float *to = y + t * y_stride;
        alignas(32) float out[TILE_ROWS] = {};
        if (add) __builtin_memcpy(out, to, 4 * rows);
        const __m256 scale = _mm256_set1_ps(x.scales[t]);
        _mm256_store_ps(out, _mm256_fmadd_ps(sum[t][0], scale, _mm256_load_ps(out)));
        _mm256_store_ps(out + 8, _mm256_fmadd_ps(sum[t][1], scale, _mm256_load_ps(out + 8)));
        __builtin_memcpy(to, out, 4 * rows);
    });
}

// Rows begin .. end - 1 for all vectors.
void multiply_many(const oxl::Weight &w, int64_t begin, int64_t end, const Codes &x, int64_t batch, float *y,
                   int64_t y_stride) {
    alignas(64) int16_t panels[PANELS * TILE_ROWS * SECTION];
    alignas(64) float scales[PANELS * TILE_ROWS * (SECTION / 32)];
    const int64_t width = oxl::round_up(padded_columns(w), 2), group = w.kind == oxl::WEIGHT_INT4 ? w.group : SECTION;
    for (int64_t row = begin; row < end; row += PANELS * TILE_ROWS)
        for (int64_t first = 0; first < width; first += SECTION) {
            const int64_t n = width - first < SECTION ? width - first : SECTION, groups = (n + group - 1) / group;
            const int64_t count = (end - row < PANELS * TILE_ROWS ? end - row : PANELS * TILE_ROWS);
            for (int64_t p = 0; p * TILE_ROWS < count; ++p) {
                const int64_t r = row + p * TILE_ROWS, rows = end - r < TILE_ROWS ? end - r : TILE_ROWS;
                int16_t *panel = panels + p * TILE_ROWS * SECTION;
                float *scale = scales + p * TILE_ROWS * (SECTION / 32);
                if (w.kind == oxl::WEIGHT_INT8) {
                    const int64_t left = w.columns - first < n ? w.columns - first : n;
                    expand_int8(static_cast<const int8_t *>(w.data) + r * w.columns + first, w.columns, rows, left, panel);
                } else {
                    expand_int4(static_cast<const uint8_t *>(w.data) + (r * width + first) / 2, width / 2, rows, n, panel);
                }
                for (int64_t g = 0; g < groups; ++g)
                    for (int64_t k = 0; k < TILE_ROWS; ++k) {
                        float value = 0.0f;
                        if (k < rows && w.kind == oxl::WEIGHT_INT8)
                            value = static_cast<const float *>(w.scales)[r + k];
                        else if (k < rows)
                            value = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(static_cast<int>(
                                static_cast<uint32_t>(static_cast<const uint16_t *>(
                                    w.scales)[(r + k) * (width / group) + first / group + g]) << 16))));
                        scale[g * TILE_ROWS + k] = value;
                    }
            }
            for (int64_t t = 0; t < batch;) {
                const int tokens = batch - t >= 6 ? 6 : batch - t >= 2 ? 2 : 1;
                const Codes part = {x.codes + t * x.stride + first, x.scales + t, x.stride};
                for (int64_t p = 0; p * TILE_ROWS < count; ++p) {
                    const int64_t rows = count - p * TILE_ROWS < TILE_ROWS ? count - p * TILE_ROWS : TILE_ROWS;
                    const int16_t *panel = panels + p * TILE_ROWS * SECTION;
                    const float *scale = scales + p * TILE_ROWS * (SECTION / 32);
                    float *to = y + t * y_stride + row + p * TILE_ROWS;
                    const auto run = tokens == 6 ? multiply_panel<6> : tokens == 2 ? multiply_panel<2> : multiply_panel<1>;
                    run(panel, scale, n, group, part, to, y_stride, rows, first > 0);
                }
                t += tokens;
            }
        }
}

#else

void multiply_many(const oxl::Weight &w, int64_t begin, int64_t end, const Codes &x, int64_t batch, float *y,
                   int64_t y_stride) {
    multiply_codes(w, begin, end, x, batch, y, y_stride);
}

#endif

inline bool many(const oxl::QuantizedProduct &a) { return a.batch > 8; }

// Rounds the activations of vectors_per_task vectors.
void quantize_activations(const oxl::QuantizedProduct &a, int64_t task, float *scratch) {
#if defined(__AVX512VNNI__)
    if (by_bytes(a)) return encode_bytes(a, task, scratch);
#endif
    const int64_t begin = task * a.vectors_per_task, end = begin + a.vectors_per_task;
    for (int64_t b = begin; b < end && b < a.batch; ++b) {
        const float *x = activations(a, b, scratch);
        const ActivationScale found = activation_scale(x, a.weight.columns, a.limit);
        a.scales[b] = found.scale;
        const int32_t kind = many(a) ? oxl::WEIGHT_INT8 : a.weight.kind;  // multiply_many takes them in plain order
        encode(kind, x, a.weight.columns, found.factor, a.codes + b * a.stride);
    }
}

// Rows of the matrix, for all vectors.
void quantized_product(const oxl::QuantizedProduct &a, int64_t task, float *scratch) {
    const int64_t begin = task * a.rows_per_task, next = begin + a.rows_per_task;
    const int64_t end = next < a.weight.rows ? next : a.weight.rows, rows = end - begin;
#if defined(__AVX512VNNI__)
    if (by_bytes(a)) return multiply_many_bytes(a, begin, end, scratch);
#endif
    const Codes x = {a.codes, a.scales, a.stride};
    const auto multiply = many(a) ? multiply_many : multiply_codes;
    if (!a.bfloat16) return multiply(a.weight, begin, end, x, a.batch, static_cast<float *>(a.y), a.weight.rows);
    multiply(a.weight, begin, end, x, a.batch, scratch - begin, rows);
    for (int64_t b = 0; b < a.batch; ++b)
        for (int64_t r = 0; r < rows; r += W)
            store(static_cast<bf16 *>(a.y) + b * a.weight.rows + begin + r, load(scratch + b * rows + r, rows - r), rows - r);
}

// How both want to be cut, and floats of working space of their tasks.
void quantized_plan(oxl::QuantizedProduct &a, int threads) {
    const int64_t columns = a.weight.columns, share = (a.weight.rows + 8 * threads - 1) / (8 * threads);
    a.vector_scratch = a.bfloat16 ? columns : 0;
    if (by_bytes(a)) {
        a.stride = oxl::round_up(columns, 64);
        a.code_bytes = oxl::round_up(a.batch, BYTE_TOKENS) * a.stride;
        a.vectors_per_task = BYTE_TOKENS;
        a.rows_per_task = oxl::round_up(share, BYTE_ROWS);
        a.row_scratch = a.stride * BYTE_ROWS / 4;
    } else {
        a.stride = oxl::code_stride(columns);
        a.code_bytes = 2 * a.batch * a.stride;
        a.vectors_per_task = many(a) ? 8 : a.batch;
        a.rows_per_task = oxl::round_up(share, many(a) ? 64 : 8);
        a.row_scratch = a.bfloat16 ? a.rows_per_task * a.batch : 0;
    }
}

}  // namespace
