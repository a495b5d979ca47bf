"""SGLang and FlashInfer as installed are what `versions.py` says, also what only a GPU uses."""

import os
import subprocess
import sys

import pytest

from lim_sglang.compat import CPU_ENGINE_VAR, TENSOR_CORE_VAR

PROGRAM = """
import torch
from lim_sglang import compat, versions
versions.check_version()
versions.check_signatures()
from sglang.srt.layers.attention.flashinfer_backend import should_use_tensor_core
groups_of_two = (torch.bfloat16, 16, 8)
chosen = [should_use_tensor_core(*groups_of_two)]
with compat.decode_on_tensor_cores(wanted=True):
    chosen.append(should_use_tensor_core(*groups_of_two))
print(chosen)
print(versions.reasons_against_decode_stack())
"""


@pytest.mark.e2e
def test_what_is_installed_has_the_signatures_that_are_relied_on() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={k: v for k, v in os.environ.items() if k != TENSOR_CORE_VAR} | {CPU_ENGINE_VAR: "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.splitlines()[-2:] == ["[False, True]", "[]"], done.stderr[-3000:]
