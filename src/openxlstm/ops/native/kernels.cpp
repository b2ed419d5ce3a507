// The kernels of one instruction set. Compiled once for each, with OXL_ISA naming it and the compiler's flags
// choosing it.
#include "convolution.h"
#include "cross_entropy.h"
#include "decode_layers.h"
#include "head_norm.h"
#include "matrix_product.h"
#include "mlstm_backward.h"
#include "mlstm_forward.h"
#include "mlstm_step.h"
#include "probe.h"
#include "products.h"
#include "quantized_prefill.h"
#include "rnn.h"

#define OXL_JOIN2(a, b) a##b
#define OXL_JOIN(a, b) OXL_JOIN2(a, b)
#define OXL_STRING2(a) #a
#define OXL_STRING(a) OXL_STRING2(a)

extern const oxl::Kernels OXL_JOIN(oxl_kernels_, OXL_ISA) = {
    OXL_STRING(OXL_ISA), TILE, mlstm_step, mlstm_forward_scratch, mlstm_backward_scratch, mlstm_forward,
    mlstm_backward, pack, rnn_forward, rnn_backward, convolution_forward, convolution_backward, head_norm_forward,
    head_norm_backward, product, matrix_product_plan, matrix_product, quantized_plan, quantize_activations, quantized_product,
    cross_entropy, probe, decode,
};
