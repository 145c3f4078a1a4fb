"""STCI against its formulas, written out head by head, on every path that can run it."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models import build_model, fused
from models.stci import STCI, Twist
from models.twistnet import TwistBlock

PATHS = ["plain", "fused", "folded"]  # folded: what "auto" is on a GPU
VARIANTS = {
    "full": {},
    "no_spiral": {"spiral": False},
    "no_ais": {"ais": False},
    "first_order": {"second_order": False},
}


def make_stci(channels=24, dtype=torch.float64, **settings):
    """An STCI none of whose parameters is at a value that would hide a mistake."""
    torch.manual_seed(0)
    stci = STCI(channels, **settings).to(dtype)
    with torch.no_grad():
        for parameter in stci.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return stci


def run(path, stci, h):
    """STCI's output by the formulas ("plain") or by models/fused.py, as on a CPU or a GPU."""
    if path == "plain":
        return stci(h)
    gate = torch.ones((), dtype=h.dtype)
    if path == "fused":
        return fused.gated_stci(gate, stci, h)
    with mock.patch.object(fused, "runs_by_hand", return_value=False):
        return fused.gated_stci(gate, stci, h)


def inputs(dtype=torch.float64, channels=24):
    torch.manual_seed(1)
    return torch.randn(3, channels, 5, 4, dtype=dtype).relu_().requires_grad_()


def unit_by_hand(x):
    norm = (x * x).sum(1, keepdim=True).clamp_min(1e-12).sqrt()  # max(|x|, 1e-6)
    return torch.where(norm > 1e-6, x / norm, (x / norm).detach())


def reference(stci, h):
    """The formulas with a loop over heads, pairs and groups."""
    heads = []
    for k in range(4):
        own = slice(8 * k, 8 * k + 8)
        x = F.conv2d(h, stci.reduce.weight[own])
        bn = stci.reduce_bn
        x = F.batch_norm(x, None, None, bn.weight[own], bn.bias[own], training=True)
        z = t = torch.where(x > 0, x, 0.0)
        if stci.twist is not None:
            t = F.conv2d(z, stci.twist.conv.weight[own], padding=1, groups=8)
            t = stci.twist.scale[own].view(1, 8, 1, 1) * t
        z, t = unit_by_hand(z), unit_by_hand(t)
        heads.append(z)
        if stci.second_order:
            for i in range(8):
                for j in range(i, 8):
                    heads.append(z[:, i : i + 1] * t[:, j : j + 1])
    f = torch.cat(heads, 1)
    if stci.ais is not None:
        hidden = F.relu(F.linear(f.mean((2, 3)), stci.ais.fc1.weight, stci.ais.fc1.bias))
        chosen = torch.sigmoid(F.linear(hidden, stci.ais.fc2.weight, stci.ais.fc2.bias))
        f = f * chosen[..., None, None]
    normed = []
    for c in range(0, f.shape[1], 8):
        group = f[:, c : c + 8]
        mean = group.mean((1, 2, 3), keepdim=True)
        variance = ((group - mean) ** 2).mean((1, 2, 3), keepdim=True)
        normed.append((group - mean) / (variance + 1e-5).sqrt())
    f = torch.cat(normed, 1) * stci.norm.weight.view(1, -1, 1, 1) + stci.norm.bias.view(1, -1, 1, 1)
    out = F.conv2d(f, stci.proj.weight)
    return F.batch_norm(out, None, None, stci.proj_bn.weight, stci.proj_bn.bias, training=True)


def gradients(out, stci, h):
    """Gradients of a sum that weighs every output differently."""
    weights = torch.arange(out.numel(), dtype=out.dtype).view(out.shape).sin()
    return torch.autograd.grad((out * weights).sum(), [h, *stci.parameters()])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bias", [0.0, -1.5])  # with -1.5 most positions have no active channel
@pytest.mark.parametrize("variant", VARIANTS)
def test_outputs_and_gradients_match_the_formulas(variant, bias, path):
    stci, h = make_stci(**VARIANTS[variant]), inputs()
    with torch.no_grad():
        stci.reduce_bn.bias.add_(bias)
    out, want = run(path, stci, h), reference(stci, h)
    torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-10)
    for got, expected in zip(gradients(out, stci, h), gradients(want, stci, h), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-9)


def gradient_norm_with_one_position_at(value, *, dtype, path):
    """The whole network's gradient norm when z of layer4.1 is `value` at a single position.

    In the first head the biases of STCI's BatchNorm close all channels but the first, and that one
    everywhere but at its largest position.
    """
    torch.manual_seed(0)
    model = build_model("twistnet18", 10).train()
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    model.to(precise)
    images, labels = torch.randn(4, 3, 64, 64, dtype=precise), torch.arange(4)
    for module in model.modules():
        if isinstance(module, STCI):
            module.implementation = path
    bn, seen = model.layer4[1].stci.reduce_bn, []
    bn.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))

    def loss():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = model(images)
        return F.cross_entropy(logits.to(precise), labels)

    with torch.no_grad():
        bn.bias[1:8] = -100.0
        bn.bias[0] = 0.0
        for _ in range(20):  # the output is rounded, so approach the value step by step
            loss()
            largest = seen[-1][:, 0].max().to(precise)
            if (largest - value).abs() <= 0.1 * value or 0 < largest <= 1e-6 and value < 1e-6:
                break
            bn.bias[0] += value - largest
        assert largest > 0 and (largest <= 1e-6) == (value <= 1e-6)
    loss().backward()
    return nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()


@pytest.mark.parametrize("path", ["plain", "fused"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_position_below_the_floor_does_not_move_the_network(dtype, path):
    usual = gradient_norm_with_one_position_at(0.3, dtype=dtype, path=path)
    tiny = gradient_norm_with_one_position_at(5e-7, dtype=dtype, path=path)
    assert usual / 3 < tiny < usual * 3


def test_the_variants_have_the_widths_of_the_paper():
    widths = {name: make_stci(**settings).proj.in_channels for name, settings in VARIANTS.items()}
    assert widths == {"full": 176, "no_spiral": 176, "no_ais": 176, "first_order": 32}
    assert make_stci().ais.fc1.out_features == 44
    assert make_stci(second_order=False).ais.fc1.out_features == 16
    assert make_stci().norm.num_groups == 22
    assert make_stci(second_order=False).norm.num_groups == 4


def test_a_new_model_has_directional_kernels_and_a_small_projection():
    kernels = {  # y points down: rows are y = -1, 0, 1
        0: [[0, 0, 0], [0, 0.5, 0.5], [0, 0, 0]],
        1: [[0, 0, 0], [0, 0.5, 0], [0, 0, 0.5]],
        2: [[0, 0, 0], [0, 0.5, 0], [0, 0.5, 0]],
        3: [[0, 0, 0], [0, 0.5, 0], [0.5, 0, 0]],
    }
    want = torch.tensor([kernels[k] for k in range(4) for _ in range(8)])[:, None]
    torch.manual_seed(0)
    model = build_model("twistnet18", 5)
    blocks = [module for module in model.modules() if isinstance(module, STCI)]
    assert len(blocks) == 4
    for stci in blocks:
        assert torch.equal(stci.twist.conv.weight, want)
        assert torch.equal(stci.twist.scale, torch.ones(32))
        assert stci.proj.weight.std().item() == pytest.approx(0.01, rel=0.03)
        assert stci.reduce.weight.std().item() == pytest.approx(0.5, rel=0.03)  # sqrt(2 / 8)
    assert [block.gate.item() for layer in (model.layer3, model.layer4) for block in layer] == [
        -2
    ] * 4
    # kaiming fan_out of a 3x3 convolution to 512 channels: sqrt(2 / (512 * 9))
    assert model.layer4[1].conv2.weight.std().item() == pytest.approx(0.02083, rel=0.01)


def test_each_head_looks_one_step_in_its_direction():
    z = torch.zeros(1, 32, 3, 3)
    z[0, :, 1, 1] = 1.0
    t = Twist(32)(z)
    seen = [[tuple(p) for p in t[0, 8 * k].nonzero().tolist()] for k in range(4)]
    # Each position adds its own value and the next one in the direction, so the single pixel is
    # also seen from one step behind it.
    assert seen == [[(1, 0), (1, 1)], [(0, 0), (1, 1)], [(0, 1), (1, 1)], [(0, 2), (1, 1)]]


@pytest.mark.parametrize("path", PATHS)
def test_memory_formats_agree(path):
    stci, h = make_stci(), inputs()
    last = h.detach().to(memory_format=torch.channels_last).requires_grad_()
    out, out_last = run(path, stci, h), run(path, stci, last)
    torch.testing.assert_close(out, out_last, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients(out, stci, h), gradients(out_last, stci, last), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("path", PATHS)
def test_autocast_stays_near_float32(path, variant, dtype):
    stci, h = make_stci(dtype=torch.float32, **VARIANTS[variant]), inputs(torch.float32)
    exact = stci(h)
    with torch.autocast("cpu", dtype):
        out = run(path, stci, h)
    error = (out.float() - exact).std() / exact.std()
    assert error < (0.05 if dtype is torch.bfloat16 else 0.01)
    for gradient in gradients(out, stci, h):
        assert gradient.dtype == torch.float32 and gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_autocast_is_as_exact_as_plain_autocast(dtype):
    h, stci = inputs(torch.float32), make_stci(dtype=torch.float32)
    exact = [stci(h)]
    exact += gradients(exact[0], stci, h)
    errors = {}
    for path in PATHS:
        with torch.autocast("cpu", dtype):
            out = run(path, stci, h)
        got = [out.float(), *gradients(out, stci, h)]
        errors[path] = [(a - b).norm().item() for a, b in zip(got, exact, strict=True)]
    # Short vectors magnify the rounding of z, so the gradients' own error is large on both paths.
    assert errors["fused"][0] < 1.2 * errors["plain"][0]
    assert sum(errors["fused"]) < 1.5 * sum(errors["plain"])


@pytest.mark.parametrize("path", PATHS)
def test_a_network_converted_to_bfloat16_runs(path):
    stci, h = make_stci(dtype=torch.float32), inputs(torch.float32)
    exact = stci(h)
    out = run(path, stci.bfloat16(), h.bfloat16())
    assert out.dtype == torch.bfloat16
    assert (out.float() - exact).std() < 0.05 * exact.std()


@pytest.mark.parametrize("path", PATHS)
def test_two_runs_are_bit_identical(path):
    stci, h = make_stci(dtype=torch.float32), inputs(torch.float32)
    first, second = (gradients(run(path, stci, h), stci, h) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_compiled_stci_gives_the_same_numbers(variant):
    torch._dynamo.reset()
    stci, h = make_stci(**VARIANTS[variant]), inputs()
    want = stci(h)
    wanted = gradients(want, stci, h)
    out = torch.compile(stci, backend="aot_eager", fullgraph=True)(h)
    torch.testing.assert_close(out, want, rtol=1e-9, atol=1e-10)
    for a, b in zip(gradients(out, stci, h), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_an_exported_stci_gives_the_same_numbers_at_another_batch_size():
    stci, h = make_stci(dtype=torch.float32).eval(), inputs(torch.float32).detach()
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(stci, (h,), dynamic_shapes=({0: batch},))
    more = torch.cat([h, h.flip(0)])
    torch.testing.assert_close(program.module()(more), stci(more), rtol=1e-4, atol=1e-5)


def test_batchnorms_can_be_converted_to_synchronised_ones():
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(make_stci())
    assert isinstance(converted.reduce_bn, nn.SyncBatchNorm)
    assert isinstance(converted.proj_bn, nn.SyncBatchNorm)


@pytest.mark.parametrize("path", PATHS)
def test_an_evaluation_may_come_before_the_training(path):
    fused.layout.cache_clear()
    module = STCI(24)
    h = torch.randn(2, 24, 5, 5)
    with torch.inference_mode():
        run(path, module.eval(), h)
    run(path, module.train(), h).sum().backward()
    assert module.reduce.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_block_has_the_same_outputs_and_gradients_on_both_paths(variant, training):
    torch.manual_seed(0)
    block = TwistBlock(8, 16, stride=2, **VARIANTS[variant]).double().train(training)
    x, found = torch.randn(3, 8, 8, 8, dtype=torch.double), {}
    for path in ("plain", "fused"):
        block.stci.implementation = path
        out = block(x)
        parameters = dict(block.named_parameters())
        found[path] = [out, *torch.autograd.grad(out.square().sum(), parameters.values())]
    for name, plain, fast in zip(["out", *parameters], *found.values(), strict=True):
        torch.testing.assert_close(plain, fast, rtol=1e-7, atol=1e-9, msg=name)


def test_one_attribute_chooses_the_path():
    stci, cpu, gpu = STCI(8), torch.device("cpu"), torch.device("cuda")
    assert stci.implementation == "auto" and fused.is_chosen(stci)
    assert fused.runs_by_hand(stci, cpu) and not fused.runs_by_hand(stci, gpu)
    stci.implementation = "fused"
    assert fused.is_chosen(stci) and fused.runs_by_hand(stci, gpu)
    stci.implementation = "plain"
    assert not fused.is_chosen(stci)
    stci.implementation = "fast"
    with pytest.raises(KeyError, match="fast"):
        fused.is_chosen(stci)


def test_hooks_on_stci_are_called():
    block, seen = TwistBlock(8, 8), []
    block.stci.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    block(torch.randn(2, 8, 4, 4))
    assert seen == [(2, 8, 4, 4)]
