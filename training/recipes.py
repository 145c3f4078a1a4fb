"""The recipes of pretraining: each one table of values. A checkpoint keeps its run's whole table.

What a flag of the same name is given for is that flag's; the rest belongs to the recipe.
"""

FLAGS = (
    "epochs",
    "batch_size",
    "lr",
    "weight_decay",
    "warmup_epochs",
    "label_smoothing",
    "clip_norm",
)

RECIPES = {
    "guide": {
        "epochs": 600,
        "batch_size": 256,
        "global_batch": None,  # batch_size × processes
        "optimizer": "sgd",
        "lr": 0.1,
        "lr_images": 256,  # lr is for so many images a step
        "weight_decay": 1e-4,
        "momentum": 0.9,
        "nesterov": True,
        "schedule": "cosine over steps, after a warm-up",
        "warmup_epochs": 5,
        "loss": "cross-entropy",
        "label_smoothing": 0.1,
        "clip_norm": 0,  # the largest gradient norm of a step; 0: not clipped
        "mixup": 0.2,
        "cutmix": 1.0,
        "randaugment": [2, 9],
        "repeats": 1,
        "crop_scale": [0.08, 1.0],
        "stochastic_depth": 0.0,
        "test_resize": 256,  # to crop 224
    },
    # A1 of Wightman, Touvron and Jégou, "ResNet strikes back" (2021), as timm trains it.
    "a1": {
        "epochs": 600,
        "batch_size": 256,
        "global_batch": 2048,
        "optimizer": "lamb",
        "lr": 5e-3,
        "lr_images": None,  # as it stands, whatever the batch
        "weight_decay": 0.01,
        "schedule": "timm's cosine",
        "warmup_epochs": 5,
        "warmup_lr": 1e-4,
        "min_lr": 1e-6,
        "loss": "binary cross-entropy",
        "label_smoothing": 0.1,
        "clip_norm": 0,  # timm's LAMB itself clips to 1
        "mixup": 0.2,
        "cutmix": 1.0,
        "randaugment": "rand-m7-n2-mstd0.5-inc1",
        "repeats": 3,
        "crop_scale": [0.08, 1.0],
        "stochastic_depth": 0.05,
        "test_resize": 236,
    },
}


def in_words(recipe: dict) -> str:
    """A table in one line: "epochs 600; batch_size 256; …", without what is None."""
    return "; ".join(f"{name} {value}" for name, value in recipe.items() if value is not None)
