"""The other datasets of the comparison, in the layouts in which they are published.

FMD (Sharan et al., Material perception, Journal of Vision 2009), KTH-TIPS2-b (Caputo et al.,
Class-specific material categorisation, ICCV 2005), CUB-200-2011 (Wah et al., Caltech technical
report CNS-TR-2011-001, 2011) and Oxford Flowers-102 (Nilsback and Zisserman, Automated flower
classification over a large number of classes, ICVGIP 2008).

Every loader takes (data_dir, fold), returns Splits and raises UserError.
"""

import os
from collections import Counter
from pathlib import Path

from torchvision.datasets import Flowers102

from common.errors import UserError
from common.optional import import_optional
from data.splits import (
    SPLITS,
    ExistingFiles,
    Splits,
    check_fold,
    find_root,
    list_class_folders,
    list_images,
    make_splits,
    make_stratified_splits,
    read_fields,
    report_left_out,
    shuffle_files,
)

KTH_SAMPLES = ["sample_a", "sample_b", "sample_c", "sample_d"]
CUB_FILES = ["images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt"]


def load_fmd(data_dir: Path, fold: int) -> Splits:
    """Flickr Material Database: image/<class>/*.jpg; no official splits, folds 1-5 are shuffles."""
    check_fold(fold, [1, 2, 3, 4, 5], "fmd")
    root = data_dir / "image" if (data_dir / "image").is_dir() else data_dir
    names = list_class_folders(root)
    if len(names) < 2 or not all(list_images(root, name) for name in names):
        raise UserError(f"--data_dir {data_dir}: FMD not found (expected image/<class>/*.jpg)")
    return make_stratified_splits(root, fold)


def load_kth_tips2b(data_dir: Path, fold: int) -> Splits:
    """KTH-TIPS2-b: <class>/sample_{a,b,c,d}/*.png, four physical samples of each material.

    Fold k tests on the k-th sample, validates on the next (cyclically) and trains on the other two:
    the photographs of one sample are so similar that a random split would leak.
    """
    # Where the dataset is.
    check_fold(fold, [1, 2, 3, 4], "kth_tips2b")
    nested = data_dir / "KTH-TIPS2-b"
    root = nested if nested.is_dir() else data_dir
    classes = list_class_folders(root)
    if not any((root / name / sample).is_dir() for name in classes for sample in KTH_SAMPLES):
        raise UserError(
            f"--data_dir {data_dir}: KTH-TIPS2-b not found (expected <class>/sample_a/*.png)"
        )

    # Whole samples go to splits.
    split_of = dict.fromkeys(KTH_SAMPLES, "train")
    split_of[KTH_SAMPLES[fold - 1]] = "test"
    split_of[KTH_SAMPLES[fold % 4]] = "val"
    left_out, listed = Counter(), {split: [] for split in SPLITS}
    for label, name in enumerate(classes):
        for sample, split in split_of.items():
            place = f"{name}/{sample}"
            images = list_images(root, place, left_out) if (root / place).is_dir() else []
            if not images:
                raise UserError(f"{root / place}: has no images; every class has four samples")
            listed[split] += [(image, label) for image in images]
    report_left_out(root, left_out)
    return make_splits(root, classes, listed)


def load_cub200(data_dir: Path, fold: int) -> Splits:
    """CUB-200-2011, one fold: the official test set; 10 % of the rest is held out to validate."""
    # Its four tables, {id: (file:line, value)}.
    check_fold(fold, [1], "cub200")
    root = find_root(data_dir, ["", "CUB_200_2011"], [*CUB_FILES, "images"], "CUB-200-2011")
    images, label_of, is_train, names = (_read_cub(root / file) for file in CUB_FILES)
    classes = sorted(names, key=int)

    # The official split: training images by class, test images with their labels.
    existing = ExistingFiles(root / "images")
    training = {class_id: [] for class_id in classes}
    listed = {split: [] for split in SPLITS}
    for image_id, (here, image) in images.items():
        if image not in existing:
            raise UserError(f"{here}: {existing.root / image} is missing")
        for file, table in zip(CUB_FILES[1:3], (label_of, is_train), strict=True):
            if image_id not in table:
                raise UserError(f"{root / file}: has no line for image {image_id}")
        (where, class_id), (flag_at, flag) = label_of[image_id], is_train[image_id]
        if class_id not in training:
            raise UserError(f"{where}: class {class_id} is not in classes.txt")
        if flag not in ("0", "1"):
            raise UserError(f"{flag_at}: expected 0 or 1, found {flag!r}")
        if flag == "1":
            training[class_id].append(f"images/{image}")
        else:
            listed["test"].append((f"images/{image}", classes.index(class_id)))

    # A tenth of each class's training images is held out for validation.
    for label, class_id in enumerate(classes):
        files = shuffle_files(training[class_id], fold)
        if len(files) < 2:
            raise UserError(f"{root}: class {names[class_id][1]} has fewer than 2 training images")
        tenth = max(1, round(len(files) / 10))
        listed["val"] += [(file, label) for file in sorted(files[:tenth])]
        listed["train"] += [(file, label) for file in sorted(files[tenth:])]
    return make_splits(root, [names[class_id][1] for class_id in classes], listed)


def _read_cub(path: Path) -> dict[str, tuple[str, str]]:
    """One of CUB's tables, lines "id value", as {id: ("file:line", value)}."""
    table = {}
    for number, (key, value) in read_fields(path, None, 2):
        if not key.isdecimal() or key in table:
            raise UserError(f"{path}:{number}: id {key!r} is not a number or is used twice")
        table[key] = (f"{path}:{number}", value)
    return table


def load_flowers102(data_dir: Path, fold: int) -> Splits:
    """Oxford Flowers-102, one fold: the official splits, read by torchvision (needs scipy)."""
    check_fold(fold, [1], "flowers102")
    import_optional("scipy.io", purpose="--dataset flowers102")
    parent = Path(os.path.abspath(data_dir))
    if parent.name == "flowers-102" and (parent / "jpg").is_dir():
        parent = parent.parent
    root = parent / "flowers-102"
    listed = {}
    try:
        for split in SPLITS:
            flowers = Flowers102(parent, split)
            files = [f"jpg/{path.name}" for path in flowers._image_files]
            listed[split] = list(zip(files, flowers._labels, strict=True))
    except RuntimeError as error:  # torchvision: not found, or another checksum
        raise UserError(
            f"--data_dir {data_dir}: Flowers-102 not found (expected flowers-102/ with jpg/ and the"
            " official imagelabels.mat and setid.mat)"
        ) from error
    existing = ExistingFiles(root)
    for image, _ in (row for rows in listed.values() for row in rows):
        if image not in existing:
            raise UserError(f"{root / image} is missing, though setid.mat lists it")
    return make_splits(root, list(Flowers102.classes), listed)
