"""Datasets for fine-tuning as splits: DTD, any folder of class folders, and the registry of all.

The Describable Textures Dataset is from Cimpoi et al., Describing Textures in the Wild, CVPR 2014.
"""

import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path

from torchvision.datasets import DTD

from common.errors import UserError
from data import more_datasets
from data.splits import (
    SPLITS,
    ExistingFiles,
    Splits,
    check_fold,
    find_root,
    list_class_folders,
    make_splits,
    make_stratified_splits,
    read_fields,
)

# Names of folders that are splits and not classes, in lower case.
SPLIT_FOLDERS = frozenset(
    ["train", "training", "val", "valid", "validation", "test", "testing", "eval", "evaluation"]
)
DTD_PLACES = ["", "dtd", "dtd/dtd"]  # unpacked by hand, by download_dtd, by torchvision


def load_splits(dataset: str, data_dir: str | Path, fold: int, *, num_folds: int = 10) -> Splits:
    """Train, val and test images of one fold; only the dataset `folder` reads `num_folds`.

    Raises UserError, one line, for anything that makes the data unusable.
    """
    if dataset not in DATASETS:
        raise UserError(f"--dataset {dataset}: unknown; choose from {', '.join(DATASETS)}")
    data_dir = Path(data_dir)
    options = {"num_folds": num_folds} if dataset == "folder" else {}
    try:
        if not data_dir.is_dir():
            hint = ", or let train.py --download it" if dataset == "dtd" else ""
            raise UserError(
                f"--data_dir {data_dir}: no such folder; give the folder of the dataset{hint}"
            )
        return DATASETS[dataset](data_dir, fold, **options)
    except OSError as error:
        raise UserError(f"{error.filename or data_dir}: {_reason(error)}") from error


def load_dtd(data_dir: Path, fold: int) -> Splits:
    """The Describable Textures Dataset; folds 1-10 are official, labels/{train,val,test}K.txt."""
    # Where the dataset is, and which folds it has.
    root = find_root(data_dir, DTD_PLACES, ["images", "labels"], "DTD")
    labels = root / "labels"
    names = {path.name for path in labels.iterdir()}
    numbers = sorted(int(m[1]) for n in names if (m := re.fullmatch(r"train([1-9]\d*)\.txt", n)))
    folds = [k for k in numbers if {f"val{k}.txt", f"test{k}.txt"} <= names]
    check_fold(fold, folds, labels)

    # The files of each split; an image in two of them would leak.
    existing, seen, listed = ExistingFiles(root / "images"), {}, {}
    for split in SPLITS:
        path = labels / f"{split}{fold}.txt"
        listed[split] = []
        for number, (name, file) in read_fields(path, "/", 2):
            image, here = f"{name}/{file}", f"{path}:{number}"
            if image not in existing:
                raise UserError(f"{here}: {existing.root / image} is missing")
            if image in seen:
                raise UserError(f"{here}: {image} is already in {seen[image]}")
            seen[image] = here
            listed[split].append((image, name))
        if not listed[split]:
            raise UserError(f"{path}: lists no images")

    # Labels by the sorted names of the training classes.
    classes = sorted({name for _, name in listed["train"]})
    label_of = {name: label for label, name in enumerate(classes)}
    for images in listed.values():
        for image, name in images:
            if name not in label_of:
                raise UserError(f"{seen[image]}: class {name} has no image in train{fold}.txt")
    relative = {
        split: [(f"images/{image}", label_of[name]) for image, name in images]
        for split, images in listed.items()
    }
    all_files = [os.fsencode(f"images/{image}") for image in existing.images()]
    return replace(make_splits(root, classes, relative), all_files=all_files)


def download_dtd(data_dir: str | Path) -> None:
    """Download DTD into data_dir/dtd, unless it exists, with torchvision's checksum.

    It is unpacked into a temporary folder and moved when it is complete, so that an interrupted
    download leaves nothing that looks like the dataset. Raises UserError.
    """
    data_dir = Path(data_dir)
    if any((data_dir / place / "labels").is_dir() for place in DTD_PLACES):
        return
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data_dir, prefix=".download-") as staging:
            DTD(staging, download=True)
            # If dtd/ exists already, this becomes dtd/dtd, where load_dtd looks as well.
            shutil.move(Path(staging, "dtd", "dtd"), data_dir / "dtd")
    except (OSError, RuntimeError, HTTPException, tarfile.TarError, EOFError) as error:
        what = str(error).strip().splitlines()
        raise UserError(
            f"--download: could not download DTD from {DTD._URL} into {data_dir}"
            f" ({what[0] if what else type(error).__name__})"
        ) from error


def load_folder(data_dir: Path, fold: int, *, num_folds: int = 10) -> Splits:
    """Any folder of class folders, images at any depth; folds 1 to `num_folds` are shuffles."""
    check_fold(fold, list(range(1, num_folds + 1)), f"--num_folds {num_folds}")
    names = list_class_folders(data_dir)
    splits = [name for name in names if name.lower() in SPLIT_FOLDERS]
    if len(splits) > 1 or (splits and splits == names):
        raise UserError(
            f"--data_dir {data_dir}: {', '.join(splits)} are splits, not classes;"
            " give one of them: folds are made from a folder of class folders"
        )
    return make_stratified_splits(data_dir, fold)


def _reason(error: OSError) -> str:
    return "no permission" if isinstance(error, PermissionError) else error.strerror or str(error)


# What --dataset accepts: loaders (data_dir, fold) -> Splits. Each docstring says which folds exist.
DATASETS: dict[str, Callable[..., Splits]] = {
    "dtd": load_dtd,
    "folder": load_folder,
    "fmd": more_datasets.load_fmd,
    "kth_tips2b": more_datasets.load_kth_tips2b,
    "cub200": more_datasets.load_cub200,
    "flowers102": more_datasets.load_flowers102,
}
