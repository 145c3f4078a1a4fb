"""Check a finished ImageNet tree: count its images and decode every one of them."""

from pathlib import Path

import numpy as np

from common.errors import UserError
from data.imagenet import load_imagenet
from data.images import ImageFiles
from tools.prepare_imagenet.classes import find_partial_folders
from tools.prepare_imagenet.processes import map_in_processes

NUM_CLASSES, NUM_IMAGES = 1000, {"train": 1_281_167, "val": 50_000}  # of ImageNet-1K
CHUNK = 256  # images that one task decodes


def verify(out: Path, workers: int) -> bool:
    """Print every image of the tree that does not decode, and whatever else is wrong with the tree.

    Returns whether nothing is wrong. Raises UserError when `out` does not exist.
    """
    if not out.is_dir():
        raise UserError(f"--out {out} does not exist: prepare it with --source")
    problems = [
        f"{part} is unfinished: run with --source again" for part in find_partial_folders(out)
    ]
    try:
        train, val, classes = load_imagenet(out)
    except UserError as error:
        problems.append(f"{error}; images not opened")
    else:
        if not isinstance(train, ImageFiles):
            raise UserError(f"--out {out} is packed: tools.pack checks it, with the same --out")
        problems += describe_missing(train, val, classes)
        chunks = [
            ImageFiles(images.root, files, np.zeros(len(files), dtype=np.int64))
            for images in (train, val)
            for files in np.array_split(images.files, -(-len(images) // CHUNK))
        ]
        for found in map_in_processes(
            find_unreadable, chunks, workers=workers, desc="decoding", unit="image", size=len
        ):
            problems += found
    print("\n".join(f"broken: {problem}" for problem in problems) or f"{out}: nothing is broken")
    return not problems


def find_unreadable(images: ImageFiles) -> list[str]:
    """The errors of all images that cannot be decoded, by the reader that training uses."""
    problems = []
    for index in range(len(images)):
        try:
            images.read(index)
        except OSError as error:
            problems.append(str(error))
    return problems


def describe_missing(train: ImageFiles, val: ImageFiles, classes: list[str]) -> list[str]:
    """A line for each split that is smaller than ImageNet-1K's, if the tree is meant to be that.

    Other datasets have 1,000 classes as well (ImageNet-Mini): a tree counts as ImageNet-1K if it
    has more than half of the images of either split.
    """
    if len(classes) != NUM_CLASSES or not (
        2 * len(train) > NUM_IMAGES["train"] or 2 * len(val) > NUM_IMAGES["val"]
    ):
        return []
    return [
        f"{images.root} has {len(images):,} images, ImageNet-1K has {NUM_IMAGES[split]:,}"
        for split, images in (("train", train), ("val", val))
        if len(images) != NUM_IMAGES[split]
    ]
