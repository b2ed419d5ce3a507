// The depthwise causal convolution over whole sequences, forward and backward, with SiLU or without:
//     p_t = bias + sum_{d < reach(t)} weight[taps - 1 - d] * x_{t - d},   y_t = p_t or p_t * sigmoid(p_t)
// where reach(t) stops at the start of the document of t, and x before position 0 is what the state kept.
//
// A task computes some positions of one row of the batch for all channels, position by position: the rows of x it reads
// again are in the cache. Equations and layouts: openxlstm.ops.convolution.
#pragma once

#include "bfloat16.h"
#include "kernels.h"
#include "vector.h"

namespace {

// What one task works on, and where its things are. T is how x, y and their gradients are kept.
template <class T>
struct Positions {
    const oxl::Convolution &a;
    int64_t row, begin, end, past;  // past = taps - 1

    Positions(const oxl::Convolution &args, int64_t task) : a(args) {
        row = task / a.blocks;
        begin = task % a.blocks * a.block;
        end = a.time - begin < a.block ? a.time : begin + a.block;
        past = a.taps - 1;
    }
    const T *x(int64_t t) const {
        return t < 0 ? static_cast<const T *>(a.before) + (row * past + past + t) * a.channels
                     : static_cast<const T *>(a.x) + row * a.x_b + t * a.x_t;
    }
    T *at(void *data, int64_t t) const { return static_cast<T *>(data) + (row * a.time + t) * a.channels; }
    // How many taps position t has within its document, itself included.
    int64_t reach(int64_t t) const {
        const uint8_t *starts = a.reset ? a.reset + row * a.time : nullptr;
        for (int64_t d = 0; starts && d < past && d <= t; ++d)
            if (starts[t - d]) return d + 1;
        return a.taps;
    }
};

// p_t of the channels from e on; REACH is the number of taps, or 0 where only `reach` knows it.
template <int REACH, class T>
inline vf convolved(const Positions<T> &w, int64_t t, int64_t reach, int64_t e, int64_t n) {
    const oxl::Convolution &a = w.a;
    vf total = a.bias ? load(a.bias + e, n) : vf{};
    for (int64_t d = 0; d < (REACH ? REACH : reach); ++d)
        total = load(w.x(t - d) + e, n) * load(a.weight + (w.past - d) * a.channels + e, n) + total;
    return total;
}

template <int REACH, class T>
void forward_position(const Positions<T> &w, int64_t t, int64_t reach) {
    const oxl::Convolution &a = w.a;
    T *y = w.at(a.y, t);
    for (int64_t e = 0; e < a.channels; e += W) {
        const int64_t n = a.channels - e;
        const vf p = convolved<REACH>(w, t, reach, e, n);
        store(y + e, a.silu ? p * sigmoid(p) : p, n);
    }
}

template <class T>
void forward_positions(const Positions<T> &w) {
    for (int64_t t = w.begin; t < w.end; ++t) {
        const int64_t reach = w.reach(t);
        reach == 4 ? forward_position<4>(w, t, reach) : forward_position<0>(w, t, reach);
    }
}

// Writes the gradient of p_t to d_p and, where this task owns position t, adds to those of weight and bias.
template <int REACH, class T>
void backward_position(const Positions<T> &w, int64_t t, int64_t reach, float *d_p, float *d_weight, float *d_bias) {
    const oxl::Convolution &a = w.a;
    const T *dy = static_cast<const T *>(a.dy) + w.row * a.dy_b + t * a.dy_t;
    for (int64_t e = 0; e < a.channels; e += W) {
        const int64_t n = a.channels - e;
        vf gradient = load(dy + e, n);
        if (a.silu) {
            const vf p = convolved<REACH>(w, t, reach, e, n), open = sigmoid(p);
            gradient = gradient * open * (1.0f + p * (1.0f - open));
        }
        store(d_p + e, gradient, n);
        if (t >= w.end) continue;
        store(d_bias + e, load(d_bias + e, n) + gradient, n);
        for (int64_t d = 0; d < (REACH ? REACH : reach); ++d) {
            float *own = d_weight + (w.past - d) * a.channels + e;
            store(own, load(w.x(t - d) + e, n) * gradient + load(own, n), n);
        }
    }
}

// dx_t from the gradients of p at t and the `past` positions after it, which lie in a ring.
template <class Out, class T>
void gather(const Positions<T> &w, int64_t t, const float *ring, const int64_t *reaches, Out *dx) {
    const oxl::Convolution &a = w.a;
    for (int64_t e = 0; e < a.channels; e += W) {
        const int64_t n = a.channels - e;
        vf total = {};
        for (int64_t d = 0; d < a.taps; ++d) {
            if (t + d < 0 || d >= reaches[(t + d) % a.taps]) continue;
            total = load(ring + (t + d) % a.taps * a.channels + e, n) * load(a.weight + (w.past - d) * a.channels + e, n) + total;
        }
        store(dx + e, total, n);
    }
}

// scratch: a ring of `taps` positions
template <class T>
void backward_positions(const Positions<T> &w, int64_t task, float *ring, int64_t *reaches) {
    const oxl::Convolution &a = w.a;
    float *d_weight = a.d_weight + task * a.taps * a.channels, *d_bias = a.d_bias + task * a.channels;
    __builtin_memset(d_weight, 0, sizeof(float) * a.taps * a.channels);
    __builtin_memset(d_bias, 0, sizeof(float) * a.channels);
    for (int64_t s = w.begin; s < w.end + w.past; ++s) {
        const int64_t reach = s < a.time ? w.reach(s) : 0, t = s - w.past;
        float *d_p = ring + s % a.taps * a.channels;
        reaches[s % a.taps] = reach;
        if (reach) reach == 4 ? backward_position<4>(w, s, reach, d_p, d_weight, d_bias)
                              : backward_position<0>(w, s, reach, d_p, d_weight, d_bias);
        if (t >= w.begin) gather(w, t, ring, reaches, w.at(a.dx, t));
        else if (w.begin == 0) gather(w, t, ring, reaches, a.d_before + (w.row * w.past + s) * a.channels);
    }
}

void convolution_forward(const oxl::Convolution &a, int64_t task, float *) {
    a.bfloat16 ? forward_positions(Positions<bf16>(a, task)) : forward_positions(Positions<float>(a, task));
}

void convolution_backward(const oxl::Convolution &a, int64_t task, float *scratch) {
    int64_t *reaches = reinterpret_cast<int64_t *>(scratch);
    float *ring = scratch + oxl::round_up(2 * a.taps, 16);
    a.bfloat16 ? backward_positions(Positions<bf16>(a, task), task, ring, reaches)
               : backward_positions(Positions<float>(a, task), task, ring, reaches);
}

}  // namespace
