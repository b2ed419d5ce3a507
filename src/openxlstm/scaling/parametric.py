"""The parametric law L(N, D) = E + (A N^-alpha + B D^-beta)^gamma, with gamma = 1 or free.

    ln L = LSE( gamma LSE(a - alpha ln N, b - beta ln D), e ),    A = e^a, B = e^b, E = e^e
    minimise sum_i huber_delta( ln L_i - ln L(N_i, D_i) )          (Hoffmann et al. 2022; arXiv 2510.02228)

Thousands of starts run at once through a batched Gauss-Newton (:mod:`openxlstm.scaling.optimization`); the
best different ones are polished with analytic gradients. Uncertainty comes from the bootstrap. With a free
gamma the parameters are strongly correlated: compare predictions first, and read
:meth:`ParametricFit.diagnostics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from openxlstm.scaling.data import Table, check_one_convention, require_runs
from openxlstm.scaling.objective import NAMES, Problem, derivatives, log_loss
from openxlstm.scaling.optimization import Array, minimize_batch

ENDLESS_GAMMA = 50.0
"""Above, (A N^-alpha + B D^-beta)^gamma is practically the exponential it tends to."""


class Optimum(NamedTuple):
    """How to spend a budget."""

    num_params: float
    num_tokens: float
    loss: float


@dataclass(frozen=True)
class ParametricFit:
    """A fitted law, with its data and, if asked for, bootstrap samples."""

    parameters: tuple[float, float, float, float, float, float]
    """a, b, e, alpha, beta, gamma."""
    objective: float
    """Sum of Huber losses."""
    delta: float
    """Delta of the Huber loss."""
    free_gamma: bool
    """Whether gamma was fitted."""
    num_params: Array = field(repr=False)
    """N of the runs."""
    num_tokens: Array = field(repr=False)
    """D of the runs."""
    losses: Array = field(repr=False)
    """Losses of the runs."""
    agreeing_starts: int = 0
    """How many of the starts came within 1 % of this objective before polishing."""
    samples: Array | None = field(default=None, repr=False)
    """Bootstrap samples of the parameters, (S, 6)."""

    def __getattr__(self, name: str) -> float:
        if name in NAMES:
            return self.parameters[NAMES.index(name)]
        raise AttributeError(name)

    @property
    def constants(self) -> dict[str, float]:
        """E, A, B, alpha, beta, gamma."""
        a, b, e, alpha, beta, gamma = self.parameters
        return {
            "E": float(np.exp(e)), "A": float(np.exp(a)), "B": float(np.exp(b)),
            "alpha": alpha, "beta": beta, "gamma": gamma,
        }  # fmt: skip

    def __call__(self, num_params: Any, num_tokens: Any) -> Any:
        """Predicted loss."""
        shape = np.broadcast_shapes(np.shape(num_params), np.shape(num_tokens))
        logs = log_loss(np.array([self.parameters]), *(np.ravel(np.log(u)) for u in (num_params, num_tokens)))
        return np.exp(logs[0]).reshape(shape)

    @property
    def residuals(self) -> Array:
        """ln L - ln L(N, D) of the runs."""
        return np.log(self.losses) - np.log(self(self.num_params, self.num_tokens))

    @property
    def r_squared(self) -> float:
        """Share of the variance of the losses that is explained."""
        rest = ((self.losses - self(self.num_params, self.num_tokens)) ** 2).sum()
        return float(1 - rest / ((self.losses - self.losses.mean()) ** 2).sum())

    @property
    def noise(self) -> float:
        """Standard deviation of the residuals, degrees of freedom allowed for."""
        free = max(1, len(self.losses) - 5 - self.free_gamma)
        return float(np.sqrt((self.residuals**2).sum() / free))

    @property
    def widening(self) -> float:
        """Factor on bootstrap deviations: refits of few runs to many parameters scatter too little."""
        return widening(len(self.losses), 5 + self.free_gamma)

    def interval(
        self,
        num_params: float,
        num_tokens: float,
        level: float = 0.95,
        *,
        prediction: bool = True,
        seed: int = 0,
    ) -> tuple[float, float]:
        """Interval of the loss at one point: of the law, or (``prediction``) of a run, noise included.

        Raises:
            ValueError: the fit has no bootstrap samples.
        """
        point = np.log([num_params]), np.log([num_tokens])
        centre = float(log_loss(np.array([self.parameters]), *point)[0, 0])
        logs = centre + self.widening * (log_loss(self._samples(), *point)[:, 0] - centre)
        if prediction:
            generator = np.random.default_rng(seed)
            residuals = self.residuals - self.residuals.mean()
            residuals = residuals * self.noise / max(residuals.std(), 1e-300)
            logs = (logs[:, None] + generator.choice(residuals, (len(logs), 64))).ravel()
        low, high = np.quantile(logs, [0.5 - level / 2, 0.5 + level / 2])
        return float(np.exp(low)), float(np.exp(high))

    def parameter_intervals(self, level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Bootstrap percentile intervals of the parameters and of the exponents of N*(C) and D*(C).

        Raises:
            ValueError: the fit has no bootstrap samples.
        """
        samples = self._samples()
        columns: dict[str, Array] = dict(zip(NAMES, samples.T, strict=True))
        total = columns["alpha"] + columns["beta"]
        columns["size_exponent"] = columns["beta"] / total
        columns["token_exponent"] = columns["alpha"] / total
        centres = dict(zip(NAMES, self.parameters, strict=True))
        centres |= {"size_exponent": self.size_exponent, "token_exponent": 1 - self.size_exponent}
        result: dict[str, tuple[float, float]] = {}
        for name, column in columns.items():
            low, high = np.quantile(column, [0.5 - level / 2, 0.5 + level / 2]) - centres[name]
            centre, factor = centres[name], self.widening
            result[name] = (float(centre + factor * low), float(centre + factor * high))
        return result

    @property
    def size_exponent(self) -> float:
        """Exponent of N*(C) if C is proportional to N D."""
        return self.beta / (self.alpha + self.beta)

    def optimum(self, flops: float, flops_per_param_token: float = 6.0) -> Optimum:
        """The best split of ``flops`` = k N D, in closed form (gamma does not move it)."""
        a, b, _, alpha, beta, _ = self.parameters
        product = flops / flops_per_param_token
        log_n = (np.log(alpha / beta) + a - b + beta * np.log(product)) / (alpha + beta)
        size = float(np.exp(log_n))
        return Optimum(size, product / size, float(self(size, product / size)))

    def diagnostics(self) -> list[str]:
        """What is not identified by the data, in sentences; empty if all is well."""
        notes: list[str] = []
        columns = list(range(5 + self.free_gamma))
        _, slopes = derivatives(np.log(self.num_params), np.log(self.num_tokens))(np.array([self.parameters]))
        jacobian = slopes[0][:, columns]
        scaled = jacobian / np.maximum(np.linalg.norm(jacobian, axis=0), 1e-300)
        condition = float(np.linalg.cond(scaled))
        if condition > 1e4:
            _, _, directions = np.linalg.svd(scaled)
            weak = directions[-1]
            names = [NAMES[n] for n in np.argsort(-np.abs(weak))[:3]]
            notes.append(
                f"the parameters {', '.join(names)} can move together almost without changing the fit "
                f"(condition number {condition:.1e}): trust predictions, not single parameters"
            )
        if self.alpha <= 0 or self.beta <= 0:
            notes.append("an exponent is not positive: the data do not show gains from both size and tokens")
        ranges = {"num_params": self.num_params, "num_tokens": self.num_tokens}
        for name, values in ranges.items():
            if values.max() / values.min() < 4:
                notes.append(f"{name} spans only a factor of {values.max() / values.min():.1f}")
        correlation = np.corrcoef(np.log(self.num_params), np.log(self.num_tokens))[0, 1]
        if abs(correlation) > 0.98:
            notes.append(f"size and tokens are almost one variable (correlation {correlation:.3f})")
        if float(np.exp(self.e)) < 0.05 * self.losses.min():
            notes.append(
                "the irreducible loss E is practically zero: the data do not reach its neighbourhood"
            )
        if self.gamma > ENDLESS_GAMMA:
            notes.append(
                f"the outer exponent grows without end (gamma = {self.gamma:.0f}): there is no minimum, only "
                "a limit"
            )
        if self.agreeing_starts < 2:
            notes.append("at most one start came near the best objective: there may be better ones")
        if self.samples is not None:
            for name in ("alpha", "beta"):
                low, high = self.parameter_intervals()[name]
                if low <= 0 or high > 3 * max(low, 1e-9):
                    notes.append(f"the 95 % interval of {name} is wide: {low:.3g} to {high:.3g}")
        return notes

    def _samples(self) -> Array:
        if self.samples is None:
            raise ValueError("this fit has no bootstrap samples; make them with bootstrap(fit)")
        return self.samples


def fit_parametric(
    num_params: Sequence[float] | Array,
    num_tokens: Sequence[float] | Array,
    losses: Sequence[float] | Array,
    *,
    delta: float = 1e-3,
    free_gamma: bool = False,
    starts: int = 512,
    polish: int = 12,
    seed: int = 0,
    extra_starts: Sequence[Sequence[float]] = (),
) -> ParametricFit:
    """Fit the law from many starts.

    Args:
        num_params, num_tokens, losses: N, D and loss of the runs, each (n).
        delta: of the Huber loss, in ln L.
        free_gamma: also fit the outer exponent.
        starts: random starts, from the region of the published grid.
        polish: how many of the best different ones are polished.
        seed: of the random starts.
        extra_starts: further starts (a, b, e, alpha, beta, gamma), such as a neighbouring fit.

    Raises:
        ValueError: fewer runs than parameters, values that are not positive and finite, or no spread.
    """
    n, d, losses = (np.asarray(u, float).ravel() for u in (num_params, num_tokens, losses))
    if not len(n) == len(d) == len(losses):
        raise ValueError(f"sizes, tokens and losses differ in number: {len(n)}, {len(d)}, {len(losses)}")
    require_runs(len(n), 7 + free_gamma, "a parametric fit")
    for name, values in (("num_params", n), ("num_tokens", d), ("losses", losses)):
        if not (np.isfinite(values) & (values > 0)).all():
            raise ValueError(f"{name} must be positive and finite; {int((~(values > 0)).sum())} are not")
        if np.ptp(values) == 0:
            raise ValueError(f"all {name} are {values[0]:.4g}, so nothing can be learned about their effect")
    if not delta > 0:
        raise ValueError(f"delta must be positive, got {delta}")
    problem = Problem(np.log(n), np.log(d), np.log(losses), delta, free_gamma)
    points = np.concatenate([problem.random_starts(starts, seed), problem.to_local(extra_starts)])
    points, values = minimize_batch(problem.model, problem.targets, points, delta, iterations=80)
    best = [problem.polish(points[index]) for index in _distinct(points, values, polish)]
    objective, point = min(best, key=lambda pair: pair[0])
    agreeing = int((values <= 1.01 * objective + 1e-12).sum())
    return ParametricFit(
        problem.to_global(point), objective, delta, free_gamma, n, d, losses, agreeing_starts=agreeing
    )


def fit_runs(runs: Table, **options: Any) -> ParametricFit:
    """:func:`fit_parametric` of a table of runs.

    Raises:
        ValueError: also if FLOPs were counted in different ways, or at several context lengths or families.
    """
    check_one_convention(runs)
    for name in ("model", "context_length"):
        if runs[name].nunique() > 1:
            found = ", ".join(str(value) for value in runs[name].unique())
            raise ValueError(f"a law belongs to one {name}, the runs have several ({found}); select one")
    sizes, tokens, losses = (runs[name].to_numpy() for name in ("num_params", "num_tokens", "val_loss"))
    return fit_parametric(sizes, tokens, losses, **options)


def bootstrap(fit: ParametricFit, samples: int = 400, seed: int = 0) -> ParametricFit:
    """The fit with bootstrap samples: refitted to the runs drawn with replacement, all at once.

    Each sample starts from the fit itself and from two perturbed copies of it, and keeps the best.

    Raises:
        ValueError: ``samples`` below 2.
    """
    if samples < 2:
        raise ValueError(f"a bootstrap needs at least 2 samples, got {samples}")
    generator = np.random.default_rng(seed)
    log_n, log_d, log_loss = (np.log(u) for u in (fit.num_params, fit.num_tokens, fit.losses))
    problem = Problem(log_n, log_d, log_loss, fit.delta, fit.free_gamma)
    count = len(fit.losses)
    weights = generator.multinomial(count, np.full(count, 1 / count), samples).astype(float)
    centre = problem.to_local([fit.parameters])[0]
    tries = []
    for spread in (0.0, 0.05, 0.15):
        points = centre * (1 + spread * generator.standard_normal((samples, len(centre))))
        tries.append(
            minimize_batch(problem.model, problem.targets, points, fit.delta, weights=weights, iterations=60)
        )
    values = np.stack([value for _, value in tries])
    points = np.stack([point for point, _ in tries])
    chosen = points[values.argmin(0), np.arange(samples)]
    return replace(fit, samples=np.array([problem.to_global(point) for point in chosen]))


def widening(runs: int, parameters: int) -> float:
    """sqrt(n / (n - p)), the small-sample correction of deviations (as in the HC1 covariance)."""
    return float(np.sqrt(runs / max(1, runs - parameters)))


def _distinct(points: Array, values: Array, count: int) -> list[int]:
    """Indices of the best points, without those that ended where a better one did."""
    kept: list[int] = []
    for index in np.argsort(values):
        if not np.isfinite(values[index]):
            break
        if all(np.abs(points[index] - points[other]).max() > 1e-4 for other in kept):
            kept.append(int(index))
        if len(kept) == count:
            break
    return kept or [int(np.argmin(values))]
