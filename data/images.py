"""Images as uint8 tensors: reading files, and the two datasets that training and evaluation use."""

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from data import DataError
from data.sampling import seeded


class Sample(NamedTuple):
    """One image, or after collation a batch of them (every field then has a leading B)."""

    image: torch.Tensor  # uint8, 3 × H × W
    label: int
    index: int  # position in the listing
    draws: torch.Tensor  # what the device still has to do to it, see transforms.RandAugment
    broken: int  # 0: read.  1: unreadable, `image` is another of its class.  2: nothing instead


@dataclass(frozen=True)
class ImageFiles:
    """A listing of image files; arrays, which worker processes share without copying.

    files: N paths below `root`, as fixed-width bytes.  labels: int64 N.
    """

    root: Path
    files: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> Path:
        return self.root / self.files[index].decode("utf-8", "surrogateescape")

    def name(self, index: int) -> str:
        return str(self.path(index))

    def read(self, index: int) -> torch.Tensor:
        """uint8 RGB, 3 × H × W. Raises OSError when the file cannot be decoded."""
        return read_rgb(self.path(index))


def read_rgb(path: Path) -> torch.Tensor:
    """Decode any image Pillow reads into RGB, uint8, 3 × H × W; OSError when it cannot be."""
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            # Broken EXIF and transparent palettes warn once a file and are read all the same.
            warnings.simplefilter("ignore")
            pixels = np.array(image.convert("RGB"))
    except Exception as error:  # Pillow's plugins raise whatever their parsers met
        raise OSError(f"{path} cannot be read as an image ({error})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def quick_look(source: ImageFiles, *, seconds: float = 5.0) -> None:
    """Open the headers of a listing's images, spread over it, for a bounded time.

    Raises DataError for one that is no image. What only decoding can tell shows when it is read.
    """
    started = time.monotonic()
    for index in np.random.default_rng(0).permutation(len(source)).tolist():
        try:
            with Image.open(source.path(index)):
                pass
        except Exception as error:  # Pillow's plugins raise whatever their parsers met
            raise DataError(f"{source.name(index)} cannot be read as an image, and an evaluation "
                            "never leaves one out: restore or remove it") from error
        if time.monotonic() - started > seconds:
            return


def _unread() -> torch.Tensor:
    # Workers cannot raise one clear line through a DataLoader: they hand over a black image that
    # is marked, and the training process, which knows what to do, names the file.
    return torch.zeros(3, 8, 8, dtype=torch.uint8)


class TrainSet(Dataset):
    """Augmented samples by (epoch, index). A broken file gives another image of its class."""

    def __init__(self, source: ImageFiles, transform, seed: int):
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        epoch, index = key
        image, broken = self._read(index)
        with seeded(self.seed, epoch, index):
            image, draws = self.transform(image)
        return Sample(image, int(self.source.labels[index]), index, draws, broken)

    def _read(self, index: int) -> tuple[torch.Tensor, int]:
        try:
            return self.source.read(index), 0
        except OSError:
            same_class = np.flatnonzero(self.source.labels == self.source.labels[index])
        # The next ones of the class, cyclically: the same stand-in in every epoch and run.
        for other in np.roll(same_class, -1 - int(np.searchsorted(same_class, index)))[:-1]:
            try:
                return self.source.read(int(other)), 1
            except OSError:
                continue
        return _unread(), 2


class EvalSet(Dataset):
    """Samples by index, cropped at the centre. A broken file is marked, not replaced."""

    def __init__(self, source: ImageFiles, transform):
        self.source, self.transform = source, transform

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        try:
            image, broken = self.source.read(index), 0
        except OSError:
            image, broken = _unread(), 2
        return Sample(
            self.transform(image), int(self.source.labels[index]), index,
            torch.empty(0, 2, dtype=torch.int64), broken,
        )
