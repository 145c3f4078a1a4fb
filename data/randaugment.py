"""RandAugment on whole batches: drawn per image in the workers, applied on the training device.

Every image gets exactly the pixels that torchvision's RandAugment gives to it alone (tested on the
CPU). Instead of being called once per image, each kind of operation runs once per batch, on all
images that drew it, and the host never waits for the device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.transforms import v2

# The private names of torchvision that this file depends on (requirements.txt bounds its version):
# RandAugment._AUGMENTATION_SPACE, RandAugment._apply_image_or_video_transform, RandAugment._fill.
SPACE = v2.RandAugment._AUGMENTATION_SPACE  # operation -> (its magnitudes, whether it has a sign)
OPS = tuple(SPACE)

# The kinds of operations. A batch is sorted by what its images drew, in this order.
LOOKUPS = ("Brightness", "Posterize", "Solarize", "AutoContrast")  # a table of 256 values
MOVES = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")  # pixels change places
BLENDS = ("Color", "Contrast", "Sharpness")  # weighted sums of the image and a plainer one
SORTED_OPS = ("Identity", *LOOKUPS, *MOVES, *BLENDS, "Equalize")

# Every (operation, negated) that can be drawn, in sorted order, and where each one is in that list.
CHOICES = [(op, negated) for op in SORTED_OPS for negated in range(2 if SPACE[op][1] else 1)]
CHOICE_OF = torch.tensor(
    [[CHOICES.index((op, negated and int(SPACE[op][1]))) for negated in (0, 1)] for op in OPS]
)

# The row of each choice in the tables of its kind; 0 for the kinds that have none.
TABLE_ROW = torch.zeros(len(CHOICES), dtype=torch.int64)
for _kind in (LOOKUPS, MOVES):
    _chosen = [i for i, (op, _) in enumerate(CHOICES) if op in _kind]
    TABLE_ROW[_chosen] = torch.arange(len(_chosen))

# More pixels than this at a time (32 images of 224 × 224) do not stay in a CPU's caches.
PIXELS_AT_ONCE_ON_CPU = 32 * 224 * 224


class RandAugment:
    """RandAugment with `magnitude` (0 to 30, of torchvision's 31 bins) for batches of images.

    Cubuk et al. 2019, arXiv:1909.13719; operations and magnitudes are those of torchvision.
    """

    def __init__(self, *, magnitude: int):
        self.magnitude = magnitude
        self.reference = v2.RandAugment(magnitude=magnitude)
        # A blend is weight × image + (1 - weight) × plainer image, whatever the image's size.
        blends = [choice for choice in CHOICES if choice[0] in BLENDS]
        self.weights = {choice: 1.0 + self._magnitude(*choice, (1, 1)) for choice in blends}
        self.tables: dict[tuple[torch.Size, torch.device], Tables] = {}

    @staticmethod
    def draw(num_ops: int) -> Tensor:
        """Draw the operations of one image: int64, num_ops × 2, a position in OPS and 1 if negated.

        The generator is called as torchvision calls it, so the same seed gives the same operations.
        """
        draws = []
        for _ in range(num_ops):
            op = int(torch.randint(len(OPS), ()))
            has_sign = SPACE[OPS[op]][1]
            draws.append((op, int(has_sign and bool(torch.rand(()) <= 0.5))))
        return torch.tensor(draws, dtype=torch.int64).view(num_ops, 2)

    def __call__(self, images: Tensor, draws: Tensor) -> Tensor:
        """Apply the drawn operations to a batch and return new images, channels last in memory.

        images: uint8, B × 3 × H × W, on any device.  draws: int64, B × num_ops × 2, on the CPU.
        Without operations (num_ops = 0), the images are returned as they are.
        """
        if draws.shape[1] == 0:
            return images
        at_once = len(images)
        if images.device.type == "cpu":
            at_once = max(1, PIXELS_AT_ONCE_ON_CPU // images.shape[2:].numel())
        parts = zip(images.split(at_once), draws.split(at_once), strict=True)
        done = [self._augment(part, part_draws) for part, part_draws in parts]
        return done[0] if len(done) == 1 else torch.cat(done)

    def _augment(self, images: Tensor, draws: Tensor) -> Tensor:
        size = images.shape[2:]
        tables = self._tables_for(size, images.device)

        # One copy to the device, from pinned memory: a copy from pageable memory makes it wait.
        plan, counts = make_plan(draws)
        if images.device.type == "cuda":
            plan = plan.pin_memory()
        plan = plan.to(images.device, non_blocking=True)

        # In each round, sort the images by what they drew, then apply each kind to its slice.
        rows = images.permute(0, 2, 3, 1).flatten(1)  # B × HWC
        for column, count in enumerate(counts):
            order, table_row = plan[2 * column], plan[2 * column + 1]
            images = rows.index_select(0, order).unflatten(1, (*size, 3))
            batch = SortedBatch(images, table_row, count)
            look_up(batch, tables)
            move(batch, tables)
            blend_with_grey(batch, self.weights)
            sharpen(batch, self.weights)
            equalize(batch)
            rows = batch.images.flatten(1)
        rows = rows.index_select(0, plan[-1])  # back to the order of the batch
        return rows.unflatten(1, (*size, 3)).permute(0, 3, 1, 2)

    def _magnitude(self, op: str, negated: int, size: tuple[int, int]) -> float:
        values = SPACE[op][0](self.reference.num_magnitude_bins, *size)
        magnitude = 0.0 if values is None else float(values[self.magnitude])
        return -magnitude if negated else magnitude

    def _tables_for(self, size: torch.Size, device: torch.device) -> "Tables":
        if (size, device) not in self.tables:
            self.tables[size, device] = self._make_tables(size, device)
        return self.tables[size, device]

    def _make_tables(self, size: torch.Size, device: torch.device) -> "Tables":
        """Run torchvision's operations on probes to learn what they do to any image.

        This happens on the CPU whatever the device: torchvision rotates and shears by a matrix
        product, whose rounding moves about 1 % of the pixels where TF32 is allowed.
        """

        # What becomes of each value. AutoContrast depends on the image: its rows are filled later.
        ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
        values = [self._run(ramp, *c, size).flatten() for c in CHOICES if c[0] in LOOKUPS]

        # Where each pixel comes from. The probe's pixels are their own numbers, exact in float32
        # up to 4096 × 4096; 0 stands for outside of the image.
        numbers = torch.arange(1, size.numel() + 1).view(1, 1, *size).float()
        moved = [self._run(numbers, *c, size).long().flatten() for c in CHOICES if c[0] in MOVES]
        pixel = torch.stack(moved).unsqueeze(2) - 1  # 10 × HW × 1
        source = (3 * pixel + torch.arange(3)).flatten(1)  # 10 × HWC
        return Tables(
            ramp=ramp.flatten().to(device),
            values=torch.stack(values).repeat(1, 3).to(device),
            offsets=(256 * torch.arange(3)).repeat(size[1]).to(device),
            source=source.clamp(min=0).to(device),
            inside=(source >= 0).to(torch.uint8).to(device),
        )

    def _run(self, images: Tensor, op: str, negated: int, size: torch.Size) -> Tensor:
        """torchvision's operation, with the magnitude that it has for images of `size`."""
        return self.reference._apply_image_or_video_transform(
            images,
            op,
            self._magnitude(op, negated, size),
            interpolation=self.reference.interpolation,
            fill=self.reference._fill,
        )


@dataclass(frozen=True)
class Tables:
    """What the operations of LOOKUPS and MOVES do, for one image size; a row per choice."""

    ramp: Tensor  # uint8, 256: every value
    values: Tensor  # uint8, 5 × 768: what becomes of each value of each channel
    offsets: Tensor  # int64, 3W: 0, 256, 512, 0, …: where a channel's values start in `values`
    source: Tensor  # int64, 10 × HWC: where each position's value comes from
    inside: Tensor  # uint8, 10 × HWC: 0 where it would come from outside of the image


class SortedBatch:
    """The images of one round, sorted by choice, so that each operation works on a slice."""

    def __init__(self, images: Tensor, table_row: Tensor, counts: list[int]):
        """images: uint8, B × H × W × 3.  table_row: B.  counts: images per choice."""
        self.images, self.table_row = images, table_row
        self.ends = torch.tensor([0, *counts]).cumsum(0).tolist()

    def find(self, *ops: str, negated: int | None = None) -> slice:
        """Where the images are that drew one of `ops` (neighbours in SORTED_OPS)."""
        numbers = [i for i, (op, n) in enumerate(CHOICES) if op in ops and negated in (None, n)]
        return slice(self.ends[numbers[0]], self.ends[numbers[-1] + 1])


def make_plan(draws: Tensor) -> tuple[Tensor, list[list[int]]]:
    """How to sort a batch, round by round, without asking the device.

    draws: B × num_ops × 2. Returns (2 num_ops + 1) × B: for each round the images' new order and
    their rows in the tables, at last the way back; and for each round the images per choice.
    """
    place = torch.arange(len(draws))  # which image is where
    plan, counts = [], []
    for column in draws.unbind(1):
        choice = CHOICE_OF[column[:, 0], column[:, 1]]
        choice, order = choice[place].sort(stable=True)
        place = place[order]
        plan += [order, TABLE_ROW[choice]]
        counts.append(choice.bincount(minlength=len(CHOICES)).tolist())
    plan.append(place.argsort())
    return torch.stack(plan), counts


def look_up(batch: SortedBatch, tables: Tables) -> None:
    """Brightness, Posterize, Solarize and AutoContrast: every value becomes another, in place."""
    group, auto = batch.find(*LOOKUPS), batch.find("AutoContrast")
    images = batch.images[group]
    if len(images) == 0:
        return
    values = tables.values.index_select(0, batch.table_row[group])  # n × 768
    if auto.stop > auto.start:
        stretch_contrast(batch.images[auto], tables.ramp, values[auto.start - group.start :])
    index = images.flatten(2).long().add_(tables.offsets).flatten(1)
    torch.gather(values, 1, index, out=images.flatten(1))


def stretch_contrast(images: Tensor, ramp: Tensor, table: Tensor) -> None:
    """AutoContrast of images, uint8, n × H × W × 3, as a table, n × 768, by torchvision's formula.

    The formula is applied to the 256 values of `ramp`, not to the pixels. What it gives for values
    that are not in the image does not matter.
    """
    low, high = images.flatten(2).aminmax(dim=1)  # n × 3W
    low = low.unflatten(1, (-1, 3)).amin(1).unsqueeze(2)  # n × 3 × 1
    high = high.unflatten(1, (-1, 3)).amax(1).unsqueeze(2)
    scale = (high - low).mul(1.0 / 255)
    stretched = (ramp - low).div(scale).clamp_(0, 255).to(torch.uint8)
    torch.where(high == low, ramp, stretched, out=table.unflatten(1, (3, 256)))


def move(batch: SortedBatch, tables: Tables) -> None:
    """Shear, translate and rotate, in place; what comes from outside of the image is black."""
    group = batch.find(*MOVES)
    rows = batch.images[group].flatten(1)
    if len(rows) == 0:
        return
    table_row = batch.table_row[group]
    moved = rows.gather(1, tables.source.index_select(0, table_row))
    torch.mul(moved, tables.inside.index_select(0, table_row), out=rows)


def blend_with_grey(batch: SortedBatch, weights: dict[tuple[str, int], float]) -> None:
    """Color and Contrast: towards the grey image, or towards its mean, or away from it; in place.

    The arithmetic is torchvision's, operation by operation: other roundings would show in pixels.
    """
    group = batch.find("Color", "Contrast")
    if group.stop == group.start:
        return
    images = batch.images[group].float()
    red, green, blue = images.unbind(3)
    grey = red.mul(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114).floor_()
    grey = grey.unsqueeze(3)  # n × H × W × 1
    contrast = batch.find("Contrast").start - group.start
    plainer = {"Color": grey, "Contrast": grey[contrast:].mean((1, 2, 3), keepdim=True)}
    for (op, negated), weight in weights.items():
        if op in plainer:
            chosen, start = batch.find(op, negated=negated), batch.find(op).start
            other = plainer[op][chosen.start - start : chosen.stop - start]
            image = images[chosen.start - group.start : chosen.stop - group.start]
            image.mul_(weight).add_(other, alpha=1.0 - weight)
    batch.images[group] = images.clamp_(0, 255)


def sharpen(batch: SortedBatch, weights: dict[tuple[str, int], float]) -> None:
    """Sharpness: away from the blurred image, or towards it, in place; the border stays.

    Blurred is (sum of the 3 × 3 pixels + 4 × the middle one) / 13, rounded. Sums of whole numbers
    are exact in any order and k / 13 is never close to a half, so the pixels are torchvision's.
    There is no convolution because cudnn.benchmark would time it again for every number of images,
    TF32 could change its pixels, and torchvision copies its kernel to the device in every call,
    which makes the host wait.
    """
    group = batch.find("Sharpness")
    if group.stop == group.start:
        return
    rows = batch.images[group].float().flatten(2)  # n × H × 3W: neighbours are 3 apart
    middle = rows[:, 1:-1, 3:-3]
    across = rows[:, :, :-6] + rows[:, :, 3:-3]
    across += rows[:, :, 6:]
    blurred = across[:, :-2] + across[:, 1:-1]
    blurred += across[:, 2:]
    blurred.add_(middle, alpha=4).mul_(1 / 13).round_()
    difference = blurred.sub_(middle)
    for negated in (0, 1):
        chosen = batch.find("Sharpness", negated=negated)
        part = slice(chosen.start - group.start, chosen.stop - group.start)
        middle[part].add_(difference[part], alpha=1.0 - weights["Sharpness", negated])
    batch.images[group] = rows.clamp_(0, 255).view_as(batch.images[group])


def equalize(batch: SortedBatch) -> None:
    """Equalize: torchvision's, which works on batches; in place."""
    images = batch.images[batch.find("Equalize")].permute(0, 3, 1, 2)
    if len(images):
        images.copy_(v2.functional.equalize_image(images))
