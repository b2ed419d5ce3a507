// A vector of floats as wide as the instruction set has them, and the functions the gates need.
//
// Built on the compilers' vector extension, so one source serves every instruction set; the flags of the
// translation unit decide what it becomes. Accuracy of the functions: about 2 units in the last place, with
// infinities and NaN as in libm. Everything is static: nothing may be shared between translation units that are
// compiled for different processors.
#pragma once

#include <cstdint>

#if defined(__AVX512F__)
#define OXL_WIDTH 16
#elif defined(__AVX2__)
#define OXL_WIDTH 8
#else
#define OXL_WIDTH 4
#endif

namespace {

constexpr int W = OXL_WIDTH;
typedef float vf __attribute__((vector_size(4 * OXL_WIDTH)));
typedef int32_t vi __attribute__((vector_size(4 * OXL_WIDTH)));

inline vf splat(float x) { return x - vf{}; }

inline vf load(const float *p) {
    vf v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float *p, vf v) { __builtin_memcpy(p, &v, sizeof v); }

// The first n elements only; the rest reads as zero.
inline vf load(const float *p, int64_t n) {
    if (n >= W) return load(p);
    vf v = {};
    for (int64_t e = 0; e < n; ++e) v[e] = p[e];
    return v;
}
inline void store(float *p, vf v, int64_t n) {
    if (n >= W) return store(p, v);
    for (int64_t e = 0; e < n; ++e) p[e] = v[e];
}

inline vf select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
inline vf min(vf a, vf b) { return select(b < a, b, a); }  // a if either is NaN
inline vf max(vf a, vf b) { return select(b > a, b, a); }
inline vf abs(vf a) { return (vf)((vi)a & 0x7fffffff); }

typedef float vq __attribute__((vector_size(16)));

inline float sum(vf v) {
    vq parts[W / 4];
    __builtin_memcpy(parts, &v, sizeof v);
    for (int n = W / 8; n > 0; n /= 2)
        for (int e = 0; e < n; ++e) parts[e] += parts[e + n];
    return (parts[0][0] + parts[0][2]) + (parts[0][1] + parts[0][3]);
}

inline vf power_of_two(vi n) { return (vf)((n + 127) << 23); }

inline vf exp(vf x) {
    const vf y = max(min(x, splat(89.0f)), splat(-104.0f));
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const vf n = (y * 1.44269504f + magic) - magic;
    vf r = y - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const vi whole = __builtin_convertvector(n, vi);
    const vi half = whole >> 1;  // two factors reach the whole range, subnormal numbers too
    p = p * power_of_two(half) * power_of_two(whole - half);
    return select(x == x, p, x);
}

inline vf sigmoid(vf x) { return 1.0f / (1.0f + exp(-x)); }

inline vf tanh(vf x) {
    const vf z = x * x;
    vf p = splat(-5.70498872745e-3f);
    p = p * z + 2.06390887954e-2f;
    p = p * z - 5.37397155531e-2f;
    p = p * z + 1.33314422036e-1f;
    p = p * z - 3.33332819422e-1f;
    p = p * z * x + x;
    const vf e = exp(2.0f * abs(x));
    const vf large = 1.0f - 2.0f / (e + 1.0f);
    const vf with_sign = select(x < 0.0f, -large, large);
    return select(abs(x) < 0.625f, p, with_sign);
}

// log sigmoid(x) = min(x, 0) - log1p(exp(-|x|)), the logarithm as 2 atanh(u / (2 + u))
inline vf log_sigmoid(vf x) {
    const vf u = exp(-abs(x));
    const vf s = u / (2.0f + u), z = s * s;
    vf p = splat(1.0f / 15);
    p = p * z + 1.0f / 13;
    p = p * z + 1.0f / 11;
    p = p * z + 1.0f / 9;
    p = p * z + 1.0f / 7;
    p = p * z + 1.0f / 5;
    p = p * z + 1.0f / 3;
    p = p * z + 1.0f;
    return min(x, splat(0.0f)) - 2.0f * s * p;
}

}  // namespace
