"""Run a training script with the data path that everyone copies: tools.benchmark's other side.

  python -m tools.benchmark.plain pretrain_imagenet.py --data_dir /path/to/imagenet --no_amp

Pillow decodes in every epoch; the workers crop, draw RandAugment and normalise image by image, and
hand over float32. All else is the script's own: the order of images, mixing, steps, checkpoints.
--nchw before the script also takes channels_last away.
"""

import importlib
import sys
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import default_collate
from torchvision import transforms as v1

from common.cli import run
from common.errors import UserError
from data import loading, transforms
from data.images import ImageFiles
from data.transforms import IMAGENET_MEAN, IMAGENET_STD, Augment

BICUBIC = v1.InterpolationMode.BICUBIC
TO_FLOAT = v1.ToTensor(), v1.Normalize(IMAGENET_MEAN, IMAGENET_STD)


def read(source: ImageFiles, index: int) -> Image.Image:
    with open(source.path(index), "rb") as file:
        return Image.open(file).convert("RGB")


def train_transform(size: int, *, scale=(0.08, 1.0), randaugment=(2, 9)) -> v1.Compose:
    return v1.Compose(
        [
            v1.RandomResizedCrop(size, scale, interpolation=BICUBIC),
            v1.RandomHorizontalFlip(),
            v1.RandAugment(*randaugment),
            *TO_FLOAT,
        ]
    )


def eval_transform(size: int, resize: int = 256) -> v1.Compose:
    return v1.Compose(
        [v1.Resize(round(size * resize / 224), BICUBIC), v1.CenterCrop(size), *TO_FLOAT]
    )


def make_augmentation(recipe: dict, *, size: int, seed: int, num_classes: int):
    """The workers' half, which is nearly all, and the device's, which only mixes."""
    transform = train_transform(
        size, scale=tuple(recipe["crop_scale"]), randaugment=recipe["randaugment"]
    )
    augment = Augment(
        num_classes, seed=seed, magnitude=0, mixup=recipe["mixup"], cutmix=recipe["cutmix"]
    )
    augment.randaugment = lambda images, draws: images
    return lambda image: (transform(image), torch.empty(0, 2, dtype=torch.int64)), augment


def main() -> None:
    words = sys.argv[1:]
    if words[:1] == ["--nchw"]:
        words = words[1:]
        torch.channels_last = torch.contiguous_format  # whoever asks for it from now on
    if not words or Path(words[0]).name not in ("pretrain_imagenet.py", "train.py"):
        raise UserError("give pretrain_imagenet.py or train.py, and its flags")
    ImageFiles.read, loading.collate = read, default_collate
    script = importlib.import_module(Path(words[0]).stem)
    script.make_augmentation, script.EvalTransform = make_augmentation, eval_transform
    transforms.normalise = script.normalise = lambda images: images  # the workers have done it
    script.main(words[1:])


if __name__ == "__main__":
    run(main)
