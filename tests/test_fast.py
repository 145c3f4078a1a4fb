"""The recipe fast: growing images, alternating flips, plain targets, rarer validations."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

import pretrain_imagenet
from common.errors import Preempted, UserError
from data.imagenet import load_imagenet
from data.images import TrainSet
from data.loading import TrainLoader
from data.sampling import StepSampler
from data.synthetic import write_imagenet_tree
from data.transforms import (
    find_train_sizes,
    flip_alternately,
    list_train_sizes,
    make_augmentation,
    normalise,
    ramp_size,
)
from tools import evaluate, pack
from training import loop
from training.checkpoint import Checkpointer
from training.engine import Trainer
from training.loop import TrainLoop
from training.recipes import PRETRAIN

FAST = PRETRAIN["fast"]
TINY = pytest.mark.usefixtures("tiny_network")
TIMINGS = ("images_per_s", "data_wait", "seconds")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """3 classes, 18 images to train on and 9 to validate on: with a batch of 4, 4 steps."""
    root = tmp_path_factory.mktemp("tree")
    write_imagenet_tree(root, train_per_class=6, val_per_class=3, size=72, seed=0, num_classes=3)
    return root


def pretrain(tree, *flags, epochs=6):
    pretrain_imagenet.main(
        [
            *("--data_dir", str(tree), "--recipe", "fast", "--model", "resnet18"),
            *("--img_size", "64", "--batch_size", "4", "--workers", "0"),
            *("--epochs", str(epochs), *flags),
        ]
    )


def rows(folder="checkpoints"):
    lines = map(json.loads, (Path(folder) / "log.jsonl").read_text().splitlines())
    return [{name: row[name] for name in row if name not in TIMINGS} for row in lines]


def make_loader(source, *, epochs=6, seed=3, workers=0, rank=0, world_size=1):
    recipe = {**FAST, "epochs": epochs}
    transform, _ = make_augmentation(recipe, size=64, seed=seed, num_classes=3)
    sampler = StepSampler(
        len(source), seed=seed, micro_batch=4, micro_batches=2, rank=rank, world_size=world_size
    )
    return TrainLoader(TrainSet(source, transform, seed), sampler, workers=workers)


def load(loader, first=0, epochs=6):
    """All micro-batches from step `first` on."""
    return [batch for step in loader.steps(first, 2 * epochs) for batch in step]


# ---------------------------------------------------------------- sizes


def test_the_size_is_low_for_two_thirds_and_high_at_the_end():
    sizes = [ramp_size(epoch, epochs=88, low=160, high=192) for epoch in range(88)]
    assert set(sizes[:58]) == {160} and sizes[-1] == 192
    assert sizes == sorted(sizes) and set(sizes) == {160, 176, 192}


@pytest.mark.parametrize("epochs", range(1, 40))
def test_every_run_ends_at_the_high_size_and_only_grows_by_multiples_of_16(epochs):
    sizes = [ramp_size(epoch, epochs=epochs, low=96, high=144) for epoch in range(epochs)]
    assert sizes[-1] == 144 and sizes == sorted(sizes)
    assert all(size % 16 == 0 for size in sizes)
    assert sizes[: 2 * epochs // 3] == [96] * (2 * epochs // 3)


def test_sizes_are_in_proportion_to_img_size():
    config = {"train_sizes": [160, 192]}
    assert find_train_sizes({**config, "img_size": 224}) == (160, 192)
    assert find_train_sizes({**config, "img_size": 448}) == (320, 384)
    assert find_train_sizes({**config, "img_size": 32}) == (32, 32)  # never smaller
    assert find_train_sizes({"img_size": 100}) == (100, 100)


# ---------------------------------------------------------------- flips and targets


def test_an_image_is_flipped_in_every_second_epoch_and_half_of_them_in_the_first():
    flip = partial(flip_alternately, seed=7)
    first = [flip(0, index) for index in range(2000)]
    assert abs(sum(first) / 2000 - 0.5) < 0.05
    for epoch in range(1, 5):
        flips = [flip(epoch, index) for index in range(2000)]
        assert flips == [is_flipped ^ (epoch % 2 == 1) for is_flipped in first]
    assert first != [flip_alternately(0, index, seed=8) for index in range(2000)]


def test_the_loader_flips_alternately(tree):
    source, _, _ = load_imagenet(tree)
    transform, _ = make_augmentation(
        {**FAST, "crop_scale": [1.0, 1.0]}, size=64, seed=0, num_classes=3
    )
    dataset = TrainSet(source, transform, 0)
    for index in range(len(source)):
        images = [dataset[epoch, index].image.float() for epoch in range(4)]
        turned = [image.flip(2) if epoch % 2 else image for epoch, image in enumerate(images)]
        # The crops differ by a few pixels in their aspect ratio.
        assert all((image - turned[0]).abs().mean() < 20 for image in turned)
        assert (images[1] - images[0]).abs().mean() > (turned[1] - turned[0]).abs().mean()


def test_without_mixing_images_are_normalised_and_targets_are_the_classes():
    _, augment = make_augmentation(FAST, size=64, seed=0, num_classes=3)
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    labels = torch.tensor([2, 0, 1, 2])
    draws = torch.empty(4, 0, 2, dtype=torch.int64)
    found, targets = augment(images, labels, draws, step=0, micro=0)
    assert torch.equal(found, normalise(images))
    assert torch.equal(targets, torch.eye(3)[labels])


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.5, 0), (0, 0.5)])
def test_either_way_of_mixing_can_be_left_out(mixup, cutmix):
    recipe = {**FAST, "mixup": mixup, "cutmix": cutmix}
    _, augment = make_augmentation(recipe, size=64, seed=0, num_classes=2)
    images = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).repeat(1, 3, 16, 16)
    draws = torch.empty(2, 0, 2, dtype=torch.int64)
    levels = set(normalise(images)[:, 0].unique().tolist())
    blended, patched = 0, 0
    for step in range(20):
        found, _ = augment(images, torch.tensor([0, 1]), draws, step=step, micro=0)
        values = found[0, 0].unique().tolist()
        blended += len(values) == 1 and values[0] not in levels
        patched += len(values) == 2 and set(values) == levels
    assert (blended > 10, patched > 10) == (mixup > 0, cutmix > 0)
    assert (blended == 0, patched == 0) == (mixup == 0, cutmix == 0)


# ---------------------------------------------------------------- the same images whatever happens


def test_batches_have_the_size_of_their_epoch(tree):
    source, _, _ = load_imagenet(tree)
    sizes = [batch.image.shape[2:] for batch in load(make_loader(source))]
    low, high = find_train_sizes({**FAST, "img_size": 64})
    assert sizes[0] == (low, low) and sizes[-1] == (high, high)
    per_epoch = [sizes[4 * epoch : 4 * epoch + 4] for epoch in range(6)]
    assert all(len(set(found)) == 1 for found in per_epoch)


def test_images_do_not_depend_on_workers_processes_or_where_a_run_resumes(tree):
    source, _, _ = load_imagenet(tree)
    expected = [batch.image for batch in load(make_loader(source))]
    for workers in (1, 2):
        found = [batch.image for batch in load(make_loader(source, workers=workers))]
        assert all(map(torch.equal, found, expected))
    ranks = [load(make_loader(source, rank=rank, world_size=2)) for rank in (0, 1)]
    dealt = [batch.image for pair in zip(*ranks, strict=True) for batch in pair]
    assert len(dealt) == len(expected) and all(map(torch.equal, dealt, expected))
    resumed = [batch.image for batch in load(make_loader(source), first=7)]
    assert len(resumed) == len(expected) - 14 and all(map(torch.equal, resumed, expected[14:]))


def test_packed_images_of_the_same_pixels_are_the_same_samples(tree, tmp_path):
    source, _, _ = load_imagenet(tree)
    packed = ["--data_dir", str(tree), "--out", str(tmp_path / "packed"), "--workers", "0"]
    pack.main(packed)
    other, _, _ = load_imagenet(tmp_path / "packed")
    pairs = zip(load(make_loader(source)), load(make_loader(other)), strict=True)
    assert all(torch.equal(one.image, two.image) for one, two in pairs)


@TINY
@pytest.mark.parametrize("step", [2, 9, 17, 23])
def test_an_interrupted_run_ends_with_the_same_bits(tree, stop_after, step):
    pretrain(tree, "--checkpoint_dir", "whole", "--weights_dir", "whole/weights")
    stop_after(step=step)
    with pytest.raises(Preempted):
        pretrain(tree)
    pretrain(tree)
    whole, resumed = (
        torch.load(f"{folder}/resnet18_imagenet.pt", weights_only=True)
        for folder in ("whole", "checkpoints")
    )
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert rows("whole") == rows()


# ---------------------------------------------------------------- runs


@TINY
def test_a_resume_that_ends_where_no_validation_was_due_validates_and_writes_weights(
    tree, monkeypatch, capsys
):
    train_epoch = TrainLoop.train_epoch

    def die_in_the_fourth(training, state, steps):
        training.join_save()
        if state.epoch == 3:
            raise Preempted("killed")
        train_epoch(training, state, steps)

    with monkeypatch.context() as patch, pytest.raises(Preempted):
        patch.setattr(TrainLoop, "train_epoch", die_in_the_fourth)
        pretrain(tree, epochs=7)  # every fifth epoch is validated
    assert all("val_top1" not in row for row in rows())
    logged = []  # by each call of a logger: the last epoch and whether it has been validated
    monkeypatch.setattr(
        pretrain_imagenet,
        "TensorBoardLogger",
        lambda folder: lambda rows: logged.append((len(rows), "val_top1" in rows[-1])),
    )
    pretrain_imagenet.main(
        ["--data_dir", str(tree), "--resume", "checkpoints/latest.pt", "--epochs", "3"]
        + ["--workers", "0", "--tensorboard"]
    )
    assert logged == [(3, True)]
    printed = capsys.readouterr().out
    assert "best.pt is missing" not in printed and "\nEpoch 3: val_acc" in printed
    last = torch.load("checkpoints/best.pt", weights_only=True)["history"][-1]
    top1 = json.loads(Path("weights/resnet18_imagenet.json").read_text())["top1"]
    assert rows()[-1]["epoch"] == 3 and rows()[-1]["val_top1"] == last["val_top1"] == top1


@TINY
def test_an_epoch_without_a_validation_is_saved_once(tree, monkeypatch):
    """A validation may be long, so that the state is saved before it, too."""
    saved = []
    save = Checkpointer.save
    monkeypatch.setattr(
        Checkpointer, "save", lambda *args, **kw: saved.append(args[1]["step"]) or save(*args, **kw)
    )
    monkeypatch.setattr(loop, "SAVE_BEFORE_VALIDATION", 0)
    pretrain(tree, epochs=6)
    assert saved == [4, 8, 12, 16, 20, 20, 24, 24]


@TINY
def test_each_image_size_is_compiled_for_itself(tree, eager_compiler):
    pretrain(tree, "--compile", "--img_size", "96", epochs=9)
    sizes = list_train_sizes({**FAST, "img_size": 96, "epochs": 9})
    # Validation has two shapes: whole batches and the last one.
    assert len(sizes) == 3 and eager_compiler["stats"]["unique_graphs"] == len(sizes) + 2


@TINY
def test_the_largest_images_of_the_run_are_tried_first(tree, monkeypatch):
    tried = []
    monkeypatch.setattr(Trainer, "try_memory", lambda self, *shape: tried.append(shape))
    pretrain(tree, epochs=6)
    assert tried == [(4, 48)]


@TINY
def test_a_large_validation_set_is_used_less_often_and_always_at_the_end(tree, capsys):
    pretrain(tree, "--checkpoint_dir", "run", epochs=7)  # 9 of 18 × 0.1 images: every fifth epoch
    validated = [row["epoch"] for row in rows("run") if "val_top1" in row]
    assert validated == [5, 7]
    printed = capsys.readouterr().out
    assert "\nEpoch 4: train_loss" in printed and "\nEpoch 5: val_acc" in printed
    assert "validation every 5 epochs" in printed


@TINY
def test_the_start_says_which_sizes_are_used(tree, capsys):
    pretrain(tree, epochs=1)
    assert "training at 48 px, validation at 64 px" in capsys.readouterr().out
    pretrain(tree, "--checkpoint_dir", "run", epochs=7)
    assert "training at 32, 48 px, validation at 64 px" in capsys.readouterr().out


def test_evaluate_repeats_the_accuracy_of_the_run(tree, capsys):
    pretrain(tree, epochs=2)
    about = json.loads(Path("weights/resnet18_imagenet.json").read_text())
    assert about["top1"] == rows()[-1]["val_top1"]
    evaluate.main(
        ["--data_dir", str(tree), "--weights", "weights/resnet18_imagenet.pt", "--workers", "0"]
    )
    printed = capsys.readouterr().out
    assert f"{about['top1']:.2f}" in printed and "resize 73, crop 64" in printed


def test_a_network_of_one_image_size_is_refused_in_one_line(tree):
    pytest.importorskip("timm")
    with pytest.raises(UserError, match="takes a single one: use another --recipe"):
        pretrain_imagenet.main(
            ["--data_dir", str(tree), "--recipe", "fast", "--epochs", "1", "--workers", "0"]
            + ["--model", "timm/swin_tiny_patch4_window7_224"]
        )


def test_a_network_that_does_not_take_every_size_of_the_run_is_refused_at_the_start(tree):
    pytest.importorskip("timm")
    message = "timm/hrnet_w18_small does not take 48 px images: .*must match"
    with pytest.raises(UserError, match=message):
        pretrain_imagenet.main(
            ["--data_dir", str(tree), "--recipe", "fast", "--epochs", "6", "--workers", "0"]
            + ["--model", "timm/hrnet_w18_small", "--img_size", "64", "--batch_size", "4"]
        )
    assert not Path("checkpoints/latest.pt").exists()


# ---------------------------------------------------------------- weight decay


@TINY
def test_an_epoch_decays_as_much_as_one_of_imagenet(tree, trainers, capsys):
    def decays(*flags):
        pretrain(tree, *flags, epochs=1)
        return [group["weight_decay"] for group in trainers[-1].optimizer.param_groups]

    expected = 5e-5 * 1_281_167 / 18
    assert decays() == pytest.approx([expected, 0])
    assert "weight decay 3.56 (5e-05 × 1,281,167 / 18), 1 epochs of 4" in capsys.readouterr().out
    flags = ("--weight_decay", "1e-5", "--checkpoint_dir", "other")
    assert decays(*flags) == pytest.approx([expected / 5, 0])


@TINY
def test_a_checkpoint_from_before_the_decay_was_scaled_keeps_its_own(tree, stop_after, capsys):
    stop_after(step=1)
    with pytest.raises(Preempted):
        pretrain(tree)
    stop_after()
    content = torch.load("checkpoints/latest.pt", weights_only=True)
    del content["config"]["weight_decay_images"]
    content["optimizer"]["param_groups"][0]["weight_decay"] = 5e-5
    torch.save(content, "checkpoints/latest.pt")
    pretrain(tree)
    assert "weight decay" not in capsys.readouterr().out.split("resuming")[1]
    saved = torch.load("checkpoints/latest.pt", weights_only=True)
    assert saved["optimizer"]["param_groups"][0]["weight_decay"] == 5e-5
