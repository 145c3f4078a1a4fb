"""data/synthetic.py: deterministic images, whose classes differ in shape and not in colour."""

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from data.synthetic import PATTERNS, draw, write_dtd, write_imagenet_tree


def read_all(root):
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def write_small_tree(root, **changes):
    values = {"train_per_class": 3, "val_per_class": 2, "size": 24, "seed": 5} | changes
    return write_imagenet_tree(root, **values)


def test_imagenet_tree_has_the_counts_names_and_size(tmp_path):
    names = write_small_tree(tmp_path, num_classes=3)
    assert names == ["banded", "blotchy", "bricked"]
    assert len(read_all(tmp_path)) == 3 * (3 + 2)
    image = Image.open(tmp_path / "train" / "bricked" / "bricked_00003.JPEG")
    assert (image.format, image.size, image.mode) == ("JPEG", (24, 24), "RGB")


def test_labels_are_the_order_of_sorted_names():
    assert list(PATTERNS) == sorted(PATTERNS) and len(PATTERNS) >= 8


def test_the_same_seed_gives_the_same_bytes_whatever_the_counts(tmp_path):
    write_small_tree(tmp_path / "a")
    write_small_tree(tmp_path / "b")
    write_small_tree(tmp_path / "more", train_per_class=5, val_per_class=3, num_classes=10)
    write_small_tree(tmp_path / "other", seed=6)
    first, more = read_all(tmp_path / "a"), read_all(tmp_path / "more")
    assert first == read_all(tmp_path / "b")
    assert all(more[file] == data for file, data in first.items())
    assert not set(first.values()) & set(read_all(tmp_path / "other").values())


def test_no_image_is_in_two_splits_or_layouts(tmp_path):
    write_small_tree(tmp_path / "tree")
    write_dtd(tmp_path / "dtd", images_per_class=3, folds=1, size=24, seed=5)
    images = [data for file, data in read_all(tmp_path).items() if "labels" not in file]
    assert len(images) == 8 * (3 + 2 + 3) == len(set(images))


def test_every_dtd_fold_splits_all_images_into_thirds(tmp_path):
    write_dtd(tmp_path, images_per_class=7, folds=2, size=24, seed=5, num_classes=4)
    everything = {p.relative_to(tmp_path / "images").as_posix() for p in tmp_path.rglob("*.jpg")}
    assert len(everything) == 28 and "dotted/dotted_0007.jpg" not in everything
    assert "chequered/chequered_0007.jpg" in everything
    tests = []
    for fold in (1, 2):
        parts = [
            (tmp_path / "labels" / f"{split}{fold}.txt").read_text().split()
            for split in ("train", "val", "test")
        ]
        assert [len(part) for part in parts] == [12, 8, 8]  # 7 = 3 + 2 + 2 per class
        assert set().union(*parts) == everything
        tests.append(parts[2])
    assert tests[0] != tests[1]


def test_writing_again_is_allowed_but_leftovers_of_a_larger_set_are_not(tmp_path):
    write_small_tree(tmp_path)
    before = read_all(tmp_path)
    write_small_tree(tmp_path)
    assert read_all(tmp_path) == before
    with pytest.raises(UserError, match=r"banded contains other files \(banded_00003.JPEG\)"):
        write_small_tree(tmp_path, train_per_class=2)


def colour_histogram(image):
    """How often each of 4 x 4 x 4 colours occurs."""
    cells = (image // 64).reshape(-1, 3) @ (16, 4, 1)
    return np.bincount(cells, minlength=64) / len(cells)


def gradient_orientations(image):
    """How much of the brightness gradient points each way, the strongest turned to the front."""
    down, right = np.gradient(image @ np.array([0.299, 0.587, 0.114]))
    strength = np.hypot(down, right)
    bins = (np.arctan2(down, right) % np.pi / np.pi * 18).astype(int) % 18
    histogram = np.bincount(bins.ravel(), strength.ravel() ** 2, minlength=18)
    return np.roll(histogram, -histogram.argmax()) / histogram.sum()


def nearest_centroid_accuracy(feature, per_class=40, size=64):
    """Share of held-out images whose nearest class mean, by `feature`, is their own."""
    features = np.array(
        [
            [
                feature(draw(name, np.random.default_rng([9, label, i]), size))
                for i in range(per_class)
            ]
            for label, name in enumerate(PATTERNS)
        ]
    )
    half = per_class // 2
    centroids = features[:, :half].mean(axis=1)
    distances = np.linalg.norm(features[:, half:, None] - centroids, axis=-1)
    return float((distances.argmin(axis=-1) == np.arange(len(PATTERNS))[:, None]).mean())


def test_colour_classifies_near_chance_and_shape_well_above():
    chance = 1 / len(PATTERNS)
    assert nearest_centroid_accuracy(colour_histogram) < 2 * chance
    assert nearest_centroid_accuracy(gradient_orientations) > 3 * chance
