"""The `lim` command, also as `python -m lim_sglang`: Ctrl-C is heeded before all other imports."""

import os
import signal
import sys

from lim_sglang.errors import INTERRUPTED

TOLD = "interrupted\n"


def main() -> None:
    """Run the command line; Ctrl-C ends it with a code of its own and without a traceback."""
    # An exception could be lost, or printed, in the midst of an import.
    heeded = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if heeded:
        signal.signal(signal.SIGINT, lambda *_: _end_at_once())
    from lim_sglang import cli

    try:
        if heeded:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        cli.main()
    except KeyboardInterrupt:
        sys.stderr.write(TOLD)
        sys.exit(INTERRUPTED)


def _end_at_once() -> None:
    os.write(2, TOLD.encode())
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    main()
