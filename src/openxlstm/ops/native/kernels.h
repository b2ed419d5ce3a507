// Arguments of the native kernels and the table through which one instruction set's kernels are called.
//
// All tensors are float32 and contiguous unless strides are given; strides count elements. Every kernel is cut
// into tasks that share no arithmetic, so results depend neither on the number of threads nor on which other
// rows a batch holds.
#pragma once

#include <cstdint>

namespace oxl {

// One token of the mLSTM for `pairs` = batch * heads memories. Task p * splits + s computes share s of the value
// columns of memory p.
struct MlstmStep {
    const float *q, *k, *v;            // (pairs, dk), (pairs, dk), (pairs, dv)
    const float *i, *f;                // (pairs)
    const float *c, *n, *m;            // (pairs, dk, dv), (pairs, dk), (pairs)
    float *h, *c_out, *n_out, *m_out;  // (pairs, dv), and as c, n, m; may be c, n, m themselves if splits == 1
    int64_t pairs, dk, dv, splits;
    int32_t sigmoid, normalize;
    float eps;
};

// A tensor (B, T, H, D) of float32, or of bfloat16 where the call says so; D lies together.
struct View {
    const void *data;
    int64_t b, t, h;
};

// The mLSTM over whole sequences, in chunks. Forward: task pair * splits + s computes share s of the value columns of
// memory `pair`. Backward: one task per pair.
struct Mlstm {
    int64_t batch, time, heads, dk, dv, chunk, chunks, splits;
    int32_t bfloat16, bfloat16_gates;  // whether q, k, v, h are bfloat16, and i, f, each with its gradient
    int32_t sigmoid, normalize;
    float eps;
    View q, k, v;
    View i, f;               // (B, T, H)
    const uint8_t *reset;    // (B, T) or null
    const float *c0, *n0;    // (B, H, DK, DV), (B, H, DK); or both null: zeros
    const float *m0;         // (B, H)
    void *h;                 // (B, T, H, DV)
    float *c, *n, *m;        // the last state
    float *r, *den;          // (B, H, T)
    // backward only; gradients of absent outputs are null
    View h_view, dh;
    const float *dc_last, *dn_last, *dm_last;
    void *dq_out, *dk_out, *dv_out, *di, *df;  // laid out as h; (B, T, H)
    float *dc0, *dn0, *dm0;
};

enum Cell : int32_t { SLSTM = 0, LSTM = 1, GRU = 2, ELMAN = 3 };

// A recurrent network over time. Task head * row_groups + g computes rows [g, g + 1) * rows_per_task of one head,
// all positions. The buffers hs, gates, memory and factors are those of the Python module
// openxlstm.ops.rnn.scan_cells; a time stride of 0 keeps only the current position of one.
struct Rnn {
    int32_t cell;
    float floor;  // sLSTM normaliser floor; 0 for none
    int64_t batch, time, heads, d, rows_per_task, row_groups;
    const float *x;  // (B, T, G, H, D), last stride 1
    int64_t x_b, x_t, x_g, x_h;
    const float *weight;   // (H, G_r * D, D)
    float *packed;         // per head: weight in tiles, see packed_size; filled by the library
    const float *bias;     // (G_b, H, D) or null
    const uint8_t *reset;  // (B, T) or null
    const float *state;    // (S, H, B, D)
    float *h, *last;       // (B, T, H, D), (S, H, B, D)
    float *hs, *gates, *memory, *factors;
    int64_t hs_h, hs_t, gates_h, gates_t, memory_t, factors_t;
    // backward only
    const float *d_h, *d_last;   // (B, T, H, D); (S, H, B, D) or null
    float *d_gates, *d_state;    // (H, T, B, G_b, D), (S, H, B, D)
    int32_t follow_m;
};

// The depthwise causal convolution. Task row * blocks + b computes positions [b, b + 1) * block of one row of the batch.
// x, y, before and their gradients dy and dx are float32 or bfloat16 as the call says.
struct Convolution {
    int64_t batch, time, channels, taps, block, blocks;
    int32_t bfloat16, silu;
    const void *x;  // (B, T, E), last stride 1
    int64_t x_b, x_t;
    const void *before;           // (B, K - 1, E), the inputs before the first
    const float *weight, *bias;   // (K, E); (E) or null
    const uint8_t *reset;         // (B, T) or null
    void *y;                      // (B, T, E)
    // backward only
    const void *dy;  // (B, T, E), last stride 1
    int64_t dy_b, dy_t;
    void *dx;                             // (B, T, E)
    float *d_before, *d_weight, *d_bias;  // (B, K - 1, E); every task's share, (B * blocks, K, E) and (B * blocks, E)
};

// The norm of heads, scaled, with a skip path and a gate. Task t computes rows [t, t + 1) * block for all heads. x, gate,
// skip and their gradients are float32, or bfloat16 as the call says; so are y and dy.
struct HeadNorm {
    int64_t rows, heads, d, block, blocks;
    int32_t bfloat16, y_bfloat16, center, silu;
    float eps;
    const void *x;  // (R, H, D), last stride 1
    int64_t x_r, x_h;
    const float *scale, *bias, *skip_scale;  // (H D), each may be null
    const void *gate;                        // (R, H D), last stride 1, or null
    int64_t gate_r;
    const void *skip;  // (R, H D), last stride 1, or null
    int64_t skip_r;
    void *y;  // (R, H D)
    // backward only
    const void *dy;              // (R, H D)
    void *dx, *d_gate, *d_skip;  // (R, H D); the last two where there are gate and skip
    float *d_scale, *d_bias, *d_skip_scale;  // every task's share, (blocks, H D), or null
};

// How the numbers of a weight matrix are kept.
enum WeightKind : int32_t { WEIGHT_F32 = 0, WEIGHT_BF16 = 1, WEIGHT_INT8 = 2, WEIGHT_INT4 = 3 };

// A weight matrix (rows, columns), rows being outputs and columns inputs, row by row without gaps.
//   INT8: one float32 scale per row.
//   INT4: value = (nibble - 8) * scale. 32 inputs are 16 bytes, byte j holding input j in its low and input j + 16 in
//         its high half; one bfloat16 scale per `group` (32 or 64) inputs, (rows, columns / group).
struct Weight {
    int32_t kind, group;
    int64_t rows, columns;
    const void *data, *scales;
};

// c = a b + bias for large matrices, (m, n) = (m, k) (k, n) + (n). Strides count elements; of each pair one is 1. The task of
// block row r and block column s computes rows_per_task rows and columns_per_task columns. The kernels say how they want
// the work cut and how many floats of working space a task needs.
struct MatrixProduct {
    const float *a, *b, *bias;  // bias may be null
    float *c;                   // (m, n) without gaps
    int64_t m, n, k, a_m, a_k, b_k, b_n;
    int64_t rows_per_task, columns_per_task, scratch;
};

// y[b][r] = sum_c weight[r][c] x[b][c]. A task computes rows_per_task rows for the whole batch.
struct Product {
    Weight weight;
    const float *x;
    float *y;
    int64_t batch, x_stride, y_stride, rows_per_task;
};

// The same with a quantised weight (int8 or int4) and activations rounded to integers -limit .. limit, limit at most
// 32767. x (batch, columns) and y (batch, rows) have no gaps and are float32 or bfloat16. The rest is how the kernels
// want the work cut, and working space that the library provides: codes, and a scale and a sum of codes for each vector.
struct QuantizedProduct {
    Weight weight;
    const void *x;
    void *y;
    int64_t batch;
    float limit;
    int32_t bfloat16;
    int16_t *codes;
    float *scales;
    int32_t *sums;
    int64_t stride, code_bytes;                 // from one vector's codes to the next one's; of all codes
    int64_t vectors_per_task, vector_scratch;   // of the rounding
    int64_t rows_per_task, row_scratch;         // of the product
};

// Cross-entropy of `rows` vectors of `columns` logits (B, V), which become their gradients where these are asked for.
// A task computes rows_per_task rows and needs whole vectors for `columns` floats of working space.
struct CrossEntropy {
    void *logits;            // float32, or bfloat16
    const int64_t *targets;  // negative where a row does not count
    float *losses;
    int64_t rows, columns, rows_per_task;
    int32_t bfloat16, gradients;
    float cap;  // of the logits; 0 for none
};

// Reads `count` numbers and nothing else. Task t reads `each` of them and leaves the union of their bits in seen[t].
struct Probe {
    const float *data;
    int64_t count, each;
    int32_t *seen;
};

// Bytes from `data` on.
struct Span {
    const void *data;
    int64_t bytes;
};

struct Decode;
struct Team;

struct Kernels {
    const char *name;
    int64_t tile;  // columns of a packed weight tile
    void (*mlstm_step)(const MlstmStep &, int64_t task, float *scratch);
    int64_t (*mlstm_forward_scratch)(const Mlstm &);  // floats of working space of one task
    int64_t (*mlstm_backward_scratch)(const Mlstm &);
    void (*mlstm_forward)(const Mlstm &, int64_t task, float *scratch);
    void (*mlstm_backward)(const Mlstm &, int64_t task, float *scratch);
    void (*pack)(const float *matrix, int64_t rows, int64_t columns, bool transpose, float *packed);
    void (*rnn_forward)(const Rnn &, int64_t task, float *scratch);
    void (*rnn_backward)(const Rnn &, int64_t task, float *scratch);
    void (*convolution_forward)(const Convolution &, int64_t task, float *scratch);
    void (*convolution_backward)(const Convolution &, int64_t task, float *scratch);
    void (*head_norm_forward)(const HeadNorm &, int64_t task, float *scratch);
    void (*head_norm_backward)(const HeadNorm &, int64_t task, float *scratch);
    void (*product)(const Product &, int64_t task, float *scratch);
    void (*matrix_product_plan)(MatrixProduct &, int threads);
    void (*matrix_product)(const MatrixProduct &, int64_t task, float *scratch);
    void (*quantized_plan)(QuantizedProduct &, int threads);
    void (*quantize_activations)(const QuantizedProduct &, int64_t task, float *scratch);
    void (*quantized_product)(const QuantizedProduct &, int64_t task, float *scratch);
    void (*cross_entropy)(const CrossEntropy &, int64_t task, float *scratch);
    void (*probe)(const Probe &, int64_t task, float *scratch);
    void (*decode)(const Decode &, Team &team, int worker);
};

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
// Numbers of 16 bits from one vector's codes to the next one's, enough for every kind of matrix; not a power of two, whose
// rows would share cache sets.
constexpr int64_t MOST_CODES_PER_FOUR = 5;
inline int64_t code_stride(int64_t columns) { return round_up(columns, 128) * MOST_CODES_PER_FOUR / 4 + 64; }
inline int64_t recurrent_gates(int32_t cell) { return cell == ELMAN ? 1 : cell == GRU ? 3 : 4; }
inline int64_t bias_gates(int32_t cell) { return cell == ELMAN ? 1 : 4; }

}  // namespace oxl
