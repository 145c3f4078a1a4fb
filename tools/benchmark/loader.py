"""The CPU time of loading: the workers' part of several ways to read images, and the device's."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch.utils.data import default_collate
from torchvision.datasets import ImageFolder

from common.errors import UserError
from data.decoding import fast_jpeg
from data.imagenet import list_tree, load_imagenet
from data.images import ImageFiles, Sample, TrainSet, collate
from data.packed import MANIFEST, PackedImages, finish_pack, open_pack, read_manifest
from data.synthetic import write_imagenet_tree
from data.transforms import find_train_sizes, make_augmentation
from tools.benchmark.plain_train import MixingCollate, make_train_transform, plain_values
from tools.benchmark.timing import interleaved, run_python
from training.distributed import init_distributed
from training.recipes import PRETRAIN

DRAWN_SIZE = 420  # px, about ImageNet's mean


def measure_loader(args) -> dict:
    """CPU time per image of a worker: read, decode, augment, collate; and of the device's part.

    The side of the crop is the smallest of the recipe at args.img_size.
    """
    size = min(find_train_sizes({**PRETRAIN[args.recipe], "img_size": args.img_size}))
    return measure_loader_at(args, [size])[size]


def measure_loader_at(args, sizes: list[int]) -> dict[int, dict]:
    """What measure_loader finds, for each side of the crop, of the same images."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        # the same images as files, packed, and decoded
        folder = Path(name)
        tree = make_small_tree(args.data_dir, folder / "tree", count=args.images)
        files, _, classes = load_imagenet(tree)
        packed = pack(tree, folder / "packed")
        pixels = decode_all(files, folder / "decoded")
        kilobytes = {
            "files": sum(files.path(i).stat().st_size for i in range(len(files))),
            "packed": packed.data.numel(),
            "decoded": pixels.data.numel(),
        }

        recipe = {**PRETRAIN[args.recipe], "train_sizes": None}
        min_scale, num_ops, mixup = plain_values(recipe).values()
        mix = MixingCollate(len(classes), mixup) if mixup else default_collate
        found = {}
        for size in sizes:
            # one row per way to read them
            transform, augment = make_augmentation(
                recipe,
                size=size,
                seed=0,
                num_classes=max(1000, len(classes)),
            )
            plain = ImageFolder(tree / "train", make_train_transform(size, min_scale, num_ops))
            decoder = "torchcodec" if fast_jpeg() else "Pillow"
            rows = {
                "plain: ImageFolder, PIL, float": load_plainly(plain, mix, args.batch_size),
                f"files, {decoder}": load(TrainSet(files, transform, 0), args.batch_size),
                f"packed 256, {decoder}": load(TrainSet(packed, transform, 0), args.batch_size),
                "decoded once (fine-tuning)": load(TrainSet(pixels, transform, 0), args.batch_size),
            }
            table = interleaved(rows, rounds=args.rounds, images=len(files))

            # what the workers leave to the device
            dataset = TrainSet(files, transform, 0)
            batch = collate([dataset[0, i % len(files)] for i in range(args.batch_size)])
            found[size] = {
                "loader": table,
                "device": measure_device_part(augment, batch, rounds=args.rounds),
                "images": len(files),
                "size": size,
                "kb": {what: total / len(files) / 1e3 for what, total in kilobytes.items()},
            }
    return found


def make_small_tree(data_dir: Path | None, tree: Path, *, count: int) -> Path:
    """Fill `tree` with links to `count` of data_dir's images, or with as many drawn ones."""
    if data_dir is None:
        write_imagenet_tree(
            tree, train_per_class=-(-count // 8), val_per_class=1, size=DRAWN_SIZE, seed=0
        )
        return tree
    if (data_dir / MANIFEST).exists():
        raise UserError(f"--data_dir {data_dir} is packed: give the tree; the benchmark packs it")
    inside = data_dir / "train"
    source, _ = list_tree(inside if inside.is_dir() else data_dir)
    chosen = np.linspace(0, len(source) - 1, min(count, len(source))).astype(int)
    for number, index in enumerate(chosen.tolist()):
        path = source.path(index).resolve()
        for split in ("train", "val"):
            folder = tree / split / f"{source.labels[index]:05d}"
            folder.mkdir(parents=True, exist_ok=True)
            if split == "train" or not any(folder.iterdir()):  # one validation image per class
                (folder / f"{number}{path.suffix}").symlink_to(path)
    return tree


def pack(tree: Path, out: Path) -> PackedImages:
    run_python(["-m", "tools.pack", "--data_dir", tree, "--out", out, "--skip_unreadable"])
    return load_imagenet(out)[0]


def decode_all(source: ImageFiles, out: Path) -> PackedImages:
    """The pixels of all images in one file, as the cache of fine-tuning stores them."""
    out.mkdir()
    with open_pack(out, {"decoded": source}) as writers:
        for index in range(len(source)):
            image = source.read(index).permute(1, 2, 0).contiguous()  # H × W × 3
            writers["decoded"].add(index, image.numpy(), *image.shape[:2], decoded=True)
        finish_pack(out, writers, {"classes": []})
    return PackedImages(out, "decoded", read_manifest(out)["splits"]["decoded"])


def load(dataset: TrainSet, batch_size: int) -> Callable[[int], None]:
    """One turn: load the whole dataset once, batch by batch, as a worker does."""

    def turn(number: int) -> None:
        for first in range(0, len(dataset), batch_size):
            indices = range(first, min(first + batch_size, len(dataset)))
            collate(dataset.__getitems__([(number, index) for index in indices]))

    return turn


def load_plainly(
    dataset: ImageFolder, mix: Callable[[list], tuple], batch_size: int
) -> Callable[[int], None]:
    """The same of the plain recipe's dataset and collate function."""

    def turn(number: int) -> None:
        for first in range(0, len(dataset), batch_size):
            indices = range(first, min(first + batch_size, len(dataset)))
            mix([dataset[index] for index in indices])

    return turn


def measure_device_part(augment, batch: Sample, *, rounds: int) -> list[dict]:
    """RandAugment, normalisation and mixing of whole batches, on the device that trains."""
    device = init_distributed().device
    image, label = batch.image.to(device), batch.label.to(device)

    def turn(number: int) -> None:
        for micro in range(4):
            draws = batch.draws.roll(4 * number + micro, 0)  # other images get these operations
            augment(image, label, draws, step=number, micro=micro)

    return interleaved({f"ours, on {device.type}": turn}, rounds=rounds, images=4 * len(label))
