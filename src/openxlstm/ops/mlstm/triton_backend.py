"""Backend ``triton`` of the mLSTM: Tiled Flash Linear Attention on GPUs, exact gradients.

``openxlstm::mlstm_triton`` computes what :mod:`openxlstm.ops.mlstm.chunkwise` does. Forwards, gate scalars
(:mod:`triton_scalars`) apart: three launches with the state on the chip where heads and value columns fill
the machine, else two (states between chunks, then all chunks in parallel); :func:`configurations.resident` is
the rule. Backwards four: states again, row scalars, state gradients, then dQ, dK and dV of each chunk from
shared score tiles. Any length, any head dimension up to 1,024, strided inputs, resets. Values are float32,
bfloat16 or float16; gates, normaliser and returned states are float32, sums of gates float64. States between
chunks are kept in bfloat16 for bfloat16 inputs, else in float32.

Gradients do not depend on how forward and backward choose their chunk lengths. Not twice differentiable; the
backend ``recurrent`` is. Source: arXiv 2503.14376; derivation in docs/kernels.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from openxlstm.ops.gpu import configurations
from openxlstm.ops.gpu.support import kernel, precision, unit_stride
from openxlstm.ops.mlstm.chunkwise import register_gradient
from openxlstm.ops.mlstm.triton_scalars import MAX_CHUNK, Scalars, gradients, prepare
from openxlstm.ops.mlstm.triton_schedules import outputs, resident, states_between, strides


@torch.library.custom_op("openxlstm::mlstm_triton", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c0: Tensor,
    n0: Tensor,
    m0: Tensor,
    reset: Tensor | None,
    sigmoid: bool,
    normalize: bool,
    eps: float,
    chunk_size: int | None,
    scale_invariant: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h, the last c, n, m, and (B, H, T) r, den and m for the backward."""
    batch, time, heads, dk = q.shape
    dv = v.shape[-1]
    h = v.new_empty(v.shape)
    r, den = (c0.new_empty((batch, heads, time)) for _ in range(2))
    if time == 0 or batch == 0 or heads == 0:
        m = torch.zeros_like(m0) if sigmoid else m0.clone(memory_format=torch.contiguous_format)
        c, n = (x.clone(memory_format=torch.contiguous_format) for x in (c0, n0))
        return h, c, n, m, r, den, r.double()
    q, k, v = (unit_stride(x) for x in (q, k, v))
    config = configurations.mlstm(q.device, q.dtype)
    if configurations.resident(config, q.device, batch * heads, dk, dv):
        length = min(chunk_size or config.resident.time, config.resident.time, time)
        scalars = prepare(i, f, m0, reset, length, sigmoid)
        c_last, n_last = (x.new_empty(x.shape) for x in (c0, n0))
        resident(
            (q, k, v), scalars, (c0.contiguous(), n0.contiguous()), (h, r, den, c_last, n_last), config,
            length, normalize, eps,
        )  # fmt: skip
    else:
        length = min(chunk_size or config.forward_chunk, MAX_CHUNK, time)
        scalars = prepare(i, f, m0, reset, length, sigmoid)
        c_states, n_states, c_last, n_last = states_between(
            k, v, scalars, c0.contiguous(), n0.contiguous(), length, last=True
        )
        outputs((q, k, v), scalars, (c_states, n_states), (h, r, den), length, normalize, eps)
    if not normalize:
        r.zero_()
        den.fill_(1.0)
    m = scalars.m[..., -1].to(m0.dtype).contiguous()
    return h, c_last, n_last, m, r, den, scalars.m


@torch.library.custom_op("openxlstm::mlstm_triton_backward", mutates_args=())
def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c0: Tensor,
    n0: Tensor,
    m0: Tensor,
    reset: Tensor | None,
    h: Tensor,
    c_last: Tensor,
    n_last: Tensor,
    r: Tensor,
    den: Tensor,
    m: Tensor,
    dh: Tensor | None,
    dc_last: Tensor | None,
    dn_last: Tensor | None,
    dm_last: Tensor | None,
    sigmoid: bool,
    normalize: bool,
    eps: float,
    chunk_size: int | None,
    scale_invariant: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, i, f, c0, n0, m0."""
    batch, time, heads, _ = q.shape
    dq, dk_out, dv_out = (x.new_empty(x.shape) for x in (q, k, v))
    dc, dn = (
        x.new_zeros(x.shape) if d is None else d.clone(memory_format=torch.contiguous_format)
        for x, d in ((c0, dc_last), (n0, dn_last))
    )
    if time == 0 or batch == 0 or heads == 0:
        dm = m0.new_zeros(m0.shape) if dm_last is None or sigmoid else dm_last.clone()
        return dq, dk_out, dv_out, torch.zeros_like(i), torch.zeros_like(f), dc, dn, dm
    last_flow = m0.new_zeros(m0.shape, dtype=torch.float64)
    if dc_last is not None:
        last_flow = last_flow + (c_last * dc_last).sum((-2, -1), dtype=torch.float64)
    if dn_last is not None:
        last_flow = last_flow + (n_last * dn_last).sum(-1, dtype=torch.float64)
    q, k, v = (unit_stride(x) for x in (q, k, v))
    dh = h.new_zeros(h.shape) if dh is None else unit_stride(dh)
    config = configurations.mlstm(q.device, q.dtype)
    length = min(chunk_size or config.backward_chunk, config.backward_chunk, time)
    scalars = prepare(i, f, m0, reset, length, sigmoid, m)
    through = normalize and not scale_invariant  # whether a gradient passes through the normaliser
    flows = _matrix_gradients(
        (q, k, v, h, dh), (c0.contiguous(), n0.contiguous(), dc, dn), (r, den), scalars,
        (dq, dk_out, dv_out), config, length, through,
    )  # fmt: skip
    di, df, dm0 = gradients(
        i, f, m0, reset, m, *flows, last_flow, dm_last, eps, sigmoid=sigmoid, normalize=through
    )
    return dq, dk_out, dv_out, di, df, dc, dn, dm0


def _matrix_gradients(
    inputs: tuple[Tensor, ...],
    states: tuple[Tensor, ...],
    normaliser: tuple[Tensor, Tensor],
    scalars: Scalars,
    outputs: tuple[Tensor, ...],
    config: configurations.MLSTM,
    length: int,
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fill ``outputs`` (dq, dk, dv) and turn dc, dn of the last state into those of the first, in place.

    Returns float32 (dh . h) / den (B, H, T); parts of <C, dC> + n . dn entering each chunk
    (B, H, N, tiles); and parts of q . dq and k . dk (parts, B, H, N, L).
    """
    q, k, v, h, dh = inputs
    c0, n0, dc, dn = states
    r, den = normaliser
    batch, time, heads, dk = q.shape
    dv, pairs, chunks = v.shape[-1], batch * heads, scalars.keep.shape[-1]
    numbers = precision(q.dtype)
    c_states, n_states, _, _ = states_between(k, v, scalars, c0, n0, length, last=False)

    inverse, delta, along = den.reciprocal(), torch.zeros_like(r), torch.zeros_like(r)
    if normalize:
        tile = configurations.tile_of(min(time, 64))
        kernel("mlstm.triton_backward", "rows_kernel")[(pairs * -(-time // tile),)](
            h, dh, r, den, scalars.floor, inverse, delta, along, time, heads, dv, *strides(dh),
            BT=tile, BV=min(64, configurations.tile_of(dv)), **configurations.Tiles().options,
        )  # fmt: skip

    tiles = config.state_gradients.cut(length, dk, dv)
    grid = (pairs, -(-dk // tiles.k), -(-dv // tiles.v))
    flow = r.new_empty((pairs, chunks, *grid[1:]))
    dc_states, dn_states = torch.empty_like(c_states), torch.empty_like(n_states)
    kernel("mlstm.triton_backward", "state_gradients_kernel")[grid](
        q, dh, scalars.carry_in, scalars.keep, inverse, delta, c_states, n_states, dc, dn,
        dc_states, dn_states, flow, dk**-0.5, time, heads, dk, dv, length, chunks, *strides(q, dh),
        NORMALIZE=normalize, BT=tiles.time, BK=tiles.k, BV=tiles.v, PRECISION=numbers,
        **tiles.options,
    )  # fmt: skip

    tiles = config.inputs.cut(length, dk, dv)
    parts = _parts(q.device, pairs * chunks, -(-max(dk, dv) // max(tiles.k, tiles.v)))
    outgoing, incoming = (r.new_empty((parts, batch, heads, chunks, length)) for _ in range(2))
    kernel("mlstm.triton_backward", "inputs_kernel")[(parts * pairs * chunks,)](
        q, k, v, dh, scalars.rows, scalars.columns, scalars.segment, scalars.carry_in, scalars.to_state,
        inverse, delta, c_states, n_states, dc_states, dn_states, *outputs, outgoing, incoming,
        -0.5 * math.log2(dk), time, heads, dk, dv, length, chunks, parts, *strides(q, k, v, dh),
        NORMALIZE=normalize, BT=tiles.time, BK=tiles.k, BV=tiles.v, PRECISION=numbers,
        **tiles.options,
    )  # fmt: skip
    return along, flow.view(batch, heads, chunks, -1), outgoing, incoming


def _parts(device: torch.device, programs: int, most: int) -> int:
    """Programs per chunk: more than one only while the chunks alone leave multiprocessors idle."""
    if device.type != "cuda":
        return 1
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(most, processors // programs))


register_gradient("openxlstm::mlstm_triton", _forward, _backward, saved=(0, 1, 2, 4, 5, 6))


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    c: Tensor,
    n: Tensor,
    m: Tensor,
    reset: Tensor | None,
    *,
    sigmoid: bool,
    normalize: bool,
    eps: float,
    chunk_size: int | None = None,
    scale_invariant: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """mLSTM on a GPU; shapes and results as :func:`openxlstm.ops.mlstm.reference.recurrent`. With
    ``scale_invariant`` the normaliser is a constant backwards."""
    options = sigmoid, normalize, eps, chunk_size, scale_invariant
    h, c, n, m, *_ = _forward(q, k, v, i, f, c, n, m, reset, *options)
    return h, c, n, m
