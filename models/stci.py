"""Spiral-Twisted Channel Interaction (STCI): the idea of the paper as formulas, and nothing else.

Four heads look in four directions: 0, 45, 90 and 135 degrees. Head k reduces C channels to r = 8,
blends each with its neighbour one step along the direction, and multiplies the two pairwise:

    z    = ReLU(BN(W_k h))                    features, 8 channels
    t    = s_k (z * D_k)                      shifted features: a depthwise 3x3 convolution, which
                                              starts as 0.5 at the position and at its neighbour
    u, v = z / max(|z|, 1e-6), t / max(|t|, 1e-6)
    p_ij = u_i v_j                            36 products, i <= j, at each position
    f    = [u, p] of all heads                4 x (8 + 36) = 176 channels
    out  = BN(W_p GroupNorm(f AIS(mean f)))   GroupNorm: groups of 8 channels, 22 of them
                                              AIS: Linear 176->44, ReLU, Linear 44->176, sigmoid

The block adds sigmoid(gate) out to its main branch (models/twistnet.py).

Source: TwistNet-2D: Learning Second-Order Channel Interactions via Spiral Twisting for Texture
Recognition (Lian, Xiong, Sun, Ouyang, Zong, Yu, Fu, Rui, Yujun, Chen; 2026). The four heads are
computed together, as 32 channels in 4 groups of 8.

A TwistBlock calls models/fused.py, in training and evaluation, which computes the same in less time
or memory; torch.compile, torch.export, hooks and derived classes run this file. To experiment with
the formulas, derive a class from STCI or set STCI.implementation = "plain".
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

ANGLES = (0, 45, 90, 135)  # degrees, one per head; y points down
HEADS = len(ANGLES)
REDUCED = 8  # channels of a head
EPS = 1e-6  # the smallest norm that is divided by


class STCI(nn.Module):
    """Map [B, C, H, W] to [B, C, H, W] by products of directionally shifted channels.

    Args:
        channels: C.
        spiral: False multiplies each position with itself (t = z).
        ais: False leaves the adaptive interaction selection out.
        second_order: False leaves the products out (f = z / |z|, 32 channels).
    """

    # "plain" runs this file, "fused" every trick of models/fused.py, "auto" those that help on the
    # device. Set it for all networks (STCI.implementation = "plain") or on one module.
    implementation = "auto"

    def __init__(
        self, channels: int, *, spiral: bool = True, ais: bool = True, second_order: bool = True
    ):
        super().__init__()
        reduced = HEADS * REDUCED
        features = HEADS * (REDUCED + REDUCED * (REDUCED + 1) // 2) if second_order else reduced
        self.second_order = second_order
        self.reduce = nn.Conv2d(channels, reduced, 1, bias=False)
        self.reduce_bn = nn.BatchNorm2d(reduced)
        self.twist = Twist(reduced) if spiral and second_order else None
        self.ais = AIS(features) if ais else None
        self.norm = nn.GroupNorm(features // 8, features)
        self.proj = nn.Conv2d(features, channels, 1, bias=False)
        self.proj_bn = nn.BatchNorm2d(channels)
        # Kaiming, fan_out, of each head's own convolution to 8 channels, not of all four together.
        nn.init.normal_(self.reduce.weight, std=math.sqrt(2 / REDUCED))
        nn.init.normal_(self.proj.weight, std=0.01)

    def forward(self, h: Tensor) -> Tensor:  # [B, C, H, W]
        z, t = self.reduce_and_twist(h)
        return self.proj_bn(self.select_and_project(self.interact(z, t)))

    def reduce_and_twist(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The features z and the shifted features t: [B, C, H, W] -> two of [B, 32, H, W]."""
        z = F.relu(self.reduce_bn(self.reduce(h)))
        t = z if self.twist is None else self.twist(z)
        return z, t

    def interact(self, z: Tensor, t: Tensor) -> Tensor:
        """All heads' channels f, [z / |z|, p] per head: two of [B, 32, H, W] -> [B, 176, H, W]."""
        unit_z = unit(z)  # [B, 4, 8, H, W]
        if not self.second_order:
            return unit_z.flatten(1, 2)  # [B, 32, H, W]
        unit_t = unit_z if t is z else unit(t)
        products = unit_z[:, :, :, None] * unit_t[:, :, None]  # [B, 4, 8, 8, H, W]: all i and j
        i, j = torch.triu_indices(REDUCED, REDUCED, device=z.device)
        p = products.flatten(2, 3).index_select(2, REDUCED * i + j)  # [B, 4, 36, H, W]: i <= j
        return torch.cat([unit_z, p], 2).flatten(1, 2)

    def select_and_project(self, f: Tensor) -> Tensor:
        """W_p GroupNorm(f AIS(f)): [B, 176, H, W] -> [B, C, H, W]."""
        if self.ais is not None:
            f = f * self.ais(f.mean((2, 3)))[:, :, None, None]
        return self.proj(self.norm(f))


class Twist(nn.Module):
    """The shifted features, s (z * D): a depthwise 3x3 convolution, at first a directional step."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.scale = nn.Parameter(torch.ones(channels))
        with torch.no_grad():
            self.conv.weight.copy_(direction_kernels().repeat_interleave(REDUCED, 0)[:, None])

    def forward(self, z: Tensor) -> Tensor:  # [B, 32, H, W]
        return self.scale[:, None, None].to(z.dtype) * self.conv(z)


class AIS(nn.Module):
    """Adaptive interaction selection: pooled channels [B, F] to a weight in (0, 1) for each."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(channels // 4, 16)
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, pooled: Tensor) -> Tensor:  # [B, F]
        return torch.sigmoid(self.fc2(F.relu(self.fc1(pooled))))


def direction_kernels() -> Tensor:
    """The start of D, [4, 3, 3]: 0.5 at the centre and 0.5 one step along each angle."""
    kernels = torch.zeros(HEADS, 3, 3)
    for kernel, angle in zip(kernels, ANGLES, strict=True):
        dx, dy = round(math.cos(math.radians(angle))), round(math.sin(math.radians(angle)))
        kernel[1, 1] = kernel[1 + dy, 1 + dx] = 0.5
    return kernels


def unit(x: Tensor) -> Tensor:
    """Divide each head's channels by their norm at each position: [B, 32, H, W] -> [B, 4, 8, H, W].

    Where the norm is at or below EPS, the unit vector is treated as a constant: its gradient is 0.
    The exact gradient there, 1 / EPS, is a spike. A position with a single positive channel has
    gradient 0 above EPS (a unit vector of one channel is 1, whatever its length) and 1,000,000
    below it, and after BatchNorm and ReLU such positions do occur: at ImageNet's scale one in
    about 20 steps, each enough to ruin that step for the whole network.
    """
    x = x.unflatten(1, (HEADS, REDUCED))
    precise = torch.promote_types(x.dtype, torch.float32)  # squares leave the range of float16
    norm = torch.linalg.vector_norm(x, dim=2, keepdim=True, dtype=precise)  # [B, 4, 1, H, W]
    unit = (x / norm.clamp_min(EPS)).to(x.dtype)
    # torch.where's result and gradient take the memory layout of the condition: give it x's.
    is_above = torch.empty_like(x, dtype=torch.bool).copy_(norm > EPS)
    return torch.where(is_above, unit, unit.detach())
