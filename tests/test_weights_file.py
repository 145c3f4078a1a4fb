"""models/weights_file.py: files of weights as other programs write them, and damaged ones."""

import argparse
import collections
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from common.errors import UserError
from models.weights_file import read_weights

STATE = {"conv1.weight": torch.arange(6.0).view(2, 3), "fc.bias": torch.tensor([1.0, -1.0])}
OTHER = {name: x + 1 for name, x in STATE.items()}


def read(content, path="x.pt"):
    """What read_weights makes of an object that torch.save has written."""
    torch.save(content, path)
    return read_weights(Path(path))


def contains(file, state):
    return set(file.tensors) == set(state) and all(
        torch.equal(file.tensors[name], x) for name, x in state.items()
    )


def error_of(path):
    """The error of a file that must be refused: one line that names it."""
    with pytest.raises(UserError) as error:
        read_weights(Path(path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


def prefixed(prefix):
    return {prefix + name: x for name, x in STATE.items()}


def write_safetensors(path, state, *, cut=0):
    """The format by hand: a length, JSON with the place of each tensor, and the numbers."""
    header, numbers = {"__metadata__": {"format": "pt"}}, b""
    for name, x in state.items():
        data = x.numpy().tobytes()
        place = [len(numbers), len(numbers) + len(data)]
        header[name] = {"dtype": "F32", "shape": list(x.shape), "data_offsets": place}
        numbers += data
    text = json.dumps(header).encode()
    content = struct.pack("<Q", len(text)) + text + numbers
    Path(path).write_bytes(content[: len(content) - cut])


# ---------------------------------------------------------------- containers


@pytest.mark.parametrize(
    "key", ["model", "state_dict", "model_state_dict", "model_state", "net", "network", "weights"]
)
def test_a_state_dict_inside_a_checkpoint_is_found(key):
    file = read({"epoch": 3, key: STATE, "optimizer": {"state": {}}})
    assert contains(file, STATE) and file.ema is None


def test_a_state_dict_two_levels_down_is_found():
    assert contains(read({"model": {"state_dict": STATE, "version": 2}, "epoch": 1}), STATE)


@pytest.mark.parametrize("prefix", ["model.", "net.", "model.module.", "module.model._orig_mod."])
def test_a_network_inside_a_larger_module_is_found(prefix):
    """Lightning saves the attributes of its module, so that all names begin with one of them."""
    content = {"state_dict": prefixed(prefix), "pytorch-lightning_version": "2.5", "callbacks": {}}
    assert contains(read(content), STATE)


def test_wrappers_in_the_middle_of_names_are_removed():
    names = {"layer1._orig_mod.0.weight": STATE["fc.bias"], "stem.module.x": STATE["fc.bias"]}
    torch.save({"layer3.0.stci." + name: x for name, x in names.items()}, "x.pt")
    assert list(read_weights(Path("x.pt")).tensors) == [
        "layer3.0.stci.layer1.0.weight",
        "layer3.0.stci.stem.x",
    ]


def test_one_tensor_with_and_without_a_wrapper_is_refused():
    torch.save(STATE | {"module.fc.bias": torch.zeros(2)}, "x.pt")
    assert "two tensors for fc.bias" in error_of("x.pt")


def test_files_without_a_state_dict_are_refused_with_their_entries():
    for content in ({}, [torch.ones(1)], {"model": {}}, {"epoch": 3, "model": None}, torch.ones(2)):
        torch.save(content, "x.pt")
        assert "has no state dict" in error_of("x.pt")
    torch.save({"epoch": 3, "generator": STATE}, "x.pt")
    assert "(its entries: epoch, generator)" in error_of("x.pt")


# ---------------------------------------------------------------- moving averages


@pytest.mark.parametrize(
    ("key", "ema_key"), [("state_dict", "state_dict_ema"), ("model", "model_ema"), ("model", "ema")]
)
def test_the_moving_average_is_taken_and_named(key, ema_key):
    file = read({key: OTHER, ema_key: STATE, "epoch": 3})
    assert contains(file, STATE)
    assert file.ema == (f"Took {ema_key} (exponential moving average) of x.pt, not its {key}")


def test_a_moving_average_that_was_off_is_passed_over():
    file = read({"state_dict": STATE, "state_dict_ema": None, "model_ema": {}})
    assert contains(file, STATE) and file.ema is None


def test_an_averaged_models_own_state_dict_is_read():
    """As torchvision's reference scripts save it, under model_ema beside their arguments."""
    network = nn.Sequential(collections.OrderedDict(conv1=nn.Linear(2, 3), fc=nn.Linear(3, 2)))
    averaged = torch.optim.swa_utils.AveragedModel(network, use_buffers=True)
    state = averaged.state_dict()
    assert "n_averaged" in state and "module.conv1.weight" in state
    assert contains(read(state), network.state_dict())
    arguments = argparse.Namespace(lr=0.5, output_dir=Path("out"), model="resnet18")
    file = read({"model": OTHER, "model_ema": state, "args": arguments})
    assert contains(file, network.state_dict()) and "not its model" in file.ema


# ---------------------------------------------------------------- other values in a checkpoint


@pytest.mark.parametrize(
    "value",
    [np.float64(71.2), np.float32(71.2), np.int64(3), np.bool_(True)],
    ids=lambda value: type(value).__name__,
)
def test_numpy_scalars_do_not_spoil_a_checkpoint(value):
    assert contains(read({"state_dict": STATE, "best_acc1": value}), STATE)


def test_arguments_paths_and_versions_do_not_spoil_a_checkpoint():
    extras = {"args": argparse.Namespace(lr=1), "data": Path("/data"), "torch": torch.__version__}
    assert contains(read({"state_dict": STATE, **extras}), STATE)


def test_a_pickled_module_is_refused_by_the_name_of_its_class():
    torch.save(nn.Linear(2, 2), "x.pt")
    message = error_of("x.pt")
    assert "torch.nn.modules.linear.Linear" in message and "ask for its plain state dict" in message


# ---------------------------------------------------------------- safetensors


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_safetensors_files_are_read_whatever_their_name(name):
    pytest.importorskip("safetensors", reason="pip install safetensors")
    write_safetensors(name, STATE)
    assert contains(read_weights(Path(name)), STATE)


def test_without_the_package_a_safetensors_file_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    write_safetensors("x.safetensors", STATE)
    assert "pip install safetensors" in error_of("x.safetensors")


def test_a_torn_safetensors_file_is_damaged():
    pytest.importorskip("safetensors", reason="pip install safetensors")
    write_safetensors("x.safetensors", STATE, cut=5)
    assert "is damaged" in error_of("x.safetensors")
    Path("y.safetensors").write_bytes(b"not at all")
    assert "is damaged" in error_of("y.safetensors")


# ---------------------------------------------------------------- what is not a file of weights


@pytest.mark.parametrize(
    ("content", "cure"),
    [
        (b"", "is empty; download or copy it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n", "run git lfs pull"),
        (b"\n<!DOCTYPE html><html><title>Sign in</title></html>", "is a web page"),
        (b"<html>\n<head></head></html>", "is a web page"),
        (b"404: Not Found", "download or copy it again"),
        (b"\x80\x02}q\x00", "download or copy it again"),
    ],
)
def test_what_stands_in_for_weights_is_named_with_the_cure(content, cure):
    Path("x.pt").write_bytes(content)
    assert cure in error_of("x.pt")


def test_a_folder_and_a_missing_file_are_one_line_errors():
    Path("folder").mkdir()
    assert "Is a directory" in error_of("folder")
    assert "No such file" in error_of("missing.pt")


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated
def test_a_torchscript_program_is_named():
    torch.jit.script(nn.Linear(2, 2)).save("x.pt")
    assert "TorchScript" in error_of("x.pt")
