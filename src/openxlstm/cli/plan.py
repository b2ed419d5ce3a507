"""``openxlstm plan``: what to train with a budget, xLSTM and Transformer side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from openxlstm.cli.options import naming_options, parse

if TYPE_CHECKING:
    from openxlstm.models.accounting import Device
    from openxlstm.scaling.laws import Outside
    from openxlstm.scaling.planning import Option

EXAMPLES = """\
  openxlstm plan --flops 1e20
  openxlstm plan --gpus 8 --hours 72 --device h100
  openxlstm plan --flops 1e20 --gpus 64 --context-length 16384
  openxlstm plan --flops 1e13 --laws runs/study/laws.json --vocab-size 257 --context-length 128"""


@dataclass(frozen=True)
class PlanOptions:
    """Plan a training run: sizes, tokens, expected loss, time, memory and the cost of inference.

    The budget is --flops, or --gpus and --hours. The first column of each family is the compute-optimal
    model; the others are smaller ones, trained longer on the same budget. Losses come from laws fitted to the
    published runs (DCLM, context 8192), or to runs of your own (--laws); what lies outside their range is
    said.
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
    print(f"\n{table(families, options.context_length)}")
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


def table(families: Mapping[str, Sequence[Option]], context_length: int) -> str:
    """The options of all families side by side, one column each."""
    rows: list[tuple[str, Callable[[Option], str]]] = [
        ("parameters", lambda o: f"{o.num_params:.3g}"),
        ("tokens", lambda o: f"{o.num_tokens:.3g}"),
        ("tokens per parameter", lambda o: f"{o.ratio:.0f}"),
        ("loss", lambda o: f"{o.loss:.3f}"),
        ("95 % interval", lambda o: "{:.3f}-{:.3f}".format(*o.interval)),
        ("training: GB per device", lambda o: f"{o.training_memory / 1e9:.1f}"),
        ("  days", lambda o: "" if o.seconds is None else f"{o.seconds / 86400:.2f}"),
        ("  learning rate", lambda o: f"{o.learning_rate:.2g}"),
        ("  tokens per batch", lambda o: f"{o.batch_tokens:.2g}"),
        ("inference: GB", lambda o: f"{o.inference_memory / 1e9:.2f}"),
        ("  state or cache, MB", lambda o: f"{o.state_memory / 1e6:.1f}"),
        (f"  prompt of {context_length}, s", lambda o: f"{o.prefill_seconds:.3g}"),
        ("  next token, ms", lambda o: f"{o.step_seconds * 1e3:.3g}"),
        ("  in 32 rows, ms", lambda o: f"{o.batch_step_seconds * 1e3:.3g}"),
    ]
    columns = [option for choices in families.values() for option in choices]
    heads = "".join(f"{family:>12}" + " " * 12 * (len(c) - 1) for family, c in families.items())
    lines = [" " * 24 + heads, " " * 24 + "".join(f"{_label(option):>12}" for option in columns)]
    for name, shown in rows:
        values = [shown(option) for option in columns]
        if any(values):
            lines.append(f"{name:<24}" + "".join(f"{value:>12}" for value in values))
    return "\n".join(line.rstrip() for line in lines)


def warnings_of(options: Sequence[Option]) -> list[str]:
    """The warnings of one family, each kind once, with the options it concerns and how far they are off."""
    outside: dict[tuple[str, bool], list[tuple[Option, Outside]]] = {}
    notes: dict[str, list[Option]] = {}
    for option in options:
        for place in option.outside:
            outside.setdefault((place.quantity, place.above), []).append((option, place))
        for note in option.notes:
            notes.setdefault(note, []).append(option)
    sentences: list[tuple[str, Sequence[Option]]] = []
    for found in outside.values():
        factors = sorted({float(f"{place.factor:.3g}") for _, place in found})
        spread = " to ".join(f"{factor:g}" for factor in (factors[0], factors[-1])[: len(factors)])
        sentences.append((found[0][1].sentence(spread), [option for option, _ in found]))
    sentences += notes.items()
    return [
        f"{options[0].family}, "
        f"{'all' if len(concerned) == len(options) else ', '.join(map(_label, concerned))}: {sentence}"
        for sentence, concerned in sentences
    ]


def _label(option: Option) -> str:
    return "optimal" if option.shrink == 1 else f"{option.shrink:g}x smaller"
