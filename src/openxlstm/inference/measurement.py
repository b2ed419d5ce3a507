"""How fast the decode engine is on this machine, beside what its memory allows.

Decoding reads every weight once per token and reads and writes the states, so it is bound by memory. Shared
machines change their bandwidth from one second to the next: the bound is therefore measured between the
steps, by reading a large array in huge pages with the same threads, and the share of the bound is a median
over such pairs.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from openxlstm.inference.runner import ModelRunner, State
from openxlstm.inference.slots import HeldState
from openxlstm.ops.products import read_memory, use_huge_pages
from openxlstm.state import leaves

PROBE_BYTES = 128 << 20
BUSY = 0.1
"""Cores that other processes may use before a measurement counts as disturbed."""


@dataclass(frozen=True)
class DecodeSpeed:
    """A measurement of decoding; rates are medians."""

    tokens_per_second: float
    """All sequences together."""
    step_seconds: float
    bound_tokens_per_second: float
    """What reading ``bytes_per_step`` at the measured bandwidth would allow."""
    share_of_bound: float
    bandwidth: float
    """Bytes per second of the read probe."""
    bytes_per_step: int
    """Weights once, states twice (read and written)."""
    steps: int
    cores_used_by_others: float | None
    """During the measurement; None where the system does not say."""

    @property
    def disturbed(self) -> bool:
        """Whether other processes took so much that the figures are too low."""
        return (self.cores_used_by_others or 0.0) > BUSY


def weight_bytes(model: nn.Module) -> int:
    """Bytes of weights that one decode step reads: all but the embedding, of which it reads a row."""
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            tied = any(
                m.weight.data_ptr() == module.weight.data_ptr()
                for m in model.modules()
                if isinstance(m, nn.Linear)
            )
            if not tied:
                tensors.pop(module.weight.data_ptr(), None)
    return sum(tensors.values())


def state_bytes(state: State) -> int:
    """Bytes of a state; of one that the engine holds, as it keeps them."""
    if not isinstance(state, HeldState):
        return sum(t.nbytes for t in leaves(state))
    engine = state.engine
    return sum(t.nbytes for t in leaves(engine.states)) // engine.slots * len(state.slots)


def measure_decode(runner: ModelRunner, state: State, *, batch: int, seconds: float = 3.0) -> DecodeSpeed:
    """Alternate decode steps with reads of memory for ``seconds``, at least ten of each.

    Args:
        runner: of the model.
        state: to go on from with random tokens; the engine advances one that it holds in place.
        batch: sequences in ``state``.
        seconds: time to spend.
    """
    traffic = weight_bytes(runner.model) + 2 * state_bytes(state)
    probe = torch.ones(PROBE_BYTES // 4)
    use_huge_pages(probe)
    generator = torch.Generator().manual_seed(0)
    steps: list[float] = []
    rates: list[float] = []
    load, begin = None, time.perf_counter()
    while load is None or len(steps) < 10 or time.perf_counter() - begin < seconds:
        tokens = torch.randint(runner.vocab_size, (batch,), generator=generator).tolist()
        start = time.perf_counter()
        read_memory(probe)
        middle = time.perf_counter()
        _, state = runner.advance(tokens, state, reuse=True)
        end = time.perf_counter()
        if load is None:  # the first round wakes threads and maps pages
            load, begin = OtherLoad(), time.perf_counter()
            continue
        rates.append(PROBE_BYTES / (middle - start))
        steps.append(end - middle)
    others = load.cores()
    step, bandwidth = statistics.median(steps), statistics.median(rates)
    return DecodeSpeed(
        tokens_per_second=batch / step,
        step_seconds=step,
        bound_tokens_per_second=batch * bandwidth / traffic,
        share_of_bound=statistics.median(traffic / t / r for t, r in zip(steps, rates, strict=True)),
        bandwidth=bandwidth,
        bytes_per_step=traffic,
        steps=len(steps),
        cores_used_by_others=others,
    )


class OtherLoad:
    """What other processes take of the processors from now on: why a measurement may be too low."""

    def __init__(self) -> None:
        self._begin, self._before = time.perf_counter(), cpu_seconds()

    def cores(self) -> float | None:
        """Cores that others have used on average; this process and its ended children are not others.

        None where the system does not say.
        """
        elapsed, after = time.perf_counter() - self._begin, cpu_seconds()
        if self._before is None or after is None:
            return None
        busy, own = after[0] - self._before[0], after[1] - self._before[1]
        return max(0.0, busy - own) / elapsed


def cpu_seconds() -> tuple[float, float] | None:
    """Seconds that all processes, and this one with its ended children, have spent on the processors."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _, _, interrupts, soft, stolen = (int(field) for field in fields[:8])
    busy = (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")
    return busy, sum(os.times()[:4])


def available_memory() -> int | None:
    """Bytes that programs can still get, or None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None
