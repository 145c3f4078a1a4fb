"""training/optim.py: which parameters decay, and learning rates worked out by hand."""

import pytest
import torch
from torch import nn

from models import build_model
from training.optim import cosine_lr_at, count_warmup_steps, make_optimizer
from training.recipes import PRETRAIN

GUIDE = PRETRAIN["guide"]


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        # base 0.8, 12 steps, of which 4 warm up; the cosine over 8 steps: 0.4 (1 + cos(pi k / 8))
        (0, 0.2),
        (1, 0.4),
        (2, 0.6),
        (3, 0.8),
        (4, 0.8),
        (6, 0.6828427),
        (8, 0.4),
        (10, 0.1171573),
        (11, 0.0304482),
        (12, 0.0),
    ],
)
def test_lr_by_hand(step, expected):
    rate = cosine_lr_at(step, base=0.8, total_steps=12, warmup_steps=4)
    assert rate == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(
    ("total", "warmup", "rates"),
    [
        (2, 0, [1.0, 0.5, 0.0]),
        (1, 0, [1.0, 0.0]),
        (3, 2, [0.5, 1.0, 1.0, 0.0]),
        (1, 1, [1.0]),
    ],
)
def test_lr_of_short_runs(total, warmup, rates):
    found = [
        cosine_lr_at(s, base=1.0, total_steps=total, warmup_steps=warmup) for s in range(len(rates))
    ]
    assert found == pytest.approx(rates, abs=1e-12)


def test_lr_falls_continuously_after_the_warm_up_and_ends_near_zero():
    rates = [cosine_lr_at(s, base=0.4, total_steps=600, warmup_steps=50) for s in range(600)]
    assert rates[:50] == sorted(rates[:50]) and rates[50:] == sorted(rates[50:], reverse=True)
    assert max(rates) == rates[49] == rates[50] == 0.4
    assert 0 < rates[-1] < 1e-5


@pytest.mark.parametrize(
    ("epochs", "per_epoch", "total", "expected"),
    [
        (5, 10, 600, 50),
        (5, 10, 51, 50),
        (5, 10, 50, 5),  # not shorter than the run: a tenth of it
        (5, 10, 20, 2),
        (5, 1, 3, 0),
        (0.25, 10, 100, 2),
        (0, 10, 100, 0),
    ],
)
def test_warm_up_is_shorter_than_the_run(epochs, per_epoch, total, expected):
    assert count_warmup_steps(epochs, steps_per_epoch=per_epoch, total_steps=total) == expected


@pytest.mark.parametrize("name", ["twistnet18", "seresnet18"])
def test_only_weights_of_convolutions_and_linear_layers_decay(name):
    model = build_model(name, 5)
    optimizer = make_optimizer(GUIDE, model, lr=0.1)
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (1e-4, 0.0)
    weights = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    assert {id(p) for p in decayed["params"]} == weights
    names = {id(p): n for n, p in model.named_parameters()}
    rest = [names[id(p)] for p in others["params"]]
    assert len(decayed["params"]) + len(rest) == len(names)
    last = {n.rpartition(".")[2] for n in rest}
    if name == "twistnet18":
        assert sum(n.endswith(".gate") for n in rest) == 4
        assert sum(n.endswith(".scale") for n in rest) == 4
        assert last == {"weight", "bias", "gate", "scale"}
    else:
        assert last == {"weight", "bias"}


def test_named_parameters_have_groups_of_their_own_with_their_factor():
    model = build_model("resnet18", 5)
    factors = {"fc.weight": 10.0, "fc.bias": 10.0}
    optimizer = make_optimizer(GUIDE, model, lr=0.1, lr_factors=factors)
    found = [
        (group["lr_factor"], group["weight_decay"], len(group["params"]))
        for group in optimizer.param_groups
    ]
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    norms = 2 * sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert found == [(1, 1e-4, convolutions), (1, 0, norms), (10, 1e-4, 1), (10, 0, 1)]
    assert optimizer.param_groups[2]["params"][0] is model.fc.weight


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"momentum": 0.7, "nesterov": False}, {"momentum": 0.7, "nesterov": False}),
        ({"momentum": 0.8, "nesterov": True}, {"momentum": 0.8, "nesterov": True}),
    ],
)
def test_the_optimizer_is_built_from_what_a_recipe_records(values, expected):
    optimizer = make_optimizer({"weight_decay": 0.25, **values}, nn.Linear(2, 2), lr=0.1)
    decayed, others = optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.25, 0.0)
    for group in (decayed, others):
        assert {name: group[name] for name in expected} == expected


def test_it_is_sgd_with_nesterov_momentum_of_09():
    """Two steps worked by hand: p = 1, gradient 1, lr 0.1, decay 0.5, momentum 0.9."""
    layer = nn.Linear(1, 1)
    nn.init.ones_(layer.weight), nn.init.ones_(layer.bias)
    optimizer = make_optimizer({**GUIDE, "weight_decay": 0.5}, layer, lr=0.1)
    weights, biases = [], []
    for _ in range(2):
        layer.weight.grad, layer.bias.grad = torch.ones(1, 1), torch.ones(1)
        optimizer.step()
        weights.append(layer.weight.item()), biases.append(layer.bias.item())
    # weight: d = 1 + 0.5 p, v = 0.9 v + d, p -= 0.1 (d + 0.9 v).  1.5 · 1.9 = 2.85, then
    # d = 1.3575, v = 1.35 + 1.3575, d + 0.9 v = 3.79425
    assert weights == pytest.approx([0.715, 0.335575])
    # bias: the same with d = 1: 1.9, then v = 1.9, 1 + 1.71
    assert biases == pytest.approx([0.81, 0.539])
