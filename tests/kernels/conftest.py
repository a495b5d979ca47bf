"""On a machine without a GPU, Triton interprets; it reads this when a kernel is decorated."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
