"""The decode engine: equal to the model, rows independent bit for bit, slots, fallbacks with a reason."""

from __future__ import annotations

import gc
import threading
from typing import Any

import pytest
import torch
from torch import nn

from openxlstm.inference import Generator
from openxlstm.inference.engine import DecodeEngine, why_not
from openxlstm.layers.quantized import Quantization, quantize_model
from openxlstm.models import build_model
from openxlstm.ops.native import build, loader
from openxlstm.state import leaves

LARGE: dict[str, Any] = {"model_type": "xlstm_large", "embedding_dim": 40, "num_heads": 2, "num_blocks": 2}
STACK: dict[str, Any] = {"model_type": "xlstm_lm", "embedding_dim": 24, "num_blocks": 3}
CASES: dict[str, dict[str, Any]] = {
    "large": LARGE,
    "large, fused, biases": LARGE | {"weight_mode": "fused", "use_bias": True, "qk_dim_factor": 1.0},
    "large, no caps, tied": LARGE
    | {"gate_soft_cap": None, "output_logit_soft_cap": None, "add_out_norm": False}
    | {"tie_word_embeddings": True},
    "mLSTM blocks": STACK | {"bias": True, "mlstm_block": {"mlstm": {"num_heads": 2}}},
    "wide diagonal, no convolution": STACK
    | {"mlstm_block": {"mlstm": {"num_heads": 4, "qkv_proj_blocksize": 16, "conv1d_kernel_size": 0}}},
    "sLSTM blocks": STACK
    | {"slstm_at": "all", "slstm_block": {"slstm": {"num_heads": 2}}, "add_post_blocks_norm": False},
    "mixed, one tap": STACK
    | {"slstm_at": [1], "mlstm_block": {"mlstm": {"conv1d_kernel_size": 1, "num_heads": 2}}}
    | {"slstm_block": {"slstm": {"num_heads": 3, "conv1d_kernel_size": 2}}},
    "LSTM cells, no feed-forward": STACK
    | {"slstm_at": [0, 2]}
    | {"slstm_block": {"slstm": {"function": "lstm", "conv1d_kernel_size": 0}, "feedforward": None}},
}
ACTIVATIONS = ("gelu", "relu", "relu^2", "sigmoid", "swish", "selu")


def lively(values: dict[str, Any], seed: int = 0, vocab_size: int = 77) -> nn.Module:
    """A model whose parameters are all away from their initial values, so that each of them counts."""
    generator = torch.Generator().manual_seed(seed)
    model = build_model(values | {"vocab_size": vocab_size})
    model.reset_parameters(generator)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.3 * noise if parameter.ndim < 2 else 0.5 * noise * parameter.shape[-1] ** -0.5)
    return model.eval()


@torch.no_grad()
def full(model: nn.Module, tokens: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
    return model(tokens, state, return_state=True)


@pytest.fixture(autouse=True)
def _native() -> None:
    reason = loader.unavailable()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(params=sorted(build.instruction_sets()))
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param not in loader.status().isas:
        pytest.skip(f"this machine does not have {request.param}")
    monkeypatch.setenv("OPENXLSTM_ISA", request.param)
    return request.param


@pytest.mark.parametrize("case", CASES)
def test_equals_the_full_forward(isa, case):
    model = lively(CASES[case])
    tokens = torch.randint(0, 77, (3, 40), generator=torch.Generator().manual_seed(1))
    expected, last = full(model, tokens)
    engine = DecodeEngine(model)
    held = engine.open(rows=3)
    logits = []
    for t in range(40):
        step, held = engine.step(tokens[:, t].tolist(), held, reuse=t % 3 > 0)
        logits.append(step)
    torch.testing.assert_close(torch.stack(logits, 1), expected, rtol=1e-4, atol=3e-5)
    for mine, theirs in zip(leaves(held.state()), leaves(last), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=3e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    feedforward = {"feedforward": {"act_fn": activation, "bias": True}}
    model = lively(STACK | {"slstm_at": "all", "slstm_block": feedforward})
    tokens = torch.randint(0, 77, (1, 8))
    engine = DecodeEngine(model)
    held = engine.open()
    for t in range(8):
        logits, held = engine.step([int(tokens[0, t])], held, reuse=True)
    torch.testing.assert_close(logits[0], full(model, tokens)[0][0, -1], rtol=1e-4, atol=3e-5)


@pytest.mark.parametrize("case", ["large", "mixed, one tap"])
def test_bfloat16_weights(case):
    """Nearer to the model in float32 with the same weights than the model in bfloat16 is."""
    model = lively(CASES[case]).to(torch.bfloat16)
    exact = lively(CASES[case])
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    tokens = torch.randint(0, 77, (1, 24), generator=torch.Generator().manual_seed(1))
    expected = full(exact, tokens)[0][0]
    engine = DecodeEngine(model)
    held = engine.open()
    logits = torch.cat([engine.step([t], held, reuse=True)[0] for t in tokens[0].tolist()])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=3e-5)
    error = (logits - expected).abs().max()
    assert error < 0.1 * (full(model, tokens)[0][0] - expected).abs().max()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("case", ["large, fused, biases", "mLSTM blocks", "mixed, one tap"])
def test_quantized_weights(isa, case, bits):
    """As exact as the dequantised model: only the 16-bit activations round."""
    model = lively(CASES[case])
    quantize_model(model, Quantization(bits=bits))
    tokens = torch.randint(0, 77, (3, 24), generator=torch.Generator().manual_seed(1))
    expected = full(model, tokens)[0]
    engine = DecodeEngine(model)
    held, single = engine.open(rows=3), engine.open()
    for t in range(24):
        logits, held = engine.step(tokens[:, t].tolist(), held, reuse=True)
        alone, single = engine.step(tokens[1:2, t].tolist(), single, reuse=True)
        assert torch.equal(alone[0], logits[1])
        torch.testing.assert_close(logits, expected[:, t], rtol=3e-3, atol=3e-3)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["large", "mixed, one tap"])
def test_ten_thousand_tokens(case, weights):
    """As the forward pass in float32 of a model with the same, perhaps rounded, weights."""
    model = lively(CASES[case]).to(weights)
    exact = lively(CASES[case])
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    tokens = torch.randint(0, 77, (10_000,), generator=torch.Generator().manual_seed(2)).tolist()
    engine = DecodeEngine(model)
    held = engine.open()
    kept = [engine.step([t], held, reuse=True)[0] for t in tokens]
    expected, last = full(exact, torch.tensor([tokens]))
    torch.testing.assert_close(torch.cat(kept), expected[0], rtol=1e-3, atol=1e-3)
    errors = (torch.cat(kept) - expected[0]).abs().amax(-1)
    assert errors[-1000:].mean() < 3 * errors[:1000].mean() + 1e-5  # nothing drifts
    for mine, theirs in zip(leaves(held.state()), leaves(last), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-3)
    if weights == torch.bfloat16:
        rounded = full(model, torch.tensor([tokens]))[0][0]
        assert errors.max() < 0.1 * (rounded - expected[0]).abs().max()


@pytest.mark.parametrize("case", CASES)
def test_rows_are_independent_bit_for_bit(isa, case, request):
    model = lively(CASES[case])
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(0, 77, (n,), generator=generator).tolist() for n in (3, 11, 1, 7, 18, 5, 9)]
    engine = DecodeEngine(model)
    alone = []
    for text in texts:
        held = engine.open()
        alone.append([engine.step([t], held, reuse=True)[0][0] for t in text])
    before = torch.get_num_threads()
    request.addfinalizer(lambda: torch.set_num_threads(before))
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        held, rows = engine.open(rows=len(texts)), list(range(len(texts)))
        for t in range(max(map(len, texts))):
            staying = [n for n, row in enumerate(rows) if len(texts[row]) > t]
            if len(staying) < len(rows):
                rows, held = [rows[n] for n in staying], held.select(staying)
            logits, held = engine.step([texts[row][t] for row in rows], held, reuse=True)
            for row, mine in zip(rows, logits, strict=True):
                assert torch.equal(mine, alone[row][t])


def test_slots_are_reused_and_states_are_values():
    model = lively(CASES["mixed, one tap"])
    engine = DecodeEngine(model)
    held = engine.open(rows=4)
    for _ in range(20):
        _, held = engine.step([1, 2, 3, 4], held, reuse=False)
    assert engine.slots <= 9
    old = held.state()
    _, after = engine.step([5, 6, 7, 8], held, reuse=False)
    assert all(torch.equal(a, b) for a, b in zip(leaves(held.state()), leaves(old), strict=True))
    again = engine.step([5, 6, 7, 8], engine.open(old), reuse=True)[0]
    expected, new = full(model, torch.tensor([[5], [6], [7], [8]]), old)
    torch.testing.assert_close(again, expected[:, 0], rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(leaves(after.state()), leaves(new), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    first = held.select([2])
    assert len(first.slots) == 1
    del held, after, first
    gc.collect()
    assert sorted(engine._free) == list(range(engine.slots))


def test_state_round_trip_is_exact():
    model = lively(CASES["mixed, one tap"])
    _, state = full(model, torch.randint(0, 77, (2, 9)))
    back = DecodeEngine(model).open(state).state()
    assert all(torch.equal(a, b) for a, b in zip(leaves(back), leaves(state), strict=True))


@pytest.mark.parametrize("case", ["large", "mLSTM blocks"])
def test_bfloat16_state(case, isa):
    """Rounding the memories costs little, and no more after many tokens than after few."""
    model = lively(CASES[case])
    tokens = torch.randint(0, 77, (400,), generator=torch.Generator().manual_seed(2)).tolist()
    engine, rounded = DecodeEngine(model), DecodeEngine(model, state_dtype=torch.bfloat16)
    held, low = engine.open(), rounded.open()
    errors = []
    for token in tokens:
        exact, held = engine.step([token], held, reuse=True)
        logits, low = rounded.step([token], low, reuse=True)
        errors.append(float((logits - exact).norm() / exact.norm()))
    assert 0 < sum(errors) / len(errors) < 0.1  # one rounding is 0.002, and a memory keeps many
    assert sum(errors[-100:]) < 5 * sum(errors[20:120])
    assert low.state().blocks[0][-1 if case == "large" else 0].dtype == torch.float32


def test_threads_of_python_share_an_engine():
    model = lively(CASES["large"])
    engine = DecodeEngine(model)
    tokens = torch.randint(0, 77, (4, 60)).tolist()
    expected = [full(model, torch.tensor([row]))[0][0, -1] for row in tokens]
    results: list[Any] = [None] * 4

    def work(number: int) -> None:
        held = engine.open()
        for token in tokens[number]:
            results[number], held = engine.step([token], held, reuse=False)

    workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for result, logits in zip(results, expected, strict=True):
        torch.testing.assert_close(result[0], logits, rtol=1e-4, atol=1e-5)


def test_generator_uses_it_and_says_so(model, bpe, monkeypatch):
    options: dict[str, Any] = {"temperature": 0, "max_new_tokens": 12, "stop_at_eos": False}
    native, plain = Generator(model, bpe), Generator(model, bpe, decode="model")
    assert native.runner.explain().startswith("decoding with the native engine: ")
    assert plain.runner.explain().endswith("PyTorch: decode='model' was asked for")
    expected = plain.complete(["User: how", "bye"], **options)
    assert [r.tokens for r in native.complete(["User: how", "bye"], **options)] == [
        r.tokens for r in expected
    ]
    assert native.runner._engine is not None
    assert plain.runner._engine is None
    alone = native.complete("bye", **options)
    assert alone.logprobs == native.complete(["User: how", "bye"], **options)[1].logprobs  # bit for bit
    monkeypatch.setenv("OPENXLSTM_NATIVE", "0")
    assert "turned off by OPENXLSTM_NATIVE=0" in native.runner.explain()
    assert native.complete("bye", **options).tokens == alone.tokens
    with pytest.raises(ValueError, match="the decode engine cannot run this model: turned off"):
        Generator(model, bpe, decode="engine")
    with pytest.raises(ValueError, match=r"decode must be one of auto, .*Did you mean 'engine'"):
        Generator(model, bpe, decode="engin")  # pyright: ignore


def test_changed_weights_are_seen(model, bpe):
    generator = Generator(model, bpe)
    session = generator.start("User:", temperature=0, stop_at_eos=False, max_new_tokens=8)
    session.generate()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    fresh = Generator(model, bpe, decode="model").start(list(session.tokens), temperature=0)
    fresh._state, fresh.consumed = session.state, session.consumed
    session.generate()
    fresh.generate(stop_at_eos=False, max_new_tokens=8)
    assert session.tokens == fresh.tokens


def test_what_it_refuses():
    model = lively(LARGE)
    assert why_not(model) is None
    assert why_not(nn.Linear(2, 2)) == "it runs xLSTMLarge and xLSTMLMModel, not Linear"
    assert "weights must be float32 or bfloat16, 'embedding.weight' is float64" in str(
        why_not(lively(LARGE).double())
    )
    assert "the model is on meta" in str(why_not(lively(LARGE).to("meta")))
    assert "asks for the backend 'recurrent'" in str(why_not(lively(LARGE | {"ops_backend": "recurrent"})))
    hooked = lively(LARGE)
    hooked.lm_head.register_forward_hook(lambda *_: None)
    assert "'lm_head' has forward hooks" in str(why_not(hooked))
    strange = lively(LARGE)
    strange.lm_head = nn.Bilinear(2, 2, 2)
    assert "'lm_head' is a Bilinear, which it does not know" in str(why_not(strange))
    with pytest.raises(ValueError, match="cannot run this model: weights must be"):
        DecodeEngine(lively(LARGE).double())
    with pytest.raises(ValueError, match="state_dtype must be"):
        DecodeEngine(model, state_dtype=torch.float16)
    engine = DecodeEngine(model)
    held = engine.open(rows=2)
    with pytest.raises(ValueError, match="got 1 tokens for 2 sequences"):
        engine.step([1], held, reuse=True)
    with pytest.raises(ValueError, match="token id 77 is out of range for a vocabulary of 77"):
        engine.step([1, 77], held, reuse=True)
    with pytest.raises(ValueError, match="held by another engine"):
        DecodeEngine(model).step([1, 2], held, reuse=True)
    with pytest.raises(ValueError, match="the state belongs to another model"):
        engine.open(lively(STACK).initial_state(1))


def test_without_a_compiler_one_line_says_why_decoding_is_slower(monkeypatch, tmp_path):
    from openxlstm.inference import engine as engine_module
    from openxlstm.ops.native import loader

    for name, value in {"PATH": str(tmp_path), "OPENXLSTM_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(loader, "_shipped", lambda: tmp_path / "none")
    monkeypatch.setattr(loader, "_find", loader._find.__wrapped__)
    for compiler, reason in (
        ("", "no C++ compiler found: install g++"),
        ("nowhere", "'nowhere', does not exist"),
    ):
        monkeypatch.setenv("CXX", compiler)
        why = engine_module.why_not(lively(CASES["large"]))
        assert why is not None
        assert reason in why
        assert "using PyTorch" in why
        assert "\n" not in why
