"""Packed images: each split as one sequential file and one index, made once and read many times.

A packed folder holds, for each split, SPLIT.data (entries one after another) and SPLIT.npy (a row
an entry, see `row_type`), and packed.json, which is written last: without it there is no pack. An
entry is an image file's bytes or, decoded, its uint8 pixels H × W × 3. Files are memory-mapped, so
that the workers of a machine share one copy, and every entry's CRC-32 is checked when it is read.
"""

import fcntl
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from common.errors import UserError
from data.images import decode_rgb

ABOUT, BEGUN, FORMAT = "packed.json", "packing.json", 1
FLUSH_BYTES = 1 << 26  # how much of a pack may be lost when the machine fails


def row_type(name_bytes: int) -> np.dtype:
    """An entry in the index; `position` is where its image stood in the listing that was packed."""
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


class PackedImages:
    """One split of a packed folder, a source of images as data.images.ImageFiles is one.

    Raises UserError, one line, where the files are not those that packed.json describes.
    """

    def __init__(self, root: Path, split: str, about: dict):
        self.root, self.split, self.about = Path(root), split, about
        data, index = self.root / f"{split}.data", self.root / f"{split}.npy"
        again = "copy it again from where it was made, or pack again"
        try:
            if data.stat().st_size != about["data_bytes"]:
                raise UserError(
                    f"{data} has {data.stat().st_size:,} bytes, not "
                    f"{about['data_bytes']:,} as packed: {again}"
                )
            if zlib.crc32(index.read_bytes()) != about["index_crc"]:
                raise UserError(f"{index} is damaged (its checksum differs): {again}")
            self.rows = np.load(index, mmap_mode="r", allow_pickle=False)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that nobody may write to it, as nobody does
                self.data = torch.from_numpy(np.memmap(data, np.uint8, mode="r"))
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{self.root}: the packed {split} images cannot be opened ({error}): {again}"
            ) from error
        self.labels = self.rows["label"].astype(np.int64)

    def __reduce__(self):  # a worker that was not forked opens the files itself
        return PackedImages, (self.root, self.split, self.about)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def files(self) -> np.ndarray:
        """The names that the images had in the listing that was packed."""
        return self.rows["name"]

    def file_name(self, index: int) -> str:
        file = self.rows[index]["name"].decode("utf-8", "surrogateescape")
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


def read_about(root: Path) -> dict:
    """packed.json: {"format", "classes", "splits": {split: {…}}, …}. Raises UserError."""
    path = Path(root) / ABOUT
    try:
        about = json.loads(path.read_text())
        if about["format"] != FORMAT:
            raise UserError(
                f"{path} is of format {about['format']}, this program reads {FORMAT}: "
                "pack again with it"
            )
        if not isinstance(about["classes"], list) or not isinstance(about["splits"], dict):
            raise TypeError("classes and splits wanted")
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy or pack again") from error
    return about


@contextmanager
def held(root: Path) -> Iterator[None]:
    """Hold a folder that is being packed. BlockingIOError when another process holds it."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".lock", "a") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except PermissionError as error:  # what some systems say instead
            raise BlockingIOError(*error.args) from error
        yield


class Packing:
    """A folder that is being packed: begun or gone on with, and at the end made a pack.

    The order on disk is data, then the rows that speak of it, then packed.json: a kill at any
    moment leaves a pack that can be gone on with, and never one that claims what is not there.
    `settings` must be those it was begun with; UserError otherwise.
    """

    def __init__(self, root: Path, settings: dict):
        self.root, self.writers, self.settings = root, {}, {"format": FORMAT, **settings}
        try:
            begun = json.loads((root / BEGUN).read_text())
        except FileNotFoundError:
            begun = None
            write_json(root / BEGUN, self.settings)
        except ValueError as error:
            raise UserError(f"{root / BEGUN} cannot be read ({error}): empty the folder") from error
        if begun is not None and begun != self.settings:
            differ = ", ".join(k for k in self.settings if begun.get(k) != self.settings[k])
            raise UserError(
                f"{root} holds a pack that was begun otherwise ({differ}): give the "
                "same data and flags, or another folder"
            )

    def writer(self, split: str, names: np.ndarray, labels: np.ndarray) -> "PackWriter":
        self.writers[split] = PackWriter(self.root, split, names, labels)
        return self.writers[split]

    def finish(self, classes: list[str], **more) -> None:
        splits = {split: writer.finish() for split, writer in self.writers.items()}
        write_json(
            self.root / ABOUT, {**self.settings, **more, "classes": classes, "splits": splits}
        )
        for file in [BEGUN, *(f"{split}.rows" for split in splits)]:
            (self.root / file).unlink()

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


class PackWriter:
    """One split being packed. Whatever was packed before is kept; `missing` is what is left."""

    def __init__(self, root: Path, split: str, names: np.ndarray, labels: np.ndarray):
        self.root, self.split, self.names, self.labels = root, split, names, labels
        self.type, self.journal_path = row_type(names.dtype.itemsize), root / f"{split}.rows"
        for path in (root / f"{split}.data", self.journal_path):
            path.touch()
        rows = np.fromfile(self.journal_path, self.type)
        size = (root / f"{split}.data").stat().st_size
        whole = rows["offset"] + rows["length"] <= size
        rows = rows[: len(rows) if whole.all() else int(whole.argmin())]
        self.end = int((rows["offset"] + rows["length"]).max(initial=0))
        self.missing = np.setdiff1d(np.arange(len(names)), rows["position"])
        self.fresh, self.flushed = [], self.end
        self.data = open(root / f"{split}.data", "r+b")  # noqa: SIM115 (closed by close)
        self.journal = open(self.journal_path, "r+b")  # noqa: SIM115
        for file, end in ((self.data, self.end), (self.journal, len(rows) * self.type.itemsize)):
            file.truncate(end)
            file.seek(end)

    def add(self, position: int, entry, height: int, width: int, *, decoded: bool) -> None:
        """Append the image at `position` of the listing: a file's bytes, or pixels H × W × 3."""
        entry = memoryview(entry).cast("B")
        self.data.write(entry)
        self.fresh.append(
            (
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
        )
        self.end += len(entry)
        if self.end - self.flushed > FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        self.data.flush()
        os.fsync(self.data.fileno())
        self.journal.write(np.array(self.fresh, self.type).tobytes())
        self.journal.flush()
        self.fresh, self.flushed = [], self.end

    def finish(self) -> dict:
        """Write the index of all entries; what packed.json has to say of this split."""
        self.flush()
        os.fsync(self.journal.fileno())
        self.close()
        rows = np.fromfile(self.journal_path, self.type)
        rows = rows[np.argsort(rows["position"], kind="stable")]
        index = self.root / f"{self.split}.npy"
        np.save(index, rows, allow_pickle=False)
        return {
            "images": len(rows),
            "data_bytes": self.end,
            "index_crc": zlib.crc32(index.read_bytes()),
        }

    def close(self) -> None:
        self.data.close()
        self.journal.close()


class _Made(Dataset):
    def __init__(self, make: Callable[[int], object]):
        self.make = make

    def __getitem__(self, position: int):
        return self.make(position)


def made(make: Callable[[int], object], positions: np.ndarray, *, workers: int, **options):
    """Yield make(position) for each position, in order, made ahead by worker processes."""
    loader = DataLoader(
        _Made(make),
        sampler=positions.tolist(),
        batch_size=None,
        num_workers=min(workers, len(positions)),
        generator=torch.Generator(),
        collate_fn=_same,
        **options,
    )
    return zip(positions.tolist(), loader, strict=True)


def _same(value):
    return value


def discard(root: Path, splits: Iterable[str]) -> None:
    """Remove a pack that is damaged; unlinked, not truncated, as a run may be reading it."""
    for file in (ABOUT, *(f"{split}.{end}" for split in splits for end in ("data", "npy"))):
        (root / file).unlink(missing_ok=True)


def write_json(path: Path, value: dict) -> None:
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(value, indent=1))
    os.replace(partial, path)


def check_room(root: Path, needed: float) -> None:
    """Raise UserError unless `needed` bytes are free where `root` lies."""
    free = shutil.disk_usage(root).free
    if needed > free:
        raise UserError(
            f"{root} needs about {needed / 1e9:.1f} GB more and has "
            f"{free / 1e9:.1f} GB free: make room, or give a folder elsewhere"
        )
