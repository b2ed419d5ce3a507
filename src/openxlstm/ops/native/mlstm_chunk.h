// What the forward and the backward pass of the chunkwise mLSTM share: one chunk's operands and its decays.
//
// Scalars of the gates come prepared (openxlstm.ops.mlstm.gates); equations: openxlstm.ops.mlstm.chunkwise. A task is
// one head of one sequence. It walks over the chunks with the state in panels beside the core; a chunk's tiles are
// small enough for the second-level cache, and nothing is shared between tasks.
#pragma once

#include "bfloat16.h"
#include "kernels.h"
#include "tiles.h"

namespace {

// Hands out parts of one block of memory, each at a 64-byte boundary; without a block it only counts.
struct Arena {
    float *base;
    int64_t used = 0;

    float *take(int64_t floats) {
        float *part = base ? base + used : nullptr;
        used += oxl::round_up(floats, 16);
        return part;
    }
};

// Distance between rows of the scores: whole tiles in both directions.
inline int64_t score_stride(const oxl::Mlstm &a) { return whole_columns(whole_rows(a.chunk)); }

// n numbers times a factor, from one type to another.
template <class From, class To>
inline void scale(const From *from, int64_t n, float factor, To *to) {
    for (int64_t c = 0; c < n; c += W) store(to + c, load(from + c, n - c) * factor, n - c);
}

constexpr int64_t AHEAD = 4;  // rows

// Whether there is anything in a state; an empty one need not be multiplied.
inline bool occupied(const float *state, int64_t floats) {
    for (int64_t e = 0; e < floats; ++e)
        if (!(state[e] == 0.0f)) return true;
    return false;
}

struct Head {
    const oxl::Mlstm &a;
    int64_t pair, batch, head;

    Head(const oxl::Mlstm &args, int64_t which)
        : a(args), pair(which), batch(which / args.heads), head(which % args.heads) {}

    int64_t length(int64_t chunk) const {
        const int64_t left = a.time - chunk * a.chunk;
        return left < a.chunk ? left : a.chunk;
    }
    // Rows of a chunk in float32, `stride` floats apart, times a factor; padded with zeros to whole tiles both ways.
    void read(const oxl::View &x, int64_t chunk, int64_t columns, float factor, float *to, int64_t stride) const {
        const int64_t rows = length(chunk), size = a.bfloat16 ? 2 : 4;
        const char *from = static_cast<const char *>(x.data) + (batch * x.b + chunk * a.chunk * x.t + head * x.h) * size;
        for (int64_t r = 0; r < rows; ++r, from += x.t * size, to += stride) {
            // rows lie far apart, so the processor does not see the next one coming
            if (r + AHEAD < rows)
                for (int64_t at = 0; at < columns * size; at += 64) __builtin_prefetch(from + AHEAD * x.t * size + at);
            if (a.bfloat16)
                scale(reinterpret_cast<const bf16 *>(from), columns, factor, to);
            else
                scale(reinterpret_cast<const float *>(from), columns, factor, to);
            for (int64_t c = columns; c < stride; ++c) to[c] = 0.0f;
        }
        __builtin_memset(to, 0, sizeof(float) * (whole_rows(rows) - rows) * stride);
    }
    // Fetch share `part` of `parts` of the rows of a chunk that is read next, while the core is busy with products.
    void prefetch(const oxl::View &x, int64_t chunk, int64_t columns, int64_t part, int64_t parts) const {
        if (chunk < 0 || chunk >= a.chunks || !x.data) return;
        const int64_t rows = length(chunk), size = a.bfloat16 ? 2 : 4;
        const char *from = static_cast<const char *>(x.data) + (batch * x.b + chunk * a.chunk * x.t + head * x.h) * size;
        for (int64_t r = rows * part / parts; r < rows * (part + 1) / parts; ++r)
            for (int64_t at = 0; at < columns * size; at += 64) __builtin_prefetch(from + r * x.t * size + at, 0, 1);
    }
    // `columns` numbers into row t of an output (B, T, H, width), from column `first` on.
    void write(void *out, int64_t t, int64_t width, int64_t first, const float *from, int64_t columns) const {
        const int64_t at = ((batch * a.time + t) * a.heads + head) * width + first;
        if (a.bfloat16)
            scale(from, columns, 1.0f, static_cast<bf16 *>(out) + at);
        else
            scale(from, columns, 1.0f, static_cast<float *>(out) + at);
    }
    // The rows of a chunk of such an output.
    void write(void *out, int64_t chunk, int64_t columns, const float *from, int64_t stride) const {
        const int64_t rows = length(chunk);
        for (int64_t r = 0; r < rows; ++r) write(out, chunk * a.chunk + r, columns, 0, from + r * stride, columns);
    }
    const float *scalars(const float *x, int64_t chunk) const { return x + (pair * a.chunks + chunk) * a.chunk; }
    float keep(int64_t chunk) const { return a.keep[pair * a.chunks + chunk]; }

    // Multiply a row of scores, columns first .. first + COLUMNS, by its decays; zero where nothing may pass.
    OXL_INLINE void decay(int64_t chunk, int64_t row, int64_t first, vf (&scores)[VECTORS], vf *other) const {
        const int64_t at = (pair * a.chunks + chunk) * a.chunk;
        const double *columns = a.columns + at;
        const int32_t *segment = a.segment + at;
        float exponent[COLUMNS];
        int32_t open[COLUMNS];
        const int64_t limit = row + 1 - first < COLUMNS ? row + 1 - first : COLUMNS;  // causal
        for (int64_t e = 0; e < limit; ++e) {
            exponent[e] = static_cast<float>(a.rows[at + row] + columns[first + e]);
            open[e] = -(segment[first + e] == segment[row]);
        }
        for (int64_t e = limit < 0 ? 0 : limit; e < COLUMNS; ++e) exponent[e] = 0.0f, open[e] = 0;
        for (int c = 0; c < VECTORS; ++c) {
            vi mask;
            __builtin_memcpy(&mask, open + c * W, sizeof mask);
            const vf weight = exp(load(exponent + c * W));
            scores[c] = select(mask, scores[c] * weight, vf{});
            if (other) other[c] = select(mask, other[c] * weight, vf{});
        }
    }
};

}  // namespace
