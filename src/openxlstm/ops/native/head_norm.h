// The norm of heads with what follows it, forward and backward, one pass over memory each:
//     u = (x - mean) / sqrt(var + eps), without `center` x / sqrt(mean(x^2) + eps)
//     p = scale * u + bias + skip_scale * skip,   y = p * act(gate)
// u is rounded to the type of x before the scale, as the models were trained. A task computes `block` rows. The backward pass keeps nothing and computes u and p again.
#pragma once

#include "bfloat16.h"
#include "kernels.h"
#include "vector.h"

namespace {

// As T keeps it.
template <class T>
inline vf kept(vf v) {
    return v;
}
template <>
inline vf kept<bf16>(vf v) {
    return (vf)(__builtin_convertvector(rounded(v), vu) << 16);
}

// One head of one row: its numbers, and where its channels begin among those of all heads. T is how x, gate and skip
// and their gradients are kept, Y how y and its gradient are.
template <class T, class Y>
struct NormedHead {
    const oxl::HeadNorm &a;
    int64_t row, first;
    const T *x;
    float mean = 0.0f, inverse;

    NormedHead(const oxl::HeadNorm &args, int64_t r, int64_t head) : a(args), row(r), first(head * args.d) {
        x = static_cast<const T *>(a.x) + r * a.x_r + head * a.x_h;
        if (a.center) {
            vf total = {};
            for (int64_t j = 0; j < a.d; j += W) total += load(x + j, a.d - j);
            mean = sum(total) / (float)a.d;
        }
        vf squares = {};
        for (int64_t j = 0; j < a.d; j += W) {
            vf centered = load(x + j, a.d - j) - mean;
            for (int64_t e = a.d - j; e < W; ++e) centered[e] = 0.0f;
            squares += centered * centered;
        }
        inverse = 1.0f / __builtin_sqrtf(sum(squares) / (float)a.d + a.eps);
    }
    vf u(int64_t j) const { return (load(x + j, a.d - j) - mean) * inverse; }
    vf vector(const float *values, int64_t j) const { return load(values + first + j, a.d - j); }
    vf at(const void *rows, int64_t stride, int64_t j) const {
        return load(static_cast<const T *>(rows) + row * stride + first + j, a.d - j);
    }
    vf before_gate(vf normed, int64_t j) const {
        vf p = a.scale ? normed * vector(a.scale, j) : normed;
        if (a.bias) p = p + vector(a.bias, j);
        if (a.skip) {
            const vf skip = at(a.skip, a.skip_r, j);
            p = a.skip_scale ? skip * vector(a.skip_scale, j) + p : p + skip;
        }
        return p;
    }
    void forward() const {
        Y *y = static_cast<Y *>(a.y) + row * a.heads * a.d + first;
        for (int64_t j = 0; j < a.d; j += W) {
            vf p = before_gate(kept<T>(u(j)), j);
            if (a.gate) {
                const vf gate = at(a.gate, a.gate_r, j), open = sigmoid(gate);
                p = p * (a.silu ? gate * open : open);
            }
            store(y + j, p, a.d - j);
        }
    }
    void put(void *rows, int64_t j, vf value) const {
        store(static_cast<T *>(rows) + row * a.heads * a.d + first + j, value, a.d - j);
    }
    void add(float *share, int64_t j, vf value) const {
        store(share + first + j, load(share + first + j, a.d - j) + value, a.d - j);
    }
    // d_u: working space for the gradients of u
    void backward(float *d_scale, float *d_bias, float *d_skip_scale, float *d_u) const {
        const Y *dy = static_cast<const Y *>(a.dy) + row * a.heads * a.d + first;
        vf total = {}, along = {};
        for (int64_t j = 0; j < a.d; j += W) {
            const vf normed = u(j), rounded_u = kept<T>(normed);
            vf d_p = load(dy + j, a.d - j);
            if (a.gate) {
                const vf gate = at(a.gate, a.gate_r, j), open = sigmoid(gate), flow = d_p * before_gate(rounded_u, j);
                put(a.d_gate, j, flow * open * (a.silu ? 1.0f + gate * (1.0f - open) : 1.0f - open));
                d_p = d_p * (a.silu ? gate * open : open);
            }
            if (a.skip) {
                put(a.d_skip, j, a.skip_scale ? d_p * vector(a.skip_scale, j) : d_p);
                if (d_skip_scale) add(d_skip_scale, j, d_p * at(a.skip, a.skip_r, j));
            }
            if (d_bias) add(d_bias, j, d_p);
            if (d_scale) add(d_scale, j, d_p * rounded_u);
            const vf flow = a.scale ? d_p * vector(a.scale, j) : d_p;
            store(d_u + j, flow, a.d - j);
            total += flow;
            along += flow * normed;
        }
        const float shift = a.center ? sum(total) / (float)a.d : 0.0f, slope = sum(along) / (float)a.d;
        for (int64_t j = 0; j < a.d; j += W)
            put(a.dx, j, (load(d_u + j, a.d - j) - shift - u(j) * slope) * inverse);
    }
};

// A task's share of a gradient (blocks, H D), set to zero, or null.
inline float *share(float *shares, int64_t task, int64_t width) {
    if (!shares) return nullptr;
    __builtin_memset(shares + task * width, 0, sizeof(float) * width);
    return shares + task * width;
}

template <class T, class Y>
void head_norm_block(const oxl::HeadNorm &a, int64_t task, float *scratch, bool backward) {
    const int64_t end = a.rows - task * a.block < a.block ? a.rows : (task + 1) * a.block, width = a.heads * a.d;
    float *d_scale = backward ? share(a.d_scale, task, width) : nullptr;
    float *d_bias = backward ? share(a.d_bias, task, width) : nullptr;
    float *d_skip_scale = backward ? share(a.d_skip_scale, task, width) : nullptr;
    for (int64_t row = task * a.block; row < end; ++row)
        for (int64_t head = 0; head < a.heads; ++head) {
            const NormedHead<T, Y> one(a, row, head);
            backward ? one.backward(d_scale, d_bias, d_skip_scale, scratch) : one.forward();
        }
}

inline void head_norm_any(const oxl::HeadNorm &a, int64_t task, float *scratch, bool backward) {
    if (!a.bfloat16) head_norm_block<float, float>(a, task, scratch, backward);
    else if (!a.y_bfloat16) head_norm_block<bf16, float>(a, task, scratch, backward);
    else head_norm_block<bf16, bf16>(a, task, scratch, backward);
}

void head_norm_forward(const oxl::HeadNorm &a, int64_t task, float *scratch) { head_norm_any(a, task, scratch, false); }
void head_norm_backward(const oxl::HeadNorm &a, int64_t task, float *scratch) { head_norm_any(a, task, scratch, true); }

}  // namespace
