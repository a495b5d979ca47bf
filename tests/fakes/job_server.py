"""A server of the scheduler whose samples are known in advance, without HTTP."""

import threading
from dataclasses import replace

from lim_sglang.config import Drafts
from lim_sglang.errors import ServerError
from lim_sglang.evals.run_store import Key
from lim_sglang.evals.scheduler import Job, SampleResult, SampleSink, Server
from lim_sglang.programs.schema import SampleState
from tests.builders import make_sample


class JobServer:
    """Answers 1 to every question, and is gone after `lives` samples."""

    def __init__(
        self, url: str = "http://here", *, lives: int = 10_000, drafts: bool = False
    ) -> None:
        self.url = url
        self.lives = lives
        self._drafts = drafts
        self.asked: list[Key] = []
        self.num_checked = 0
        self.num_closed = 0
        self.begin = threading.Event()
        """Jobs wait for this event before they start."""
        self.begin.set()
        self.end = threading.Event()
        """Jobs of a server that is gone wait for this event before they end."""
        self.end.set()
        self._lock = threading.Lock()

    def sample(self, job: Job, deliver: SampleSink) -> None:
        self.begin.wait(10)
        results = []
        for index in job.indices:
            with self._lock:
                self.asked.append((job.question.question_id, index))
                self.lives -= 1
                failed = self.lives < 0
            state = SampleState.FAILED if failed else SampleState.FINISHED
            sample = replace(make_sample(index, "1", state), text=r"\boxed{1}")
            results.append(SampleResult(sample))
            if (failed or not job.all_or_nothing) and not deliver(results[-1]):
                self.end.wait(10)
                return
        if job.all_or_nothing:
            deliver(*results)

    def check(self) -> None:
        self.num_checked += 1
        if self.lives < 0:
            raise ServerError(f"no server answers at {self.url}")

    def close(self) -> None:
        self.num_closed += 1

    def drafts(self) -> Drafts | None:
        """Count as if each sample had a cycle of 8 drafts, 6 accepted; nothing once it is gone."""
        count, is_gone = len(self.asked), self.lives < 0
        found = Drafts(count, 8 * count, 6 * count, {"6": count})
        return found if self._drafts > is_gone else None

    def as_server(self, concurrency: int = 2) -> Server:
        return Server(
            self.url, self.sample, self.check, self.close, concurrency, drafts=self.drafts
        )


class FailingServer(JobServer):
    """Fails samples after `lives`, but stays alive."""

    def check(self) -> None:
        self.num_checked += 1
