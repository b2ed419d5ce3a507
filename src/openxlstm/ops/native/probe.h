// Reads memory as fast as it comes and does nothing with it: the bound that decoding is held against.
#pragma once

#include "kernels.h"
#include "vector.h"

namespace {

void probe(const oxl::Probe &a, int64_t task, float *) {
    constexpr int64_t STREAMS = 4, STEP = STREAMS * W;
    const float *p = a.data + task * a.each;
    const int64_t count = (a.count - task * a.each < a.each ? a.count - task * a.each : a.each) / STEP * STEP;
    vi seen[STREAMS] = {};
    for (int64_t j = 0; j < count; j += STEP)
        for (int64_t s = 0; s < STREAMS; ++s) seen[s] |= (vi)load(p + j + s * W);
    const vi all = seen[0] | seen[1] | seen[2] | seen[3];
    int32_t bits = 0;
    for (int e = 0; e < W; ++e) bits |= all[e];
    a.seen[task] = bits;
}

}  // namespace
