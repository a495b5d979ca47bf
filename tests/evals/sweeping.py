"""`lim sweep` with a fake in place of each server. As a script, the command: FOLDER WORDS…, where
the folder says how servers behave, and is told of each that starts and of each that ends.
"""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from rich.console import Console

from lim_sglang.errors import ServerError
from lim_sglang.evals.serving import ServerSpec
from tests.evals.evaluating import Done, answering, asked
from tests.fakes.sglang_server import FakeServer
from tests.forked_commands import Command, Forker

MANNERS_FILE = "manners.json"
STARTS_FILE = "starts"
ENDS_FILE = "ends"


@dataclass(frozen=True)
class Manners:
    """How the servers of a sweep behave; a server is meant by a part of its name."""

    no_start: tuple[str, ...] = ()
    """These do not start."""
    lives: dict[str, int] = field(default_factory=dict)
    """These are gone after so many answers."""
    refuses: tuple[int, ...] = ()
    """Questions that no server answers."""
    pace_s: float = 0.0
    """Before each of seven tokens."""


@dataclass
class LimServer(FakeServer):
    """One that shows how it decodes."""

    spec: ServerSpec = field(default_factory=lambda: ServerSpec("tiny"))

    def _about(self) -> dict[str, Any]:
        flags = {name.removeprefix("--lim-"): text for name, text in self.spec.lim_flags.items()}
        budget = int(flags.get("budget", 2048))
        lim = {"config": {"policy": flags["policy"], "budget": budget}, "roles": ["full"]}
        return super()._about() | {
            "model_path": self.spec.model,
            "max_running_requests": 256,
            "internal_states": [{"lim": lim}],
        }


@contextmanager
def fake_serving(folder: Path, spec: ServerSpec, _: Console, log: Path) -> Iterator[str]:
    """In place of `serving`."""
    manners = Manners(**json.loads((folder / MANNERS_FILE).read_text()))
    name = f"{spec} {' '.join(spec.sglang_options)}"
    _note(folder / STARTS_FILE, name)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("CUDA out of memory\n")
    if any(part in name for part in manners.no_start):
        raise ServerError(f"it ended with code 1 (log: {log})\n{log.read_text()}")
    lives = next((lives for part, lives in manners.lives.items() if part in name), None)
    fake = LimServer(lambda body: answer(fake, manners, lives, body), spec=spec)
    fake.start()
    try:
        yield fake.url
    finally:
        fake.stop()
        _note(folder / ENDS_FILE, name)


def answer(fake: FakeServer, manners: Manners, lives: int | None, body: dict[str, Any]) -> Any:
    """What a server says, while it lives."""
    if lives is not None and len(fake.requests) > lives:
        threading.Thread(target=fake.kill).start()
        threading.Event().wait(1.0)
    if asked(body) in manners.refuses:
        return 400, {"message": "the prompt is too long"}
    return answering(manners.pace_s)(body)


def _note(file: Path, line: str) -> None:
    with file.open("a") as lines:
        lines.write(f"{line}\n")


@dataclass(frozen=True)
class Sweeps:
    """Runs the command in a folder, again and again."""

    forker: Forker
    folder: Path

    @property
    def file(self) -> Path:
        """The sweep's."""
        return self.folder / "sums.toml"

    @property
    def out(self) -> Path:
        """Of the runs."""
        return self.folder / "runs"

    def start(self, *words: str, manners: Manners | None = None) -> Command:
        """Begin it; without words, all of the file."""
        self.forget_starts()
        (self.folder / MANNERS_FILE).write_text(json.dumps(asdict(manners or Manners())))
        place = ["sweep", str(self.file), "--out", str(self.out)]
        streams = Path(mkdtemp(dir=self.folder))
        return self.forker.start(streams, __file__, str(self.folder), *place, *words)

    def run(self, *words: str, manners: Manners | None = None) -> Done:
        """Wait for its end."""
        command = self.start(*words, manners=manners)
        code = command.wait()
        assert "Traceback" not in command.error, command.error
        return Done(code, command.output, command.error)

    @property
    def starts(self) -> list[str]:
        """Servers that were started, each time the last command did it."""
        return self._lines(STARTS_FILE)

    @property
    def ends(self) -> list[str]:
        """Servers that it ended."""
        return self._lines(ENDS_FILE)

    def forget_starts(self) -> None:
        """As if no server had ever been started."""
        for name in (STARTS_FILE, ENDS_FILE):
            (self.folder / name).unlink(missing_ok=True)

    def _lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []


def main() -> None:
    """Be `lim`, with fakes for servers."""
    from lim_sglang import cli
    from lim_sglang.evals import sweeping

    folder = Path(sys.argv[1])
    serve = partial(fake_serving, folder)
    sweeping.run_sweep = partial(sweeping.run_sweep, serve=serve)  # type: ignore[assignment]
    sys.argv = ["lim", *sys.argv[2:]]
    cli.main()


if __name__ == "__main__":
    main()
