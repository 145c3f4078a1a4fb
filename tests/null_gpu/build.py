"""Build the null GPU, a stand-in for CUDA that counts, and run scripts on it.

    python tests/null_gpu/build.py tests/null_gpu/measure.py step twistnet18

PyTorch's own CUDA host code runs on two small C libraries: its allocator, autograd, AMP, DDP and
pinned memory. Kernels, copies, waits and allocations are counted and kernels do nothing. So it
shows what a step asks of a GPU: hidden waits, pageable copies, numbers of kernels, peak memory, and
tensors on the wrong device or of the wrong type. It cannot show speed, and all values are garbage.
"""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = {"cuda_runtime.c": "libnull_gpu.so", "cuda_driver.c": "libcuda.so.1"}


class CannotBuild(Exception):
    """The reason why there is no null GPU here."""


def build() -> Path:
    """Compile the libraries into a folder below the system's temporary folder, once."""
    compiler, headers = find_compiler(), find_headers()
    contents = b"".join((HERE / name).read_bytes() for name in SOURCES)
    digest = hashlib.sha256(contents + str(headers).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"null-gpu-{os.getuid()}-{digest}"
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        for source, library in SOURCES.items():
            command = [compiler, "-shared", "-fPIC", "-O1", "-w", f"-I{headers}", HERE / source]
            command += ["-o", f"{scratch}/{library}", "-lpthread"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise CannotBuild(f"{compiler} could not compile {source}: {done.stderr[-500:]}")
        os.chmod(scratch, 0o755)
        try:
            os.rename(scratch, folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
        else:
            os.mkdir(scratch)  # for TemporaryDirectory to remove
    return folder


def find_compiler() -> str:
    for name in (os.environ.get("CC"), sysconfig.get_config_var("CC"), "cc", "gcc", "clang"):
        if name and shutil.which(name.split()[0]):
            return shutil.which(name.split()[0])
    raise CannotBuild("there is no C compiler")


def find_headers() -> Path:
    """The headers of the CUDA runtime, which come with Triton, and that with CUDA's PyTorch."""
    version = Path(importlib.util.find_spec("torch").origin).with_name("version.py").read_text()
    if "cuda: Optional[str] = None" in version or "linux" not in sys.platform:
        raise CannotBuild("PyTorch is not a CUDA build for Linux")
    triton = importlib.util.find_spec("triton")
    headers = triton and Path(triton.origin).parent / "backends/nvidia/include"
    if not headers or not (headers / "cuda_runtime_api.h").exists():
        raise CannotBuild(
            "there are no headers of CUDA (Triton, which comes with PyTorch, has them)"
        )
    return headers


def make_environment(folder: Path, *, devices: int = 1) -> dict[str, str]:
    """The environment in which a process finds `devices` null GPUs."""
    environment = dict(os.environ)
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    paths = [str(HERE), str(HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    environment.update(
        LD_PRELOAD=str(folder / "libnull_gpu.so"),
        LD_LIBRARY_PATH=f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}",
        NULL_GPU=str(folder / "libnull_gpu.so"),
        NULL_GPU_DEVICES=str(devices),
        PYTHONPATH=os.pathsep.join(filter(None, paths)),
        OMP_NUM_THREADS="1",
    )
    return environment


if __name__ == "__main__":
    try:
        environment = make_environment(build())
    except CannotBuild as reason:
        sys.exit(str(reason))
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], environment)
