"""Fine-tuning data as three listings, and what the loaders of single datasets share."""

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from common.errors import UserError
from common.files import printable, read_text
from common.processes import read_integer
from data.images import ImageFiles

SPLITS = ("train", "val", "test")
# Images in these formats are in no listing; they are counted, so that nobody misses them.
LEFT_OUT_SUFFIXES = (".avif", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".jxl", ".tga")
# Added to folders by macOS, Synology, Windows and ext file systems, some with thumbnails inside.
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}


@dataclass(frozen=True)
class Splits:
    """One fold of a dataset; labels are positions in `classes`, all files are below one `root`."""

    classes: list[str]
    train: ImageFiles
    val: ImageFiles
    test: ImageFiles
    all_files: Sequence[bytes] = ()  # of all folds, if this one may lack some; for the cache

    @property
    def root(self) -> Path:
        return self.train.root


def make_splits(root: Path, classes: list[str], listed: dict[str, list[tuple[str, int]]]) -> Splits:
    """Splits from {"train": [(file below root, label)], "val": …, "test": …}.

    Raises UserError where one of them is empty.
    """
    parts = {}
    for split in SPLITS:
        if not listed[split]:
            raise UserError(f"{root}: the {split} split has no images")
        files, labels = zip(*listed[split], strict=True)
        encoded = np.array([os.fsencode(file) for file in files])
        parts[split] = ImageFiles(root, encoded, np.array(labels, dtype=np.int64))
    return Splits(classes, **parts)


def fingerprint(splits: Splits) -> str:
    """sha256 of class names, files and labels: the same wherever the data is stored."""
    return digest_of(splits.classes, {split: getattr(splits, split) for split in SPLITS})


def digest_of(classes: list[str], parts: dict[str, ImageFiles]) -> str:
    digest = hashlib.sha256(b"\0".join(os.fsencode(name) for name in classes))
    for split, part in parts.items():
        digest.update(f"\0\0{split} {len(part)}\0".encode())
        digest.update(b"\0".join(part.files.tolist()))
        digest.update(part.labels.astype("<i8").tobytes())
    return digest.hexdigest()


def check_fold(fold: int, folds: list[int], where: str | Path) -> None:
    """Raise UserError, naming the folds that exist, unless `fold` is one of them."""
    if fold not in folds:
        consecutive = len(folds) > 1 and folds == list(range(1, len(folds) + 1))
        existing = f"1-{len(folds)}" if consecutive else ", ".join(map(str, folds)) or "none"
        raise UserError(f"--fold {fold}: not among the folds of {where} ({existing})")


def find_root(data_dir: Path, inside: list[str], entries: list[str], name: str) -> Path:
    """The first of data_dir / inside[i] that contains all `entries`; UserError where none does."""
    for place in inside:
        if all((data_dir / place / entry).exists() for entry in entries):
            return data_dir / place
    places = " or ".join(["it", *(f"its {place}/" for place in inside if place)])
    raise UserError(
        f"--data_dir {data_dir}: {name} not found (expected {', '.join(entries)} in {places})"
    )


def list_class_folders(root: Path) -> list[str]:
    """Names of the folders in `root`, sorted; hidden (.ipynb_checkpoints) and system ones not."""
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not _is_skipped(e.name))


def list_images(root: Path, folder: str, left_out: Counter | None = None) -> list[str]:
    """Images anywhere below root/folder, as sorted paths below root; hidden names are skipped.

    `left_out` counts the images whose format is not read, by suffix, for report_left_out.
    """
    found, visited = [], {os.path.realpath(root / folder)}
    for place, folders, names in os.walk(root / folder, onerror=_raise, followlinks=True):
        here = os.path.relpath(place, root)
        prefix = "" if here == "." else f"{here}/"
        names = [name for name in names if not name.startswith(".")]
        found += [prefix + name for name in names if is_image(name)]
        if left_out is not None:
            suffixes = (os.path.splitext(name)[1].lower() for name in names)
            left_out.update(suffix for suffix in suffixes if suffix in LEFT_OUT_SUFFIXES)
        # A second way to a folder would put one image into two splits. Links come last, so that
        # images are listed by the folders' own names.
        kept, ordered = [], sorted(folders)
        ordered.sort(key=lambda name: os.path.islink(os.path.join(place, name)))
        for name in ordered:
            real = os.path.realpath(os.path.join(place, name))
            if not _is_skipped(name) and real not in visited:
                visited.add(real)
                kept.append(name)
        folders[:] = kept
    return sorted(found)


def is_image(name: str) -> bool:
    """Whether a file's name is that of an image, and not hidden."""
    return name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")


def _is_skipped(folder: str) -> bool:
    return folder.startswith(".") or folder in SYSTEM_FOLDERS


def _raise(error: OSError):
    raise error


def report_left_out(root: Path, left_out: Counter) -> None:
    """Say once per listing, on stderr of rank 0, how many images of which formats were left out."""
    if left_out and not read_integer("RANK", 0):
        counts = ", ".join(f"{count:,} {suffix}" for suffix, count in sorted(left_out.items()))
        print(
            f"note: {printable(root)}: left out {counts}: convert these files to JPEG or PNG to "
            "use them",
            file=sys.stderr,
        )


def shuffle_files(files: list[str], fold: int) -> list[str]:
    """Shuffle `files` in an order that depends only on the fold and the names, on any machine."""
    return sorted(files, key=lambda file: hashlib.sha256(os.fsencode(f"{fold}:{file}")).digest())


def make_stratified_splits(root: Path, fold: int) -> Splits:
    """The `fold`-th independent shuffle of a folder of class folders, split 60/20/20 per class.

    Raises UserError for fewer than two classes, or fewer than three images in a class.
    """
    classes = list_class_folders(root)
    if len(classes) < 2:
        raise UserError(f"{root}: needs at least two class folders, has {len(classes)}")
    left_out, listed = Counter(), {split: [] for split in SPLITS}
    images = [list_images(root, name, left_out) for name in classes]
    report_left_out(root, left_out)
    for label, name in enumerate(classes):
        files = shuffle_files(images[label], fold)
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
    """Lines of a text file as (line number, fields); empty lines are left out.

    `separator` None means white space. Raises UserError naming a line that has not `count` fields.
    """
    rows = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        fields = line.strip().split(separator)
        if len(fields) == count and all(fields):
            rows.append((number, fields))
        elif line.strip():
            raise UserError(
                f"{path}:{number}: expected {count} fields, found {line.strip()[:60]!r}"
            )
    return rows


class ExistingFiles:
    """Which files exist, by one listing per folder instead of one stat per file."""

    def __init__(self, root: Path):
        self.root, self.names = root, {}

    def __contains__(self, file: str) -> bool:
        folder, _, name = file.rpartition("/")
        if folder not in self.names:
            path = self.root / folder
            self.names[folder] = set(os.listdir(path)) if path.is_dir() else set()
        return name in self.names[folder]

    def images(self) -> list[str]:
        """The images of all folders that have been asked for, in no order."""
        listed = self.names.items()
        return [f"{folder}/{name}" for folder, names in listed for name in names if is_image(name)]
