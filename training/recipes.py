"""The training recipes, each one table of values, which a checkpoint stores with its run.

A flag of the same name overrides a value; the others can be changed only here. Sizes in pixels are
for --img_size 224 and others in proportion.
"""

from common.errors import UserError

# Values that are flags of pretrain_imagenet.py.
FLAGS = (
    "epochs",
    "batch_size",
    "lr",
    "weight_decay",
    "warmup_epochs",
    "label_smoothing",
    "clip_norm",
)

PRETRAIN = {
    # The recipe of the pretraining guide.
    "guide": {
        "epochs": 600,
        "batch_size": 256,  # images per process and step
        "global_batch": None,  # batch_size × processes
        "optimizer": "sgd",
        "lr": 0.1,
        "lr_images": 256,  # the batch that lr is for: linear scaling, Goyal et al. arXiv:1706.02677
        "weight_decay": 1e-4,  # of convolutions and linear layers only
        "weight_decay_images": None,  # weight_decay does not depend on the training set
        "momentum": 0.9,
        "nesterov": True,
        "schedule": "cosine",
        "warmup_epochs": 5,
        "loss": "cross_entropy",
        "label_smoothing": 0.1,  # Szegedy et al. 2016, arXiv:1512.00567
        "clip_norm": 0,  # largest gradient norm of a step; 0: not clipped
        "mixup": 0.2,
        "cutmix": 1.0,
        "randaugment": [2, 9],  # operations per image, magnitude
        "repeats": 1,
        "crop_scale": [0.08, 1.0],  # share of the image's area
        "stochastic_depth": 0.0,
        "test_resize": 256,  # shorter side before a centre crop of 224
    },
    # A1 of Wightman, Touvron and Jégou 2021, "ResNet strikes back", arXiv:2110.00476, as in timm.
    "a1": {
        "epochs": 600,
        "batch_size": 256,
        "global_batch": 2048,  # by accumulation
        "optimizer": "lamb",
        "lr": 5e-3,
        "lr_images": None,  # lr is not scaled with the batch
        "weight_decay": 0.01,
        "weight_decay_images": None,
        "schedule": "timm_cosine",
        "warmup_epochs": 5,
        "warmup_lr": 1e-4,
        "min_lr": 1e-6,
        "loss": "binary_cross_entropy",
        "label_smoothing": 0.1,
        "clip_norm": 0,  # timm's LAMB clips the gradient norm to 1 itself
        "mixup": 0.2,
        "cutmix": 1.0,
        "randaugment": "rand-m7-n2-mstd0.5-inc1",
        "repeats": 3,
        "crop_scale": [0.08, 1.0],
        "stochastic_depth": 0.05,
        "test_resize": 235,  # 224 / 0.95, rounded down
    },
    # Short runs: small images first, no RandAugment and no mixing, as in the ResNet-18 of FFCV
    # (Leclerc et al. 2023, arXiv:2306.12517), whose lr is 0.5 for 1024 images, 0.125 for 256.
    # docs/results.md has the runs behind lr and sizes.
    "fast": {
        "epochs": 88,
        "batch_size": 256,
        "global_batch": None,
        "optimizer": "sgd",
        "lr": 0.1,
        "lr_images": 256,
        "weight_decay": 5e-5,
        # The training set that weight_decay is for. A smaller one has fewer steps per epoch, which
        # decay more, so that an epoch decays as much: Wang and Aitchison 2024, arXiv:2405.13698.
        "weight_decay_images": 1_281_167,
        "momentum": 0.9,
        "nesterov": True,
        "schedule": "linear",
        "warmup_epochs": 1,
        "loss": "cross_entropy",
        "label_smoothing": 0.1,
        "clip_norm": 0,
        "mixup": 0.0,
        "cutmix": 0.0,
        "randaugment": [0, 0],
        "repeats": 1,
        "crop_scale": [0.25, 1.0],
        "flip": "alternating",
        "stochastic_depth": 0.0,
        "train_sizes": [128, 192],  # low, and at the end of a ramp over the last third of the run
        "test_resize": 256,
        # At most this many validation images per training image: a larger val/ is used less often.
        "validation_share": 0.1,
    },
}

# train.py's recipe; lr, epochs and batch size are flags. docs/results.md has the study behind it.
FINETUNE = {
    "lr": 0.03,
    "momentum": 0.9,
    "nesterov": True,
    "weight_decay": 1e-4,
    "head_lr_factor": 5.0,  # of a new classifier on pretrained weights
    "warmup_steps": 100,  # at most a tenth of the run
    "label_smoothing": 0.1,
    "mixup": 0.2,
    "cutmix": 1.0,
    "randaugment": [0, 0],  # docs/results.md: with it and more mixing, 20 epochs lose three points
    "crop_scale": [0.2, 1.0],
    "clip_norm": 1.0,
}

# Old spellings in checkpoints, and their current names.
_RENAMED = {
    "cross-entropy": "cross_entropy",
    "binary cross-entropy": "binary_cross_entropy",
    "cosine over steps, after a warm-up": "cosine",
    "timm's cosine": "timm_cosine",
}


def upgrade_pretrain_config(config: dict) -> dict:
    """Translate an older checkpoint's configuration to current names, without changing it."""
    name = config.get("recipe", "guide")
    if name not in PRETRAIN:
        raise UserError(
            f"the run was made with --recipe {name}, which this version does not have: resume it "
            "with the version that started it"
        )
    added = {"clip_norm": 0, "weight_decay_images": None}  # later than the oldest checkpoints
    upgraded = {"recipe": name, **PRETRAIN[name], **added, **config}
    for name in ("loss", "schedule"):
        upgraded[name] = _RENAMED.get(upgraded[name], upgraded[name])
    return upgraded


def describe_recipe(recipe: dict) -> str:
    """A table in one line: "epochs 600; batch_size 256; …", without what is None."""
    return "; ".join(f"{name} {value}" for name, value in recipe.items() if value is not None)
