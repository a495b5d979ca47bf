"""Drawing a run: what comes of its jobs is stored by one writer, in the order in which it comes."""

from collections.abc import Callable, Sequence
from contextlib import closing

from lim_sglang.evals.dispatch import Event, Server, ServerLost, stream
from lim_sglang.evals.grade import Grader
from lim_sglang.evals.jobs import Job
from lim_sglang.evals.records import Failure
from lim_sglang.evals.store import RunFolder


def run_jobs(
    jobs: Sequence[Job],
    servers: Sequence[Server],
    *,
    grader: Grader,
    folder: RunFolder,
    in_flight: int,
    on_event: Callable[[Event], object] = lambda _: None,
) -> None:
    """Draw, grade and store.

    Args:
        in_flight: samples of one question that are drawn at the same time.
        on_event: told of samples and failures once they are safe, and of servers that are gone.

    Raises:
        LimError: all servers are gone or the disk refuses; what was finished before is stored.
    """
    with closing(stream(jobs, servers, grader, in_flight=in_flight)) as events:
        for event in events:
            if isinstance(event, Failure):
                folder.append_failure(event)
            elif not isinstance(event, ServerLost):
                folder.append(*event)
            on_event(event)
