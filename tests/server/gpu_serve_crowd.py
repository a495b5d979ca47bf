"""An engine under 200 requests that come, finish, abort and get retracted; prints what came of it.

Run by `test_race.py` in a process of its own, since each mode needs an engine of its own.
"""

import asyncio
import json
import random
import sys
from typing import Any

NUM_REQUESTS = 200
NUM_PREFIXES = 6
ABORT_EVERY = 7


def make_requests() -> list[dict[str, Any]]:
    """Prompts that share prefixes, of lengths on both sides of the budget."""
    rng = random.Random(11)
    prefixes = [[rng.randrange(5, 1000) for _ in range(300)] for _ in range(NUM_PREFIXES)]
    requests = []
    for number in range(NUM_REQUESTS):
        own = [rng.randrange(5, 1000) for _ in range(rng.randrange(1, 700))]
        prompt = (prefixes[rng.randrange(NUM_PREFIXES)] if number % 3 else []) + own
        requests.append(
            {"rid": f"r{number:03}.", "prompt": prompt, "num_tokens": rng.randrange(8, 48)}
        )
    return requests


def is_aborted(number: int) -> bool:
    """Whether a request is aborted in mid-stream."""
    return number % ABORT_EVERY == 0


async def ask(
    engine: Any, request: dict[str, Any], number: int, adapter: str | None
) -> dict[str, Any]:
    """Tokens of one request, how many of its prompt were cached, and its retractions."""
    await asyncio.sleep(0.02 * number % 1.0)
    sampling = {
        "temperature": 0,
        "max_new_tokens": request["num_tokens"],
        "ignore_eos": True,
    }
    stream = await engine.async_generate(
        input_ids=request["prompt"],
        sampling_params=sampling,
        rid=request["rid"],
        stream=True,
        lora_path=adapter if number % 2 else None,
    )
    tokens: list[int] = []
    meta: dict[str, Any] = {}
    async for part in stream:
        tokens, meta = part["output_ids"], meta | part["meta_info"]
        if is_aborted(number) and len(tokens) >= request["num_tokens"] // 2:
            engine.tokenizer_manager.abort_request(rid=request["rid"])
    return {
        "tokens": tokens,
        "cached": meta["cached_tokens"],
        "retractions": meta["num_retractions"],
    }


async def ask_all(engine: Any, adapter: str | None) -> list[dict[str, Any]]:
    """All requests, as a crowd; every other one with the adapter, if there is one."""
    tasks = [ask(engine, request, n, adapter) for n, request in enumerate(make_requests())]
    return await asyncio.gather(*tasks)


def main() -> None:
    """`MODEL OPTIONS`, the options of SGLang's engine as JSON."""
    import sglang as sgl

    model, options = sys.argv[1], json.loads(sys.argv[2])
    adapter = next(iter(options.get("lora_paths", ())), None)
    engine = sgl.Engine(
        model_path=model,
        skip_tokenizer_init=True,
        dtype="float16",
        mem_fraction_static=0.6,
        max_total_tokens=24_000,
        max_running_requests=32,
        chunked_prefill_size=512,
        cuda_graph_max_bs_decode=24,  # larger steps run layer by layer
        disable_prefill_cuda_graph=True,
        log_level="warning",
        **options,
    )
    try:
        loop = asyncio.get_event_loop()
        answers = loop.run_until_complete(ask_all(engine, adapter))
        state = engine.get_server_info()["internal_states"][0].get("lim")
    finally:
        engine.shutdown()
    sys.stdout.write("\n" + json.dumps({"answers": answers, "lim": state}))


if __name__ == "__main__":
    main()
