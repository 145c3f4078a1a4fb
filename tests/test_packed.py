"""data/packed.py: what is packed is read back, interrupted packs start over, damage is named."""

import contextlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from data import images, packed
from data.decoding import decode_rgb
from data.images import ImageFiles, TrainSet, collate
from data.packed import (
    MANIFEST,
    PackedImages,
    finish_pack,
    is_interrupted,
    map_in_workers,
    open_pack,
    read_manifest,
)
from data.transforms import TrainTransform

ROOT = Path(__file__).resolve().parent.parent
NAMES = np.array([b"a/1.jpg", b"a/\xff.jpg", b"b/3.jpg", b"b/4.jpg"])
LABELS = np.array([0, 0, 1, 1])
SOURCES = {"train": ImageFiles(Path("."), NAMES, LABELS)}


def pixels(index):
    rng = np.random.default_rng(index)
    return rng.integers(0, 256, (20 + index, 30, 3), dtype=np.uint8)


def jpeg(index, **options):
    file = io.BytesIO()
    Image.fromarray(pixels(index)).save(file, "JPEG", **options)
    return file.getvalue()


def write_pack(root, positions=range(4), *, decoded=False):
    root.mkdir(exist_ok=True)
    with open_pack(root, SOURCES) as writers:
        for i in positions:
            entry = pixels(i) if decoded else jpeg(i)
            writers["train"].add(i, entry, 20 + i, 30, decoded=decoded)
        finish_pack(root, writers, {"classes": ["a", "b"], "short_side": 256})
    return open_split(root)


def open_split(root):
    return PackedImages(root, "train", read_manifest(root)["splits"]["train"])


@pytest.mark.parametrize("decoded", [True, False])
def test_images_labels_and_names_come_back(tmp_path, decoded):
    source = write_pack(tmp_path, decoded=decoded)
    assert len(source) == 4 and source.labels.tolist() == [0, 0, 1, 1]
    assert source.labels.dtype == np.int64
    assert source.file_name(
        2
    ) == f"{tmp_path}/train.data: b/3.jpg" and "\udcff" in source.file_name(1)
    for i in range(4):
        image = torch.from_numpy(pixels(i)).permute(2, 0, 1)
        if not decoded:
            encoded = torch.frombuffer(bytearray(jpeg(i)), dtype=torch.uint8)
            image = decode_rgb(encoded, "x")
        assert torch.equal(source.read(i), image) and source.read(i).shape == (3, 20 + i, 30)
        source.check_header(i)


def test_a_pack_is_three_files(tmp_path):
    write_pack(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"train.data", "train.npy", MANIFEST}
    about = json.loads((tmp_path / MANIFEST).read_text())
    assert about["classes"] == ["a", "b"] and about["short_side"] == 256
    assert about["splits"]["train"]["images"] == 4


def test_it_has_no_object_per_image_and_is_sent_to_workers_as_a_path(tmp_path):
    source = write_pack(tmp_path, decoded=True)
    assert len(pickle.dumps(source)) < 1000
    again = pickle.loads(pickle.dumps(source))
    assert torch.equal(again.read(3), source.read(3))
    dataset = TrainSet(source, TrainTransform(16), 0)
    batch = collate([dataset[0, i] for i in range(4)])
    assert batch.image.shape == (4, 3, 16, 16) and batch.label.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("decoded", [True, False])
@pytest.mark.parametrize("byte", [0, 700, -1])
def test_one_wrong_byte_is_found_and_named_and_the_others_are_read(tmp_path, decoded, byte):
    source = write_pack(tmp_path, decoded=decoded)
    row = source.rows[1]
    at = int(row["offset"]) + byte % int(row["length"])
    data = bytearray((tmp_path / "train.data").read_bytes())
    data[at] ^= 4
    (tmp_path / "train.data").write_bytes(data)
    source = open_split(tmp_path)
    for look in (source.read, source.check_header):
        with pytest.raises(OSError, match="train.data: a/.*is damaged"):
            look(1)
    assert source.read(0).shape == (3, 20, 30) and source.read(2).shape == (3, 22, 30)
    sample = TrainSet(source, TrainTransform(16), 0)[0, 1]
    assert (sample.broken, sample.label) == (1, 0)  # as any broken image


@pytest.mark.parametrize(("limit", "value"), [("IMAGES", 3), ("BYTES", 4000)])
def test_a_batch_is_its_samples_one_by_one(tmp_path, monkeypatch, limit, value):
    monkeypatch.setattr(images, f"DECODED_{limit}", value)
    dataset = TrainSet(write_pack(tmp_path), TrainTransform(16), 0)
    keys = [(1, i % 4) for i in range(8)]
    batch = collate(dataset.__getitems__(keys))
    one_by_one = collate([dataset[key] for key in keys])
    assert all(torch.equal(a, b) for a, b in zip(batch, one_by_one, strict=True))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def grow(path):
    path.write_bytes(path.read_bytes() + b"x")


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("train.data", cut, r"train.data has [\d,]+ bytes, not [\d,]+ as packed"),
        ("train.data", grow, "train.data has"),
        ("train.npy", cut, "train.npy is damaged"),
        ("train.npy", flip, "train.npy is damaged"),
        ("train.data", lambda path: path.unlink(), "train images cannot be opened"),
        ("train.npy", lambda path: path.unlink(), "train images cannot be opened"),
        (MANIFEST, lambda path: path.write_text('{"format": 1, '), "packed.json cannot be read"),
        (MANIFEST, lambda path: path.write_text('{"format": 1}'), "packed.json cannot be read"),
        (MANIFEST, lambda path: path.write_text('{"format": 9}'), "has format 9"),
    ],
)
def test_files_that_differ_from_the_manifest_are_refused_in_one_line(
    tmp_path, file, damage, message
):
    write_pack(tmp_path)
    damage(tmp_path / file)
    with pytest.raises(UserError, match=message) as caught:
        open_split(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_images_left_out_keep_the_order_of_the_others(tmp_path):
    source = write_pack(tmp_path, [0, 3])
    assert source.rows["position"].tolist() == [0, 3] and source.labels.tolist() == [0, 1]


@pytest.mark.parametrize("end", ["return", "error", "interrupt"])
def test_a_pack_that_is_not_finished_leaves_nothing(tmp_path, end):
    with contextlib.suppress(OSError, KeyboardInterrupt), open_pack(tmp_path, SOURCES) as writers:
        writers["train"].add(0, jpeg(0), 20, 30, decoded=False)
        if end == "error":
            raise OSError(28, "No space left on device")
        if end == "interrupt":
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_killed_pack_is_recognised_and_the_next_one_starts_over(tmp_path):
    write_pack(tmp_path / "whole")
    (tmp_path / "parts").mkdir()
    kill = (
        "import os, sys; from pathlib import Path; import numpy as np\n"
        "from data.images import ImageFiles; from data.packed import finish_pack, open_pack\n"
        "source = ImageFiles(None, np.array([b'a']), np.array([0]))\n"
        "with open_pack(Path(sys.argv[1]), {'train': source}) as writers:\n"
        "    writers['train'].add(0, b'x' * 10_000_000, 1, 1, decoded=False)\n"
        "    os._exit(9)"
    )
    command = [sys.executable, "-c", kill, str(tmp_path / "parts")]
    assert subprocess.run(command, cwd=ROOT).returncode == 9
    assert is_interrupted(tmp_path / "parts") and not is_interrupted(tmp_path / "whole")
    assert not (tmp_path / "parts" / MANIFEST).exists()
    write_pack(tmp_path / "parts")
    assert not is_interrupted(tmp_path / "parts")
    for file in ("train.data", "train.npy", MANIFEST):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_what_an_earlier_version_left_unfinished_starts_over(tmp_path):
    for file in ("packing.json", "train.data", "train.rows"):
        (tmp_path / file).write_bytes(b"half a pack")
    assert is_interrupted(tmp_path)
    assert write_pack(tmp_path).read(0).shape == (3, 20, 30)
    assert {path.name for path in tmp_path.iterdir()} == {"train.data", "train.npy", MANIFEST}


def test_the_manifest_is_written_after_the_files_it_describes(tmp_path, monkeypatch):
    def die(path, value):
        assert (tmp_path / "train.data").stat().st_size == value["splits"]["train"]["data_bytes"]
        raise KeyboardInterrupt

    monkeypatch.setattr(packed, "write_json", die)
    with pytest.raises(KeyboardInterrupt):
        write_pack(tmp_path)
    assert not (tmp_path / MANIFEST).exists()


def test_workers_outlive_the_signals_that_stop_a_run():
    def signal_itself(position):
        os.kill(os.getpid(), signal.SIGTERM)
        return -position

    assert list(map_in_workers(signal_itself, np.array([3]), workers=1)) == [(3, -3)]


def test_results_of_workers_come_in_order_and_draw_no_random_number():
    state = torch.get_rng_state()
    for workers in (0, 2):
        assert list(map_in_workers(int.__neg__, np.array([4, 1, 3]), workers=workers)) == [
            (4, -4),
            (1, -1),
            (3, -3),
        ]
    assert torch.equal(torch.get_rng_state(), state)
