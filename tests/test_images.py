"""data/images.py: samples are functions of a key, and unreadable images are marked."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from data import decoding
from data.images import EvalSet, ImageFiles, TrainSet, spot_check
from data.transforms import EvalTransform, TrainTransform

ROOT = Path(__file__).resolve().parent.parent


def photo(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_listing(root, count, *, classes=2, broken=()):
    """`count` JPEGs, labels in blocks; those at the positions `broken` are cut, empty or text."""
    damage = (lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"no image" * 9)
    names = [f"{i}.jpg" for i in range(count)]
    for i, name in enumerate(names):
        photo(i).save(root / name)
        if i in broken:
            data = (root / name).read_bytes()
            (root / name).write_bytes(damage[i % 3](data))
    labels = np.sort(np.arange(count) % classes)
    return ImageFiles(root, np.array([name.encode() for name in names]), labels)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ESTALE, errno.EIO, errno.ETIMEDOUT])
def test_an_error_of_the_machine_is_not_taken_for_an_unreadable_image(
    tmp_path, failing, number, monkeypatch
):
    source = write_listing(tmp_path, 4)
    failing(number, 100, "*")
    for dataset, key in (
        (train_set(source), (0, 1)),
        (EvalSet(source, EvalTransform(16)), 1),
    ):
        with pytest.raises(OSError) as caught:
            dataset[key]
        assert caught.value.errno == number and caught.value.filename.endswith(".jpg")
    monkeypatch.setattr(decoding, "open_image", decoding._read_once)
    with pytest.raises(OSError) as caught:
        spot_check(source)
    assert caught.value.errno == number


def test_an_error_that_passes_leaves_no_trace(tmp_path, failing):
    source = write_listing(tmp_path, 4)
    failing(errno.ESTALE, 2, "1.jpg")
    assert same(train_set(source)[0, 1], train_set(source)[0, 1])
    failing(errno.EIO, 2, "1.jpg")
    assert EvalSet(source, EvalTransform(16))[1].broken == 0


def test_a_server_that_comes_back_late_replaces_no_image(tmp_path, failing):
    source = write_listing(tmp_path, 4)
    failing(errno.ESTALE, 4, "*")  # three attempts at 1.jpg, and one at its replacement
    assert train_set(source)[0, 1].broken == 0


def test_a_file_on_a_bad_sector_is_replaced_and_other_errors_are_not_retried(tmp_path, failing):
    source = write_listing(tmp_path, 4)
    failing(errno.EIO, 100, "0.jpg")
    assert train_set(source)[0, 0].broken == 1
    failing(errno.EACCES, 1, "2.jpg")
    assert train_set(source)[0, 2].broken == 1


def test_names_are_found_whatever_the_locale(tmp_path):
    (tmp_path / "a").mkdir()
    photo(0).save(tmp_path / "a" / "café.png")
    code = (
        "import sys; from pathlib import Path; from data.imagenet import list_tree;"
        "source, _ = list_tree(Path(sys.argv[1]));"
        "print(sys.getfilesystemencoding(), source.read(0).shape)"
    )
    environment = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split(" ", 1)[1] == "torch.Size([3, 40, 50])\n", done.stderr
    assert not done.stdout.startswith("utf-8")


def train_set(source, seed=1):
    return TrainSet(source, TrainTransform(16), seed)


def same(a, b):
    return torch.equal(a.image, b.image) and torch.equal(a.draws, b.draws) and a[1:3] == b[1:3]


def test_training_samples_depend_only_on_seed_epoch_and_index(tmp_path):
    source = write_listing(tmp_path, 3)
    first = train_set(source)[0, 1]
    assert first.image.shape == (3, 16, 16) and first.image.dtype == torch.uint8
    assert (first.label, first.index, first.broken) == (0, 1, 0) and first.draws.shape == (2, 2)
    torch.manual_seed(123)  # nothing else has a say
    later = train_set(source)
    _ = later[0, 0], later[5, 2]
    assert same(later[0, 1], first)
    assert not same(later[1, 1], first)
    assert not same(train_set(source, seed=2)[0, 1], first)


def test_samples_do_not_change_the_global_random_state(tmp_path):
    dataset = train_set(write_listing(tmp_path, 3))
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    _ = dataset[0, 0], dataset[3, 1]
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


@pytest.mark.parametrize(
    ("broken", "index", "stand_in"),
    [
        # 8 files, labels 0 0 0 0 1 1 1 1: the next of the class that reads, cyclically
        ([1], 1, 2),
        ([3], 3, 0),
        ([2, 3], 2, 0),
        ([1, 2, 3], 1, 0),
        ([4, 5, 6], 5, 7),
        ([7, 4], 7, 5),
    ],
)
def test_an_unreadable_training_image_is_replaced_by_the_next_of_its_class(
    tmp_path, broken, index, stand_in
):
    source = write_listing(tmp_path, 8, broken=broken)
    identity = TrainSet(source, lambda image, epoch, index: (image, torch.empty(0, 2)), 0)
    for epoch in (0, 3):
        sample = identity[epoch, index]
        assert torch.equal(sample.image, source.read(stand_in))
        assert (sample.label, sample.index, sample.broken) == (index // 4, index, 1)


def test_a_class_without_a_readable_image_is_marked_2(tmp_path):
    source = write_listing(tmp_path, 6, broken=[0, 1, 2])
    assert [train_set(source)[0, i].broken for i in range(6)] == [2, 2, 2, 0, 0, 0]
    assert train_set(source)[0, 1].image.shape == (3, 16, 16)  # it still collates


def test_evaluation_marks_unreadable_images_and_replaces_none(tmp_path):
    dataset = EvalSet(write_listing(tmp_path, 4, broken=[1, 2]), EvalTransform(16))
    samples = [dataset[i] for i in range(4)]
    assert len(dataset) == 4
    assert [s.broken for s in samples] == [0, 2, 2, 0]
    assert [s.index for s in samples] == [0, 1, 2, 3]
    assert [s.label for s in samples] == [0, 0, 1, 1]
    assert all(s.image.shape == (3, 16, 16) for s in samples)
    assert not samples[1].image.any() and samples[3].image.any()


@pytest.mark.parametrize("broken", [1, 2])  # empty, text; a cut file has a whole header
def test_spot_check_names_a_file_that_is_not_an_image(tmp_path, broken):
    with pytest.raises(UserError, match=rf"{broken}\.jpg cannot be read as an image") as caught:
        spot_check(write_listing(tmp_path, 12, broken=[broken]))
    assert "\n" not in str(caught.value)


def test_spot_check_accepts_good_files_and_is_bounded_in_time(tmp_path):
    spot_check(write_listing(tmp_path, 12))
    all_broken_but_one = write_listing(tmp_path, 12, broken=range(1, 12))
    order = np.random.default_rng(0).permutation(12)
    photo(0).save(tmp_path / f"{order[0]}.jpg")
    spot_check(all_broken_but_one, seconds=-1)  # the time is over after the first file
    with pytest.raises(UserError):
        spot_check(all_broken_but_one)
