"""Looking inside: gates over time, memory half-lives, and which past tokens a head retrieves, on a real text.

For an mLSTM head with log forget gates F_t = sum of log sigmoid(f) up to t, position s weighs at position t

    w_ts = exp(F_t - F_s + i_s) |q_t . k_s|,   normalised to sum 1 over s

(equation 27 of arXiv 2405.04517 without signs). Its memory halves in ln 2 / mean(-log sigmoid(f)) tokens. The
memory of an sLSTM cell is an average c / n; what a token keeps of the average before it is 1 - i'_t / n_t,
and it halves in ln 2 / mean(-log of that) tokens.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openxlstm.evaluation.text import evaluating
from openxlstm.layers.large import mLSTMLargeLayer
from openxlstm.layers.mlstm_layer import mLSTMCell
from openxlstm.layers.slstm_layer import sLSTMCell

LONGEST = 1e9  # half-lives beyond this are reported as this


class Probe(NamedTuple):
    """What one block did on a text of T tokens."""

    block: int
    kind: str
    """``"mLSTM"`` or ``"sLSTM"``."""
    input_gate: Tensor
    """(H, T), pre-activations i; mean over the cells of an sLSTM head."""
    forget_gate: Tensor
    """(H, T), sigmoid(f) in an mLSTM; in an sLSTM the share of the average that is kept, mean over cells."""
    half_life: Tensor
    """(H,) tokens; median over the cells of an sLSTM head."""
    retrieval: Tensor | None
    """(H, T, T), row t is over which positions s a head's output spreads; None for an sLSTM."""

    @property
    def distance(self) -> Tensor | None:
        """(H,) mean number of tokens that retrieval goes back; None for an sLSTM."""
        if self.retrieval is None:
            return None
        time = torch.arange(self.retrieval.shape[-1])
        return (self.retrieval * (time[:, None] - time)).sum(-1).mean(-1)


def probe(model: nn.Module, tokens: Tensor) -> list[Probe]:
    """Run a text through a model and record every recurrent block.

    Args:
        model: a language model of mLSTM and sLSTM blocks.
        tokens: int64 (1, T); time and memory grow with T squared.

    Raises:
        ValueError: not one text, or a model without such blocks.
    """
    if tokens.ndim != 2 or tokens.shape[0] != 1 or tokens.shape[1] < 1:
        raise ValueError(
            f"one text is looked at at a time: tokens of shape (1, T), got {tuple(tokens.shape)}"
        )
    found: list[Probe] = []
    handles = []

    def record(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, mLSTMCell):
            i, f, q, k, _ = module._heads(*inputs[:3])
            found.append(_mlstm(len(found), i, f, q, k))
        elif isinstance(module, mLSTMLargeLayer):
            q, k, _, i, f, _ = module._project(inputs[0])
            found.append(_mlstm(len(found), i, f, q, k))
        elif isinstance(module, sLSTMCell):
            found.append(_slstm(len(found), module, inputs[0], output[0]))

    with evaluating(model):
        try:
            for module in model.modules():
                if isinstance(module, mLSTMCell | mLSTMLargeLayer | sLSTMCell):
                    handles.append(module.register_forward_hook(record))  # noqa: PERF401  (removed below)
            if not handles:
                raise ValueError(f"a {type(model).__name__} has no mLSTM or sLSTM blocks to look into")
            model(tokens.to(next(model.parameters()).device))
        finally:
            for handle in handles:
                handle.remove()
    return found


def _half_life(log_kept: Tensor) -> Tensor:
    """ln 2 / mean(-log kept) over the last dimension, at most :data:`LONGEST`."""
    return (math.log(2) / (-log_kept).mean(-1).clamp_min(1e-12)).clamp_max(LONGEST)


def _mlstm(block: int, i: Tensor, f: Tensor, q: Tensor, k: Tensor) -> Probe:  # (1, T, H), (1, T, H, D)
    i, f = (gate[0].double().cpu().T for gate in (i, f))  # (H, T)
    log_f = F.logsigmoid(f)
    total = log_f.cumsum(-1)
    scores = torch.einsum("thd,shd->hts", q[0].double().cpu(), k[0].double().cpu()).abs()
    weights = total[:, :, None] - total[:, None, :] + i[:, None, :]
    causal = torch.ones(weights.shape[-2:], dtype=torch.bool).tril()
    weights = weights.masked_fill(~causal, -math.inf)
    weights = (weights - weights.amax(-1, keepdim=True)).exp() * scores
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-300)
    return Probe(block, "mLSTM", i, f.sigmoid(), _half_life(log_f), weights)


def _slstm(block: int, cell: sLSTMCell, x: Tensor, h: Tensor) -> Probe:  # x (1, T, 4, H, D), h (1, T, H, D)
    before = torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], dim=1)
    recurrent = torch.einsum("bthd,ghod->btgho", before.float(), cell.recurrent_weight.float())
    gates = (x.float() + recurrent + cell.bias.float())[0].double().cpu()  # (T, 4, H, D)
    i, log_f = gates[:, 0], F.logsigmoid(gates[:, 1])
    log_n, kept = torch.full_like(i[0], -math.inf), []
    for time in range(i.shape[0]):  # log n_t = logaddexp(log f_t + log n_{t-1}, i_t), in the scale of m = 0
        old = log_f[time] + log_n
        log_n = torch.logaddexp(old, i[time])
        kept.append(old - log_n)
    log_kept = torch.stack(kept, dim=-1)  # (H, D, T); the first token keeps nothing
    lives = _half_life(log_kept[..., 1:]) if log_kept.shape[-1] > 1 else torch.zeros(log_kept.shape[:-1])
    return Probe(block, "sLSTM", i.mean(-1).T, log_kept.exp().mean(1), lives.median(-1).values, None)
