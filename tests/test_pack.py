"""tools/pack.py: trees become packs of small JPEGs, or one line says why not."""

import errno
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from common.errors import Busy, UserError
from data import packed
from data.decoding import read_rgb
from data.imagenet import load_imagenet
from data.packed import MANIFEST, read_manifest
from data.synthetic import write_imagenet_tree
from tools import pack as tool


@pytest.fixture
def tree(tmp_path):
    """Two classes; in the first one image each that is larger, a PNG, grey and CMYK."""
    write_imagenet_tree(
        tmp_path / "tree", train_per_class=4, val_per_class=2, size=40, seed=0, num_classes=2
    )
    first = sorted((tmp_path / "tree" / "train").iterdir())[0]
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (90, 130, 3), dtype=np.uint8))
    photo.save(first / "large.jpg")
    photo.resize((48, 36)).save(first / "small.png")
    photo.convert("L").save(first / "grey.jpg")
    photo.resize((60, 50)).convert("CMYK").save(first / "cmyk.jpg")
    return tmp_path / "tree"


def run(tree, *flags, workers=0):
    out = tree.parent / "packed"
    words = ["--data-dir", str(tree), "--out", str(out), "--short_side", "64"]
    tool.main([*words, "--workers", str(workers), *flags])
    return out


def index_of(source, name):
    return next(i for i in range(len(source)) if source.file_name(i).endswith(name))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pack_is_read_in_place_of_its_tree(tree, workers, capsys):
    out = run(tree, workers=workers)
    assert "train 12 images in" in capsys.readouterr().out
    (train, val, classes), theirs = load_imagenet(out), load_imagenet(tree)
    assert classes == theirs[2]
    for ours, files in ((train, theirs[0]), (val, theirs[1])):
        assert ours.labels.tolist() == files.labels.tolist()
        assert [row.tobytes().rstrip(b"\0") for row in ours.rows["name"]] == files.files.tolist()
        for i in range(len(files)):
            height, width = files.read(i).shape[1:]
            expected = (height, width) if min(height, width) <= 64 else (64, 64 * width // height)
            assert ours.read(i).shape == (3, *expected)


def test_small_jpegs_are_copied_byte_for_byte(tree):
    train = load_imagenet(run(tree))[0]
    files = load_imagenet(tree)[0]
    copied = [
        i for i in range(len(files)) if bytes(train._entry(i).numpy()) == files.path(i).read_bytes()
    ]
    assert len(copied) == 8  # all but large, grey (large too), png and cmyk
    assert torch.equal(train.read(copied[0]), files.read(copied[0]))


def test_larger_images_are_shrunk_bicubically_and_saved_at_the_quality(tree):
    train = load_imagenet(run(tree, "--quality", "80"))[0]
    image = read_rgb(next(tree.glob("train/*/large.jpg")))
    small = v2.functional.resize(image, [64], v2.InterpolationMode.BICUBIC)
    file = io.BytesIO()
    Image.fromarray(small.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=80)
    entry = bytes(train._entry(index_of(train, "large.jpg")).numpy())
    assert entry == file.getvalue()
    png = train.read(index_of(train, "small.png"))  # not a JPEG before: coded, not resized
    assert png.shape == (3, 36, 48)


@pytest.mark.parametrize("size", [(70_000, 40), (80_000, 70)])  # the second would be shrunk
def test_an_image_too_long_for_a_jpeg_is_copied_byte_for_byte(tree, size):
    first = sorted((tree / "train").iterdir())[0]
    Image.new("RGB", size, (1, 2, 3)).save(first / "long.png")
    train = load_imagenet(run(tree))[0]
    index = index_of(train, "long.png")
    assert bytes(train._entry(index).numpy()) == (first / "long.png").read_bytes()
    row = train.rows[index]
    assert (row["width"], row["height"]) == size and train.read(index).shape == (3, *size[::-1])


def test_a_pack_that_was_interrupted_starts_over_and_ends_the_same(tree, monkeypatch):
    whole = run(tree)
    files = ("train.data", "train.npy", "val.data", "val.npy", MANIFEST)
    expected = {name: (whole / name).read_bytes() for name in files}
    shutil.rmtree(whole)
    whole.mkdir()
    (whole / "train.data.part").write_bytes(b"half a pack")
    with pytest.raises(UserError, match="contains an interrupted pack: run tools.pack again"):
        load_imagenet(whole)
    add, added = packed.PackWriter.add, []

    def interrupt(self, position, *args, **kwargs):
        added.append(position)
        if len(added) == 5:
            raise KeyboardInterrupt
        add(self, position, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(packed.PackWriter, "add", interrupt)
        run(tree)
    assert [path.name for path in whole.iterdir()] == [".lock"]
    run(tree)
    assert {name: (whole / name).read_bytes() for name in expected} == expected


def test_unreadable_images_are_all_named_and_no_pack_is_written_until_they_are_restored(
    tree, capsys
):
    files = load_imagenet(tree)[0]
    broken = [files.path(1), next(tree.glob("val/*/*"))]
    contents = [path.read_bytes() for path in broken]
    for path in broken:
        path.write_bytes(b"no image")
    with pytest.raises(SystemExit) as left:
        run(tree)
    error = capsys.readouterr().err
    assert left.value.code == 1 and "error: 2 images cannot be read" in error
    assert all(str(path) in error for path in broken)
    assert not (tree.parent / "packed" / MANIFEST).exists()
    for path, content in zip(broken, contents, strict=True):
        path.write_bytes(content)
    train, val, _ = load_imagenet(run(tree))
    assert (len(train), len(val)) == (12, 4)
    assert torch.equal(train.read(1), files.read(1))


def test_unreadable_images_are_left_out_on_request(tree, capsys):
    path = load_imagenet(tree)[0].path(2)
    path.write_bytes(b"")
    train, val, _ = load_imagenet(run(tree, "--skip_unreadable"))
    assert (len(train), len(val)) == (11, 4)
    assert "1 unreadable images left out" in capsys.readouterr().out
    assert not any(
        train.file_name(i).endswith(path.name) and path.parent.name in train.file_name(i)
        for i in range(11)
    )
    run(tree, "--skip_unreadable")
    assert "warning: 1 images that could not be read then are not in it" in capsys.readouterr().out


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_without_readable_images_is_not_packed(tree, split):
    folder = min((tree / split).iterdir())
    for path in folder.iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match=f"no image of class {folder.name} in {split}/ can be read"):
        run(tree, "--skip_unreadable")
    assert not (tree.parent / "packed" / MANIFEST).exists()


def test_an_older_pack_that_lacks_a_class_is_refused(tree):
    out = run(tree)
    manifest = read_manifest(out)
    (out / MANIFEST).write_text(json.dumps({**manifest, "classes": [*manifest["classes"], "new"]}))
    with pytest.raises(UserError, match="has no train images of class new: pack again"):
        load_imagenet(out)
    run(tree)
    assert len(load_imagenet(out)[2]) == len(manifest["classes"])


def test_a_finished_pack_is_left_as_it_is(tree, capsys):
    out = run(tree)
    before = (out / MANIFEST).stat().st_mtime_ns
    run(tree)
    assert "is packed already" in capsys.readouterr().out
    assert (out / MANIFEST).stat().st_mtime_ns == before
    with pytest.raises(UserError, match="contains a pack with other settings"):
        run(tree, "--quality", "70")


@pytest.mark.parametrize("broken", ["_entry", "__init__"])
def test_a_pack_that_the_machine_cannot_read_now_is_left_alone(tree, monkeypatch, broken):
    out = run(tree)
    before = (out / "train.data").stat()

    def fail(*_):
        error = OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        if broken == "_entry":
            raise error
        raise UserError("the packed train images cannot be opened") from error

    monkeypatch.setattr(packed.PackedImages, broken, fail)
    with pytest.raises((OSError, UserError), match="Stale|cannot be opened"):
        run(tree)
    assert (out / "train.data").stat() == before


def test_a_damaged_pack_is_replaced_and_one_of_other_images_is_refused(tree, capsys):
    out = run(tree)
    whole = (out / "train.data").read_bytes()
    (out / "train.data").write_bytes(whole[:-100] + bytes(100))
    run(tree)
    assert "packing again: " in (text := capsys.readouterr().out) and "is damaged" in text
    assert (out / "train.data").read_bytes() == whole
    path = next(tree.glob("val/*/*"))
    path.rename(path.with_name("other.jpg"))
    with pytest.raises(UserError, match="contains a pack of other images"):
        run(tree)


def test_too_little_space_is_one_line_before_anything_is_packed(tree, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("", (), {"free": 1000}))
    with pytest.raises(UserError, match="needs about 0.0 GB more and has 0.0 GB free"):
        run(tree)
    assert not any((tree.parent / "packed").glob("train*"))


def test_a_full_disk_is_one_line_and_the_same_command_succeeds_later(tree, monkeypatch):
    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed.PackWriter, "finish", full)
    with pytest.raises(UserError, match="No space left on device.*same command again"):
        run(tree)
    monkeypatch.undo()
    assert len(load_imagenet(run(tree))[0]) == 12


def test_a_file_server_that_fails_leaves_no_image_out(tree, failing):
    failing(errno.ESTALE, 100, "*")
    with pytest.raises(UserError, match=r"Stale file handle: .*: run the same command again"):
        run(tree, "--skip_unreadable")
    assert not (tree.parent / "packed" / MANIFEST).exists()


def test_impossible_flags_are_refused_in_one_line(tree):
    packed_tree = run(tree)
    with pytest.raises(UserError, match="is packed: give the tree"):
        tool.main(["--data_dir", str(packed_tree), "--out", str(tree.parent / "again")])
    with pytest.raises(UserError, match="--out must be another folder"):
        tool.main(["--data_dir", str(tree), "--out", str(tree)])
    with pytest.raises(UserError, match="--quality above 95"):
        run(tree, "--quality", "100")


def test_two_processes_do_not_pack_into_one_folder(tree, locked_by_another):
    with (
        locked_by_another(tree.parent / "packed"),
        pytest.raises(Busy, match="packed is in use by another running process"),
    ):
        run(tree)


def test_a_pack_with_a_damaged_manifest_is_replaced_and_one_of_another_format_is_not(tree, capsys):
    manifest = run(tree) / "packed.json"
    content = manifest.read_text()
    manifest.write_text(content[:40])
    run(tree)
    assert "packing again" in capsys.readouterr().out and manifest.read_text() == content
    manifest.write_text(json.dumps({**json.loads(content), "format": 99}))
    with pytest.raises(UserError, match="has format 99, .* into another --out"):
        run(tree)


def test_other_programs_partial_files_are_not_a_pack(tree):
    (tree / "ILSVRC2012_img_val.tar.part").touch()
    load_imagenet(tree)
    run(tree)
    (tree / "train.data.part").touch()  # beside train/, it is not of a pack either
    load_imagenet(tree)
    foreign = tree.parent / "foreign"
    foreign.mkdir()
    (foreign / "movie.mkv.part").touch()
    (foreign / "train.data").write_text("mine")
    with pytest.raises(UserError, match="contains files that this tool did not write"):
        tool.main(["--data_dir", str(tree), "--out", str(foreign), "--workers", "0"])
    assert (foreign / "train.data").read_text() == "mine"


def test_a_pack_inside_of_a_split_is_refused(tree):
    with pytest.raises(UserError, match="--out must be another folder than --data_dir, its train/"):
        tool.main(["--data_dir", str(tree), "--out", str(tree / "train" / "packed")])


def test_a_manifest_that_the_machine_cannot_read_does_not_remove_the_pack(tree):
    manifest = run(tree) / "packed.json"
    content, data = manifest.read_bytes(), manifest.with_name("train.data").stat().st_ino
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "read_text", lambda *args, **kwargs: fail(errno.EIO))
        with pytest.raises(UserError, match="packed.json cannot be read"):
            run(tree)
    assert manifest.read_bytes() == content
    assert manifest.with_name("train.data").stat().st_ino == data  # not one that was packed again


def fail(number):
    raise OSError(number, os.strerror(number))
