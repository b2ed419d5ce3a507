"""Fitted laws in a file: parameters, bootstrap samples, residual noise and the range they were fitted in.

The package brings ``laws.json``: the published xLSTM and Transformer runs of the token/parameter experiment
at context 8192 (arXiv 2510.02228), fitted here with a free outer exponent and delta = 1. It holds fitted
numbers only, no measurements. ``openxlstm scaling fit RUNS --laws FILE`` writes one for runs of your own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import numpy as np

from openxlstm.runtime import atomic_write_text
from openxlstm.scaling.data import Table
from openxlstm.scaling.objective import log_loss
from openxlstm.scaling.parametric import ParametricFit, widening

FORMAT = "openxlstm laws 1"


class Outside(NamedTuple):
    """How far a plan lies outside the range of the runs behind a law."""

    quantity: str
    """parameters, tokens or FLOPs."""
    above: bool
    """Above the largest run, or below the smallest."""
    factor: float
    """Over the largest run, or the smallest run over the plan; above 1."""
    bound: float
    """Of the largest or smallest run."""

    def sentence(self, factor: str = "") -> str:
        """In words; ``factor`` replaces the number."""
        times = factor or f"{self.factor:.3g}"
        if self.above:
            return f"{times} times the {self.quantity} of the largest run ({self.bound:.3g})"
        return f"{times} times fewer {self.quantity} than the smallest run ({self.bound:.3g})"


@dataclass(frozen=True)
class Law:
    """L(N, D) with what is needed for intervals and for saying how far outside its range a plan lies."""

    parameters: tuple[float, ...]
    """a, b, e, alpha, beta, gamma."""
    samples: tuple[tuple[float, ...], ...]
    """Bootstrap samples of the parameters."""
    noise: float
    """Standard deviation of ln L around the law."""
    num_params: tuple[float, float]
    """Least and largest N of the runs."""
    num_tokens: tuple[float, float]
    """Least and largest D."""
    flops: tuple[float, float]
    """Least and largest C."""
    context_length: int
    """Of the runs."""
    runs: int
    """How many."""

    def loss(self, num_params: float, num_tokens: float) -> float:
        """Predicted loss."""
        points = np.array([self.parameters]), np.log([num_params]), np.log([num_tokens])
        return float(np.exp(log_loss(*points)[0, 0]))

    def interval(self, num_params: float, num_tokens: float, level: float = 0.95) -> tuple[float, float]:
        """Prediction interval of one run: parameters and residual noise."""
        point = np.log([num_params]), np.log([num_tokens])
        centre = log_loss(np.array([self.parameters]), *point)[0, 0]
        factor = widening(self.runs, 5 + (self.parameters[-1] != 1))
        logs = centre + factor * (log_loss(np.array(self.samples), *point)[:, 0] - centre)
        draws = logs[:, None] + self.noise * np.random.default_rng(0).standard_normal((len(logs), 64))
        low, high = np.exp(np.quantile(draws, [0.5 - level / 2, 0.5 + level / 2]))
        return float(low), float(high)

    def outside(self, num_params: float, num_tokens: float, flops: float) -> list[Outside]:
        """Where a run lies outside the fitted range, and how far; empty inside."""
        places: list[Outside] = []
        for name, value, (low, high) in (
            ("parameters", num_params, self.num_params),
            ("tokens", num_tokens, self.num_tokens),
            ("FLOPs", flops, self.flops),
        ):
            if value > high * 1.001:
                places.append(Outside(name, True, value / high, high))
            elif value < low * 0.999:
                places.append(Outside(name, False, low / value, low))
        return places


def law_of(fit: ParametricFit, flops: Table, context_length: int, samples: int = 100) -> Law:
    """The law of a fit with bootstrap samples, of which ``samples`` are kept."""
    if fit.samples is None:
        raise ValueError("the fit has no bootstrap samples; make them with bootstrap(fit)")

    def span(values: Table) -> tuple[float, float]:
        return float(f"{np.min(values):.6g}"), float(f"{np.max(values):.6g}")

    rounded = tuple(tuple(float(f"{v:.8g}") for v in row) for row in fit.samples[:samples])
    parameters = tuple(float(f"{v:.10g}") for v in fit.parameters)
    ranges = span(fit.num_params), span(fit.num_tokens), span(flops)
    noise = float(f"{fit.noise:.4g}")
    return Law(parameters, rounded, noise, *ranges, int(context_length), len(fit.losses))


def write_laws(laws: Mapping[str, Law], path: str | Path, source: str) -> None:
    """Write laws by family, whole or not at all."""
    values = {"format": FORMAT, "source": source, "laws": {name: asdict(law) for name, law in laws.items()}}
    atomic_write_text(path, json.dumps(values) + "\n")


def read_laws(path: str | Path | None = None) -> tuple[dict[str, Law], str]:
    """Laws by family ("xlstm", "transformer"), and where they come from.

    Args:
        path: file of :func:`write_laws`; None is the one of the package.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no laws.
    """
    if path is None:
        text = resources.files("openxlstm.scaling").joinpath("laws.json").read_text(encoding="utf-8")
    elif Path(path).is_file():
        text = Path(path).read_text(encoding="utf-8")
    else:
        raise FileNotFoundError(f"file of laws '{path}' does not exist")
    try:
        values = json.loads(text)
        if values["format"] != FORMAT:
            raise ValueError(values["format"])
        laws = {name: _law(fields) for name, fields in values["laws"].items()}
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            f"'{path}' is no file of laws; write one with `openxlstm scaling fit RUNS --laws FILE`"
        ) from None
    return laws, str(values.get("source", path))


def _law(fields: Mapping[str, object]) -> Law:
    values = {n: tuple(v) if isinstance(v, list) else v for n, v in fields.items()}
    values["samples"] = tuple(tuple(row) for row in fields["samples"])  # pyright: ignore
    law = Law(**values)  # pyright: ignore[reportArgumentType]
    if len(law.parameters) != 6 or not law.samples:
        raise ValueError("parameters")
    return law
