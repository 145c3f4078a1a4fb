"""data/packed.py: what is packed is read back, a pack that was stopped goes on, damage is named."""

import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from data import images, packed
from data.images import TrainSet, collate, decode_rgb, read_rgb
from data.packed import ABOUT, BEGUN, PackedImages, Packing, held, made, read_about, row_type
from data.transforms import TrainTransform

ROOT = Path(__file__).resolve().parent.parent
NAMES = np.array([b"a/1.jpg", b"a/\xff.jpg", b"b/3.jpg", b"b/4.jpg"])
LABELS = np.array([0, 0, 1, 1])


def pixels(index):
    rng = np.random.default_rng(index)
    return rng.integers(0, 256, (20 + index, 30, 3), dtype=np.uint8)


def jpeg(index, **options):
    file = io.BytesIO()
    Image.fromarray(pixels(index)).save(file, "JPEG", **options)
    return file.getvalue()


def begin(root, positions, *, decoded=False, settings=None):
    root.mkdir(exist_ok=True)
    packing = Packing(root, settings or {"short_side": 256})
    writer = packing.writer("train", NAMES, LABELS)
    for i in positions:
        entry = pixels(i) if decoded else jpeg(i)
        writer.add(i, entry, 20 + i, 30, decoded=decoded)
    return packing, writer


def finished(root, **options):
    packing, _ = begin(root, range(4), **options)
    packing.finish(["a", "b"])
    return opened(root)


def opened(root):
    return PackedImages(root, "train", read_about(root)["splits"]["train"])


@pytest.mark.parametrize("decoded", [True, False])
def test_images_labels_and_names_come_back(tmp_path, decoded):
    source = finished(tmp_path, decoded=decoded)
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


def test_nothing_is_left_but_data_index_and_what_describes_them(tmp_path):
    finished(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"train.data", "train.npy", ABOUT}
    about = json.loads((tmp_path / ABOUT).read_text())
    assert about["classes"] == ["a", "b"] and about["short_side"] == 256
    assert about["splits"]["train"]["images"] == 4


def test_it_holds_no_object_an_image_and_travels_to_workers_as_a_path(tmp_path):
    source = finished(tmp_path, decoded=True)
    assert len(pickle.dumps(source)) < 1000
    again = pickle.loads(pickle.dumps(source))
    assert torch.equal(again.read(3), source.read(3))
    dataset = TrainSet(source, TrainTransform(16), 0)
    batch = collate([dataset[0, i] for i in range(4)])
    assert batch.image.shape == (4, 3, 16, 16) and batch.label.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("decoded", [True, False])
@pytest.mark.parametrize("byte", [0, 700, -1])
def test_one_wrong_byte_is_found_and_named_and_the_others_are_read(tmp_path, decoded, byte):
    source = finished(tmp_path, decoded=decoded)
    row = source.rows[1]
    at = int(row["offset"]) + byte % int(row["length"])
    data = bytearray((tmp_path / "train.data").read_bytes())
    data[at] ^= 4
    (tmp_path / "train.data").write_bytes(data)
    source = opened(tmp_path)
    for look in (source.read, source.check_header):
        with pytest.raises(OSError, match="train.data: a/.*is damaged"):
            look(1)
    assert source.read(0).shape == (3, 20, 30) and source.read(2).shape == (3, 22, 30)
    sample = TrainSet(source, TrainTransform(16), 0)[0, 1]
    assert (sample.broken, sample.label) == (1, 0)  # as any broken image


def test_a_batch_is_its_samples_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "DECODED_AT_ONCE", 3)
    dataset = TrainSet(finished(tmp_path), TrainTransform(16), 0)
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
        (ABOUT, cut, "packed.json cannot be read"),
        (ABOUT, lambda path: path.write_text('{"format": 1}'), "packed.json cannot be read"),
        (ABOUT, lambda path: path.write_text('{"format": 9}'), "is of format 9"),
    ],
)
def test_files_that_are_not_as_packed_are_one_line(tmp_path, file, damage, message):
    finished(tmp_path)
    damage(tmp_path / file)
    with pytest.raises(UserError, match=message) as caught:
        opened(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_pack_that_was_stopped_goes_on_where_it_stood(tmp_path):
    finished(tmp_path / "whole")
    packing, writer = begin(tmp_path / "parts", [0, 1])
    writer.flush()
    del packing, writer  # killed: nothing is finished
    assert (tmp_path / "parts" / BEGUN).exists() and not (tmp_path / "parts" / ABOUT).exists()
    with open(tmp_path / "parts" / "train.data", "ab") as data:
        data.write(b"half an entry")  # written, and not yet spoken of
    with open(tmp_path / "parts" / "train.rows", "ab") as rows:
        rows.write(b"half a row")
    packing, writer = begin(tmp_path / "parts", [])
    assert writer.missing.tolist() == [2, 3]
    for i in (2, 3):
        writer.add(i, jpeg(i), 20 + i, 30, decoded=False)
    packing.finish(["a", "b"])
    for file in ("train.data", "train.npy", ABOUT):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


def test_rows_without_their_data_are_packed_again(tmp_path):
    _, writer = begin(tmp_path, [0, 1, 2])
    writer.flush()
    ends = np.fromfile(tmp_path / "train.rows", row_type(NAMES.dtype.itemsize))
    with open(tmp_path / "train.data", "r+b") as data:
        data.truncate(int(ends["offset"][2]) + 5)
    assert begin(tmp_path, [])[1].missing.tolist() == [2, 3]


def test_images_left_out_keep_the_order_of_the_others(tmp_path):
    begin(tmp_path, [3, 0])[0].finish(["a", "b"])
    source = opened(tmp_path)
    assert source.rows["position"].tolist() == [0, 3] and source.labels.tolist() == [0, 1]


def test_a_pack_begun_otherwise_is_refused(tmp_path):
    begin(tmp_path, [0])
    with pytest.raises(UserError, match=r"begun otherwise \(short_side\)"):
        begin(tmp_path, [], settings={"short_side": 128})


def test_data_are_written_before_the_rows_that_speak_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "FLUSH_BYTES", 1)
    _, writer = begin(tmp_path, [])
    for i in range(3):
        writer.add(i, jpeg(i), 20 + i, 30, decoded=False)
        rows = np.fromfile(tmp_path / "train.rows", row_type(NAMES.dtype.itemsize))
        assert len(rows) == i + 1
        assert (tmp_path / "train.data").stat().st_size == rows["offset"][-1] + rows["length"][-1]


def test_what_is_made_comes_in_order_from_any_number_of_workers():
    state = torch.get_rng_state()
    for workers in (0, 2):
        assert list(made(int.__neg__, np.array([4, 1, 3]), workers=workers)) == [
            (4, -4),
            (1, -1),
            (3, -3),
        ]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_folder_is_held_by_one_process(tmp_path):
    other = (
        "import sys; from pathlib import Path; from data.packed import held\n"
        "try:\n  with held(Path(sys.argv[1])): print('free')\n"
        "except BlockingIOError: print('held')"
    )

    def ask():
        return subprocess.run(
            [sys.executable, "-c", other, str(tmp_path)],
            cwd=ROOT,
            text=True,
            capture_output=True,
            check=True,
        ).stdout.strip()

    with held(tmp_path):
        assert ask() == "held"
    assert ask() == "free"


def turned(orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    return exif


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"subsampling": 0},
        {"exif": turned(6)},
        {"exif": turned(3)},
        {"keep_rgb": True},
        {"restart_marker_rows": 1},
        "L",
        "CMYK",
        "cut",
        "empty",
        "stray",
    ],
)
def test_torchcodec_and_pillow_give_the_same_pixels(tmp_path, monkeypatch, options):
    pytest.importorskip("torchcodec")
    path, image = tmp_path / "x.jpg", Image.fromarray(pixels(1))
    if isinstance(options, dict):
        image.save(path, "JPEG", **options)
    else:
        image.convert(options if options in ("L", "CMYK") else "RGB").save(path, "JPEG")
        data = path.read_bytes()
        path.write_bytes(
            {
                "cut": data[: len(data) // 2],
                "empty": b"",
                "stray": data[:2] + b"\0\0" + data[2:],
            }.get(options, data)
        )

    def read():
        try:
            return read_rgb(path)
        except OSError:
            return None

    fast = read()
    monkeypatch.setattr(images, "fast_jpeg", lambda: None)
    plain = read()
    assert (fast is None) == (plain is None) == (options in ("cut", "empty", "stray"))
    assert fast is None or torch.equal(fast, plain)


def test_torchcodec_is_used_where_it_is_installed(tmp_path, monkeypatch):
    pytest.importorskip("torchcodec")
    asked = []

    def decode_jpeg(data, mode):
        asked.append(mode)
        return torch.zeros(1, 2, 3, dtype=torch.uint8)

    monkeypatch.setattr(images, "fast_jpeg", lambda: decode_jpeg)
    (tmp_path / "x.jpg").write_bytes(jpeg(0))
    assert read_rgb(tmp_path / "x.jpg").shape == (3, 2, 3) and asked == ["UNCHANGED"]
