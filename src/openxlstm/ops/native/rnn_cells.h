// One position of one row, forward and backward, for every cell. Included by rnn.h, inside its namespace.
//
// forward_cell finds R h of its row in `pre`, adds input and bias, and writes h, the state and what the backward
// pass needs. backward_cell takes the whole gradient of h (from the loss, `through` the recurrent matrix, and the
// part of `carry` that reaches h directly), writes the gradients of the pre-activations and updates `carry`.

template <int CELL>
inline void forward_cell(const Rows &w, int64_t t, int64_t r, const float *pre, const float *before, float *m) {
    const oxl::Rnn &a = w.a;
    const int64_t d = w.d, per_gate = a.heads * d;
    const float *x = a.x + (w.first + r) * a.x_b + t * a.x_t + w.head * a.x_h;
    const float *bias = a.bias ? a.bias + w.head * d : nullptr;
    float *gates = w.gates(a.gates, t, r), *h = w.hs(t + 1, r);
    const bool starts = w.starts(t, r);
    for (int64_t e = 0; e < d; e += W) {
        const int64_t n = d - e;
        const auto input = [&](int64_t gate) { return load(x + gate * a.x_g + e, n); };
        const auto offset = [&](int64_t gate) { return bias ? load(bias + gate * per_gate + e, n) : vf{}; };
        const auto recurrent = [&](int64_t gate) { return load(pre + gate * d + e, n); };
        const auto whole = [&](int64_t gate) { return recurrent(gate) + (input(gate) + offset(gate)); };
        const auto keep = [&](int64_t gate, vf value) { store(gates + gate * d + e, value, n); };
        if constexpr (CELL == oxl::ELMAN) {
            const vf out = tanh(whole(0));
            keep(0, out);
            store(h + e, out, n);
        } else if constexpr (CELL == oxl::GRU) {
            const vf g = recurrent(0) + offset(0);
            const vf reset = sigmoid(recurrent(1) + (input(0) + offset(1)));
            const vf update = sigmoid(recurrent(2) + (input(1) + offset(2)));
            const vf candidate = tanh(input(2) + offset(3) + reset * g);
            keep(0, g), keep(1, reset), keep(2, update), keep(3, candidate);
            store(h + e, candidate + update * (load(before + e, n) - candidate), n);
        } else if constexpr (CELL == oxl::LSTM) {
            const vf i = sigmoid(whole(0)), f = sigmoid(whole(1)), z = tanh(whole(2)), o = sigmoid(whole(3));
            const vf c = f * (starts ? vf{} : load(w.memory(t, r) + e, n)) + i * z;
            keep(0, i), keep(1, f), keep(2, z), keep(3, o);
            store(w.memory(t + 1, r) + e, c, n);
            store(h + e, o * tanh(c), n);
        } else {
            const float *memory = w.memory(t, r) + e;
            const vf p_i = whole(0), p_f = whole(1), z = tanh(whole(2)), o = sigmoid(whole(3)), zero = {};
            const vf c_before = starts ? zero : load(memory, n), n_before = starts ? zero : load(memory + w.inner, n);
            const vf carried = (starts ? zero : load(m + e, n)) + log_sigmoid(p_f);
            const vf next = select(n_before == 0.0f, p_i, max(carried, p_i));
            const vf i = exp(min(p_i - next, zero)), f = exp(min(carried - next, zero));
            const vf c = f * c_before + i * z;
            vf norm = f * n_before + i;
            if (a.floor > 0) norm = max(norm, splat(a.floor));
            keep(0, p_i), keep(1, p_f), keep(2, z), keep(3, o);
            store(w.factors(t, r) + e, i, n), store(w.factors(t, r) + w.inner + e, f, n);
            store(w.memory(t + 1, r) + e, c, n), store(w.memory(t + 1, r) + w.inner + e, norm, n);
            store(m + e, next, n);
            store(h + e, o * (c / norm), n);
        }
    }
}

template <int CELL>
inline void backward_cell(const Rows &w, int64_t t, int64_t r, bool starts, const float *through, float *carry) {
    const oxl::Rnn &a = w.a;
    const int64_t d = w.d;
    const float *gates = w.gates(a.gates, t, r), *h = w.hs(t + 1, r);
    float *d_gates = w.gates(a.d_gates, t, r);
    for (int64_t e = 0; e < d; e += W) {
        const int64_t n = d - e;
        const auto gate = [&](int64_t slot) { return load(gates + slot * d + e, n); };
        const auto write = [&](int64_t slot, vf value) { store(d_gates + slot * d + e, value, n); };
        const vf zero = {}, one = splat(1.0f);
        const vf d_h = load(a.d_h + w.output(t, r) + e, n) + load(carry + e, n) + load(through + e, n);
        if constexpr (CELL == oxl::ELMAN) {
            const vf out = load(h + e, n);
            write(0, d_h * (1.0f - out * out));
            store(carry + e, zero, n);
        } else if constexpr (CELL == oxl::GRU) {
            const vf g = gate(0), reset = gate(1), update = gate(2), candidate = gate(3);
            const vf before = starts ? zero : load(w.hs(t, r) + e, n);
            const vf d_n = d_h * (1.0f - update) * (1.0f - candidate * candidate), d_g = d_n * reset;
            write(0, d_g), write(1, d_g * g * (1.0f - reset));
            write(2, d_h * (before - candidate) * update * (1.0f - update)), write(3, d_n);
            store(carry + e, d_h * update, n);
        } else if constexpr (CELL == oxl::LSTM) {
            const vf i = gate(0), f = gate(1), z = gate(2), o = gate(3);
            const vf before = starts ? zero : load(w.memory(t, r) + e, n);
            const vf squashed = tanh(load(w.memory(t + 1, r) + e, n));
            const vf d_c = load(carry + d + e, n) + d_h * o * (1.0f - squashed * squashed);
            write(0, d_c * z * i * (1.0f - i)), write(1, d_c * before * f * (1.0f - f));
            write(2, d_c * i * (1.0f - z * z)), write(3, d_h * squashed * o * (1.0f - o));
            store(carry + e, zero, n), store(carry + d + e, d_c * f, n);
        } else {
            const float *memory = w.memory(t, r) + e, *factors = w.factors(t, r) + e;
            const vf p_f = gate(1), z = gate(2), o = gate(3), i = load(factors, n), f = load(factors + w.inner, n);
            const vf c_before = starts ? zero : load(memory, n), n_before = starts ? zero : load(memory + w.inner, n);
            const vf out = load(h + e, n), norm = load(w.memory(t + 1, r) + w.inner + e, n);
            const vf d_c = load(carry + d + e, n) + d_h * o / norm;
            vf d_n = load(carry + 2 * d + e, n) - d_h * out / norm;
            if (a.floor > 0) d_n = select(f * n_before + i >= a.floor, d_n, zero);
            const vf slope = sigmoid(-p_f);
            vf d_i = i * (z * d_c + d_n), d_f = f * (c_before * d_c + n_before * d_n);
            if (a.follow_m) {  // m' was one of the two arguments of the maximum, or shared between equal ones
                vf from_f = select(i == 1.0f, splat(0.5f), one);
                from_f = select(f == 1.0f, from_f, zero);
                from_f = select(n_before == 0.0f, zero, from_f);
                const vf rest = load(carry + 3 * d + e, n) - d_i - d_f;
                d_i = d_i + (1.0f - from_f) * rest;
                d_f = d_f + from_f * rest;
                store(carry + 3 * d + e, d_f, n);
            }
            write(0, d_i), write(1, d_f * slope), write(2, d_c * i * (1.0f - z * z)), write(3, d_h * out * (1.0f - o));
            store(carry + e, zero, n), store(carry + d + e, d_c * f, n), store(carry + 2 * d + e, d_n * f, n);
        }
    }
}
