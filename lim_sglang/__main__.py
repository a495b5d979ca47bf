"""`python -m lim_sglang` is the `lim` command."""

from lim_sglang.cli import main

main()
