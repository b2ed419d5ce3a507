"""Parameters and states from the configuration against the modules and the published sizes."""

from __future__ import annotations

import pytest
import torch

from openxlstm.models import (
    FeedForwardConfig,
    TransformerLMConfig,
    build_model,
    mLSTMBlockConfig,
    mLSTMLayerConfig,
    parameter_count,
    sLSTMBlockConfig,
    sLSTMLayerConfig,
    state_bytes,
    training_flops_per_token,
    xLSTMBlockStack,
    xLSTMBlockStackConfig,
    xLSTMLargeConfig,
    xLSTMLMModelConfig,
)
from openxlstm.models.accounting import Counting, mlstm_cell_flops
from openxlstm.state import leaves

CONFIGS = [
    xLSTMLargeConfig(64, 2, 2, 48),
    xLSTMLargeConfig(64, 4, 3, 48, use_bias=True, ffn_dim=100, qk_dim_factor=1.0, add_out_norm=False),
    xLSTMLargeConfig(64, 4, 1, 48, weight_mode="fused", use_bias=True, tie_word_embeddings=True),
    xLSTMLMModelConfig(vocab_size=40, embedding_dim=32, num_blocks=3, slstm_at=[1]),
    xLSTMLMModelConfig(vocab_size=40, embedding_dim=32, num_blocks=2, bias=True, tie_weights=True),
    xLSTMLMModelConfig(
        mLSTMBlockConfig(mLSTMLayerConfig(conv1d_kernel_size=0, num_heads=2, proj_factor=1.3)),
        sLSTMBlockConfig(
            sLSTMLayerConfig(conv1d_kernel_size=0, num_heads=8, group_norm_weight=False),
            FeedForwardConfig(bias=True, proj_factor=2.0),
        ),
        vocab_size=40,
        embedding_dim=48,
        num_blocks=4,
        slstm_at="[1:1]",
        add_post_blocks_norm=False,
    ),
    xLSTMLMModelConfig(
        slstm_block=sLSTMBlockConfig(sLSTMLayerConfig(function="lstm"), None), vocab_size=10, embedding_dim=16
    ),
]


TRANSFORMERS = [
    TransformerLMConfig(48, 4, 3, 40),
    TransformerLMConfig(48, 4, 1, 40, num_kv_heads=2, tie_weights=True, ffn_dim=50),
]


@pytest.mark.parametrize("config", TRANSFORMERS)
def test_counts_of_the_transformer_equal_the_module(config):
    model = build_model(config)
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())
    state = model.read(torch.zeros(3, 7, dtype=torch.long))
    assert state_bytes(config, 3, 7) == sum(t.numel() * t.element_size() for t in leaves(state))


@pytest.mark.parametrize("config", CONFIGS)
def test_counts_equal_the_module(config):
    model = build_model(config)
    assert parameter_count(config) == sum(p.numel() for p in model.parameters())
    state = model.initial_state(3)
    assert state_bytes(config, 3) == sum(t.numel() * t.element_size() for t in leaves(state))


def test_block_stack_without_a_language_model():
    config = xLSTMBlockStackConfig(num_blocks=2, embedding_dim=32, slstm_at=[0])
    assert parameter_count(config) == sum(p.numel() for p in xLSTMBlockStack(config).parameters())


def test_published_sizes():
    seven = xLSTMLargeConfig(4096, 8, 32, 50304)
    assert parameter_count(seven) == 6_865_424_896
    assert state_bytes(seven) == 32 * 8 * (256 * 512 + 256 + 1) * 4
    assert parameter_count(xLSTMLargeConfig(768, 6, 12, 50304, ffn_dim=2112)) == 164_110_224
    sizes = {(768, 24): 163.8, (1024, 48): 409.3, (1536, 48): 840.4, (2048, 48): 1422.6}
    for (width, blocks), millions in sizes.items():
        config = xLSTMLMModelConfig(
            mLSTMBlockConfig(), vocab_size=50304, embedding_dim=width, num_blocks=blocks, tie_weights=False
        )
        assert parameter_count(config) / 1e6 == pytest.approx(millions, abs=0.06)
    mixed = xLSTMLMModelConfig(vocab_size=50304, embedding_dim=768, num_blocks=24, slstm_at=[3, 20])
    assert parameter_count(mixed) / 1e6 == pytest.approx(163.7, abs=0.06)


def test_meta_device_builds_a_model_without_memory():
    with torch.device("meta"):
        model = build_model(xLSTMLargeConfig(4096, 8, 2, 50304))
    assert all(p.is_meta for p in model.parameters())


def test_block_stack_flops_are_about_six_per_parameter_and_token():
    config = xLSTMLMModelConfig(vocab_size=50304, embedding_dim=768, num_blocks=24, slstm_at=[3, 20])
    matrices = parameter_count(config) - 50304 * 768
    cell = 3 * 22 * mlstm_cell_flops(2048, 4, 384, 384, 64).total / 2048
    assert training_flops_per_token(config, 2048) == pytest.approx(6 * matrices + cell, rel=0.02)
    longer = Counting(chunk_size=128)
    assert training_flops_per_token(config, 2048, longer) > training_flops_per_token(config, 2048)
