"""tools/demo.py: its commands, and the results that it prints at the end."""

import json
from pathlib import Path

import pretrain_imagenet
import run_all
from tools import demo


def test_the_scripts_accept_the_commands_of_the_demo():
    flags = demo.pretrain_flags("twistnet18").split()
    assert pretrain_imagenet.parse_args(flags)
    assert run_all.parse_args(demo.sweep_flags().split())


def test_results_are_the_pretraining_accuracy_and_the_mean_over_folds(capsys):
    for model, top1, folds in (("resnet18", 90.0, (60, 70)), ("twistnet18", 92.5, (71, 80))):
        Path("weights").mkdir(exist_ok=True)
        Path(f"weights/{model}_imagenet.json").write_text(json.dumps({"top1": top1}))
        for fold, accuracy in enumerate(folds, 1):
            run = Path(f"runs/dtd_fold{fold}_{model}_seed42")
            run.mkdir(parents=True)
            (run / "results.json").write_text(json.dumps({"test_acc": accuracy}))
    demo.print_results(Path(), minutes=3.14)
    lines = capsys.readouterr().out.splitlines()
    assert "(3.1 minutes with " in lines[1]
    assert [line.split() for line in lines[3:6]] == [
        ["resnet18", "90.0", "%", "65.0", "%"],
        ["twistnet18", "92.5", "%", "75.5", "%"],
        ["chance", "12.5", "%", "12.5", "%"],
    ]


def test_the_demo_runs_its_scripts_in_a_folder_behind_a_link(tmp_path, capfd):
    (tmp_path / "far" / "away" / "from").mkdir(parents=True)
    Path("link").symlink_to(tmp_path / "far" / "away" / "from")
    demo.run_script("train.py", "--help", folder=Path("link"))
    assert "usage: train.py" in capfd.readouterr().out
