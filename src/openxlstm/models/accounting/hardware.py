"""What devices can do, from their makers' data sheets, and the roofline."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from openxlstm.config import nearest_name


@dataclass(frozen=True)
class Device:
    """A device's limits: dense bfloat16 with float32 accumulation, no sparsity."""

    name: str
    peak_flops: float
    """FLOPs per second."""
    bandwidth: float
    """Bytes per second between memory and cores."""
    memory: float
    """Bytes."""


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("a100", 312e12, 2.039e12, 80e9),
        Device("h100", 989e12, 3.35e12, 80e9),
        Device("h200", 989e12, 4.8e12, 141e9),
        Device("b200", 2250e12, 8.0e12, 180e9),
        Device("l40s", 362e12, 0.864e12, 48e9),
        Device("rtx4090", 165e12, 1.008e12, 24e9),
        Device("mi300x", 1307e12, 5.3e12, 192e9),
    )
}
"""SXM or OAM versions where there are several."""


def find_device(name: str) -> Device:
    """The device of this name.

    Raises:
        ValueError: not in :data:`DEVICES`.
    """
    key = name.lower().replace("-", "").replace(" ", "")
    if key not in DEVICES:
        raise ValueError(f"unknown device {name!r}: use {', '.join(DEVICES)}.{nearest_name(key, DEVICES)}")
    return DEVICES[key]


def roofline(intensity: float, peak_flops: float, bandwidth: float, sharpness: float | None = None) -> float:
    """Attainable FLOPs per second at an arithmetic intensity (FLOPs per byte).

    Args:
        intensity: FLOPs per byte.
        peak_flops: FLOPs per second of the cores.
        bandwidth: bytes per second of the memory.
        sharpness: None for the two straight lines, min(peak, bandwidth * intensity). A positive number rounds
            the corner: -log(mean(exp(-s x))) / s over both limits relative to the peak; larger is sharper.

    Raises:
        ValueError: a limit or the intensity is not positive.
    """
    for name, value in (("intensity", intensity), ("peak_flops", peak_flops), ("bandwidth", bandwidth)):
        if not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")
    limits = np.array([1.0, bandwidth * intensity / peak_flops])
    if sharpness is None:
        return float(peak_flops * limits.min())
    if not sharpness > 0:
        raise ValueError(f"sharpness must be positive, or None for straight lines, got {sharpness}")
    low = limits.min()
    soft = low - np.log(np.exp(-sharpness * (limits - low)).mean()) / sharpness
    return float(peak_flops * soft)
