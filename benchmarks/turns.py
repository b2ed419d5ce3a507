"""Language models that take turns: each in a process of its own, a turn of a fraction of a second each.

Runtimes keep threads, and some let them spin when idle, so they don't share a process; while one has its
turn the others wait at a pipe. Within a turn, bursts of calls alternate with a probe of what bounds them (a
read of memory for decoding, a product of matrices for prompts), so that a machine whose rates change from
second to second cannot favour anybody. Other programs' use of the processors is counted during the turns.
"""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch

from harness import OtherLoad, matrix_rate

PROBE_BYTES = 128 << 20
BURST = 0.025
"""Seconds of calls between two probes, at least one call."""
TURN = 0.4
"""Seconds; at least one call."""
IDLE = 0.015
"""Seconds before a probe: OpenMP's threads spin for some milliseconds and would take part of its rate."""

NAMES = {
    "openxlstm": "openxlstm",
    "llama_cpp": "llama.cpp",
    "transformers_llama": "transformers Llama",
    "transformers_xlstm": "transformers xLSTM",
    "xlstm": "xlstm",
}
"""Modules in `runtimes/` and what tables call them."""
INSTALL = {
    "llama_cpp": (
        ("llama_cpp", "gguf"),
        "CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python gguf  (compiles for some ten minutes)",
    ),
    "transformers_llama": (("transformers",), 'pip install "openxlstm[bench]"'),
    "transformers_xlstm": (("transformers",), 'pip install "openxlstm[bench]"'),
    "xlstm": (("xlstm", "mlstm_kernels"), 'pip install "openxlstm[bench]"'),
}
"""Packages of the peers in `runtimes/`, and how to get them."""


@dataclass(frozen=True)
class Row:
    """One line of a table: a runtime, its type of weights, and what it does."""

    runtime: str
    """Module in `runtimes/`."""
    dtype: str
    context: int = 0
    """Tokens read before the ones that are timed; of a prompt, its length."""
    batch: int = 1
    prompt: bool = False
    """Time reading a prompt of ``context`` tokens; else, decoding after it."""

    @property
    def name(self) -> str:
        """What tables say."""
        return f"{NAMES[self.runtime]} {self.dtype}"


@dataclass
class Work:
    """What a runtime does for a row."""

    call: Callable[[], Any]
    tokens: int
    """That a call processes, all sequences together."""
    restart: Callable[[], Any] = lambda: None
    """Back to the row's context; called before every turn."""
    bytes: int | None = None
    """That a call has to read or write: weights once, a state twice, a cache once."""
    flops: float | None = None
    """Useful operations of a call, instead of ``bytes``."""
    rate_dtype: torch.dtype = torch.bfloat16
    """Of the matrix product that bounds ``flops``."""

    def probe(self) -> float:
        """Bytes or operations per second that the machine allows at this moment."""
        if self.flops is not None:
            return matrix_rate(self.rate_dtype, 1024)
        from openxlstm.ops.products import read_memory

        read_memory(_probe_array())  # wakes the threads
        start = time.perf_counter()
        read_memory(_probe_array())
        return PROBE_BYTES / (time.perf_counter() - start)


_ARRAYS: list[torch.Tensor] = []


def _probe_array() -> torch.Tensor:
    if not _ARRAYS:
        from openxlstm.ops.products import use_huge_pages

        _ARRAYS.append(torch.ones(PROBE_BYTES // 4))
        use_huge_pages(_ARRAYS[0])  # read a quarter faster than plain ones: the bound is the best there is
    return _ARRAYS[0]


@dataclass
class Samples:
    """What was measured of a row."""

    tokens: int
    least: float | None
    """Bytes or operations of a call."""
    seconds: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    others: list[float] = field(default_factory=list)

    def result(self) -> dict[str, Any]:
        """Medians, and the share of the bound as a median over pairs of a burst and its probe."""
        values: dict[str, Any] = {
            "tokens_per_second": self.tokens / statistics.median(self.seconds),
            "fastest": self.tokens / min(self.seconds),
            "slowest": self.tokens / max(self.seconds),
            "bursts": len(self.seconds),
            "cores_used_by_others": statistics.fmean(self.others),
        }
        if self.least is not None:
            pairs = zip(self.seconds, self.rates, strict=True)
            values |= {
                "share_of_bound": statistics.median(self.least / t / rate for t, rate in pairs),
                "probe": statistics.median(self.rates),
                "least_per_call": self.least,
            }
        return values


def missing(runtime: str) -> str | None:
    """How to install a runtime that is not there; None if it is."""
    packages, command = INSTALL.get(runtime, ((), ""))
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed: {command}" if absent else None


def measure(
    rows: Sequence[Row], *, size: str, threads: int, seconds: float, say: Callable[[str], Any] = print
) -> dict[Row, dict[str, Any]]:
    """Let ``rows`` take turns for ``seconds`` each.

    Rows whose runtime is not installed, or fails, are left out with one line to ``say``.
    """
    for runtime in dict.fromkeys(row.runtime for row in rows):
        if (reason := missing(runtime)) is not None:
            say(f"skipped: {NAMES[runtime]}: {reason}")
    present = [row for row in rows if missing(row.runtime) is None]
    with _workers(present, size, threads, say) as workers:
        samples: dict[Row, Samples] = {}
        for row in present:
            if (start := workers[row.runtime, row.dtype].samples(row)) is not None:
                samples[row] = start
        spent = dict.fromkeys(samples, 0.0)
        while pending := [row for row in samples if spent[row] < seconds]:
            for row in pending:
                begin = time.perf_counter()
                worker = workers[row.runtime, row.dtype]
                times, rates, others = worker.ask(row)
                samples[row].seconds += times
                samples[row].rates += rates
                samples[row].others.append(others)
                spent[row] += max(time.perf_counter() - begin, TURN)
    return {row: values.result() for row, values in samples.items()}


class _Worker:
    """The process of one runtime with one type of weights."""

    def __init__(self, rows: list[Row], size: str, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, rows, size, threads), daemon=True)
        self.process.start()
        theirs.close()
        try:
            self.opened: dict[Row, Any] | str = self.pipe.recv()
        except EOFError:
            self.opened = "its process died"

    def samples(self, row: Row) -> Samples | None:
        """An empty record, or None if the row cannot be measured."""
        if isinstance(self.opened, str) or isinstance(self.opened[row], str):
            return None
        return Samples(*self.opened[row])

    def ask(self, row: Row) -> tuple[list[float], list[float], float]:
        """A turn: seconds per call and probe rates of its bursts, cores that others used."""
        self.pipe.send(row)
        return self.pipe.recv()

    def stop(self) -> None:
        """End the process."""
        self.pipe.close()
        self.process.join(20)
        self.process.kill()


@contextmanager
def _workers(
    rows: Sequence[Row], size: str, threads: int, say: Callable[[str], Any]
) -> Iterator[dict[tuple[str, str], _Worker]]:
    workers: dict[tuple[str, str], _Worker] = {}
    try:
        for key in dict.fromkeys((row.runtime, row.dtype) for row in rows):
            mine = [row for row in rows if (row.runtime, row.dtype) == key]
            worker = workers[key] = _Worker(mine, size, threads)
            opened = worker.opened
            answers = [opened] if isinstance(opened, str) else opened.values()
            for reason in dict.fromkeys(a for a in answers if isinstance(a, str)):
                say(f"failed: {mine[0].name}: {reason}")
        yield workers
    finally:
        for worker in workers.values():
            worker.stop()


def _serve(pipe: Connection, rows: list[Row], size: str, threads: int) -> None:
    """A worker: prepare the rows, then measure whichever is asked for until the pipe closes."""
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    works: dict[Row, Work] = {}
    try:
        module = importlib.import_module(f"runtimes.{rows[0].runtime}")
        model = module.Model(size, rows[0].dtype, threads)
    except Exception as error:
        pipe.send(_sentence(error))
        return
    opened: dict[Row, Any] = {}
    for row in rows:
        try:
            work = works[row] = (
                model.prompt(row.context) if row.prompt else model.decode(row.context, row.batch)
            )
            if not row.prompt:
                work.restart()
                work.call()
            work.probe()
            opened[row] = (work.tokens, work.bytes if work.flops is None else work.flops)
        except Exception as error:
            opened[row] = _sentence(error)
    pipe.send(opened)
    while True:
        try:
            row = pipe.recv()
        except EOFError:
            os._exit(0)  # runtimes take seconds to free what the system frees at once
        pipe.send(_turn(works[row], warm=not row.prompt))


def _turn(work: Work, *, warm: bool) -> tuple[list[float], list[float], float]:
    work.restart()
    if warm:
        work.call()
    times: list[float] = []
    rates: list[float] = []
    load, begin = OtherLoad(), time.perf_counter()
    while not times or time.perf_counter() - begin < TURN:
        time.sleep(IDLE)
        rates.append(work.probe())
        start, calls = time.perf_counter(), 0
        while calls == 0 or time.perf_counter() - start < BURST:
            work.call()
            calls += 1
        times.append((time.perf_counter() - start) / calls)
    return times, rates, load.cores() or 0.0


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
