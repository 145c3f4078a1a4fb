"""training/tensorboard.py: TensorBoard shows each epoch of the log once, after a resume too."""

import sys

import pytest

import pretrain_imagenet
import train
from common.errors import UserError
from data.synthetic import write_dtd, write_imagenet_tree
from training.tensorboard import TensorBoardLogger

ROWS = [
    {"epoch": 1, "lr": 0.5, "val_top1": 20.0, "gates": [0.25, 0.125]},
    {"epoch": 2, "lr": 0.25, "val_top1": 30.0, "gates": [0.5, 0.75]},
]


def shown(folder):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def test_rows_are_scalars_by_epoch_and_a_resume_repeats_none(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    (tmp_path / "log.jsonl").write_text("stays")
    logger = TensorBoardLogger(tmp_path)
    logger([])
    logger(ROWS[:1])
    logger(ROWS)
    expected = {
        "lr": [(1, 0.5), (2, 0.25)],
        "val_top1": [(1, 20.0), (2, 30.0)],
        "gates/0": [(1, 0.25), (2, 0.5)],
        "gates/1": [(1, 0.125), (2, 0.75)],
    }
    assert shown(tmp_path) == expected
    resumed = TensorBoardLogger(tmp_path)
    resumed(ROWS[:1])
    resumed(ROWS)
    assert shown(tmp_path) == expected
    assert (tmp_path / "log.jsonl").exists()


def test_without_tensorboard_it_is_said_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="--tensorboard.*: pip install tensorboard"):
        TensorBoardLogger(tmp_path)


def test_both_scripts_write_an_event_file_beside_their_log(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    words = "--tensorboard --model resnet18 --epochs 1 --img_size 32 --batch_size 4 --workers 0"
    flags = words.split()
    write_imagenet_tree(
        tmp_path / "tree", train_per_class=4, val_per_class=2, size=40, seed=0, num_classes=2
    )
    pretrain_imagenet.main(["--data_dir", "tree", *flags])
    write_dtd(tmp_path / "dtd", images_per_class=6, folds=1, size=40, seed=0, num_classes=2)
    train.main(["--data_dir", "dtd", "--pretrained", "none", "--no_cache", *flags])
    for folder in ("checkpoints", "runs/dtd_fold1_resnet18_seed42"):
        found = shown(tmp_path / folder)
        names = "train_loss val_loss lr grad_norm grad_norm_max images_per_s"
        assert set(names.split()) <= found.keys()
        assert [step for step, _ in found["val_loss"]] == [1]
