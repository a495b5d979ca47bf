"""`lim eval --matrix`: the runs of a file, its mistakes, and its way from a file to tables on fake
servers, each of which is started once.
"""

import json
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count, product
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lim_sglang.config import LimConfig
from lim_sglang.errors import ConfigError, ServerError
from lim_sglang.evals import matrix as matrix_module
from lim_sglang.evals.matrix import MATRICES, MatrixRun, find_matrix, read_matrix
from lim_sglang.evals.run_config import RunConfig
from lim_sglang.launch.server import ServerSpec
from lim_sglang.policies import POLICIES
from tests.builders import TextEquivalence
from tests.fakes.sglang_server import FakeServer
from tests.fakes.sums import (
    SEED,
    Done,
    answering,
    asked,
    comparable,
    keys,
    lim,
    run_record,
    write_sums,
)

SMALL = """
sglang = ["--dtype", "bfloat16"]
[sampling]
temperature = 0.5
top_k = 20
[[tasks]]
task = "math500"
samples = 2
limit = 5
[[tasks]]
task = "aime24"
name = "contest"
samples = 8
sampling = { max_tokens = 64 }
[[servers]]
model = ["Org/One", "/models/two"]
policy = "full"
sampling = { top_k = -1 }
[[servers]]
model = "Org/One"
budget = [256, 512]
tasks = ["contest"]
sglang = ["--tp-size", "2"]
"""
LEAST = """
[[tasks]]
task = "math500"
[[servers]]
"""
"""The least that a file may say."""


def runs_of(folder: Path, text: str, **others: Any) -> list[MatrixRun]:
    path = folder / "small.toml"
    path.write_text(text)
    return [*read_matrix(path, Path("out"), **others).runs]


def problems_of(folder: Path, text: str) -> list[str]:
    """Return the problems that a file is refused for."""
    with pytest.raises(ConfigError) as caught:
        runs_of(folder, text)
    first, *lines = str(caught.value).split("\n  - ")
    assert first == f"{folder / 'small.toml'} is not a matrix of runs:"
    return lines


def test_runs_come_server_by_server_in_the_order_of_the_file(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, SMALL)
    assert [run.name for run in runs] == [
        "math500 Org/One full",
        "contest Org/One full",
        "math500 two full",
        "contest two full",
        "contest Org/One lessismore-256",
        "contest Org/One lessismore-512",
    ]
    assert [run.path.name for run in runs[1:3]] == ["contest-Org-One-full", "math500-two-full"]


def test_a_run_has_the_settings_of_its_task_and_of_its_server(tmp_path: Path) -> None:
    first, *_, last = runs_of(tmp_path, SMALL, data_dir=Path("data"))
    assert first.config == RunConfig(
        task="math500",
        num_samples=2,
        sampling={"temperature": 0.5, "top_k": -1},
        limit=5,
        data_dir=Path("data"),
        out=Path("out/math500-Org-One-full"),
        retry_failed=True,
        served=("Org/One", "--dtype", "bfloat16"),
    )
    assert (last.config.task, last.config.samples_per_question) == ("aime24", 8)
    assert last.config.sampling == {"temperature": 0.5, "top_k": 20, "max_tokens": 64}
    assert last.server.lim == {"policy": "lessismore", "budget": 512}
    assert last.server.spec == ServerSpec(
        "Org/One",
        {"--lim-config": LimConfig(budget=512).to_json()},
        ("--dtype", "bfloat16", "--tp-size", "2"),
    )


def test_a_server_without_a_model_is_the_default_one_and_other_settings_are_in_its_name(
    tmp_path: Path,
) -> None:
    text = LEAST + 'budget = 64\nlim = { ranking = "mass", select_layers = [2, 12] }\n'
    (run,) = runs_of(tmp_path, text)
    config = LimConfig(budget=64, ranking="mass", select_layers=(2, 12))
    assert run.server.spec.model is None
    assert run.server.spec.lim_flags == {"--lim-config": config.to_json()}
    assert run.name == "math500 default-model lessismore-64 ranking=mass select_layers=2,12"
    assert run.path.name.endswith("-lessismore-64-ranking-mass-select_layers-2-12")
    (named,) = runs_of(tmp_path, f'{LEAST}name = "mine"\n')
    assert named.name == "math500 mine"


@pytest.mark.parametrize(
    ("patterns", "count"),
    [
        (["contest"], 4),
        (["*One"], 4),
        (["lessismore-5*", "math500"], 3),
        (["* Org/One full"], 2),
        (["contest Org/One full"], 1),
    ],
)
def test_only_takes_runs_by_their_name_or_a_word_of_it(
    patterns: list[str], count: int, tmp_path: Path
) -> None:
    assert len(runs_of(tmp_path, SMALL, only=patterns)) == count
    with pytest.raises(ConfigError, match="matches none of these runs:\n  - math500 Org/One full"):
        runs_of(tmp_path, SMALL, only=["lessismore-51"])


def test_only_takes_the_plain_row_by_its_name_without_those_that_say_more(tmp_path: Path) -> None:
    rows = f"{LEAST}budget = 64\n[[servers]]\nbudget = 64\nlim = {{ recent_ratio = 0.5 }}\n"
    plain, other = runs_of(tmp_path, rows)
    name = plain.name.split()[-1]
    assert other.name.startswith(f"{plain.name} ")
    assert runs_of(tmp_path, rows, only=[name]) == [plain]
    assert runs_of(tmp_path, rows, only=[f"{name}*"]) == [plain, other]


def test_a_list_of_policies_stands_for_a_row_each(tmp_path: Path) -> None:
    runs = runs_of(tmp_path, f'{LEAST}policy = ["streaming", "quest"]\nbudget = [64, 128]\n')
    assert [run.server.name.split()[-1] for run in runs] == [
        *("streaming-64", "streaming-128", "quest-64", "quest-128"),
    ]
    assert runs[2].server.lim == {"policy": "quest", "budget": 64}


def test_a_server_names_a_generated_task_with_or_without_its_length(tmp_path: Path) -> None:
    tasks = "[[tasks]]\ntask = 'needle'\n[[tasks]]\ntask = 'chain'\nname = 'chain'\n"
    server = "[[servers]]\ntasks = ['{}', 'chain']\n"
    for name in ("needle", "needle:1024"):
        found = [run.name.split()[0] for run in runs_of(tmp_path, tasks + server.format(name))]
        assert found == ["needle:1024", "chain"]


def test_mistakes_of_form_are_told_at_once_with_their_keys(tmp_path: Path) -> None:
    text = """
concurency = 5
timeout_s = 0
[sampling]
max_tokens = 0
[[tasks]]
samples = "four"
limt = 3
options = { window = true }
[[servers]]
model = 5
budget = [0, 5]
sampling = { topk = 4 }
lim = 7
"""
    expected = {
        "servers.0.model.0": "must be a string, not 5",
        "servers.0.budget.0": "must be at least 1, not 0",
        "servers.0.sampling.topk": "unknown key topk; known keys: max_tokens, temperature",
        "servers.0.lim": "must be a table, not 7",
        "tasks.0.task": "missing",
        "tasks.0.samples": "must be an integer, not 'four'",
        "tasks.0.options.window.int": "must be an integer, not True",
        "tasks.0.options.window.float": "must be a number, not True",
        "tasks.0.limt": "unknown key limt; known keys: task, samples, limit, program",
        "sampling.max_tokens": "must be at least 1, not 0",
        "timeout_s": "must be at least 1, not 0",
        "concurency": "unknown key concurency; known keys: servers, tasks, sampling",
    }
    found = dict(line.split(": ", 1) for line in problems_of(tmp_path, text))
    assert found.keys() == expected.keys()
    assert [key for key, words in expected.items() if words not in found[key]] == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "[[tasks]]\ntask = 'aime99'\n[[tasks]]\ntask = 'math500'\nprogram = 'oracle'\n"
            "[[tasks]]\ntask = 'math500'\noptions = { window = 2 }\n"
            "[[servers]]\npolicy = 'quests'",
            [
                "tasks.0: unknown task 'aime99'",
                "tasks.1: unknown program 'oracle'",
                "tasks.2: the program majority has no option window",
                "servers.0: policy must be one of lessismore, f",
            ],
        ),
        (
            f"{LEAST}policy = 'full'\nbudget = 3\n[[servers]]\ntasks = ['math']\n[[servers]]\n"
            "sglang = ['--lim-budget', '5']\n[[servers]]\nlim = { rank = 1, sinks = 2 }",
            [
                "servers.0: policy full does not heed budget",
                "servers.1: no task math; the tasks are math500",
                "servers.2: --lim-budget among SGLang's options: use policy, budget and lim",
                "servers.3: unknown LessIsMore setting 'rank'",
            ],
        ),
        (
            "[[tasks]]\ntask = 'math500'\nthinking = true\nthinking_budget = 1000\n"
            "[[tasks]]\ntask = 'aime99'\n[[servers]]\n[servers.sampling]\nmax_tokens = 500",
            ["tasks.1: unknown task 'aime99'", "servers.0 with task math500: a thinking budget of"],
        ),
        (
            f"{LEAST}model = ['/a/tiny', '/b/tiny']\n",
            ["2 runs share the folder math500-tiny-less", "2 models are published as tiny: rename"],
        ),
        (f"{LEAST}[[servers]]", ["2 runs share the folder math500-default-model-lessismore: give"]),
        (
            "[[tasks]]\ntask = 'needle'\n[[tasks]]\ntask = 'needle:1024'\n[[servers]]",
            ["2 runs share the folder needle-1024-default-model-lessismore: give"],
        ),
        (f"{LEAST}[[tasks]]\ntask = 'math500'", ["2 runs share the folder math500-default-model"]),
    ],
)
def test_settings_that_do_not_fit_together_are_told_at_once(
    text: str, expected: list[str], tmp_path: Path
) -> None:
    found = problems_of(tmp_path, text)
    assert all(line.startswith(words) for line, words in zip(found, expected, strict=True))


@pytest.mark.parametrize("content", [b"tasks = [", b"\xff", None])
def test_a_file_that_is_not_toml_is_refused_in_a_sentence(
    content: bytes | None, tmp_path: Path
) -> None:
    path = tmp_path / "matrix.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"cannot read {path}: "):
        read_matrix(path, tmp_path)


def test_a_name_is_that_of_a_file_first_and_of_one_of_ours_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_matrix("tiny") == MATRICES / "tiny.toml"
    Path("tiny").write_text(LEAST)
    assert find_matrix("tiny") == Path("tiny")
    with pytest.raises(ConfigError, match=r"no file tinny: .* one of analyses, long-coder"):
        find_matrix("tinny")


def ours(name: str) -> list[MatrixRun]:
    return [*read_matrix(find_matrix(name), Path("out")).runs]


def test_the_matrices_that_come_with_lim_have_their_runs_and_servers() -> None:
    found = {path.stem: ours(path.stem) for path in MATRICES.iterdir()}
    numbers = {
        name: (len(runs), len({run.server.name for run in runs})) for name, runs in found.items()
    }
    assert numbers == {
        **{"paper": (48, 15), "math500-coder-1.5b": (23, 23), "tiny": (2, 2)},
        **{"analyses": (27, 27), "tiny-analyses": (10, 10), "long-coder-1.5b": (144, 24)},
    }


def test_the_headline_matrix_is_all_of_math500_dense_and_for_every_policy() -> None:
    runs = ours("math500-coder-1.5b")
    budgets: dict[str, list[int | None]] = {}
    for run in runs:
        budgets.setdefault(run.server.lim["policy"], []).append(run.server.lim.get("budget"))
    assert budgets.pop("full") == [None]
    assert budgets.pop("lessismore") == [128, 256, 512, 1024]
    rivals = POLICIES.keys() - {"full", "lessismore", "lossless"}  # the last answers as full does
    assert budgets == {name: [256, 512, 1024] for name in rivals}
    sampling = {"max_tokens": 2048, "temperature": 0.6, "top_p": 0.95, "top_k": -1}
    config = RunConfig("math500", num_samples=4, sampling=sampling, retry_failed=True)
    assert [replace(run.config, out=None, served=None) for run in runs] == [config] * len(runs)
    assert {run.server.spec.model for run in runs} == {"Qwen/Qwen2.5-Coder-1.5B-Instruct"}


def test_the_papers_cells_have_its_samples_budgets_and_length() -> None:
    runs = ours("paper")
    assert {
        (run.config.task, run.server.lim.get("budget"), run.config.samples_per_question)
        for run in runs
    } == {
        *product(("aime24", "aime25"), (None, 2048, 4096, 6144), (16,)),
        *product(("math500", "gpqa_diamond"), (None, 1024, 2048, 4096), (8,)),
    }
    assert {run.config.sampling["max_tokens"] for run in runs} == {32768}
    assert {run.server.spec.model: run.config.sampling["top_k"] for run in runs} == {
        "Qwen/Qwen3-8B": 20,
        "Qwen/Qwen3-4B": 20,
        "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": -1,
    }


NUM_QUESTIONS, NUM_SAMPLES = 4, 3
NUM_LINES = NUM_QUESTIONS * NUM_SAMPLES
FILE = """
concurrency = {concurrency}
sampling = {{ seed = {seed}, max_tokens = 64 }}
[[tasks]]
task = "file:{folder}/sums.jsonl:integer"
samples = {samples}
[[tasks]]
task = "file:{folder}/more.jsonl:integer"
samples = {samples}
[[servers]]
model = "Org/Tiny"
policy = "full"
[[servers]]
model = "Org/Tiny"
budget = [64, 128]
"""
SERVERS = ["full", "64", "128"]
FOLDERS = [
    f"file-{task}-integer-Org-Tiny-{policy}"
    for policy in ("full", "lessismore-64", "lessismore-128")
    for task in ("sums", "more")
]


@dataclass
class LimServer(FakeServer):
    """A fake server that reports how it decodes."""

    config: LimConfig = field(default_factory=LimConfig)

    def _about(self) -> dict[str, Any]:
        state = {"lim": {"config": json.loads(self.config.to_json()), "roles": ["full"]}}
        about = {"model_path": "Org/Tiny", "max_running_requests": 256, "internal_states": [state]}
        return super()._about() | about


class World:
    """Servers that start and end, in a folder with a matrix of six runs on three of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "sums.toml"
        self.out = folder / "runs"
        self.starts: list[str] = []
        self.ends: list[str] = []
        self.no_start: set[str] = set()
        self.lives: dict[str, int] = {}
        """Answers after which a server is gone."""
        self.unanswerable: set[int] = set()
        """Questions that every server refuses."""
        self.num_answers_to_ctrl_c: int | None = None
        self._answers = count(1)
        for name in ("sums", "more"):
            write_sums(folder, NUM_QUESTIONS, name)
        self.write_file()

    def write_file(self, samples: int = NUM_SAMPLES, concurrency: int = 8) -> None:
        text = FILE.format(samples=samples, concurrency=concurrency, seed=SEED, folder=self.folder)
        self.file.write_text(text)

    def run(self, *words: str) -> Done:
        """Run the command; without words, all of the file."""
        self.starts.clear()
        self.ends.clear()
        done = lim("eval", "--matrix", str(self.file), "--out", str(self.out), *words)
        assert "Traceback" not in done.error, done.error
        return done

    @contextmanager
    def serving(self, spec: ServerSpec, _: Console, log: Path) -> Iterator[str]:
        """Take the place of `lim_sglang.launch.server.serving`."""
        config = LimConfig.from_json(spec.lim_flags["--lim-config"])
        name = "full" if config.policy == "full" else str(config.budget)
        self.starts.append(name)
        if name in self.no_start:
            raise ServerError(f"it ended with code 1 (log: {log})\nCUDA out of memory")
        fake = LimServer(lambda body: self._answer(fake, name, body), config=config)
        fake.start()
        try:
            yield fake.url
        finally:
            fake.stop()
            self.ends.append(name)

    def _answer(self, fake: FakeServer, name: str, body: dict[str, Any]) -> Any:
        if next(self._answers) == self.num_answers_to_ctrl_c:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        if len(fake.requests) > self.lives.get(name, 10_000):
            fake.kill()
        if asked(body) in self.unanswerable:
            return 400, {"message": "the prompt is too long"}
        return answering()(body)

    def assert_complete(self) -> None:
        """Check that each run of the file has each of its samples once."""
        for folder in FOLDERS:
            stored = keys(self.out / folder)
            assert len(stored) == len(set(stored)) == NUM_LINES


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    world = World(tmp_path)
    monkeypatch.setattr(matrix_module, "serving", world.serving)
    monkeypatch.setattr(matrix_module, "EquivalenceChecker", TextEquivalence)
    return world


def test_each_server_starts_once_and_complete_runs_start_none(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIM_CONFIG", '{"ranking": "mass"}')
    planned = world.run("--dry-run")
    assert planned.output.endswith("6 runs: 0 complete, 0 begun, 6 new\n")
    assert not world.out.exists()
    done = world.run()
    assert done.code == 0, done.error
    assert world.starts == world.ends == SERVERS
    world.assert_complete()
    record = run_record(world.out / FOLDERS[2])
    config = record["settings"]["lim"]["config"]
    assert (config["policy"], config["budget"], config["ranking"]) == ("lessismore", 64, "rank")
    assert record["settings"]["sampling"]["max_tokens"] == 64
    assert record["about"]["concurrency"] == [8]
    again = world.run()
    assert again.code == 0, again.error
    assert world.starts == []
    assert again.output == done.output
    assert "6 runs: 6 complete, 0 begun, 0 new" in world.run("--dry-run").output


def test_the_end_shows_each_score_and_the_commands_that_say_more(world: World) -> None:
    done = world.run("--only", "full", "--only", "lessismore-64")
    titles = re.findall(r"file:\S+, Org/Tiny, .+", done.output)
    assert titles == [
        f"file:{task}:integer, Org/Tiny, {policy}"
        for policy in ("full", "LessIsMore 64")
        for task in ("sums", "more")
    ]
    *_, first, second, report = done.output.strip().split("\n")
    paths = [str(world.out / folder) for folder in FOLDERS[:4]]
    assert first.split() == ["lim", "compare", paths[0], paths[2]]
    assert second.split() == ["lim", "compare", paths[1], paths[3]]
    assert report == f"lim report {world.out} --html {world.out / 'report.html'}"
    for command in (first, second, report):
        said = lim(*command.split()[1:])
        assert said.code == 0, said.error
    later = world.run("--only", "lessismore-64").output
    assert later.endswith(f"{first}\n{second}\n{report}\n")  # the dense run is the reference


def test_a_server_that_does_not_start_costs_its_own_runs_only(world: World) -> None:
    world.no_start = {"64"}
    done = world.run()
    assert (done.code, world.starts, world.ends) == (1, SERVERS, ["full", "128"])
    assert "CUDA out of memory" in done.error
    reason = f"it ended with code 1 (log: {world.out / 'Org-Tiny-lessismore-64.log'})"
    assert done.error.split("error: ")[1] == (
        "these runs are not complete:\n"
        f"  - file:sums:integer Org/Tiny lessismore-64: {reason}\n"
        f"  - file:more:integer Org/Tiny lessismore-64: {reason}\n"
        "finished samples are safe; the same command tries the others again\n"
    )
    assert done.output.count("lim compare") == 2
    world.no_start = set()
    assert world.run().code == 0
    assert world.starts == ["64"]
    world.assert_complete()


def test_a_server_that_is_lost_costs_its_own_runs_only(world: World) -> None:
    world.lives = {"full": NUM_LINES + 4}
    done = world.run()
    assert done.code == 1
    assert "  - file:more:integer Org/Tiny full: no server answers" in done.error
    assert "file:sums:integer Org/Tiny full: no" not in done.error
    assert world.starts == world.ends == SERVERS
    assert len(keys(world.out / FOLDERS[0])) == NUM_LINES
    assert len(keys(world.out / FOLDERS[1])) < NUM_LINES
    world.lives = {}
    assert world.run().code == 0
    assert world.starts == ["full"]
    world.assert_complete()


def test_failed_samples_are_told_and_tried_by_the_next_command(world: World) -> None:
    world.unanswerable = {2}
    done = world.run("--only", "full")
    assert done.code == 1
    for task in ("sums", "more"):
        words = f"- file:{task}:integer Org/Tiny full: {NUM_SAMPLES} samples failed, the last with"
        assert words in done.error
    assert "the prompt is too long" in done.error
    world.unanswerable = set()
    assert world.run("--only", "full").code == 0
    assert world.starts == ["full"]
    assert sorted(keys(world.out / FOLDERS[0])) == sorted(set(keys(world.out / FOLDERS[1])))


def test_ctrl_c_ends_the_server_and_the_same_command_resumes(world: World) -> None:
    world.write_file(concurrency=2)
    world.num_answers_to_ctrl_c = NUM_LINES + 5
    done = world.run()
    assert done.code == 130
    assert world.ends == world.starts == ["full"]
    assert f"interrupted; finished samples are safe in {world.out / FOLDERS[1]}" in done.error
    stored = {folder: comparable(world.out / folder) for folder in FOLDERS[:2]}
    assert 0 < len(stored[FOLDERS[1]]) < NUM_LINES
    assert world.run().code == 0
    assert world.starts == SERVERS
    world.assert_complete()
    for folder, before in stored.items():
        assert all(row in comparable(world.out / folder) for row in before)


def test_runs_of_a_changed_file_are_refused_before_a_server_starts(world: World) -> None:
    assert world.run("--only", "full").code == 0
    before = comparable(world.out / FOLDERS[0])
    world.write_file(samples=NUM_SAMPLES + 1)
    for words in ((), ("--dry-run",)):
        done = world.run(*words)
        assert (done.code, world.starts) == (1, [])
        assert (
            f"num_samples (--samples) was {NUM_SAMPLES} and is now {NUM_SAMPLES + 1}" in done.error
        )
    world.write_file()
    write_sums(world.folder, NUM_QUESTIONS + 1, "sums")
    done = world.run()
    assert f"{NUM_QUESTIONS} questions, now {NUM_QUESTIONS + 1}; new in" in done.error
    assert world.starts == []
    assert comparable(world.out / FOLDERS[0]) == before


def test_a_complete_run_of_another_server_is_not_taken_for_this_one(world: World) -> None:
    assert world.run("--only", "full").code == 0
    text = world.file.read_text()
    for changed, words in (
        (text.replace("Org/Tiny", "Other/Tiny"), "served"),
        (f'sglang = ["--kv-cache-dtype", "fp8_e5m2"]\n{text}', "--kv-cache-dtype"),
    ):
        world.file.write_text(changed.replace("[[servers]]", "[[servers]]\nname = 'x'", 1))
        for folder in FOLDERS[:2]:
            renamed = world.out / folder.replace("Org-Tiny-full", "x")
            if not renamed.exists():
                (world.out / folder).rename(renamed)
        done = world.run("--dry-run")
        assert done.code == 1
        assert done.error.count("was made with other settings") == 2
        assert words in done.error


def test_a_run_that_cannot_be_completed_costs_no_other_run_of_its_server(world: World) -> None:
    (world.out / FOLDERS[0]).mkdir(parents=True)
    (world.out / FOLDERS[0] / "samples.jsonl").write_text("no run\n")
    done = world.run("--only", "full")
    assert (done.code, world.starts, world.ends) == (1, ["full"], ["full"])
    assert len(keys(world.out / FOLDERS[1])) == NUM_LINES


def test_questions_that_cannot_be_read_are_told_before_a_server_starts(world: World) -> None:
    (world.folder / "more.jsonl").unlink()
    done = world.run()
    assert done.code == 2
    assert world.starts == []
    assert f"cannot read {world.folder}/more.jsonl" in done.error
    assert world.run("--dry-run").code == 0


def test_a_second_task_row_may_ask_the_same_questions_with_another_program(world: World) -> None:
    row = f"""
[[tasks]]
task = "file:{world.folder}/sums.jsonl:integer"
name = "early"
program = "early_stop"
options = {{ window = 2 }}
samples = 3
"""
    world.file.write_text(world.file.read_text() + row)
    done = world.run("--only", "full")
    assert done.code == 0, done.error
    settings = run_record(world.out / "early-Org-Tiny-full")["settings"]
    assert settings["program"]["options"] == {"window": 2}
    assert settings["task"] == run_record(world.out / FOLDERS[0])["settings"]["task"]
    assert world.run("--only", "full").code == 0
    assert world.starts == []
