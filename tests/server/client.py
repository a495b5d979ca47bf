"""What the end-to-end tests ask a server, over SGLang's native HTTP API and in token ids."""

import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

from tests.server.oracle import KeptSets
from tests.server.prompts import NUM_NEW, Prompt

_TIMEOUT_S = 300


@dataclass(frozen=True)
class Answer:
    """What the server says about one request."""

    rid: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens whose KV was in the radix cache."""
    finish: str
    """`length`, `stop` or `abort`."""

    @classmethod
    def read(cls, body: dict[str, Any]) -> "Answer":
        """From one result of `/generate`."""
        meta = body["meta_info"]
        return cls(
            rid=meta["id"],
            tokens=tuple(body["output_ids"]),
            prompt_tokens=meta["prompt_tokens"],
            cached_tokens=meta["cached_tokens"],
            finish=(meta["finish_reason"] or {}).get("type", ""),
        )


class Client:
    """One server, asked greedily and through end tokens."""

    def __init__(self, url: str, trace: Path, api_key: str | None = None) -> None:
        self.url = url
        self._trace = trace
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def is_ready(self) -> bool:
        """Whether the server takes requests."""
        try:
            return requests.get(f"{self.url}/health", timeout=5).ok
        except requests.RequestException:
            return False

    def ask(self, prompt: Prompt, num_tokens: int = NUM_NEW) -> Answer:
        """Generate for one prompt that is alone in the server."""
        return self.ask_together([prompt], num_tokens)[0]

    def ask_together(self, prompts: Sequence[Prompt], num_tokens: int = NUM_NEW) -> list[Answer]:
        """Generate for all prompts at once."""
        body = _request(list(prompts), [new_rid() for _ in prompts], num_tokens)
        return [Answer.read(answer) for answer in self._post("/generate", body).json()]

    def ask_cold(self, prompts: Sequence[Prompt], *, together: bool) -> list[Answer]:
        """Generate for all prompts, at once or one by one, from an empty radix cache."""
        self._post("/flush_cache?timeout=20", {})  # an answer may come before its request's end
        return self.ask_together(prompts) if together else [self.ask(p) for p in prompts]

    def ask_copies(self, prompt: Prompt, num_copies: int) -> list[Answer]:
        """Generate n samples in one request."""
        body = _request(prompt, None, NUM_NEW)
        body["sampling_params"]["n"] = num_copies
        return [Answer.read(answer) for answer in self._post("/generate", body).json()]

    def stream(self, prompt: Prompt, rid: str, num_tokens: int) -> Iterator[Answer]:
        """Generate for one prompt; yields after every few tokens."""
        body = _request(prompt, rid, num_tokens) | {"stream": True}
        with requests.post(
            f"{self.url}/generate",
            json=body,
            headers=self._headers,
            timeout=_TIMEOUT_S,
            stream=True,
        ) as response:
            for line in response.iter_lines():
                if line.startswith(b"data: {"):
                    yield Answer.read(json.loads(line.removeprefix(b"data: ")))

    def chat(self, text: str, num_tokens: int) -> dict[str, Any]:
        """The answer of the OpenAI API to one user message."""
        body = {"messages": [{"role": "user", "content": text}], "max_tokens": num_tokens}
        answer: dict[str, Any] = self._post("/v1/chat/completions", body).json()
        return answer

    def abort(self, rid: str) -> None:
        """End one request in mid-stream."""
        self._post("/abort_request", {"rid": rid})

    def lim(self) -> dict[str, Any] | None:
        """What the server shows of LessIsMore; None where it is not live."""
        response = requests.get(
            f"{self.url}/server_info", headers=self._headers, timeout=_TIMEOUT_S
        )
        state: dict[str, Any] | None = response.json()["internal_states"][0].get("lim")
        return state

    def kept_sets(self, answer: Answer) -> KeptSets:
        """The sets that led to the answer's tokens.

        SGLang overlaps its steps: it learns that a request has ended one step late, so the server
        also decodes the last token and drops the result. That row is left out.
        """
        last = answer.prompt_tokens + len(answer.tokens) - 1
        lines = [line for line in read_trace(self._trace) if line["rid"] == answer.rid]
        return {
            (line["seq_len"], line["layer"]): tuple(line["kept"])
            for line in lines
            if line["seq_len"] <= last
        }

    def steps(self, rid: str) -> dict[int, int]:
        """Number of the decode step in which a request had a sparse row -> its length there."""
        lines = read_trace(self._trace)
        return {line["step"]: line["seq_len"] for line in lines if line["rid"] == rid}

    def _post(self, path: str, body: dict[str, Any]) -> requests.Response:
        response = requests.post(
            f"{self.url}{path}", json=body, headers=self._headers, timeout=_TIMEOUT_S
        )
        response.raise_for_status()
        return response


def read_trace(folder: Path) -> list[dict[str, Any]]:
    """Every kept set that a server has written so far."""
    files = sorted(folder.glob("kept-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def new_rid() -> str:
    """A request id that no other starts with."""
    return f"{uuid.uuid4().hex}."


def _request(ids: Any, rid: Any, num_tokens: int) -> dict[str, Any]:
    sampling = {"max_new_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    return {"input_ids": ids, "rid": rid, "sampling_params": sampling}
