"""tools/benchmark: every row is there, medians and ratios are what they say."""

import itertools
import json
import subprocess
from pathlib import Path

import pytest

from common.errors import UserError
from data.synthetic import write_dtd, write_imagenet_tree
from tools.benchmark import __main__ as benchmark
from tools.benchmark import end_to_end, loader, step, timing

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


def test_milliseconds_an_image_and_ratios_are_medians(monkeypatch):
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


def test_loader_has_every_way_to_read_and_the_devices_part(tree, capsys):
    result = found(capsys, "loader", "--data_dir", str(tree), "--images", "6", *SMALL)
    rows = [row["row"] for row in result["loader"]]
    assert rows[0].startswith("plain") and {
        "files, Pillow",
        "packed 256, Pillow",
        "decoded once (fine-tuning)",
    } <= set(rows)
    assert result["images"] == 6 and result["loader"][0]["cpu_ratio"] == 1
    assert all(row["cpu_ms"] > 0 and row["wall_ms"] > 0 for row in result["loader"])
    assert result["device"][0]["cpu_ms"] > 0
    assert result["kb"]["decoded"] == pytest.approx(48 * 48 * 3 / 1e3)


def test_loader_reads_class_folders_and_refuses_a_pack(tree, tmp_path_factory):
    args = benchmark.parse_args(["loader", "--data_dir", str(tree / "train"), "--images", "5"])
    made = loader.small_tree(args, tmp_path_factory.mktemp("made"))
    train, val, classes = loader.load_imagenet(made)
    assert (len(train), len(val), len(classes)) == (5, 2, 2)
    (tree / "train" / loader.MANIFEST).touch()
    with pytest.raises(UserError, match="is packed: give the tree"):
        loader.small_tree(args, tree)


def test_step_compares_two_networks_in_time_and_memory(monkeypatch, capsys):
    monkeypatch.setattr(step, "STEPS", {"plain": ("resnet18", True), "ours": ("twistnet18", False)})
    result = found(capsys, "step", *SMALL)
    plain, ours = result["step"]
    assert result["twistnet_memory"] == pytest.approx(ours["peak_mb"] / plain["peak_mb"])
    assert (
        plain["wall_ratio"] == 1 and min(plain["peak_mb"], ours["peak_mb"]) > 4 * 11.7
    )  # the weights alone, in float32
    assert result["twistnet_time"] == pytest.approx(ours["wall_ms"] / plain["wall_ms"])


@pytest.mark.parametrize(
    ("ms", "cores", "rate", "gpus", "bottleneck", "reached"),
    [
        (2.0, 8, 3000, 4, "loader", 4000),
        (0.5, 8, 3000, 4, "step", 12000),
    ],
)
def test_joint_says_which_side_decides_and_how_long_it_takes(
    monkeypatch, capsys, ms, cores, rate, gpus, bottleneck, reached
):
    row = {"row": "x", "cpu_ms": ms, "wall_ms": ms, "cpu_ratio": 1, "wall_ratio": 1}
    monkeypatch.setattr(benchmark, "loader", lambda args: {"loader": [row]})
    result = found(
        capsys, "joint", "--cores", str(cores), "--gpus", str(gpus), "--step_rate", str(rate)
    )
    (only,) = result["joint"]
    assert (only["bottleneck"], only["reached"]) == (bottleneck, reached)
    assert only["days"] == pytest.approx(600 * 1_281_167 / reached / 86400)


def test_pretrain_runs_both_sides_and_tells_their_accuracies(tree, capsys):
    result = found(capsys, "pretrain", "--data_dir", str(tree), "--epochs", "2", *SMALL)
    plain, ours = result["pretrain"]
    assert (plain["row"], ours["row"]) == ("plain loader, --no_amp", "ours")
    assert result["images"] == 2 * 8 and plain["cpu_ratio"] == 1
    assert min(plain["cpu_ms"], ours["cpu_ms"]) > 0
    assert {plain["accuracy"], ours["accuracy"]} <= {0, 50, 100}  # of two validation images


def test_sweep_starts_the_same_runs_on_both_sides(tmp_path, monkeypatch, capsys):
    write_dtd(tmp_path, images_per_class=6, folds=2, size=40, seed=0, num_classes=2)
    started = []

    def run(command, **kwargs):
        started.append(command[1:])
        runs = [4] if "run_all.py" in command else [len(started)]
        for number in runs:
            cell = Path(command[command.index("--run_dir") + 1]) / f"cell{number}"
            cell.mkdir(parents=True)
            (cell / "results.json").write_text(json.dumps({"test_acc": 10 * number}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(end_to_end.subprocess, "run", run)
    monkeypatch.setattr(end_to_end, "children_cpu", itertools.count(1).__next__)
    result = found(capsys, "sweep", "--data_dir", str(tmp_path), *SMALL)
    *plain, ours = started
    assert [command[:3] for command in plain] == 4 * [["-m", "tools.benchmark.plain", "train.py"]]
    assert all("--no_amp" in command and "--no_cache" in command for command in plain)
    assert {
        (command[command.index("--model") + 1], command[command.index("--fold") + 1])
        for command in plain
    } == {(model, fold) for model in ("resnet18", "twistnet18") for fold in "12"}
    assert ours[0] == "run_all.py" and "--no_amp" not in ours
    assert [row["accuracy"] for row in result["sweep"]] == [25, 40]  # the mean of 10, 20, 30, 40
    assert result["images"] == 10 * 4 * 4  # epochs, runs, training images


def test_start_ends_at_the_first_step(tmp_path, capsys):
    write_dtd(tmp_path, images_per_class=6, folds=1, size=40, seed=0, num_classes=2)
    least, ours = found(capsys, "start", "--data_dir", str(tmp_path), *SMALL)["start"]
    assert least["wall_ms"] > 0 and ours["wall_ratio"] == pytest.approx(
        least["wall_ms"] / ours["wall_ms"]
    )


def test_whole_runs_need_images_and_say_what_failed(tree):
    with pytest.raises(UserError, match="sweep needs real images: .*--data_dir"):
        benchmark.main(["sweep"])
    broken = next((tree / "val").glob("*/*"))
    broken.write_bytes(b"no image")
    with pytest.raises(UserError, match=f"{broken.name} cannot be read"):
        benchmark.main(["pretrain", "--data_dir", str(tree), *SMALL])
