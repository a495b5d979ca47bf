"""From an address to a frontend backend: quick to fail, slow only where SGLang is imported."""

from typing import TYPE_CHECKING

from rich.console import Console

from lim_sglang.programs.client import Client, check_server

if TYPE_CHECKING:
    from lim_sglang.programs.endpoint import Endpoint


def connect(
    url: str,
    api_key: str | None,
    console: Console,
    *,
    timeout_s: float,
    max_concurrency: int,
    thinking: bool | None = None,
) -> "Endpoint":
    """The server as a frontend backend, once it is known to be there.

    Args:
        timeout_s: limit of one generation, from sending to the answer.
        max_concurrency: requests in flight at once; a server that says that it runs fewer gets
            fewer, so that no request spends its time waiting there.
        thinking: on or off for models that can do both; None leaves it to the model's template.

    Raises:
        ServerError: nothing answers, the key is wrong, or it is no SGLang server.
    """
    check_server(url, api_key)
    with Client(url, api_key=api_key) as client:
        running: int | None = client.get("/server_info").get("max_running_requests")
    # SGLang takes seconds to import, which a user should not wait for in vain or in the dark.
    with console.status("Loading SGLang's frontend"):
        from lim_sglang.programs.endpoint import Endpoint
    return Endpoint(
        url,
        api_key=api_key,
        timeout_s=timeout_s,
        max_concurrency=min(max_concurrency, running or max_concurrency),
        thinking=thinking,
    )
