"""A network of a few hundred parameters, for tests of what is around it.

  torchrun --nproc_per_node=2 tests/tiny_network.py --data_dir ...

pretrains it with the flags of pretrain_imagenet.py, whatever --model says.
"""

import sys
from pathlib import Path

import torch
from torch import nn


class TinyNetwork(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 4, stride=4, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.relu(self.bn1(self.conv1(images))).mean((2, 3)))


def build_model(name: str, num_classes: int, **settings) -> TinyNetwork:
    return TinyNetwork(num_classes)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    import pretrain_imagenet
    from common.cli import run

    pretrain_imagenet.build_model = build_model
    run(pretrain_imagenet.main)
