"""`lim bench divergence`: texts, cells, passes, statistics, tables; a real runner on CPU or GPU."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lim_sglang import compat
from lim_sglang.bench import divergence, model_runner
from lim_sglang.bench.commands import bench
from lim_sglang.bench.divergence import DivergenceOptions, compare_passes, measure, measure_group
from lim_sglang.bench.results import (
    DIVERGENCE_SECTION,
    SECTION,
    DivergenceRow,
    DivergenceTable,
    divergence_tables,
    mean_and_error,
    read_divergences,
    same_divergence,
)
from lim_sglang.bench.workloads import Cell, ModelChoice, make_sequences, read_cells, read_texts
from lim_sglang.compat import CPU_ENGINE_VAR
from lim_sglang.config import LimConfig
from lim_sglang.errors import ConfigError, DataError, RefusedError, ServerError
from lim_sglang.evals.run_store import AskedQuestion, read_questions, write_questions
from lim_sglang.gates.files import WEIGHTS_FILE, write_gates
from lim_sglang.kernels.reference_rivals import BlockGate
from lim_sglang.progress import plain_console
from tests.bench.forced_runner import LENGTH, ROWS, STEPS, VOCABULARY, Dense, Runner, stand_in
from tests.bench.recorded import LINES, write
from tests.processes import clean_environment
from tests.server.gpu_rig import build_model
from tests.server.tiny_model import random_prompt, write_tokenizer

ROOT = Path(__file__).parents[2]


# Texts and cells


TEXTS = ["abc", "def", [1, 2, 3], [4, 5, 6]]


def sequences(count: int = 2, seed: int = 0) -> list[list[int]]:
    """Join texts of 3 tokens to sequences of 5; letters are their own token ids."""
    encode = lambda text: list(map(ord, text))  # noqa: E731
    return make_sequences(TEXTS, encode, 0, count=count, length=5, seed=seed)


def test_texts_are_joined_by_the_end_token_and_each_sequence_begins_with_a_text() -> None:
    ids = [list(map(ord, text)) if isinstance(text, str) else text for text in TEXTS]
    for seed in range(6):
        for found in sequences(seed=seed):
            assert (found[:3] in ids, found[3]) == (True, 0)
            assert found[4] in [text[0] for text in ids]
    assert sequences(seed=3) == sequences(seed=3)
    assert len({str(sequences(seed=seed)) for seed in range(20)}) > 1


def test_too_little_text_is_refused_with_the_numbers() -> None:
    words = "16 tokens in 4 texts, which fill 2 of 3 sequences of 5 tokens"
    with pytest.raises(DataError, match=words):
        sequences(count=3)


def test_a_line_holds_a_text_or_token_ids(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "one\u2028line"}\n\n{"tokens": [3, 4]}\n')
    assert read_texts(path) == ["one\u2028line", [3, 4]]
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n \r\n')
    assert read_texts(path) == ["a"]
    path.write_text('{"text": "\\ud800"}')
    with pytest.raises(DataError, match="line 1 holds half a surrogate pair"):
        read_texts(path)
    lines = ("no json", "[1]", '{"text": 3}', '{"tokens": [1.5]}', '{"tokens": [-1]}')
    for line in (*lines, json.dumps({"tokens": [2**63]}), "[" * 100_000):
        path.write_text(f'{{"text": "a"}}\n{line}\n')
        with pytest.raises(DataError, match="line 2 needs"):
            read_texts(path)
    with pytest.raises(DataError, match="is no readable text"):
        read_texts(tmp_path / "none.jsonl")


def test_a_runs_texts_are_its_questions_with_their_answers(tmp_path: Path) -> None:
    run = ROOT / "tests" / "golden" / "runs" / "smollm2-full"
    assert "12 divided by 4 equals 3 with a remainder of 2." in read_texts(run)
    for file in run.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    asked = dict.fromkeys(read_questions(run), AskedQuestion("3", "What is 12 / 4?\ud800"))
    write_questions(tmp_path, asked)
    expected = "What is 12 / 4??\n\n12 divided by 4 equals 3 with a remainder of 2."
    assert expected in read_texts(tmp_path)


def test_a_budget_that_a_definition_excludes_has_a_reason() -> None:
    cells = read_cells(["delta,quest", '{"policy": "quest", "shared_by": "all"}'], "128,200,256")
    assert [(cell.policy, cell.budget) for cell in cells if not cell.config] == [
        *(("delta", 128), ("delta", 200)),
        *(("quest", 200), ("quest shared_by=all", 200)),
    ]
    assert "at least 144" in str(cells[0].reason)
    assert cells[2].config == LimConfig(policy="delta", budget=256)


@pytest.mark.parametrize(
    ("policies", "budgets", "words"),
    [
        (["quest"], "128;256", "numbers of tokens between commas"),
        (["quest"], "0", "numbers of tokens between commas"),
        (["guest"], "128", "policy must be one of"),
        (["full"], "128", "reads everything"),
        (['{"policy": "quest", "budget": 64}'], "128", "the budget is that of --budget"),
        ([], "128", "at least one policy"),
        (["quest,seer"], "256", r"""write --policy '{"policy": "seer", "gate": "FOLDER"}'"""),
    ],
)
def test_settings_that_are_wrong_at_any_budget_are_refused(
    policies: list[str], budgets: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        read_cells(policies, budgets)


# Passes, on a model in plain torch


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Return the model."""
    return stand_in(monkeypatch)


def options(**changed: Any) -> DivergenceOptions:
    """Return options of the model in plain torch."""
    cells = read_cells(["streaming"], "4,12,30")
    given = {"cells": cells, "sequences": ROWS, "length": LENGTH, "steps": STEPS, **changed}
    return DivergenceOptions(ModelChoice(None, "model"), Path("texts.jsonl"), **given)


TOKENS = torch.randint(VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))


def test_each_step_is_compared_with_the_dense_one_on_the_texts_own_tokens(runner: Runner) -> None:
    """The expected numbers come from the definition of KL, token by token."""
    asked = options()
    clock = divergence.StepClock(4 * STEPS, lambda *_: None)
    runner.live, runner.budget = 9, 4  # another policy served last
    results = measure_group(runner, Dense(), asked.cells, TOKENS, asked, clock)  # type: ignore[arg-type]
    for cell, found in results:
        kl, same = [], []
        for tokens in TOKENS.tolist():
            pairs = [
                [runner.logits(tokens[:n], read).double().softmax(-1) for read in (99, cell.budget)]
                for n in range(LENGTH - STEPS + 1, LENGTH + 1)
            ]
            kl.append(sum(float((p * (p / q).log()).sum()) for p, q in pairs) / STEPS)
            same.append(sum(int(p.argmax() == q.argmax()) for p, q in pairs) / STEPS)
        assert found.kl == pytest.approx(kl, rel=1e-4, abs=1e-6)
        assert found.agreement == pytest.approx(same)
        assert found.settings == LimConfig(policy="streaming", budget=cell.budget).settings()
        assert (max(found.kl) == 0.0) == (cell.budget == LENGTH)


def test_each_pass_has_summaries_of_the_prefill(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, list[int], list[int]]] = []

    class Selector:
        def summarize(
            self, layer: int, keys: Any, lengths: Any, slots: Any, summaries: Any
        ) -> None:
            assert (keys.of_layer, summaries) == (1, "summaries of 1")
            calls.append((layer, lengths.tolist(), slots.tolist()))

    def make_contender(*_: Any) -> Any:
        runner.live, runner.lim_config = 1, LimConfig(policy="streaming")  # type: ignore[attr-defined]
        return SimpleNamespace(
            state={"lim_summaries": {1: "summaries of 1"}, "lim_selector": Selector()}
        )

    monkeypatch.setattr(model_runner, "make_contender", make_contender)
    pool = SimpleNamespace(get_key_buffer=lambda n: SimpleNamespace(device="cpu", of_layer=n))
    monkeypatch.setattr(runner, "token_to_kv_pool", pool, raising=False)
    clock = divergence.StepClock(2 * STEPS, lambda *_: None)
    asked = options()
    next(measure_group(runner, Dense(), asked.cells[:1], TOKENS, asked, clock))  # type: ignore[arg-type]
    prefilled = list(range(1, LENGTH - STEPS + 1))
    assert [(layer, lengths) for layer, lengths, _ in calls] == [(1, prefilled)] * ROWS
    rows = runner.req_to_token_pool.req_to_token[1:, : LENGTH - STEPS]
    assert [slots for *_, slots in calls] == rows.tolist()


def test_tokens_that_the_model_lacks_are_refused(
    runner: Runner, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(divergence, "load_dense_runner", lambda *_: runner)
    groups = [TOKENS.clone(), TOKENS.clone()]
    groups[1][0, 0] = VOCABULARY
    asked, console = options(), plain_console(stderr=True)
    with pytest.raises(DataError, match="has the token 40, which the model lacks"):
        next(divergence.measure_cells(asked, str(tmp_path), asked.cells, groups, {}, console))


def test_kl_is_of_dense_to_sparse_and_averaged_over_steps_within_a_sequence() -> None:
    even, odd = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
    expected = torch.stack([torch.stack([odd, odd]), torch.stack([odd, odd])])  # [T, B, V]
    found = [torch.stack([even, odd]), torch.stack([odd, odd])]
    kl, same = compare_passes(expected, found)
    forward = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    assert kl == pytest.approx([forward / 2, 0.0])
    assert same == [1.0, 1.0]
    with pytest.raises(ValueError, match="shorter"):
        compare_passes(expected, found[:1])


def test_logits_that_are_not_finite_are_no_result(runner: Runner) -> None:
    runner.table.fill_(math.nan)
    clock = divergence.StepClock(4 * STEPS, lambda *_: None)
    with pytest.raises(ServerError, match="the logits at position 24 are not finite"):
        next(measure_group(runner, Dense(), (), TOKENS, options(), clock))  # type: ignore[arg-type]


def test_the_prefill_goes_through_the_cache_chunk_by_chunk(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_runner, "PREFILL_TOKENS", 7)
    seen = []
    monkeypatch.setattr(runner, "forward", seen.append)
    with model_runner.filled_batch(runner, model_runner.Point((LENGTH,) * ROWS), 0) as batch:
        model_runner.prefill(runner, batch, TOKENS[:, :20])
        slots = [mine[:20].tolist() for mine in batch.slots]
    for row in range(ROWS):
        chunks = seen[3 * row : 3 * row + 3]
        assert [len(chunk.input_ids) for chunk in chunks] == [7, 7, 6]
        assert [chunk.extend_prefix_lens.tolist() for chunk in chunks] == [[0], [7], [14]]
        assert [chunk.seq_lens.tolist() for chunk in chunks] == [[7], [14], [20]]
        tokens = TOKENS[row, :20].tolist()
        assert torch.cat([chunk.positions for chunk in chunks]).tolist() == list(range(20))
        assert torch.cat([chunk.input_ids for chunk in chunks]).tolist() == tokens
        assert torch.cat([chunk.out_cache_loc for chunk in chunks]).tolist() == slots[row]


def test_the_clock_shows_policy_step_share_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 10.0, 20.0, 30.0])
    monkeypatch.setattr(divergence.time, "monotonic", lambda: next(times))
    shown: list[tuple[float, str]] = []
    clock = divergence.StepClock(4, lambda *found: shown.append(found))
    list(clock.follow(iter([torch.ones(1)] * 2), "full", 2))
    list(clock.follow(iter([torch.ones(1)]), "quest at 256", 2))
    assert shown[0] == (1, "full: step 1 of 2, 25 % of all; about 30 s left")
    assert shown[2] == (3, "quest at 256: step 1 of 2, 75 % of all; about 10 s left")


# Rows and tables

CONDITIONS: Mapping[str, Any] = {
    "date": "2026-11-29T04:15:54+00:00",
    "commit": "c0ffee0123456789",
    "gpu": "NVIDIA H200",
    "versions": {"torch": "2.11.0", "sglang": "0.5.16"},
    "model": "model",
    "model_sha256": "fedcba9876543210",
    "texts_sha256": "0123456789abcdef",
    **{"sequences": 3, "length": 4096, "steps": 512, "seed": 0},
}
KL = DivergenceRow("quest", 256, {"policy": "quest"}, (0.001, 0.002, 0.006), (0.9, 0.95, 1.0))
REASON = DivergenceRow("delta", 128, None, reason="budget must be larger")
MEASURED = [(REASON, CONDITIONS), (KL, CONDITIONS)]


def test_the_error_is_the_standard_error_over_sequences() -> None:
    assert mean_and_error([1.0, 2.0, 6.0]) == (3.0, pytest.approx(math.sqrt(7 / 3)))
    assert mean_and_error([2.0]) == (2.0, None)


def test_the_table_has_a_row_for_each_policy_and_words_where_nothing_is_defined() -> None:
    section = DivergenceTable.of(MEASURED).section()
    assert "| quest | - | 3 ± 1.5 |\n| delta | not defined | - |" in section
    assert "| quest | - | 95 ± 2.9 |" in section
    assert "- delta at 128: budget must be larger" in section
    assert "3 sequences of 4,096 tokens, the last 512 decoded" in section
    with pytest.raises(DataError, match="quest at 256 is recorded twice"):
        DivergenceTable.of([*MEASURED, MEASURED[1]])


def record(path: Path, *measured: Any) -> Path:
    """Write rows as --out does."""
    path.write_text("".join(f"{row.to_json(found)}\n" for row, found in measured))
    return path


def test_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert read_divergences(record(tmp_path / "rows.jsonl", *MEASURED)) == MEASURED
    other = (KL, {**CONDITIONS, "seed": 1})
    assert len(divergence_tables([*MEASURED, other])) == 2
    for line in ("{}", '{"divergence"', json.dumps(LINES[0])):
        (tmp_path / "rows.jsonl").write_text(line)
        with pytest.raises(DataError, match="line 1 is no row of `lim bench divergence`"):
            read_divergences(tmp_path / "rows.jsonl")


def test_report_writes_each_kind_of_rows_into_its_section(tmp_path: Path) -> None:
    results = tmp_path / "results.md"
    marks = [f"{each.begin}\n{each.end}\n" for each in (SECTION, DIVERGENCE_SECTION)]
    results.write_text("\nbetween\n".join(marks))
    files = [write(tmp_path, *LINES), record(tmp_path / "rows.jsonl", *MEASURED)]
    done = CliRunner().invoke(bench, ["report", *map(str, files), "--results", str(results)])
    assert done.exit_code == 0, done.exception
    text = results.read_text()
    assert "| quest |" in DIVERGENCE_SECTION.extract(text, "")
    assert "| decode step" in SECTION.extract(text, "")
    assert "\nbetween\n" in text
    refused = CliRunner().invoke(bench, ["report", str(files[1]), "--update", str(results)])
    assert isinstance(refused.exception, ConfigError)
    assert results.read_text() == text


def test_recorded_rows_of_the_same_conditions_are_not_measured_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[tuple[Cell, ...]] = []

    def measure_cells(
        _options: Any, _folder: str, cells: Any, groups: Any, found: Any, _: Any
    ) -> Any:
        asked.append(tuple(cells))
        assert [len(group) for group in groups] == [2, 1]
        yield from ((DivergenceRow(*cell.key, {}, (0.1,) * 3, (1.0,) * 3), found) for cell in cells)

    tokens = [[*range(40)], [*range(30, 70)], [*range(7)] * 6]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"tokens": t}) + "\n" for t in tokens))
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(divergence, "load_tokenizer", lambda _folder: (list, 0, 100))
    monkeypatch.setattr(divergence, "DENSE_BYTES", 2 * 4 * STEPS * 100)  # of two sequences
    monkeypatch.setattr(divergence, "measure_cells", measure_cells)
    cells = read_cells(["delta,streaming"], "128,256")
    given = options(cells=cells, length=35)
    given = replace(given, texts=tmp_path / "texts.jsonl", model=ModelChoice(None, str(tmp_path)))
    console = plain_console(stderr=True)
    first = list(measure(given, [], console))
    assert [row.reason is None for row, _ in first] == [False, True, True, True]
    assert [row.key for row, _ in first] == [cell.key for cell in cells]
    assert first[0][1]["model"] == tmp_path.name
    assert list(measure(given, first, console)) == first
    assert list(measure(given, first[:2], console))[:2] == first[:2]
    list(measure(replace(given, seed=5), first, console))
    assert [len(found) for found in asked] == [3, 2, 3]

    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    assert [row.kl for row, _ in measure(given, first, console)] == [(), *[(0.1,) * 3] * 3]
    assert len(asked) == 4


def seer_cells(*folders: Path) -> tuple[Cell, ...]:
    """Return the cells of gates at 256 tokens."""
    texts = [json.dumps({"policy": "seer", "gate": str(folder)}) for folder in folders]
    return read_cells(texts, "256")


def test_a_gate_is_named_by_its_folder_and_its_weights(tmp_path: Path) -> None:
    first, second, copy = (tmp_path / name / "own" for name in "abc")
    for folder, layers in ((first, 1), (second, 2), (copy, 1)):
        write_gates(folder, [BlockGate(torch.ones(1, 1, 8, 8), torch.ones(1, 24, 8))] * layers, {})
    names = [cell.policy for cell in seer_cells(first, second)]
    assert all(re.fullmatch(r"seer gate=own@[0-9a-f]{12}", name) for name in names)
    assert len(set(names)) == 2
    with pytest.raises(ConfigError, match=r"names seer gate=own@[0-9a-f]{12} twice"):
        seer_cells(first, copy)
    copy.joinpath(WEIGHTS_FILE).write_bytes(second.joinpath(WEIGHTS_FILE).read_bytes())
    assert seer_cells(first)[0].key != seer_cells(copy)[0].key == seer_cells(second)[0].key
    with pytest.raises(ConfigError, match=r"holds no attn_gate_weights\.pth"):
        seer_cells(tmp_path)


def test_rows_without_a_digest_of_the_model_are_shown() -> None:
    recorded = read_divergences(ROOT / "docs/measured/2026-11-29-h200-coder-1.5b-divergence.jsonl")
    (table,) = divergence_tables(recorded)
    assert "| seer gate=own |" in table.section()
    digest = {**recorded[0][1], "model_sha256": "0123"}
    assert same_divergence(digest) != same_divergence(recorded[0][1])


@pytest.mark.parametrize("name", [name for name in CONDITIONS if name != "date"])
def test_a_row_of_other_conditions_is_of_another_table(name: str) -> None:
    assert same_divergence({**CONDITIONS, name: "other"}) != same_divergence(CONDITIONS)


def test_policies_that_cannot_serve_the_model_are_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "load_dense_runner", pytest.fail)
    folder = str(build_model(tmp_path / "model", "smollm2"))
    for name, layers in (("short", 2), ("long", 9)):
        gate = BlockGate(torch.ones(3, 3, 64, 64), torch.ones(3, 192, 64))
        write_gates(tmp_path / name, [gate] * layers, {})
    cells = (*seer_cells(tmp_path / "short", tmp_path / "long"), *read_cells(["quest"], "64"))
    asked = options(cells=cells)
    words = r"(?s)short@\w+: the gate was trained for 2 layers, .*long@\w+: .* for 9 layers"
    with pytest.raises(RefusedError, match=words) as refused:
        next(divergence.measure_cells(asked, folder, cells, [], {}, plain_console(stderr=True)))
    assert len(refused.value.reasons) == 2


def test_a_gate_is_refused_on_a_cache_of_fp8(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(model_runner, "reasons_against_model", lambda *_: [])
    folder = str(build_model(tmp_path / "model", "smollm2"))
    policies = {"seer": LimConfig(policy="seer", gate="g"), "quest": LimConfig(policy="quest")}
    model_runner.check_policies(folder, policies, "auto")
    with pytest.raises(RefusedError, match="seer: a KV cache of fp8 does not give back") as refused:
        model_runner.check_policies(folder, policies, "fp8_e5m2")
    assert len(refused.value.reasons) == 1


def test_a_gate_is_refused_on_a_cache_that_is_fp8_by_the_checkpoints_choice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(compat, "serves_on_cpu", lambda: False)
    sizes = {"num_hidden_layers": 3, "hidden_size": 64, "num_attention_heads": 2}
    text_config = SimpleNamespace(model_type="llama", **sizes)
    served = SimpleNamespace(
        model_config=SimpleNamespace(hf_text_config=text_config),
        lim_roles=("full",) * 3,
        rope_table=lambda _policy: None,
        kv_cache_dtype=torch.float8_e4m3fn,
        dtype=torch.bfloat16,
        allocate_selection=pytest.fail,
    )
    with pytest.raises(RefusedError, match="a KV cache of fp8 does not give back"):
        model_runner.use_policy(served, LimConfig(policy="seer", gate="g"))


def test_more_steps_than_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match="--steps 30 leaves nothing to prefill of --length 30"):
        options(steps=30)


# A served model


def served(
    folder: Path, place: Path, environment: Mapping[str, str], vocabulary: int, *words: str
) -> list[DivergenceRow]:
    """Run the command in a process of its own; return the rows that it wrote."""
    texts, out = place / "texts.jsonl", place / "rows.jsonl"
    prompts = [[t % vocabulary for t in random_prompt(700, seed)] for seed in range(4)]
    texts.write_text("".join(json.dumps({"tokens": prompt}) + "\n" for prompt in prompts))
    command = [sys.executable, "-m", "lim_sglang", "bench", "divergence", str(folder)]
    command += ["--texts", str(texts), "--sequences", "2", "--length", "600", "--steps", "24"]
    command += ["--out", str(out), *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "| lessismore |" in done.stdout
    return [row for row, _ in read_divergences(out)]


def check_served(rows: list[DivergenceRow]) -> None:
    """Check that KL falls with the budget, to 0 at 640, which covers the sequence."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.kl:  # else the policy is not defined for the budget
            found.setdefault(row.key[0], {})[row.key[1]] = sum(row.kl) / 2
    for by_budget in found.values():
        assert [*by_budget][-2:] == [512, 640]
        assert all(less > more for less, more in pairwise(by_budget.values()))
        assert abs(by_budget[640]) < 1e-4


@pytest.mark.e2e
@pytest.mark.slow
def test_a_budget_that_covers_the_text_is_dense_and_a_small_one_is_far(
    tiny_model: Path, tmp_path: Path
) -> None:
    words = ("--policy", "lessismore,quest", "--budget", "64,512,640")
    on_cpu = clean_environment({CPU_ENGINE_VAR: "1"})
    check_served(served(tiny_model, tmp_path, on_cpu, 512, *words))


@pytest.mark.gpu
def test_on_a_gpu_two_runs_give_equal_numbers(tmp_path: Path) -> None:
    """The second run measures in another order, so no pass reads what another one left."""
    folder = build_model(tmp_path / "model", "qwen3-8b")
    write_tokenizer(folder)
    runs = []
    orders = ("lessismore,quest,delta,tidal", "tidal,delta,quest,lessismore")
    for number, policies in enumerate(orders):
        place = tmp_path / str(number)
        place.mkdir()
        words = ("--policy", policies, "--budget", "64,512,640")
        rows = served(folder, place, clean_environment({"SGLANG_USE_CPU_ENGINE": ""}), 512, *words)
        check_served(rows)
        runs.append({row.key: (row.kl, row.agreement) for row in rows})
    assert runs[0] == runs[1]
