"""Exact counts from a configuration alone: parameters, FLOPs, bytes moved, bytes of state, rooflines.

Everything that reports a utilisation, a cost or a plan takes its numbers from here. Training follows the
scaling-law study (Beck et al., xLSTM Scaling Laws, arXiv 2510.02228): a multiply-add is 2 FLOPs, the backward
pass costs twice the forward pass, transcendental functions count 1, norms, skips and the embedding look-up
nothing. :class:`Counting` chooses between its conventions. The study has no block stack; its maps, recurrent
products and pointwise operations are charged in the same way.
"""

from openxlstm.models.accounting.cells import (
    Flops,
    attention_flops,
    least_mlstm_flops,
    mlstm_backward_flops,
    mlstm_cell_flops,
)
from openxlstm.models.accounting.flops import (
    Counting,
    forward_components,
    forward_flops,
    least_prompt_flops,
    training_flops_per_token,
)
from openxlstm.models.accounting.hardware import DEVICES, Device, find_device, roofline
from openxlstm.models.accounting.inference import Cost, Storage, decode_cost, inference_memory, prefill_cost
from openxlstm.models.accounting.parameters import ModelConfig, parameter_count, state_bytes

__all__ = [
    "DEVICES",
    "Cost",
    "Counting",
    "Device",
    "Flops",
    "ModelConfig",
    "Storage",
    "attention_flops",
    "decode_cost",
    "find_device",
    "forward_components",
    "forward_flops",
    "inference_memory",
    "least_mlstm_flops",
    "least_prompt_flops",
    "mlstm_backward_flops",
    "mlstm_cell_flops",
    "parameter_count",
    "prefill_cost",
    "roofline",
    "state_bytes",
    "training_flops_per_token",
]
