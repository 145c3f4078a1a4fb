"""ResNet-18 and SE-ResNet-18 from torchvision's parts, under torchvision's names."""

import torch
import torch.nn as nn
from torch import Tensor
from torchvision.models import resnet as torchvision_resnet
from torchvision.models.resnet import BasicBlock
from torchvision.ops import SqueezeExcitation, stochastic_depth


class Block(BasicBlock):
    """BasicBlock that in training leaves its branch out for a share of images, `drop_rate`."""

    drop_rate = 0.0  # see set_stochastic_depth

    def branch(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        if self.training and self.drop_rate:
            out = stochastic_depth(out, self.drop_rate, "row")
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(torchvision_resnet.ResNet):
    """Four stages of two blocks; `num_classes=0` returns the pooled features, B, 512."""

    num_features = 512

    def __init__(self, num_classes: int, block: type[nn.Module] = Block):
        super().__init__(block, [2, 2, 2, 2], num_classes=max(num_classes, 1))
        if num_classes == 0:
            self.fc = nn.Identity()

    def forward_features(self, images: Tensor) -> Tensor:
        """Map images B, 3, H, W to the last stage's features B, 512, H/32, W/32."""
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
    """Leave out branches in training: none of the first block's, `rate` of the last's, evenly so.

    As timm does, Huang et al. 2016, arXiv:1603.09382. Draws come from torch's generators.
    """
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for i, block in enumerate(blocks):
        block.drop_rate = rate * i / (len(blocks) - 1)


def resnet18(num_classes: int) -> ResNet:
    return ResNet(num_classes)


def seresnet18(num_classes: int) -> ResNet:
    return ResNet(num_classes, SEBasicBlock)
