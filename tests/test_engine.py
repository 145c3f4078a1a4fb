"""training/engine.py: a step equals the plain loop, an evaluation equals counting by hand."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from data.images import Sample
from training.distributed import World
from training.engine import Score, Trainer, choose_precision, evaluate
from training.optim import make_sgd

ALONE = World(0, 1, 0, 1, torch.device("cpu"))


def tiny(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def sample(seed, count=6, size=8, broken=0):
    generator = torch.Generator().manual_seed(seed)
    return Sample(
        torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=generator),
        torch.arange(count) % 3,
        torch.arange(count),
        torch.zeros(count, 0, 2, dtype=torch.int64),
        torch.full((count,), broken),
    )


def mix(images, labels, draws=None, *, step=0, micro=0):
    """A mixing that is known: 0.7 of an image, 0.3 of the next, by step and micro-batch turned."""
    images, targets = images.float() / 255 - 0.5, F.one_hot(labels, 3).float()
    turn = 1 + (step + micro) % 2
    return (0.7 * images + 0.3 * images.roll(turn, 0), 0.7 * targets + 0.3 * targets.roll(turn, 0))


def sgd(model, lr=0.1, momentum=0.9):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, nesterov=momentum > 0)


def make(model, *, momentum=0.9, precision="fp32", augment=mix, **settings):
    return Trainer(model, sgd(model, momentum=momentum), ALONE, precision, augment, **settings)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def same_state(a, b):
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def plain_step(model, optimizer, batches, *, step, lr, smoothing=0.1, clip=None):
    """The step as one writes it out by hand, with the loss from its formula's target."""
    model.train()
    losses = []
    for micro, batch in enumerate(batches):
        images, targets = mix(batch.image, batch.label, step=step, micro=micro)
        logits = model(images.contiguous(memory_format=torch.channels_last))
        losses.append(F.cross_entropy(logits, targets, label_smoothing=smoothing))
        (losses[-1] / len(batches)).backward()
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return sum(loss.item() * 6 for loss in losses)


@pytest.mark.parametrize(("micros", "clip"), [(1, None), (1, 0.05), (3, None), (2, 0.05)])
def test_steps_equal_the_plain_loop_bit_for_bit(micros, clip):
    ours, plain = tiny(), tiny()
    trainer, optimizer = make(ours, clip_norm=clip), sgd(plain)
    loss = 0.0
    for step in range(4):
        batches = [sample(10 * step + i) for i in range(micros)]
        lr = 0.1 / (step + 1)
        trainer.step(batches, step=step, lr=lr)
        loss += plain_step(plain, optimizer, batches, step=step, lr=lr, clip=clip)
        assert same_state(ours, plain)
    assert not torch.equal(flat(ours), flat(tiny()))
    assert trainer.sums == pytest.approx([loss, 4 * micros * 6], rel=1e-12)


def test_two_micro_batches_give_the_mean_of_their_gradients():
    def update(batches):
        model = tiny()
        before = flat(model)
        make(model, momentum=0.0, augment=lambda *a, **k: mix(*a)).step(batches, step=0, lr=1.0)
        return before - flat(model)

    both = update([sample(1), sample(2)])
    mean = (update([sample(1)]) + update([sample(2)])) / 2
    torch.testing.assert_close(both, mean, rtol=1e-4, atol=1e-7)
    assert (update([sample(1)]) - both).abs().max() > 1e-3


def test_label_smoothing_is_kept_on_mixed_targets():
    """The loss from the formula: targets (1 - e) t + e / K, and minus their sum with log p."""
    for smoothing in (0.0, 0.1, 0.3):
        model, batch = tiny(), sample(1)
        images, targets = mix(batch.image, batch.label)
        logp = copy.deepcopy(model).train()(images).log_softmax(1)
        expected = -(((1 - smoothing) * targets + smoothing / 3) * logp).sum(1).sum()
        trainer = make(model, label_smoothing=smoothing)
        trainer.step([batch], step=0, lr=0.1)
        assert trainer.sums[0] == pytest.approx(expected.item(), rel=1e-6)


def test_clipping_bounds_the_step_and_leaves_small_gradients_alone():
    def norm_of_update(clip):
        model = tiny()
        before = flat(model)
        make(model, momentum=0.0, clip_norm=clip).step([sample(1)], step=0, lr=1.0)
        return (before - flat(model)).norm().item()

    free = norm_of_update(None)
    assert norm_of_update(free / 4) == pytest.approx(free / 4, rel=1e-3)
    assert norm_of_update(10 * free) == pytest.approx(free, rel=1e-5)


def test_augmentation_is_told_the_step_and_the_micro_batch_of_the_run():
    told = []

    def augment(images, labels, draws, *, step, micro):
        told.append((step, micro, len(draws)))
        return mix(images, labels)

    trainer = make(tiny(), augment=augment)
    trainer.step([sample(1), sample(2, count=4)], step=17, lr=0.1)
    assert told == [(17, 0, 6), (17, 1, 4)]


def test_bf16_autocast_keeps_float32_weights_near_those_of_float32():
    models = {}
    for precision in ("fp32", "bf16"):
        models[precision] = model = tiny()
        trainer = make(model, precision=precision)
        for step in range(3):
            trainer.step([sample(step)], step=step, lr=0.1)
    low, full = flat(models["bf16"]), flat(models["fp32"])
    assert low.dtype == torch.float32
    assert not torch.equal(low, full)
    torch.testing.assert_close(low, full, rtol=0, atol=0.03)


@pytest.mark.parametrize(
    ("amp", "has", "expected"),
    [
        (None, {}, "fp32"),
        (None, {"avx512_f": True, "avx512_bf16": False}, "fp32"),
        (None, {"avx512_bf16": True}, "bf16"),
        (None, {"amx_bf16": True}, "bf16"),
        (False, {"avx512_bf16": True}, "fp32"),
        (True, {}, "bf16"),
    ],
)
def test_precision_on_a_cpu(monkeypatch, amp, has, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has)
    assert choose_precision(torch.device("cpu"), amp) == expected


@pytest.mark.parametrize(
    ("amp", "bf16", "expected"),
    [(None, True, "bf16"), (None, False, "fp16"), (True, False, "fp16"), (False, True, "fp32")],
)
def test_precision_with_cuda(monkeypatch, amp, bf16, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)
    assert choose_precision(torch.device("cuda"), amp) == expected


# ------------------------------------------------------------------ evaluate


def scored(rows, *, classes, batch=4, rounds=None, broken=(), between=lambda: None):
    """Evaluate a network whose logits are the images: rows of (logits, label)."""
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(classes, affine=False, eps=0.0))
    model.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    trainer = make(model)
    model.train()
    batches = []
    for first in range(0, len(rows), batch):
        part = range(first, min(first + batch, len(rows)))
        logits = torch.tensor([rows[i][0] for i in part], dtype=torch.uint8)
        batches.append(
            Sample(
                logits.view(len(part), classes, 1, 1),
                torch.tensor([rows[i][1] for i in part]),
                torch.tensor(part),
                torch.empty(len(part), 0, 2),
                torch.tensor([2 * (i in broken) for i in part]),
            )
        )
    before = copy.deepcopy(model.state_dict())
    result = evaluate(
        trainer,
        batches,
        torch.Tensor.float,
        rounds=rounds or len(batches),
        name_of=lambda i: f"file{i}",
        between=between,
    )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    return result


SEVEN = [
    ([9, 1, 2, 3, 4, 5, 6], 0),  # first
    ([9, 1, 2, 3, 4, 5, 6], 3),  # the fifth of them
    ([9, 1, 2, 3, 4, 5, 6], 2),  # the sixth
    ([9, 1, 2, 3, 4, 5, 6], 1),  # the last
    ([0, 1, 2, 3, 4, 5, 6], 6),  # first
    ([0, 1, 2, 3, 4, 5, 6], 5),  # the second
]


def test_counts_and_loss_by_hand():
    score, seen = scored(SEVEN, classes=7)
    assert (score.top1, score.top5, score.images, score.unreadable) == (2, 4, 6, [])
    logits = torch.tensor([row for row, _ in SEVEN], dtype=torch.float64)
    labels = torch.tensor([label for _, label in SEVEN])
    expected = -(logits - logits.exp().sum(1, keepdim=True).log())[range(6), labels].sum()
    assert score.loss == pytest.approx(expected.item(), rel=1e-6)
    assert seen.tolist() == [[0, 0], [1, 0], [2, 0], [3, 0], [4, 6], [5, 6]]
    assert score.row("val") == pytest.approx(
        {"val_loss": expected.item() / 6, "val_top1": 100 * 2 / 6, "val_top5": 100 * 4 / 6}
    )


def test_the_cut_into_batches_does_not_matter():
    whole, cut = scored(SEVEN, classes=7, batch=6), scored(SEVEN, classes=7, batch=1)
    assert (whole[0].top1, whole[0].top5, whole[0].images) == (
        cut[0].top1,
        cut[0].top5,
        cut[0].images,
    )
    assert torch.equal(whole[1], cut[1])


def test_top5_of_three_classes_is_everything():
    score, _ = scored([([3, 2, 1], 0), ([3, 2, 1], 2), ([1, 2, 3], 1)], classes=3)
    assert (score.top1, score.top5, score.images) == (1, 3, 3)


def test_files_that_cannot_be_read_are_named():
    score, _ = scored(SEVEN, classes=7, broken=[1, 4])
    assert score.unreadable == ["file1", "file4"]


def test_a_rank_with_fewer_batches_still_takes_every_turn():
    turns = []
    score, seen = scored(SEVEN, classes=7, rounds=5, between=lambda: turns.append(1))
    assert len(turns) == 5 and score.images == 6
    score, seen = scored([], classes=7, rounds=2, between=lambda: turns.append(1))
    assert len(turns) == 7 and (score.images, seen.shape) == (0, (0, 2))


def test_what_is_raised_between_batches_abandons_the_evaluation():
    def leave():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        scored(SEVEN, classes=7, between=leave)


def test_evaluation_uses_running_statistics_and_training_goes_on_after():
    model = tiny()
    trainer = make(model)
    batch = sample(3)
    assert evaluate(trainer, [batch], torch.Tensor.float, rounds=1, name_of=str)[0].images == 6
    buffers = [b.clone() for b in model.buffers()]
    trainer.step([batch], step=0, lr=0.1)
    assert not all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))


def test_scores_start_empty_and_apart():
    Score().unreadable.append("x")
    assert Score().unreadable == []


def test_an_fp16_overflow_is_skipped_and_is_no_divergence():
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    spoil = {1: 1e30}  # the second step's images leave fp16's range

    def augment(images, labels, draws, *, step, micro):
        return images.float() * spoil.get(step, 1e-2), torch.eye(3)[labels]

    trainer = Trainer(model, make_sgd(model, lr=0.1, weight_decay=0), ALONE, "fp16", augment)
    trainer.autocast = lambda: torch.autocast("cpu", torch.float16)
    batch = Sample(
        torch.randint(255, (4, 3, 2, 2), dtype=torch.uint8),
        torch.tensor([0, 1, 2, 0]),
        torch.arange(4),
        torch.zeros(4, 0, 2),
        torch.zeros(4),
    )
    before = []
    for step in range(3):
        before.append([p.clone() for p in model.parameters()])
        trainer.step([batch], step=step, lr=0.1)
    assert not torch.equal(before[1][0], before[0][0])
    assert torch.equal(before[2][0], before[1][0])  # skipped
    assert not torch.equal(model[1].weight, before[2][0])  # and on
    assert trainer.is_finite() and trainer.scaler.get_scale() == 2.0**15
    trainer.scaler.update(2.0**-7)
    assert not trainer.is_finite()
