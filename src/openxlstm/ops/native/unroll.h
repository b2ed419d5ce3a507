// Loops that are unrolled before anything else happens: arrays indexed by them live in registers, where compilers would
// keep those of an ordinary nest of loops in memory.
#pragma once

#include <utility>

namespace {

template <class F, int... I>
inline __attribute__((always_inline)) void unrolled_each(const F &f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>{}), ...);
}

// f(0), f(1), ... f(N - 1), each argument a constant.
template <int N, class F>
inline __attribute__((always_inline)) void unrolled(const F &f) {
    unrolled_each(f, std::make_integer_sequence<int, N>{});
}

}  // namespace
