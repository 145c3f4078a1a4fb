"""The six networks for torch.hub.

    model = torch.hub.load("path/to/this/folder", "twistnet18", source="local",
                           num_classes=47, pretrained=True)

pretrained   False: newly started.  True or "auto": weights/<name>_imagenet.pt of the working
             folder, then of this one, then what train.py would take.  A path: that file.
num_classes  left out: a trained network keeps its own classes and classifier, a new one has 1000.
             N: a new classifier of N classes, also where the file has as many.
             0: none, model(images) is the pooled features, B x 512.

Images are float32, B x 3 x H x W, ImageNet's mean and standard deviation taken out.
model.forward_features(images) is the last feature map, B x 512 x H/32 x W/32.
"""

import os as _os
from pathlib import Path as _Path

import models as _models

_OURS = _Path(__file__).resolve().parent / "models" / "__init__.py"
if _Path(_models.__file__ or "").resolve() != _OURS:
    raise ImportError(
        f"another module named models ({_models.__spec__.origin or _models.__name__}) is imported "
        f"already and hides {_OURS.parent}: load this network first, or in a process of its own"
    )

import models.weights as _weights  # noqa: E402 (after the check that models is this one)

dependencies = ["torch", "torchvision"]


def resnet18(pretrained=False, num_classes=None):
    """ResNet-18; pretrained, num_classes: see the file's beginning."""
    return _build("resnet18", pretrained, num_classes)


def seresnet18(pretrained=False, num_classes=None):
    """ResNet-18 with squeeze-and-excitation; pretrained, num_classes: see the file's beginning."""
    return _build("seresnet18", pretrained, num_classes)


def twistnet18(pretrained=False, num_classes=None):
    """TwistNet-18; pretrained, num_classes: see the file's beginning."""
    return _build("twistnet18", pretrained, num_classes)


def twistnet18_no_spiral(pretrained=False, num_classes=None):
    """TwistNet-18 whose products are of a position with itself."""
    return _build("twistnet18_no_spiral", pretrained, num_classes)


def twistnet18_no_ais(pretrained=False, num_classes=None):
    """TwistNet-18 without adaptive interaction selection."""
    return _build("twistnet18_no_ais", pretrained, num_classes)


def twistnet18_first_order(pretrained=False, num_classes=None):
    """TwistNet-18 without products."""
    return _build("twistnet18_first_order", pretrained, num_classes)


def _build(name, pretrained, num_classes):
    pretrained = {True: "auto", False: "none", None: "none"}.get(pretrained, pretrained)
    pretrained = _os.fspath(pretrained)
    keep_head = num_classes is None and pretrained != "none"
    if num_classes is None:
        num_classes = _count_classes(name, pretrained)
    model = _models.build_model(name, num_classes)
    _weights.load_pretrained(model, name, pretrained, keep_head=keep_head)
    return model


def _count_classes(name, pretrained):
    """The classes of the weights' own classifier; 1000 for a new network and for torchvision's."""
    if pretrained == "none":
        return 1000
    path = _weights.find_weights(name) if pretrained == "auto" else pretrained
    if path is None:
        return 1000
    head = _weights.read_weights(_Path(path)).tensors.get("fc.weight")
    if head is None or head.dim() != 2:
        raise _models.UserError(f"{path} has no classifier (fc.weight): give num_classes")
    return len(head)
