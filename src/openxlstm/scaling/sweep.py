"""Running a study: recipes in a directory, one process per run, results collected in a table.

    DIRECTORY/design.json           what to run, and with which data
    DIRECTORY/runs/NAME.yaml        the recipe of each run; its directory and messages beside it
    DIRECTORY/runs.csv              the finished runs, in the schema of openxlstm.scaling.data

Each run is ``openxlstm train`` in its own process. A sweep can be stopped at any time (running processes save
a checkpoint) and continues when it is started again; finished runs are not repeated. One process trains one
run, so a cluster does many at once: under ``torchrun`` every process takes its share of the runs
(:meth:`Sweep.share`), under SLURM every run is a task of an array.
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

import torch

from openxlstm.runtime import atomic_write_text
from openxlstm.scaling.data import Table
from openxlstm.scaling.design import PlannedRun, planned_run
from openxlstm.training import read_log

STEM = (sys.executable, "-m", "openxlstm.cli")
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells its processes; the runs they start are on their own."""

PROGRESS_SECONDS = 2.0
"""Between two looks at the logs of the runs."""


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
            raise FileNotFoundError(
                f"'{directory}' holds no study (design.json is missing); begin one with --data DIRECTORY "
                "--budgets FLOPS ..."
            )
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
                "checkpoint_every": 1000,
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

    def flops_done(self, run: PlannedRun) -> float:
        """FLOPs of a run that its log records."""
        log = self.path(run) / "log.jsonl"
        steps = [record.get("step", 0) for record in read_log(log)] if log.is_file() else []
        return run.flops * max(steps, default=0) / run.steps

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

    def share(self, rank: int, world_size: int) -> Sweep:
        """The runs of one of ``world_size`` processes: disjoint, of about equal cost, together all."""
        ordered = sorted(self.runs, key=lambda run: run.flops)
        return Sweep(self.directory, ordered[rank::world_size], self.data)

    def commands(self, launcher: str, jobs: int = 1) -> str:
        """Commands for the unfinished runs, for a shell, ``torchrun`` or SLURM.

        Args:
            launcher: ``"shell"``, one line per run; ``"torchrun"``, one line that starts ``jobs`` processes,
                each with its share of the runs; ``"slurm"``, a script of an array job with at most ``jobs``
                runs at a time. Each run is one process on one device.
            jobs: see ``launcher``.

        Raises:
            ValueError: another launcher.
        """
        unfinished = self.unfinished()
        study = shlex.quote(str(self.directory))
        if launcher == "shell":
            return "\n".join(shlex.join(["openxlstm", *self._words(run)]) for run in unfinished)
        if launcher == "torchrun":
            stem = f"torchrun --standalone --nproc-per-node {jobs} -m openxlstm.cli scaling sweep"
            return f"{stem} {study}" if unfinished else ""
        if launcher == "slurm":
            lines = ["#!/bin/bash", "#SBATCH --job-name=openxlstm-sweep", "#SBATCH --gres=gpu:1"]
            lines.append(f"#SBATCH --array=0-{max(len(unfinished) - 1, 0)}%{jobs}")
            lines.append("#SBATCH --signal=TERM@120 --requeue   # saves two minutes before the time limit")
            recipes = (shlex.quote(str(self.recipe_path(run).absolute())) for run in unfinished)
            lines += ["RECIPES=(", *(f"  {recipe}" for recipe in recipes), ")"]
            lines.append('RECIPE="${RECIPES[$SLURM_ARRAY_TASK_ID]}"')
            lines.append(
                'if [ -n "$(ls "${RECIPE%.yaml}/checkpoints" 2>/dev/null)" ]; then RESUME=--resume; fi'
            )
            lines.append('srun openxlstm train "$RECIPE" ${RESUME:-}')
            lines.append(f"# fits and report, at any time: openxlstm scaling sweep {study} --minutes 0")
            return "\n".join(lines)
        raise ValueError(f"unknown launcher {launcher!r}: use shell, torchrun or slurm")

    def _words(self, run: PlannedRun) -> list[str]:
        """Arguments of ``openxlstm`` that begin a run, or go on with it if it has saved."""
        resume = any((self.path(run) / "checkpoints").glob("*"))
        return ["train", str(self.recipe_path(run).absolute()), *(["--resume"] if resume else [])]

    def run(
        self,
        jobs: int = 1,
        *,
        seconds: float | None = None,
        threads: int = 1,
        slot: int = 0,
        report: Callable[[str], object] = lambda _: None,
        progress: Callable[[float], object] = lambda _: None,
    ) -> list[str]:
        """Run what is not finished, ``jobs`` processes at a time, the cheapest runs first.

        Args:
            jobs: processes at a time.
            seconds: stop after this long: running processes save and end.
            threads: of each process.
            slot: number of the first process on this machine; on several GPUs each takes the next one.
            report: called with a line per event.
            progress: called with the FLOPs done, from time to time.

        Returns:
            what failed, in sentences; the other runs are not affected.
        """
        waiting = sorted(self.unfinished(), key=lambda run: run.flops)
        total, done, failures = len(self.runs), len(self.runs) - len(waiting), []
        running: dict[subprocess.Popen[bytes], tuple[PlannedRun, int]] = {}
        free, asked = list(range(slot, slot + jobs)), time.monotonic()
        deadline = float("inf") if seconds is None else time.monotonic() + seconds
        try:
            while (waiting or running) and time.monotonic() < deadline:
                while waiting and free:
                    run, place = waiting.pop(0), free.pop(0)
                    running[self._start(run, environment(threads, place))] = run, place
                finished = [process for process in running if process.poll() is not None]
                for process in finished:
                    run, place = running.pop(process)
                    free.append(place)
                    row = self.result(run)
                    if row is None:
                        failures.append(f"{run.name}: {self._last_words(run)}")
                        report(f"failed    {failures[-1]}")
                    else:
                        done += 1
                        report(f"{done:>3}/{total}  {run.name}  loss {row['val_loss']:.4f}")
                if finished or time.monotonic() > asked + PROGRESS_SECONDS:
                    progress(sum(map(self.flops_done, self.runs)))
                    asked = time.monotonic()
                if not finished:
                    time.sleep(0.05)
        finally:
            for process in running:
                process.send_signal(signal.SIGINT)
            for process, (run, _) in running.items():
                process.wait()
                report(f"stopped   {run.name}")
        return failures

    def _start(self, run: PlannedRun, variables: dict[str, str]) -> subprocess.Popen[bytes]:
        words = [*STEM, *self._words(run)]
        if "--resume" not in words:  # what a process left that was killed before its first checkpoint
            shutil.rmtree(self.path(run), ignore_errors=True)
        with (self.directory / "runs" / f"{run.name}.err").open("wb") as errors:
            return subprocess.Popen(
                words, stdout=errors, stderr=errors, env=variables, start_new_session=True
            )

    def _last_words(self, run: PlannedRun) -> str:
        lines = (self.directory / "runs" / f"{run.name}.err").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "ended without a result"


def environment(threads: int, slot: int) -> dict[str, str]:
    """Variables of the process of a run: its threads, and of several GPUs the one of its ``slot``."""
    variables = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = named.split(",") if named else [str(n) for n in range(torch.cuda.device_count())]
    if len(devices) > 1:
        variables["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    return variables | {"OMP_NUM_THREADS": str(threads)}
