// Calls the native library with random shapes, options and exactly sized buffers; built with sanitizers by
// test_sanitizers.py. Prints "done" at the end.
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <random>
#include <thread>
#include <vector>

#include "decode.h"
#include "kernels.h"

extern "C" {
int oxl_isa_count();
int oxl_isa_available(int isa);
int oxl_mlstm_step(int isa, int threads, oxl::MlstmStep *args);
int oxl_mlstm_forward(int isa, int threads, oxl::Mlstm *args);
int oxl_mlstm_backward(int isa, int threads, oxl::Mlstm *args);
int oxl_rnn_forward(int isa, int threads, oxl::Rnn *args);
int oxl_rnn_backward(int isa, int threads, oxl::Rnn *args);
int oxl_convolution_forward(int isa, int threads, oxl::Convolution *args);
int oxl_convolution_backward(int isa, int threads, oxl::Convolution *args);
int oxl_head_norm_forward(int isa, int threads, oxl::HeadNorm *args);
int oxl_head_norm_backward(int isa, int threads, oxl::HeadNorm *args);
int oxl_cross_entropy(int isa, int threads, oxl::CrossEntropy *args);
int oxl_product(int isa, int threads, oxl::Product *args);
int oxl_matrix_product(int isa, int threads, oxl::MatrixProduct *args);
int oxl_quantized_product(int isa, int threads, oxl::QuantizedProduct *args);
int oxl_probe(int isa, int threads, oxl::Probe *args);
int oxl_decode_workspace(int isa, int threads, oxl::Decode *args);
int oxl_decode(int isa, int threads, oxl::Decode *args);
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

static void mlstm(Random &random, int isa) {
    oxl::Mlstm a = {};
    a.batch = 1 + random.below(3), a.time = 1 + random.below(60), a.heads = 1 + random.below(3);
    a.dk = 1 + random.below(40), a.dv = 1 + random.below(140), a.chunk = 1 + random.below(a.time), a.splits = 1;
    a.chunks = (a.time + a.chunk - 1) / a.chunk, a.eps = 1e-6f;
    a.bfloat16 = random.below(2), a.bfloat16_gates = random.below(2), a.sigmoid = random.below(2), a.normalize = random.below(2);
    const int64_t pairs = a.batch * a.heads, rows = pairs * a.time;
    const int64_t size = a.bfloat16 ? 2 : 4, state = pairs * a.dk * a.dv;
    const auto tensor = [&](int64_t width) {  // any values: the first bytes of random floats
        const Floats x = random.floats(rows * width);
        const char *bytes = reinterpret_cast<const char *>(x.data());
        return std::vector<char>(bytes, bytes + rows * width * size);
    };
    const auto view = [&](const std::vector<char> &x, int64_t width) {
        return oxl::View{x.data(), a.time * a.heads * width, a.heads * width, width};
    };
    const auto q = tensor(a.dk), k = tensor(a.dk), v = tensor(a.dv), dh = tensor(a.dv);
    std::vector<char> h(v.size()), dq(q.size()), dk(k.size()), dv(v.size());
    const Floats i = random.floats(rows), f = random.floats(rows), m0 = random.floats(pairs);
    const Floats c0 = random.floats(state), n0 = random.floats(pairs * a.dk);
    std::vector<uint8_t> reset(a.batch * a.time);
    for (auto &r : reset) r = random.below(8) == 0;
    Floats c(state), n(n0.size()), m(pairs), r(rows), den(rows), dc(state), dn(n0.size()), dm(pairs), di(rows), df(rows);
    a.q = view(q, a.dk), a.k = view(k, a.dk), a.v = view(v, a.dv);
    a.i = oxl::View{i.data(), a.time * a.heads, a.heads, 1}, a.f = oxl::View{f.data(), a.time * a.heads, a.heads, 1};
    a.reset = random.below(2) ? reset.data() : nullptr, a.c0 = c0.data(), a.n0 = n0.data(), a.m0 = m0.data();
    a.h = h.data(), a.c = c.data(), a.n = n.data(), a.m = m.data(), a.r = r.data(), a.den = den.data();
    const int threads = 1 + static_cast<int>(random.below(3));
    oxl_mlstm_forward(isa, threads, &a);
    a.h_view = view(h, a.dv), a.dh = random.below(4) ? view(dh, a.dv) : oxl::View{};
    a.dc_last = random.below(2) ? c0.data() : nullptr, a.dn_last = random.below(2) ? n0.data() : nullptr;
    a.dm_last = random.below(2) ? m0.data() : nullptr, a.di = di.data(), a.df = df.data(), a.dm0 = dm.data();
    a.dq_out = dq.data(), a.dk_out = dk.data(), a.dv_out = dv.data(), a.dc0 = dc.data(), a.dn0 = dn.data();
    oxl_mlstm_backward(isa, threads, &a);
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

static void convolution(Random &random, int isa) {
    oxl::Convolution a = {};
    a.batch = 1 + random.below(3), a.time = 1 + random.below(40), a.channels = 1 + random.below(70);
    a.taps = 1 + random.below(random.below(4) ? 5 : 40), a.block = 1 + random.below(20);
    a.blocks = (a.time + a.block - 1) / a.block, a.bfloat16 = random.below(2), a.silu = random.below(2);
    const int64_t past = a.taps - 1, numbers = a.batch * a.time * a.channels, size = a.bfloat16 ? 2 : 4;
    const auto tensor = [&](int64_t n) {  // any values: the first bytes of random floats
        const Floats x = random.floats(n);
        const char *bytes = reinterpret_cast<const char *>(x.data());
        return std::vector<char>(bytes, bytes + n * size);
    };
    const auto x = tensor(numbers), dy = tensor(numbers), before = tensor(a.batch * past * a.channels);
    const Floats weight = random.floats(a.taps * a.channels), bias = random.floats(a.channels);
    std::vector<uint8_t> reset(a.batch * a.time);
    for (auto &r : reset) r = random.below(4) == 0;
    std::vector<char> y(x.size()), dx(x.size());
    Floats d_before(a.batch * past * a.channels), d_weight(a.batch * a.blocks * a.taps * a.channels);
    Floats d_bias(a.batch * a.blocks * a.channels);
    a.x = x.data(), a.dy = dy.data(), a.before = before.data(), a.weight = weight.data();
    a.x_t = a.dy_t = a.channels, a.x_b = a.dy_b = a.time * a.channels;
    a.bias = random.below(2) ? bias.data() : nullptr, a.reset = random.below(2) ? reset.data() : nullptr;
    a.y = y.data(), a.dx = dx.data(), a.d_before = d_before.data(), a.d_weight = d_weight.data(), a.d_bias = d_bias.data();
    const int threads = 1 + static_cast<int>(random.below(3));
    oxl_convolution_forward(isa, threads, &a);
    oxl_convolution_backward(isa, threads, &a);
}

static void matrix_product(Random &random, int isa) {
    oxl::MatrixProduct a = {};
    a.m = 1 + random.below(80), a.n = 1 + random.below(80), a.k = 1 + random.below(random.below(4) ? 70 : 900);
    const bool a_in_rows = random.below(2), b_in_rows = random.below(2);
    const Floats left = random.floats(a.m * a.k), right = random.floats(a.k * a.n), bias = random.floats(a.n);
    Floats result(a.m * a.n);
    a.a = left.data(), a.b = right.data(), a.c = result.data();
    a.a_m = a_in_rows ? a.k : 1, a.a_k = a_in_rows ? 1 : a.m, a.b_k = b_in_rows ? a.n : 1, a.b_n = b_in_rows ? 1 : a.k;
    if (random.below(2)) a.bias = bias.data();
    oxl_matrix_product(isa, 1 + static_cast<int>(random.below(3)), &a);
}

static void head_norm(Random &random, int isa) {
    oxl::HeadNorm a = {};
    a.rows = 1 + random.below(40), a.heads = 1 + random.below(4), a.d = 1 + random.below(70), a.block = 1 + random.below(20);
    a.blocks = (a.rows + a.block - 1) / a.block, a.bfloat16 = random.below(2), a.y_bfloat16 = a.bfloat16 && random.below(2);
    a.center = random.below(2), a.silu = random.below(2), a.eps = 1e-6f;
    const int64_t width = a.heads * a.d, size = a.bfloat16 ? 2 : 4, y_size = a.y_bfloat16 ? 2 : 4;
    const auto tensor = [&](int64_t bytes) {  // any values: the first bytes of random floats
        const Floats x = random.floats((bytes + 3) / 4);
        const char *from = reinterpret_cast<const char *>(x.data());
        return std::vector<char>(from, from + bytes);
    };
    const auto x = tensor(a.rows * width * size), gate = tensor(a.rows * width * size), skip = tensor(a.rows * width * size);
    const auto dy = tensor(a.rows * width * y_size);
    const Floats scale = random.floats(width), bias = random.floats(width), skip_scale = random.floats(width);
    std::vector<char> y(dy.size()), dx(x.size()), d_gate(x.size()), d_skip(x.size());
    Floats d_scale(a.blocks * width), d_bias(a.blocks * width), d_skip_scale(a.blocks * width);
    a.x = x.data(), a.x_r = a.gate_r = a.skip_r = width, a.x_h = a.d, a.y = y.data(), a.dy = dy.data(), a.dx = dx.data();
    if (random.below(2)) a.scale = scale.data(), a.d_scale = d_scale.data();
    if (random.below(2)) a.bias = bias.data(), a.d_bias = d_bias.data();
    if (random.below(2)) a.gate = gate.data(), a.d_gate = d_gate.data();
    if (random.below(2)) a.skip = skip.data(), a.d_skip = d_skip.data();
    if (a.skip && random.below(2)) a.skip_scale = skip_scale.data(), a.d_skip_scale = d_skip_scale.data();
    const int threads = 1 + static_cast<int>(random.below(3));
    oxl_head_norm_forward(isa, threads, &a);
    oxl_head_norm_backward(isa, threads, &a);
}

static void cross_entropy(Random &random, int isa) {
    oxl::CrossEntropy a = {};
    a.rows = random.below(30), a.columns = 1 + random.below(random.below(10) ? 200 : 3000), a.bfloat16 = random.below(2);
    a.gradients = random.below(2), a.cap = random.below(2) ? 30.0f : 0.0f;
    Floats logits = random.floats((a.rows * a.columns + (a.bfloat16 ? 1 : 0)) / (a.bfloat16 ? 2 : 1)), losses(a.rows);
    if (!logits.empty() && !random.below(4)) logits[0] = random.below(2) ? 1e38f : 0.0f / 0.0f;
    std::vector<int64_t> targets(a.rows);
    for (auto &target : targets) target = random.below(5) ? random.below(a.columns) : -100;
    a.logits = logits.data(), a.targets = targets.data(), a.losses = losses.data();
    oxl_cross_entropy(isa, 1 + static_cast<int>(random.below(3)), &a);
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

// A quantised matrix and its numbers, in exactly sized buffers.
struct Quantized {
    oxl::Weight weight = {};
    std::vector<uint8_t> codes;
    Floats wide;
    std::vector<uint16_t> half;

    Quantized(Random &random, int64_t rows, int64_t columns) {
        oxl::Weight &w = weight;
        w.rows = rows, w.columns = columns;
        w.kind = random.below(2) ? oxl::WEIGHT_INT8 : oxl::WEIGHT_INT4, w.group = random.below(2) ? 32 : 64;
        const int64_t padded = oxl::round_up(columns, w.group), offset = random.below(3);  // they begin anywhere in a file
        codes.resize(offset + (w.kind == oxl::WEIGHT_INT8 ? rows * columns : rows * padded / 2));
        for (auto &c : codes) c = static_cast<uint8_t>(random.below(256));
        if (w.kind == oxl::WEIGHT_INT8) wide = random.floats(rows);
        else half.resize(rows * padded / w.group);
        for (auto &h : half) h = static_cast<uint16_t>(random.below(1 << 14));
        w.data = codes.data() + offset;
        w.scales = w.kind == oxl::WEIGHT_INT8 ? static_cast<const void *>(wide.data()) : half.data();
    }
    Quantized(const Quantized &) = delete;
};

static void quantized(Random &random, int isa) {
    const int64_t rows_of = 1 + random.below(70), columns = 1 + random.below(random.below(10) ? 200 : 5000);
    const Quantized matrix(random, rows_of, columns);
    const oxl::Weight &w = matrix.weight;
    const int64_t batch = 1 + random.below(20);
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
    std::vector<uint16_t> half(x.size()), rounded(y.size());
    for (size_t k = 0; k < x.size(); ++k) std::memcpy(&half[k], reinterpret_cast<const char *>(&x[k]) + 2, 2);
    a.x = half.data(), a.y = rounded.data(), a.bfloat16 = 1;
    oxl_quantized_product(isa, threads, &a);
}

// A model of random blocks; all its numbers lie in exactly sized buffers.
struct Model {
    Random &random;
    std::deque<Floats> kept;
    std::deque<std::vector<uint16_t>> halves;
    std::deque<Quantized> packed;

    float *floats(int64_t n) { return kept.emplace_back(random.floats(n)).data(); }
    const float *maybe(int64_t n) { return random.below(2) ? floats(n) : nullptr; }
    oxl::Weight weight(int64_t rows, int64_t columns) {
        oxl::Weight w = {static_cast<int32_t>(random.below(2)), 0, rows, columns, nullptr, nullptr};
        if (w.kind == oxl::WEIGHT_F32) return w.data = floats(rows * columns), w;
        auto &half = halves.emplace_back(rows * columns);
        for (auto &h : half) h = static_cast<uint16_t>(0x3c00 + random.below(0x300) + (random.below(2) << 15));
        return w.data = half.data(), w;
    }
    // Gates, recurrent matrices and the embedding stay dense; the other maps may be quantised.
    oxl::Weight any_weight(int64_t rows, int64_t columns) {
        return random.below(2) ? weight(rows, columns) : packed.emplace_back(random, rows, columns).weight;
    }
    oxl::Linear linear(int64_t rows, int64_t columns) { return {any_weight(rows, columns), maybe(rows)}; }
    oxl::Norm norm(int64_t n, int32_t kind) { return {floats(n), maybe(n), 1e-5f, kind}; }

    oxl::Layer layer(int64_t width, int64_t heads, int64_t slots, bool half_state) {
        oxl::Layer y = {};
        y.kind = static_cast<int32_t>(random.below(3)), y.heads = heads, y.eps = 1e-6f;
        y.norm = norm(width, static_cast<int32_t>(random.below(2)));
        y.taps = y.kind == oxl::LARGE ? 0 : static_cast<int32_t>(random.below(5));
        int64_t channels = width;
        if (y.kind == oxl::SLSTM_BLOCK) {
            y.dv = width / heads, y.cell = static_cast<int32_t>(random.below(2));
            for (auto *map : {&y.i, &y.f, &y.z, &y.o}) *map = {weight(width, y.dv), nullptr};
            y.recurrent = {weight(4 * width, y.dv), floats(4 * width)};
            y.h = floats(slots * width), y.c = floats(slots * width), y.n = floats(slots * width);
            for (int64_t e = 0; e < slots * width; ++e) y.n[e] = 1 + y.n[e] * y.n[e];
            y.m = floats(slots * width), y.head_norm = norm(width, oxl::LAYER_NORM);
        } else {
            y.block = 1 + random.below(5), y.dv = y.block * (1 + random.below(40));
            y.dk = y.kind == oxl::LARGE ? 1 + random.below(40) : y.dv;
            channels = heads * y.dv;
            const int64_t size = slots * heads * y.dk * y.dv;
            y.c = half_state ? static_cast<void *>(halves.emplace_back(size).data()) : floats(size);
            y.n = floats(slots * heads * y.dk), y.m = floats(slots * heads);
            y.head_norm = norm(channels, oxl::LAYER_NORM), y.out = linear(width, channels);
        }
        if (y.kind == oxl::LARGE) {
            y.gate_cap = random.below(2) ? 15.0f : 0.0f;
            y.q = linear(heads * y.dk, width), y.k = linear(heads * y.dk, width), y.v = linear(channels, width);
            y.o = linear(channels, width), y.i = {weight(heads, width), maybe(heads)}, y.f = {weight(heads, width), maybe(heads)};
        } else if (y.kind == oxl::MLSTM_BLOCK) {
            y.up = linear(channels, width), y.z = linear(channels, width), y.skip = floats(channels);
            y.i = {weight(heads, 3 * channels), floats(heads)}, y.f = {weight(heads, 3 * channels), floats(heads)};
            for (int map = 0; map < 3; ++map) y.diagonal[map] = floats(channels * y.block), y.diagonal_bias[map] = maybe(channels);
        }
        if (y.taps) y.conv = floats(y.taps * channels), y.conv_bias = maybe(channels);
        y.conv_state = floats(y.taps > 1 ? slots * (y.taps - 1) * channels : 0);
        if (random.below(2)) {
            y.hidden = 1 + random.below(100), y.activation = static_cast<int32_t>(random.below(6)), y.ffn_norm = norm(width, oxl::RMS_NORM);
            y.ffn_gate = linear(y.hidden, width), y.ffn_up = linear(y.hidden, width), y.ffn_down = linear(width, y.hidden);
        }
        return y;
    }
};

static void decode(Random &random, int isa) {
    Model model{random, {}, {}, {}};
    const int64_t heads = 1 + random.below(3), width = heads * (1 + random.below(50)), slots = 8, vocabulary = 1 + random.below(300);
    const bool half_state = random.below(2);
    std::vector<oxl::Layer> layers(random.below(4));
    for (auto &layer : layers) layer = model.layer(width, heads, slots, half_state);
    oxl::Decode a = {};
    a.layers = layers.data(), a.num_layers = static_cast<int64_t>(layers.size()), a.width = width;
    a.embedding = model.weight(vocabulary, width), a.head = model.linear(vocabulary, width);
    a.out_norm = model.norm(width, static_cast<int32_t>(random.below(3))), a.logit_cap = random.below(2) ? 30.0f : 0.0f;
    a.state_kind = half_state ? oxl::WEIGHT_BF16 : oxl::WEIGHT_F32, a.batch = 1 + random.below(4);
    std::vector<int64_t> tokens(a.batch), source(a.batch), target(a.batch);
    const bool in_place = random.below(2);
    for (int64_t b = 0; b < a.batch; ++b) source[b] = slots - 1 - b, target[b] = in_place ? source[b] : b;
    Floats logits(a.batch * vocabulary);
    a.tokens = tokens.data(), a.source = source.data(), a.target = target.data(), a.logits = logits.data();
    const int threads = 1 + static_cast<int>(random.below(3));
    oxl_decode_workspace(isa, threads, &a);
    Floats workspace(a.workspace_floats);
    a.workspace = workspace.data();
    for (int round = 0; round < 3; ++round) {
        for (auto &token : tokens) token = random.below(vocabulary);
        oxl_decode(isa, threads, &a);
    }
    const Floats memory = random.floats(random.below(500));
    oxl::Probe probe = {memory.data(), static_cast<int64_t>(memory.size()), 0, nullptr};
    oxl_probe(isa, threads, &probe);
}

static void fuzz(unsigned seed, int rounds) {
    Random random{std::mt19937(seed)};
    for (int round = 0; round < rounds; ++round)
        for (int isa = 0; isa < oxl_isa_count(); ++isa) {
            if (!oxl_isa_available(isa)) continue;
            step(random, isa);
            mlstm(random, isa);
            rnn(random, isa);
            convolution(random, isa);
            matrix_product(random, isa);
            head_norm(random, isa);
            cross_entropy(random, isa);
            product(random, isa);
            quantized(random, isa);
            decode(random, isa);
        }
}

int main() {
    std::thread other(fuzz, 1u, 150);  // two callers share the pool
    fuzz(2u, 150);
    other.join();
    std::puts("done");
}
