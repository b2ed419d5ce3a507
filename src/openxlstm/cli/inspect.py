"""``openxlstm inspect``: what a checkpoint or a recipe's model is made of; with a text, what its heads do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from openxlstm.cli.options import parse
from openxlstm.config import config_to_dict, read_mapping

EXAMPLES = """\
  openxlstm inspect runs/demo/model
  openxlstm inspect recipes/xlstm_7b.yaml
  openxlstm inspect runs/demo/model --text novel.txt"""


@dataclass(frozen=True)
class InspectOptions:
    """Show the configuration, the size and the cost of a model, without loading its weights.

    With a text, load it and show what it does there: gates over time, how fast each head forgets, which past
    tokens it retrieves.
    """

    model: Annotated[str, Positional, arg(metavar="MODEL|RECIPE.yaml")]
    """Checkpoint directory, hub id, or recipe."""
    context_length: int = 2048
    """Tokens that training, reading a prompt and decoding are counted for."""
    text: Path | None = None
    """Look inside on this text: a file, a directory, or prepared data."""
    tokens: int = 128
    """How many tokens of the text to look at."""
    output: Path = Path("runs/inspect")
    """Directory of plots and figures of the text."""


def run(arguments: Sequence[str]) -> int:
    """Run the command."""
    options = parse(InspectOptions, arguments, command="inspect", examples=EXAMPLES)
    if options.context_length < 1:
        raise ValueError(f"--context-length must be at least 1, got {options.context_length}")
    from openxlstm.models import build_config, parameter_count

    path = Path(options.model)
    tokenizer: Any = None
    if path.suffix in (".yaml", ".yml") and not path.is_dir():
        if options.text is not None:
            raise ValueError(f"--text needs a trained model, and '{path}' is a recipe; give a checkpoint")
        model = read_mapping(path).get("model")
        if not isinstance(model, dict):
            raise ValueError(f"'{path}' has no section 'model', so it is not a recipe")
        config: Any = build_config({"vocab_size": 50304, **model})
        kind, stored = model["model_type"], "recipe"
    else:
        from openxlstm.checkpoint import read_checkpoint
        from openxlstm.checkpoint.hub import locate

        checkpoint = read_checkpoint(locate(options.model))
        config, kind, tokenizer = checkpoint.config, checkpoint.model_type, checkpoint.tokenizer
        stored = f"{len(checkpoint.weights)} tensors, {str(checkpoint.dtype).removeprefix('torch.')}"
        if checkpoint.quantization is not None:
            size = sum(tensor.nbytes for tensor in checkpoint.weights.values()) / 2**20
            scheme = ", ".join(f"{n}={v}" for n, v in config_to_dict(checkpoint.quantization).items())
            stored = f"{len(checkpoint.weights)} tensors, {size:,.1f} MiB, quantised: {scheme}"
    count = parameter_count(config)
    rows = [("model", kind), ("stored", stored), ("parameters", f"{count:,}")]
    rows.append(("weights", f"{count * 4 / 2**20:,.1f} MiB in float32, {count * 2 / 2**20:,.1f} in bfloat16"))
    rows.append(("state", _state(config, options.context_length)))
    if hasattr(config, "vocab_size"):
        rows += _costs(config, options.context_length)
    if tokenizer is not None:
        rows.append(("tokenizer", repr(tokenizer)))
    rows += [(name, _short(value)) for name, value in config_to_dict(config).items()]
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows))
    if options.text is not None:
        from openxlstm.cli.inspect_text import look_inside

        look_inside(options.model, options.text, options.tokens, options.output)
    return 0


def _costs(config: Any, time: int) -> list[tuple[str, str]]:
    """What training and inference cost at ``time`` tokens."""
    from openxlstm.models.accounting import (
        decode_cost,
        forward_components,
        prefill_cost,
        training_flops_per_token,
    )

    flops = training_flops_per_token(config, time) / 1e6
    parts = forward_components(config, time)
    total = sum(part.total for part in parts.values())
    shares = ", ".join(f"{name} {part.total / total:.0%}" for name, part in parts.items() if part.total)
    read, step = prefill_cost(config, 1, time), decode_cost(config, 1, time)
    return [
        ("training", f"{flops:,.1f} MFLOP per token at {time} tokens"),
        ("", shares),
        ("prompt", f"{read.flops / 1e9:,.1f} GFLOP, {read.bytes / 2**20:,.1f} MiB moved in bfloat16"),
        (
            "next token",
            f"{step.flops / 1e9:,.3f} GFLOP, {step.bytes / 2**20:,.1f} MiB moved after {time} tokens",
        ),
    ]


def _state(config: Any, context_length: int) -> str:
    from openxlstm.models import state_bytes

    size = state_bytes(config, context_length=context_length) / 2**20
    if state_bytes(config, context_length=context_length) == state_bytes(config, context_length=1):
        return f"{size:,.2f} MiB per sequence, of any length"
    return f"{size:,.2f} MiB per sequence of {context_length} tokens in float32, growing with the text"


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(
            f"{name}=({_short(v)})" if isinstance(v, dict) else f"{name}={v}" for name, v in value.items()
        )
    return str(value)
