// Products of large float32 matrices.
//
// A task computes a block of the result. It goes through the dimension summed over in blocks short enough that a panel of
// B stays in the first-level cache while all rows of A, in the second-level cache, meet it. Every number is the sum of
// these blocks in order, so its bits depend neither on the number of threads nor on how many rows and columns there are.
#pragma once

#include "kernels.h"
#include "tiles.h"

namespace {

constexpr int64_t DEPTH = 384;       // of a block
constexpr int64_t ROWS_AT_ONCE = 384;
constexpr int64_t APART = DEPTH + 16;  // floats between rows of A's block: no power of two, whose rows share cache sets

inline int64_t block_stride(const oxl::MatrixProduct &a) { return a.a_k == 1 ? APART : a.rows_per_task + 16; }

void matrix_product_plan(oxl::MatrixProduct &a, int threads) {
    const int64_t blocks = (a.m + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, panels = (a.n + COLUMNS - 1) / COLUMNS;
    a.rows_per_task = whole_rows((a.m + blocks - 1) / blocks);
    const int64_t wanted = (4 * threads + blocks - 1) / blocks, parts = wanted < panels ? wanted : panels;
    a.columns_per_task = (panels + parts - 1) / parts * COLUMNS;
    a.scratch = (a.a_k == 1 ? a.rows_per_task * APART : DEPTH * block_stride(a)) + DEPTH * COLUMNS;
}

struct MatrixBlock {
    const oxl::MatrixProduct &a;
    int64_t row, rows, column, columns, stride;
    float *left, *panel;

    MatrixBlock(const oxl::MatrixProduct &args, int64_t task, float *scratch) : a(args), stride(block_stride(args)) {
        const int64_t across = (a.n + a.columns_per_task - 1) / a.columns_per_task;
        row = task / across * a.rows_per_task, column = task % across * a.columns_per_task;
        rows = a.m - row < a.rows_per_task ? a.m - row : a.rows_per_task;
        columns = a.n - column < a.columns_per_task ? a.n - column : a.columns_per_task;
        panel = scratch, left = scratch + DEPTH * COLUMNS;
    }

    // The block of A from `first` on; rows that are missing from the last tile are zeros.
    OXL_PHASE void load_left(int64_t first, int64_t depth) const {
        const float *from = a.a + row * a.a_m + first * a.a_k;
        const bool in_rows = a.a_k == 1;
        const int64_t lines = in_rows ? rows : depth, length = in_rows ? depth : rows;
        for (int64_t line = 0; line < lines; ++line) {
            float *to = left + line * stride;
            __builtin_memcpy(to, from + line * (in_rows ? a.a_m : a.a_k), sizeof(float) * length);
            if (!in_rows) __builtin_memset(to + rows, 0, sizeof(float) * (whole_rows(rows) - rows));
        }
        if (in_rows) __builtin_memset(left + rows * stride, 0, sizeof(float) * (whole_rows(rows) - rows) * stride);
    }

    // COLUMNS columns of B from column `at` on, `first` to `first + depth`.
    OXL_PHASE void load_panel(int64_t at, int64_t first, int64_t depth) const {
        const float *from = a.b + at * a.b_n + first * a.b_k;
        const int64_t left_over = a.n - at;
        if (a.b_n == 1) {
            for (int64_t k = 0; k < depth; ++k, from += a.b_k)
                for (int64_t c = 0; c < COLUMNS; c += W) store(panel + k * COLUMNS + c, load(from + c, left_over - c));
            return;
        }
        for (int64_t c = 0; c < COLUMNS; c += W)
            for (int64_t k = 0; k < depth; k += W) block_of_panel(from + c * a.b_n + k, left_over - c, depth - k, panel + k * COLUMNS + c);
    }

    // W columns of B, which lie in rows there, W long or to the end.
    OXL_INLINE void block_of_panel(const float *from, int64_t count, int64_t length, float *to) const {
        if (length >= W) return transpose(from, a.b_n, count, W, to, COLUMNS);
        float ends[W * W];
        for (int64_t r = 0; r < W; ++r) store(ends + r * W, r < count ? load(from + r * a.b_n, length) : vf{});
        transpose(ends, W, count, length, to, COLUMNS);
    }

    template <bool IN_ROWS>
    OXL_PHASE void multiply_panel(int64_t at, int64_t first, int64_t depth) const {
        const int64_t left_over = a.n - at;
        for (int64_t r = 0; r < rows; r += ROWS) {
            float *to = a.c + (row + r) * a.n + at;
            const int64_t here = rows - r < ROWS ? rows - r : ROWS;
            if (first > 0)
                for (int64_t n = 0; n < here; ++n)
                    for (int64_t c = 0; c < COLUMNS && c < left_over; c += 16) __builtin_prefetch(to + n * a.n + c, 1);
            Tile tile;
            tile.clear();
            if constexpr (IN_ROWS)
                tile.multiply(left + r * stride, stride, 1, panel, COLUMNS, depth);
            else
                tile.multiply(left + r, 1, stride, panel, COLUMNS, depth);
            for (int n = 0; n < ROWS; ++n) {
                if (n >= here) break;
                for (int c = 0; c < VECTORS; ++c) {
                    const int64_t there = left_over - c * W;
                    if (there <= 0) break;
                    const vf before = first > 0 ? load(to + n * a.n + c * W, there) : a.bias ? load(a.bias + at + c * W, there) : vf{};
                    store(to + n * a.n + c * W, before + tile.at[n][c], there);
                }
            }
        }
    }

    void run() const {
        for (int64_t first = 0; first < a.k; first += DEPTH) {
            const int64_t depth = a.k - first < DEPTH ? a.k - first : DEPTH;
            load_left(first, depth);
            for (int64_t at = column; at < column + columns; at += COLUMNS) {
                load_panel(at, first, depth);
                if (a.a_k == 1)
                    multiply_panel<true>(at, first, depth);
                else
                    multiply_panel<false>(at, first, depth);
            }
        }
    }
};

void matrix_product(const oxl::MatrixProduct &a, int64_t task, float *scratch) { MatrixBlock(a, task, scratch).run(); }

}  // namespace
