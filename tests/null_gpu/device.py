"""What a process on the null GPU imports first: its counters, and convolutions that do nothing."""

import ctypes
import os
import time
import warnings

import torch

warnings.filterwarnings("ignore", message=".*no current CUDA context.*")
COUNTERS = (
    *("launches", "blas", "memsets", "h2d_pageable", "h2d_pinned", "d2h_pageable", "d2h_pinned"),
    *("d2d", "stream_waits", "device_waits", "event_waits", "allocations", "nccl"),
)
_library = ctypes.CDLL(os.environ["NULL_GPU"])
_library.null_gpu_count.restype = ctypes.c_longlong
_convolutions = 0

torch.cuda._device_count_nvml = lambda: -1  # a real driver may be there: do not count its devices


def read_counters() -> dict[str, int]:
    counters = {name: _library.null_gpu_count(i) for i, name in enumerate(COUNTERS)}
    return {**counters, "convolutions": _convolutions}


class Counted:
    """What the device is asked for within a `with` block, and the host's time in milliseconds."""

    def __enter__(self):
        self.before, self.started = read_counters(), time.perf_counter()
        return self

    def __exit__(self, *error):
        self.host_ms = 1000 * (time.perf_counter() - self.started)
        self.counts = {name: n - self.before[name] for name, n in read_counters().items()}

    def summary(self) -> dict[str, float]:
        """Kernels, waits, pageable copies, allocations and the host's time."""
        c = self.counts
        return {
            "kernels": c["launches"] + c["blas"] + c["memsets"] + c["convolutions"],
            "waits": c["stream_waits"] + c["device_waits"] + c["event_waits"],
            "pageable": c["h2d_pageable"] + c["d2h_pageable"],
            "pinned": c["h2d_pinned"] + c["d2h_pinned"],
            "allocations": c["allocations"],
            "host_ms": round(self.host_ms, 2),
        }


def convolve(x, weight, bias, stride, padding, dilation, transposed, output_padding, groups):
    """An empty output of the right shape: cuDNN is not there."""
    global _convolutions
    _convolutions += 1
    assert x.dtype == weight.dtype, (x.dtype, weight.dtype)
    sizes = zip(x.shape[2:], padding, dilation, weight.shape[2:], stride, strict=True)
    shape = [(size + 2 * p - d * (k - 1) - 1) // s + 1 for size, p, d, k, s in sizes]
    shape = (len(x), len(weight), *shape)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def convolve_backward(
    grad, x, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, mask
):
    global _convolutions
    _convolutions += mask[0] + mask[1]
    assert grad.dtype == x.dtype == weight.dtype, (grad.dtype, x.dtype, weight.dtype)
    return (
        torch.empty_like(x, memory_format=torch.channels_last) if mask[0] else None,
        torch.empty_like(weight, memory_format=torch.channels_last) if mask[1] else None,
        grad.new_empty(len(weight)) if mask[2] else None,
    )


library = torch.library.Library("aten", "IMPL")
library.impl("convolution", convolve, "CUDA")
library.impl("convolution_backward", convolve_backward, "CUDA")
torch.backends.cudnn.enabled = False
