"""Scaling laws: fits of training runs and of inference times, reproduction, planning, sweeps.

Needs the extra ``scaling`` (``pip install 'openxlstm[scaling]'``).
"""

from openxlstm.scaling.data import check_one_convention, check_runs, read_measurements, read_runs
from openxlstm.scaling.inference_time import TimeModel, fit_measurements, fit_time
from openxlstm.scaling.isoflop import IsoFlopFit, fit_isoflop, isoflop_profiles, optimum_law
from openxlstm.scaling.parametric import ParametricFit, bootstrap, fit_parametric, fit_runs
from openxlstm.scaling.power_law import PowerLaw, fit_power_law, overtraining_slopes

__all__ = [
    "IsoFlopFit",
    "ParametricFit",
    "PowerLaw",
    "TimeModel",
    "bootstrap",
    "check_one_convention",
    "check_runs",
    "fit_isoflop",
    "fit_measurements",
    "fit_parametric",
    "fit_power_law",
    "fit_runs",
    "fit_time",
    "isoflop_profiles",
    "optimum_law",
    "overtraining_slopes",
    "read_measurements",
    "read_runs",
]
