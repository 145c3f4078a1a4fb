"""ImageNet (Deng et al. 2009; ILSVRC 2012, Russakovsky et al. 2015) or any tree of class folders.

A tree is train/<class>/**/image and val/<class>/**/image. A folder that tools/pack.py made of a
tree is read in its place; pack a tree whose listing takes long on your file system.
"""

import os
from collections import Counter
from pathlib import Path

import numpy as np

from common.errors import UserError
from data.images import ImageFiles
from data.packed import MANIFEST, PackedImages, find_empty_class, is_interrupted, read_manifest
from data.splits import list_class_folders, list_images, report_left_out

Source = ImageFiles | PackedImages


def load_imagenet(data_dir: str | Path) -> tuple[Source, Source, list[str]]:
    """The training images, the validation images and the class names, in label order.

    Raises UserError when a split is missing, a class is empty, or val/ has other classes than
    train/ (its labels would then mean other classes, and accuracies would be wrong).
    """
    root = Path(data_dir)
    if os.path.isfile(root / MANIFEST):
        return _load_packed(root)
    if is_interrupted(root) and not os.path.isdir(root / "train"):
        raise UserError(f"{root} contains an interrupted pack: run tools.pack again")
    for split in ("train", "val"):
        try:
            os.scandir(root / split).close()
        except OSError as error:
            absent = isinstance(error, (FileNotFoundError, NotADirectoryError))
            problem = "does not exist" if absent else f"cannot be listed ({error.strerror})"
            raise UserError(
                f"{root / split} {problem}: --data_dir must be a folder with train/ and val/, each "
                "with one folder of images per class"
            ) from error
    train, classes = list_tree(root / "train")
    val, val_classes = list_tree(root / "val")
    if val_classes != classes:
        raise UserError(
            f"{root / 'val'} has other classes than {root / 'train'}: "
            + _describe_difference(classes, val_classes)
        )
    return train, val, classes


def _describe_difference(classes: list[str], val_classes: list[str]) -> str:
    missing = sorted(set(classes) - set(val_classes))
    extra = sorted(set(val_classes) - set(classes))
    return "; ".join(
        f"{what} {len(names)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for what, names in (("it lacks", missing), ("only it has", extra))
        if names
    )


def _load_packed(root: Path) -> tuple[PackedImages, PackedImages, list[str]]:
    manifest = read_manifest(root)
    splits = manifest["splits"]
    missing = [split for split in ("train", "val") if split not in splits]
    if missing:
        raise UserError(f"{root / MANIFEST} has no {missing[0]} images: pack a tree that has them")
    train, val = (PackedImages(root, split, splits[split]) for split in ("train", "val"))
    classes = manifest["classes"]
    for packed in (train, val):
        empty = find_empty_class(packed.labels, classes)
        if empty is not None:
            raise UserError(
                f"{root} has no {packed.split} images of class {empty}: pack again, from a tree "
                "that has images of every class in train/ and val/"
            )
    return train, val, classes


def list_tree(root: Path) -> tuple[ImageFiles, list[str]]:
    """All images below the class folders of `root`; class names sorted, labels by that order.

    Hidden files and folders (.ipynb_checkpoints, ._x.JPEG) are neither classes nor images.
    Raises UserError where there is no class folder, or one without images.
    """
    left_out = Counter()
    try:
        classes = list_class_folders(root)
        files = [list_images(root, name, left_out) for name in classes]
    except OSError as error:
        raise UserError(f"{error.filename or root} cannot be listed ({error.strerror})") from error
    report_left_out(root, left_out)
    if not classes:
        raise UserError(f"{root} has no class folders: expected {root}/<class>/<image>")
    empty = [name for name, found in zip(classes, files, strict=True) if not found]
    if empty:
        raise UserError(
            f"{root / empty[0]} has no images ({len(empty)} such class folder"
            f"{'s' if len(empty) > 1 else ''}): fill or remove it, in train/ and val/"
        )
    labels = np.repeat(np.arange(len(classes)), [len(found) for found in files])
    listing = np.array([os.fsencode(name) for found in files for name in found])
    return ImageFiles(root, listing, labels), classes
