"""training/loop.py: interrupted anywhere and resumed, a run is the run it would have been."""

import errno
import json
import math
import os

import pytest
import torch
from torch import nn

from common.errors import Diverged, Preempted, UserError
from common.files import read_json
from data.images import Sample
from training import loop
from training.checkpoint import BEST, LATEST, PREVIOUS, load_checkpoint
from training.distributed import World
from training.engine import Score, Trainer, evaluate
from training.loop import Progress, Run, restore
from training.optim import lr_at, make_sgd
from training.run_dir import Folder

ALONE = World(0, 1, 0, 1, torch.device("cpu"))
EPOCHS, STEPS = 3, 4
TIMINGS = ("images_per_s", "data_wait", "seconds")


class Stop:
    """A request that comes when it is looked at for the n-th time, from 0."""

    def __init__(self, at=None):
        self.at, self.looks, self.reason = at, 0, "SIGTERM"

    def __bool__(self):
        self.looks += 1
        return self.at is not None and self.looks > self.at


def batch(key, broken=None):
    generator = torch.Generator().manual_seed(key)
    return Sample(
        torch.randint(256, (8, 3, 6, 6), dtype=torch.uint8, generator=generator),
        torch.randint(3, (8,), generator=generator),
        torch.arange(8) + 8 * key,
        torch.zeros(8, 0, 2),
        torch.zeros(8) if broken is None else torch.tensor(broken),
    )


def augment(images, labels, draws, *, step, micro):
    return images.float() / 255, nn.functional.one_hot(labels, 3).float()


def nan_from(first):
    def spoilt(images, labels, draws, *, step, micro):
        images, targets = augment(images, labels, draws, step=step, micro=micro)
        return images * (float("nan") if step >= first else 1), targets

    return spoilt


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
    state=None,
    model=None,
    mixing=augment,
    broken=lambda step: None,
    **settings,
):
    """A run of 3 epochs of 4 steps, each of two micro-batches, and 3 batches of validation."""
    model = model or tiny()
    trainer = Trainer(model, make_sgd(model, lr=0.1, weight_decay=1e-3), ALONE, "fp32", mixing)
    progress = restore(trainer, state) if state else Progress()

    def steps_from(first):
        for step in range(first, EPOCHS * STEPS):
            yield [batch(2 * step, broken(step)), batch(2 * step + 1)]

    def validate(between):
        return evaluate(
            trainer,
            [batch(1000 + i) for i in range(3)],
            lambda x: x.float() / 255,
            rounds=3,
            name_of=str,
            between=between,
        )[0]

    defaults = {
        "steps_from": steps_from,
        "validate": validate,
        "lr_of": lambda s: lr_at(s, base=0.2, total_steps=EPOCHS * STEPS, warmup_steps=2),
        "frozen": {"config": {"lr": 0.1}, "classes": ["a", "b", "c"], "images": 64},
        "name_of": lambda index: f"image{index}",
        "resume_with": "the same command",
    }
    return Run(
        trainer,
        progress,
        Folder(folder),
        Stop() if stop is None else stop,
        epochs=EPOCHS,
        steps_per_epoch=STEPS,
        **{**defaults, **settings},
    )


def resumed(folder, **settings):
    return make(folder, state=load_checkpoint(folder / LATEST)[0], **settings)


def weights(run):
    return {name: value.clone() for name, value in run.trainer.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def untimed(rows):
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The undisturbed run: how often it looked at its stop request, final weights, the log."""
    folder, stop = tmp_path_factory.mktemp("whole"), Stop()
    run = make(folder, stop=stop)
    run.fit()
    return stop.looks, weights(run), log(folder)


def test_rows_are_those_of_the_formulas(whole, tmp_path, capsys):
    _, _, rows = whole
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    # the rate of each epoch's last step: warm-up of 2 of 12 steps, then 0.1 (1 + cos(pi k / 10))
    assert [row["lr"] for row in rows] == pytest.approx(
        [0.1 * (1 + math.cos(math.pi * k / 10)) for k in (1, 5, 9)]
    )
    for row in rows:
        assert set(row) == {
            "epoch",
            "lr",
            "train_loss",
            "val_loss",
            "val_top1",
            "val_top5",
            *TIMINGS,
        }
        assert row["val_top5"] == 100 and 0 < row["train_loss"] < 2 and row["seconds"] >= 0
        assert row["val_top1"] * 24 / 100 == pytest.approx(round(row["val_top1"] * 24 / 100))
        assert 0 <= row["data_wait"] <= 1 and row["images_per_s"] > 0
    make(tmp_path, extra_row=lambda: {"gates": [0.1, 0.2]}).fit()
    assert all(row["gates"] == [0.1, 0.2] for row in log(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert [line[: line.index(",")] for line in lines] == [
        f"Epoch {row['epoch']}: val_acc {row['val_top1']:.1f}" for row in rows
    ]


def test_each_step_gets_its_number_and_its_rate_resumed_or_not(tmp_path):
    def spy(run):
        step = run.trainer.step

        def spied(batches, *, step, lr, inner=step):
            told.append((step, lr))
            inner(batches, step=step, lr=lr)

        run.trainer.step = spied
        return run

    told = []
    with pytest.raises(Preempted):
        spy(make(tmp_path, stop=Stop(6))).fit()
    spy(resumed(tmp_path)).fit()
    assert told == [
        (step, lr_at(step, base=0.2, total_steps=12, warmup_steps=2)) for step in range(12)
    ]


def test_the_train_loss_is_the_mean_over_the_epochs_images(tmp_path):
    run = make(tmp_path, lr_of=lambda step: 0.0)  # the weights stay, so that it can be checked
    run.fit()
    model = tiny().train()
    for row in log(tmp_path):
        losses = []
        for key in range(8 * (row["epoch"] - 1), 8 * row["epoch"]):
            images, targets = augment(*batch(key)[:2], None, step=0, micro=0)
            losses.append(nn.functional.cross_entropy(model(images), targets, label_smoothing=0.1))
        assert row["train_loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)


def interrupted(folder, at, **settings):
    """fit() until the `at`-th look, True where it was left there; the run goes on in its folder."""
    run = (resumed if (folder / LATEST).exists() else make)(folder, stop=Stop(at), **settings)
    try:
        run.fit()
    except Preempted:
        return run, True
    return run, False


def test_preempted_twice_anywhere_a_run_ends_with_the_same_bits(whole, tmp_path):
    looks, final, rows = whole
    assert looks >= EPOCHS * (STEPS + 3)  # in every step and in every batch of validation
    for first in range(looks):
        folder = tmp_path / str(first)
        folder.mkdir()
        run, left = interrupted(folder, first)
        assert left and read_json(folder / "status.json")["state"] == "preempted"
        again, left = interrupted(folder, (first * 7) % 5)
        assert again.progress.step >= run.progress.step
        while left:
            again, left = interrupted(folder, None)
        assert same(weights(again), final)
        assert untimed(log(folder)) == untimed(rows)


def test_a_preempted_run_says_where_and_how_it_goes_on(tmp_path):
    run = make(tmp_path, stop=Stop(STEPS + 1 + 3 + 2))  # epoch 1 looks so often, and then twice
    with pytest.raises(Preempted, match="^preempted, epoch 2 step 2, resume with: the same comm"):
        run.fit()
    status = read_json(tmp_path / "status.json")
    assert (status["state"], status["epoch"], status["step"]) == ("preempted", 2, 2)
    assert status["resume"] == "the same command"
    assert load_checkpoint(tmp_path / LATEST)[0]["step"] == STEPS + 2
    assert len(log(tmp_path)) == 1


def test_resuming_rewrites_the_log_from_the_checkpoint(whole, tmp_path):
    interrupted(tmp_path, STEPS + 5)
    (tmp_path / "log.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    resumed(tmp_path).fit()
    assert untimed(log(tmp_path)) == untimed(whole[2])


def test_a_finished_run_does_nothing_more(whole, tmp_path):
    make(tmp_path).fit()
    run = resumed(tmp_path)
    run.fit()
    assert same(weights(run), whole[1]) and untimed(log(tmp_path)) == untimed(whole[2])


def scores(*top1):
    """A validation that gives these counts of 10, one an epoch."""
    left = list(top1)
    return lambda between: Score(loss=1.0, top1=left.pop(0), top5=10, images=10)


@pytest.mark.parametrize(
    ("top1", "best"),
    [((1, 3, 2), 2), ((3, 2, 1), 1), ((0, 0, 0), 1), ((1, 2, 2), 2), ((1, 2, 3), 3)],
)
def test_best_is_the_first_epoch_of_the_highest_accuracy(tmp_path, top1, best):
    run = make(tmp_path, validate=scores(*top1))
    run.fit()
    state = load_checkpoint(tmp_path / BEST)[0]
    assert run.progress.best["epoch"] == best == len(state["rows"])
    assert state["step"] == best * STEPS
    assert Progress().best is None


def test_best_survives_a_resume(tmp_path):
    run = make(tmp_path, validate=scores(5, 0, 0), stop=Stop(STEPS + 2))
    with pytest.raises(Preempted):
        run.fit()
    resumed(tmp_path, validate=scores(1, 4)).fit()
    assert load_checkpoint(tmp_path / BEST)[0]["step"] == STEPS


# ------------------------------------------------------------------ divergence


@pytest.mark.parametrize("show_seconds", [-1.0, 1000.0])
def test_a_loss_that_is_nan_stops_the_run_and_spares_the_checkpoint(
    tmp_path, monkeypatch, show_seconds
):
    monkeypatch.setattr(loop, "SHOW_SECONDS", show_seconds)
    kept = []

    def steps_from(first):
        for step in range(EPOCHS * STEPS):
            if step == 5:
                kept.append((tmp_path / LATEST).read_bytes())
            yield [batch(step)]

    run = make(tmp_path, mixing=nan_from(5), steps_from=steps_from, save_seconds=1000.0)
    with pytest.raises(Diverged, match=r"loss is not finite at epoch 2 step \d, learning rate 0\."):
        run.fit()
    assert run.step_in_epoch == (2 if show_seconds < 0 else STEPS)
    assert (tmp_path / LATEST).read_bytes() == kept[0]
    assert load_checkpoint(tmp_path / LATEST)[0]["step"] == STEPS
    assert read_json(tmp_path / "status.json")["state"] == "diverged"
    assert len(log(tmp_path)) == 1


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    run = make(tmp_path)
    run.save()
    before = (tmp_path / LATEST).read_bytes()
    run.trainer.model[5].bias.data[1] = float("inf")
    with pytest.raises(Diverged, match=r"model\.5\.bias is not finite at epoch 1 step 0"):
        run.save()
    assert (tmp_path / LATEST).read_bytes() == before
    assert not (tmp_path / PREVIOUS).exists()


def test_a_stop_request_does_not_save_what_diverged(tmp_path):
    run = make(tmp_path, mixing=nan_from(0), stop=Stop(1))
    with pytest.raises(Diverged):
        run.fit()
    assert not (tmp_path / LATEST).exists()


# ------------------------------------------------------------------ images that cannot be read


def events(folder):
    path = folder / "events.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_ten_replaced_images_an_epoch_are_named_and_borne(tmp_path, capsys):
    run = make(tmp_path, broken=lambda step: [1] * 5 + [0] * 3 if step % STEPS < 2 else None)
    run.fit()
    found = events(tmp_path)
    assert len(found) == 10 * EPOCHS
    assert found[0]["event"] == "unreadable_image" and found[0]["file"] == "image0"
    assert [e["epoch"] for e in found] == [1] * 10 + [2] * 10 + [3] * 10
    assert capsys.readouterr().out.count("warning: image") == 30


@pytest.mark.parametrize(("images", "stops"), [(64, True), (11_000, False), (10_999, True)])
def test_more_than_ten_and_a_thousandth_stop_the_run_with_the_list(tmp_path, images, stops):
    def broken(step):  # 8 and then 3 in epoch 1
        return {1: [1] * 8, 2: [1, 1, 1, 0, 0, 0, 0, 0]}.get(step)

    run = make(tmp_path, broken=broken, frozen={"config": {}, "classes": [], "images": images})
    if not stops:
        return run.fit()
    with pytest.raises(UserError, match="11 training images cannot be read") as caught:
        run.fit()
    names = [f"image{i}" for i in [*range(16, 24), *range(32, 35)]]
    assert sorted(str(caught.value).rpartition(": ")[2].split(", ")) == sorted(names)
    assert load_checkpoint(tmp_path / LATEST)[0]["step"] == 3


def test_a_class_that_cannot_be_read_at_all_stops_the_run(tmp_path):
    run = make(tmp_path, broken=lambda step: [0, 0, 2, 0, 0, 0, 0, 0] if step == 1 else None)
    with pytest.raises(UserError, match="image18 cannot be read as an image, nor can any other"):
        run.fit()
    assert run.progress.step == 1


def test_a_broken_validation_image_stops_after_saving_and_is_validated_again(whole, tmp_path):
    bad = Score(1.0, 1, 1, 10, ["val/x.jpg", "val/y.jpg"])
    run = make(tmp_path, validate=lambda between: bad)
    with pytest.raises(UserError, match=r"2 validation images .*: val/x\.jpg, val/y\.jpg$"):
        run.fit()
    assert load_checkpoint(tmp_path / LATEST)[0]["step"] == STEPS and log(tmp_path) == []
    again = resumed(tmp_path)
    again.fit()
    assert same(weights(again), whole[1]) and untimed(log(tmp_path)) == untimed(whole[2])


# ------------------------------------------------------------------ saves


@pytest.mark.parametrize(("save_seconds", "expected"), [(0.0, 6), (1000.0, 4)])
def test_saves_within_an_epoch_come_when_they_are_due(tmp_path, save_seconds, expected):
    """The power fails while step 7 is loaded."""

    def steps_from(first):
        yield from ([batch(step)] for step in range(6))
        raise ConnectionError

    with pytest.raises(ConnectionError):
        make(tmp_path, steps_from=steps_from, save_seconds=save_seconds).fit()
    assert load_checkpoint(tmp_path / LATEST)[0]["step"] == expected


def test_a_run_without_power_goes_on_from_its_last_save(whole, tmp_path):
    def steps_from(first):
        yield from ([batch(2 * s), batch(2 * s + 1)] for s in range(6))
        raise ConnectionError

    with pytest.raises(ConnectionError):
        make(tmp_path, steps_from=steps_from).fit()
    run = resumed(tmp_path)
    run.fit()
    assert same(weights(run), whole[1]) and untimed(log(tmp_path)) == untimed(whole[2])


def full_disk(monkeypatch, failing):
    """Replacing a file fails, whatever the file, as long as `failing` holds something."""
    replace = os.replace

    def maybe(*args, **kwargs):
        if failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(*args, **kwargs)

    monkeypatch.setattr(os, "replace", maybe)


def filling(failing, steps):
    def steps_from(first):
        for step in range(first, EPOCHS * STEPS):
            failing[:] = [True] if step in steps else []
            yield [batch(2 * step), batch(2 * step + 1)]

    return steps_from


def test_a_disk_that_is_full_for_a_while_costs_warnings_alone(whole, tmp_path, monkeypatch, capsys):
    failing = []
    full_disk(monkeypatch, failing)
    run = make(tmp_path, steps_from=filling(failing, [3]))  # at the end of epoch 1
    run.fit()
    assert "No space left on device" in capsys.readouterr().out
    assert same(weights(run), whole[1]) and untimed(log(tmp_path)) == untimed(whole[2])
    assert load_checkpoint(tmp_path / LATEST)[0]["step"] == EPOCHS * STEPS


def test_the_best_epoch_is_kept_though_the_disk_was_full_when_it_ended(tmp_path, monkeypatch):
    failing = []
    full_disk(monkeypatch, failing)
    run = make(tmp_path, steps_from=filling(failing, [7]), validate=scores(3, 9, 5))
    run.fit()
    assert run.progress.best["epoch"] == 2
    assert load_checkpoint(tmp_path / BEST)[0]["rows"] == run.progress.rows[:2]


def test_a_run_does_not_end_with_its_last_epoch_unsaved(tmp_path, monkeypatch):
    failing = []
    full_disk(monkeypatch, failing)
    run = make(tmp_path, steps_from=filling(failing, [11]), validate=scores(3, 5, 9))
    with pytest.raises(UserError, match="could not be written .* free space there"):
        run.fit()
    failing.clear()
    again = resumed(tmp_path, validate=scores(9))
    again.fit()
    assert load_checkpoint(tmp_path / BEST)[0]["rows"] == again.progress.rows


def test_unreadable_images_are_counted_over_a_resume(tmp_path):
    ten = {"broken": lambda step: [1.0] * 5 + [0.0] * 3 if step < 2 else None}
    with pytest.raises(Preempted):
        make(tmp_path, stop=Stop(2), **ten).fit()
    one_more = {"broken": lambda step: [1.0] + [0.0] * 7 if step == 2 else None}
    with pytest.raises(UserError, match="11 training images cannot be read"):
        resumed(tmp_path, **one_more).fit()


def test_a_disk_that_stays_full_stops_the_run_after_three_saves(tmp_path, monkeypatch):
    failing = []
    full_disk(monkeypatch, failing)
    run = make(tmp_path, steps_from=filling(failing, range(2, 12)), save_seconds=0.0)
    with pytest.raises(UserError, match="3 times in a row"):
        run.fit()
    assert load_checkpoint(tmp_path / LATEST)[0]["step"] == 2


# ------------------------------------------------------------------ what is resumed


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state["model"].pop("0.weight"),
        lambda state: state["model"].update({"5.weight": torch.ones(4, 4)}),
        lambda state: state["model"].update(extra=torch.ones(1)),
        lambda state: state.update(model=[1]),
        lambda state: state["optimizer"].update(param_groups=[]),
        lambda state: state.pop("clock"),
        lambda state: state.update(scaler={"scale": 1.0}) or state["optimizer"].clear(),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, spoil):
    make(tmp_path).save()
    state = load_checkpoint(tmp_path / LATEST)[0]
    spoil(state)
    with pytest.raises(UserError, match="the checkpoint does not fit this run"):
        make(tmp_path, state=state)


def test_another_networks_checkpoint_names_the_tensors(tmp_path):
    make(tmp_path).save()
    with pytest.raises(UserError, match=r"5\.weight"):
        resumed(tmp_path, model=tiny(width=5))


def test_sums_of_another_number_of_processes_are_added(tmp_path):
    run = make(tmp_path)
    for sums, mine in (([], [0, 0]), ([[3.0, 8.0]], [3, 8]), ([[3.0, 8.0], [4.5, 8.0]], [7.5, 16])):
        run.progress.sums = sums
        run._restore_sums()
        assert run.trainer.sums == mine


def test_check_stop_leaves_only_when_asked(tmp_path):
    run = make(tmp_path, stop=Stop(1))
    run.check_stop()
    with pytest.raises(Preempted, match="resume with: the same command"):
        run.check_stop()
