"""Which servers a run is drawn from: what names them, and what is wrong with them."""

import pytest
from rich.console import Console

from lim_sglang.errors import ConfigError, ServerError
from lim_sglang.evals.servers import connected, split_urls
from lim_sglang.programs.schema import Access


@pytest.mark.parametrize(
    "texts",
    [
        ["http://a:1", "http://b:2"],
        ["http://a:1 http://b:2"],
        ["a:1,b:2/"],
        ["a:1, b:2"],
        ["a:1,", " b:2\n"],
    ],
)
def test_addresses_come_one_by_one_or_together(texts: list[str]) -> None:
    assert split_urls(texts) == ("http://a:1", "http://b:2")


@pytest.mark.parametrize("texts", [["http://a:1", "a:1/"], ["a:1 b:2 a:1"]])
def test_a_server_that_is_named_twice_is_no_second_server(texts: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"http://a:1 is named twice"):
        split_urls(texts)


@pytest.mark.parametrize("texts", [[], [" , "]])
def test_no_server_at_all_is_refused(texts: list[str]) -> None:
    with pytest.raises(ConfigError, match="no server is named"):
        split_urls(texts)


def test_what_is_no_address_is_refused() -> None:
    with pytest.raises(ServerError, match="'ftp://a' is no server address"):
        split_urls(["http://b", "ftp://a"])


def test_all_servers_that_do_not_answer_are_named_at_once() -> None:
    urls = ["http://127.0.0.1:9", "http://127.0.0.1:7"]
    with pytest.raises(ServerError) as caught, connected(urls, Access(), Console()):
        pass
    assert all(f"no server answers at {url}" in str(caught.value) for url in urls)
