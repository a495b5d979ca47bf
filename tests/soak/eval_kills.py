"""Kill `lim eval` and its server at random moments: each sample must be there once at the end.

`python -m tests.soak.eval_kills` kills the command 20 times and a fake server 5 times. With `--url`
the samples come from a real server, which is not killed.
"""

import argparse
import json
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.fakes.sglang_server import FakeServer, eventually
from tests.fakes.sums import answering, comparable, keys, rows, write_sums
from tests.forked_commands import Command, Forker, forking

NUM_SAMPLES = 4
SAMPLES_BETWEEN = 8
"""Most samples that begin before a kill."""
QUESTIONS_A_KILL = 4
"""Questions of the run for each kill, so that the run does not end before the last kill."""
PACE_S = 0.01
"""Time that the fake server takes for each of seven tokens."""
START_S = 0.4
"""Most time from the start of a command to a kill that no sample precedes."""
WAIT_S = 300.0


@dataclass
class KillReport:
    """Figures of a soak."""

    seed: int
    command_kills: int = 0
    server_kills: int = 0
    torn_lines: int = 0
    """Halves of lines that were appended to the file after a kill, as a torn write leaves them."""
    samples_after: list[int] = field(default_factory=list)
    """Complete lines after each kill."""
    samples: int = 0
    lost: int = 0
    doubled: int = 0
    changed: int = 0
    """Samples that differ from those of a run that nobody killed; fake server only."""
    generated_twice: int = 0
    """Requests of the fake server beyond one a sample."""
    seconds: float = 0.0

    @property
    def is_clean(self) -> bool:
        """True if no sample was lost, doubled or changed."""
        return not (self.lost or self.doubled or self.changed)


class Soak:
    """One run in a folder, begun and killed again and again."""

    def __init__(self, forker: Forker, folder: Path, seed: int, url: str | None = None) -> None:
        """Begin nothing yet.

        Args:
            url: a real server; None: fake ones.
        """
        self.report = KillReport(seed)
        self.out = folder / "run"
        self._forker = forker
        self._folder = folder
        self._random = random.Random(seed)
        self._url = url
        self._fake: FakeServer | None = None
        self._requests_before = 0

    def run(self, command_kills: int, server_kills: int) -> KillReport:
        """Kill as often as asked, in a random order; then let the run end, and compare."""
        began_s = time.monotonic()
        kills = [self._kill_command] * command_kills + [self._kill_server] * server_kills
        self._random.shuffle(kills)
        self._questions = write_sums(self._folder, QUESTIONS_A_KILL * len(kills) + 4, "sums")
        try:
            for kill in kills:
                kill()
                self._check_and_tear()
            self._end()
        finally:
            if self._fake:
                self._fake.stop()
        self.report.seconds = round(time.monotonic() - began_s, 1)
        return self.report

    def _words(self, out: Path, concurrency: int) -> list[str]:
        how = ["--samples", str(NUM_SAMPLES), "--seed", "100", "--max-tokens", "16"]
        where = ["--out", str(out), "--url", self._url or self._serve(), "--concurrency"]
        return ["eval", f"file:{self._questions}:integer", *how, *where, str(concurrency)]

    def _serve(self) -> str:
        if self._fake is None:
            self._fake = FakeServer(answering(PACE_S))
            self._fake.start()
        return self._fake.url

    def _start(self, words: list[str]) -> Command:
        return self._forker.start(Path(tempfile.mkdtemp(dir=self._folder)), *words)

    def _start_and_wait(self) -> Command:
        """Start the command and wait for a random moment: soon after its start, or after some more
        samples have begun or, from a real server, are stored.
        """
        command = self._start(self._words(self.out, concurrency=2))
        if self._random.random() < 0.3:
            time.sleep(self._random.uniform(0, START_S))
            return command
        count: Callable[[], int] = self._num_stored
        if fake := self._fake:
            count = lambda: len(fake.requests)  # noqa: E731
        wanted = count() + self._random.randrange(1, SAMPLES_BETWEEN)
        assert eventually(lambda: count() >= wanted, WAIT_S), command.error
        time.sleep(self._random.uniform(0, 0.1))
        return command

    def _num_stored(self) -> int:
        return len(rows(self.out)) if (self.out / "samples.jsonl").exists() else 0

    def _kill_command(self) -> None:
        command = self._start_and_wait()
        os.killpg(command.pid, signal.SIGKILL)
        code = command.wait()
        assert code == -signal.SIGKILL, f"ended before the kill with {code}: {command.error}"
        self.report.command_kills += 1

    def _kill_server(self) -> None:
        command = self._start_and_wait()
        assert self._fake, "a real server is not killed"
        self._fake.stop()
        assert command.wait() == 1, command.error
        assert f"no server answers at {self._fake.url}" in command.error
        assert "Traceback" not in command.error
        self._requests_before += len(self._fake.requests)
        self._fake = None
        self.report.server_kills += 1

    def _check_and_tear(self) -> None:
        """Check that no stored sample is doubled, and tear the next line every other time."""
        path = self.out / "samples.jsonl"
        stored = keys(self.out) if path.exists() else []
        self.report.samples_after.append(len(stored))
        self.report.doubled += len(stored) - len(set(stored))
        if stored and self._random.random() < 0.5:
            content = path.read_bytes()
            line = content.splitlines(keepends=True)[-1]
            path.write_bytes(
                content[: content.rindex(b"\n") + 1] + line[: self._random.randrange(1, len(line))]
            )
            self.report.torn_lines += 1

    def _end(self) -> None:
        """Let the run end, and compare it with one that nobody killed."""
        command = self._start(self._words(self.out, concurrency=32))
        assert command.wait(WAIT_S) == 0, command.error
        stored, report = keys(self.out), self.report
        num_questions = len(self._questions.read_text().splitlines())
        expected = {(str(n), i) for n in range(num_questions) for i in range(NUM_SAMPLES)}
        report.samples = len(expected)
        report.lost = len(expected - set(stored))
        report.doubled += len(stored) - len(set(stored))
        if self._fake:
            num_requests = self._requests_before + len(self._fake.requests)
            report.generated_twice = num_requests - len(expected)
            whole = self._folder / "undisturbed"
            undisturbed = self._start(self._words(whole, concurrency=32))
            assert undisturbed.wait(WAIT_S) == 0, undisturbed.error
            pairs = zip(comparable(self.out), comparable(whole), strict=True)
            report.changed = sum(one != other for one, other in pairs)


def main() -> None:
    """Run the soak and print its figures as JSON; exit code 1 if a sample was lost or doubled."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="kills of lim eval")
    parser.add_argument("--server-kills", type=int, default=5, help="kills of the fake server")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", help="a real server, which is not killed")
    given = parser.parse_args()
    with forking() as forker, tempfile.TemporaryDirectory() as folder:
        soak = Soak(forker, Path(folder), given.seed, given.url)
        report = soak.run(given.kills, 0 if given.url else given.server_kills)
    print(json.dumps(asdict(report)))  # noqa: T201 - the result of a script
    raise SystemExit(not report.is_clean)


if __name__ == "__main__":
    main()
