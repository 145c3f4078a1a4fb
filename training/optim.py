"""The optimizer's parameter groups and the learning rate, a pure function of the step."""

import math
from collections.abc import Callable

import torch
from torch import nn

from common.errors import UserError


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Weights of convolutions and linear layers decay, alone.

    They are told by rank: BatchNorm and GroupNorm scales, biases and gates have one dimension or
    none, and STCI's channel scales are one-dimensional too.
    """
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def make_sgd(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.SGD:
    """SGD with Nesterov momentum 0.9."""
    return torch.optim.SGD(
        decay_groups(model, weight_decay), lr=lr, momentum=0.9, nesterov=True, fused=True
    )


def make_lamb(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """timm's LAMB, which clips the norm of all gradients to 1. UserError where timm is missing."""
    try:
        from timm.optim import Lamb
    except ImportError as error:
        raise UserError(f"LAMB is timm's ({error}): pip install timm") from error
    return Lamb(decay_groups(model, weight_decay), lr=lr)


OPTIMIZERS = {"sgd": make_sgd, "lamb": make_lamb}


def lr_at(step: int, *, base: float, total_steps: int, warmup_steps: int) -> float:
    """Linear warm-up to `base` over `warmup_steps`, then a cosine that reaches 0 at `total_steps`.

    >>> [round(lr_at(s, base=1.0, total_steps=6, warmup_steps=2), 3) for s in range(7)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return base * 0.5 * (1 + math.cos(math.pi * progress))


def timm_lr_at(
    step: int,
    *,
    base: float,
    total_steps: int,
    warmup_steps: int,
    warmup_lr: float,
    min_lr: float,
) -> float:
    """timm's CosineLRScheduler: a cosine to `min_lr` from step 0 on, begun in the warm-up's shade.

    The warm-up rises from `warmup_lr` towards `base`, which is not reached.
    """
    if step < warmup_steps:
        return warmup_lr + step * (base - warmup_lr) / warmup_steps
    return min_lr + (base - min_lr) * 0.5 * (1 + math.cos(math.pi * step / total_steps))


def make_schedule(
    recipe: dict, *, base: float, total_steps: int, warmup_steps: int
) -> Callable[[int], float]:
    """The learning rate by step that a recipe names."""
    settings = {"base": base, "total_steps": total_steps, "warmup_steps": warmup_steps}
    if recipe["schedule"] == "timm's cosine":
        settings |= {"warmup_lr": recipe["warmup_lr"], "min_lr": recipe["min_lr"]}
        return lambda step: timm_lr_at(step, **settings)
    return lambda step: lr_at(step, **settings)


def warmup_steps(warmup_epochs: float, *, steps_per_epoch: int, total_steps: int) -> int:
    """Steps of warm-up; a tenth of the run when the warm-up asked for is not shorter than it."""
    steps = round(warmup_epochs * steps_per_epoch)
    return steps if steps < total_steps else total_steps // 10
