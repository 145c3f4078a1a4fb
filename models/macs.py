"""Multiply-adds of a network for one image."""

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.stci import HEADS, REDUCED, STCI

PRODUCTS = HEADS * REDUCED * (REDUCED + 1) // 2  # of STCI at each position


def count_macs(model: nn.Module, img_size: int) -> int:
    """Multiply-adds of convolutions, matrix products and STCI's products, for img_size² pixels.

    torch counts two FLOPs per multiply-add and nothing for element-wise products, so STCI's are
    added here. Normalisation and activations are not counted, as is usual.
    """
    products = 0

    def add_products(module: STCI, inputs: tuple, output: torch.Tensor) -> None:
        nonlocal products
        if module.second_order:
            products += PRODUCTS * output.shape[2] * output.shape[3]

    # A hook also makes a TwistBlock run the formulas of stci.py, whose operations torch counts.
    blocks = [module for module in model.modules() if isinstance(module, STCI)]
    hooks = [block.register_forward_hook(add_products) for block in blocks]
    counter = FlopCounterMode(display=False)
    was_training, device = model.training, next(model.parameters()).device
    # torch's counter hooks into parameters that require gradients, which fails on views of them.
    trained = [p for p in model.parameters() if p.requires_grad]
    try:
        model.requires_grad_(False)
        # Attention as matrix products: torch counts nothing for some of its fused kernels.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            model.eval()(torch.zeros(1, 3, img_size, img_size, device=device))
    finally:
        model.train(was_training)
        for parameter in trained:
            parameter.requires_grad_(True)
        for hook in hooks:
            hook.remove()
    return counter.get_total_flops() // 2 + products
