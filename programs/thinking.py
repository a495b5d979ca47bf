"""A limit to the thoughts: a model that thinks for too long is made to answer.

The first request may take as many tokens as the thoughts may. Where it used them all, a second one
goes on from its text, with the thoughts closed: SGLang renders the question again and puts the text
behind the beginning of the assistant's turn, as it is (`continue_final_message`).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lim_sglang.programs.chat import Generation
from lim_sglang.programs.endpoint import SglangBackend
from lim_sglang.programs.running import InFlightSample
from lim_sglang.programs.thoughts import END_OF_THOUGHT

ENOUGH = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the "
    f"thinking directly now.\n{END_OF_THOUGHT}\n\n"
)
"""How Qwen3 is made to stop (arXiv 2505.09388, its thinking budget)."""
CUT_CHARACTER = "\ufffd"
"""In place of a character whose first bytes alone were generated."""


class ThinkingBudgetBackend(SglangBackend):
    """A SGLang server with a thinking model. The words that close the thoughts are no tokens of its
    own: they are in the text and not in the counts.
    """

    def __init__(self, url: str, *, thinking_budget: int, **options: Any) -> None:
        """Like `Endpoint`.

        Args:
            thinking_budget: tokens after which the thoughts are closed.
        """
        super().__init__(url, **options)
        self._thinking_budget = thinking_budget

    def about(self) -> dict[str, Any]:
        """What of the server an answer depends on; raises `ServerError`."""
        return super().about() | {"thinking_budget": self._thinking_budget}

    async def _generate(self, body: Mapping[str, Any], in_flight: InFlightSample) -> Generation:
        limit = body["max_tokens"]
        budget = min(self._thinking_budget, limit)
        first = await super()._generate({**body, "max_tokens": budget}, in_flight)
        if not first.truncated or budget == limit:
            return first
        said = close_thoughts(first.text)
        in_flight.keep(first.num_tokens, said)
        rest = await super()._generate(continuation(body, said, limit - budget), in_flight)
        return joined(first, said, rest)


def close_thoughts(text: str) -> str:
    """What was said, and the end of the thoughts if they have none."""
    return text if END_OF_THOUGHT in text else text.rstrip(CUT_CHARACTER) + ENOUGH


def continuation(body: Mapping[str, Any], said: str, max_tokens: int) -> dict[str, Any]:
    """The same request, to go on from what was said."""
    turns = [*body["messages"], {"role": "assistant", "content": said}]
    return {**body, "messages": turns, "max_tokens": max_tokens, "continue_final_message": True}


def joined(first: Generation, said: str, rest: Generation) -> Generation:
    """Both as one, which ended as the second did."""
    closed = END_OF_THOUGHT in first.text
    return replace(
        rest,
        text=said + rest.text,
        num_tokens=first.num_tokens + rest.num_tokens,
        tokens_at_least=first.tokens_at_least or rest.tokens_at_least,
        num_reasoning_tokens=first.num_reasoning_tokens if closed else first.num_tokens,
        reasoning_estimated=closed and first.reasoning_estimated,
        num_repeated_logprobs=first.num_repeated_logprobs + rest.num_repeated_logprobs,
        num_prompt_tokens=first.num_prompt_tokens,
        latency_s=first.latency_s + rest.latency_s,
    )
