"""A cache of decoded images, which fine-tuning reads in every epoch of every run of a sweep.

The pixels of a dataset are stored in a packed folder (data/packed.py) beside the data, or under the
user's cache folder where that cannot be written; all folds and runs share them. The folder's name
hashes every file's name, size and times of change, so changed files get a new cache. What cannot be
cached is read from its file: the pixels are the same.
"""

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.errors import Busy, UserError
from common.files import lock_folder, require_free_space
from data.decoding import is_system_error
from data.images import ImageFiles
from data.packed import (
    MANIFEST,
    PackedImages,
    finish_pack,
    map_in_workers,
    open_pack,
    read_manifest,
    remove_pack,
)
from data.splits import SPLITS, Splits

FOLDER, SPLIT = ".twistnet_cache", "decoded"


@dataclass(frozen=True)
class DecodedFiles(ImageFiles):
    """Image files whose pixels are cached; `rows` are their rows in the cache, -1 for none."""

    packed: PackedImages
    rows: np.ndarray

    def read(self, index: int) -> torch.Tensor:
        if self.rows[index] >= 0:
            try:
                return self.packed.read(int(self.rows[index]))
            except OSError:  # the cache is damaged, the file may not be
                pass
        return super().read(index)

    def check_header(self, index: int) -> None:
        if self.rows[index] < 0:
            super().check_header(index)


def cache_folders(root: Path) -> list[Path]:
    """Folders for caches of the data in `root`: beside it, else under the user's cache folder."""
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    folders = [root / FOLDER]
    if os.path.isabs(user):  # a user without a home folder has none
        folders.append(Path(user, "twistnet", name))
    return folders


def with_pixel_cache(
    splits: Splits, *, workers: int, stop: Callable[[], bool] = lambda: False
) -> Splits:
    """The same splits, read from a cache of decoded images, which is written unless it exists.

    One line says where it is written, or why the files themselves are read instead.
    """
    # All images of the dataset, whichever split they are in.
    parts = [getattr(splits, split) for split in SPLITS]
    files = np.unique(
        np.concatenate([*(part.files for part in parts), np.array(splits.all_files, "S")])
    )
    everything = ImageFiles(splits.root, files, np.zeros(len(files), np.int64))

    # Open an existing cache, or write one in the first folder that allows it.
    key, reasons = _hash_files(everything), []
    places = [folder / key for folder in cache_folders(splits.root)]
    packed = next(filter(None, map(_open_cache, places)), None)
    for place in places:
        if packed is None and not stop():
            try:
                packed = _build(everything, place, workers=workers, stop=stop)
            except (OSError, UserError) as error:
                reasons.append(str(error))
    if packed is None:
        if reasons:
            print(
                "no cache of decoded images, files are decoded in each epoch: "
                + "; ".join(reasons),
            )
        return splits

    # The row of every file of every split.
    row_of = np.full(len(files), -1, np.int64)
    row_of[packed.rows["position"]] = np.arange(len(packed))
    cached = {
        split: DecodedFiles(
            part.root, part.files, part.labels, packed, row_of[np.searchsorted(files, part.files)]
        )
        for split, part in zip(SPLITS, parts, strict=True)
    }
    return replace(splits, **cached)


def check_uncached(splits: Splits) -> None:
    """Raise UserError if a validation or test image that is not in the cache cannot be decoded."""
    for source in (splits.val, splits.test):
        rows = source.rows if isinstance(source, DecodedFiles) else np.empty(0, np.int64)
        for index in np.flatnonzero(rows < 0).tolist():
            try:
                source.read(index)
            except OSError as error:
                if is_system_error(error):
                    raise
                raise UserError(
                    f"{error}. Validation and test use every image: restore the file, or remove it "
                    "from the dataset"
                ) from error


def _hash_files(source: ImageFiles) -> str:
    digest = hashlib.sha256()  # without the root, which other machines may have mounted elsewhere
    for index, name in enumerate(source.files.tolist()):
        try:
            # Copying tools restore mtime: only ctime shows that a file was replaced.
            stat = os.stat(source.path(index))
            state = (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
            digest.update(name + f"\0{state}\0".encode())
        except OSError:  # reported when it is read
            digest.update(name + b"\0\0")
    return digest.hexdigest()[:16]


def _open_cache(place: Path) -> PackedImages | None:
    if not os.path.isfile(place / MANIFEST):  # Path.is_file raises where it may not look
        return None
    try:
        return PackedImages(place, SPLIT, read_manifest(place)["splits"][SPLIT])
    except (UserError, KeyError, OSError):
        return None  # it is written again


def _build(source: ImageFiles, place: Path, *, workers: int, stop) -> PackedImages | None:
    """Decode all of `source` into `place`, or wait for the process that does. None when stopped."""
    lock = _wait_for_lock(place, stop)
    if lock is None:
        return None
    with lock:
        packed = _open_cache(place)
        if packed is None:
            remove_pack(place, [SPLIT])  # it is damaged, if it exists
            _remove_other_caches(place)
            try:
                _decode(source, place, workers=workers, stop=stop)
            except (OSError, UserError):
                shutil.rmtree(place, ignore_errors=True)  # make room for others
                raise
            packed = _open_cache(place)
        return packed


def _wait_for_lock(place: Path, stop: Callable[[], bool]):
    """The lock of `place`, as lock_folder returns it, or None when asked to stop."""
    said = False
    while not stop():
        try:
            return lock_folder(place)
        except Busy:  # after two seconds
            if not said:
                print(f"waiting for the process that decodes the images into {place}")
            said = True
    return None


def _decode(source: ImageFiles, place: Path, *, workers: int, stop) -> None:
    size = _mean_size(source) * len(source)
    _check_fits(place, size)
    print(f"decoding {len(source):,} images once, {size / 1e9:.1f} GB, into {place}")
    with open_pack(place, {SPLIT: source}) as writers:
        images = map_in_workers(
            partial(_read_pixels, source), np.arange(len(source)), workers=workers
        )
        progress = tqdm(
            images, total=len(source), unit="image", desc="decoding", leave=False, disable=None
        )
        for position, image in progress:
            if stop():
                return
            if image is not None:
                writers[SPLIT].add(position, image.numpy(), *image.shape[:2], decoded=True)
        finish_pack(place, writers, {"key": place.name, "classes": []})


def _read_pixels(source: ImageFiles, position: int) -> torch.Tensor | None:
    try:
        return source.read(position).permute(1, 2, 0).contiguous()  # H × W × 3
    except OSError:
        return None  # reported when the file itself is read


def _mean_size(source: ImageFiles) -> float:
    """Mean size of a decoded image in bytes, from up to 100 of them."""
    sizes = []
    for index in np.linspace(0, len(source) - 1, min(100, len(source))).astype(int).tolist():
        try:
            sizes.append(source.read(index).numel())
        except OSError:
            continue
    return float(np.mean(sizes)) if sizes else 0.0


def _check_fits(place: Path, size: float) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory / 2:
        raise UserError(
            f"the decoded images, about {size / 1e9:.1f} GB, would not stay in this "
            f"machine's memory of {memory / 1e9:.1f} GB"
        )
    require_free_space(place, 1.05 * size)


def _remove_other_caches(place: Path) -> None:
    """Remove caches of earlier states of the same data, except one that is being written."""
    for other in place.parent.iterdir():
        if other != place and other.is_dir():
            try:
                with lock_folder(other):
                    shutil.rmtree(other, ignore_errors=True)
            except (OSError, UserError):
                continue
