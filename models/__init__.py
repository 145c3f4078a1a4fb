"""What is trained: six networks by name."""

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


def build_model(
    name: str, num_classes: int, pretrained: str = "auto", keep_head: bool = False
) -> nn.Module:
    """Build a network of MODELS, with weights: "auto" finds them, "none" starts new, or a path.

    The classifier always starts new unless keep_head; num_classes=0 has none. The result's
    weights_origin says what was loaded: {"source", "sha256", "tensors_loaded"}.
    """
    from models.weights import load_pretrained  # here, because it reads MODELS and UserError

    if name not in MODELS:
        raise UserError(f"--model: no model {name!r}; there are {', '.join(MODELS)}")
    if num_classes < 0:
        raise UserError(f"a network cannot have {num_classes} classes")
    model = MODELS[name](num_classes)
    model.weights_origin = load_pretrained(model, name, str(pretrained), keep_head=keep_head)
    return model
