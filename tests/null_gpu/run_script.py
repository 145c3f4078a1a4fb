"""Run a script of the project, unchanged, on the null GPU: run_script.py SCRIPT ARGUMENTS…"""

import runpy
import sys

import device  # noqa: F401  (it replaces convolutions)
import torch.nn.parallel.distributed as ddp

# DDP compares shapes over NCCL, which moves no data here.
ddp._verify_param_shape_across_processes = lambda *arguments: None

sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
