"""The six networks for torch.hub.

    model = torch.hub.load("path/to/this/folder", "twistnet18", source="local",
                           num_classes=47, pretrained=True)

pretrained   False: random weights.  True or "auto": weights/<name>_imagenet.pt in the working
             folder, then in this one, then what train.py would take.  A path: that file.
             Weights that fill only a part of the network need num_classes.
num_classes  Left out: trained weights keep their own classes and classifier; without weights, 1000.
             N: a new classifier of N classes, also where the file has as many.
             0: no classifier; model(images) returns the pooled features, [B, 512].

Images are float32, [B, 3, H, W], normalised with ImageNet's mean and standard deviation.
model.forward_features(images) returns the last feature map, [B, 512, H/32, W/32].
"""

import importlib as _importlib
import os as _os
from pathlib import Path as _Path

_HERE = _Path(__file__).resolve().parent
for _name in ("common", "models"):
    _file = getattr(_importlib.import_module(_name), "__file__", None)
    if _Path(_file or "").resolve() != _HERE / _name / "__init__.py":
        raise ImportError(
            f"another module named {_name} ({_file}) is already imported and hides "
            f"{_HERE / _name}: load this network first, or in a process of its own"
        )

import models as _models  # noqa: E402 (after the check that they are this folder's)
import models.weights as _weights  # noqa: E402

_ARGUMENTS = __doc__.split("\n\n", 2)[2]  # what follows the example above, for torch.hub.help
dependencies = ["torch", "torchvision"]


def _make_entry(name, summary):
    """A function that torch.hub finds by the name that it is assigned to."""

    def entry(pretrained=False, num_classes=None):
        pretrained = {True: "auto", False: "none", None: "none"}.get(pretrained, pretrained)
        pretrained = _os.fspath(pretrained)
        keep_head = num_classes is None and pretrained != "none"
        if num_classes is None:
            num_classes = _choose_num_classes(name, pretrained)
        model = _models.build_model(name, num_classes)
        _weights.load_pretrained(model, name, pretrained, keep_head=keep_head)
        return model

    entry.__name__ = entry.__qualname__ = name
    entry.__doc__ = f"{summary}\n\n{_ARGUMENTS}"
    return entry


def _choose_num_classes(name, pretrained):
    """The classes of the weights' own classifier; 1000 for random weights and torchvision's."""
    path = None if pretrained == "none" else _weights.resolve_path(name, pretrained)
    if path is None:
        return 1000
    file = _weights.read_weights(path)
    if "fc.weight" not in file.tensors:
        raise _models.UserError(f"{path} has no classifier (fc.weight): give num_classes")
    return _weights.count_classes(file, name)


resnet18 = _make_entry("resnet18", "ResNet-18 (He et al. 2016, arXiv:1512.03385).")
seresnet18 = _make_entry(
    "seresnet18", "ResNet-18 with squeeze-and-excitation (Hu et al. 2018, arXiv:1709.01507)."
)
twistnet18 = _make_entry("twistnet18", "TwistNet-18 (Lian et al. 2026, TwistNet-2D).")
twistnet18_no_spiral = _make_entry(
    "twistnet18_no_spiral", "TwistNet-18 that multiplies each position with itself."
)
twistnet18_no_ais = _make_entry(
    "twistnet18_no_ais", "TwistNet-18 without adaptive interaction selection."
)
twistnet18_first_order = _make_entry("twistnet18_first_order", "TwistNet-18 without products.")
