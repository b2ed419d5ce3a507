"""Norms, convolution, block-diagonal maps, feed-forward, soft cap: against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from openxlstm.layers import (
    CausalConv1d,
    FeedForward,
    FeedForwardConfig,
    LayerNorm,
    LinearHeadwise,
    MultiHeadLayerNorm,
    PlainMultiHeadLayerNorm,
    RMSNorm,
    soft_cap,
)


def test_layer_norms_scale_by_one_plus_weight():
    x = torch.randn(2, 3, 4, 5, dtype=torch.double)
    weight = torch.randn(20, dtype=torch.double)
    flat = x.flatten(-2)

    norm = LayerNorm(20).double()
    norm.weight.data = weight
    expected = (flat - flat.mean(-1, keepdim=True)) / (flat.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(norm(flat), expected * (1 + weight))

    heads = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    norm = MultiHeadLayerNorm(20).double()
    norm.weight.data = weight
    torch.testing.assert_close(norm(x), heads.flatten(-2) * (1 + weight))
    torch.testing.assert_close(MultiHeadLayerNorm(20, affine=False)(x), heads.flatten(-2))


@pytest.mark.parametrize("bias", [False, True])
def test_plain_norms(bias):
    x = torch.randn(2, 3, 4, 5, dtype=torch.double)
    weight, offset = torch.randn(2, 20, dtype=torch.double)
    offset = offset if bias else torch.zeros_like(offset)
    flat = x.flatten(-2)
    rms, heads = RMSNorm(20, bias=bias).double(), PlainMultiHeadLayerNorm(20, bias=bias).double()
    for norm in (rms, heads):
        norm.weight.data = weight
        if norm.bias is not None:
            norm.bias.data = offset
    expected = flat / (flat.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(rms(flat), expected * weight + offset)
    expected = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(heads(x), expected.flatten(-2) * weight + offset)


def test_rms_norm_in_bfloat16_reduces_in_float32_and_casts_before_the_weight():
    x = torch.randn(3, 64).bfloat16()
    norm = RMSNorm(64).bfloat16()
    norm.weight.data.uniform_(0.5, 2)
    wide = x.float()
    expected = (wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()).bfloat16() * norm.weight
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), expected)


def convolution(kernel_size, channels=3):
    return CausalConv1d(channels, kernel_size).double()


@pytest.mark.parametrize("kernel_size", [1, 2, 4, 7])
def test_convolution_equals_conv1d(kernel_size):
    conv, x = convolution(kernel_size), torch.randn(2, 9, 3, dtype=torch.double)
    padded = F.pad(x.transpose(1, 2), (kernel_size - 1, 0))
    expected = F.conv1d(padded, conv.conv.weight, conv.conv.bias, groups=3).transpose(1, 2)
    y, state = conv(x)
    torch.testing.assert_close(y, expected)
    assert state.shape == (2, kernel_size - 1, 3)
    for split in range(10):
        first, state = conv(x[:, :split])
        second, state = conv(x[:, split:], state)
        torch.testing.assert_close(torch.cat([first, second], 1), expected)
    assert conv.initial_state(2).shape == state.shape


@pytest.mark.parametrize("kernel_size", [1, 2, 4])
def test_convolution_stops_at_documents(kernel_size):
    conv = convolution(kernel_size)
    x = torch.randn(1, 9, 3, dtype=torch.double, requires_grad=True)
    before = torch.randn(1, kernel_size - 1, 3, dtype=torch.double)
    starts = [0, 1, 4, 5]
    reset = torch.zeros(1, 9, dtype=torch.bool)
    reset[0, starts] = True
    y, state = conv(x, before, reset=reset)
    pieces = [x[:, a:b] for a, b in zip(starts, [*starts[1:], 9], strict=True)]
    alone = [conv(piece) for piece in pieces]
    torch.testing.assert_close(y, torch.cat([part for part, _ in alone], 1))
    torch.testing.assert_close(state, alone[-1][1])
    reset[0, 0] = False  # now the first document goes on where the state stopped
    y, _ = conv(x, before, reset=reset)
    torch.testing.assert_close(y[:, :1], conv(x[:, :1], before)[0])
    (gradient,) = torch.autograd.grad(y[:, 4:].sum(), x)
    assert gradient[:, :4].abs().max() == 0


def test_convolution_state_after_a_short_document_hides_what_came_before():
    conv, x = convolution(4), torch.randn(1, 6, 3, dtype=torch.double)
    reset = torch.tensor([[False, False, False, False, True, False]])
    _, state = conv(x, reset=reset)
    y, _ = conv(x[:, :2], state)
    expected, _ = conv(torch.cat([x[:, 4:], x[:, :2]], 1))
    torch.testing.assert_close(y, expected[:, 2:])


def test_no_convolution():
    conv, x = CausalConv1d(3, 0), torch.randn(2, 5, 3)
    y, state = conv(x)
    assert y is x
    assert state.shape == conv.initial_state(2).shape == (2, 0, 3)
    assert not list(conv.parameters())
    with pytest.raises(ValueError, match="kernel_size"):
        CausalConv1d(3, -1)


@pytest.mark.parametrize(("features", "heads"), [(12, 3), (12, 12), (8, 1), (64, 16)])
def test_linear_headwise_is_block_diagonal(features, heads):
    linear = LinearHeadwise(features, heads, bias=True)
    linear.bias.data.normal_()
    x = torch.randn(2, 5, features)
    expected = x @ torch.block_diag(*linear.weight).T + linear.bias
    torch.testing.assert_close(linear(x), expected)
    with pytest.raises(ValueError, match="divide"):
        LinearHeadwise(10, 4)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("gelu", lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))),
        ("relu", lambda x: x.clamp_min(0)),
        ("relu^2", lambda x: x.clamp_min(0) ** 2),
        ("sigmoid", torch.sigmoid),
        ("swish", lambda x: x * torch.sigmoid(x)),
        ("selu", torch.selu),
    ],
)
def test_feedforward(name, function):
    ffn = FeedForward(FeedForwardConfig(embedding_dim=10, act_fn=name, bias=True)).double()
    ffn.proj_up.bias.data.normal_()
    assert ffn.proj_up.weight.shape == (128, 10)
    x = torch.randn(3, 10, dtype=torch.double)
    up = x @ ffn.proj_up.weight.T + ffn.proj_up.bias
    expected = (function(up[:, :64]) * up[:, 64:]) @ ffn.proj_down.weight.T + ffn.proj_down.bias
    torch.testing.assert_close(ffn(x), expected)


def test_feedforward_configuration():
    with pytest.raises(ValueError, match="act_fn"):
        FeedForwardConfig(act_fn="gelo")
    assert FeedForwardConfig(embedding_dim=100).proj_up_dim == 192
    assert FeedForwardConfig(embedding_dim=100, round_proj_up_dim_up=False).proj_up_dim == 128


def test_soft_cap():
    x = torch.randn(50, dtype=torch.double, requires_grad=True)
    y = soft_cap(x, 3.0)
    torch.testing.assert_close(y, 3 * torch.tanh(x / 3))
    assert torch.autograd.gradcheck(lambda u: soft_cap(u, 3.0), (x,))
    assert torch.autograd.gradgradcheck(lambda u: soft_cap(u, 3.0), (x,))
    assert soft_cap(torch.ones(2).bfloat16(), 3.0).dtype == torch.float32
    assert soft_cap(x, None) is x
