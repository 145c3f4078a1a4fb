"""What happens to images: cropping in the workers (uint8), everything else on the device.

Workers decode, crop, flip and draw; a batch crosses to the device as uint8. RandAugment, the
normalisation, MixUp and CutMix then run there on whole batches (`Augment`), each op once on the
group of images that drew it, with the pixels that torchvision's RandAugment gives each one alone.
"""

import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from data.sampling import seeded

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_BICUBIC = v2.InterpolationMode.BICUBIC


class TrainTransform:
    """RandomResizedCrop (bicubic) and flip of one uint8 image, and its RandAugment draws."""

    def __init__(self, size: int, *, scale: tuple[float, float] = (0.08, 1.0), num_ops: int = 2):
        self.crop = v2.RandomResizedCrop(size, scale=scale, interpolation=_BICUBIC)
        self.flip = v2.RandomHorizontalFlip()
        self.num_ops = num_ops

    def __call__(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.flip(self.crop(image)), RandAugment.draw(self.num_ops)


class EvalTransform:
    """Resize of the shorter side to 256/224 of `size`, bicubic, and the centre crop of `size`."""

    def __init__(self, size: int):
        self.size, self.resize = size, round(size * 256 / 224)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        image = F.resize(image, [self.resize], interpolation=_BICUBIC, antialias=True)
        return F.center_crop(image, [self.size, self.size])


class RandAugment(v2.RandAugment):
    """torchvision's RandAugment, drawn per image and applied per group of a batch.

    The draws are made where the sample is (its seed decides), the ops run where the batch is.
    """

    OPS = tuple(v2.RandAugment._AUGMENTATION_SPACE)
    SIGNED = tuple(signed for _, signed in v2.RandAugment._AUGMENTATION_SPACE.values())

    @classmethod
    def draw(cls, num_ops: int) -> torch.Tensor:
        """int64, num_ops × 2: an op's number and 1 where its magnitude is negated."""
        draws = torch.zeros(num_ops, 2, dtype=torch.int64)
        for row in draws:  # the same calls in the same order as torchvision's
            row[0] = torch.randint(len(cls.OPS), ())
            row[1] = cls.SIGNED[row[0]] and torch.rand(()) <= 0.5
        return draws

    def forward(self, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """images: uint8, B × 3 × H × W (left as they are).  draws: B × num_ops × 2, on the CPU."""
        images = images.clone()
        for column in draws.unbind(1):
            for op, negated in column.unique(dim=0).tolist():
                if self.OPS[op] == "Identity":
                    continue
                group = (column == torch.tensor([op, negated])).all(1).nonzero().squeeze(1)
                group = group.to(images.device, non_blocking=True)
                magnitude = self._magnitude(op, *images.shape[-2:])
                images[group] = self._apply_image_or_video_transform(
                    images[group], self.OPS[op], -magnitude if negated else magnitude,
                    interpolation=self.interpolation, fill=self._fill,
                )
        return images

    def _magnitude(self, op: int, height: int, width: int) -> float:
        magnitudes, _ = self._AUGMENTATION_SPACE[self.OPS[op]]
        values = magnitudes(self.num_magnitude_bins, height, width)
        return 0.0 if values is None else float(values[self.magnitude])


def normalise(images: torch.Tensor) -> torch.Tensor:
    """uint8 B × 3 × H × W → float32 with ImageNet's mean and standard deviation taken out."""
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).mul_(255).view(3, 1, 1)
    scale = torch.tensor(IMAGENET_STD, device=images.device).mul_(255).reciprocal_().view(3, 1, 1)
    return images.float().sub_(mean).mul_(scale)


class Augment:
    """The device's half of training augmentation: RandAugment, normalise, MixUp or CutMix.

    Each micro-batch is mixed by one of the two with equal chance, drawn from (seed, step, micro).
    Returns images, float32 B × 3 × H × W, and targets, B × num_classes, which sum to 1.
    """

    def __init__(
        self, num_classes: int, *, seed: int, magnitude: int, mixup: float, cutmix: float,
    ):
        self.seed = seed
        self.randaugment = RandAugment(magnitude=magnitude)
        self.mixes = (v2.MixUp(alpha=mixup, num_classes=num_classes),
                      v2.CutMix(alpha=cutmix, num_classes=num_classes))

    def __call__(self, images, labels, draws, *, step: int, micro: int):
        images = normalise(self.randaugment(images, draws))
        with seeded(self.seed, step, micro, 1):  # the 1 keeps these apart from the samples' keys
            mix = self.mixes[int(torch.randint(2, ()))]
            return mix(images, labels)
