"""The report and the curves, as a user runs them, and what a page shows of each run."""

import base64
import io
import json
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sweeps import figures
from sweeps.comparison import confused_pairs, confusion, make_rows, mistaken_images
from sweeps.figures import LONGEST_NAME, series, shorten
from sweeps.report import collect_mistakes, make_thumbnail, summarise_in_words
from sweeps.runs import read_log, read_sweep

ROOT = Path(__file__).parents[1]
CLASSES = ["banded", "dotted & <b>", "$woven$"]


def report(*args, path=None, environment=None):
    """Run the tool; `path` is searched for modules before the installed ones."""
    env = {**os.environ, "PYTHONPATH": str(path or ""), **(environment or {})}
    command = [sys.executable, "-W", "error::UserWarning", "-m", "tools.report", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def write_log(folder, epochs=3, tail="", **values):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"epoch": e, "lr": 0.1 / e, "train_loss": 3 / e, "val_loss": 3 / e, "val_top1": 20.0 * e,
         "val_top5": 90.0, "images_per_s": 100.0, **values}
        for e in range(1, epochs + 1)
    ]  # fmt: skip
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)


def write_run(root, model, fold, seed, correct, *, data_dir="nowhere", **values):
    """A finished run; `correct` of 4 images a class are right, the rest taken for the next."""
    folder = root / f"dtd_fold{fold}_{model}_seed{seed}"
    write_log(folder, **({"gates": [0.1, 0.2, 0.3, 0.4]} if "twist" in model else {}))
    labels = [label for label in range(3) for _ in range(4)]
    predictions = [label if i % 4 < correct else (label + 1) % 3 for i, label in enumerate(labels)]
    matrix = np.zeros((3, 3), dtype=int)
    np.add.at(matrix, (labels, predictions), 1)
    results = {
        "model": model, "dataset": "dtd", "fold": fold, "seed": seed, "best_epoch": 3,
        "val_acc": 50.0, "test_acc": 25.0 * correct, "test_images": 12, "train_images": 12,
        "classes": CLASSES, "confusion": matrix.tolist(), "test_labels": labels,
        "test_predictions": predictions, "test_files": [f"{i}.jpg" for i in range(12)],
        "settings": {"epochs": 3, "data_dir": str(data_dir), "note": "<script>"},
        "weights": {"source": "w.pt", "sha256": "ab" * 32, "tensors_loaded": 9},
        "parameters": 1000, "seconds": 1800.0, "commit": "c0ffee", "command": "python train.py",
        "versions": {"torch": "9.9"}, **values,
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_the_report_needs_no_other_file(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    data, runs = tmp_path / "data", tmp_path / "runs"
    data.mkdir()
    for i in range(11):  # one of the twelve is gone
        Image.new("RGB", (40, 20), (20 * i, 0, 0)).save(data / f"{i}.jpg")
    for fold, correct in ((1, 2), (2, 3), (3, 3)):
        write_run(runs, "resnet18", fold, 42, correct - 1, data_dir=data)
        write_run(runs, "twistnet18", fold, 42, correct, data_dir=data)
    (runs / "notes.txt").write_text("not a run")
    (runs / "dtd_fold1_twistnet18_seed42.old").mkdir()
    done = report(runs)
    assert done.returncode == 0, done.stderr
    assert "| twistnet18 | 0.00       | **66.67 ± 14.43 (3 folds × 1 seed)** |" in done.stdout
    page = (runs / "report.html").read_text(encoding="utf-8")
    drawn = ["classes", "confusion", "gates", "learning", "paired"]
    assert sorted(path.stem for path in (runs / "report").glob("*.png")) == drawn
    assert page.count("data:image/png;base64,") == 5
    assert page.count("data:image/jpeg;base64,") > 3 and "images are not in" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "<b>66.67 ± 14.43 (3 folds × 1 seed)</b>" in page
    assert "dotted &amp; &lt;b&gt;" in page and "<script>" not in page
    for shown in ("ab" * 32, "c0ffee", "9.9", "3.00 hours", "python train.py"):
        assert shown in page


def test_a_sweep_that_is_half_done_has_a_report(tmp_path):
    write_run(tmp_path, "twistnet18", 1, 42, 3)
    write_log(tmp_path / "dtd_fold2_twistnet18_seed42", 1, tail='{"epoch": 2, "lr"')
    write_run(tmp_path, "resnet18", 1, 42, 2)
    write_log(tmp_path / "dtd_fold1_seresnet18_seed42", 2, train_loss=math.nan)
    (tmp_path / "dtd_fold2_resnet18_seed42").mkdir()
    done = report(tmp_path, "--baseline", "twistnet18")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("– †1 of 2 missing") == 2  # no seed has both folds
    assert "2 of 6 runs finished" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_without_matplotlib_the_page_and_the_tables_are_still_written(tmp_path):
    broken = tmp_path / "path"
    broken.mkdir()
    (broken / "matplotlib.py").write_text("raise ModuleNotFoundError(name='matplotlib')")
    write_run(tmp_path / "runs", "resnet18", 1, 42, 3)
    done = report(tmp_path / "runs", path=broken)
    assert done.returncode == 0, done.stderr
    assert "pip install matplotlib" in done.stdout
    page = (tmp_path / "runs" / "report.html").read_text(encoding="utf-8")
    assert "pip install matplotlib" in page and "75.00" in page
    assert (tmp_path / "runs" / "table.tex").is_file()
    done = report("--curves", tmp_path / "runs", path=broken)
    assert done.returncode == 2 and "pip install matplotlib" in done.stderr


def test_curves_of_running_and_finished_jobs(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    write_log(tmp_path / "checkpoints", 2, tail='{"epo')
    write_run(tmp_path / "runs", "resnet18", 1, 42, 3)
    (tmp_path / "runs" / "dtd_fold2_resnet18_seed42").mkdir()
    (tmp_path / "runs" / "dtd_fold2_resnet18_seed42" / "log.jsonl").write_text("")
    out = tmp_path / "new" / "curves.png"
    jobs = ("--curves", tmp_path / "runs", "--curves", tmp_path / "checkpoints")
    done = report(*jobs, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "dtd_fold2_resnet18_seed42: no epoch in its log.jsonl yet" in done.stdout
    with Image.open(out) as image:
        assert image.size[0] == 1600


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["{}/none"], "is not a folder"),
        (["{}"], "contains no run folder"),
        (["--curves", "{}"], "has no log.jsonl"),
        ([], "give RUN_DIR, or --curves"),
        (["{}", "--curves", "{}"], "give RUN_DIR, or --curves"),
        (["{}", "--out", "x.png"], "--out is for --curves"),
        (["--curves", "{}", "--baseline", "resnet18"], "--baseline is for RUN_DIR"),
    ],
)
def test_bad_input_is_one_line(tmp_path, args, told):
    done = report(*(arg.format(tmp_path) for arg in args))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and told in line


def test_read_log_keeps_the_last_line_of_an_epoch_and_skips_incomplete_lines(tmp_path):
    log = tmp_path / "log.jsonl"
    foreign = '[1]\n{"epoch": Infinity}\n{"epoch": 1}\n'
    log.write_text('{"epoch": 2}\n' + foreign + '{"epoch": 2, "x": 5}\n{"epoch": 3, "x')
    assert read_log(tmp_path) == [{"epoch": 1}, {"epoch": 2, "x": 5}]
    assert read_log(tmp_path / "none") == []


def test_series_is_mean_and_std_over_the_runs_that_have_the_epoch():
    logs = [
        [{"epoch": 1, "x": 1.0}, {"epoch": 2, "x": 4.0}],
        [{"epoch": 1, "x": 3.0}, {"epoch": 2}],
    ]
    epochs, mean, std = series(logs, lambda entry: entry["x"])
    assert epochs.tolist() == [1, 2] and mean.tolist() == [2.0, 4.0]
    assert std.tolist() == pytest.approx([math.sqrt(2), 0.0])


def test_confused_pairs_by_hand():
    matrix = np.array([[6, 3, 1], [1, 9, 0], [2, 0, 3]])
    first, second = confused_pairs(matrix, 2)
    assert (first.a, first.b, first.a_as_b, first.b_as_a) == (0, 1, 3, 1)
    assert (
        first.share == 0.2
    )  # 4 of the 20 tests of both classes; and 3 of 15, which is found later
    assert (second.a, second.b, second.share) == (0, 2, 0.2)  # 3 of 15
    assert len(confused_pairs(matrix)) == 2  # 1 and 2 are never confused


def test_names_that_are_shortened_stay_different():
    names = [f"dtd_fold1_twistnet18_no_spiral_seed{seed}" for seed in (42, 43, 44)]
    assert len({shorten(name) for name in names}) == 3
    assert max(len(shorten(name)) for name in names) <= LONGEST_NAME
    assert shorten("resnet18") == "resnet18"


def test_confusion_and_images_add_up_over_runs(tmp_path):
    write_run(tmp_path, "resnet18", 1, 42, 3)
    write_run(tmp_path, "resnet18", 2, 42, 2)
    write_run(tmp_path, "resnet18", 3, 42, 2, confusion=None)  # as older results
    runs = read_sweep(tmp_path).finished()
    assert confusion(runs)[1].tolist() == [[5, 3, 0], [0, 5, 3], [3, 0, 5]]
    # image 3 is wrong in all three runs, image 2 where 2 of 4 are right
    assert mistaken_images(runs, 0, 1) == [("3.jpg", 3, 3), ("2.jpg", 2, 3)]


def test_images_that_are_missing_or_unreadable_are_counted_apart(tmp_path):
    write_run(tmp_path, "resnet18", 1, 42, 2)
    runs = read_sweep(tmp_path).finished()
    assert collect_mistakes(runs, None)["missing"] == 6
    Image.new("L", (9, 9)).save(tmp_path / "2.jpg")
    (tmp_path / "3.jpg").write_text("not an image")
    found = collect_mistakes(runs, tmp_path)
    assert (found["missing"], found["unreadable"], found["folder"]) == (4, 1, tmp_path)
    done = report(tmp_path, "--data-dir", tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert done.returncode == 0 and f"4 images are not in {tmp_path}" in page
    assert f"1 images in {tmp_path} cannot be read" in page


def test_thumbnails_use_the_reader_of_the_training_images(tmp_path):
    """A 16-bit PNG is scaled to 8 bits, where Pillow's own conversion makes it white."""
    grey = np.full((30, 30), 100 << 8, dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "16 bit.png")
    data = base64.b64decode(make_thumbnail(tmp_path / "16 bit.png"))
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (224, 224) and image.getpixel((100, 100)) == (100, 100, 100)
    (tmp_path / "none.png").write_bytes(b"")
    assert make_thumbnail(tmp_path / "none.png") is None


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_any_encoding_of_the_terminal_and_any_file_name_will_do(tmp_path, encoding):
    """Names that are not UTF-8 come from the file system as surrogates."""
    name = os.fsdecode(b"caf\xe9")
    for fold in (1, 2, 3):
        for model, correct in (("resnet18", 2), ("twistnet18", 3)):
            files = [f"{name}/{i}.jpg" for i in range(12)]
            classes = [name, "dotted", "纹理"]
            write_run(
                tmp_path, model, fold, 42, correct, classes=classes, test_files=files,
                data_dir=tmp_path, command=f"train.py {name}",
            )  # fmt: skip
    (tmp_path / name).mkdir()
    for i in range(12):
        Image.new("RGB", (9, 9)).save(tmp_path / name / f"{i}.jpg")
    env = {**os.environ, "PYTHONIOENCODING": encoding, "LC_ALL": "C"}
    command = [sys.executable, "-m", "tools.report", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert (b"\xb1" if encoding == "latin-1" else b"\\xb1") in done.stdout  # ±
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "caf\\xe9" in page and "纹理" in page and page.count("data:image/jpeg") > 0


def test_a_notebooks_backend_does_not_stop_the_figures(tmp_path):
    """Jupyter and Colab set it for every process they start."""
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    write_run(tmp_path, "resnet18", 1, 42, 3)
    backend = "module://a_backend_that_is_not_here"
    done = report(tmp_path, environment={"MPLBACKEND": backend})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report" / "learning.png").is_file()


def test_characters_without_a_font_are_one_line(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    monkeypatch.setattr(figures, "CJK_FONTS", [])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with figures.new_figure(tmp_path / "x.png", 1) as figure:
            figure.text(0.5, 0.5, "日本語")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path / 'x.png'}: some characters are drawn as boxes")


def test_gradient_norms_are_drawn_where_they_are_logged(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    drawn = []
    monkeypatch.setattr(figures, "draw_norms", lambda axes, logs, **line: drawn.append(logs))
    write_run(tmp_path, "resnet18", 1, 42, 3)
    log = read_log(tmp_path / "dtd_fold1_resnet18_seed42")
    assert figures.draw_learning(tmp_path / "a.png", read_sweep(tmp_path))
    figures.draw_curves(tmp_path / "b.png", {"old": log})
    assert not drawn
    write_log(tmp_path / "dtd_fold1_resnet18_seed42", grad_norm=2.0, grad_norm_max=9.0)
    new = read_log(tmp_path / "dtd_fold1_resnet18_seed42")
    assert figures.draw_learning(tmp_path / "a.png", read_sweep(tmp_path))
    figures.draw_curves(tmp_path / "b.png", {"old": log, "new": new})
    assert drawn == [[new], [log], [new]]


def test_the_median_and_the_maximum_of_the_gradient_norm_are_two_lines():
    matplotlib = pytest.importorskip("matplotlib.figure", reason="pip install matplotlib")
    axes = matplotlib.Figure().subplots()
    log = [{"epoch": 1, "grad_norm": 2.0, "grad_norm_max": 9.0}, {"epoch": 2}]
    figures.draw_norms(axes, [log], color="black", ls="-")
    assert [line.get_ydata().tolist() for line in axes.lines] == [[2.0], [9.0]]
    assert axes.yaxis.get_major_formatter()(10) == "10"  # not TeX, which would be shown as it is


def test_the_highest_mean_is_called_complete_only_if_it_is(tmp_path):
    for fold in (1, 2, 3):
        write_run(tmp_path, "resnet18", fold, 42, 2)
    (tmp_path / "dtd_fold4_resnet18_seed42").mkdir()
    sweep = read_sweep(tmp_path)
    rows = make_rows(sweep, "resnet18")
    assert summarise_in_words(rows, "resnet18", "resnet18", 1.0)[1].startswith(
        "Highest mean test accuracy: resnet18, 50.00"
    )
