"""Runs on their servers, with fakes for both: what an error costs, and what it does not."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from lim_sglang.errors import DataError, LimError, ServerError
from lim_sglang.evals import sweeping as sweeping_module
from lim_sglang.evals.run_config import Method
from lim_sglang.evals.run_store import Failure
from lim_sglang.evals.runner import Evaluation, TaskQuestions
from lim_sglang.evals.sweep import SweepRun, SweepServer
from lim_sglang.evals.sweeping import Failed, Standing, look, run_sweep
from lim_sglang.evals.tasks import Question, find_task
from lim_sglang.programs.schema import Access
from lim_sglang.server import ServerSpec
from tests.evals.stored import begin, graded

ACCESS = Access(timeout_s=5.0, max_concurrency=3)
LIM = {"policy": "lessismore", "budget": 64}


def runs(model: str = "Org/One", tasks: Sequence[str] = ("math500", "aime24")) -> list[SweepRun]:
    server = SweepServer(model, f"/models/{model}", LIM, ("--dtype", "half"))
    return [SweepRun(server, task, Method(2), {"max_tokens": 9}, 4) for task in tasks]


def missing(runs: Sequence[SweepRun], out: Path) -> list[Standing]:
    return [Standing(run, out / run.folder, None, None) for run in runs]


class World:
    """Servers that are started and ended, and runs that are drawn from them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[Any] = []
        self.errors: dict[str, LimError | BaseException] = {}
        """By model or task: what goes wrong there."""
        self.failures: tuple[Failure, ...] = ()
        self.shown = io.StringIO()
        monkeypatch.setattr(sweeping_module, "run_evaluation", self._evaluate)

    def sweep(self, *standings: Standing) -> list[Failed]:
        """Draw these."""
        console = Console(file=self.shown, width=200)
        return run_sweep(standings, ACCESS, console, data_dir=Path("data"), serve=self._serve)

    @contextmanager
    def _serve(self, spec: ServerSpec, _: Console, log: Path) -> Iterator[str]:
        self.events.append((spec, log.name))
        if error := self.errors.get(str(spec.model)):
            raise error
        try:
            yield f"http://{spec.model}"
        finally:
            self.events.append("end")

    def _evaluate(
        self, evaluation: Evaluation, urls: Sequence[str], access: Access, _: Console
    ) -> list[Any]:
        self.events.append((evaluation, tuple(urls), access))
        if error := self.errors.get(evaluation.tasks[0]):
            raise error
        return [SimpleNamespace(summary=None, outcome=SimpleNamespace(failures=self.failures))]

    @property
    def course(self) -> list[str]:
        """Models that are served, tasks that are drawn, and the ends of servers."""
        return [self._name(event) for event in self.events]

    def _name(self, event: Any) -> str:
        if isinstance(event, tuple) and isinstance(event[0], ServerSpec):
            return str(event[0].model)
        return event if isinstance(event, str) else event[0].tasks[0]


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    return World(monkeypatch)


def test_a_server_has_what_the_file_says_and_a_run_what_lim_eval_would_be_told(
    world: World, tmp_path: Path
) -> None:
    run, _ = runs()
    assert world.sweep(*missing([run], tmp_path)) == []
    flags = {"--lim-policy": "lessismore", "--lim-budget": "64"}
    evaluation = Evaluation(
        ("math500",),
        Method(2),
        {"max_tokens": 9},
        limit=4,
        data_dir=Path("data"),
        out=tmp_path / "math500-Org-One-lessismore-64",
        retry_failed=True,
    )
    assert world.events == [
        (ServerSpec("/models/Org/One", flags, ("--dtype", "half")), "Org-One-lessismore-64.log"),
        (evaluation, ("http:///models/Org/One",), ACCESS),
        "end",
    ]


def test_an_error_of_one_run_costs_that_run(world: World, tmp_path: Path) -> None:
    error = world.errors["math500"] = DataError("another lim eval is writing there")
    failed = world.sweep(*missing(runs(), tmp_path))
    assert failed == [Failed("Org/One lessismore-64 math500", error)]
    assert world.course == ["/models/Org/One", "math500", "aime24", "end"]
    assert "math500: another lim eval is writing there" in world.shown.getvalue()


def test_a_server_that_is_gone_costs_what_was_left_of_it(world: World, tmp_path: Path) -> None:
    error = world.errors["math500"] = ServerError("no server answers")
    standings = missing([*runs(), *runs("Org/Two", ["aime24"])], tmp_path)
    failed = world.sweep(*standings)
    name = "Org/One lessismore-64 math500, and 1 more on its server"
    assert failed == [Failed(name, error)]
    expected = ["/models/Org/One", "math500", "end", "/models/Org/Two", "aime24", "end"]
    assert world.course == expected


def test_a_server_that_does_not_start_costs_its_runs(world: World, tmp_path: Path) -> None:
    error = world.errors["/models/Org/One"] = ServerError("it ended with code 1\nout of memory")
    standings = missing([*runs(), *runs("Org/Two", ["aime24"])], tmp_path)
    assert [each.error for each in world.sweep(*standings)] == [error]
    assert world.course == ["/models/Org/One", "/models/Org/Two", "aime24", "end"]
    assert "out of memory" in world.shown.getvalue()


def test_samples_that_failed_are_told_with_the_last_reason(world: World, tmp_path: Path) -> None:
    world.failures = (Failure("q", 0, "HTTP 400"), Failure("q", 1, "HTTP 503 [red]"))
    failed = world.sweep(*missing(runs(), tmp_path))
    assert [str(each.error) for each in failed] == [
        "2 samples failed, the last with: HTTP 503 [red]"
    ] * 2
    assert "HTTP 503 [red]" in world.shown.getvalue()


def test_ctrl_c_ends_the_server_and_the_sweep(world: World, tmp_path: Path) -> None:
    world.errors["math500"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        world.sweep(*missing([*runs(), *runs("Org/Two")], tmp_path))
    assert world.course == ["/models/Org/One", "math500", "end"]


def test_folders_that_are_damaged_or_of_other_settings_are_named_all_at_once(
    tmp_path: Path,
) -> None:
    one, two = runs()
    with begin(tmp_path / one.folder) as folder:
        folder.append(graded())
    (tmp_path / two.folder).mkdir()
    (tmp_path / two.folder / "run.json").write_text("{")
    with pytest.raises(DataError) as caught:
        look([one, two], tmp_path, {})
    text = str(caught.value)
    assert f"the run in {tmp_path / one.folder} was made with other settings:" in text
    assert "\n  - lim.config.budget was 256 and is now 64" in text
    assert "\n  - sampling was null and is now" in text
    assert f"{tmp_path / two.folder / 'run.json'} is no record of a run" in text
    assert text.endswith("name another folder with --out")


@pytest.mark.parametrize(("program", "num_wanted"), [("majority", 6), ("early_stop", None)])
def test_so_many_samples_are_wanted_unless_a_program_stops_by_itself(
    program: str, num_wanted: int | None, tmp_path: Path
) -> None:
    questions = tuple(Question(str(n), f"What is {n} + 1?", str(n + 1)) for n in range(3))
    asked = TaskQuestions(find_task("math500"), questions, "digest", "here")
    [run] = runs(tasks=["math500"])
    run = replace(run, method=Method(2, program))
    known = {("math500", 4): asked}
    assert look([run], tmp_path, known) == [Standing(run, tmp_path / run.folder, None, num_wanted)]
    assert look([run], tmp_path, {})[0].num_wanted is None
