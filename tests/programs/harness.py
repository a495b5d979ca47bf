"""A program, or a single generation, on a fake server in one call."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing, contextmanager
from typing import Any, TypeVar

from lim_sglang.programs.backend import Backend, InFlightSample
from lim_sglang.programs.chat import Generation
from lim_sglang.programs.program import PROGRAMS, Outcome, Program, run_program
from lim_sglang.programs.sampler import SamplingRun
from lim_sglang.programs.schema import Access, Sample, Sampling, SamplingRequest, ask_messages
from lim_sglang.programs.sglang_backend import SglangBackend
from tests.fakes.sglang_server import Answerer, FakeServer, eventually

MAJORITY = PROGRAMS["majority"]
MESSAGES = [{"role": "user", "content": "What is 17 * 23?"}]
SAMPLING = Sampling(max_tokens=64, temperature=0.6, top_p=0.95, top_k=20)
WAIT_S = 10.0
HANGS_S = 30.0

T = TypeVar("T")


def boxed(answer: str) -> str:
    """Return an answer as a model states it."""
    return f"\\boxed{{{answer}}}"


def request(
    parallel: int = 64, *, streamed: bool = False, seeds_honoured: bool = False, **sampling: Any
) -> SamplingRequest:
    """Return the request of one question."""
    messages = ask_messages("What is 17 * 23?")
    return SamplingRequest(messages, Sampling(**sampling), parallel, streamed, seeds_honoured)


def run_on(
    backend: Backend,
    count: int,
    on_sample: Callable[[Sample], None] = lambda _: None,
    *,
    program: Program = MAJORITY,
    streamed: bool | None = None,
    options: dict[str, Any] | None = None,
    on_begin: Callable[[SamplingRun], None] = lambda _: None,
    **asked: Any,
) -> Outcome:
    """Run a program on one question; answers are equal if their texts are.

    A run that hangs is stopped, so that its test fails.
    """
    watchdogs: list[threading.Timer] = []

    def begin(run: SamplingRun) -> None:
        watchdogs.append(threading.Timer(HANGS_S, run.stop))
        watchdogs[0].start()
        on_begin(run)

    try:
        return run_program(
            program,
            backend,
            request(streamed=program.streamed if streamed is None else streamed, **asked),
            indices=range(count),
            equivalent=str.__eq__,
            options=options,
            on_sample=on_sample,
            on_begin=begin,
        )
    finally:
        for watchdog in watchdogs:
            watchdog.cancel()


def run_at(
    fake: FakeServer, count: int, on_sample: Callable[[Sample], None] = lambda _: None, **how: Any
) -> Outcome:
    """Run a program on a backend of its own."""
    with closing(SglangBackend(Access(fake.url))) as backend:
        return run_on(backend, count, on_sample, seeds_honoured=fake.deterministic, **how)


def generate(backend: Backend, in_flight: InFlightSample | None = None) -> Generation:
    """Generate once, as the frontend asks a backend."""
    return backend.generate(MESSAGES, SAMPLING, in_flight or InFlightSample(0))


def begin(backend: Backend, in_flight: InFlightSample | None = None) -> Future[Generation]:
    """Generate once, in a thread of its own."""
    return in_thread(generate, backend, in_flight)


def in_thread(function: Callable[..., T], *arguments: Any, **options: Any) -> Future[T]:
    """Call a function in a thread that keeps no test process from its end."""
    future: Future[T] = Future()

    def call() -> None:
        try:
            future.set_result(function(*arguments, **options))
        except BaseException as error:  # noqa: BLE001 - given to the caller
            future.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    return future


def by_sample(answers: Mapping[int, Any], usual: Any = None) -> Answerer:
    """Answer each sample by its seed."""
    return lambda body: answers.get(body["seed"], usual)


def requests_by_seed(fake: FakeServer) -> Counter[int]:
    """Count the requests of each sample."""
    return Counter(body["seed"] for body in fake.requests)


def states(outcome: Outcome) -> list[str]:
    """Return the states of the samples, by index."""
    return [str(sample.state) for sample in outcome.samples]


@contextmanager
def no_thread_is_left() -> Iterator[None]:
    """Check that no thread of the frontend, a backend or a fake server outlives the block."""
    before = set(threading.enumerate())
    yield

    def left() -> list[threading.Thread]:
        # The threads of a pool wait for more work until the process ends.
        new = set(threading.enumerate()) - before
        return [thread for thread in new if not thread.name.startswith("ThreadPool")]

    assert eventually(lambda: not left()), left()
