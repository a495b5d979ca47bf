"""The servers that a run is drawn from: found, connected, and of one mind."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lim_sglang.errors import ConfigError, ServerError
from lim_sglang.programs.http_client import check_server, normalise_url
from lim_sglang.programs.program import load_frontend
from lim_sglang.programs.schema import Access, Api
from lim_sglang.programs.sglang_backend import connect

if TYPE_CHECKING:
    from lim_sglang.programs.backend import Backend


@dataclass(frozen=True)
class Facts:
    """What a server says of itself."""

    url: str
    info: Mapping[str, Any]
    sampling_defaults: Mapping[str, Any] = field(default_factory=dict)
    """That the model's makers recommend."""
    concurrency: int = 64
    """Requests that it is given at once."""


@dataclass(frozen=True)
class Connection:
    """A server that answers."""

    facts: Facts
    backend: "Backend"


def split_urls(texts: Sequence[str]) -> tuple[str, ...]:
    """The addresses in some texts, each of which may hold several, between spaces or commas.

    Raises:
        ConfigError: there is none, or one twice.
        ServerError: one is no address.
    """
    urls = [normalise_url(url) for text in texts for url in re.split(r"[\s,]+", text) if url]
    if not urls:
        raise ConfigError("no server is named: give --url or LIM_URL an address, or use --serve")
    twice = {url for url in urls if urls.count(url) > 1}
    if twice:
        raise ConfigError(f"{', '.join(sorted(twice))} is named twice: name each server once")
    return tuple(urls)


@contextmanager
def connected(
    urls: Sequence[str], access: Access, console: Console
) -> Iterator[tuple[Connection, ...]]:
    """Connections to all servers, until the block ends.

    Raises:
        ConfigError: an option that the API does not take.
        ServerError: a server does not answer; all that do not are named.
    """
    if access.api is Api.SGLANG:
        _check_all(urls, access.api_key)
    with ExitStack() as stack:
        connections = []
        for url in urls:
            backend = connect(replace(access, url=url), console)
            stack.callback(backend.close)
            defaults = backend.sampling_defaults()
            facts = Facts(url, backend.server_info(), defaults, backend.limiter.total)
            connections.append(Connection(facts, backend))
        load_frontend(console)
        yield tuple(connections)


def _check_all(urls: Sequence[str], api_key: str | None) -> None:
    """Before SGLang is loaded, which takes seconds."""
    problems = []
    for url in urls:
        try:
            check_server(url, api_key)
        except ServerError as error:
            problems.append(str(error))
    if problems:
        raise ServerError("\n".join(problems))
