"""Lossless drafting without a server: settings, refusals, slots, ends of runs, counters."""

from array import array
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lim_sglang.config import LimConfig
from lim_sglang.counters import DraftStats
from lim_sglang.errors import ConfigError
from lim_sglang.kernels.reference_sampling import count_accepted
from lim_sglang.lossless.cpu_kernels import copy_in_place, write_slots
from lim_sglang.lossless.passes import LaunchedCycle, host_lengths
from lim_sglang.lossless.widths import reasons_against_verifying
from lim_sglang.mends import (
    add_penalties_before_scaling,
    count_newest_tokens,
    count_tokens_later,
    finish_of_run,
    prepare_after_retraction,
    rows_that_can_be_read,
)
from lim_sglang.policies.lossless import Lossless
from lim_sglang.policies.policy import Role
from lim_sglang.validation import DRAFTING, DRAFTING_REFUSALS, reasons_against_drafting


def test_what_is_served_is_dense_and_drafts_read_one_list_a_segment() -> None:
    policy = Lossless(select_layers=(2, 5))
    assert policy.roles(8) == (Role.FULL,) * 8
    assert policy.list_of_layer(8) == (0, 0, 0, 0, 0, 1, 1, 1)
    assert Lossless(select_layers=(3,)).list_of_layer(5) == (0, 0, 0, 0, 0)
    with pytest.raises(ConfigError, match="layer 5, but the model has 4"):
        policy.roles(4)


def test_the_budget_is_its_own_and_auto_drafts_eight_on_a_cpu() -> None:
    config = LimConfig(policy="lossless")
    assert (config.budget, config.draft_tokens) == (1024, "auto")
    policy = config.make_policy()
    assert isinstance(policy, Lossless)
    assert policy.choices(on_cpu=True) == (8,)
    assert Lossless(draft_tokens=15).choices(on_cpu=False) == (15,)
    assert Lossless(draft_tokens=15).choices(on_cpu=False, most=7) == (7,)
    assert Lossless().choices(on_cpu=False, most=7) == (0, 4, 7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"draft_tokens": 0}, "draft_tokens must be auto or an integer from 1 to 15, not 0"),
        ({"draft_tokens": -1}, "from 1 to 15, not -1"),
        ({"draft_tokens": 16}, "from 1 to 15, not 16"),
        ({"draft_tokens": True}, "from 1 to 15, not True"),
        ({"draft_tokens": 2.0}, "from 1 to 15, not 2.0"),
        ({"draft_tokens": "many"}, "from 1 to 15, not 'many'"),
        ({"policy": "lessismore", "draft_tokens": 4}, "lessismore does not heed draft_tokens"),
        ({"policy": "full", "draft_tokens": "auto"}, "full does not heed draft_tokens"),
        ({"shared_by": "all"}, "lossless does not heed shared_by"),
        ({"dense_layers": [0]}, "no layer of a draft is dense"),
        ({"select_layers": []}, "at least one of select_layers"),
    ],
)
def test_settings_that_draft_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LimConfig.from_mapping({"policy": "lossless"} | settings)


def options(**given: object) -> SimpleNamespace:
    """Return SGLang's options, of those that matter here."""
    fields = {refusal.field: None for refusal in DRAFTING_REFUSALS}
    return SimpleNamespace(**{**fields, "speculative_algorithm": None, **given})


@pytest.mark.parametrize("refusal", DRAFTING_REFUSALS, ids=lambda refusal: refusal.option)
def test_options_that_were_not_verified_with_drafts_are_refused_for_them_alone(
    refusal: Any,
) -> None:
    value = next(v for v in ("fp8_e4m3", 64, True) if refusal.is_refused(v))
    given = options(**{refusal.field: value})
    config = LimConfig(policy="lossless")
    assert refusal.option in " ".join(reasons_against_drafting(given, config))
    assert reasons_against_drafting(options(), config) == []
    assert reasons_against_drafting(given, LimConfig()) == []


def test_groups_that_no_verification_attends_for_are_refused_on_a_gpu() -> None:
    reasons = [
        reasons_against_verifying(SimpleNamespace(num_attention_heads=heads, num_key_value_heads=1))
        for heads in (32, 33, 48)
    ]
    assert reasons[0] == []
    assert "33 query heads" in reasons[1][0]
    assert "at most 32" in reasons[2][0]


def test_lengths_are_known_to_within_the_cycles_that_run() -> None:
    """One request comes from a prefill, and is in no cycle yet."""
    requests = [SimpleNamespace(kv_committed_len=length) for length in (100, 7)]
    batch = SimpleNamespace(reqs=requests, seq_lens_cpu=None)
    first = frozenset([id(requests[0])])
    for widths, lengths, is_exact in (
        ([], [100, 7], True),
        ([9], [109, 7], False),
        ([1], [101, 7], True),
        ([9, 1], [110, 7], False),
    ):
        found, exact = host_lengths(batch, [LaunchedCycle(first, width) for width in widths])
        assert (found.tolist(), exact) == (lengths, is_exact)
    known = SimpleNamespace(reqs=requests, seq_lens_cpu=torch.tensor([3, 4]))
    assert host_lengths(known, [LaunchedCycle(first, 9)])[0].tolist() == [3, 4]


def test_multimodal_rope_is_refused() -> None:
    plain = SimpleNamespace(rope_parameters={"rope_type": "default"}, rope_scaling=None)
    several = SimpleNamespace(rope_scaling={"mrope_section": [16, 24, 24]})
    assert Lossless().reasons_against_model(plain) == []
    assert "multimodal RoPE" in Lossless().reasons_against_model(several)[0]


def test_drafts_are_refused_by_another_name() -> None:
    config = LimConfig(policy="lossless")
    by_name = options(speculative_algorithm=DRAFTING)
    assert "--lim-policy lossless" in reasons_against_drafting(by_name, LimConfig())[0]
    assert reasons_against_drafting(by_name, config) == []


@dataclass
class Arguments:
    """SGLang's arguments, of those that matter here."""

    speculative_algorithm: str | None = None
    speculative_adaptive: bool = False
    speculative_accept_threshold_single: float = 1.0


def test_every_option_of_speculation_is_refused_but_its_default() -> None:
    config = LimConfig(policy="lossless")
    assert reasons_against_drafting(Arguments(), config) == []
    given = Arguments(speculative_adaptive=True, speculative_accept_threshold_single=0.5)
    assert reasons_against_drafting(given, config) == [
        "--speculative-adaptive: policy lossless sets it",
        "--speculative-accept-threshold-single: policy lossless sets it",
    ]


@pytest.mark.parametrize("drafts", [False, True])
def test_under_overlap_newest_tokens_count_once_and_when_the_step_begins(drafts: bool) -> None:
    counted: list[str] = []
    orchestrator = SimpleNamespace(cumulate_output_tokens=counted.append)
    info = SimpleNamespace(penalizer_orchestrator=orchestrator)
    batch = SimpleNamespace(
        enable_overlap=True,
        sampling_info=info,
        spec_algorithm=SimpleNamespace(is_none=lambda: not drafts),
        spec_info=SimpleNamespace(bonus_tokens="of the cycle before"),
        input_ids="of the step before",
    )
    count_tokens_later(pytest.fail, batch)
    assert counted == []
    count_newest_tokens(info)
    count_newest_tokens(info)  # a prefill
    assert counted == ["of the cycle before" if drafts else "of the step before"]
    batch.enable_overlap = False
    count_tokens_later(lambda _: counted.append("by SGLang"), batch)
    assert counted[1:] == ["by SGLang"]


def test_a_retracted_requests_tokens_are_counted_once() -> None:
    asked = SimpleNamespace(
        frequency_penalty=0.5, presence_penalty=0.0, repetition_penalty=1.2, min_new_tokens=3
    )
    requests = [
        SimpleNamespace(output_ids=tokens, sampling_params=asked) for tokens in ([], [1, 2, 1])
    ]
    penalizer = SimpleNamespace(
        orchestrator=SimpleNamespace(reqs=lambda: requests),
        is_prepared=lambda: hasattr(penalizer, "cumulated_frequency_penalties"),
    )

    def prepare(_: Any) -> None:
        penalizer.cumulated_frequency_penalties = torch.zeros(2, 4)
        penalizer.frequency_penalties = torch.full((2, 1), 0.5)
        penalizer.cumulated_presence_penalties = torch.zeros(2, 4)
        penalizer.presence_penalties = torch.zeros(2, 1)
        penalizer.cumulated_repetition_penalties = torch.ones(2, 4)
        penalizer.repetition_penalties = torch.full((2, 1), 1.2)
        penalizer.len_output_tokens = torch.zeros(2, 1, dtype=torch.int32)

    prepare_after_retraction(prepare, penalizer)
    prepare_after_retraction(pytest.fail, penalizer)
    assert penalizer.cumulated_frequency_penalties.tolist() == [[0] * 4, [0, 1, 0.5, 0]]
    assert not penalizer.cumulated_presence_penalties.any()
    scaled = torch.tensor([[1, 1, 1, 1], [1, 1.2, 1.2, 1]])
    assert torch.equal(penalizer.cumulated_repetition_penalties, scaled)
    assert penalizer.len_output_tokens.tolist() == [[0], [3]]


def test_penalties_are_added_before_they_scale() -> None:
    penalties = {
        name: SimpleNamespace(is_multiplicative=name == "repetition")
        for name in ("frequency", "repetition", "presence")
    }
    orchestrator = SimpleNamespace(penalizers=penalties)
    add_penalties_before_scaling(orchestrator)
    assert list(orchestrator.penalizers) == ["frequency", "presence", "repetition"]


def test_a_request_that_names_no_tokens_has_a_row_that_can_be_read() -> None:
    logprobs = torch.zeros(2, 4)
    values, ids = rows_that_can_be_read(([logprobs[0, :2], []], [[0, 1], []]), logprobs, [], True)
    assert [row.tolist() for row in values] == [[0.0, 0.0], []]
    assert ids == [[0, 1], []]
    assert rows_that_can_be_read(([[0.5], []], [[1], []]), logprobs, []) == ([[0.5], []], [[1], []])


@pytest.mark.parametrize(
    ("drafts", "picks", "expected"),
    [
        ([[5, 6, 7]], [[5, 6, 7, 8]], [4]),
        ([[5, 6, 7]], [[5, 9, 7, 8]], [2]),  # what follows a difference does not count
        ([[5, 6, 7], [1, 1, 1]], [[4, 6, 7, 8], [1, 1, 2, 1]], [1, 3]),
        ([[]], [[3]], [1]),
    ],
)
def test_a_run_ends_with_the_first_pick_that_is_no_draft(
    drafts: list[list[int]], picks: list[list[int]], expected: list[int]
) -> None:
    accepted = count_accepted(torch.tensor(drafts, dtype=torch.long), torch.tensor(picks))
    assert accepted.tolist() == expected


def test_slots_are_written_between_each_requests_own_bounds() -> None:
    table = torch.full((4, 8), -1, dtype=torch.int32)
    requests, starts, ends = torch.tensor([2, 0, 3]), torch.tensor([1, 4, 5]), [3, 4, 8]
    write_slots(requests, table, starts, torch.tensor(ends), torch.tensor([70, 71, 80, 81, 82]), 8)
    assert table[2].tolist() == [-1, 70, 71, -1, -1, -1, -1, -1]
    assert table[3].tolist() == [-1, -1, -1, -1, -1, 80, 81, 82]
    assert (table[:2] == -1).all()


def test_keys_of_drafts_are_never_moved() -> None:
    slots = torch.zeros(3, dtype=torch.long)
    copy_in_place(slots, slots, slots, slots)
    with pytest.raises(NotImplementedError, match="never moved"):
        copy_in_place(slots, slots, slots + 1, slots)


class Request:
    """A request that ends as SGLang's: at its limit of tokens first, then at an end token."""

    def __init__(self, tokens: list[int], limit: int) -> None:
        self.output_ids = array("q", tokens)
        self.limit = limit
        self.reason = ""
        self.finished_len = 0
        self.looks: list[tuple[int, int]] = []

    def finished(self) -> bool:
        """Return True behind the end."""
        return bool(self.reason)

    def update(self, count: int) -> None:
        """Look for the end among the last `count` tokens."""
        self.looks.append((len(self.output_ids), count))
        if len(self.output_ids) >= self.limit:
            self.reason, self.finished_len = "length", self.limit
        elif 2 in (run := list(self.output_ids[-count:])):
            self.reason = "stop"
            self.finished_len = len(self.output_ids) - len(run) + run.index(2) + 1


@pytest.mark.parametrize(
    ("tokens", "limit", "run", "expected"),
    [
        ([9, 9, 9, 2, 9, 9], 6, 4, ("stop", 4)),  # SGLang: length, 6
        ([9, 9, 9, 9, 9, 2], 6, 4, ("length", 6)),  # as a dense step has it
        ([9, 9, 9, 9, 9, 2], 5, 4, ("length", 5)),
        ([9, 9, 2, 9, 9, 9], 9, 5, ("stop", 3)),
        ([9, 9, 9, 9], 9, 3, ("", 0)),
        ([9, 9, 9, 2], 9, 1, ("stop", 4)),
    ],
)
def test_a_run_ends_where_it_would_have_ended_token_by_token(
    tokens: list[int], limit: int, run: int, expected: tuple[str, int]
) -> None:
    request = Request(tokens, limit)
    finish: Callable[..., None] = Request.update
    finish_of_run(finish, request, run)
    assert (request.reason, request.finished_len) == expected
    assert request.output_ids.tolist() == tokens
    assert all(count == 1 for _, count in request.looks)


def test_cycles_are_counted_by_what_they_drafted() -> None:
    stats = DraftStats()
    stats.count_undrafted("short")
    stats.count_cycle(1, [0, 0], {})
    stats.count_cycle(5, [4, 0, 2], {1: "penalty"})
    stats.count_cycle(5, [2], {})
    assert asdict(stats) == {
        "cycles": 3,
        "drafted_tokens": 12,
        "accepted_tokens": 8,
        "accepted_histogram": {4: 1, 2: 2},
        "cycles_by_width": {1: 1, 5: 2},
        "rows_capped": {"penalty": 1},
        "cycles_undrafted": {"short": 1},
    }
