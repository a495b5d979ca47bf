"""The thoughts of a model in its text: where they end, put in, taken out, counted. Pure."""

from collections.abc import Mapping
from typing import Any

OPENING = "<think>"
END_OF_THOUGHT = "</think>"


class Thoughts:
    """Puts thoughts that a server tells apart back where the model wrote them, between marks."""

    def __init__(self) -> None:
        self._open = False

    def mark(self, message: Mapping[str, Any]) -> str:
        """The text of a message, or of the next piece of one."""
        # SGLang, DeepSeek and llama.cpp use the first name, newer vLLM the second.
        thoughts = message.get("reasoning_content") or message.get("reasoning") or ""
        text = message.get("content") or ""
        opening = f"{OPENING}\n" if thoughts and not self._open else ""
        self._open = self._open or bool(thoughts)
        closing = f"\n{END_OF_THOUGHT}\n\n" if text and self._open else ""
        self._open = self._open and not closing
        return f"{opening}{thoughts}{closing}{text}"


def thoughts_of(text: str) -> str:
    """The beginning of a text that is thoughts, marks included: up to their end, or all of it where
    they were begun and never ended. Nothing where neither mark is there: a model whose template
    opens its thoughts and which was cut off within them looks like one that does not think.
    """
    thoughts, end, _ = text.partition(END_OF_THOUGHT)
    return thoughts + end if end or text.lstrip().startswith(OPENING) else ""


def split_thoughts(text: str) -> tuple[str, str]:
    """Thoughts and reply, both without the marks and the white space around them."""
    thoughts = thoughts_of(text)
    inner = thoughts.strip().removeprefix(OPENING).removesuffix(END_OF_THOUGHT)
    return inner.strip(), text[len(thoughts) :].lstrip() if thoughts else text


def share_of_thoughts(num_tokens: int, thoughts: str, text: str) -> int:
    """How many of a text's tokens are thoughts, if all characters weigh the same: an estimate."""
    return round(num_tokens * len(thoughts) / max(len(text), 1))
