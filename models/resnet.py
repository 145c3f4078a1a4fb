"""ResNet-18 and SE-ResNet-18 from torchvision's parts, under torchvision's names.

Sources: Deep Residual Learning for Image Recognition (He et al. 2016, arXiv:1512.03385);
Squeeze-and-Excitation Networks (Hu et al. 2018, arXiv:1709.01507); Deep Networks with Stochastic
Depth (Huang et al. 2016, arXiv:1603.09382).
"""

import torch
import torch.nn as nn
from torch import Tensor
from torchvision.models import resnet as torchvision_resnet
from torchvision.models.resnet import BasicBlock
from torchvision.ops import SqueezeExcitation, stochastic_depth


class Block(BasicBlock):
    """torchvision's BasicBlock with stochastic depth, and its residual branch as a method."""

    drop_rate = 0.0  # share of images that skip the branch in training; see set_stochastic_depth

    def branch(self, x: Tensor) -> Tensor:
        """The residual branch: [B, C_in, H, W] -> [B, C, H/stride, W/stride]."""
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        if self.training and self.drop_rate:
            out = stochastic_depth(out, self.drop_rate, "row")
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(torchvision_resnet.ResNet):
    """Four stages of two blocks; with `num_classes=0` it returns the pooled features, [B, 512]."""

    def __init__(self, num_classes: int, block: type[nn.Module] = Block):
        super().__init__(block, [2, 2, 2, 2], num_classes=max(num_classes, 1))
        if num_classes == 0:
            self.fc = nn.Identity()

    def forward_features(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W] to the last stage's features [B, 512, H/32, W/32]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, images: Tensor) -> Tensor:
        features = self.avgpool(self.forward_features(images))
        return self.fc(torch.flatten(features, 1))


class SEBasicBlock(Block):
    """BasicBlock with squeeze-and-excitation after bn2."""

    def __init__(self, inplanes: int, planes: int, *args, **kwargs):
        super().__init__(inplanes, planes, *args, **kwargs)
        self.se = SqueezeExcitation(planes, max(8, planes // 16))

    def branch(self, x: Tensor) -> Tensor:
        return self.se(super().branch(x))


def set_stochastic_depth(model: nn.Module, rate: float) -> None:
    """Let images skip residual branches in training, more often in later blocks.

    The share of skipped images grows linearly from 0 in the first block to `rate` in the last, as
    in timm (Huang et al. 2016, arXiv:1603.09382). It is drawn from torch's default generators.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for i, block in enumerate(blocks):
        block.drop_rate = rate * i / (len(blocks) - 1)
