"""SGLang's engine in this process, decoding with LessIsMore: `python examples/engine.py MODEL`.

MODEL is a model folder or a hub id. LessIsMore's settings are in the environment variable
LIM_CONFIG, which reaches the engine's processes, too. Without a GPU, SGLang has to be told to serve
on the CPU before it is imported.
"""

import argparse
import json
import os

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
if __name__ == "__main__":
    asked = parser.parse_args()
    print(f"starting SGLang's engine with {asked.model} for 16 tokens ...", flush=True)

import torch

os.environ.setdefault("LIM_CONFIG", json.dumps({"budget": 64}))
ON_CPU = {"device": "cpu", "dtype": "float32", "mem_fraction_static": 0.3, "max_total_tokens": 8192}
if not torch.cuda.is_available():
    os.environ["SGLANG_USE_CPU_ENGINE"] = "1"

import sglang as sgl


def main(model: str) -> None:
    options = {} if torch.cuda.is_available() else ON_CPU
    engine = sgl.Engine(model_path=model, attention_backend="lim", log_level="error", **options)
    try:
        prompt = "To add two numbers, write one below the other and begin at the right. " * 8
        answer = engine.generate(prompt, {"max_new_tokens": 16, "ignore_eos": True})
        counters = engine.get_server_info()["internal_states"][0]["lim"]
        print(answer["text"])
        print(f"{counters['sparse_rows']} sparse rows, {counters['dense_rows']} dense rows")
    finally:
        engine.shutdown()


if __name__ == "__main__":  # the engine's processes import this file again
    main(asked.model)
