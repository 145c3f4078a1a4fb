"""The six networks: sizes, gradients, torchvision's numbers."""

from copy import deepcopy

import pytest
import torch
import torchvision
from torch import nn

from common.errors import UserError
from models import MODELS, build_model
from models.twistnet import TwistBlock

COUNTS = {
    "resnet18": (11_689_512, 11_200_623),
    "seresnet18": (11_779_624, 11_290_735),
    "twistnet18": (12_077_852, 11_588_963),
    "twistnet18_no_spiral": (12_076_572, 11_587_683),
    "twistnet18_no_ais": (12_015_020, 11_526_131),
    "twistnet18_first_order": (11_795_692, 11_306_803),
}


def test_there_are_six_networks():
    assert list(MODELS) == list(COUNTS)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_match_the_documented_ones(name):
    with torch.device("meta"):
        counts = tuple(
            sum(p.numel() for p in build_model(name, classes).parameters())
            for classes in (1000, 47)
        )
    assert counts == COUNTS[name]


@pytest.mark.parametrize("name", COUNTS)
def test_every_parameter_gets_a_gradient(name):
    torch.manual_seed(0)
    model = build_model(name, 7)
    logits = model(torch.randn(2, 3, 64, 64))
    assert logits.shape == (2, 7)
    nn.functional.cross_entropy(logits, torch.tensor([1, 6])).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        # BatchNorm removes the shift that GroupNorm's bias adds, so its gradient is 0.
        assert parameter.grad.abs().max() > 0 or key.endswith("norm.bias"), key


def test_resnet18_gives_torchvisions_logits_bit_for_bit():
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(num_classes=1000).eval()
    ours = build_model("resnet18", 1000).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images))


def test_twistnet_has_all_tensors_of_resnet_under_the_same_names():
    plain = {k: v.shape for k, v in torchvision.models.resnet18().state_dict().items()}
    twist = {k: v.shape for k, v in MODELS["twistnet18"](1000).state_dict().items()}
    assert {k for k in plain if twist.get(k) != plain[k]} == set()
    extra = {k for k in twist if k not in plain}
    assert all(".stci." in k or k.endswith(".gate") for k in extra)
    blocks = [k for k, m in MODELS["twistnet18"](3).named_modules() if isinstance(m, TwistBlock)]
    assert blocks == ["layer3.0", "layer3.1", "layer4.0", "layer4.1"]


def test_the_gate_multiplies_the_interaction():
    torch.manual_seed(0)
    block = TwistBlock(8, 8).double().eval()
    with torch.no_grad():
        block.stci.proj_bn.bias.fill_(1.0)
    x = torch.randn(1, 8, 4, 4, dtype=torch.double)
    h = block.relu(block.bn1(block.conv1(x)))
    rest = block.bn2(block.conv2(h)) + x
    with torch.no_grad():
        torch.testing.assert_close(block(x), torch.relu(rest + 0.11920292202 * block.stci(h)))
        block.gate.fill_(-1e3)
        torch.testing.assert_close(block(x), torch.relu(rest))


def test_a_compiled_block_trains_like_an_uncompiled_one():
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = TwistBlock(8, 16, stride=2).double()
    x = torch.randn(3, 8, 8, 8, dtype=torch.double)
    copy = deepcopy(block)
    out, want = torch.compile(block, backend="aot_eager", fullgraph=True)(x), copy(x)
    torch.testing.assert_close(out, want)
    out.square().sum().backward()
    want.square().sum().backward()
    for (name, a), b in zip(block.named_parameters(), copy.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-7, atol=1e-9, msg=name)
    for a, b in zip(block.buffers(), copy.buffers(), strict=True):  # running statistics are updated
        torch.testing.assert_close(a, b)
    assert block.stci.proj_bn.num_batches_tracked == 1


def test_squeeze_and_excitation_comes_after_the_second_batchnorm():
    torch.manual_seed(0)
    block = MODELS["seresnet18"](3).layer2[1].eval()
    assert [block.se.fc1.out_channels, block.se.fc1.in_channels] == [8, 128]
    x = torch.randn(1, 128, 4, 4)
    main = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x)))))
    scale = torch.sigmoid(block.se.fc2(torch.relu(block.se.fc1(main.mean((2, 3), keepdim=True)))))
    torch.testing.assert_close(block(x), torch.relu(main * scale + x))


def test_twistnet_trains_under_ddp_autocast_and_channels_last(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        torch.manual_seed(0)
        model = build_model("twistnet18", 3).to(memory_format=torch.channels_last)
        model = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        images = torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        losses = []
        for _ in range(4):
            with torch.autocast("cpu", torch.bfloat16):
                loss = nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 0]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    finally:
        torch.distributed.destroy_process_group()
    assert losses[-1] < losses[0]


def test_an_unknown_name_is_an_error_that_lists_the_names():
    with pytest.raises(UserError) as error:
        build_model("resnet50", 10)
    assert all(name in str(error.value) for name in COUNTS)
    assert "resnet50" in str(error.value) and "\n" not in str(error.value)


def test_a_negative_class_count_is_refused():
    with pytest.raises(UserError, match="-1"):
        build_model("resnet18", -1)
