"""GPU kernels: first right, then fast. One run of at most eight minutes prints a table and writes JSON.

    python benchmarks/gpu.py                     everything
    python benchmarks/gpu.py --only correctness  the case table against float64, nothing timed
    python benchmarks/gpu.py --quick             few shapes and repeats

Correctness compares every kernel with float64 on the same rounded inputs, values and gradients, over the case
table of the tests; a failure stops the run before anything is timed. Timings interleave ours with the peers
that are installed (mlstm_kernels, flash-linear-attention, SDPA, a cuDNN LSTM), flush the L2 cache before each
call and report medians, with the bound of the machine (matrix rate and bandwidth measured in the same run)
beside each figure. Sections that do not fit into the time left are named as left out.

Needs a CUDA or ROCm device. Results go to benchmarks/results/gpu/.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from openxlstm.models.accounting import least_mlstm_flops
from openxlstm.ops import mlstm, mlstm_advance, rnn
from openxlstm.ops.rnn.cells import CELLS
from openxlstm.state import mLSTMState

ROOT = Path(__file__).parent.parent
DEVICE = torch.device("cuda")
Call = Callable[[], Any]


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    difference = torch.linalg.vector_norm(actual.detach().double() - expected.detach().double())
    return float(difference / torch.linalg.vector_norm(expected.detach().double()).clamp_min(1e-30))


class Clock:
    """The time budget of the run."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes
        self.left_out: list[str] = []

    def allows(self, name: str, seconds: float) -> bool:
        if time.monotonic() + seconds < self._end:
            return True
        self.left_out.append(name)
        return False


# --- correctness -------------------------------------------------------------------------------------------


def check_mlstm() -> list[dict[str, Any]]:
    """Every case of the tests' table, in every dtype, values and gradients."""
    sys.path.insert(0, str(ROOT / "tests/ops/mlstm"))
    from cases import CASES, run

    tolerances = {torch.float32: (5e-6, 2e-5), torch.float16: (2e-3, 8e-3), torch.bfloat16: (1e-2, 4e-2)}
    rows = []
    for name, case in CASES.items():
        case = case.but(time=max(case.time, 200), qk_dim=max(case.qk_dim, 48), v_dim=max(case.v_dim, 80))
        for dtype, (values, grads) in tolerances.items():
            inputs = {key: x.to(DEVICE) for key, x in case.inputs(dtype).items()}
            exact = {key: x.double() for key, x in inputs.items()}
            with torch.device(DEVICE):
                expected = run(case, exact, "chunkwise")
                actual = run(case, inputs, "triton")
                portable = run(case, inputs, "chunkwise")
            worst = [
                max(relative_error(a[k], e[k]) for k in e) for a, e in zip(actual, expected, strict=True)
            ]
            other = [
                max(relative_error(a[k], e[k]) for k in e) for a, e in zip(portable, expected, strict=True)
            ]
            good = all(
                w < max(tolerance, 2 * o)
                for w, o, tolerance in zip(worst, other, (values, grads), strict=True)
            )
            rows.append({
                "what": f"mlstm {name}", "dtype": str(dtype), "values": worst[0], "gradients": worst[1],
                "good": good,
            })  # fmt: skip
    return rows


def check_rnn() -> list[dict[str, Any]]:
    """Every cell, fused and alternating head dimensions."""
    rows = []
    for cell, kind in CELLS.items():
        for d in (17, 64, 128, 192):
            for dtype, tolerance in ((torch.float32, 2e-5), (torch.bfloat16, 4e-2)):
                g = torch.Generator(DEVICE).manual_seed(0)
                shapes = [
                    (20, 40, len(kind.input_gates), 2, d),
                    (len(kind.recurrent_gates), 2, d, d),
                    (len(kind.bias_gates), 2, d),
                ]
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
                rows.append({
                    "what": f"{cell} D={d}", "dtype": str(dtype), "values": worst, "good": worst < tolerance,
                })  # fmt: skip
    return rows


def check_determinism() -> list[dict[str, Any]]:
    """Three runs, identical bits."""
    q, k, v, i, f = mlstm_inputs(2, 1024, 4, 128, 256)
    runs = []
    for _ in range(3):
        h = mlstm(q, k, v, i, f, backend="triton")
        runs.append([h, *torch.autograd.grad(h.float().square().sum(), (q, k, v, i, f))])
    good = all(torch.equal(a, b) for other in runs[1:] for a, b in zip(runs[0], other, strict=True))
    return [{"what": "mlstm three runs", "dtype": "bits", "values": 0.0, "good": good}]


# --- measuring ---------------------------------------------------------------------------------------------


def mlstm_inputs(batch: int, time: int, heads: int, dk: int, dv: int, grad: bool = True) -> tuple:
    g = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape: int, mean: float = 0.0) -> torch.Tensor:
        x = torch.randn(shape, device=DEVICE, generator=g) + mean
        return x.bfloat16().requires_grad_(grad)

    return (
        normal(batch, time, heads, dk), normal(batch, time, heads, dk), normal(batch, time, heads, dv),
        normal(batch, time, heads), normal(batch, time, heads, mean=3.0),
    )  # fmt: skip


def measure(calls: dict[str, Call], repeats: int) -> dict[str, float]:
    """Median milliseconds of each call, interleaved, L2 flushed before each."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device=DEVICE)
    alive: dict[str, Call] = {}
    for name, call in calls.items():
        try:
            call()
            alive[name] = call
        except Exception as error:
            print(f"  {name}: cannot run here ({type(error).__name__}: {str(error).splitlines()[0][:80]})")
    times: dict[str, list[float]] = {name: [] for name in alive}
    for _ in range(repeats + 3):
        for name, call in alive.items():
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            call()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(t[3:]) for name, t in times.items()}


def peak_memory(call: Call) -> int:
    """Bytes a call allocates at its peak, beyond what was there."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def machine() -> dict[str, float]:
    """bfloat16 matrix rate (FLOP/s) and copy bandwidth (B/s) of this device, measured."""
    a = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    block = torch.empty(1 << 30, dtype=torch.int8, device=DEVICE)
    other = torch.empty_like(block)
    ms = measure({"matrix": lambda: a @ a, "copy": lambda: other.copy_(block)}, 10)
    return {"matrix": 2 * 8192**3 / ms["matrix"] * 1e3, "bandwidth": 2 * (1 << 30) / ms["copy"] * 1e3}


def forward_and_backward(function: Callable[..., torch.Tensor], leaves: tuple) -> dict[str, Call]:
    """The two calls to time: forward without gradients, and forward with backward."""
    dh = torch.randn_like(function(*leaves))

    def forward() -> None:
        with torch.no_grad():
            function(*leaves)

    def both() -> None:
        torch.autograd.grad(function(*leaves), [x for x in leaves if x.requires_grad], dh)

    return {"forward": forward, "forward+backward": both}


def mlstm_peers(q, k, v, i, f) -> dict[str, tuple[Callable, tuple]]:
    """Installed implementations of the same or a comparable layer, with their inputs."""
    found: dict[str, tuple[Callable, tuple]] = {}
    first = tuple(x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v, i, f))
    if importlib.util.find_spec("mlstm_kernels"):
        try:
            from mlstm_kernels.torch import get_mlstm_kernel

            for name, size in (("chunkwise--triton_xl_chunk", 128), ("chunkwise--triton_limit_chunk", 64)):
                kernel = get_mlstm_kernel(name)
                found[f"mlstm_kernels {name}"] = (
                    lambda q, k, v, i, f, kernel=kernel, size=size: kernel(
                        q=q, k=k, v=v, i=i, f=f, chunk_size=size
                    ),
                    first,
                )
        except Exception as error:
            print(f"  mlstm_kernels: cannot be used here ({type(error).__name__})")
    if importlib.util.find_spec("fla"):
        from fla.ops.simple_gla import chunk_simple_gla

        found["fla simple_gla"] = (
            lambda q, k, v, i, f: chunk_simple_gla(q, k, v, torch.nn.functional.logsigmoid(f.float()))[0],
            tuple(x.detach().requires_grad_() for x in (q, k, v, i, f)),
        )
    wide = [x.detach().transpose(1, 2) for x in (v, v, v)]
    attention = tuple(x[..., : min(256, x.shape[-1])].contiguous().requires_grad_() for x in wide)
    found["sdpa causal"] = (
        lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True), attention,
    )  # fmt: skip
    return found


def bench_mlstm(clock: Clock, rates: dict[str, float], quick: bool) -> list[dict[str, Any]]:
    rows = []
    shapes = [
        (8, 8192, 8, 256, 512),
        (1, 65536, 8, 256, 512),
        (16, 4096, 16, 128, 256),
        (128, 512, 16, 128, 256),
    ]
    for batch, length, heads, dk, dv in shapes[: 1 if quick else None]:
        name = f"mlstm B={batch} T={length} H={heads} DK={dk} DV={dv}"
        if not clock.allows(name, 45):
            continue
        q, k, v, i, f = inputs = mlstm_inputs(batch, length, heads, dk, dv)
        variants: dict[str, tuple[Callable, tuple]] = {
            "ours exp": (lambda *x: mlstm(*x, backend="triton"), inputs),
            "ours sigmoid": (lambda *x: mlstm(*x, input_gate="sigmoid", backend="triton"), inputs),
            **mlstm_peers(q, k, v, i, f),
        }
        calls: dict[str, Call] = {}
        for label, (function, leaves) in variants.items():
            try:
                both = forward_and_backward(function, leaves)
            except Exception as error:
                print(
                    f"  {label}: cannot run here ({type(error).__name__}: {str(error).splitlines()[0][:80]})"
                )
                continue
            calls |= {f"{label} | {what}": call for what, call in both.items()}
        times = measure(calls, 3 if quick else 20)
        for label, ms in times.items():
            backward = "backward" in label
            flops = batch * least_mlstm_flops(length, heads, dk, dv, backward=backward)
            widths = 6 * dk + 5 * dv if backward else 2 * dk + 2 * dv  # q, k, v, h and gradients, bfloat16
            bytes_moved = 2 * batch * length * heads * widths
            bound = 1e3 * max(flops / rates["matrix"], bytes_moved / rates["bandwidth"])
            rows.append({
                "shape": name, "what": label, "ms": ms, "peak_bytes": peak_memory(calls[label]),
                "bound_ms": bound,
            })  # fmt: skip
        del calls, variants, inputs, q, k, v, i, f
        torch.cuda.empty_cache()
    return rows


def bench_decode(clock: Clock, rates: dict[str, float], quick: bool) -> list[dict[str, Any]]:
    rows, heads, dk, dv = [], 8, 256, 512
    for batch in (1, 16, 64)[: 1 if quick else None]:
        name = f"step B={batch} H={heads} DK={dk} DV={dv}"
        if not clock.allows(name, 10):
            continue
        inputs = mlstm_inputs(batch, 1, heads, dk, dv, grad=False)
        state = mLSTMState(
            torch.zeros(batch, heads, dk, dv, device=DEVICE), torch.zeros(batch, heads, dk, device=DEVICE),
            torch.zeros(batch, heads, device=DEVICE),
        )  # fmt: skip

        def step(inputs=inputs, state=state) -> None:
            mlstm_advance(*inputs, state, backend="triton")

        for _ in range(3):
            step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        moved = 2 * 4 * state.c.numel()
        for label, ms in measure({"ours": step, "ours, CUDA graph": graph.replay}, 50).items():
            bound = moved / rates["bandwidth"] * 1e3
            rows.append({"shape": name, "what": label, "ms": ms, "bound_ms": bound})
    return rows


def bench_rnn(clock: Clock, _: dict[str, float], quick: bool) -> list[dict[str, Any]]:
    rows, batch, steps, hidden = [], 16, 1024, 768
    for d in (64, 32, 16, 128, 256, 768)[: 1 if quick else None]:
        heads = hidden // d
        for cell in ("lstm", "slstm") if d == 64 else ("lstm",):
            name = f"{cell} B={batch} T={steps} {heads} heads of {d}"
            if not clock.allows(name, 25):
                continue
            x = torch.randn(
                batch, steps, 4, heads, d, device=DEVICE, dtype=torch.bfloat16, requires_grad=True
            )
            weight = (torch.randn(4, heads, d, d, device=DEVICE) / d**0.5).requires_grad_()
            calls = {
                f"ours | {what}": call
                for what, call in forward_and_backward(
                    lambda x, w, cell=cell: rnn(cell, x, w, backend="triton"), (x, weight)
                ).items()
            }
            if d == hidden:
                layer = torch.nn.LSTM(hidden, hidden, batch_first=True, device=DEVICE, dtype=torch.bfloat16)
                given = torch.randn(
                    batch, steps, hidden, device=DEVICE, dtype=torch.bfloat16, requires_grad=True
                )
                calls |= {
                    f"cuDNN LSTM (with input product) | {what}": call
                    for what, call in forward_and_backward(
                        lambda x, layer=layer: layer(x)[0], (given,)
                    ).items()
                }
            for label, ms in measure(calls, 3 if quick else 10).items():
                rows.append({"shape": name, "what": label, "ms": ms, "us_per_step": ms * 1e3 / steps})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    shape = None
    for row in rows:
        if row["shape"] != shape:
            shape = row["shape"]
            print(f"\n{shape}")
        bound = (
            f"bound {row['bound_ms']:8.3f} ms"
            if "bound_ms" in row
            else f"{row['us_per_step']:.2f} us per step"
        )
        memory = f"{row['peak_bytes'] / 1e9:6.2f} GB" if "peak_bytes" in row else ""
        print(f"  {row['what']:60s} {row['ms']:9.3f} ms   {bound} {memory}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", choices=["correctness", "mlstm", "decode", "rnn"])
    p.add_argument("--quick", action="store_true", help="one shape per section, three repeats")
    p.add_argument("--minutes", type=float, default=8.0, help="time budget")
    p.add_argument(
        "--output", type=Path, default=None, help="JSON file (default: results/gpu/DATE-DEVICE.json)"
    )
    arguments = p.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA or ROCm device; this machine has none.")
    clock, name = Clock(arguments.minutes), torch.cuda.get_device_name()
    versions = {
        package: importlib.metadata.version(package)
        for package in ("openxlstm", "torch", "triton", "mlstm_kernels", "flash-linear-attention")
        if importlib.util.find_spec({"flash-linear-attention": "fla"}.get(package, package))
    }
    report: dict[str, Any] = {
        "date": datetime.date.today().isoformat(), "device": name, "versions": versions,
        "command": " ".join(["python", "benchmarks/gpu.py", *sys.argv[1:]]),
    }  # fmt: skip
    if arguments.only in (None, "correctness"):
        checks = check_mlstm() + check_rnn() + check_determinism()
        report["correctness"] = checks
        bad = [row for row in checks if not row["good"]]
        print(f"correctness: {len(checks) - len(bad)} of {len(checks)} within tolerance")
        for row in bad:
            print("  WRONG", row)
        if bad:
            sys.exit("nothing is timed until these are right.")
    if arguments.only != "correctness":
        report["machine"] = rates = machine()
        print(f"{name}: {rates['matrix'] / 1e12:.0f} TFLOP/s bfloat16, {rates['bandwidth'] / 1e12:.2f} TB/s")
        for section, run in (("mlstm", bench_mlstm), ("decode", bench_decode), ("rnn", bench_rnn)):
            if arguments.only in (None, section):
                report[section] = run(clock, rates, arguments.quick)
                show(report[section])
    report["left_out"] = clock.left_out
    if clock.left_out:
        print("\nleft out for lack of time:", "; ".join(clock.left_out))
    default = f"{report['date']}-{name.replace(' ', '-')}.json"
    output = arguments.output or Path(__file__).parent / "results" / "gpu" / default
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten: {output}")


if __name__ == "__main__":
    main()
