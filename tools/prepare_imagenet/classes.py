"""One ImageNet class in a download, a folder or part of a tar, and how it is written to OUT."""

import os
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from common.errors import UserError
from data.splits import is_image

SPLITS = ("train", "val")
BLOCK = 512  # bytes: tar's unit
PARTIAL = ".{wnid}.part"  # a class folder that is being written; no listing takes it for a class


@dataclass(frozen=True)
class FolderClass:
    """Images of one class in the folder `path`: those in `names`, or all of them."""

    split: str
    wnid: str
    path: Path
    names: tuple[str, ...] | None = None

    def sizes(self) -> dict[str, int]:
        """Bytes of each image, by file name. Raises UserError when there is none."""
        names = list_folder(self.path) if self.names is None else self.names
        return _require_images({name: (self.path / name).stat().st_size for name in names}, self)

    def bytes_to_write(self, copy: bool) -> int:
        return sum(self.sizes().values()) if copy else 0

    def write(self, folder: Path, copy: bool) -> None:
        """Link (or copy) the images into `folder`."""
        for name in self.sizes():
            # The file itself: a hard link to a symbolic link would still point elsewhere.
            source, target = os.path.realpath(self.path / name), folder / name
            if copy:
                shutil.copyfile(source, target)
            else:
                _link(source, target)


@dataclass(frozen=True)
class TarClass:
    """Images of one class in the tar `path`: in the tar nested in it as `inner`, or its `members`.

    With neither, all of `path` is the class. Nested tars are read in place: the 138 GB of class
    tars are never written, and several processes can extract classes at the same time.
    """

    split: str
    wnid: str
    path: Path
    inner: tarfile.TarInfo | None = None
    members: tuple[tarfile.TarInfo, ...] | None = None

    def sizes(self) -> dict[str, int]:
        """Bytes of each image, by file name. Raises UserError as read_members, or if empty."""
        with self._open() as (_, members):
            return {member.name: member.size for member in members}

    def bytes_to_write(self, copy: bool) -> int:
        if self.members is not None:
            return sum(member.size for member in self.members)
        return self.inner.size if self.inner else self.path.stat().st_size

    def write(self, folder: Path, copy: bool) -> None:
        """Extract the images into `folder`. Raises UserError as `sizes`."""
        with self._open() as (archive, members):
            # Python before 3.10.12 and 3.11.4 has no filters. The members' names are checked.
            archive.extraction_filter = getattr(tarfile, "data_filter", None)
            for member in members:
                archive.extract(member, folder)

    @contextmanager
    def _open(self) -> Iterator[tuple[tarfile.TarFile, list[tarfile.TarInfo]]]:
        with open_tar(self.path) as archive:
            if self.inner is None:
                yield archive, self._find_members(archive)
                return
            with tarfile.open(fileobj=archive.extractfile(self.inner), mode="r:") as nested:
                yield nested, self._find_members(nested)

    def _find_members(self, archive: tarfile.TarFile) -> list[tarfile.TarInfo]:
        if self.members is not None:
            return list(self.members)
        where = f"{self.path} ({self.inner.name})" if self.inner else str(self.path)
        images = [m for m in read_members(archive, where) if is_image(m.name)]
        _require_images(images, self)
        return images


ClassSource = FolderClass | TarClass


def write_class(source: ClassSource, out: Path, copy: bool) -> None:
    """Write one class into a partial folder and rename that when it is complete."""
    folder = out / source.split / source.wnid
    part = folder.with_name(PARTIAL.format(wnid=source.wnid))
    part.mkdir(parents=True)
    source.write(part, copy)
    part.rename(folder)


def find_partial_folders(out: Path) -> list[Path]:
    """What an interrupted write_class left behind."""
    return [
        part for split in SPLITS for part in sorted((out / split).glob(PARTIAL.format(wnid="n*")))
    ]


def is_complete(source: ClassSource, out: Path) -> bool:
    """Whether the class in `out` has the images of `source`, by name and size, and no others."""
    folder = out / source.split / source.wnid
    sizes = {name: (folder / name).stat().st_size for name in list_folder(folder)}
    return sizes == source.sizes()


def list_folder(folder: Path) -> list[str]:
    """Names of the images directly in `folder`, sorted."""
    return sorted(e.name for e in os.scandir(folder) if is_image(e.name) and not e.is_dir())


@contextmanager
def open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """Open an uncompressed tar; damage found while it is open is a UserError that names it."""
    try:
        with tarfile.open(path, "r:") as archive:
            yield archive
    except tarfile.TarError as error:
        raise UserError(f"{path} is damaged ({error}): download or copy it again") from error


def read_members(archive: tarfile.TarFile, where: str) -> list[tarfile.TarInfo]:
    """The regular files of an archive, named without their folders; hidden files are left out.

    Raises UserError before anything is extracted: for members that are links or devices, or that
    point out of the archive; for two files with the same name; and for an archive that is cut off,
    which tarfile and tar take for a shorter one when the cut falls between two members.
    """
    files, end = {}, 0
    for member in archive:
        path = PurePosixPath(member.name)
        end = member.offset_data + -(-member.size // BLOCK) * BLOCK
        if member.isdir() or _is_hidden(path):  # macOS adds ._NAME beside each NAME
            continue
        if not member.isreg() or path.is_absolute() or ".." in path.parts or path.name in files:
            raise UserError(
                f"{where} holds {member.name!r}, which is not a plain file with "
                "a name of its own: not an archive of ImageNet, nothing of it was extracted"
            )
        member.name = path.name
        files[path.name] = member
    archive.fileobj.seek(end)
    if archive.fileobj.read(BLOCK) != bytes(BLOCK):
        raise UserError(
            f"{where} is cut off or damaged after {len(files)} files: download or copy it again"
        )
    return list(files.values())


def _is_hidden(path: PurePosixPath) -> bool:
    return ".." not in path.parts and any(p.startswith((".", "__MACOSX")) for p in path.parts)


def _link(source: str, target: Path) -> None:
    try:
        os.link(source, target)
        return
    except OSError:  # another file system, or one without hard links
        pass
    try:
        os.symlink(source, target)
    except PermissionError as error:
        raise UserError(
            f"{target.parent} is on a file system without links: add --copy, or use another --out"
        ) from error


def _require_images(images, source: ClassSource):
    if not images:
        raise UserError(
            f"{source.path} has no images of {source.split}/{source.wnid}: "
            "unpack or download it again"
        )
    return images
