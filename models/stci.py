"""Spiral-Twisted Channel Interaction (STCI): the idea of the paper, alone in one file.

Four heads, one a direction. Head k reduces C channels to r = 8, looks at them a second time one
step along its direction, and multiplies the channels of the first look with those of the second:

    z = ReLU(BN(W_k h))      t = s_k * (z conv D_k)      p_ij = z_i / |z| * t_j / |t|,  i <= j

All heads are computed at once, as 32 channels in 4 groups of 8.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from models.fused import select_and_project

ANGLES = (0, 45, 90, 135)  # degrees, one a head; y points down
HEADS = len(ANGLES)
REDUCED = 8  # channels of a head
EPS = 1e-6  # smallest norm that is divided by; at or below it a unit vector is a constant


class STCI(nn.Module):
    """Map B, C, H, W to B, C, H, W by products of directionally shifted channels.

    `spiral=False` multiplies a position with itself (t = z); `second_order=False` has no product.
    """

    fused = True  # the hand-written path of fused.py; False runs the formulas as they stand

    def __init__(
        self, channels: int, *, spiral: bool = True, ais: bool = True, second_order: bool = True
    ):
        super().__init__()
        narrow = HEADS * REDUCED
        features = HEADS * (REDUCED + REDUCED * (REDUCED + 1) // 2) if second_order else narrow
        self.second_order = second_order
        self.reduce = nn.Conv2d(channels, narrow, 1, bias=False)
        self.reduce_bn = nn.BatchNorm2d(narrow)
        self.twist = None
        if spiral and second_order:
            self.twist = Twist(narrow)
        self.ais = AIS(features) if ais else None
        self.norm = nn.GroupNorm(features // 8, features)
        self.proj = nn.Conv2d(features, channels, 1, bias=False)
        self.proj_bn = nn.BatchNorm2d(channels)
        # kaiming fan_out of each head's own convolution, C -> 8, not of the four together
        nn.init.normal_(self.reduce.weight, std=math.sqrt(2 / REDUCED))
        nn.init.normal_(self.proj.weight, std=0.01)

    def forward(self, h: Tensor, gate: Tensor | None = None) -> Tensor:
        """The interaction, times the scalar gate: B, C, H, W to B, C, H, W."""
        out = self.project(*self.look(h))
        if gate is None:
            return self.proj_bn(out)
        # BN(x) times a scalar is BN with its weight and bias times it: no pass over the image
        gated = {name: gate * x for name, x in self.proj_bn.named_parameters()}
        return functional_call(self.proj_bn, gated, (out,))

    def look(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """The first and the second look at h, z and t, B, 32, H, W each."""
        z = F.relu(self.reduce_bn(self.reduce(h)))
        return z, z if self.twist is None else self.twist(z)

    def interact(self, z: Tensor, t: Tensor) -> Tensor:
        """f, the channels of all heads: B, 176, H, W (32 channels where there are no products)."""
        return interact(z, t) if self.second_order else unit(z).flatten(1, 2)

    def project(self, z: Tensor, t: Tensor) -> Tensor:
        """W_p GroupNorm(AIS(f)), B, C, H, W: fused, or plainly where a compiler does the fusing."""
        if self.fused and self.second_order and not torch.compiler.is_compiling():
            weight = self.proj.weight.flatten(1)
            return select_and_project(
                z, t, heads=HEADS, eps=EPS, ais=self.ais, norm=self.norm, weight=weight
            )
        f = self.interact(z, t).to(self.proj.weight.dtype)
        if self.ais is not None:
            f = f * self.ais(f.mean((2, 3)))[:, :, None, None]
        return self.proj(self.norm(f))


class Twist(nn.Module):
    """The second look, s * (z conv D): depthwise 3x3, a step in the head's direction at first."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.scale = nn.Parameter(torch.ones(channels))
        with torch.no_grad():
            self.conv.weight.copy_(direction_kernels().repeat_interleave(REDUCED, 0)[:, None])

    def forward(self, z: Tensor) -> Tensor:
        # the scale goes into the 32 kernels: the same product, without a pass over the image
        weight = self.conv.weight * self.scale[:, None, None, None]
        return F.conv2d(z, weight, padding=1, groups=z.shape[1])


class AIS(nn.Module):
    """Adaptive interaction selection: pooled channels B, C to a weight in (0, 1) each."""

    def __init__(self, channels: int):
        super().__init__()
        hidden = max(channels // 4, 16)
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, pooled: Tensor) -> Tensor:
        return torch.sigmoid(self.fc2(F.relu(self.fc1(pooled))))


def direction_kernels() -> Tensor:
    """The start of D, 4, 3, 3: 0.5 at the centre and 0.5 one step along each angle."""
    kernels = torch.zeros(HEADS, 3, 3)
    for kernel, angle in zip(kernels, ANGLES, strict=True):
        dx, dy = round(math.cos(math.radians(angle))), round(math.sin(math.radians(angle)))
        kernel[1, 1] = kernel[1 + dy, 1 + dx] = 0.5
    return kernels


def unit(x: Tensor) -> Tensor:
    """Divide each head's channels by their norm at each position: B, 32, H, W -> B, 4, 8, H, W.

    Where the norm is at or below EPS, the unit vector is treated as a constant: its gradient is 0.
    The exact gradient there, 1 / EPS, is a spike. A position with a single positive channel has
    gradient 0 above EPS (a unit vector of one channel is 1, whatever its length) and 1,000,000
    below it, and after BatchNorm and ReLU such positions do occur: at ImageNet's scale one in
    about 20 steps, each enough to ruin that step for the whole network.
    """
    x = x.unflatten(1, (HEADS, REDUCED))
    x = x.to(torch.promote_types(x.dtype, torch.float32))  # squares leave the range of float16
    norm = torch.linalg.vector_norm(x, dim=2, keepdim=True)
    unit = x / norm.clamp_min(EPS)
    return torch.where(norm > EPS, unit, unit.detach())


def interact(z: Tensor, t: Tensor) -> Tensor:
    """Every head's channels [z (8), p (36)] from unit vectors: B, 32, H, W -> B, 176, H, W."""
    z, t = unit(z), unit(t)
    i, j = torch.triu_indices(REDUCED, REDUCED, device=z.device)
    return torch.cat([z, z[:, :, i] * t[:, :, j]], 2).flatten(1, 2)
