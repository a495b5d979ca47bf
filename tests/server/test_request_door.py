"""The door: HTTP bodies and answers in a small application, and requests on the real CPU server."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Annotated, Any

import httpx
import pytest
from fastapi import Body, FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, model_validator
from starlette.background import BackgroundTask
from starlette.middleware import Middleware

from lim_sglang import request_door
from lim_sglang.request_door import (
    RequestDoor,
    anthropic_error,
    check_detokenized,
    check_incoming,
    checked_conversion,
    shaped_error,
)

ABORTED = {"type": "abort", "message": "too long", "status_code": 400}


class Careless(BaseModel):
    """A body whose validator takes any value for an object."""

    value: Any

    @model_validator(mode="before")
    @classmethod
    def look(cls, values: Any) -> Any:
        """Read a key of the value."""
        values["value"].get("key")
        return values


def application() -> FastAPI:
    """Return an application with the door and routes that answer as SGLang's do."""
    app = FastAPI()
    app.user_middleware.append(Middleware(RequestDoor))

    @app.post("/echo")
    async def echo(body: Annotated[Any, Body()]) -> Any:
        return body

    @app.post("/v1/careless")
    async def careless(_body: Careless) -> str:
        return "read"

    @app.post("/v1/broken")
    async def broken() -> None:
        raise TypeError("a defect of the server")

    @app.post("/separate_reasoning")
    async def separate() -> None:
        raise ValueError("no such parser")

    @app.post("/v1/flat")
    async def flat() -> JSONResponse:
        body = {"object": "error", "message": "no", "type": "BadRequest", "param": "n", "code": 400}
        return JSONResponse(body, 400)

    @app.post("/generate")
    async def generate() -> JSONResponse:
        return JSONResponse({"error": {"message": "no"}}, 400)

    @app.post("/v1/messages")
    async def messages() -> JSONResponse:
        return JSONResponse(
            {"type": "error", "error": {"type": "not_found_error", "message": "no"}}, 404
        )

    @app.post("/late")
    async def late() -> StreamingResponse:
        def fail() -> None:
            raise AttributeError("is_single")

        events = iter(['data: {"error": {"message": "no"}}\n\n', "data: [DONE]\n\n"])
        background = BackgroundTask(fail)
        return StreamingResponse(events, media_type="text/event-stream", background=background)

    @app.post("/stream")
    async def stream(events: Annotated[list[Any], Body()]) -> StreamingResponse:
        async def each() -> AsyncIterator[str]:
            for event in events:
                yield f"data: {json.dumps(event)}\n\n"

        return StreamingResponse(each(), media_type="text/event-stream")

    return app


@pytest.fixture(scope="module")
def client() -> "Caller":
    """Return a client of the application."""
    return Caller(application())


class Caller:
    """A synchronous client of an ASGI application in this process."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    def post(
        self, path: str, body: Any, kind: str = "application/json", *, raises: bool = False
    ) -> httpx.Response:
        """Send bytes as they are, anything else as JSON; raise what the application raises."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()

        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self._app, raise_app_exceptions=raises)
            async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
                return await client.post(path, content=content, headers={"content-type": kind})

        return asyncio.run(send())


def test_a_body_that_can_be_read_arrives_as_it_is(client: Caller) -> None:
    body = {"text": "a\U0001f600b", "list": [1.5, None, {"a": []}]}
    assert client.post("/echo", body).json() == body


@pytest.mark.parametrize("path", ["/echo", "/v1/flat", "/v1/messages"])
@pytest.mark.parametrize("body", [rb'{"a": "\ud83d"}', b"[" * 100_000], ids=["half", "deep"])
def test_a_body_that_cannot_be_read_is_a_400_with_an_error_object(
    client: Caller, path: str, body: bytes
) -> None:
    answer = client.post(path, body)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert "the body" in answer.json()["error"]["message"]


def test_an_error_after_the_answer_leaves_the_connection_alone(
    client: Caller, caplog: pytest.LogCaptureFixture
) -> None:
    answer = client.post("/late", {}, raises=True)
    assert answer.status_code == 400
    assert "an error after the answer to /late" in caplog.text
    with pytest.raises(TypeError, match="a defect"):
        client.post("/v1/broken", {}, raises=True)


def test_a_body_over_the_limit_is_a_413(client: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_door, "MAX_BODY_BYTES", 10)
    assert client.post("/echo", b'"' + b"a" * 7 + b'"').status_code == 200
    assert client.post("/echo", b'"' + b"a" * 9 + b'"').status_code == 413


def test_a_value_that_a_validator_trips_over_is_a_400(client: Caller) -> None:
    answer = client.post("/v1/careless", {"value": 5})
    assert answer.status_code == 400
    assert "the request cannot be read" in answer.json()["error"]["message"]


def test_a_parser_that_does_not_exist_is_a_400(client: Caller) -> None:
    answer = client.post("/separate_reasoning", {})
    assert answer.status_code == 400
    assert "no such parser" in answer.json()["error"]["message"]


def test_a_defect_of_a_route_stays_a_500(client: Caller) -> None:
    assert client.post("/v1/broken", {}).status_code == 500


def test_errors_have_openais_object_beside_sglangs_fields(client: Caller) -> None:
    error = {"message": "no", "type": "invalid_request_error", "param": "n", "code": 400}
    answer = client.post("/v1/flat", {}).json()
    assert answer["error"] == error
    assert (answer["message"], answer["type"]) == ("no", "BadRequest")
    assert client.post("/generate", {}).json()["error"] == {**error, "param": None}


def test_an_error_names_no_place_in_the_code() -> None:
    place = '\n  File "/sglang/http_server.py", line 12, in generate\n    POST /generate'
    told = "1 validation error:\n  {'type': 'int_parsing'}"
    for payload in ({"message": told + place}, {"error": {"message": told + place}}):
        assert shaped_error(payload, 400, "/generate")["error"]["message"] == told
        assert "File" not in json.dumps(shaped_error(payload, 400, "/v1/messages"))


def test_anthropics_routes_keep_their_shape(client: Caller) -> None:
    answer = client.post("/v1/messages", {})
    expected = {"type": "error", "error": {"type": "not_found_error", "message": "no"}}
    assert (answer.status_code, answer.json()) == (404, expected)


@pytest.mark.parametrize(
    ("first", "status"),
    [
        ({"error": {"message": "no", "code": 400}}, 400),
        ({"error": {"message": "no", "type": "rate_limit_error", "code": 429}}, 429),
        ({"error": {"message": "no", "code": "odd"}}, 400),
        ({"type": "error", "error": {"type": "api_error", "message": "no"}}, 500),
        ({"text": "", "meta_info": {"finish_reason": ABORTED}}, 400),
    ],
)
def test_a_stream_that_begins_with_an_error_is_one(client: Caller, first: Any, status: int) -> None:
    answer = client.post("/stream", [first, {"text": "more"}])
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["error"]["message"] in ("no", "too long")


@pytest.mark.parametrize(
    "first",
    [
        {"text": "a", "meta_info": {"finish_reason": None}},
        {"text": "", "meta_info": {"finish_reason": {"type": "abort", "message": "by user"}}},
        {"choices": []},
        [5],
    ],
)
def test_a_stream_of_answers_passes_unchanged(client: Caller, first: Any) -> None:
    events = [first, {"error": {"message": "later", "code": 400}}]
    answer = client.post("/stream", events)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [json.loads(line[6:]) for line in answer.text.splitlines() if line]
    assert lines == events


def run(original: Any, request: Any, path: str = "/generate") -> list[Any]:
    """Collect what `check_incoming` yields for a request on a route."""

    async def collect() -> list[Any]:
        http = SimpleNamespace(url=SimpleNamespace(path=path))
        return [each async for each in check_incoming(original, "manager", request, http)]

    return asyncio.run(collect())


async def two_answers(_manager: Any, _obj: Any, _request: Any) -> AsyncIterator[int]:
    """Stand in for SGLang's `generate_request`."""
    yield 1
    yield 2


async def no_answer(_manager: Any, _obj: Any, _request: Any) -> AsyncIterator[int]:
    """Trip over a value before the first answer."""
    raise IndexError("list index out of range")
    yield 1


async def broken_answer(_manager: Any, _obj: Any, _request: Any) -> AsyncIterator[int]:
    """Fail while answers are made."""
    yield 1
    raise KeyError("a defect")


def test_answers_pass_the_door() -> None:
    assert run(two_answers, SimpleNamespace(text="a", sampling_params={"n": 2})) == [1, 2]


def test_a_refused_request_is_not_begun() -> None:
    with pytest.raises(ValueError, match="n: expected 1"):
        run(broken_answer, SimpleNamespace(text="a", sampling_params={"n": 0}))


def test_a_value_that_no_check_knows_is_still_a_bad_request() -> None:
    with pytest.raises(ValueError, match="cannot be read: IndexError"):
        run(no_answer, SimpleNamespace(text="a"))


def test_an_error_after_the_first_answer_is_the_servers() -> None:
    with pytest.raises(KeyError):
        run(broken_answer, SimpleNamespace(text="a"))


@pytest.mark.parametrize(
    ("path", "refused"),
    [("/generate", False), ("/v1/chat/completions", True), ("/invocations", True)],
)
def test_the_route_decides_how_many_logprobs_there_are(path: str, refused: bool) -> None:
    request = SimpleNamespace(text="a", top_logprobs_num=21)
    if refused:
        with pytest.raises(ValueError, match="at most 20"):
            run(two_answers, request, path)
    else:
        assert run(two_answers, request, path) == [1, 2]


def test_a_vote_that_was_sent_to_the_server_is_refused() -> None:
    with pytest.raises(ValueError, match=r"to lim proxy, .* this server$"):
        checked_conversion(pytest.fail, None, SimpleNamespace(model="majority@3"))
    route = SimpleNamespace(tokenizer_manager=SimpleNamespace(served_model_name="org/tiny"))
    with pytest.raises(ValueError, match=r"this server, org/tiny$"):
        checked_conversion(pytest.fail, route, SimpleNamespace(model="Early-Stop @3"))


def test_an_error_in_the_reading_of_a_request_is_blamed_on_it() -> None:
    with pytest.raises(ValueError, match="cannot be read: AttributeError"):
        checked_conversion(lambda _, request: request.messages, None, 5)
    assert checked_conversion(lambda _, value, more: value + more, None, 5, more=1) == 6


@pytest.mark.parametrize(("error", "status"), [(ValueError("a role"), 400), (OSError("x"), 500)])
def test_anthropics_routes_blame_a_refusal_on_the_request(error: Exception, status: int) -> None:
    def answer(*arguments: Any, **words: Any) -> tuple[Any, ...]:
        return (*arguments, *words.values())

    words = {"error_type": "api_error", "message": "Internal server error"}
    try:
        raise error
    except type(error):
        found = anthropic_error(answer, "route", status_code=500, **words)
    assert found[1] == status
    assert ("a role" in found) is (status == 400)
    assert anthropic_error(answer, "route", status_code=404, **words)[1] == 404


@pytest.mark.parametrize(
    ("tokens", "refused"), [([0, 9], 0), ([[9], []], 0), ([-1], 1), ([10], 1), ([[5], [10**9]], 1)]
)
def test_ids_that_are_made_text_lie_in_the_vocabulary(tokens: list[Any], refused: int) -> None:
    model = SimpleNamespace(vocab_size=10)
    route = SimpleNamespace(tokenizer_manager=SimpleNamespace(model_config=model))
    with pytest.raises(ValueError, match="tokens has") if refused else nullcontext():
        check_detokenized(route, SimpleNamespace(tokens=tokens))
