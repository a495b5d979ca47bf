"""Soak: thousands of mixed requests against one server whose KV cache is too small for them.

    python -m tests.soak.server_soak FOLDER --requests 10000
    python -m tests.soak.server_soak FOLDER --model MODEL --on-gpu --options="--page-size 16"

Requests stream, ask for several samples, continue earlier answers, are aborted or hang up. Then
every prompt is asked alone, from an empty cache, and every finished greedy answer has to begin as
that one, up to a step whose two best tokens tie. FOLDER keeps outcomes, solo answers and memory
samples as JSON lines, so that the same command resumes; the summary is printed as JSON, and the
exit code is 1 if a claim fails.
"""

import argparse
import asyncio
import json
import random
import shlex
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import psutil

from lim_sglang.evals.run_store import JsonlFile, complete_lines
from lim_sglang.programs.http_client import MAX_IDLE_S
from tests.processes import ON_CPU, SGLANG, WITH_LIM, LocalServer, new_rid, serving
from tests.server.tiny_model import BUDGET, FIRST_WORD, VOCAB_SIZE, Prompt, build_tiny_qwen3

MIN_NEW, MAX_NEW = 8, 64
"""Tokens that a request generates."""
NUM_PROMPTS = 240
"""Prompts that all requests share, so that each needs one solo run only."""
NUM_PREFIXES = 12
"""Beginnings that the prompts share, so that the radix cache has branches."""
CONCURRENT = 24
"""Requests in flight."""
REQUEST_TIMEOUT_S = 600.0
IDLE_TIMEOUT_S = 60.0
SAMPLE_EVERY_S = 2.0
"""Pause between two samples of memory."""
MAX_GROWTH = 0.03
"""Growth of the resident memory over the second half that still counts as flat."""

TIE = 1e-4
"""Difference of two logprobs, in nats, that the rounding of a batch may turn around."""
TOP_LOGPROBS = "output_top_logprobs"
"""SGLang's field."""
AUDIT_COUNTS = (
    *("checked_sets", "wrong_sets", "checked_outputs", "wrong_outputs"),
    *("checked_summaries", "wrong_summaries"),
)
"""Counts of `LIM_AUDIT`."""

TINY_POOL = ("--max-total-tokens", "2048", "--max-running-requests", "16")
RETRACTING = ("--schedule-conservativeness", "0", *TINY_POOL)
"""A KV cache of about four requests, which SGLang fills without a reserve: it has to retract."""

KINDS = {
    "plain": 35,
    "stream": 15,
    "several": 10,
    "turn": 10,
    "sampled": 5,
    "abort": 13,
    "hang-up": 12,
}
"""Kinds of requests and how many of a hundred are of each kind."""
ENDED_EARLY = ("abort", "hang-up")


@dataclass(frozen=True)
class Request:
    """One request, known from seed and number alone."""

    number: int
    kind: str
    prompt: int
    """Index of the prompt."""
    num_new: int
    stop_after: int
    """Streamed chunks after which an abort or a hang-up comes."""
    num_samples: int = 1


@dataclass(frozen=True)
class Outcome:
    """The end of one request; one line of outcomes.jsonl."""

    number: int
    kind: str
    prompt: int
    num_new: int
    ended: str
    """`finished`, `aborted`, `hung up`, or an error in words."""
    outputs: list[list[int]]
    """Tokens of each sample, as far as they were received."""
    own_prompt: bool
    """False if an earlier answer stands between the prompt and the output."""
    retractions: int = 0
    cached_tokens: int = 0

    @property
    def is_comparable(self) -> bool:
        """True if the outputs have to begin as the solo run does."""
        greedy = self.kind != "sampled" and self.own_prompt
        return greedy and self.ended == "finished" and not self.retractions


def make_prompts(seed: int) -> list[Prompt]:
    """Return prompts of 8 to 700 tokens, within the budget and beyond, many with a shared start."""
    rng = random.Random(seed)

    def words(count: int) -> Prompt:
        return [rng.randrange(FIRST_WORD, VOCAB_SIZE) for _ in range(count)]

    prefixes = [words(rng.randint(16, 320)) for _ in range(NUM_PREFIXES)]
    lengths = ((8, BUDGET - MAX_NEW), (BUDGET - MAX_NEW, BUDGET), (BUDGET, 380))
    return [
        [*(rng.choice(prefixes) if rng.random() < 0.5 else ()), *words(rng.randint(*size))]
        for size in (lengths[number % len(lengths)] for number in range(NUM_PROMPTS))
    ]


def make_request(seed: int, number: int) -> Request:
    """Return the request of this number."""
    rng = random.Random(f"{seed}-{number}")
    kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
    return Request(
        number,
        kind,
        prompt=rng.randrange(NUM_PROMPTS),
        num_new=rng.randint(MIN_NEW, MAX_NEW),
        stop_after=rng.randint(0, 6),
        num_samples=rng.randint(2, 3) if kind == "several" else 1,
    )


class Log:
    """A file of JSON lines; a line that a kill cut off is dropped."""

    def __init__(self, path: Path) -> None:
        self._file = JsonlFile(path)
        self._file.drop_torn_line()
        self.found: list[Any] = [json.loads(line) for _, line, _ in complete_lines(path)]

    def add(self, line: Any) -> None:
        """Append one line."""
        self.found.append(line)
        self._file.append([line])


class Soak:
    """A soak that is under way: requests in flight, and what they gave so far."""

    def __init__(self, folder: Path, url: str, seed: int) -> None:
        self.prompts = make_prompts(seed)
        self._seed = seed
        self._log = Log(folder / "outcomes.jsonl")
        self._solo = Log(folder / "solo.jsonl")
        self._ties = Log(folder / "ties.jsonl")
        # Finished greedy answers, which later requests may continue.
        self._answers: dict[int, list[int]] = {}
        limits = httpx.Limits(max_connections=None, keepalive_expiry=MAX_IDLE_S)
        self._http = httpx.AsyncClient(
            base_url=url, timeout=REQUEST_TIMEOUT_S, limits=limits, trust_env=False
        )

    @property
    def outcomes(self) -> list[Outcome]:
        """The outcomes of this run and of those that it resumes."""
        return [Outcome(**line) for line in self._log.found]

    @property
    def num_done(self) -> int:
        """The number of requests that have an outcome."""
        return len(self._log.found)

    @property
    def solo(self) -> dict[int, list[int]]:
        """The longest greedy answer to each prompt that was asked alone."""
        return {line["prompt"]: line["output"] for line in self._solo.found}

    @property
    def ties(self) -> dict[int, int]:
        """First step of a prompt's solo run whose two best tokens tie."""
        return {line["prompt"]: line["step"] for line in self._ties.found}

    async def ask_all(self, num_requests: int) -> None:
        """Send the requests that have no outcome yet, `CONCURRENT` at once."""
        done = {line["number"] for line in self._log.found}
        waiting = iter([n for n in range(num_requests) if n not in done])

        async def work() -> None:
            for number in waiting:
                outcome = await self._outcome(make_request(self._seed, number))
                self._log.add(asdict(outcome))

        await asyncio.gather(*(work() for _ in range(CONCURRENT)))

    async def ask_alone(self) -> None:
        """Ask every prompt with a comparable answer alone, from an empty cache."""
        wanted = {outcome.prompt for outcome in self.outcomes if outcome.is_comparable}
        for prompt in sorted(wanted - set(self.solo)):
            await self.flush()
            body = _body(self.prompts[prompt], new_rid(), MAX_NEW)
            answer = (await self._http.post("/generate", json=body)).raise_for_status().json()
            self._solo.add({"prompt": prompt, "output": answer["output_ids"]})

    async def find_ties(self, prompts: Iterable[int]) -> None:
        """Ask these prompts alone once more, for the first step whose two best tokens tie."""
        for prompt in sorted(set(prompts) - set(self.ties)):
            await self.flush()
            body = _body(self.prompts[prompt], new_rid(), MAX_NEW)
            body |= {"return_logprob": True, "top_logprobs_num": 2}
            answer = (await self._http.post("/generate", json=body)).raise_for_status().json()
            best = [[logprob for logprob, *_ in step] for step in answer["meta_info"][TOP_LOGPROBS]]
            tied = (n for n, (first, second) in enumerate(best) if first - second < TIE)
            self._ties.add({"prompt": prompt, "step": next(tied, MAX_NEW)})

    async def flush(self) -> None:
        """Empty the radix cache, once the server is idle."""
        path = f"/flush_cache?timeout={IDLE_TIMEOUT_S:.0f}"
        (await self._http.post(path)).raise_for_status()

    async def used_tokens(self) -> int:
        """Return the slots of the KV cache that are in use."""
        answer = (await self._http.get("/v1/loads")).raise_for_status().json()
        return sum(load["num_used_tokens"] for load in answer["loads"])

    async def state(self) -> dict[str, Any]:
        """Return LessIsMore's part of `/server_info`."""
        answer = (await self._http.get("/server_info")).raise_for_status().json()
        found: dict[str, Any] = answer["internal_states"][0]["lim"]
        return found

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def _outcome(self, request: Request) -> Outcome:
        """Send one request and see it end, in whatever way."""
        earlier = self._answers.get(request.prompt) if request.kind == "turn" else None
        ids = self.prompts[request.prompt]
        if earlier:
            ids = [*ids, *earlier, FIRST_WORD + request.num_new]
        try:
            ended, results = await self._send(request, ids)
        except httpx.HTTPError as error:
            ended, results = f"{type(error).__name__}: {error}", []
        metas = [result["meta_info"] for result in results]
        outcome = Outcome(
            request.number,
            request.kind,
            request.prompt,
            request.num_new,
            ended,
            outputs=[result["output_ids"] for result in results],
            own_prompt=not earlier,
            # A request that is aborted while it waits has neither figure.
            retractions=max((meta.get("num_retractions", 0) for meta in metas), default=0),
            cached_tokens=max((meta.get("cached_tokens", 0) for meta in metas), default=0),
        )
        if outcome.is_comparable:
            self._answers[request.prompt] = outcome.outputs[0]
        return outcome

    async def _send(self, request: Request, ids: Prompt) -> tuple[str, list[Mapping[str, Any]]]:
        """Return how a request ended, and the last state of each of its samples."""
        rid = new_rid()
        body = _body(ids, rid, request.num_new)
        if request.kind == "sampled":
            body["sampling_params"]["temperature"] = 1.0
        if request.num_samples > 1:
            body["rid"] = None
            body["sampling_params"]["n"] = request.num_samples
        if request.kind in ("stream", *ENDED_EARLY):
            return await self._stream(request, body | {"stream": True}, rid)
        response = await self._http.post("/generate", json=body)
        if not response.is_success:
            return f"{response.status_code}: {response.text[:200]}", []
        results = response.json()
        results = results if isinstance(results, list) else [results]
        return _ending(results), results

    async def _stream(
        self, request: Request, body: Mapping[str, Any], rid: str
    ) -> tuple[str, list[Mapping[str, Any]]]:
        last: Mapping[str, Any] | None = None
        async with self._http.stream("POST", "/generate", json=body) as response:
            if not response.is_success:
                return f"{response.status_code}: {(await response.aread())[:200]!r}", []
            chunks = 0
            async for result in _events(response):
                last, chunks = result, chunks + 1
                if chunks == request.stop_after + 1 and request.kind == "hang-up":
                    return "hung up", [result]
                if chunks == request.stop_after + 1 and request.kind == "abort":
                    await self._http.post("/abort_request", json={"rid": rid})
        if last is None:
            return "an empty stream", []
        return _ending([last]), [last]


def _body(ids: Prompt, rid: str, num_new: int) -> dict[str, Any]:
    sampling = {"max_new_tokens": num_new, "temperature": 0, "ignore_eos": True}
    return {"input_ids": ids, "rid": rid, "sampling_params": sampling}


async def _events(response: httpx.Response) -> AsyncIterator[Mapping[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def _ending(results: Sequence[Mapping[str, Any]]) -> str:
    """Return in words how all samples of one request ended."""
    reasons = [result["meta_info"]["finish_reason"] or {} for result in results]
    kinds = {reason.get("type") for reason in reasons}
    if kinds == {"length"}:
        return "finished"
    return "aborted" if kinds == {"abort"} else f"ended by {reasons}"


class MemoryWatch:
    """Samples of the memory of a server's processes; one line of memory.jsonl each."""

    def __init__(self, folder: Path, server: LocalServer) -> None:
        self._log = Log(folder / "memory.jsonl")
        self._main = psutil.Process(server.pid)

    async def follow(self, soak: Soak) -> None:
        """Sample until cancelled."""
        while True:
            self._log.add({"done": soak.num_done, "pid": self._main.pid, **self.sample()})
            await asyncio.sleep(SAMPLE_EVERY_S)

    def sample(self) -> dict[str, float]:
        """Return resident memory, shared memory files (both in MiB) and open files."""
        rss = files = 0
        for process in (self._main, *self._main.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                rss += process.memory_info().rss
                files += process.num_fds()
        shm = psutil.disk_usage("/dev/shm").used
        return {"rss_mib": rss / 2**20, "shm_mib": shm / 2**20, "open_files": files}

    def growth(self) -> dict[str, dict[str, float]]:
        """Return for each figure the medians of the third and of the last quarter of requests."""
        lines = [line for line in self._log.found if line["pid"] == self._main.pid]
        last = max((line["done"] for line in lines), default=0)
        first = min((line["done"] for line in lines), default=0)
        quarter = max(1, (last - first) / 4)
        found: dict[str, dict[str, float]] = {}
        for name in ("rss_mib", "shm_mib", "open_files"):
            third = [ln[name] for ln in lines if 2 <= (ln["done"] - first) / quarter < 3]
            fourth = [ln[name] for ln in lines if (ln["done"] - first) / quarter >= 3]
            if third and fourth:
                found[name] = {"third": _median(third), "last": _median(fourth)}
        return found


def _median(values: Sequence[float]) -> float:
    return round(sorted(values)[len(values) // 2], 1)


def differing(
    outcomes: Sequence[Outcome],
    solo: Mapping[int, Sequence[int]],
    ties: Mapping[int, int] = MappingProxyType({}),
) -> list[Outcome]:
    """Return the finished greedy answers that differ from their solo run before a tie.

    Args:
        solo: greedy answers by prompt; answers to other prompts are not compared.
        ties: first step of a solo run, by prompt, whose two best tokens tie: from there on the
            rounding of a batch decides.
    """
    return [
        outcome
        for outcome in outcomes
        if outcome.is_comparable and outcome.prompt in solo
        for length in [min(outcome.num_new, ties.get(outcome.prompt, outcome.num_new))]
        if any(
            len(output) > outcome.num_new or output[:length] != solo[outcome.prompt][:length]
            for output in outcome.outputs
        )
    ]


def summary(
    outcomes: Sequence[Outcome],
    solo: Mapping[int, Sequence[int]],
    num_requests: int,
    ties: Mapping[int, int] = MappingProxyType({}),
) -> dict[str, Any]:
    """Count how requests ended, and the finished greedy answers that differ from their solo run.

    Args:
        solo, ties: as for `differing`.
    """
    compared = [outcome for outcome in outcomes if outcome.is_comparable and outcome.prompt in solo]
    without_ties = differing(outcomes, solo)
    wrong = [outcome.number for outcome in differing(outcomes, solo, ties)]
    failed = [outcome for outcome in outcomes if not _is_expected(outcome)]
    numbers = Counter(outcome.number for outcome in outcomes)
    return {
        "requests": num_requests,
        "lost": sum(number not in numbers for number in range(num_requests)),
        "doubled": sum(count > 1 for count in numbers.values()),
        "ended": dict(Counter(outcome.ended.split(":")[0] for outcome in outcomes)),
        "failed": [asdict(outcome) | {"outputs": []} for outcome in failed[:10]],
        "num_failed": len(failed),
        "retracted": sum(outcome.retractions > 0 for outcome in outcomes),
        "with_cached_tokens": sum(outcome.cached_tokens > 1 for outcome in outcomes),
        "compared": len(compared),
        "differing": sorted(wrong),
        "differing_from_a_tie_on": sorted({each.number for each in without_ties} - set(wrong)),
    }


def _is_expected(outcome: Outcome) -> bool:
    """Return True if a request ended as its kind says, with as many tokens as were asked for."""
    if outcome.ended == "finished":
        return all(len(output) == outcome.num_new for output in outcome.outputs)
    return outcome.ended == {"abort": "aborted", "hang-up": "hung up"}.get(outcome.kind)


def broken_claims(found: Mapping[str, Any], *, exact: bool) -> list[str]:
    """Return the claims of a soak that its summary refutes."""
    claims = {
        "no request is lost": not found["lost"] and not found["doubled"],
        "every request ends as its kind says": not found["num_failed"],
        "the KV cache is empty after a flush": found["used_tokens"] == 0,
        "requests were retracted": max(found["retracted"], found.get("retractions", 0)) > 0,
        "every finished greedy answer equals its solo run": not (exact and found["differing"]),
        "no set, no output and no summary is wrong": not any(
            found[name] for name in AUDIT_COUNTS if name.startswith("wrong")
        ),
    }
    growth = found["memory"].get("rss_mib")
    if growth:
        flat = growth["last"] <= growth["third"] * (1 + MAX_GROWTH)
        claims["resident memory is flat over the second half"] = flat
    return [claim for claim, holds in claims.items() if not holds]


async def soak_server(
    server: LocalServer, folder: Path, *, num_requests: int, seed: int, exact: bool = True
) -> dict[str, Any]:
    """Run or resume a soak against a server; return its summary, with the claims that it refutes.

    Args:
        exact: ask all prompts alone afterwards; False where greedy tokens depend on the batch.
    """
    soak = Soak(folder, server.url, seed)
    watch = MemoryWatch(folder, server)
    began_s = time.monotonic()
    follower = asyncio.create_task(watch.follow(soak))
    try:
        await soak.ask_all(num_requests)
    finally:
        follower.cancel()
    took_s = time.monotonic() - began_s
    await soak.flush()
    used, state = await soak.used_tokens(), await soak.state()
    if exact:
        await soak.ask_alone()
        await soak.find_ties(each.prompt for each in differing(soak.outcomes, soak.solo))
    found = summary(soak.outcomes, soak.solo, num_requests, soak.ties)
    found |= {"seconds": round(took_s), "used_tokens": used, "memory": watch.growth()}
    found |= {name: state.get(name, 0) for name in (*AUDIT_COUNTS, "retractions", "sparse_rows")}
    await soak.close()
    return found | {"broken": broken_claims(found, exact=exact)}


def main() -> None:
    """Start a server, soak it, print the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="outcomes, solo answers, memory samples, log")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="model folder; default: a tiny random Qwen3")
    parser.add_argument("--on-gpu", action="store_true", help="audit every step; no solo runs")
    parser.add_argument("--options", default="", help="more options for SGLang, in one string")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    model = given.model or build_tiny_qwen3(given.folder / "model")
    command = [*SGLANG, "--model-path", str(model)]
    command += [] if given.on_gpu else ON_CPU
    command += WITH_LIM if given.model is None else WITH_LIM[:4]
    on_gpu = {"LIM_AUDIT": "1", "SGLANG_USE_CPU_ENGINE": ""}
    settings = {"LIM_TRACE": "", **(on_gpu if given.on_gpu else {})}
    command += [*RETRACTING, *shlex.split(given.options)]
    with serving(command, folder=given.folder, settings=settings) as server:
        soak = soak_server(
            server,
            given.folder,
            num_requests=given.requests,
            seed=given.seed,
            exact=not given.on_gpu,
        )
        found = asyncio.run(soak)
    sys.stdout.write(json.dumps(found, indent=2) + "\n")
    sys.exit(1 if found["broken"] else 0)


if __name__ == "__main__":
    main()
