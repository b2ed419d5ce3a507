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
#include "quantized_products.h"
#include "vector.h"

namespace {

// One pass over ROWS rows of the matrix for BATCH vectors. `ahead` elements further on lies what comes next: asking
// for it early keeps memory busy while sums finish and rows change.
template <int ROWS, int BATCH, class T>
inline void multiply_block(const T *w, int64_t columns, int64_t ahead, const float *x, int64_t x_stride, float *y,
                           int64_t y_stride) {
    vf total[ROWS][BATCH] = {};
    int64_t c = 0;
    constexpr int64_t LINE = 64 / sizeof(T);
    for (; c + LINE <= columns; c += LINE) {
        for (int r = 0; r < ROWS; ++r) __builtin_prefetch(w + r * columns + c + ahead);
        for (int64_t e = c; e < c + LINE; e += W)
            for (int r = 0; r < ROWS; ++r) {
                const vf value = load(w + r * columns + e);
                for (int b = 0; b < BATCH; ++b) total[r][b] = value * load(x + b * x_stride + e) + total[r][b];
            }
    }
    for (; c < columns; c += W)
        for (int r = 0; r < ROWS; ++r) {
            const vf value = load(w + r * columns + c, columns - c);
            for (int b = 0; b < BATCH; ++b)
                total[r][b] = value * load(x + b * x_stride + c, columns - c) + total[r][b];
        }
    for (int r = 0; r < ROWS; ++r)
        for (int b = 0; b < BATCH; ++b) y[b * y_stride + r] = sum(total[r][b]);
}

template <int ROWS, class T>
inline void multiply_batch(const T *w, int64_t columns, const float *x, int64_t x_stride, int64_t batch, float *y,
                           int64_t y_stride) {
    const int64_t ahead = ROWS * columns;
    int64_t b = 0;
    for (; b + 4 <= batch; b += 4)
        multiply_block<ROWS, 4>(w, columns, ahead, x + b * x_stride, x_stride, y + b * y_stride, y_stride);
    for (; b + 2 <= batch; b += 2)
        multiply_block<ROWS, 2>(w, columns, ahead, x + b * x_stride, x_stride, y + b * y_stride, y_stride);
    if (b < batch) multiply_block<ROWS, 1>(w, columns, ahead, x + b * x_stride, x_stride, y + b * y_stride, y_stride);
}

template <class T>
void multiply_dense(const T *w, int64_t columns, int64_t row, int64_t row_end, const float *x, int64_t x_stride,
                    int64_t batch, float *y, int64_t y_stride) {
    constexpr int MANY = W == 16 ? 4 : 2;  // with a batch: as many sums as there are registers for
    w += row * columns;
    if (batch == 1)
        for (; row + 8 <= row_end; row += 8, w += 8 * columns)
            multiply_block<8, 1>(w, columns, 8 * columns, x, x_stride, y + row, y_stride);
    for (; row + MANY <= row_end; row += MANY, w += MANY * columns)
        multiply_batch<MANY>(w, columns, x, x_stride, batch, y + row, y_stride);
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
