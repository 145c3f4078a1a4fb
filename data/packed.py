"""Packed images: each split as one sequential file and one index, written once, read many times.

A packed folder contains, for each split, SPLIT.data (entries one after another) and SPLIT.npy (a
row per entry, see `row_type`), and packed.json, which is written last: without it the folder is
not a pack. An entry is an image file's bytes or, decoded, its uint8 pixels H × W × 3. The files
are memory-mapped, so that all workers of a machine share one copy, and every entry's CRC-32 is
checked when it is read.
"""

import contextlib
import json
import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from common.errors import UserError
from common.files import sync_folder, write_json
from common.processes import ignore_stop_signals
from data.decoding import decode_rgb

MANIFEST, FORMAT = "packed.json", 1
PARTIAL = ".part"  # suffix of files that are being written
OLD_JOURNAL = "packing.json"  # earlier versions resumed from it and from SPLIT.rows


def row_type(name_bytes: int) -> np.dtype:
    """An entry in the index; `position` is the image's place in the listing that was packed."""
    return np.dtype(
        [
            ("position", "<u4"),
            ("label", "<i4"),
            ("offset", "<u8"),
            ("length", "<u8"),
            ("crc", "<u4"),
            ("height", "<u4"),
            ("width", "<u4"),
            ("decoded", "?"),
            ("name", f"S{max(1, name_bytes)}"),
        ]
    )


# ---------------------------------------------------------------- reading


class PackedImages:
    """One split of a packed folder, a source of images with the methods of images.ImageFiles.

    `manifest` is packed.json's entry for the split. Raises UserError, one line, where the files
    are not those that it describes.
    """

    def __init__(self, root: Path, split: str, manifest: dict):
        self.root, self.split, self.manifest = Path(root), split, manifest
        data, index = self.root / f"{split}.data", self.root / f"{split}.npy"
        advice = "copy it again from where it was made, or pack again"
        try:
            if data.stat().st_size != manifest["data_bytes"]:
                raise UserError(
                    f"{data} has {data.stat().st_size:,} bytes, not "
                    f"{manifest['data_bytes']:,} as packed: {advice}"
                )
            if zlib.crc32(index.read_bytes()) != manifest["index_crc"]:
                raise UserError(f"{index} is damaged (its checksum differs): {advice}")
            self.rows = np.load(index, mmap_mode="r", allow_pickle=False)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns that the array is read-only
                self.data = torch.from_numpy(np.memmap(data, np.uint8, mode="r"))
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.root}: the packed {split} images cannot be opened ({error}): {advice}"
            ) from error
        self.labels = self.rows["label"].astype(np.int64)

    def __reduce__(self):  # a worker that was not forked opens the files itself
        return PackedImages, (self.root, self.split, self.manifest)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def files(self) -> np.ndarray:
        """The names that the images had in the listing that was packed."""
        return self.rows["name"]

    def file_name(self, index: int) -> str:
        file = os.fsdecode(self.rows[index]["name"])
        return f"{self.root / self.split}.data: {file}"

    def read(self, index: int) -> torch.Tensor:
        """uint8 RGB, 3 × H × W. Raises OSError when the entry is damaged."""
        entry = self._entry(index)
        row = self.rows[index]
        if row["decoded"]:
            return entry.view(int(row["height"]), int(row["width"]), 3).permute(2, 0, 1)
        return decode_rgb(entry, self.file_name(index))

    def check_header(self, index: int) -> None:
        """Raise OSError when the entry is damaged, without decoding it."""
        self._entry(index)

    def _entry(self, index: int) -> torch.Tensor:
        row = self.rows[index]
        first = int(row["offset"])
        entry = self.data[first : first + int(row["length"])]
        if zlib.crc32(entry.numpy()) != row["crc"]:
            raise OSError(f"{self.file_name(index)} is damaged (its checksum differs)")
        return entry


def read_manifest(root: Path) -> dict:
    """packed.json: {"format", "classes", "splits": {split: {…}}, …}. Raises UserError."""
    path = Path(root) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] != FORMAT:
            raise UserError(
                f"{path} has format {manifest['format']}, this program reads {FORMAT}: "
                "pack again with it"
            )
        if not isinstance(manifest["classes"], list) or not isinstance(manifest["splits"], dict):
            raise TypeError("expected a list of classes and a dictionary of splits")
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy or pack again") from error
    return manifest


def find_empty_class(labels: np.ndarray, classes: list[str]) -> str | None:
    """The first class that none of the images has, if there is one."""
    images = np.bincount(labels, minlength=len(classes))
    return None if images.all() else classes[int(images.argmin())]


def is_interrupted(root: Path) -> bool:
    """Whether `root` contains what a killed process left of a pack."""
    names = [f"{split}{end}{PARTIAL}" for split in ("train", "val") for end in (".data", ".npy")]
    return any(os.path.isfile(root / name) for name in (OLD_JOURNAL, *names))


# ---------------------------------------------------------------- writing


class PackWriter:
    """Write the entries of one split to SPLIT.data.part; `finish` writes the index beside it."""

    def __init__(self, root: Path, split: str, names: np.ndarray, labels: np.ndarray):
        self.path, self.names, self.labels = root / split, names, labels
        self.rows = np.zeros(len(names), row_type(names.dtype.itemsize))
        self.written = np.zeros(len(names), bool)
        self.end = 0  # bytes written
        self.data = open(f"{self.path}.data{PARTIAL}", "wb")  # noqa: SIM115 (open_pack closes it)

    def add(self, position: int, entry, height: int, width: int, *, decoded: bool) -> None:
        """Append the image at `position` of the listing: a file's bytes, or pixels H × W × 3."""
        entry = memoryview(entry).cast("B")
        self.data.write(entry)
        self.rows[position] = (
            position,
            self.labels[position],
            self.end,
            len(entry),
            zlib.crc32(entry),
            height,
            width,
            decoded,
            self.names[position],
        )
        self.written[position] = True
        self.end += len(entry)

    def finish(self) -> dict:
        """Complete both files on disk and return the manifest's entry for this split."""
        with open(f"{self.path}.npy{PARTIAL}", "wb") as index:
            np.save(index, self.rows[self.written], allow_pickle=False)
            for file in (index, self.data):
                file.flush()
                os.fsync(file.fileno())
        return {
            "images": int(self.written.sum()),
            "data_bytes": self.end,
            "index_crc": zlib.crc32(Path(index.name).read_bytes()),
        }


@contextlib.contextmanager
def open_pack(root: Path, sources: dict) -> Iterator[dict[str, PackWriter]]:
    """Yield a writer for each of `sources`, {split: source with files and labels}.

    Unless finish_pack has been called, nothing is left when the block ends, however it ends. Only
    a process that is killed leaves .part files, which the next one overwrites.
    """
    remove_partial(root, sources)
    writers = {}
    try:
        for split, source in sources.items():
            writers[split] = PackWriter(root, split, source.files, source.labels)
        yield writers
    finally:
        for writer in writers.values():
            with contextlib.suppress(OSError):  # a full disk, which has been reported already
                writer.data.close()
        remove_partial(root, sources)


def finish_pack(root: Path, writers: dict[str, PackWriter], manifest: dict) -> None:
    """Make what was written a pack. `manifest` has at least "classes"."""
    splits = {split: writer.finish() for split, writer in writers.items()}
    for split in writers:
        for suffix in (".data", ".npy"):
            os.replace(root / f"{split}{suffix}{PARTIAL}", root / f"{split}{suffix}")
    sync_folder(root)
    write_json(root / MANIFEST, {"format": FORMAT, **manifest, "splits": splits})


def remove_partial(root: Path, splits: Iterable[str]) -> None:
    """Remove what an interrupted process left of a pack."""
    for split in splits:
        for suffix in (f".data{PARTIAL}", f".npy{PARTIAL}", ".rows"):
            (root / f"{split}{suffix}").unlink(missing_ok=True)
    (root / OLD_JOURNAL).unlink(missing_ok=True)


def remove_pack(root: Path, splits: Iterable[str]) -> None:
    """Remove a damaged pack; unlinked, not truncated, as a run may be reading it."""
    for file in (MANIFEST, *(f"{split}{end}" for split in splits for end in (".data", ".npy"))):
        (root / file).unlink(missing_ok=True)


# ---------------------------------------------------------------- making entries in parallel


def map_in_workers(
    function: Callable[[int], object], positions: np.ndarray, *, workers: int
) -> Iterator[tuple[int, object]]:
    """Yield (position, function(position)) in order, computed ahead by worker processes."""
    loader = DataLoader(
        positions.tolist(),
        batch_size=None,
        collate_fn=function,  # called with each element where there are no batches
        num_workers=min(workers, len(positions)),
        generator=torch.Generator(),  # the global one stays as it is
        worker_init_fn=ignore_stop_signals,
    )
    return zip(positions.tolist(), loader, strict=True)
