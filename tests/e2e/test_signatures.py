"""SGLang and FlashInfer as installed are what `versions.py` says, also what only a GPU uses."""

import os
import subprocess
import sys

import pytest

from lim_sglang.compat import CPU_ENGINE_VAR

PROGRAM = """
from lim_sglang import versions
versions.check_version()
versions.check_signatures()
print(versions.reasons_against_decode_stack())
"""


@pytest.mark.e2e
def test_what_is_installed_has_the_signatures_that_are_relied_on() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | {CPU_ENGINE_VAR: "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr[-3000:]
