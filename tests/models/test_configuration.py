"""Configurations: published fields and defaults, round trips, ratios, and one clear line for wrong ones."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from openxlstm.config import config_from_dict, config_to_dict
from openxlstm.models import (
    FeedForwardConfig,
    build_config,
    build_model,
    mLSTMBlockConfig,
    mLSTMLayerConfig,
    model_type_of,
    slstm_positions,
    sLSTMBlockConfig,
    sLSTMLayerConfig,
    xLSTMBlockStack,
    xLSTMBlockStackConfig,
    xLSTMLargeConfig,
    xLSTMLMModelConfig,
)
from openxlstm.state import ModelState, map_state

PUBLISHED_YAML = """
num_blocks: 7
embedding_dim: 64
mlstm_block:
  mlstm:
    conv1d_kernel_size: 4
    qkv_proj_blocksize: 4
    num_heads: 4
slstm_block:
  slstm:
    backend: cuda
    num_heads: 4
    conv1d_kernel_size: 4
    bias_init: powerlaw_blockdependent
  feedforward:
    proj_factor: 1.3
    act_fn: gelu
slstm_at: [1]
context_length: 256
vocab_size: 100
"""


def test_published_defaults():
    layer, cell, ffn = mLSTMLayerConfig(), sLSTMLayerConfig(), FeedForwardConfig()
    assert (layer.conv1d_kernel_size, layer.qkv_proj_blocksize, layer.num_heads, layer.proj_factor) == (
        4,
        4,
        4,
        2,
    )
    assert (layer.round_proj_up_dim_up, layer.round_proj_up_to_multiple_of) == (True, 64)
    assert (cell.backend, cell.function, cell.num_heads, cell.conv1d_kernel_size) == ("cuda", "slstm", 4, 4)
    assert (cell.bias_init, cell.recurrent_weight_init) == ("powerlaw_blockdependent", "zeros")
    assert (cell.batch_size, cell.dtype, cell.dtype_b) == (8, "bfloat16", "float32")
    assert (ffn.proj_factor, ffn.act_fn, ffn.dropout, ffn.bias) == (1.3, "gelu", 0.0, False)
    stack = xLSTMLMModelConfig()
    assert (stack.context_length, stack.num_blocks, stack.embedding_dim, stack.slstm_at) == (-1, 1, 128, [])
    assert (stack.add_post_blocks_norm, stack.bias, stack.dropout, stack.vocab_size) == (True, False, 0.0, -1)
    large = xLSTMLargeConfig(4096, 8, 32, 50304)
    assert (large.norm_eps, large.eps, large.qk_dim_factor, large.v_dim_factor) == (1e-6, 1e-6, 0.5, 1.0)
    assert (large.chunk_size, large.return_last_states, large.mode) == (64, False, "train")
    assert (large.gate_soft_cap, large.output_logit_soft_cap, large.weight_mode) == (15, 30, "single")


def test_published_yaml_loads_and_round_trips():
    config = config_from_dict(xLSTMLMModelConfig, yaml.safe_load(PUBLISHED_YAML))
    assert config.block_map == ["m", "s", "m", "m", "m", "m", "m"]
    assert config.slstm_block.feedforward.act_fn == "gelu"
    for config_or_large in (config, xLSTMLargeConfig(64, 2, 1, 40, ffn_dim=100)):
        values = json.loads(json.dumps(config_to_dict(config_or_large)))
        assert config_from_dict(type(config_or_large), values) == config_or_large
    model = build_model({"model_type": "xlstm_lm", **config_to_dict(config)})
    assert model.config == config
    assert build_config({"model_type": "xlstm_lm", **config_to_dict(config)}) == config


@pytest.mark.parametrize(
    ("width", "factor", "hidden"),
    [
        (768, 2.6667, 2048),
        (1024, 2.667, 2752),
        (1152, 2.6667, 3072),
        (2560, 2.667, 6848),
        (4096, 2.6667, 10944),
    ],
)
def test_feedforward_width_is_rounded_like_the_published_code(width, factor, hidden):
    assert xLSTMLargeConfig(width, 4, 1, 10, ffn_proj_factor=factor).ffn_hidden_dim == hidden
    assert xLSTMLargeConfig(width, 4, 1, 10, ffn_proj_factor=factor, ffn_dim=2112).ffn_hidden_dim == 2112


@pytest.mark.parametrize(
    ("ratio", "blocks", "expected"),
    [
        ("[7:1]", 8, [4]),
        ("7:1", 16, [4, 12]),
        ("[1:0]", 4, []),
        ("[0:1]", 3, [0, 1, 2]),
        ("[1:1]", 4, [1, 3]),
        ("[11:1]", 24, [6, 18]),
        ("[7:1]", 2, [1]),
        ("[1:2]", 6, [0, 2, 3, 5]),
    ],
)
def test_ratio_notation(ratio, blocks, expected):
    assert slstm_positions(ratio, blocks) == expected
    config = xLSTMBlockStackConfig(num_blocks=blocks, slstm_at=ratio)
    assert config.slstm_positions == expected
    assert config.block_map.count("s") == len(expected)


def test_slstm_at_all():
    assert xLSTMBlockStackConfig(num_blocks=2, slstm_at="all").block_map == ["s", "s"]
    assert xLSTMBlockStackConfig(num_blocks=2, slstm_block=sLSTMBlockConfig()).block_map == ["s", "s"]
    both = xLSTMBlockStackConfig(mLSTMBlockConfig(), sLSTMBlockConfig(), num_blocks=2)
    assert both.block_map == ["m", "m"]


def lm(**fields):
    return build_model(xLSTMLMModelConfig(**{"vocab_size": 40, "embedding_dim": 16} | fields))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: lm(vocab_size=-1), "vocab_size must be set"),
        (lambda: lm(num_blocks=0), "num_blocks must be at least 1"),
        (lambda: lm(embedding_dim=0), "embedding_dim must be positive"),
        (lambda: lm(dropout=1.5), "dropout"),
        (lambda: lm(slstm_at=[1]), "slstm_at holds 1, but 1 blocks have positions 0 to 0"),
        (lambda: lm(**yaml.safe_load("slstm_at: [7:1]")), "slstm_at holds 421.* needs quotes"),
        (lambda: lm(slstm_at=[-1]), "slstm_at holds -1"),
        (lambda: lm(slstm_at=[0, 0]), "names a block twice"),
        (lambda: lm(slstm_at="some"), r"'some' is not a ratio; write it like '\[7:1\]'"),
        (lambda: lm(slstm_at="[0:0]"), "not a ratio"),
        (lambda: lm(mlstm_block=mLSTMBlockConfig(mLSTMLayerConfig(num_heads=3))), "choose a divisor of 64"),
        (
            lambda: lm(mlstm_block=mLSTMBlockConfig(mLSTMLayerConfig(qkv_proj_blocksize=5))),
            "qkv_proj_blocksize 5",
        ),
        (lambda: lm(slstm_block=sLSTMBlockConfig(sLSTMLayerConfig(num_heads=3))), "choose a divisor of 16"),
        (lambda: sLSTMLayerConfig(bias_init="ones"), "bias_init must be one of"),
        (lambda: sLSTMLayerConfig(forward_clipval=1.0), "not supported"),
        (lambda: xLSTMLargeConfig(20, 3, 1, 40), "num_heads 3 does not divide the query/key width 10"),
        (lambda: xLSTMLargeConfig(16, 2, 1, 0), "vocab_size must be positive"),
        (lambda: xLSTMLargeConfig(16, 2, 1, 40, ffn_dim=0), "feed-forward width"),
        (lambda: xLSTMLargeConfig(16, 2, 1, 40, weight_mode="joint"), "weight_mode"),
        (lambda: xLSTMLargeConfig(16, 2, 1, 40, gate_soft_cap=0.0), "gate_soft_cap"),
        (lambda: xLSTMLargeConfig(16, 2, 1, 40, chunk_size=0), "chunk_size must be positive, got 0"),
        (lambda: xLSTMLargeConfig(16, 2, 1, 40, ops_backend="fast"), "unknown backend 'fast' for mlstm"),
        (lambda: mLSTMLayerConfig(ops_backend="chunkwize"), "Did you mean 'chunkwise'"),
        (
            lambda: sLSTMLayerConfig(ops_backend="nativ"),
            "unknown backend 'nativ' for rnn. Did you mean 'native'",
        ),
        (lambda: mLSTMLayerConfig(proj_factor=0.0), "proj_factor must be a positive number, got 0.0"),
        (lambda: mLSTMLayerConfig(round_proj_up_to_multiple_of=0), "multiple_of must be at least 1"),
        (lambda: FeedForwardConfig(proj_factor=float("nan")), "proj_factor must be a positive number"),
        (lambda: FeedForwardConfig(round_proj_up_to_multiple_of=-64), "multiple_of must be at least 1"),
        (
            lambda: lm(mlstm_block=mLSTMBlockConfig(mLSTMLayerConfig(round_proj_up_dim_up=False))),
            "gives an inner width of 0",
        ),
        (lambda: build_model({"model_type": "xlstm_larg"}), "Did you mean 'xlstm_large'"),
        (lambda: build_model({"model_type": "xlstm_lm", "num_block": 3}), "Did you mean 'num_blocks'"),
        (lambda: build_model(xLSTMBlockStackConfig()), "not the configuration of a language model"),
        (lambda: model_type_of(torch.nn.Linear(1, 1)), "not a registered model"),
    ],
)
def test_wrong_configurations(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    "config", [xLSTMLargeConfig(16, 2, 2, 40), xLSTMLMModelConfig(vocab_size=40, embedding_dim=16)]
)
def test_wrong_inputs(config):
    model = build_model(config)
    good = torch.zeros(2, 3, dtype=torch.long)
    for tokens, message in (
        (good + 40, "token id 40 is out of range for a vocabulary of 40"),
        (good - 1, "token id -1 is out of range"),
        (good.float(), "integers"),
        (good[0], "shape"),
    ):
        with pytest.raises(ValueError, match=message):
            model(tokens)
    with pytest.raises(ValueError, match="one position"):
        model.step(good)
    with pytest.raises(ValueError, match="holds 3 sequences, the input 2"):
        model(good, model.initial_state(3))
    with pytest.raises(ValueError, match="holds 3 sequences, the input 2"):
        model.step(good[:, :1], model.initial_state(3))
    other = build_model(xLSTMLargeConfig(16, 2, 3, 40))
    with pytest.raises(ValueError, match="3 blocks"):
        model(good, other.initial_state(2))
    blocks = model.initial_state(2).blocks
    first = map_state(lambda leaf: torch.cat([leaf, leaf], -1), blocks[0])
    for wrong in (first, blocks[0][:1]):
        with pytest.raises(ValueError, match="other cells or widths: its block 0 holds"):
            model.step(good[:, :1], ModelState((wrong, *blocks[1:])))
    with pytest.raises(ValueError, match=r"must be a ModelState.*got tuple"):
        model(good, blocks)
    with pytest.raises(ValueError, match="reset"):
        model(good, reset=torch.zeros(2, 4, dtype=torch.bool))


def test_wrong_width():
    with pytest.raises(ValueError, match=r"\(batch, time, 16\)"):
        xLSTMBlockStack(xLSTMBlockStackConfig(embedding_dim=16))(torch.randn(2, 3, 8))
