"""The table of a sweep: what is averaged, what is marked, what is kept apart."""

import csv
import json
import math

import pytest

from common.errors import UserError
from sweeps.grid import read_sweep
from sweeps.rows import footnotes, make_rows, pick_baseline
from sweeps.tables import latex, to_latex, write_tables


def write_run(root, model, fold, seed, accuracy, *, sha="ab" * 32, dataset="dtd", **settings):
    folder = root / f"{dataset}_fold{fold}_{model}_seed{seed}"
    folder.mkdir(parents=True)
    results = {
        "model": model, "dataset": dataset, "fold": fold, "seed": seed, "test_acc": accuracy,
        "test_images": 100, "train_images": 100, "parameters": 11_200_623,
        "settings": {"epochs": 100, "fold": fold, "seed": seed, "model": model, **settings},
        "weights": {"source": "w.pt", "sha256": sha, "tensors_loaded": 120},
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def write_pair(root):
    """Differences 1, 2, 3 over three folds of one seed."""
    for fold, gain in ((1, 1.0), (2, 2.0), (3, 3.0)):
        write_run(root, "resnet18", fold, 42, 60.0 + fold)
        write_run(root, "twistnet18", fold, 42, 60.0 + fold + gain)


GRID = {"dataset": "dtd", "models": ["twistnet18", "resnet18"], "folds": [1, 2, 3], "seeds": [42]}


def rows_of(run_dir, baseline=None, **grid):
    sweep = read_sweep(run_dir, **grid)
    baseline = pick_baseline(sweep, baseline)
    rows = make_rows(sweep, baseline)
    return {row.label: row for row in rows}, footnotes(sweep, rows, baseline)


def test_write_tables_writes_every_format(tmp_path):
    write_pair(tmp_path)
    markdown = write_tables(tmp_path, **GRID)
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == markdown
    lines = markdown.splitlines()
    assert lines[2].startswith("| twistnet18 | 11.20      | **64.00 ± 2.00 (3 folds × 1 seed)** |")
    assert "+2.00 [−2.97, +6.97] | 0.225 | 0.225    | 0.250         | 3/0/0 |" in lines[2]
    assert "| 62.00 ± 1.00 (3 folds × 1 seed)     | –" in lines[3]  # resnet18, the baseline
    with (tmp_path / "table.csv").open() as file:
        twist, resnet = csv.DictReader(file)
    assert float(twist["p"]) == pytest.approx(1 - math.sqrt(0.6))
    assert (twist["baseline"], twist["wins"], resnet["difference"]) == ("resnet18", "3", "")
    tex = (tmp_path / "table.tex").read_text(encoding="utf-8")
    assert r"\textbf{64.00 $\pm$ 2.00 (3 folds $\times$ 1 seed)}" in tex and r"\toprule" in tex
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 1 + 6
    assert not list(tmp_path.glob("*.partial"))


def test_missing_runs_are_marked_and_their_fold_is_not_averaged(tmp_path):
    write_pair(tmp_path)
    grid = {**GRID, "folds": [1, 2, 3, 4]}
    write_run(tmp_path, "resnet18", 4, 42, 10.0)
    lines = write_tables(tmp_path, **grid).splitlines()
    assert "64.00 ± 2.00 (3 folds × 1 seed) †1 of 4 missing" in lines[2]
    assert "+2.00 [−2.97, +6.97]" in lines[2]  # fold 4 is in no pair
    assert "**" not in lines[2]  # an incomplete row is not the best
    assert any(line.startswith("- † runs of 4 folds × 1 seed") for line in lines)


def test_skipped_folders_are_missing_and_other_models_no_rows(tmp_path):
    write_pair(tmp_path)
    write_run(tmp_path, "seresnet18", 1, 42, 99.0)
    text = write_tables(tmp_path, **GRID, skip=["dtd_fold2_resnet18_seed42"])
    assert "†1 of 3 missing" in text and "seresnet18" not in text


def test_a_sweep_without_any_result_has_a_table(tmp_path):
    text = write_tables(tmp_path, **GRID)
    assert text.count("– †3 of 3 missing") == 2


@pytest.mark.parametrize("change", [{"epochs": 10}, {"sha": "cd" * 32}])
def test_other_settings_or_weights_are_never_mixed(tmp_path, change):
    write_pair(tmp_path)
    write_run(tmp_path, "twistnet18", 4, 42, 1.0, **change)
    rows, notes = rows_of(tmp_path)
    assert list(rows) == ["resnet18", "twistnet18", "twistnet18 #2"]
    assert rows["twistnet18"].summary.mean == 64.0
    assert rows["twistnet18 #2"].summary.mean == 1.0
    expected = "epochs 10 instead of 100" if "epochs" in change else "weights cdcdcdcdcdcd instead"
    assert any("twistnet18 #2 is kept apart" in note and expected in note for note in notes)


def test_settings_of_place_do_not_part_runs(tmp_path):
    for fold, workers in ((1, 0), (2, 4)):
        place = {"workers": workers, "data_dir": f"/d{fold}", "data": f"fold {fold}"}
        write_run(tmp_path, "resnet18", fold, 42, 60.0, **place)
    assert list(rows_of(tmp_path)[0]) == ["resnet18"]


def test_a_fold_of_other_images_is_kept_apart(tmp_path):
    for fold in (1, 2):
        for seed in (42, 43):
            write_run(tmp_path, "resnet18", fold, seed, 60.0, data=f"fold {fold}")
            write_run(tmp_path, "twistnet18", fold, seed, 61.0, data=f"fold {fold}")
    write_run(tmp_path, "resnet18", 2, 44, 99.0, data="another fold 2")
    rows, notes = rows_of(tmp_path)
    assert rows["resnet18"].summary.mean == 60.0 and "resnet18 #2" in rows
    assert any("data others instead of as most (dtd_fold2_resnet18_seed44)" in n for n in notes)


def test_a_baseline_of_other_settings_is_told(tmp_path):
    write_run(tmp_path, "resnet18", 1, 42, 60.0, lr=0.1)
    write_run(tmp_path, "twistnet18", 1, 42, 61.0, lr=0.01)
    notes = rows_of(tmp_path)[1]
    assert "Not a like comparison: twistnet18 ran with lr 0.01 instead of 0.1 in resnet18." in notes


def test_the_grid_is_that_of_sweep_json_and_results_beside_it_stay_out(tmp_path):
    write_pair(tmp_path)
    write_run(tmp_path, "resnet18", 1, 7, 1.0)
    write_run(tmp_path, "seresnet18", 1, 42, 62.0)
    plan = {"dataset": "dtd", "models": ["twistnet18", "resnet18"], "folds": [1, 2, 3]}
    (tmp_path / "sweep.json").write_text(json.dumps({**plan, "seeds": [42]}))
    rows, _ = rows_of(tmp_path)
    assert list(rows) == ["twistnet18", "resnet18", "seresnet18"]
    assert rows["resnet18"].summary.mean == 62.0 and not rows["resnet18"].summary.missing
    assert rows["seresnet18"].summary.missing == 2
    assert [run.seed for run in read_sweep(tmp_path).outside] == [7]
    write_run(tmp_path, "vgg", 9, 1, 50.0, dataset="folder")
    other = read_sweep(tmp_path, dataset="folder")  # not the sweep of sweep.json
    assert (other.labels, other.folds, other.seeds) == (["vgg"], [9], [1])


def test_holm_counts_the_compared_models(tmp_path):
    write_pair(tmp_path)
    for fold, accuracy in ((1, 61.5), (2, 62.0), (3, 62.5)):
        write_run(tmp_path, "seresnet18", fold, 42, accuracy)
    rows, notes = rows_of(tmp_path)
    assert rows["twistnet18"].p_holm == pytest.approx(2 * rows["twistnet18"].versus.p)
    assert any("corrected for 2 comparisons" in note for note in notes)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"model": "resnet18", "dataset": "dtd", "fold": 1, "seed": 42}', "test_acc"),
        ('{"model": "a", "dataset": "dtd", "fold": 1, "seed": 42, "test_acc": 1}', "that of dtd"),
        ('{"model":"resnet18","dataset":"dtd","fold":1,"seed":42,"test_acc":NaN}', "is nan"),
    ],
)
def test_results_that_cannot_be_counted_are_told(tmp_path, content, told):
    write_run(tmp_path, "resnet18", 2, 42, 60.0)
    folder = write_run(tmp_path, "resnet18", 1, 42, 60.0)
    (folder / "results.json").write_text(content)
    rows, notes = rows_of(tmp_path)
    assert rows["resnet18"].summary.missing == 1
    assert any(folder.name in note and told in note for note in notes)


def test_clear_errors(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        read_sweep(tmp_path / "none")
    with pytest.raises(UserError, match="holds no run folder"):
        read_sweep(tmp_path)
    write_pair(tmp_path)
    with pytest.raises(UserError, match="--baseline vgg is not in .*resnet18, twistnet18"):
        pick_baseline(read_sweep(tmp_path), "vgg")
    write_run(tmp_path, "resnet18", 1, 42, 60.0, dataset="folder")
    with pytest.raises(UserError, match="dtd, folder: choose with --dataset"):
        read_sweep(tmp_path)
    assert len(read_sweep(tmp_path, dataset="folder").runs) == 1
    (tmp_path / "sweep.json").write_text('{"models": 3}')
    with pytest.raises(UserError, match="sweep.json cannot be read"):
        read_sweep(tmp_path)


def test_latex_escapes_what_latex_would_read(tmp_path):
    assert latex("a_b & 5 % #2 {x}") == r"a\_b \& 5 \% \#2 \{x\}"
    write_run(tmp_path, "net_a", 1, 42, 50.0)
    sweep = read_sweep(tmp_path)
    assert r"net\_a & 11.20 & 50.00 $\pm$ --" in to_latex(make_rows(sweep, "net_a"), [])
