"""Summaries of runs, read from run folders or from files that may be published, and written."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from lim_sglang.errors import ConfigError, DataError
from lim_sglang.evals.metrics import QuestionResult, Summary, summarise
from lim_sglang.evals.report import FULL
from lim_sglang.evals.run_store import (
    RUN_FILE,
    SAMPLES_FILE,
    AskedQuestion,
    Run,
    load_run,
    read_questions,
    read_record,
    write_atomically,
)
from lim_sglang.evals.tasks import Task, find_task, recorded_origin, task_title
from lim_sglang.markdown_section import counted
from lim_sglang.progress import show_progress

if TYPE_CHECKING:
    from lim_sglang.programs.grading.equivalence import EquivalenceChecker


def rename_models(summaries: Sequence[Summary], names: Mapping[str, str]) -> list[Summary]:
    """Replace the names of models.

    Args:
        names: from the name in the summaries to the published name.

    Raises:
        ConfigError: no summary has such a model.
    """
    models = dict.fromkeys(str(summary.conditions.get("model")) for summary in summaries)
    unknown = [name for name in names if name not in models]
    if unknown:
        raise ConfigError(
            f"--name {', '.join(unknown)}: no run has that model; the models are "
            f"{', '.join(models)}"
        )
    return [
        replace(summary, conditions={**summary.conditions, "model": names[model]})
        if (model := str(summary.conditions.get("model"))) in names
        else summary
        for summary in summaries
    ]


FORMAT = 1
EXPECTED = "expected the folder of a run, or a summary written by lim report --summaries"


def write_summary(summary: Summary, path: Path) -> None:
    """Write a summary as JSON with one line a question, so that `diff` compares two summaries.

    Raises:
        DataError: the file cannot be written.
    """
    head = {
        "format": FORMAT,
        "run_id": summary.run_id,
        "conditions": summary.conditions,
        "num_failed": summary.num_failed,
    }
    rows = ",\n".join(f"  {json.dumps(question.to_row())}" for question in summary.questions)
    text = f'{json.dumps(head, indent=1)[:-2]},\n "questions": [\n{rows}\n ]\n}}\n'
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot write {path} ({error.strerror}); name another file") from None
    write_atomically(path, text)


def write_summaries(summaries: Iterable[Summary], folder: Path) -> list[Path]:
    """Write summaries into a folder and return their paths.

    The files are named by the runs' ids, which may come from a stranger's file.

    Raises:
        DataError: a file cannot be written.
    """
    paths = []
    for summary in summaries:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", summary.run_id).lstrip(".")
        paths.append(folder / f"{name}.json")
        write_summary(summary, paths[-1])
    return paths


def read_summary(path: Path) -> Summary:
    """Read a file of `write_summary`.

    Raises:
        DataError: the file is no summary, is damaged or has another format.
    """
    if (path.parent / RUN_FILE).exists():
        raise DataError(f"{path} is a part of a run; name its folder, {path.parent}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}); {EXPECTED}") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); {EXPECTED}") from None
    if not isinstance(content, dict) or "format" not in content:
        raise DataError(f"{path} is not the summary of a run; {EXPECTED}")
    if content["format"] != FORMAT:
        raise DataError(
            f"{path} has format {content['format']}, expected {FORMAT}: write the summary again "
            "from its run with lim report --summaries"
        )
    try:
        questions = tuple(map(QuestionResult.from_row, content["questions"]))
        if len({question.question_id for question in questions}) != len(questions):
            raise ValueError("a question occurs twice")
        conditions = _with_origin(content["conditions"])
        return Summary(content["run_id"], conditions, questions, content["num_failed"])
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path} is a damaged summary: {reason}; {EXPECTED}") from None


def _with_origin(conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Return a summary's conditions with the origin of its questions, which older ones lack."""
    if "origin" in conditions:
        return dict(conditions)
    origin = recorded_origin(conditions["task"], conditions["benchmark"], None)
    return {**conditions, "task": task_title(conditions["task"], origin), "origin": str(origin)}


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Replace each folder that is no run by the runs in it, at any depth, and by the summaries
    right in it; sorted by path. Servers' logs, which a shell pattern names beside them, are left
    out.

    Raises:
        ConfigError: a folder holds neither.
    """
    found: list[Path] = []
    paths = list(paths)
    for path in [path for path in paths if path.suffix != ".log"] or paths:
        if not path.is_dir() or (path / RUN_FILE).exists():
            found.append(path)
            continue
        runs = (record.parent for record in path.rglob(RUN_FILE))
        inside = sorted([*path.glob("*.json"), *runs])
        if not inside:
            raise ConfigError(
                f"{path} holds no run and no summary; name the folder of a run, a summary written "
                "by lim report --summaries, or a folder of these"
            )
        found += inside
    return found


def load_summaries(paths: Sequence[Path], console: Console | None = None) -> list[Summary]:
    """Read summaries, and summarise the folders of runs with their newest verdicts.

    Args:
        console: shows the progress, since 2,000 samples take up to ten seconds.

    Raises:
        ConfigError: a path is neither.
        DataError: a file is damaged, or a run has no sample.
    """
    from lim_sglang.programs.grading.equivalence import EquivalenceChecker

    check_paths(paths)
    found, text = [], f"counting votes of {counted(len(paths), 'run')}"
    progress = show_progress(console or Console(quiet=True), len(paths), text)
    # One checker for all runs: it caches verdicts, and takes seconds to start.
    with EquivalenceChecker() as checker, progress as advance:
        for path in paths:
            found.append(_summarise_folder(path, checker) if path.is_dir() else read_summary(path))
            is_last = len(found) == len(paths)
            advance(len(found), text if is_last else f"{text}: {len(found)} done")
    return [replace(each, source=str(path)) for each, path in zip(found, paths, strict=True)]


def load_by_task(
    paths: Sequence[Path], console: Console | None = None
) -> tuple[list[list[Summary]], list[Path]]:
    """Read runs, and group them by their tasks; the console is that of `load_summaries`.

    A group has the order of the paths; of one folder's runs, full attention comes first.

    Returns:
        The groups, and the runs without a sample, which are left out.

    Raises:
        ConfigError, DataError: as `find_runs`, `check_distinct` and `load_summaries`.
    """
    inside = [find_runs([path]) for path in paths]
    check_distinct([path for runs in inside for path in runs])
    empty = [path for runs in inside for path in runs if _has_no_sample(path)]
    inside = [[path for path in runs if path not in empty] for runs in inside]
    loaded = iter(load_summaries([path for runs in inside for path in runs], console))
    by_task: dict[str, list[Summary]] = {}
    for runs in inside:
        found = [next(loaded) for _ in runs]
        for summary in sorted(found, key=lambda each: each.conditions["policy"] != FULL):
            by_task.setdefault(summary.conditions["task"], []).append(summary)
    return list(by_task.values()), empty


def _has_no_sample(path: Path) -> bool:
    """Return True for the folder of a run that was begun, and has stored nothing yet."""
    samples = path / SAMPLES_FILE
    return (path / RUN_FILE).exists() and not (samples.exists() and samples.stat().st_size)


def check_paths(paths: Iterable[Path]) -> None:
    """Check that every path exists.

    Raises:
        ConfigError: some do not; all of them are named.
    """
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise ConfigError(f"cannot read {', '.join(missing)} (no such file or folder); {EXPECTED}")


def check_distinct(paths: Sequence[Path]) -> None:
    """Check that every path leads to a run of its own.

    Raises:
        ConfigError: two are the same folder or file.
    """
    seen: dict[Path, Path] = {}
    for path in paths:
        first = seen.setdefault(path.resolve(), path)
        if first is not path:
            same = f"{path} is named twice" if first == path else f"{first} and {path} are the same"
            raise ConfigError(f"{same}: name each run once")


def load_asked(paths: Iterable[Path]) -> dict[str, dict[str, AskedQuestion]]:
    """Return the questions of all run folders among some paths, by their digest and id.

    Raises:
        DataError: a folder holds no run, or its questions are damaged.
    """
    asked: dict[str, dict[str, AskedQuestion]] = {}
    for path in filter(Path.is_dir, paths):
        digest = read_record(path).settings["questions"]["asked_digest"]
        stored = asked.setdefault(digest, {})
        stored |= {
            name: each
            for name, each in read_questions(path).items()
            if each.text or name not in stored
        }
    return asked


def recorded_task(run: Run) -> Task:
    """Return the task of a stored run.

    Raises:
        DataError: this version has no such task.
    """
    try:
        return find_task(run.record.settings["task"])
    except ConfigError as error:
        raise DataError(f"{run.path}: {error}") from None


def _summarise_folder(path: Path, checker: "EquivalenceChecker") -> Summary:
    from lim_sglang.evals.grading import Grader

    run = load_run(path)
    if not run.samples:
        raise DataError(f"{path} has no sample yet; run lim eval until it has")
    grader = Grader(recorded_task(run).answer_kind, checker)
    asked = read_questions(path)
    return summarise(run.record, run.samples, grader.equivalent, len(run.failures), asked)
