"""training/engine.py: a step equals the plain loop, an evaluation equals counting by hand."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from common.errors import UserError
from data.images import Sample
from training.distributed import DistributedContext
from training.engine import EvalMetrics, Evaluator, Trainer, check_precision, choose_precision
from training.optim import make_optimizer
from training.recipes import PRETRAIN

CONTEXT = DistributedContext()


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
    """A known mixing: 0.7 of an image and 0.3 of another, which the step and micro-batch choose."""
    images, targets = images.float() / 255 - 0.5, F.one_hot(labels, 3).float()
    turn = 1 + (step + micro) % 2
    return (0.7 * images + 0.3 * images.roll(turn, 0), 0.7 * targets + 0.3 * targets.roll(turn, 0))


def sgd(model, lr=0.1, momentum=0.9):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, nesterov=momentum > 0)


def make(model, *, momentum=0.9, precision="fp32", augment=mix, **settings):
    return Trainer(model, sgd(model, momentum=momentum), CONTEXT, precision, augment, **settings)


def test_nothing_that_was_computed_in_eval_mode_survives_the_loading_of_weights():
    class Caching(nn.Linear):  # as the attention biases of LeViT in timm before 1.0.30
        cache = None

        def train(self, mode=True):
            self.cache = None if mode else self.cache
            return super().train(mode)

        def forward(self, x):
            if self.training or self.cache is None:
                self.cache = self.weight.detach().clone()
            return F.linear(x, self.cache, self.bias)

    trained, model = Caching(4, 3), Caching(4, 3)
    model.eval()(torch.zeros(1, 4))
    trainer = make(model)
    trainer.load_state_dict(make(trained).state_dict())
    x = torch.randn(2, 4)
    assert torch.equal(model.eval()(x), trained.eval()(x))


def test_trying_the_memory_runs_the_largest_images_and_changes_nothing():
    model = tiny()
    trainer, shapes = make(model, precision="bf16"), []
    model.register_forward_hook(lambda module, inputs, _: shapes.append(inputs[0].shape))
    before, draws = copy.deepcopy(trainer.state_dict()), torch.get_rng_state()
    trainer.try_memory(5, 48)
    assert shapes == [(5, 3, 48, 48)]
    after = trainer.state_dict()
    assert all(torch.equal(after["model"][name], x) for name, x in before["model"].items())
    assert after["optimizer"] == before["optimizer"] and trainer.loss_sum == 0
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), draws)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def same_state(a, b):
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def plain_step(model, optimizer, batches, *, step, lr, smoothing=0.1, clip=None):
    """The step written out by hand: its summed loss, and the norm of its gradient."""
    model.train()
    losses = []
    for micro, batch in enumerate(batches):
        images, targets = mix(batch.image, batch.label, step=step, micro=micro)
        logits = model(images.contiguous(memory_format=torch.channels_last))
        losses.append(F.cross_entropy(logits, targets, label_smoothing=smoothing))
        (losses[-1] / len(batches)).backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return sum(loss.item() * 6 for loss in losses), norm


@pytest.mark.parametrize(("micros", "clip"), [(1, None), (1, 0.05), (3, None), (2, 0.05)])
def test_steps_equal_the_plain_loop_bit_for_bit(micros, clip):
    ours, plain = tiny(), tiny()
    trainer, optimizer = make(ours, clip_norm=clip), sgd(plain)
    loss, norms = 0.0, []
    for step in range(4):
        batches = [sample(10 * step + i) for i in range(micros)]
        lr = 0.1 / (step + 1)
        trainer.step(batches, step=step, lr=lr)
        step_loss, norm = plain_step(plain, optimizer, batches, step=step, lr=lr, clip=clip)
        loss, norms = loss + step_loss, [*norms, norm]
        assert same_state(ours, plain)
    assert not torch.equal(flat(ours), flat(tiny()))
    assert trainer.read_loss() == pytest.approx((loss, 4 * micros * 6), rel=1e-12)
    assert trainer.read_grad_norms() == pytest.approx(norms, rel=1e-5)  # those before clipping
    assert trainer.read_grad_norms() == []


def test_a_group_trains_at_its_factor_of_the_learning_rate():
    def update(factor):
        model = tiny()
        before = flat(model)
        trainer = make(model, momentum=0.0)
        for group in trainer.optimizer.param_groups:
            group["lr_factor"] = factor
        trainer.step([sample(1)], step=0, lr=0.1)
        return before - flat(model)

    torch.testing.assert_close(update(3.0), 3 * update(1.0), rtol=1e-4, atol=1e-6)


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


def test_label_smoothing_applies_to_mixed_targets():
    """The loss from the formula: targets (1 - e) t + e / K, and minus their sum with log p."""
    for smoothing in (0.0, 0.1, 0.3):
        model, batch = tiny(), sample(1)
        images, targets = mix(batch.image, batch.label)
        logp = copy.deepcopy(model).train()(images).log_softmax(1)
        expected = -(((1 - smoothing) * targets + smoothing / 3) * logp).sum(1).sum()
        trainer = make(model, label_smoothing=smoothing)
        trainer.step([batch], step=0, lr=0.1)
        assert trainer.read_loss()[0] == pytest.approx(expected.item(), rel=1e-6)


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


class Properties:
    def __init__(self, major, minor):
        self.major, self.minor = major, minor


@pytest.mark.parametrize(
    ("amp", "capability", "expected"),
    [
        (None, (9, 0), "bf16"),
        (None, (8, 0), "bf16"),
        (None, (7, 5), "fp16"),  # Turing only emulates bf16
        (True, (7, 5), "fp16"),
        (True, (7, 0), "fp16"),
        (False, (8, 0), "fp32"),
    ],
)
def test_precision_with_cuda(monkeypatch, amp, capability, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: Properties(*capability))
    # what emulation would answer
    monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda *_: True)
    assert choose_precision(torch.device("cuda"), amp) == expected
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    check_precision(torch.device("cuda"), "fp16")
    if capability >= (8, 0):
        check_precision(torch.device("cuda"), "bf16")
    else:  # a run that was started on another machine
        with pytest.raises(UserError, match="the run is in bf16, which Tesla T4 does not have"):
            check_precision(torch.device("cuda"), "bf16")


@pytest.fixture
def tf32_allowed(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("bf16", True)])
def test_fp32_trains_and_evaluates_without_tf32(tf32_allowed, precision, allowed):
    make(tiny(), precision=precision)
    assert torch.backends.cudnn.allow_tf32 is allowed
    torch.backends.cudnn.allow_tf32 = True
    Evaluator(Batches([sample(1)]), CONTEXT, precision).run(tiny())
    assert torch.backends.cudnn.allow_tf32 is allowed
    assert not torch.backends.cuda.matmul.allow_tf32  # torch's default


# ------------------------------------------------------------------ evaluate


class Batches(list):
    """Batches of this rank, as a data.loading.EvalLoader gives them."""

    dataset = range(6)

    def normalise(self, images):
        return images.float()

    def file_name(self, index):
        return f"file{index}"


def evaluated(rows, *, classes, batch=4, broken=(), indices=range(6)):
    """Evaluate a network whose logits are the images: rows of (logits, label)."""
    model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(classes, affine=False, eps=0.0))
    model.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    model.train()
    batches = Batches()
    for first in range(0, len(rows), batch):
        part = range(first, min(first + batch, len(rows)))
        logits = torch.tensor([rows[i][0] for i in part], dtype=torch.uint8)
        batches.append(
            Sample(
                logits.view(len(part), classes, 1, 1),
                torch.tensor([rows[i][1] for i in part]),
                torch.tensor([indices[i] for i in part]),
                torch.empty(len(part), 0, 2),
                torch.tensor([2 * (i in broken) for i in part]),
            )
        )
    before = copy.deepcopy(model.state_dict())
    metrics = Evaluator(batches, CONTEXT, "fp32").run(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    return metrics


SIX_ROWS = [
    ([9, 1, 2, 3, 4, 5, 6], 0),  # first
    ([9, 1, 2, 3, 4, 5, 6], 3),  # the fifth of them
    ([9, 1, 2, 3, 4, 5, 6], 2),  # the sixth
    ([9, 1, 2, 3, 4, 5, 6], 1),  # the last
    ([0, 1, 2, 3, 4, 5, 6], 6),  # first
    ([0, 1, 2, 3, 4, 5, 6], 5),  # the second
]


def test_counts_and_loss_by_hand():
    metrics = evaluated(SIX_ROWS, classes=7)
    counts = metrics.top1, metrics.top5, metrics.num_images, metrics.unreadable
    assert counts == (2, 4, 6, [])
    logits = torch.tensor([row for row, _ in SIX_ROWS], dtype=torch.float64)
    labels = torch.tensor([label for _, label in SIX_ROWS])
    expected = -(logits - logits.exp().sum(1, keepdim=True).log())[range(6), labels].sum()
    assert metrics.loss_sum == pytest.approx(expected.item(), rel=1e-6)
    assert metrics.predictions.tolist() == [0, 0, 0, 0, 6, 6]
    assert metrics.as_row("val") == pytest.approx(
        {"val_loss": expected.item() / 6, "val_top1": 100 * 2 / 6, "val_top5": 100 * 4 / 6}
    )


def test_losses_that_are_not_finite_are_counted(monkeypatch):
    def overflow(self, images):
        return images.float().masked_fill(images == 9, math.inf)

    monkeypatch.setattr(Batches, "normalise", overflow)
    assert evaluated(SIX_ROWS, classes=7).overflowed == 4


@pytest.mark.parametrize(("overflowed", "in_fp16"), [(0, False), (1, False), (2, True)])
def test_in_fp16_single_images_may_overflow(overflowed, in_fp16):
    loss = math.nan if overflowed else 0.0
    metrics = EvalMetrics(loss, 1, 1, 100, [], torch.empty(0), overflowed=overflowed)
    assert metrics.has_diverged("bf16") == metrics.has_diverged("fp32") == (overflowed > 0)
    assert metrics.has_diverged("fp16") == in_fp16


def test_the_cut_into_batches_does_not_matter():
    whole, cut = (evaluated(SIX_ROWS, classes=7, batch=size) for size in (6, 1))
    assert (whole.top1, whole.top5, whole.num_images) == (cut.top1, cut.top5, cut.num_images)
    assert torch.equal(whole.predictions, cut.predictions)


def test_predictions_are_in_the_order_of_the_dataset_and_of_this_rank_only():
    metrics = evaluated(SIX_ROWS, classes=7, indices=[5, 0, 3, 1, 4, 2])
    assert metrics.predictions.tolist() == [0, 0, 6, 0, 6, 0]
    metrics = evaluated(SIX_ROWS[3:], classes=7, indices=[4, 0, 2])
    assert metrics.predictions.tolist() == [6, -1, 6, -1, 0, -1]


def test_top5_of_three_classes_is_everything():
    metrics = evaluated([([3, 2, 1], 0), ([3, 2, 1], 2), ([1, 2, 3], 1)], classes=3)
    assert (metrics.top1, metrics.top5, metrics.num_images) == (1, 3, 3)


def test_files_that_cannot_be_read_are_named():
    assert evaluated(SIX_ROWS, classes=7, broken=[1, 4]).unreadable == ["file1", "file4"]


def test_a_rank_without_batches_counts_nothing():
    metrics = evaluated([], classes=7)
    assert (metrics.top1, metrics.num_images) == (0, 0)
    assert metrics.predictions.tolist() == [-1] * 6


def test_ranks_add_their_counts_and_their_unreadable_files():
    class TwoRanks(DistributedContext):
        def sum(self, values):
            return [2 * value for value in values]

        def gather(self, value):
            return [value, ["file9"]]

    batches = Batches([sample(1, broken=2)])
    alone = Evaluator(batches, CONTEXT, "fp32").run(tiny())
    both = Evaluator(batches, TwoRanks(), "fp32").run(tiny())
    assert (both.top1, both.top5, both.num_images) == (2 * alone.top1, 2 * alone.top5, 12)
    assert both.loss_sum == 2 * alone.loss_sum
    assert both.unreadable == [*alone.unreadable, "file9"] and len(alone.unreadable) == 6
    assert both.as_row("val") == alone.as_row("val")


def test_evaluation_uses_running_statistics_and_training_continues_after_it():
    model = tiny()
    trainer = make(model)
    batch = sample(3)
    metrics = Evaluator(Batches([batch]), CONTEXT, "fp32").run(model)
    assert isinstance(metrics, EvalMetrics) and metrics.num_images == 6
    buffers = [b.clone() for b in model.buffers()]
    trainer.step([batch], step=0, lr=0.1)
    assert not all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))


# ------------------------------------------------------------------ fp16


def make_fp16(model, images_of_step, precision="fp16"):
    """A trainer in fp16, which is used on GPUs only, on the CPU."""

    def augment(images, labels, draws, *, step, micro):
        return images.float() * images_of_step.get(step, 1e-2), torch.eye(3)[labels]

    optimizer = make_optimizer({**PRETRAIN["guide"], "weight_decay": 0}, model, lr=0.1)
    return Trainer(model, optimizer, CONTEXT, precision, augment)


FOUR = Sample(
    torch.randint(255, (4, 3, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
    torch.tensor([0, 1, 2, 0]),
    torch.arange(4),
    torch.zeros(4, 0, 2),
    torch.zeros(4),
)


@pytest.fixture
def uninitialised_memory_is_nan(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("overflow", [0, 1])
def test_a_step_that_overflows_in_fp16_is_skipped_and_does_not_diverge(
    uninitialised_memory_is_nan, overflow
):
    """In step 0 torch's fused SGD would leave its momentum uninitialised, and then use it."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    trainer = make_fp16(model, {overflow: 1e30})  # its images leave fp16's range
    weights = [model[1].weight.detach().clone()]
    for step in range(3):
        trainer.step([FOUR], step=step, lr=0.1)
        weights.append(model[1].weight.detach().clone())
        assert weights[-1].abs().max() < 1
    changed = [not torch.equal(a, b) for a, b in zip(weights, weights[1:], strict=False)]
    assert changed == [step != overflow for step in range(3)]
    assert trainer.scaler.get_scale() == 2.0**15
    assert not trainer.has_diverged(trainer.read_loss()[0])
    norms = trainer.read_grad_norms()
    assert [math.isfinite(norm) for norm in norms] == [step != overflow for step in range(3)]
    trainer.scaler.update(2.0**-7)
    assert trainer.has_diverged(1.0)


def test_gradient_norms_in_fp16_are_those_without_loss_scaling():
    norms = {}
    for precision in ("fp32", "fp16"):
        torch.manual_seed(0)
        trainer = make_fp16(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), {}, precision)
        trainer.step([FOUR], step=0, lr=0.1)
        (norms[precision],) = trainer.read_grad_norms()
    assert norms["fp16"] == pytest.approx(norms["fp32"], rel=0.01)
