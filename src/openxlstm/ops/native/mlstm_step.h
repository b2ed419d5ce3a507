// One token of the mLSTM in one sweep over the memory: decay, rank-one update and readout together.
//
//     C' = kept C + added k v^T      n' = kept n + added k      h = s C'^T q / (max(|s n'.q|, exp(-m')) + eps)
//
// Bound by reading and writing C once. Four rows of C stream at a time; the readout of a share of the value
// columns stays in the first-level cache. Equations: openxlstm.ops.mlstm.reference.step.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace {

inline float log_sigmoid_scalar(float x) {
    return (x < 0 ? x : 0.0f) - __builtin_log1pf(__builtin_expf(-__builtin_fabsf(x)));
}

struct StepGates {
    float kept, added, m;
};

inline StepGates step_gates(float i, float f, float m, bool sigmoid) {
    const float log_f = log_sigmoid_scalar(f);
    if (sigmoid) return {__builtin_expf(log_f), __builtin_expf(log_sigmoid_scalar(i)), 0.0f};
    const float carried = log_f + m;
    float next = carried >= i ? carried : i;
    if (next == -__builtin_inff()) next = 0.0f;  // nothing kept, nothing added: the empty state
    return {__builtin_expf(carried - next), __builtin_expf(i - next), next};
}

// C' = kept C + wk v^T and out += qs C' for `columns` columns of a memory of dk rows, `stride` apart; out starts as
// zero. May work in place.
template <class T>
inline void sweep_memory(const T *c, T *c_out, int64_t dk, int64_t stride, int64_t columns, float kept, const float *wk,
                         const float *qs, const float *v, float *out) {
    for (int64_t j = 0; j < columns; j += W) store(out + j, vf{}, columns - j);
    constexpr int ROWS = 4;
    int64_t row = 0;
    for (; row + ROWS <= dk; row += ROWS) {
        const T *from = c + row * stride;
        T *to = c_out + row * stride;
        for (int64_t j = 0; j < columns; j += W) {
            const int64_t left = columns - j;
            const vf value = load(v + j, left);
            vf h = load(out + j, left);
            for (int r = 0; r < ROWS; ++r) {
                const vf next = load(from + r * stride + j, left) * kept + value * wk[row + r];
                store(to + r * stride + j, next, left);
                h = h + next * qs[row + r];
            }
            store(out + j, h, left);
        }
    }
    for (; row < dk; ++row)
        for (int64_t j = 0; j < columns; j += W) {
            const int64_t left = columns - j;
            const vf next = load(c + row * stride + j, left) * kept + load(v + j, left) * wk[row];
            store(c_out + row * stride + j, next, left);
            store(out + j, load(out + j, left) + next * qs[row], left);
        }
}

// max(|r|, exp(-m)) + eps
inline float step_divisor(float r, float m, float eps) {
    const float size = __builtin_fabsf(r), least = __builtin_expf(-m);
    return (size >= least || size != size ? size : least) + eps;
}

// scratch: 2 dk + dv floats, each part rounded up to 16
void mlstm_step(const oxl::MlstmStep &a, int64_t task, float *scratch) {
    const int64_t pair = task / a.splits, split = task % a.splits, dk = a.dk, dv = a.dv;
    const int64_t share = oxl::round_up((dv + a.splits - 1) / a.splits, 16);
    const int64_t begin = split * share < dv ? split * share : dv;
    const int64_t columns = (begin + share < dv ? begin + share : dv) - begin;
    const StepGates g = step_gates(a.i[pair], a.f[pair], a.m[pair], a.sigmoid);
    const float scale = (float)(1.0 / __builtin_sqrt((double)dk));

    float *qs = scratch, *wk = qs + oxl::round_up(dk, 16), *out = wk + oxl::round_up(dk, 16);
    const float *q = a.q + pair * dk, *k = a.k + pair * dk, *n = a.n + pair * dk;
    float *n_out = a.n_out + pair * dk;
    vf dot = {};
    for (int64_t d = 0; d < dk; d += W) {
        const vf scaled = load(q + d, dk - d) * scale, weighted = load(k + d, dk - d) * g.added;
        const vf next = load(n + d, dk - d) * g.kept + weighted;
        store(qs + d, scaled, dk - d);
        store(wk + d, weighted, dk - d);
        if (split == 0) store(n_out + d, next, dk - d);
        dot += scaled * next;
    }
    if (split == 0) a.m_out[pair] = g.m;

    const float *v = a.v + pair * dv + begin, *c = a.c + pair * dk * dv + begin;
    float *c_out = a.c_out + pair * dk * dv + begin;
    sweep_memory(c, c_out, dk, dv, columns, g.kept, wk, qs, v, out);

    const float divisor = a.normalize ? step_divisor(sum(dot), g.m, a.eps) : 1.0f;
    float *h = a.h + pair * dv + begin;
    for (int64_t j = 0; j < columns; j += W) store(h + j, load(out + j, columns - j) / divisor, columns - j);
}

}  // namespace
