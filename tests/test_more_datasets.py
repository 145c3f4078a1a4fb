"""data/more_datasets.py: the other datasets in their owners' layouts, made here of empty files."""

import sys

import numpy as np
import pytest
from torchvision.datasets import Flowers102

from common.errors import UserError
from data.splits import fingerprint
from data.textures import load_splits

NAMES = ("fmd", "kth_tips2b", "cub200", "flowers102")


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def names(part):
    return [file.decode() for file in part.files]


@pytest.fixture
def fmd(tmp_path):
    for name in ("fabric", "water"):
        for i in range(10):
            touch(tmp_path / "image" / name / f"{name}_{i:03d}.jpg")
            touch(tmp_path / "mask" / name / f"{name}_{i:03d}.jpg")
        touch(tmp_path / "image" / name / "Thumbs.db")
    return tmp_path


def test_fmd_has_five_shuffles_of_its_images_only(fmd):
    folds = [load_splits("fmd", fmd, k) for k in range(1, 6)]
    assert len({fingerprint(splits) for splits in folds}) == 5
    for splits in folds:
        assert splits.classes == ["fabric", "water"]
        parts = (splits.train, splits.val, splits.test)
        assert [np.bincount(part.labels).tolist() for part in parts] == [[6, 6], [2, 2], [2, 2]]
        files = set().union(*(names(part) for part in parts))
        assert len(files) == 20 and all(file.endswith(".jpg") for file in files)
        assert splits.train.path(0).is_file()
    assert fingerprint(load_splits("fmd", fmd / "image", 3)) == fingerprint(folds[2])
    with pytest.raises(UserError, match=r"--fold 6: not among the folds of fmd \(1-5\)"):
        load_splits("fmd", fmd, 6)


def test_fmd_is_found_beside_the_folder_that_macos_adds(fmd):
    expected = fingerprint(load_splits("fmd", fmd, 1))
    touch(fmd / "image" / "__MACOSX" / "fabric" / "._fabric_000.jpg")
    assert fingerprint(load_splits("fmd", fmd, 1)) == expected
    assert fingerprint(load_splits("fmd", fmd / "image", 1)) == expected


def test_images_in_formats_that_are_left_out_are_counted(fmd, kth, capsys):
    touch(fmd / "image" / "water" / "a.avif")
    touch(fmd / "image" / "water" / "b.jfif")
    load_splits("fmd", fmd, 1)
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert said.err.startswith(f"note: {fmd / 'image'}: left out 1 .avif, 1 .jfif: ")
    touch(kth / "KTH-TIPS2-b" / "wool" / "sample_d" / "x.gif")
    load_splits("kth_tips2b", kth, 1)
    assert "left out 1 .gif" in capsys.readouterr().err


@pytest.fixture
def kth(tmp_path):
    for name in ("cork", "wool"):
        for sample in "abcd":
            for i in range(2):
                touch(tmp_path / "KTH-TIPS2-b" / name / f"sample_{sample}" / f"{i}-im.png")
    return tmp_path


@pytest.mark.parametrize(
    ("fold", "test", "val", "train"),
    [(1, "a", "b", "cd"), (2, "b", "c", "ad"), (3, "c", "d", "ab"), (4, "d", "a", "bc")],
)
def test_kth_keeps_each_physical_sample_in_one_split(kth, fold, test, val, train):
    splits = load_splits("kth_tips2b", kth, fold)
    for part, samples in ((splits.test, test), (splits.val, val), (splits.train, train)):
        assert names(part) == [
            f"{name}/sample_{sample}/{i}-im.png"
            for name in ("cork", "wool")
            for sample in samples
            for i in range(2)
        ]
        assert part.labels.tolist() == [int(name.startswith("wool")) for name in names(part)]
    direct = load_splits("kth_tips2b", kth / "KTH-TIPS2-b", fold)
    assert fingerprint(direct) == fingerprint(splits)


def test_kth_without_one_sample_is_refused(kth):
    for path in (kth / "KTH-TIPS2-b" / "wool" / "sample_c").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"wool/sample_c: has no images"):
        load_splits("kth_tips2b", kth, 1)
    with pytest.raises(UserError, match=r"--fold 5: .*kth_tips2b \(1-4\)"):
        load_splits("kth_tips2b", kth, 5)


@pytest.fixture
def cub(tmp_path):
    """Two classes; every fourth image tests, so that 15 of 20 and 3 of 4 are trained on."""
    root = tmp_path / "CUB_200_2011"
    classes = {1: ("001.Albatross", 20), 2: ("002.Auklet", 4)}
    tables = {"images": [], "image_class_labels": [], "train_test_split": []}
    number = 0
    for label, (name, count) in classes.items():
        for i in range(count):
            number += 1
            touch(root / "images" / name / f"{i}.jpg")
            tables["images"].append(f"{number} {name}/{i}.jpg")
            tables["image_class_labels"].append(f"{number} {label}")
            tables["train_test_split"].append(f"{number} {int(i % 4 != 0)}")
    tables["classes"] = [f"{label} {name}" for label, (name, _) in classes.items()]
    for table, lines in tables.items():
        (root / f"{table}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_cub_tests_on_the_official_images_and_validates_on_a_tenth(cub):
    splits = load_splits("cub200", cub, 1)
    assert splits.classes == ["001.Albatross", "002.Auklet"]
    albatross = [f"images/001.Albatross/{i}.jpg" for i in range(0, 20, 4)]
    assert names(splits.test) == [*albatross, "images/002.Auklet/0.jpg"]
    # a tenth of 15 and of 3 training images, rounded, at least one: 2 and 1
    assert np.bincount(splits.val.labels).tolist() == [2, 1]
    assert np.bincount(splits.train.labels).tolist() == [13, 2]
    assert not set(names(splits.val)) & set(names(splits.train) + names(splits.test))
    assert all(splits.val.path(i).is_file() for i in range(3))
    direct = load_splits("cub200", cub / "CUB_200_2011", 1)
    assert fingerprint(direct) == fingerprint(splits)


@pytest.mark.parametrize(
    ("table", "line", "message"),
    [
        ("images", "1 001.Albatross/99.jpg", r"images.txt:1: .*99.jpg is missing"),
        ("images", "1", r"images.txt:1: expected 2 fields, found '1'"),
        (
            "images",
            "2 001.Albatross/0.jpg",
            r"images.txt:2: id '2' is not a number or is used twice",
        ),
        ("image_class_labels", "1 7", r"image_class_labels.txt:1: class 7 is not in classes.txt"),
        ("train_test_split", "1 yes", r"train_test_split.txt:1: expected 0 or 1, found 'yes'"),
        ("train_test_split", "99 1", r"train_test_split.txt: has no line for image 1$"),
    ],
)
def test_wrong_cub_tables_are_refused(cub, table, line, message):
    path = cub / "CUB_200_2011" / f"{table}.txt"
    path.write_text("\n".join([line, *path.read_text().splitlines()[1:]]))
    with pytest.raises(UserError, match=message):
        load_splits("cub200", cub, 1)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_cub_tables_may_have_any_common_encoding(cub, encoding):
    root = cub / "CUB_200_2011"
    (root / "images" / "002.Auklet").rename(root / "images" / "002.Aukl\xe9t")
    for path in root.glob("*.txt"):
        path.write_bytes(path.read_text().replace("Auklet", "Aukl\xe9t").encode(encoding))
    splits = load_splits("cub200", cub, 1)
    assert splits.classes == ["001.Albatross", "002.Aukl\xe9t"] and len(splits.train) == 15


@pytest.fixture
def flowers(tmp_path, monkeypatch):
    """Six images: 1 and 4 train, 2 validates, 3, 5 and 6 test; the release's checksums left out."""
    savemat = pytest.importorskip("scipy.io", reason="Flowers-102 needs scipy").savemat
    root = tmp_path / "flowers-102"
    for i in range(1, 7):
        touch(root / "jpg" / f"image_{i:05d}.jpg")
    savemat(root / "imagelabels.mat", {"labels": [[1, 2, 102, 1, 2, 1]]})
    savemat(root / "setid.mat", {"trnid": [[4, 1]], "valid": [[2, 3]], "tstid": [[5, 6]]})
    unchecked = {key: (file, None) for key, (file, _) in Flowers102._file_dict.items()}
    monkeypatch.setattr(Flowers102, "_file_dict", unchecked)
    return tmp_path


@pytest.mark.parametrize("inside", ["", "flowers-102"])
def test_flowers_splits_are_those_of_setid(flowers, inside):
    splits = load_splits("flowers102", flowers / inside, 1)
    assert names(splits.train) == ["jpg/image_00004.jpg", "jpg/image_00001.jpg"]
    assert splits.train.labels.tolist() == [0, 0]
    assert splits.val.labels.tolist() == [1, 101] and splits.test.labels.tolist() == [1, 0]
    assert len(splits.classes) == 102 and splits.classes[0] == "pink primrose"
    assert splits.test.path(1).is_file()
    (flowers / "flowers-102" / "jpg" / "image_00006.jpg").unlink()
    with pytest.raises(UserError, match=r"image_00006.jpg is missing"):
        load_splits("flowers102", flowers / inside, 1)


def test_flowers_without_scipy_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UserError, match="pip install scipy$"):
        load_splits("flowers102", tmp_path, 1)


@pytest.mark.parametrize("dataset", NAMES)
def test_another_layout_is_refused_in_one_line(dataset, tmp_path):
    if dataset == "flowers102":
        pytest.importorskip("scipy.io", reason="Flowers-102 needs scipy")
    for place in ("", "images/banded"):
        touch(tmp_path / place / "banded_0001.jpg")
        with pytest.raises(UserError, match=r"^--data_dir .*: .* not found \(expected ") as caught:
            load_splits(dataset, tmp_path, 1)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    with pytest.raises(UserError, match="no such folder"):
        load_splits(dataset, tmp_path / "absent", 1)


@pytest.mark.parametrize("dataset", ["cub200", "flowers102"])
def test_official_splits_have_one_fold(dataset, tmp_path):
    with pytest.raises(UserError, match=rf"--fold 2: .*{dataset} \(1\)"):
        load_splits(dataset, tmp_path, 2)
