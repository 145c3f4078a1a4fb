"""The six networks by name, and timm's as timm/NAME."""

import argparse
from collections.abc import Callable
from functools import partial

from torch import nn

from common.errors import UserError
from models.resnet import ResNet, SEBasicBlock, set_stochastic_depth
from models.timm_models import PREFIX, build_timm, find_config, is_timm
from models.twistnet import TwistNet

MODELS: dict[str, Callable[[int], nn.Module]] = {
    "resnet18": ResNet,
    "seresnet18": partial(ResNet, block=SEBasicBlock),
    "twistnet18": TwistNet,
    "twistnet18_no_spiral": partial(TwistNet, spiral=False),
    "twistnet18_no_ais": partial(TwistNet, ais=False),
    "twistnet18_first_order": partial(TwistNet, second_order=False),
}
CHOICES = f"{', '.join(MODELS)}, or {PREFIX}NAME for a network of timm (pip install timm)"


def check_model_name(name: str) -> None:
    """Raise UserError for a name that is neither in MODELS nor timm/ and a network of timm."""
    if is_timm(name):
        find_config(name)
    elif name not in MODELS:
        raise UserError(f"--model: there is no model {name!r}; choose from {CHOICES}")


def model_name(text: str) -> str:
    """An argparse type: the name of a network."""
    try:
        check_model_name(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def add_model_flag(group) -> None:
    group.add_argument(
        "--model",
        default="twistnet18",
        type=model_name,
        metavar="NAME",
        help=f"network to train: {CHOICES}",
    )


def build_model(
    name: str, num_classes: int, *, img_size: int | None = None, stochastic_depth: float = 0.0
) -> nn.Module:
    """Build a network with random weights; models.weights.load_pretrained fills it.

    Args:
        name: one of MODELS, or timm/NAME.
        num_classes: 0 leaves the classifier out, and the network returns its pooled features
            ([B, 512] for ours).
        img_size: side of the images in pixels, for those of timm's networks whose size is fixed.
        stochastic_depth: share of images that skip the last residual branch in training; with 0
            timm's networks keep their own.

    Raises UserError for an unknown name, and for an img_size that the network does not take.
    """
    check_model_name(name)
    if num_classes < 0:
        raise UserError(f"a network cannot have {num_classes} classes")
    if is_timm(name):
        return build_timm(name, num_classes, img_size=img_size, stochastic_depth=stochastic_depth)
    model = MODELS[name](num_classes)
    set_stochastic_depth(model, stochastic_depth)
    return model


def has_fixed_size(name: str) -> bool:
    """Whether a network takes only the image size that it was built for."""
    return is_timm(name) and bool(find_config(name).fixed_input_size)
