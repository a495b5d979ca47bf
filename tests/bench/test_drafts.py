"""`lim bench drafts`: what is counted, and what it refuses; its times need a GPU."""

from dataclasses import replace

import pytest
import torch

from lim_sglang.bench.drafts import (
    ACCEPTANCE,
    TEXTS,
    DraftRow,
    Draw,
    draft_table,
    expected_tokens,
    sampling_of,
)
from lim_sglang.bench.workloads import check_draft_budgets, read_drafts, read_timed_policies
from lim_sglang.errors import ConfigError
from lim_sglang.kernels.bench import Spread
from lim_sglang.policies.lossless import MAX_DRAFT_TOKENS


def row(name: str, ms: float, drafts: int = 0, budget: int | None = None) -> DraftRow:
    tokens = expected_tokens(drafts, budget) if budget else dict.fromkeys(TEXTS, 1.0)
    return DraftRow("8x32768", name, budget, drafts, Draw(), Spread.of([ms]), tokens)


@pytest.mark.parametrize("budget", ACCEPTANCE)
def test_acceptance_falls_by_place_and_is_higher_on_easy_texts(budget: int) -> None:
    for shares in ACCEPTANCE[budget].values():
        assert len(shares) == MAX_DRAFT_TOKENS
        assert sorted(shares, reverse=True) == list(shares)
    assert expected_tokens(0, budget) == dict.fromkeys(TEXTS, 1.0)
    found = expected_tokens(8, budget)
    assert 9 > found["easy"] > found["hard"] > 1


def test_a_smaller_budget_counts_fewer_tokens() -> None:
    """As measured: 5.2, 5.9, 6.3 and 6.7 of 8 drafts of source code, and the run's last token."""
    found = [expected_tokens(8, budget)["hard"] for budget in (256, 512, 1024, 2048)]
    assert found == pytest.approx([6.23, 6.85, 7.2, 7.73], abs=0.05)


def test_cycles_are_compared_with_dense_steps_of_the_same_sampling() -> None:
    greedy = Draw(0.0)
    rows = [
        row("flashinfer", 10.0),
        replace(row("flashinfer", 5.0), draw=greedy),
        row("lossless", 40.0, 8, 1024),
    ]
    table = draft_table(rows)
    (cells,) = (line for line in table.splitlines() if "8 drafts" in line)
    assert "1,024, 8 drafts (T 0.6)" in cells
    easy = 40 / expected_tokens(8, 1024)["easy"]
    assert f"{easy:.2f} ({10 / easy:.2f})" in cells
    assert "(greedy)" in table


def test_greedy_is_top_k_of_one_and_filters_are_said_to_sglang() -> None:
    greedy = sampling_of(2, Draw(0.0, 0.9), 100, "cpu")
    assert (greedy.is_all_greedy, greedy.top_ks.tolist()) == (True, [1, 1])
    filtered = sampling_of(2, Draw(0.6, 0.95), 100, "cpu")
    assert (filtered.is_all_greedy, filtered.need_top_p_sampling) == (False, True)
    assert torch.equal(filtered.top_ps, torch.full((2,), 0.95))


@pytest.mark.parametrize("drafts", ["3", "16", "-1", "many", ""])
def test_drafts_without_graphs_are_refused(drafts: str) -> None:
    assert read_drafts("0, 4,15,4") == (0, 4, 15)
    with pytest.raises(ConfigError, match="0, 4, 8, 12, 15, which have CUDA graphs"):
        read_drafts(drafts)


def test_budgets_without_recorded_acceptance_are_refused() -> None:
    check_draft_budgets([256, 1024], ACCEPTANCE)
    with pytest.raises(ConfigError, match=r"--draft-budget 300: .* 256, 512, 1,024, 2,048"):
        check_draft_budgets([300, 512], ACCEPTANCE)


def test_lossless_is_no_policy_of_steps() -> None:
    with pytest.raises(ConfigError, match="time it by lim bench drafts"):
        read_timed_policies(["quest,lossless"], 256)
