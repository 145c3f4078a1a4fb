"""What loading costs: the workers' part of every way to read the same images, and the device's."""

import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from torch.utils.data import default_collate

from common.errors import UserError
from data import decoding
from data.imagenet import list_tree, load_imagenet
from data.images import ImageFiles, Sample, TrainSet, collate
from data.packed import MANIFEST, PackedImages, finish_pack, open_pack, read_manifest
from data.synthetic import write_imagenet_tree
from data.transforms import Augment, TrainTransform
from tools.benchmark import plain
from tools.benchmark.end_to_end import call
from tools.benchmark.timing import interleaved
from training.distributed import init_distributed

DRAWN_SIZE = 420  # px, about ImageNet's mean


class PlainSet:
    """What everyone copies: Pillow, float transforms, RandAugment and normalisation, all here."""

    def __init__(self, source: ImageFiles, size: int):
        self.source, self.transform = source, plain.train_transform(size)

    def __getitem__(self, key: tuple[int, int]):
        image = plain.read(self.source, key[1])
        return self.transform(image), int(self.source.labels[key[1]])


@contextmanager
def pillow_alone():
    """Decode as where torchcodec is not installed."""
    fast, decoding.fast_jpeg = decoding.fast_jpeg, lambda: None
    try:
        yield
    finally:
        decoding.fast_jpeg = fast


def small_tree(args, folder: Path) -> Path:
    """A tree of links to some of --data_dir's images, or of drawn ones."""
    tree = folder / "tree"
    if args.data_dir is None:
        write_imagenet_tree(
            tree, train_per_class=-(-args.images // 8), val_per_class=1, size=DRAWN_SIZE, seed=0
        )
        return tree
    if (args.data_dir / MANIFEST).exists():
        raise UserError(f"--data_dir {args.data_dir} is packed: give the tree, it is packed here")
    inside = args.data_dir / "train"
    source, _ = list_tree(inside if inside.is_dir() else args.data_dir)
    chosen = np.linspace(0, len(source) - 1, min(args.images, len(source))).astype(int)
    for number, index in enumerate(chosen.tolist()):
        path = source.path(index).resolve()
        for split in ("train", "val"):
            place = tree / split / f"{source.labels[index]:05d}"
            place.mkdir(parents=True, exist_ok=True)
            if split == "train" or not any(place.iterdir()):
                (place / f"{number}{path.suffix}").symlink_to(path)
    return tree


def pack(tree: Path, out: Path) -> PackedImages:
    call(["-m", "tools.pack", "--data_dir", tree, "--out", out, "--skip_unreadable"])
    return load_imagenet(out)[0]


def decode_all(source: ImageFiles, out: Path) -> PackedImages:
    out.mkdir()
    with open_pack(out, {"decoded": source}) as writers:
        for index in range(len(source)):
            image = source.read(index).permute(1, 2, 0).contiguous()
            writers["decoded"].add(index, image.numpy(), *image.shape[:2], decoded=True)
        finish_pack(out, writers, {"classes": []})
    return PackedImages(out, "decoded", read_manifest(out)["splits"]["decoded"])


def loader(args) -> dict:
    """CPU time an image of a worker: read, decode, augment, collate; and the device's part."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as name:
        folder = Path(name)
        tree = small_tree(args, folder)
        files, _, _ = load_imagenet(tree)
        packed = pack(tree, folder / "packed")
        pixels = decode_all(files, folder / "decoded")

        def epoch(dataset, collate_fn):
            def turn(number: int) -> None:
                for first in range(0, len(dataset.source), args.batch_size):
                    batch = range(first, min(first + args.batch_size, len(dataset.source)))
                    keys = [(number, index) for index in batch]
                    if hasattr(dataset, "__getitems__"):  # as DataLoader asks
                        collate_fn(dataset.__getitems__(keys))
                    else:
                        collate_fn([dataset[key] for key in keys])

            return turn

        def ours(source, *, pillow: bool):
            turn = epoch(TrainSet(source, TrainTransform(args.img_size), 0), collate)

            def with_pillow(number: int) -> None:
                with pillow_alone():
                    turn(number)

            return with_pillow if pillow else turn

        rows = {
            "plain: PIL, float, RandAugment": epoch(PlainSet(files, args.img_size), default_collate)
        }
        for what, source in (("files", files), ("packed 256", packed)):
            rows[f"{what}, Pillow"] = ours(source, pillow=True)
            if decoding.fast_jpeg():
                rows[f"{what}, torchcodec"] = ours(source, pillow=False)
        rows["decoded once (fine-tuning)"] = ours(pixels, pillow=True)
        table = interleaved(rows, rounds=args.rounds, images=len(files))
        train_set = TrainSet(files, TrainTransform(args.img_size), 0)
        few = collate([train_set[0, i % len(files)] for i in range(args.batch_size)])
        kb = {
            what: size / len(files) / 1e3
            for what, size in (
                ("files", sum(files.path(i).stat().st_size for i in range(len(files)))),
                ("packed", packed.data.numel()),
                ("decoded", pixels.data.numel()),
            )
        }
    return {"loader": table, "device": device_part(args, few), "images": len(files), "kb": kb}


def device_part(args, batch: Sample) -> list[dict]:
    """RandAugment, normalisation and mixing of whole batches, where the network trains."""
    device = init_distributed().device
    augment = Augment(1000, seed=0, magnitude=9, mixup=0.2, cutmix=1.0)
    image, label = batch.image.to(device), batch.label.to(device)

    def turn(number: int) -> None:
        for micro in range(4):
            draws = batch.draws.roll(4 * number + micro, 0)  # the ops fall on other images
            augment(image, label, draws, step=number, micro=micro)

    return interleaved({f"ours, on {device.type}": turn}, rounds=args.rounds, images=4 * len(label))
