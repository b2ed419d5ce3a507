// Forward pass of the chunkwise mLSTM; see mlstm_chunk.h.
//
// The value columns of a head may be split among tasks; each then computes the scores for itself.
#pragma once

#include "mlstm_chunk.h"

namespace {

struct ForwardSpace {
    float *q, *k, *k_transposed, *v, *value_panel, *scores, *beta, *reciprocal, *c, *n;
    int64_t floats;

    ForwardSpace(const oxl::Mlstm &a, float *memory) {
        Arena arena{memory};
        const int64_t rows = whole_rows(a.chunk), wide = whole_rows(a.dk);
        q = arena.take(rows * wide);
        k = arena.take(rows * wide);
        k_transposed = arena.take(whole_columns(a.chunk) * a.dk);
        v = arena.take(rows * whole_columns(a.dv));  // and h, panel by panel as the values are consumed
        value_panel = arena.take(a.chunk * COLUMNS);
        scores = arena.take(rows * score_stride(a));
        beta = arena.take(rows);
        reciprocal = arena.take(rows);
        c = arena.take(whole_columns(a.dv) * wide);
        n = arena.take(wide);
        floats = arena.used;
    }
};

struct Forward : Head {
    ForwardSpace s;
    int64_t split, wide, tall, across, begin, end, length = 0, rows = 0;

    Forward(const oxl::Mlstm &args, int64_t task, float *scratch)
        : Head(args, task / args.splits), s(args, scratch), split(task % args.splits), wide(whole_rows(args.dk)),
          tall(whole_columns(args.dv)), across(score_stride(args)) {
        const int64_t panels = tall / COLUMNS, share = (panels + a.splits - 1) / a.splits;
        begin = split * share, end = begin + share < panels ? begin + share : panels;
    }

    // Columns of panel p that exist.
    int64_t columns(int64_t p) const {
        const int64_t left = a.dv - p * COLUMNS;
        return left < COLUMNS ? left : COLUMNS;
    }

    void load_state() {
        const float *c0 = a.c0 + pair * a.dk * a.dv, *n0 = a.n0 + pair * a.dk;
        for (int64_t p = begin; p < end; ++p) {
            float *panel = s.c + p * wide * COLUMNS;
            pack_panels(c0 + p * COLUMNS, a.dk, columns(p), a.dv, nullptr, panel, 0);
            __builtin_memset(panel + a.dk * COLUMNS, 0, sizeof(float) * (wide - a.dk) * COLUMNS);
        }
        for (int64_t d = 0; d < wide; ++d) s.n[d] = d < a.dk ? n0[d] : 0.0f;
    }

    void store_state() const {
        float *c = a.c + pair * a.dk * a.dv;
        for (int64_t p = begin; p < end; ++p)
            for (int64_t d = 0; d < a.dk; ++d)
                __builtin_memcpy(c + d * a.dv + p * COLUMNS, s.c + (p * wide + d) * COLUMNS, sizeof(float) * columns(p));
        if (split == 0) __builtin_memcpy(a.n + pair * a.dk, s.n, sizeof(float) * a.dk);
    }

    // Scores times decays, and with them the normaliser and the divisor of each row.
    OXL_PHASE void load_scores(int64_t chunk) {
        const float *carry = scalars(a.carry_in, chunk);
        pack_transposed(s.k, length, a.dk, wide, s.k_transposed, a.dk * COLUMNS);
        for (int64_t row = 0; row < rows; row += ROWS) {
            vf sums[ROWS] = {};
            for (int64_t first = 0; first < length && first < row + ROWS; first += COLUMNS) {
                Tile tile;
                tile.clear();
                tile.multiply(s.q + row * wide, wide, 1, s.k_transposed + first * a.dk, COLUMNS, a.dk);
                for (int r = 0; r < ROWS; ++r) {
                    if (row + r < length) decay(chunk, row + r, first, tile.at[r], nullptr);
                    for (int c = 0; c < VECTORS; ++c) sums[r] += tile.at[r][c];
                }
                tile.write(s.scores + row * across + first, across);
            }
            for (int64_t r = 0; r < ROWS; ++r) {
                const bool real = row + r < length;
                s.beta[row + r] = real ? carry[row + r] : 0.0f;
                s.reciprocal[row + r] = real ? 1.0f / divide(chunk, row + r, sum(sums[r])) : 0.0f;
            }
        }
    }

    // The divisor of row t, from the sum of its scores.
    float divide(int64_t chunk, int64_t t, float scores) const {
        vf carried = {};
        for (int64_t d = 0; d < wide; d += W) carried += load(s.q + t * wide + d, wide - d) * load(s.n + d, wide - d);
        const float r = scores + s.beta[t] * sum(carried), size = __builtin_fabsf(r);
        const int64_t at = pair * a.time + chunk * a.chunk + t;
        const float least = a.floor[at];
        const float divisor = a.normalize ? (size >= least || size != size ? size : least) + a.eps : 1.0f;
        if (split == 0) a.r[at] = a.normalize ? r : 0.0f, a.den[at] = divisor;
        return divisor;
    }

    // Keys by their weight in the state that leaves the chunk, and the normaliser of that state.
    void weigh_keys(int64_t chunk) {
        const float *to_state = scalars(a.to_state, chunk);
        const float kept = keep(chunk);
        for (int64_t d = 0; d < wide; ++d) s.n[d] *= kept;
        for (int64_t t = 0; t < length; ++t) {
            float *k = s.k + t * wide;
            for (int64_t d = 0; d < wide; ++d) s.n[d] += k[d] *= to_state[t];
        }
    }

    // Outputs and state of one panel of values after the other, while its part of the state is in the first-level cache.
    OXL_PHASE void outputs(int64_t p, bool carried) {
        float *state = s.c + p * wide * COLUMNS;
        pack_panels(s.v + p * COLUMNS, length, COLUMNS, tall, nullptr, s.value_panel, 0);
        for (int64_t row = 0; row < rows; row += ROWS) {
            Tile tile;
            tile.clear();
            if (carried) {
                tile.multiply(s.q + row * wide, wide, 1, state, COLUMNS, a.dk);
                tile.scale_rows(s.beta + row);
            }
            const int64_t until = row + ROWS < length ? row + ROWS : length;
            tile.multiply(s.scores + row * across, across, 1, s.value_panel, COLUMNS, until);
            tile.scale_rows(s.reciprocal + row);
            tile.write(s.v + row * tall + p * COLUMNS, tall);
        }
    }

    OXL_PHASE void advance(int64_t p, float kept) {
        float *state = s.c + p * wide * COLUMNS;
        for (int64_t d = 0; d < wide; d += ROWS) {
            Tile tile;
            tile.read(state + d * COLUMNS, COLUMNS, kept);
            tile.multiply(s.k + d, 1, wide, s.value_panel, COLUMNS, length);
            tile.write(state + d * COLUMNS, COLUMNS);
        }
    }

    void run() {
        const float scale = static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(a.dk)));
        load_state();
        const bool starts_empty = !occupied(a.c0 + pair * a.dk * a.dv, a.dk * a.dv);
        const int64_t first = begin * COLUMNS, last = end * COLUMNS < a.dv ? end * COLUMNS : a.dv;
        for (int64_t chunk = 0; chunk < a.chunks; ++chunk) {
            length = Head::length(chunk), rows = whole_rows(length);
            read(a.q, chunk, a.dk, scale, s.q, wide);
            read(a.k, chunk, a.dk, 1.0f, s.k, wide);
            read(a.v, chunk, a.dv, 1.0f, s.v, tall);
            load_scores(chunk);
            weigh_keys(chunk);
            for (int64_t p = begin; p < end; ++p) {
                outputs(p, chunk > 0 || !starts_empty);
                advance(p, keep(chunk));
                prefetch(a.q, chunk + 1, a.dk, p - begin, end - begin);
                prefetch(a.k, chunk + 1, a.dk, p - begin, end - begin);
                prefetch(a.v, chunk + 1, a.dv, p - begin, end - begin);
            }
            for (int64_t t = 0; t < length && first < last; ++t)
                write(a.h, chunk * a.chunk + t, a.dv, first, s.v + t * tall + first, last - first);
        }
        store_state();
    }
};

void mlstm_forward(const oxl::Mlstm &a, int64_t task, float *scratch) { Forward(a, task, scratch).run(); }

int64_t mlstm_forward_scratch(const oxl::Mlstm &a) { return ForwardSpace(a, nullptr).floats; }

}  // namespace
