"""Pack an ImageNet tree into one sequential file per split: faster training, less disk space.

  python -m tools.pack --data_dir /path/to/imagenet --out /path/to/packed

Images are shrunk to a shorter side of --short_side (never enlarged) and written as JPEGs; JPEGs
that are small enough already are copied byte for byte. Then give --data_dir /path/to/packed to
pretrain_imagenet.py. ImageNet becomes about 38 GB instead of 147. The same command checks a
finished pack, and replaces it if it is damaged; an interrupted pack starts over. Unreadable images
are named, and no pack is written: restore them and run the same command, or leave them out with
--skip_unreadable.
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
from common.errors import UserError
from common.files import LOCK, check_output_folder, lock_folder, require_free_space
from common.processes import usable_cpus
from data.decoding import decode_rgb, is_system_error, open_image, read_bytes
from data.imagenet import load_imagenet
from data.images import ImageFiles
from data.packed import (
    MANIFEST,
    PackedImages,
    PackWriter,
    find_empty_class,
    finish_pack,
    is_interrupted,
    map_in_workers,
    open_pack,
    read_manifest,
    remove_pack,
)

MAX_JPEG_SIDE = 65_500  # px, of libjpeg; a file of a longer image is copied byte for byte
SAMPLE = 64  # images per split from which the size of the pack is estimated


def make_parser() -> Parser:
    parser = Parser(prog="python -m tools.pack", description=__doc__)
    parser.add_argument(
        "--data_dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder with train/ and val/, each with one folder of images per class",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder to write the pack to"
    )
    parser.add_argument(
        "--short_side",
        type=at_least(32),
        default=256,
        metavar="PX",
        help="shrink larger images to this shorter side",
    )
    parser.add_argument(
        "--quality",
        type=at_least(1),
        default=90,
        metavar="Q",
        help="quality of the JPEGs that are written, at most 95",
    )
    parser.add_argument(
        "--workers",
        type=at_least(0),
        default=usable_cpus(),
        metavar="N",
        help="number of processes that shrink images",
    )
    parser.add_argument(
        "--skip_unreadable", action="store_true", help="leave out images that cannot be read"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if args.quality > 95:
        raise UserError("--quality above 95 makes files larger and images hardly better")

    # The images, and a place that it is safe to write to.
    train, val, classes = load_imagenet(args.data_dir)
    if not isinstance(train, ImageFiles):
        raise UserError(f"--data_dir {args.data_dir} is packed: give the tree it was made of")
    splits = [(args.data_dir / split).resolve() for split in ("train", "val")]
    if args.out.resolve() == args.data_dir.resolve() or any(
        args.out.resolve().is_relative_to(split) for split in splits
    ):
        raise UserError("--out must be another folder than --data_dir, its train/ and its val/")
    if not is_interrupted(args.out):
        check_output_folder(args.out, flag="--out", made_by_tool=[LOCK, MANIFEST])

    # Pack, unless that has been done.
    sources = {"train": train, "val": val}
    settings = {
        "short_side": args.short_side,
        "quality": args.quality,
        "listing": hash_listing(sources, classes),
    }
    try:
        with lock_folder(args.out):
            if not is_packed(args.out, sources, settings):
                pack(
                    args.out,
                    sources,
                    classes,
                    settings=settings,
                    workers=args.workers,
                    skip_unreadable=args.skip_unreadable,
                )
    except OSError as error:
        raise UserError(
            f"--out {args.out} cannot be written ({error.strerror or error}): correct this and run "
            "the same command again, which starts over"
        ) from error


def hash_listing(sources: dict[str, ImageFiles], classes: list[str]) -> str:
    """sha256 of class names, files and labels: what a finished pack is recognised by."""
    digest = hashlib.sha256(b"\0".join(os.fsencode(name) for name in classes))
    for source in sources.values():
        digest.update(source.files.tobytes() + source.labels.tobytes())
    return digest.hexdigest()


def is_packed(out: Path, sources: dict[str, ImageFiles], settings: dict) -> bool:
    """Whether `out` contains this pack, undamaged to the last byte; a damaged one is removed.

    Raises UserError where it contains another pack.
    """
    if not (out / MANIFEST).is_file():
        return False
    try:
        manifest = read_manifest(out)
    except UserError as error:
        if isinstance(error.__cause__, OSError):  # it may be intact
            raise
        if error.__cause__ is None:  # it is one, of another format
            raise UserError(f"{error}, into another --out") from error
        print(f"packing again: {error}")
        remove_pack(out, sources)
        return False
    for key, what in (
        ("short_side", "with other settings"),
        ("quality", "with other settings"),
        ("listing", "of other images than --data_dir has"),
    ):
        if manifest.get(key) != settings[key]:
            raise UserError(f"--out {out} contains a pack {what}: choose another folder")
    try:
        for split in sources:
            packed = PackedImages(out, split, manifest["splits"][split])
            empty = find_empty_class(packed.labels, manifest["classes"])
            if empty is not None:
                raise UserError(f"{out} has no {split} images of class {empty}")
            indices = tqdm(
                range(len(packed)),
                desc=f"checking {split}",
                unit="image",
                leave=False,
                disable=None,
            )
            for index in indices:
                packed.check_header(index)
    except (OSError, UserError) as error:
        if is_system_error(error) or is_system_error(error.__cause__):  # it may be intact
            raise
        print(f"packing again: {error}")
        remove_pack(out, sources)
        return False
    print(f"{out} is packed already and undamaged: {describe(manifest['splits'])}")
    if manifest.get("left_out"):
        print(
            f"warning: {len(manifest['left_out'])} images that could not be read then are not in "
            f"it ({MANIFEST} names them): if they can be read now, pack into another --out"
        )
    return True


def pack(
    out: Path,
    sources: dict[str, ImageFiles],
    classes: list[str],
    *,
    settings: dict,
    workers: int,
    skip_unreadable: bool,
) -> None:
    """Write the pack; exits with code 1, and writes none, where images cannot be read."""
    shrink = partial(shrink_image, short_side=settings["short_side"], quality=settings["quality"])
    require_free_space(out, sum(estimate_size(source, shrink) for source in sources.values()))
    torch.set_num_threads(1)  # in each worker
    with open_pack(out, sources) as writers:
        unreadable = []
        for split, source in sources.items():
            unreadable += pack_split(writers[split], source, shrink, split=split, workers=workers)
        if unreadable and not skip_unreadable:
            print(
                f"error: {len(unreadable)} images cannot be read, no pack was written: restore "
                "them, or leave them out with --skip_unreadable, and run the same command again: "
                + "; ".join(unreadable),
                file=sys.stderr,
            )
            sys.exit(1)
        for split, writer in writers.items():
            empty = find_empty_class(writer.labels[writer.written], classes)
            if empty is not None:
                raise UserError(
                    f"no pack was written: no image of class {empty} in {split}/ can be read; "
                    "restore them, or remove the class from train/ and val/"
                )
        finish_pack(out, writers, {**settings, "left_out": unreadable, "classes": classes})
    print(
        f"wrote {out}: {describe(read_manifest(out)['splits'])}"
        + (f"; {len(unreadable)} unreadable images left out" if unreadable else "")
    )


def estimate_size(source: ImageFiles, shrink) -> float:
    """Bytes of a split when packed, with 5 % to spare, from SAMPLE of its images."""
    chosen = np.unique(np.linspace(0, len(source) - 1, SAMPLE).astype(int))
    shrunk = [stop_if_machine_fails(shrink(source, int(index))) for index in chosen]
    sizes = [len(image[0]) for image in shrunk if not isinstance(image, str)]
    return 1.05 * float(np.mean(sizes or [0])) * len(source)


def pack_split(
    writer: PackWriter, source: ImageFiles, shrink, *, split: str, workers: int
) -> list[str]:
    """Pack one split; returns why images could not be read, a line for each."""
    unreadable = []
    images = map_in_workers(partial(shrink, source), np.arange(len(source)), workers=workers)
    for position, image in tqdm(images, total=len(source), unit="image", desc=split, disable=None):
        if isinstance(stop_if_machine_fails(image), str):
            unreadable.append(image)
            tqdm.write(f"warning: {image}", file=sys.stderr)
        else:
            encoded, height, width = image
            writer.add(position, encoded.numpy(), height, width, decoded=False)
    return unreadable


def stop_if_machine_fails(image):
    """What shrink_image returns; UserError for an error that says nothing about the image."""
    if isinstance(image, OSError):
        raise UserError(f"{image}: run the same command again, which starts over") from image
    return image


def shrink_image(source: ImageFiles, index: int, *, short_side: int, quality: int):
    """(JPEG file as uint8 tensor, height, width), or the reason why the image cannot be read.

    An error of the machine that says nothing about the image is returned as it is.
    """
    path = source.path(index)
    try:
        encoded = read_bytes(path)
        pixels = decode_rgb(encoded, path)  # 3 × H × W
        with open_image(io.BytesIO(encoded.numpy())) as image:
            is_jpeg = image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
    except OSError as error:
        return error if is_system_error(error) else str(error)
    shrunk = pixels
    if min(pixels.shape[1:]) > short_side:
        shrunk = F.resize(pixels, [short_side], InterpolationMode.BICUBIC, antialias=True)
    is_changed = shrunk is not pixels or not is_jpeg
    if is_changed and max(shrunk.shape[1:]) <= MAX_JPEG_SIDE:
        pixels = shrunk
        file = io.BytesIO()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
        encoded = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
    return encoded, *pixels.shape[1:]


def describe(splits: dict) -> str:
    return ", ".join(
        f"{split} {entry['images']:,} images in {entry['data_bytes'] / 1e6:,.1f} MB"
        for split, entry in splits.items()
    )


if __name__ == "__main__":
    run(main)
