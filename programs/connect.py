"""From an address to a frontend backend: quick to fail, slow only where SGLang is imported."""

from collections.abc import Sequence
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING

from rich.console import Console

from lim_sglang.errors import ConfigError
from lim_sglang.programs.chat import switched
from lim_sglang.programs.http_client import Client, check_server

if TYPE_CHECKING:
    from lim_sglang.programs.backend import Backend
    from lim_sglang.programs.openai_backend import OpenAIBackend
    from lim_sglang.programs.sglang_backend import SglangBackend

MODELS_SHOWN = 10
"""Of a long list, enough to see what the names look like."""
LOADING = "Loading SGLang's frontend"
"""It takes seconds to import, which a user should not wait for in vain or in the dark."""


class Api(StrEnum):
    """What a server is spoken to in."""

    SGLANG = "sglang"
    """Chat completions with request ids, aborts and all of SGLang's options."""
    OPENAI = "openai"
    """Chat completions as any OpenAI-compatible server has them."""


def connect(
    url: str,
    api_key: str | None,
    console: Console,
    *,
    timeout_s: float,
    max_concurrency: int,
    thinking: bool | None = None,
    thinking_budget: int | None = None,
    api: Api = Api.SGLANG,
    model: str | None = None,
) -> "Backend":
    """The server as a frontend backend, once it is known to be there.

    Args:
        timeout_s: limit of one generation, from sending to the answer.
        max_concurrency: requests in flight; a server that says that it runs fewer gets fewer.
        thinking: on or off for models that can do both; None leaves it to the model's template.
        thinking_budget: tokens after which thoughts are closed (`thinking.py`); None: no limit.
        model: its name at a server of OpenAI's API; None: its only one.

    Raises:
        ConfigError: an option that cannot be honoured there, or no model where one must be chosen.
        ServerError: nothing answers, the key is wrong, or it speaks something else.
    """
    _refuse_options(api, model, thinking=thinking, thinking_budget=thinking_budget)
    if api is Api.OPENAI:
        return _connect_openai(
            *(url, model, api_key, console),
            timeout_s=timeout_s,
            max_concurrency=max_concurrency,
            thinking=thinking,
        )
    return _connect_sglang(
        *(url, api_key, console),
        timeout_s=timeout_s,
        max_concurrency=max_concurrency,
        thinking=thinking,
        thinking_budget=thinking_budget,
    )


def _connect_sglang(
    url: str,
    api_key: str | None,
    console: Console,
    *,
    timeout_s: float,
    max_concurrency: int,
    thinking: bool | None,
    thinking_budget: int | None,
) -> "SglangBackend":
    check_server(url, api_key)
    with Client(url, api_key=api_key) as client:
        running: int | None = client.get("/server_info").get("max_running_requests")
        check_switch(client, thinking)
    with console.status(LOADING):
        from lim_sglang.programs.sglang_backend import SglangBackend, ThinkingBudgetBackend
    create = (
        partial(ThinkingBudgetBackend, thinking_budget=thinking_budget)
        if thinking_budget
        else SglangBackend
    )
    return create(
        url,
        api_key=api_key,
        timeout_s=timeout_s,
        max_concurrency=min(max_concurrency, running or max_concurrency),
        thinking=thinking,
    )


def check_switch(client: Client, thinking: bool | None) -> None:
    """Refuse to switch thoughts on or off where the chat template of the server's model renders
    the same prompt either way.

    Raises:
        ConfigError: that is so.
        ServerError: the server does not render prompts.
    """
    if thinking is None:
        return
    messages = [{"role": "user", "content": "Do you think?"}]
    on, off = (
        client.post("/v1/tokenize", {"messages": messages, **switched(choice)})
        for choice in (True, False)
    )
    if on == off:
        raise ConfigError(
            f"--{'' if thinking else 'no-'}thinking: the chat template of the server's model has "
            "no enable_thinking to switch; leave the option out"
        )


def _refuse_options(
    api: Api, model: str | None, *, thinking: bool | None, thinking_budget: int | None
) -> None:
    if api is Api.SGLANG and model is not None:
        raise ConfigError("--model goes with --api openai: a SGLang server answers with its own")
    if api is Api.OPENAI and thinking_budget is not None:
        raise ConfigError(
            "--thinking-budget needs --api sglang: OpenAI's API cannot go on with half a turn"
        )
    if thinking is False and thinking_budget is not None:
        raise ConfigError("--thinking-budget limits thoughts that --no-thinking forbids")


def _connect_openai(
    url: str,
    model: str | None,
    api_key: str | None,
    console: Console,
    *,
    timeout_s: float,
    max_concurrency: int,
    thinking: bool | None,
) -> "OpenAIBackend":
    from lim_sglang.programs.openai_backend import OpenAIClient

    with OpenAIClient(url, api_key=api_key) as client:
        model = choose_model(model, client.models(), client.url)
    console.print(
        f"{model} by OpenAI's API, which has no top_k: one is sent only if --top-k names it",
        highlight=False,
        soft_wrap=True,
    )
    with console.status(LOADING):
        from lim_sglang.programs.openai_backend import OpenAIBackend
    return OpenAIBackend(
        url,
        model,
        api_key=api_key,
        timeout_s=timeout_s,
        max_concurrency=max_concurrency,
        thinking=thinking,
    )


def choose_model(given: str | None, listed: Sequence[str] | None, url: str) -> str:
    """The model to ask for: a given one even if it is not listed, since servers know aliases.

    Args:
        listed: what the server lists; None where it does not.

    Raises:
        ConfigError: none is given and there is not exactly one.
    """
    if given:
        return given
    if listed is None:
        raise ConfigError(f"{url} does not list its models: name one with --model")
    if len(listed) == 1:
        return listed[0]
    names = ", ".join(listed[:MODELS_SHOWN]) + (", …" if len(listed) > MODELS_SHOWN else "")
    raise ConfigError(
        f"{url} has {len(listed)} models: choose one with --model"
        + (f" from {names}" if names else "")
    )
