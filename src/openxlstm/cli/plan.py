"""``openxlstm plan``: what to train with a budget, xLSTM and Transformer side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from openxlstm.cli.options import naming_options, parse

if TYPE_CHECKING:
    from openxlstm.models.accounting import Device
    from openxlstm.scaling.planning import Option

EXAMPLES = """\
  openxlstm plan --flops 1e20
  openxlstm plan --gpus 8 --hours 72 --device h100
  openxlstm plan --flops 1e20 --gpus 64 --context-length 16384
  openxlstm plan --flops 1e13 --laws runs/study/laws.json --vocab-size 257 --context-length 128"""


@dataclass(frozen=True)
class PlanOptions:
    """Plan a training run: sizes, tokens, expected loss, time, memory and the cost of inference.

    The budget is --flops, or --gpus and --hours. The first line of each family is compute-optimal; the others
    are smaller models trained longer on the same budget. Losses come from laws fitted to the published runs
    (DCLM, context 8192), or to runs of your own (--laws); what lies outside their range is said.
    """

    flops: float | None = None
    """Training budget in FLOPs."""
    gpus: int | None = None
    """Devices that train."""
    hours: float | None = None
    """Hours that they train."""
    device: str = "h100"
    """a100, h100, h200, b200, l40s, rtx4090 or mi300x."""
    utilisation: float = 0.4
    """Share of the device's peak that training attains: an assumption, measure yours."""
    context_length: int = 8192
    """Tokens per training row, and of the prompt whose inference is costed."""
    vocab_size: int = 50304
    """Tokens of the tokenizer."""
    laws: Path | None = None
    """Laws that `openxlstm scaling fit --laws` wrote; default: those of the published runs."""


def run(arguments: Sequence[str]) -> int:
    """Run the command."""
    options = parse(PlanOptions, arguments, command="plan", examples=EXAMPLES)
    from openxlstm.models.accounting import find_device
    from openxlstm.scaling.laws import read_laws
    from openxlstm.scaling.planning import plan

    device = find_device(options.device)
    laws, source = read_laws(options.laws)
    with naming_options(PlanOptions):
        flops = _budget(options, device)
        families = plan(
            flops,
            laws,
            device=device,
            gpus=options.gpus,
            utilisation=options.utilisation,
            context_length=options.context_length,
            vocab_size=options.vocab_size,
        )
    print(f"budget     {flops:.3g} FLOPs" + (f" on {options.gpus} {device.name}" if options.gpus else ""))
    print(f"laws       {source}")
    print(
        f"assumed    {options.utilisation:.0%} of the peak in training, 16 bytes per parameter while "
        f"training, bfloat16 inference on one {device.name} at its limits"
    )
    for family, choices in families.items():
        print(f"\n{family}\n{table(choices, options.context_length)}")
    notes = [note for choices in families.values() for note in warnings_of(choices)]
    if notes:
        print("\nwarnings\n" + "\n".join(f"  {note}" for note in notes))
    return 0


def _budget(options: PlanOptions, device: Device) -> float:
    from openxlstm.scaling.planning import budget_of

    if options.flops is None:
        if options.gpus is None or options.hours is None:
            raise ValueError("give the budget: --flops 1e20, or --gpus 8 --hours 72")
        return budget_of(options.gpus, options.hours, device, options.utilisation)
    if options.hours is not None:
        raise ValueError("--hours and --flops say the same thing; give one of them")
    if options.gpus is not None:
        budget_of(options.gpus, 1, device, options.utilisation)  # checks both
    return options.flops


def table(options: Sequence[Option], context_length: int) -> str:
    """The options of one family, one per line."""
    head = [
        "", "parameters", "tokens", "per param.", "loss", "95 % interval", "days", "GB to train", "GB to run",
        "state MB", f"prompt of {context_length} s", "token ms", "32 rows ms", "rate", "batch tokens",
    ]  # fmt: skip
    rows = [head]
    for option in options:
        low, high = option.interval
        days = "-" if option.seconds is None else f"{option.seconds / 86400:.2f}"
        rows.append([
            _label(option), f"{option.num_params:.3g}", f"{option.num_tokens:.3g}", f"{option.ratio:.0f}",
            f"{option.loss:.3f}", f"{low:.3f}-{high:.3f}", days, f"{option.training_memory / 1e9:.1f}",
            f"{option.inference_memory / 1e9:.2f}", f"{option.state_memory / 1e6:.1f}",
            f"{option.prefill_seconds:.3g}", f"{option.step_seconds * 1e3:.3g}",
            f"{option.batch_step_seconds * 1e3:.3g}", f"{option.learning_rate:.2g}",
            f"{option.batch_tokens:.2g}",
        ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *cells in rows:
        shown = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join(("", first.ljust(widths[0]), *shown)))
    return "\n".join(lines)


def warnings_of(options: Sequence[Option]) -> list[str]:
    """The warnings of one family, each once, with the options it concerns."""
    concerned: dict[str, list[str]] = {}
    for option in options:
        for note in option.warnings:
            concerned.setdefault(note, []).append(_label(option))
    return [
        f"{options[0].family}, {'all' if len(labels) == len(options) else ', '.join(labels)}: {note}"
        for note, labels in concerned.items()
    ]


def _label(option: Option) -> str:
    return "compute-optimal" if option.shrink == 1 else f"{option.shrink:g}x smaller"
