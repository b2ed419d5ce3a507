"""Cross-entropy of the outputs of a linear map, without keeping these outputs.

    z = x W^T + b,   z <- cap tanh(z / cap),   loss = sum_t log sum_j exp(z[t, j]) - z[t, target[t]]

A language model's logits are its largest tensors by far: here they exist for some rows at a time, become
their own gradients in place, and meet x and W at once. So the forward pass computes the gradients too, where
they are asked for, and the backward pass only scales them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from openxlstm.ops import dispatch
from openxlstm.ops.cross_entropy import native
from openxlstm.ops.dense import computing_dtype, widened
from openxlstm.ops.dispatch import Request
from openxlstm.ops.matmul import matmul

OPERATOR = "linear_cross_entropy"
IGNORED = -100
"""Target of positions that do not count: padding, the last token of a document."""
LOGITS = 1 << 26
"""At most so many logits exist at a time (but at least one row)."""
GRADIENT_BLOCK = 1 << 21
"""So many elements of the weight's gradient are computed at a time."""


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    soft_cap: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sum of the cross-entropies of ``x @ weight.T + bias``, under autocast with products in its dtype.

    Logits have the dtype of the products; the loss and its gradient are computed in float32 (float64 for
    float64). Differentiable once in ``x``, ``weight`` and ``bias``.

    Args:
        x: (..., E), any floating dtype.
        weight: (V, E).
        targets: int64 (...), in [0, V), or :data:`IGNORED` where a position does not count.
        bias: (V), or None.
        soft_cap: capped logits are ``soft_cap * tanh(z / soft_cap)``; None leaves them as they are.
        backend: ``"auto"``, ``"native"`` or ``"portable"``.

    Returns:
        Scalar, float32 (float64 for float64): a sum in nats, zero if no position counts.

    Raises:
        ValueError: shapes or dtypes that do not fit, a target out of range, a cap that is not positive, or a
            backend that cannot serve the call.
    """
    if weight.ndim != 2 or x.shape[-1:] != weight.shape[1:] or not x.is_floating_point():
        raise ValueError(
            f"x must be floating point vectors (..., E) and weight (V, E), got {x.dtype} {tuple(x.shape)} "
            f"and {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({weight.shape[0]},) for this weight, got {tuple(bias.shape)}")
    if soft_cap is not None and not 0 < soft_cap < math.inf:
        raise ValueError(f"soft_cap must be a positive number or None, got {soft_cap}")
    _check_targets(targets, x.shape[:-1], weight.shape[0])
    dtype = computing_dtype(x)
    gradients = dispatch.needs_grad(x, weight, bias)
    chosen = dispatch.resolve(OPERATOR, backend, Request(x.device, dtype)).name
    loss, *_ = _linear_cross_entropy(
        x.reshape(-1, x.shape[-1]).to(dtype), weight, targets.flatten(), bias, soft_cap, gradients, chosen
    )
    return loss


def _check_targets(targets: Tensor, shape: torch.Size, vocabulary: int) -> None:
    if targets.dtype != torch.int64 or targets.shape != shape:
        raise ValueError(
            f"targets must be int64 of shape {tuple(shape)}, got {targets.dtype} {tuple(targets.shape)}"
        )
    if torch.compiler.is_compiling() or targets.is_meta or not targets.numel():
        return
    bad = targets[(targets != IGNORED) & ((targets < 0) | (targets >= vocabulary))]
    if bad.numel():
        raise ValueError(
            f"target {int(bad[0])} is out of range: tokens are 0 to {vocabulary - 1}, and {IGNORED} where a "
            "position does not count"
        )


def portable(logits: Tensor, targets: Tensor, soft_cap: float | None, gradients: bool) -> Tensor:
    """Losses of rows of logits, which become their gradients.

    Args:
        logits: (N, V), before the cap, contiguous; with ``gradients`` overwritten by the gradient of the sum.
        targets: int64 (N), negative where a row does not count.
        soft_cap: as for :func:`linear_cross_entropy`.
        gradients: whether to compute them.

    Returns:
        Losses (N), float32 (float64 for float64); zero for rows that do not count.
    """
    counts = (targets >= 0)[:, None]
    wanted = targets.clamp(min=0)[:, None]
    z = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    if soft_cap is not None:
        z.div_(soft_cap).tanh_().mul_(soft_cap)
    total = torch.logsumexp(z, 1, keepdim=True)
    losses = (total - z.gather(1, wanted)).where(counts, 0.0)
    if gradients:
        slope = None if soft_cap is None else (z / soft_cap).square_().neg_().add_(1)
        z.sub_(total).exp_()
        z.scatter_add_(1, wanted, torch.full_like(losses, -1.0))
        logits.copy_((z if slope is None else z.mul_(slope)).where(counts, 0.0))
    return losses[:, 0]


dispatch.register(
    OPERATOR,
    "native",
    native.losses_and_gradients,
    priority=20,
    refuse=native.refuse,
    description="C++, one sweep over each row",
)
dispatch.register(OPERATOR, "portable", portable, priority=10, description="portable PyTorch")


@torch.library.custom_op("openxlstm::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    soft_cap: float | None,
    gradients: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = dispatch.resolve(OPERATOR, backend, Request(x.device, x.dtype)).implementation
    parts = max(1, math.ceil(x.shape[0] * weight.shape[0] / LOGITS))
    loss, dx, dw, db = _results(x, weight, bias, gradients)
    wide = torch.promote_types(weight.dtype, torch.float32)
    dw, db = dw.to(wide), db.to(wide)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        matrix = widened(weight, x.dtype)
        for n, (part, labels) in enumerate(zip(x.chunk(parts), targets.chunk(parts), strict=True)):
            inputs = widened(part, x.dtype)
            logits = matmul(inputs, matrix.t())
            if bias is not None:
                logits += bias
            total += rows(logits, labels, soft_cap, gradients).sum(dtype=torch.float64)
            if gradients:
                dx.chunk(parts)[n].copy_(matmul(logits, matrix))
                _add_weight_gradient(dw, logits, inputs, first=n == 0)
                if bias is not None:
                    db.copy_(logits.sum(0, dtype=wide) + (db if n else 0))
    return loss.copy_(total), dx, dw.to(weight.dtype), db.to(weight.dtype)


def _add_weight_gradient(dw: Tensor, dlogits: Tensor, x: Tensor, *, first: bool) -> None:
    """``dw`` (V, E) = or += ``dlogits.T @ x``, in blocks: new pages for a whole product would cost more."""
    block = max(1, GRADIENT_BLOCK // dw.shape[1])
    for rows, part in zip(dw.split(block), dlogits.split(block, 1), strict=True):
        product = matmul(part.t(), x)
        rows.copy_(product) if first else rows.add_(product)


def _results(x: Tensor, weight: Tensor, bias: Tensor | None, gradients: bool) -> tuple[Tensor, ...]:
    """Loss and gradients, not filled in; without elements what is not asked for."""
    return (
        x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32)),
        x.new_empty(x.shape if gradients else 0),
        weight.new_empty(weight.shape if gradients else 0),
        weight.new_empty(weight.shape[:1] if gradients and bias is not None else 0),
    )


@_linear_cross_entropy.register_fake
def _(x, weight, targets, bias, soft_cap, gradients, backend):
    return _results(x, weight, bias, gradients)


@torch.library.custom_op("openxlstm::linear_cross_entropy_backward", mutates_args=())
def _scaled(factor: Tensor, dx: Tensor, dw: Tensor, db: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return dx * factor, dw * factor, db * factor


@_scaled.register_fake
def _(factor, dx, dw, db):
    return torch.empty_like(dx), torch.empty_like(dw), torch.empty_like(db)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.has_bias = inputs[3] is not None
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _autograd(ctx, factor, *_):
    if torch.is_grad_enabled():
        raise RuntimeError(
            "linear_cross_entropy can be differentiated once: for create_graph=True take the cross-entropy "
            "of the model's logits"
        )
    gradients = ctx.saved_tensors
    if type(factor) is Tensor:
        # not traced, and nobody else has them: in place, since new pages would cost more than the product
        dx, dw, db = (gradient.mul_(factor) for gradient in gradients)
    else:
        dx, dw, db = _scaled(factor, *gradients)
    return dx, dw, None, db if ctx.has_bias else None, None, None, None


torch.library.register_autograd("openxlstm::linear_cross_entropy", _autograd, setup_context=_setup_context)
