"""Export a trained network to a file that runs without this code: torch.export or ONNX.

  python -m tools.export --weights runs/dtd_fold1_twistnet18_seed42/best.pt --out twistnet18.pt2
  python -m tools.export --weights weights/twistnet18_imagenet.pt --out twistnet18.onnx

Input "images": float32, B x 3 x H x W, RGB from 0 to 1, any B, H and W from 33 px; a network of
timm (timm/NAME) takes the image size it was trained at. The exported network normalises with
ImageNet's mean and standard deviation itself; do not normalise before.
Output "logits": float32, B x classes. Resize and crop before. Class names, image size and the
checksum of the weights are stored in the file: as metadata of an ONNX model, and as the extra
file about.json of a .pt2.

The file is read back and compared with the network at two batch sizes and, where it takes any, two
image sizes, and is kept only if they agree. ONNX needs: pip install onnx onnxscript onnxruntime
"""

import io
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from common.cli import Parser, add_weights_flag, run
from common.errors import UserError
from common.files import check_outputs
from common.optional import import_optional
from data.transforms import IMAGENET_MEAN, IMAGENET_STD, normalise
from models.timm_models import is_timm
from models.weights import load_trained

TOLERANCE = 1e-4  # relative to the largest logit; about 1e-6 was measured
MARK = b"sha256_of_weights"  # every file that this tool writes contains it
INPUT = "float32, B x 3 x {} x {}, RGB from 0 to 1; normalisation is inside the network"


class Normalised(nn.Module):
    """A network preceded by its normalisation; takes images from 0 to 1."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.model((images - self.mean) / self.std)


def parse_args(argv: list[str] | None):
    parser = Parser(prog="python -m tools.export", description=__doc__)
    add_weights_flag(parser)
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help="name.pt2 for torch.export, name.onnx for ONNX",
    )
    args = parser.parse_args(argv)
    if args.out.suffix not in FORMATS:
        parser.error(f"--out {args.out}: the name must end in {' or '.join(FORMATS)}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    write, read = FORMATS[args.out.suffix]
    if args.out.suffix == ".onnx":
        require_onnx()
    check_outputs([args.out], flag="--out", mark=MARK, inputs=[args.weights])
    model, about = load_trained(args.weights)
    size = about["config"].get("img_size", 224)
    any_size = not is_timm(about["model"])
    input_text = INPUT.format(*("HW" if any_size else (size, size)))
    facts = {
        "model": about["model"],
        "num_classes": about["num_classes"],
        "img_size": size,
        "classes": about["classes"],
        "input": input_text,
        "sha256_of_weights": about["sha256"],
    }
    try:
        with tempfile.TemporaryDirectory(dir=args.out.resolve().parent, prefix=".export-") as new:
            path = Path(new) / args.out.name
            write(trace(model, None if any_size else size), path, facts)
            difference = compare(model, read(path), size, any_size=any_size)
            os.replace(path, args.out)
    except OSError as error:
        raise UserError(f"--out {args.out}: cannot be written ({error.strerror})") from error
    print(
        f"largest difference of a logit: {difference:.1e}\ninput: {input_text}\nwrote {args.out} "
        f"({about['model']}, {about['num_classes']} classes, trained at {size} px)"
    )


def require_onnx() -> None:
    """Raise UserError unless the packages are installed that ONNX export needs."""
    packages = ("onnx", "onnxscript", "onnxruntime")
    for name in packages:
        try:
            import_optional(name, purpose="ONNX", install=" ".join(packages))
        except UserError as error:
            raise UserError(f"{error}, or choose an --out that ends in .pt2") from error


def trace(model: nn.Module, size: int | None = None) -> torch.export.ExportedProgram:
    """The network with its normalisation as a graph, for any batch, and any or one image size."""
    if size is not None:
        images = torch.rand(2, 3, size, size)
        only_batch = {"images": {0: torch.export.Dim("batch")}}
        return torch.export.export(Normalised(model), (images,), dynamic_shapes=only_batch)
    # from 33 px: smaller images end in a single position, for which the tracer specialises
    sizes = {
        0: torch.export.Dim("batch"),
        2: torch.export.Dim("height", min=33),
        3: torch.export.Dim("width", min=33),
    }
    images = torch.rand(2, 3, 64, 96)
    return torch.export.export(Normalised(model), (images,), dynamic_shapes={"images": sizes})


def compare(
    model: nn.Module, exported: Callable[[Tensor], Tensor], size: int, *, any_size: bool = True
) -> float:
    """The largest difference of a logit over two batch sizes and image sizes; prints each.

    Ends the process with exit code 1 if the exported network disagrees with the original.
    """
    generator = torch.Generator().manual_seed(0)
    largest = 0.0
    shapes = [(max(size, 33), max(size, 33)), (size + 32, size + 61)]
    for batch in (1, 3):
        for shape in shapes if any_size else [(size, size)]:
            images = torch.randint(256, (batch, 3, *shape), generator=generator, dtype=torch.uint8)
            with torch.inference_mode():
                wanted = model(normalise(images))
            found = exported(images.float() / 255)
            difference = (found - wanted).abs().max().item()
            scale = wanted.abs().max().item()
            print(
                f"{batch} x 3 x {shape[0]} x {shape[1]}: logits differ by at most "
                f"{difference:.1e} (the largest is {scale:.2g})"
            )
            if not difference <= TOLERANCE * max(scale, 1):
                sys.exit("error: the exported network gives other logits: nothing was written")
            largest = max(largest, difference)
    return largest


def write_pt2(program: torch.export.ExportedProgram, path: Path, facts: dict) -> None:
    content = io.BytesIO()  # PyTorch's writer of files aborts the process when the disk is full
    torch.export.save(program, content, extra_files={"about.json": json.dumps(facts, indent=2)})
    path.write_bytes(content.getvalue())


def read_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    return torch.inference_mode()(torch.export.load(path).module())


def write_onnx(program: torch.export.ExportedProgram, path: Path, facts: dict) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter itself makes deprecated calls
        exported = torch.onnx.export(
            program,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes={"images": {0: "batch", 2: "height", 3: "width"}},
            verbose=False,
        )
    exported.model.metadata_props.update(
        {
            key: value if isinstance(value, str) else json.dumps(value)
            for key, value in facts.items()
        }
    )
    exported.save(path, external_data=False)


def read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


FORMATS = {".pt2": (write_pt2, read_pt2), ".onnx": (write_onnx, read_onnx)}


if __name__ == "__main__":
    run(main)
