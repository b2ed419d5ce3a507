"""The Triton operators inside PyTorch's training tools: autocast, checkpointing, compilation, FSDP2.

A small model of both cells with the backend ``triton`` (on a GPU, or in the interpreter) against the same
model with portable backends; and three runs, which must give the same bits. Outputs start as NaN.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from openxlstm.models import build_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0"),  # older interpreters
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


def model_with(mlstm: str, rnn: str, device: torch.device) -> torch.nn.Module:
    config = {
        "model_type": "xlstm_lm", "vocab_size": 11, "embedding_dim": 16, "num_blocks": 2, "slstm_at": [1],
        "mlstm_block": {"mlstm": {"num_heads": 1, "ops_backend": mlstm}},
        "slstm_block": {"slstm": {"num_heads": 2, "ops_backend": rnn}},
    }  # fmt: skip
    torch.manual_seed(0)
    return build_model(config).to(device)


@pytest.fixture
def tokens(poisoned):
    torch.compiler.reset()
    return torch.randint(11, (1, 4)).to(poisoned)


@pytest.fixture
def triton_model(poisoned):
    return model_with("triton", "triton", poisoned)


def gradients(model, tokens, call=None):
    logits = (model if call is None else call)(tokens)
    return [logits, *torch.autograd.grad(logits.float().square().sum(), list(model.parameters()))]


@pytest.fixture
def expected(poisoned, tokens):
    return gradients(model_with("chunkwise", "scan", poisoned), tokens)


def assert_close(actual, expected, rel_error, tolerance=2e-5):
    for one, two in zip(actual, expected, strict=True):
        assert rel_error(one, two) < tolerance or torch.allclose(one, two, atol=1e-6)


def test_plain_and_three_runs_have_the_same_bits(triton_model, tokens, expected, rel_error):
    runs = [gradients(triton_model, tokens) for _ in range(3)]
    assert_close(runs[0], expected, rel_error)
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))


def test_autocast(triton_model, tokens, expected, rel_error):
    """Projections in bfloat16, and so the operators' inputs; gates and states stay float32."""
    with torch.autocast(tokens.device.type, torch.bfloat16):
        actual = gradients(triton_model, tokens)
    assert all(g.dtype == p.dtype for g, p in zip(actual[1:], triton_model.parameters(), strict=True))
    assert_close(actual[:1], expected[:1], rel_error, 2e-2)
    assert_close(actual[1:], expected[1:], rel_error, 1e-1)


def test_activation_checkpointing(triton_model, tokens):
    plain = gradients(triton_model, tokens)
    again = gradients(triton_model, tokens, lambda x: checkpoint(triton_model, x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_fullgraph_compilation(triton_model, tokens, expected, rel_error):
    """Forward and backward in one graph each."""
    compiled = torch.compile(triton_model, fullgraph=True, backend="aot_eager")
    assert_close(gradients(triton_model, tokens, compiled), expected, rel_error)


def test_fullgraph_prefill(triton_model, tokens):
    """A prompt, then its state goes on, in one graph each."""
    compiled = torch.compile(triton_model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected, state = triton_model(tokens, return_state=True)
        logits, held = compiled(tokens, return_state=True)
        torch.testing.assert_close(logits, expected)
        expected, _ = triton_model(tokens, state, return_state=True)
        torch.testing.assert_close(compiled(tokens, held, return_state=True)[0], expected)


def test_fsdp2(triton_model, tokens, expected, rel_error, tmp_path):
    """Sharded parameters, in a group of one process."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    kind = tokens.device.type
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh(kind, (1,))
        for block in triton_model.xlstm_block_stack.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(triton_model, mesh=mesh)
        logits = triton_model(tokens)
        logits.float().square().sum().backward()
        actual = [logits, *(p.grad.full_tensor() for p in triton_model.parameters())]
    finally:
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
    assert_close(actual, expected, rel_error)
