// Exact backward pass of the chunkwise mLSTM; see mlstm_chunk.h.
//
// The states entering the chunks are rebuilt first and kept for the task's head only, transposed, because that is
// how the gradients of queries need them; the state's gradient is transposed too, for the keys. With pairs as units of
// operands, everything that is multiplied is rounded to bfloat16, the kept states among it; the state that is carried
// on and the state's gradient are float32.
#pragma once

#include "mlstm_chunk.h"

namespace {

template <class Unit>
struct BackwardSpace {
    static constexpr bool ROUNDED = NUMBERS<Unit> > 1;
    int64_t wide, tall, state;             // floats of a row of q and k; of v; of one C^T
    int64_t value_columns, score_columns;  // numbers of a row
    int64_t key_stride, value_stride, score_stride, state_stride;  // units of a row; of one C^T
    Unit *q, *k, *v, *y, *v_stacked, *y_stacked;
    Unit *k_transposed, *v_transposed;
    Unit *key_panels, *query_panels, *carried_panels, *gradient_panel, *gradient_rows;
    Unit *scores, *d_scores, *d_scores_stacked;  // scores are stacked
    Unit *states;
    float *d_values, *rho, *along, *arriving, *leaving;
    float *running, *dc, *dn, *normalisers;
    double *stabilisers;  // entering each chunk

    BackwardSpace(const oxl::Mlstm &a, Arena &arena) {
        const int64_t rows = whole_rows(a.chunk), columns = whole_columns(a.chunk), stacked = units<Unit>(rows);
        wide = whole_columns(a.dk), tall = whole_rows(a.dv), state = wide * tall;
        value_columns = whole_columns(tall), score_columns = ::score_columns(a);
        key_stride = units<Unit>(wide), value_stride = units<Unit>(value_columns);
        score_stride = units<Unit>(score_columns), state_stride = wide * units<Unit>(tall);
        q = arena.take<Unit>(rows * key_stride);
        k = arena.take<Unit>(rows * key_stride);
        v = arena.take<Unit>(rows * value_stride);
        y = arena.take<Unit>(rows * value_stride);
        v_stacked = ROUNDED ? arena.take<Unit>(stacked * value_columns) : v;
        y_stacked = ROUNDED ? arena.take<Unit>(stacked * value_columns) : y;
        k_transposed = arena.take<Unit>(columns * units<Unit>(a.dk));
        v_transposed = arena.take<Unit>(columns * units<Unit>(a.dv));
        key_panels = arena.take<Unit>(stacked * wide);
        query_panels = arena.take<Unit>(stacked * wide);
        carried_panels = arena.take<Unit>(stacked * wide);
        gradient_panel = ROUNDED ? arena.take<Unit>(units<Unit>(tall) * COLUMNS) : nullptr;
        gradient_rows = ROUNDED ? arena.take<Unit>(ROWS * key_stride) : nullptr;
        scores = arena.take<Unit>(stacked * score_columns);
        d_scores = arena.take<Unit>(rows * score_stride);
        d_scores_stacked = ROUNDED ? arena.take<Unit>(stacked * score_columns) : d_scores;
        d_values = arena.take(value_columns * score_columns);
        rho = arena.take(rows + columns);
        along = arena.take(rows);
        arriving = arena.take(rows * W);  // k . dk, a vector of parts for each row
        leaving = arena.take(rows * W);   // q . dq
        running = ROUNDED ? arena.take(state) : nullptr;
        dc = arena.take(state);
        dn = arena.take(wide);
        states = arena.take<Unit>((a.chunks + 1) * state_stride);
        normalisers = arena.take((a.chunks + 1) * wide);
        stabilisers = arena.take<double>(a.chunks + 1);
    }
};

template <class Unit>
struct Backward : Head {
    static constexpr bool ROUNDED = BackwardSpace<Unit>::ROUNDED;
    static constexpr int64_t N = NUMBERS<Unit>;

    // <C, dC> over one panel.
    struct Products {
        vf parts[VECTORS][N] = {};

        // N rows of dC, and as many of C on top of each other
        OXL_INLINE void add(const Unit *c, const vf (*dc)[VECTORS]) {
            for (int d = 0; d < VECTORS; ++d) {
                vf x[N];
                unstack(c + d * W, x);
                for (int64_t k = 0; k < N; ++k) parts[d][k] += x[k] * dc[k][d];
            }
        }
        double total() const {
            double total = 0.0;
            for (const auto &column : parts)
                for (const vf &part : column) total += sum(part);
            return total;
        }
    };

    Gates gates;
    BackwardSpace<Unit> s;
    int64_t length = 0, rows = 0, panel, state_panel, inner_keys, inner_values;
    Ahead ahead;
    bool starts_empty = false, flows_back = false;  // the first state is zero; the state's gradient is not

    Backward(const oxl::Mlstm &args, int64_t task, Arena &&arena)
        : Head(args, task), gates(args, pair, scale, arena), s(args, arena), panel(s.tall * COLUMNS), state_panel(units<Unit>(s.tall) * COLUMNS),
          inner_keys(units<Unit>(args.dk)), inner_values(units<Unit>(args.dv)) {}

    static int64_t scratch(const oxl::Mlstm &a) {
        Arena arena{nullptr};
        Gates(a, 0, 0.0f, arena);
        BackwardSpace<Unit>(a, arena);
        return arena.used;
    }

    // C (DK, DV) to C^T in panels of keys; zeros if there is none.
    void pack_state(const float *c, float *to) const {
        __builtin_memset(to, 0, sizeof(float) * s.state);
        for (int64_t d = 0; c && d < a.dk; ++d) {
            float *column = to + d / COLUMNS * panel + d % COLUMNS;
            for (int64_t e = 0; e < a.dv; ++e) column[e * COLUMNS] = c[d * a.dv + e];
        }
    }
    void unpack_state(const float *from, float *c) const {
        for (int64_t d = 0; d < a.dk; d += W)
            for (int64_t e = 0; e < a.dv; e += W) {
                float block[W * W];
                transpose(from + d / COLUMNS * panel + e * COLUMNS + d % COLUMNS, COLUMNS, a.dv - e, W, block, W);
                for (int64_t r = 0; r < W && d + r < a.dk; ++r) store(c + (d + r) * a.dv + e, load(block + r * W), a.dv - e);
            }
    }

    // The first state, as it is carried on and as it is kept.
    void load_state() {
        const float *c0 = a.c0 ? a.c0 + pair * a.dk * a.dv : nullptr;
        if constexpr (ROUNDED) {
            pack_state(c0, s.running);
            for (int64_t p = 0; p < s.wide / COLUMNS; ++p)
                stack(s.running + p * panel, s.tall, COLUMNS, COLUMNS, nullptr, s.states + p * state_panel, COLUMNS);
        } else {
            pack_state(c0, s.states);
        }
        for (int64_t d = 0; d < s.wide; ++d) s.normalisers[d] = a.c0 && d < a.dk ? a.n0[pair * a.dk + d] : 0.0f;
    }

    OXL_PHASE void begin(int64_t chunk) {
        length = Head::length(chunk), rows = whole_rows(length);
        s.stabilisers[chunk + 1] = gates.load_chunk(chunk, s.stabilisers[chunk]);
        read(a.k, chunk, a.dk, s.k, s.key_stride);
        read(a.v, chunk, a.dv, s.v, s.value_stride);
    }

    // The state leaving a chunk from the one entering it.
    OXL_PHASE void advance(int64_t chunk) {
        begin(chunk);
        const int64_t span = units<Unit>(length) * COLUMNS, panels = s.wide / COLUMNS;
        stack_panels(s.k, length, s.wide, s.key_stride, gates.to_state, s.key_panels, span);
        if constexpr (ROUNDED) stack(s.v, length, s.value_columns, s.value_stride, nullptr, s.v_stacked, s.value_columns);
        Unit *after = s.states + (chunk + 1) * s.state_stride;
        ahead = Ahead();
        announce(ahead, a.k, chunk + 1, a.dk);
        announce(ahead, a.v, chunk + 1, a.dv);
        ahead.spread(panels * s.tall / ROWS);
        for (int64_t p = 0; p < panels; ++p) {
            for (int64_t e = 0; e < s.tall; e += ROWS) {
                const int64_t at = p * panel + e * COLUMNS;
                Tile tile;
                if constexpr (ROUNDED)
                    tile.read(s.running + at, COLUMNS, gates.keep);
                else
                    tile.read(s.states + chunk * s.state_stride + at, COLUMNS, gates.keep);
                tile.multiply(s.v_stacked + e, 1, s.value_columns, s.key_panels + p * span, COLUMNS, units<Unit>(length));
                if constexpr (ROUNDED) tile.write(s.running + at, COLUMNS);
                tile.write_stacked(after + p * state_panel + units<Unit>(e) * COLUMNS, COLUMNS);
                ahead.fetch();
            }
        }
        const float *n = s.normalisers + chunk * s.wide;
        float *next = s.normalisers + (chunk + 1) * s.wide;
        for (int64_t d = 0; d < s.wide; d += W) {
            vf total = load(n + d) * gates.keep;
            for (int64_t t = 0; t < length; ++t) total += numbers(s.k + t * s.key_stride, d) * gates.to_state[t];
            store(next + d, total);
        }
    }

    // y = dh / den and rho, the gradients of numerator and normaliser; zero without a gradient of h.
    OXL_PHASE void load_outputs(int64_t chunk) {
        const int64_t at = pair * a.time + chunk * a.chunk;
        __builtin_memset(s.rho, 0, sizeof(float) * rows);
        __builtin_memset(s.y, 0, sizeof(Unit) * rows * s.value_stride);
        for (int64_t t = 0; t < length; ++t) {
            float along = 0.0f;  // dh . h / den
            if (a.dh.data) along = a.bfloat16 ? load_output<bf16>(chunk, t) : load_output<float>(chunk, t);
            if (!a.normalize) along = 0.0f;
            const float r = a.r[at + t];
            const bool inside = a.normalize && __builtin_fabsf(r) > gates.floor[t];
            s.rho[t] = inside ? (r < 0 ? along : -along) : 0.0f;
            s.along[t] = along;
        }
        if constexpr (ROUNDED) stack(s.y, length, s.value_columns, s.value_stride, nullptr, s.y_stacked, s.value_columns);
    }

    template <class Number>
    OXL_INLINE float load_output(int64_t chunk, int64_t t) {
        prefetch_row<Number>(a.dh, chunk, t, a.dv);
        prefetch_row<Number>(a.h_view, chunk, t, a.dv);
        const Number *dh = row<Number>(a.dh, chunk, t), *h = row<Number>(a.h_view, chunk, t);
        const float factor = 1.0f / a.den[pair * a.time + chunk * a.chunk + t];
        vf dot = {};
        for (int64_t e = 0; e < a.dv; e += W) {
            const vf value = load(dh + e, a.dv - e) * factor;
            put(s.y + t * s.value_stride, e, value);
            dot += value * load(h + e, a.dv - e);
        }
        return sum(dot);
    }

    // Scores and their gradients, both times the decays, in the causal half.
    OXL_PHASE void load_scores() {
        transpose_panels(s.k, length, inner_keys, s.key_stride, s.k_transposed, inner_keys * COLUMNS);
        transpose_panels(s.v, length, inner_values, s.value_stride, s.v_transposed, inner_values * COLUMNS);
        float held[ROWS * COLUMNS];
        for (int64_t row = 0; row < rows; row += ROWS)
            for (int64_t first = 0; first < length; first += COLUMNS) {
                Tile score, gradient;
                score.clear();
                gradient.clear();
                if (first < row + ROWS) {
                    score.multiply(s.q + row * s.key_stride, s.key_stride, 1, s.k_transposed + first * inner_keys, COLUMNS,
                                   inner_keys);
                    score.write(held, COLUMNS);
                    gradient.multiply(s.y + row * s.value_stride, s.value_stride, 1, s.v_transposed + first * inner_values,
                                      COLUMNS, inner_values);
                    for (int r = 0; r < ROWS && row + r < length; ++r) {
                        vf kept[VECTORS];
                        for (int c = 0; c < VECTORS; ++c) {
                            gradient.at[r][c] += s.rho[row + r];
                            kept[c] = load(held + r * COLUMNS + c * W);
                        }
                        gates.decay(row + r, first, kept, gradient.at[r]);
                        for (int c = 0; c < VECTORS; ++c) store(held + r * COLUMNS + c * W, kept[c]);
                    }
                    score.read(held, COLUMNS, 1.0f);
                }
                const int64_t stacked = units<Unit>(row) * s.score_columns + first;
                score.write_stacked(s.scores + stacked, s.score_columns);
                gradient.write_rows(s.d_scores + row * s.score_stride + units<Unit>(first), s.score_stride);
                if constexpr (ROUNDED) gradient.write_stacked(s.d_scores_stacked + stacked, s.score_columns);
            }
    }

    OXL_PHASE void values(int64_t chunk) {
        const int64_t inner = units<Unit>(length);
        for (int64_t e = 0; e < s.tall; e += ROWS) {
            if constexpr (ROUNDED)
                if (flows_back) round_rows(e);
            for (int64_t first = 0; first < length; first += COLUMNS) {
                const Unit *keys = s.k_transposed + first * inner_keys;
                Tile tile;
                tile.clear();
                if (!flows_back) {
                } else if constexpr (ROUNDED) {
                    tile.multiply(s.gradient_rows, s.key_stride, 1, keys, COLUMNS, inner_keys);
                } else {
                    for (int64_t d = 0; d < a.dk; d += COLUMNS) {
                        const int64_t count = a.dk - d < COLUMNS ? a.dk - d : COLUMNS;
                        tile.multiply(s.dc + d / COLUMNS * panel + e * COLUMNS, COLUMNS, 1, keys + d * COLUMNS, COLUMNS, count);
                    }
                }
                tile.scale_columns(gates.to_state + first);
                const int64_t above = units<Unit>(first);
                tile.multiply(s.y_stacked + above * s.value_columns + e, 1, s.value_columns,
                              s.scores + above * s.score_columns + first, s.score_columns, inner - above);
                tile.write(s.d_values + e * s.score_columns + first, s.score_columns);
            }
        }
        for (int64_t first = 0; first < length; first += W)
            for (int64_t e = 0; e < a.dv; e += COLUMNS) {
                float there[W * COLUMNS];
                for (int64_t c = 0; c < COLUMNS; c += W)
                    transpose(s.d_values + (e + c) * s.score_columns + first, s.score_columns, W, W, there + c, COLUMNS);
                const int64_t left = a.dv - e;
                for (int64_t t = 0; t < W && first + t < length; ++t)
                    write(a.dv_out, chunk * a.chunk + first + t, a.dv, e, there + t * COLUMNS, left < COLUMNS ? left : COLUMNS);
            }
    }

    // Rows e .. e + ROWS of the state's gradient as an operand in rows.
    OXL_INLINE void round_rows(int64_t e) {
        for (int64_t d = 0; d < s.wide; d += W)
            for (int64_t r = 0; r < ROWS; ++r)
                put(s.gradient_rows + r * s.key_stride, d, load(s.dc + d / COLUMNS * panel + (e + r) * COLUMNS + d % COLUMNS));
    }

    // Gradients of keys and queries, and the state's gradient carried to before the chunk, one panel of keys at a time.
    // Returns <C, dC> + n . dn before the chunk.
    double keys_and_queries(int64_t chunk) {
        const int64_t span = units<Unit>(length) * COLUMNS, panels = s.wide / COLUMNS;
        stack_panels(s.k, length, s.wide, s.key_stride, nullptr, s.key_panels, span);
        stack_panels(s.q, length, s.wide, s.key_stride, nullptr, s.query_panels, span);
        stack_panels(s.q, length, s.wide, s.key_stride, gates.beta, s.carried_panels, span);
        __builtin_memset(s.arriving, 0, sizeof(float) * rows * W);
        __builtin_memset(s.leaving, 0, sizeof(float) * rows * W);
        double flow = 0.0;
        ahead = Ahead();
        announce(ahead, a.q, chunk - 1, a.dk);
        announce(ahead, a.k, chunk - 1, a.dk);
        announce(ahead, a.v, chunk - 1, a.dv);
        announce(ahead, a.dh, chunk - 1, a.dv);
        announce(ahead, a.h_view, chunk - 1, a.dv);
        ahead.spread(panels * (2 * rows + s.tall) / ROWS);
        for (int64_t p = 0; p < panels; ++p) {
            keys(chunk, p);
            queries(chunk, p);
            flow += carry(chunk, p);
        }
        return flow;
    }

    // Panel p of the state's gradient as an operand.
    const Unit *operand(const float *gradient) {
        if constexpr (ROUNDED) {
            stack(gradient, s.tall, COLUMNS, COLUMNS, nullptr, s.gradient_panel, COLUMNS);
            return s.gradient_panel;
        } else {
            return gradient;
        }
    }

    OXL_PHASE void keys(int64_t chunk, int64_t p) {
        const int64_t first = p * COLUMNS, span = units<Unit>(length) * COLUMNS;
        const Unit *dc = flows_back ? operand(s.dc + p * panel) : nullptr;
        for (int64_t row = 0; row < rows; row += ROWS) {
            const int64_t above = units<Unit>(row);
            Tile tile;
            tile.clear();
            if (flows_back) tile.multiply(s.v + row * s.value_stride, s.value_stride, 1, dc, COLUMNS, inner_values);
            for (int c = 0; c < VECTORS; ++c)
                for (int r = 0; r < ROWS; ++r) tile.at[r][c] += load(s.dn + first + c * W);
            tile.scale_rows(gates.to_state + row);
            tile.multiply(s.d_scores_stacked + above * s.score_columns + row, 1, s.score_columns,
                          s.query_panels + p * span + above * COLUMNS, COLUMNS, units<Unit>(length) - above);
            finish(a.dk_out, chunk, s.k, row, first, tile, s.arriving);
            ahead.fetch();
        }
    }

    OXL_PHASE void queries(int64_t chunk, int64_t p) {
        const int64_t first = p * COLUMNS, span = units<Unit>(length) * COLUMNS;
        const Unit *c = s.states + chunk * s.state_stride + p * state_panel;
        const float *n = s.normalisers + chunk * s.wide + first;
        for (int64_t row = 0; row < rows; row += ROWS) {
            Tile tile;
            tile.clear();
            if (chunk > 0 || !starts_empty)
                tile.multiply(s.y + row * s.value_stride, s.value_stride, 1, c, COLUMNS, inner_values);
            for (int r = 0; r < ROWS; ++r)
                for (int e = 0; e < VECTORS; ++e) tile.at[r][e] += load(n + e * W) * s.rho[row + r];
            tile.scale_rows(gates.beta + row);
            const int64_t until = row + ROWS < length ? row + ROWS : length;
            tile.multiply(s.d_scores + row * s.score_stride, s.score_stride, 1, s.key_panels + p * span, COLUMNS,
                          units<Unit>(until));
            finish(a.dq_out, chunk, s.q, row, first, tile, s.leaving);
            ahead.fetch();
        }
    }

    // Panel p of the state's gradient before the chunk; returns its share of <C, dC> + n . dn there.
    OXL_PHASE double carry(int64_t chunk, int64_t p) {
        const int64_t inner = units<Unit>(length);
        const Unit *carried = s.carried_panels + p * inner * COLUMNS, *c = s.states + chunk * s.state_stride + p * state_panel;
        const float *n = s.normalisers + chunk * s.wide + p * COLUMNS;
        float *dc = s.dc + p * panel, *dn = s.dn + p * COLUMNS;
        Products products;
        for (int64_t e = 0; e < s.tall; e += ROWS) {
            Tile tile;
            tile.read(dc + e * COLUMNS, COLUMNS, gates.keep);
            tile.multiply(s.y_stacked + e, 1, s.value_columns, carried, COLUMNS, inner);
            tile.write(dc + e * COLUMNS, COLUMNS);
            ahead.fetch();
            for (int r = 0; r < ROWS; r += N) products.add(c + units<Unit>(e + r) * COLUMNS, &tile.at[r]);
        }
        vf along = {};
        for (int64_t d = 0; d < COLUMNS; d += W) {
            vf total = load(dn + d) * gates.keep;
            for (int64_t u = 0; u < inner; ++u) {
                vf part[N];
                unstack(carried + u * COLUMNS + d, part);
                for (int64_t k = 0; k < N; ++k) total += part[k] * s.rho[u * N + k];
            }
            store(dn + d, total);
            along += load(n + d) * total;
        }
        return products.total() + sum(along);
    }

    // Write a tile of gradients, and add its products with the queries or keys it belongs to.
    OXL_INLINE void finish(void *out, int64_t chunk, const Unit *x, int64_t row, int64_t first, const Tile &tile,
                           float *dots) const {
        for (int r = 0; r < ROWS; ++r) {
            vf dot = load(dots + (row + r) * W);
            for (int c = 0; c < VECTORS; ++c) dot += tile.at[r][c] * numbers(x + (row + r) * s.key_stride, first + c * W);
            store(dots + (row + r) * W, dot);
            if (row + r < length) write(out, chunk * a.chunk + row + r, a.dk, first, tile.at[r]);
        }
    }

    // <C, dC> + n . dn after the last chunk
    OXL_PHASE double last_flow() const {
        const float *n = s.normalisers + a.chunks * s.wide;
        double total = 0.0;
        for (int64_t p = 0; p < s.wide / COLUMNS; ++p) {
            const Unit *c = s.states + a.chunks * s.state_stride + p * state_panel;
            Products products;
            for (int64_t e = 0; e < s.tall; e += N) {
                vf dc[N][VECTORS];
                for (int64_t k = 0; k < N; ++k)
                    for (int64_t d = 0; d < VECTORS; ++d) dc[k][d] = load(s.dc + p * panel + (e + k) * COLUMNS + d * W);
                products.add(c + units<Unit>(e) * COLUMNS, dc);
            }
            total += products.total();
        }
        vf part = {};
        for (int64_t d = 0; d < s.wide; d += W) part += load(n + d) * load(s.dn + d);
        return total + sum(part);
    }

    void run() {
        const int64_t size = a.dk * a.dv;
        starts_empty = !a.c0 || !occupied(a.c0 + pair * size, size), flows_back = a.dc_last != nullptr;
        load_state();
        s.stabilisers[0] = gates.first_stabiliser();
        const bool last = a.dc_last || a.dn_last;
        for (int64_t chunk = 0; chunk + !last < a.chunks; ++chunk) advance(chunk);
        pack_state(a.dc_last ? a.dc_last + pair * size : nullptr, s.dc);
        for (int64_t d = 0; d < s.wide; ++d) s.dn[d] = a.dn_last && d < a.dk ? a.dn_last[pair * a.dk + d] : 0.0f;
        double flow = last ? last_flow() : 0.0;
        double path = (a.dm_last ? a.dm_last[pair] : 0.0) - flow;
        for (int64_t chunk = a.chunks; chunk-- > 0;) {
            begin(chunk);
            read(a.q, chunk, a.dk, s.q, s.key_stride);
            load_outputs(chunk);
            load_scores();
            values(chunk);
            const double before = keys_and_queries(chunk);
            gates.gradients(s.arriving, s.leaving, s.along, flow, path);
            flows_back = true;
            flow = before;
        }
        a.dm0[pair] = a.sigmoid ? 0.0f : static_cast<float>(flow + path);
        unpack_state(s.dc, a.dc0 + pair * size);
        __builtin_memcpy(a.dn0 + pair * a.dk, s.dn, sizeof(float) * a.dk);
    }
};

void mlstm_backward(const oxl::Mlstm &a, int64_t task, float *scratch) {
#if defined(OXL_PAIRS)
    if (a.bfloat16) return Backward<Pair>(a, task, Arena{scratch}).run();
#endif
    Backward<float>(a, task, Arena{scratch}).run();
}

int64_t mlstm_backward_scratch(const oxl::Mlstm &a) {
#if defined(OXL_PAIRS)
    if (a.bfloat16) return Backward<Pair>::scratch(a);
#endif
    return Backward<float>::scratch(a);
}

}  // namespace
