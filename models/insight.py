"""What STCI sees in images, read out of a trained TwistNet for people to look at."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.errors import UserError
from models.stci import HEADS, REDUCED, STCI
from models.twistnet import TwistBlock


@dataclass(frozen=True)
class View:
    """One TwistBlock on B images. F channels a direction: 8 first looks, then 36 products."""

    gate: float  # sigmoid(gate): what STCI's output is multiplied with
    kernels: Tensor | None  # 4, 8, 3, 3: the learnt s * D of each direction; None without a step
    weights: Tensor | None  # B, 4, F: AIS weights; None without AIS
    maps: Tensor  # B, 4, F, H, W: the channels themselves, before AIS
    shares: Tensor  # B, 4, F: each channel's share in STCI's output, summing to 1 an image


def channel_names(second_order: bool = True) -> list[str]:
    """The F channels of a direction: z0 ... z7, then z0·t0, z0·t1 ... z7·t7."""
    first = [f"z{i}" for i in range(REDUCED)]
    pairs = [f"z{i}·t{j}" for i in range(REDUCED) for j in range(i, REDUCED)]
    return first + pairs if second_order else first


def twist_blocks(model: nn.Module) -> dict[str, TwistBlock]:
    """The network's TwistBlocks by name; UserError where it has none."""
    blocks = {name: m for name, m in model.named_modules() if isinstance(m, TwistBlock)}
    if not blocks:
        raise UserError("this network has no STCI to look into: take a TwistNet's checkpoint")
    return blocks


@torch.no_grad()
def look_inside(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, dict[str, View]]:
    """Normalised images B, 3, H, W -> logits B, K; class maps B, K, H/32, W/32; a View a block.

    A class map is what each position adds to the class's logit: its mean, plus the classifier's
    bias, is the logit (Zhou et al. 2016, Learning Deep Features for Discriminative Localization).
    """
    blocks, seen = twist_blocks(model), {}
    hooks = [
        block.stci.register_forward_pre_hook(
            lambda _, inputs, name=name: seen.__setitem__(name, inputs[0])
        )
        for name, block in blocks.items()
    ]
    try:
        features = model.forward_features(images)
    finally:
        for hook in hooks:
            hook.remove()
    class_maps = torch.einsum("kc,bchw->bkhw", model.fc.weight, features)
    logits = class_maps.mean((2, 3)) + model.fc.bias
    views = {
        name: view(block.stci, torch.sigmoid(block.gate).item(), seen[name])
        for name, block in blocks.items()
    }
    return logits, class_maps, views


def view(stci: STCI, gate: float, h: Tensor) -> View:
    """STCI's channels on its input h: B, C, H, W.

    Its output is the sum over channels of f * scale * column of the projection, plus what does
    not depend on the position. A channel's share is the mean size of its term among all terms.
    """
    f = stci.interact(*stci.look(h))
    weights = None if stci.ais is None else stci.ais(f.mean((2, 3)))
    selected = f if weights is None else f * weights[:, :, None, None]
    groups = selected.unflatten(1, (stci.norm.num_groups, -1))
    rstd = (groups.var((2, 3, 4), correction=0) + stci.norm.eps).rsqrt()
    scale = rstd.repeat_interleave(groups.shape[2], 1) * stci.norm.weight.abs()
    bn = stci.proj_bn
    columns = stci.proj.weight.flatten(1) * (bn.weight * (bn.running_var + bn.eps).rsqrt())[:, None]
    sizes = selected.abs().mean((2, 3)) * scale * columns.norm(dim=0)
    kernels = None
    if stci.twist is not None:
        kernels = stci.twist.conv.weight[:, 0] * stci.twist.scale[:, None, None]
        kernels = kernels.unflatten(0, (HEADS, REDUCED))
    heads = (HEADS, -1)
    return View(
        gate=gate,
        kernels=kernels,
        weights=None if weights is None else weights.unflatten(1, heads),
        maps=f.unflatten(1, heads),
        shares=(sizes / sizes.sum(1, keepdim=True)).unflatten(1, heads),
    )
