"""data/decoding.py: every pixel mode is scaled right or refused, and errors name the file."""

import errno
import os
import struct
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from data import decoding
from data.decoding import check_header, read_rgb

COLOUR = (200, 40, 90)
GREY = round(0.299 * 200 + 0.587 * 40 + 0.114 * 90)


def flat(mode="RGB"):
    return Image.new("RGB", (20, 12), COLOUR).convert(mode, palette=Image.Palette.ADAPTIVE)


def photo(seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


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
def test_common_formats_are_read_as_rgb(tmp_path, name, mode, expected, tolerance):
    flat(mode).save(tmp_path / name)
    image = read_rgb(tmp_path / name)
    assert image.dtype == torch.uint8 and image.shape == (3, 12, 20)
    if expected:
        error = (image.int() - torch.tensor(expected).view(3, 1, 1)).abs().max()
        assert error <= tolerance
    else:
        assert set(image.unique().tolist()) <= {0, 255}


def test_a_png_named_jpeg_is_read_by_its_content(tmp_path):
    photo(0).save(tmp_path / "x.JPEG", format="PNG")
    expected = torch.from_numpy(np.array(photo(0))).permute(2, 0, 1)
    assert torch.equal(read_rgb(tmp_path / "x.JPEG"), expected)


GREY16 = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)


def write_pgm(path, pixels, maximum):
    header = f"P5 {pixels.shape[1]} {pixels.shape[0]} {maximum}\n".encode()
    path.write_bytes(header + pixels.astype(">u2").tobytes())


def write_tiff(path, pixels, *, bits, kind=1, white_is_zero=False):
    """A TIFF of one strip; `pixels` are its bytes, `kind` 1 unsigned, 2 signed, 3 float."""
    tags = {256: 8, 257: 8, 258: bits, 259: 1, 262: 0 if white_is_zero else 1, 277: 1, 278: 8}
    tags |= {279: len(pixels), 339: kind}
    start = 8 + 2 + 12 * (len(tags) + 1) + 4
    tags[273] = start
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    header = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    path.write_bytes(header + pixels)


def pack_12_bits(values):
    pairs = values.reshape(-1, 2).astype(int)
    triples = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1]])
    return (triples.T & 255).astype(np.uint8).tobytes()


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("kind", ["png", "tiff", "pgm", "pgm of 12 bits", "12 bits", "inverted"])
def test_grey_of_more_than_8_bits_is_scaled_by_the_range_of_its_format(tmp_path, kind, big_endian):
    path = tmp_path / "x"
    if kind in ("png", "tiff"):
        pixels = Image.fromarray(GREY16.astype(">u2" if big_endian else "<u2"))
        assert pixels.mode == ("I;16B" if big_endian else "I;16")
        pixels.save(path, kind)
    elif kind == "pgm":
        write_pgm(path, GREY16, 65535)
    elif kind == "pgm of 12 bits":
        write_pgm(path, GREY16 >> 4, 4095)
    elif kind == "12 bits":
        write_tiff(path, pack_12_bits(GREY16 >> 4), bits=12)
    else:
        write_tiff(path, (65535 - GREY16).astype("<u2").tobytes(), bits=16, white_is_zero=True)
    check_header(path)
    image = read_rgb(path)
    assert image.shape == (3, 8, 8)
    for channel in image:
        assert np.abs(channel.int().numpy() - (GREY16 >> 8)).max() <= 1


@pytest.mark.parametrize("dtype", ["float32", "int16", "int32", "uint32"])
def test_values_from_0_to_255_are_kept_whatever_their_type(tmp_path, dtype):
    values = np.arange(64).reshape(8, 8) * 4
    kind = {"f": 3, "i": 2, "u": 1}[np.dtype(dtype).kind]
    bits = 8 * np.dtype(dtype).itemsize
    write_tiff(tmp_path / "x.tif", values.astype(dtype).tobytes(), bits=bits, kind=kind)
    assert np.array_equal(read_rgb(tmp_path / "x.tif")[1].numpy(), values)


def test_floats_from_0_to_1_are_scaled(tmp_path):
    values = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(values).save(tmp_path / "x.tif")
    assert np.array_equal(read_rgb(tmp_path / "x.tif")[2].numpy(), np.rint(values * 255))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((8, 8), 300.0, np.float32), "mode F with values from 300 to 300"),
        (np.full((8, 8), -0.5, np.float32), "mode F with values from -0.5 to -0.5"),
        (np.full((8, 8), np.nan, np.float32), "mode F with values from nan"),
        (GREY16.astype(np.int32), "mode I with values from 0 to 65535"),
        (np.full((8, 8), -1, np.int32), "mode I with values from -1 to -1"),
    ],
)
def test_values_without_a_known_range_are_refused_by_name(tmp_path, values, message):
    Image.fromarray(values).save(tmp_path / "x.tif")
    with pytest.raises(OSError, match=rf"x.tif cannot .*{message}.*convert the file") as caught:
        read_rgb(tmp_path / "x.tif")
    assert "\n" not in str(caught.value)


def convert(mode):
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        transform = ImageCms.buildTransformFromOpenProfiles(*profiles, "RGB", "LAB")
        return ImageCms.applyTransform(flat(), transform)
    through = {"RGBa": "RGBA", "La": "LA", "PA": "P"}.get(mode, "RGB")
    return flat(through).convert(mode, palette=Image.Palette.ADAPTIVE)


@pytest.mark.parametrize("mode", [*decoding.CONVERTIBLE, "F", "I"])
def test_every_mode_that_pillow_has_becomes_rgb(mode):
    image = np.asarray(decoding.to_rgb(convert(mode))).astype(int)
    assert image.shape == (12, 20, 3)
    expected = (GREY,) * 3 if mode in ("L", "LA", "La", "I", "F") else COLOUR
    if mode == "1":
        assert set(image.flat) <= {0, 255}
    else:
        assert np.abs(image - expected).max() <= (15 if mode in ("P", "PA") else 6)


def test_an_unknown_mode_is_refused_by_its_name(tmp_path, monkeypatch):
    flat("CMYK").save(tmp_path / "x.tif")
    monkeypatch.setattr(decoding, "CONVERTIBLE", ("RGB",))
    with pytest.raises(OSError, match="x.tif cannot .*pixel mode CMYK is not supported"):
        read_rgb(tmp_path / "x.tif")
    with pytest.raises(OSError, match="x.tif cannot .*pixel mode CMYK is not supported"):
        check_header(tmp_path / "x.tif")


@pytest.mark.parametrize("read", [read_rgb, check_header])
def test_pillow_prints_no_warnings(tmp_path, monkeypatch, read):
    flat().save(tmp_path / "exif.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x1a\x01junk")
    palette = flat("P")
    palette.save(tmp_path / "palette.png", transparency=bytes(range(3)))
    flat().save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12 * 20 - 1)  # warns above, refuses above twice
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("exif.jpg", "palette.png", "large.png"):
            read(tmp_path / name)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_a_file_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"x.{suffix}"
    flat().save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 12 * 20 // 2 - 1)
    monkeypatch.setattr(decoding, "MAX_PIXELS", 2 * Image.MAX_IMAGE_PIXELS)
    with pytest.raises(OSError, match=rf"x.{suffix} cannot be read as an image .*240 pixels"):
        read_rgb(path)


@pytest.mark.parametrize("damage", [lambda d: d[: len(d) // 2], lambda d: b"", lambda d: b"no" * 9])
def test_a_file_that_is_not_an_image_is_an_oserror_that_names_it(tmp_path, damage):
    photo(0).save(tmp_path / "x.jpg")
    (tmp_path / "x.jpg").write_bytes(damage((tmp_path / "x.jpg").read_bytes()))
    with pytest.raises(OSError, match=r"x\.jpg cannot be read as an image"):
        read_rgb(tmp_path / "x.jpg")
    with pytest.raises(OSError, match="missing.jpg cannot be read"):
        read_rgb(tmp_path / "missing.jpg")


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
    path, image = tmp_path / "x.jpg", photo(1)
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
    monkeypatch.setattr(decoding, "fast_jpeg", lambda: None)
    plain = read()
    assert (fast is None) == (plain is None) == (options in ("cut", "empty", "stray"))
    assert fast is None or torch.equal(fast, plain)


def test_torchcodec_is_used_where_it_is_installed(tmp_path, monkeypatch):
    pytest.importorskip("torchcodec")
    asked = []

    def decode_jpeg(data, mode):
        asked.append(mode)
        return torch.zeros(1, 2, 3, dtype=torch.uint8)

    monkeypatch.setattr(decoding, "fast_jpeg", lambda: decode_jpeg)
    photo(0).save(tmp_path / "x.jpg")
    assert read_rgb(tmp_path / "x.jpg").shape == (3, 2, 3) and asked == ["UNCHANGED"]


def test_an_error_of_the_disk_names_the_file(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))  # as file.readinto

    monkeypatch.setattr(decoding, "RETRY_AFTER", ())
    monkeypatch.setattr(decoding, "_read_once", fail)
    with pytest.raises(OSError, match="Input/output error: .*x.jpg"):
        read_rgb(tmp_path / "x.jpg")
