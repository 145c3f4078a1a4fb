"""timm/NAME: built, trained, resumed, evaluated and exported like our networks, without network."""

import csv
import json
import logging
import sys
from pathlib import Path

import pytest
import torch

import pretrain_imagenet
import run_all
import train
from common.cli import run
from common.errors import Preempted, UserError
from data.synthetic import write_dtd, write_imagenet_tree
from data.transforms import IMAGENET_MEAN, IMAGENET_STD
from models import build_model, check_model_name
from models.macs import count_macs
from models.stci import STCI
from models.timm_models import classifier_tensors
from models.weights import load_pretrained, load_trained, weights_identity
from sweeps.tables import write_tables
from tools import evaluate, export, predict
from training.export import write_weights
from training.optim import parameter_groups
from training.preemption import StopRequest

timm = pytest.importorskip("timm")

VIT = "timm/test_vit"  # 6 blocks of 64 channels, patches of 16 px, fixed size, statistics 0.5
RESNET = "timm/resnet10t"  # ImageNet's statistics, any size
RUN = Path("runs/dtd_fold1_timm-test_vit_seed42")


@pytest.fixture(scope="module")
def dtd(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "dtd"
    write_dtd(root, images_per_class=9, folds=2, size=40, seed=0, num_classes=3)
    return root


def fine_tune(dtd, *flags, model=VIT, pretrained="none", size=32, epochs=1, run_dir="runs"):
    train.main(
        ["--data_dir", str(dtd), "--model", model, "--pretrained", pretrained]
        + ["--img_size", str(size), "--batch_size", "4", "--epochs", str(epochs)]
        + ["--workers", "0", "--no_cache", "--no_amp", "--run_dir", run_dir, *flags]
    )


def exit_code(main, *argv):
    with pytest.raises(SystemExit) as left:
        run(lambda: main(list(argv)))
    return left.value.code


def publish(monkeypatch, name, seed=5, **settings):
    """Let timm's download return these weights, with 1000 classes; returns them."""
    torch.manual_seed(seed)
    state = timm.create_model(name.removeprefix("timm/"), **settings).state_dict()
    asked = []

    def download(source, **kwargs):
        asked.append(source)
        return dict(state)

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", download)
    return state, asked


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    "name", [VIT, "timm/test_vit.r160_in1k", "timm/swin_tiny_patch4_window7_224"]
)
def test_names_of_timm_are_accepted_with_and_without_tag(name):
    check_model_name(name)


@pytest.mark.parametrize(
    ("name", "close"),
    [
        ("timm/convnext_tinny", "timm/convnext_tiny"),
        ("timm/test_vit.r160_in2k", "timm/test_vit.r160_in1k"),
        ("timm/../etc", "timm.list_models() lists them"),
        ("timm/qwen3_vit_88m_enc", "has no classifier"),
    ],
)
def test_an_unknown_name_is_one_line_with_close_matches(name, close, dtd, capsys):
    assert exit_code(train.main, "--data_dir", str(dtd), "--model", name) == 2
    error = capsys.readouterr().err
    assert close in error and error.count("\n") == 1
    assert exit_code(run_all.main, "--data_dir", str(dtd), "--models", f"resnet18,{name}") == 2
    assert close in capsys.readouterr().err


def test_without_timm_the_error_says_what_to_install(dtd, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert exit_code(train.main, "--data_dir", str(dtd), "--model", VIT) == 2
    error = capsys.readouterr().err
    assert "needs timm: pip install timm" in error and error.count("\n") == 1


# ---------------------------------------------------------------- building


def test_a_network_with_a_fixed_size_is_built_for_the_images():
    assert build_model(VIT, 3, img_size=64).pos_embed.shape[1] == 1 + 4 * 4
    assert build_model(RESNET, 3, img_size=64).eval()(torch.zeros(1, 3, 96, 96)).shape == (1, 3)
    with pytest.raises(
        UserError, match="test_vit does not take 40 px images: .*divisible by patch"
    ):
        build_model(VIT, 3, img_size=40)


def test_a_classifier_that_timm_names_but_does_not_build_is_found():
    with pytest.raises(UserError, match="gemma4_vit_167m_enc: .* has no classifier to train"):
        build_model("timm/gemma4_vit_167m_enc", 3)


def test_drop_rates_are_the_networks_own_unless_a_recipe_sets_them():
    def rates(**settings):
        modules = build_model("timm/swin_tiny_patch4_window7_224", 3, **settings).modules()
        return [m.drop_prob for m in modules if type(m).__name__ == "DropPath"]

    assert max(rates()) == pytest.approx(0.1, abs=1e-6)
    assert max(rates(stochastic_depth=0.3)) == pytest.approx(0.3, abs=1e-6)
    with pytest.raises(UserError, match="timm/vgg11 cannot be built for .*stochastic depth 0.05"):
        build_model("timm/vgg11", 3, stochastic_depth=0.05)


@pytest.mark.parametrize(("name", "statistics"), [(VIT, 0.5), (RESNET, None)])
def test_networks_get_images_with_the_statistics_of_their_weights(name, statistics):
    torch.manual_seed(0)
    model = build_model(name, 3, img_size=64).eval()
    plain = (
        timm.create_model(name.removeprefix("timm/"), num_classes=3, img_size=64)
        if (statistics)
        else timm.create_model(name.removeprefix("timm/"), num_classes=3)
    )
    plain.load_state_dict(model.state_dict())  # nothing of ours is in it
    images = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    wanted = (images - statistics) / statistics if statistics else (images - mean) / std
    torch.testing.assert_close(
        model((images - mean) / std), plain.eval()(wanted), atol=1e-5, rtol=1e-4
    )


def test_weight_decay_spares_what_timm_names():
    model = build_model(VIT, 3, img_size=32)
    decayed, others = parameter_groups(model, 0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0)
    spared = {id(p) for p in others["params"]}
    assert id(model.pos_embed) in spared and id(model.head.bias) in spared
    assert id(model.head.weight) not in spared
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("name", "gmacs", "tolerance"),
    [
        ("resnet18", 1.814, 5e-4),
        ("twistnet18", 1.846, 5e-4),
        ("timm/deit_tiny_patch16_224", 1.258, 2e-2),  # the paper of DeiT says 1.3
        ("timm/convnext_tiny", 4.456, 1e-2),
        ("timm/pit_ti_224", 0.7, 2e-2),  # PiT's paper; it passes on a view of a parameter
    ],
)
def test_multiply_adds_are_those_published(name, gmacs, tolerance):
    model = build_model(name, 1000).train()
    assert count_macs(model, 224) / 1e9 == pytest.approx(gmacs, abs=tolerance)
    assert model.training and not any(m._forward_hooks for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_products_of_channels_count_as_multiply_adds():
    whole, none = (count_macs(build_model(f"twistnet18{x}", 3), 64) for x in ("", "_no_spiral"))
    assert whole - none == 2 * (4 * 4 + 2 * 2) * 32 * 9  # the step, a depthwise 3 × 3

    # by hand, at 8 × 8 positions: 3 channels to 32, the step, 36 products per head, 176 to 3
    convolutions = 3 * 32 + 32 * 9 + 176 * 3
    assert count_macs(STCI(3, ais=False), 8) == 64 * (convolutions + 4 * 36)


# ---------------------------------------------------------------- weights


def test_auto_takes_our_file_then_timms_weights_and_always_a_new_classifier(monkeypatch, capsys):
    published, asked = publish(monkeypatch, RESNET)
    torch.manual_seed(0)
    model = build_model(RESNET, 1000)
    new_head = model.fc.weight.clone()
    loaded = load_pretrained(model, RESNET, "auto")
    assert asked == ["timm/resnet10t.c3_in1k"]
    assert loaded["source"] == "timm resnet10t.c3_in1k"
    assert {k: loaded[k] for k in ("source", "sha256")} == weights_identity(RESNET)
    assert torch.equal(model.conv1[0].weight, published["conv1.0.weight"])
    assert torch.equal(model.fc.weight, new_head)
    assert "Loaded 84 layers from timm resnet10t.c3_in1k" in capsys.readouterr().out

    own = timm.create_model("resnet10t").state_dict()
    Path("weights").mkdir()
    torch.save(own, "weights/timm-resnet10t_imagenet.pt")
    loaded = load_pretrained(model, RESNET, "auto")
    assert loaded["source"] == "weights/timm-resnet10t_imagenet.pt"
    assert torch.equal(model.conv1[0].weight, own["conv1.0.weight"])
    assert torch.equal(model.fc.weight, new_head)
    assert (
        "[Auto-detected] Found timm/resnet10t weights: weights/timm-res" in capsys.readouterr().out
    )


def test_weights_of_another_size_are_interpolated(monkeypatch):
    published, _ = publish(monkeypatch, VIT)  # at 160 px: 10 × 10 patches
    torch.save(published, "vit.pt")
    for pretrained in ("auto", "vit.pt"):
        model = build_model(VIT, 3, img_size=64)
        load_pretrained(model, VIT, pretrained, img_size=64)
        assert torch.equal(model.cls_token, published["cls_token"])
        assert model.pos_embed.shape == (1, 17, 64) != published["pos_embed"].shape
        middle, wanted = model.pos_embed[0, 1:].mean(0), published["pos_embed"][0, 1:].mean(0)
        assert torch.nn.functional.cosine_similarity(middle, wanted, 0) > 0.9


@pytest.mark.parametrize("state", [{"a": torch.zeros(1)}, {"head.weight": torch.zeros(3, 64)}])
def test_weights_of_another_network_are_refused(state):
    torch.save(state, "x.pt")
    model = build_model(VIT, 3, img_size=32)
    with pytest.raises(UserError, match="x.pt does not fit timm/test_vit: .* missing"):
        load_pretrained(model, VIT, "x.pt", img_size=32)


@pytest.mark.parametrize("lost", ["fc.bias", "base_layer.1.weight", None])
def test_weights_are_refused_that_timm_would_accept_in_part(lost):
    name = "timm/dla46_c"  # timm fills it with whatever fits, and leaves the rest at random
    state = timm.create_model("dla46_c").state_dict()
    if lost:
        del state[lost]
    else:  # another network's
        state = {"fc.weight": state["fc.weight"], "a": torch.zeros(1)}
    torch.save(state, "x.pt")
    model = build_model(name, 3)
    if lost == "fc.bias":  # the classifier is not loaded
        assert load_pretrained(model, name, "x.pt")["tensors_loaded"] == len(state) - 1
        return
    with pytest.raises(UserError, match="x.pt does not fit timm/dla46_c: .* missing"):
        load_pretrained(model, name, "x.pt")


def test_weights_of_another_size_that_timm_does_not_interpolate_say_so():
    name = "timm/mixer_s16_224"
    torch.save(build_model(name, 3, img_size=32).state_dict(), "mixer.pt")
    model = build_model(name, 3, img_size=64)
    with pytest.raises(UserError, match="misshapen .*; was it trained at another --img_size"):
        load_pretrained(model, name, "mixer.pt", img_size=64)


def test_a_network_of_timm_with_a_stem_is_not_taken_for_the_authors():
    name = "timm/test_convnext"  # its first layer is stem.0, as that of the authors' network
    torch.manual_seed(0)
    state = build_model(name, 3).state_dict()
    assert "stem.0.weight" in state
    torch.save({"model": state, "config": {"model": name, "img_size": 64}}, "best.pt")
    model, about = load_trained("best.pt")
    assert about["model"] == name
    assert all(torch.equal(x, state[key]) for key, x in model.state_dict().items())


def test_weights_that_cannot_be_downloaded_are_one_line(dtd, monkeypatch, capsys, caplog):
    def offline(*args, **kwargs):
        logging.getLogger("huggingface_hub.utils").warning("retrying")
        raise OSError("Name or service not known\nRetrying")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    words = ["--data_dir", str(dtd), "--model", VIT, "--img_size", "32", "--workers", "0"]
    assert exit_code(train.main, *words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(
        "error: no weights for timm/test_vit: timm test_vit.r160_in1k could not"
    )
    assert "--pretrained none" in error and not caplog.records


def test_a_network_without_published_weights_says_so():
    with pytest.raises(
        UserError, match="timm has no pretrained weights for timm/test_maxvit: give"
    ):
        weights_identity("timm/test_maxvit")


def test_a_network_with_two_classifiers_starts_with_two_new_ones(monkeypatch):
    name = "timm/levit_128s"
    assert len(classifier_tensors(name)) == 4
    published, _ = publish(monkeypatch, name)
    model = build_model(name, 1000)
    load_pretrained(model, name)
    for module in ("head", "head_dist"):
        assert not torch.equal(
            model.get_submodule(module).linear.weight, published[f"{module}.linear.weight"]
        )


# ---------------------------------------------------------------- the scripts


@pytest.fixture(scope="module")
def trained(dtd, tmp_path_factory):
    """A finished run of the ViT, 2 epochs."""
    root = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        fine_tune(dtd, epochs=2)
    return root / RUN


def test_a_run_is_in_a_folder_with_a_valid_name_and_in_the_table_as_timm(trained, dtd):
    results = json.loads((trained / "results.json").read_text())
    assert results["model"] == VIT and results["settings"]["model"] == VIT
    assert results["gmacs"] == count_macs(build_model(VIT, 3, img_size=32), 32) / 1e9
    markdown = write_tables(trained.parent, dataset="dtd")
    assert f"| {VIT} |" in markdown and "GMACs" in markdown
    (row,) = csv.DictReader((trained.parent / "table.csv").open())
    assert (row["model"], float(row["gmacs"])) == (VIT, results["gmacs"])
    assert int(row["parameters"]) == results["parameters"]


WORST = {"test_acc": 0.0, "test_correct": 0}


def test_older_results_have_a_dash_for_their_multiply_adds(trained, tmp_path):
    results = json.loads((trained / "results.json").read_text())
    del results["gmacs"]
    folder = tmp_path / "old" / trained.name
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    assert "GMACs" not in write_tables(folder.parent, dataset="dtd")
    newer = tmp_path / "old" / "dtd_fold1_resnet18_seed42"
    newer.mkdir()
    (newer / "results.json").write_text(
        json.dumps({**results, "model": "resnet18", "gmacs": 0.037, **WORST})
    )
    lines = write_tables(folder.parent, dataset="dtd").splitlines()
    assert [line.split("|")[3].strip() for line in lines[:4]] == ["GMACs", "-----", "0.037", "–"]
    assert "**" in next(line for line in lines if VIT in line).split("|")[4]


def test_an_interrupted_run_of_a_network_that_draws_resumes_with_the_same_bits(
    dtd, monkeypatch, capsys
):
    create = timm.create_model  # with stochastic depth, which timm's small networks do not have

    def dropping(name, **settings):
        return create(name, **{"drop_path_rate": 0.5, **settings})

    monkeypatch.setattr(timm, "create_model", dropping)
    fine_tune(dtd, run_dir="whole", epochs=2)
    polls = iter(range(100))
    with monkeypatch.context() as patch, pytest.raises(Preempted):
        patch.setattr(StopRequest, "requested", property(lambda self: next(polls) == 3))
        fine_tune(dtd, epochs=2)
    torch.manual_seed(99)
    capsys.readouterr()
    fine_tune(dtd, epochs=2)
    assert "in epoch 2, after step 2" in capsys.readouterr().out
    whole, resumed = (
        torch.load(folder / "latest.pt", weights_only=True)["model"]
        for folder in (Path("whole") / RUN.name, RUN)
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_evaluate_gives_the_recorded_count(trained, capsys):
    evaluate.main(["--weights", str(trained / "best.pt"), "--workers", "0"])
    out = capsys.readouterr().out
    assert out.startswith(f"{VIT}, 3 classes") and "the same count" in out
    code = exit_code(evaluate.main, "--weights", str(trained / "best.pt"), "--img_size", "64")
    assert code == 2 and "was trained at 32 px and takes no other size" in capsys.readouterr().err


def test_a_size_that_a_network_cannot_halve_often_enough_is_refused():
    name = "timm/hrnet_w18_small"
    record = {"recipe": {"model": name, "img_size": 64, "run": "1"}}
    write_weights(build_model(name, 3, img_size=64), record, "weights", [Path()])
    assert not load_trained("weights.pt", img_size=96)[0].training
    with pytest.raises(UserError, match="hrnet_w18_small does not take 100 px images"):
        load_trained("weights.pt", img_size=100)

    Path("weights.json").unlink()
    with pytest.raises(UserError, match="a network of timm needs its .json beside it"):
        load_trained("weights.pt")


def test_predict_classifies(trained, dtd, capsys):
    image = next(dtd.rglob("*.jpg"))
    predict.main(["--weights", str(trained / "best.pt"), "--workers", "0", str(image)])
    assert "%" in capsys.readouterr().out


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_export_at_the_size_of_training(trained, suffix, capsys):
    if suffix == ".onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    export.main(["--weights", str(trained / "best.pt"), "--out", f"x{suffix}"])
    out = capsys.readouterr().out
    assert "input: float32, B x 3 x 32 x 32, RGB" in out and "largest difference" in out
    if suffix == ".pt2":
        model, _ = load_trained(trained / "best.pt")
        images = torch.rand(5, 3, 32, 32)
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
        with torch.no_grad():
            wanted = model((images - mean) / std)
        exported = torch.export.load("x.pt2").module()
        torch.testing.assert_close(exported(images), wanted, atol=1e-4, rtol=1e-4)


def test_a_sweep_names_its_runs_and_its_weights(dtd, monkeypatch, capsys):
    publish(monkeypatch, VIT)
    words = ["--data_dir", str(dtd), "--models", f"resnet18,{VIT}", "--img_size", "32"]
    run_all.main([*words, "--pretrained", "none", "--dry_run"])
    commands = capsys.readouterr().out.splitlines()
    assert len(commands) == 2 and f"--model {VIT} --fold 1" in commands[1]
    run_all.main([*words[:2], "--models", VIT, "--img_size", "32", "--dry_run"])
    assert f"{VIT} starts from timm test_vit.r160_in1k" in capsys.readouterr().err


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A pretraining of the ViT with timm's recipe and its stochastic depth, exported."""
    root = tmp_path_factory.mktemp("pretrained")
    write_imagenet_tree(
        root / "tree", train_per_class=8, val_per_class=4, size=40, seed=0, num_classes=3
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        pretrain_imagenet.main(
            ["--data_dir", "tree", "--model", VIT, "--img_size", "32", "--epochs", "1"]
            + ["--batch_size", "4", "--workers", "0", "--no_amp"]
        )
    return root / "weights/timm-test_vit_imagenet.pt"


def test_pretraining_writes_weights_that_fine_tuning_finds(pretrained, dtd, monkeypatch, capsys):
    monkeypatch.chdir(pretrained.parent.parent)
    record = json.loads(pretrained.with_suffix(".json").read_text())
    assert (record["model"], record["classes"]) == (VIT, 3)
    fine_tune(dtd, pretrained="auto")
    results = json.loads((RUN / "results.json").read_text())
    assert results["weights"]["source"] == "weights/timm-test_vit_imagenet.pt"
    assert results["weights"]["sha256"] == record["sha256"]
    capsys.readouterr()
    evaluate.main(["--weights", str(pretrained), "--data_dir", "tree", "--workers", "0"])
    assert capsys.readouterr().out.count("the same count") == 2


def test_an_interrupted_pretraining_resumes(pretrained, monkeypatch, capsys):
    monkeypatch.chdir(pretrained.parent.parent)
    checkpoint = "checkpoints/latest.pt"
    pretrain_imagenet.main(
        ["--data_dir", "tree", "--resume", checkpoint, "--epochs", "2", "--workers", "0"]
    )
    assert json.loads(pretrained.with_suffix(".json").read_text())["epochs"] == 2
