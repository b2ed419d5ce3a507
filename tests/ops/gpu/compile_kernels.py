"""Compile the shipped kernel configurations for a GPU that need not be here, and read off what they use.

    python tests/ops/gpu/compile_kernels.py sm_90 --only mlstm-bfloat16     one JSON line per kernel

Launches are recorded instead of run, so every kernel is compiled exactly as the operator would launch it on
that architecture: same tiles, same specialisation of strides. Each target needs its own process (compilers
may abort), without TRITON_INTERPRET. ``python tests/ops/gpu/compile_kernels.py --write`` compiles everything
and rewrites the committed table.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
TABLE = Path(__file__).parent / "resources.json"
SHARED_MEMORY = {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
"""Bytes of shared memory a program may use."""
SHOWN = ("kernel", "registers", "spills", "shared", "instructions")


def mlstm(dtype_name: str, *, resident: bool = False) -> None:
    """Training and prefill at the 7B shape, or the forward with the state on the chip at the
    largest DK it takes."""
    import torch

    from openxlstm.ops.gpu import configurations
    from openxlstm.ops.mlstm import triton_backend

    dtype = getattr(torch, dtype_name)
    batch, time, heads, dk, dv = 1, 512, 2, 256, 512
    if resident:
        dk = configurations.mlstm(torch.device("cpu"), dtype).resident.k
        configurations.resident = lambda *_: True
    q, k = (torch.zeros(batch, time, heads, dk, dtype=dtype) for _ in range(2))
    v = torch.zeros(batch, time, heads, dv, dtype=dtype)
    i, f = (torch.zeros(batch, time, heads) for _ in range(2))
    c, n, m = torch.zeros(batch, heads, dk, dv), torch.zeros(batch, heads, dk), torch.zeros(batch, heads)
    inputs = [x.requires_grad_() for x in (q, k, v, i, f, c, n, m)]
    h, *_ = triton_backend.run(*inputs, None, sigmoid=False, normalize=True, eps=1e-6)
    if not resident:
        h.sum().backward()


def step(dtype_name: str) -> None:
    """Decoding at the 7B shape, in slots."""
    import torch

    from openxlstm.ops.mlstm import triton_decode

    dtype = getattr(torch, dtype_name)
    batch, heads, dk, dv = 2, 8, 256, 512
    q, k = (torch.zeros(batch, 1, heads, dk, dtype=dtype) for _ in range(2))
    v = torch.zeros(batch, 1, heads, dv, dtype=dtype)
    i, f = (torch.zeros(batch, 1, heads, dtype=dtype) for _ in range(2))
    c, n, m = torch.zeros(batch, heads, dk, dv), torch.zeros(batch, heads, dk), torch.zeros(batch, heads)
    slots = torch.zeros(batch, dtype=torch.int32)
    triton_decode.advance(q, k, v, i, f, c, n, m, slots, sigmoid=False, normalize=True, eps=1e-6)


def epilogues() -> None:
    """What surrounds the cells when a model decodes: norms, gates, convolutions."""
    import torch

    from openxlstm.ops import causal_convolution, head_norm

    h, o = torch.zeros(2, 1, 8, 512, dtype=torch.bfloat16), torch.zeros(2, 1, 4096, dtype=torch.bfloat16)
    weight = torch.zeros(4096, dtype=torch.bfloat16)
    head_norm(h, weight, gate=o, backend="triton")
    head_norm(o.unsqueeze(-2), weight, center=False, backend="triton")
    options = {"weight_offset": 1.0, "activation": "silu", "skip": o, "skip_weight": weight}
    head_norm(h, weight, gate=o, **options, backend="triton")
    taps = torch.zeros(4096, 4, dtype=torch.bfloat16)
    causal_convolution(o, taps, weight, silu=True, backend="triton")
    causal_convolution(o.expand(2, 64, 4096), taps, weight, silu=True, backend="triton")


def rnn(cell: str, dtype_name: str, d: int) -> None:
    """Training of a recurrent layer of hidden size 768."""
    import torch

    from openxlstm.ops.rnn.cells import CELLS
    from openxlstm.ops.rnn.triton_backend import run

    kind, heads, batch = CELLS[cell], 768 // d, 16
    x = torch.zeros(batch, 2, len(kind.input_gates), heads, d, dtype=getattr(torch, dtype_name))
    weight = torch.zeros(len(kind.recurrent_gates), heads, d, d, requires_grad=True)
    bias = torch.zeros(len(kind.bias_gates), heads, d)
    state = kind.state_type(*(torch.zeros(batch, heads, d) for _ in kind.state_type._fields))
    h, _ = run(kind, x, weight, bias, state, None, None)
    h.sum().backward()


def branches() -> None:
    """Every branch on constants that the other scenarios leave out, at sizes of one and odd ones: what the
    interpreter accepts need not compile."""
    import torch

    from openxlstm.ops import causal_convolution, head_norm
    from openxlstm.ops.gpu import configurations
    from openxlstm.ops.mlstm import triton_backend, triton_decode
    from openxlstm.ops.rnn.cells import CELLS
    from openxlstm.ops.rnn.triton_backend import run as run_rnn

    tables = configurations.resident
    for shape in ((1, 1, 1, 1, 1), (2, 70, 3, 17, 5)):
        batch, time, heads, dk, dv = shape
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            reset = torch.zeros(batch, time, dtype=torch.bool) if dk > 1 else None
            for sigmoid, normalize in ((False, True), (True, True), (True, False)):
                sizes = (dk, dk, dv, None, None)
                tensors = [
                    torch.zeros(batch, time, heads, *([] if d is None else [d]), dtype=dtype) for d in sizes
                ]
                state = (
                    torch.zeros(batch, heads, dk, dv),
                    torch.zeros(batch, heads, dk),
                    torch.zeros(batch, heads),
                )
                options = {"sigmoid": sigmoid, "normalize": normalize, "eps": 1e-6}
                configurations.resident = tables
                leaves = [x.requires_grad_() for x in (*tensors, *state)]
                h, *last = triton_backend.run(*leaves, reset, **options)
                (h.sum() + sum(x.sum() for x in last)).backward()
                configurations.resident = lambda *_: True
                with torch.no_grad():
                    triton_backend.run(*leaves, reset, **options)
                    slots = torch.zeros(batch, dtype=torch.int32) if dk > 1 else None
                    few = [x[:, :3].detach() for x in tensors]
                    triton_decode.advance(*few, *(x.detach() for x in state), slots, **options)
    for batch, time, heads, d in ((1, 1, 1, 1), (2, 5, 3, 17)):
        x = torch.zeros(batch, time, heads, d, dtype=torch.bfloat16)
        vector, rows = torch.zeros(heads * d), x.flatten(-2)
        for options in (
            {"weight": vector, "bias": vector, "gate": rows},
            {"weight": vector, "weight_offset": 1.0, "gate": rows, "skip": rows, "skip_weight": vector,
             "activation": "silu"},
            {"center": False, "skip": rows},
        ):  # fmt: skip
            head_norm(x, **options, backend="triton")
        reset = torch.zeros(batch, time, dtype=torch.bool)
        for taps, bias, silu, cuts in (
            (1, None, False, None),
            (4, vector, True, None),
            (4, None, True, reset),
        ):
            causal_convolution(
                rows, torch.zeros(heads * d, taps), bias, silu=silu, reset=cuts, backend="triton"
            )
    for cell, kind in CELLS.items():
        for d, dtype in ((1, torch.float32), (17, torch.float16), (130, torch.bfloat16)):
            x = torch.zeros(3, 2, len(kind.input_gates), 1, d, dtype=dtype)
            weight = torch.zeros(len(kind.recurrent_gates), 1, d, d)
            state = kind.state_type(*(torch.zeros(3, 1, d) for _ in kind.state_type._fields))
            reset = torch.zeros(3, 2, dtype=torch.bool)
            floor = 1.0 if cell == "slstm" else None
            run_rnn(kind, x, weight, None, state, reset, floor)
            h, _ = run_rnn(kind, x, weight.requires_grad_(), None, state, reset, floor)
            h.sum().backward()


SCENARIOS: dict[str, Callable[[], None]] = {
    "mlstm-bfloat16": lambda: mlstm("bfloat16"),
    "mlstm-float16": lambda: mlstm("float16"),
    "mlstm-float32": lambda: mlstm("float32"),
    "resident-bfloat16": lambda: mlstm("bfloat16", resident=True),
    "resident-float16": lambda: mlstm("float16", resident=True),
    "resident-float32": lambda: mlstm("float32", resident=True),
    "step-bfloat16": lambda: step("bfloat16"),
    "epilogues-bfloat16": epilogues,
    "slstm-64-bfloat16": lambda: rnn("slstm", "bfloat16", 64),
    "slstm-128-bfloat16": lambda: rnn("slstm", "bfloat16", 128),
    "slstm-256-bfloat16": lambda: rnn("slstm", "bfloat16", 256),
    "lstm-128-bfloat16": lambda: rnn("lstm", "bfloat16", 128),
    "gru-128-bfloat16": lambda: rnn("gru", "bfloat16", 128),
    "elman-128-bfloat16": lambda: rnn("elman", "bfloat16", 128),
    "slstm-32-float32": lambda: rnn("slstm", "float32", 32),
}
UNRECORDED: dict[str, Callable[[], None]] = {"branches": branches}
"""Need only compile, within the budget."""


def compile_scenario(target: str, scenario: str) -> list[dict[str, Any]]:
    """What every kernel of a scenario compiles to for ``target``, in order of launch."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from openxlstm.ops.gpu import configurations, support

    gpu = GPUTarget("hip", target, 64) if target.startswith("gfx") else GPUTarget("cuda", int(target[3:]), 32)
    found: dict[tuple, dict[str, Any]] = {}

    def compile_launch(kernel: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        names = [p.name for p in kernel.params]
        values = dict(zip(names, args, strict=False))
        values |= {name: options.pop(name) for name in list(options) if name in names}
        signature, constants, attributes = _specialise(kernel, values)
        key = (kernel.fn.__name__, str(signature), str(constants), str(options))
        if key in found:
            return
        source = triton.compiler.ASTSource(
            fn=kernel, signature=signature, constexprs=constants, attrs=attributes
        )
        compiled = triton.compile(source, target=gpu, options=options)
        tiles = {n: values[n] for n in names if n.isupper()}
        found[key] = {
            "target": target,
            "scenario": scenario,
            "kernel": kernel.fn.__name__,
            "options": {**tiles, **options},
            **_resources(compiled, target),
        }

    JITFunction.run = compile_launch
    configurations.architecture = lambda index: target
    support.interpreted = lambda: True  # tensors on the CPU are welcome: nothing runs
    (SCENARIOS | UNRECORDED)[scenario]()
    return list(found.values())


def _specialise(kernel: Any, values: dict[str, Any]) -> tuple[dict, dict, dict]:
    """Signature, constants and alignment attributes of a launch, as Triton's own launcher derives them."""
    import torch

    signature, constants, attributes = {}, {}, {}
    types = {
        torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64",
        torch.int32: "*i32", torch.int64: "*i64", torch.bool: "*i1", torch.uint8: "*u8", torch.int8: "*i8",
    }  # fmt: skip
    for position, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        special = isinstance(value, int) and not parameter.do_not_specialize
        aligned = isinstance(value, torch.Tensor) or (special and value % 16 == 0)
        if parameter.is_constexpr or value is None or (special and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(position,)] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = types[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        if aligned:
            attributes[(position,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _resources(compiled: Any, target: str) -> dict[str, Any]:
    """Registers, spilled bytes, shared memory and instruction kinds."""
    shared = compiled.metadata.shared
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        number = lambda key: int(re.search(rf"\.{key}:\s+(\d+)", text).group(1))  # noqa: E731
        return {
            "registers": number("vgpr_count"),
            "spills": number("vgpr_spill_count"),
            "shared": shared,
            "instructions": {"mfma": text.count("v_mfma")},
        }
    tools = Path(sys.modules["triton"].__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    ptx = compiled.asm["ptx"]
    kinds = {
        "wgmma": "wgmma.mma_async",
        "tcgen05": "tcgen05.mma",
        "mma": "mma.sync",
        "cp.async": "cp.async.c",
        "bulk": "cp.async.bulk.tensor",
    }
    return {
        "registers": int(re.search(r"REG:(\d+)", usage).group(1)),
        "spills": int(re.search(r"STACK:(\d+)", usage).group(1)),
        "shared": shared,
        "instructions": {name: ptx.count(text) for name, text in kinds.items() if ptx.count(text)},
    }


def in_process(target: str, scenario: str) -> list[dict[str, Any]]:
    """:func:`compile_scenario` in a process of its own. Raises ``RuntimeError`` with its last words."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, __file__, target, "--only", scenario],
        capture_output=True,
        text=True,
        env=environment,
    )
    if result.returncode != 0:
        raise RuntimeError(
            f"{scenario} for {target} ended with {result.returncode}:\n{result.stderr[-3000:]}"
        )
    return [json.loads(line) for line in result.stdout.splitlines()]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("target", nargs="?", choices=TARGETS)
    p.add_argument("--only", choices=list(SCENARIOS | UNRECORDED))
    p.add_argument("--write", action="store_true", help="compile everything and rewrite the table")
    arguments = p.parse_args()
    chosen = [arguments.only] if arguments.only else list(SCENARIOS)
    if arguments.target and len(chosen) == 1 and not arguments.write:
        for row in compile_scenario(arguments.target, chosen[0]):
            print(json.dumps(row, default=str))
        return
    import triton

    rows: list[dict[str, Any]] = []
    for target in [arguments.target] if arguments.target else TARGETS:
        for scenario in chosen:
            rows += in_process(target, scenario)
            for row in rows[-12:]:
                if (row["target"], row["scenario"]) == (target, scenario):
                    print(target, scenario, *(row[k] for k in SHOWN))
    if arguments.write:
        if TABLE.exists():  # keep what was not compiled now
            now = {(row["target"], row["scenario"]) for row in rows}
            old = json.loads(TABLE.read_text())["rows"]
            rows = [row for row in old if (row["target"], row["scenario"]) not in now] + rows
        rows.sort(key=lambda row: (row["target"], row["scenario"]))
        lines = ",\n".join("  " + json.dumps(row) for row in rows)
        TABLE.write_text(f'{{"triton": "{triton.__version__}", "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
