"""Running a study: recipes in a directory, one process per run, results collected in a table.

    DIRECTORY/design.json           what to run, and with which data
    DIRECTORY/runs/NAME.yaml        the recipe of each run; its directory and messages beside it
    DIRECTORY/runs.csv              the finished runs, in the schema of openxlstm.scaling.data

Each run is ``openxlstm train`` in its own process. A sweep can be stopped at any time (running processes save
a checkpoint) and continues when it is started again; finished runs are not repeated.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from openxlstm.runtime import atomic_write_text
from openxlstm.scaling.data import Table
from openxlstm.scaling.design import PlannedRun, planned_run
from openxlstm.training import read_log

STEM = (sys.executable, "-m", "openxlstm.cli", "train")


class Sweep:
    """A study in a directory.

    Args:
        directory: where it lives; see :meth:`create` and :meth:`open`.
        runs: what to run.
        data: directory that ``openxlstm data`` prepared.
    """

    def __init__(self, directory: Path, runs: Sequence[PlannedRun], data: Path) -> None:
        self.directory, self.runs, self.data = directory, list(runs), data

    @classmethod
    def create(cls, directory: Path, runs: Sequence[PlannedRun], data: Path) -> Sweep:
        """Write the design and the recipes; the same design again is taken up where it stands.

        Raises:
            ValueError: the directory holds another design.
        """
        sweep = cls(directory, runs, data.absolute())
        values = {"data": str(sweep.data), "runs": [run.values() for run in runs]}
        path = directory / "design.json"
        if path.is_file():
            if json.loads(path.read_text(encoding="utf-8")) != json.loads(json.dumps(values)):
                raise ValueError(
                    f"'{directory}' holds another design; give the options it was made with, or another "
                    "directory"
                )
            return sweep
        (directory / "runs").mkdir(parents=True, exist_ok=True)
        for run in runs:
            atomic_write_text(sweep.recipe_path(run), sweep.recipe(run))
        atomic_write_text(path, json.dumps(values, indent=1) + "\n")
        return sweep

    @classmethod
    def open(cls, directory: Path) -> Sweep:
        """An existing study.

        Raises:
            FileNotFoundError: there is none.
            ValueError: its design cannot be read.
        """
        path = directory / "design.json"
        if not path.is_file():
            raise FileNotFoundError(f"'{directory}' holds no study (design.json is missing)")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return cls(directory, [planned_run(run) for run in values["runs"]], Path(values["data"]))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(f"'{path}' is not the design of a study: {error!r}") from None

    def path(self, run: PlannedRun) -> Path:
        """Directory of a run."""
        return self.directory / "runs" / run.name

    def recipe_path(self, run: PlannedRun) -> Path:
        """Recipe of a run, beside its directory: the trainer writes its own copy inside."""
        return self.directory / "runs" / f"{run.name}.yaml"

    def recipe(self, run: PlannedRun) -> str:
        """The recipe of a run, as YAML."""
        import yaml

        values = {
            "model": run.model,
            "data": {"path": str(self.data), "context_length": run.context_length},
            "train": {
                "steps": run.steps,
                "batch_size": run.batch_size,
                "learning_rate": run.learning_rate,
                "schedule": "cosine",
                "warmup_steps": min(750, max(1, run.steps // 10)),
                "clip": 1.0,
                "validation_every": 0,
                "validation_batches": 0,
                "sample_every": 0,
                "checkpoint_every": 0,
                "log_every": max(1, run.steps // 100),
                "output": str(self.path(run).absolute()),
                "tensorboard": False,
                "progress": False,
            },
        }
        return yaml.safe_dump(values, sort_keys=False)

    def result(self, run: PlannedRun) -> dict[str, Any] | None:
        """The finished run as a row of the table; None if it is not finished."""
        log = self.path(run) / "log.jsonl"
        if not log.is_file() or not (self.path(run) / "model").is_dir():
            return None
        records = read_log(log)
        losses = [r["loss"] for r in records if r["kind"] == "validation" and r["step"] == run.steps]
        training = [r["loss"] for r in records if r["kind"] == "train"]
        if not losses:
            return None
        return {
            "model": run.family, "name": run.name, "experiment": run.experiment,
            "context_length": run.context_length, "num_params": run.num_params, "num_tokens": run.num_tokens,
            "flops": run.flops, "val_loss": losses[-1], "train_loss": training[-1] if training else None,
            "isoflop": run.budget if run.experiment == "isoflop" else None, "preset_ratio": run.preset_ratio,
            "global_batch_size": run.batch_size, "num_steps": run.steps, "learning_rate": run.learning_rate,
            "embedding_dim": run.model["embedding_dim"], "num_blocks": run.model["num_blocks"],
            "num_heads": run.model["num_heads"],
        }  # fmt: skip

    def unfinished(self) -> list[PlannedRun]:
        """Runs without a result, in order."""
        return [run for run in self.runs if self.result(run) is None]

    def collect(self) -> Table:
        """All finished runs; also written to ``runs.csv``.

        Raises:
            ValueError: no run is finished.
        """
        import pandas as pd

        rows = [row for run in self.runs if (row := self.result(run)) is not None]
        if not rows:
            raise ValueError(f"no run of '{self.directory}' is finished yet")
        table: Table = pd.DataFrame(rows)
        atomic_write_text(self.directory / "runs.csv", table.to_csv(index=False))
        return table

    def commands(self, launcher: str, jobs: int = 1) -> str:
        """Commands for the unfinished runs, for a shell, ``torchrun`` or SLURM.

        Args:
            launcher: ``"shell"``, ``"torchrun"`` or ``"slurm"`` (an array job with at most ``jobs`` runs at a
                time). Each run is one process, on one device.
            jobs: see ``launcher``.

        Raises:
            ValueError: another launcher.
        """
        recipes = [shlex.quote(str(self.recipe_path(run))) for run in self.unfinished()]
        if launcher == "shell":
            return "\n".join(f"openxlstm train {recipe}" for recipe in recipes)
        if launcher == "torchrun":
            stem = "torchrun --standalone --nproc-per-node 1 -m openxlstm.cli train"  # one process trains
            return "\n".join(f"{stem} {recipe}" for recipe in recipes)
        if launcher == "slurm":
            lines = ["#!/bin/bash", "#SBATCH --job-name=openxlstm-sweep", "#SBATCH --gres=gpu:1"]
            lines.append(f"#SBATCH --array=0-{max(len(recipes) - 1, 0)}%{jobs}")
            lines += ["RECIPES=(", *(f"  {recipe}" for recipe in recipes), ")"]
            lines.append('srun openxlstm train "${RECIPES[$SLURM_ARRAY_TASK_ID]}"')
            return "\n".join(lines)
        raise ValueError(f"unknown launcher {launcher!r}: use shell, torchrun or slurm")

    def run(
        self,
        jobs: int = 1,
        *,
        seconds: float | None = None,
        threads: int = 1,
        report: Callable[[str], None] = lambda _: None,
    ) -> list[str]:
        """Run what is not finished, ``jobs`` processes at a time, the cheapest runs first.

        Args:
            jobs: processes at a time.
            seconds: stop after this long: running processes save and end.
            threads: of each process.
            report: called with a line per event.

        Returns:
            what failed, in sentences; the other runs are not affected.
        """
        waiting = sorted(self.unfinished(), key=lambda run: run.flops)
        total, done, failures = len(self.runs), len(self.runs) - len(waiting), []
        running: dict[subprocess.Popen[bytes], PlannedRun] = {}
        deadline = float("inf") if seconds is None else time.monotonic() + seconds
        try:
            while (waiting or running) and time.monotonic() < deadline:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    running[self._start(run, threads)] = run
                finished = [process for process in running if process.poll() is not None]
                for process in finished:
                    run = running.pop(process)
                    row = self.result(run)
                    if row is None:
                        failures.append(f"{run.name}: {self._last_words(run)}")
                        report(f"failed    {failures[-1]}")
                    else:
                        done += 1
                        report(f"{done:>3}/{total}  {run.name}  loss {row['val_loss']:.4f}")
                if not finished:
                    time.sleep(0.05)
        finally:
            for process in running:
                process.send_signal(signal.SIGINT)
            for process, run in running.items():
                process.wait()
                report(f"stopped   {run.name}")
        return failures

    def _start(self, run: PlannedRun, threads: int) -> subprocess.Popen[bytes]:
        resume = any((self.path(run) / "checkpoints").glob("*"))
        if not resume:  # what a process left that was killed before its first checkpoint
            shutil.rmtree(self.path(run), ignore_errors=True)
        recipe = self.path(run) / "recipe.yaml" if resume else self.recipe_path(run)
        words = [*STEM, str(recipe), *(["--resume"] if resume else [])]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        with (self.directory / "runs" / f"{run.name}.err").open("wb") as errors:
            return subprocess.Popen(
                words, stdout=errors, stderr=errors, env=environment, start_new_session=True
            )

    def _last_words(self, run: PlannedRun) -> str:
        lines = (self.directory / "runs" / f"{run.name}.err").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "ended without a result"
