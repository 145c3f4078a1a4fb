"""Name what is on images: the five most probable classes of each, with their probabilities.

  python -m tools.predict --checkpoint runs/dtd_fold1_twistnet18_seed42/best.pt photo.jpg scans/

Takes images and folders, which are searched for images at any depth. An image is resized and
cropped as in validation. One that cannot be read is named on stderr; the exit code is then 1.
"""

import csv
import io
import os
import sys
from pathlib import Path

import numpy as np
import torch

from common.cli import Parser, at_least, run
from common.errors import UserError
from common.files import write_atomic
from common.processes import usable_cpus
from data.images import EvalSet, ImageFiles
from data.loading import eval_batches
from data.splits import list_images
from data.transforms import EvalTransform, normalise, trained_transform
from models.weights import load_trained

TOP = 5


def parse_args(argv: list[str] | None):
    parser = Parser(prog="python -m tools.predict", description=__doc__)
    parser.add_argument(
        "images",
        nargs="+",
        type=Path,
        metavar="IMAGE",
        help="image file, or folder of images at any depth",
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="FILE",
        help="best.pt of a run, or a weights file with its JSON beside it",
    )
    parser.add_argument(
        "--csv",
        type=Path,
        metavar="FILE",
        help="also write file, class_1, probability_1, … class_5, probability_5",
    )
    parser.add_argument(
        "--img_size",
        type=at_least(32),
        metavar="PX",
        help="crop (default: that of the checkpoint, else 224)",
    )
    parser.add_argument(
        "--batch_size", type=at_least(1), default=32, metavar="B", help="images at a time"
    )
    parser.add_argument(
        "--workers",
        type=at_least(0),
        default=4,
        metavar="N",
        help="loader processes, at most the CPUs there are",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    files = find_images(args.images)
    if args.csv and not args.csv.resolve().parent.is_dir():
        raise UserError(f"--csv {args.csv}: there is no folder {args.csv.parent}")
    model, about = load_trained(args.checkpoint)
    transform = trained_transform(about["config"], args.img_size)
    names = about["classes"] or [f"class {i}" for i in range(about["num_classes"])]
    rows, unread = [], 0
    for file, ranked in predict(model, files, transform, args.batch_size, args.workers):
        if ranked is None:
            print(f"{shown(file)}: cannot be read as an image", file=sys.stderr)
            unread += 1
            continue
        best = [(names[label], chance) for label, chance in ranked]
        print(f"{shown(file)}: " + ", ".join(f"{name} {100 * p:.1f} %" for name, p in best))
        rows.append([str(file), *(x for name, p in best for x in (name, f"{p:.6f}"))])
    if args.csv:
        write_csv(args.csv, rows, min(TOP, len(names)))
    if unread:
        print(f"{unread} of {len(files)} images cannot be read", file=sys.stderr)
        sys.exit(1)


def find_images(places: list[Path]) -> list[Path]:
    """The files named, and all images in the folders named; UserError where there are none."""
    found = []
    for place in places:
        if place.is_dir():
            try:
                inside = list_images(place, ".")
            except OSError as error:
                raise UserError(f"{error.filename}: {error.strerror}") from error
            if not inside:
                raise UserError(f"{place}: no images in this folder")
            found += [place / file for file in inside]
        elif place.exists():
            found.append(place)
        else:
            raise UserError(f"{place}: no such file or folder")
    return found


@torch.inference_mode()
def predict(
    model,
    files: list[Path],
    transform: EvalTransform,
    batch_size: int,
    workers: int,
):
    """Yield (file, [(label, probability)], best first), with None for a file that is no image."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device, memory_format=torch.channels_last)
    listing = np.array([os.fsencode(file) for file in files])
    source = ImageFiles(Path(), listing, np.zeros(len(files), dtype=np.int64))
    batches, _ = eval_batches(
        EvalSet(source, transform),
        batch_size=batch_size,
        workers=min(workers, usable_cpus(), len(files) // batch_size),
        pin_memory=False,
    )
    for batch in batches:
        images = normalise(batch.image.to(device))
        logits = model(images.contiguous(memory_format=torch.channels_last))
        chances, labels = logits.float().softmax(1).topk(min(TOP, logits.shape[1]))
        for i, index in enumerate(batch.index.tolist()):
            ranked = list(zip(labels[i].tolist(), chances[i].tolist(), strict=True))
            yield files[index], None if batch.broken[i] else ranked


def shown(file: Path) -> str:
    """The name as any terminal can print it, whatever bytes it has."""
    return os.fsencode(file).decode("utf-8", "backslashreplace")


def write_csv(path: Path, rows: list[list], top: int) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(
        ["file", *(x for i in range(1, top + 1) for x in (f"class_{i}", f"probability_{i}"))]
    )
    writer.writerows(rows)
    try:
        write_atomic(path, text.getvalue().encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise UserError(f"--csv {path}: cannot be written ({error.strerror})") from error


if __name__ == "__main__":
    run(main)
