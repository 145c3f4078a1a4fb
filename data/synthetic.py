"""Built-in data: procedural textures, drawn with numpy under a seed and written as JPEG.

A class is a kind of pattern. Angle, phase, scale, duty, both colours, light and noise are drawn
anew for every image, so that colour says nothing about the class and shape says nearly everything.
Image `index` of a class depends on (seed, split, class, index) alone: more images, more classes or
another order leave the ones already there as they are.
"""

from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import UserError

# What the random streams are for: the splits of a tree share no image, the two layouts neither.
STREAMS = {"train": 0, "val": 1, "dtd": 2, "folds": 3}


def write_imagenet_tree(root, *, train_per_class, val_per_class, size, seed, num_classes=8):
    """Write root/{train,val}/<class>/<class>_00001.JPEG, `size` pixels square; -> class names.

    Raises UserError for impossible counts and where other files lie in the class folders.
    """
    names = _class_names(num_classes)
    for split, count in (("train", train_per_class), ("val", val_per_class)):
        _check_at_least(count, 1, f"{split}_per_class")
        for label, name in enumerate(names):
            files = [f"{name}_{i:05d}.JPEG" for i in range(1, count + 1)]
            _write_class(Path(root) / split / name, files, (seed, STREAMS[split], label), size)
    return names


def write_dtd(root, *, images_per_class, folds, size, seed, num_classes=8):
    """Write DTD's official layout, root/{images/<class>/*.jpg, labels/{train,val,test}K.txt}.

    Every fold K = 1..folds is a reshuffle of all images, class by class, into thirds; what does
    not divide by three goes to train. -> class names; raises UserError as write_imagenet_tree.
    """
    names = _class_names(num_classes)
    _check_at_least(images_per_class, 3, "images_per_class")
    _check_at_least(folds, 1, "folds")
    for label, name in enumerate(names):
        files = [f"{name}_{i:04d}.jpg" for i in range(1, images_per_class + 1)]
        _write_class(Path(root) / "images" / name, files, (seed, STREAMS["dtd"], label), size)
    third = images_per_class // 3
    wanted = [f"{split}{k}.txt" for k in range(1, folds + 1) for split in ("train", "val", "test")]
    _prepare_folder(Path(root) / "labels", wanted)
    for fold in range(1, folds + 1):
        lines = {"train": [], "val": [], "test": []}
        for label, name in enumerate(names):
            rng = np.random.default_rng([seed, STREAMS["folds"], label, fold])
            order = rng.permutation(images_per_class) + 1
            parts = {"val": order[:third], "test": order[third : 2 * third]}
            parts["train"] = order[2 * third :]
            for split, part in parts.items():
                lines[split] += [f"{name}/{name}_{i:04d}.jpg\n" for i in sorted(part)]
        for split, text in lines.items():
            with _written(Path(root) / "labels" / f"{split}{fold}.txt") as path:
                path.write_text("".join(text))
    return names


def draw(name, rng, size):
    """Draw one texture of class `name` -> uint8 [size, size, 3]; all that is random is from rng."""
    angle, cycles = rng.uniform(0, 2 * np.pi), rng.uniform(3, 6)  # cycles across the image
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size - 0.5
    x, y = axis[None, :], axis[:, None]
    u = cycles * (np.cos(angle) * x + np.sin(angle) * y) + rng.uniform(0, 100)
    v = cycles * (np.cos(angle) * y - np.sin(angle) * x) + rng.uniform(0, 100)
    height = PATTERNS[name](u, v, rng)  # [size, size], the edge between the colours lies at 0
    mask = 0.5 + 0.5 * np.tanh(rng.uniform(4, 12) * height)[..., None]

    ground, figure = _two_colours(rng)
    slope = rng.uniform(-0.3, 0.3, size=2)
    light = 1 + (slope[0] * x + slope[1] * y)[..., None]
    noise = rng.normal(0, rng.uniform(0.01, 0.03), size=(size, size, 1))
    image = (ground + (figure - ground) * mask) * light + noise
    return (255 * image.clip(0, 1) + 0.5).astype(np.uint8)


def _two_colours(rng):
    """Two muted RGB colours in [0, 1], either the lighter, brightness at least 0.4 apart.

    With loud colours of any contrast a ResNet needs several times the steps to see the shapes.
    """
    while True:
        ground, figure = 0.7 * rng.random((2, 1)) + 0.3 * rng.random((2, 3))
        if abs((ground - figure) @ (0.299, 0.587, 0.114)) > 0.4:
            return ground, figure


# Each pattern takes u, v [size, size] in periods and returns heights of about -1..1 around 0.


def _from_line(position):
    """Distance to the nearest whole number, 0..0.5: a family of parallel lines."""
    return np.abs(position - np.round(position))


def _banded(u, v, rng):
    return np.sin(2 * np.pi * u) - rng.uniform(-0.5, 0.5)


def _blotchy(u, v, rng):
    cells = rng.integers(6, 13)
    coarse = Image.fromarray(rng.normal(size=(cells, cells)).astype(np.float32))
    smooth = np.asarray(coarse.resize(u.shape[::-1], Image.Resampling.BICUBIC))
    return smooth - np.median(smooth) - rng.uniform(-0.3, 0.3)


def _bricked(u, v, rng):
    row = np.floor(v)
    mortar = np.minimum(_from_line(v), 2 * _from_line(u / 2 + row / 2))
    return 4 * (rng.uniform(0.08, 0.15) - mortar)


def _chequered(u, v, rng):
    return np.sin(np.pi * u) * np.sin(np.pi * v) * 2


def _dotted(u, v, rng):
    return 4 * (rng.uniform(0.2, 0.36) - np.hypot(_from_line(u), _from_line(v)))


def _gridded(u, v, rng):
    return 4 * (rng.uniform(0.08, 0.15) - np.minimum(_from_line(u), _from_line(v)))


def _ringed(u, v, rng):
    u, v = (w - w.mean() - rng.uniform(-1, 1) for w in (u, v))
    return np.sin(2 * np.pi * np.hypot(u, v) + rng.uniform(0, 2 * np.pi))


def _wavy(u, v, rng):
    bend = rng.uniform(0.25, 0.4) * np.sin(2 * np.pi * v / rng.uniform(1.5, 2.5))
    return np.sin(2 * np.pi * (u + bend)) - rng.uniform(-0.5, 0.5)


def _woven(u, v, rng):
    over = (np.floor(u) + np.floor(v)) % 2 == 0
    return np.sin(2 * np.pi * rng.integers(2, 4) * np.where(over, u, v))


def _zigzagged(u, v, rng):
    bend = rng.uniform(1.6, 2.4) * _from_line(v / 2)
    return np.sin(2 * np.pi * (u + bend)) - rng.uniform(-0.5, 0.5)


PATTERNS = {  # in the order of the labels, which is that of the sorted names
    "banded": _banded,
    "blotchy": _blotchy,
    "bricked": _bricked,
    "chequered": _chequered,
    "dotted": _dotted,
    "gridded": _gridded,
    "ringed": _ringed,
    "wavy": _wavy,
    "woven": _woven,
    "zigzagged": _zigzagged,
}


def _class_names(num_classes):
    if not 2 <= num_classes <= len(PATTERNS):
        raise UserError(f"num_classes {num_classes}: there are 2 to {len(PATTERNS)} patterns")
    return list(PATTERNS)[:num_classes]


def _check_at_least(value, least, name):
    if value < least:
        raise UserError(f"{name} {value}: built-in data needs at least {least}")


@contextmanager
def _written(path):
    """Turn what the system says against writing `path` into a UserError."""
    try:
        yield path
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def _prepare_folder(folder, wanted):
    """Make `folder`, or find nothing in it but `wanted`: leftovers of a larger set would mix in."""
    with _written(folder):
        folder.mkdir(parents=True, exist_ok=True)
        others = sorted({path.name for path in folder.iterdir()} - set(wanted))
    if others:
        raise UserError(f"{folder}: holds other files ({others[0]}); give an empty folder")


def _write_class(folder, files, stream, size):
    _check_at_least(size, 8, "size")
    _prepare_folder(folder, files)
    for index, file in enumerate(files, 1):
        image = draw(folder.name, np.random.default_rng([*stream, index]), size)
        with _written(folder / file) as path:
            Image.fromarray(image).save(path, "JPEG", quality=90)
