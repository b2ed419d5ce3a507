// Vectors in memory as bfloat16, the upper half of a float32; in registers they are float32.
#pragma once

#include "vector.h"

#if OXL_WIDTH > 4
#include <immintrin.h>
#endif

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

// Two vectors of neighbouring bfloat16 numbers, in the order that widens them fastest: within each 128 bits of eight
// numbers the first four go to v[0], the others to v[1]. `sorted_alike` sorts float32 numbers in the same way.
#if OXL_WIDTH == 8
inline void widened(const bf16 *p, vf (&v)[2]) {
    const __m256i all = _mm256_loadu_si256((const __m256i *)p), zero = _mm256_setzero_si256();
    v[0] = (vf)_mm256_unpacklo_epi16(zero, all);
    v[1] = (vf)_mm256_unpackhi_epi16(zero, all);
}
inline void sorted_alike(const float *p, vf (&v)[2]) {
    v[0] = (vf)_mm256_loadu2_m128(p + 8, p);
    v[1] = (vf)_mm256_loadu2_m128(p + 12, p + 4);
}
#else
inline void widened(const bf16 *p, vf (&v)[2]) {
    v[0] = load(p);
    v[1] = load(p + W);
}
inline void sorted_alike(const float *p, vf (&v)[2]) {
    v[0] = load(p);
    v[1] = load(p + W);
}
#endif

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
    if (n >= W) return store(p, v);
    const vh half = rounded(v);
    __builtin_memcpy(p, &half, sizeof(bf16) * n);
}

}  // namespace
