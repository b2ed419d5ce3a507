"""``openxlstm doctor``: this machine, its versions, its backends and what it measures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from openxlstm.cli.options import parse

EXAMPLES = """\
  openxlstm doctor
  openxlstm doctor --json > environment.json       (for a bug report)"""


@dataclass(frozen=True)
class DoctorOptions:
    """Show what this machine has and can do: versions, devices, operator backends, measured speed."""

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
    from openxlstm.runtime import environment_report, render_report, resolve_device

    report = environment_report(measure=not options.no_measure)
    native = asdict(loader.status())
    device = resolve_device("auto")
    backends = {name: explain(name, device=device).splitlines() for name in operators()}
    if options.json:
        print(json.dumps({**report, "native": native, "backends": backends}, indent=2))
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
    return 0
