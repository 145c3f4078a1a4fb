"""Pack an ImageNet tree into one sequential file a split, for faster training from less disk.

  python -m tools.pack --data_dir /path/to/imagenet --out /path/to/packed

Images are shrunk to a shorter side of --short_side (never enlarged) and written as JPEGs; those
that are small enough already are copied byte for byte. Then give --data_dir /path/to/packed to
pretrain_imagenet.py. ImageNet becomes about 38 GB instead of 147. A pack that was stopped goes on
with the same command. Unreadable images are named, and leave the pack unfinished: restore them and
run the same command, or leave them out with --skip_unreadable.
"""

import hashlib
import io
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from common.cli import Parser, at_least, run
from common.errors import Busy, UserError
from common.processes import ignore_stop_signals, usable_cpus
from data.imagenet import load_imagenet
from data.images import ImageFiles, decode_rgb
from data.packed import ABOUT, PackedImages, Packing, check_room, discard, held, made, read_about


def make_parser() -> Parser:
    parser = Parser(prog="python -m tools.pack", description=__doc__)
    parser.add_argument(
        "--data_dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder with train/ and val/, each of one folder of images a class",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the packed folder")
    parser.add_argument(
        "--short_side",
        type=at_least(32),
        default=256,
        metavar="PX",
        help="shorter side after shrinking",
    )
    parser.add_argument(
        "--quality",
        type=at_least(1),
        default=90,
        metavar="Q",
        help="of the JPEGs that are written, at most 95",
    )
    parser.add_argument(
        "--workers",
        type=at_least(0),
        default=usable_cpus(),
        metavar="N",
        help="processes that shrink",
    )
    parser.add_argument(
        "--skip_unreadable", action="store_true", help="leave out images that cannot be read"
    )
    return parser


def shrink(source: ImageFiles, index: int, *, short_side: int, quality: int):
    """(JPEG file as uint8 tensor, height, width), or the reason why there is none."""
    path = source.path(index)
    try:
        encoded = torch.from_numpy(np.fromfile(path, np.uint8))
        pixels = decode_rgb(encoded, path)
        with Image.open(io.BytesIO(encoded.numpy().tobytes())) as image:
            jpeg = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
    except OSError as error:
        return str(error)
    if not jpeg or min(pixels.shape[1:]) > short_side:
        if min(pixels.shape[1:]) > short_side:
            pixels = F.resize(pixels, [short_side], InterpolationMode.BICUBIC, antialias=True)
        file = io.BytesIO()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
        encoded = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
    return encoded, *pixels.shape[1:]


def pack_split(writer, source: ImageFiles, *, split: str, workers: int, make) -> list[str]:
    """Pack what is missing of one split; why images could not be read."""
    unreadable = []
    images = made(
        partial(make, source), writer.missing, workers=workers, worker_init_fn=ignore_stop_signals
    )
    for position, image in tqdm(
        images,
        total=len(source),
        initial=len(source) - len(writer.missing),
        unit="image",
        desc=split,
        disable=None,
    ):
        if isinstance(image, str):
            unreadable.append(image)
            tqdm.write(f"warning: {image}")
        else:
            encoded, height, width = image
            writer.add(position, encoded.numpy(), height, width, decoded=False)
    writer.flush()
    return unreadable


def check_size(out: Path, writers: dict, sources: dict, make) -> None:
    """UserError where the images that are missing would not fit on the disk."""
    needed = 0.0
    for split, writer in writers.items():
        sample = (
            writer.missing[np.linspace(0, len(writer.missing) - 1, 64).astype(int)]
            if len(writer.missing)
            else []
        )
        shrunk = [make(sources[split], int(i)) for i in np.unique(sample)]
        sizes = [len(image[0]) for image in shrunk if not isinstance(image, str)]
        needed += 1.05 * float(np.mean(sizes or [0])) * len(writer.missing)
    check_room(out, needed)


def listing_key(sources: dict, classes: list[str]) -> str:
    """Tells whether a pack is gone on with from the listing it was begun with."""
    digest = hashlib.sha256(b"\0".join(os.fsencode(name) for name in classes))
    for source in sources.values():
        digest.update(source.files.tobytes() + source.labels.tobytes())
    return digest.hexdigest()


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.quality > 95:
        raise UserError("--quality above 95 makes files larger and images hardly better")
    train, val, classes = load_imagenet(args.data_dir)
    if not isinstance(train, ImageFiles):
        raise UserError(f"--data_dir {args.data_dir} is packed: give the tree it was made of")
    if args.out.resolve() == args.data_dir.resolve():
        raise UserError("--out must be another folder than --data_dir")
    sources = {"train": train, "val": val}
    try:
        with held(args.out):
            if not is_packed(args, sources, classes):
                pack(args, sources, classes)
    except BlockingIOError as error:
        raise Busy(f"--out {args.out} is being packed by another process") from error
    except OSError as error:
        raise UserError(
            f"--out {args.out} cannot be written ({error.strerror or error}): with "
            "that mended, the same command goes on"
        ) from error


def is_packed(args, sources: dict[str, ImageFiles], classes: list[str]) -> bool:
    """Whether --out holds this pack, whole to the last byte; a damaged one is removed.

    UserError where it holds another one.
    """
    if not (args.out / ABOUT).is_file():
        return False
    about = read_about(args.out)
    if (about.get("short_side"), about.get("quality")) != (args.short_side, args.quality):
        raise UserError(f"--out {args.out} holds a pack of other settings: give another folder")
    if about.get("listing") != listing_key(sources, classes):
        raise UserError(
            f"--out {args.out} holds a pack of other images than --data_dir "
            f"{args.data_dir} has: give another folder"
        )
    try:
        for split in sources:
            packed = PackedImages(args.out, split, about["splits"][split])
            for index in tqdm(
                range(len(packed)),
                desc=f"checking {split}",
                unit="image",
                leave=False,
                disable=None,
            ):
                packed.check_header(index)
    except (OSError, UserError) as error:
        print(f"packing again: {error}", flush=True)
        discard(args.out, sources)
        return False
    print(f"{args.out} is packed already, and whole: " + describe(about["splits"]))
    return True


def pack(args, sources: dict[str, ImageFiles], classes: list[str]) -> None:
    packing = Packing(
        args.out,
        {
            "short_side": args.short_side,
            "quality": args.quality,
            "listing": listing_key(sources, classes),
        },
    )
    make = partial(shrink, short_side=args.short_side, quality=args.quality)
    try:
        writers = {
            split: packing.writer(split, source.files, source.labels)
            for split, source in sources.items()
        }
        check_size(args.out, writers, sources, make)
        torch.set_num_threads(1)  # in each worker
        unreadable = [
            why
            for split, writer in writers.items()
            for why in pack_split(
                writer, sources[split], split=split, workers=args.workers, make=make
            )
        ]
        if unreadable and not args.skip_unreadable:
            print(
                f"error: {len(unreadable)} images cannot be read, all others are packed: restore "
                "them and run the same command, or leave them out with --skip_unreadable: "
                + "; ".join(unreadable),
                file=sys.stderr,
                flush=True,
            )
            sys.exit(1)
        packing.finish(classes, left_out=unreadable)
    finally:
        packing.close()
    print(
        f"wrote {args.out}: {describe(read_about(args.out)['splits'])}"
        + (f"; {len(unreadable)} unreadable images left out" if unreadable else "")
    )


def describe(splits: dict) -> str:
    return ", ".join(
        f"{split} {about['images']:,} images in {about['data_bytes'] / 1e6:,.1f} MB"
        for split, about in splits.items()
    )


if __name__ == "__main__":
    run(main)
