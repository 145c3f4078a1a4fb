"""The layouts in which ImageNet is downloaded, each recognised by its files and folders.

Every layout is turned into a list of classes, each of them files in a folder or members of a tar
(classes.py). labels.py reads the labels of validation images that are not in class folders.
"""

from collections import defaultdict
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path

from torchvision.datasets.imagenet import ARCHIVE_META

from common.errors import UserError
from common.files import read_text
from data.splits import is_image
from tools.prepare_imagenet.classes import (
    ClassSource,
    FolderClass,
    TarClass,
    list_folder,
    open_tar,
    read_members,
)
from tools.prepare_imagenet.labels import WNID, read_val_labels

TRAIN_TAR, VAL_TAR = ARCHIVE_META["train"][0], ARCHIVE_META["val"][0]
KAGGLE = "ILSVRC/Data/CLS-LOC"


def find_classes(source: Path) -> tuple[list[ClassSource], list[Path]]:
    """All classes of both splits in the folder `source`, and the archives that were read for them.

    Raises UserError naming what is missing, damaged or ambiguous.
    """
    if not source.is_dir():
        raise UserError(f"--source {source} is not a folder: name the one with the downloads")
    train, archives = _find_train(source)
    val, more = _find_val(source)
    return train + val, archives + more


def choose_subset(classes: list[ClassSource], subset: str) -> list[ClassSource]:
    """Both splits of some classes: `subset` is a number of them, or a file with one wnid per line.

    The same number always selects the same classes, and a larger number adds to them.
    Raises UserError.
    """
    wnids = sorted({c.wnid for c in classes if c.split == "train"})
    path = Path(subset)
    if subset.isdecimal():
        if not 1 <= int(subset) <= len(wnids):
            raise UserError(f"--subset {subset}: the source has {len(wnids)} classes")
        # By hash: a draw that no version of a random generator can change.
        chosen = set(sorted(wnids, key=lambda wnid: sha256(wnid.encode()).digest())[: int(subset)])
    elif path.is_file():
        chosen = {line.split()[0] for line in read_text(path).splitlines() if line.strip()}
        unknown = sorted(chosen - set(wnids))
        if unknown or not chosen:
            what = f"{unknown[0]!r} ({len(unknown)} such)" if unknown else "nothing"
            raise UserError(
                f"--subset {path} names {what}, expected one wnid per line, of the "
                f"{len(wnids)} training classes in the source"
            )
    else:
        raise UserError(f"--subset {subset} is neither a number nor a file of wnids")
    return [c for c in classes if c.wnid in chosen]


def check_same_classes(classes: list[ClassSource]) -> None:
    """Raise UserError unless train and val have the same classes."""
    train, val = ({c.wnid for c in classes if c.split == split} for split in ("train", "val"))
    for split, only, other in (("train", train - val, "val"), ("val", val - train, "train")):
        if only:
            raise UserError(
                f"{len(only)} classes have {split} images and no {other} images "
                f"({min(only)}, …): add what is missing, or choose classes that have "
                "both with --subset FILE"
            )


def _find_train(source: Path) -> tuple[list[ClassSource], list[Path]]:
    archive = source / TRAIN_TAR
    if archive.is_file():
        return _nested_classes(archive), [archive]
    folder = _split_folder(source, "train", TRAIN_TAR)
    classes = {c.wnid: c for c in _class_folders("train", folder)}
    # Where a class has both, an interrupted tar may have left the folder behind.
    classes |= {
        p.stem: TarClass("train", p.stem, p)
        for p in sorted(folder.glob("n*.tar"))
        if WNID.fullmatch(p.stem)
    }
    if not classes:
        raise UserError(
            f"{folder} has neither class folders nor class tars (n01440764, "
            "n01440764.tar, …): is the training archive unpacked into it?"
        )
    return [classes[wnid] for wnid in sorted(classes)], []


def _nested_classes(path: Path) -> list[ClassSource]:
    with open_tar(path) as archive:
        members = read_members(archive, str(path))
    for member in members:
        if not (member.name.endswith(".tar") and WNID.fullmatch(member.name[:-4])):
            raise UserError(
                f"{path} holds {member.name!r}, expected only class tars such as "
                "n01440764.tar: not the official training archive"
            )
    return [
        TarClass("train", m.name[:-4], path, inner=m) for m in sorted(members, key=lambda m: m.name)
    ]


def _find_val(source: Path) -> tuple[list[ClassSource], list[Path]]:
    # The official archive, whose images have no folders.
    path = source / VAL_TAR
    if path.is_file():
        with open_tar(path) as archive:
            found = {m.name: m for m in read_members(archive, str(path)) if is_image(m.name)}
        labels, archives = read_val_labels(source, source / "val")
        return [
            TarClass("val", wnid, path, members=tuple(found[name] for name in names))
            for wnid, names in _by_class(found, labels, path).items()
        ], [path, *archives]

    # A folder: either class folders, or images without folders and a list of their classes.
    folder = _split_folder(source, "val", VAL_TAR)
    flat = folder / "images" if (folder / "images").is_dir() else folder
    names, classes = list_folder(flat), _class_folders("val", folder)
    if not names:
        if not classes:
            raise UserError(
                f"{folder} has neither images nor class folders: is the validation "
                "archive unpacked into it?"
            )
        return classes, []
    if any(list_folder(c.path) for c in classes):
        raise UserError(
            f"{folder} has {len(names)} loose images beside filled class folders: "
            "move them all into class folders, or all out of them"
        )
    labels, archives = read_val_labels(source, folder)
    return [
        FolderClass("val", wnid, flat, tuple(of_class))
        for wnid, of_class in _by_class(names, labels, flat).items()
    ], archives


def _by_class(names: Iterable[str], labels: dict[str, str], where: Path) -> dict[str, list[str]]:
    """Image names by wnid, sorted. Raises UserError unless names and labels are the same images."""
    stems = {Path(name).stem for name in names}
    for lacking, what in (
        (stems - labels.keys(), "no label is known for"),
        (labels.keys() - stems, "it lacks"),
    ):
        if lacking:
            raise UserError(
                f"{where}: {what} {len(lacking)} of {len(labels.keys() | stems)} "
                f"validation images ({min(lacking)}, …): unpack or download it again"
            )
    by_class = defaultdict(list)
    for name in sorted(names):
        by_class[labels[Path(name).stem]].append(name)
    return dict(sorted(by_class.items()))


def _split_folder(source: Path, split: str, tar: str) -> Path:
    for name in (f"{KAGGLE}/{split}", split, Path(tar).stem):
        if (source / name).is_dir():
            return source / name
    raise UserError(
        f"--source {source} has no {split} images: expected {tar}, {split}/ or "
        f"{KAGGLE}/{split}/ in it (a .zip must be unpacked first)"
    )


def _class_folders(split: str, folder: Path) -> list[ClassSource]:
    # Tiny-ImageNet has train/<wnid>/images, and val/images/<wnid> once its images are sorted.
    found = [p for p in sorted(folder.iterdir()) if WNID.fullmatch(p.name) and p.is_dir()]
    if not found and (folder / "images").is_dir():
        return _class_folders(split, folder / "images")
    return [
        FolderClass(split, p.name, p / "images" if (p / "images").is_dir() else p) for p in found
    ]
