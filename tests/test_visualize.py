"""tools/visualize: what it reads out of a network, the pages it draws, the files it may write."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from data.images import read_rgb
from data.transforms import EvalTransform, normalise
from models import build_model
from models.stci import STCI, direction_kernels
from tools.visualize import __main__ as visualize
from tools.visualize.network import describe_block, describe_network, name_channels

TWISTNETS = ["twistnet18", "twistnet18_no_spiral", "twistnet18_no_ais", "twistnet18_first_order"]
CLASSES = ["$banded$", "dotted"]


def make(name="twistnet18"):
    """A network in which every part changes the output."""
    torch.manual_seed(0)
    model = build_model(name, len(CLASSES))
    for key, parameter in model.named_parameters():
        if ".norm." in key or ".proj" in key or key.startswith("fc."):
            torch.nn.init.normal_(parameter)
    model.train()(torch.randn(8, 3, 64, 64))
    return model.eval()


def write_checkpoint(name="twistnet18"):
    model = make(name)
    torch.save(
        {
            "model": model.state_dict(),
            "classes": CLASSES,
            "config": {"model": name, "img_size": 64},
        },
        "best.pt",
    )
    return model


def write_image(path, seed=0):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def call(*words, out="seen"):
    visualize.main([*map(str, words), "--weights", "best.pt", "--out", str(out)])


def refusal_of(*words, out="seen"):
    with pytest.raises(UserError) as error:
        call(*words, out=out)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", TWISTNETS)
def test_logits_maps_and_weights_are_those_of_the_forward_pass(name):
    model, images = make(name), torch.randn(2, 3, 64, 96)
    logits, class_maps, views = describe_network(model, images)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(images), atol=1e-4, rtol=1e-4)
    assert class_maps.shape == (2, 2, 2, 3)
    assert list(views) == ["layer3.0", "layer3.1", "layer4.0", "layer4.1"]
    features = 8 if name == "twistnet18_first_order" else 44
    assert views["layer3.1"].maps.shape == (2, 4, features, 4, 6)
    assert (views["layer3.1"].weights is None) == (name == "twistnet18_no_ais")
    assert (views["layer3.1"].kernels is None) == (
        name in ("twistnet18_no_spiral", "twistnet18_first_order")
    )
    assert views["layer3.1"].gate == pytest.approx(0.1192, abs=1e-4)
    assert not any(m._forward_pre_hooks for m in model.modules())
    for seen in views.values():
        torch.testing.assert_close(seen.shares.sum((1, 2)), torch.ones(2))


def test_shares_match_removing_each_channel_from_the_projection():
    """The reference sets one column of the projection to zero at a time."""
    torch.manual_seed(0)
    stci, h = STCI(16).eval(), torch.randn(1, 16, 5, 6)
    for part in (stci.norm, stci.proj_bn):
        torch.nn.init.normal_(part.weight)
        torch.nn.init.normal_(part.bias)
    with torch.no_grad():
        whole, sizes = stci(h), []
        for channel in range(176):
            column = stci.proj.weight[:, channel].clone()
            stci.proj.weight[:, channel] = 0
            term = (whole - stci(h))[0]
            # without what is constant: the norm's shift of this channel
            bn = stci.proj_bn.weight * (1 + stci.proj_bn.eps) ** -0.5
            f = stci.interact(*stci.reduce_and_twist(h))
            f = f * stci.ais(f.mean((2, 3)))[:, :, None, None]
            group = f[0, channel // 8 * 8 : channel // 8 * 8 + 8]
            shift = (
                stci.norm.bias[channel]
                - stci.norm.weight[channel]
                * group.mean()
                / (group.var(correction=0) + stci.norm.eps).sqrt()
            )
            term -= (shift * bn * column[:, 0, 0])[:, None, None]
            sizes.append(term.norm(dim=0).mean())
            stci.proj.weight[:, channel] = column
        sizes = torch.stack(sizes)
        shares = describe_block(stci, 0.1, h).shares.flatten()
    torch.testing.assert_close(shares, sizes / sizes.sum(), atol=1e-5, rtol=1e-3)


def test_channel_names_and_learnt_kernels_by_hand():
    names = name_channels()
    assert names[:3] == ["z0", "z1", "z2"] and len(names) == 44
    assert names[8:10] + names[16:17] + names[-1:] == ["z0·t0", "z0·t1", "z1·t1", "z7·t7"]
    assert name_channels(second_order=False) == names[:8]
    stci = STCI(16).eval()
    torch.nn.init.constant_(stci.twist.scale, 3.0)
    kernels = describe_block(stci, 0.1, torch.randn(1, 16, 4, 4)).kernels
    assert torch.equal(kernels[1, 5], 3 * direction_kernels()[1])
    assert kernels[1, 5, 2, 2] == 1.5  # down and to the right


@pytest.mark.parametrize("name", TWISTNETS)
def test_each_picture_gets_a_page(name, capsys):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    write_checkpoint(name)
    write_image("a/$x$.png")
    call("a")
    assert capsys.readouterr().out == "wrote seen/$x$.png\n"
    with Image.open("seen/$x$.png") as page:
        assert page.size[0] == 1440 and len(page.convert("L").getcolors()) > 50


def test_pictures_with_equal_names_get_separate_pages(capsys):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    write_checkpoint()
    write_image("a/x.png")
    write_image("b/x.png")
    call("a/x.png", "b/x.png", "--block", "layer4.0")
    assert capsys.readouterr().out == "wrote seen/x.png\nwrote seen/x-2.png\n"
    assert Path("seen/x.png").is_file() and Path("seen/x-2.png").is_file()


def test_classes_are_compared_by_the_mean_over_their_images(capsys):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    model = write_checkpoint()
    files = [f"data/{name}/{i}.png" for name in ("dotted", "$banded$") for i in range(3)]
    for seed, file in enumerate(files):
        write_image(file, seed)
    call("data")
    assert Path("seen/ais_by_class.png").is_file()
    assert capsys.readouterr().out == "wrote seen/ais_by_class.png and ais_by_class.csv\n"
    with open("seen/ais_by_class.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 4 * 4
    row = next(
        r for r in rows if (r["class"], r["block"], r["direction"]) == ("dotted", "layer4.0", "90")
    )
    images = [normalise(EvalTransform(64)(read_rgb(Path(file)))[None]) for file in files[:3]]
    views = [describe_network(model, image)[2]["layer4.0"] for image in images]
    means = [view.weights[0, 2].mean().item() for view in views]
    assert row["images"] == "3"
    assert float(row["mean"]) == pytest.approx(np.mean(means), abs=2e-6)
    assert float(row["std"]) == pytest.approx(np.std(means, ddof=1), abs=2e-6)


def test_unreadable_images_are_named_and_counted_and_the_exit_code_is_1(capsys):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    write_checkpoint()
    write_image("data/dotted/1.png")
    Path("data/dotted/bad.png").write_bytes(b"no image")
    with pytest.raises(SystemExit) as ended:
        call("data")
    assert ended.value.code == 1
    err = capsys.readouterr().err.splitlines()
    assert any("data/dotted/bad.png" in line for line in err)
    assert err[-1] == "1 images cannot be read"
    assert Path("seen/ais_by_class.png").is_file()


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    write_checkpoint()
    write_image("x.png")
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.font_manager"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        call("x.png")


@pytest.mark.parametrize(
    ("name", "words", "told"),
    [
        ("resnet18", ["x.png"], "no STCI to visualize"),
        ("twistnet18", ["none.png"], "none.png: no such file"),
        ("twistnet18", ["empty"], "empty: no images"),
        ("twistnet18", ["x.png", "--block", "layer2.0"], "choose one of layer3.0, layer3.1"),
        ("twistnet18_no_ais", ["classes"], "has no AIS"),
        ("twistnet18", ["data"], "data: no images"),
    ],
)
def test_wrong_input_is_a_one_line_error(name, words, told):
    write_checkpoint(name)
    write_image("x.png")
    write_image("classes/dotted/1.png")
    Path("empty").mkdir()
    Path("data/dotted").mkdir(parents=True)
    with pytest.raises(ValueError, match=told) as error:
        call(*words)
    assert "\n" not in str(error.value)


def test_an_output_folder_that_cannot_be_created_is_a_one_line_error():
    write_checkpoint()
    write_image("x.png")
    Path("seen").write_text("a file")
    with pytest.raises(ValueError, match="seen"):
        call("x.png")


def test_a_folder_of_png_images_is_not_overwritten_by_its_pages():
    write_checkpoint()
    for name in ("a", "b"):
        write_image(f"pictures/{name}.png")
    before = {path: path.read_bytes() for path in Path("pictures").iterdir()}
    assert "which is one of the inputs" in refusal_of("pictures", out="pictures")
    assert {path: path.read_bytes() for path in Path("pictures").iterdir()} == before


@pytest.mark.parametrize("name", ["x.png", "ais_by_class.png", "ais_by_class.csv"])
def test_files_that_the_tool_did_not_write_are_not_overwritten(name):
    write_checkpoint()
    write_image("x.jpg")
    write_image("data/dotted/1.jpg")
    Path("seen").mkdir()
    Path("seen", name).write_text("mine")
    message = refusal_of("x.jpg", "data")
    assert f"seen/{name}, which this tool did not write" in message
    assert Path("seen", name).read_text() == "mine"
    assert [path.name for path in Path("seen").iterdir()] == [name]  # refused before the first page


def test_a_link_from_a_page_to_a_picture_is_not_followed():
    write_checkpoint()
    write_image("x.jpg")
    write_image("other.png")
    other = Path("other.png").read_bytes()
    Path("seen").mkdir()
    Path("seen/x.png").symlink_to(Path("other.png").resolve())
    assert "did not write" in refusal_of("x.jpg")
    assert Path("other.png").read_bytes() == other


def test_pages_and_tables_of_an_earlier_call_are_replaced():
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    write_checkpoint()
    write_image("x.jpg")
    write_image("data/dotted/1.jpg")
    call("x.jpg", "data")
    before = Path("seen/x.png").read_bytes()
    call("x.jpg", "data", "--block", "layer4.0")
    assert Path("seen/x.png").read_bytes() != before
    assert "one of the inputs" in refusal_of("seen/x.png")  # the page itself is an input here


def test_a_folder_with_pictures_and_class_folders_gives_both(capsys):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    write_checkpoint()
    write_image("data/x.png")
    write_image("data/dotted/1.png")
    Path("data/notes.txt").write_text("")
    Path("data/dotted/old.gif").write_bytes(b"")
    call("data")
    out, err = capsys.readouterr()
    assert out == "wrote seen/x.png\nwrote seen/ais_by_class.png and ais_by_class.csv\n"
    assert err.splitlines()[0].startswith("data: ignored by their names: 1 .txt, 1 .gif (images")


def test_names_that_are_not_utf8_are_drawn_and_printed(capsys):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    write_checkpoint()
    name = b"caf\xe9".decode("utf-8", "surrogateescape")
    write_image("x.png")
    Path("x.png").rename(f"{name}.png")
    write_image("classes/x/1.png")
    Path("classes/x").rename(f"classes/{name}")
    call(f"{name}.png", "classes")
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "wrote seen/caf\\xe9.png" and Path(f"seen/{name}.png").is_file()
    assert b"\ncaf\xe9,1," in Path("seen/ais_by_class.csv").read_bytes()


def test_checkpoint_is_accepted_as_another_name_of_weights():
    words = ["x.png", "--out", "seen", "--checkpoint", "best.pt"]
    assert visualize.parse_args(words).weights == Path("best.pt")
