"""Write the tree OUT/{train,val}/<wnid>: what is missing in it, and nothing over what is there."""

import hashlib
import os
import shutil
from functools import partial
from pathlib import Path

from torchvision.datasets.imagenet import ARCHIVE_META
from tqdm import tqdm

from common.errors import UserError
from common.files import lock_folder, require_free_space
from tools.prepare_imagenet.classes import (
    SPLITS,
    ClassSource,
    find_partial_folders,
    is_complete,
    list_folder,
    write_class,
)
from tools.prepare_imagenet.layouts import check_same_classes, choose_subset, find_classes
from tools.prepare_imagenet.processes import map_in_processes

BLOCK_BYTES = 1 << 22  # per read while a checksum is computed


def prepare(
    source: Path, out: Path, *, subset: str | None, copy: bool, checksum: bool, workers: int
) -> None:
    """Make the tree `out` from the downloads in `source`; continues an interrupted call.

    Raises UserError before any image is written where `source` or the contents of `out` are wrong.
    Classes that were finished before a later error are kept.
    """
    # What is there, and which classes of it are wanted.
    classes, archives = find_classes(source)
    if subset is not None:
        classes = choose_subset(classes, subset)
    check_same_classes(classes)
    check_apart(classes, out)

    # Write the missing classes. File systems without locks are common where ImageNet is stored.
    with lock_folder(out, required=False):
        todo = find_missing(classes, out, workers)
        for part in find_partial_folders(out):
            shutil.rmtree(part)
        needed = sum(class_source.bytes_to_write(copy) for class_source in todo)
        require_free_space(out, 1.02 * needed)  # a file's last block is half empty
        for archive in archives if todo and checksum else ():
            check_md5(archive)
        map_in_processes(
            partial(write_class, out=out, copy=copy), todo, workers=workers, desc="preparing"
        )

    print(f"{len(todo)} class folders made, {len(classes) - len(todo)} were there already")
    if any(
        os.path.islink(out / c.split / c.wnid / name)
        for c in classes[:1] + classes[-1:]
        for name in list_folder(out / c.split / c.wnid)[:1]
    ):
        print(f"note: {out} links to files in {source}: keep them, or prepare with --copy")


def check_apart(classes: list[ClassSource], out: Path) -> None:
    """Raise UserError if making `out` would write into the folders that are read."""
    for source in classes:
        target, origin = (out / source.split).resolve(), source.path.resolve()
        if origin.is_relative_to(target) or target.is_relative_to(origin):
            raise UserError(
                f"--out {out} would change the downloads in {source.path}: choose "
                "another folder (files are linked, not copied)"
            )


def find_missing(classes: list[ClassSource], out: Path, workers: int) -> list[ClassSource]:
    """The classes that `out` does not contain yet; UserError for folders that do not belong there.

    Existing folders are compared with the source file by file, by size: an interrupted tar or a
    power cut leaves folders that look finished.
    """
    # Folders that exist must be of a class that is wanted ...
    wanted = {out / c.split / c.wnid: c for c in classes}
    existing = [
        path
        for split in SPLITS
        for path in sorted((out / split).glob("[!.]*"))
        if path.is_dir() and any(path.iterdir())
    ]
    foreign = [str(path) for path in existing if path not in wanted]
    if foreign:
        raise UserError(
            f"{foreign[0]} ({len(foreign)} such) is not one of the classes to prepare: "
            "choose an empty --out"
        )

    # ... and complete.
    complete = map_in_processes(
        partial(is_complete, out=out),
        [wanted[path] for path in existing],
        workers=workers,
        desc="comparing",
    )
    differing = [str(path) for path, same in zip(existing, complete, strict=True) if not same]
    if differing:
        raise UserError(
            "other images than the source's, or not all of them, are in "
            f"{', '.join(differing)}: remove these folders and run again"
        )
    return [wanted[path] for path in sorted(wanted.keys() - set(existing))]


def check_md5(archive: Path) -> None:
    """Compare an official archive with the published MD5; UserError when they differ."""
    (expected,) = (md5 for name, md5 in ARCHIVE_META.values() if name == archive.name)
    digest = hashlib.md5(usedforsecurity=False)
    with (
        archive.open("rb") as file,
        tqdm(total=archive.stat().st_size, desc="checksum", unit="B", unit_scale=True) as bar,
    ):
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            bar.update(len(block))
    if digest.hexdigest() != expected:
        raise UserError(
            f"{archive} has MD5 {digest.hexdigest()}, the official one {expected}: "
            "download it again, or use it as it is with --no_checksum"
        )
