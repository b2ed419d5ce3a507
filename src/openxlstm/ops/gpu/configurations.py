"""Tile sizes of the Triton kernels per architecture: a shipped table, no tuning at run time.

An entry belongs to an architecture (else ``default``) and the dtype of the inputs. Tiles are cut to the
call's dimensions, so small problems get small tiles. docs/kernels.md explains the choices; the table
tests/ops/gpu/resources.json holds what each entry compiles to (registers, spills, shared memory).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch


@dataclass(frozen=True)
class Tiles:
    """How one kernel is cut: tile extents and the compiler's two dials."""

    time: int = 64
    """Positions per tile of columns (and of rows, where the kernel has one extent for both)."""
    rows: int = 64
    """Positions per tile of rows."""
    k: int = 64
    """Query/key dimensions per tile."""
    v: int = 64
    """Value dimensions per tile."""
    warps: int = 4
    stages: int = 2

    @property
    def options(self) -> dict[str, int | bool]:
        """Launch options. Fused multiply-adds are named because Triton's default differs by version."""
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}

    def cut(self, time: int, dk: int, dv: int) -> Tiles:
        """No larger than the problem (powers of two, at least 16, which matrix instructions need)."""
        return replace(
            self,
            time=min(self.time, tile_of(time)),
            rows=min(self.rows, tile_of(time)),
            k=min(self.k, tile_of(dk)),
            v=min(self.v, tile_of(dv)),
        )


def tile_of(extent: int) -> int:
    """Smallest tile extent (a power of two, at least 16) that covers ``extent``."""
    return max(16, power_of_two(extent))


def power_of_two(extent: int) -> int:
    """Smallest power of two that covers ``extent``, at least 1."""
    return 1 << max(0, extent - 1).bit_length()


@dataclass(frozen=True)
class MLSTM:
    """Chunk lengths and tiles of the mLSTM kernels."""

    forward_chunk: int = 256
    backward_chunk: int = 64
    states: Tiles = Tiles()
    output: Tiles = Tiles(v=128)
    state_gradients: Tiles = Tiles()
    inputs: Tiles = Tiles(warps=8)
    scores: Tiles = Tiles()
    """Scores of the schedule with the state on the chip, and its vectors n; ``time`` as in ``resident``."""
    resident: Tiles = Tiles(k=256, warps=8)
    """The forward schedule with the state on the chip; ``k`` is the largest query/key dimension it takes."""


_FLOAT32 = MLSTM(
    forward_chunk=128,
    backward_chunk=32,
    states=Tiles(time=32, stages=1),
    output=Tiles(time=32, rows=32, k=32, stages=1),
    state_gradients=Tiles(time=32),
    inputs=Tiles(time=32, k=32, v=32, stages=1),
    scores=Tiles(time=32, k=32, stages=1),
    resident=Tiles(time=32, k=64, v=32, warps=8, stages=1),
)
_FLOAT16 = MLSTM(inputs=Tiles(v=32, warps=8), resident=Tiles(k=64, warps=8))  # its states are float32
_TWO_WARP_GROUPS = Tiles(rows=128, v=128, warps=8, stages=3)

MLSTM_TABLE: dict[tuple[str, str], MLSTM] = {
    ("default", "bfloat16"): MLSTM(resident=Tiles(k=128, warps=8)),  # 99 KB of shared memory is all some have
    ("default", "float16"): _FLOAT16,
    ("default", "float32"): _FLOAT32,
    ("sm_80", "bfloat16"): MLSTM(),
    ("sm_80", "float32"): replace(_FLOAT32, state_gradients=Tiles(time=32, stages=1)),
    ("sm_90", "bfloat16"): MLSTM(output=_TWO_WARP_GROUPS),
    ("sm_90", "float16"): replace(_FLOAT16, output=_TWO_WARP_GROUPS),
    ("sm_100", "bfloat16"): MLSTM(output=_TWO_WARP_GROUPS),
    ("sm_100", "float16"): replace(_FLOAT16, output=_TWO_WARP_GROUPS, resident=Tiles(k=64)),
    ("sm_100", "float32"): replace(_FLOAT32, output=Tiles(time=32, rows=32, k=16, stages=1)),
    ("gfx942", "bfloat16"): MLSTM(resident=Tiles(k=64, warps=8, stages=1)),
    ("gfx942", "float16"): replace(_FLOAT16, resident=Tiles(k=64, warps=8, stages=1)),
}


@cache
def architecture(device: torch.device) -> str:
    """Name of a device's architecture as in the tables: ``sm_90``, ``gfx942``; a CPU's is ``default``."""
    if device.type != "cuda":
        return "default"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def mlstm(device: torch.device, dtype: torch.dtype) -> MLSTM:
    """The entry for a device and the dtype of q, k, v."""
    kind = str(dtype).removeprefix("torch.")
    return MLSTM_TABLE.get((architecture(device), kind)) or MLSTM_TABLE["default", kind]


def resident(config: MLSTM, device: torch.device, pairs: int, dk: int, dv: int) -> bool:
    """Whether the state stays on the chip: it fits, and its programs (heads x tiles of value columns) leave
    at most a quarter of the multiprocessors idle while they walk over the sequence."""
    if device.type != "cuda" or dk > config.resident.k:
        return False
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return pairs * -(-dv // min(config.resident.v, tile_of(dv))) >= 0.75 * processors


def step(device: torch.device) -> Tiles:
    """Tiles of the step kernel: 64 x 32 of C per turn, so 128 bytes per row."""
    return Tiles(k=64, v=32, warps=4, stages=2)


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory one program may use; an H100's where the device is not here."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return 232448
    properties = torch.cuda.get_device_properties(device)
    name = "shared_memory_per_block" if torch.version.hip is not None else "shared_memory_per_block_optin"
    return getattr(properties, name)


def fused_head_dim(device: torch.device, dtype: torch.dtype) -> int:
    """Largest head dimension of the recurrent operator whose matrices stay on the chip.

    At 128 four matrices of 16-bit numbers and what a step needs beside them take 136 KB: data-centre GPUs
    have that much, the 99 KB of others and the 64 KB of an AMD compute unit do not. Without tensor cores
    float32 operands stay in registers.
    """
    if dtype == torch.float32:
        return 32
    return 128 if shared_memory(device) >= _FUSED_128 and not architecture(device).startswith("gfx") else 64


_FUSED_128 = 139264  # bytes, see slstm-128 in resources.json


def rnn(width: int) -> Tiles:
    """Warps of the recurrent kernels for tiles of ``width`` dimensions: enough registers for the matrices."""
    return Tiles(warps=8 if width > 64 else 4, stages=1)
