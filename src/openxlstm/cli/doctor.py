"""``openxlstm doctor``: this machine, its versions and backends, what it measures, what would improve it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from openxlstm.cli.advice import advice, usable_cores
from openxlstm.cli.options import parse

EXAMPLES = """\
  openxlstm doctor
  openxlstm doctor --json > environment.json       (for a bug report)"""


@dataclass(frozen=True)
class DoctorOptions:
    """Show what this machine has and can do, and how to improve it: versions, devices, backends, speed."""

    json: bool = False
    """Print JSON."""
    no_measure: bool = False
    """Leave the measurements out (they take about two seconds)."""


def run(arguments: Sequence[str]) -> int:
    """Run the command."""
    options = parse(DoctorOptions, arguments, command="doctor", examples=EXAMPLES)
    from openxlstm.ops import explain
    from openxlstm.ops.dispatch import operators
    from openxlstm.ops.native import loader
    from openxlstm.runtime import environment_report, has_fast_bfloat16, render_report, resolve_device

    others = None if options.no_measure else _cores_used_by_others()
    report = environment_report(measure=not options.no_measure)
    status = loader.status()
    native = asdict(status)
    bandwidth = report.get("bandwidth_gbytes")
    improvements = advice(
        status,
        cores=usable_cores(),
        bfloat16_units=has_fast_bfloat16("cpu"),
        bandwidth=None if bandwidth is None else bandwidth * 1e9,
        cores_used_by_others=others,
    )
    device = resolve_device("auto")
    backends = {name: explain(name, device=device).splitlines() for name in operators()}
    if options.json:
        print(
            json.dumps({**report, "native": native, "backends": backends, "advice": improvements}, indent=2)
        )
        return 0
    print(render_report(report), end="")
    print(f"native kernels: {native['reason'] or native['isa'] + ', ' + native['path']} ({native['tier']})")
    if native["reason"] is None:
        sets = ", ".join(native["isas"])
        print(f"  instruction sets: {sets} (OPENXLSTM_ISA chooses), {native['threads']} threads")
        print("  decoding: native engine, for float32, bfloat16 and quantised xLSTM models on the CPU")
    else:
        print("  decoding: the model's own steps in PyTorch, several times slower")
    print(f"backends on {device}:")
    for lines in backends.values():
        print("\n".join(f"  {line}" for line in lines))
    print("to improve:" if improvements else "to improve: nothing found")
    for line in improvements:
        print(f"  {line}")
    return 0


def _cores_used_by_others(seconds: float = 0.5) -> float | None:
    """Cores that other processes use while this one waits; None where the system does not say."""
    from openxlstm.inference.measurement import cpu_seconds

    before, begin = cpu_seconds(), time.perf_counter()
    time.sleep(seconds)
    after, elapsed = cpu_seconds(), time.perf_counter() - begin
    if before is None or after is None:
        return None
    return max(0.0, (after[0] - before[0]) - (after[1] - before[1])) / elapsed
