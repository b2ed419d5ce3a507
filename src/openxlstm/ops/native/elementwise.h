// Norms, activations and the causal convolution for single vectors: what stands between the products of decoding.
#pragma once

#include "decode.h"
#include "vector.h"

namespace {

// y = norm(x) over n numbers; the weight may be null. x and y may be the same.
inline void normalize(const oxl::Norm &norm, const float *x, int64_t n, const float *weight, const float *bias, float *y) {
    float mean = 0.0f;
    if (norm.kind == oxl::LAYER_NORM) {
        vf total = {};
        for (int64_t j = 0; j < n; j += W) total += load(x + j, n - j);
        mean = sum(total) / (float)n;
    }
    vf squares = {};
    for (int64_t j = 0; j < n; j += W) {
        vf centered = load(x + j, n - j) - mean;
        if (n - j < W)
            for (int64_t e = n - j; e < W; ++e) centered[e] = 0.0f;
        squares += centered * centered;
    }
    const float scale = 1.0f / __builtin_sqrtf(sum(squares) / (float)n + norm.eps);
    for (int64_t j = 0; j < n; j += W) {
        vf value = (load(x + j, n - j) - mean) * scale;
        if (weight) value = value * load(weight + j, n - j);
        if (bias) value = value + load(bias + j, n - j);
        store(y + j, value, n - j);
    }
}

inline vf soft_cap(vf x, float cap) { return cap > 0 ? cap * tanh(x / cap) : x; }

// Gaussian error function: Abramowitz and Stegun 7.1.26 is too coarse, so a rational fit of erf(x) / x on [-4, 4]
inline vf erf(vf x) {
    const vf y = max(min(x, splat(4.0f)), splat(-4.0f)), z = y * y;
    vf p = splat(-2.72614225801306e-10f);
    p = p * z + 2.77068142495902e-08f;
    p = p * z - 2.10102402082508e-06f;
    p = p * z - 5.69250639462346e-05f;
    p = p * z - 7.34990630326855e-04f;
    p = p * z - 2.95459980854025e-03f;
    p = p * z - 1.60960333262415e-02f;
    vf q = splat(-1.45660718464996e-05f);
    q = q * z - 2.13374055278905e-04f;
    q = q * z - 1.68282697438203e-03f;
    q = q * z - 7.37332916720468e-03f;
    q = q * z - 1.42647390514189e-02f;
    return select(x == x, y * p / q, x);
}

inline vf activate(int32_t activation, vf x) {
    const vf zero = {};
    switch (activation) {
        case oxl::GELU: return 0.5f * x * (1.0f + erf(x * 0.70710678f));
        case oxl::RELU: return max(x, zero);
        case oxl::RELU_SQUARED: return max(x, zero) * max(x, zero);
        case oxl::SIGMOID: return sigmoid(x);
        case oxl::SWISH: return x * sigmoid(x);
        default: {  // SELU
            const vf low = 1.75809934f * (exp(min(x, zero)) - 1.0f);
            return select(x > zero, 1.05070099f * x, low);
        }
    }
}

// One position of the depthwise causal convolution for the channels [begin, end): y = SiLU(bias + sum w x), and the
// state moves on by one. `before` and `after` may be the same. Without a convolution y = x.
inline void convolve(const oxl::Layer &layer, int64_t channels, int64_t begin, int64_t end, const float *x,
                     const float *before, float *after, float *y) {
    const int64_t past = layer.taps - 1;
    for (int64_t j = begin; j < end; j += W) {
        const int64_t left = end - j;
        const vf input = load(x + j, left);
        if (layer.taps == 0) {
            store(y + j, input, left);
            continue;
        }
        vf total = input * load(layer.conv + past * channels + j, left);
        for (int64_t d = past; d-- > 0;) total = load(before + d * channels + j, left) * load(layer.conv + d * channels + j, left) + total;
        for (int64_t d = 0; d < past; ++d)
            store(after + d * channels + j, d + 1 < past ? load(before + (d + 1) * channels + j, left) : input, left);
        if (layer.conv_bias) total = total + load(layer.conv_bias + j, left);
        store(y + j, total * sigmoid(total), left);
    }
}

}  // namespace
