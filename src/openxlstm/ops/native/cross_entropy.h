// Cross-entropy and its gradient, one row of logits at a time, so that a row is read from memory once.
//
//     z = cap tanh(x / cap),   loss = log sum_j exp(z_j) - z_target,
//     dx_j = (exp(z_j) / sum - [j = target]) (1 - (z_j / cap)^2)
#pragma once

#include "bfloat16.h"
#include "kernels.h"

namespace {

// Where a capped logit lies in (-1, 1); without a cap nobody asks.
inline vf capped(vf x, float cap, float inverse) { return cap > 0 ? tanh(x * inverse) : x; }

// e[j] becomes exp(z_j - top) times the slope of the cap; the result is the sum of exp(z_j - top).
template <class T>
double exponentials(const T *x, int64_t n, float cap, float inverse, float top, float *e) {
    constexpr int64_t PART = 64 * W;  // a longer float32 sum would lose digits
    double total = 0;
    for (int64_t part = 0; part < n; part += PART) {
        const int64_t end = part + PART < n ? part + PART : n;
        vf sums = {};
        for (int64_t j = part; j < end; j += W) {
            const vf y = capped(load(x + j, end - j), cap, inverse);
            vf power = exp((cap > 0 ? cap * y : y) - top);
            if (end - j < W)
                for (int64_t k = end - j; k < W; ++k) power[k] = 0.0f;
            sums += power;
            if (e) store(e + j, cap > 0 ? power * (1.0f - y * y) : power);  // rows of e are whole vectors
        }
        total += sum(sums);
    }
    return total;
}

// The largest number; NaN may be passed over, the exponentials find it.
template <class T>
float largest(const T *x, int64_t n) {
    vf most = splat(-__builtin_inff());
    int64_t j = 0;
    for (; j + W <= n; j += W) most = max(most, load(x + j));
    float result = -__builtin_inff();
    for (int k = 0; k < W; ++k) result = most[k] > result ? most[k] : result;
    for (; j < n; ++j) {
        const float value = load(x + j, 1)[0];
        result = value > result ? value : result;
    }
    return result;
}

template <class T>
void cross_entropy_row(const oxl::CrossEntropy &a, int64_t row, float *e) {
    T *x = static_cast<T *>(a.logits) + row * a.columns;
    const int64_t n = a.columns, target = a.targets[row];
    if (target < 0) {
        a.losses[row] = 0.0f;
        if (a.gradients) __builtin_memset(x, 0, n * sizeof(T));
        return;
    }
    const float cap = a.cap, inverse = cap > 0 ? 1.0f / cap : 1.0f;
    const auto logit = [&](float value) { return cap > 0 ? cap * tanh(splat(value * inverse))[0] : value; };
    const float top = logit(largest(x, n)), wanted = logit(load(x + target, 1)[0]);
    const double total = exponentials(x, n, cap, inverse, top, a.gradients ? e : nullptr);
    a.losses[row] = (float)(__builtin_log(total) + ((double)top - wanted));
    if (!a.gradients) return;
    const float scale = (float)(1.0 / total);
    for (int64_t j = 0; j < n; j += W) store(x + j, load(e + j) * scale, n - j);
    const float slope = cap > 0 ? 1.0f - wanted * wanted * inverse * inverse : 1.0f;
    store(x + target, splat(e[target] * scale - slope), 1);
}

void cross_entropy(const oxl::CrossEntropy &a, int64_t task, float *scratch) {
    const int64_t end = (task + 1) * a.rows_per_task < a.rows ? (task + 1) * a.rows_per_task : a.rows;
    for (int64_t row = task * a.rows_per_task; row < end; ++row) {
        if (a.bfloat16)
            cross_entropy_row<bf16>(a, row, scratch);
        else
            cross_entropy_row<float>(a, row, scratch);
    }
}

}  // namespace
