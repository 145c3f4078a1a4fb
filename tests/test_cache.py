"""data/cache.py: a cache gives the pixels of the files, and is renewed when they change."""

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from common.files import lock_folder
from data import cache
from data.cache import (
    FOLDER,
    DecodedFiles,
    cache_folders,
    check_uncached,
    with_pixel_cache,
)
from data.images import TrainSet, spot_check
from data.splits import SPLITS, fingerprint, make_stratified_splits
from data.synthetic import write_dtd
from data.textures import load_splits
from data.transforms import EvalTransform, TrainTransform

ROOT = Path(__file__).resolve().parent.parent


def draw(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 20 + seed % 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    for i in range(12):
        draw(tmp_path / "data" / "ab"[i % 2] / f"{i:02d}.{'jpg' if i % 3 else 'png'}", i)
    return tmp_path / "data"


def load(root, fold=1):
    return make_stratified_splits(root, fold)


def cached(root, fold=1, **options):
    return with_pixel_cache(load(root, fold), workers=0, **options)


def images(splits):
    return [getattr(splits, s).read(i) for s in SPLITS for i in range(len(getattr(splits, s)))]


def same(some, others):
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def kept(root):
    return sorted(path.name for path in (root / FOLDER).iterdir())


def test_the_cache_is_found_where_the_data_is_mounted_at_another_path(root, capsys):
    expected = images(cached(root))
    before, moved = kept(root), root.with_name("elsewhere")
    root.rename(moved)
    capsys.readouterr()
    assert same(images(cached(moved)), expected) and kept(moved) == before
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("workers", [0, 2])
def test_the_cache_gives_the_pixels_samples_and_listing_of_the_files(root, workers, capsys):
    plain, fast = load(root), with_pixel_cache(load(root), workers=workers)
    assert f"decoding 12 images once, 0.0 GB, into {root / FOLDER}" in capsys.readouterr().out
    assert isinstance(fast.train, DecodedFiles) and (fast.train.rows >= 0).all()
    assert same(images(fast), images(plain)) and fingerprint(fast) == fingerprint(plain)
    for splits in (plain, fast):
        assert splits.classes == ["a", "b"]
    sets = [TrainSet(splits.train, TrainTransform(16), 5) for splits in (plain, fast)]
    for key in [(0, 0), (3, 1)]:
        a, b = (dataset[key] for dataset in sets)
        assert torch.equal(a.image, b.image) and torch.equal(a.draws, b.draws)
    assert torch.equal(*[EvalTransform(16)(s.val.read(0)) for s in (plain, fast)])


def forbid_reading(monkeypatch):
    def read(self, index):
        raise AssertionError(f"{self.path(index)} was decoded again")

    monkeypatch.setattr(cache.ImageFiles, "read", read)
    monkeypatch.setattr(cache.ImageFiles, "check_header", read)


def test_all_folds_share_one_cache_and_decode_nothing_again(root, monkeypatch, capsys):
    expected = images(load(root, 2))
    cached(root)
    capsys.readouterr()
    forbid_reading(monkeypatch)
    fold2 = cached(root, 2)
    assert same(images(fold2), expected) and len(kept(root)) == 1
    spot_check(fold2.val)
    assert capsys.readouterr().out == ""


def test_folds_of_dtd_that_lack_an_image_share_the_cache_too(tmp_path, capsys):
    write_dtd(tmp_path / "dtd", images_per_class=6, folds=2, size=24, seed=1, num_classes=2)
    listed = tmp_path / "dtd/labels/train1.txt"
    listed.write_text("".join(listed.read_text().splitlines(keepends=True)[1:]))
    for fold in (1, 2, 1):
        splits = load_splits("dtd", tmp_path / "dtd", fold)
        assert same(images(with_pixel_cache(splits, workers=0)), images(splits))
    out = capsys.readouterr().out
    assert out.count("decoding") == out.count("decoding 12 images once") == 1


@pytest.mark.parametrize("change", ["content", "content at the same time", "time", "new", "gone"])
def test_a_change_of_files_makes_a_new_cache_and_removes_the_old(root, change):
    cached(root)
    before, file = kept(root), root / "a" / "02.jpg"
    if change == "content":
        draw(file, 77)
    elif change == "content at the same time":  # as a tar restores it, by chance of equal size
        times = os.stat(file)
        Image.new("RGB", (9, 9), (200, 0, 0)).save(file)
        file.write_bytes(file.read_bytes().ljust(times.st_size, b"\0"))
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif change == "time":
        os.utime(file, ns=(1, 1))
    elif change == "new":
        draw(root / "a" / "new.png", 5)
    else:
        file.unlink()
    after = cached(root)
    assert same(images(after), images(load(root)))
    assert len(kept(root)) == 1 and kept(root) != before


def test_the_users_cache_folder_is_used_where_the_data_folder_cannot_be_written(
    root, monkeypatch, capsys
):
    (root / FOLDER).write_text("in the way")
    splits = cached(root)
    place = cache_folders(root)[1]
    assert str(place) in capsys.readouterr().out and place.is_relative_to(root.parent / "user")
    assert isinstance(splits.val, DecodedFiles)
    forbid_reading(monkeypatch)
    cached(root)


def test_another_users_private_cache_is_not_opened(unprivileged, monkeypatch):
    with tempfile.TemporaryDirectory() as name:  # other users may not read tmp_path
        root = Path(name)
        os.chmod(root, 0o755)
        for i in range(6):
            draw(root / "ab"[i % 2] / f"{i}.png", i)
        (root / FOLDER).mkdir(mode=0o700)
        with unprivileged():
            monkeypatch.setenv("XDG_CACHE_HOME", str(root / "none"))
            splits = cached(root)
            assert same(images(splits), images(load(root)))


def test_a_user_without_a_home_folder_has_a_cache_beside_the_data_only(root, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as if passwd had no such user
    assert cache_folders(root) == [root / FOLDER]
    assert isinstance(cached(root).val, DecodedFiles)


def test_files_are_read_and_one_line_says_so_where_no_cache_can_be_written(root, capsys):
    (root / FOLDER).write_text("in the way")
    (root.parent / "user").write_text("in the way")
    splits = cached(root)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].startswith("no cache of decoded images")
    assert not isinstance(splits.train, DecodedFiles) and len(images(splits)) == 12


def test_too_little_disk_or_memory_is_one_line_and_leaves_nothing(root, monkeypatch, capsys):
    def no_room(place, needed):
        raise cache.UserError(f"{place} has no room")

    monkeypatch.setattr(cache, "require_free_space", no_room)
    assert not isinstance(cached(root).train, DecodedFiles)
    assert capsys.readouterr().out.count("\n") == 1 and kept(root) == []
    monkeypatch.undo()
    monkeypatch.setattr(cache.os, "sysconf", lambda name: 50)  # 2,500 bytes of memory
    assert not isinstance(cached(root).train, DecodedFiles)
    assert "would not stay in this machine's memory" in capsys.readouterr().out


def test_a_full_disk_midway_is_one_line(root, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("data.packed.PackWriter.finish", full)
    assert not isinstance(cached(root).train, DecodedFiles)
    assert "No space left on device" in capsys.readouterr().out and kept(root) == []


def test_unreadable_images_are_unreadable_with_the_cache_too(root):
    (root / "a" / "02.jpg").write_bytes(b"no image")
    splits = cached(root)
    broken = [
        part.file_name(i)
        for part in (splits.train, splits.val, splits.test)
        for i in range(len(part))
        if part.rows[i] < 0
    ]
    assert broken == [str(root / "a" / "02.jpg")]
    part, at = next(
        (p, int(p.rows.argmin()))
        for p in (splits.train, splits.val, splits.test)
        if (p.rows < 0).any()
    )
    with pytest.raises(OSError, match="02.jpg cannot be read"):
        part.read(at)
    with pytest.raises(OSError):
        part.check_header(at)


def test_a_damaged_cache_costs_no_image(root, capsys):
    cached(root)
    data = next((root / FOLDER).glob("*/decoded.data"))
    content = bytearray(data.read_bytes())
    content[5] ^= 1
    data.write_bytes(content)
    assert same(images(cached(root)), images(load(root)))
    capsys.readouterr()
    data.write_bytes(content[:-1])  # does not open: decoded again
    assert same(images(cached(root)), images(load(root)))
    assert "decoding" in capsys.readouterr().out


def test_a_stopped_build_reads_files_and_the_next_starts_over(root, monkeypatch, capsys):
    asked = iter([False] * 8 + [True] * 99)
    splits = cached(root, stop=lambda: next(asked))
    assert not isinstance(splits.train, DecodedFiles)
    capsys.readouterr()
    assert isinstance(cached(root).train, DecodedFiles)
    assert "decoding 12 images" in capsys.readouterr().out


def test_the_processes_of_a_sweep_write_the_cache_once(root):
    script = (
        "import sys; from pathlib import Path; from data.cache import with_pixel_cache\n"
        "from data.splits import make_stratified_splits\n"
        "s = with_pixel_cache(make_stratified_splits(Path(sys.argv[1]), 1), workers=0)\n"
        "print(type(s.train).__name__, (s.train.rows >= 0).all())"
    )
    with lock_folder(next(p / cache._hash_files(everything(root)) for p in cache_folders(root))):
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", script, str(root)],
                cwd=ROOT,
                text=True,
                stdout=subprocess.PIPE,
            )
            for _ in range(2)
        ]
        assert "waiting for the process" in processes[0].stdout.readline()
    out = [process.communicate()[0] for process in processes]
    assert all("DecodedFiles True" in text for text in out)
    assert sum("decoding 12 images" in text for text in out) == 1


def everything(root):
    splits = load(root)
    files = np.unique(np.concatenate([getattr(splits, s).files for s in SPLITS]))
    return cache.ImageFiles(root, files, np.zeros(len(files), np.int64))


def test_workers_need_not_be_forked(root, monkeypatch):
    sent = []

    def map_pickled(function, positions, *, workers):
        sent.append(pickle.dumps(function))
        return zip(positions.tolist(), map(pickle.loads(sent[0]), positions.tolist()), strict=True)

    monkeypatch.setattr(cache, "map_in_workers", map_pickled)
    assert same(images(cached(root)), images(load(root))) and sent


def test_an_unreadable_test_image_is_found_before_training(root):
    splits = load(root)
    path = splits.test.path(0)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=f"{path.name} cannot be read .*Validation and test use"):
        check_uncached(cached(root))
    check_uncached(load(root))  # without a cache nothing is read in advance
