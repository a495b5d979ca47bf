"""Parses each command line on standard input with SGLang's own parser; prints what it says.

Run by `test_every_refusal.py` in a process of its own, because plugins change SGLang for good.
"""

import contextlib
import io
import json
import os
import sys


def outcome(arguments: list[str]) -> dict[str, object]:
    """Exit code and message of one start, up to the point where a server would be launched."""
    from sglang.srt.server_args import prepare_server_args

    os.environ.pop("LIM_CONFIG", None)  # what the start before this one settled on
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            prepare_server_args(arguments)
        except SystemExit as end:
            return {"code": end.code, "message": errors.getvalue()}
    return {"code": 0, "message": errors.getvalue()}


def main() -> None:
    """Load the plugin once, then try every command line."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    outcomes = [outcome(arguments) for arguments in json.load(sys.stdin)]
    sys.stdout.write("\n" + json.dumps(outcomes))


if __name__ == "__main__":
    main()
