"""The README's part on accuracy, written from summaries between two markers: a pure function."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lim_sglang.evals.report import Group, in_words
from lim_sglang.evals.tables import PLUS_MINUS, listed, markdown
from lim_sglang.readme_part import Part, short_commit

PART = Part("<!-- lim report: begin -->", "<!-- lim report: end -->")
NOT_MEASURED = "Accuracy: not measured yet."
TIMES = "\N{MULTIPLICATION SIGN}"
METHOD = (
    f"{PLUS_MINUS} is one standard error, clustered by question. Differences are of pass@1, paired "
    "by question, with 95 % intervals by bootstrap over questions, not corrected for their number; "
    "McNemar's exact test compares the votes. Cut off: samples that reached the limit of new "
    "tokens. Length ratios are to full; tokens per correct counts all that was generated."
)
STOPPING = (
    "Programs that stop by themselves have more samples where these disagree, so that they are "
    "judged by their answers and by the tokens of a question."
)
PACKAGES = {"sglang_server": "SGLang", "torch": "torch", "math_verify": "Math-Verify"}
"""Versions that are named, by their names among the conditions."""


def make_section(groups: Sequence[Group], plot: str | None = None) -> str:
    """Tables in Markdown, each with its conditions.

    Args:
        plot: where the README finds the plot of accuracy against budget.
    """
    if not groups:
        return NOT_MEASURED
    parts = [f"{markdown(group)}\n\n{group.title}: {conditions(group)}" for group in groups]
    picture = [f"![Accuracy against budget]({plot})"] if plot else []
    return "\n\n".join([*parts, method(groups), *picture])


def method(groups: Sequence[Group]) -> str:
    """How the figures of tables came about."""
    fair = all(row.draws_all for group in groups for row in group.rows)
    return METHOD if fair else f"{METHOD} {STOPPING}"


def conditions(group: Group) -> str:
    """What the figures of one table hold for, in a sentence or two."""
    how = [
        f"{_counted(group, 'asked', 'question')} {TIMES} {_counted(group, 'samples', 'sample')}",
        f"at most {_all(group, 'max_tokens')} new tokens",
        *(in_words(name, group.values(name)[0]) for name in ("temperature", "top_p", "top_k")),
    ]
    made = [_all(group, "device_name"), *versions(group.values("versions"))]
    commits = listed(map(short_commit, group.values("commit")))
    days = listed(sorted(map(str, group.values("date"))))
    notes = "".join(f" {row.name}: {row.note}." for row in group.rows if row.note)
    return f"{', '.join(how)}; {', '.join(made)}. By `lim eval` on {days}, commit {commits}.{notes}"


def _all(group: Group, name: str) -> str:
    """The values of a condition that the rows may not share."""
    unknown = f"unknown {name.replace('_', ' ')}"
    found = group.values(name)
    return listed(f"{each:,}" if type(each) is int else each or unknown for each in found)


def _counted(group: Group, name: str, what: str) -> str:
    return f"{_all(group, name)} {what}{'' if group.values(name) == [1] else 's'}"


def versions(found: Iterable[Mapping[str, Any] | None]) -> list[str]:
    """`SGLang 0.5.16`, and so on; several where runs differ."""
    texts = []
    each_run = [versions or {} for versions in found]
    for name, shown in PACKAGES.items():
        known = dict.fromkeys(str(each[name]) for each in each_run if each.get(name))
        if known:
            texts.append(f"{shown} {listed(known)}")
    return texts
