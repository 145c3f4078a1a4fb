"""The table of a sweep: which runs it has, what is averaged, marked and kept apart."""

import csv
import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from sweeps import tables
from sweeps.comparison import footnotes, make_rows, pick_baseline
from sweeps.runs import add_plan, read_plans, read_sweep
from sweeps.tables import latex, to_latex, write_tables

ROOT = Path(__file__).resolve().parent.parent


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


def write_planned(run_dir, **grid):
    add_plan(run_dir, **{**GRID, **grid})
    return write_tables(run_dir, dataset="dtd")


def rows_of(run_dir, baseline=None):
    sweep = read_sweep(run_dir)
    baseline = pick_baseline(sweep, baseline)
    rows = make_rows(sweep, baseline)
    return {row.label: row for row in rows}, footnotes(sweep, rows, baseline)


def test_write_tables_writes_every_format(tmp_path):
    write_pair(tmp_path)
    markdown = write_planned(tmp_path)
    assert (tmp_path / "table.md").read_text(encoding="utf-8") == markdown
    lines = markdown.splitlines()
    assert lines[2].startswith("| twistnet18 | 11.20      | **64.00 ± 2.00 (3 folds × 1 seed)** |")
    assert "+2.00 [−2.97, +6.97] | 0.225    | 3/0/0 |" in lines[2]
    assert "| 62.00 ± 1.00 (3 folds × 1 seed)     | –" in lines[3]  # resnet18, the baseline
    with (tmp_path / "table.csv").open() as file:
        twist, resnet = csv.DictReader(file)
    assert float(twist["p"]) == pytest.approx(1 - math.sqrt(0.6))
    assert twist["p_sign_flip"] == "0.25"
    assert (twist["baseline"], twist["wins"], resnet["difference"]) == ("resnet18", "3", "")
    tex = (tmp_path / "table.tex").read_text(encoding="utf-8")
    assert r"\textbf{64.00 $\pm$ 2.00 (3 folds $\times$ 1 seed)}" in tex and r"\toprule" in tex
    assert len((tmp_path / "runs.csv").read_text().splitlines()) == 1 + 6
    assert not [path for path in tmp_path.iterdir() if ".tmp" in path.name]


def test_missing_runs_are_marked_and_their_fold_is_not_averaged(tmp_path):
    write_pair(tmp_path)
    write_run(tmp_path, "resnet18", 4, 42, 10.0)
    lines = write_planned(tmp_path, folds=[1, 2, 3, 4]).splitlines()
    assert "64.00 ± 2.00 (3 folds × 1 seed) †1 of 4 missing" in lines[2]
    assert "+2.00 [−2.97, +6.97]" in lines[2]  # fold 4 is in no pair
    assert "**" not in lines[2]  # an incomplete row is not the best
    assert any(line.startswith("- † runs that are missing, of the 4") for line in lines)


def test_a_sweep_without_any_result_has_a_table(tmp_path):
    text = write_planned(tmp_path)
    assert text.count("– †3 of 3 missing") == 2


def test_a_later_sweep_in_the_same_folder_adds_to_the_table(tmp_path):
    """Folds 1-2 first, then fold 3: all six runs are in the table."""
    write_pair(tmp_path)
    write_planned(tmp_path, folds=[1, 2])
    lines = write_planned(tmp_path, folds=[3]).splitlines()
    assert "64.00 ± 2.00 (3 folds × 1 seed)" in lines[2] and "†" not in lines[2] + lines[3]
    assert [plan["folds"] for plan in read_plans(tmp_path)] == [[1, 2], [3]]


def test_a_narrower_sweep_leaves_the_table_as_it_is(tmp_path):
    write_pair(tmp_path)
    before = write_planned(tmp_path)
    assert write_planned(tmp_path, models=["resnet18"], folds=[2]) == before
    assert len(read_plans(tmp_path)) == 1


def test_another_seed_of_one_fold_does_not_drop_the_other_folds(tmp_path):
    write_pair(tmp_path)
    write_planned(tmp_path)
    write_run(tmp_path, "twistnet18", 1, 43, 64.0)  # fold 1 had 62 with seed 42
    lines = write_planned(tmp_path, models=["twistnet18"], folds=[1], seeds=[43]).splitlines()
    assert "64.33 ± 1.53 (4 runs in 3 folds)" in lines[2]
    assert "+2.00 [−2.97, +6.97]" in lines[2]  # paired over the seeds of both
    assert "62.00 ± 1.00 (3 folds × 1 seed) †1 of 4 missing" in lines[3]


def test_two_sweeps_may_be_planned_at_the_same_time(tmp_path):
    code = (
        "import sys; from pathlib import Path; from sweeps.runs import add_plan\n"
        "add_plan(Path(sys.argv[1]), dataset='dtd', models=['a'], folds=[int(sys.argv[2])],"
        " seeds=[1])"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    started = [subprocess.Popen([*command, str(fold)], cwd=ROOT) for fold in range(1, 5)]
    assert [process.wait() for process in started] == [0] * 4
    assert sorted(plan["folds"][0] for plan in read_plans(tmp_path)) == [1, 2, 3, 4]


def test_what_is_left_out_is_said_beside_the_table(tmp_path):
    write_pair(tmp_path)
    write_run(tmp_path, "resnet18", 1, 42, 50.0, dataset="folder")
    (tmp_path / "dtd_fold9_resnet18_seed42").mkdir()  # not finished, and nobody planned it
    text = write_planned(tmp_path)
    assert "- Not in this table: runs of other datasets (1 of folder)." in text
    assert "not finished and not planned (dtd_fold9_resnet18_seed42)" in text
    assert "†" not in text


def test_without_scipy_the_table_has_means_and_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    write_pair(tmp_path)
    text = write_planned(tmp_path)
    assert "64.00 ± 2.00" in text and "| +2.00      | 3/0/0 |" in text and "Holm" not in text
    assert "- No intervals and no p values: computing them needs scipy: pip install scipy." in text


@pytest.mark.parametrize(
    ("number", "kind", "told"),
    [
        (errno.EACCES, UserError, "copy the runs to another folder"),
        (errno.EROFS, UserError, "copy the runs to another folder"),
        (errno.ENOSPC, OSError, "No space left on device"),
    ],
)
def test_a_table_that_cannot_be_written_is_printed(
    tmp_path, monkeypatch, capsys, number, kind, told
):
    write_pair(tmp_path)

    def fail(path, content):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(tables, "write_atomic", fail)
    with pytest.raises(kind, match=told):
        write_planned(tmp_path)
    assert "64.00 ± 2.00" in capsys.readouterr().out


def test_equal_differences_have_no_interval_and_the_note_says_why(tmp_path):
    for fold in (1, 2, 3):
        write_run(tmp_path, "resnet18", fold, 42, 60.0 + fold)
        write_run(tmp_path, "twistnet18", fold, 42, 62.0 + fold)
    text = write_planned(tmp_path)
    assert "| +2.00 " in text and "95 % CI" not in text
    assert "- twistnet18: no interval and no p, as all differences are equal." in text
    assert "ewer than 3" not in text


def test_a_seed_without_all_folds_is_not_averaged(tmp_path):
    for fold, accuracy in ((1, 60.0), (2, 70.0)):
        write_run(tmp_path, "resnet18", fold, 42, accuracy)
    write_run(tmp_path, "resnet18", 1, 43, 61.0)
    grid = {"dataset": "dtd", "models": ["resnet18"]}
    add_plan(tmp_path, **grid, folds=[1, 2], seeds=[42])
    add_plan(tmp_path, **grid, folds=[1], seeds=[43])
    text = write_tables(tmp_path, dataset="dtd")
    assert "65.00 ± – (2 folds × 1 seed)" in text
    assert "- resnet18: 1 finished run not in the mean, which is over complete seeds." in text


def test_two_folds_have_no_interval_and_the_note_says_why(tmp_path):
    write_pair(tmp_path)
    for model in ("resnet18", "twistnet18"):
        shutil.rmtree(tmp_path / f"dtd_fold3_{model}_seed42")
    text = write_planned(tmp_path, folds=[1, 2])
    assert "- twistnet18: no interval and no p, with fewer than 3 complete folds in common." in text


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


def test_runs_that_differ_only_in_their_paths_are_averaged(tmp_path):
    for fold in (1, 2):
        place = {"data_dir": f"/d{fold}", "data": f"fold {fold}"}
        write_run(tmp_path, "resnet18", fold, 42, 60.0, **place)
    assert list(rows_of(tmp_path)[0]) == ["resnet18"]


@pytest.mark.parametrize("dataset", ["folder", "dtd"])
def test_folds_of_a_dataset_that_has_grown_are_kept_apart(tmp_path, dataset):
    for fold in range(1, 6):
        folder = write_run(
            tmp_path, "resnet18", fold, 42, 60.0, dataset=dataset, data=f"fold {fold}"
        )
        results = json.loads((folder / "results.json").read_text())
        results["val_images"] = 100 if fold < 4 else 400
        (folder / "results.json").write_text(json.dumps(results))
    rows, notes = rows_of(tmp_path)
    if dataset == "dtd":  # whose folds are lists, of any length
        assert list(rows) == ["resnet18"]
        return
    assert list(rows) == ["resnet18", "resnet18 #2"]
    assert any("resnet18 #2 is kept apart from resnet18: other images" in note for note in notes)


def test_two_other_datasets_in_one_fold_are_two_rows(tmp_path):
    for seed, data in enumerate(["usual", "usual", "second", "third"]):
        write_run(tmp_path, "resnet18", 1, seed, 60.0 + seed, data=data)
    assert list(rows_of(tmp_path)[0]) == ["resnet18", "resnet18 #2", "resnet18 #3"]


def test_the_initial_weights_of_each_row_are_named(tmp_path):
    write_pair(tmp_path)
    assert (
        "Initial weights: resnet18 w.pt (120 tensors); twistnet18 w.pt (120 tensors)."
        in (rows_of(tmp_path)[1])
    )


def test_a_difference_over_some_of_the_seeds_says_so(tmp_path):
    for seed in (42, 43):
        write_run(tmp_path, "resnet18", 1, seed, 60.0)
    write_run(tmp_path, "twistnet18", 1, 43, 61.0)
    assert not [note for note in rows_of(tmp_path)[1] if "other folds or seeds" in note]  # missing
    for model, seeds in (("resnet18", [42, 43]), ("twistnet18", [43, 44])):
        add_plan(tmp_path, dataset="dtd", models=[model], folds=[1], seeds=seeds)
    assert (
        "twistnet18: planned or run with other folds or seeds than resnet18; its difference is "
        "over the 1 run that both have." in rows_of(tmp_path)[1]
    )


def test_a_fold_of_other_images_is_kept_apart(tmp_path):
    for fold in (1, 2):
        for seed in (42, 43):
            write_run(tmp_path, "resnet18", fold, seed, 60.0, data=f"fold {fold}")
            write_run(tmp_path, "twistnet18", fold, seed, 61.0, data=f"fold {fold}")
    write_run(tmp_path, "resnet18", 2, 44, 99.0, data="another fold 2")
    rows, notes = rows_of(tmp_path)
    assert rows["resnet18"].summary.mean == 60.0 and "resnet18 #2" in rows
    assert any("other images than most runs (dtd_fold2_resnet18_seed44)" in n for n in notes)


def test_a_baseline_with_other_settings_is_noted(tmp_path):
    write_run(tmp_path, "resnet18", 1, 42, 60.0, lr=0.1)
    write_run(tmp_path, "twistnet18", 1, 42, 61.0, lr=0.01)
    notes = rows_of(tmp_path)[1]
    assert "Not like for like: twistnet18 ran with lr 0.01 instead of 0.1 in resnet18." in notes


def test_models_that_nobody_planned_are_measured_against_the_plan_of_the_others(tmp_path):
    write_pair(tmp_path)
    write_run(tmp_path, "seresnet18", 1, 42, 62.0)
    plan = {"dataset": "dtd", "models": ["twistnet18", "resnet18"], "folds": [1, 2, 3]}
    older = {**plan, "seeds": [42]}  # a sweep.json with a single grid
    (tmp_path / "sweep.json").write_text(json.dumps(older))
    rows, _ = rows_of(tmp_path)
    assert list(rows) == ["twistnet18", "resnet18", "seresnet18"]
    assert rows["resnet18"].summary.mean == 62.0 and not rows["resnet18"].summary.missing
    assert rows["seresnet18"].summary.missing == 2
    write_run(tmp_path, "vgg", 9, 1, 50.0, dataset="folder")
    other = read_sweep(tmp_path, dataset="folder")  # not planned in sweep.json
    assert (other.labels, other.folds) == (["vgg"], [9])


def test_a_finished_run_that_nobody_planned_counts(tmp_path):
    write_pair(tmp_path)
    write_planned(tmp_path)
    write_run(tmp_path, "resnet18", 4, 42, 60.0)
    rows, _ = rows_of(tmp_path)
    assert (rows["resnet18"].summary.mean, rows["resnet18"].summary.folds) == (61.5, 4)
    assert rows["twistnet18"].summary.mean == 64.0 and rows["twistnet18"].summary.missing == 1


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
        ("{", "is empty, cut off or not JSON"),
        ("[]", "is not a JSON object"),
        ('{"model": "resnet18", "dataset": "dtd", "fold": 1, "seed": 42}', "test_acc"),
    ],
)
def test_results_that_cannot_be_counted_are_noted(tmp_path, capsys, content, told):
    write_run(tmp_path, "resnet18", 2, 42, 60.0)
    folder = write_run(tmp_path, "resnet18", 1, 42, 60.0)
    (folder / "results.json").write_text(content)
    rows, notes = rows_of(tmp_path)
    assert rows["resnet18"].summary.missing == 1
    assert any(folder.name in note and told in note for note in notes)
    assert "warning: not counted" in capsys.readouterr().err


def test_clear_errors(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        read_sweep(tmp_path / "none")
    with pytest.raises(UserError, match="contains no run folder"):
        read_sweep(tmp_path)
    write_pair(tmp_path)
    with pytest.raises(UserError, match="--baseline vgg is not in .*resnet18, twistnet18"):
        pick_baseline(read_sweep(tmp_path), "vgg")
    write_run(tmp_path, "resnet18", 1, 42, 60.0, dataset="folder")
    with pytest.raises(UserError, match="dtd, folder: choose with --dataset"):
        read_sweep(tmp_path)
    assert len(read_sweep(tmp_path, dataset="folder").runs) == 1


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        ("{", "it is not the JSON that run_all.py writes"),
        ("[]", "it is not the JSON that run_all.py writes"),
        ('{"sweeps": [3]}', "it is not the JSON that run_all.py writes"),
        ({"models": 3}, "its models must be a list of text"),
        ({"models": "resnet18"}, "its models must be a list of text"),
        ({"models": []}, "its models must be a list of text"),
        ({"models": [None]}, "its models must be a list of text"),
        ({"folds": "123"}, "its folds must be a list of integers"),
        ({"folds": [1.9]}, "its folds must be a list of integers"),
        ({"seeds": [True]}, "its seeds must be a list of integers"),
        ({"seeds": [1e999]}, "its seeds must be a list of integers"),
        ({"dataset": None}, "its dataset must be text"),
    ],
)
def test_a_plan_that_cannot_be_one_is_refused(tmp_path, plan, told):
    write_pair(tmp_path)
    text = plan if isinstance(plan, str) else json.dumps({"sweeps": [{**GRID, **plan}]})
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(UserError, match=f"sweep.json cannot be used: {told}: correct or delete"):
        read_sweep(tmp_path)


def test_a_plan_that_cannot_be_read_need_not_be_deleted(tmp_path):
    write_pair(tmp_path)
    (tmp_path / "sweep.json").mkdir()
    with pytest.raises(UserError, match=r"sweep.json cannot be read \(Is a directory\)$"):
        read_sweep(tmp_path)


def test_without_a_complete_fold_or_seed_there_is_no_mean_and_a_way_out_is_named(tmp_path):
    for fold, seed in ((1, 42), (2, 43)):  # two sweeps, of which no seed has both folds
        add_plan(tmp_path, **{**GRID, "folds": [fold], "seeds": [seed]})
        write_run(tmp_path, "resnet18", fold, seed, 60.0)
        write_run(tmp_path, "twistnet18", fold, seed, 61.0)
    rows, notes = rows_of(tmp_path)
    assert [row.summary.mean for row in rows.values()] == [None, None]
    assert not any(row.best for row in rows.values())
    note = "twistnet18, resnet18: no mean, because no seed has all of its runs."
    way_out = f"Run the others of these folds and seeds, or remove what .* {tmp_path}/sweep.json"
    assert any(n.startswith(note) and "Run the others of these folds" in n for n in notes)
    assert not any("sweep.json" in n for n in notes)  # every run that it plans is finished
    add_plan(tmp_path, **{**GRID, "folds": [1, 2], "seeds": [42, 43]})
    assert any(re.search(way_out, n) for n in rows_of(tmp_path)[1])


def test_equal_means_are_both_the_best(tmp_path):
    for fold, accuracies in enumerate(((0.1, 0.3), (0.2, 0.2), (0.3, 0.1)), 1):
        write_run(tmp_path, "resnet18", fold, 42, accuracies[0])
        write_run(tmp_path, "twistnet18", fold, 42, accuracies[1] + 1e-16)
    rows, _ = rows_of(tmp_path)
    assert [row.best for row in rows.values()] == [True, True]


def change_results(folder, **values):
    results = json.loads((folder / "results.json").read_text())
    changed = {k: v for k, v in {**results, **values}.items() if v is not None}
    (folder / "results.json").write_text(json.dumps(changed))


def test_the_correction_uses_the_images_of_the_folds_that_are_compared(tmp_path):
    write_pair(tmp_path)
    other = write_run(tmp_path, "resnet18", 4, 42, 60.0)  # a fold that is not compared
    change_results(other, test_images=900)
    rows, notes = rows_of(tmp_path)
    assert rows["twistnet18"].versus.ratio == 1.0
    assert any(note.endswith("images trained on = 1.00.") for note in notes)


def test_without_the_counts_of_a_run_there_is_no_interval(tmp_path):
    write_pair(tmp_path)
    change_results(tmp_path / "dtd_fold1_twistnet18_seed42", train_images=None)
    rows, notes = rows_of(tmp_path)
    assert rows["twistnet18"].versus.low is None and rows["twistnet18"].versus.p is None
    assert any("the results do not count their images" in note for note in notes)


def test_other_numbers_of_test_images_are_noted(tmp_path):
    write_pair(tmp_path)
    change_results(tmp_path / "dtd_fold1_twistnet18_seed42", test_images=50)
    assert (
        "Not like for like: twistnet18 and resnet18 saw different images." in rows_of(tmp_path)[1]
    )


def test_results_that_do_not_count_their_images_are_not_taken_for_others(tmp_path):
    write_pair(tmp_path)
    change_results(tmp_path / "dtd_fold1_twistnet18_seed42", test_images=None, train_images=None)
    assert not any("different images" in note for note in rows_of(tmp_path)[1])


def test_runs_of_several_versions_are_noted(tmp_path):
    write_pair(tmp_path)
    change_results(tmp_path / "dtd_fold1_twistnet18_seed42", commit="b" * 40)
    change_results(tmp_path / "dtd_fold2_twistnet18_seed42", commit="a" * 40)
    for fold, version in ((1, "2.13.0"), (2, "2.14.1"), (3, "2.14.1")):
        folder = tmp_path / f"dtd_fold{fold}_twistnet18_seed42"
        change_results(folder, versions={"torch": version})
    change_results(tmp_path / "dtd_fold3_twistnet18_seed42", commit="a" * 40 + "-dirty")
    notes = rows_of(tmp_path)[1]
    told = "aaaaaaaaaaaa, aaaaaaaaaaaa-dirty, bbbbbbbbbbbb"
    assert f"The runs are of 3 versions of this code: {told}." in notes
    assert "The runs are of 2 versions of torch: 2.13.0, 2.14.1." in notes


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ({"source": "none"}, "random weights"),
        ({"source": "torchvision"}, "torchvision"),
        (
            {"sha256": "cd" * 32, "pretraining": "8 epochs of recipe fast"},
            "8 epochs of recipe fast",
        ),
        ({"sha256": "cd" * 32, "pretraining": "600 epochs of recipe guide"}, None),
        ({"sha256": "cd" * 32}, "weights of unknown pretraining"),
    ],
)
def test_unequal_pretraining_is_noted(tmp_path, weights, told):
    write_pair(tmp_path)
    guide = {"source": "r.pt", "sha256": "ab" * 32, "pretraining": "600 epochs of recipe guide"}
    for fold in (1, 2, 3):
        change_results(tmp_path / f"dtd_fold{fold}_resnet18_seed42", weights=guide)
        change_results(tmp_path / f"dtd_fold{fold}_twistnet18_seed42", weights={**weights})
    notes = [note for note in rows_of(tmp_path)[1] if "started from" in note]
    assert notes == [
        f"Not like for like: twistnet18 started from {told}, resnet18 from 600 epochs of recipe "
        "guide."
    ] * bool(told)


def test_special_characters_are_escaped_in_latex(tmp_path):
    assert latex("a_b & 5 % #2 {x}") == r"a\_b \& 5 \% \#2 \{x\}"
    write_run(tmp_path, "net_a", 1, 42, 50.0)
    sweep = read_sweep(tmp_path)
    assert r"net\_a & 11.20 & 50.00 $\pm$ --" in to_latex(make_rows(sweep, "net_a"), [])
