"""The six networks, by name."""

from collections.abc import Callable

from torch import nn

from common.errors import UserError
from models.resnet import resnet18, seresnet18
from models.twistnet import (
    twistnet18,
    twistnet18_first_order,
    twistnet18_no_ais,
    twistnet18_no_spiral,
)

MODELS: dict[str, Callable[[int], nn.Module]] = {
    "resnet18": resnet18,
    "seresnet18": seresnet18,
    "twistnet18": twistnet18,
    "twistnet18_no_spiral": twistnet18_no_spiral,
    "twistnet18_no_ais": twistnet18_no_ais,
    "twistnet18_first_order": twistnet18_first_order,
}


def build_model(name: str, num_classes: int) -> nn.Module:
    """Build a network of MODELS with random weights; models.weights.load_pretrained fills it.

    With num_classes=0 it has no classifier and returns the pooled features, [B, 512].
    Raises UserError for a name that MODELS does not have.
    """
    if name not in MODELS:
        raise UserError(f"--model: there is no model {name!r}; choose from {', '.join(MODELS)}")
    if num_classes < 0:
        raise UserError(f"a network cannot have {num_classes} classes")
    return MODELS[name](num_classes)
