"""Many trials: in parallel processes, each result in a file of its own, so that an interrupted study goes on.

output/trials/parity-slstm-w32-seed0-1a2b3c4d.json          a result; the name ends in a digest of the trial
output/trials/....safetensors                               a trial in progress
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from openxlstm.config import config_to_dict
from openxlstm.evaluation.networks import available
from openxlstm.evaluation.trial import Trial, run_trial
from openxlstm.runtime import atomic_write_text, end_with_parent


def trial_name(trial: Trial) -> str:
    """A readable name that differs whenever anything about the trial differs."""
    digest = hashlib.sha256(json.dumps(config_to_dict(trial), sort_keys=True).encode()).hexdigest()[:8]
    return f"{trial.task}-{trial.model}-w{trial.width}-seed{trial.seed}-{digest}"


def run_study(
    trials: Sequence[Trial],
    output: str | Path,
    *,
    processes: int | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Run the trials that have no result yet, and return all results in the order of the trials.

    Args:
        trials: what to run. Networks that cannot run here are left out, and reported.
        output: directory of the study.
        processes: trials at a time, each in a process with an equal share of the threads; None is as many as
            threads. 1 runs them in this process.
        report: called with a line per event.

    Raises:
        ValueError: ``processes`` is not positive.
        ArithmeticError: a trial diverged. The results of the others are kept.
        OSError: results cannot be written.
    """
    threads = torch.get_num_threads()
    processes = threads if processes is None else processes
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    directory = Path(output) / "trials"
    directory.mkdir(parents=True, exist_ok=True)
    for model, reason in sorted({(t.model, available(t.model)) for t in trials if available(t.model)}):
        report(f"leaving out {model}: {reason}")
    trials = [trial for trial in trials if not available(trial.model)]
    missing = [t for t in trials if not (directory / f"{trial_name(t)}.json").is_file()]
    if len(missing) < len(trials):
        report(f"{len(trials) - len(missing)} of {len(trials)} trials are done already")
    if processes == 1:
        for number, trial in enumerate(missing, 1):
            report(_line(_run(trial, directory, report), number, len(missing)))
    elif missing:
        _run_parallel(missing, directory, min(processes, len(missing)), threads, report)
    return [json.loads((directory / f"{trial_name(trial)}.json").read_text()) for trial in trials]


def _run_parallel(
    trials: Sequence[Trial], directory: Path, processes: int, threads: int, report: Callable[[str], None]
) -> None:
    pool = ProcessPoolExecutor(
        processes,
        multiprocessing.get_context("spawn"),
        initializer=_begin_worker,
        initargs=(max(1, threads // processes),),
    )
    futures = [pool.submit(_run, trial, directory) for trial in trials]
    try:
        for number, future in enumerate(as_completed(futures), 1):
            report(_line(future.result(), number, len(trials)))
    except BaseException:
        workers = list((pool._processes or {}).values())  # no public way to reach running trials
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.terminate()
        raise
    pool.shutdown()


def _begin_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    end_with_parent()


def _run(trial: Trial, directory: Path, report: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    name = trial_name(trial)
    result = run_trial(trial, checkpoint=directory / f"{name}.safetensors", report=report)
    atomic_write_text(directory / f"{name}.json", json.dumps(result))
    return result


def _line(result: dict[str, Any], number: int, count: int) -> str:
    trial = result["trial"]
    parts = [f"{span(a['lengths'])}: {a['accuracy']:.3f}" for a in result["accuracy"]]
    return (
        f"[{number}/{count}] {trial['task']} {trial['model']} seed {trial['seed']}: accuracy at "
        f"{', '.join(parts)} ({result['parameters']:,} parameters, {result['seconds']:.0f} s)"
    )


def span(lengths: Sequence[int]) -> str:
    """A range of lengths as text."""
    low, high = lengths
    return f"{low}" if low == high else f"{low}-{high}"
