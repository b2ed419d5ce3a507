"""``openxlstm bench``: tokens per second on this machine, and what its memory would allow."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import nn
from tyro.conf import Positional, arg

from openxlstm.checkpoint import load_pretrained
from openxlstm.cli.advice import say_if_slow
from openxlstm.cli.options import parse
from openxlstm.config import nearest_name
from openxlstm.inference.engine import DecodeEngine
from openxlstm.inference.measurement import DecodeSpeed, available_memory, measure_decode
from openxlstm.inference.runner import ModelRunner, State
from openxlstm.layers.quantized import Quantization, QuantizedLinear, quantize_model
from openxlstm.models import state_bytes, xLSTMLarge, xLSTMLargeConfig
from openxlstm.ops.native import loader
from openxlstm.runtime import DTYPES
from openxlstm.state import ModelState

EXAMPLES = """\
  openxlstm bench xlstm-160m --random-weights --dtype bfloat16
  openxlstm bench xlstm-160m --random-weights --dtype int8 --batch 8
  openxlstm bench xlstm-7b --random-weights --dtype int4
  openxlstm bench runs/demo/model --context 2048"""

SIZES = {
    "xlstm-160m": xLSTMLargeConfig(
        embedding_dim=768, num_heads=6, num_blocks=12, vocab_size=50304, ffn_dim=2112
    ),
    "xlstm-400m": xLSTMLargeConfig(embedding_dim=1024, num_heads=4, num_blocks=24, vocab_size=50304),
    "xlstm-7b": xLSTMLargeConfig(embedding_dim=4096, num_heads=8, num_blocks=32, vocab_size=50304),
}
"""Published sizes for ``--random-weights``."""

BITS = {"int8": 8, "int4": 4}
FLOATS = ("float32", "bfloat16")


@dataclass(frozen=True)
class BenchOptions:
    """Measure how fast a model writes on this CPU, and how fast memory would allow it to.

    Steps of the decode engine alternate with reads of a large array; the share of the bound compares the two.
    """

    model: Annotated[str, Positional, arg(metavar="MODEL")]
    """Checkpoint directory or hub id; with --random-weights a size: xlstm-160m, xlstm-400m, xlstm-7b.
    May also be given as --model MODEL."""
    random_weights: bool = False
    """Measure a published size with random weights; speed does not depend on their values."""
    dtype: str | None = None
    """Type of the weights: float32, bfloat16, int8 or int4; as stored unless given, bfloat16 if random."""
    state_dtype: str = "float32"
    """Type of the matrix memories between tokens: float32 or bfloat16."""
    batch: int = 1
    """Sequences that step together."""
    context: int = 0
    """Tokens to read before measuring. What a step costs does not depend on them."""
    seconds: float = 5.0
    """Time to measure for."""
    threads: int | None = None
    """Threads; all cores unless given."""
    json: bool = False
    """Print JSON."""


def run(arguments: Sequence[str]) -> int:
    """Run the command."""
    words = [word.removeprefix("--model=") for word in arguments if word != "--model"]
    options = parse(BenchOptions, words, command="bench", examples=EXAMPLES)
    dtype = None if options.dtype is None else _type_name("--dtype", options.dtype, (*FLOATS, *BITS))
    state_dtype = _type_name("--state-dtype", options.state_dtype, FLOATS)
    options = dataclasses.replace(options, dtype=dtype, state_dtype=state_dtype)
    for name in ("batch", "seconds", "threads"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name} must be positive, got {value}")
    if options.context < 0:
        raise ValueError(f"--context must not be negative, got {options.context}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.random_weights:
        model = random_model(options.model, options.dtype or "bfloat16", options.batch)
    else:
        model = _stored_model(options)
    runner = ModelRunner(model)
    state, read_rate = runner.initial_state(), None
    if options.context:
        state, read_rate = _read(runner, options.context)
    state = _held(model, state.fork(options.batch), options)
    speed = measure_decode(runner, state, batch=options.batch, seconds=options.seconds)
    _report(options, speed, read_rate)
    return 0


def _type_name(option: str, name: str, choices: Sequence[str]) -> str:
    """The name of a type as tables have it: "bfloat16" of "bf16", for instance."""
    full = str(DTYPES[name]).removeprefix("torch.") if name in DTYPES else name
    if full not in choices:
        raise ValueError(
            f"{option} must be one of {', '.join(choices)}, got '{name}'.{nearest_name(name, choices)}"
        )
    return full


def random_model(name: str, dtype: str, batch: int = 1) -> xLSTMLarge:
    """A published size with random weights.

    Args:
        name: of :data:`SIZES`.
        dtype: "float32", "bfloat16", "int8" or "int4".
        batch: sequences that memory is needed for.

    Raises:
        ValueError: an unknown size, or not enough memory for it.
    """
    if name not in SIZES:
        raise ValueError(
            f"no published size '{name}' for --random-weights: choose one of {', '.join(SIZES)}."
            f"{nearest_name(name, SIZES)}"
        )
    config = SIZES[name]
    with torch.device("meta"):
        model = xLSTMLarge(config).to(DTYPES.get(dtype, torch.bfloat16))
        if dtype in BITS:
            quantize_model(model, Quantization(bits=BITS[dtype]), weights=False)
    weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    needed = weights + 2 * batch * state_bytes(config) + (1 << 29)
    free = available_memory()
    if free is not None and needed > free:
        raise ValueError(
            f"{name} in {dtype} with {batch} sequences needs {needed / 2**30:.1f} GiB of memory and "
            f"{free / 2**30:.1f} GiB are free: choose a smaller type, size or batch"
        )
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            _fill(tensor, generator)
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.scales.abs_()
    return model.eval()


def _fill(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Random numbers, repeated from one block: drawing billions would take minutes."""
    flat = tensor.view(-1)
    block = min(flat.numel(), 1 << 22)
    if tensor.is_floating_point():
        values = 0.02 * torch.randn(block, generator=generator)
    else:
        values = torch.randint(0, 256, (block,), generator=generator, dtype=torch.uint8).view(torch.int8)
    if tensor.dtype == torch.uint8:
        values = values.view(torch.uint8)
    for start in range(0, flat.numel(), block):
        flat[start : start + block] = values[: flat.numel() - start]


def _stored_model(options: BenchOptions) -> nn.Module:
    if options.model in SIZES:
        raise ValueError(f"'{options.model}' is the name of a size: add --random-weights to measure it")
    plain = options.dtype if options.dtype in FLOATS else None
    model, _ = load_pretrained(options.model, dtype=plain, device="cpu")
    if options.dtype in BITS:
        quantize_model(model, Quantization(bits=BITS[options.dtype]))
    return model.eval()


def _held(model: nn.Module, state: ModelState, options: BenchOptions) -> State:
    """The state in the decode engine; as it is where there are no native kernels, and one line says so."""
    reason = loader.unavailable()
    if reason is None:
        return DecodeEngine(model, state_dtype=DTYPES[options.state_dtype]).open(state)
    if options.state_dtype != "float32":
        raise ValueError(f"--state-dtype {options.state_dtype} needs native kernels: {reason}")
    say_if_slow(torch.device("cpu"))
    return state


def _read(runner: ModelRunner, context: int) -> tuple[ModelState, float]:
    """A state after ``context`` random tokens, and the tokens per second at which they were read."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(runner.vocab_size, (context,), generator=generator).tolist()
    state, start = runner.initial_state(), time.perf_counter()
    for piece in runner.pieces(tokens):
        state = runner.read(piece, state)
    return state, context / (time.perf_counter() - start)


def _report(options: BenchOptions, speed: DecodeSpeed, read_rate: float | None) -> None:
    kind = options.dtype or ("bfloat16" if options.random_weights else "as stored")
    if options.json:
        facts = dataclasses.asdict(options) | dataclasses.asdict(speed)
        facts |= {"dtype": kind, "prefill_tokens_per_second": read_rate, "threads": torch.get_num_threads()}
        print(json.dumps(facts | {"disturbed": speed.disturbed}, indent=2))
        return
    threads, rows = torch.get_num_threads(), options.batch
    print(f"{options.model}, {kind}, batch {rows}, after {options.context:,} tokens, {threads} threads")
    if read_rate is not None:
        print(f"prompt:  {read_rate:,.0f} tokens/s")
    print(f"decode:  {speed.tokens_per_second:,.1f} tokens/s ({speed.step_seconds * 1e3:.2f} ms per step)")
    print(
        f"bound:   {speed.bound_tokens_per_second:,.1f} tokens/s "
        f"({speed.bytes_per_step / 1e6:,.0f} MB per step at {speed.bandwidth / 1e9:.1f} GB/s)"
    )
    print(f"reached: {speed.share_of_bound:.0%} of the bound, median of {speed.steps} pairs")
    if speed.disturbed:
        print(
            f"note: the machine is busy; other processes used {speed.cores_used_by_others:.1f} cores "
            "meanwhile, so these figures are too low"
        )
