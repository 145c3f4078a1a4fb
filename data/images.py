"""Listings of images, and the two datasets that training and evaluation make of them."""

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from common.errors import READ, REPLACED, UNREADABLE, UserError, is_transient
from common.files import printable
from data.decoding import RESOURCE_ERRNOS, check_header, is_system_error, read_rgb
from data.sampling import FIRST_REPEAT, seeded

# Of a batch, before they are augmented; see TrainSet.__getitems__.
DECODED_IMAGES, DECODED_BYTES = 16, 2**25


class Sample(NamedTuple):
    """One image, or after collation a batch of them (every field then has a leading B)."""

    image: torch.Tensor  # uint8, 3 × H × W
    label: int
    index: int  # position in the listing
    draws: torch.Tensor  # operations that the device applies later, see RandAugment.draw
    broken: int  # READ, REPLACED or UNREADABLE


@dataclass(frozen=True)
class ImageFiles:
    """A listing of image files, as arrays, which worker processes share without copying.

    files: N paths below `root`, as fixed-width bytes.  labels: int64 N.
    """

    root: Path
    files: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> Path:
        return self.root / os.fsdecode(self.files[index])

    def file_name(self, index: int) -> str:
        """The path as text that can be printed, whatever bytes it has."""
        return printable(self.path(index))

    def read(self, index: int) -> torch.Tensor:
        """uint8 RGB, 3 × H × W. Raises OSError when the file cannot be decoded."""
        return read_rgb(self.path(index))

    def check_header(self, index: int) -> None:
        """Raise an error if the header is not that of a readable image; pixels are not decoded."""
        check_header(self.path(index))


def spot_check(source: ImageFiles, *, seconds: float = 5.0) -> None:
    """Check the headers of a listing's images, in random order, for at most `seconds`.

    Raises UserError for a file that is not an image. Damaged pixels are found when they are read.
    """
    end = time.monotonic() + seconds
    for index in np.random.default_rng(0).permutation(len(source)).tolist():
        try:
            source.check_header(index)
        except OSError as error:
            if is_system_error(error):
                raise
            raise UserError(
                f"{error}. Evaluation uses every image: restore the file or remove it from the "
                "dataset"
            ) from error
        if time.monotonic() > end:
            return


def _unread() -> torch.Tensor:
    # An error in a worker would end the DataLoader with a traceback. Workers return a black image
    # that is marked as broken instead, and the training process names the file and decides.
    return torch.zeros(3, 8, 8, dtype=torch.uint8)


class TrainSet(Dataset):
    """Augmented samples by key: (epoch, index) or (epoch, index, repeat).

    An unreadable image is replaced by another of its class. transform: (image, epoch, index) →
    (image, draws), such as data.transforms.TrainTransform.
    """

    def __init__(self, source: ImageFiles, transform, seed: int):
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, ...]) -> Sample:
        return self._sample(key, *self._read(key[1]))

    def __getitems__(self, keys: list[tuple[int, ...]]) -> list[Sample]:
        """The samples of a batch: decode DECODED_IMAGES images, augment them, and so on.

        Alternating between the two for each image would evict the CPU caches. Large images are
        fewer at a time: 16 photographs of 24 megapixels take more than a gigabyte.
        """
        samples, read, size = [], [], 0
        for key in keys:
            image, broken = self._read(key[1])
            read.append((key, image, broken))
            size += image.nbytes
            if len(read) == DECODED_IMAGES or size > DECODED_BYTES:
                samples += [self._sample(*each) for each in read]
                read, size = [], 0
        return samples + [self._sample(*each) for each in read]

    def _sample(self, key: tuple[int, ...], image: torch.Tensor, broken: int) -> Sample:
        epoch, index, *repeat = key
        with seeded(self.seed, epoch, index, *(FIRST_REPEAT + number for number in repeat)):
            image, draws = self.transform(image, epoch, index)
        return Sample(image, int(self.source.labels[index]), index, draws, broken)

    def _read(self, index: int) -> tuple[torch.Tensor, int]:
        try:
            return self.source.read(index), READ
        except OSError as error:
            if error.errno in RESOURCE_ERRNOS:
                raise
            was_transient = is_transient(error)
            same_class = np.flatnonzero(self.source.labels == self.source.labels[index])
        # The next images of the class, cyclically: the same replacement in every epoch and run.
        for other in np.roll(same_class, -1 - int(np.searchsorted(same_class, index)))[:-1]:
            try:
                replacement = self.source.read(int(other))
            except OSError as error:
                if is_system_error(error):  # two bad sectors are unlikely: the disk fails
                    raise
                continue
            if was_transient:
                with contextlib.suppress(OSError):  # if the server has come back, it can be read
                    return self.source.read(index), READ
            return replacement, REPLACED
        return _unread(), UNREADABLE


class EvalSet(Dataset):
    """Samples by index for evaluation. An unreadable image is marked as broken, not replaced.

    So is one that the machine fails to read if `marks_all`; otherwise that error is raised.
    """

    def __init__(self, source: ImageFiles, transform, *, marks_all: bool = False):
        self.source, self.transform, self.marks_all = source, transform, marks_all

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        try:
            image, broken = self.source.read(index), READ
        except OSError as error:
            if is_system_error(error) and not self.marks_all:
                raise
            image, broken = _unread(), UNREADABLE
        return Sample(
            self.transform(image),
            int(self.source.labels[index]),
            index,
            torch.empty(0, 2, dtype=torch.int64),
            broken,
        )


def collate(samples: list[Sample]) -> Sample:
    """A batch of samples: images B × 3 × H × W, channels last in memory.

    Decoders and networks use that order; changing it here would take as long as the crop.
    """
    batch = default_collate([s._replace(image=s.image.permute(1, 2, 0)) for s in samples])
    return batch._replace(image=batch.image.permute(0, 3, 1, 2))
