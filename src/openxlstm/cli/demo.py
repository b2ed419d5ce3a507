"""``openxlstm demo``: the whole library in a few minutes, on two CPU cores, without a download.

Prepares the Python standard library's source text, trains a small mixed mLSTM/sLSTM language model on it for
a fixed number of steps from a fixed seed, compares bits per byte on held-out files with a byte 5-gram, gzip
and xz, draws the curve, completes a few prompts and says what to try next. It is ``openxlstm data``,
``train`` and ``generate`` in a row; the recipe it used is left beside the results.

The held-out text is split off by document before anything is trained; tokenizer, 5-gram and model see the
training split only. The model's figure counts every token of the held-out documents and their ends. Documents
longer than a validation row are cut there, and the model starts anew, so the figure errs against it.
"""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openxlstm.cli.options import parse

EXAMPLES = """\
  openxlstm demo
  openxlstm demo --steps 2000 --output runs/longer        (about a quarter of an hour)"""

MODEL: dict[str, Any] = {
    "model_type": "xlstm_lm",
    "embedding_dim": 192,
    "num_blocks": 4,
    "slstm_at": [1],
    "mlstm_block": {"mlstm": {"num_heads": 4}},
    "slstm_block": {"slstm": {"num_heads": 4}, "feedforward": {"proj_factor": 1.3}},
}
VOCABULARY = 2048
HELD_OUT = 0.025
STEPS = 300
DATA = {"context_length": 256, "validation_context_length": 1024}
TRAIN: dict[str, Any] = {
    "batch_size": 8,
    "learning_rate": 3e-3,
    "schedule": "wsd",
    "final_factor": 0.05,
    "clip": 1.0,
    "precision": "float32",
    "validation_batches": 0,
    "sample_every": 0,
    "checkpoint_every": 0,
    "seed": 0,
}
MAX_THREADS = 4  # the products are small: more threads would wait for each other
PROMPTS = ("def __init__(self, ", "import os\n\ndef read_file(path):\n", 'class Error(Exception):\n    """')


@dataclass(frozen=True)
class DemoOptions:
    """Train a small xLSTM language model on the Python standard library's own source, and compare it.

    Takes under five minutes on two CPU cores and downloads nothing.
    """

    output: Path | None = None
    """Directory of the run; runs/demo, or the first free runs/demo-N."""
    steps: int = STEPS
    """Training steps. The comparison is meant for the default."""
    corpus: Path | None = None
    """Another text to train on: a file, or a directory."""
    device: str = "cpu"
    """Where to train: cpu, cuda, mps, auto."""


def run(arguments: Sequence[str]) -> int:
    """Run the command."""
    options = parse(DemoOptions, arguments, command="demo", examples=EXAMPLES)
    start = time.perf_counter()
    if options.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {options.steps}")
    output = options.output or _free_directory(Path("runs/demo"))

    import torch

    from openxlstm.checkpoint import train_bpe
    from openxlstm.cli.advice import say_if_slow
    from openxlstm.cli.recipe import build_trainer, make_recipe
    from openxlstm.data import as_source, open_corpus, prepare, python_standard_library
    from openxlstm.models import parameter_count
    from openxlstm.plots import plot_loss_curve
    from openxlstm.training import read_log, refuse_existing_run

    hint = f"go on with `{shlex.join(['openxlstm', 'train', str(output / 'recipe.yaml'), '--resume'])}`"
    refuse_existing_run(output, hint)
    torch.set_num_threads(min(torch.get_num_threads(), MAX_THREADS))
    source = python_standard_library() if options.corpus is None else as_source(options.corpus)
    _heading(f"1/4  text: {source.name}")
    corpus = open_corpus(source, validation_fraction=HELD_OUT)
    tokenizer = train_bpe(corpus.texts("train"), VOCABULARY)
    progress = sys.stderr.isatty()
    print(prepare(corpus, output / "data", tokenizer, progress=progress).summary())

    _heading("2/4  baselines on the held-out text, in bits per byte")
    baselines = measure_baselines(
        [text.encode() for text in corpus.texts("train")],
        [text.encode() for text in corpus.texts("validation")],
    )
    for name, bits in baselines.items():
        print(f"  {name:<14} {bits:.3f}")

    recipe = make_recipe(
        {
            "model": MODEL,
            "data": {"path": str(output / "data"), **DATA},
            "train": {
                **TRAIN,
                "steps": options.steps,
                "warmup_steps": max(1, options.steps // 20),
                "validation_every": max(1, options.steps // 5),
                "output": str(output),
                "device": options.device,
            },
            "prompts": list(PROMPTS),
        }
    )
    trainer, recipe = build_trainer(recipe, resume_hint=hint)
    say_if_slow(trainer.device)
    tokens = options.steps * recipe.train.batch_size * recipe.data.context_length
    count = parameter_count(trainer.model.config)  # pyright: ignore[reportArgumentType]
    _heading(f"3/4  training: {count:,} parameters, {options.steps} steps, {tokens:,} tokens")
    result = trainer.fit(on_start=lambda: recipe.write(output / "recipe.yaml"))
    records = read_log(output / "log.jsonl")
    picture = _draw(plot_loss_curve, output, baselines)
    print(curve_table(records, baselines))
    print(verdict(result.bits_per_byte, baselines))

    _heading("4/4  completions")
    print("\n".join(complete(result.model_directory)))

    seconds = time.perf_counter() - start
    print(next_steps(output, picture, options.steps))
    print(f"\ndone in {int(seconds // 60)} min {seconds % 60:.0f} s, {result.seconds:.0f} s of it training")
    return 0


def measure_baselines(training: list[bytes], held_out: list[bytes]) -> dict[str, float]:
    """Bits per byte of the three baselines on ``held_out``, by name."""
    from openxlstm.cli.baselines import ByteNGram, gzip_bits_per_byte, xz_bits_per_byte

    return {
        "gzip -9": gzip_bits_per_byte(held_out),
        "xz -9": xz_bits_per_byte(held_out),
        "byte 5-gram": ByteNGram(training).bits_per_byte(held_out),
    }


def curve_table(records: Sequence[dict[str, Any]], baselines: dict[str, float]) -> str:
    """The learning curve on the held-out text, with a column per baseline that says who is ahead."""
    names = list(baselines)
    head = "".join(f"{name:>14}" for name in ["step", "bits per byte", *names])
    own = "".join(f"{text:>14}" for text in ["", "model", *(f"{baselines[n]:.3f}" for n in names)])
    lines = [head, own]
    for record in records:
        if record.get("kind") == "validation":
            bits = record["bits_per_byte"]
            marks = ["beaten" if bits < baselines[name] else "-" for name in names]
            cells = [str(record["step"]), f"{bits:.3f}", *marks]
            lines.append("".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def verdict(bits: float | None, baselines: dict[str, float]) -> str:
    """One sentence about the end of the curve."""
    if bits is None:
        return "there was no held-out text to compare on"
    beaten = [f"{name} ({value:.3f})" for name, value in baselines.items() if bits < value]
    others = [f"{name} ({value:.3f})" for name, value in baselines.items() if bits >= value]
    sentence = f"the model needs {bits:.3f} bits per byte of unseen text"
    if beaten:
        sentence += f": better than {', '.join(beaten)}"
    if others:
        sentence += f"{';' if beaten else ':'} not yet better than {', '.join(others)}"
    return sentence


def complete(model_directory: Path) -> list[str]:
    """The prompts with what the saved model makes of them."""
    from openxlstm.checkpoint import load_pretrained
    from openxlstm.inference import Generator

    generator = Generator(*load_pretrained(model_directory))
    texts = generator.generate(list(PROMPTS), max_new_tokens=60, temperature=0.6, top_p=0.95, seed=1)
    rule = "-" * 72
    return [f"{rule}\n{prompt}|{text}" for prompt, text in zip(PROMPTS, texts, strict=True)] + [rule]


def next_steps(output: Path, picture: Path | None, steps: int) -> str:
    """What was written, and commands to type next."""
    model, recipe = output / "model", output / "recipe.yaml"
    prefix = "" if _on_path() else f"{shlex.quote(_shortest(Path(sys.executable).parent))}/"
    commands = [
        (f"{prefix}openxlstm generate {model} 'class Parser:' --max-new-tokens 200", "write more"),
        (f"{prefix}openxlstm chat {model} --template plain", "type, let it continue"),
        (f"{prefix}openxlstm train {recipe} --resume --train.steps {5 * steps}", "train on from here"),
        (f"{prefix}openxlstm inspect {model}", "what is in it"),
        (f"{prefix}openxlstm eval model {model} {output / 'data'}", "what it can do"),
    ]
    width = max(len(command) for command, _ in commands)
    lines = [f"model and tokenizer: {model}", f"recipe:              {recipe}"]
    if picture is not None:
        lines.append(f"learning curve:      {picture}")
    lines.append("\nnext:")
    return "\n".join(lines + [f"  {command:<{width}}   # {comment}" for command, comment in commands])


def _draw(plot: Any, output: Path, baselines: dict[str, float]) -> Path | None:
    """The curve with the baselines in it, if matplotlib is there."""
    try:
        title = "xLSTM on the Python standard library"
        return plot(output / "log.jsonl", output / "loss.png", baselines=baselines, title=title)
    except ImportError:
        return None


def _on_path() -> bool:
    """Whether typing ``openxlstm`` finds a command."""
    import shutil

    return shutil.which("openxlstm") is not None


def _shortest(path: Path) -> str:
    """``path`` relative to here if it lies below."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _free_directory(wanted: Path) -> Path:
    """``wanted``, or the first of ``wanted-2``, ``wanted-3``, ... that does not exist."""
    candidate, number = wanted, 2
    while candidate.exists():
        candidate, number = wanted.with_name(f"{wanted.name}-{number}"), number + 1
    return candidate


def _heading(text: str) -> None:
    print(f"\n== {text}", flush=True)
