// Asking for weights before they are needed. A product computes while its next weights travel; the processor's own window
// of some hundred instructions covers a fraction of the time that memory takes.
#pragma once

#include <cstdint>

namespace {

constexpr int64_t LINE_BYTES = 64;

// Bytes between what is asked for and what is used. With several vectors a line lasts longer, and too many lines
// in the cache would push out the vectors.
template <int BATCH>
constexpr int64_t WEIGHTS_AHEAD = BATCH == 1 ? 8192 : 4096;

// For one use: a token needs every weight once, and what weights push out of the last-level cache, states above all, is
// needed again. An address beyond the end does no harm.
inline void prefetch(const void *p) { __builtin_prefetch(p, 0, 0); }

}  // namespace
