// Scalars of one head's gates, a chunk at a time, and their gradients: openxlstm.ops.mlstm.gates in one sweep each way.
//
// Sums of log gates and the stabiliser run in float64, one position after the other; a chunk needs no more of the past than
// the stabiliser that enters it. A cut is a position whose past does not count: sums restart there, so that nothing crosses.
#pragma once

#include "bfloat16.h"
#include "kernels.h"
#include "tiles.h"

namespace {

// Hands out parts of one block of memory, each at a 64-byte boundary; without a block it only counts.
struct Arena {
    float *base;
    int64_t used = 0;

    template <class Unit = float>
    Unit *take(int64_t count) {
        float *part = base ? base + used : nullptr;
        used += oxl::round_up(count * static_cast<int64_t>(sizeof(Unit) / sizeof(float)), 16);
        return reinterpret_cast<Unit *>(part);
    }
};

// Columns of the scores: whole tiles in both directions.
inline int64_t score_columns(const oxl::Mlstm &a) { return whole_columns(whole_rows(a.chunk)); }

struct Gates {
    static constexpr int32_t CUT = 1, BY_FORGET = 2;  // BY_FORGET: the stabiliser came from the one before
    static constexpr float INF = __builtin_inff();

    const oxl::Mlstm &a;
    const float scale;  // of the products of queries and keys
    const int64_t batch, head;
    int64_t start = 0, length = 0;  // of the chunk that is loaded
    // Position s reaches position t of the chunk with weight exp(rows[t] + columns[s]) if s <= t and both have the same
    // segment. Both are sums of two floats, for they cancel.
    float *rows, *rows_low, *columns, *columns_low;
    int32_t *segment, *flags;
    float *beta, *to_state, *floor;  // weight of the entering state, times the scale; in the leaving one; least divisor
    float keep = 0.0f;               // weight of the entering state in the leaving one
    float *i, *f, *log_i, *log_f, *floor_low;
    double *wide_columns;

    Gates(const oxl::Mlstm &args, int64_t pair, float factor, Arena &arena)
        : a(args), scale(factor), batch(pair / args.heads), head(pair % args.heads) {
        const int64_t n = score_columns(args);
        for (float **x : {&rows, &rows_low, &columns, &columns_low, &beta, &to_state, &floor, &i, &f, &log_i, &log_f, &floor_low})
            *x = arena.take(n);
        segment = arena.take<int32_t>(n);
        flags = arena.take<int32_t>(n);
        wide_columns = arena.take<double>(n);
    }

    double first_stabiliser() const { return a.sigmoid ? 0.0 : a.m0[batch * a.heads + head]; }

    // The scalars of a chunk, from the stabiliser that enters it; returns the one that leaves it.
    OXL_PHASE double load_chunk(int64_t chunk, double entering) {
        start = chunk * a.chunk, length = a.time - start < a.chunk ? a.time - start : a.chunk;
        read(a.i, i, log_i, a.sigmoid);
        read(a.f, f, log_f, true);
        const uint8_t *reset = a.reset ? a.reset + batch * a.time + start : nullptr;
        double m = entering, b = 0.0;
        int32_t cuts = 0;
        for (int64_t t = 0; t < length; ++t) {
            const double decay = log_f[t], added = log_i[t];
            const bool forgotten = log_f[t] == -INF, cut = forgotten || (reset && reset[t]);
            bool by_forget = true;
            if (!a.sigmoid) {
                const double kept = decay + (cut ? 0.0 : m);
                by_forget = kept >= added && !forgotten;
                m = kept > added || kept != kept ? kept : added;
                if (cut && m == -INF) m = 0.0;  // nothing kept, nothing added: the empty state
            }
            b = cut ? 0.0 : t == 0 ? decay : b + decay;
            cuts += cut;
            segment[t] = cuts, flags[t] = (cut ? CUT : 0) | (by_forget ? BY_FORGET : 0);
            wide_columns[t] = added - b;
            split(b - m, rows[t], rows_low[t]);
            split(wide_columns[t], columns[t], columns_low[t]);
            split(-m, floor[t], floor_low[t]);
            beta[t] = cuts == 0 ? static_cast<float>(b - m + entering) : -INF;
        }
        const double leave = b - m;  // what still decays until the chunk's end
        for (int64_t t = 0; t < length; ++t)
            to_state[t] = segment[t] == cuts ? static_cast<float>(wide_columns[t] + leave) : -INF;
        for (int64_t t = length; t < score_columns(a); ++t) {
            beta[t] = to_state[t] = columns[t] = -INF;
            columns_low[t] = floor[t] = floor_low[t] = 0.0f, segment[t] = -1;
        }
        for (int64_t t = 0; t < score_columns(a); t += W) {
            store(beta + t, exp(load(beta + t)) * scale);
            store(to_state + t, exp(load(to_state + t)));
            store(floor + t, exp(load(floor + t)) * (1.0f + load(floor_low + t)));
        }
        keep = cuts == 0 ? exp(splat(static_cast<float>(leave + entering)))[0] : 0.0f;
        return m;
    }

    // Multiply a row of scores, columns first .. first + COLUMNS, by its decays and the scale of scores; zero where nothing
    // may pass.
    OXL_INLINE void decay(int64_t row, int64_t first, vf (&scores)[VECTORS], vf *other) const {
        vi index;
        for (int e = 0; e < W; ++e) index[e] = e;
        for (int c = 0; c < VECTORS; ++c) {
            const int64_t at = first + c * W;
            vi segments;
            __builtin_memcpy(&segments, segment + at, sizeof segments);
            const vi open = (index <= static_cast<int32_t>(row - at)) & (segments == segment[row]);
            const vf exponent = (load(columns + at) + rows[row]) + (load(columns_low + at) + rows_low[row]);
            const vf weight = exp(exponent) * scale;
            scores[c] = select(open, scores[c] * weight, vf{});
            if (other) other[c] = select(open, other[c] * weight, vf{});
        }
    }

    // Gradients of the gates of the chunk that is loaded, from its end on. `arriving` and `leaving`, k . dk and q . dq, are
    // vectors of parts; `through` is the flow through the leaving state, and `path`, which is carried on, what enters the
    // stabiliser: `along` times -eps at each position.
    OXL_PHASE void gradients(const float *arriving, const float *leaving, const float *along, double through, double &path) {
        for (int64_t t = length; t-- > 0;) {
            const double arrives = sum(load(arriving + t * W)), leaves = sum(load(leaving + t * W));
            const bool cut = flags[t] & CUT, by_forget = flags[t] & BY_FORGET;
            through += leaves - arrives;
            double d_f = cut ? 0.0 : through, d_i = arrives;
            if (cut) through = 0.0;
            if (!a.sigmoid) {
                path += static_cast<double>(along[t]) * -static_cast<double>(a.eps);
                if (by_forget)
                    d_f += path;
                else if (i[t] > -INF)
                    d_i += path;
                if (cut || !by_forget) path = 0.0;
            }
            log_f[t] = static_cast<float>(d_f), log_i[t] = static_cast<float>(d_i);
        }
        for (int64_t t = 0; t < length; t += W) {
            store(log_f + t, load(log_f + t) * sigmoid(-load(f + t)));
            if (a.sigmoid) store(log_i + t, load(log_i + t) * sigmoid(-load(i + t)));
        }
        write(log_i, a.di);
        write(log_f, a.df);
    }

  private:
    static void split(double x, float &high, float &low) {
        high = static_cast<float>(x);
        low = __builtin_isinf(high) ? 0.0f : static_cast<float>(x - high);
    }

    // Pre-activations of the chunk and their logarithms, log sigmoid if it is one.
    void read(const oxl::View &x, float *gate, float *logarithm, bool is_sigmoid) const {
        const int64_t at = batch * x.b + start * x.t + head * x.h;
        for (int64_t t = 0; t < length; ++t)
            if (a.bfloat16_gates)
                gate[t] = load(static_cast<const bf16 *>(x.data) + at + t * x.t, 1)[0];
            else
                gate[t] = static_cast<const float *>(x.data)[at + t * x.t];
        for (int64_t t = length; t < oxl::round_up(length, W); ++t) gate[t] = 0.0f;
        for (int64_t t = 0; t < length; t += W) store(logarithm + t, is_sigmoid ? log_sigmoid(load(gate + t)) : load(gate + t));
    }

    void write(const float *gradient, void *out) const {
        for (int64_t t = 0; t < length; ++t) {
            const int64_t at = (batch * a.time + start + t) * a.heads + head;
            if (a.bfloat16_gates)
                store(static_cast<bf16 *>(out) + at, splat(gradient[t]), 1);
            else
                static_cast<float *>(out)[at] = gradient[t];
        }
    }
};

}  // namespace
