"""timm's RandAugment, whose operations and magnitudes differ from torchvision's."""

import random

import numpy as np
import torch
from PIL import Image

from common.optional import import_optional


class TimmRandAugment:
    """One of timm's RandAugment policies, such as rand-m7-n2-mstd0.5-inc1, for single images.

    RandAugment: Cubuk et al. 2019, arXiv:1909.13719. `size` is that of the images, which limits how
    far they are translated. Raises UserError if timm is not installed.
    """

    def __init__(self, name: str, *, size: int):
        timm_augment = import_optional("timm.data.auto_augment", purpose=f"RandAugment {name}")
        # The same arguments as in timm's own transforms_imagenet_train for a crop of `size`.
        self.policy = timm_augment.rand_augment_transform(
            name,
            {
                "translate_const": int(size * 0.45),
                "img_mean": (124, 116, 104),  # ImageNet's, for pixels from outside of the image
            },
        )

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """uint8, 3 × H × W, to the same, by Pillow."""
        # timm draws from Python's and NumPy's generators: seed both, and restore them after.
        before = random.getstate(), np.random.get_state()
        seed = int(torch.randint(2**32, ()))
        random.seed(seed)
        np.random.seed(seed)
        try:
            image = self.policy(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()))
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
