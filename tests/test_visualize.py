"""tools/visualize.py and what it reads out of a network with models/insight.py."""

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
from models.insight import channel_names, look_inside, view
from models.stci import STCI, direction_kernels
from tools import visualize

TWISTNETS = ["twistnet18", "twistnet18_no_spiral", "twistnet18_no_ais", "twistnet18_first_order"]
CLASSES = ["$banded$", "dotted"]


def make(name="twistnet18"):
    """A network whose every part matters to its output."""
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


def call(*words):
    visualize.main([*map(str, words), "--checkpoint", "best.pt", "--out", "seen"])


@pytest.mark.parametrize("name", TWISTNETS)
def test_what_is_read_out_is_what_the_network_computes(name):
    model, images = make(name), torch.randn(2, 3, 64, 96)
    logits, class_maps, views = look_inside(model, images)
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


def test_shares_are_those_of_the_channels_terms_in_the_output():
    """Each term is found by taking its channel's column out of the projection."""
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
            f = stci.interact(*stci.look(h))
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
        shares = view(stci, 0.1, h).shares.flatten()
    torch.testing.assert_close(shares, sizes / sizes.sum(), atol=1e-5, rtol=1e-3)


def test_names_and_kernels_by_hand():
    names = channel_names()
    assert names[:3] == ["z0", "z1", "z2"] and len(names) == 44
    assert names[8:10] + names[16:17] + names[-1:] == ["z0·t0", "z0·t1", "z1·t1", "z7·t7"]
    assert channel_names(second_order=False) == names[:8]
    stci = STCI(16).eval()
    torch.nn.init.constant_(stci.twist.scale, 3.0)
    kernels = view(stci, 0.1, torch.randn(1, 16, 4, 4)).kernels
    assert torch.equal(kernels[1, 5], 3 * direction_kernels()[1])
    assert kernels[1, 5, 2, 2] == 1.5  # down and to the right


@pytest.mark.parametrize("name", TWISTNETS)
def test_a_page_a_picture(name, capsys):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    write_checkpoint(name)
    write_image("a/$x$.png")
    call("a")
    assert capsys.readouterr().out == "wrote seen/$x$.png\n"
    with Image.open("seen/$x$.png") as page:
        assert page.size[0] == 1440 and len(page.convert("L").getcolors()) > 50


def test_pictures_of_one_name_get_a_page_each(capsys):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    write_checkpoint()
    write_image("a/x.png")
    write_image("b/x.png")
    call("a/x.png", "b/x.png", "--block", "layer4.0")
    assert capsys.readouterr().out == "wrote seen/x.png\nwrote seen/x-2.png\n"
    assert Path("seen/x.png").is_file() and Path("seen/x-2.png").is_file()


def test_classes_are_compared_by_the_mean_of_their_images(capsys):
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
    means = [
        look_inside(model, image)[2]["layer4.0"].weights[0, 2].mean().item() for image in images
    ]
    assert row["images"] == "3"
    assert float(row["mean"]) == pytest.approx(np.mean(means), abs=2e-6)
    assert float(row["std"]) == pytest.approx(np.std(means, ddof=1), abs=2e-6)


def test_unreadable_images_are_named_counted_and_end_in_1(capsys):
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


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    write_checkpoint()
    write_image("x.png")
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.font_manager"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        call("x.png")


@pytest.mark.parametrize(
    ("name", "words", "told"),
    [
        ("resnet18", ["x.png"], "no STCI to look into"),
        ("twistnet18", ["none.png"], "none.png: no such file"),
        ("twistnet18", ["empty"], "empty: no images"),
        ("twistnet18", ["x.png", "--block", "layer2.0"], "there are layer3.0, layer3.1"),
        ("twistnet18_no_ais", ["data"], "has no AIS"),
        ("twistnet18", ["data"], "data/dotted: no image"),
    ],
)
def test_wrong_input_is_one_line(name, words, told):
    write_checkpoint(name)
    write_image("x.png")
    Path("empty").mkdir()
    Path("data/dotted").mkdir(parents=True)
    with pytest.raises(ValueError, match=told) as error:
        call(*words)
    assert "\n" not in str(error.value)


def test_an_output_folder_that_cannot_be_made_is_one_line():
    write_checkpoint()
    write_image("x.png")
    Path("seen").write_text("a file")
    with pytest.raises(ValueError, match="seen"):
        call("x.png")


def test_no_model_error_escapes_its_class():
    with pytest.raises(UserError):
        look_inside(build_model("seresnet18", 2), torch.randn(1, 3, 64, 64))
