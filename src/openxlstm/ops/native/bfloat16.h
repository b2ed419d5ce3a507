// Vectors in memory as bfloat16, the upper half of a float32; in registers they are float32.
#pragma once

#include "vector.h"

namespace {

struct bf16 {
    uint16_t bits;
};
typedef uint16_t vh __attribute__((vector_size(2 * OXL_WIDTH)));
typedef uint32_t vu __attribute__((vector_size(4 * OXL_WIDTH)));

inline vf load(const bf16 *p) {
    vh half;
    __builtin_memcpy(&half, p, sizeof half);
    return (vf)(__builtin_convertvector(half, vu) << 16);
}

// The first n elements only; the rest reads as zero.
inline vf load(const bf16 *p, int64_t n) {
    if (n >= W) return load(p);
    vu wide = {};
    for (int64_t e = 0; e < n; ++e) wide[e] = (uint32_t)p[e].bits << 16;
    return (vf)wide;
}

// Rounds to the nearest, ties to even; NaN stays NaN.
inline vh rounded(vf v) {
    const vu bits = (vu)v, up = bits + 0x7fff + ((bits >> 16) & 1);
    const vu kept = (vu)select(v == v, (vf)up, (vf)(bits | 0x400000));
    return __builtin_convertvector(kept >> 16, vh);
}

inline void store(bf16 *p, vf v) {
    const vh half = rounded(v);
    __builtin_memcpy(p, &half, sizeof half);
}
inline void store(bf16 *p, vf v, int64_t n) {
    const vh half = rounded(v);
    __builtin_memcpy(p, &half, sizeof(bf16) * (n >= W ? W : n));
}

}  // namespace
