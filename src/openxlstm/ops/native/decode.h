// Description of a whole language model for the decode engine: one call advances a batch of sequences by one token.
//
// Weights stay where they are; states live in slots, arrays with one entry per sequence, and are read from
// slot `source[b]` and written to slot `target[b]`, which may be the same. All vectors are float32.
#pragma once

#include "kernels.h"

namespace oxl {

struct Linear {
    Weight weight;
    const float *bias;  // or null
};

enum NormKind : int32_t { RMS_NORM = 0, LAYER_NORM = 1, NO_NORM = 2 };

// (x - mean) / sqrt(variance + eps) * weight + bias; RMS without the mean
struct Norm {
    const float *weight, *bias;  // or null
    float eps;
    int32_t kind;
};

enum LayerKind : int32_t { LARGE = 0, MLSTM_BLOCK = 1, SLSTM_BLOCK = 2 };
enum Activation : int32_t { GELU = 0, RELU = 1, RELU_SQUARED = 2, SIGMOID = 3, SWISH = 4, SELU = 5 };

// A residual block. Which fields count depends on the kind; the equations stand in openxlstm.layers.
struct Layer {
    int32_t kind, cell, activation, taps;
    int64_t heads, dk, dv, hidden;  // hidden = 0: no feed-forward
    int64_t block;                  // width of the diagonal blocks of an mLSTM block's q, k and v
    float eps, gate_cap;            // gate_cap = 0: none
    Norm norm, head_norm, ffn_norm;
    Linear q, k, v, o, i, f, z;     // z: sLSTM gate, or the output branch of an mLSTM block
    Linear up, out;                 // mLSTM block: input branch, down-projection; Large: out
    Linear recurrent;               // sLSTM: (heads, gate, out) rows of d inputs, bias (gate, heads, out)
    Linear ffn_gate, ffn_up, ffn_down;
    const float *conv, *conv_bias;  // (taps, channels), oldest first
    const float *skip;
    const float *diagonal[3], *diagonal_bias[3];  // q, k, v: (blocks, in, out)
    // state, one entry per slot
    void *c;                       // (slots, heads, dk, dv) of the state's kind; sLSTM: float32 (slots, heads, d)
    float *h, *n, *m, *conv_state;  // (taps - 1, channels), oldest first
};

struct Decode {
    const Layer *layers;
    int64_t num_layers, width;
    Weight embedding;
    Norm out_norm;
    Linear head;
    float logit_cap;     // 0: none
    int32_t state_kind;  // WEIGHT_F32 or WEIGHT_BF16: how matrix memories are kept
    int64_t batch;
    const int64_t *tokens, *source, *target;  // (batch)
    float *logits;                            // (batch, vocabulary)
    float *workspace;
    int64_t workspace_floats;
};

// The threads that work on one token. They go through the same phases; a phase is a number of tasks, and none begins
// the next phase before all tasks are done. Who comes late finds phases done, who never comes is not waited for.
struct Team;
int64_t team_claim(Team &team, int64_t phase, int64_t count, int worker);  // a task, or -1 if none is left
int team_size(const Team &team);

// What a member reads first in the next phase: it asks for it while it waits, or memory would lie idle meanwhile.
struct Ahead {
    const char *data;
    int64_t bytes;
};
void team_finish(Team &team, int64_t phase, int64_t count, int64_t done, Ahead next);  // wait until the others are done too

}  // namespace oxl

namespace {

// The vectors between the operations, (batch, ...) each, and each worker's own space.
struct Workspace {
    float *x = nullptr, *sum, *normed, *convolved, *qkv, *o, *h, *i, *f, *n_next, *m_next, *gates, *recurrent, *hidden, *up;
    float *own;
    int64_t width, heads = 0, qk = 0, qkv_width = 0, inner, four = 0, ffn = 0;  // strides of a row of the batch
    int64_t code_stride;         // of a row of the batch in a worker's codes
    int64_t own_floats, floats;  // of one worker; of everything but the workers

    Workspace(const oxl::Decode &a, float *base) : width(a.width), inner(a.width) {
        int64_t memory = 0;
        for (int64_t l = 0; l < a.num_layers; ++l) {
            const oxl::Layer &y = a.layers[l];
            heads = larger(heads, y.heads);
            ffn = larger(ffn, y.hidden);
            if (y.kind == oxl::SLSTM_BLOCK) {
                four = 4 * a.width;
                continue;
            }
            qk = larger(qk, y.heads * y.dk);
            inner = larger(inner, y.heads * y.dv);
            qkv_width = larger(qkv_width, y.heads * (2 * y.dk + y.dv));
            memory = larger(memory, 2 * y.dk + y.dv);
        }
        code_stride = oxl::code_stride(larger(larger(width, inner), ffn));
        own_floats = padded(a.batch * inner) + padded(memory + 48) + 2 * padded(heads) + code_floats(a.batch);
        struct {
            float **place;
            int64_t each;
        } const parts[] = {
            {&x, width}, {&sum, width}, {&normed, width}, {&convolved, inner}, {&qkv, qkv_width}, {&o, inner},
            {&h, inner}, {&i, heads}, {&f, heads}, {&n_next, qk}, {&m_next, heads}, {&gates, four},
            {&recurrent, four}, {&hidden, ffn}, {&up, ffn}, {&own, 0},
        };
        floats = 0;
        for (const auto &part : parts) {
            *part.place = base ? base + floats : nullptr;
            floats += padded(a.batch * part.each);
        }
    }

    int64_t code_floats(int64_t batch) const { return padded(batch) + padded(batch * code_stride / 2); }
    static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
    static int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }
};

}  // namespace
