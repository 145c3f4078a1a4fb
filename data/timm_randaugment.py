"""timm's RandAugment, whose ops and magnitudes are others than torchvision's."""

import random

import numpy as np
import torch
from PIL import Image

from common.errors import UserError


class TimmRandAugment:
    """timm's RandAugment of one uint8 image, 3 × H × W, under its name there, by Pillow.

    It draws from Python's and NumPy's generators: one draw of torch's seeds them, and they are put
    back after. `mean`: 0 to 1, a channel, the colour of what comes in from outside. UserError
    where timm is missing.
    """

    def __init__(self, name: str, *, size: int, mean: tuple[float, float, float]):
        try:
            from timm.data.auto_augment import rand_augment_transform
        except ImportError as error:
            raise UserError(f"RandAugment {name} is timm's ({error}): pip install timm") from error
        # What timm's own transforms_imagenet_train passes on for a crop of `size`.
        self.theirs = rand_augment_transform(
            name,
            {
                "translate_const": int(size * 0.45),
                "img_mean": tuple(min(255, round(255 * value)) for value in mean),
            },
        )

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        before = random.getstate(), np.random.get_state()
        seed = int(torch.randint(2**32, ()))
        random.seed(seed)
        np.random.seed(seed)
        try:
            image = self.theirs(Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()))
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
