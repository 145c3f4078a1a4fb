"""TwistNet-18: ResNet-18 whose blocks in stages 3 and 4 add STCI's channel products.

Source: TwistNet-2D: Learning Second-Order Channel Interactions via Spiral Twisting for Texture
Recognition (Lian, Xiong, Sun, Ouyang, Zong, Yu, Fu, Rui, Yujun, Chen; 2026).
"""

import torch
import torch.nn as nn
from torch import Tensor

from models import fused
from models.resnet import Block, ResNet
from models.stci import STCI


class TwistBlock(Block):
    """BasicBlock plus sigmoid(gate) * STCI(h), where h is the activation between its convolutions.

    Args:
        stci: settings of STCI: spiral, ais, second_order.

    The block initialises its own weights. A Kaiming pass over every convolution of a finished
    network would erase the directional start of STCI's kernels and the small start of its
    projection.
    """

    def __init__(self, in_channels: int, channels: int, *, stride: int = 1, **stci: bool):
        shortcut = None
        if stride != 1 or in_channels != channels:
            shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )
        super().__init__(in_channels, channels, stride, shortcut)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.stci = STCI(channels, **stci)  # after the Kaiming pass, which must not reach it
        self.gate = nn.Parameter(torch.tensor(-2.0))

    def branch(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn1(self.conv1(x)))  # [B, C, H, W]
        out = self.bn2(self.conv2(h))
        gate = torch.sigmoid(self.gate)
        if fused.is_chosen(self.stci):  # the same product in less time or memory
            out += fused.gated_stci(gate, self.stci, h)
        else:
            out += gate * self.stci(h)
        return out


class TwistNet(ResNet):
    """ResNet-18 with TwistBlocks in layer3 and layer4."""

    def __init__(self, num_classes: int, **stci: bool):
        super().__init__(num_classes)
        for layer in (self.layer3, self.layer4):
            for i, block in enumerate(layer):
                conv = block.conv1
                layer[i] = TwistBlock(
                    conv.in_channels, conv.out_channels, stride=conv.stride[0], **stci
                )


def read_gates(model: nn.Module) -> dict[str, list[float]]:
    """sigmoid(gate) of each TwistBlock, as a column of the log; empty for other networks."""
    blocks = [module for module in model.modules() if isinstance(module, TwistBlock)]
    return {"gates": [torch.sigmoid(block.gate).item() for block in blocks]} if blocks else {}
