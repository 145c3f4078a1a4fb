"""Which image files a command line names: files as they are, and the images in folders."""

import os
from collections import Counter
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from common.errors import UserError
from common.files import printable
from data.splits import list_images


def check_exists(place: Path) -> None:
    if not place.exists():
        raise UserError(f"{printable(place)}: no such file or folder")


def find_images(folder: Path) -> list[str]:
    """Images at any depth, as sorted paths relative to `folder`. Raises UserError if none."""
    try:
        files = list_images(folder, ".")
    except OSError as error:
        raise UserError(f"{printable(error.filename)}: {error.strerror}") from error
    if not files:
        ignored = describe_ignored_files(folder)
        raise UserError(
            f"{printable(folder)}: no images in this folder" + (f"; {ignored}" if ignored else "")
        )
    return files


def describe_ignored_files(folder: Path) -> str:
    """The files in a folder, at any depth, that are ignored by their names; "" if there are none.

    Files are counted by suffix: "ignored 2 .gif, 1 .heic (not .jpg, …)". Hidden ones do not count.
    """
    suffixes = Counter()
    for _, folders, names in os.walk(folder, followlinks=False):
        folders[:] = [name for name in folders if not name.startswith(".")]
        suffixes.update(
            Path(name).suffix.lower() or "without suffix"
            for name in names
            if not name.startswith(".") and not name.lower().endswith(IMG_EXTENSIONS)
        )
    if not suffixes:
        return ""
    counts = ", ".join(f"{count} {printable(suffix)}" for suffix, count in suffixes.most_common())
    return f"ignored by their names: {counts} (images are {', '.join(IMG_EXTENSIONS)})"
