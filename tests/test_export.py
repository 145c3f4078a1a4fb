"""tools/export.py: both formats, read back without this project's code."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UserError
from data.transforms import IMAGENET_MEAN, IMAGENET_STD
from models import build_model
from tools import export

CLASSES = ["banded", "müll", "woven"]
ONNX = ("onnx", "onnxscript", "onnxruntime")


def write_checkpoint(name="resnet18"):
    """Write a best.pt whose BatchNorm statistics and classifier matter; returns its network."""
    torch.manual_seed(0)
    model = build_model(name, len(CLASSES))
    torch.nn.init.normal_(model.fc.weight)
    model.train()(torch.randn(8, 3, 64, 64))
    torch.save(
        {
            "model": model.state_dict(),
            "classes": CLASSES,
            "config": {"model": name, "img_size": 40},
        },
        "best.pt",
    )
    return model.eval()


def wanted(model, images):
    """Logits of images from 0 to 1, normalised with torchvision's constants."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        return model((images - mean) / std)


def call(out):
    export.main(["--weights", "best.pt", "--out", out])


def test_pt2_file_gives_the_networks_logits_at_any_size(capsys):
    model = write_checkpoint("twistnet18")
    call("x.pt2")
    out = capsys.readouterr().out
    sizes = ["1 x 3 x 40 x 40", "1 x 3 x 72 x 101", "3 x 3 x 40 x 40", "3 x 3 x 72 x 101"]
    assert [line.split(":")[0] for line in out.splitlines()[:4]] == sizes
    assert "largest difference of a logit: " in out and "RGB from 0 to 1" in out
    about = {"about.json": ""}
    exported = torch.export.load("x.pt2", extra_files=about).module()
    images = torch.rand(5, 3, 33, 70)
    torch.testing.assert_close(exported(images), wanted(model, images), atol=1e-4, rtol=1e-4)
    about = json.loads(about["about.json"])
    assert about["classes"] == CLASSES and about["img_size"] == 40
    assert about["model"] == "twistnet18"
    assert [path.name for path in Path().iterdir() if path.name != "best.pt"] == ["x.pt2"]


def test_onnx_file_gives_the_networks_logits_at_any_size():
    for package in ONNX:
        pytest.importorskip(package, reason=f"pip install {' '.join(ONNX)}")
    import onnx
    import onnxruntime

    model = write_checkpoint("twistnet18")
    call("x.onnx")
    session = onnxruntime.InferenceSession("x.onnx", providers=["CPUExecutionProvider"])
    images = torch.rand(5, 3, 33, 70)
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    np.testing.assert_allclose(logits, wanted(model, images), atol=1e-4, rtol=1e-4)
    about = {entry.key: entry.value for entry in onnx.load("x.onnx").metadata_props}
    assert json.loads(about["classes"]) == CLASSES and about["model"] == "twistnet18"
    assert sorted(path.name for path in Path().iterdir()) == ["best.pt", "x.onnx"]


@pytest.mark.parametrize("suffix", export.FORMATS)
def test_a_full_disk_is_one_line(full_disk, suffix):
    write_checkpoint()
    if suffix == ".onnx":
        pytest.importorskip("onnxscript", reason="pip install onnx onnxscript onnxruntime")
    with full_disk(), pytest.raises(UserError, match="cannot be written"):
        call(f"x{suffix}")


def test_a_difference_writes_nothing_and_the_exit_code_is_1(monkeypatch):
    write_checkpoint()
    monkeypatch.setattr(export, "IMAGENET_STD", (0.23, 0.224, 0.225))  # one digit off
    with pytest.raises(SystemExit, match="other logits") as ended:
        call("x.pt2")
    assert ended.value.code != 0 and not Path("x.pt2").exists()


@pytest.mark.parametrize("package", ONNX)
def test_without_the_onnx_packages_the_error_says_what_to_install(package, monkeypatch):
    for name in ONNX:
        monkeypatch.setitem(sys.modules, name, None if name == package else sys)
    with pytest.raises(UserError, match=f"needs {package}: pip install {' '.join(ONNX)}"):
        call("x.onnx")


@pytest.mark.parametrize(
    ("checkpoint", "out", "told"),
    [
        ("best.pt", "x.pt", "must end in .pt2 or .onnx"),
        ("best.pt", "no/x.pt2", "there is no folder no"),
        ("none.pt", "x.pt2", "none.pt"),
    ],
)
def test_wrong_input_is_a_one_line_error(checkpoint, out, told):
    write_checkpoint()
    with pytest.raises(UserError, match=told) as error:
        export.main(["--weights", checkpoint, "--out", out])
    assert "\n" not in str(error.value) and not Path(out).exists()
