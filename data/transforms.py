"""What happens to images: cropping in the workers (uint8), everything else on the device.

Workers decode, crop, flip and draw; a batch crosses to the device as uint8. RandAugment, the
normalisation, MixUp and CutMix then run there on whole batches (`Augment`), each op once on the
group of images that drew it, with the pixels that torchvision's RandAugment gives each one alone.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from data.sampling import seeded
from data.timm_randaugment import TimmRandAugment

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_BICUBIC = v2.InterpolationMode.BICUBIC


class TrainTransform:
    """RandomResizedCrop (bicubic) and flip of one uint8 image, and its RandAugment draws.

    `then` is what is done to the crop on the spot.
    """

    def __init__(
        self,
        size: int,
        *,
        scale: tuple[float, float] = (0.08, 1.0),
        num_ops: int = 2,
        then: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        self.crop = v2.RandomResizedCrop(size, scale=scale, interpolation=_BICUBIC)
        self.num_ops, self.then = num_ops, then

    def __call__(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # torchvision's draws and kernels without its dispatch, which takes as long as the kernels.
        box = self.crop.make_params([image])
        top, left = box["top"], box["left"]
        crop = image[:, top : top + box["height"], left : left + box["width"]]
        # Resizing is fastest where a pixel's three values lie side by side, as decoders leave them.
        crop = crop.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        crop = F.resize_image(crop, self.crop.size, interpolation=_BICUBIC, antialias=True)
        if torch.rand(1) < 0.5:
            crop = F.horizontal_flip_image(crop)
        if self.then:
            crop = self.then(crop)
        return crop, RandAugment.draw(self.num_ops)


class EvalTransform:
    """Resize of the shorter side to 256/224 of `size`, bicubic, and the centre crop of `size`.

    `resize` is the 256: the shorter side at a crop of 224.
    """

    def __init__(self, size: int, resize: int = 256):
        self.size, self.resize = size, round(size * resize / 224)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        image = F.resize_image(image, [self.resize], interpolation=_BICUBIC, antialias=True)
        return F.center_crop_image(image, [self.size, self.size])


def trained_transform(config: dict, size: int | None = None) -> EvalTransform:
    """The validation that a network was trained with, by its config; `size` is another crop."""
    return EvalTransform(size or config.get("img_size", 224), config.get("test_resize", 256))


class RandAugment(v2.RandAugment):
    """torchvision's RandAugment, drawn per image and applied per group of a batch.

    The draws are made where the sample is (its seed decides), the ops run where the batch is.
    """

    OPS = tuple(v2.RandAugment._AUGMENTATION_SPACE)
    SIGNED = tuple(signed for _, signed in v2.RandAugment._AUGMENTATION_SPACE.values())
    MOVES = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")  # pixels to other places
    MAPS = ("Brightness", "Posterize", "Solarize")  # each value to another one

    def __init__(self, *, magnitude: int):
        super().__init__(magnitude=magnitude)
        self._tables = {}

    @classmethod
    def draw(cls, num_ops: int) -> torch.Tensor:
        """int64, num_ops × 2: an op's number and 1 where its magnitude is negated."""
        draws = []
        for _ in range(num_ops):  # the same calls in the same order as torchvision's
            op = int(torch.randint(len(cls.OPS), ()))
            draws.append((op, int(cls.SIGNED[op] and bool(torch.rand(()) <= 0.5))))
        return torch.tensor(draws, dtype=torch.int64).view(num_ops, 2)

    def forward(self, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
        """images: uint8, B × 3 × H × W (left as they are).  draws: B × num_ops × 2, on the CPU."""
        images = images.clone(memory_format=torch.channels_last)
        rows = images.permute(0, 2, 3, 1).view(len(images), -1)  # B × HWC, the same memory
        for column in draws.unbind(1):
            for op, negated in column.unique(dim=0).tolist():
                if self.OPS[op] == "Identity":
                    continue
                group = (column == torch.tensor([op, negated])).all(1).nonzero().squeeze(1)
                group = group.to(images.device, non_blocking=True)
                changed = self._apply(rows.index_select(0, group), op, negated, images.shape[2:])
                rows.index_copy_(0, group, changed)
        return images

    def _apply(self, rows: torch.Tensor, op: int, negated: int, size: torch.Size) -> torch.Tensor:
        """One op on images that all drew it, n × HWC: by its table, or else as torchvision does."""
        if self.OPS[op] in self.MAPS:
            table = self._table(op, negated, size, rows.device)
            return table.gather(0, rows.flatten().long()).view_as(rows)
        if self.OPS[op] in self.MOVES:
            source, outside = self._table(op, negated, size, rows.device)
            return rows.gather(1, source.expand(len(rows), -1)).index_fill_(1, outside, 0)
        images = rows.view(-1, *size, 3).permute(0, 3, 1, 2)
        return self._theirs(images, op, negated).permute(0, 2, 3, 1).flatten(1)

    def _table(self, op: int, negated: int, size: torch.Size, device: torch.device):
        """What torchvision's op does to each value, or where it takes each pixel from.

        All images share the magnitude, so this is computed once: the op is run on a ramp of all
        values, or on an image whose pixels are their own numbers (exact up to 4096 × 4096).
        """
        key = op, negated, size, device
        if key not in self._tables:
            if self.OPS[op] in self.MAPS:
                ramp = torch.arange(256, dtype=torch.uint8, device=device).view(1, 1, 16, 16)
                self._tables[key] = self._theirs(ramp, op, negated).flatten()
            else:
                numbers = torch.arange(1, size.numel() + 1, device=device)  # 0: from outside
                moved = self._theirs(numbers.view(1, 1, *size).float(), op, negated)
                source = 3 * (moved.long().view(-1, 1) - 1) + torch.arange(3, device=device)
                source = source.flatten()
                self._tables[key] = source.clamp(min=0), (source < 0).nonzero().squeeze(1)
        return self._tables[key]

    def _theirs(self, images: torch.Tensor, op: int, negated: int) -> torch.Tensor:
        magnitude = self._magnitude(op, *images.shape[-2:])
        return self._apply_image_or_video_transform(
            images,
            self.OPS[op],
            -magnitude if negated else magnitude,
            interpolation=self.interpolation,
            fill=self._fill,
        )

    def _magnitude(self, op: int, height: int, width: int) -> float:
        magnitudes, _ = self._AUGMENTATION_SPACE[self.OPS[op]]
        values = magnitudes(self.num_magnitude_bins, height, width)
        return 0.0 if values is None else float(values[self.magnitude])


def normalise(images: torch.Tensor) -> torch.Tensor:
    """uint8 B × 3 × H × W → float32, channels last, less ImageNet's mean, over its deviation."""
    mean, scale = _constants(images.shape[3], images.device)
    # By rows of 3 W values: by channels last's three at a time it takes a CPU nine times as long.
    rows = images.permute(0, 2, 3, 1).flatten(2).float().sub_(mean).mul_(scale)
    return rows.unflatten(2, (-1, 3)).permute(0, 3, 1, 2)


@lru_cache
def _constants(width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    # Once a device: a copy from the host at each step would make it wait for the device.
    mean = torch.tensor(IMAGENET_MEAN).mul_(255)
    scale = torch.tensor(IMAGENET_STD).mul_(255).reciprocal_()
    return mean.repeat(width).to(device), scale.repeat(width).to(device)


class Augment:
    """The device's half of training augmentation: RandAugment, normalise, MixUp or CutMix.

    Each micro-batch is mixed by one of the two with equal chance, drawn from (seed, step, micro).
    Returns images, float32 B × 3 × H × W, and targets, B × num_classes, which sum to 1.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        seed: int,
        magnitude: int,
        mixup: float,
        cutmix: float,
    ):
        self.seed = seed
        self.randaugment = RandAugment(magnitude=magnitude)
        self.mixes = (
            v2.MixUp(alpha=mixup, num_classes=num_classes),
            v2.CutMix(alpha=cutmix, num_classes=num_classes),
        )

    def __call__(self, images, labels, draws, *, step: int, micro: int):
        images = normalise(self.randaugment(images, draws))
        with seeded(self.seed, step, micro, 1):  # the 1 keeps these apart from other keys
            mix = self.mixes[int(torch.randint(2, ()))]
            return mix(images, labels)


def make_augmentation(
    recipe: dict, *, size: int, seed: int, num_classes: int
) -> tuple[TrainTransform, Augment]:
    """The workers' half and the device's, by a recipe's crop_scale, randaugment, mixup and cutmix.

    randaugment: [ops, magnitude] of torchvision's, or the name of one of timm's.
    """
    (num_ops, magnitude), then = (0, 0), None
    if isinstance(recipe["randaugment"], str):
        then = TimmRandAugment(recipe["randaugment"], size=size, mean=IMAGENET_MEAN)
    else:
        num_ops, magnitude = recipe["randaugment"]
    transform = TrainTransform(size, scale=tuple(recipe["crop_scale"]), num_ops=num_ops, then=then)
    return transform, Augment(
        num_classes, seed=seed, magnitude=magnitude, mixup=recipe["mixup"], cutmix=recipe["cutmix"]
    )
