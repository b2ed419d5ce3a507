"""Layers of xLSTMLarge, the architecture of xLSTM 7B (post up-projection).

    x = x + mLSTMLarge(norm(x));   x = x + FFN(norm(x))

    mLSTMLarge:  q, k, v, o = W x;   i, f = cap15(W x + b)
                 y = W_out( sigmoid(o) * norm_heads(mLSTM(q, k, v, i, f)) )
    FFN:         y = W_down( SiLU(W_gate x) * W_up x )

``weight_mode="fused"`` keeps q, k, v, o (and i, f; and gate, up) in one matrix each; state dicts of either
mode load into modules of the other. Parameter names are the published ones. Source: Beck et al., xLSTM 7B,
arXiv 2503.13427.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from openxlstm.layers.backends import step_backend
from openxlstm.layers.initialization import linspace_, small_init_, wang_init_, zero_
from openxlstm.layers.linear import Linear
from openxlstm.layers.norms import PlainMultiHeadLayerNorm, RMSNorm
from openxlstm.layers.precision import cast_once
from openxlstm.layers.soft_cap import soft_cap
from openxlstm.layers.stateful import with_state
from openxlstm.ops import mlstm, mlstm_initial_state, mlstm_step
from openxlstm.state import mLSTMState


class LargeConfig(Protocol):
    """What these layers read from the model's configuration (``xLSTMLargeConfig``)."""

    @property
    def embedding_dim(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def qk_dim(self) -> int: ...
    @property
    def v_dim(self) -> int: ...
    @property
    def ffn_hidden_dim(self) -> int: ...
    @property
    def use_bias(self) -> bool: ...
    @property
    def norm_eps(self) -> float: ...
    @property
    def norm_reduction_force_float32(self) -> bool: ...
    @property
    def eps(self) -> float: ...
    @property
    def gate_soft_cap(self) -> float | None: ...
    @property
    def weight_mode(self) -> str: ...
    @property
    def ops_backend(self) -> str: ...


class _FusableModule(nn.Module):
    """Loads state dicts whose linear maps are fused or single, whichever form the module itself has."""

    _fusions: Mapping[str, Sequence[tuple[str, int]]]
    """Name of the fused map to the names and row counts of its parts, in order."""
    _fused: bool

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for fused, parts in self._fusions.items():
            for kind in ("weight", "bias"):
                fused_key = f"{prefix}{fused}.{kind}"
                part_keys = [f"{prefix}{name}.{kind}" for name, _ in parts]
                if self._fused and all(key in state_dict for key in part_keys):
                    state_dict[fused_key] = torch.cat([state_dict.pop(key) for key in part_keys])
                elif not self._fused and fused_key in state_dict:
                    rows = [count for _, count in parts]
                    if state_dict[fused_key].shape[0] == sum(rows):
                        state_dict.update(zip(part_keys, state_dict.pop(fused_key).split(rows), strict=True))
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class mLSTMLargeLayer(_FusableModule):
    """mLSTM layer of xLSTMLarge, (B, T, E) -> (B, T, E). The state is an :class:`mLSTMState`."""

    def __init__(self, config: LargeConfig) -> None:
        super().__init__()
        self.config = config
        self.step_backend = step_backend("mlstm_step", config.ops_backend)
        width, heads, qk, v = config.embedding_dim, config.num_heads, config.qk_dim, config.v_dim
        self._fused = config.weight_mode == "fused"
        self._fusions = {
            "qkv_opreact": (("q", qk), ("k", qk), ("v", v), ("ogate_preact", v)),
            "ifgate_preact": (("igate_preact", heads), ("fgate_preact", heads)),
        }
        if self._fused:
            self.qkv_opreact = Linear(width, 2 * qk + 2 * v, bias=config.use_bias)
            self.ifgate_preact = Linear(width, 2 * heads)
        else:
            self.q = Linear(width, qk, bias=config.use_bias)
            self.k = Linear(width, qk, bias=config.use_bias)
            self.v = Linear(width, v, bias=config.use_bias)
            self.ogate_preact = Linear(width, v, bias=config.use_bias)
            self.igate_preact = Linear(width, heads)
            self.fgate_preact = Linear(width, heads)
        self.multihead_norm = PlainMultiHeadLayerNorm(
            v, config.norm_eps, config.use_bias, config.norm_reduction_force_float32
        )
        self.out_proj = Linear(v, width, bias=config.use_bias)
        self.reset_parameters()

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q, k (B, T, H, DK), v (B, T, H, DV), capped gates i, f (B, T, H), output gate o (B, T, H DV)."""
        config, x = self.config, cast_once(x)
        if self._fused:
            widths = [config.qk_dim, config.qk_dim, config.v_dim, config.v_dim]
            q, k, v, o = self.qkv_opreact(x).split(widths, dim=-1)
            i, f = self.ifgate_preact(x).chunk(2, dim=-1)
        else:
            q, k, v, o = self.q(x), self.k(x), self.v(x), self.ogate_preact(x)
            i, f = self.igate_preact(x), self.fgate_preact(x)
        q, k, v = (u.unflatten(-1, (config.num_heads, -1)) for u in (q, k, v))
        i, f = soft_cap(i, config.gate_soft_cap), soft_cap(f, config.gate_soft_cap)
        return q, k, v, i, f, o

    def forward(
        self,
        x: Tensor,
        state: mLSTMState | None = None,
        *,
        return_state: bool = False,
        reset: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, mLSTMState]:
        """Run a sequence.

        Args:
            x: (B, T, E).
            state: what came before; None is the empty state.
            return_state: also return the state after the last position.
            reset: bool (B, T), True where a new document starts.

        Returns:
            y (B, T, E), or (y, state).
        """
        q, k, v, i, f, o = self._project(x)
        result = mlstm(
            q,
            k,
            v,
            i,
            f,
            state=state,
            return_state=return_state,
            reset=reset,
            eps=self.config.eps,
            backend=self.config.ops_backend,
        )
        h, new_state = with_state(result, return_state)
        y = self.out_proj(self.multihead_norm(h, gate=o))
        return (y, new_state) if return_state else y

    def step(self, x: Tensor, state: mLSTMState | None = None) -> tuple[Tensor, mLSTMState]:
        """Advance by one position: x (B, 1, E) -> (y (B, 1, E), state)."""
        state = self.initial_state(x.shape[0], x.device) if state is None else state
        q, k, v, i, f, o = self._project(x)
        q, k, v, i, f = (u[:, 0] for u in (q, k, v, i, f))
        h, state = mlstm_step(q, k, v, i, f, state, eps=self.config.eps, backend=self.step_backend)
        return self.out_proj(self.multihead_norm(h[:, None], gate=o)), state

    def initial_state(self, batch_size: int, device: torch.device | str | None = None) -> mLSTMState:
        """The empty state: zeros."""
        heads, weight = self.config.num_heads, self.out_proj.weight
        return mlstm_initial_state(
            batch_size,
            heads,
            self.config.qk_dim // heads,
            self.config.v_dim // heads,
            device=weight.device if device is None else device,
            dtype=torch.promote_types(torch.float32, weight.dtype),
        )

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """The initial values of the 7B recipe: q, k, v small init, out_proj Wang init, o-gate weights 0, gate
        weights 0 with input-gate bias -10 and forget-gate bias from 3 to 6 over the heads, other biases 0."""
        width, qk, v = self.config.embedding_dim, self.config.qk_dim, self.config.v_dim
        if self._fused:
            q, k, v_weight, o = self.qkv_opreact.weight.split([qk, qk, v, v])
            i, f = self.ifgate_preact.weight.chunk(2)
            i_bias, f_bias = self.ifgate_preact.bias.chunk(2)
            biases = [self.qkv_opreact.bias]
        else:
            q, k, v_weight, o = self.q.weight, self.k.weight, self.v.weight, self.ogate_preact.weight
            i, f = self.igate_preact.weight, self.fgate_preact.weight
            i_bias, f_bias = self.igate_preact.bias, self.fgate_preact.bias
            biases = [self.q.bias, self.k.bias, self.v.bias, self.ogate_preact.bias]
        with torch.no_grad():
            for weight in (q, k, v_weight):
                small_init_(weight, width, generator)
            zero_(o, i, f, *biases, self.out_proj.bias)
            nn.init.constant_(i_bias, -10.0)
            linspace_(f_bias, 3.0, 6.0)
            wang_init_(self.out_proj.weight, width, self.config.num_blocks, generator)
        self.multihead_norm.reset_parameters()


class LargeFeedForward(_FusableModule):
    """SwiGLU feed-forward of xLSTMLarge, (B, T, E) -> (B, T, E)."""

    def __init__(self, config: LargeConfig) -> None:
        super().__init__()
        self.config = config
        width, hidden, bias = config.embedding_dim, config.ffn_hidden_dim, config.use_bias
        self._fused = config.weight_mode == "fused"
        self._fusions = {"proj_up_gate_z": (("proj_up_gate", hidden), ("proj_up", hidden))}
        if self._fused:
            self.proj_up_gate_z = Linear(width, 2 * hidden, bias=bias)
        else:
            self.proj_up_gate = Linear(width, hidden, bias=bias)
            self.proj_up = Linear(width, hidden, bias=bias)
        self.proj_down = Linear(hidden, width, bias=bias)
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        x = cast_once(x)
        if self._fused:
            gate, up = self.proj_up_gate_z(x).chunk(2, dim=-1)
        else:
            gate, up = self.proj_up_gate(x), self.proj_up(x)
        return self.proj_down(F.silu(gate) * up)

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Small init up, Wang init down, biases 0."""
        width = self.config.embedding_dim
        ups = [self.proj_up_gate_z] if self._fused else [self.proj_up_gate, self.proj_up]
        for up in ups:
            small_init_(up.weight, width, generator)
            zero_(up.bias)
        wang_init_(self.proj_down.weight, width, self.config.num_blocks, generator)
        zero_(self.proj_down.bias)


class mLSTMLargeBlock(nn.Module):
    """x = x + mLSTM(norm(x)); x = x + FFN(norm(x))."""

    def __init__(self, config: LargeConfig) -> None:
        super().__init__()
        norm = (config.embedding_dim, config.norm_eps, config.use_bias, config.norm_reduction_force_float32)
        self.norm_mlstm = RMSNorm(*norm)
        self.mlstm_layer = mLSTMLargeLayer(config)
        self.norm_ffn = RMSNorm(*norm)
        self.ffn = LargeFeedForward(config)

    def forward(
        self,
        x: Tensor,
        state: mLSTMState | None = None,
        *,
        return_state: bool = False,
        reset: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, mLSTMState]:
        """Run a sequence, (B, T, E) -> (B, T, E); see :meth:`mLSTMLargeLayer.forward`."""
        result = self.mlstm_layer(self.norm_mlstm(x), state, return_state=return_state, reset=reset)
        y, new_state = with_state(result, return_state)
        x = x + y
        x = x + self.ffn(self.norm_ffn(x))
        return (x, new_state) if return_state else x

    def step(self, x: Tensor, state: mLSTMState | None = None) -> tuple[Tensor, mLSTMState]:
        """Advance by one position: x (B, 1, E) -> (y (B, 1, E), state)."""
        y, state = self.mlstm_layer.step(self.norm_mlstm(x), state)
        x = x + y
        return x + self.ffn(self.norm_ffn(x)), state

    def initial_state(self, batch_size: int, device: torch.device | str | None = None) -> mLSTMState:
        """The empty state: zeros."""
        return self.mlstm_layer.initial_state(batch_size, device)

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """The initial values of the 7B recipe."""
        for module in (self.norm_mlstm, self.norm_ffn):
            module.reset_parameters()
        self.mlstm_layer.reset_parameters(generator)
        self.ffn.reset_parameters(generator)
