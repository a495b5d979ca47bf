"""One generation at an endpoint, as SGLang's frontend asks for it."""

from concurrent.futures import Future, ThreadPoolExecutor
from types import SimpleNamespace

from lim_sglang.programs.chat import Generation
from lim_sglang.programs.endpoint import Endpoint
from lim_sglang.programs.running import Running
from lim_sglang.programs.transport import RUNNING, SEED

PARAMS = SimpleNamespace(max_new_tokens=64, temperature=0.6, top_p=0.95, top_k=20, stop=[])
MESSAGES = [{"role": "user", "content": "What is 17 * 23?"}]


def generate(
    endpoint: Endpoint, running: Running | None = None, seed: int | None = None
) -> Generation:
    """Wait for it."""
    state = SimpleNamespace(messages_=MESSAGES, variables={SEED: seed, RUNNING: running})
    text, found = endpoint.generate(state, PARAMS)
    assert text == found.text
    return found


def begin(endpoint: Endpoint, running: Running) -> Future[Generation]:
    """The same, in a thread of its own."""
    with_thread = ThreadPoolExecutor(1)
    future = with_thread.submit(generate, endpoint, running)
    with_thread.shutdown(wait=False)
    return future
