"""One optimizer step, and one pass over an evaluation set: the same code on every device.

AMP, loss scaling, clipping, accumulation and DDP are no-ops when disabled, so the CPU tests
exercise the same code path as a GPU run.
"""

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from common.errors import READ, UserError
from training.distributed import DistributedContext

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MIN_LOSS_SCALE = 2**-6  # below it fp16 has overflowed so often that training has diverged


def binary_cross_entropy(logits, targets, *, label_smoothing: float) -> torch.Tensor:
    """timm's binary cross-entropy: one yes-or-no question per class, mean over images and classes.

    logits, targets: B × classes; targets are smoothed as in timm's Mixup.
    """
    targets = targets * (1 - label_smoothing) + label_smoothing / targets.shape[1]
    return F.binary_cross_entropy_with_logits(logits, targets)


LOSSES = {"cross_entropy": F.cross_entropy, "binary_cross_entropy": binary_cross_entropy}


def choose_precision(device: torch.device, amp: bool | None) -> str:
    """Return the name in PRECISIONS for --amp (True), --no_amp (False) or neither (None).

    By default mixed precision is on where it is faster: on CUDA, and on CPUs with instructions for
    bf16 (AVX512-BF16, AMX). It is bf16, or fp16 on GPUs without bf16 hardware (before Ampere).
    """
    if amp is None:
        cpu = torch.cpu.get_capabilities()
        amp = device.type == "cuda" or cpu.get("avx512_bf16") or cpu.get("amx_bf16")
    if not amp:
        return "fp32"
    if device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    return "fp16"


def check_precision(device: torch.device, precision: str) -> None:
    """Raise UserError where a run that was started in bf16 continues on a GPU that has none."""
    if precision != "bf16" or device.type != "cuda":
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError(
            f"the run is in bf16, which {torch.cuda.get_device_name(device)} does not have: "
            "continue it on GPUs from Ampere on, or start a new run here"
        )


def autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32")


def set_float32_mode(precision: str) -> None:
    """Keep "fp32" at float32: by default cuDNN uses TF32 on Ampere GPUs and later."""
    if precision == "fp32":
        torch.backends.cudnn.allow_tf32 = False


def move_to_device(batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Copy a batch's images and labels to the device; its other fields stay on the CPU.

    On CUDA the copy has a stream of its own: as the host is a step ahead of the GPU, it runs while
    the GPU still computes the step before.
    """
    if device.type != "cuda":
        return batch.image.to(device), batch.label.to(device)
    compute, copy = torch.cuda.current_stream(device), _copy_stream(device)
    with torch.cuda.stream(copy):
        moved = [x.to(device, non_blocking=True) for x in (batch.image, batch.label)]
    compute.wait_stream(copy)
    for tensor in moved:
        tensor.record_stream(compute)  # its memory is not reused before the step is over
    return tuple(moved)


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


# ---------------------------------------------------------------- training


@dataclass
class Trainer:
    """A network and everything that one training step needs.

    `model` stays the bare module, with the checkpoint's parameter names, also under DDP and
    torch.compile.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    context: DistributedContext
    precision: str
    augment: Callable  # (images, labels, draws, step=, micro=) -> images, soft targets
    label_smoothing: float = 0.1
    clip_norm: float | None = None  # largest gradient norm; None: gradients are not clipped
    loss: Callable = F.cross_entropy  # (logits, soft targets, label_smoothing=) -> their mean loss
    seed_forward: Callable = lambda step, micro: None  # before what the network itself draws
    wrapped: nn.Module = field(init=False)  # the model, in DDP where there are several ranks
    scaler: torch.amp.GradScaler = field(init=False)
    loss_sum: torch.Tensor = field(init=False)  # float64, on the device: over this epoch's images
    num_images: int = 0  # how many those are
    grad_norms: list[torch.Tensor] = field(default_factory=list)  # of steps not yet read

    def __post_init__(self):
        device = self.context.device
        self.wrapped = self.model
        if self.context.world_size > 1:
            self.wrapped = DistributedDataParallel(
                self.model,
                device_ids=[device] if device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                forward_sync_buffers=False,
            )
        set_float32_mode(self.precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)

    def step(self, batches: list, *, step: int, lr: float) -> None:
        """Train on this rank's micro-batches of global step `step`, without waiting for the GPU.

        Each of `batches` has image (uint8, B × 3 × H × W), label (int64, B) and draws for augment.
        The gradient is the mean over all micro-batches of all ranks, however many ranks there are.
        """
        self.model.train()
        for number, batch in enumerate(batches):
            # Move and augment.
            images, labels = move_to_device(batch, self.context.device)
            micro = self.context.rank + number * self.context.world_size
            images, targets = self.augment(images, labels, batch.draws, step=step, micro=micro)
            images = images.contiguous(memory_format=torch.channels_last)

            # Forward. Gradients are reduced over the ranks in the last backward only.
            is_last = number == len(batches) - 1
            self.seed_forward(step, micro)
            with (
                nullcontext() if is_last or self.context.world_size == 1 else self.wrapped.no_sync()
            ):
                with autocast(self.context.device, self.precision):
                    logits = self.wrapped(images)
                loss = self.loss(logits.float(), targets, label_smoothing=self.label_smoothing)

                # Backward.
                self.scaler.scale(loss / len(batches)).backward()

            # Count, on the device.
            loss = loss.detach().double()
            if self.scaler.is_enabled():
                loss = loss.nan_to_num(0, 0, 0)  # the scaler skips this step
            self.loss_sum += loss * len(images)
            self.num_images += len(images)

        # Update.
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)  # older checkpoints lack it
        self.scaler.unscale_(self.optimizer)
        self.grad_norms.append(self._clip_gradients())
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    @property
    def lr(self) -> float:
        """The learning rate of the last step, of the parameters whose factor is 1."""
        return self.optimizer.param_groups[0]["lr"]

    def try_memory(self, batch_size: int, img_size: int) -> None:
        """Run a forward and a backward pass on black images, and discard them.

        Where memory is too small for the run's largest images, a run then ends before its first
        step. Weights, buffers, gradients and random numbers stay as they are.
        """
        device = self.context.device
        self.model.train()
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        images = torch.zeros(batch_size, 3, img_size, img_size, device=device)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            with autocast(device, self.precision):
                logits = torch.func.functional_call(self.model, buffers, images)
            parameters = [p for p in self.model.parameters() if p.requires_grad]
            torch.autograd.grad(logits.float().sum(), parameters, allow_unused=True)

    def _clip_gradients(self) -> torch.Tensor:
        """Scale the gradients down to clip_norm, if any; the norm that they had before."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if self.clip_norm is not None:
            return nn.utils.clip_grad_norm_(parameters, self.clip_norm)
        return nn.utils.get_total_norm([p.grad for p in parameters])

    def read_loss(self) -> tuple[float, int]:
        """This rank's summed loss and number of images in this epoch; waits for the GPU."""
        return self.loss_sum.item(), self.num_images

    def read_grad_norms(self) -> list[float]:
        """The gradient norms of all steps since the last call; waits for the GPU once.

        A step that fp16 skips has an infinite norm or NaN.
        """
        norms = torch.stack(self.grad_norms).tolist() if self.grad_norms else []
        self.grad_norms.clear()
        return norms

    def set_loss(self, loss_sum: float, num_images: int) -> None:
        self.loss_sum.fill_(loss_sum)
        self.num_images = int(num_images)

    def has_diverged(self, loss_sum: float) -> bool:
        """Whether the loss is not finite, or fp16 overflows at any scale.

        A single step that overflows in fp16 is skipped by the scaler, which halves its scale.
        """
        return not math.isfinite(loss_sum) or self.scaler.get_scale() < MIN_LOSS_SCALE

    def state_dict(self) -> dict[str, dict]:
        parts = {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: dict[str, dict]) -> None:
        self.model.load_state_dict(state["model"])
        self.model.train()  # older networks of timm keep what they computed in eval mode until then
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])


# ---------------------------------------------------------------- evaluation


@dataclass
class EvalMetrics:
    """Counts over all images of an evaluation, summed over the ranks, for dividing once."""

    loss_sum: float
    top1: int  # images whose class is predicted
    top5: int  # images whose class is among the five most likely
    num_images: int
    unreadable: list[str]  # files that could not be decoded, of all ranks
    predictions: torch.Tensor  # int64, by image; -1 for images of other ranks
    seconds: float = 0.0
    overflowed: int = 0  # images whose loss is not finite

    def has_diverged(self, precision: str) -> bool:
        """Whether the loss is not finite, in fp16 because of more than 1 % of the images."""
        allowed = self.num_images / 100 if precision == "fp16" else 0
        return not math.isfinite(self.loss_sum) and self.overflowed > allowed

    def as_row(self, prefix: str) -> dict[str, float]:
        """Mean loss and accuracies in percent, as columns of the log."""
        return {
            f"{prefix}_loss": self.loss_sum / self.num_images,
            f"{prefix}_top1": 100 * self.top1 / self.num_images,
            f"{prefix}_top5": 100 * self.top5 / self.num_images,
        }


@torch.inference_mode()
def classify(model: nn.Module, loader, *, device: torch.device, precision: str) -> Iterator[tuple]:
    """Yield each batch of a data.loading.EvalLoader with the network's logits.

    Yields (batch, labels, logits): labels, int64, B, and logits, float32, B × classes, on `device`.
    """
    model.eval()
    for batch in loader:
        images, labels = move_to_device(batch, device)
        images = loader.normalise(images).contiguous(memory_format=torch.channels_last)
        with autocast(device, precision):
            logits = model(images)
        yield batch, labels, logits.float()


@dataclass(frozen=True)
class Evaluator:
    """Evaluates any network on one dataset."""

    loader: Iterable  # data.loading.EvalLoader: this rank's batches
    context: DistributedContext
    precision: str

    @torch.inference_mode()
    def run(self, model: nn.Module) -> EvalMetrics:
        """Classify every image of the loader's dataset once and count the correct ones.

        The bare module is evaluated, not its DDP wrapper, which would communicate in every
        forward. The ranks may have different numbers of batches; they meet at the end only.
        """
        started = time.monotonic()
        self.context.broadcast_buffers(model)
        set_float32_mode(self.precision)
        device, num_images = self.context.device, 0
        sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, top-1, top-5, not finite
        indices, predicted, unreadable = [], [], []
        for batch, labels, logits in classify(
            model, self.loader, device=device, precision=self.precision
        ):
            # Count, on the device.
            ranked = logits.topk(min(5, logits.shape[1])).indices
            correct = ranked == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="none")
            counts = correct[:, 0].sum(), correct.sum(), (~loss.isfinite()).sum()
            sums += torch.stack([loss.sum().double(), *counts])
            num_images += len(labels)
            indices.append(batch.index.clone())  # a worker's tensor keeps a file open
            predicted.append(ranked[:, 0])
            broken = batch.index[batch.broken != READ].tolist()
            unreadable += [self.loader.file_name(index) for index in broken]

        # Add up over the ranks: the only waits for the device are here.
        predictions = torch.full((len(self.loader.dataset),), -1)
        if indices:
            predictions[torch.cat(indices)] = torch.cat(predicted).cpu()
        sums = self.context.sum([*sums.tolist(), num_images])
        unreadable = [name for names in self.context.gather(unreadable) for name in names]
        top1, top5, overflowed, num_images = map(int, sums[1:])
        seconds = time.monotonic() - started
        return EvalMetrics(
            sums[0], top1, top5, num_images, unreadable, predictions, seconds, overflowed
        )
