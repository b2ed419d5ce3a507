// Activations as integers, the form in which they meet quantised weights.
//
//     x[c] ~ code[c] * scale,   scale = max_c |x[c]| / limit,   code[c] = round(x[c] * (limit / max_c |x[c]|))
//
// A limit of 32767 rounds fifty times finer than bfloat16 and lets products run on integers, which is twice as fast as
// expanding weights to floats; 127 is for processors that multiply bytes faster still.
#pragma once

#include "vector.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr float LEAST_ACTIVATION = 1e-30f;  // a vector of smaller numbers counts as zero: 1 / scale would overflow
typedef int16_t vs __attribute__((vector_size(2 * OXL_WIDTH)));

struct ActivationScale {
    float scale, factor;  // value = code * scale, code = round(value * factor)
};

// The scale is NaN if a number is not finite, and so is then every result.
ActivationScale activation_scale(const float *x, int64_t n, float limit) {
    vf largest = {}, finite = {}, others = {}, finite_too = {};
    int64_t c = 0;
    for (; c + 2 * W <= n; c += 2 * W) {
        const vf v = load(x + c), u = load(x + c + W);
        largest = max(largest, abs(v));
        others = max(others, abs(u));
        finite += v * 0.0f;
        finite_too += u * 0.0f;
    }
    for (; c < n; c += W) {
        const vf v = load(x + c, n - c);
        largest = max(largest, abs(v));
        finite += v * 0.0f;
    }
    largest = max(largest, others);
    finite += finite_too;
    if (sum(finite) != 0.0f) return {__builtin_nanf(""), 0.0f};
    float most = 0.0f;
    for (int e = 0; e < W; ++e) most = largest[e] > most ? largest[e] : most;
    if (most < LEAST_ACTIVATION) return {0.0f, 0.0f};
    return {most / limit, limit / most};
}

// The nearest integers, ties to even.
inline vi nearest(vf v) {
#if defined(__AVX512F__)
    return (vi)_mm512_cvtps_epi32((__m512)v);
#elif defined(__AVX2__)
    return (vi)_mm256_cvtps_epi32((__m256)v);
#else
    __asm__ volatile("" : "+m"(v));  // or the compiler joins the product before with the sum below, and rounds once
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23
    return __builtin_convertvector((v + magic) - magic, vi);
#endif
}

// Codes of n numbers, and zeros up to `padded`, a multiple of 16.
void round_activations(const float *x, int64_t n, int64_t padded, float factor, int16_t *codes) {
    int64_t c = 0;
#if defined(__AVX2__)
    if (factor > 0.0f)
        for (const __m256 by = _mm256_set1_ps(factor); c + 16 <= n; c += 16) {
            const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + c), by));
            const __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + c + 8), by));
            const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
            _mm256_storeu_si256(reinterpret_cast<__m256i *>(codes + c), both);
        }
#endif
    for (; c < padded; c += W) {
        const vf v = factor > 0.0f && c < n ? load(x + c, n - c) * factor : vf{};
        const vs code = __builtin_convertvector(nearest(v), vs);
        __builtin_memcpy(codes + c, &code, sizeof code);
    }
}

}  // namespace
