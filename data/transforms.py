"""Transforms of images: cropping in the workers (uint8), everything else on the training device.

Workers decode, crop and flip each image, and draw its RandAugment operations (`TrainTransform`).
Batches are copied to the device as uint8; RandAugment, normalisation and MixUp or CutMix run there
on whole batches (`Augment`).
"""

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch.nn.functional import one_hot
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from data.randaugment import RandAugment
from data.sampling import MIXING, key_seed, seeded
from data.timm_randaugment import TimmRandAugment

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_BICUBIC = v2.InterpolationMode.BICUBIC
RECIPE_SIZE = 224  # px; the sizes in recipes are for this --img_size, others are in proportion
MAX_ASPECT = 32  # longer side over shorter: of longer images, evaluation resizes only the centre


def flip_randomly(epoch: int, index: int) -> bool:
    return bool(torch.rand(1) < 0.5)


def flip_alternately(epoch: int, index: int, *, seed: int) -> bool:
    """Flip each image in every second epoch; whether in the first depends on (seed, index).

    Two epochs thus show an image both ways. Source: Jordan 2024, arXiv:2404.00498, section 3.6.
    """
    # The fifth number keeps this draw apart from those of samples and micro-batches.
    return (key_seed(seed, 0, index, 0, 1) + epoch) % 2 == 1


class TrainTransform:
    """RandomResizedCrop (bicubic) and flip of one uint8 image, and its RandAugment draws.

    RandomResizedCrop: Szegedy et al. 2015, arXiv:1409.4842, section 6. `scale` is the range of the
    crop's share of the image's area; `num_ops` operations are drawn for the device to apply;
    `post_crop` is applied to the crop here, in the worker. `size` is the side of the crop, or a
    function that returns it for an epoch; `flip` decides whether to flip, by epoch and index.
    """

    def __init__(
        self,
        size: int | Callable[[int], int],
        *,
        scale: tuple[float, float] = (0.08, 1.0),
        num_ops: int = 2,
        post_crop: Callable[[torch.Tensor], torch.Tensor] | None = None,
        flip: Callable[[int, int], bool] = flip_randomly,
    ):
        self.size = size
        self.crop = v2.RandomResizedCrop(1, scale=scale, interpolation=_BICUBIC)
        self.num_ops, self.post_crop = num_ops, post_crop
        self.flip = flip

    def size_at(self, epoch: int) -> int:
        return self.size(epoch) if callable(self.size) else self.size

    def __call__(
        self, image: torch.Tensor, epoch: int = 0, index: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 3 × H × W → uint8 3 × size × size, and draws, int64 num_ops × 2."""
        # Crop: torchvision's draws and kernels, without its dispatch, which takes as long.
        box = self.crop.make_params([image])
        top, left = box["top"], box["left"]
        crop = image[:, top : top + box["height"], left : left + box["width"]]
        # Resize: fastest if the three values of a pixel are next to each other in memory.
        crop = crop.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        size = [self.size_at(epoch)] * 2
        crop = F.resize_image(crop, size, interpolation=_BICUBIC, antialias=True)
        if self.flip(epoch, index):
            crop = F.horizontal_flip_image(crop)
        if self.post_crop:
            crop = self.post_crop(crop)
        return crop, RandAugment.draw(self.num_ops)


def ramp_size(epoch: int, *, epochs: int, low: int, high: int) -> int:
    """Side of the training crop in `epoch` (counted from 0) of a run of `epochs` epochs.

    It is `low` for two thirds of the run, then rises linearly and is `high` in the last epoch; a
    size that changes is always a multiple of 16 pixels.

    >>> [ramp_size(e, epochs=9, low=160, high=192) for e in range(9)]
    [160, 160, 160, 160, 160, 160, 176, 176, 192]
    """
    if low == high:
        return low
    progress = (3 * (epoch + 1) - 2 * epochs) / epochs
    return round_to_16(low + (high - low) * max(0.0, progress))


def find_train_sizes(config: dict) -> tuple[int, int]:
    """Side of the training crops at the start and at the end of a run, in pixels."""
    img_size = config["img_size"]
    if not config.get("train_sizes"):
        return img_size, img_size
    low, high = (round_to_16(size * img_size / RECIPE_SIZE) for size in config["train_sizes"])
    return low, high


def make_size_schedule(config: dict) -> Callable[[int], int]:
    """The side of the training crop as a function of the epoch, counted from 0."""
    low, high = find_train_sizes(config)
    return partial(ramp_size, epochs=config.get("epochs", 1), low=low, high=high)


def list_train_sizes(config: dict) -> list[int]:
    """The sides of the training crops of a whole run, in pixels, each once, from small to large."""
    size_at = make_size_schedule(config)
    return sorted({size_at(epoch) for epoch in range(config["epochs"])})


def round_to_16(size: float) -> int:
    return max(32, 16 * round(size / 16))


class EvalTransform:
    """Resize the shorter side (bicubic), then crop the central `size` × `size` pixels.

    `resize` is the length of the shorter side for a crop of RECIPE_SIZE; others are in proportion.
    """

    def __init__(self, size: int, resize: int = 256):
        self.size, self.resize = size, round(size * resize / RECIPE_SIZE)

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 3 × H × W → uint8 3 × size × size."""
        image = _bound_aspect(image)
        image = F.resize_image(image, [self.resize], interpolation=_BICUBIC, antialias=True)
        return F.center_crop_image(image, [self.size, self.size])


def _bound_aspect(image: torch.Tensor) -> torch.Tensor:
    """The centre of an image beyond MAX_ASPECT; any other image as it is.

    Resized whole, a file of 1 × 65,000 px would take 14 GB.
    """
    height, width = image.shape[1:]
    longer = MAX_ASPECT * min(height, width)
    longer += (max(height, width) - longer) % 2  # the centre stays between the same pixels
    if max(height, width) <= longer:
        return image
    return F.center_crop_image(image, [min(height, longer), min(width, longer)])


def make_eval_transform(config: dict, size: int | None = None) -> EvalTransform:
    """The evaluation transform that a network was trained with, or one with another crop `size`.

    config: the training run's, as in its checkpoint and its weights file.
    """
    return EvalTransform(size or config.get("img_size", 224), config.get("test_resize", 256))


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Subtract ImageNet's mean and divide by its standard deviation.

    images: uint8, B × 3 × H × W. Returns a new float32 tensor, channels last in memory.
    """
    mean, scale = _constants(images.shape[3], images.device)
    # On rows of 3W values: broadcasting over 3 channels in the last dimension takes a CPU nine
    # times as long.
    rows = images.permute(0, 2, 3, 1).flatten(2).float().sub_(mean).mul_(scale)
    return rows.unflatten(2, (-1, 3)).permute(0, 3, 1, 2)


@lru_cache
def _constants(width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    # Cached: copying them from the host in every step would make it wait for the device.
    mean = torch.tensor(IMAGENET_MEAN).mul_(255)
    scale = torch.tensor(IMAGENET_STD).mul_(255).reciprocal_()
    return mean.repeat(width).to(device), scale.repeat(width).to(device)


class Augment:
    """The part of training augmentation that runs on the device: RandAugment, normalise, mixing.

    Each micro-batch is mixed by MixUp or by CutMix, with equal chance; what is drawn depends only
    on (seed, step, micro). `mixup` and `cutmix` are the alphas of their Beta distributions, and 0
    leaves that one out.
    """

    def __init__(self, num_classes: int, *, seed: int, magnitude: int, mixup: float, cutmix: float):
        self.num_classes, self.seed = num_classes, seed
        self.randaugment = RandAugment(magnitude=magnitude)
        self.mixing = []
        if mixup > 0:
            self.mixing.append((mix_up, v2.MixUp(alpha=mixup)))
        if cutmix > 0:
            self.mixing.append((cut_mix, v2.CutMix(alpha=cutmix)))

    def __call__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        draws: torch.Tensor,
        *,
        step: int,
        micro: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Augment micro-batch `micro` of global step `step`.

        images: uint8, B × 3 × H × W.  labels: int64, B.  draws: B × num_ops × 2, on the CPU.
        Returns images, float32, B × 3 × H × W, channels last in memory, and targets, float32,
        B × num_classes, whose rows sum to 1.
        """
        images = normalise(self.randaugment(images, draws))
        targets = one_hot(labels, self.num_classes)
        if not self.mixing:
            return images, targets.float()
        with seeded(self.seed, step, micro, MIXING):
            mix, transform = self.mixing[int(torch.randint(len(self.mixing), ()))]
            return mix(images, targets, **transform.make_params([images]))


def mix_up(
    images: torch.Tensor, targets: torch.Tensor, *, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """lam × each image + (1 - lam) × the one before it, and the same of the targets.

    MixUp: Zhang et al. 2018, arXiv:1710.09412. The images' memory is reused.
    """
    # torchvision's values. It returns another memory layout, for which the network copies them.
    pixels = images.permute(0, 2, 3, 1)  # B × H × W × 3, as they are in memory
    mixed = pixels.roll(1, 0).mul_(1 - lam).add_(pixels.mul_(lam))
    return mixed.permute(0, 3, 1, 2), mix_targets(targets, lam)


def cut_mix(
    images: torch.Tensor,
    targets: torch.Tensor,
    *,
    box: tuple[int, int, int, int],
    lam_adjusted: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace a box of each image by that of the image before it; weigh targets by the areas.

    CutMix: Yun et al. 2019, arXiv:1905.04899. The images are changed in place; box: x1, y1, x2, y2;
    lam_adjusted: the share of the area outside of the box.
    """
    left, top, right, bottom = box
    patch = images[:, :, top:bottom, left:right]
    patch.copy_(patch.roll(1, 0))
    return images, mix_targets(targets, lam_adjusted)


def mix_targets(targets: torch.Tensor, lam: float) -> torch.Tensor:
    return (targets.roll(1, 0) * (1 - lam)).add_(targets * lam)  # float32, also of integers


def make_augmentation(
    recipe: dict, *, size: int, seed: int, num_classes: int
) -> tuple[TrainTransform, Augment]:
    """Make the workers' part and the device's part of a recipe's augmentation.

    Used of the recipe: crop_scale, randaugment, mixup and cutmix; and, where it has them,
    train_sizes with epochs, and flip. randaugment is [operations per image, magnitude] for
    torchvision's, or the name of a policy for timm's. `size` is that of --img_size. Raises
    UserError if timm is required and not installed.
    """
    (num_ops, magnitude), post_crop = (0, 0), None
    if isinstance(recipe["randaugment"], str):
        post_crop = TimmRandAugment(recipe["randaugment"], size=size)
    else:
        num_ops, magnitude = recipe["randaugment"]
    flips = {"random": flip_randomly, "alternating": partial(flip_alternately, seed=seed)}
    transform = TrainTransform(
        make_size_schedule({**recipe, "img_size": size}),
        scale=tuple(recipe["crop_scale"]),
        num_ops=num_ops,
        post_crop=post_crop,
        flip=flips[recipe.get("flip", "random")],
    )
    return transform, Augment(
        num_classes, seed=seed, magnitude=magnitude, mixup=recipe["mixup"], cutmix=recipe["cutmix"]
    )
