// What the forward and the backward pass of the chunkwise mLSTM share: one chunk's operands and its decays.
//
// Equations: openxlstm.ops.mlstm.chunkwise; scalars of the gates: mlstm_gates.h. A task is one head of one sequence. It
// walks over the chunks with the state in panels beside the core; a chunk's tiles are small enough for the second-level
// cache, and nothing is shared between tasks.
#pragma once

#include "mlstm_gates.h"

namespace {

// n numbers from one type to another.
template <class From, class To>
inline void copy(const From *from, int64_t n, To *to) {
    for (int64_t c = 0; c < n; c += W) store(to + c, load(from + c, n - c), n - c);
}

constexpr int64_t AHEAD = 4;  // rows

// Whether there is anything in a state; an empty one need not be multiplied.
inline bool occupied(const float *state, int64_t floats) {
    for (int64_t e = 0; e < floats; ++e)
        if (!(state[e] == 0.0f)) return true;
    return false;
}

// Rows that are read next, fetched a few lines at a time while the core is busy with products: more at once would stall it.
// The rows of a group are fetched side by side, because each begins in a page of its own: the processor looks up several
// pages at once, but waits for the last of them.
struct Ahead {
    static constexpr int64_t GROUP = 8;
    struct Rows {
        const char *at;
        int64_t stride, bytes, rows;
    } queue[5];
    int64_t count = 0, taken = 0, row = 0, line = 0, lines = 0, each = 0;

    void add(const char *at, int64_t stride, int64_t bytes, int64_t rows) {
        queue[count++] = {at, stride, bytes, rows};
        lines += rows * ((bytes + 63) / 64);
    }
    // How many products there are to spread the reading over.
    void spread(int64_t products) { each = lines / products + 1; }
    OXL_INLINE void fetch() {
        for (int64_t n = 0; n < each && taken < count; ++n) {
            Rows &x = queue[taken];
            const int64_t group = x.rows < GROUP ? x.rows : GROUP;
            __builtin_prefetch(x.at + row * x.stride + line, 0, 1);
            if (++row < group) continue;
            row = 0, line += 64;
            if (line < x.bytes) continue;
            line = 0, x.at += group * x.stride;
            if ((x.rows -= group) == 0) ++taken;
        }
    }
};

struct Head {
    const oxl::Mlstm &a;
    int64_t pair, batch, head;
    float scale;  // of the products of queries and keys

    Head(const oxl::Mlstm &args, int64_t which)
        : a(args), pair(which), batch(which / args.heads), head(which % args.heads),
          scale(static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(args.dk)))) {}

    int64_t length(int64_t chunk) const {
        const int64_t left = a.time - chunk * a.chunk;
        return left < a.chunk ? left : a.chunk;
    }
    // Row r of a chunk where it lies.
    template <class Number>
    const Number *row(const oxl::View &x, int64_t chunk, int64_t r) const {
        return static_cast<const Number *>(x.data) + batch * x.b + (chunk * a.chunk + r) * x.t + head * x.h;
    }
    // Fetch the row that is read AHEAD rows later: rows lie far apart, so the processor does not see it coming.
    template <class Number>
    void prefetch_row(const oxl::View &x, int64_t chunk, int64_t r, int64_t columns) const {
        if (r + AHEAD >= length(chunk)) return;
        const char *next = reinterpret_cast<const char *>(row<Number>(x, chunk, r + AHEAD));
        for (int64_t at = 0; at < columns * static_cast<int64_t>(sizeof(Number)); at += 64) __builtin_prefetch(next + at);
    }
    // Rows of a chunk as an operand in rows, `stride` units apart; padded with zeros to whole tiles both ways.
    template <class Unit>
    void read(const oxl::View &x, int64_t chunk, int64_t columns, Unit *to, int64_t stride) const {
        if (a.bfloat16)
            read_from<bf16>(x, chunk, columns, to, stride);
        else
            read_from<float>(x, chunk, columns, to, stride);
    }
    template <class Number, class Unit>
    void read_from(const oxl::View &x, int64_t chunk, int64_t columns, Unit *to, int64_t stride) const {
        const int64_t rows = length(chunk);
        for (int64_t r = 0; r < rows; ++r, to += stride) {
            prefetch_row<Number>(x, chunk, r, columns);
            const Number *from = row<Number>(x, chunk, r);
            if constexpr (NUMBERS<Unit> == 1) {
                copy(from, columns, to);
                for (int64_t c = columns; c < stride; ++c) to[c] = 0.0f;
            } else {
                __builtin_memcpy(to, from, sizeof(Number) * columns);
                __builtin_memset(reinterpret_cast<Number *>(to) + columns, 0, sizeof(Unit) * stride - sizeof(Number) * columns);
            }
        }
        __builtin_memset(to, 0, sizeof(Unit) * (whole_rows(rows) - rows) * stride);
    }
    // What is read of x for a chunk, if there is such a chunk.
    void announce(Ahead &ahead, const oxl::View &x, int64_t chunk, int64_t columns) const {
        if (chunk < 0 || chunk >= a.chunks || !x.data) return;
        const int64_t size = a.bfloat16 ? 2 : 4;
        const char *from = static_cast<const char *>(x.data) + (batch * x.b + chunk * a.chunk * x.t + head * x.h) * size;
        ahead.add(from, x.t * size, columns * size, length(chunk));
    }
    // `columns` numbers into row t of an output (B, T, H, width), from column `first` on.
    void write(void *out, int64_t t, int64_t width, int64_t first, const float *from, int64_t columns) const {
        const int64_t at = ((batch * a.time + t) * a.heads + head) * width + first;
        if (a.bfloat16)
            copy(from, columns, static_cast<bf16 *>(out) + at);
        else
            copy(from, columns, static_cast<float *>(out) + at);
    }
    // One row of a tile into such a row.
    OXL_INLINE void write(void *out, int64_t t, int64_t width, int64_t first, const vf (&from)[VECTORS]) const {
        const int64_t at = ((batch * a.time + t) * a.heads + head) * width + first;
        for (int64_t c = 0; c < VECTORS && first + c * W < width; ++c)
            if (a.bfloat16)
                store(static_cast<bf16 *>(out) + at + c * W, from[c], width - first - c * W);
            else
                store(static_cast<float *>(out) + at + c * W, from[c], width - first - c * W);
    }
};

}  // namespace
