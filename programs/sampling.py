"""Which sampling parameters apply: those given, else the model's own, else the paper's."""

from collections.abc import Mapping
from typing import Any

from lim_sglang.errors import ConfigError
from lim_sglang.programs.records import Sampling

RECOMMENDED = ("temperature", "top_p", "top_k")
"""What a model's generation config may recommend; the server itself applies the rest of it."""


def resolve_sampling(published: Mapping[str, Any], **given: Any) -> Sampling:
    """The parameters of a run, decided once.

    Args:
        published: the model's, by name, as far as its server says them. A top_k of 0 is no limit,
            as in transformers.
        given: fields of `Sampling`; None was not given.
    """
    recommended = {name: published[name] for name in RECOMMENDED if published.get(name) is not None}
    if recommended.get("top_k") == 0:
        recommended["top_k"] = -1
    wanted = {name: value for name, value in given.items() if value is not None}
    return Sampling(**{**recommended, **wanted})


def check_thinking_budget(budget: int | None, max_tokens: int) -> None:
    """Refuse a limit of the thoughts that no answer fits behind; raises `ConfigError`."""
    if budget is not None and budget >= max_tokens:
        raise ConfigError(
            f"a thinking budget of {budget:,} tokens leaves nothing of max_tokens {max_tokens:,} "
            "to answer with: lower the one or raise the other"
        )
