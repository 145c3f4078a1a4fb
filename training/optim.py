"""The optimizer with its parameter groups, and the learning rate as a pure function of the step."""

import functools
import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from common.optional import import_optional


def parameter_groups(
    model: nn.Module, weight_decay: float, lr_factors: Mapping[str, float] | None = None
) -> list[dict]:
    """Split the parameters: weights of convolutions and linear layers decay, all others do not.

    They are told apart by rank: normalisation scales, biases, gates and STCI's channel scales have
    one dimension or none. A network of timm also names what else must not decay, such as position
    embeddings. Parameters named in `lr_factors` have groups of their own, with the factor of their
    learning rate as "lr_factor" (see Trainer.step).
    """
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    lr_factors = lr_factors or {}
    groups = []
    for factor in [1.0, *sorted(set(lr_factors.values()) - {1.0})]:
        named = [
            (name, p) for name, p in model.named_parameters() if lr_factors.get(name, 1.0) == factor
        ]
        decayed = [p for name, p in named if p.ndim >= 2 and name not in exempt]
        others = [p for name, p in named if p.ndim < 2 or name in exempt]
        groups += [
            {"params": decayed, "weight_decay": weight_decay, "lr_factor": factor},
            {"params": others, "weight_decay": 0.0, "lr_factor": factor},
        ]
    return groups


def make_sgd(groups: list[dict], recipe: dict, lr: float) -> torch.optim.SGD:
    optimizer = torch.optim.SGD(
        groups, lr=lr, momentum=recipe["momentum"], nesterov=recipe["nesterov"], fused=True
    )
    # Momentum starts from explicit zeros. Fused SGD would allocate it in the first step, and leave
    # it uninitialised when that step overflows in fp16 and is skipped.
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def make_lamb(groups: list[dict], recipe: dict, lr: float) -> torch.optim.Optimizer:
    """timm's LAMB (You et al. 2020, arXiv:1904.00962), which clips the norm of all gradients to 1.

    Raises UserError where timm is not installed.
    """
    return import_optional("timm.optim", purpose="--recipe a1 (LAMB)").Lamb(groups, lr=lr)


OPTIMIZERS = {"sgd": make_sgd, "lamb": make_lamb}


def make_optimizer(
    recipe: dict, model: nn.Module, *, lr: float, lr_factors: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """The optimizer that a recipe describes; for lr_factors see parameter_groups."""
    groups = parameter_groups(model, recipe["weight_decay"], lr_factors)
    return OPTIMIZERS[recipe.get("optimizer", "sgd")](groups, recipe, lr)


def cosine_lr_at(step: int, *, base: float, total_steps: int, warmup_steps: int) -> float:
    """Linear warm-up to `base` over `warmup_steps`, then a cosine that reaches 0 at `total_steps`.

    >>> [round(cosine_lr_at(s, base=1.0, total_steps=6, warmup_steps=2), 3) for s in range(7)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return base * 0.5 * (1 + math.cos(math.pi * progress))


def timm_cosine_lr_at(
    step: int, *, base: float, total_steps: int, warmup_steps: int, warmup_lr: float, min_lr: float
) -> float:
    """timm's CosineLRScheduler with warmup_prefix=False.

    The cosine to `min_lr` starts at step 0; the warm-up from `warmup_lr` towards `base` overrides
    its first steps.
    """
    if step < warmup_steps:
        return warmup_lr + step * (base - warmup_lr) / warmup_steps
    return min_lr + (base - min_lr) * 0.5 * (1 + math.cos(math.pi * step / total_steps))


def linear_lr_at(step: int, *, base: float, total_steps: int, warmup_steps: int) -> float:
    """Linear warm-up to `base` over `warmup_steps`, then a line that reaches 0 at `total_steps`.

    >>> [round(linear_lr_at(s, base=1.0, total_steps=6, warmup_steps=2), 3) for s in range(7)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    return base * (total_steps - step) / max(1, total_steps - warmup_steps)


SCHEDULES = {"cosine": cosine_lr_at, "linear": linear_lr_at, "timm_cosine": timm_cosine_lr_at}


def make_schedule(
    recipe: dict, *, base: float, total_steps: int, warmup_steps: int
) -> Callable[[int], float]:
    """The learning rate that a recipe describes, as a function of the global step."""
    options = {name: recipe[name] for name in ("warmup_lr", "min_lr") if name in recipe}
    return functools.partial(
        SCHEDULES[recipe.get("schedule", "cosine")],
        base=base,
        total_steps=total_steps,
        warmup_steps=warmup_steps,
        **options,
    )


def count_warmup_steps(warmup_epochs: float, *, steps_per_epoch: int, total_steps: int) -> int:
    """Steps of warm-up; a tenth of the run where the recipe's warm-up is not shorter than it."""
    steps = round(warmup_epochs * steps_per_epoch)
    return steps if steps < total_steps else total_steps // 10
