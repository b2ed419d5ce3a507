// Exact backward pass of the chunkwise mLSTM; see mlstm_chunk.h.
//
// The states entering the chunks are rebuilt first and kept for the task's head only, transposed, because that is
// how the gradients of queries need them; the state's gradient is transposed too, for the keys.
#pragma once

#include "mlstm_chunk.h"

namespace {

struct BackwardSpace {
    int64_t wide, tall, state;         // floats of a row of q and k; of v; of one C^T
    float *q, *k, *v, *y;              // rows
    float *k_transposed, *v_transposed;
    float *key_panels, *query_panels, *carried_panels;
    float *scores, *d_scores, *d_values;
    float *rho, *beta, *to_state, *arriving, *leaving;
    float *dc, *dn, *states, *normalisers;
    int64_t floats;

    BackwardSpace(const oxl::Mlstm &a, float *memory) {
        Arena arena{memory};
        const int64_t rows = whole_rows(a.chunk), columns = whole_columns(a.chunk);
        wide = whole_columns(a.dk), tall = whole_rows(a.dv), state = wide * tall;
        q = arena.take(rows * wide);
        k = arena.take(rows * wide);
        v = arena.take(rows * tall);
        y = arena.take(rows * tall);
        k_transposed = arena.take(columns * a.dk);
        v_transposed = arena.take(columns * a.dv);
        key_panels = arena.take(a.chunk * wide);
        query_panels = arena.take(a.chunk * wide);
        carried_panels = arena.take(a.chunk * wide);
        scores = arena.take(rows * score_stride(a));
        d_scores = arena.take(rows * score_stride(a));
        d_values = arena.take(tall * score_stride(a));
        rho = arena.take(rows + columns);
        beta = arena.take(rows + columns);
        to_state = arena.take(rows + columns);
        arriving = arena.take(rows * W);  // k . dk, a vector of parts for each row
        leaving = arena.take(rows * W);   // q . dq
        dc = arena.take(state);
        dn = arena.take(wide);
        states = arena.take((a.chunks + 1) * state);
        normalisers = arena.take((a.chunks + 1) * wide);
        floats = arena.used;
    }
};

struct Backward : Head {
    BackwardSpace s;
    int64_t length = 0, rows = 0, panel, across;
    float scale;
    bool starts_empty = false, flows_back = false;  // the first state is zero; the state's gradient is not

    Backward(const oxl::Mlstm &args, int64_t task, float *scratch)
        : Head(args, task), s(args, scratch), scale(static_cast<float>(1.0 / __builtin_sqrt(static_cast<double>(args.dk)))) {
        panel = s.tall * COLUMNS, across = score_stride(a);
    }

    // C (DK, DV) to C^T in panels of keys.
    void pack_state(const float *c, float *to) const {
        __builtin_memset(to, 0, sizeof(float) * s.state);
        for (int64_t d = 0; d < a.dk; ++d) {
            float *column = to + d / COLUMNS * panel + d % COLUMNS;
            for (int64_t e = 0; e < a.dv; ++e) column[e * COLUMNS] = c[d * a.dv + e];
        }
    }
    void unpack_state(const float *from, float *c) const {
        for (int64_t d = 0; d < a.dk; ++d) {
            const float *column = from + d / COLUMNS * panel + d % COLUMNS;
            for (int64_t e = 0; e < a.dv; ++e) c[d * a.dv + e] = column[e * COLUMNS];
        }
    }

    OXL_PHASE void begin(int64_t chunk) {
        length = Head::length(chunk), rows = whole_rows(length);
        const float *carry = scalars(a.carry_in, chunk), *leave = scalars(a.to_state, chunk);
        for (int64_t t = 0; t < rows || t < whole_columns(length); ++t) {
            s.beta[t] = t < length ? carry[t] : 0.0f;
            s.to_state[t] = t < length ? leave[t] : 0.0f;
        }
        read(a.k, chunk, a.dk, 1.0f, s.k, s.wide);
        read(a.v, chunk, a.dv, 1.0f, s.v, s.tall);
    }

    // The state leaving a chunk from the one entering it.
    OXL_PHASE void advance(int64_t chunk) {
        begin(chunk);
        const float kept = keep(chunk);
        const int64_t span = length * COLUMNS, panels = s.wide / COLUMNS;
        pack_panels(s.k, length, s.wide, s.wide, s.to_state, s.key_panels, span);
        const float *before = s.states + chunk * s.state, *n = s.normalisers + chunk * s.wide;
        float *after = s.states + (chunk + 1) * s.state, *next = s.normalisers + (chunk + 1) * s.wide;
        for (int64_t p = 0; p < panels; ++p) {
            for (int64_t e = 0; e < s.tall; e += ROWS) {
                const int64_t at = p * panel + e * COLUMNS;
                Tile tile;
                tile.read(before + at, COLUMNS, kept);
                tile.multiply(s.v + e, 1, s.tall, s.key_panels + p * span, COLUMNS, length);
                tile.write(after + at, COLUMNS);
            }
            prefetch(a.k, chunk + 1, a.dk, p, panels);
            prefetch(a.v, chunk + 1, a.dv, p, panels);
        }
        for (int64_t d = 0; d < s.wide; ++d) next[d] = n[d] * kept;
        for (int64_t t = 0; t < length; ++t)
            for (int64_t d = 0; d < s.wide; ++d) next[d] += s.k[t * s.wide + d] * s.to_state[t];
    }

    // y = dh / den and rho, the gradients of numerator and normaliser; zero without a gradient of h.
    OXL_PHASE void load_outputs(int64_t chunk) {
        const int64_t at = pair * a.time + chunk * a.chunk;
        __builtin_memset(s.rho, 0, sizeof(float) * rows);
        if (!a.dh.data) {
            __builtin_memset(s.y, 0, sizeof(float) * rows * s.tall);
            for (int64_t t = 0; t < length; ++t) a.path[at + t] = 0.0;
            return;
        }
        read(a.dh, chunk, a.dv, 1.0f, s.y, s.tall);
        read(a.h_view, chunk, a.dv, 1.0f, s.d_values, s.tall);
        for (int64_t t = 0; t < length; ++t) {
            float *y = s.y + t * s.tall;
            const float *h = s.d_values + t * s.tall, divisor = a.den[at + t], r = a.r[at + t];
            vf dot = {};
            for (int64_t e = 0; e < a.dv; e += W) {
                const vf value = load(y + e, a.dv - e) / divisor;
                store(y + e, value, a.dv - e);
                dot += value * load(h + e, a.dv - e);
            }
            const float along = a.normalize ? sum(dot) : 0.0f;  // dh . h / den
            const bool inside = a.normalize && __builtin_fabsf(r) > a.floor[at + t];
            s.rho[t] = inside ? (r < 0 ? along : -along) : 0.0f;
            a.path[at + t] = static_cast<double>(along) * -static_cast<double>(a.eps);
        }
    }

    // Scores and their gradients, both times the decays, in the causal half.
    OXL_PHASE void load_scores(int64_t chunk) {
        pack_transposed(s.k, length, a.dk, s.wide, s.k_transposed, a.dk * COLUMNS);
        pack_transposed(s.v, length, a.dv, s.tall, s.v_transposed, a.dv * COLUMNS);
        for (int64_t row = 0; row < rows; row += ROWS)
            for (int64_t first = 0; first < length; first += COLUMNS) {
                const int64_t to = row * across + first;
                Tile score, gradient;
                score.clear();
                gradient.clear();
                if (first < row + ROWS) {
                    score.multiply(s.q + row * s.wide, s.wide, 1, s.k_transposed + first * a.dk, COLUMNS, a.dk);
                    score.write(s.scores + to, across);
                    gradient.multiply(s.y + row * s.tall, s.tall, 1, s.v_transposed + first * a.dv, COLUMNS, a.dv);
                    for (int r = 0; r < ROWS && row + r < length; ++r) {
                        vf kept[VECTORS];
                        for (int c = 0; c < VECTORS; ++c) {
                            gradient.at[r][c] += s.rho[row + r];
                            kept[c] = load(s.scores + to + r * across + c * W);
                        }
                        decay(chunk, row + r, first, kept, gradient.at[r]);
                        for (int c = 0; c < VECTORS; ++c) store(s.scores + to + r * across + c * W, kept[c]);
                    }
                } else {
                    score.write(s.scores + to, across);
                }
                gradient.write(s.d_scores + to, across);
            }
    }

    OXL_PHASE void values(int64_t chunk) {
        for (int64_t e = 0; e < s.tall; e += ROWS)
            for (int64_t first = 0; first < length; first += COLUMNS) {
                const float *keys = s.k_transposed + first * a.dk;
                Tile tile;
                tile.clear();
                for (int64_t d = 0; d < a.dk && flows_back; d += COLUMNS) {
                    const int64_t count = a.dk - d < COLUMNS ? a.dk - d : COLUMNS;
                    tile.multiply(s.dc + d / COLUMNS * panel + e * COLUMNS, COLUMNS, 1, keys + d * COLUMNS, COLUMNS, count);
                }
                tile.scale_columns(s.to_state + first);
                tile.multiply(s.y + first * s.tall + e, 1, s.tall, s.scores + first * across + first, across,
                              length - first);
                tile.write(s.d_values + e * across + first, across);
            }
        float row[64];
        for (int64_t t = 0; t < length; ++t)
            for (int64_t first = 0; first < a.dv; first += 64) {
                const int64_t count = a.dv - first < 64 ? a.dv - first : 64;
                for (int64_t e = 0; e < count; ++e) row[e] = s.d_values[(first + e) * across + t];
                write(a.dv_out, chunk * a.chunk + t, a.dv, first, row, count);
            }
    }

    // Gradients of keys and queries, and the state's gradient carried to before the chunk, one panel of keys at a time.
    void keys_and_queries(int64_t chunk) {
        const int64_t span = length * COLUMNS, panels = s.wide / COLUMNS;
        pack_panels(s.k, length, s.wide, s.wide, nullptr, s.key_panels, span);
        pack_panels(s.q, length, s.wide, s.wide, nullptr, s.query_panels, span);
        pack_panels(s.q, length, s.wide, s.wide, s.beta, s.carried_panels, span);
        __builtin_memset(s.arriving, 0, sizeof(float) * rows * W);
        __builtin_memset(s.leaving, 0, sizeof(float) * rows * W);
        for (int64_t p = 0; p < panels; ++p) {
            keys(p);
            queries(chunk, p);
            carry(chunk, p);
            prefetch(a.q, chunk - 1, a.dk, p, panels);
            prefetch(a.k, chunk - 1, a.dk, p, panels);
            prefetch(a.v, chunk - 1, a.dv, p, panels);
            prefetch(a.dh, chunk - 1, a.dv, p, panels);
            prefetch(a.h_view, chunk - 1, a.dv, p, panels);
        }
        write(a.dk_out, chunk, a.dk, s.k, s.wide);
        write(a.dq_out, chunk, a.dk, s.q, s.wide);
        const int64_t at = pair * a.time + chunk * a.chunk, slot = (pair * a.chunks + chunk) * a.chunk;
        for (int64_t t = 0; t < length; ++t) {
            const double arrives = sum(load(s.arriving + t * W)), leaves = sum(load(s.leaving + t * W)) / scale;
            a.di[at + t] = arrives;
            a.row_flow[slot + t] = leaves - arrives;
        }
        for (int64_t t = length; t < a.chunk; ++t) a.row_flow[slot + t] = 0.0;
    }

    OXL_PHASE void keys(int64_t p) {
        const int64_t first = p * COLUMNS;
        const float *dc = s.dc + p * panel;
        for (int64_t row = 0; row < rows; row += ROWS) {
            Tile tile;
            tile.clear();
            if (flows_back) tile.multiply(s.v + row * s.tall, s.tall, 1, dc, COLUMNS, a.dv);
            for (int c = 0; c < VECTORS; ++c)
                for (int r = 0; r < ROWS; ++r) tile.at[r][c] += load(s.dn + first + c * W);
            tile.scale_rows(s.to_state + row);
            tile.multiply(s.d_scores + row * across + row, 1, across, s.query_panels + (p * length + row) * COLUMNS,
                          COLUMNS, length - row);
            replace(s.k, row, first, tile, s.arriving);
        }
    }

    OXL_PHASE void queries(int64_t chunk, int64_t p) {
        const int64_t first = p * COLUMNS;
        const float *c = s.states + chunk * s.state + p * panel, *n = s.normalisers + chunk * s.wide + first;
        for (int64_t row = 0; row < rows; row += ROWS) {
            Tile tile;
            tile.clear();
            if (chunk > 0 || !starts_empty) tile.multiply(s.y + row * s.tall, s.tall, 1, c, COLUMNS, a.dv);
            for (int r = 0; r < ROWS; ++r)
                for (int e = 0; e < VECTORS; ++e) tile.at[r][e] += load(n + e * W) * s.rho[row + r];
            tile.scale_rows(s.beta + row);
            const int64_t until = row + ROWS < length ? row + ROWS : length;
            tile.multiply(s.d_scores + row * across, across, 1, s.key_panels + p * length * COLUMNS, COLUMNS, until);
            for (int r = 0; r < ROWS; ++r)
                for (int e = 0; e < VECTORS; ++e) tile.at[r][e] *= scale;
            replace(s.q, row, first, tile, s.leaving);
        }
    }

    OXL_PHASE void carry(int64_t chunk, int64_t p) {
        const float kept = keep(chunk), *carried = s.carried_panels + p * length * COLUMNS;
        float *dc = s.dc + p * panel, *dn = s.dn + p * COLUMNS;
        for (int64_t e = 0; e < s.tall; e += ROWS) {
            Tile tile;
            tile.read(dc + e * COLUMNS, COLUMNS, kept);
            tile.multiply(s.y + e, 1, s.tall, carried, COLUMNS, length);
            tile.write(dc + e * COLUMNS, COLUMNS);
        }
        for (int c = 0; c < VECTORS; ++c) {
            vf total = load(dn + c * W) * kept;
            for (int64_t t = 0; t < length; ++t) total += load(carried + t * COLUMNS + c * W) * s.rho[t];
            store(dn + c * W, total);
        }
    }

    // Put a tile of gradients in the place of the queries or keys it belongs to, and add its products with them.
    OXL_INLINE void replace(float *x, int64_t row, int64_t first, const Tile &tile, float *dots) const {
        for (int r = 0; r < ROWS; ++r) {
            vf dot = load(dots + (row + r) * W);
            for (int c = 0; c < VECTORS; ++c) dot += tile.at[r][c] * load(x + (row + r) * s.wide + first + c * W);
            store(dots + (row + r) * W, dot);
        }
        tile.write(x + row * s.wide + first, s.wide);
    }

    // <C, dC> + n . dn, each panel row summed on its own
    OXL_PHASE double inner(int64_t chunk) const {
        const float *c = s.states + chunk * s.state, *n = s.normalisers + chunk * s.wide;
        double total = 0.0;
        for (int64_t e = 0; e < s.state; e += panel) {
            vf part[4] = {};
            for (int64_t at = 0; at + 4 * W <= panel; at += 4 * W)
                for (int u = 0; u < 4; ++u) part[u] += load(c + e + at + u * W) * load(s.dc + e + at + u * W);
            for (int64_t at = panel / (4 * W) * (4 * W); at < panel; at += W)
                part[0] += load(c + e + at) * load(s.dc + e + at);
            for (int u = 0; u < 4; ++u) total += sum(part[u]);
        }
        vf part = {};
        for (int64_t d = 0; d < s.wide; d += W) part += load(n + d) * load(s.dn + d);
        return total + sum(part);
    }

    void run() {
        const int64_t size = a.dk * a.dv;
        pack_state(a.c0 + pair * size, s.states);
        starts_empty = !occupied(a.c0 + pair * size, size), flows_back = a.dc_last != nullptr;
        for (int64_t d = 0; d < s.wide; ++d) s.normalisers[d] = d < a.dk ? a.n0[pair * a.dk + d] : 0.0f;
        const bool last = a.dc_last || a.dn_last;
        for (int64_t chunk = 0; chunk + !last < a.chunks; ++chunk) advance(chunk);
        __builtin_memset(s.dc, 0, sizeof(float) * s.state);
        if (a.dc_last) pack_state(a.dc_last + pair * size, s.dc);
        for (int64_t d = 0; d < s.wide; ++d) s.dn[d] = a.dn_last && d < a.dk ? a.dn_last[pair * a.dk + d] : 0.0f;
        double flow = last ? inner(a.chunks) : 0.0;
        for (int64_t chunk = a.chunks; chunk-- > 0;) {
            a.chunk_flow[pair * a.chunks + chunk] = flow;
            begin(chunk);
            read(a.q, chunk, a.dk, scale, s.q, s.wide);
            load_outputs(chunk);
            load_scores(chunk);
            values(chunk);
            keys_and_queries(chunk);
            flows_back = true;
            flow = inner(chunk);
        }
        a.first_flow[pair] = flow;
        unpack_state(s.dc, a.dc0 + pair * size);
        __builtin_memcpy(a.dn0 + pair * a.dk, s.dn, sizeof(float) * a.dk);
    }
};

void mlstm_backward(const oxl::Mlstm &a, int64_t task, float *scratch) { Backward(a, task, scratch).run(); }

int64_t mlstm_backward_scratch(const oxl::Mlstm &a) { return BackwardSpace(a, nullptr).floats; }

}  // namespace
