"""training/loop.py: a run that is interrupted anywhere ends as if it had not been."""

import errno
import json
import math
import os
import threading
from statistics import median

import pytest
import torch
from torch import nn

from common.errors import Diverged, Preempted, UserError
from common.files import read_json
from data.images import Sample
from training import checkpoint, loop
from training.checkpoint import (
    BEST,
    LATEST,
    PREVIOUS,
    TrainState,
    load_checkpoint,
    load_tensors,
)
from training.distributed import DistributedContext
from training.engine import EvalMetrics, Evaluator, Trainer
from training.loop import TrainLoop
from training.optim import cosine_lr_at, make_optimizer
from training.recipes import PRETRAIN
from training.run_dir import RunDir

CONTEXT = DistributedContext()
EPOCHS, STEPS = 3, 4
TIMINGS = ("images_per_s", "data_wait", "seconds")


class Stop:
    """A stop request that arrives while step `in_step` is loaded, or in a validation (from 1).

    in_step=-1: before the run starts.
    """

    def __init__(self, in_step=None, in_validation=None):
        self.in_step, self.in_validation = in_step, in_validation
        self.requested = in_step == -1


def batch(key, broken=None):
    generator = torch.Generator().manual_seed(key)
    return Sample(
        torch.randint(256, (8, 3, 6, 6), dtype=torch.uint8, generator=generator),
        torch.randint(3, (8,), generator=generator),
        torch.arange(8) + 8 * key,
        torch.zeros(8, 0, 2),
        torch.zeros(8) if broken is None else torch.tensor(broken),
    )


class Loader:
    """Steps of two micro-batches. `before(step)` is called before a step is loaded."""

    steps_per_epoch = STEPS

    def __init__(self, stop, broken, before):
        self.stop, self.broken, self.before = stop, broken, before

    def steps(self, first, last):
        for step in range(first, last):
            self.before(step)
            self.stop.requested |= step == self.stop.in_step
            yield [batch(2 * step, self.broken(step)), batch(2 * step + 1)]

    def file_name(self, index):
        return f"image{index}"


class Batches(list):
    """Three batches of validation, as an EvalLoader gives them."""

    dataset = range(8 * 1003)

    def normalise(self, images):
        return images.float() / 255


class Validation:
    """The real evaluation, which a stop request may interrupt."""

    def __init__(self, stop):
        batches = Batches(batch(1000 + i) for i in range(3))
        self.evaluator, self.stop, self.runs = Evaluator(batches, CONTEXT, "fp32"), stop, 0

    def run(self, model):
        self.runs += 1
        self.stop.requested |= self.runs == self.stop.in_validation
        return self.evaluator.run(model)


class Scores:
    """A validation with these counts of correct images, of 10, one per epoch."""

    def __init__(self, *top1, unreadable=(), overflowed=0):
        self.top1, self.unreadable, self.overflowed = list(top1), list(unreadable), overflowed

    def run(self, model):
        counts = self.top1.pop(0), 10, 1000
        loss = math.nan if self.overflowed else 1.0
        return EvalMetrics(
            loss, *counts, self.unreadable, torch.empty(0), overflowed=self.overflowed
        )


def augment(images, labels, draws, *, step, micro):
    return images.float() / 255, nn.functional.one_hot(labels, 3).float()


def nan_from(first):
    def augment_with_nan(images, labels, draws, *, step, micro):
        images, targets = augment(images, labels, draws, step=step, micro=micro)
        return images * (float("nan") if step >= first else 1), targets

    return augment_with_nan


def scaling_targets(factors):
    """Scale the targets of some steps, and with them the gradient."""

    def augment_and_scale(images, labels, draws, *, step, micro):
        images, targets = augment(images, labels, draws, step=step, micro=micro)
        return images, targets * factors.get(step, 1.0)

    return augment_and_scale


def tiny(width=4):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, width, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 3),
    )


def make(
    folder,
    *,
    stop=None,
    model=None,
    mixing=augment,
    broken=lambda step: None,
    before=lambda step: None,
    evaluator=None,
    num_images=64,
    **settings,
):
    """The loop and the state of a run of 3 epochs of 4 steps: a new one, or that of the folder."""
    model, stop = model or tiny(), stop or Stop()
    optimizer = make_optimizer({**PRETRAIN["guide"], "weight_decay": 1e-3}, model, lr=0.1)
    trainer = Trainer(model, optimizer, CONTEXT, "fp32", mixing)
    state = TrainState({"lr": 0.1}, ["a", "b", "c"], num_images)
    if (folder / LATEST).exists():
        state, tensors, _ = load_checkpoint(folder / LATEST)
        load_tensors(trainer, tensors)
    defaults = {
        "lr_schedule": lambda s: cosine_lr_at(
            s, base=0.2, total_steps=EPOCHS * STEPS, warmup_steps=2
        ),
        "epochs": EPOCHS,
        "resume_command": "the same command",
    }
    train_loop = TrainLoop(
        trainer,
        Loader(stop, broken, before),
        evaluator or Validation(stop),
        run_dir=RunDir(folder),
        stop=stop,
        **{**defaults, **settings},
    )
    return train_loop, state


def fit(folder, **settings):
    """Train to the end; the final weights and the state."""
    train_loop, state = make(folder, **settings)
    train_loop.fit(state)
    return weights(train_loop), state


def interrupt(folder, **settings):
    """Train until a stop request arrives; True if the run stopped there, and its state."""
    train_loop, state = make(folder, **settings)
    try:
        train_loop.fit(state)
    except Preempted:
        return True, state
    return False, state


def lose_power(folder, *, in_step, **settings):
    """Train until the power fails while a step is loaded; what is being written is completed."""

    def before(step):
        if step == in_step:
            raise ConnectionError

    train_loop, state = make(folder, before=before, **settings)
    with pytest.raises(ConnectionError):
        train_loop.fit(state)
    train_loop.checkpointer.join()


def weights(train_loop):
    return {name: value.clone() for name, value in train_loop.trainer.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def untimed(rows):
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


def saved(folder, name=LATEST):
    return load_checkpoint(folder / name)[0]


def events(folder):
    path = folder / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The final weights and the log of the run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    final, _ = fit(folder)
    return final, log(folder)


def test_rows_have_the_values_of_the_formulas(whole, tmp_path, capsys):
    _, rows = whole
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    # the rate of each epoch's last step: warm-up of 2 of 12 steps, then 0.1 (1 + cos(pi k / 10))
    assert [row["lr"] for row in rows] == pytest.approx(
        [0.1 * (1 + math.cos(math.pi * k / 10)) for k in (1, 5, 9)]
    )
    columns = "epoch lr train_loss val_loss val_top1 val_top5 grad_norm grad_norm_max"
    for row in rows:
        assert set(row) == {*columns.split(), *TIMINGS}
        assert row["val_top5"] == 100 and 0 < row["train_loss"] < 2 and row["seconds"] >= 0
        assert row["val_top1"] * 24 / 100 == pytest.approx(round(row["val_top1"] * 24 / 100))
        assert 0 <= row["data_wait"] <= 1 and row["images_per_s"] > 0
    fit(tmp_path, extra_columns=lambda: {"gates": [0.1, 0.2]})
    assert all(row["gates"] == [0.1, 0.2] for row in log(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert [line[: line.index(",")] for line in lines] == [
        f"Epoch {row['epoch']}: val_acc {row['val_top1']:.1f}" for row in rows
    ]
    for line, row in zip(lines, rows, strict=True):
        assert f"grad norm {row['grad_norm']:.3g} (max {row['grad_norm_max']:.3g})" in line


def test_each_step_gets_its_number_and_its_rate_resumed_or_not(tmp_path):
    told = []

    def fit_and_record(stop):
        train_loop, state = make(tmp_path, stop=stop)
        step_of_trainer = train_loop.trainer.step

        def record(batches, *, step, lr):
            told.append((step, lr))
            step_of_trainer(batches, step=step, lr=lr)

        train_loop.trainer.step = record
        train_loop.fit(state)

    with pytest.raises(Preempted):
        fit_and_record(Stop(5))
    fit_and_record(Stop())
    assert told == [
        (step, cosine_lr_at(step, base=0.2, total_steps=12, warmup_steps=2)) for step in range(12)
    ]


def step_by_hand(model, step):
    """The loss of a step, and the norm of its gradient, without a trainer."""
    losses = []
    for micro in (0, 1):
        images, targets = augment(*batch(2 * step + micro)[:2], None, step=0, micro=0)
        losses.append(nn.functional.cross_entropy(model(images), targets, label_smoothing=0.1))
    loss = torch.stack(losses).mean()
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.item(), torch.cat([g.flatten() for g in gradients]).norm().item()


def test_loss_and_gradient_norms_are_those_worked_out_by_hand(tmp_path):
    fit(tmp_path, lr_schedule=lambda step: 0.0)  # the weights stay, so that it can be checked
    model = tiny().train()
    for row in log(tmp_path):
        steps = range(STEPS * (row["epoch"] - 1), STEPS * row["epoch"])
        losses, norms = zip(*(step_by_hand(model, step) for step in steps), strict=True)
        assert row["train_loss"] == pytest.approx(sum(losses) / STEPS, rel=1e-6)
        assert row["grad_norm"] == pytest.approx(median(norms), rel=1e-4)
        assert row["grad_norm_max"] == pytest.approx(max(norms), rel=1e-4)


STOPS = [Stop(step) for step in range(-1, EPOCHS * STEPS)] + [Stop(None, v) for v in (1, 2)]


@pytest.mark.parametrize("stop", STOPS, ids=lambda stop: f"{stop.in_step}-{stop.in_validation}")
def test_a_run_that_is_preempted_twice_anywhere_ends_with_the_same_bits(whole, tmp_path, stop):
    final, rows = whole
    stopped, state = interrupt(tmp_path, stop=Stop(stop.in_step, stop.in_validation))
    assert stopped and read_json(tmp_path / "status.json")["state"] == "preempted"
    _, later = interrupt(tmp_path, stop=Stop(state.step + state.step % 3))
    assert later.step >= state.step
    final_resumed, _ = fit(tmp_path)
    assert same(final_resumed, final)
    assert untimed(log(tmp_path)) == untimed(rows)


def test_a_stop_request_in_the_last_validation_finds_the_run_finished(whole, tmp_path):
    stopped, state = interrupt(tmp_path, stop=Stop(in_validation=EPOCHS))
    assert not stopped and untimed(log(tmp_path)) == untimed(whole[1])
    assert saved(tmp_path).epoch == EPOCHS


def test_a_preempted_run_says_where_it_stopped_and_how_to_resume(tmp_path):
    train_loop, state = make(tmp_path, stop=Stop(STEPS + 1))
    with pytest.raises(Preempted, match="^preempted, epoch 2 step 1, resume with: the same comm"):
        train_loop.fit(state)
    status = read_json(tmp_path / "status.json")
    assert (status["state"], status["epoch"], status["step"]) == ("preempted", 2, 1)
    assert status["resume"] == "the same command" and status["message"].startswith("preempted")
    assert saved(tmp_path).step == STEPS + 1
    assert len(log(tmp_path)) == 1


def test_resuming_rewrites_the_log_from_the_checkpoint(whole, tmp_path):
    interrupt(tmp_path, stop=Stop(STEPS + 1))
    (tmp_path / "log.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    fit(tmp_path)
    assert untimed(log(tmp_path)) == untimed(whole[1])


def test_a_finished_run_is_not_trained_again(whole, tmp_path):
    fit(tmp_path)
    before = (tmp_path / LATEST).read_bytes()
    final, _ = fit(tmp_path)
    assert same(final, whole[0]) and untimed(log(tmp_path)) == untimed(whole[1])
    assert (tmp_path / LATEST).read_bytes() == before


# ------------------------------------------------------------------ the best epoch


@pytest.mark.parametrize(
    ("top1", "best"),
    [((1, 3, 2), 2), ((3, 2, 1), 1), ((0, 0, 0), 1), ((1, 2, 2), 2), ((1, 2, 3), 3)],
)
def test_best_is_the_first_epoch_of_the_highest_accuracy(tmp_path, top1, best):
    _, state = fit(tmp_path, evaluator=Scores(*top1))
    assert state.best["epoch"] == state.best_epoch == best == saved(tmp_path, BEST).epoch
    assert saved(tmp_path, BEST).step == best * STEPS
    assert TrainState({}, [], 0).best is None


def test_best_survives_a_resume(tmp_path):
    interrupt(tmp_path, evaluator=Scores(5, 0, 0), stop=Stop(STEPS))
    fit(tmp_path, evaluator=Scores(1, 4))
    assert saved(tmp_path, BEST).step == STEPS


def test_a_deleted_best_is_replaced_by_the_best_of_the_epochs_that_follow(tmp_path, capsys):
    interrupt(tmp_path, evaluator=Scores(9), stop=Stop(STEPS))
    (tmp_path / BEST).unlink()
    _, state = fit(tmp_path, evaluator=Scores(5, 4))
    assert (
        "best.pt is missing, damaged or not of epoch 1, the best one: that will be the best of "
        in capsys.readouterr().out
    )
    assert state.best_epoch == saved(tmp_path, BEST).epoch == 2


def test_a_best_that_is_deleted_after_the_last_epoch_is_the_last_epoch(tmp_path, capsys):
    fit(tmp_path)
    (tmp_path / BEST).unlink()
    _, state = fit(tmp_path)
    assert "best.pt is missing: the last epoch takes its place" in capsys.readouterr().out
    assert state.best_epoch == saved(tmp_path, BEST).epoch == EPOCHS


# ------------------------------------------------------------------ divergence


@pytest.mark.parametrize("read_seconds", [-1.0, 1000.0])
def test_a_loss_that_is_nan_stops_the_run_and_spares_the_checkpoint(
    tmp_path, monkeypatch, read_seconds
):
    monkeypatch.setitem(loop.READ_SECONDS, "cpu", read_seconds)
    train_loop, state = make(tmp_path, mixing=nan_from(5), save_seconds=1000.0)
    with pytest.raises(Diverged, match=r"loss is not finite at epoch 2 step \d, learning rate 0\."):
        train_loop.fit(state)
    assert state.step - STEPS == (2 if read_seconds < 0 else STEPS)
    assert saved(tmp_path).step == STEPS and not (tmp_path / PREVIOUS).exists()
    assert len(log(tmp_path)) == 1


@pytest.mark.parametrize(("precision", "overflowed"), [("fp32", 1), ("bf16", 1), ("fp16", 11)])
def test_a_validation_loss_that_is_nan_stops_the_run(tmp_path, precision, overflowed):
    train_loop, state = make(tmp_path)
    train_loop.trainer.precision = precision
    train_loop.evaluator = Scores(5, overflowed=overflowed)
    with pytest.raises(Diverged, match="validation loss is not finite at epoch 1 step 4, learning"):
        train_loop.fit(state)
    assert log(tmp_path) == []


def test_a_validation_that_overflows_in_fp16_is_a_warning(tmp_path, capsys):
    train_loop, state = make(tmp_path)
    train_loop.trainer.precision = "fp16"
    train_loop.evaluator = Scores(*[5] * EPOCHS, overflowed=10)
    train_loop.fit(state)
    assert "warning: fp16 overflowed on 10 validation images" in capsys.readouterr().out
    assert [row["val_loss"] for row in log(tmp_path)] == [None] * EPOCHS


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    train_loop, state = make(tmp_path)
    train_loop.save(state)
    train_loop.checkpointer.join()
    before = (tmp_path / LATEST).read_bytes()
    train_loop.trainer.model[5].bias.data[1] = float("inf")
    with pytest.raises(Diverged, match=r"model\.5\.bias is not finite at epoch 1 step 0.*predates"):
        train_loop.save(state)
    assert (tmp_path / LATEST).read_bytes() == before
    assert not (tmp_path / PREVIOUS).exists()


def test_a_stop_request_does_not_save_what_diverged(tmp_path):
    train_loop, state = make(tmp_path, mixing=nan_from(0), stop=Stop(1))
    with pytest.raises(Diverged):
        train_loop.fit(state)
    assert not (tmp_path / LATEST).exists()


def test_a_spike_of_the_gradient_is_reported_with_its_step(tmp_path, capsys):
    """The 7th step is the 3rd of the 2nd epoch; a resume before it does not change the count."""
    spike = {"mixing": scaling_targets({6: 1000.0}), "lr_schedule": lambda step: 0.0}
    interrupt(tmp_path, stop=Stop(4), **spike)
    fit(tmp_path, **spike)
    (event,) = events(tmp_path)
    row = log(tmp_path)[1]
    assert (event["event"], event["epoch"], event["step"]) == ("gradient_spike", 2, 3)
    assert (event["grad_norm"], event["median"]) == (row["grad_norm_max"], row["grad_norm"])
    assert row["grad_norm_max"] > 20 * row["grad_norm"]
    printed = capsys.readouterr().out
    assert printed.count("warning: ") == 1
    assert f"warning: epoch 2 step 3: gradient norm {row['grad_norm_max']:.4g}" in printed


def test_a_loss_that_rises_above_the_first_epochs_is_reported_and_training_continues(
    tmp_path, capsys
):
    factors = {step: (1.0, 0.5, 2.0)[step // STEPS] for step in range(12)}
    fit(
        tmp_path,
        mixing=scaling_targets(factors),
        lr_schedule=lambda step: 0.0,
        evaluator=Scores(3, 5, 4),
    )
    first, lowest, last = (row["train_loss"] for row in log(tmp_path))
    assert lowest < 0.8 * first < last
    (event,) = events(tmp_path)
    assert (event["event"], event["epoch"]) == ("training_loss_rose", 3)
    assert (event["first_loss"], event["lowest_loss"], event["train_loss"]) == (first, lowest, last)
    assert event["checkpoint"].endswith("best.pt") and event["checkpoint_epoch"] == 2
    assert "The last good checkpoint is" in capsys.readouterr().out and len(log(tmp_path)) == 3


# ------------------------------------------------------------------ images that cannot be read


def test_ten_replaced_images_per_epoch_are_named_and_tolerated(tmp_path, capsys):
    fit(tmp_path, broken=lambda step: [1] * 5 + [0] * 3 if step % STEPS < 2 else None)
    found = events(tmp_path)
    assert len(found) == 10 * EPOCHS
    assert found[0]["event"] == "unreadable_image" and found[0]["file"] == "image0"
    assert [e["epoch"] for e in found] == [1] * 10 + [2] * 10 + [3] * 10
    assert capsys.readouterr().out.count("warning: image") == 30


@pytest.mark.parametrize(("num_images", "stops"), [(64, True), (11_000, False), (10_999, True)])
def test_more_than_ten_and_a_thousandth_stop_the_run_with_the_list(tmp_path, num_images, stops):
    def broken(step):  # 8 and then 3 in epoch 1
        return {1: [1] * 8, 2: [1, 1, 1, 0, 0, 0, 0, 0]}.get(step)

    train_loop, state = make(tmp_path, broken=broken, num_images=num_images)
    if not stops:
        return train_loop.fit(state)
    with pytest.raises(UserError, match="11 training images cannot be decoded") as caught:
        train_loop.fit(state)
    names = [f"image{i}" for i in [*range(16, 24), *range(32, 35)]]
    assert sorted(str(caught.value).rpartition(": ")[2].split(", ")) == sorted(names)
    assert "restore the files and run the same command again" in str(caught.value)
    assert saved(tmp_path).step == 2 and saved(tmp_path).unreadable == []
    final, _ = fit(tmp_path, num_images=num_images)  # the files are restored


def test_a_class_of_which_no_image_can_be_read_stops_the_run(tmp_path):
    train_loop, state = make(
        tmp_path, broken=lambda step: [0, 0, 2, 0, 0, 0, 0, 0] if step == 1 else None
    )
    with pytest.raises(UserError, match="image18 cannot be decoded, nor can any other"):
        train_loop.fit(state)
    assert state.step == saved(tmp_path).step == 1


def test_a_broken_validation_image_stops_after_saving_and_is_validated_again(whole, tmp_path):
    bad = Scores(1, unreadable=["val/x.jpg", "val/y.jpg"])
    train_loop, state = make(tmp_path, evaluator=bad)
    with pytest.raises(UserError, match=r"2 validation images .*: val/x\.jpg, val/y\.jpg$"):
        train_loop.fit(state)
    assert saved(tmp_path).step == STEPS and saved(tmp_path).epoch == 0 and log(tmp_path) == []
    final, _ = fit(tmp_path)
    assert same(final, whole[0]) and untimed(log(tmp_path)) == untimed(whole[1])


def test_unreadable_images_are_counted_over_a_resume(tmp_path):
    interrupt(tmp_path, stop=Stop(1), broken=lambda s: [1.0] * 5 + [0.0] * 3 if s < 2 else None)
    assert len(saved(tmp_path).unreadable) == 10
    train_loop, state = make(tmp_path, broken=lambda s: [1.0] + [0.0] * 7 if s == 2 else None)
    with pytest.raises(UserError, match="11 training images cannot be decoded"):
        train_loop.fit(state)


# ------------------------------------------------------------------ saves


@pytest.mark.parametrize(("save_seconds", "expected"), [(0.0, 5), (1000.0, 4)])
def test_saves_within_an_epoch_come_when_they_are_due(tmp_path, save_seconds, expected):
    lose_power(tmp_path, in_step=6, save_seconds=save_seconds)
    assert saved(tmp_path).step == expected


def test_a_run_that_lost_its_power_resumes_from_its_last_save(whole, tmp_path):
    lose_power(tmp_path, in_step=6)
    final, _ = fit(tmp_path)
    assert same(final, whole[0]) and untimed(log(tmp_path)) == untimed(whole[1])


class Disk:
    """Replacing a file fails on a full disk, which it is while some steps are trained."""

    def __init__(self, monkeypatch):
        self.is_full, replace = False, os.replace

        def replace_unless_full(*args, **kwargs):
            if self.is_full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return replace(*args, **kwargs)

        monkeypatch.setattr(os, "replace", replace_unless_full)

    def make(self, folder, full_in, **settings):
        """A run on this disk. Each write ends before the disk changes."""

        def before(step):
            thread = train_loop.checkpointer._thread
            if thread:
                thread.join()
            self.is_full = step in full_in

        train_loop, state = make(folder, before=before, **settings)
        return train_loop, state


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


def test_a_disk_that_is_full_for_a_while_costs_only_warnings(whole, tmp_path, disk, capsys):
    train_loop, state = disk.make(tmp_path, [3])  # at the end of epoch 1
    train_loop.fit(state)
    assert "No space left on device" in capsys.readouterr().out
    assert same(weights(train_loop), whole[0]) and untimed(log(tmp_path)) == untimed(whole[1])
    assert saved(tmp_path).step == EPOCHS * STEPS


def test_the_best_epoch_is_kept_although_the_disk_was_full_when_it_ended(tmp_path, disk):
    train_loop, state = disk.make(tmp_path, [7], evaluator=Scores(3, 9, 5))
    train_loop.fit(state)
    assert state.best_epoch == 2
    assert saved(tmp_path, BEST).history == state.history[:2]


def test_the_last_epoch_is_saved_by_a_second_try(tmp_path, disk, monkeypatch):
    train_loop, state = disk.make(tmp_path, [11], evaluator=Scores(3, 5, 9))
    finish = train_loop.finish

    def finish_with_room(state):
        train_loop.checkpointer._thread.join()
        disk.is_full = False
        finish(state)

    monkeypatch.setattr(train_loop, "finish", finish_with_room)
    train_loop.fit(state)
    assert saved(tmp_path).epoch == saved(tmp_path, BEST).epoch == EPOCHS


def test_a_run_does_not_end_with_its_last_epoch_unsaved(tmp_path, disk):
    train_loop, state = disk.make(tmp_path, [11], evaluator=Scores(3, 5, 9))
    with pytest.raises(UserError, match="could not be written .* free space there and run the sam"):
        train_loop.fit(state)
    disk.is_full = False
    _, state = fit(tmp_path, evaluator=Scores(9))
    assert saved(tmp_path, BEST).history == state.history


def test_a_disk_that_stays_full_stops_the_run_after_three_saves(tmp_path, disk):
    train_loop, state = disk.make(tmp_path, range(2, 12), save_seconds=0.0)
    with pytest.raises(UserError, match="3 times in a row"):
        train_loop.fit(state)
    assert state.step == 4 and saved(tmp_path).step == 1


def test_training_does_not_wait_for_the_write_and_the_write_has_what_was_saved(
    tmp_path, monkeypatch
):
    """The first write of latest.pt begins two steps later."""
    may_write, serialise = threading.Event(), checkpoint.serialise

    def serialise_late(content):
        assert may_write.wait(20)
        return serialise(content)

    monkeypatch.setattr(checkpoint, "serialise", serialise_late)
    seen = []

    def before(step):
        if step == STEPS + 2:  # the end of epoch 1 is being written
            seen.append((tmp_path / LATEST).exists())
            may_write.set()

    train_loop, state = make(tmp_path, before=before, epochs=2)
    train_loop.fit(state)
    assert seen == [False]
    # the weights of the end of epoch 1, although training changed them before they were written
    (tmp_path / "one").mkdir()
    expected, _ = fit(tmp_path / "one", epochs=1)
    tensors = load_checkpoint(tmp_path / PREVIOUS)[1]
    assert same(tensors["model"], expected) and saved(tmp_path, PREVIOUS).step == STEPS


# ------------------------------------------------------------------ what is resumed


def change_tensors(folder, spoil):
    content = torch.load(folder / LATEST, weights_only=True)
    spoil(content)
    torch.save(content, folder / LATEST)


def save_once(folder):
    train_loop, state = make(folder)
    train_loop.save(state)
    train_loop.checkpointer.join()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content["model"].pop("0.weight"),
        lambda content: content["model"].update({"5.weight": torch.ones(4, 4)}),
        lambda content: content["model"].update(extra=torch.ones(1)),
        lambda content: content.update(model=[1]),
        lambda content: content["optimizer"].update(param_groups=[]),
        lambda content: content.update(scaler={"scale": 1.0}) or content["optimizer"].clear(),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, spoil):
    save_once(tmp_path)
    change_tensors(tmp_path, spoil)
    with pytest.raises(UserError, match="the checkpoint does not fit this run"):
        make(tmp_path)


def test_another_networks_checkpoint_names_the_tensors(tmp_path):
    save_once(tmp_path)
    with pytest.raises(UserError, match=r"5\.weight"):
        make(tmp_path, model=tiny(width=5))


def test_sums_of_another_number_of_processes_are_added():
    state = TrainState({}, [], 0)
    assert state.loss_sum_of(0, 1) == [0, 0]
    state.loss_sums = [[3.0, 8.0], [4.5, 8.0]]
    assert state.loss_sum_of(0, 1) == [7.5, 16]
    assert [state.loss_sum_of(rank, 2) for rank in (0, 1)] == [[3, 8], [4.5, 8]]
    assert [state.loss_sum_of(rank, 3) for rank in (0, 1, 2)] == [[7.5, 16], [0, 0], [0, 0]]
