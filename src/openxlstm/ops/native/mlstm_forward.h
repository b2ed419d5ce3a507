// Forward pass of the chunkwise mLSTM; see mlstm_chunk.h.
//
// The value columns of a head may be split among tasks; each then computes the scores for itself. With pairs as units of
// operands, scores, weighed keys and the state are rounded to bfloat16 for the products; the state itself is float32.
#pragma once

#include "mlstm_chunk.h"

namespace {

template <class Unit>
struct ForwardSpace {
    static constexpr bool ROUNDED = NUMBERS<Unit> > 1;
    int64_t wide, tall, key_columns, key_stride, value_stride, score_stride;  // strides: units of a row
    Unit *q, *k, *k_transposed, *weighed, *v, *value_panel, *state_panel, *scores;
    float *reciprocal, *c, *n;

    ForwardSpace(const oxl::Mlstm &a, Arena &arena) {
        const int64_t rows = whole_rows(a.chunk);
        wide = whole_rows(a.dk), tall = whole_columns(a.dv), key_columns = whole_columns(wide);
        key_stride = units<Unit>(key_columns), value_stride = units<Unit>(tall);
        score_stride = units<Unit>(score_columns(a));
        q = arena.take<Unit>(rows * key_stride);
        k = arena.take<Unit>(rows * key_stride);
        k_transposed = arena.take<Unit>(whole_columns(a.chunk) * units<Unit>(a.dk));
        weighed = ROUNDED ? arena.take<Unit>(units<Unit>(rows) * key_columns) : k;
        v = arena.take<Unit>(rows * value_stride);
        value_panel = arena.take<Unit>(units<Unit>(rows) * COLUMNS);
        state_panel = ROUNDED ? arena.take<Unit>(units<Unit>(wide) * COLUMNS) : nullptr;
        scores = arena.take<Unit>(rows * score_stride);
        reciprocal = arena.take(rows);
        c = arena.take(tall * wide);
        n = arena.take(key_columns);
    }
};

template <class Unit>
struct Forward : Head {
    Gates gates;
    ForwardSpace<Unit> s;
    int64_t split, begin, end, length = 0, rows = 0;
    Ahead ahead;

    Forward(const oxl::Mlstm &args, int64_t task, Arena &&arena)
        : Head(args, task / args.splits), gates(args, pair, scale, arena), s(args, arena), split(task % args.splits) {
        const int64_t panels = s.tall / COLUMNS, share = (panels + a.splits - 1) / a.splits;
        begin = split * share, end = begin + share < panels ? begin + share : panels;
    }

    static int64_t scratch(const oxl::Mlstm &a) {
        Arena arena{nullptr};
        Gates(a, 0, 0.0f, arena);
        ForwardSpace<Unit>(a, arena);
        return arena.used;
    }

    // Columns of panel p that exist.
    int64_t columns(int64_t p) const {
        const int64_t left = a.dv - p * COLUMNS;
        return left < COLUMNS ? left : COLUMNS;
    }

    void load_state() {
        __builtin_memset(s.n, 0, sizeof(float) * s.key_columns);
        __builtin_memset(s.c + begin * s.wide * COLUMNS, 0, sizeof(float) * (end - begin) * s.wide * COLUMNS);
        if (!a.c0) return;
        const float *c0 = a.c0 + pair * a.dk * a.dv;
        for (int64_t p = begin; p < end; ++p)
            for (int64_t d = 0; d < a.dk; ++d)
                __builtin_memcpy(s.c + (p * s.wide + d) * COLUMNS, c0 + d * a.dv + p * COLUMNS, sizeof(float) * columns(p));
        __builtin_memcpy(s.n, a.n0 + pair * a.dk, sizeof(float) * a.dk);
    }

    void store_state() const {
        float *c = a.c + pair * a.dk * a.dv;
        for (int64_t p = begin; p < end; ++p)
            for (int64_t d = 0; d < a.dk; ++d)
                __builtin_memcpy(c + d * a.dv + p * COLUMNS, s.c + (p * s.wide + d) * COLUMNS, sizeof(float) * columns(p));
        if (split == 0) __builtin_memcpy(a.n + pair * a.dk, s.n, sizeof(float) * a.dk);
    }

    // Scores times decays, and with them the normaliser and the divisor of each row.
    OXL_PHASE void load_scores(int64_t chunk) {
        const int64_t inner = units<Unit>(a.dk);
        transpose_panels(s.k, length, inner, s.key_stride, s.k_transposed, inner * COLUMNS);
        for (int64_t row = 0; row < rows; row += ROWS) {
            vf sums[ROWS] = {};
            for (int64_t first = 0; first < length && first < row + ROWS; first += COLUMNS) {
                Tile tile;
                tile.clear();
                tile.multiply(s.q + row * s.key_stride, s.key_stride, 1, s.k_transposed + first * inner, COLUMNS, inner);
                for (int r = 0; r < ROWS; ++r) {
                    if (row + r < length) gates.decay(row + r, first, tile.at[r], nullptr);
                    for (int c = 0; c < VECTORS; ++c) sums[r] += tile.at[r][c];
                }
                tile.write_rows(s.scores + row * s.score_stride + units<Unit>(first), s.score_stride);
            }
            for (int64_t r = 0; r < ROWS; ++r) {
                s.reciprocal[row + r] = row + r < length ? 1.0f / divide(chunk, row + r, sum(sums[r])) : 0.0f;
            }
        }
    }

    // The divisor of row t, from the sum of its scores.
    float divide(int64_t chunk, int64_t t, float scores) const {
        vf carried = {};
        for (int64_t d = 0; d < s.key_columns; d += W) carried += numbers(s.q + t * s.key_stride, d) * load(s.n + d);
        const float r = scores + gates.beta[t] * sum(carried), size = __builtin_fabsf(r);
        const int64_t at = pair * a.time + chunk * a.chunk + t;
        const float least = gates.floor[t];
        const float divisor = a.normalize ? (size >= least || size != size ? size : least) + a.eps : 1.0f;
        if (split == 0) a.r[at] = a.normalize ? r : 0.0f, a.den[at] = divisor;
        return divisor;
    }

    // Keys by their weight in the state that leaves the chunk, and the normaliser of that state.
    OXL_PHASE void weigh_keys() {
        for (int64_t d = 0; d < s.key_columns; d += W) {
            vf n = load(s.n + d) * gates.keep;
            for (int64_t t = 0; t < length; ++t) n += numbers(s.k + t * s.key_stride, d) * gates.to_state[t];
            store(s.n + d, n);
        }
        stack(s.k, length, s.key_columns, s.key_stride, gates.to_state, s.weighed, s.key_columns);
    }

    // The state of panel p as an operand.
    const Unit *operand(const float *state) {
        if constexpr (ForwardSpace<Unit>::ROUNDED) {
            stack(state, s.wide, COLUMNS, COLUMNS, nullptr, s.state_panel, COLUMNS);
            return s.state_panel;
        } else {
            return state;
        }
    }

    // Outputs and state of one panel of values after the other, while its part of the state is in the first-level cache.
    OXL_PHASE void outputs(int64_t chunk, int64_t p, bool carried) {
        const Unit *state = carried ? operand(s.c + p * s.wide * COLUMNS) : nullptr;
        stack(s.v + units<Unit>(p * COLUMNS), length, COLUMNS, s.value_stride, nullptr, s.value_panel, COLUMNS);
        for (int64_t row = 0; row < rows; row += ROWS) {
            Tile tile;
            tile.clear();
            if (carried) {
                tile.multiply(s.q + row * s.key_stride, s.key_stride, 1, state, COLUMNS, units<Unit>(a.dk));
                tile.scale_rows(gates.beta + row);
            }
            const int64_t until = row + ROWS < length ? row + ROWS : length;
            tile.multiply(s.scores + row * s.score_stride, s.score_stride, 1, s.value_panel, COLUMNS, units<Unit>(until));
            tile.scale_rows(s.reciprocal + row);
            for (int r = 0; r < ROWS; ++r)
                if (row + r < length) write(a.h, chunk * a.chunk + row + r, a.dv, p * COLUMNS, tile.at[r]);
            ahead.fetch();
        }
    }

    OXL_PHASE void advance(int64_t p) {
        float *state = s.c + p * s.wide * COLUMNS;
        for (int64_t d = 0; d < s.wide; d += ROWS) {
            Tile tile;
            tile.read(state + d * COLUMNS, COLUMNS, gates.keep);
            tile.multiply(s.weighed + d, 1, s.key_columns, s.value_panel, COLUMNS, units<Unit>(length));
            tile.write(state + d * COLUMNS, COLUMNS);
            ahead.fetch();
        }
    }

    void run() {
        load_state();
        const bool starts_empty = !a.c0 || !occupied(a.c0 + pair * a.dk * a.dv, a.dk * a.dv);
        double m = gates.first_stabiliser();
        for (int64_t chunk = 0; chunk < a.chunks; ++chunk) {
            m = gates.load_chunk(chunk, m);
            length = Head::length(chunk), rows = whole_rows(length);
            read(a.q, chunk, a.dk, s.q, s.key_stride);
            read(a.k, chunk, a.dk, s.k, s.key_stride);
            read(a.v, chunk, a.dv, s.v, s.value_stride);
            load_scores(chunk);
            weigh_keys();
            ahead = Ahead();
            announce(ahead, a.q, chunk + 1, a.dk);
            announce(ahead, a.k, chunk + 1, a.dk);
            announce(ahead, a.v, chunk + 1, a.dv);
            ahead.spread((end - begin) * (rows + s.wide) / ROWS);
            for (int64_t p = begin; p < end; ++p) {
                outputs(chunk, p, chunk > 0 || !starts_empty);
                advance(p);
            }
        }
        store_state();
        if (split == 0) a.m[pair] = static_cast<float>(m);
    }
};

void mlstm_forward(const oxl::Mlstm &a, int64_t task, float *scratch) {
#if defined(OXL_PAIRS)
    if (a.bfloat16) return Forward<Pair>(a, task, Arena{scratch}).run();
#endif
    Forward<float>(a, task, Arena{scratch}).run();
}

int64_t mlstm_forward_scratch(const oxl::Mlstm &a) {
#if defined(OXL_PAIRS)
    if (a.bfloat16) return Forward<Pair>::scratch(a);
#endif
    return Forward<float>::scratch(a);
}

}  // namespace
