"""Measurements on the null GPU, each printed as one line of JSON; run by build.py or a test.

measure.py augment | step MODEL | steps | evaluate
"""

import json
import sys

import torch
from device import Counted

from data.images import Sample
from data.randaugment import RandAugment
from data.transforms import Augment

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
    return {**most, "channels_last": channels_last}


def compare_tables() -> dict:
    """Whether RandAugment's tables are the same on the device as on the CPU."""
    size, same = torch.Size((64, 64)), True
    augment = RandAugment(magnitude=9)
    ours, theirs = (augment._tables_for(size, torch.device(name)) for name in ("cpu", "cuda"))
    for name in ("values", "offsets", "source", "inside"):
        same &= torch.equal(getattr(ours, name), getattr(theirs, name).cpu())
    return {"same": same}


if __name__ == "__main__":
    torch.manual_seed(0)
    measurements = {"augment": measure_augment, "tables": compare_tables}
    result = measurements[sys.argv[1]](*sys.argv[2:])
    print("MEASURED " + json.dumps(result), flush=True)
