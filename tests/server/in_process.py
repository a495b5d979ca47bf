"""Programs that tests run in processes of their own, as plugins change SGLang for good.

`python -m tests.server.in_process PROGRAM` reads JSON from standard input and prints JSON as its
last line; `run_in_process` starts it.
"""

import argparse
import asyncio
import contextlib
import inspect
import io
import json
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run_in_process(
    program: str, given: Any, environment: Mapping[str, str], timeout_s: float = 500
) -> Any:
    """Run one of `PROGRAMS` and return its result; fail with its errors if it fails."""
    from tests.processes import end_tree

    process = subprocess.Popen(
        [sys.executable, "-m", "tests.server.in_process", program],
        env=environment,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        output, errors = process.communicate(json.dumps(given).encode(), timeout=timeout_s)
    finally:
        end_tree(process)  # SGLang's own shutdown may leave a process behind
    assert process.returncode == 0, errors.decode()[-3000:]
    return json.loads(output.splitlines()[-1])


def start(given: Mapping[str, Any]) -> dict[str, Any]:
    """Load the plugin once, then parse command lines and run an engine.

    Args:
        given: `command_lines`; `engine` and `refused`, options of `sgl.Engine`; `config` for
            `LIM_CONFIG`; `prompts` and `sampling`.
    """
    from sglang.srt.plugins import load_plugins

    from lim_sglang.compat import reasons_against_decode_stack

    load_plugins()
    return {
        "outcomes": [_parse(arguments) for arguments in given["command_lines"]],
        "tensor_cores": _tensor_cores_for_pairs(),
        "decode_stack": reasons_against_decode_stack(),
        "options": _server_options(),
        "runners": _make_runners(given["engine"]),
        "engine": _ask_engine(given),
    }


def _server_options() -> list[str]:
    """List the options of SGLang's parser, ours left out."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return [word for word in parser._option_string_actions if not word.startswith("--lim-")]


def _parse(arguments: list[str]) -> dict[str, Any]:
    """Return exit code and message of one start, up to the launch of a server."""
    from sglang.srt.server_args import prepare_server_args

    environment = dict(os.environ)
    errors = io.StringIO()
    code: object = 0
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        try:
            prepare_server_args(arguments)
        except SystemExit as end:
            code = end.code
    os.environ.clear()
    os.environ.update(environment)
    return {"code": code, "message": errors.getvalue()}


def _make_runners(options: Mapping[str, Any]) -> list[str]:
    """Make a model runner of options that our hook has seen, then of some that it has not; return
    the errors."""
    from sglang.srt.server_args import ServerArgs

    from lim_sglang.errors import LimError
    from lim_sglang.model_runner import LimModelRunner

    hooked, errors = ServerArgs.__post_init__, []
    for init in (hooked, inspect.unwrap(hooked)):
        ServerArgs.__post_init__ = init
        sent = pickle.loads(pickle.dumps(ServerArgs(**options)))  # as to a child process
        try:
            LimModelRunner(model_config=None, server_args=sent)
        except (AttributeError, LimError) as error:
            errors.append(f"{type(error).__name__}: {error}")
    ServerArgs.__post_init__ = hooked
    return errors


def _tensor_cores_for_pairs() -> list[bool]:
    """Ask SGLang, as it is and while we make a backend, for two query heads a KV head."""
    import torch
    from sglang.srt.layers.attention.flashinfer_backend import should_use_tensor_core

    from lim_sglang.compat import decode_on_tensor_cores

    pairs = (torch.bfloat16, 16, 8)
    chosen = [should_use_tensor_core(*pairs)]
    with decode_on_tensor_cores(wanted=True):
        chosen.append(should_use_tensor_core(*pairs))
    return chosen


def _ask_engine(given: Mapping[str, Any]) -> dict[str, Any]:
    """Start an engine with options that are refused, then one without, and ask the latter."""
    import sglang

    from lim_sglang.errors import LimError

    os.environ["LIM_CONFIG"] = json.dumps(given["config"])
    try:
        sglang.Engine(**given["engine"], **given["refused"])
        refusal = "none: it started"
    except LimError as error:
        refusal = f"{type(error).__name__}: {error}"
    engine = sglang.Engine(**given["engine"])
    answers = [
        engine.generate(input_ids=prompt, sampling_params=given["sampling"])
        for prompt in given["prompts"]
    ]
    engine.shutdown()
    return {"refusal": refusal, "answers": answers}


NUM_REQUESTS = 200
NUM_PREFIXES = 6
ABORT_EVERY = 7
RETRACTING = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "20"}
"""Environment in which SGLang retracts requests again and again."""
PAGE_SIZE = 64
EDGES = (0, 1, 15, 63)
"""Lengths, modulo a page of 64 tokens, where a block of 16 or 64 tokens has just ended, has just
begun, or is about to end."""
CHUNK = 512
"""Tokens of a prompt that are prefilled at once."""


def make_requests() -> list[dict[str, Any]]:
    """Return requests that share prefixes, of lengths on both sides of the budget.

    Every fourth prompt ends near the border of a page, some of them after three chunks; every
    tenth is the prompt before it once more, while that one is being served.
    """
    rng = random.Random(11)
    prefixes = [[rng.randrange(5, 1000) for _ in range(300)] for _ in range(NUM_PREFIXES)]
    requests: list[dict[str, Any]] = []
    for number in range(NUM_REQUESTS):
        own = [rng.randrange(5, 1000) for _ in range(rng.randrange(1, 700))]
        prompt = (prefixes[rng.randrange(NUM_PREFIXES)] if number % 3 else []) + own
        if number % 4 == 1:
            length = PAGE_SIZE * rng.randrange(1, 3 * CHUNK // PAGE_SIZE)
            prompt = rng.choices(range(5, 1000), k=length + EDGES[number // 4 % len(EDGES)])
        if number % 10 == 6:
            prompt = requests[-1]["prompt"]
        requests.append(
            {"rid": f"r{number:03}.", "prompt": prompt, "num_tokens": rng.randrange(8, 48)}
        )
    return requests


def is_aborted(number: int) -> bool:
    """Return True for a request that is aborted in mid-stream."""
    return number % ABORT_EVERY == 0


def serve_crowd(given: Mapping[str, Any]) -> dict[str, Any]:
    """Run an engine under 200 requests that come, finish, abort and get retracted.

    Args:
        given: `model`, and `options` of SGLang's engine.
    """
    import sglang

    defaults = {
        "max_total_tokens": 24_000,
        "max_running_requests": 32,
        "disable_prefill_cuda_graph": True,
    }
    options = {**defaults, **given["options"]}
    adapter = next(iter(options.get("lora_paths", ())), None)
    engine = sglang.Engine(
        model_path=given["model"],
        skip_tokenizer_init=True,
        dtype="float16",
        mem_fraction_static=0.6,
        chunked_prefill_size=CHUNK,
        cuda_graph_max_bs_decode=24,  # larger steps run layer by layer
        log_level="warning",
        **options,
    )
    try:
        loop = asyncio.get_event_loop()
        answers = loop.run_until_complete(_ask_all(engine, adapter))
        state = engine.get_server_info()["internal_states"][0].get("lim")
    finally:
        engine.shutdown()
    return {"answers": answers, "lim": state}


async def _ask_all(engine: Any, adapter: str | None) -> list[dict[str, Any]]:
    """Ask all requests at once; every other one with the adapter, if there is one."""
    tasks = [_ask(engine, request, n, adapter) for n, request in enumerate(make_requests())]
    return await asyncio.gather(*tasks)


async def _ask(
    engine: Any, request: Mapping[str, Any], number: int, adapter: str | None
) -> dict[str, Any]:
    """Return one request's tokens, its cached prompt tokens and its retractions."""
    await asyncio.sleep(0.02 * number % 1.0)
    stream = await engine.async_generate(
        input_ids=request["prompt"],
        sampling_params={
            "temperature": 0,
            "max_new_tokens": request["num_tokens"],
            "ignore_eos": True,
        },
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


def answer(given: Mapping[str, Any]) -> dict[str, Any]:
    """Run an engine; ask it all requests at once.

    Args:
        given: `model`, `options` of SGLang's engine, and `requests`, their bodies.
    """
    import sglang

    defaults = {"max_running_requests": 32, "cuda_graph_max_bs_decode": 24}
    options = {**defaults, "disable_prefill_cuda_graph": True, **given["options"]}
    engine = sglang.Engine(
        model_path=given["model"],
        skip_tokenizer_init=True,
        log_level="warning",
        **options,
    )

    async def ask(body: Mapping[str, Any]) -> Any:
        return await engine.async_generate(**body)

    async def ask_all() -> Any:
        return await asyncio.gather(*map(ask, given["requests"]))

    try:
        results = asyncio.get_event_loop().run_until_complete(ask_all())
        state = engine.get_server_info()["internal_states"][0].get("lim")
    finally:
        engine.shutdown()
    return {"results": results, "lim": state}


NUM_PROMPTS, NUM_STEPS = 20, 64
ORACLE_BUDGET = 256


def force_tokens(given: Mapping[str, Any]) -> dict[str, Any]:
    """Feed a real model the same tokens, served on the GPU and by the oracle; compare logits.

    Args:
        given: `model`, a folder, and `select_layers`.
    """
    import torch
    from torch import Tensor
    from transformers import AutoTokenizer

    from tests.server.gpu_rig import Rig
    from tests.server.oracle import Oracle
    from tests.server.tiny_model import story

    model, select = Path(given["model"]), given["select_layers"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    rng = random.Random(2)
    stories = [story(rng.randrange(22, 95), 7000 + n) for n in range(NUM_PROMPTS)]
    prompts = [tokenizer(text)["input_ids"] for text in stories]  # of 300 to 1,400 tokens

    def by_oracle(
        layers: Sequence[int],
        forced: list[list[int]] | None = None,
        dtype: torch.dtype = torch.float16,
    ) -> tuple[Tensor, list[list[int]]]:
        """Return logits of the decode steps [B, n, V] and the tokens that were fed."""
        options = {"select_layers": layers, "budget": ORACLE_BUDGET}
        oracle = Oracle(model, **options, dtype=dtype, device="cuda")
        logits, fed = [], []
        for number, prompt in enumerate(prompts):
            run = oracle.generate(prompt, NUM_STEPS, forced=forced[number] if forced else None)
            logits.append(oracle.logits().half())
            fed.append(list(run.tokens))
        return torch.stack(logits), fed

    def distance(expected: Tensor, found: Tensor) -> dict[str, float]:
        """Return the share of positions with the same likeliest token, and KL(expected ‖ found).

        Of the next token, in nats, mean over positions; logits are [B, n, V].
        """
        same = (expected.argmax(-1) == found.argmax(-1)).float().mean()
        expected, found = expected.float().log_softmax(-1), found.float().log_softmax(-1)
        kl = (expected.exp() * (expected - found)).sum(-1).mean()
        return {"top1": float(same), "kl": float(kl)}

    dense, forced = by_oracle(())
    sparse, _ = by_oracle(select, forced)
    exact, _ = by_oracle(select, forced, torch.float32)
    rig = Rig(model)
    rig.use_dense()
    served_dense = rig.teacher_forced(prompts, forced)
    rig.use_lim(ORACLE_BUDGET, select_layers=tuple(select))
    served_sparse = rig.teacher_forced(prompts, forced)
    rig.use_lim(ORACLE_BUDGET, select_layers=(select[0], select[1] + 3))
    served_otherwise = rig.teacher_forced(prompts, forced)
    return {
        "dense": distance(dense, served_dense),
        "lim": distance(exact, served_sparse),
        "oracle_in_fp16": distance(exact, sparse),
        "dense_oracle_to_lim": distance(dense, served_sparse),
        "oracle_to_other_select_layers": distance(sparse, served_otherwise),
        "shortest": min(map(len, prompts)),
        "longest": max(map(len, prompts)) + NUM_STEPS,
    }


PROGRAMS = {
    "start": start,
    "serve_crowd": serve_crowd,
    "answer": answer,
    "force_tokens": force_tokens,
}

if __name__ == "__main__":
    result = PROGRAMS[sys.argv[1]](json.load(sys.stdin))
    sys.stdout.write("\n" + json.dumps(result))
