"""``"auto"`` takes the Triton kernels on GPUs: by the registry, and in a decode step of the graph engine.

Without a GPU the registry is asked about one, and the kernels it chooses run in the interpreter.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from openxlstm.inference import graph_engine
from openxlstm.inference.graph_engine import GraphEngine
from openxlstm.inference.runner import ModelRunner
from openxlstm.models import build_model
from openxlstm.ops import dispatch
from openxlstm.ops.gpu import configurations, support

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0")  # older interpreters
OPERATORS = ("mlstm", "mlstm_step", "mlstm_advance", "rnn", "rnn_step", "head_norm", "causal_convolution")
WITHOUT_GRADIENT = ("mlstm_step", "head_norm", "causal_convolution")


def chosen(operator: str, device: str, dtype: torch.dtype, **options: object) -> str:
    return dispatch.resolve(operator, "auto", dispatch.Request(torch.device(device), dtype, options)).name


@pytest.mark.parametrize("dtype", support.DTYPES)
@pytest.mark.parametrize("operator", OPERATORS)
def test_auto_on_a_gpu_and_elsewhere(operator, dtype):
    """On a GPU, and with gradients where it has them; never the interpreter, nor what it cannot compute."""
    assert chosen(operator, "cuda", dtype, needs_grad=False) == "triton"
    trained = chosen(operator, "cuda", dtype, needs_grad=True)
    assert (trained == "triton") == (operator not in WITHOUT_GRADIENT)
    assert chosen(operator, "cpu", dtype) != "triton"
    assert chosen(operator, "cuda", torch.float64) != "triton"


FAMILIES = {
    "large": {"model_type": "xlstm_large", "embedding_dim": 32, "num_heads": 2, "num_blocks": 2},
    "blocks": {
        "model_type": "xlstm_lm", "embedding_dim": 16, "num_blocks": 2, "slstm_at": [1],
        "mlstm_block": {"mlstm": {"num_heads": 2}}, "slstm_block": {"slstm": {"num_heads": 2}},
    },
}  # fmt: skip
KERNELS = {
    "large": {"step_scalars_kernel", "step_memory_kernel", "head_norm_kernel"},
    "blocks": {
        "step_scalars_kernel", "step_memory_kernel", "head_norm_kernel", "convolution_kernel",
        "forward_kernel",
    },
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_in_the_decode_step_of_a_model(family, poisoned, monkeypatch):
    """What the graph engine records on a GPU is made of Triton kernels, and gives the model's own logits."""
    model = build_model(FAMILIES[family] | {"vocab_size": 17}).to(poisoned)
    expected, _ = ModelRunner(model, decode="model").step([3, 5, 7], model.initial_state(3))
    launched = set()
    resolve, get = dispatch.resolve, support.Kernel.__getitem__

    def as_on_a_gpu(operator, backend, request):
        return resolve(operator, backend, dataclasses.replace(request, device=torch.device("cuda")))

    def noted(kernel, grid):
        launched.add(kernel.function.__name__)
        return get(kernel, grid)

    monkeypatch.setattr(dispatch, "resolve", as_on_a_gpu)
    monkeypatch.setattr(support.Kernel, "__getitem__", noted)
    if poisoned.type == "cpu":
        monkeypatch.setattr(graph_engine, "why_not", lambda _: None)
        monkeypatch.setattr(graph_engine, "record", lambda function: function)
    engine = GraphEngine(model)
    logits, _ = engine.step([3, 5, 7], engine.open(rows=3), reuse=True)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert launched == KERNELS[family]


def test_the_state_stays_on_the_chip_where_that_fills_the_machine(monkeypatch):
    """7B heads (DK 256, DV 512, eight a sequence) on 132 multiprocessors: from two sequences on."""
    properties = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    config, gpu = configurations.MLSTM_TABLE["sm_90", "bfloat16"], torch.device("cuda")
    assert configurations.resident(config, gpu, 16, 256, 512)
    assert not configurations.resident(config, gpu, 8, 256, 512)  # 64 programs
    assert not configurations.resident(config, gpu, 64, 512, 512)  # C does not fit
    assert not configurations.resident(config, torch.device("cpu"), 64, 256, 512)
