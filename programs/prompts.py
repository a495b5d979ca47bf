"""What a question is wrapped in before the model's own chat template renders it."""

from typing import TypedDict

from lim_sglang.errors import ConfigError

MATH_PROMPT = r"""{question}

Please reason step by step, and put your final answer within \boxed{{}}."""
"""For `str.format(question=...)`; raw, since `\b` would be a backspace."""
CHOICE_PROMPT = r"""{question}

Please reason step by step, and put the letter of your final answer within \boxed{{}}."""
"""For a question that ends with its options."""


class Message(TypedDict):
    """One turn of a conversation, as OpenAI's API has it."""

    role: str
    content: str


def ask_messages(
    question: str, *, template: str = MATH_PROMPT, system: str | None = None
) -> tuple[Message, ...]:
    """The conversation that asks one question.

    Raises:
        ConfigError: the template does not hold {question} once, or another field.
    """
    try:
        content = template.format(question=question)
        holds_question = template.format(question="\0").count("\0") == 1
    except (KeyError, IndexError, ValueError) as error:
        raise ConfigError(
            f"the prompt template cannot be filled in ({error!r}): write {{question}} where the "
            "question goes, and {{ and }} for braces"
        ) from None
    if not holds_question:
        raise ConfigError("the prompt template must hold {question} exactly once")
    turns = [Message(role="system", content=system)] if system else []
    return (*turns, Message(role="user", content=content))
