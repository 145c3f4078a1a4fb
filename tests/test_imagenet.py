"""data/imagenet.py: the images of a tree of class folders, and which trees are refused."""

import errno
import os
import tempfile
from pathlib import Path

import pytest

from common.errors import UserError, is_transient
from data.imagenet import list_tree, load_imagenet


def make(root, *files):
    """Empty files: listing opens none."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).touch()


def listed(source):
    return list(zip([f.decode() for f in source.files], source.labels.tolist(), strict=True))


def test_labels_follow_the_sorted_class_names_and_files_are_sorted(tmp_path):
    make(tmp_path, "n02/b.JPEG", "n02/a.JPEG", "n10/x.png", "n01/z.jpg")
    source, classes = list_tree(tmp_path)
    assert classes == ["n01", "n02", "n10"]
    assert listed(source) == [
        ("n01/z.jpg", 0),
        ("n02/a.JPEG", 1),
        ("n02/b.JPEG", 1),
        ("n10/x.png", 2),
    ]
    assert source.file_name(1) == str(tmp_path / "n02/a.JPEG")


def test_the_order_is_not_that_of_the_file_system(tmp_path):
    names = [f"{i * 7 % 20:02d}.jpg" for i in range(20)]
    make(tmp_path, *[f"{c}/{name}" for name in names for c in "bca"])
    source, classes = list_tree(tmp_path)
    assert classes == ["a", "b", "c"]
    assert [name for name, _ in listed(source)] == [
        f"{c}/{name}" for c in "abc" for name in sorted(names)
    ]


def test_hidden_and_other_files_are_neither_classes_nor_images(tmp_path):
    make(
        tmp_path,
        "a/1.jpg",
        "b/1.jpg",
        ".ipynb_checkpoints/1.jpg",
        "LOC.csv",
        "top.jpg",
        "a/._1.jpg",
        "a/.cache/2.jpg",
        "a/boxes.txt",
        "a/Thumbs.db",
        "b/notes/readme.md",
    )
    source, classes = list_tree(tmp_path)
    assert classes == ["a", "b"]
    assert listed(source) == [("a/1.jpg", 0), ("b/1.jpg", 1)]


def test_system_folders_are_neither_classes_nor_searched(tmp_path):
    make(tmp_path, "a/1.jpg", "__MACOSX/a/1.jpg", "lost+found/1.jpg", "a/@eaDir/1.jpg/thumb.jpg")
    source, classes = list_tree(tmp_path)
    assert classes == ["a"] and listed(source) == [("a/1.jpg", 0)]


def test_images_in_formats_that_are_left_out_are_counted_once_per_listing(
    tmp_path, capsys, monkeypatch
):
    make(tmp_path, "train/a/1.jpg", "train/a/x.GIF", "train/b/1.jpg", "train/b/deep/y.gif")
    make(tmp_path, "train/b/z.heic", "train/b/._w.gif", "train/b/notes.txt", "val/a/1.jpg")
    make(tmp_path, "val/b/1.jpg", "val/b/.gif")
    train, _, _ = load_imagenet(tmp_path)
    said = capsys.readouterr()
    assert len(train) == 2 and said.out == ""
    assert said.err == (
        f"note: {tmp_path / 'train'}: left out 2 .gif, 1 .heic: convert these files to JPEG or PNG "
        "to use them\n"
    )
    monkeypatch.setenv("RANK", "1")
    load_imagenet(tmp_path)
    assert capsys.readouterr().err == ""


def test_a_file_server_that_fails_is_not_a_missing_folder(tmp_path, monkeypatch):
    make(tmp_path, "train/a/1.jpg", "val/a/1.jpg")

    scandir = os.scandir

    def fail(path):
        if Path(path).name == "train":
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", fail)
    with pytest.raises(UserError, match=r"train cannot be listed \(Stale file handle\)") as caught:
        load_imagenet(tmp_path)
    assert is_transient(caught.value.__cause__)


def test_images_in_nested_folders_are_found(tmp_path):  # Tiny-ImageNet's train/<wnid>/images/
    make(tmp_path, "n1/images/n1_0.JPEG", "n1/images/n1_1.JPEG", "n1/n1_boxes.txt", "n2/0.JPEG")
    assert listed(list_tree(tmp_path)[0]) == [
        ("n1/images/n1_0.JPEG", 0),
        ("n1/images/n1_1.JPEG", 0),
        ("n2/0.JPEG", 1),
    ]


def test_linked_classes_and_images_are_listed(tmp_path):
    make(tmp_path, "store/c/1.jpg", "store/2.jpg", "tree/b/1.jpg")
    (tmp_path / "tree/a").symlink_to(tmp_path / "store/c")
    (tmp_path / "tree/b/2.jpg").symlink_to(tmp_path / "store/2.jpg")
    source, classes = list_tree(tmp_path / "tree")
    assert classes == ["a", "b"]
    assert [name for name, _ in listed(source)] == ["a/1.jpg", "b/1.jpg", "b/2.jpg"]


def test_names_that_are_not_utf8_are_kept(tmp_path):
    make(tmp_path, "a/1.jpg")
    os.close(os.open(bytes(tmp_path) + b"/a/\xff.jpg", os.O_CREAT))
    source, _ = list_tree(tmp_path)
    assert len(source) == 2 and all(source.path(i).exists() for i in range(2))


def test_both_splits_share_their_labels(tmp_path):
    make(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "train/b/2.jpg", "val/b/9.jpg", "val/a/9.jpg")
    train, val, classes = load_imagenet(tmp_path)
    assert classes == ["a", "b"] and len(train) == 3
    assert listed(val) == [("a/9.jpg", 0), ("b/9.jpg", 1)]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["val/a/1.jpg"], "train does not exist: --data_dir must be"),
        (["train/a/1.jpg"], "val does not exist: --data_dir must be"),
        (["train/1.jpg", "val/a/1.jpg"], "train has no class folders"),
        (["train/a/1.jpg", "val/a.jpg"], "val has no class folders"),
        (
            ["train/a/1.jpg", "train/b/x.txt", "val/a/1.jpg", "val/b/1.jpg"],
            r"train/b has no images \(1 such class folder\)",
        ),
        (
            ["train/a/1.jpg", "train/b/1.jpg", "val/a/.1.jpg", "val/b/x"],
            r"val/a has no images \(2 such class folders\)",
        ),
        (["train/a/1.jpg", "train/b/1.jpg", "val/b/1.jpg"], r"val has other .* lacks 1 \(a\)$"),
        (["train/a/1.jpg", "val/a/1.jpg", "val/c/1.jpg"], r"only it has 1 \(c\)$"),
        (
            ["train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/c/1.jpg"],
            r"it lacks 1 \(b\); only it has 1 \(c\)$",
        ),
        ([*[f"train/{c}/1.jpg" for c in "abcdef"], "val/a/1.jpg"], r"lacks 5 \(b, c, d, …\)$"),
    ],
)
def test_trees_that_would_give_wrong_numbers_are_refused_in_one_line(tmp_path, files, message):
    make(tmp_path, *files)
    with pytest.raises(UserError, match=message) as caught:
        load_imagenet(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_missing_data_dir_or_a_file_is_refused(tmp_path):
    make(tmp_path, "file")
    for place in ("nowhere", "file"):
        with pytest.raises(UserError, match=f"{place}/train does not exist"):
            load_imagenet(tmp_path / place)


@pytest.mark.parametrize("closed", ["train/a", "val", "train", "."])
def test_missing_permissions_are_one_line(closed, unprivileged):
    with tempfile.TemporaryDirectory() as name:  # other users may not read tmp_path
        root = Path(name)
        os.chmod(root, 0o755)
        make(root, "train/a/1.jpg", "val/a/1.jpg")
        (root / closed).chmod(0)
        try:
            with (
                unprivileged(),
                pytest.raises(UserError, match="ermission|not exist") as caught,
            ):
                load_imagenet(root)
            assert "\n" not in str(caught.value)
        finally:
            (root / closed).chmod(0o755)
