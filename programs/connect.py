"""From an address to a frontend backend: quick to fail, slow only where SGLang is imported."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lim_sglang.errors import ConfigError
from lim_sglang.programs.chat import switched
from lim_sglang.programs.http_client import Client, check_server
from lim_sglang.programs.schema import Access, Api

if TYPE_CHECKING:
    from lim_sglang.programs.backend import Backend
    from lim_sglang.programs.openai_backend import OpenAIBackend
    from lim_sglang.programs.sglang_backend import SglangBackend

MODELS_SHOWN = 10
"""Of a long list, enough to see what the names look like."""
LOADING = "Loading SGLang's frontend"
"""It takes seconds to import, which a user should not wait for in vain or in the dark."""


def connect(access: Access, console: Console) -> "Backend":
    """Connect to a server, once it is known to be there.

    Raises:
        ConfigError: an option that cannot be honoured there, or no model where one must be chosen.
        ServerError: nothing answers, the key is wrong, or it speaks something else.
    """
    _refuse_options(access)
    return (
        _connect_openai(access, console)
        if access.api is Api.OPENAI
        else _connect_sglang(access, console)
    )


def _connect_sglang(access: Access, console: Console) -> "SglangBackend":
    check_server(access.url, access.api_key)
    with Client(access.url, api_key=access.api_key) as client:
        running: int | None = client.get("/server_info").get("max_running_requests")
        check_switch(client, access.thinking)
    if running:
        access = replace(access, max_concurrency=min(access.max_concurrency, running))
    with console.status(LOADING):
        from lim_sglang.programs.sglang_backend import SglangBackend, ThinkingBudgetBackend
    how: dict[str, Any] = {
        "api_key": access.api_key,
        "timeout_s": access.timeout_s,
        "max_concurrency": access.max_concurrency,
        "thinking": access.thinking,
    }
    if access.thinking_budget:
        return ThinkingBudgetBackend(access.url, thinking_budget=access.thinking_budget, **how)
    return SglangBackend(access.url, **how)


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


def _refuse_options(access: Access) -> None:
    if access.api is Api.SGLANG and access.model is not None:
        raise ConfigError("--model goes with --api openai: a SGLang server answers with its own")
    if access.api is Api.OPENAI and access.thinking_budget is not None:
        raise ConfigError(
            "--thinking-budget needs --api sglang: OpenAI's API cannot go on with half a turn"
        )
    if access.thinking is False and access.thinking_budget is not None:
        raise ConfigError("--thinking-budget limits thoughts that --no-thinking forbids")


def _connect_openai(access: Access, console: Console) -> "OpenAIBackend":
    from lim_sglang.programs.openai_backend import OpenAIClient

    with OpenAIClient(access.url, api_key=access.api_key) as client:
        model = choose_model(access.model, client.models(), client.url)
    console.print(
        f"{model} by OpenAI's API, which has no top_k: one is sent only if --top-k names it",
        highlight=False,
        soft_wrap=True,
    )
    with console.status(LOADING):
        from lim_sglang.programs.openai_backend import OpenAIBackend
    return OpenAIBackend(
        access.url,
        model,
        api_key=access.api_key,
        timeout_s=access.timeout_s,
        max_concurrency=access.max_concurrency,
        thinking=access.thinking,
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
