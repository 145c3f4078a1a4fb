"""Measurements on the null GPU, each printed as one line of JSON; run by build.py or a test.

measure.py augment | step MODEL [PRECISION] | steps | evaluate
"""

import json
import os
import sys

import torch
from device import Counted

from data.images import Sample
from data.randaugment import RandAugment
from data.transforms import Augment, normalise
from models import MODELS, build_model
from training.distributed import init_distributed
from training.engine import Evaluator, Trainer
from training.optim import make_optimizer
from training.recipes import PRETRAIN

DEVICE = torch.device("cuda")


def make_batch(count: int, size: int, *, num_ops: int = 2, num_classes: int = 10) -> Sample:
    """A batch as a loader with pinned memory yields it."""
    generator = torch.Generator().manual_seed(0)
    batch = Sample(
        torch.zeros(count, size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2),
        torch.randint(num_classes, (count,), generator=generator),
        torch.arange(count),
        torch.stack([RandAugment.draw(num_ops) for _ in range(count)]),
        torch.zeros(count, dtype=torch.int64),
    )
    return Sample(*(field.pin_memory() for field in batch))


def measure_augment() -> dict:
    """Augmentation of 256 images after a warm-up: the most of each count over a few batches."""
    augment = Augment(1000, seed=0, magnitude=9, mixup=0.2, cutmix=1.0)
    most, channels_last = {}, True
    for step in range(6):
        batch = make_batch(256, 224, num_classes=1000)
        images = batch.image.to(DEVICE, non_blocking=True)
        labels = batch.label.to(DEVICE, non_blocking=True)
        with Counted() as counted:
            images, _ = augment(images, labels, batch.draws, step=step, micro=0)
        channels_last &= images.is_contiguous(memory_format=torch.channels_last)
        if step >= 2:
            most = {k: max(n, most.get(k, 0)) for k, n in counted.summary().items()}
    return {**most, "channels_last": channels_last, "same_tables": has_same_tables()}


def has_same_tables() -> bool:
    """Whether RandAugment's tables are the same on the device as on the CPU."""
    augment, size = RandAugment(magnitude=9), torch.Size((64, 64))
    ours, theirs = (augment._tables_for(size, torch.device(name)) for name in ("cpu", "cuda"))
    return all(torch.equal(x, getattr(theirs, name).cpu()) for name, x in vars(ours).items())


def make_trainer(name: str, precision: str, num_classes: int = 10, **settings) -> Trainer:
    """A trainer as pretrain_imagenet.py makes it."""
    model = build_model(name, num_classes).to(DEVICE, memory_format=torch.channels_last)
    optimizer = make_optimizer(PRETRAIN["guide"], model, lr=0.1)
    augment = Augment(num_classes, seed=0, magnitude=9, mixup=0.2, cutmix=1.0)
    return Trainer(model, optimizer, CONTEXT, precision, augment, **settings)


def measure_step(name: str, precision: str = "bf16") -> dict:
    """Training steps of 256 images of 224 × 224 after a warm-up: the most of each count.

    peak_mb: the most memory allocated in them; grown_mb: by how much more is allocated after the
    last step than after the warm-up.
    """
    trainer = make_trainer(name, precision, num_classes=1000)
    batches = [make_batch(256, 224, num_classes=1000) for _ in range(2)]
    most, host_ms, allocated = {}, [], []
    for step in range(7):
        with Counted() as counted:
            trainer.step([batches[step % 2]], step=step, lr=0.1)
        trainer.read_grad_norms()  # as the loop does every now and then
        allocated.append(torch.cuda.memory_allocated())
        if step < 3:
            torch.cuda.reset_peak_memory_stats()
            continue
        summary = counted.summary()
        host_ms.append(summary.pop("host_ms"))
        most = {k: max(n, most.get(k, 0)) for k, n in summary.items()}
    most["peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
    most["grown_mb"] = (allocated[-1] - allocated[2]) / 1e6
    return {**most, "host_ms": min(host_ms)}


def measure_steps() -> dict:
    """One step of two micro-batches of every model in bf16 and fp16: waits and pageable copies."""
    results = {}
    for name in MODELS:
        for precision in ("bf16", "fp16"):
            trainer = make_trainer(name, precision, clip_norm=1.0)
            for step in range(4):
                batches = [make_batch(16, 64), make_batch(16, 64)]
                with Counted() as counted:
                    trainer.step(batches, step=step, lr=0.1)
            summary = counted.summary()
            results[f"{name} {precision}"] = [summary[k] for k in ("kernels", "waits", "pageable")]
    return results


class Loader(list):
    """Batches with what `evaluate` asks of a data.loading.EvalLoader."""

    dataset = range(16 + 16 + 7)
    normalise = staticmethod(normalise)

    def file_name(self, index: int) -> str:
        return str(index)


def measure_evaluate() -> dict:
    """One evaluation of three batches, after another one."""
    batches = [make_batch(count, 64, num_ops=0) for count in (16, 16, 7)]
    loader = Loader(batch._replace(index=batch.index + 16 * i) for i, batch in enumerate(batches))
    results = {}
    for precision in ("bf16", "fp16", "fp32"):
        model = build_model("twistnet18", 10).to(DEVICE, memory_format=torch.channels_last)
        Evaluator(loader, CONTEXT, precision).run(model)
        with Counted() as counted:
            metrics = Evaluator(loader, CONTEXT, precision).run(model)
        results[precision] = {**counted.summary(), "images": metrics.num_images}
    return results


if __name__ == "__main__":
    CONTEXT = init_distributed()
    torch.manual_seed(0)
    measurements = {
        "augment": measure_augment,
        "step": measure_step,
        "steps": measure_steps,
        "evaluate": measure_evaluate,
    }
    result = measurements[sys.argv[1]](*sys.argv[2:])
    print("MEASURED " + json.dumps(result), flush=True)
    # At the interpreter's end PyTorch's threads sometimes abort a process that has no real CUDA.
    os._exit(0)
