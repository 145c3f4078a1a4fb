"""data/images.py: any image becomes RGB, broken ones are marked, samples are functions of a key."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from data.decoding import read_rgb
from data.images import EvalSet, ImageFiles, TrainSet, spot_check
from data.transforms import EvalTransform, TrainTransform

COLOUR = (200, 40, 90)
GREY = round(0.299 * 200 + 0.587 * 40 + 0.114 * 90)


def flat(mode="RGB"):
    return Image.new("RGB", (20, 12), COLOUR).convert(mode, palette=Image.Palette.ADAPTIVE)


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


@pytest.mark.parametrize(
    ("name", "mode", "expected", "tolerance"),
    [
        ("rgb.png", "RGB", COLOUR, 0),
        ("rgb.jpg", "RGB", COLOUR, 3),
        ("cmyk.jpg", "CMYK", COLOUR, 6),
        ("cmyk.tif", "CMYK", COLOUR, 2),
        ("grey.png", "L", (GREY,) * 3, 1),
        ("grey.jpg", "L", (GREY,) * 3, 2),
        ("grey_alpha.png", "LA", (GREY,) * 3, 1),
        ("alpha.png", "RGBA", COLOUR, 0),
        ("palette.png", "P", COLOUR, 0),
        ("palette.gif", "P", COLOUR, 0),
        ("two.png", "1", None, None),
    ],
)
def test_every_kind_is_read_as_rgb(tmp_path, name, mode, expected, tolerance):
    flat(mode).save(tmp_path / name)
    image = read_rgb(tmp_path / name)
    assert image.dtype == torch.uint8 and image.shape == (3, 12, 20)
    if expected:
        error = (image.int() - torch.tensor(expected).view(3, 1, 1)).abs().max()
        assert error <= tolerance
    else:
        assert set(image.unique().tolist()) <= {0, 255}


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    image = read_rgb(tmp_path / "deep.png")
    assert (image[0].int() - torch.from_numpy((ramp >> 8).astype(int))).abs().max() <= 1


def test_png_named_jpeg_is_read_by_its_content(tmp_path):
    photo(0).save(tmp_path / "x.JPEG", format="PNG")
    expected = torch.from_numpy(np.array(photo(0))).permute(2, 0, 1)
    assert torch.equal(read_rgb(tmp_path / "x.JPEG"), expected)


def test_broken_exif_is_no_reason_not_to_read_nor_to_warn(tmp_path):
    flat().save(tmp_path / "x.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x1a\x01junk")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = read_rgb(tmp_path / "x.jpg")
    assert image.shape == (3, 12, 20)


@pytest.mark.parametrize("broken", [0, 1, 2])  # truncated, empty, text
def test_what_is_no_image_is_an_oserror_that_names_the_file(tmp_path, broken):
    write_listing(tmp_path, 3, broken=[broken])
    with pytest.raises(OSError, match=rf"{broken}\.jpg cannot be read as an image"):
        read_rgb(tmp_path / f"{broken}.jpg")
    with pytest.raises(OSError, match="missing.jpg"):
        read_rgb(tmp_path / "missing.jpg")


def test_listing_keeps_names_that_are_not_utf8(tmp_path):
    name = b"f\xff.png"
    with open(bytes(tmp_path) + b"/" + name, "wb") as file:
        flat().save(file, format="PNG")
    source = ImageFiles(tmp_path, np.array([name]), np.array([0]))
    assert len(source) == 1 and source.read(0).shape == (3, 12, 20)


def train_set(source, seed=1):
    return TrainSet(source, TrainTransform(16), seed)


def same(a, b):
    return torch.equal(a.image, b.image) and torch.equal(a.draws, b.draws) and a[1:3] == b[1:3]


def test_training_samples_are_functions_of_seed_epoch_and_index(tmp_path):
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


def test_samples_leave_the_global_generators_as_they_were(tmp_path):
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
def test_a_broken_training_image_is_replaced_by_the_next_of_its_class(
    tmp_path, broken, index, stand_in
):
    source = write_listing(tmp_path, 8, broken=broken)
    identity = TrainSet(source, lambda image: (image, torch.empty(0, 2)), 0)
    for epoch in (0, 3):
        sample = identity[epoch, index]
        assert torch.equal(sample.image, source.read(stand_in))
        assert (sample.label, sample.index, sample.broken) == (index // 4, index, 1)


def test_a_class_without_a_readable_image_is_marked_2(tmp_path):
    source = write_listing(tmp_path, 6, broken=[0, 1, 2])
    assert [train_set(source)[0, i].broken for i in range(6)] == [2, 2, 2, 0, 0, 0]
    assert train_set(source)[0, 1].image.shape == (3, 16, 16)  # it still collates


def test_evaluation_marks_broken_images_and_replaces_none(tmp_path):
    dataset = EvalSet(write_listing(tmp_path, 4, broken=[1, 2]), EvalTransform(16))
    samples = [dataset[i] for i in range(4)]
    assert len(dataset) == 4
    assert [s.broken for s in samples] == [0, 2, 2, 0]
    assert [s.index for s in samples] == [0, 1, 2, 3]
    assert [s.label for s in samples] == [0, 0, 1, 1]
    assert all(s.image.shape == (3, 16, 16) for s in samples)
    assert not samples[1].image.any() and samples[3].image.any()


@pytest.mark.parametrize("broken", [1, 2])  # empty, text; a cut file has a whole header
def test_spot_check_names_what_is_no_image(tmp_path, broken):
    with pytest.raises(UserError, match=rf"{broken}\.jpg cannot be read as an image") as caught:
        spot_check(write_listing(tmp_path, 12, broken=[broken]))
    assert "\n" not in str(caught.value)


def test_spot_check_is_content_with_good_files_and_is_bounded(tmp_path):
    spot_check(write_listing(tmp_path, 12))
    all_broken_but_one = write_listing(tmp_path, 12, broken=range(1, 12))
    order = np.random.default_rng(0).permutation(12)
    photo(0).save(tmp_path / f"{order[0]}.jpg")
    spot_check(all_broken_but_one, seconds=-1)  # the time is over after the first file
    with pytest.raises(UserError):
        spot_check(all_broken_but_one)
