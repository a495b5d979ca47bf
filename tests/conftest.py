"""Without a GPU, Triton interprets; it reads this when a kernel is decorated.

So it is set before anything imports a kernel, tests of the GPU among them, which are collected too.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
