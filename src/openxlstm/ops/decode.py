"""A language model as the native library runs it: one call for one token of a batch of sequences.

A :class:`Program` is a table of weights, read where they are, and of states, arrays with one entry ("slot")
per sequence that a step updates in place. Which field of a layer means what stands in ``native/decode.h``;
the equations are those of :mod:`openxlstm.layers`. Results of a sequence depend neither on the others in its
batch nor on the number of threads, bit for bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from openxlstm.ops.native import loader
from openxlstm.ops.products import BFLOAT16, FLOAT32, Weight

LARGE, MLSTM_BLOCK, SLSTM_BLOCK = range(3)
CELLS = {"slstm": 0, "lstm": 1}
ACTIVATIONS = {"gelu": 0, "relu": 1, "relu^2": 2, "sigmoid": 3, "swish": 4, "selu": 5}
STATE_DTYPES = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}


class Map(NamedTuple):
    """A linear map."""

    weight: Weight
    bias: Tensor | None = None
    """float32 (out)."""


class Norm(NamedTuple):
    """A norm over the last dimension; weight and bias are float32."""

    kind: int
    """:data:`RMS`, :data:`LAYER` or :data:`NONE`."""
    weight: Tensor | None = None
    bias: Tensor | None = None
    eps: float = 0.0


RMS, LAYER, NONE = range(3)


class _Linear(ctypes.Structure):
    _fields_ = (("weight", Weight), ("bias", ctypes.c_void_p))


class _Norm(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("kind", ctypes.c_int32),
    )


_Three = ctypes.c_void_p * 3


class _Layer(ctypes.Structure):
    """``Layer`` of native/decode.h."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("kind", "cell", "activation", "taps")),
        *((name, ctypes.c_int64) for name in ("heads", "dk", "dv", "hidden", "block")),
        ("eps", ctypes.c_float),
        ("gate_cap", ctypes.c_float),
        *((name, _Norm) for name in ("norm", "head_norm", "ffn_norm")),
        *((name, _Linear) for name in ("q", "k", "v", "o", "i", "f", "z", "up", "out", "recurrent")),
        *((name, _Linear) for name in ("ffn_gate", "ffn_up", "ffn_down")),
        *((name, ctypes.c_void_p) for name in ("conv", "conv_bias", "skip")),
        ("diagonal", _Three),
        ("diagonal_bias", _Three),
        *((name, ctypes.c_void_p) for name in ("c", "h", "n", "m", "conv_state")),
    )


class _Decode(ctypes.Structure):
    """``Decode`` of native/decode.h."""

    _fields_ = (
        ("layers", ctypes.POINTER(_Layer)),
        ("num_layers", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("embedding", Weight),
        ("out_norm", _Norm),
        ("head", _Linear),
        ("logit_cap", ctypes.c_float),
        ("state_kind", ctypes.c_int32),
        ("batch", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("tokens", "source", "target", "logits", "workspace")),
        ("workspace_floats", ctypes.c_int64),
    )


class Program:
    """Weights and states of a model, ready to run.

    Args:
        layers: for each block its fields by the names of ``Layer`` in native/decode.h: numbers, :class:`Map`,
            :class:`Norm`, float32 tensors, or three of them.
        embedding: (vocabulary, width), float32 or bfloat16.
        out_norm: the last norm.
        head: the map to the logits.
        logit_cap: soft cap of the logits; 0 for none.
        state_dtype: how matrix memories are kept, float32 or bfloat16.
        keep: tensors that the weights lie in; they are kept alive.
    """

    def __init__(
        self,
        layers: Sequence[Mapping[str, Any]],
        *,
        embedding: Weight,
        out_norm: Norm,
        head: Map,
        logit_cap: float,
        state_dtype: torch.dtype,
        keep: Sequence[Tensor],
    ) -> None:
        self._alive: list[Any] = list(keep)
        self._layers = (_Layer * len(layers))()
        for structure, values in zip(self._layers, layers, strict=True):
            self._fill(structure, values)
        self._call = _Decode(
            layers=self._layers, num_layers=len(layers), width=embedding.columns, embedding=embedding
        )
        self._fill(self._call, {"out_norm": out_norm, "head": head, "logit_cap": logit_cap})
        self._call.state_kind = STATE_DTYPES[state_dtype]
        self.vocab_size = head.weight.rows
        self._workspace = torch.empty(0)
        self._sized_for = (0, 0)

    def set_states(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Use these arrays (slots, ...) as states: for each block those of c, h, n, m, conv_state it has."""
        for structure, values in zip(self._layers, states, strict=True):
            for name, tensor in values.items():
                setattr(structure, name, _address(tensor, (torch.float32, torch.bfloat16)))
        self._states = states

    def step(self, tokens: Sequence[int], source: Sequence[int], target: Sequence[int]) -> Tensor:
        """Read one token per sequence: from slots ``source`` to slots ``target``, which may be the same.

        One call at a time. Every token and slot must exist, and no target may be the source or target of
        another sequence. Returns float32 logits (B, vocabulary).
        """
        batch, threads = len(tokens), torch.get_num_threads()
        logits = torch.empty(batch, self.vocab_size)
        if not batch:
            return logits
        integers = torch.tensor([list(tokens), list(source), list(target)], dtype=torch.int64)
        a = self._call
        a.batch, a.logits = batch, logits.data_ptr()
        a.tokens, a.source, a.target = (row.data_ptr() for row in integers)
        if self._sized_for != (batch, threads):
            loader.call("oxl_decode_workspace", a)
            if a.workspace_floats > self._workspace.numel():
                self._workspace = torch.empty(a.workspace_floats)
            self._sized_for = (batch, threads)
        a.workspace = self._workspace.data_ptr()
        loader.call("oxl_decode", a)
        return logits

    def _fill(self, structure: ctypes.Structure, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            setattr(structure, name, self._converted(value))

    def _converted(self, value: Any) -> Any:
        if isinstance(value, Map):
            return _Linear(value.weight, self._pointer(value.bias))
        if isinstance(value, Norm):
            return _Norm(self._pointer(value.weight), self._pointer(value.bias), value.eps, value.kind)
        if isinstance(value, tuple):
            return _Three(*(self._pointer(part) for part in value))
        return self._pointer(value) if isinstance(value, Tensor) else value

    def _pointer(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        self._alive.append(tensor)
        return _address(tensor, (torch.float32,))


def _address(tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> int:
    if tensor.dtype not in dtypes or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise ValueError(
            f"needs a contiguous {dtypes[0]} tensor on the CPU, got {tensor.dtype} {tuple(tensor.shape)}"
        )
    return tensor.data_ptr()
