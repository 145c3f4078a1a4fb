"""models/weights.py: where weights come from, what is printed, and which files are refused."""

import hashlib
import io
import json
import pickle
import re
import zipfile
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torchvision.models import ResNet18_Weights

from common.errors import UserError
from models import MODELS, build_model, torchvision_weights, weights
from models.weights import find_weights, load_pretrained, load_trained, weights_identity

CLASSES = 10
FILE = Path("weights/twistnet18_imagenet.pt")


@pytest.fixture(scope="module")
def states():
    """One state dict of 10 classes per network, built when a test asks for it."""
    built = {}

    def state(name):
        if name not in built:
            torch.manual_seed(3)
            model = MODELS[name](CLASSES)
            with torch.no_grad():
                for x in model.state_dict().values():
                    x.add_(torch.rand(x.shape).mul(0.01).to(x.dtype))
            built[name] = model.state_dict()
        return dict(built[name])

    return state


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Every test runs in an empty folder, with an empty script folder and no network."""
    (tmp_path / "here" / "weights").mkdir(parents=True)
    (tmp_path / "script" / "weights").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(weights, "ROOT", tmp_path / "script")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def no_network(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    return tmp_path


def save(state, path=FILE, **record):
    torch.save(state, path)
    if record:
        record.setdefault("sha256", hashlib.sha256(Path(path).read_bytes()).hexdigest())
        Path(path).with_suffix(".json").write_text(json.dumps(record))


def fill_torchvision_cache(monkeypatch, tmp_path, state):
    """Put a state dict where torch.hub keeps torchvision's ResNet-18, as the published file."""
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(state, folder / "x.pth")
    digest = hashlib.sha256((folder / "x.pth").read_bytes()).hexdigest()
    (folder / "x.pth").rename(folder / f"resnet18-{digest[:8]}.pth")
    monkeypatch.setattr(torchvision_weights, "URL", f"https://host/resnet18-{digest[:8]}.pth")


def load(name, num_classes, pretrained="auto", *, keep_head=False):
    """A network and what load_pretrained says that it loaded."""
    model = build_model(name, num_classes)
    return model, load_pretrained(model, name, pretrained, keep_head=keep_head)


def has_weights(model, state, names):
    own = model.state_dict()
    return all(torch.equal(own[name], state[name]) for name in names)


RECORD = {"model": "twistnet18", "classes": 10, "epochs": 3, "top1": 41.256, "top5": 88.1}
RECORD["recipe"] = {"recipe": "guide"}


def test_own_weights_are_found_and_reported_to_the_letter(states, capsys):
    state = states("twistnet18")
    save(state, **RECORD)
    model, origin = load("twistnet18", 47)
    lines = capsys.readouterr().out.splitlines()
    body = [name for name in state if not name.startswith("fc.")]
    assert lines[0] == "[Auto-detected] Found TwistNet weights: weights/twistnet18_imagenet.pt"
    assert lines[1] == (
        f"[TwistNet Pretrained] Loaded {len(body)} layers from weights/twistnet18_imagenet.pt"
    )
    assert lines[2].endswith("10 classes, 3 epochs, top-1 41.26 %, top-5 88.10 %")
    assert lines[3:] == [
        "[TwistNet Pretrained] Left out of the file: fc.*",
        "[TwistNet Pretrained] New in the network: fc.*",
    ]
    assert has_weights(model, state, body)
    digest = hashlib.sha256(FILE.read_bytes()).hexdigest()
    assert origin == {
        "source": str(FILE),
        "sha256": digest,
        "tensors_loaded": len(body),
        "pretraining": "3 epochs of recipe guide",
    }
    assert weights_identity("twistnet18") == {"source": str(FILE), "sha256": digest}


def test_the_trained_ais_layers_are_loaded(states):
    state = states("twistnet18")
    save(state)
    names = [name for name in state if ".ais.fc" in name]
    assert len(names) == 16
    assert has_weights(load("twistnet18", 3)[0], state, names)


@pytest.mark.parametrize(
    ("name", "title"), [("resnet18", "ResNet-18"), ("seresnet18", "SE-ResNet-18")]
)
def test_the_baselines_own_files_are_reported_under_their_names(name, title, states, capsys):
    save(states(name), f"weights/{name}_imagenet.pt")
    load(name, 3)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"[Auto-detected] Found {title} weights: weights/{name}_imagenet.pt"
    assert re.fullmatch(
        rf"\[{title} Pretrained\] Loaded \d+ layers from weights/{name}_imagenet.pt", lines[1]
    )


def test_weights_are_looked_for_here_then_beside_the_script(folders):
    script = folders / "script" / "weights"
    places = [
        script / "twistnet18_imagenet.pt",
        Path("weights/twistnet18_imagenet.pt"),
        script / "twistnet18_no_ais_imagenet.pt",
        Path("weights/twistnet18_no_ais_imagenet.pt"),
    ]
    assert find_weights("twistnet18_no_ais") is None
    for place in places:  # from the last choice to the first
        place.touch()
        assert find_weights("twistnet18_no_ais") == place
    assert find_weights("twistnet18") == places[1]
    assert find_weights("resnet18") is None and find_weights("seresnet18") is None


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("twistnet18_no_spiral", "layer3.0.stci.twist.*"),
        ("twistnet18_no_ais", "layer3.0.stci.ais.*"),
        ("twistnet18_first_order", "layer3.0.stci.proj.*"),
    ],
)
def test_ablations_load_what_fits_of_twistnet18(name, left_out, states, capsys):
    state = states("twistnet18")
    save(state)
    model, origin = load(name, 47)
    own = model.state_dict()
    fitting = [
        k for k in own if k in state and state[k].shape == own[k].shape and not k.startswith("fc.")
    ]
    assert has_weights(model, state, fitting)
    assert origin["tensors_loaded"] == len(fitting)
    out = capsys.readouterr().out
    assert f"[TwistNet Pretrained] Loaded {len(fitting)} layers from {FILE}\n" in out
    assert left_out in re.search("Left out of the file: (.*)", out)[1].split(", ")


@pytest.mark.parametrize("record", ["missing", "unreadable", "list", "other sha256", "no accuracy"])
def test_unknown_accuracy_is_one_line_with_the_reason(record, states, capsys):
    save(states("twistnet18"))
    digest = hashlib.sha256(FILE.read_bytes()).hexdigest()
    text = {
        "unreadable": "{",
        "list": "[1]",
        "other sha256": json.dumps(RECORD | {"sha256": "0" * 64}),
        "no accuracy": json.dumps(RECORD | {"sha256": digest, "top1": None}),
    }
    if record in text:
        FILE.with_suffix(".json").write_text(text[record])
    load("twistnet18", 10)
    line = capsys.readouterr().out.splitlines()[2]
    reason = {"missing": "no twist", "other sha256": "belongs to another file"}
    assert "Classes, epochs and accuracy unknown: " in line
    assert reason.get(record, "cannot be read") in line and "41" not in line


def test_resnet18_gets_torchvisions_weights(states, folders, capsys, monkeypatch):
    state = {k: x for k, x in states("resnet18").items() if "num_batches" not in k}
    fill_torchvision_cache(monkeypatch, folders, state)
    model, origin = load("resnet18", 47)
    assert has_weights(model, state, [name for name in state if not name.startswith("fc.")])
    assert origin["sha256"] is None and origin["tensors_loaded"] == 100
    assert weights_identity("resnet18") == {"source": origin["source"], "sha256": None}
    assert "torchvision" in origin["source"]
    assert "[ResNet-18 Pretrained] Loaded 100 layers from torchvision" in capsys.readouterr().out


def test_seresnet18_gets_torchvisions_weights_but_new_se(states, folders, capsys, monkeypatch):
    state = states("resnet18")
    fill_torchvision_cache(monkeypatch, folders, state)
    model, origin = load("seresnet18", 47)
    assert has_weights(model, state, [name for name in state if not name.startswith("fc.")])
    new = re.search("New in the network: (.*)", capsys.readouterr().out)[1].split(", ")
    assert len(new) == 9 and new[0] == "layer1.0.se.*" and new[-1] == "fc.*"


@pytest.mark.parametrize("content", ["foreign", "torn", "web page", "empty"])
@pytest.mark.parametrize("name", ["resnet18", "twistnet18"])
def test_another_file_under_torch_hubs_name_is_refused(name, content, folders, capsys):
    """Random weights must not be reported with the accuracy of the published ones."""
    path = folders / "torch" / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    assert path.name == Path(ResNet18_Weights.IMAGENET1K_V1.url).name
    path.parent.mkdir(parents=True)
    torch.save({"conv1.weight": torch.ones(64, 3, 7, 7)}, path)
    foreign = path.read_bytes()
    other = {"torn": foreign[:200], "web page": b"<html></html>", "empty": b""}
    path.write_bytes(other.get(content, foreign))
    with torch.device("meta"):
        model = build_model(name, 3)
    with pytest.raises(UserError) as error:
        load_pretrained(model, name)
    message = str(error.value)
    assert message.startswith(f"{path} is damaged or is not the file that torchvision published")
    assert "delete it, and it will be downloaded again" in message
    assert capsys.readouterr().out == ""


def test_torchvisions_weights_are_downloaded_with_their_hash(folders, monkeypatch):
    asked = []

    def download(url, path, hash_prefix):
        asked.append((url, hash_prefix))
        Path(path).write_bytes(b"x")

    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    with torch.device("meta"), pytest.raises(UserError, match="published"):
        load("resnet18", 3)
    assert asked == [(ResNet18_Weights.IMAGENET1K_V1.url, "f37072fd")]


def test_a_classifier_is_not_kept_on_a_partly_loaded_network(states):
    save(states("twistnet18"))
    with torch.device("meta"), pytest.raises(UserError, match="it contains twistnet18"):
        load("twistnet18_no_ais", CLASSES, keep_head=True)


def test_seresnet18_loads_a_resnet18_file(states):
    save(states("resnet18"), "r.pt")
    assert load("seresnet18", 3, "r.pt")[1]["tensors_loaded"] == 120


@pytest.mark.parametrize("name", ["twistnet18", "twistnet18_no_ais"])
def test_the_fallback_loads_the_early_layers_and_warns(name, states, folders, capsys, monkeypatch):
    state = states("resnet18")
    fill_torchvision_cache(monkeypatch, folders, state)
    model, origin = load(name, 1000)
    early = [k for k in state if k.startswith(("conv1", "bn1", "layer1.", "layer2."))]
    assert has_weights(model, state, early)
    assert origin["tensors_loaded"] == len(early)
    assert not torch.equal(model.layer3[0].conv1.weight, state["layer3.0.conv1.weight"])
    out = capsys.readouterr().out
    assert "[TwistNet Pretrained] Loaded" not in out
    assert "not recommended" in out and "run pretrain_imagenet.py first" in out
    counted = {
        "twistnet18": "683,072 of 12,077,852 parameters = 5.7 %",
        "twistnet18_no_ais": "683,072 of 12,015,020 parameters = 5.7 %",
    }
    assert counted[name] in out
    assert "Left out of the file: layer3.*, layer4.*, fc.*" in out


def test_no_weights_and_no_internet_is_one_clear_error(folders):
    for name in MODELS:
        with torch.device("meta"), pytest.raises(UserError) as error:
            load(name, 10)
        message = str(error.value)
        assert f"weights/{name}_imagenet.pt" in message
        assert str(folders / "script" / "weights" / f"{name}_imagenet.pt") in message
        assert "--pretrained none" in message and "\n" not in message


def test_none_loads_nothing_whatever_files_there_are(states, capsys):
    save(states("twistnet18"))
    model, origin = load("twistnet18", 10, "none")
    assert origin == {"source": "none", "sha256": None, "tensors_loaded": 0}
    assert capsys.readouterr().out == ""
    assert weights_identity("twistnet18", "none") == {"source": "none", "sha256": None}


def test_the_classifier_starts_new_unless_it_is_kept(states):
    state = states("resnet18")
    save(state, "r.pt")
    assert not has_weights(load("resnet18", CLASSES, "r.pt")[0], state, ["fc.weight"])
    assert has_weights(load("resnet18", CLASSES, "r.pt", keep_head=True)[0], state, list(state))
    with pytest.raises(UserError, match=r"r.pt: fc.weight is \(10, 512\).*\(11, 512\)"):
        load("resnet18", 11, "r.pt", keep_head=True)
    assert load("resnet18", 0, "r.pt")[1]["tensors_loaded"] == 120


def error_of(path, name="twistnet18"):
    """The error of a file that must be refused: one line that names it."""
    with torch.device("meta"):
        model = MODELS[name](CLASSES)  # the file is refused before anything is loaded
    with pytest.raises(UserError) as error:
        weights.load_pretrained(model, name, str(path), keep_head=False)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("was_run"),)


class EvilCall:
    def __reduce__(self):
        return eval, ("open('was_run', 'w')",)


@pytest.mark.parametrize("evil", [Evil, EvilCall])
@pytest.mark.parametrize("old_format", [False, True])
def test_a_file_that_carries_code_is_refused_and_runs_nothing(evil, old_format, states):
    content = {"model": {"conv1.weight": torch.zeros(1)}, "config": evil()}
    torch.save(content, "evil.pt", _use_new_zipfile_serialization=not old_format)
    assert "carries code" in error_of("evil.pt")
    Path("evil.pt").write_bytes(pickle.dumps(evil(), protocol=2))
    error_of("evil.pt")
    for read in (load_trained, lambda path: load("resnet18", 10, path, keep_head=True)):
        with pytest.raises(UserError):
            read("evil.pt")
    assert not Path("was_run").exists()


def test_damaged_files_are_refused(states):
    save(states("twistnet18"), "x.pt")
    whole = Path("x.pt").read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    Path("flipped.pt").write_bytes(flipped)
    assert "checksum" in error_of("flipped.pt")
    Path("torn.pt").write_bytes(whole[: len(whole) // 2])
    Path("empty.pt").write_bytes(b"")
    Path("text.pt").write_text("404: Not Found")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("readme.txt", "a zip of something else")
    Path("zip.pt").write_bytes(buffer.getvalue())
    for path in ("torn.pt", "empty.pt", "text.pt", "zip.pt"):
        assert "is damaged" in error_of(path)


def test_a_path_without_a_file_is_refused():
    for path in ("nothing.pt", "weights"):
        assert "--pretrained" in error_of(path)
        with pytest.raises(UserError):
            weights_identity("resnet18", path)


def test_tensors_that_are_not_finite_are_named(states):
    state = states("twistnet18")
    for name, value in (("conv1.weight", float("nan")), ("fc.bias", float("inf"))):
        state[name] = state[name].clone()
        state[name].view(-1)[1] = value
    save(state, "nan.pt")
    message = error_of("nan.pt")
    assert f"2 of {len(state)} tensors are not finite (conv1.weight, fc.bias)" in message


def test_another_architecture_is_named_with_its_tensors(states):
    save(states("resnet18"), "r.pt")
    message = error_of("r.pt")
    # Four gates, and in each STCI 22 tensors without the counters of its two BatchNorms.
    assert "missing (layer3.0.gate, layer3.0.stci.reduce.weight," in message
    assert message.endswith("it contains resnet18")
    save(states("twistnet18"), "t.pt")
    assert "unexpected (layer3.0.gate" in error_of("t.pt", "resnet18")
    save(states("twistnet18_no_ais"), "n.pt")
    assert "16 missing (layer3.0.stci.ais.fc1.weight" in error_of("n.pt")
    assert "twistnet18_no_ais" in error_of("n.pt", "twistnet18_no_spiral")


def test_half_a_state_dict_is_refused(states):
    state = states("resnet18")
    half = dict(list(state.items())[:61])
    save(half, "half.pt")
    message = error_of("half.pt", "resnet18")
    counters = [k for k in state if k not in half and k.endswith("num_batches_tracked")]
    assert f"{len(state) - 61 - 2 - len(counters)} missing (" in message  # fc's two may be missing


def test_misshapen_tensors_are_named_with_both_shapes(states):
    state = states("resnet18")
    state["conv1.weight"] = torch.zeros(64, 3, 3, 3)
    save(state, "small.pt")
    message = error_of("small.pt", "resnet18")
    assert "1 misshapen (conv1.weight (64, 3, 3, 3) not (64, 3, 7, 7))" in message


def to_authors(state):
    """Give a TwistNet's state dict the authors' names, from their description."""
    theirs = {}
    for name, x in state.items():
        block, _, rest = name.partition(".stci.")
        module, _, leaf = rest.rpartition(".")
        if not rest:
            name = re.sub(r"^conv1\.", "stem.0.", name)
            theirs[re.sub(r"^bn1\.", "stem.1.", name)] = x
        elif module in ("reduce", "reduce_bn", "twist.conv", "twist"):
            for k in range(4):
                part = x if leaf == "num_batches_tracked" else x[8 * k : 8 * k + 8]
                part = part.view(1, 8, 1, 1) if leaf == "scale" else part
                their = {
                    "reduce": "reduce.0",
                    "reduce_bn": "reduce.1",
                    "twist.conv": "twist.dwconv",
                    "twist": "twist",
                }[module]
                theirs[f"{block}.mhstci.heads.{k}.{their}.{leaf}"] = part
        else:
            their = {
                "ais.fc1": "ais.fc.2",
                "ais.fc2": "ais.fc.4",
                "norm": "norm",
                "proj": "proj.0",
                "proj_bn": "proj.1",
            }[module]
            theirs[f"{block}.mhstci.{their}.{leaf}"] = x
    for block in sorted({name.partition(".mhstci.")[0] for name in theirs if ".mhstci." in name}):
        for k in range(4):
            i, j = torch.triu_indices(8, 8)
            theirs |= {f"{block}.mhstci.heads.{k}.idx_{n}": x for n, x in (("i", i), ("j", j))}
    return theirs


@pytest.mark.parametrize("name", ["twistnet18", "twistnet18_no_ais", "twistnet18_no_spiral"])
def test_authors_checkpoints_give_the_same_logits(name, states):
    state = states(name)
    ours = MODELS[name](CLASSES).eval()
    ours.load_state_dict(state)
    theirs = {f"module.{k}": x for k, x in to_authors(state).items()}
    assert "module.layer4.1.mhstci.heads.3.reduce.0.weight" in theirs
    save({"state_dict": theirs, "epoch": 600}, "authors.pt")
    loaded, origin = load(name, CLASSES, "authors.pt", keep_head=True)
    assert origin["tensors_loaded"] == len(state)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images), ours(images))


def test_authors_first_order_is_refused_with_the_reason(states):
    save(to_authors(states("resnet18")), "first.pt")
    message = error_of("first.pt", "twistnet18_first_order")
    assert "no STCI at all" in message and "plain ResNet-18" in message


def test_authors_files_with_other_pairs_or_fewer_heads_are_refused(states):
    theirs = to_authors(states("twistnet18"))
    key = "layer3.1.mhstci.heads.2.idx_j"
    save(theirs | {key: theirs[key].flip(0)}, "pairs.pt")
    assert key in error_of("pairs.pt")
    save({k: x for k, x in theirs.items() if ".heads.3." not in k}, "three.pt")
    assert "heads [0, 1, 2]" in error_of("three.pt")


def test_moving_averages_are_loaded_and_named(states, capsys):
    state = states("resnet18")
    plain = {name: torch.zeros_like(x) for name, x in state.items()}
    save({"state_dict": plain, "state_dict_ema": state, "epoch": 3}, "timm.pt")
    model, _ = load("resnet18", CLASSES, "timm.pt", keep_head=True)
    assert has_weights(model, state, list(state))
    sentence = "Took state_dict_ema (exponential moving average) of timm.pt, not its state_dict"
    assert f"[ResNet-18 Pretrained] {sentence}\n" in capsys.readouterr().out
    model, _ = load_trained("timm.pt")
    assert has_weights(model, state, list(state))
    out, err = capsys.readouterr()
    assert out == "" and err == sentence + "\n"


@pytest.mark.parametrize("name", MODELS)
def test_load_trained_recognises_the_network(name, states):
    state = states(name)
    names = [f"class {i}" for i in range(CLASSES)]
    save({"model": state, "config": {"model": name}, "classes": names}, "best.pt")
    model, info = load_trained("best.pt")
    assert not model.training and has_weights(model, state, list(state))
    assert info["model"] == name and info["classes"] == names
    assert info["num_classes"] == CLASSES and info["config"] == {"model": name}
    assert info["sha256"] == hashlib.sha256(Path("best.pt").read_bytes()).hexdigest()


def test_load_trained_reads_the_record_of_plain_weights(states, capsys):
    names = [f"n{i:08d}" for i in range(CLASSES)]
    save(states("twistnet18"), **RECORD, class_names=names)
    _, info = load_trained(FILE)
    assert info["classes"] == names and info["record"]["top1"] == 41.256
    FILE.with_suffix(".json").unlink()
    _, info = load_trained(FILE)
    assert info["classes"] is None and info["record"] is None
    assert capsys.readouterr().out == ""


def test_load_trained_needs_a_classifier(states):
    state = {k: x for k, x in states("resnet18").items() if not k.startswith("fc.")}
    save(state, "body.pt")
    with pytest.raises(UserError, match="no classifier"):
        load_trained("body.pt")
    save({"something.weight": torch.ones(3)}, "other.pt")
    with pytest.raises(UserError, match="does not fit"):
        load_trained("other.pt")
