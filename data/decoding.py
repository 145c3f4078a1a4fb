"""Decoding: any image file that Pillow opens becomes uint8 RGB, or an error that names the file."""

import contextlib
import errno
import functools
import io
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from common.errors import is_transient
from common.files import printable

# Modes that Pillow converts to RGB without losing range. Integers of more than 8 bits and floats
# are scaled by _to_8_bits; any other mode is refused by its name.
CONVERTIBLE = (
    *("RGB", "RGBX", "RGBA", "RGBa", "L", "LA", "La", "1", "P", "PA"),
    *("CMYK", "YCbCr", "HSV", "LAB"),
)
TIFF_BITS, TIFF_PHOTOMETRIC = 258, 262  # tags
RESOURCE_ERRNOS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # not the file's fault
RETRY_AFTER = (0.1, 0.5, 2, 5)  # seconds
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)  # 179 million; larger files are refused


def read_rgb(path: Path) -> torch.Tensor:
    """Decode an image file into RGB, uint8, 3 × H × W. Raises OSError naming the file and why.

    An error of the machine is raised as it is, with its errno: see is_system_error.
    """
    try:
        data = read_bytes(path)
    except OSError as error:
        if is_system_error(error):
            raise
        raise OSError(f"{printable(path)} cannot be read as an image ({error})") from error
    return decode_rgb(data, path)


def read_bytes(path: Path) -> torch.Tensor:
    """A file's content, uint8, one dimension."""
    return _retry(_read_once, path)


def _retry(read: Callable[[Path], object], path: Path):
    """read(path), several times while it fails with an error that may pass."""
    for seconds in RETRY_AFTER:
        try:
            return read(path)
        except OSError as error:
            if not is_transient(error):
                raise
        time.sleep(seconds)
    try:
        return read(path)
    except OSError as error:
        error.filename = error.filename or os.fspath(path)  # errors of reading do not have it
        raise


def _read_once(path: Path) -> torch.Tensor:
    with open(path, "rb", buffering=0, opener=_open_at_once) as file:
        data, size = np.empty(os.fstat(file.fileno()).st_size, np.uint8), 0
        while count := file.readinto(data[size:]):
            size += count
    return torch.from_numpy(data[:size])


def _open_at_once(path: str, flags: int) -> int:
    """Open a named pipe without waiting for its writer: it reads as an empty file."""
    return os.open(path, flags | os.O_NONBLOCK)


def is_system_error(error: Exception) -> bool:
    """Whether an error says nothing about the file that was to be read."""
    return is_transient(error) or getattr(error, "errno", None) in RESOURCE_ERRNOS


def decode_rgb(data: torch.Tensor, name: str | Path) -> torch.Tensor:
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
        with open_image(io.BytesIO(data.numpy())) as image:
            image = to_rgb(image)
            # These are Pillow's own bytes, read-only, so torch would warn.
            return torch.from_numpy(np.asarray(image)).permute(2, 0, 1)
    except Exception as error:  # Pillow's plugins raise whatever their parsers raise
        raise OSError(f"{printable(name)} cannot be read as an image ({_reason(error)})") from error


def check_header(path: Path) -> None:
    """Raise OSError, as read_rgb does, if the header is not that of a supported image."""
    try:
        _retry(_check_header_once, path)
    except Exception as error:
        if is_system_error(error):
            raise
        raise OSError(f"{printable(path)} cannot be read as an image ({_reason(error)})") from error


def _check_header_once(path: Path) -> None:
    with open(path, "rb", opener=_open_at_once) as file, open_image(file) as image:
        _check_mode(image)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its message has only the address of the bytes
        return "not a format or pixel type that Pillow reads"
    return str(error)


@contextlib.contextmanager
def open_image(file) -> Iterator[Image.Image]:
    """Open an image with Pillow and without its warnings, some of which come at opening.

    Broken EXIF tags, transparent palettes and sizes above half of MAX_PIXELS are read all the same,
    and would warn once per file.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(file) as image:
            yield image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, scaled to 8 bits. Raises ValueError naming the mode."""
    _check_mode(image)
    if image.mode.startswith(("I", "F")):
        image = Image.fromarray(_to_8_bits(image))
    if image.mode in ("RGBa", "La"):  # premultiplied by alpha
        image = image.convert(image.mode.replace("a", "A"))
    return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy it


def _check_mode(image: Image.Image) -> None:
    if image.mode not in CONVERTIBLE and not image.mode.startswith(("I", "F")):
        raise ValueError(f"pixel mode {image.mode} is not supported: convert the file to RGB")


def _to_8_bits(image: Image.Image) -> np.ndarray:
    """Pixels of a grey image with 16 or 32 bits, uint8 H × W, scaled by the range of its format.

    Where the format has none, floats up to 1 are taken for 0-1, and floats and integers up to 255
    for 0-255. Other values have no known scale: ValueError.
    """
    pixels = np.asarray(image)
    if image.mode.startswith("I;16"):
        tags = getattr(image, "tag_v2", {})  # of a TIFF
        bits = tags.get(TIFF_BITS, (16,))[0]
        grey = (pixels >> (bits - 8)).astype(np.uint8)
        return 255 - grey if tags.get(TIFF_PHOTOMETRIC) == 0 else grey  # 0: white is zero
    if image.mode == "I" and image.format in ("PNG", "PPM"):  # 16 bits, which Pillow has scaled
        return (pixels >> 8).astype(np.uint8)
    low, high = (float(pixels.min()), float(pixels.max())) if pixels.size else (0.0, 0.0)
    if not (low >= 0 and high <= 255):  # not for NaN either
        raise ValueError(
            f"pixel mode {image.mode} with values from {low:g} to {high:g} has no known range: "
            "convert the file to 8 or 16 bits"
        )
    scale = 255 if image.mode == "F" and high <= 1 else 1
    return np.rint(pixels * scale).astype(np.uint8)


def _without_exif(data: torch.Tensor) -> torch.Tensor | None:
    """A JPEG without its EXIF tags; None for other files, odd headers and sizes above the limit.

    torchcodec would rotate an image by its tag, which Pillow, like the usual recipe, does not.
    """
    header, at = memoryview(data.numpy()), 2
    if header[:3] != b"\xff\xd8\xff":
        return None
    while at + 9 < len(header) and header[at] == 0xFF:
        marker = header[at + 1]
        if marker == 0xDA:  # the pixels start here
            return data
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # the frame's size
            height, width = (header[at + i] << 8 | header[at + i + 1] for i in (5, 7))
            if height * width > MAX_PIXELS:
                return None
        if marker == 0xE1:  # the block of tags: rename it to one that nobody reads
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
