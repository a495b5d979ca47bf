"""The client of OpenAI's API: its address, its key, its models."""

import pytest

from lim_sglang.errors import ServerError
from lim_sglang.programs.openai_backend import OpenAIClient, base_url
from tests.fakes.openai_server import Streamed, serving_openai


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("127.0.0.1:8000", "http://127.0.0.1:8000/v1"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1"),
        ("https://api.openai.com/v1", "https://api.openai.com/v1"),
        ("https://host/openai/v1/", "https://host/openai/v1"),
    ],
)
def test_a_bare_host_gets_the_version(given: str, expected: str) -> None:
    assert base_url(given) == expected


@pytest.mark.parametrize("models", [None, (), ("a", "b")])
def test_models_are_listed_where_the_server_does(models: tuple[str, ...] | None) -> None:
    with (
        serving_openai(lambda _: Streamed(()), models=models) as fake,
        OpenAIClient(fake.url) as client,
    ):
        assert client.models() == models


def test_a_wrong_key_is_said_and_the_right_one_is_sent() -> None:
    with serving_openai(lambda _: Streamed(()), key="right") as fake:
        with (
            OpenAIClient(fake.url, api_key="wrong") as client,
            pytest.raises(ServerError, match="refuses the API key"),
        ):
            client.models()
        with OpenAIClient(fake.url, api_key="right") as client:
            assert client.models() == ("small",)
