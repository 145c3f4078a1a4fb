"""STCI's middle part by hand: the same sums as stci.py's plain path, in fewer passes over memory.

The plain path walks over the 176 channels some thirty times a step: gathers, product, joining, AIS,
group norm, their backwards. Here
- f lies channel by channel, with all images' positions in one row, so that the products of one
  distance d = j - i, z_i t_(i+d), are one pass over contiguous rows (hence f's own channel order);
- AIS and GroupNorm only multiply and shift a channel of an image. The factors come from the
  channels' means and mean squares, and these from 8x8 matrix products of the two looks;
- the projection is one matrix product, and so are its gradients.
Statistics are float32 (float64 for float64).
"""

from functools import cache

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def select_and_project(
    z: Tensor,
    t: Tensor,
    *,
    heads: int,
    eps: float,
    ais: nn.Module | None,
    norm: nn.GroupNorm,
    weight: Tensor,
) -> Tensor:
    """W_p GroupNorm(AIS([z, p])) of both looks, B, 32, H, W each -> B, C, H, W, channels last."""
    batch, _, height, width = z.shape
    dtype = z.dtype
    with torch.autocast(z.device.type, enabled=False):
        unit_z = Unit.apply(z, heads, eps)  # B, 4, 8, H*W
        unit_t = unit_z if t is z else Unit.apply(t, heads, eps)
        mean, square = Moments.apply(unit_z, unit_t)  # B, 176
        scale, shift = affine(mean, square, ais, norm)
        out = Project.apply(unit_z, unit_t, scale, shift, weight.to(dtype))  # B*H*W, C
    return out.view(batch, height, width, -1).permute(0, 3, 1, 2)


def affine(
    mean: Tensor, square: Tensor, ais: nn.Module | None, norm: nn.GroupNorm
) -> tuple[Tensor, Tensor]:
    """AIS and GroupNorm as f * scale + shift, B, 176 each, from f's means and mean squares."""
    # a network converted to half precision has half precision layers
    gate = ais(mean.to(norm.weight.dtype)).to(mean.dtype) if ais else torch.ones_like(mean)
    groups = (norm.num_groups, -1)
    center = (mean * gate).unflatten(1, groups).mean(2, keepdim=True)
    spread = (square * gate.square()).unflatten(1, groups).mean(2, keepdim=True) - center.square()
    rstd = torch.rsqrt(spread.clamp_min(0) + norm.eps)
    weight, bias = norm.weight.view(groups), norm.bias.view(groups)
    scale = (gate.unflatten(1, groups) * rstd * weight).flatten(1)
    return scale, (bias - center * rstd * weight).flatten(1)


class Unit(Function):
    """Each head's channels over their norm: B, 32, H, W -> B, heads, 8, H*W, float32 or more."""

    @staticmethod
    def forward(ctx, x: Tensor, heads: int, eps: float) -> Tensor:
        # laid out first and widened then: torch does the two together several times slower
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
        along = (grad * unit).sum(2, keepdim=True)
        grad = (unit * along).neg_().add_(grad).div_(norm).to(ctx.dtype).view(ctx.shape)
        return grad.contiguous(memory_format=torch.channels_last), None, None


class Moments(Function):
    """Means and mean squares of [z, p] over the positions, in stci.py's channel order: B, 176."""

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
            grad = grad.view(batch, heads, -1).mul(power / positions)
            matrix = grad.new_zeros(batch, heads, reduced * reduced)
            matrix = matrix.index_copy_(2, pairs, grad[:, :, reduced:]).view(
                batch, heads, reduced, reduced
            )
            if power == 1:
                total_z += (matrix @ t).add_(grad[:, :, :reduced, None])
                total_t += matrix.mT @ z
            else:
                total_z.addcmul_((matrix @ t.square()).add_(grad[:, :, :reduced, None]), z)
                total_t.addcmul_(matrix.mT @ z.square(), t)
        return total_z, total_t


class Project(Function):
    """([z, p] * scale + shift) times weight C, 176 -> B*P, C in the weight's dtype."""

    @staticmethod
    def forward(ctx, z: Tensor, t: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
        batch, heads, reduced, _ = z.shape
        _, order, inverse = layout(reduced, heads, z.device)
        z, t = z.permute(1, 2, 0, 3), t.permute(1, 2, 0, 3)  # 4, 8, B, P
        f = products(z, t)
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
        f, reduced = products(z, t), z.shape[1]  # a pass is cheaper than the memory to keep them
        grad_weight = (x @ grad).index_select(0, inverse).t()
        grad = (weight.t() @ grad.t()).to(f.dtype).view_as(f)
        small = (-1, f.shape[2])
        grad_scale = f.mul_(grad).sum(-1).view(small).index_select(0, inverse).t()
        grad_shift = grad.sum(-1).view(small).index_select(0, inverse).t()
        grad.mul_(scale)
        grad_z, grad_t = torch.empty_like(z).copy_(grad[:, :reduced]), torch.zeros_like(t)
        for d, rows in diagonals(reduced):
            grad_z[:, : reduced - d].addcmul_(grad[:, rows], t[:, d:])
            grad_t[:, d:].addcmul_(grad[:, rows], z[:, : reduced - d])
        back = (2, 0, 1, 3)
        return grad_z.permute(back), grad_t.permute(back), grad_scale, grad_shift, grad_weight


def products(z: Tensor, t: Tensor) -> Tensor:
    """[z, p] of heads, 8, B, P: heads, 44, B, P, contiguous, p in the order of diagonals()."""
    heads, reduced, batch, positions = z.shape
    f = z.new_empty(heads, reduced * (reduced + 3) // 2, batch, positions)
    f[:, :reduced] = z
    for d, rows in diagonals(reduced):
        torch.mul(z[:, : reduced - d], t[:, d:], out=f[:, rows])
    return f


def diagonals(reduced: int):
    """For each distance d = j - i, the rows of f that hold p_0d, p_1(1+d), ..."""
    start = reduced
    for d in range(reduced):
        yield d, slice(start, start + reduced - d)
        start += reduced - d


@cache
@torch.inference_mode(False)  # an evaluation may come first, and training could not use its tensors
def layout(reduced: int, heads: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Positions of the pairs i <= j in an 8x8 matrix; the channel of each row of f; its inverse."""
    i, j = torch.triu_indices(reduced, reduced)
    by_diagonal = torch.argsort((j - i) * reduced + i)
    one = torch.cat([torch.arange(reduced), reduced + by_diagonal])
    order = (torch.arange(heads)[:, None] * len(one) + one).flatten()
    return tuple(x.to(device) for x in (i * reduced + j, order, torch.argsort(order)))
