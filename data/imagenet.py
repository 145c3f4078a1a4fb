"""ImageNet and any other tree of class folders: train/<class>/**/image, val/<class>/**/image.

Or a folder that tools/pack.py made of one. Listing a large tree takes minutes on some file systems,
so its listing is kept and holds until one of its folders changes.
"""

import os
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from common.errors import UserError
from data.cache import cache_folders
from data.images import ImageFiles
from data.packed import ABOUT, BEGUN, PackedImages, read_about
from data.splits import class_folders, list_images

Source = ImageFiles | PackedImages
KEPT_FROM = 20_000  # images; a smaller tree is listed as fast as its listing is read
SETTLED = 2.0  # seconds: a folder changed so shortly before may change again at the same mtime


def load_imagenet(data_dir: str | Path) -> tuple[Source, Source, list[str]]:
    """The training images, the validation images and the class names, in label order.

    Raises UserError when a split is missing, a class is empty, or val/ has other classes than
    train/ (its labels would then mean other classes: accuracies would be wrong, not missing).
    """
    root = Path(data_dir)
    if os.path.isfile(root / ABOUT):
        return _load_packed(root)
    if os.path.isfile(root / BEGUN):
        raise UserError(f"{root} is not packed to the end: run its tools.pack again, it goes on")
    for split in ("train", "val"):
        if not os.path.isdir(root / split):
            raise UserError(
                f"{root / split} is not there: --data_dir must be a folder with train/ "
                "and val/, each of one folder of images a class"
            )
    train, classes = _listing(root, "train")
    val, val_classes = _listing(root, "val")
    if val_classes != classes:
        extra = sorted(set(val_classes) - set(classes))
        missing = sorted(set(classes) - set(val_classes))
        raise UserError(
            f"{root / 'val'} has other classes than {root / 'train'}: "
            + "; ".join(
                f"{word} {len(names)} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
                for word, names in (("it lacks", missing), ("only it has", extra))
                if names
            )
        )
    return train, val, classes


def _load_packed(root: Path) -> tuple[PackedImages, PackedImages, list[str]]:
    about = read_about(root)
    lacking = [split for split in ("train", "val") if split not in about["splits"]]
    if lacking:
        raise UserError(f"{root / ABOUT} has no {lacking[0]} images: pack a tree that has them")
    train, val = (PackedImages(root, split, about["splits"][split]) for split in ("train", "val"))
    return train, val, about["classes"]


def _listing(root: Path, split: str) -> tuple[ImageFiles, list[str]]:
    """`list_tree` of one split, from the listing that is kept where no folder has changed."""
    places = [folder / f"{split}_listing.npz" for folder in cache_folders(root)]
    for place in places:
        kept = _read_listing(place, root / split)
        if kept:
            return kept
    started, folders = time.time(), {}
    source, classes = list_tree(root / split, folders)
    # A folder that is in the making may change again, or while it is listed, at the same time.
    if len(source) >= KEPT_FROM and max(folders.values()) < (started - SETTLED) * 1e9:
        for place in places:
            if _write_listing(place, source, classes, folders):
                break
    return source, classes


def _read_listing(place: Path, root: Path) -> tuple[ImageFiles, list[str]] | None:
    try:
        with np.load(place, allow_pickle=False) as kept:
            folders = [os.fsdecode(name) for name in kept["folders"].tolist()]
            if [_mtime(root / name) for name in folders] != kept["mtimes"].tolist():
                return None
            classes = [os.fsdecode(name) for name in kept["classes"].tolist()]
            return ImageFiles(root, kept["files"], kept["labels"]), classes
    except Exception:  # there is none, or it is damaged in one of many ways: list again
        return None


def _write_listing(place: Path, source: ImageFiles, classes: list[str], folders: dict) -> bool:
    partial = place.with_name(f"{place.name}.{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            np.savez(
                file,
                files=source.files,
                labels=source.labels,
                classes=np.array([os.fsencode(name) for name in classes]),
                folders=np.array([os.fsencode(name) for name in folders]),
                mtimes=np.array(list(folders.values())),
            )
        os.replace(partial, place)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        return False
    return True


def _mtime(folder: Path) -> int:
    return os.stat(folder).st_mtime_ns


def list_tree(root: Path, folders: dict[str, int] | None = None) -> tuple[ImageFiles, list[str]]:
    """All images below the class folders of `root`; class names sorted, labels by that order.

    Hidden files and folders (.ipynb_checkpoints, ._x.JPEG) are not classes and not images.
    `folders` is filled with every folder that was listed and its time of change, in ns.
    """
    folders = {} if folders is None else folders
    try:
        folders["."] = _mtime(root)
        classes = class_folders(root)
        files = [list_images(root, name, folders) for name in classes]
    except OSError as error:
        raise UserError(f"{error.filename or root} cannot be listed ({error.strerror})") from error
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
