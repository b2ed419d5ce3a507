"""The global random generators as data: PyTorch's (CPU and accelerators), NumPy's and Python's."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def generator_state(device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """States of all global generators: tensors, and what JSON holds."""
    tensors = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        tensors["accelerator"] = torch.get_device_module(device).get_rng_state()
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    values = {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), position, has_gauss, gauss],  # pyright: ignore[reportAttributeAccessIssue]
    }
    return tensors, values


def restore_generators(tensors: dict[str, Tensor], values: dict[str, Any], device: torch.device) -> None:
    """Put back what :func:`generator_state` gave. A state of a device that is not in use now is left out."""
    torch.set_rng_state(tensors["cpu"])
    if device.type != "cpu" and "accelerator" in tensors:
        torch.get_device_module(device).set_rng_state(tensors["accelerator"])
    version, internal, gauss = values["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = values["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))  # noqa: NPY002
