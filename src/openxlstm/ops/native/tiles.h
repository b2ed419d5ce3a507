// Register tiles: the inner loop of matrix products.
//
// A tile is ROWS x COLUMNS numbers of a product that stay in registers while it is summed. Operand A is read one
// number at a time, so it may lie in rows or in columns; operand B is read in panels, COLUMNS numbers of one row
// side by side (see pack_panels), so that the loop reads memory in order. Callers pad both to whole tiles with zeros.
#pragma once

#include "vector.h"

#define OXL_INLINE inline __attribute__((always_inline))
// Keeps the registers of one phase's inner loops from being taken by another's.
#define OXL_PHASE __attribute__((noinline))

namespace {

// As many sums as there are registers for, beside one row of B and one number of A.
#if OXL_WIDTH == 16
constexpr int ROWS = 12, VECTORS = 2;
#elif defined(__aarch64__)
constexpr int ROWS = 6, VECTORS = 4;
#else
constexpr int ROWS = 6, VECTORS = 2;
#endif
constexpr int64_t COLUMNS = VECTORS * W;

inline int64_t whole_rows(int64_t n) { return (n + ROWS - 1) / ROWS * ROWS; }
inline int64_t whole_columns(int64_t n) { return (n + COLUMNS - 1) / COLUMNS * COLUMNS; }

struct Tile {
    vf at[ROWS][VECTORS];

    OXL_INLINE void clear() {
        for (int r = 0; r < ROWS; ++r)
            for (int c = 0; c < VECTORS; ++c) at[r][c] = vf{};
    }
    // rows of `stride` floats, each times one factor
    OXL_INLINE void read(const float *from, int64_t stride, float factor) {
        __asm__ volatile("" : "+m"(factor));  // or it occupies a register in the loop of multiply()
        for (int r = 0; r < ROWS; ++r)
            for (int c = 0; c < VECTORS; ++c) at[r][c] = load(from + r * stride + c * W) * factor;
    }
    OXL_INLINE void write(float *to, int64_t stride) const {
        for (int r = 0; r < ROWS; ++r)
            for (int c = 0; c < VECTORS; ++c) store(to + r * stride + c * W, at[r][c]);
    }
    OXL_INLINE void scale_rows(const float *factors) {
        for (int r = 0; r < ROWS; ++r)
            for (int c = 0; c < VECTORS; ++c) at[r][c] *= factors[r];
    }
    OXL_INLINE void scale_columns(const float *factors) {
        for (int c = 0; c < VECTORS; ++c) {
            const vf factor = load(factors + c * W);
            for (int r = 0; r < ROWS; ++r) at[r][c] *= factor;
        }
    }
    // += A B over `count` inner positions. A's number of row r at position k is a[r * row_step + k * step]; B's row at
    // position k is COLUMNS numbers from b + k * b_step. Pass step or row_step as the constant 1.
    OXL_INLINE void multiply(const float *a, int64_t row_step, int64_t step, const float *b, int64_t b_step,
                             int64_t count) {
        for (int64_t k = 0; k < count; ++k, a += step, b += b_step) {
            vf row[VECTORS];
            for (int c = 0; c < VECTORS; ++c) row[c] = load(b + c * W);
            for (int r = 0; r < ROWS; ++r) {
                const vf value = splat(a[r * row_step]);
                for (int c = 0; c < VECTORS; ++c) at[r][c] = value * row[c] + at[r][c];
            }
        }
    }
};

// Panels of a matrix of `rows` rows of `stride` floats: [column / COLUMNS][row][column % COLUMNS], zero filled.
// Each row is multiplied by its factor, if there are factors. Panels lie `panel` floats apart.
inline void pack_panels(const float *from, int64_t rows, int64_t columns, int64_t stride, const float *factors,
                        float *to, int64_t panel) {
    for (int64_t first = 0; first < columns; first += COLUMNS, to += panel)
        for (int64_t r = 0; r < rows; ++r) {
            const float factor = factors ? factors[r] : 1.0f;
            const float *source = from + r * stride + first;
            float *target = to + r * COLUMNS;
            if (first + COLUMNS <= columns)
                for (int64_t e = 0; e < COLUMNS; e += W) store(target + e, load(source + e) * factor);
            else
                for (int64_t e = 0; e < COLUMNS; ++e) target[e] = first + e < columns ? source[e] * factor : 0.0f;
        }
}

// Panels of the transpose: [row / COLUMNS][column][row % COLUMNS], zero filled.
inline void pack_transposed(const float *from, int64_t rows, int64_t columns, int64_t stride, float *to,
                            int64_t panel) {
    for (int64_t first = 0; first < rows; first += COLUMNS, to += panel) {
        const int64_t there = rows - first < COLUMNS ? rows - first : COLUMNS;
        const float *source = from + first * stride;
        for (int64_t c = 0; c < columns; ++c) {
            float *target = to + c * COLUMNS;
            for (int64_t e = 0; e < there; ++e) target[e] = source[e * stride + c];
            for (int64_t e = there; e < COLUMNS; ++e) target[e] = 0.0f;
        }
    }
}

}  // namespace
