"""The optimizer's parameter groups and the learning rate, a pure function of the step."""

import math

import torch
from torch import nn


def make_sgd(model: nn.Module, *, lr: float, weight_decay: float) -> torch.optim.SGD:
    """SGD with Nesterov momentum 0.9. Weights of convolutions and linear layers decay, alone.

    They are told by rank: BatchNorm and GroupNorm scales, biases and gates have one dimension or
    none, and STCI's channel scales are one-dimensional too.
    """
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": weight_decay},
              {"params": others, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True, fused=True)


def lr_at(step: int, *, base: float, total_steps: int, warmup_steps: int) -> float:
    """Linear warm-up to `base` over `warmup_steps`, then a cosine that reaches 0 at `total_steps`.

    >>> [round(lr_at(s, base=1.0, total_steps=6, warmup_steps=2), 3) for s in range(7)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return base * 0.5 * (1 + math.cos(math.pi * progress))


def warmup_steps(warmup_epochs: float, *, steps_per_epoch: int, total_steps: int) -> int:
    """Steps of warm-up; a tenth of the run when the warm-up asked for is not shorter than it."""
    steps = round(warmup_epochs * steps_per_epoch)
    return steps if steps < total_steps else total_steps // 10
