"""Kernels run on the GPU where there is one, else in Triton's interpreter."""

import os

import torch

if not torch.cuda.is_available():
    # read when the kernels are imported, which no test does before this
    os.environ.setdefault('TRITON_INTERPRET', '1')
