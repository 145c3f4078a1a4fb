"""Images decoded once: what fine-tuning reads in every epoch of every run of a sweep.

The pixels of a dataset lie in a packed folder (data/packed.py) beside the data, or where that
cannot be written under the user's cache folder, and all folds and runs share them. The folder's
name is drawn from each file's name, size and time of change, so that other files are another
cache. Whatever cannot be cached is read from its file: the pixels are the same.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from common.errors import UserError
from data.images import ImageFiles
from data.packed import ABOUT, PackedImages, Packing, check_room, discard, held, made, read_about
from data.splits import SPLITS, Splits

FOLDER, SPLIT = ".twistnet_cache", "decoded"


@dataclass(frozen=True)
class DecodedFiles(ImageFiles):
    """Image files whose pixels lie in a cache; `rows` says where, -1 for those that do not."""

    packed: PackedImages
    rows: np.ndarray

    def read(self, index: int) -> torch.Tensor:
        if self.rows[index] >= 0:
            try:
                return self.packed.read(int(self.rows[index]))
            except OSError:  # a damaged cache is no reason to lose an image
                pass
        return super().read(index)

    def check_header(self, index: int) -> None:
        if self.rows[index] < 0:
            super().check_header(index)


def cache_folders(root: Path) -> list[Path]:
    """Where things about the data in `root` are kept: beside it, else under the user's cache."""
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]
    return [root / FOLDER, user / "twistnet" / name]


def decoded(
    splits: Splits,
    *,
    workers: int,
    stop: Callable[[], bool] = lambda: False,
) -> Splits:
    """The same splits, read from a cache of decoded images, which is made unless it is there.

    One line says where it is written, or why the files themselves are read instead.
    """
    parts = [getattr(splits, split) for split in SPLITS]
    files = np.unique(np.concatenate([part.files for part in parts]))
    everything = ImageFiles(splits.root, files, np.zeros(len(files), np.int64))
    key, reasons = _key(everything), []
    places = [folder / key for folder in cache_folders(splits.root)]
    packed = next(filter(None, map(_opened, places)), None)
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
                flush=True,
            )
        return splits
    row_of = np.full(len(files), -1, np.int64)
    row_of[packed.rows["position"]] = np.arange(len(packed))
    cached = {
        split: DecodedFiles(
            part.root, part.files, part.labels, packed, row_of[np.searchsorted(files, part.files)]
        )
        for split, part in zip(SPLITS, parts, strict=True)
    }
    return replace(splits, **cached)


def _key(source: ImageFiles) -> str:
    digest = hashlib.sha256(os.fsencode(source.root.resolve()))
    for index, name in enumerate(source.files.tolist()):
        try:
            about = os.stat(source.path(index))
            state = (about.st_size, about.st_mtime_ns, about.st_ctime_ns)
            digest.update(name + f"\0{state}\0".encode())
        except OSError:  # reading it will tell
            digest.update(name + b"\0\0")
    return digest.hexdigest()[:16]


def _opened(place: Path) -> PackedImages | None:
    if not (place / ABOUT).is_file():
        return None
    try:
        return PackedImages(place, SPLIT, read_about(place)["splits"][SPLIT])
    except (UserError, KeyError, OSError):
        return None  # it will be made anew


def _build(source: ImageFiles, place: Path, *, workers: int, stop) -> PackedImages | None:
    """Decode all of `source` into `place`, or wait for the process that does. None when stopped."""
    for _ in _until_held(place, stop):
        packed = _opened(place)
        if packed is None:
            if (place / ABOUT).exists():  # it did not open
                discard(place, [SPLIT])
            _remove_others(place)
            try:
                _decode(source, place, workers=workers, stop=stop)
            except (OSError, UserError):
                shutil.rmtree(place, ignore_errors=True)  # room for others
                raise
            packed = _opened(place)
        return packed
    return None


def _until_held(place: Path, stop) -> Iterator[None]:
    """Yield once, while holding `place`; not at all when asked to stop before."""
    said = False
    while not stop():
        try:
            with held(place):
                yield
                return
        except BlockingIOError:
            if not said:
                print(f"waiting for the process that decodes the images into {place}", flush=True)
            said = True
            time.sleep(0.2)


def _decode(source: ImageFiles, place: Path, *, workers: int, stop) -> None:
    packing = Packing(place, {"key": place.name})
    try:
        writer = packing.writer(SPLIT, source.files, source.labels)
        size = _mean_size(source) * len(writer.missing)
        _check_fits(place, size)
        print(
            f"decoding {len(writer.missing):,} images once, {size / 1e9:.1f} GB, into {place}",
            flush=True,
        )

        images = made(partial(_pixels, source), writer.missing, workers=workers)
        for position, image in tqdm(
            images,
            total=len(writer.missing),
            unit="image",
            desc="decoding",
            leave=False,
            disable=None,
        ):
            if stop():
                writer.flush()
                return
            if image is not None:
                writer.add(position, image.numpy(), *image.shape[:2], decoded=True)
        packing.finish([])
    finally:
        packing.close()


def _pixels(source: ImageFiles, position: int) -> torch.Tensor | None:
    try:
        return source.read(position).permute(1, 2, 0).contiguous()
    except OSError:
        return None  # left to whoever reads the file


def _mean_size(source: ImageFiles) -> float:
    """Bytes of a decoded image, from up to 100 of them."""
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
    check_room(place, 1.05 * size)


def _remove_others(place: Path) -> None:
    """Remove caches of the same folder in an earlier state, but for one that is being made."""
    for other in place.parent.iterdir():
        if other != place and other.is_dir():
            try:
                with held(other):
                    shutil.rmtree(other, ignore_errors=True)
            except OSError:
                continue
