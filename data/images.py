"""Images as uint8 tensors: reading files, and the two datasets that training and evaluation use."""

import functools
import io
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset, default_collate

from common.errors import UserError
from data.sampling import seeded

DECODED_AT_ONCE = 16  # images, of a batch in a worker


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

    def file_name(self, index: int) -> str:
        """The path, printable whatever bytes it has."""
        return str(self.path(index)).encode(errors="replace").decode()

    def read(self, index: int) -> torch.Tensor:
        """uint8 RGB, 3 × H × W. Raises OSError when the file cannot be decoded."""
        return read_rgb(self.path(index))

    def check_header(self, index: int) -> None:
        """Raise an error where a glance at the file shows that it is no image."""
        with Image.open(self.path(index)):
            pass


def read_rgb(path: Path) -> torch.Tensor:
    """Decode any image Pillow reads into RGB, uint8, 3 × H × W; OSError when it cannot be."""
    try:
        data = np.fromfile(path, np.uint8)
    except OSError as error:
        raise OSError(f"{path} cannot be read as an image ({error})") from error
    return decode_rgb(torch.from_numpy(data), path)


def decode_rgb(data: torch.Tensor, name) -> torch.Tensor:
    """Decode an image file's bytes (uint8, one dimension) as `read_rgb` does; `name` is for errors.

    torchcodec, where it is installed, decodes JPEGs faster, to the same pixels as Pillow. What it
    does not read, or would not read as three channels or one, is left to Pillow.
    """
    decode_jpeg = fast_jpeg()
    if decode_jpeg and (jpeg := _without_exif(data)) is not None:
        try:
            image = decode_jpeg(jpeg, mode="UNCHANGED")
            if len(image) in (1, 3):
                return image.expand(3, -1, -1)
        except (RuntimeError, ValueError):
            pass
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data.numpy())) as image:
            # Broken EXIF and transparent palettes warn once a file and are read all the same.
            warnings.simplefilter("ignore")
            if image.mode.startswith("I;16"):  # Pillow would clip these, not scale them
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            image = image if image.mode == "RGB" else image.convert("RGB")  # which would copy it
            # Pillow's bytes as they are: not to be written to, which torch would warn of.
            return torch.from_numpy(np.asarray(image)).permute(2, 0, 1)
    except Exception as error:  # Pillow's plugins raise whatever their parsers met
        raise OSError(f"{name} cannot be read as an image ({error})") from error


def _without_exif(data: torch.Tensor) -> torch.Tensor | None:
    """A JPEG without its EXIF tags; None for what is no JPEG, or one with an odd header.

    torchcodec would turn an image by its tag, which Pillow, like the plain recipe, leaves alone.
    """
    header, at = memoryview(data.numpy()), 2
    if header[:3] != b"\xff\xd8\xff":
        return None
    while at + 4 < len(header) and header[at] == 0xFF:
        if header[at + 1] == 0xDA:  # the pixels begin
            return data
        if header[at + 1] == 0xE1:  # the block that tags lie in: name it one that nobody reads
            data = data.clone()  # it may be a file in memory
            data[at + 1] = 0xEF
            header = memoryview(data.numpy())
        at += 2 + (header[at + 2] << 8 | header[at + 3])
    return None


@functools.cache
def fast_jpeg():
    """torchcodec's decode_jpeg, or None where it is not installed (pip install torchcodec)."""
    try:
        from torchcodec.decoders import decode_jpeg
    except (ImportError, OSError, RuntimeError):  # the last two: built for another torch
        return None
    return decode_jpeg


def spot_check(source: ImageFiles, *, seconds: float = 5.0) -> None:
    """Open the headers of a listing's images, spread over it, for a bounded time.

    Raises UserError for one that is no image. What only decoding can tell shows when it is read.
    """
    started = time.monotonic()
    for index in np.random.default_rng(0).permutation(len(source)).tolist():
        try:
            source.check_header(index)
        except Exception as error:  # Pillow's plugins raise whatever their parsers met
            raise UserError(
                f"{source.file_name(index)} cannot be read as an image, and an evaluation "
                "never leaves one out: restore or remove it"
            ) from error
        if time.monotonic() - started > seconds:
            return


def _unread() -> torch.Tensor:
    # Workers cannot raise one clear line through a DataLoader: they hand over a black image that
    # is marked, and the training process, which knows what to do, names the file.
    return torch.zeros(3, 8, 8, dtype=torch.uint8)


class TrainSet(Dataset):
    """Augmented samples by (epoch, index) or (epoch, index, repeat).

    A broken file gives another image of its class.
    """

    def __init__(self, source: ImageFiles, transform, seed: int):
        self.source, self.transform, self.seed = source, transform, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: tuple[int, ...]) -> Sample:
        return self._sample(key, *self._read(key[1]))

    def __getitems__(self, keys: list[tuple[int, ...]]) -> list[Sample]:
        """A batch: a few images are decoded, then all of them augmented, and so on.

        Taking turns with the decoder, the many small steps of drawing would run from cold caches.
        """
        samples = []
        for first in range(0, len(keys), DECODED_AT_ONCE):
            few = keys[first : first + DECODED_AT_ONCE]
            read = [self._read(key[1]) for key in few]
            samples += [self._sample(key, *image) for key, image in zip(few, read, strict=True)]
        return samples

    def _sample(self, key: tuple[int, ...], image: torch.Tensor, broken: int) -> Sample:
        epoch, index, *repeat = key
        # With a 1 or a 2 as the fourth number it would be the seed of a micro-batch.
        with seeded(self.seed, epoch, index, *(3 + number for number in repeat)):
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
            self.transform(image),
            int(self.source.labels[index]),
            index,
            torch.empty(0, 2, dtype=torch.int64),
            broken,
        )


def collate(samples: list[Sample]) -> Sample:
    """A batch of samples: images B × 3 × H × W, channels last in memory, as they come and are used.

    Stacking them channels first would cost as much as the crop.
    """
    batch = default_collate([s._replace(image=s.image.permute(1, 2, 0)) for s in samples])
    return batch._replace(image=batch.image.permute(0, 3, 1, 2))
