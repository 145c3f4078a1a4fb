"""training/recipes.py: guide and A1, each piece of A1 against timm's own, and runs of it."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import pretrain_imagenet
from common.errors import Preempted, UserError
from data.sampling import seeded
from data.synthetic import write_imagenet_tree
from data.transforms import IMAGENET_MEAN, EvalTransform, make_augmentation
from models import build_model
from models.resnet import Block, set_stochastic_depth
from training.checkpoint import load_checkpoint
from training.engine import LOSSES, binary_cross_entropy
from training.optim import OPTIMIZERS, SCHEDULES, count_warmup_steps, make_optimizer, make_schedule
from training.recipes import FLAGS, PRETRAIN, describe_recipe, upgrade_pretrain_config

A1 = PRETRAIN["a1"]


@pytest.fixture
def timm():
    return pytest.importorskip("timm", reason="compares with timm: pip install timm")


# ---------------------------------------------------------------- the tables


def test_a1_as_published():
    assert {name: A1[name] for name in FLAGS} == {
        "epochs": 600,
        "batch_size": 256,
        "lr": 5e-3,
        "weight_decay": 0.01,
        "warmup_epochs": 5,
        "label_smoothing": 0.1,
        "clip_norm": 0,
    }
    assert (A1["global_batch"], A1["warmup_lr"], A1["min_lr"]) == (2048, 1e-4, 1e-6)
    assert (A1["mixup"], A1["cutmix"], A1["repeats"], A1["stochastic_depth"]) == (0.2, 1, 3, 0.05)
    assert A1["randaugment"] == "rand-m7-n2-mstd0.5-inc1"
    assert EvalTransform(224, A1["test_resize"]).resize == 235


def test_every_recipe_names_what_there_is_and_has_a_clip_norm():
    for recipe in PRETRAIN.values():
        assert recipe["optimizer"] in OPTIMIZERS
        assert recipe["loss"] in LOSSES and recipe["loss"].isidentifier()
        assert recipe["schedule"] in SCHEDULES and recipe["schedule"].isidentifier()
        assert recipe.keys() >= set(FLAGS) and recipe["clip_norm"] >= 0


@pytest.mark.parametrize("name", PRETRAIN)
def test_an_upgraded_configuration_of_today_is_unchanged(name):
    config = {**PRETRAIN[name], "recipe": name, "clip_norm": 3.0}
    assert upgrade_pretrain_config(config) == config


def test_a_table_in_one_line():
    assert describe_recipe({"lr": 0.1, "global_batch": None, "randaugment": [2, 9]}) == (
        "lr 0.1; randaugment [2, 9]"
    )


# ---------------------------------------------------------------- each piece is timm's


def test_loss_is_timms_on_the_targets_of_its_mixup(timm):
    from timm.data.mixup import mixup_target
    from timm.loss import BinaryCrossEntropy

    logits, labels = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.arange(6)
    theirs = BinaryCrossEntropy()(logits, mixup_target(labels % 5, 5, lam=0.3, smoothing=0.1))
    mixed = mixup_target(labels % 5, 5, lam=0.3, smoothing=0.0)
    ours = binary_cross_entropy(logits, mixed, label_smoothing=0.1)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert abs(binary_cross_entropy(logits, mixed, label_smoothing=0.0) - theirs) > 1e-4


@pytest.mark.parametrize("warmup", [0, 10])
def test_schedule_is_timms_at_every_update(timm, warmup):
    from timm.scheduler import CosineLRScheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=5e-3)
    theirs = CosineLRScheduler(
        optimizer,
        t_initial=60,
        lr_min=1e-6,
        warmup_t=warmup,
        warmup_lr_init=1e-4,
        t_in_epochs=False,
    )
    ours = make_schedule(A1, base=5e-3, total_steps=60, warmup_steps=warmup)
    for step in range(61):
        theirs.step_update(step)
        assert ours(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
    assert ours(60) == pytest.approx(1e-6)


def test_the_guides_schedule_is_the_one_it_names():
    guide = make_schedule(PRETRAIN["guide"], base=0.8, total_steps=12, warmup_steps=4)
    assert [guide(step) for step in (0, 3, 8, 12)] == pytest.approx([0.2, 0.8, 0.4, 0])
    assert (
        count_warmup_steps(A1["warmup_epochs"], steps_per_epoch=625, total_steps=600 * 625) == 3125
    )


def test_optimizer_is_timms_lamb_with_its_groups_for_decay(timm):
    from timm.optim import Lamb, param_groups_weight_decay

    model = build_model("twistnet18", 5)
    ours = make_optimizer(A1, model, lr=A1["lr"])
    theirs = param_groups_weight_decay(model, weight_decay=A1["weight_decay"])
    assert isinstance(ours, Lamb) and ours.defaults["max_grad_norm"] == 1.0

    def decay(groups):
        return {id(p): group["weight_decay"] for group in groups for p in group["params"]}

    assert decay(ours.param_groups) == decay(theirs)


def test_randaugment_is_timms_under_the_same_seed_and_leaves_the_generators_alone(timm):
    from PIL import Image
    from timm.data.auto_augment import rand_augment_transform

    image = torch.randint(256, (3, 40, 40), dtype=torch.uint8)
    ours = make_augmentation(A1, size=40, seed=0, num_classes=3)[0].post_crop
    theirs = rand_augment_transform(
        "rand-m7-mstd0.5-inc1",
        {"translate_const": 18, "img_mean": tuple(round(255 * m) for m in IMAGENET_MEAN)},
    )
    changed = 0
    for key in range(20):
        random.seed(1)
        np.random.seed(1)
        with seeded(key):
            got = ours(image)
        assert (random.random(), np.random.rand()) == (
            random.Random(1).random(),
            np.random.RandomState(1).rand(),
        )
        with seeded(key):
            seed = int(torch.randint(2**32, ()))
        random.seed(seed)
        np.random.seed(seed)
        expected = theirs(Image.fromarray(image.permute(1, 2, 0).numpy()))
        assert torch.equal(got.permute(1, 2, 0), torch.from_numpy(np.array(expected)))
        changed += not torch.equal(got, image)
    assert changed > 10


def test_a1_draws_only_the_mixing_on_the_device(timm):
    transform, augment = make_augmentation(A1, size=32, seed=0, num_classes=3)
    crop, draws = transform(torch.randint(256, (3, 50, 60), dtype=torch.uint8))
    assert crop.shape == (3, 32, 32) and draws.shape == (0, 2)
    images, targets = augment(
        torch.stack([crop, crop.flip(1)]),
        torch.tensor([0, 1]),
        torch.stack([draws, draws]),
        step=0,
        micro=0,
    )
    assert images.shape == (2, 3, 32, 32) and targets.sum(1).tolist() == pytest.approx([1, 1])


def test_without_timm_it_is_said_what_to_install(monkeypatch):
    for module in ("timm.optim", "timm.data.auto_augment"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match="LAMB.* needs timm: pip install timm"):
        make_optimizer(A1, nn.Linear(2, 2), lr=1.0)
    with pytest.raises(UserError, match="RandAugment rand-m7-.* needs timm: pip install timm"):
        make_augmentation(A1, size=32, seed=0, num_classes=3)


# ---------------------------------------------------------------- stochastic depth


@pytest.mark.parametrize("name", ["resnet18", "seresnet18", "twistnet18"])
def test_a_block_leaves_out_its_whole_branch_image_by_image(name):
    model = build_model(name, 3).train()
    names = list(model.state_dict())
    set_stochastic_depth(model, 0.7)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    assert [block.drop_rate for block in blocks] == pytest.approx([i / 10 for i in range(8)])
    assert list(model.state_dict()) == names
    block, x = blocks[-1], torch.rand(40, 512, 2, 2)
    torch.manual_seed(0)
    out = block(x)
    left_out = (out == x).flatten(1).all(1)
    assert 20 < left_out.sum() < 36
    kept = ~left_out
    block.drop_rate = 0.0
    branch = block.branch(x)
    torch.testing.assert_close(
        out[kept], (branch[kept] / 0.3 + x[kept]).relu(), rtol=1e-4, atol=1e-5
    )
    block.drop_rate = 0.7
    block.eval()
    assert torch.equal(block(x), (block.branch(x) + x).relu())


# ---------------------------------------------------------------- runs


@pytest.fixture
def pretrain(timm, tmp_path, monkeypatch):
    """18 images in steps of 2 × 4: 2 steps per epoch of A1."""
    write_imagenet_tree(
        tmp_path / "tree", train_per_class=6, val_per_class=3, size=40, seed=0, num_classes=3
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(A1, "global_batch", 8)

    def run(*flags):
        pretrain_imagenet.main(["--data_dir", "tree", "--workers", "0", *flags])

    return run


FLAGS_OF_A_NEW_RUN = "--recipe a1 --model resnet18 --img_size 32 --batch_size 4 --epochs 2"
NEW = FLAGS_OF_A_NEW_RUN.split()
RESUME = ["--resume", "checkpoints/latest.pt"]


def weights(folder):
    return torch.load(Path(folder) / "resnet18_imagenet.pt", weights_only=True)


def test_an_interrupted_a1_resumes_to_the_same_bits(pretrain, stop_after, capsys):
    pretrain(*NEW, "--checkpoint_dir", "whole", "--weights_dir", "whole")
    assert "global batch 8 (2 × 4), lr 0.005, 2 epochs of 2 steps" in capsys.readouterr().out
    stop_after(step=0)
    with pytest.raises(Preempted, match="epoch 1 step 1"):
        pretrain(*NEW)
    with pytest.raises(UserError, match="other settings .*recipe a1 → guide"):
        pretrain(*RESUME, "--recipe", "guide")
    pretrain(*RESUME)
    resumed, whole = weights("weights"), weights("whole")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    about = json.loads(Path("weights/resnet18_imagenet.json").read_text())["recipe"]
    assert {**A1, **about} == about and about["recipe"] == "a1" and about["micro_batches"] == 2


def test_flags_override_the_table_and_micro_batches_fill_the_step(pretrain, capsys):
    pretrain(*NEW, "--epochs", "1", "--lr", "0.003", "--batch_size", "2")
    printed = capsys.readouterr().out
    assert "recipe a1: epochs 1; batch_size 2; global_batch 8; optimizer lamb; lr 0.003" in printed
    assert "global batch 8 (4 × 2), lr 0.003, 1 epochs of 2 steps" in printed
    with pytest.raises(UserError, match="--batch_size 3 does not divide the 8 images per step"):
        pretrain(*NEW, "--batch_size", "3", "--checkpoint_dir", "other")
    assert not Path("other").exists()


def test_a_checkpoint_from_before_recipes_had_names_is_of_the_guide(pretrain):
    pretrain(*NEW, "--recipe", "guide", "--epochs", "1")
    content = torch.load("checkpoints/latest.pt", weights_only=True)
    for name in ("recipe", "optimizer", "loss", "repeats", "lr_images", "global_batch"):
        del content["config"][name]
    torch.save(content, "checkpoints/latest.pt")
    pretrain(*RESUME, "--epochs", "2")
    with pytest.raises(UserError, match="other settings .*recipe guide → a1"):
        pretrain(*RESUME, "--recipe", "a1", "--batch_size", "4")


def test_an_a1_checkpoint_of_the_older_format_resumes_to_the_same_bits(
    pretrain, stop_after, write_in_old_format
):
    pretrain(*NEW, "--checkpoint_dir", "whole", "--weights_dir", "whole")
    stop_after(step=2)
    with pytest.raises(Preempted, match="epoch 2 step 1"):
        pretrain(*NEW)
    stop_after()
    write_in_old_format(Path("checkpoints/latest.pt"))
    pretrain(*RESUME)
    resumed, whole = weights("weights"), weights("whole")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    config = load_checkpoint(Path("checkpoints/latest.pt"))[0].config
    assert (config["loss"], config["schedule"]) == ("binary_cross_entropy", "timm_cosine")


def test_the_values_that_are_not_flags_act(pretrain, trainers, monkeypatch):
    """Each of a recipe's values of training reaches the trainer."""
    guide = [*NEW, "--recipe", "guide", "--epochs", "1", "--clip_norm", "2.5"]
    monkeypatch.setitem(PRETRAIN["guide"], "momentum", 0.5)
    monkeypatch.setitem(PRETRAIN["guide"], "nesterov", False)
    monkeypatch.setitem(PRETRAIN["guide"], "label_smoothing", 0.3)
    pretrain(*guide)
    (trainer,) = trainers
    group = trainer.optimizer.param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.5, False)
    assert (trainer.clip_norm, trainer.label_smoothing) == (2.5, 0.3)
