"""``openxlstm scaling``: reproduce the published study, or run one of your own."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from openxlstm.cli.options import naming_options, parse
from openxlstm.config import nearest_name

ACTIONS = {
    "reproduce": "fit the published measurements and compare with the published results",
    "sweep": "design, run, fit and report a study of your own",
    "fit": "fit and report a table of runs",
}
HELP = """usage: openxlstm scaling ACTION [options]

Scaling laws: what loss, size and tokens a budget buys.

actions:
{actions}

examples:
  openxlstm scaling reproduce measurements/
  openxlstm scaling sweep runs/study --data data/python --budgets 3e11 1e12 3e12 --context-length 128 --jobs 2
  openxlstm scaling fit runs/study/runs.csv

`openxlstm scaling ACTION --help` explains each."""
TORCHRUN = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
"""What torchrun tells its processes, and what holds without it."""
SWEEP_EXAMPLES = """\
  openxlstm data --standard-library --output data/python --tokenizer bytes
  openxlstm scaling sweep runs/study --data data/python --budgets 3e11 1e12 3e12 --context-length 128 --jobs 2
  openxlstm scaling sweep runs/study                                   (go on after an interruption)
  torchrun --standalone --nproc-per-node 4 -m openxlstm.cli scaling sweep runs/study   (4 processes)
  openxlstm scaling sweep runs/big --data data/web --budgets 6e18 1e19 3e19 --launcher slurm > sweep.sh"""


@dataclass(frozen=True)
class ReproduceOptions:
    """Fit the published measurements of the xLSTM scaling study and compare with the published results.

    DATA holds training_runs.parquet (or .csv) and, as far as there are any, inference_measurements.parquet
    and the reference results ref_*.csv. They are not part of this package.
    """

    data: Annotated[Path, Positional, arg(metavar="DATA")]
    """Directory of the measurements."""
    output: Path = Path("scaling-laws.html")
    """Report to write."""


@dataclass(frozen=True)
class SweepOptions:
    """Run a scaling study: IsoFLOP profiles and, with --ratios, a grid of tokens per parameter.

    Writes the design, a recipe per run, the table of finished runs (runs.csv) and the report (report.html)
    into DIRECTORY. Stop it at any time, with Ctrl-C or --minutes; the same command, or only the directory,
    goes on. Learning rates and batch sizes are assumptions, which the report states.
    """

    directory: Annotated[Path, Positional, arg(metavar="DIRECTORY")]
    """Where the study lives."""
    data: Path | None = None
    """Directory that `openxlstm data` prepared (required to begin)."""
    budgets: tuple[float, ...] = ()
    """FLOPs of each IsoFLOP profile, such as 1e18 3e18 1e19 (required to begin)."""
    families: tuple[Literal["xlstm", "transformer"], ...] = ("xlstm", "transformer")
    """Architectures to compare."""
    sizes: int = 5
    """Models per profile."""
    spread: float = 4.0
    """Largest size of a profile over its centre (20 tokens per parameter), and centre over smallest."""
    ratios: tuple[float, ...] = ()
    """Tokens per parameter of the grid; without them there is no grid."""
    grid_sizes: int = 3
    """Models of the grid."""
    context_length: int = 512
    """Tokens per training sequence."""
    jobs: int = 1
    """Runs at a time, each one process; with a launcher the processes of torchrun or the tasks of slurm."""
    threads: int = 1
    """CPU threads of each process."""
    minutes: float | None = None
    """Stop after so many minutes; running processes save first. 0 only fits and reports what is finished."""
    launcher: Literal["here", "shell", "torchrun", "slurm"] = "here"
    """Run here, or only print commands: one per run, one for torchrun, or the script of a SLURM array."""
    title: str = "A scaling study"
    """Heading of the report."""


@dataclass(frozen=True)
class FitOptions:
    """Fit a table of training runs and write a report.

    The table is CSV or Parquet with the columns model, context_length, num_params, num_tokens, flops and
    val_loss; isoflop (the budget) adds profiles, preset_ratio (tokens per parameter) slopes of over-training.
    """

    table: Annotated[Path, Positional, arg(metavar="RUNS.csv")]
    """The table."""
    output: Path = Path("scaling.html")
    """Report to write."""
    title: str = "A scaling study"
    """Heading of the report."""
    laws: Path | None = None
    """Also write the fitted laws of the families xlstm and transformer, for `openxlstm plan --laws`."""


def run(arguments: Sequence[str]) -> int:
    """Run the command."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP.format(actions="\n".join(f"  {name:<10}  {text}" for name, text in ACTIONS.items())))
        return 0
    action, *rest = arguments
    if action not in ACTIONS:
        hint = nearest_name(action, ACTIONS)
        raise ValueError(f"unknown action '{action}' of scaling.{hint} Actions: {', '.join(ACTIONS)}")
    return {"reproduce": _reproduce, "sweep": _sweep, "fit": _fit}[action](rest)


def _reproduce(arguments: Sequence[str]) -> int:
    options = parse(ReproduceOptions, arguments, command="scaling reproduce")
    from openxlstm.scaling.reproduction import reproduce

    report, checks = reproduce(options.data, lambda line: print(line, flush=True))
    print("\nagainst the published results: values compared, largest difference, limit")
    for check in checks:
        mark = "" if check.holds else "   above the limit, see the report"
        print(f"  {check.what:<66} {check.count:>4}  {check.largest:>8.1e}  {check.limit:g}{mark}")
    print(f"report: {report.write(options.output)}")
    return 0


def _fit(arguments: Sequence[str]) -> int:
    options = parse(FitOptions, arguments, command="scaling fit")
    from openxlstm.scaling import read_runs
    from openxlstm.scaling.study import analyse, study_report

    with _warnings_as_notes():
        results = analyse(read_runs(options.table))
    print_summary(results)
    if options.laws is not None:
        _write_laws(results, options.laws, str(options.table))
    print(f"report: {study_report(results, options.title).write(options.output)}")
    return 0


def _write_laws(results: Sequence[Any], path: Path, source: str) -> None:
    """The laws of the families that can be planned for.

    Raises:
        ValueError: none of them could be fitted.
    """
    from openxlstm.scaling.laws import law_of, write_laws

    names = {"xlstm": "xlstm", "mlstm": "xlstm", "transformer": "transformer", "llama": "transformer"}
    laws = {
        names[result.family]: law_of(result.law, result.runs["flops"], result.runs["context_length"].iloc[0])
        for result in results
        if result.law is not None and result.family in names
    }
    if not laws:
        raise ValueError("no family of the table (xlstm, transformer) has enough runs for a parametric law")
    write_laws(laws, path, source)
    print(f"laws:   {path}")


def _sweep(arguments: Sequence[str]) -> int:
    options = parse(SweepOptions, arguments, command="scaling sweep", examples=SWEEP_EXAMPLES)
    for name in ("jobs", "threads"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}")
    from openxlstm.scaling.data import check_runs
    from openxlstm.scaling.study import analyse, study_report

    sweep = _study(options)
    flops = sum(run.flops for run in sweep.runs)
    summary = f"{len(sweep.runs)} runs, {len(sweep.unfinished())} to do, {flops:.3g} FLOPs in all"
    if options.launcher != "here":
        print(summary, file=sys.stderr)  # what is printed is a script
        print(sweep.commands(options.launcher, options.jobs))
        return 0
    print(summary, flush=True)
    start = time.monotonic()
    rank, world_size, slot = (int(os.environ.get(name, value)) for name, value in TORCHRUN.items())
    seconds = None if options.minutes is None else 60 * options.minutes
    share = sweep.share(rank, world_size)
    with _terminated_as_interrupted(), _progress_bar(share, world_size == 1) as bar:
        failures = share.run(
            options.jobs,
            seconds=seconds,
            threads=options.threads,
            slot=slot * options.jobs,
            report=lambda line: (bar.write(line), sys.stdout.flush()),
            progress=lambda done: bar.update(done - bar.n),
        )
    if world_size > 1:
        print(
            f"process {rank} of {world_size} has done its share; when all have, fit and report with "
            f"`openxlstm scaling sweep {sweep.directory}`"
        )
        return 1 if failures else 0
    left = len(sweep.unfinished())
    print(f"{len(sweep.runs) - left} of {len(sweep.runs)} runs finished, {time.monotonic() - start:.0f} s")
    with _warnings_as_notes():
        table = check_runs(sweep.collect(), f"'{sweep.directory}'")
        results = analyse(table)
    print_summary(results)
    limits = [f"{left} of {len(sweep.runs)} runs are not finished; the fits use the others"] if left else []
    facts = facts_about(sweep.data, table)
    report = study_report(results, options.title, facts, [*limits, *failures, *repeats(sweep.data, table)])
    print(f"table:  {sweep.directory / 'runs.csv'}")
    print(f"report: {report.write(sweep.directory / 'report.html')}")
    if left:
        print(f"go on:  openxlstm scaling sweep {sweep.directory}")
    return 1 if failures else 0


def _study(options: SweepOptions) -> Any:
    """The study of the directory, made if the options describe one."""
    from openxlstm.data import TokenDataset
    from openxlstm.scaling.design import design
    from openxlstm.scaling.sweep import Sweep

    if not options.budgets and not options.data:
        return Sweep.open(options.directory)
    if not options.budgets or not options.data:
        raise ValueError("a new study needs both --data DIRECTORY and --budgets FLOPS ...")
    vocab_size = TokenDataset.open(options.data).vocab_size
    with naming_options(SweepOptions):
        runs = design(
            options.budgets,
            families=options.families,
            sizes=options.sizes,
            spread=options.spread,
            ratios=options.ratios,
            grid_sizes=options.grid_sizes,
            vocab_size=vocab_size,
            context_length=options.context_length,
        )
    return Sweep.create(options.directory, runs, options.data)


def facts_about(data: Path, table: Any) -> list[str]:
    """Data and design in sentences."""
    from openxlstm.data import TokenDataset

    training, held_out = TokenDataset.open(data), TokenDataset.open(data, "validation")
    budgets = ", ".join(f"{b:.2g}" for b in sorted(table["isoflop"].dropna().unique()))
    families = " and ".join(sorted(table["model"].unique()))
    return [
        f"{len(table)} runs of {families}; IsoFLOP budgets {budgets} FLOPs; "
        f"{table['num_params'].min():,.0f} to {table['num_params'].max():,.0f} parameters, "
        f"{table['num_tokens'].min():,.0f} to {table['num_tokens'].max():,.0f} tokens, "
        f"{table['flops'].sum():.3g} FLOPs in all.",
        f"Data: {len(training):,} training tokens ({training.text_bytes:,} bytes of text), vocabulary "
        f"{training.vocab_size}; validation on all {len(held_out):,} held-out tokens, split off by document. "
        f"Context {table['context_length'].max():.0f} tokens. AdamW, cosine schedule to a tenth, warm-up "
        "over a tenth of the steps, gradient clipping at 1.",
    ]


def repeats(data: Path, table: Any) -> list[str]:
    """A sentence if runs read the data more than once."""
    from openxlstm.data import TokenDataset

    passes = table["num_tokens"].max() / len(TokenDataset.open(data))
    return [f"the longest run reads its data {passes:.1f} times"] if passes > 1 else []


def print_summary(results: Sequence[Any]) -> None:
    """The optima and exponents, and how many doubts there are."""
    for result in results:
        for fit in result.profiles["num_params"]:
            print(
                f"{result.family:<12} {fit.budget:>8.2g} FLOPs: N* {fit.optimum:>10.4g}, loss {fit.loss:.4f} "
                f"({fit.count} runs)"
            )
        for name, law in result.laws.items():
            low, high = law.exponent_interval()
            interval = f"95 % {low:.3f} to {high:.3f}" if law.count > 2 else "two budgets, no interval"
            print(f"{result.family:<12} {name} exponent {law.exponent:.3f} ({interval})")
        if result.notes:
            print(f"{result.family:<12} {len(result.notes)} doubts: see the report")


def _progress_bar(sweep: Any, alone: bool) -> Any:
    """FLOPs done of all; several processes on one terminal have none."""
    from tqdm import tqdm

    return tqdm(
        total=sum(run.flops for run in sweep.runs),
        initial=sum(map(sweep.flops_done, sweep.runs)),
        bar_format="{percentage:3.0f} %|{bar}| {n:.3g} of {total:.3g} FLOPs, {elapsed}, {remaining} to go",
        disable=not (alone and sys.stderr.isatty()),
        leave=False,
    )


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM, with which torchrun and SLURM stop a process, end it as Ctrl-C does: runs save first."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def _warnings_as_notes() -> Iterator[None]:
    """Show warnings as single lines on standard error."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        print(f"note: {warning.message}", file=sys.stderr)
