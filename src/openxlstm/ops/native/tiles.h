// Register tiles: the inner loop of matrix products.
//
// A tile is ROWS x COLUMNS numbers of a product that stay in registers while it is summed. Operand A is read one
// number at a time, so it may lie in rows or in columns; operand B is read in panels, COLUMNS numbers of one row
// side by side (see pack_panels), so that the loop reads memory in order. Callers pad both to whole tiles with zeros.
//
// Operands are made of units of 32 bits: one float or, where the processor multiplies bfloat16 numbers, a pair of those
// that are neighbours along the dimension summed over. Such a matrix has two forms. In rows, pairs are neighbours of a
// row; stacked, a pair is a number and the one below it. Of floats the two forms are the same.
#pragma once

#include "bfloat16.h"

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

// Numbers in one unit of an operand, and units that hold n numbers.
template <class Unit>
constexpr int64_t NUMBERS = 1;
template <class Unit>
constexpr int64_t units(int64_t n) {
    return (n + NUMBERS<Unit> - 1) / NUMBERS<Unit>;
}

// Unit times unit, summed. Vectors of pairs are carried as vf.
template <class Unit>
OXL_INLINE vf multiplied(vf a, vf b, vf total) {
    return a * b + total;
}
OXL_INLINE vf everywhere(const float *unit) { return splat(*unit); }
OXL_INLINE vf units_at(const float *p) { return load(p); }
// Numbers of a row from column c on.
OXL_INLINE vf numbers(const float *row, int64_t c) { return load(row + c); }
// The numbers that lie on top of each other in W units.
OXL_INLINE void unstack(const float *p, vf (&rows)[1]) { rows[0] = load(p); }
OXL_INLINE void put(float *row, int64_t c, vf v) { store(row + c, v); }

#if defined(__AVX512BF16__)
#define OXL_PAIRS 1

struct Pair {
    bf16 numbers[2];
};
template <>
constexpr int64_t NUMBERS<Pair> = 2;

template <>
OXL_INLINE vf multiplied<Pair>(vf a, vf b, vf total) {
    return (vf)_mm512_dpbf16_ps((__m512)total, (__m512bh)a, (__m512bh)b);
}
OXL_INLINE vf everywhere(const Pair *unit) {
    int32_t bits;
    __builtin_memcpy(&bits, unit, sizeof bits);
    return (vf)_mm512_set1_epi32(bits);
}
OXL_INLINE vf units_at(const Pair *p) {
    vf v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
OXL_INLINE vf numbers(const Pair *row, int64_t c) { return load(row->numbers + c); }
OXL_INLINE void unstack(const Pair *p, vf (&rows)[2]) {
    const vu both = (vu)units_at(p);
    rows[0] = (vf)(both << 16), rows[1] = (vf)(both & 0xffff0000u);
}
OXL_INLINE void put(Pair *row, int64_t c, vf v) {
    const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
    __builtin_memcpy(row + c / 2, &half, sizeof half);
}
// W units of a row of numbers `above` and the row below it.
OXL_INLINE void put_stacked(Pair *to, vf above, vf below) {
    static const uint16_t ORDER[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)below, (__m512)above);
    const __m512i sorted = _mm512_permutexvar_epi16(_mm512_loadu_si512(ORDER), both);
    __builtin_memcpy(to, &sorted, sizeof sorted);
}
#endif

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
    // The same as an operand in its two forms; rows are `stride` units apart.
    OXL_INLINE void write_rows(float *to, int64_t stride) const { write(to, stride); }
    OXL_INLINE void write_stacked(float *to, int64_t stride) const { write(to, stride); }
#if defined(OXL_PAIRS)
    OXL_INLINE void write_rows(Pair *to, int64_t stride) const {
        for (int r = 0; r < ROWS; ++r)
            for (int c = 0; c < VECTORS; ++c) put(to + r * stride, c * W, at[r][c]);
    }
    OXL_INLINE void write_stacked(Pair *to, int64_t stride) const {
        for (int r = 0; r < ROWS; r += 2)
            for (int c = 0; c < VECTORS; ++c) put_stacked(to + r / 2 * stride + c * W, at[r][c], at[r + 1][c]);
    }
#endif
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
    // += A B over `count` inner units. A's unit of row r at position k is a[r * row_step + k * step]; B's row at
    // position k is COLUMNS units from b + k * b_step. Pass step or row_step as the constant 1.
    template <class Unit>
    OXL_INLINE void multiply(const Unit *a, int64_t row_step, int64_t step, const Unit *b, int64_t b_step,
                             int64_t count) {
        for (int64_t k = 0; k < count; ++k, a += step, b += b_step) {
            vf row[VECTORS];
            for (int c = 0; c < VECTORS; ++c) row[c] = units_at(b + c * W);
            for (int r = 0; r < ROWS; ++r) {
                const vf value = everywhere(a + r * row_step);
                for (int c = 0; c < VECTORS; ++c) at[r][c] = multiplied<Unit>(value, row[c], at[r][c]);
            }
        }
    }
};

// A matrix in rows to its stacked form, each row times its factor, if there are factors. `columns` is a multiple of W;
// the rows (and factors) that fill the last unit must be there.
template <class Number, class Unit>
inline void stack(const Number *from, int64_t rows, int64_t columns, int64_t stride, const float *factors, Unit *to,
                  int64_t to_stride) {
    for (int64_t r = 0; r < rows; r += NUMBERS<Unit>, to += to_stride)
        for (int64_t c = 0; c < columns; c += W) {
            vf v[NUMBERS<Unit>];
            for (int64_t n = 0; n < NUMBERS<Unit>; ++n) {
                v[n] = numbers(from + (r + n) * stride, c);
                if (factors) v[n] *= factors[r + n];
            }
            if constexpr (NUMBERS<Unit> == 1)
                store(to + c, v[0]);
            else
                put_stacked(to + c, v[0], v[1]);
        }
}

// The same cut into panels of COLUMNS, `panel` units apart.
template <class Unit>
inline void stack_panels(const Unit *from, int64_t rows, int64_t columns, int64_t stride, const float *factors, Unit *to,
                         int64_t panel) {
    for (int64_t first = 0; first < columns; first += COLUMNS, to += panel)
        stack(from + units<Unit>(first), rows, COLUMNS, stride, factors, to, COLUMNS);
}

#if OXL_WIDTH == 16
// Exchange what lies off the diagonal of blocks of 2 * HALF rows and columns.
template <int HALF>
OXL_INLINE void exchange(vf (&x)[W]) {
    vi first, second;
    for (int e = 0; e < W; ++e) {
        first[e] = e & HALF ? W + e - HALF : e;
        second[e] = e & HALF ? W + e : e + HALF;
    }
    for (int r = 0; r < W; ++r) {
        if (r & HALF) continue;
        const __m512 upper = (__m512)x[r], lower = (__m512)x[r + HALF];
        x[r] = (vf)_mm512_permutex2var_ps(upper, (__m512i)first, lower);
        x[r + HALF] = (vf)_mm512_permutex2var_ps(upper, (__m512i)second, lower);
    }
}
#endif

// to[c][r] = from[r][c] for a block of units, of which `rows` rows are there and the others read as zero. Rows must be
// readable in their whole width, but only `columns` of them are written.
template <class Unit>
inline void transpose(const Unit *from, int64_t stride, int64_t rows, int64_t columns, Unit *to, int64_t to_stride) {
#if OXL_WIDTH == 16
    vf x[W];
    for (int r = 0; r < W; ++r) x[r] = r < rows ? units_at(from + r * stride) : vf{};
    exchange<1>(x);
    exchange<2>(x);
    exchange<4>(x);
    exchange<8>(x);
    for (int c = 0; c < W; ++c)
        if (c < columns) __builtin_memcpy(to + c * to_stride, &x[c], sizeof x[c]);
#else
    for (int64_t c = 0; c < columns && c < W; ++c)
        for (int64_t r = 0; r < W; ++r) to[c * to_stride + r] = r < rows ? from[r * stride + c] : Unit{};
#endif
}

// Panels of the transpose of a matrix in rows, in units: [row / COLUMNS][column][row % COLUMNS], zero filled. Rows are
// readable to a whole block.
template <class Unit>
inline void transpose_panels(const Unit *from, int64_t rows, int64_t columns, int64_t stride, Unit *to, int64_t panel) {
    for (int64_t first = 0; first < rows; first += COLUMNS, to += panel)
        for (int64_t r = 0; r < COLUMNS; r += W)
            for (int64_t c = 0; c < columns; c += W)
                transpose(from + (first + r) * stride + c, stride, rows - first - r, columns - c, to + c * COLUMNS + r,
                          COLUMNS);
}

}  // namespace
