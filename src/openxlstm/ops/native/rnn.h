// Recurrent networks over time, forward and backward: a task runs all positions of some rows of one head, so the
// recurrent matrix of that head stays in the cache and no two tasks ever wait for each other.
//
// The matrix is packed in tiles of two vectors of outputs; a tile meets four rows (eight with AVX-512) at a time in
// registers. Every output is one sum in the order of the inputs, whatever the number of rows.
// Equations and buffers: openxlstm.ops.rnn.cells and openxlstm.ops.rnn.scan_cells.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace {

constexpr int64_t TILE = 2 * W;
constexpr int BLOCK = W == 16 ? 8 : 4;

// Packed form of a matrix (rows = inputs, columns = outputs): tiles of TILE columns, each (rows, TILE), zero filled.
void pack(const float *matrix, int64_t rows, int64_t columns, bool transpose, float *packed) {
    for (int64_t tile = 0; tile < columns; tile += TILE)
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t e = 0; e < TILE; ++e) {
                const int64_t column = tile + e;
                *packed++ = column >= columns ? 0.0f
                                              : transpose ? matrix[column * rows + r] : matrix[r * columns + column];
            }
}

template <int ROWS>
inline void multiply_tile(const float *const *x, const float *tile, int64_t inputs, float *out, int64_t stride) {
    vf left[ROWS] = {}, right[ROWS] = {};
    for (int64_t k = 0; k < inputs; ++k, tile += TILE) {
        const vf a = load(tile), b = load(tile + W);
        for (int r = 0; r < ROWS; ++r) {
            const vf value = splat(x[r][k]);
            left[r] = value * a + left[r];
            right[r] = value * b + right[r];
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        store(out + r * stride, left[r]);
        store(out + r * stride + W, right[r]);
    }
}

// out (rows, stride) = x (rows of pointers to `inputs` values) times a packed matrix of `outputs` columns
void multiply(const float *const *x, int64_t rows, const float *packed, int64_t inputs, int64_t outputs, float *out,
              int64_t stride) {
    for (int64_t column = 0; column < outputs; column += TILE, packed += inputs * TILE) {
        int64_t r = 0;
        for (; r + BLOCK <= rows; r += BLOCK) multiply_tile<BLOCK>(x + r, packed, inputs, out + r * stride + column, stride);
        if (BLOCK == 8 && r + 4 <= rows) {
            multiply_tile<4>(x + r, packed, inputs, out + r * stride + column, stride);
            r += 4;
        }
        for (; r + 2 <= rows; r += 2) multiply_tile<2>(x + r, packed, inputs, out + r * stride + column, stride);
        if (r < rows) multiply_tile<1>(x + r, packed, inputs, out + r * stride + column, stride);
    }
}

// What one task works on, and where its things are.
struct Rows {
    const oxl::Rnn &a;
    int64_t head, first, rows, d, inner;  // inner = distance between the slots of memory and factors

    Rows(const oxl::Rnn &args, int64_t task) : a(args) {
        head = task / a.row_groups;
        first = task % a.row_groups * a.rows_per_task;
        rows = a.batch - first < a.rows_per_task ? a.batch - first : a.rows_per_task;
        d = a.d;
        inner = a.heads * a.batch * d;
    }
    float *hs(int64_t t, int64_t r) const { return a.hs + head * a.hs_h + t * a.hs_t + (first + r) * d; }
    float *gates(float *base, int64_t t, int64_t r) const {
        return base + head * a.gates_h + t * a.gates_t + (first + r) * oxl::bias_gates(a.cell) * d;
    }
    int64_t at(int64_t r) const { return (head * a.batch + first + r) * d; }  // in (H, B, D)
    float *memory(int64_t t, int64_t r) const { return a.memory + t * a.memory_t + at(r); }
    float *factors(int64_t t, int64_t r) const { return a.factors + t * a.factors_t + at(r); }
    bool starts(int64_t t, int64_t r) const { return a.reset && a.reset[(first + r) * a.time + t]; }
    int64_t output(int64_t t, int64_t r) const { return (((first + r) * a.time + t) * a.heads + head) * d; }
};

inline void copy(float *to, const float *from, int64_t n) { __builtin_memcpy(to, from, sizeof(float) * n); }
inline void clear(float *to, int64_t n) { __builtin_memset(to, 0, sizeof(float) * n); }

#include "rnn_cells.h"

template <int CELL>
void forward_rows(const Rows &w, float *scratch) {
    const oxl::Rnn &a = w.a;
    const int64_t d = w.d, outputs = oxl::recurrent_gates(CELL) * d, stride = oxl::round_up(outputs, TILE);
    float *pre = scratch, *m = pre + w.rows * stride, *zero = m + oxl::round_up(w.rows * d, 16);
    const float **before = reinterpret_cast<const float **>(zero + oxl::round_up(d, 16));
    const float *packed = a.packed + w.head * stride * d;
    clear(zero, d);
    for (int64_t r = 0; r < w.rows; ++r) {
        copy(w.hs(0, r), a.state + w.at(r), d);
        if (CELL == oxl::LSTM || CELL == oxl::SLSTM) copy(w.memory(0, r), a.state + w.inner + w.at(r), d);
        if (CELL == oxl::SLSTM) {
            copy(w.memory(0, r) + w.inner, a.state + 2 * w.inner + w.at(r), d);
            copy(m + r * d, a.state + 3 * w.inner + w.at(r), d);
        }
    }
    for (int64_t t = 0; t < a.time; ++t) {
        for (int64_t r = 0; r < w.rows; ++r) before[r] = w.starts(t, r) ? zero : w.hs(t, r);
        multiply(before, w.rows, packed, d, outputs, pre, stride);
        for (int64_t r = 0; r < w.rows; ++r) {
            forward_cell<CELL>(w, t, r, pre + r * stride, before[r], m + r * d);
            copy(a.h + w.output(t, r), w.hs(t + 1, r), d);
        }
    }
    for (int64_t r = 0; r < w.rows; ++r) {
        copy(a.last + w.at(r), w.hs(a.time, r), d);
        if (CELL == oxl::LSTM || CELL == oxl::SLSTM) copy(a.last + w.inner + w.at(r), w.memory(a.time, r), d);
        if (CELL == oxl::SLSTM) {
            copy(a.last + 2 * w.inner + w.at(r), w.memory(a.time, r) + w.inner, d);
            copy(a.last + 3 * w.inner + w.at(r), m + r * d, d);
        }
    }
}

template <int CELL>
void backward_rows(const Rows &w, float *scratch) {
    const oxl::Rnn &a = w.a;
    const int64_t d = w.d, inputs = oxl::recurrent_gates(CELL) * d, stride = oxl::round_up(d, TILE);
    constexpr int STATES = CELL == oxl::SLSTM ? 4 : CELL == oxl::LSTM ? 2 : 1;
    float *through = scratch, *carry = through + w.rows * stride, *zero = carry + oxl::round_up(STATES * w.rows * d, 16);
    const float **after = reinterpret_cast<const float **>(zero + oxl::round_up(inputs, 16));
    const float *packed = a.packed + w.head * stride * inputs;
    clear(zero, inputs);
    clear(through, w.rows * stride);
    clear(carry, STATES * w.rows * d);
    // carry: per row the gradient that reaches h directly and those of the rest of the state
    if (a.d_last)
        for (int64_t r = 0; r < w.rows; ++r)
            for (int s = 0; s < STATES; ++s) copy(carry + (r * STATES + s) * d, a.d_last + s * w.inner + w.at(r), d);
    for (int64_t t = a.time; t-- > 0;) {
        for (int64_t r = 0; r < w.rows; ++r) {
            const bool starts = w.starts(t, r);
            backward_cell<CELL>(w, t, r, starts, through + r * stride, carry + r * STATES * d);
            if (starts) clear(carry + r * STATES * d, STATES * d);
            after[r] = starts ? zero : w.gates(a.d_gates, t, r);
        }
        multiply(after, w.rows, packed, inputs, d, through, stride);
    }
    for (int64_t r = 0; r < w.rows; ++r) {
        const float *own = carry + r * STATES * d;
        for (int64_t e = 0; e < d; ++e) a.d_state[w.at(r) + e] = own[e] + through[r * stride + e];
        for (int s = 1; s < STATES; ++s) copy(a.d_state + s * w.inner + w.at(r), own + s * d, d);
        if (CELL == oxl::SLSTM && !a.follow_m)  // by Euler's theorem, see scan_cells
            for (int64_t e = 0; e < d; ++e)
                a.d_state[3 * w.inner + w.at(r) + e] =
                    own[d + e] * w.memory(0, r)[e] + own[2 * d + e] * w.memory(0, r)[w.inner + e];
    }
}

void rnn_forward(const oxl::Rnn &a, int64_t task, float *scratch) {
    const Rows w(a, task);
    switch (a.cell) {
        case oxl::SLSTM: return forward_rows<oxl::SLSTM>(w, scratch);
        case oxl::LSTM: return forward_rows<oxl::LSTM>(w, scratch);
        case oxl::GRU: return forward_rows<oxl::GRU>(w, scratch);
        default: return forward_rows<oxl::ELMAN>(w, scratch);
    }
}

void rnn_backward(const oxl::Rnn &a, int64_t task, float *scratch) {
    const Rows w(a, task);
    switch (a.cell) {
        case oxl::SLSTM: return backward_rows<oxl::SLSTM>(w, scratch);
        case oxl::LSTM: return backward_rows<oxl::LSTM>(w, scratch);
        case oxl::GRU: return backward_rows<oxl::GRU>(w, scratch);
        default: return backward_rows<oxl::ELMAN>(w, scratch);
    }
}

}  // namespace
