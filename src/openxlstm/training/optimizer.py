"""AdamW over the model's own parameter groups, and clipping by the global gradient norm."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from openxlstm.training.config import TrainerConfig

STATE_SEPARATOR = "/"


def build_optimizer(model: nn.Module, config: TrainerConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on the parameters that ``model.parameter_groups`` names for it.

    Raises:
        ValueError: the groups leave out a trainable parameter or hold one twice.
    """
    groups = model.parameter_groups(config.weight_decay)  # pyright: ignore[reportCallIssue]
    groups = [{**group, "params": list(group["params"])} for group in groups]  # pyright: ignore
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for key, name in trainable.items() if key not in set(grouped)]
    if missing or len(set(grouped)) != len(grouped):
        problem = f"leave out {missing[0]!r}" if missing else "hold a parameter twice"
        raise ValueError(f"the parameter groups of {type(model).__name__} {problem}")
    kinds = {parameter.device.type for group in groups for parameter in group["params"]}
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        fused=kinds <= {"cpu", "cuda"},
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use ``rate`` for every group from now on."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Euclidean norm of all gradients together, a scalar. Sharded gradients give the norm of the whole."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # pyright: ignore


def clip_gradients(parameters: Iterable[nn.Parameter], norm: float, limit: float) -> None:
    """Scale the gradients by ``limit / norm`` if ``norm`` exceeds ``limit``; a ``limit`` of 0 means never."""
    if limit and norm > limit:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(limit / norm)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as named tensors, ``"exp_avg/blocks.0.norm.weight"``, in a stable order."""
    return {
        f"{entry}{STATE_SEPARATOR}{name}": value
        for name, parameter in model.named_parameters()
        for entry, value in sorted(optimizer.state.get(parameter, {}).items())
    }


def load_optimizer_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    """Put back what :func:`optimizer_tensors` gave. Rates, betas and weight decay stay as configured now.

    Raises:
        ValueError: the tensors belong to other parameters or other shapes.
    """
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for key, value in tensors.items():
        entry, _, name = key.partition(STATE_SEPARATOR)
        parameter = parameters.get(name)
        if parameter is None:
            raise ValueError(f"the optimiser state has an entry for {name!r}, which the model does not have")
        if value.dim() and value.shape != parameter.shape:
            raise ValueError(
                f"the optimiser state of {name!r} has shape {tuple(value.shape)}, "
                f"the parameter {tuple(parameter.shape)}"
            )
        if value.dim():
            value = value.to(parameter.device, parameter.dtype)
        else:
            value = value.to(parameter.device)
        optimizer.state[parameter][entry] = value
