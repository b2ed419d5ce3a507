// Calls the native library with random shapes, options and exactly sized buffers; built with sanitizers by
// test_sanitizers.py. Prints "done" at the end.
#include <cstdint>
#include <cstdio>
#include <random>
#include <thread>
#include <vector>

#include "kernels.h"

extern "C" {
int oxl_isa_count();
int oxl_isa_available(int isa);
int oxl_mlstm_step(int isa, int threads, oxl::MlstmStep *args);
int oxl_rnn_forward(int isa, int threads, oxl::Rnn *args);
int oxl_rnn_backward(int isa, int threads, oxl::Rnn *args);
int oxl_product(int isa, int threads, oxl::Product *args);
int oxl_quantized_product(int isa, int threads, oxl::QuantizedProduct *args);
}

typedef std::vector<float> Floats;

struct Random {
    std::mt19937 engine;
    int64_t below(int64_t n) { return static_cast<int64_t>(engine() % n); }
    Floats floats(int64_t n) {
        std::normal_distribution<float> normal;
        Floats x(n);
        for (float &v : x) v = normal(engine);
        return x;
    }
};

static void step(Random &random, int isa) {
    oxl::MlstmStep a = {};
    a.pairs = 1 + random.below(6), a.dk = 1 + random.below(40), a.dv = 1 + random.below(140), a.splits = 1;
    a.sigmoid = random.below(2), a.normalize = 1, a.eps = 1e-6f;
    const Floats q = random.floats(a.pairs * a.dk), k = random.floats(a.pairs * a.dk), n = random.floats(a.pairs * a.dk);
    const Floats v = random.floats(a.pairs * a.dv), c = random.floats(a.pairs * a.dk * a.dv);
    const Floats i = random.floats(a.pairs), f = random.floats(a.pairs), m = random.floats(a.pairs);
    Floats h(v.size()), c_out(c.size()), n_out(n.size()), m_out(m.size());
    a.q = q.data(), a.k = k.data(), a.v = v.data(), a.i = i.data(), a.f = f.data();
    a.c = c.data(), a.n = n.data(), a.m = m.data();
    a.h = h.data(), a.c_out = c_out.data(), a.n_out = n_out.data(), a.m_out = m_out.data();
    oxl_mlstm_step(isa, 1 + static_cast<int>(random.below(3)), &a);
}

static void rnn(Random &random, int isa) {
    oxl::Rnn a = {};
    a.cell = static_cast<int32_t>(random.below(4));
    a.floor = a.cell == oxl::SLSTM ? static_cast<float>(random.below(2)) : 0.0f;
    a.batch = 1 + random.below(11), a.time = 1 + random.below(7), a.heads = 1 + random.below(3), a.d = 1 + random.below(37);
    const int64_t inputs = a.cell == oxl::ELMAN ? 1 : a.cell == oxl::GRU ? 3 : 4, wide = oxl::recurrent_gates(a.cell);
    const int64_t slots = oxl::bias_gates(a.cell), row = a.batch * a.d, cells = a.heads * row;
    const int64_t states = a.cell == oxl::SLSTM ? 4 : a.cell == oxl::LSTM ? 2 : 1;
    const int64_t memories = a.cell == oxl::SLSTM ? 2 : a.cell == oxl::LSTM ? 1 : 0, gains = a.cell == oxl::SLSTM ? 2 : 0;
    a.x_h = a.d, a.x_g = a.heads * a.d, a.x_t = inputs * a.x_g, a.x_b = a.time * a.x_t;
    const Floats x = random.floats(a.batch * a.x_b), weight = random.floats(a.heads * wide * a.d * a.d);
    const Floats bias = random.floats(slots * a.heads * a.d), d_h = random.floats(a.time * cells);
    Floats state = random.floats(states * cells), d_last = random.floats(states * cells);
    if (a.cell == oxl::SLSTM)
        for (int64_t e = 2 * cells; e < 3 * cells; ++e) state[e] = state[e] * state[e];
    std::vector<uint8_t> reset(a.batch * a.time);
    for (auto &r : reset) r = random.below(4) == 0;
    const bool keep = random.below(4) != 0;
    const int64_t during = keep ? a.time : 1, after = keep ? a.time + 1 : 1;
    Floats hs(a.heads * after * row), gates(a.heads * during * row * slots), d_gates(gates.size());
    Floats memory(after * memories * cells), factors(during * gains * cells);
    Floats h(a.time * cells), last(states * cells), d_state(states * cells);
    a.x = x.data(), a.weight = weight.data(), a.bias = random.below(3) ? bias.data() : nullptr;
    a.reset = random.below(2) ? reset.data() : nullptr, a.state = state.data(), a.h = h.data(), a.last = last.data();
    a.hs = hs.data(), a.gates = gates.data(), a.memory = memory.data(), a.factors = factors.data();
    a.hs_h = after * row, a.hs_t = keep * row, a.gates_h = during * row * slots, a.gates_t = keep * row * slots;
    a.memory_t = keep * memories * cells, a.factors_t = keep * gains * cells;
    const int threads = 1 + static_cast<int>(random.below(3));
    oxl_rnn_forward(isa, threads, &a);
    if (!keep) return;
    a.d_h = d_h.data(), a.d_last = random.below(2) ? d_last.data() : nullptr;
    a.follow_m = a.d_last != nullptr || a.floor > 0, a.d_gates = d_gates.data(), a.d_state = d_state.data();
    oxl_rnn_backward(isa, threads, &a);
}

static void product(Random &random, int isa) {
    oxl::Product a = {};
    oxl::Weight &w = a.weight;
    w.rows = 1 + random.below(70), w.columns = 1 + random.below(150), a.batch = 1 + random.below(11);
    w.kind = static_cast<int32_t>(random.below(2));
    const int64_t offset = random.below(3);  // weights begin anywhere in a file
    const Floats x = random.floats(a.batch * w.columns), wide = random.floats(offset + w.rows * w.columns);
    std::vector<uint16_t> half(wide.size());
    for (auto &h : half) h = static_cast<uint16_t>(random.below(1 << 15));
    Floats y(a.batch * w.rows);
    w.data = w.kind == oxl::WEIGHT_F32 ? static_cast<const void *>(wide.data() + offset) : half.data() + offset;
    a.x = x.data(), a.y = y.data(), a.x_stride = w.columns, a.y_stride = w.rows;
    oxl_product(isa, 1 + static_cast<int>(random.below(3)), &a);
}

static void quantized(Random &random, int isa) {
    oxl::Weight w = {};
    w.rows = 1 + random.below(70), w.columns = 1 + random.below(random.below(10) ? 200 : 5000);
    w.kind = random.below(2) ? oxl::WEIGHT_INT8 : oxl::WEIGHT_INT4, w.group = random.below(2) ? 32 : 64;
    const int64_t batch = 1 + random.below(20), padded = oxl::round_up(w.columns, w.group);
    const int64_t offset = random.below(3);  // weights begin anywhere in a file
    std::vector<uint8_t> codes(offset + (w.kind == oxl::WEIGHT_INT8 ? w.rows * w.columns : w.rows * padded / 2));
    for (auto &c : codes) c = static_cast<uint8_t>(random.below(256));
    const Floats wide = random.floats(w.rows);
    std::vector<uint16_t> half(w.rows * padded / w.group);
    for (auto &h : half) h = static_cast<uint16_t>(random.below(1 << 14));
    w.data = codes.data() + offset;
    w.scales = w.kind == oxl::WEIGHT_INT8 ? static_cast<const void *>(wide.data()) : half.data();
    Floats x = random.floats(batch * w.columns);
    if (!random.below(4)) x[random.below(static_cast<int64_t>(x.size()))] = random.below(2) ? 1e38f : 0.0f / 0.0f;
    Floats y(batch * w.rows);
    const int threads = 1 + static_cast<int>(random.below(3));
    oxl::Product rows = {};
    rows.weight = w, rows.x = x.data(), rows.y = y.data(), rows.batch = batch;
    rows.x_stride = w.columns, rows.y_stride = w.rows;
    oxl_product(isa, threads, &rows);
    oxl::QuantizedProduct a = {};
    a.weight = w, a.x = x.data(), a.y = y.data(), a.batch = batch, a.limit = random.below(2) ? 127.0f : 32767.0f;
    oxl_quantized_product(isa, threads, &a);
}

static void fuzz(unsigned seed, int rounds) {
    Random random{std::mt19937(seed)};
    for (int round = 0; round < rounds; ++round)
        for (int isa = 0; isa < oxl_isa_count(); ++isa) {
            if (!oxl_isa_available(isa)) continue;
            step(random, isa);
            rnn(random, isa);
            product(random, isa);
            quantized(random, isa);
        }
}

int main() {
    std::thread other(fuzz, 1u, 150);  // two callers share the pool
    fuzz(2u, 150);
    other.join();
    std::puts("done");
}
