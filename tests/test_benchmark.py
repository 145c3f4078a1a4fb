"""tools/benchmark: every row is measured, and medians and ratios are what they claim to be."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from data.synthetic import write_dtd, write_imagenet_tree
from tools.benchmark import __main__ as benchmark
from tools.benchmark import end_to_end, loader, plain_train, step, timing
from training.recipes import FINETUNE

SMALL = ["--img_size", "32", "--rounds", "1", "--batch_size", "4"]


@pytest.fixture
def tree(tmp_path):
    write_imagenet_tree(
        tmp_path, train_per_class=4, val_per_class=1, size=48, seed=0, num_classes=2
    )
    return tmp_path


def found(capsys, *argv):
    benchmark.main([*argv, "--json"])
    return json.loads(capsys.readouterr().out)


def test_rows_take_turns_and_the_first_turn_does_not_count():
    turns = []
    table = timing.interleaved(
        {"a": lambda n: turns.append(("a", n)), "b": lambda n: turns.append(("b", n))},
        rounds=2,
        images=1,
    )
    assert turns == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert [row["row"] for row in table] == ["a", "b"]


def test_milliseconds_per_image_and_ratios_are_medians(monkeypatch):
    # one clock reading at the start and one at the end of each turn, seconds
    spent = {"a": iter([9, 3, 8, 4]), "b": iter([9, 1, 2, 4])}
    clock = [0.0]

    def row(name):
        def turn(number):
            clock[0] += next(spent[name])

        return turn

    monkeypatch.setattr(timing.time, "process_time", lambda: clock[0])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: 2 * clock[0])
    a, b = timing.interleaved({"a": row("a"), "b": row("b")}, rounds=3, images=10)
    assert (a["cpu_ms"], a["wall_ms"], a["cpu_ratio"]) == (400, 800, 1)
    assert (b["cpu_ms"], b["wall_ms"]) == (200, 400)
    assert b["cpu_ratio"] == b["wall_ratio"] == 3  # the median of 3/1, 8/2 and 4/4


def test_loader_measures_every_way_to_read_and_the_devices_part(tree, capsys):
    result = found(capsys, "loader", "--data_dir", str(tree), "--images", "6", *SMALL)
    plain, files, packed, decoded = result["loader"]
    assert plain["row"].startswith("plain") and plain["cpu_ratio"] == 1
    assert files["row"].startswith("files, ") and packed["row"].startswith("packed 256, ")
    assert decoded["row"].startswith("decoded once")
    assert all(row["cpu_ms"] > 0 and row["wall_ms"] > 0 for row in result["loader"])
    assert result["images"] == 6 and result["device"][0]["cpu_ms"] > 0
    assert result["kb"]["decoded"] == pytest.approx(48 * 48 * 3 / 1e3)


@pytest.mark.parametrize(("recipe", "values"), [("guide", (0.08, 2)), ("fast", (0.25, 0))])
def test_the_plain_side_of_loader_has_the_recipes_augmentation(
    tree, monkeypatch, capsys, recipe, values
):
    seen, make = [], loader.make_train_transform
    monkeypatch.setattr(
        loader, "make_train_transform", lambda size, *v: seen.append(v) or make(size, *v)
    )
    found(capsys, "loader", "--data_dir", str(tree), "--images", "6", "--recipe", recipe, *SMALL)
    assert seen == [values]


def test_loader_reads_class_folders_and_refuses_a_pack(tree, tmp_path_factory):
    small = loader.make_small_tree(tree / "train", tmp_path_factory.mktemp("small"), count=5)
    train, val, classes = loader.load_imagenet(small)
    assert (len(train), len(val), len(classes)) == (5, 2, 2)
    (tree / "train" / loader.MANIFEST).touch()
    with pytest.raises(UserError, match="is packed: give the tree"):
        loader.make_small_tree(tree / "train", tree / "small", count=5)


def test_step_compares_networks_and_implementations_in_time_and_memory(monkeypatch, capsys):
    rows = {name: how for name, how in step.ROWS.items() if how[1] != "compiled"}
    monkeypatch.setattr(step, "ROWS", rows)
    result = found(capsys, "step", *SMALL)
    plain, resnet, *twistnets = result["step"]
    assert [row["row"].split(", ", 2)[-1] for row in twistnets] == ["plain STCI", "fused STCI"]
    assert plain["wall_ratio"] == 1
    for row in result["step"]:
        assert row["peak_mb"] > 4 * 11.7  # the weights alone, in float32
    for row in twistnets:
        assert row["memory_vs_resnet"] == pytest.approx(row["peak_mb"] / resnet["peak_mb"])
        assert row["time_vs_resnet"] == pytest.approx(row["wall_ms"] / resnet["wall_ms"])


def test_a_step_uses_the_implementation_that_its_row_names(monkeypatch):
    used = []

    def note(stci):
        used.append(stci.implementation)
        return False

    monkeypatch.setattr("models.fused.is_chosen", note)
    for how in ("plain", "fused"):
        step.make_turn("twistnet18", how, batch_size=2, img_size=32)(0)
        assert set(used) == {how}
        used.clear()


def test_a_machine_without_a_compiler_leaves_the_compiled_row_out(monkeypatch, capsys):
    def make_turn(name, how, **shape):
        def turn(number):
            if how == "compiled":
                raise RuntimeError("no compiler\nin many lines")

        return turn

    monkeypatch.setattr(step, "make_turn", make_turn)
    monkeypatch.setattr(step, "measure_peak_memory", lambda *args, **shape: 1e6)
    benchmark.main(["step", *SMALL])
    out = capsys.readouterr().out
    assert "left out, ours, TwistNet-18, compiled: RuntimeError: no compiler\n" in out
    assert "ours, TwistNet-18, fused STCI / ours, ResNet-18: time " in out


def test_a_memory_process_that_dies_costs_its_row_only(monkeypatch, capfd):
    assert step.measure_peak_memory("no network", "auto", batch_size=2, img_size=32) is None
    assert "no network" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("what", "on_gpu", "batch_size"),
    [("step", True, 256), ("step", False, 32), ("joint", True, 256), ("sweep", True, 32)],
)
def test_a_gpu_is_measured_with_large_batches(monkeypatch, what, on_gpu, batch_size):
    monkeypatch.setattr(benchmark.torch.cuda, "is_available", lambda: on_gpu)
    assert benchmark.parse_args([what, "--data_dir", "x"]).batch_size == batch_size
    assert benchmark.parse_args([what, "--data_dir", "x", "--batch_size", "7"]).batch_size == 7
    assert step.steps_per_turn() == (10 if on_gpu else 1)


@pytest.mark.parametrize(
    ("ms", "cores", "rate", "gpus", "bottleneck", "reached"),
    [
        (2.0, 8, 3000, 4, "loader", 4000),
        (0.5, 8, 3000, 4, "step", 12000),
    ],
)
def test_joint_names_the_bottleneck_and_the_days_of_a_pretraining(
    monkeypatch, capsys, ms, cores, rate, gpus, bottleneck, reached
):
    row = {"row": "x", "cpu_ms": ms, "wall_ms": ms, "cpu_ratio": 1, "wall_ratio": 1}
    monkeypatch.setattr(
        benchmark,
        "measure_loader_at",
        lambda args, sizes: {size: {"loader": [row]} for size in sizes},
    )
    result = found(
        capsys, "joint", "--cores", str(cores), "--gpus", str(gpus), "--step_rate", str(rate)
    )
    (only,) = result["joint"]
    (part,) = only["parts"]
    assert (part["bottleneck"], part["reached"]) == (bottleneck, reached)
    assert (part["size"], part["epochs"]) == (224, 600)
    assert only["days"] == pytest.approx(600 * 1_281_167 / reached / 86400)


def test_joint_adds_up_the_epochs_of_each_size(monkeypatch, capsys):
    def measure_loader_at(args, sizes):
        same = {"row": "x", "wall_ms": 1, "cpu_ratio": 1, "wall_ratio": 1}
        return {size: {"loader": [{**same, "cpu_ms": size / 100}]} for size in sizes}

    monkeypatch.setattr(benchmark, "measure_loader_at", measure_loader_at)
    monkeypatch.setitem(benchmark.PRETRAIN["fast"], "train_sizes", [112, 224])
    flags = ["--recipe", "fast", "--epochs", "3", "--cores", "1", "--gpus", "1"]
    result = found(capsys, "joint", *flags, "--step_rate", "500")
    (only,) = result["joint"]
    # 2 epochs at 112 px: 1000/1.12 = 893 images/s loaded, 2000 trained; 1 at 224: 446 and 500.
    assert [(part["size"], part["epochs"]) for part in only["parts"]] == [(112, 2), (224, 1)]
    seconds = 1_281_167 * (2 * 1.12e-3 + 2.24e-3)
    assert only["days"] == pytest.approx(seconds / 86400)
    assert {part["bottleneck"] for part in only["parts"]} == {"loader"}


def test_joint_measures_the_step_of_the_recipe(monkeypatch, capsys):
    batch, _ = step.make_batch(2, 48, recipe="guide", pin_memory=False)
    assert batch.draws.shape == (2, 2, 2)  # two operations of RandAugment
    batch, _ = step.make_batch(2, 48, recipe="fast", pin_memory=False)
    assert batch.draws.shape == (2, 0, 2) and batch.image.shape == (2, 3, 48, 48)
    asked = []

    def make_turn(*names, **settings):
        asked.append(settings)
        return lambda number: None

    row = {"row": "x", "cpu_ms": 1, "wall_ms": 1, "cpu_ratio": 1, "wall_ratio": 1}
    monkeypatch.setattr(
        benchmark, "measure_loader_at", lambda args, sizes: {s: {"loader": [row]} for s in sizes}
    )
    monkeypatch.setattr(benchmark, "make_turn", make_turn)
    found(capsys, "joint", "--recipe", "fast", "--epochs", "1", "--batch_size", "4")
    assert asked == [{"batch_size": 4, "img_size": 192, "recipe": "fast"}]


@pytest.mark.parametrize("what", ["step", "sweep", "start"])
def test_a_recipe_is_refused_where_it_would_be_ignored(what):
    with pytest.raises(UserError, match=f"--recipe is for .*: {what} does not take it"):
        benchmark.parse_args([what, "--recipe", "fast", "--data_dir", "x"])


def test_pretrain_with_a_recipe_measures_it_beside_the_guides(tree, monkeypatch, capsys):
    started = []

    def run_python(words):
        words = list(map(str, words))
        started.append(words)
        out = Path(words[words.index("--out" if "--out" in words else "--checkpoint_dir") + 1])
        out.mkdir(parents=True)
        (out / "results.json").write_text(json.dumps({"last_val_acc": 1}))
        (out / "log.jsonl").write_text(json.dumps({"val_top1": 2}))

    monkeypatch.setattr(end_to_end, "run_python", run_python)
    clock = iter(range(1, 9))
    monkeypatch.setattr(end_to_end, "children_cpu_seconds", lambda: next(clock))
    result = found(capsys, "pretrain", "--data_dir", str(tree), "--recipe", "fast", *SMALL)
    assert [row["row"] for row in result["pretrain"]] == [
        "plain_train.py",
        "ours",
        "ours, recipe fast",
    ]
    recipes = [words[words.index("--recipe") + 1] for words in started[1:]]
    assert recipes == ["guide", "fast"]


def test_pretrain_runs_both_sides_and_reports_their_accuracies(tree, capsys):
    result = found(capsys, "pretrain", "--data_dir", str(tree), "--epochs", "2", *SMALL)
    plain, ours = result["pretrain"]
    assert (plain["row"], ours["row"]) == ("plain_train.py", "ours")
    assert result["images"] == 2 * 8 and plain["cpu_ratio"] == 1
    assert min(plain["cpu_ms"], ours["cpu_ms"]) > 0
    assert {plain["accuracy"], ours["accuracy"]} <= {0, 50, 100}  # of two validation images


def test_sweep_starts_the_same_runs_on_both_sides(tmp_path, monkeypatch, capsys):
    write_dtd(tmp_path, images_per_class=6, folds=2, size=40, seed=0, num_classes=2)
    started = []

    def run_python(words):
        words = list(map(str, words))
        started.append(words)
        if "run_all.py" in words:
            folder = Path(words[words.index("--run_dir") + 1]) / "run"
            assert (Path(words[words.index("--data_dir") + 1]) / "images/banded").is_dir()
        else:
            folder = Path(words[words.index("--out") + 1])
            tree = Path(words[words.index("--data_dir") + 1])
            assert [len(list((tree / s).glob("*/*.jpg"))) for s in ("train", "val")] == [4, 4]
        folder.mkdir(parents=True)
        (folder / "results.json").write_text(json.dumps({"val_acc": 10 * len(started)}))

    monkeypatch.setattr(end_to_end, "run_python", run_python)
    clock = iter(range(1, 9))
    monkeypatch.setattr(end_to_end, "children_cpu_seconds", lambda: next(clock))
    result = found(capsys, "sweep", "--data_dir", str(tmp_path), *SMALL)
    *plain, ours = started
    assert all(words[:2] == ["-m", "tools.benchmark.plain_train"] for words in plain)
    assert {
        (words[words.index("--model") + 1], words[words.index("--data_dir") + 1][-5:])
        for words in plain
    } == {(model, fold) for model in ("resnet18", "twistnet18") for fold in ("fold1", "fold2")}
    assert ours[0] == "run_all.py"
    augmentation = ["--num_ops", "0", "--mixup", str(FINETUNE["mixup"])]  # as the recipe's
    assert all(" ".join(augmentation) in " ".join(words) for words in plain)
    assert [row["accuracy"] for row in result["sweep"]] == [25, 50]  # the mean of 10 to 40, and 50
    assert result["images"] == 10 * 4 * 4  # epochs, runs, training images


def test_start_runs_both_scripts_to_their_end(capsys):
    plain, ours = found(capsys, "start", *SMALL)["start"]
    assert (plain["row"], ours["row"]) == ("plain_train.py", "train.py")
    assert plain["wall_ms"] > 0 and ours["wall_ratio"] == pytest.approx(
        plain["wall_ms"] / ours["wall_ms"]
    )


@pytest.mark.parametrize("changed", ["", " --num_ops 0 --mixup 0 --lr 0.005 --epochs 6"])
def test_the_plain_script_learns(tmp_path, monkeypatch, changed):
    """Red and blue images are told apart after a few epochs."""
    rng = np.random.default_rng(0)
    for name, channel in (("blue", 2), ("red", 0)):
        for split, count in (("train", 32), ("val", 8)):
            Path("tree", split, name).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 80, (40, 40, 3), dtype=np.uint8)
                pixels[:, :, channel] += 150
                Image.fromarray(pixels).save(f"tree/{split}/{name}/{number}.png")
    flags = "--epochs 4 --batch_size 8 --img_size 32 --workers 0 --lr 0.02" + changed
    words = ["plain_train", *flags.split(), "--data_dir", "tree", "--out", "plain"]
    monkeypatch.setattr("sys.argv", words)
    plain_train.main()
    results = json.loads(Path("plain/results.json").read_text())
    assert results["val_acc"] >= max(90, results["last_val_acc"])
    assert Path("plain/latest.pt").is_file()


def test_whole_runs_need_images_and_report_what_failed(tree):
    with pytest.raises(UserError, match="sweep needs real images: .*--data_dir"):
        benchmark.main(["sweep"])
    broken = next((tree / "val").glob("*/*"))
    broken.write_bytes(b"no image")
    with pytest.raises(UserError, match="plain_train .* failed: .*cannot identify image file"):
        benchmark.main(["pretrain", "--data_dir", str(tree), *SMALL])
