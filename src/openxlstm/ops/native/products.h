// Products of a weight matrix with a few vectors, the work of decoding: every weight is read once from memory and
// meets all rows of the batch while it is in registers or in the first-level cache.
//
//     y[b][r] = sum_c w[r][c] x[b][c]
//
// Each sum runs in one order, fixed by the matrix alone: bits of a row of the batch depend neither on the other rows
// nor on how the rows of the matrix are shared among threads.
#pragma once

#include "bfloat16.h"
#include "kernels.h"
#include "prefetch.h"
#include "quantized_products.h"
#include "vector.h"

namespace {

// Weights of two vectors of columns, and the numbers that they meet.
inline void weights(const float *p, vf (&v)[2]) { v[0] = load(p), v[1] = load(p + W); }
inline void weights(const bf16 *p, vf (&v)[2]) { widened(p, v); }
template <class T>
inline void inputs(const float *p, vf (&v)[2]) {
    if (sizeof(T) == sizeof(bf16)) return sorted_alike(p, v);
    v[0] = load(p), v[1] = load(p + W);
}

// total[r][b] += two vectors of columns
template <int ROWS, int BATCH, class T>
inline void multiply_columns(const T *w, int64_t w_stride, const float *x, int64_t x_stride, vf (&total)[ROWS][BATCH][2]) {
    vf value[ROWS][2], input[2];
    for (int r = 0; r < ROWS; ++r) weights(w + r * w_stride, value[r]);
    for (int b = 0; b < BATCH; ++b) {
        inputs<T>(x + b * x_stride, input);
        for (int r = 0; r < ROWS; ++r)
            for (int n = 0; n < 2; ++n) total[r][b][n] = value[r][n] * input[n] + total[r][b][n];
    }
}

// One pass over ROWS rows of the matrix for BATCH vectors.
template <int ROWS, int BATCH, class T>
inline void multiply_block(const T *w, int64_t columns, const float *x, int64_t x_stride, float *y, int64_t y_stride) {
    constexpr int64_t STEP = 2 * W, LINE = LINE_BYTES / sizeof(T), PART = LINE > STEP ? LINE : STEP;
    vf total[ROWS][BATCH][2] = {};
    int64_t c = 0;
    for (; c + PART <= columns; c += PART) {
        for (int r = 0; r < ROWS; ++r)
            for (int64_t e = c; e < c + PART; e += LINE) prefetch(w + r * columns + e + WEIGHTS_AHEAD<BATCH> / sizeof(T));
        for (int64_t e = c; e < c + PART; e += STEP) multiply_columns(w + e, columns, x + e, x_stride, total);
    }
    for (; c + STEP <= columns; c += STEP) multiply_columns(w + c, columns, x + c, x_stride, total);
    if (c < columns) {
        const int64_t left = columns - c;
        T last[ROWS * STEP] = {};
        float input[BATCH * STEP] = {};
        for (int r = 0; r < ROWS; ++r) __builtin_memcpy(last + r * STEP, w + r * columns + c, left * sizeof(T));
        for (int b = 0; b < BATCH; ++b) __builtin_memcpy(input + b * STEP, x + b * x_stride + c, left * sizeof(float));
        multiply_columns(last, STEP, input, STEP, total);
    }
    for (int r = 0; r < ROWS; ++r)
        for (int b = 0; b < BATCH; ++b) y[b * y_stride + r] = sum(total[r][b][0] + total[r][b][1]);
}

template <int ROWS, class T>
inline void multiply_batch(const T *w, int64_t columns, const float *x, int64_t x_stride, int64_t batch, float *y,
                           int64_t y_stride) {
    constexpr int MANY = W == 16 ? 8 : 2;  // as many sums as there are registers for
    int64_t b = 0;
    for (; b + MANY <= batch; b += MANY)
        multiply_block<ROWS, MANY>(w, columns, x + b * x_stride, x_stride, y + b * y_stride, y_stride);
    for (; W == 16 && b + 2 <= batch; b += 2)
        multiply_block<ROWS, 2>(w, columns, x + b * x_stride, x_stride, y + b * y_stride, y_stride);
    for (; b < batch; ++b)
        multiply_block<ROWS, 1>(w, columns, x + b * x_stride, x_stride, y + b * y_stride, y_stride);
}

template <class T>
void multiply_dense(const T *w, int64_t columns, int64_t row, int64_t row_end, const float *x, int64_t x_stride,
                    int64_t batch, float *y, int64_t y_stride) {
    w += row * columns;
    if (batch > 1 && W < 16)  // wide registers hold a whole batch's sums for one row
        for (; row + 2 <= row_end; row += 2, w += 2 * columns)
            multiply_batch<2>(w, columns, x, x_stride, batch, y + row, y_stride);
    for (; row < row_end; ++row, w += columns) multiply_batch<1>(w, columns, x, x_stride, batch, y + row, y_stride);
}

// Rows row_begin .. row_end - 1 of y = x w^T for every row of the batch; y is indexed by the row of the matrix.
void multiply_rows(const oxl::Weight &w, int64_t row_begin, int64_t row_end, const float *x, int64_t x_stride,
                   int64_t batch, float *y, int64_t y_stride) {
    switch (w.kind) {
        case oxl::WEIGHT_INT8:
        case oxl::WEIGHT_INT4:
            return multiply_quantized(w, row_begin, row_end, x, x_stride, batch, y, y_stride);
        case oxl::WEIGHT_BF16:
            return multiply_dense(static_cast<const bf16 *>(w.data), w.columns, row_begin, row_end, x, x_stride, batch,
                                  y, y_stride);
        default:
            return multiply_dense(static_cast<const float *>(w.data), w.columns, row_begin, row_end, x, x_stride,
                                  batch, y, y_stride);
    }
}

void product(const oxl::Product &a, int64_t task, float *) {
    const int64_t begin = task * a.rows_per_task, end = begin + a.rows_per_task;
    multiply_rows(a.weight, begin, end < a.weight.rows ? end : a.weight.rows, a.x, a.x_stride, a.batch, a.y, a.y_stride);
}

}  // namespace
