"""hubconf.py through torch.hub, as a user of another project calls it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hubconf
from common.errors import UserError
from models import MODELS, build_model

ROOT = Path(__file__).resolve().parent.parent


def load(name, **flags):
    return torch.hub.load(str(ROOT), name, source="local", **flags)


def save(name, num_classes, path):
    """Save the weights of a new network and return its state dict."""
    state = build_model(name, num_classes).state_dict()
    path.parent.mkdir(exist_ok=True)
    torch.save(state, path)
    return state


def has_weights(model, state, *, head=True):
    own = model.state_dict()
    return {key for key in state if key in own and not torch.equal(own[key], state[key])} == (
        set() if head else {"fc.weight", "fc.bias"}
    )


def test_hubconf_offers_the_six_networks_and_nothing_else():
    offered = [
        name
        for name in dir(hubconf)  # as torch.hub.list finds them on GitHub
        if callable(getattr(hubconf, name)) and not name.startswith("_")
    ]
    assert sorted(offered) == sorted(MODELS)
    assert hubconf.dependencies == ["torch", "torchvision"]


def test_every_network_has_a_docstring_for_torch_hub_help():
    for name in MODELS:
        text = getattr(hubconf, name).__doc__
        assert "ResNet-18" in text or "TwistNet-18" in text
        assert "num_classes  Left out:" in text and "normalised" in text


@pytest.mark.parametrize("name", MODELS)
def test_every_network_loads_by_name(name):
    model = load(name, num_classes=0).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert model(images).shape == (2, 512)
        features = model.forward_features(images)
    assert features.shape == (2, 512, 2, 3)
    assert torch.allclose(model(images), features.mean((2, 3)), atol=1e-5)


def test_a_new_network_has_1000_classes_by_default():
    assert load("resnet18").fc.out_features == 1000
    assert load("resnet18", num_classes=7).fc.out_features == 7


@pytest.mark.parametrize(
    "pretrained",
    [True, "auto", "weights/twistnet18_imagenet.pt", Path("weights/twistnet18_imagenet.pt")],
)
def test_trained_weights_come_with_their_classifier_or_a_new_one(pretrained):
    state = save("twistnet18", 5, Path("weights/twistnet18_imagenet.pt"))
    assert has_weights(load("twistnet18", pretrained=pretrained), state)
    assert has_weights(load("twistnet18", pretrained=pretrained, num_classes=5), state, head=False)
    assert load("twistnet18", pretrained=pretrained, num_classes=9).fc.out_features == 9


def test_an_ablation_loads_twistnets_layers_without_its_classifier():
    state = save("twistnet18", 5, Path("weights/twistnet18_imagenet.pt"))
    assert has_weights(load("twistnet18_no_ais", pretrained=True, num_classes=5), state, head=False)
    with pytest.raises(UserError, match="it contains twistnet18"):
        load("twistnet18_no_ais", pretrained=True)


def test_missing_files_and_classifiers_are_one_line_errors():
    with pytest.raises(UserError, match="none.pt"):
        load("twistnet18", pretrained="none.pt")
    state = save("resnet18", 4, Path("headless.pt"))
    del state["fc.weight"], state["fc.bias"]
    torch.save(state, "headless.pt")
    with pytest.raises(UserError, match="give num_classes"):
        load("resnet18", pretrained="headless.pt")
    assert load("resnet18", pretrained="headless.pt", num_classes=3).fc.out_features == 3


@pytest.mark.parametrize("name", ["models", "common"])
def test_another_package_of_the_same_name_is_an_error_that_names_it(tmp_path, name):
    (tmp_path / f"{name}.py").write_text("")
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import {name}, torch; torch.hub.load({str(ROOT)!r}, 'resnet18', source='local')",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError") and "process of its own" in last
    assert str(tmp_path / f"{name}.py") in last
