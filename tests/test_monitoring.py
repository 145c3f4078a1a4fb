"""training/monitoring.py: gradient spikes, a rising loss, and unreadable images."""

import json
import math

import pytest
import torch

from data.images import Sample
from training.checkpoint import TrainState
from training.monitoring import (
    UnreadableImages,
    max_unreadable,
    report_gradient_spike,
    report_rising_loss,
    summarise_gradients,
)
from training.run_dir import RunDir

NAN, INF = math.nan, math.inf


@pytest.fixture
def run_dir(tmp_path):
    return RunDir(tmp_path)


def events(run_dir):
    path = run_dir.path / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize(
    ("norms", "expected"),
    [
        ([1.0, 5.0, 2.0], {"grad_norm": 2.0, "grad_norm_max": 5.0}),
        ([1.0, 2.0], {"grad_norm": 1.5, "grad_norm_max": 2.0}),
        ([INF, 3.0, NAN], {"grad_norm": 3.0, "grad_norm_max": 3.0}),  # two steps that fp16 skipped
        ([INF], {}),
        ([], {}),
    ],
)
def test_gradients_are_summarised_by_median_and_maximum(norms, expected):
    assert summarise_gradients(norms) == expected


def spike_of(run_dir, norms, *, steps=None):
    row = {"epoch": 3, **summarise_gradients(norms)}
    report_gradient_spike(norms, row, steps or len(norms), run_dir)
    return events(run_dir)


def test_a_norm_above_twenty_medians_is_a_warning_and_an_event(run_dir, capsys):
    (event,) = spike_of(run_dir, [2.0, 2.0, 667.0, 1.0, 3.0])
    assert capsys.readouterr().out == (
        "warning: epoch 3 step 3: gradient norm 667, 334 times the epoch's median 2\n"
    )
    del event["time"]
    assert event == {
        "event": "gradient_spike",
        "epoch": 3,
        "step": 3,
        "grad_norm": 667.0,
        "median": 2.0,
    }


@pytest.mark.parametrize(
    "norms", [[1.0, 1.0, 20.0], [1.0], [], [INF, 1.0], [NAN], [0.0, 0.0, 5.0], [0.0]]
)
def test_other_norms_are_not_reported(run_dir, capsys, norms):
    assert spike_of(run_dir, norms) == [] and capsys.readouterr().out == ""


def test_the_step_is_right_where_an_older_checkpoint_lacks_the_first_norms(run_dir):
    (event,) = spike_of(run_dir, [1.0, INF, 50.0, 1.0, 1.0], steps=8)
    assert event["step"] == 6


def rising(run_dir, losses, *, best_epoch=2):
    """What is reported when the last of these losses is that of the epoch that has just ended."""
    state = TrainState({}, [], 0, best_epoch=best_epoch)
    state.history = [{"epoch": i + 1, "train_loss": x} for i, x in enumerate(losses[:-1])]
    row = {"epoch": len(losses), "train_loss": losses[-1]}
    report_rising_loss(state, row, run_dir)
    return events(run_dir)


def test_a_loss_above_the_first_epochs_is_a_warning_and_an_event(run_dir, capsys):
    (event,) = rising(run_dir, [5.0, 3.5, 3.9, 5.1])
    printed = capsys.readouterr().out
    assert printed.startswith("warning: the training loss of epoch 4, 5.100, is above that of the")
    assert f"The last good checkpoint is {run_dir.path / 'best.pt'} of epoch 2" in printed
    assert printed.endswith("training continues\n") and printed.count("\n") == 1
    del event["time"]
    assert event == {
        "event": "training_loss_rose",
        "epoch": 4,
        "train_loss": 5.1,
        "first_loss": 5.0,
        "lowest_loss": 3.5,
        "checkpoint": str(run_dir.path / "best.pt"),
        "checkpoint_epoch": 2,
    }


def test_where_no_epoch_was_validated_yet_no_checkpoint_is_called_good(run_dir, capsys):
    (event,) = rising(run_dir, [5.0, 3.5, 3.9, 5.1], best_epoch=0)
    assert "the run may have broken; training continues\n" in capsys.readouterr().out
    assert event["checkpoint"] is None and event["checkpoint_epoch"] == 0


@pytest.mark.parametrize(
    "losses",
    [
        [5.0],
        [5.0, 6.0],  # it had not fallen
        [5.0, 4.0, 5.1],  # nor below 80 %
        [5.0, 3.5, 5.0],
        [5.0, 3.5, 5.1, 5.2],  # it was reported an epoch before
    ],
)
def test_other_losses_are_not_reported(run_dir, capsys, losses):
    assert rising(run_dir, losses) == [] and capsys.readouterr().out == ""


def batch(indices, broken):
    n = len(indices)
    return Sample(
        torch.zeros(n, 3, 2, 2),
        torch.zeros(n),
        torch.tensor(indices),
        torch.zeros(n, 0, 2),
        torch.tensor(broken),
    )


def test_a_file_counts_once_per_epoch_and_is_named_once_per_process(run_dir, capsys):
    images = UnreadableImages(lambda index: f"f{index}", run_dir)
    images.collect([batch([4, 5, 4], [1, 0, 1]), batch([4], [1])], 1)
    assert images.files == {"f4"}
    images.files.clear()  # as at the end of an epoch
    images.collect([batch([4], [1])], 2)
    assert images.files == {"f4"}
    assert [(e["file"], e["epoch"]) for e in events(run_dir)] == [("f4", 1), ("f4", 2)]
    assert capsys.readouterr().out == (
        "warning: f4 cannot be decoded: another image of its class takes its place\n"
    )


def test_a_file_that_cannot_be_replaced_is_kept_for_the_loop(run_dir):
    images = UnreadableImages(lambda index: f"f{index}", run_dir)
    images.collect([batch([6, 7], [1, 2])], 1)
    assert images.files == {"f6"} and images.lost == "f7"


def test_ten_files_or_a_thousandth_may_be_replaced():
    assert [max_unreadable(n) for n in (64, 10_000, 11_000)] == [10, 10, 11]
