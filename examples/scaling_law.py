"""Fit a law of loss to a table of runs, predict with intervals, and ask what a budget buys."""

import numpy as np

from openxlstm.models.accounting import find_device
from openxlstm.scaling import bootstrap, fit_parametric
from openxlstm.scaling.laws import read_laws
from openxlstm.scaling.planning import plan

# runs of your own: sizes N, tokens D and losses (here drawn from a known law with 0.5 % of noise)
sizes, ratios = (u.ravel() for u in np.meshgrid(np.geomspace(2e7, 2e9, 6), np.geomspace(5, 500, 6)))
tokens = sizes * ratios
losses = 1.8 + 403 * sizes**-0.34 + 1097 * tokens**-0.36
losses *= np.exp(0.005 * np.random.default_rng(0).standard_normal(len(losses)))

fit = bootstrap(fit_parametric(sizes, tokens, losses, delta=0.02), samples=200)
low, high = fit.interval(7e9, 1e12)
print(f"7 billion parameters, a trillion tokens: loss {float(fit(7e9, 1e12)):.3f} ({low:.3f} to {high:.3f})")
print("doubts:", fit.diagnostics() or "none")

laws, _ = read_laws()  # fitted to the published runs; comes with the package
for family, options in plan(1e20, laws, device=find_device("h100")).items():
    n, d, loss = options[0].num_params, options[0].num_tokens, options[0].loss
    print(f"1e20 FLOPs, {family}: {n:.2g} parameters, {d:.2g} tokens, loss {loss:.3f}")
