"""FLOPs and bytes against the published training runs, PyTorch's own counter, and hand-worked cases."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from openxlstm.config import read_mapping
from openxlstm.models import (
    TransformerLMConfig,
    build_config,
    build_model,
    large,
    lm_model,
    mLSTMBlockConfig,
    mLSTMLayerConfig,
    parameter_count,
    sLSTMBlockConfig,
    sLSTMLayerConfig,
    state_bytes,
    training_flops_per_token,
    transformer,
    xLSTMLargeConfig,
    xLSTMLMModelConfig,
)
from openxlstm.models.accounting import (
    DEVICES,
    Counting,
    Flops,
    Storage,
    attention_flops,
    decode_cost,
    find_device,
    forward_components,
    forward_flops,
    inference_memory,
    least_mlstm_flops,
    least_prompt_flops,
    mlstm_backward_flops,
    mlstm_cell_flops,
    prefill_cost,
    roofline,
)

RUNS = Path(__file__).parents[3] / "shared" / "scaling" / "training_runs.csv"
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
VOCABULARY = 50304


@pytest.mark.skipif(not RUNS.exists(), reason="the published training runs are not part of the repository")
def test_parameters_and_flops_of_all_published_runs():
    with RUNS.open() as file:
        rows = [row for row in csv.DictReader(file) if row["flops"]]
    assert len(rows) == 562
    for row in rows:
        number = {
            name: int(float(row[name]))
            for name in (
                "embedding_dim",
                "num_heads",
                "num_blocks",
                "ffn_dim",
                "context_length",
                "chunk_size",
            )
        }
        shape = (number["embedding_dim"], number["num_heads"], number["num_blocks"], VOCABULARY)
        if row["model"] == "mlstm":
            config = xLSTMLargeConfig(*shape, ffn_dim=number["ffn_dim"], chunk_size=number["chunk_size"])
        else:
            config = TransformerLMConfig(*shape, ffn_dim=number["ffn_dim"])
        chinchilla = row["experiment"] == "isoflop_chinchilla_extra"
        counting = Counting(attention="chinchilla" if chinchilla else "distill")
        assert parameter_count(config) == int(float(row["num_params"])), row["name"]
        context = number["context_length"]
        tokens = float(row["global_batch_size"]) * context * float(row["num_steps"])
        flops = training_flops_per_token(config, context, counting) * tokens
        assert flops == pytest.approx(float(row["flops"]), rel=1e-9), row["name"]


def with_definitions(config):
    """The same model with the plain definitions as operators, whose products PyTorch's counter can see."""
    import dataclasses

    if isinstance(config, xLSTMLargeConfig):
        return dataclasses.replace(config, ops_backend="parallel")
    if isinstance(config, xLSTMLMModelConfig):
        mlstm = dataclasses.replace(config.mlstm_block_config.mlstm, ops_backend="parallel")
        slstm = dataclasses.replace(config.slstm_block_config.slstm, ops_backend="recurrent")
        return dataclasses.replace(
            config,
            mlstm_block=mLSTMBlockConfig(mlstm) if "m" in config.block_map else None,
            slstm_block=sLSTMBlockConfig(slstm, config.slstm_block_config.feedforward),
        )
    return config


def counted_by_torch(config, time, monkeypatch):
    """PyTorch's count of one forward pass, on tensors that have shapes and no values."""
    for module in (large, lm_model, transformer):
        monkeypatch.setattr(module, "check_tokens", lambda *_: None)  # looks at values
    math = sdpa_kernel(SDPBackend.MATH)  # the CPU's fused attention is not counted
    with FakeTensorMode(), FlopCounterMode(display=False) as counter, torch.no_grad(), math:
        build_model(with_definitions(config))(torch.zeros(1, time, dtype=torch.long))
    return counter.get_total_flops()


def expected_from_torch(config, time):
    """Our matrix products, plus what the definitions compute beyond the parallel form.

    They always read an initial state, 2 T k v + 2 T k per head, and write a last one, 2 T k v. The causal
    half that attention and the parallel mLSTM may leave out, they compute. Small blocks of head-wise maps are
    merged into blocks of up to 16, where products are faster, and zeros are multiplied too.
    """
    counting = Counting("parallel", "chinchilla", causal_factor=1.0)
    total = sum(part.products for part in forward_components(config, time, counting).values())
    if isinstance(config, xLSTMLargeConfig):
        heads, k, v = config.num_heads, config.qk_dim // config.num_heads, config.v_dim // config.num_heads
        total += config.num_blocks * heads * (4 * time * k * v + 2 * time * k)
    elif isinstance(config, xLSTMLMModelConfig):
        layer = config.mlstm_block_config.mlstm
        inner, heads = layer.inner_embedding_dim, layer.num_heads
        dim, size = inner // heads, layer.qkv_proj_blocksize
        extra = heads * (4 * time * dim * dim + 2 * time * dim)
        extra += 6 * time * inner * (merged(size, inner // size) - size)
        total += config.block_map.count("m") * extra
    return total


def merged(size, blocks):
    while 2 * size <= 16 and blocks % 2 == 0:
        size, blocks = 2 * size, blocks // 2
    return size


ARCHITECTURES = {
    "large": xLSTMLargeConfig(64, 4, 3, 40),
    "large fused": xLSTMLargeConfig(64, 2, 2, 40, weight_mode="fused", qk_dim_factor=1.0),
    "mixed": xLSTMLMModelConfig(vocab_size=40, embedding_dim=64, num_blocks=4, slstm_at=[1]),
    "slstm": xLSTMLMModelConfig(
        slstm_block=sLSTMBlockConfig(sLSTMLayerConfig(num_heads=2), None), vocab_size=40, embedding_dim=32
    ),
    "blocks": xLSTMLMModelConfig(
        mLSTMBlockConfig(mLSTMLayerConfig(qkv_proj_blocksize=16)), vocab_size=40, embedding_dim=64
    ),
    "transformer": TransformerLMConfig(64, 4, 3, 40),
    "grouped": TransformerLMConfig(64, 4, 1, 40, num_kv_heads=2, tie_weights=True),
}
ALL = ARCHITECTURES | {
    path.stem: build_config({"vocab_size": VOCABULARY, **read_mapping(path)["model"]}) for path in RECIPES
}


SLOW = {"xlstm_400m", "xlstm_830m", "xlstm_1.3b", "xlstm_2.7b"}  # the architecture of 160m and 7b


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in ALL]
)
def test_matrix_products_equal_the_count_of_pytorch(name, monkeypatch):
    config, time = ALL[name], 5
    assert counted_by_torch(config, time, monkeypatch) == expected_from_torch(config, time)


@pytest.mark.parametrize("name", ALL)
def test_parameters_and_states_of_every_recipe_and_architecture(name):
    config = ALL[name]
    with torch.device("meta"):
        model = build_model(config)
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())
    state = model.initial_state(2)
    measured = sum(t.numel() * t.element_size() for block in state.blocks for t in _leaves(block))
    assert state_bytes(config, 2) == measured
    storage = Storage(activation=4, weight=4)
    assert inference_memory(config, 2, 0, storage) == 4 * parameter_count(config) + measured


def _leaves(state):
    from openxlstm.state import leaves

    return leaves(state)


def test_the_parts_of_a_forward_pass():
    parts = forward_components(TransformerLMConfig(8, 2, 3, 5, ffn_dim=16), 10)
    assert parts["projections"] == Flops(3 * 8 * 10 * 8 * 8)
    assert parts["mixer"] == Flops(3 * 2 * 100 * 8, 3 * 2.5 * 100 * 2)
    assert parts["feedforward"] == Flops(3 * 6 * 10 * 8 * 16, 3 * 2 * 10 * 16)
    assert parts["head"] == Flops(2 * 10 * 8 * 5)
    assert parts["convolution"].total == 0
    assert forward_flops(TransformerLMConfig(8, 2, 3, 5, ffn_dim=16), 10) == sum(
        p.total for p in parts.values()
    )


def test_forms_of_the_mlstm_agree_in_what_they_share():
    time, heads, k, v = 512, 2, 64, 128
    first, tfla = (mlstm_cell_flops(time, heads, k, v, 64, form) for form in ("first", "tfla"))
    assert first.products == tfla.products  # chunks of 64 have no causal saving in either
    assert tfla.total < first.total
    assert mlstm_cell_flops(time, heads, k, v, 128, "tfla", 0.5).products < tfla.products * 1.2
    step = mlstm_cell_flops(1, 1, k, v, 1, "recurrent").total
    assert step == 6 * k * v + 7 * k + v + 12
    parallel = mlstm_cell_flops(time, heads, k, v, 64, "parallel", 1.0)
    assert parallel.products == heads * 2 * time**2 * (k + v)
    with pytest.raises(ValueError, match="unknown form 'quick'"):
        mlstm_cell_flops(1, 1, 1, 1, 1, "quick")
    with pytest.raises(ValueError, match="unknown form 'half'"):
        attention_flops(1, 1, 1, "half")


def test_least_work_is_a_bound():
    for length in (64, 128):
        count = mlstm_cell_flops(1024, 2, 64, 128, length, "tfla", 1.0).products
        assert least_mlstm_flops(1024, 2, 64, 128, length, backward=False) < count
        both = count + mlstm_backward_flops(1024, 2, 64, 128, length, 1.0).products
        assert least_mlstm_flops(1024, 2, 64, 128, length) < both


@pytest.mark.parametrize("name", ["xlstm_large", "transformer_lm"])
def test_least_work_of_a_prompt(name):
    """One token: two operations per weight. A long prompt: about its forward pass without the logits."""
    config = build_config(
        {"model_type": name, "embedding_dim": 256, "num_heads": 4, "num_blocks": 3, "vocab_size": 512}
    )
    with torch.device("meta"):
        linear = sum(
            m.weight.numel() for m in build_model(config).modules() if isinstance(m, torch.nn.Linear)
        )
    assert least_prompt_flops(config, 1) == pytest.approx(2 * linear, rel=0.05)
    parts = forward_components(config, 2048)
    whole = sum(part.products for part in parts.values()) - parts["head"].products
    assert 0.9 * whole < least_prompt_flops(config, 2048) < 1.01 * whole


def test_a_counted_backward_pass_is_about_twice_the_forward_pass():
    config = xLSTMLargeConfig(1024, 4, 2, VOCABULARY)
    double = training_flops_per_token(config, 2048, Counting("tfla"))
    counted = training_flops_per_token(config, 2048, Counting("tfla", backward="counted"))
    assert counted != double
    assert counted == pytest.approx(double, rel=0.03)
    llama = TransformerLMConfig(64, 4, 1, 40)
    assert training_flops_per_token(llama, 64, Counting(backward="counted")) == training_flops_per_token(
        llama, 64
    )
    with pytest.raises(ValueError, match="context_length must be at least 1"):
        training_flops_per_token(llama, 0)


@pytest.mark.parametrize("name", ALL)
def test_inference_costs_are_about_two_flops_and_two_bytes_per_parameter(name):
    config = ALL[name]
    embedding = config.embedding_dim * config.vocab_size
    tied = getattr(config, "tie_weights", False)
    matrices = parameter_count(config) - (0 if tied else embedding)
    step = decode_cost(config, 1, 0)
    state = 0 if isinstance(config, TransformerLMConfig) else state_bytes(config)
    assert step.bytes == pytest.approx(2 * matrices + 2 * state, rel=0.15)
    prompt = prefill_cost(config, 4, 256)
    body = matrices - config.embedding_dim * config.vocab_size
    assert prompt.flops > 4 * 256 * 2 * body * (0.9 if name in RECIPES else 0.6)
    assert prompt.bytes > 2 * matrices
    assert prefill_cost(config, 8, 256).flops == pytest.approx(2 * prompt.flops)
    assert prefill_cost(config, 8, 256).bytes < 2 * prompt.bytes  # weights are read once


def test_decoding_costs_of_the_7b_models():
    xlstm = build_config(read_mapping(RECIPES[0].parent / "xlstm_7b.yaml")["model"])
    llama = TransformerLMConfig(4096, 32, 32, VOCABULARY)
    assert decode_cost(xlstm, 1, 100) == decode_cost(xlstm, 1, 100_000)
    growth = decode_cost(llama, 1, 10_001).bytes - decode_cost(llama, 1, 10_000).bytes
    assert growth == 32 * 2 * 4096 * 2  # keys and values of one more position in every block
    assert decode_cost(llama, 3, 10_001).bytes - decode_cost(llama, 3, 10_000).bytes == 3 * growth
    limits = find_device("H100")
    assert decode_cost(xlstm, 1, 0).seconds(limits.peak_flops, limits.bandwidth) == pytest.approx(
        4.1e-3, rel=0.05
    )
    assert decode_cost(xlstm, 1, 0).intensity < 2
    assert prefill_cost(xlstm, 8, 2048).intensity > limits.peak_flops / limits.bandwidth


def test_roofline():
    device = DEVICES["h100"]
    ridge = device.peak_flops / device.bandwidth
    assert roofline(10 * ridge, device.peak_flops, device.bandwidth) == device.peak_flops
    assert roofline(ridge / 4, device.peak_flops, device.bandwidth) == pytest.approx(device.peak_flops / 4)
    for sharpness in (1.0, 10.0, 1000.0):  # the smooth one lies between its limits' minimum and mean
        soft = roofline(ridge / 4, device.peak_flops, device.bandwidth, sharpness)
        assert device.peak_flops / 4 <= soft <= device.peak_flops * 0.625
    assert soft == pytest.approx(device.peak_flops / 4, rel=0.01)
    with pytest.raises(ValueError, match=r"unknown device 'h10'.*Did you mean 'h100'"):
        find_device("h10")
    with pytest.raises(ValueError, match="intensity must be positive"):
        roofline(0, 1, 1)
    with pytest.raises(ValueError, match="sharpness must be positive"):
        roofline(1, 1, 1, 0)


def test_impossible_sizes_are_refused():
    config = ARCHITECTURES["large"]
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        decode_cost(config, 0, 5)
    with pytest.raises(ValueError, match="context_length must be 0 or more"):
        decode_cost(config, 1, -5)
    with pytest.raises(ValueError, match="time must be at least 1"):
        prefill_cost(config, 1, 0)
