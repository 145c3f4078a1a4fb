"""STCI fused: the results of stci.py in fewer passes over memory.

The plain path walks over the 176 channels some thirty times per step: products, concatenation,
AIS, GroupNorm, and the backward passes of these. The tricks:
- A scalar times a BatchNorm is a BatchNorm with scaled weight and bias: no pass for the gate.
- A scale per channel times a depthwise convolution is a convolution with scaled kernels.
- f is stored channel by channel, with the positions of all images in one row. The products of one
  distance d = j - i, z_i t_(i+d), are then one pass over contiguous rows, so this file orders f's
  channels by d.
- AIS and GroupNorm only multiply and shift each channel of an image. The factors come from the
  channels' means and mean squares, and these from 8x8 matrix products of z and t.
- The projection is one matrix product, and so are its gradients.
- The backward passes are written by hand and recompute the products instead of storing them.
Statistics are float32 (float64 for float64). The tests hold both paths equal.
"""

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from models.stci import EPS, HEADS, STCI


def is_chosen(stci: STCI) -> bool:
    """Whether gated_stci replaces gate * stci(h).

    torch.compile and torch.export always trace the formulas of stci.py. A module with hooks and a
    class derived from STCI run the formulas, too.
    """
    has_hooks = stci._forward_hooks or stci._forward_pre_hooks
    if torch.compiler.is_compiling() or has_hooks or type(stci) is not STCI:
        return False
    return {"plain": False, "fused": True, "auto": True}[stci.implementation]


def runs_by_hand(stci: STCI, device: torch.device) -> bool:
    """Whether the products, AIS, GroupNorm and projection are the hand-written ones below."""
    return stci.second_order and (stci.implementation == "fused" or device.type == "cpu")


def gated_stci(gate: Tensor, stci: STCI, h: Tensor) -> Tensor:
    """gate * stci(h) for a scalar gate: [B, C, H, W] -> [B, C, H, W].

    The gate and the scale are folded in on every device, which saves memory and kernels. The
    hand-written middle part is for CPUs: a GPU moves as many bytes with it and launches more
    kernels, so there "auto" runs the formulas.
    """
    z = F.relu(stci.reduce_bn(stci.reduce(h)))
    t = z if stci.twist is None else twist(z, stci.twist.conv.weight, stci.twist.scale)
    if runs_by_hand(stci, h.device):
        weight = stci.proj.weight.flatten(1)
        out = select_and_project(z, t, ais=stci.ais, norm=stci.norm, weight=weight)
    else:
        out = stci.select_and_project(stci.interact(z, t))
    gated = {name: gate * x for name, x in stci.proj_bn.named_parameters()}
    return functional_call(stci.proj_bn, gated, (out,))


def twist(z: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """scale * (z convolved with weight), [B, 32, H, W], with the scale inside the 32 kernels."""
    return F.conv2d(z, weight * scale[:, None, None, None], padding=1, groups=z.shape[1])


def select_and_project(
    z: Tensor, t: Tensor, *, ais: nn.Module | None, norm: nn.GroupNorm, weight: Tensor
) -> Tensor:
    """W_p GroupNorm(AIS([z, p])) of the features z and t, [B, 32, H, W] each -> [B, C, H, W]."""
    batch, _, height, width = z.shape
    dtype = z.dtype
    with torch.autocast(z.device.type, enabled=False):
        unit_z = Unit.apply(z, HEADS, EPS)  # [B, 4, 8, H*W]
        unit_t = unit_z if t is z else Unit.apply(t, HEADS, EPS)
        mean, square = Moments.apply(unit_z, unit_t)  # [B, 176] each
        scale, shift = affine(mean, square, ais, norm)
        out = Project.apply(unit_z, unit_t, scale, shift, weight.to(dtype))  # [B*H*W, C]
    return out.view(batch, height, width, -1).permute(0, 3, 1, 2)


def affine(
    mean: Tensor, square: Tensor, ais: nn.Module | None, norm: nn.GroupNorm
) -> tuple[Tensor, Tensor]:
    """AIS and GroupNorm as f * scale + shift, [B, 176] each, from f's means and mean squares."""
    # A network converted to half precision has half-precision layers.
    gate = ais(mean.to(norm.weight.dtype)).to(mean.dtype) if ais else torch.ones_like(mean)
    groups = (norm.num_groups, -1)
    # Mean and variance of every group of f * gate, from the moments of f's channels.
    center = (mean * gate).unflatten(1, groups).mean(2, keepdim=True)
    spread = (square * gate.square()).unflatten(1, groups).mean(2, keepdim=True) - center.square()
    rstd = torch.rsqrt(spread.clamp_min(0) + norm.eps)
    weight, bias = norm.weight.view(groups), norm.bias.view(groups)
    scale = (gate.unflatten(1, groups) * rstd * weight).flatten(1)
    return scale, (bias - center * rstd * weight).flatten(1)


class Unit(Function):
    """stci.unit: [B, 32, H, W] -> [B, 4, 8, H*W], contiguous, in float32 or float64."""

    @staticmethod
    def forward(ctx, x: Tensor, heads: int, eps: float) -> Tensor:
        # Two steps, because torch changes layout and dtype together several times slower.
        x = x.contiguous()
        ctx.dtype, ctx.shape = x.dtype, x.shape
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        x = x.flatten(2).unflatten(1, (heads, -1))
        norm = x.square().sum(2, keepdim=True).sqrt_()
        unit = x / norm.clamp_min(eps)
        # The gradient at the floor is 0 (see stci.unit): backward divides by infinity there.
        ctx.save_for_backward(unit, norm.masked_fill_(norm <= eps, torch.inf))
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        unit, norm = ctx.saved_tensors
        along = (grad * unit).sum(2, keepdim=True)  # d(x/|x|) = (g - u (g . u)) / |x|
        grad = (unit * along).neg_().add_(grad).div_(norm).to(ctx.dtype).view(ctx.shape)
        return grad.contiguous(memory_format=torch.channels_last), None, None


class Moments(Function):
    """Means and mean squares of [z, p] over all positions, in stci.py's channel order: [B, 176]."""

    @staticmethod
    def forward(ctx, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(z, t)
        pairs = layout(z.shape[2], z.shape[1], z.device)[0]
        moments = []
        for a, b in ((z, t), (z.square(), t.square())):
            products = (a @ b.mT).flatten(2).index_select(2, pairs)
            moments.append(torch.cat([a.sum(3), products], 2).flatten(1).div_(z.shape[3]))
        return tuple(moments)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        z, t = ctx.saved_tensors
        batch, heads, reduced, positions = z.shape
        pairs = layout(reduced, heads, z.device)[0]
        total_z, total_t = torch.zeros_like(z), torch.zeros_like(t)
        for grad, power in zip(grads, (1, 2), strict=True):
            # The products' gradients as an upper triangular matrix per head, [B, 4, 8, 8].
            grad = grad.view(batch, heads, -1).mul(power / positions)
            matrix = grad.new_zeros(batch, heads, reduced * reduced)
            matrix.index_copy_(2, pairs, grad[:, :, reduced:])
            matrix = matrix.view(batch, heads, reduced, reduced)
            # Back through sum(z) and z t^T, and for power 2 through the squares as well.
            if power == 1:
                total_z += (matrix @ t).add_(grad[:, :, :reduced, None])
                total_t += matrix.mT @ z
            else:
                total_z.addcmul_((matrix @ t.square()).add_(grad[:, :, :reduced, None]), z)
                total_t.addcmul_(matrix.mT @ z.square(), t)
        return total_z, total_t


class Project(Function):
    """([z, p] * scale + shift) times the weight [C, 176] -> [B*H*W, C] in the weight's dtype."""

    @staticmethod
    def forward(ctx, z: Tensor, t: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
        batch, heads, reduced, _ = z.shape
        _, order, inverse = layout(reduced, heads, z.device)
        z, t = z.permute(1, 2, 0, 3), t.permute(1, 2, 0, 3)  # [4, 8, B, H*W]
        f = multiply(z, t)
        # Scale, shift and weight in the order of f's rows; then one matrix product.
        small = (*f.shape[:3], 1)
        scale, shift = (x.index_select(1, order).t().reshape(small) for x in (scale, shift))
        weight = weight.index_select(1, order)
        x = f.mul_(scale).add_(shift).to(weight.dtype).view(len(order), -1)
        ctx.save_for_backward(z, t, scale, x, weight, inverse)
        return x.t() @ weight.t()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        z, t, scale, x, weight, inverse = ctx.saved_tensors
        f, reduced = multiply(z, t), z.shape[1]  # computing f again costs less than storing it
        grad_weight = (x @ grad).index_select(0, inverse).t()
        grad = (weight.t() @ grad.t()).to(f.dtype).view_as(f)
        # Scale and shift: sums over positions, [B, 176] in stci.py's order.
        small = (-1, f.shape[2])
        grad_scale = f.mul_(grad).sum(-1).view(small).index_select(0, inverse).t()
        grad_shift = grad.sum(-1).view(small).index_select(0, inverse).t()
        # Both features, one distance d = j - i at a time.
        grad.mul_(scale)
        grad_z, grad_t = torch.empty_like(z).copy_(grad[:, :reduced]), torch.zeros_like(t)
        for d, rows in diagonals(reduced):
            grad_z[:, : reduced - d].addcmul_(grad[:, rows], t[:, d:])
            grad_t[:, d:].addcmul_(grad[:, rows], z[:, : reduced - d])
        back = (2, 0, 1, 3)
        return grad_z.permute(back), grad_t.permute(back), grad_scale, grad_shift, grad_weight


def multiply(z: Tensor, t: Tensor) -> Tensor:
    """[z, p], contiguous, p in the order of diagonals(): two of [4, 8, B, P] -> [4, 44, B, P]."""
    heads, reduced, batch, positions = z.shape
    f = z.new_empty(heads, reduced * (reduced + 3) // 2, batch, positions)
    f[:, :reduced] = z
    for d, rows in diagonals(reduced):
        torch.mul(z[:, : reduced - d], t[:, d:], out=f[:, rows])
    return f


def diagonals(reduced: int) -> Iterator[tuple[int, slice]]:
    """For each distance d = j - i, the slice of f's rows for p_0d, p_1(1+d), ..."""
    start = reduced
    for d in range(reduced):
        yield d, slice(start, start + reduced - d)
        start += reduced - d


@cache
@torch.inference_mode(False)  # Training could not use tensors that an evaluation had cached.
def layout(reduced: int, heads: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Indices, made once per device: pairs, order and inverse.

    pairs: where i <= j in a flattened 8x8 matrix, [36]. order: stci.py's channel for each row of f,
    [176]. inverse: the row of f for each of stci.py's channels, [176].
    """
    i, j = torch.triu_indices(reduced, reduced)
    by_diagonal = torch.argsort((j - i) * reduced + i)
    of_one_head = torch.cat([torch.arange(reduced), reduced + by_diagonal])
    order = (torch.arange(heads)[:, None] * len(of_one_head) + of_one_head).flatten()
    return tuple(x.to(device) for x in (i * reduced + j, order, torch.argsort(order)))
