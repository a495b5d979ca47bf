"""The script that tries another release of SGLang: it names what moved, and nothing else."""

import copy
from typing import Any

import pytest

from lim_sglang import compat
from tests.try_release import moved, names_in_code

OLD: dict[str, Any] = {
    "versions": {"sglang": "1"},
    "checked": {"sglang.a.f": ["self", "x"], "sglang.a.not_here": None},
    "called": {"sglang.a.g": ["y"]},
    "bodies": {"sglang.a.f": "12ab", "sglang.a.not_here": None},
    "buffers": [],
    "missing_names": ["sglang.a.not_here"],
    "options": {"tp_size": "1", "page_size": "None"},
    "new_steps": [],
    "checks_are_hooked": True,
    "stores_scores": "a\nlogits = variant(x);\nb",
}
"""A release as it describes itself."""


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"checked": {"sglang.a.f": ["self"]}}, "checked", "sglang.a.f: (self), was (self, x)"),
        ({"checked": {"sglang.a.f": None}}, "checked", "sglang.a.f: gone"),
        ({"called": {"sglang.a.g": ["z"]}}, "Further signatures", "sglang.a.g: (z), was (y)"),
        ({"missing_names": ["sglang.a.g"]}, "Names", "sglang.a.g"),
        ({"bodies": {"sglang.a.f": "34cd"}}, "another body", "sglang.a.f"),
        ({"options": {"page_size": "None"}}, "Options that are gone", "tp_size (was 1)"),
        ({"options": {**OLD["options"], "dp": "2"}}, "Options that are new", "dp = 2"),
        ({"options": {**OLD["options"], "tp_size": "2"}}, "another default", "tp_size = 2, was 1"),
        ({"checks_are_hooked": False}, "silence", "__post_init__"),
        ({"new_steps": ["sglang.srt.runtime_context.assert_published"]}, "silence", "publish"),
        ({"stores_scores": "a\nskip;\nlogits = variant(x);\nb"}, "silence", "+skip;"),
        ({"buffers": ["no _int_workspace_buffer"]}, "silence", "no _int_workspace_buffer"),
    ],
)
def test_what_moved_is_named_by_what_it_breaks(
    change: dict[str, Any], kind: str, words: str
) -> None:
    """Plant one change in a description; it is named under its kind, and nothing else is."""
    found = moved(OLD, {**copy.deepcopy(OLD), **change})
    named = {title: items for title, items in found.items() if items}
    assert list(named) == [title for title in found if kind in title]
    assert words in "\n".join(*named.values())


def test_a_release_has_not_moved_from_itself() -> None:
    """A function that no release has is no change."""
    assert not any(moved(OLD, OLD).values())


def test_names_are_found_in_every_form_of_our_code() -> None:
    """Imports, dotted texts, and attributes of modules that are imported by name."""
    names = set(names_in_code())
    assert {
        "sglang.srt.layers.attention.flashinfer_backend.FlashInferAttnBackend",
        str(compat.Target.POST_INIT),
        "sglang.srt.layers.moe.initialize_moe_config",
    } <= names
