"""Fine-tuning data as three listings, and what the loaders of single datasets share."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from common.errors import UserError
from data.images import ImageFiles

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Splits:
    """One fold of a dataset; labels are positions in `classes`, files lie below one `root`."""

    classes: list[str]
    train: ImageFiles
    val: ImageFiles
    test: ImageFiles

    @property
    def root(self) -> Path:
        return self.train.root


def make_splits(root: Path, classes: list[str], listed: dict[str, list[tuple[str, int]]]) -> Splits:
    """Splits from {"train": [(file below root, label)], "val": …, "test": …}; none may be empty."""
    parts = {}
    for split in SPLITS:
        if not listed[split]:
            raise UserError(f"{root}: the {split} split holds no image")
        files, labels = zip(*listed[split], strict=True)
        encoded = np.array([os.fsencode(file) for file in files])
        parts[split] = ImageFiles(root, encoded, np.array(labels, dtype=np.int64))
    return Splits(classes, **parts)


def fingerprint(splits: Splits) -> str:
    """sha256 of class names, files and labels: equal where the same data lies somewhere else."""
    return digest_of(splits.classes, {split: getattr(splits, split) for split in SPLITS})


def digest_of(classes: list[str], parts: dict[str, ImageFiles]) -> str:
    digest = hashlib.sha256(b"\0".join(os.fsencode(name) for name in classes))
    for split, part in parts.items():
        digest.update(f"\0\0{split} {len(part)}\0".encode())
        digest.update(b"\0".join(part.files.tolist()))
        digest.update(part.labels.astype("<i8").tobytes())
    return digest.hexdigest()


def check_fold(fold: int, folds: list[int], where) -> None:
    """Raise UserError that says which folds there are, unless `fold` is one of them."""
    if fold not in folds:
        runs_on = len(folds) > 1 and folds == list(range(1, len(folds) + 1))
        there = f"1-{len(folds)}" if runs_on else ", ".join(map(str, folds)) or "none"
        raise UserError(f"--fold {fold}: not among the folds of {where} ({there})")


def find_root(data_dir: Path, inside: list[str], entries: list[str], name: str) -> Path:
    """The first of data_dir / inside[i] that holds all `entries`; UserError where none does."""
    for place in inside:
        if all((data_dir / place / entry).exists() for entry in entries):
            return data_dir / place
    places = " and ".join(["it", *(f"its {place}/" for place in inside if place)])
    raise UserError(
        f"--data_dir {data_dir}: no {name} here ({', '.join(entries)} looked for in {places})"
    )


def class_folders(root: Path) -> list[str]:
    """Names of the folders in `root`, sorted, hidden ones (.ipynb_checkpoints) left out."""
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def list_images(root: Path, folder: str, times: dict[str, int] | None = None) -> list[str]:
    """Images anywhere below root/folder, as sorted paths below root; hidden names left out.

    `times` is filled with every folder that was listed and when it changed, in ns.
    """
    found, visited = [], {os.path.realpath(root / folder)}
    for place, folders, names in os.walk(root / folder, onerror=_raise, followlinks=True):
        here = os.path.relpath(place, root)
        if times is not None:
            times[here] = os.stat(place).st_mtime_ns
        prefix = "" if here == "." else f"{here}/"
        found += [
            prefix + name
            for name in names
            if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")
        ]
        real = {name: os.path.realpath(os.path.join(place, name)) for name in sorted(folders)}
        # A link to a folder that was seen already would put one image into two splits.
        folders[:] = [n for n, p in real.items() if not n.startswith(".") and p not in visited]
        visited.update(real.values())
    return sorted(found)


def _raise(error: OSError):
    raise error


def shuffled(files: list[str], fold: int) -> list[str]:
    """An order of `files` that the fold and the names alone decide, the same on every machine."""
    return sorted(files, key=lambda file: hashlib.sha256(os.fsencode(f"{fold}:{file}")).digest())


def stratified_splits(root: Path, fold: int) -> Splits:
    """The `fold`-th independent reshuffle of a folder of class folders, class by class 60/20/20."""
    classes = class_folders(root)
    if len(classes) < 2:
        raise UserError(f"{root}: needs at least two class folders, holds {len(classes)}")
    listed = {split: [] for split in SPLITS}
    for label, name in enumerate(classes):
        files = shuffled(list_images(root, name), fold)
        if len(files) < 3:
            raise UserError(
                f"{root / name}: {len(files)} images; a class needs at least 3, one for each split"
            )
        fifth = max(1, round(len(files) / 5))
        parts = (files[2 * fifth :], files[fifth : 2 * fifth], files[:fifth])
        for split, part in zip(SPLITS, parts, strict=True):
            listed[split] += [(file, label) for file in sorted(part)]
    return make_splits(root, classes, listed)


def read_fields(path: Path, separator: str | None, count: int) -> list[tuple[int, list[str]]]:
    """Lines of a text file as (line number, fields); UserError names a line that has not `count`.

    Empty lines are left out; `separator` None means white space.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not a text file ({error.reason})") from error
    rows = []
    for number, line in enumerate(lines, 1):
        fields = line.strip().split(separator)
        if len(fields) == count and all(fields):
            rows.append((number, fields))
        elif line.strip():
            raise UserError(f"{path}:{number}: {count} fields wanted, found {line.strip()[:60]!r}")
    return rows


class PresentImages:
    """Whether files are there, by one listing a folder instead of one stat a file."""

    def __init__(self, root: Path):
        self.root, self.names = root, {}

    def __contains__(self, file: str) -> bool:
        folder, _, name = file.rpartition("/")
        if folder not in self.names:
            path = self.root / folder
            self.names[folder] = set(os.listdir(path)) if path.is_dir() else set()
        return name in self.names[folder]
