"""Asks a `sgl.Engine` for what standard input says; prints its answer and its state as JSON.

Run by `test_engine.py` in a process of its own, because plugins change SGLang for good. Settings of
LessIsMore come from `LIM_CONFIG` in its environment alone.
"""

import json
import sys
from typing import Any


def main() -> None:
    """Try the options that have to be refused, then generate with the others."""
    import sglang

    from lim_sglang.errors import LimError

    asked: dict[str, Any] = json.load(sys.stdin)
    try:
        sglang.Engine(**asked["options"], **asked["refused"])
        refusal = "none: it started"
    except LimError as error:
        refusal = f"{type(error).__name__}: {error}"
    engine = sglang.Engine(**asked["options"])
    answer = engine.generate(input_ids=asked["prompt"], sampling_params=asked["sampling"])
    state = engine.get_server_info()["internal_states"][0].get("lim")
    engine.shutdown()
    sys.stdout.write("\n" + json.dumps({"refusal": refusal, "answer": answer, "lim": state}))


if __name__ == "__main__":
    main()
