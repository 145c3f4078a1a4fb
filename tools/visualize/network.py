"""What STCI computes on given images, read out of a trained TwistNet."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from common.errors import UserError
from models.stci import HEADS, REDUCED, STCI
from models.twistnet import TwistBlock


@dataclass(frozen=True)
class BlockView:
    """What one TwistBlock computes on B images; F channels per direction: 8 of z, 36 products."""

    gate: float  # sigmoid(gate), the factor that STCI's output is multiplied by
    kernels: Tensor | None  # [4, 8, 3, 3] learnt s * D of each direction; None without a step
    weights: Tensor | None  # [B, 4, F] AIS weights; None without AIS
    maps: Tensor  # [B, 4, F, H, W] the channels themselves, before AIS
    shares: Tensor  # [B, 4, F] each channel's share of STCI's output; they sum to 1 per image


def name_channels(second_order: bool = True) -> list[str]:
    """The names of a direction's F channels: z0 ... z7, then z0·t0, z0·t1 ... z7·t7."""
    first = [f"z{i}" for i in range(REDUCED)]
    pairs = [f"z{i}·t{j}" for i in range(REDUCED) for j in range(i, REDUCED)]
    return first + pairs if second_order else first


def find_twist_blocks(model: nn.Module) -> dict[str, TwistBlock]:
    """The network's TwistBlocks by name. Raises UserError if it has none."""
    blocks = {name: m for name, m in model.named_modules() if isinstance(m, TwistBlock)}
    if not blocks:
        raise UserError("this network has no STCI to visualize: give the weights of a TwistNet")
    return blocks


@torch.no_grad()
def describe_network(
    model: nn.Module, images: Tensor
) -> tuple[Tensor, Tensor, dict[str, BlockView]]:
    """Run normalised images [B, 3, H, W] through the network and keep what each block computed.

    Returns logits [B, K], class activation maps [B, K, H/32, W/32] and a BlockView per block.
    The class activation map (Zhou et al., Learning Deep Features for Discriminative Localization,
    2016, arXiv:1512.04150) is what each position adds to a class's logit: its mean over the
    positions, plus the classifier's bias, is the logit.
    """
    blocks, inputs = find_twist_blocks(model), {}

    # keep the input of each block's STCI during one forward pass
    def keep_input(name: str):
        def hook(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs[name] = arguments[0]

        return hook

    hooks = [
        block.stci.register_forward_pre_hook(keep_input(name)) for name, block in blocks.items()
    ]
    try:
        features = model.forward_features(images)  # [B, 512, H/32, W/32]
    finally:
        for hook in hooks:
            hook.remove()

    # the classifier, applied to each position
    class_maps = torch.einsum("kc,bchw->bkhw", model.fc.weight, features)
    logits = class_maps.mean((2, 3)) + model.fc.bias

    views = {
        name: describe_block(block.stci, torch.sigmoid(block.gate).item(), inputs[name])
        for name, block in blocks.items()
    }
    return logits, class_maps, views


def describe_block(stci: STCI, gate: float, h: Tensor) -> BlockView:
    """What STCI computes on its input h [B, C, H, W], in eval mode.

    Its output is a sum over channels of f * scale * column of the projection, plus a part that
    does not depend on the position. A channel's share is the mean size of its term, divided by
    the sum of these sizes over all channels.
    """
    # the channels, and those that AIS selects
    f = stci.interact(*stci.reduce_and_twist(h))  # [B, 4F, H, W]
    weights = None if stci.ais is None else stci.ais(f.mean((2, 3)))  # [B, 4F]
    selected = f if weights is None else f * weights[:, :, None, None]

    # what GroupNorm, the projection and its BatchNorm multiply each channel by
    groups = selected.unflatten(1, (stci.norm.num_groups, -1))
    rstd = (groups.var((2, 3, 4), correction=0) + stci.norm.eps).rsqrt()  # [B, groups]
    scale = rstd.repeat_interleave(groups.shape[2], 1) * stci.norm.weight.abs()  # [B, 4F]
    bn = stci.proj_bn
    columns = stci.proj.weight.flatten(1) * (bn.weight * (bn.running_var + bn.eps).rsqrt())[:, None]
    sizes = selected.abs().mean((2, 3)) * scale * columns.norm(dim=0)  # [B, 4F]

    kernels = None
    if stci.twist is not None:
        kernels = stci.twist.conv.weight[:, 0] * stci.twist.scale[:, None, None]  # [32, 3, 3]
        kernels = kernels.unflatten(0, (HEADS, REDUCED))
    per_head = (HEADS, -1)
    return BlockView(
        gate=gate,
        kernels=kernels,
        weights=None if weights is None else weights.unflatten(1, per_head),
        maps=f.unflatten(1, per_head),
        shares=(sizes / sizes.sum(1, keepdim=True)).unflatten(1, per_head),
    )
