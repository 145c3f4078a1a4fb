"""data/textures.py and data/splits.py: DTD, any folder, what they refuse, the download."""

import hashlib
import shutil
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from torchvision.datasets import DTD

from common.errors import UserError
from data.splits import fingerprint, list_images
from data.synthetic import write_dtd
from data.textures import DATASETS, download_dtd, load_splits

SPLITS = ("train", "val", "test")


def names(part):
    return [file.decode() for file in part.files]


def all_names(splits):
    return [name for split in SPLITS for name in names(getattr(splits, split))]


@pytest.fixture
def dtd(tmp_path):
    """DTD's layout with 2 classes of 6 images and 2 folds: 2 per class in each split."""
    root = tmp_path / "data" / "dtd"
    write_dtd(root, images_per_class=6, folds=2, size=8, seed=0, num_classes=2)
    return root


def make_folder(root, counts):
    """A folder of class folders; nothing opens the files here, so empty ones do."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{i}.jpg").touch()
    return root


def replace_line(path, number, line):
    lines = path.read_text().splitlines()
    lines[number - 1] = line
    path.write_text("\n".join(lines) + "\n")


def test_dtd_splits_are_those_of_the_label_files(dtd):
    splits = load_splits("dtd", dtd, 2)
    assert splits.classes == ["banded", "blotchy"]
    for split in SPLITS:
        part = getattr(splits, split)
        lines = (dtd / "labels" / f"{split}2.txt").read_text().split()
        assert names(part) == [f"images/{line}" for line in lines]
        assert part.labels.tolist() == [int(line.startswith("blotchy")) for line in lines]
        assert part.files.dtype.kind == "S" and part.labels.dtype == np.int64
        assert all(part.path(i).is_file() for i in range(len(part)))


@pytest.mark.parametrize("place", ["dtd", "dtd/dtd"])
def test_dtd_is_found_in_torchvisions_nesting(dtd, tmp_path, place):
    here = load_splits("dtd", dtd, 1)
    outer = tmp_path / "elsewhere"
    (outer / place).parent.mkdir(parents=True)
    shutil.move(dtd, outer / place)
    there = load_splits("dtd", outer, 1)
    assert there.root == outer / place
    assert fingerprint(there) == fingerprint(here)


def test_fingerprint_tells_folds_labels_classes_and_files_apart(dtd):
    first = load_splits("dtd", dtd, 1)
    seen = {fingerprint(first), fingerprint(load_splits("dtd", dtd, 2))}
    (dtd / "images" / "blotchy").rename(dtd / "images" / "zebra")
    for path in (dtd / "labels").iterdir():
        path.write_text(path.read_text().replace("blotchy/", "zebra/"))
    seen.add(fingerprint(load_splits("dtd", dtd, 1)))
    first.train.labels[0] = 1 - first.train.labels[0]
    seen.add(fingerprint(first))
    assert len(seen) == 4


@pytest.mark.parametrize("fold", [0, 3, 11])
def test_a_dtd_fold_that_does_not_exist_is_refused(dtd, fold):
    with pytest.raises(UserError, match=rf"--fold {fold}: .*labels \(1-2\)$"):
        load_splits("dtd", dtd, fold)


def test_a_dtd_fold_with_a_missing_label_file_is_not_offered(dtd):
    (dtd / "labels" / "val1.txt").unlink()
    with pytest.raises(UserError, match=r"labels \(2\)$"):
        load_splits("dtd", dtd, 1)
    assert len(load_splits("dtd", dtd, 2).val) == 4


@pytest.mark.parametrize(
    ("split", "line", "message"),
    [
        ("val", "banded/banded_0099.jpg", r"val1.txt:2: .*banded_0099.jpg is missing$"),
        ("val", "nowhere/x.jpg", r"val1.txt:2: .*x.jpg is missing$"),
        ("test", "banded_0001.jpg", r"test1.txt:2: expected 2 fields, found 'banded_0001.jpg'$"),
        ("test", "a/b/c.jpg", r"test1.txt:2: expected 2 fields"),
        ("test", "banded/", r"test1.txt:2: expected 2 fields"),
    ],
)
def test_wrong_dtd_label_lines_are_refused(dtd, split, line, message):
    replace_line(dtd / "labels" / f"{split}1.txt", 2, line)
    with pytest.raises(UserError, match=message) as caught:
        load_splits("dtd", dtd, 1)
    assert "\n" not in str(caught.value)


def test_a_dtd_image_in_two_splits_is_refused(dtd):
    first = (dtd / "labels" / "train1.txt").read_text().split()[0]
    replace_line(dtd / "labels" / "test1.txt", 3, first)
    with pytest.raises(UserError, match=rf"test1.txt:3: {first} is already in .*train1.txt:1$"):
        load_splits("dtd", dtd, 1)


def test_an_empty_dtd_split_and_a_binary_label_file_are_refused(dtd):
    (dtd / "labels" / "val1.txt").write_text("\n\n")
    with pytest.raises(UserError, match=r"val1.txt: lists no images"):
        load_splits("dtd", dtd, 1)
    (dtd / "labels" / "val1.txt").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(UserError, match=r"val1.txt:1: expected 2 fields, found"):
        load_splits("dtd", dtd, 1)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "latin-1"])
def test_dtd_label_files_may_have_any_common_encoding(dtd, encoding):
    image = dtd / "images" / "banded" / "banded_0001.jpg"
    image.rename(image.with_name("café.jpg"))
    for path in (dtd / "labels").iterdir():
        text = path.read_text().replace("banded_0001", "café").replace("\n", "\r\n")
        path.write_bytes(text.encode(encoding))
    splits = load_splits("dtd", dtd, 1)
    assert "images/banded/café.jpg" in all_names(splits)
    assert len(all_names(splits)) == 12 and splits.classes == ["banded", "blotchy"]


def test_a_dtd_class_without_training_images_is_refused(dtd):
    train = dtd / "labels" / "train1.txt"
    train.write_text("".join(f"{x}\n" for x in train.read_text().split() if "banded" in x))
    with pytest.raises(UserError, match=r"val1.txt:3: class blotchy has no image in train1.txt"):
        load_splits("dtd", dtd, 1)


def test_folders_without_the_dataset_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"absent: no such folder.*--download"):
        load_splits("dtd", tmp_path / "absent", 1)
    with pytest.raises(UserError, match=r"DTD not found \(expected images, labels in it"):
        load_splits("dtd", tmp_path, 1)
    with pytest.raises(UserError, match=r"--dataset dtb: unknown; choose from dtd, folder, fmd"):
        load_splits("dtb", tmp_path, 1)


def test_system_errors_end_in_one_line(dtd, monkeypatch):
    path = dtd / "labels" / "val1.txt"
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"val1.txt: Is a directory"):
        load_splits("dtd", dtd, 1)

    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    with pytest.raises(UserError, match=r"train1.txt: no permission$"):
        load_splits("dtd", dtd, 1)


def test_a_folder_is_split_60_20_20_per_class(tmp_path):
    # a fifth of 3, 8 and 21 images, rounded, at least one: 1, 2, 4
    root = make_folder(tmp_path, {"c": 21, "a": 3, "b": 8})
    splits = load_splits("folder", root, 1)
    assert splits.classes == ["a", "b", "c"]
    counts = [np.bincount(getattr(splits, split).labels).tolist() for split in SPLITS]
    assert counts == [[1, 4, 13], [1, 2, 4], [1, 2, 4]]
    everything = all_names(splits)
    assert len(everything) == len(set(everything)) == 32
    listed = zip(names(splits.val), splits.val.labels, strict=True)
    assert all(name[0] == "abc"[y] for name, y in listed)


def test_folds_of_a_folder_depend_only_on_fold_and_names(tmp_path):
    first = make_folder(tmp_path / "one", {"a": 10, "b": 10})
    second = make_folder(tmp_path / "two", {"b": 10, "a": 10})
    folds = [fingerprint(load_splits("folder", first, k, num_folds=5)) for k in range(1, 6)]
    assert len(set(folds)) == 5
    assert folds[2] == fingerprint(load_splits("folder", second, 3, num_folds=7))


def test_fold_one_of_a_folder_never_changes(tmp_path):
    """Published results rest on these splits: another order would be another dataset."""
    root = make_folder(tmp_path, {"a": 5, "b": 5})

    def key(name):
        return hashlib.sha256(f"1:{name}".encode()).hexdigest()

    ordered = sorted((f"a/{i}.jpg" for i in range(5)), key=key)
    splits = load_splits("folder", root, 1)
    assert names(splits.test)[:1] == ordered[:1] and names(splits.val)[:1] == ordered[1:2]
    assert names(splits.train)[:3] == sorted(ordered[2:])


def test_files_that_are_not_images_of_a_class_are_left_out(tmp_path):
    root = make_folder(tmp_path, {"a": 3, "b": 3, ".ipynb_checkpoints": 5})
    for stray in ("readme.txt", "a/._0.jpg", "a/Thumbs.db", "a/notes.jpg.txt"):
        (root / stray).touch()
    (root / "a" / ".cache").mkdir()
    (root / "a" / ".cache" / "x.jpg").touch()
    (root / "b" / "deep" / "er").mkdir(parents=True)
    (root / "b" / "deep" / "er" / "X.JPeG").touch()
    (root / "b" / "again").symlink_to(root / "b")
    splits = load_splits("folder", root, 1)
    assert splits.classes == ["a", "b"]
    expected = [f"{c}/{i}.jpg" for c in "ab" for i in range(3)] + ["b/deep/er/X.JPeG"]
    assert sorted(all_names(splits)) == expected


def test_an_image_with_two_ways_to_it_is_listed_once(tmp_path):
    root = make_folder(tmp_path, {"a": 3, "b": 3})
    (root / "b").rename(root / "a" / "scans")
    (root / "a" / "latest").symlink_to(root / "a" / "scans")
    (root / "a" / "link1").symlink_to(tmp_path / "store")
    (root / "a" / "link2").symlink_to(tmp_path / "store")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "x.jpg").touch()
    assert list_images(root, "a") == [
        *(f"a/{i}.jpg" for i in range(3)),
        "a/link1/x.jpg",
        *(f"a/scans/{i}.jpg" for i in range(3)),
    ]


def test_folders_without_enough_classes_or_images_are_refused(tmp_path):
    few = make_folder(tmp_path / "few", {"a": 3, "b": 2})
    with pytest.raises(UserError, match=r"few/b: 2 images; a class needs at least 3"):
        load_splits("folder", few, 1)
    one = make_folder(tmp_path / "one", {"a": 3})
    with pytest.raises(UserError, match="at least two class folders, has 1"):
        load_splits("folder", one, 1)
    for names in (["train", "val"], ["Testing", "Training"], ["samples", "test", "train"]):
        tree = make_folder(tmp_path / names[0], dict.fromkeys(names, 3))
        found = ", ".join(name for name in names if name != "samples")
        with pytest.raises(UserError, match=f"{found} are splits, not classes"):
            load_splits("folder", tree, 1)
    # one class of that name is a class
    load_splits("folder", make_folder(tmp_path / "words", {"eval": 3, "quote": 3}), 1)
    with pytest.raises(UserError, match=r"--fold 4: .* --num_folds 3 \(1-3\)"):
        load_splits("folder", few, 4, num_folds=3)


def test_these_are_the_datasets():
    assert list(DATASETS) == ["dtd", "folder", "fmd", "kth_tips2b", "cub200", "flowers102"]


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def archive(dtd, tmp_path, monkeypatch):
    """The release file as torchvision expects it, served on this machine, with its checksum."""
    path = tmp_path / "served" / "dtd-r1.0.1.tar.gz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        tar.add(dtd, "dtd")
    handler = partial(QuietHandler, directory=path.parent)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        monkeypatch.setattr(DTD, "_URL", f"http://127.0.0.1:{server.server_port}/{path.name}")
        monkeypatch.setattr(DTD, "_MD5", hashlib.md5(path.read_bytes()).hexdigest())
        yield path
        server.shutdown()


@pytest.mark.parametrize("folder", ["fresh/dtd", "fresh/textures"])
def test_download_is_found_by_the_same_data_dir(dtd, archive, tmp_path, folder):
    download_dtd(tmp_path / folder)
    splits = load_splits("dtd", tmp_path / folder, 1)
    assert fingerprint(splits) == fingerprint(load_splits("dtd", dtd, 1))
    assert [path.name for path in (tmp_path / folder).iterdir()] == ["dtd"]
    archive.unlink()
    download_dtd(tmp_path / folder)  # is there: fetches nothing


def test_a_failed_download_leaves_nothing_behind(archive, tmp_path, monkeypatch):
    target = tmp_path / "fresh" / "dtd"
    monkeypatch.setattr(DTD, "_MD5", "0" * 32)
    with pytest.raises(UserError, match="--download: could not download DTD") as caught:
        download_dtd(target)
    assert "\n" not in str(caught.value)
    archive.unlink()
    with pytest.raises(UserError, match="--download: could not download DTD"):
        download_dtd(target)
    assert list(target.iterdir()) == []
