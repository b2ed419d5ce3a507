"""The jobs of benchmarks/gpu.py, each run in a process of its own: ``python gpu_jobs.py '{"kind": ...}'``.

A job prints one JSON object per line: ``{"trying": variant}`` before each variant, so that the parent knows
what broke the process, and ``{"row": ...}`` for each result.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from openxlstm.models import build_model
from openxlstm.models.accounting import least_mlstm_flops, parameter_count, state_bytes
from openxlstm.models.large import xLSTMLargeConfig
from openxlstm.ops import mlstm, mlstm_advance, rnn
from openxlstm.ops.rnn.cells import CELLS
from openxlstm.state import mLSTMState

ROOT = Path(__file__).parent.parent
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
Call = Callable[[], Any]
Rows = Iterator[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is run: the real thing, or toys for a rehearsal without a GPU."""

    cases: tuple[str, ...] | None
    """Names of correctness cases; None is all."""
    rnn_dims: tuple[int, ...]
    least: tuple[int, int, int]
    """At least so many positions, query/key and value dimensions in the correctness cases."""
    mlstm: tuple[tuple[int, int, int, int, int], ...]
    """B, T, H, DK, DV."""
    step: tuple[tuple[int, int, int, int], ...]
    """B, H, DK, DV."""
    rnn: tuple[tuple[str, int, int, int, int], ...]
    """Cell, B, T, hidden size, head dimension."""
    decode: dict[str, Any]
    """Configuration of the model that decodes."""
    train: dict[str, Any]
    """Configuration of the block that trains, with its batch and length."""
    repeats: int

    @classmethod
    def full(cls, *, quick: bool) -> Sizes:
        tokens = 65536
        shapes = [(tokens // t, t, 8, 256, 512) for t in (8192, 65536, 512, 1024, 2048, 4096, 16384, 32768)]
        shapes += [(16, 4096, 16, 128, 256)]
        cells = [("lstm", 16, 1024, 768, d) for d in (64, 32, 16, 128, 256, 768)]
        cells.insert(1, ("slstm", 16, 1024, 768, 64))
        steps = [(batch, 8, 256, 512) for batch in (16, 1, 64)]
        cut = 1 if quick else None
        seven = {"embedding_dim": 4096, "num_heads": 8, "num_blocks": 32, "vocab_size": 50304}
        block = {"embedding_dim": 2048, "num_heads": 4, "num_blocks": 1, "vocab_size": 128}
        return cls(
            None, (17, 64, 128, 192), (200, 48, 80), tuple(shapes[:cut]), tuple(steps[:cut]),
            tuple(cells[:cut]), seven, block | {"batch": 8, "time": 8192}, 3 if quick else 15,
        )  # fmt: skip

    @classmethod
    def toy(cls) -> Sizes:
        tiny = {"embedding_dim": 16, "num_heads": 1, "num_blocks": 1, "vocab_size": 7}
        tiny |= {"ops_backend": "triton"}
        return cls(
            ("one_token", "sigmoid"), (5,), (3, 4, 4), ((1, 20, 1, 8, 8),), ((2, 1, 8, 8),),
            (("lstm", 2, 3, 8, 8),), tiny, tiny | {"batch": 1, "time": 8}, 1,
        )  # fmt: skip


def checks(sizes: Sizes) -> list[dict[str, Any]]:
    """Jobs of the correctness section."""
    names = sizes.cases or tuple(_cases()[0])
    least = list(sizes.least)
    jobs = [{"kind": "check_mlstm", "case": name, "least": least} for name in names]
    jobs += [{"kind": "check_rnn", "cell": cell, "dims": list(sizes.rnn_dims)} for cell in CELLS]
    batch, length, *rest = sizes.mlstm[0]
    return [*jobs, {"kind": "check_determinism", "shape": [batch, min(1024, length), *rest]}]


def timings(section: str, sizes: Sizes, rates: dict[str, Any]) -> list[dict[str, Any]]:
    """Jobs of a section that times, in order of importance."""
    jobs: dict[str, list[dict[str, Any]]] = {
        "mlstm": [{"kind": "time_mlstm", "shape": list(shape)} for shape in sizes.mlstm],
        "decode": [{"kind": "time_step", "shape": list(shape)} for shape in sizes.step],
        "rnn": [{"kind": "time_rnn", "shape": list(shape)} for shape in sizes.rnn],
        "model": [
            {"kind": "time_decode", "config": sizes.decode},
            {"kind": "time_block", "config": sizes.train},
        ],
        "tiles": [
            {"kind": kind, "shape": list(shape), **rest}
            for kind, rest in (
                ("time_kernels", {}),
                *(("time_tiles", {"field": field}) for field in CANDIDATES),
            )
            for shape in sizes.mlstm[:2]
        ],
    }
    return [{**job, "rates": rates, "repeats": sizes.repeats} for job in jobs[section]]


CANDIDATES: dict[str, list[dict[str, int]]] = {
    "resident": [{"warps": 4}, {"time": 32}, {"time": 32, "stages": 3}, {"v": 32}, {"stages": 1}],
    "output": [{"stages": 2}, {"stages": 4}, {"k": 128}, {"k": 32}, {"rows": 64}, {"v": 64}],
    "states": [{"v": 128, "warps": 8}, {"k": 128, "warps": 8}, {"stages": 3}, {"time": 32, "stages": 4}],
    "inputs": [{"v": 128}, {"k": 32}, {"stages": 3}, {"k": 128, "v": 32}],
    "state_gradients": [{"v": 128, "warps": 8}, {"k": 128, "warps": 8}, {"stages": 3}],
}
"""Changes to the shipped tiles of bfloat16 that may be faster."""


def say(**event: Any) -> None:
    print(json.dumps(event), flush=True)


def reason(error: BaseException) -> str:
    """One line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


# --- correctness -------------------------------------------------------------------------------------------


def _cases() -> tuple[dict[str, Any], Callable[..., Any]]:
    sys.path.insert(0, str(ROOT / "tests/ops/mlstm"))
    from cases import CASES, run

    return CASES, run


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    difference = torch.linalg.vector_norm(actual.detach().double() - expected.detach().double())
    return float(difference / torch.linalg.vector_norm(expected.detach().double()).clamp_min(1e-30))


def check_mlstm(job: dict[str, Any]) -> Rows:
    """One case of the tests' table in every dtype, values and gradients."""
    table, run = _cases()
    time_, dk, dv = job["least"]
    case = table[job["case"]]
    case = case.but(time=max(case.time, time_), qk_dim=max(case.qk_dim, dk), v_dim=max(case.v_dim, dv))
    tolerances = {torch.float32: (5e-6, 2e-5), torch.float16: (2e-3, 4e-3), torch.bfloat16: (6e-3, 2e-2)}
    if not GPU:
        del tolerances[torch.bfloat16]  # the interpreter multiplies the bits
    for dtype, tolerance in tolerances.items():
        inputs = {key: x.to(DEVICE) for key, x in case.inputs(dtype).items()}
        exact = {key: x.double() for key, x in inputs.items()}
        with torch.device(DEVICE):
            expected = run(case, exact, "chunkwise")
            actual = run(case, inputs, "triton")
            portable = run(case, inputs, "chunkwise")
        worst, other = (
            [max(relative_error(a[k], e[k]) for k in e) for a, e in zip(found, expected, strict=True)]
            for found in (actual, portable)
        )
        good = all(w < max(t, 2 * o) for w, o, t in zip(worst, other, tolerance, strict=True))
        yield {
            "what": f"mlstm {job['case']}", "dtype": str(dtype), "values": worst[0], "gradients": worst[1],
            "good": good,
        }  # fmt: skip


def check_rnn(job: dict[str, Any]) -> Rows:
    """One cell at fused and alternating head dimensions."""
    cell, kind = job["cell"], CELLS[job["cell"]]
    batch, length = (20, 40) if GPU else (2, 3)
    for d in job["dims"]:
        for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 4e-2))[: None if GPU else 1]:
            g = torch.Generator(DEVICE).manual_seed(0)
            shapes = [
                (batch, length, len(kind.input_gates), 2, d), (len(kind.recurrent_gates), 2, d, d),
                (len(kind.bias_gates), 2, d),
            ]  # fmt: skip
            x, weight, bias = (torch.randn(s, device=DEVICE, generator=g) for s in shapes)
            weight /= d**0.5
            x = x.to(dtype)
            results = []
            for backend, wide in (("triton", False), ("scan", True)):
                leaves = [t.double() if wide else t.clone() for t in (x, weight, bias)]
                leaves = [t.requires_grad_() for t in leaves]
                h = rnn(cell, *leaves, backend=backend)
                results.append([h, *torch.autograd.grad(h.double().square().sum(), leaves)])
            worst = max(relative_error(a, e) for a, e in zip(*results, strict=True))
            yield {
                "what": f"{cell} D={d}", "dtype": str(dtype), "values": worst, "good": worst < tolerance,
            }  # fmt: skip


def check_determinism(job: dict[str, Any]) -> Rows:
    """Three runs, identical bits."""
    q, k, v, i, f = mlstm_inputs(*job["shape"])
    runs = []
    for _ in range(3):
        h = mlstm(q, k, v, i, f, backend="triton")
        runs.append([h, *torch.autograd.grad(h.float().square().sum(), (q, k, v, i, f))])
    good = all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))
    yield {"what": "mlstm three runs", "dtype": "bits", "values": 0.0, "good": good}


# --- measuring ---------------------------------------------------------------------------------------------


def mlstm_inputs(batch: int, time: int, heads: int, dk: int, dv: int, grad: bool = True) -> tuple:
    g = torch.Generator(DEVICE).manual_seed(0)
    dtype = torch.bfloat16 if GPU else torch.float32

    def normal(*shape: int, mean: float = 0.0) -> torch.Tensor:
        x = torch.randn(shape, device=DEVICE, generator=g) + mean
        return x.to(dtype).requires_grad_(grad)

    return (
        normal(batch, time, heads, dk), normal(batch, time, heads, dk), normal(batch, time, heads, dv),
        normal(batch, time, heads), normal(batch, time, heads, mean=3.0),
    )  # fmt: skip


def milliseconds(call: Call) -> float:
    """Of one call."""
    if not GPU:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def measure(calls: dict[str, Call], repeats: int) -> dict[str, float]:
    """Median milliseconds of each call, interleaved, L2 flushed before each."""
    if repeats == 0:  # compile only
        for call in calls.values():
            call()
        return {}
    flush = torch.empty((256 << 20) if GPU else 1, dtype=torch.int8, device=DEVICE)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 2):
        for name, call in calls.items():
            say(trying=name.split(" | ")[0])
            flush.zero_()
            times[name].append(milliseconds(call))
    return {name: statistics.median(t[2:]) for name, t in times.items()}


def peak_memory(call: Call) -> int:
    """Bytes a call allocates at its peak, beyond what was there."""
    if not GPU:
        call()
        return 0
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def machine(job: dict[str, Any]) -> Rows:
    """bfloat16 matrix rate (FLOP/s) and copy bandwidth (B/s) of this device."""
    n, size = (64, 1 << 16) if job["toy"] else (8192, 1 << 30)
    a = torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16)
    block = torch.empty(size, dtype=torch.int8, device=DEVICE)
    other = torch.empty_like(block)
    ms = measure({"matrix": lambda: a @ a, "copy": lambda: other.copy_(block)}, 10)
    yield {"matrix": 2 * n**3 / ms["matrix"] * 1e3, "bandwidth": 2 * size / ms["copy"] * 1e3}


def forward_and_backward(function: Callable[..., torch.Tensor], leaves: tuple) -> dict[str, Call]:
    """The two calls to time: forward without gradients, and forward with backward."""
    dh = torch.randn_like(function(*leaves))

    def forward() -> None:
        with torch.no_grad():
            function(*leaves)

    def both() -> None:
        torch.autograd.grad(function(*leaves), [x for x in leaves if x.requires_grad], dh)

    both()
    if GPU:
        torch.cuda.synchronize()
    return {"forward": forward, "forward+backward": both}


def prepared(variants: dict[str, Callable[[], dict[str, Call]]], job: dict[str, Any]) -> dict[str, Call]:
    """The calls of every variant that can run here; a line for each that cannot.

    After an error of the device the process is of no use: it ends, and the parent starts it again without.
    """
    calls: dict[str, Call] = {}
    for label, make in variants.items():
        if label in job["skip"]:
            continue
        say(trying=label)
        try:
            calls |= {f"{label} | {what}": call for what, call in make().items()}
        except Exception as error:
            if "CUDA error" in str(error) or "illegal memory" in str(error):
                raise
            say(row={"job": {"shape": job.get("shape")}, "what": label, "failed": reason(error)})
    return calls


def mlstm_peers(q, k, v, i, f) -> dict[str, Callable[[], dict[str, Call]]]:
    """Implementations of the same or a comparable layer, as far as installed."""
    found: dict[str, Callable[[], dict[str, Call]]] = {}

    def head_first() -> tuple:
        return tuple(x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v, i, f))

    def published(name: str, size: int) -> dict[str, Call]:
        from mlstm_kernels.torch import get_mlstm_kernel

        kernel = get_mlstm_kernel(name)
        return forward_and_backward(
            lambda q, k, v, i, f: kernel(q=q, k=k, v=v, i=i, f=f, chunk_size=size), head_first()
        )

    def simple_gla() -> dict[str, Call]:
        from fla.ops.simple_gla import chunk_simple_gla

        return forward_and_backward(
            lambda q, k, v, f: chunk_simple_gla(q, k, v, torch.nn.functional.logsigmoid(f.float()))[0],
            tuple(x.detach().clone().requires_grad_() for x in (q, k, v, f)),
        )

    def attention() -> dict[str, Call]:
        width = min(256, v.shape[-1])
        leaves = tuple(
            v.detach()[..., :width].transpose(1, 2).contiguous().requires_grad_() for _ in range(3)
        )
        return forward_and_backward(
            lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True), leaves
        )

    if importlib.util.find_spec("mlstm_kernels"):
        for name, size in (("chunkwise--triton_xl_chunk", 128), ("chunkwise--triton_limit_chunk", 64)):
            found[f"mlstm_kernels {name}"] = lambda name=name, size=size: published(name, size)
    if importlib.util.find_spec("fla"):
        found["fla simple_gla"] = simple_gla
    if q.shape[1] <= 32768:  # beyond, its square costs the budget
        found["sdpa causal"] = attention
    return found


def time_mlstm(job: dict[str, Any]) -> Rows:
    batch, length, heads, dk, dv = shape = job["shape"]
    inputs = mlstm_inputs(*shape)
    variants = {
        "ours exp": lambda: forward_and_backward(lambda *x: mlstm(*x, backend="triton"), inputs),
        "ours sigmoid": lambda: forward_and_backward(
            lambda *x: mlstm(*x, input_gate="sigmoid", backend="triton"), inputs
        ),
        "ours scale-invariant": lambda: forward_and_backward(
            lambda *x: mlstm(*x, assume_scale_invariant_output=True, backend="triton"), inputs
        ),
        **mlstm_peers(*inputs),
    }
    calls = prepared(variants, job)
    for label, ms in measure(calls, job["repeats"]).items():
        backward = "backward" in label
        flops = batch * least_mlstm_flops(length, heads, dk, dv, backward=backward)
        moved = 2 * batch * length * heads * (2 * dk + 2 * dv) * (3 if backward else 1)
        bound = max(flops / job["rates"]["matrix"], moved / job["rates"]["bandwidth"])
        yield {
            "shape": f"mlstm B={batch} T={length} H={heads} DK={dk} DV={dv}", "what": label, "ms": ms,
            "peak_bytes": peak_memory(calls[label]), "bound_ms": 1e3 * bound,
        }  # fmt: skip


def time_kernels(job: dict[str, Any]) -> Rows:
    """Each kernel of one forward and backward."""
    calls = forward_and_backward(lambda *x: mlstm(*x, backend="triton"), mlstm_inputs(*job["shape"]))
    if not (GPU and job["repeats"]):
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(5):
            calls["forward+backward"]()
        torch.cuda.synchronize()
    events = sorted(profile.key_averages(), key=lambda event: -event.self_device_time_total)
    for event in events[:14]:
        yield {
            "shape": f"kernels of mlstm {job['shape']}", "what": f"{event.key[:40]} x {event.count // 5}",
            "ms": event.self_device_time_total / 5e3,
        }  # fmt: skip


def time_tiles(job: dict[str, Any]) -> Rows:
    """The shipped tiles of one kernel and others, by the time of the whole pass that it belongs to."""
    from openxlstm.ops.gpu import configurations

    field, inputs = job["field"], mlstm_inputs(*job["shape"])
    shipped = configurations.mlstm(inputs[0].device, inputs[0].dtype)
    backward = field in ("inputs", "state_gradients")

    def variant(change: dict[str, int]) -> Callable[[], dict[str, Call]]:
        tiles = dataclasses.replace(getattr(shipped, field), **change)
        config = dataclasses.replace(shipped, **{field: tiles})

        def both() -> dict[str, Call]:
            configurations.mlstm = lambda *_: config
            pair = forward_and_backward(lambda *x: mlstm(*x, backend="triton"), inputs)
            call = pair["forward+backward" if backward else "forward"]

            def run() -> None:
                configurations.mlstm = lambda *_: config
                call()

            return {"backward" if backward else "forward": run}

        return both

    batch, _, heads, *dims = job["shape"]
    resident = configurations.resident(shipped, inputs[0].device, batch * heads, *dims)
    if not backward and (field == "resident") != resident:  # the other schedule runs
        return
    changes = CANDIDATES[field] if GPU else CANDIDATES[field][:1]
    named = {" ".join(f"{k}={v}" for k, v in change.items()): change for change in changes}
    variants = {
        f"{field}: {name or 'shipped'}": variant(change) for name, change in {"": {}, **named}.items()
    }
    for label, ms in measure(prepared(variants, job), job["repeats"]).items():
        yield {"shape": f"tiles of mlstm {job['shape']}", "what": label, "field": field, "ms": ms}


def graphed(call: Call) -> Call:
    """A CUDA graph of ``call``."""
    from openxlstm.inference.graph_engine import record

    return record(call) if GPU else call


def time_step(job: dict[str, Any]) -> Rows:
    batch, heads, dk, dv = job["shape"]
    inputs = mlstm_inputs(batch, 1, heads, dk, dv, grad=False)
    sizes = ((batch, heads, dk, dv), (batch, heads, dk), (batch, heads))
    state = mLSTMState(*(torch.zeros(s, device=DEVICE) for s in sizes))

    def step() -> None:
        mlstm_advance(*inputs, state, backend="triton")

    variants = {"ours": lambda: {"eager": step}, "ours graphed": lambda: {"CUDA graph": graphed(step)}}
    moved = 2 * 4 * state.c.numel()
    for label, ms in measure(prepared(variants, job), job["repeats"]).items():
        yield {
            "shape": f"step B={batch} H={heads} DK={dk} DV={dv}", "what": label, "ms": ms,
            "bound_ms": moved / job["rates"]["bandwidth"] * 1e3,
        }  # fmt: skip


def time_rnn(job: dict[str, Any]) -> Rows:
    cell, batch, steps, hidden, d = job["shape"]
    heads, dtype = hidden // d, torch.bfloat16 if GPU else torch.float32

    def ours() -> dict[str, Call]:
        x = torch.randn(batch, steps, 4, heads, d, device=DEVICE, dtype=dtype, requires_grad=True)
        weight = (torch.randn(4, heads, d, d, device=DEVICE) / d**0.5).requires_grad_()
        return forward_and_backward(lambda x, w: rnn(cell, x, w, backend="triton"), (x, weight))

    def dense() -> dict[str, Call]:
        layer = torch.nn.LSTM(hidden, hidden, batch_first=True, device=DEVICE, dtype=dtype)
        given = torch.randn(batch, steps, hidden, device=DEVICE, dtype=dtype, requires_grad=True)
        return forward_and_backward(lambda x: layer(x)[0], (given,))

    variants = {"ours": ours, f"cuDNN LSTM, dense, hidden {hidden}, with its input product": dense}
    for label, ms in measure(prepared(variants, job), job["repeats"]).items():
        yield {
            "shape": f"{cell} B={batch} T={steps} {heads} heads of {d}", "what": label, "ms": ms,
            "us_per_step": ms * 1e3 / steps,
        }  # fmt: skip


def time_decode(job: dict[str, Any]) -> Rows:
    """One token of a whole model with random weights, batch 1, under a CUDA graph. The bound: reading the
    weights."""
    from openxlstm.inference import graph_engine

    config = xLSTMLargeConfig(**job["config"])
    with torch.device(DEVICE):
        model = build_model(config).to(torch.bfloat16 if GPU else torch.float32).requires_grad_(False)
    if not GPU:
        graph_engine.why_not, graph_engine.record = lambda _: None, lambda function: function
    engine = graph_engine.GraphEngine(model)
    held = engine.open()
    variants = {"ours": lambda: {"one token": lambda: engine.step([1], held, reuse=True)}}
    weights = parameter_count(config) - config.vocab_size * config.embedding_dim  # the embedding is looked up
    moved = 2 * weights + 2 * state_bytes(config)
    for label, ms in measure(prepared(variants, job), job["repeats"]).items():
        yield {
            "shape": f"decode E={config.embedding_dim} {config.num_blocks} blocks, batch 1", "what": label,
            "ms": ms, "bound_ms": moved / job["rates"]["bandwidth"] * 1e3,
        }  # fmt: skip


def time_block(job: dict[str, Any]) -> Rows:
    """Forward and backward of one residual block under autocast. The bound: its products at the matrix
    rate."""
    from openxlstm.layers.large import mLSTMLargeBlock

    settings = dict(job["config"])
    batch, length = settings.pop("batch"), settings.pop("time")
    config = xLSTMLargeConfig(**settings)
    block = mLSTMLargeBlock(config).to(DEVICE)
    dtype = torch.bfloat16 if GPU else torch.float32
    x = torch.randn(batch, length, config.embedding_dim, device=DEVICE, dtype=dtype, requires_grad=True)
    leaves = [x, *block.parameters()]

    def both() -> None:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
            y = block(x)
        torch.autograd.grad(y.float().sum(), leaves)

    def compiled() -> dict[str, Call]:
        block.compile(fullgraph=True)
        both()
        return {"compiled, forward+backward": both}

    matrices = sum(p.numel() for p in block.parameters() if p.ndim == 2)
    heads = config.num_heads
    cell = least_mlstm_flops(length, heads, config.qk_dim // heads, config.v_dim // heads)
    flops = batch * (6 * matrices * length + cell)
    for name, make in (("eager", lambda: {"forward+backward": both}), ("compiled", compiled)):
        if name == "compiled" and not GPU:
            continue
        for label, ms in measure(prepared({f"ours {name}": make}, job), job["repeats"]).items():
            yield {
                "shape": f"block E={config.embedding_dim} H={heads} B={batch} T={length}", "what": label,
                "ms": ms, "bound_ms": flops / job["rates"]["matrix"] * 1e3,
            }  # fmt: skip


KINDS: dict[str, Callable[[dict[str, Any]], Rows]] = {
    f.__name__: f
    for f in (
        check_mlstm, check_rnn, check_determinism, machine, time_mlstm, time_kernels, time_tiles, time_step,
        time_rnn, time_decode, time_block,
    )
}  # fmt: skip

if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    say(trying=None)
    for result in KINDS[given["kind"]](given):
        say(row=result)
