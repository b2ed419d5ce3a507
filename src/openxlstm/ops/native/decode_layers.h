// One token of a language model: embedding, blocks, head. Every member of the team runs the same program, phase by
// phase; what a phase needs as input (norms and the like, cheap) each member computes for itself.
//
// Tasks share no arithmetic, so bits depend neither on the number of members nor on the rest of the batch.
// Equations: openxlstm.layers.large, mlstm_layer, slstm_layer, feedforward.
#pragma once

#include "bfloat16.h"
#include "decode.h"
#include "elementwise.h"
#include "mlstm_step.h"
#include "products.h"

namespace {

constexpr int64_t TASK_BYTES = 64 << 10;  // of weights: small against a phase, large against the cost of taking one

// With the scales.
inline int64_t bytes_per_row(const oxl::Weight &w) {
    const int64_t eighths = w.kind == oxl::WEIGHT_F32 ? 32 : w.kind == oxl::WEIGHT_BF16 ? 16 : w.kind == oxl::WEIGHT_INT8 ? 8 : 5;
    return w.columns * eighths / 8 + 1;
}

// Of the packed or plain numbers alone.
inline int64_t data_bytes(const oxl::Weight &w) {
    if (w.kind == oxl::WEIGHT_INT4) return padded_columns(w) / 2;
    return w.columns * (w.kind == oxl::WEIGHT_F32 ? 4 : w.kind == oxl::WEIGHT_BF16 ? 2 : 1);
}

// A stretch of `rows` rows cut into tasks.
struct Cut {
    int64_t rows, each, count;
    explicit Cut(const oxl::Weight &w) : Cut(w.rows, bytes_per_row(w)) {}
    Cut(int64_t all, int64_t bytes) : rows(all) {
        each = oxl::round_up(TASK_BYTES / bytes + 1, 16);
        if (each > all) each = all > 0 ? all : 1;
        count = (all + each - 1) / each;
    }
    int64_t begin(int64_t task) const { return task * each; }
    int64_t end(int64_t task) const { return (task + 1) * each < rows ? (task + 1) * each : rows; }
};

// Both branches of an mLSTM block are made together, and the two halves of a feed-forward.
inline Cut up_cut(const oxl::Layer &y) { return {y.heads * y.dv, bytes_per_row(y.up.weight) + bytes_per_row(y.z.weight)}; }
inline Cut ffn_cut(const oxl::Layer &y) { return {y.hidden, bytes_per_row(y.ffn_gate.weight) + bytes_per_row(y.ffn_up.weight)}; }

struct Token {
    const oxl::Decode &a;
    const Workspace w;
    oxl::Team &team;
    const int worker;
    float *const own;     // (batch, inner): the input of this member's products
    float *const memory;  // vectors of one memory's step
    float *const rows;    // (heads)
    float *const scales;  // (batch) of the codes
    int16_t *const codes;  // (batch, code_stride) of the input of a quantised product
    int64_t phase = 0;
    struct {
        const float *x;
        int64_t phase, columns;
        int32_t kind;
    } coded = {nullptr, -1, 0, 0};  // what the codes stand for

    Token(const oxl::Decode &args, oxl::Team &members, int number)
        : a(args), w(args, args.workspace), team(members), worker(number), own(w.own + number * w.own_floats),
          memory(own + Workspace::padded(args.batch * w.inner)),
          rows(own + w.own_floats - w.code_floats(args.batch) - Workspace::padded(w.heads)),
          scales(own + w.own_floats - w.code_floats(args.batch)),
          codes(reinterpret_cast<int16_t *>(scales + Workspace::padded(args.batch))) {}

    // Tasks 0 .. count - 1, shared with the team; `prepare` runs before the first one that is ours, `next` is wanted then.
    template <class Prepare, class Work>
    void share(int64_t count, const Prepare &prepare, const Work &work, oxl::Ahead next = {}) {
        int64_t done = 0;
        for (int64_t task; (task = oxl::team_claim(team, phase, count, worker)) >= 0; ++done) {
            if (done == 0) prepare();
            work(task);
        }
        oxl::team_finish(team, phase++, count, done, next);
    }

    // The weights of this member's first task in a phase, as far as its products do not ask for themselves.
    oxl::Ahead first_of(const oxl::Weight &weight, const Cut &cut, int64_t task) const {
        return {static_cast<const char *>(weight.data) + cut.begin(task) * data_bytes(weight), WEIGHTS_AHEAD<1>};
    }
    oxl::Ahead beginning(const oxl::Linear &map, const Cut &cut) const {
        return first_of(map.weight, cut, cut.count * worker / oxl::team_size(team));
    }
    oxl::Ahead beginning(const oxl::Linear &map) const { return beginning(map, Cut(map.weight)); }

    // Of the phase with which a block, or after the last one the prediction, begins.
    oxl::Ahead beginning(int64_t layer) const {
        if (layer == a.num_layers) return beginning(a.head);
        const oxl::Layer &y = a.layers[layer];
        if (y.kind == oxl::MLSTM_BLOCK) return beginning(y.up, up_cut(y));
        if (y.kind == oxl::SLSTM_BLOCK) return {};
        const oxl::Linear *const maps[] = {&y.q, &y.k, &y.v, &y.o, &y.i, &y.f};
        int64_t task = 0;
        for (const oxl::Linear *map : maps) task += Cut(map->weight).count;
        task = task * worker / oxl::team_size(team);
        for (const oxl::Linear *map : maps) {
            const Cut cut(map->weight);
            if (task < cut.count) return first_of(map->weight, cut, task);
            task -= cut.count;
        }
        return {};
    }

    // What follows the recurrent half of a block.
    oxl::Ahead after_mixing(const oxl::Layer &y) const {
        return y.hidden ? beginning(y.ffn_gate, ffn_cut(y)) : beginning(&y - a.layers + 1);
    }

    // y[b][r] = bias + sum w x for rows begin .. end
    void multiply(const oxl::Linear &map, int64_t begin, int64_t end, const float *x, int64_t x_stride, float *y,
                  int64_t y_stride) {
        const oxl::Weight &weight = map.weight;
        if (weight.kind == oxl::WEIGHT_INT8 || weight.kind == oxl::WEIGHT_INT4) {
            encode_once(weight, x, x_stride);
            multiply_codes(weight, begin, end, {codes, scales, w.code_stride}, a.batch, y, y_stride);
        } else {
            multiply_rows(weight, begin, end, x, x_stride, a.batch, y, y_stride);
        }
        if (!map.bias) return;
        for (int64_t b = 0; b < a.batch; ++b)
            for (int64_t r = begin; r < end; ++r) y[b * y_stride + r] += map.bias[r];
    }

    // Inputs do not change within a phase: their codes are made for the first of this member's tasks only.
    void encode_once(const oxl::Weight &weight, const float *x, int64_t x_stride) {
        if (coded.x == x && coded.phase == phase && coded.columns == weight.columns && coded.kind == weight.kind) return;
        coded = {x, phase, weight.columns, weight.kind};
        for (int64_t b = 0; b < a.batch; ++b) {
            const ActivationScale found = activation_scale(x + b * x_stride, weight.columns, 32767.0f);
            scales[b] = found.scale;
            encode(weight.kind, x + b * x_stride, weight.columns, found.factor, codes + b * w.code_stride);
        }
    }

    void normalize_residual(const oxl::Norm &norm) const {
        for (int64_t b = 0; b < a.batch; ++b)
            normalize(norm, w.x + b * w.width, w.width, norm.weight, norm.bias, own + b * w.inner);
    }

    // The residual stream gains the product of `map` with what `prepare` leaves in `own`.
    template <class Prepare, class First>
    void project_down(const oxl::Linear &map, const Prepare &prepare, const First &first, oxl::Ahead next) {
        const Cut cut(map.weight);
        share(cut.count, prepare, [&](int64_t task) {
            if (task == 0) first();
            multiply(map, cut.begin(task), cut.end(task), own, w.inner, w.sum, w.width);
            for (int64_t b = 0; b < a.batch; ++b)
                for (int64_t r = cut.begin(task); r < cut.end(task); ++r) w.x[b * w.width + r] += w.sum[b * w.width + r];
        }, next);
    }

    void feed_forward(const oxl::Layer &y) {
        if (y.hidden == 0) return;
        const Cut cut = ffn_cut(y), down(y.ffn_down.weight);
        share(cut.count, [&] { normalize_residual(y.ffn_norm); }, [&](int64_t task) {
            const int64_t begin = cut.begin(task), end = cut.end(task);
            multiply(y.ffn_gate, begin, end, own, w.inner, w.hidden, w.ffn);
            multiply(y.ffn_up, begin, end, own, w.inner, w.up, w.ffn);
            for (int64_t b = 0; b < a.batch; ++b) {
                float *gate = w.hidden + b * w.ffn;
                const float *up = w.up + b * w.ffn;
                for (int64_t r = begin; r < end; r += W)
                    store(gate + r, activate(y.activation, load(gate + r, end - r)) * load(up + r, end - r), end - r);
            }
        }, beginning(y.ffn_down));
        share(down.count, [] {}, [&](int64_t task) {
            multiply(y.ffn_down, down.begin(task), down.end(task), w.hidden, w.ffn, w.sum, w.width);
            for (int64_t b = 0; b < a.batch; ++b)
                for (int64_t r = down.begin(task); r < down.end(task); ++r) w.x[b * w.width + r] += w.sum[b * w.width + r];
        }, beginning(&y - a.layers + 1));
    }

    // Steps all memories of an mLSTM: w.qkv, w.i, w.f -> w.h, and the next n and m beside the state: other tasks may
    // still read the old ones.
    template <class Gates>
    void step_memories(const oxl::Layer &y, const Gates &gates) {
        int64_t splits = 1;
        while (y.dv / splits >= 128 && a.batch * y.heads * splits < 16) splits *= 2;
        const int64_t share_columns = oxl::round_up((y.dv + splits - 1) / splits, 16);
        share(a.batch * y.heads * splits, [] {}, [&](int64_t task) {
            const int64_t b = task / (y.heads * splits), head = task / splits % y.heads, begin = task % splits * share_columns;
            if (begin >= y.dv) return;
            const int64_t columns = begin + share_columns < y.dv ? share_columns : y.dv - begin;
            const int64_t from = a.source[b] * y.heads + head, to = a.target[b] * y.heads + head, size = y.dk * y.dv;
            float i, f;
            gates(b, head, i, f);
            const StepGates g = step_gates(i, f, y.m[from], false);
            if (a.state_kind == oxl::WEIGHT_BF16) {
                bf16 *c = static_cast<bf16 *>(y.c);
                step_memory(y, b, head, begin, columns, g, c + from * size + begin, c + to * size + begin, y.n + from * y.dk);
            } else {
                float *c = static_cast<float *>(y.c);
                step_memory(y, b, head, begin, columns, g, c + from * size + begin, c + to * size + begin, y.n + from * y.dk);
            }
        }, beginning(y.out));
    }

    template <class T>
    void step_memory(const oxl::Layer &y, int64_t b, int64_t head, int64_t begin, int64_t columns, const StepGates &g,
                     const T *c, T *c_out, const float *n) const {
        const float *row = w.qkv + b * w.qkv_width, *q = row + head * y.dk, *k = q + y.heads * y.dk;
        const float *v = row + 2 * y.heads * y.dk + head * y.dv + begin;
        float *qs = memory, *wk = qs + oxl::round_up(y.dk, 16), *out = wk + oxl::round_up(y.dk, 16);
        const float scale = (float)(1.0 / __builtin_sqrt((double)y.dk));
        float *n_next = w.n_next + b * w.qk + head * y.dk;
        vf dot = {};
        for (int64_t d = 0; d < y.dk; d += W) {
            const int64_t left = y.dk - d;
            const vf scaled = load(q + d, left) * scale, weighted = load(k + d, left) * g.added;
            const vf next = load(n + d, left) * g.kept + weighted;
            store(qs + d, scaled, left);
            store(wk + d, weighted, left);
            if (begin == 0) store(n_next + d, next, left);
            dot += scaled * next;
        }
        if (begin == 0) w.m_next[b * w.heads + head] = g.m;
        sweep_memory(c, c_out, y.dk, y.dv, columns, g.kept, wk, qs, v, out);
        const float divisor = step_divisor(sum(dot), g.m, y.eps);
        float *h = w.h + b * w.inner + head * y.dv + begin;
        for (int64_t j = 0; j < columns; j += W) store(h + j, load(out + j, columns - j) / divisor, columns - j);
    }

    // Put the next n and m into the state: in the phase after step_memories.
    void keep_normalizers(const oxl::Layer &y) const {
        for (int64_t b = 0; b < a.batch; ++b) {
            __builtin_memcpy(y.n + a.target[b] * y.heads * y.dk, w.n_next + b * w.qk, y.heads * y.dk * sizeof(float));
            __builtin_memcpy(y.m + a.target[b] * y.heads, w.m_next + b * w.heads, y.heads * sizeof(float));
        }
    }

    // own = the head norm of w.h, without weights
    void normalize_heads(const oxl::Layer &y, int64_t b) const {
        for (int64_t head = 0; head < y.heads; ++head)
            normalize(y.head_norm, w.h + b * w.inner + head * y.dv, y.dv, nullptr, nullptr, own + b * w.inner + head * y.dv);
    }

    void large(const oxl::Layer &y) {
        const int64_t qk = y.heads * y.dk, values = y.heads * y.dv;
        struct {
            const oxl::Linear &map;
            float *to;
            int64_t stride;
        } const parts[] = {{y.q, w.qkv, w.qkv_width}, {y.k, w.qkv + qk, w.qkv_width}, {y.v, w.qkv + 2 * qk, w.qkv_width},
                           {y.o, w.o, w.inner}, {y.i, w.i, w.heads}, {y.f, w.f, w.heads}};
        int64_t count = 0;
        for (const auto &part : parts) count += Cut(part.map.weight).count;
        share(count, [&] { normalize_residual(y.norm); }, [&](int64_t task) {
            for (const auto &part : parts) {
                const Cut cut(part.map.weight);
                if (task < cut.count) {
                    multiply(part.map, cut.begin(task), cut.end(task), own, w.inner, part.to, part.stride);
                    if (&part.map == &y.i || &part.map == &y.f)
                        for (int64_t b = 0; b < a.batch; ++b)
                            for (int64_t r = cut.begin(task); r < cut.end(task); ++r) {
                                float *gate = part.to + b * part.stride + r;
                                *gate = soft_cap(splat(*gate), y.gate_cap)[0];
                            }
                    return;
                }
                task -= cut.count;
            }
        });
        step_memories(y, [&](int64_t b, int64_t head, float &i, float &f) {
            i = w.i[b * w.heads + head], f = w.f[b * w.heads + head];
        });
        project_down(
            y.out,
            [&] {
                for (int64_t b = 0; b < a.batch; ++b) {
                    normalize_heads(y, b);
                    float *h = own + b * w.inner;
                    const float *o = w.o + b * w.inner;
                    for (int64_t j = 0; j < values; j += W) {
                        const int64_t left = values - j;
                        vf value = load(h + j, left) * load(y.head_norm.weight + j, left);
                        if (y.head_norm.bias) value = value + load(y.head_norm.bias + j, left);
                        store(h + j, value * sigmoid(load(o + j, left)), left);
                    }
                }
            },
            [&] { keep_normalizers(y); }, after_mixing(y));
        feed_forward(y);
    }

    // y[j] = bias + block-diagonal map of x for the blocks [begin, end)
    static void multiply_diagonal(const float *map, const float *bias, int64_t block, int64_t begin, int64_t end,
                                  const float *x, float *y) {
        for (int64_t n = begin; n < end; ++n) {
            const float *blocks = map + n * block * block, *in = x + n * block;
            float *out = y + n * block;
            for (int64_t e = 0; e < block; ++e) out[e] = bias ? bias[n * block + e] : 0.0f;
            for (int64_t d = 0; d < block; ++d)
                for (int64_t e = 0; e < block; ++e) out[e] += blocks[d * block + e] * in[d];
        }
    }

    void mlstm_block(const oxl::Layer &y) {
        const int64_t inner = y.heads * y.dv;
        const Cut up = up_cut(y);
        share(up.count, [&] { normalize_residual(y.norm); }, [&](int64_t task) {
            multiply(y.up, up.begin(task), up.end(task), own, w.inner, w.h, w.inner);
            multiply(y.z, up.begin(task), up.end(task), own, w.inner, w.o, w.inner);
        });
        const Cut cut(inner / y.block, 64 * 3 * y.block * y.block);
        share(cut.count * a.batch, [] {}, [&](int64_t task) {
            const int64_t b = task / cut.count, first = cut.begin(task % cut.count), last = cut.end(task % cut.count);
            const int64_t begin = first * y.block, end = last * y.block, past = (y.taps ? y.taps - 1 : 0) * inner;
            const float *branch = w.h + b * w.inner;
            float *smooth = w.convolved + b * w.inner, *row = w.qkv + b * w.qkv_width, *z = w.o + b * w.inner;
            convolve(y, inner, begin, end, branch, y.conv_state + a.source[b] * past, y.conv_state + a.target[b] * past, smooth);
            for (int map = 0; map < 3; ++map)
                multiply_diagonal(y.diagonal[map], y.diagonal_bias[map], y.block, first, last, map < 2 ? smooth : branch, row + map * inner);
            for (int64_t j = begin; j < end; j += W) {
                const vf value = load(z + j, end - j);
                store(z + j, value * sigmoid(value), end - j);
            }
        });
        step_memories(y, [&](int64_t b, int64_t head, float &i, float &f) {
            const auto gate = [&](const oxl::Linear &map) {
                multiply_rows(map.weight, head, head + 1, w.qkv + b * w.qkv_width, 0, 1, rows, 0);
                return rows[head] + map.bias[head];
            };
            i = gate(y.i), f = gate(y.f);
        });
        project_down(
            y.out,
            [&] {
                for (int64_t b = 0; b < a.batch; ++b) {
                    normalize_heads(y, b);
                    float *h = own + b * w.inner;
                    const float *smooth = w.convolved + b * w.inner, *z = w.o + b * w.inner;
                    for (int64_t j = 0; j < inner; j += W) {
                        const int64_t left = inner - j;
                        const vf value = load(h + j, left) * load(y.head_norm.weight + j, left);
                        store(h + j, (value + load(y.skip + j, left) * load(smooth + j, left)) * load(z + j, left), left);
                    }
                }
            },
            [&] { keep_normalizers(y); }, after_mixing(y));
        feed_forward(y);
    }

    void slstm_block(const oxl::Layer &y) {
        const int64_t d = y.dv, heads = y.heads, width = heads * d;
        float *const cell = static_cast<float *>(y.c);
        share(a.batch, [] {}, [&](int64_t b) {
            float *normed = w.normed + b * w.width;
            const int64_t past = (y.taps ? y.taps - 1 : 0) * width;
            normalize(y.norm, w.x + b * w.width, width, y.norm.weight, y.norm.bias, normed);
            convolve(y, width, 0, width, normed, y.conv_state + a.source[b] * past, y.conv_state + a.target[b] * past, w.convolved + b * w.inner);
            __builtin_memcpy(w.h + b * w.inner, y.h + a.source[b] * width, width * sizeof(float));
        });
        struct {
            const oxl::Linear &map;
            const float *x;
            int64_t x_stride, rows;  // rows of one head
            float *to;
        } const parts[] = {
            {y.i, w.convolved, w.inner, d, w.gates},         {y.f, w.convolved, w.inner, d, w.gates + width},
            {y.z, w.normed, w.width, d, w.gates + 2 * width}, {y.o, w.normed, w.width, d, w.gates + 3 * width},
            {y.recurrent, w.h, w.inner, 4 * d, w.recurrent},
        };
        int64_t count = 0;
        for (const auto &part : parts) count += heads * Cut(part.rows, bytes_per_row(part.map.weight)).count;
        share(count, [] {}, [&](int64_t task) {
            for (const auto &part : parts) {
                const Cut cut(part.rows, bytes_per_row(part.map.weight));
                if (task < heads * cut.count) {
                    const int64_t head = task / cut.count, first = head * part.rows;
                    multiply_rows(part.map.weight, first + cut.begin(task % cut.count), first + cut.end(task % cut.count),
                                  part.x + head * d, part.x_stride, a.batch, part.to, w.four);
                    return;
                }
                task -= heads * cut.count;
            }
        });
        share(a.batch * heads, [] {}, [&](int64_t task) {
            const int64_t b = task / heads, head = task % heads;
            const float *gates = w.gates + b * w.four + head * d, *recurrent = w.recurrent + b * w.four + head * 4 * d;
            const float *bias = y.recurrent.bias + head * d;
            const int64_t from = (a.source[b] * heads + head) * d, to = (a.target[b] * heads + head) * d;
            for (int64_t e = 0; e < d; e += W) {
                const int64_t left = d - e;
                const auto gate = [&](int64_t g) {
                    return load(recurrent + g * d + e, left) + (load(gates + g * width + e, left) + load(bias + g * width + e, left));
                };
                const vf p_i = gate(0), p_f = gate(1), z = tanh(gate(2)), o = sigmoid(gate(3)), zero = {};
                const vf c_before = load(cell + from + e, left);
                vf h;
                if (y.cell == oxl::LSTM) {
                    const vf c = sigmoid(p_f) * c_before + sigmoid(p_i) * z;
                    store(cell + to + e, c, left);
                    h = o * tanh(c);
                } else {
                    const vf n_before = load(y.n + from + e, left), carried = load(y.m + from + e, left) + log_sigmoid(p_f);
                    const vf next = select(n_before == 0.0f, p_i, max(carried, p_i));
                    const vf i = exp(min(p_i - next, zero)), f = exp(min(carried - next, zero));
                    const vf c = f * c_before + i * z, n = f * n_before + i;
                    store(cell + to + e, c, left), store(y.n + to + e, n, left), store(y.m + to + e, next, left);
                    h = o * (c / n);
                }
                store(y.h + to + e, h, left);
            }
            float *normed = own;
            normalize(y.head_norm, y.h + to, d, y.head_norm.weight + head * d, nullptr, normed);
            float *x = w.x + b * w.width + head * d;
            for (int64_t e = 0; e < d; e += W) store(x + e, load(x + e, d - e) + load(normed + e, d - e), d - e);
        });
        feed_forward(y);
    }

    void embed() {
        share(a.batch, [] {}, [&](int64_t b) {
            const int64_t at = a.tokens[b] * w.width;
            float *x = w.x + b * w.width;
            if (a.embedding.kind == oxl::WEIGHT_BF16) {
                const bf16 *row = static_cast<const bf16 *>(a.embedding.data) + at;
                for (int64_t j = 0; j < w.width; j += W) store(x + j, load(row + j, w.width - j), w.width - j);
            } else {
                __builtin_memcpy(x, static_cast<const float *>(a.embedding.data) + at, w.width * sizeof(float));
            }
        });
    }

    void predict() {
        const int64_t vocabulary = a.head.weight.rows;
        const Cut cut(a.head.weight);
        const auto prepare = [&] {
            if (a.out_norm.kind != oxl::NO_NORM) return normalize_residual(a.out_norm);
            for (int64_t b = 0; b < a.batch; ++b) __builtin_memcpy(own + b * w.inner, w.x + b * w.width, w.width * sizeof(float));
        };
        share(cut.count, prepare, [&](int64_t task) {
            const int64_t begin = cut.begin(task), end = cut.end(task);
            multiply(a.head, begin, end, own, w.inner, a.logits, vocabulary);
            if (a.logit_cap > 0)
                for (int64_t b = 0; b < a.batch; ++b)
                    for (int64_t r = begin; r < end; r += W) {
                        float *logit = a.logits + b * vocabulary + r;
                        store(logit, soft_cap(load(logit, end - r), a.logit_cap), end - r);
                    }
        });
    }

    void run() {
        embed();
        for (int64_t l = 0; l < a.num_layers; ++l) {
            const oxl::Layer &y = a.layers[l];
            if (y.kind == oxl::LARGE) large(y);
            else if (y.kind == oxl::MLSTM_BLOCK) mlstm_block(y);
            else slstm_block(y);
        }
        predict();
    }
};

void decode(const oxl::Decode &a, oxl::Team &team, int worker) { Token(a, team, worker).run(); }

}  // namespace
