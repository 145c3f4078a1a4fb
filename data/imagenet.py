"""ImageNet and any other tree of class folders: train/<class>/**/image, val/<class>/**/image."""

import os
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from data import DataError
from data.images import ImageFiles


def load_imagenet(data_dir: str | Path) -> tuple[ImageFiles, ImageFiles, list[str]]:
    """The training images, the validation images and the class names, in label order.

    Raises DataError when a split is missing, a class is empty, or val/ has other classes than
    train/ (its labels would then mean other classes: accuracies would be wrong, not missing).
    """
    root = Path(data_dir)
    for split in ("train", "val"):
        if not (root / split).is_dir():
            raise DataError(f"{root / split} is not there: --data_dir must be a folder with train/ "
                            "and val/, each of one folder of images a class")
    train, classes = list_tree(root / "train")
    val, val_classes = list_tree(root / "val")
    if val_classes != classes:
        extra = sorted(set(val_classes) - set(classes))
        missing = sorted(set(classes) - set(val_classes))
        raise DataError(
            f"{root / 'val'} has other classes than {root / 'train'}: " + "; ".join(
                f"{word} {len(names)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
                for word, names in (("it lacks", missing), ("only it has", extra)) if names))
    return train, val, classes


def list_tree(root: Path) -> tuple[ImageFiles, list[str]]:
    """All images below the class folders of `root`; class names sorted, labels by that order.

    Hidden files and folders (.ipynb_checkpoints, ._x.JPEG) are not classes and not images.
    """
    try:
        classes = sorted(e.name for e in os.scandir(root) if e.is_dir() and _shown(e.name))
        files = [sorted(_images(root / name, name)) for name in classes]
    except OSError as error:
        raise DataError(f"{error.filename or root} cannot be listed ({error.strerror})") from error
    if not classes:
        raise DataError(f"{root} has no class folders: expected {root}/<class>/<image>")
    empty = [name for name, found in zip(classes, files, strict=True) if not found]
    if empty:
        raise DataError(f"{root / empty[0]} has no images ({len(empty)} such class folder"
                        f"{'s' if len(empty) > 1 else ''}): fill or remove it, in train/ and val/")
    labels = np.repeat(np.arange(len(classes)), [len(found) for found in files])
    listing = np.array([os.fsencode(name) for found in files for name in found])
    return ImageFiles(root, listing, labels), classes


def _images(folder: Path, prefix: str) -> list[str]:
    found = []
    for entry in os.scandir(folder):
        name = f"{prefix}/{entry.name}"
        if not _shown(entry.name):
            continue
        if entry.is_dir():
            found += _images(folder / entry.name, name)
        elif entry.name.lower().endswith(IMG_EXTENSIONS):
            found.append(name)
    return found


def _shown(name: str) -> bool:
    return not name.startswith(".")
