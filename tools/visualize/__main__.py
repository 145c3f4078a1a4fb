"""Show what a TwistNet computes: one page per image, or how classes differ in their directions.

  python -m tools.visualize --weights runs/dtd_fold1_twistnet18_seed42/best.pt --out pages \\
      photo.jpg data/dtd/images

For each image given, and each image directly in a folder given, it writes OUT/<name>.png: the
network's input, the evidence for the predicted class, the gate of each block, the AIS weights,
and for each direction of one block the initial and the learnt kernel and maps of the channel
pairs that contribute most to STCI's output.

For the subfolders of a folder, one per class, it writes OUT/ais_by_class.png, the mean AIS weight
of each direction for each class, and OUT/ais_by_class.csv with the numbers of all blocks.

Files that this tool did not write are never overwritten. Needs matplotlib: pip install matplotlib
"""

import sys
from pathlib import Path

import torch

from common.cli import Parser, add_crop_flag, add_weights_flag, run
from common.errors import UserError
from common.files import check_outputs, printable
from data.images import read_rgb
from data.transforms import EvalTransform, make_eval_transform
from models.weights import load_trained
from sweeps.figures import mark_of
from tools.find_images import check_exists, describe_ignored_files, find_images
from tools.visualize.classes import COLUMNS, compare_classes
from tools.visualize.network import find_twist_blocks
from tools.visualize.page import AUTHOR, draw_page

MOST_CLASSES = 200  # in one figure


def parse_args(argv: list[str] | None):
    parser = Parser(prog="python -m tools.visualize", description=__doc__)
    parser.add_argument(
        "images",
        nargs="+",
        type=Path,
        metavar="IMAGE",
        help="image file, folder of images, or folder of class folders",
    )
    add_weights_flag(parser)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder for the pictures; created if it does not exist",
    )
    parser.add_argument(
        "--block",
        default="layer3.1",
        metavar="NAME",
        help="block to show in detail: layer3.0, layer3.1, layer4.0 or layer4.1; "
        "layer4's maps have a quarter of the positions",
    )
    add_crop_flag(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)

    # images, network and outputs are checked before anything is drawn
    files, pictures, folders = sort_inputs(args.images)
    model, about = load_trained(args.weights)
    blocks = find_twist_blocks(model)
    if args.block not in blocks:
        raise UserError(f"--block {args.block}: choose one of {', '.join(blocks)}")
    if folders and blocks[args.block].stci.ais is None:
        raise UserError(f"{about['model']} has no AIS: there are no weights to compare by class")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {printable(args.out)}: {error.strerror}") from error
    names = choose_names(
        [*(picture.stem for picture in pictures), *["ais_by_class"] * len(folders)]
    )
    pages = [args.out / f"{name}.png" for name in names]
    tables = [page.with_suffix(".csv") for page in pages[len(pictures) :]]
    inputs = [args.weights, *files]
    check_outputs(pages, flag="--out", mark=mark_of(AUTHOR), inputs=inputs)
    check_outputs(tables, flag="--out", mark=",".join(COLUMNS).encode(), inputs=inputs)

    reader = Reader(make_eval_transform(about["config"], args.img_size))
    classes = about["classes"] or [f"class {i}" for i in range(about["num_classes"])]
    classes = [printable(name) for name in classes]
    try:
        # one page per picture
        for picture, page in zip(pictures, pages, strict=False):
            image = reader.read(picture)
            if image is not None:
                title = f"{printable(picture.name)} · {about['model']}"
                draw_page(page, model, image, block=args.block, names=classes, title=title)
                print(f"wrote {printable(page)}")
        # one comparison per folder of class folders
        for (folder, subfolders), page in zip(folders.items(), pages[len(pictures) :], strict=True):
            compare_classes(page, model, folder, subfolders, block=args.block, reader=reader)
            print(f"wrote {printable(page)} and {printable(page.with_suffix('.csv').name)}")
    except OSError as error:
        place = printable(error.filename or args.out)
        raise UserError(f"{place}: {error.strerror or error}") from error
    if reader.unreadable:
        print(f"{reader.unreadable} images cannot be read", file=sys.stderr)
        sys.exit(1)


class Reader:
    """Reads images as validation does, and counts those that cannot be read."""

    def __init__(self, transform: EvalTransform):
        self.transform, self.unreadable = transform, 0

    def read(self, path: Path) -> torch.Tensor | None:
        """The image, uint8 [3, H, W]; or None, with a line on stderr, if it cannot be read."""
        try:
            return self.transform(read_rgb(path))
        except OSError as error:
            self.unreadable += 1
            print(printable(str(error)), file=sys.stderr)
            return None


def sort_inputs(places: list[Path]) -> tuple[list[Path], list[Path], dict[Path, list[str]]]:
    """All images, the pictures to draw a page of, and the folders of classes to compare.

    The last is folder -> names of its class folders. A folder that contains both pictures and
    class folders gives both. Raises UserError for a place that contains no images.
    """
    files, pictures, folders = [], [], {}
    for place in places:
        check_exists(place)
        if not place.is_dir():
            pictures.append(place)
            continue

        found = find_images(place)
        files += [place / file for file in found]
        pictures += [place / file for file in found if "/" not in file]
        classes = sorted({file.split("/")[0] for file in found if "/" in file})
        if len(classes) > MOST_CLASSES:
            raise UserError(
                f"{printable(place)}: {len(classes)} class folders are too many for one figure: "
                f"give a folder with at most {MOST_CLASSES}"
            )
        if classes:
            folders[place] = classes
        if ignored := describe_ignored_files(place):
            print(f"{printable(place)}: {ignored}", file=sys.stderr)
    return files + pictures, pictures, folders


def choose_names(stems: list[str]) -> list[str]:
    """One name per picture: its stem, and from the second picture of a stem on stem-2, stem-3."""
    names, used = [], set()
    for stem in stems:
        name, number = stem, 1
        while name in used:
            number += 1
            name = f"{stem}-{number}"
        used.add(name)
        names.append(name)
    return names


if __name__ == "__main__":
    run(main)
