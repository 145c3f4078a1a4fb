"""One optimizer step, and one pass over an evaluation set: the same code on every device.

AMP, loss scaling, clipping, accumulation and DDP are objects that can do nothing, so that the CPU
path that the tests run to the bit is the path that a GPU takes.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from training.distributed import World

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def binary_cross_entropy(logits, targets, *, label_smoothing: float) -> torch.Tensor:
    """timm's: each class a question of its own, the mean over images and classes.

    logits, targets: B × classes; targets are smoothed as those of timm's Mixup are.
    """
    targets = targets * (1 - label_smoothing) + label_smoothing / targets.shape[1]
    return F.binary_cross_entropy_with_logits(logits, targets)


LOSSES = {"cross-entropy": F.cross_entropy, "binary cross-entropy": binary_cross_entropy}


def choose_precision(device: torch.device, amp: bool | None) -> str:
    """The name in PRECISIONS for what --amp (True), --no_amp (False) or neither asks of `device`.

    By default mixed precision is on where it is faster: with CUDA, and on CPUs that have
    instructions for bf16 (x86: AVX512-BF16, AMX). It is bf16, and fp16 on GPUs without bf16.
    """
    if amp is None:
        has = torch.cpu.get_capabilities()
        amp = device.type == "cuda" or has.get("avx512_bf16") or has.get("amx_bf16")
    if not amp:
        return "fp32"
    return "bf16" if device.type == "cpu" or torch.cuda.is_bf16_supported() else "fp16"


@dataclass
class Trainer:
    """A network with all that one step of training it needs.

    `model` stays the bare module: its names are the checkpoint's names, with DDP and with
    `compile`.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    world: World
    precision: str
    augment: Callable  # (images, labels, draws, step=, micro=) -> images, soft targets
    label_smoothing: float = 0.1
    clip_norm: float | None = None
    loss: Callable = F.cross_entropy  # (logits, soft targets, label_smoothing=) -> their mean
    seed_forward: Callable = lambda step, micro: None  # before what the network itself draws
    wrapped: nn.Module = field(init=False)
    scaler: torch.amp.GradScaler = field(init=False)
    loss_sum: torch.Tensor = field(init=False)  # float64, on the device: over this epoch's images
    images: int = 0  # how many those are; counted on the host, which then need not wait

    def __post_init__(self):
        device = self.world.device
        self.wrapped = self.model
        if self.world.size > 1:
            self.wrapped = DistributedDataParallel(
                self.model,
                device_ids=[device] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                forward_sync_buffers=False,
            )
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)

    def autocast(self):
        return torch.autocast(
            self.world.device.type, PRECISIONS[self.precision], enabled=self.precision != "fp32"
        )

    @property
    def sums(self) -> list[float]:
        """[summed loss, images] of this rank in this epoch; reading it waits for the device."""
        return [self.loss_sum.item(), float(self.images)]

    @sums.setter
    def sums(self, values: list[float]) -> None:
        self.loss_sum.fill_(values[0])
        self.images = int(values[1])

    def is_finite(self) -> bool:
        """Whether training has not diverged; waits for the device.

        A step that overflowed in fp16 is skipped by the scaler, which halves its scale: that is
        divergence only when it goes on.
        """
        return math.isfinite(self.loss_sum.item()) and self.scaler.get_scale() > 2**-6

    def step(self, batches: list, *, step: int, lr: float) -> None:
        """One step over this rank's micro-batches of global step `step`. Does not wait for the GPU.

        The gradient is the mean over all micro-batches of all ranks, whoever computed them.
        """
        self.model.train()
        for accumulated, batch in enumerate(batches):
            # move
            device = self.world.device
            images = batch.image.to(device, non_blocking=True)
            labels = batch.label.to(device, non_blocking=True)
            micro = self.world.rank + accumulated * self.world.size
            images, targets = self.augment(images, labels, batch.draws, step=step, micro=micro)
            images = images.contiguous(memory_format=torch.channels_last)

            # forward
            last = accumulated == len(batches) - 1
            self.seed_forward(step, micro)
            with nullcontext() if last or self.world.size == 1 else self.wrapped.no_sync():
                with self.autocast():
                    logits = self.wrapped(images)
                loss = self.loss(logits.float(), targets, label_smoothing=self.label_smoothing)

                # backward
                self.scaler.scale(loss / len(batches)).backward()

            # record
            loss = loss.detach().double()
            if self.scaler.is_enabled():
                loss = loss.nan_to_num(0, 0, 0)  # the scaler skips this step
            self.loss_sum += loss * len(images)
            self.images += len(images)

        # step
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)


@dataclass
class Score:
    """Counts of one evaluation: summed over images and ranks, divided once."""

    loss: float = 0.0
    top1: int = 0
    top5: int = 0
    images: int = 0
    unreadable: list[str] = field(default_factory=list)  # files that were not scored

    def row(self, prefix: str) -> dict[str, float]:
        return {
            f"{prefix}_loss": self.loss / self.images,
            f"{prefix}_top1": 100 * self.top1 / self.images,
            f"{prefix}_top5": 100 * self.top5 / self.images,
        }


@torch.inference_mode()
def evaluate(
    trainer: Trainer,
    batches: Iterable,
    normalise: Callable,
    *,
    rounds: int,
    name_of: Callable[[int], str],
    between: Callable[[], None] = lambda: None,
) -> tuple[Score, torch.Tensor]:
    """Score the bare module on every image once; also this rank's (index, prediction), N × 2.

    `batches` are this rank's own, unpadded: ranks may have different numbers of them, so each
    goes through `rounds` turns and calls `between` (where ranks agree to stop) in every one.
    """
    world, model = trainer.world, trainer.model
    world.broadcast_buffers(model)
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)
    predictions, unreadable = [], []
    stream = iter(batches)
    for _ in range(rounds):
        between()
        batch = next(stream, None)
        if batch is None:
            continue
        unreadable += [name_of(index) for index in batch.index[batch.broken > 0].tolist()]
        images = normalise(batch.image.to(world.device, non_blocking=True))
        labels = batch.label.to(world.device, non_blocking=True)
        with trainer.autocast():
            logits = model(images.contiguous(memory_format=torch.channels_last))
        logits = logits.float()
        ranked = logits.topk(min(5, logits.shape[1])).indices
        hits = ranked == labels[:, None]
        sums += torch.stack(
            [
                F.cross_entropy(logits, labels, reduction="sum").double(),
                hits[:, 0].sum(),
                hits.sum(),
                labels.new_tensor(len(labels)),
            ]
        )
        predictions.append(torch.stack([batch.index.to(world.device), ranked[:, 0]], dim=1))
    loss, top1, top5, images = world.sum(sums.tolist())  # the one wait for the device
    seen = torch.cat(predictions) if predictions else torch.empty(0, 2, dtype=torch.int64)
    unreadable = [name for names in world.gather(unreadable) for name in names]
    return Score(loss, int(top1), int(top5), int(images), unreadable), seen.cpu()
