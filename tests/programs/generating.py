"""One generation at an endpoint, as SGLang's frontend asks for it."""

from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

from lim_sglang.programs.backend import IN_FLIGHT, SEED, InFlightSample
from lim_sglang.programs.chat import Generation
from lim_sglang.programs.sglang_backend import SglangBackend

PARAMS = SimpleNamespace(max_new_tokens=64, temperature=0.6, top_p=0.95, top_k=20, stop=[])
MESSAGES = [{"role": "user", "content": "What is 17 * 23?"}]


def generate(
    backend: SglangBackend, in_flight: InFlightSample | None = None, seed: int | None = None
) -> Generation:
    """Wait for it."""
    state = SimpleNamespace(messages_=MESSAGES, variables={SEED: seed, IN_FLIGHT: in_flight})
    text, found = backend.generate(state, PARAMS)
    assert text == found.text
    return found


def begin(backend: SglangBackend, in_flight: InFlightSample) -> Future[Generation]:
    """The same, in a thread of its own."""
    with_thread = ThreadPoolExecutor(1)
    future = with_thread.submit(generate, backend, in_flight)
    with_thread.shutdown(wait=False)
    return future
