"""The class of each ILSVRC 2012 validation image, from whichever list comes with the download.

Every reader returns {image name without its suffix: wnid}. Lists may be in any encoding that
common.files.read_text knows.
"""

import csv
import io
import re
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from torchvision.datasets.imagenet import ARCHIVE_META

from common.errors import UserError
from common.files import decode_text, read_text
from common.optional import import_optional

WNID = re.compile(r"n\d{8}")
DEVKIT_TAR = ARCHIVE_META["devkit"][0]
DEVKIT = DEVKIT_TAR.removesuffix(".tar.gz")
GZIP = b"\x1f\x8b"
TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def read_val_labels(source: Path, val: Path) -> tuple[dict[str, str], list[Path]]:
    """Labels from the first list found in `source` or its `val` folder, and the archives read.

    Lists that name the class of each file come first, as they need no scipy. Of the archives, only
    those with a published checksum are returned. Raises UserError when there is no list, or when
    its contents are not what its name says.
    """
    readers: dict[str, Callable[[Path], dict[str, str]]] = {
        "valprep.sh": _read_valprep,
        "LOC_val_solution.csv": _read_kaggle,
        "val_annotations.txt": _read_tiny,
        DEVKIT_TAR: _read_devkit_tar,
        f"{DEVKIT}.tar": _read_devkit_tar,
        f"{DEVKIT}/data/meta.mat": _read_devkit,
        "data/meta.mat": _read_devkit,
        TRUTH: lambda truth: _read_truth_with_list(truth, source),
        f"{DEVKIT}/data/{TRUTH}": lambda truth: _read_truth_with_list(truth, source),
    }
    for name, read in readers.items():
        for path in (source / name, val / name):
            if path.is_file():
                labels = read(path)
                _check(labels, path)
                return labels, [path] if name == DEVKIT_TAR and _is_gzip(path) else []
    raise UserError(
        f"--source {source} has no labels of the validation images: put valprep.sh, "
        f"LOC_val_solution.csv or {DEVKIT_TAR} into it"
    )


def _read_valprep(path: Path) -> dict[str, str]:
    # mv ILSVRC2012_val_00000293.JPEG n01440764/
    lines = re.findall(r"^\s*mv\s+(\S+)\.\w+\s+(n\d{8})/?\s*$", read_text(path), re.MULTILINE)
    return dict(lines)


def _read_kaggle(path: Path) -> dict[str, str]:
    # ImageId,PredictionString / ILSVRC2012_val_00048981,n03995372 85 1 499 272 …
    rows = [row for row in csv.reader(io.StringIO(read_text(path))) if len(row) == 2]
    return {name: boxes.split(" ")[0] for name, boxes in rows[1:]}


def _read_tiny(path: Path) -> dict[str, str]:
    # val_0.JPEG <tab> n03444034 <tab> four corners
    rows = [line.split("\t") for line in read_text(path).splitlines() if "\t" in line]
    return {Path(row[0]).stem: row[1] for row in rows}


def _read_devkit_tar(path: Path) -> dict[str, str]:
    # Browsers unpack the gzip layer, with or without changing the name, and tar may write ./NAME.
    try:
        with tarfile.open(path, "r:*") as archive:
            members = {PurePosixPath(m.name).parts[-2:]: m for m in archive if m.isfile()}
            meta, truth = (archive.extractfile(members["data", n]) for n in ("meta.mat", TRUTH))
            return _number(decode_text(truth.read()), _read_meta(meta, path), path)
    except (tarfile.TarError, OSError, EOFError, KeyError, zlib.error) as error:
        raise UserError(
            f"{path} cannot be read as the devkit ({error}): download it again"
        ) from error


def _read_devkit(meta: Path) -> dict[str, str]:
    with meta.open("rb") as file:
        wnids = _read_meta(file, meta)
    truth = meta.with_name(TRUTH)
    if not truth.is_file():
        raise UserError(f"{truth} does not exist: unpack the devkit again")
    return _number(read_text(truth), wnids, truth)


def _read_meta(file: BinaryIO, where: Path) -> dict[int, str]:
    """ILSVRC2012_ID → wnid of the classes; meta.mat also lists the synsets above them."""
    try:
        scipy_io = import_optional("scipy.io", purpose=f"reading meta.mat of {where}")
    except UserError as error:
        raise UserError(f"{error} (or put valprep.sh or LOC_val_solution.csv beside it)") from error
    try:
        synsets = scipy_io.loadmat(file, squeeze_me=True)["synsets"]
        columns = [synsets[name] for name in ("ILSVRC2012_ID", "WNID", "num_children")]
        rows = [
            (int(number), str(wnid), int(children))
            for number, wnid, children in zip(*columns, strict=True)
        ]
    except Exception as error:  # scipy raises whatever its parser met
        raise UserError(
            f"meta.mat of {where} cannot be read ({error}): download the devkit again"
        ) from error
    return {number: wnid for number, wnid, children in rows if not children}


def _read_truth_with_list(truth: Path, source: Path) -> dict[str, str]:
    """The ground truth with a list of synsets, whose line i starts with ILSVRC2012_ID i's wnid."""
    lists = {
        path: wnids
        for path in sorted(source.glob("*.txt"))
        if path.name != TRUTH and (wnids := _read_synsets(path))
    }
    # Class numbers follow the devkit's order (1 is n02119789). Nearly every published list is in
    # alphabetical order; it, or any other, would give images a wrong class without any error.
    usable = {path: wnids for path, wnids in lists.items() if wnids[0] == "n02119789"}
    if len(usable) != 1:
        found = ", ".join(p.name for p in usable or lists) or "none"
        raise UserError(
            f"{truth} needs one list of synsets in the devkit's order (not "
            f"alphabetical), found: {found}; put {DEVKIT_TAR}, valprep.sh or "
            "LOC_val_solution.csv beside it instead"
        )
    (wnids,) = usable.values()
    return _number(read_text(truth), dict(enumerate(wnids, 1)), truth)


def _read_synsets(path: Path) -> list[str]:
    """First words of the lines if they are wnids, each once; else an empty list."""
    wnids = [line.split()[0] for line in read_text(path).splitlines() if line.strip()]
    ok = len(set(wnids)) == len(wnids) and all(WNID.fullmatch(wnid) for wnid in wnids)
    return wnids if ok else []


def _number(truth: str, wnids: dict[int, str], where: Path) -> dict[str, str]:
    """Line i of the ground truth is the ILSVRC2012_ID of ILSVRC2012_val_<i as 8 digits>."""
    try:
        return {
            f"ILSVRC2012_val_{i:08d}": wnids[int(line)] for i, line in enumerate(truth.split(), 1)
        }
    except (ValueError, KeyError) as error:
        raise UserError(
            f"{where}: {error} is not the number of any of the {len(wnids)} classes"
        ) from error


def _check(labels: dict[str, str], path: Path) -> None:
    wrong = next((w for w in labels.values() if not WNID.fullmatch(w)), None)
    if wrong is not None or not labels:
        what = "no labels" if wrong is None else f"{wrong!r} where a wnid belongs"
        raise UserError(f"{path} has {what}: it is not what its name says, download it again")


def _is_gzip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(GZIP)) == GZIP
