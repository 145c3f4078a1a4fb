"""Classify images: print the five most probable classes of each, with their probabilities.

  python -m tools.predict --weights runs/dtd_fold1_twistnet18_seed42/best.pt photo.jpg scans/

Takes image files, and folders, which are searched for images at any depth. Images are resized and
cropped as in validation. An image that cannot be read is named on stderr with the reason, and the
exit code is then 1.
"""

import csv
import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common.cli import Parser, add_crop_flag, add_weights_flag, at_least, run
from common.errors import UserError
from common.files import check_outputs, printable, write_atomic
from data.images import EvalSet, ImageFiles, read_rgb
from data.loading import EvalLoader
from data.transforms import EvalTransform, make_eval_transform
from models.weights import load_trained
from tools.find_images import check_exists, describe_ignored_files, find_images
from training.engine import classify

TOP = 5
MARK = b"file,class_1,probability_1"  # every table that this tool writes starts with it


def parse_args(argv: list[str] | None):
    parser = Parser(prog="python -m tools.predict", description=__doc__)
    parser.add_argument(
        "images",
        nargs="+",
        type=Path,
        metavar="IMAGE",
        help="image file, or folder of images at any depth",
    )
    add_weights_flag(parser)
    parser.add_argument(
        "--csv",
        type=Path,
        metavar="FILE",
        help="also write a table: file, class_1, probability_1, … class_5, probability_5",
    )
    add_crop_flag(parser)
    parser.add_argument(
        "--batch_size", type=at_least(1), default=32, metavar="B", help="images per batch"
    )
    parser.add_argument(
        "--workers",
        type=at_least(0),
        default=4,
        metavar="N",
        help="loader processes, at most one per CPU",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)

    # everything that was given is checked before the first image is read
    files = list_inputs(args.images)
    if args.csv:
        check_outputs([args.csv], flag="--csv", mark=MARK, inputs=[args.weights, *files])
    model, about = load_trained(args.weights, img_size=args.img_size)
    transform = make_eval_transform(about["config"], args.img_size)
    names = about["classes"] or [f"class {i}" for i in range(about["num_classes"])]

    # one line per image
    rows, unreadable = [], 0
    for file, ranked in predict(
        model, files, transform, batch_size=args.batch_size, workers=args.workers
    ):
        if ranked is None:
            print(explain_unreadable(file), file=sys.stderr)
            unreadable += 1
            continue
        best = [(names[label], probability) for label, probability in ranked]
        line = ", ".join(f"{printable(name)} {100 * p:.1f} %" for name, p in best)
        print(f"{printable(file)}: {line}")
        rows.append([str(file), *(x for name, p in best for x in (name, f"{p:.6f}"))])

    if args.csv:
        write_csv(args.csv, rows, min(TOP, len(names)))
    if unreadable:
        print(f"{unreadable} of {len(files)} images cannot be read", file=sys.stderr)
        sys.exit(1)


def list_inputs(places: list[Path]) -> list[Path]:
    """The files named, and all images in the folders named. Raises UserError if there are none.

    Files in the folders that are not images by their names are counted on stderr.
    """
    files = []
    for place in places:
        check_exists(place)
        if not place.is_dir():
            files.append(place)
            continue
        files += [place / file for file in find_images(place)]
        if ignored := describe_ignored_files(place):
            print(f"{printable(place)}: {ignored}", file=sys.stderr)
    return files


def explain_unreadable(file: Path) -> str:
    """Why an image cannot be read: loader workers report only that it cannot, so try again here."""
    try:
        read_rgb(file)
    except OSError as error:
        return printable(str(error))
    return f"{printable(file)} could not be read as an image, but can be read now: try again"


def predict(
    model: nn.Module, files: list[Path], transform: EvalTransform, *, batch_size: int, workers: int
) -> Iterator[tuple[Path, list[tuple[int, float]] | None]]:
    """Yield (file, [(label, probability), …]), best first; None for a file that cannot be read."""
    # the network and the images, as in validation
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device, memory_format=torch.channels_last)
    listing = np.array([os.fsencode(file) for file in files])
    source = ImageFiles(Path(), listing, np.zeros(len(files), dtype=np.int64))
    loader = EvalLoader(
        EvalSet(source, transform, marks_all=True),
        batch_size=batch_size,
        workers=min(workers, len(files) // batch_size),
    )

    for batch, _, logits in classify(model, loader, device=device, precision="fp32"):
        probabilities, labels = logits.softmax(1).topk(min(TOP, logits.shape[1]))
        for i, index in enumerate(batch.index.tolist()):
            ranked = list(zip(labels[i].tolist(), probabilities[i].tolist(), strict=True))
            yield files[index], None if batch.broken[i] else ranked


def write_csv(path: Path, rows: list[list], top: int) -> None:
    """Write one row per image; the names of files keep their bytes."""
    ranks = range(1, top + 1)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["file", *(x for i in ranks for x in (f"class_{i}", f"probability_{i}"))])
    writer.writerows(rows)
    try:
        write_atomic(path, text.getvalue().encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise UserError(f"--csv {path}: cannot be written ({error.strerror})") from error


if __name__ == "__main__":
    run(main)
