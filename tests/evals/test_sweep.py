"""A sweep's file: what it says, what it may not say, and the runs that it means."""

from pathlib import Path

import pytest

from lim_sglang.errors import ConfigError
from lim_sglang.evals.run_config import Method
from lim_sglang.evals.sweep import (
    SWEEPS,
    SweepRun,
    SweepServer,
    check_runs,
    expand,
    find_sweep,
    read_sweep,
)

SMALL = """
samples = 2
limit = 5
sglang = ["--dtype", "bfloat16"]
[sampling]
temperature = 0.5
top_k = 20
[tasks.math500]
[tasks.aime24]
samples = 8
limit = 3
budgets = [512]
[models."Org/One"]
[models."Org/Two"]
path = "/models/two"
sglang = ["--tp-size", "2"]
sampling = { top_k = -1, max_tokens = 64 }
[[policies]]
policy = "full"
[[policies]]
policy = "lessismore"
budgets = [256, 512]
"""
ONE_OF_EACH = """
[tasks.math500]
[models."Org/One"]
[[policies]]
policy = "full"
"""
"""The least that a file may say."""


def write(folder: Path, text: str) -> Path:
    path = folder / "small.toml"
    path.write_text(text)
    return path


def runs(folder: Path, text: str = SMALL, **others: object) -> list[SweepRun]:
    return expand(read_sweep(write(folder, text)), **others)  # type: ignore[arg-type]


def refusal(folder: Path, text: str) -> list[str]:
    """What a file is refused for."""
    with pytest.raises(ConfigError) as caught:
        read_sweep(write(folder, text))
    first, *lines = str(caught.value).split("\n  - ")
    assert first == f"{folder / 'small.toml'} is no sweep:"
    return lines


def test_runs_come_server_by_server_in_the_order_of_the_file(tmp_path: Path) -> None:
    assert [run.name for run in runs(tmp_path)] == [
        f"{model} {rest}"
        for model in ("Org/One", "Org/Two")
        for rest in (
            *("full math500", "full aime24"),
            "lessismore-256 math500",
            *("lessismore-512 math500", "lessismore-512 aime24"),
        )
    ]


def test_a_run_has_its_tasks_and_its_models_own_in_place_of_what_is_for_all(
    tmp_path: Path,
) -> None:
    one, two = (run for run in runs(tmp_path) if run.name.endswith("lessismore-512 aime24"))
    policy = {"policy": "lessismore", "budget": 512}
    assert one == SweepRun(
        SweepServer("Org/One", "Org/One", policy, ("--dtype", "bfloat16")),
        *("aime24", Method(8), {"temperature": 0.5, "top_k": 20}, 3),
    )
    assert two == SweepRun(
        SweepServer("Org/Two", "/models/two", policy, ("--dtype", "bfloat16", "--tp-size", "2")),
        *("aime24", Method(8), {"temperature": 0.5, "top_k": -1, "max_tokens": 64}, 3),
    )
    assert runs(tmp_path)[0].method == Method(2)
    assert runs(tmp_path)[0].limit == 5


def test_a_policy_with_all_its_settings_has_the_flags_of_lim_serve_and_a_name_of_its_own(
    tmp_path: Path,
) -> None:
    text = f"""{ONE_OF_EACH}
[[policies]]
policy = "lessismore"
budgets = [64]
ranking = "mass"
recent_ratio = 0.5
sinks = 0
select_layers = [2, 12]
"""
    _, run = runs(tmp_path, text)
    assert run.server.lim_flags == {
        "--lim-policy": "lessismore",
        "--lim-budget": "64",
        "--lim-ranking": "mass",
        "--lim-recent-ratio": "0.5",
        "--lim-sinks": "0",
        "--lim-select-layers": "2,12",
    }
    told = "ranking=mass recent_ratio=0.5 sinks=0 select_layers=2,12"
    assert run.name == f"Org/One lessismore-64 {told} math500"
    assert run.folder == (
        "math500-Org-One-lessismore-64-ranking-mass-recent_ratio-0.5-sinks-0-select_layers-2-12"
    )


def test_a_folder_may_take_a_models_place_and_its_name_stays(tmp_path: Path) -> None:
    found = runs(tmp_path, paths={"Org/One": "/here/one"}, only=["Org/One"])
    assert {(run.server.model, run.server.path) for run in found} == {("Org/One", "/here/one")}
    with pytest.raises(ConfigError, match="--model Org/Tow: the sweep has Org/One, Org/Two"):
        runs(tmp_path, paths={"Org/Tow": "/here"})


def test_the_embedded_model_is_served_on_the_cpu_unless_a_folder_takes_its_place(
    tmp_path: Path,
) -> None:
    text = ONE_OF_EACH.replace("[[policies]]", "embedded = true\n[[policies]]")
    [run] = runs(tmp_path, text)
    assert run.server.path is None
    assert run.server.sglang_options == ("--device", "cpu")
    [run] = runs(tmp_path, text, paths={"Org/One": "/here"})
    assert run.server.path == "/here"
    assert run.server.sglang_options == ()


@pytest.mark.parametrize(
    ("patterns", "count"),
    [
        (["full"], 4),
        (["aime24"], 4),
        (["Org/*"], 10),
        (["*two"], 0),
        (["*Two"], 5),
        (["lessismore-5*", "full"], 8),
        (["lessismore-51"], 0),
        (["* lessismore-512 aime24"], 2),
        (["Org/One full aime24"], 1),
    ],
)
def test_only_takes_runs_by_their_name_or_a_word_of_it(
    patterns: list[str], count: int, tmp_path: Path
) -> None:
    if count:
        assert len(runs(tmp_path, only=patterns)) == count
        return
    with pytest.raises(ConfigError, match="leaves none of these runs:\n  - Org/One full math500"):
        runs(tmp_path, only=patterns)


def test_all_that_is_wrong_is_said_at_once_with_its_key(tmp_path: Path) -> None:
    text = """
samples = "four"
concurency = 5
program = "oracle"
options = { window = true }
sglang = ["--lim-budget", "5"]
[sampling]
top_k = 0
max_tokens = 0
[tasks.aime99]
[tasks.math500]
budgets = []
limt = 3
[models.a]
path = "x"
embedded = true
[models.b]
sampling = { topk = 4 }
[[policies]]
policy = "full"
budgets = [3]
[[policies]]
policy = "lessismore"
[[policies]]
policy = "lessismore"
budgets = [0, 5]
ranking = "max"
[[policies]]
policy = "quest"
[[policies]]
budgets = [2.5]
"""
    lines = refusal(tmp_path, text)
    expected = {
        "tasks.aime99": "unknown task 'aime99'",
        "tasks.math500.budgets": "should have at least 1 item, not []",
        "tasks.math500.limt": "there is no limt; there are samples, limit, budgets",
        "models.a": "give either path or embedded",
        "models.b.sampling.topk": "there is no topk; there are max_tokens, temperature",
        "policies.0": "full reads everything",
        "policies.1": "lessismore needs budgets",
        "policies.2": "ranking must be one of rank, mass, not 'max'; budget must be an integer",
        "policies.3": "policy must be one of lessismore, full, not 'quest'",
        "policies.4.policy": "is missing",
        "policies.4.budgets.0": "should be a valid integer, not 2.5",
        "samples": "should be a valid integer, not 'four'",
        "program": "unknown program 'oracle'",
        "options.window": "should be a number, not True",
        "sampling.max_tokens": "should be greater than or equal to 1, not 0",
        "sampling.top_k": "should be 1 or more, or -1 for all tokens, not 0",
        "sglang": "--lim-budget belongs to [[policies]]",
        "concurency": "there is no concurency; there are tasks, models, policies",
    }
    assert [line.split(": ")[0] for line in lines] == list(expected)
    for line, words in zip(lines, expected.values(), strict=True):
        assert words in line


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"program = 'single'\nsamples = 4\n{ONE_OF_EACH}", "tasks.math500.samples: --program sin"),
        (
            ONE_OF_EACH.replace("500]", "500]\nbudgets = [9]"),
            "tasks.math500.budgets: no policy has 9",
        ),
        (
            ONE_OF_EACH + "[[policies]]\npolicy = 'full'",
            "2 runs would share the folder math500-Org-",
        ),
        (ONE_OF_EACH.replace("One", "One/x") + '[models."Org/One-x"]', "2 runs would share"),
        (
            "tasks = ['math500']\n" + ONE_OF_EACH.replace("[tasks.math500]", ""),
            "tasks: should be a table",
        ),
        (
            "tasks.math500 = 4\n" + ONE_OF_EACH.replace("[tasks.math500]", ""),
            "math500: should be a table, not 4",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(text: str, words: str, tmp_path: Path) -> None:
    [line] = refusal(tmp_path, text)
    assert words in line


@pytest.mark.parametrize("content", [b"tasks = [", b"\xff", None])
def test_what_is_no_toml_is_refused_in_a_sentence(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "sweep.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"cannot read the sweep {path}: "):
        read_sweep(path)


def test_a_name_is_that_of_a_file_first_and_of_one_of_ours_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_sweep("tiny") == SWEEPS / "tiny.toml"
    Path("tiny").write_text(ONE_OF_EACH)
    assert find_sweep("tiny") == Path("tiny")
    with pytest.raises(ConfigError, match=r"no file tinny: .*, or one of ours: .*paper, tiny"):
        find_sweep("tinny")


def test_models_that_no_server_can_have_are_refused_before_any_starts(tmp_path: Path) -> None:
    for name in ("a/hf", "b/hf", "c"):
        (tmp_path / name).mkdir(parents=True)
    here = {name: str(tmp_path / name) for name in ("a/hf", "b/hf", "c")}
    check_runs(runs(tmp_path, paths={"Org/One": here["a/hf"], "Org/Two": here["c"]}))
    with pytest.raises(ConfigError, match=r"Org/Two is to be served from /models/two, which is no"):
        check_runs(runs(tmp_path))
    with pytest.raises(ConfigError, match=r"Org/One and Org/Two are .* both called hf"):
        check_runs(runs(tmp_path, paths={"Org/One": here["a/hf"], "Org/Two": here["b/hf"]}))
