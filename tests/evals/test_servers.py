"""Which servers a run is drawn from: what names them, and what is wrong with them."""

import pytest
from rich.console import Console

from lim_sglang.errors import LimError, ServerError
from lim_sglang.evals.servers import connected, split_urls
from lim_sglang.programs.schema import Access


@pytest.mark.parametrize(
    "texts",
    [
        ["http://a:1", "http://b:2"],
        ["http://a:1 http://b:2"],
        ["a:1,b:2/"],
        ["a:1,", " b:2\n"],
    ],
)
def test_addresses_come_one_by_one_or_together(texts: list[str]) -> None:
    assert split_urls(texts) == ("http://a:1", "http://b:2")


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["http://a:1", "a:1/"], "http://a:1 is named twice"),
        ([], "no server is named"),
        ([" , "], "no server is named"),
        (["http://b", "ftp://a"], "'ftp://a' is no server address"),
    ],
)
def test_names_of_no_server_or_of_one_server_twice_are_refused(
    texts: list[str], message: str
) -> None:
    with pytest.raises(LimError, match=message):
        split_urls(texts)


def test_all_servers_that_do_not_answer_are_named_at_once() -> None:
    urls = ["http://127.0.0.1:9", "http://127.0.0.1:7"]
    with pytest.raises(ServerError) as caught, connected(urls, Access(), Console()):
        pass
    assert all(f"no server answers at {url}" in str(caught.value) for url in urls)
