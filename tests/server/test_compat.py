"""Pins, signatures, look-ups and mends of SGLang, without SGLang and FlashInfer."""

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lim_sglang import compat, mends
from lim_sglang.compat import (
    FLASHINFER_VERSION,
    SGLANG_VERSION,
    reasons_against_decode_stack,
    wrong_signatures,
)
from lim_sglang.errors import ServerError

ROOT = Path(__file__).parents[2]
HERE = __name__
SERVER_ARGS = "sglang.srt.server_args.ServerArgs"


def decorated(function: Any) -> Any:
    """Wrap a function as FlashInfer wraps its interface."""

    @wraps(function)
    def wrapper(*arguments: Any) -> Any:
        return function(*arguments)

    return wrapper


class Wrapper:
    """A stand-in for FlashInfer's decode wrapper."""

    @decorated
    def __init__(self, workspace: Any) -> None:
        self._workspace = workspace
        assert not hasattr(self, "_only_read")


def test_the_pins_are_those_of_the_package() -> None:
    pins = dict(re.findall(r'"([\w-]+)==([\w.]+)"', (ROOT / "pyproject.toml").read_text()))
    assert pins["sglang"] == SGLANG_VERSION
    assert pins["flashinfer-python"] == FLASHINFER_VERSION


@pytest.mark.parametrize("found", ["0.5.17", None])
def test_another_sglang_is_refused_in_words(
    monkeypatch: pytest.MonkeyPatch, found: str | None
) -> None:
    monkeypatch.setattr(compat, "installed_version", lambda _package: found)
    with pytest.raises(ServerError, match=rf"sglang 0\.5\.16 exactly, found {found or 'none'}"):
        compat.check_version()


@pytest.mark.parametrize(
    ("found", "allowed", "tried"),
    [
        ("0.5.23", "0.5.23", "0.5.23"),
        ("0.5.23", "0.5.22", None),
        ("0.5.23", "0.5.2", None),
        ("0.5.23", "1", None),
        ("0.5.23", "", None),
        ("0.5.23", None, None),
        (None, "0.5.23", None),
        (SGLANG_VERSION, SGLANG_VERSION, None),
        (SGLANG_VERSION, "0.5.23", None),
    ],
)
def test_another_sglang_is_let_through_by_exactly_its_version(
    monkeypatch: pytest.MonkeyPatch, found: str | None, allowed: str | None, tried: str | None
) -> None:
    monkeypatch.setattr(compat, "installed_version", lambda _package: found)
    monkeypatch.delenv("LIM_ALLOW_SGLANG", raising=False)
    if allowed is not None:
        monkeypatch.setenv("LIM_ALLOW_SGLANG", allowed)
    assert compat.tried_version() == tried
    reasons = compat.reasons_against_version("sglang", SGLANG_VERSION)
    assert (not reasons) == (bool(tried) or found == SGLANG_VERSION)
    if reasons and allowed:
        assert f"(LIM_ALLOW_SGLANG allows {allowed} beside it)" in reasons[0]
    with nullcontext() if not reasons else pytest.raises(ServerError):
        compat.check_version()


def test_a_tried_sglang_decodes_with_the_flashinfer_that_it_requires(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert compat.flashinfer_version() == FLASHINFER_VERSION
    found = {"sglang": "0.5.23", "flashinfer-python": FLASHINFER_VERSION}
    monkeypatch.setattr(compat, "installed_version", found.get)
    monkeypatch.setattr(compat, "requires", lambda _: ["a==1", "flashinfer_python[cu13]==0.7.2"])
    monkeypatch.setenv("LIM_ALLOW_SGLANG", "0.5.23")
    (reason,) = reasons_against_decode_stack()
    assert f"needs flashinfer-python 0.7.2 exactly, found {FLASHINFER_VERSION}: " in reason
    monkeypatch.setattr(compat, "requires", lambda _: ["a==1"])
    assert compat.flashinfer_version() == FLASHINFER_VERSION


def test_the_pinned_sglang_requires_the_pinned_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, "tried_version", lambda: "as if")
    monkeypatch.setattr(compat, "FLASHINFER_VERSION", "another")
    assert compat.flashinfer_version() == FLASHINFER_VERSION


def test_names_that_each_step_looks_up_read_no_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = compat.ForwardMode
    monkeypatch.setattr(compat, "installed_version", lambda _package: pytest.fail("read again"))
    assert compat.ForwardMode is expected


@pytest.mark.parametrize("found", ["0.6.13", "0.6.15", None])
def test_another_flashinfer_is_a_reason_of_its_own(
    monkeypatch: pytest.MonkeyPatch, found: str | None
) -> None:
    monkeypatch.setattr(compat, "installed_version", lambda _package: found)
    (reason,) = reasons_against_decode_stack()
    assert f"flashinfer-python 0.6.14 exactly, found {found or 'none'}" in reason


@pytest.mark.parametrize(
    ("signatures", "buffers", "words"),
    [
        ({f"{HERE}.decorated": ("function",)}, ("_workspace",), []),
        ({f"{HERE}.decorated": ("method",)}, ("_workspace",), ["takes ('function',)"]),
        (
            {f"{HERE}.decorated": ("function",)},
            ("_workspace", "_only_read", "_gone"),
            ["has no _only_read, _gone"],
        ),
    ],
)
def test_the_pinned_flashinfer_must_have_what_is_used(
    monkeypatch: pytest.MonkeyPatch,
    signatures: dict[str, Any],
    buffers: tuple[str, ...],
    words: list[str],
) -> None:
    monkeypatch.setattr(compat, "installed_version", lambda _package: FLASHINFER_VERSION)
    monkeypatch.setattr(compat, "USED_ON_GPU", signatures)
    monkeypatch.setattr(compat, "WRAPPER", f"{HERE}.Wrapper")
    monkeypatch.setattr(compat, "WRAPPER_BUFFERS", buffers)
    reasons = reasons_against_decode_stack()
    assert len(reasons) == len(words)
    assert all(word in reason for word, reason in zip(words, reasons, strict=True))


def test_a_hooked_function_with_other_parameters_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(compat, "HOOKED", {"json.dumps": ("text",)})
    with pytest.raises(ServerError, match=r"json\.dumps takes \('obj', "):
        compat.check_signatures()


@dataclass
class Options:
    """A stand-in for SGLang's `ServerArgs`, of which a release has renamed one."""

    page_size: int = 1
    mixed_chunk: bool = False


@pytest.mark.parametrize(
    ("allowed", "words"),
    [
        (None, "this sglang is not 0.5.16 as published, install it again"),
        ("0.5.23", "lim-sglang is made for SGLang 0.5.16, adapt it to 0.5.23"),
    ],
)
def test_a_renamed_option_is_refused_by_its_name(
    monkeypatch: pytest.MonkeyPatch, allowed: str | None, words: str
) -> None:
    monkeypatch.setattr(compat, "resolve", lambda path: {SERVER_ARGS: Options}[path])
    monkeypatch.setattr(compat, "tried_version", lambda: allowed)
    compat.check_fields(["page_size"])
    with pytest.raises(ServerError) as found:
        compat.check_fields(["page_size", "enable_mixed_chunk", "allow_all"])
    assert str(found.value) == (
        f"{SERVER_ARGS} has no allow_all, enable_mixed_chunk, which lim-sglang checks before a "
        f"start: {words}"
    )


def test_what_does_not_load_is_named_and_ends_the_search() -> None:
    (reason,) = wrong_signatures({"json.gone": (), "json.dumps": ("text",)})
    assert reason.startswith("json.gone does not load")


def test_an_unknown_name_is_no_attribute() -> None:
    with pytest.raises(AttributeError, match="Nonsense"):
        compat.Nonsense  # noqa: B018 - looking it up is the test


class Manager:
    """A stand-in for SGLang's tokenizer manager, which drops the first state only."""

    def __init__(self) -> None:
        self.states = {"a", "b", "c"}

    async def handle(self, obj: Any, request: Any = None) -> AsyncIterator[str]:
        """Yield one output, then fail if the request says so."""
        yield "output"
        self.states.discard("a")
        if obj.fails:
            raise ConnectionError

    def _discard_pending_req_states(self, obj: Any) -> None:
        self.states -= set(obj.rid)


async def drain(manager: Manager, obj: Any) -> list[str]:
    """Return all outputs of one batch through the mended handler."""
    outputs = mends.handle_batch_without_leak(Manager.handle, manager, obj)
    return [output async for output in outputs]


@pytest.mark.parametrize(
    ("num_samples", "fails", "left"),
    [(3, False, set()), (3, True, set()), (1, False, {"b", "c"})],
)
def test_parallel_samples_leave_no_state_behind_and_others_keep_theirs(
    num_samples: int, fails: bool, left: set[str]
) -> None:
    manager = Manager()
    obj = SimpleNamespace(parallel_sample_num=num_samples, rid=["a", "b", "c"], fails=fails)
    with pytest.raises(ConnectionError) if fails else nullcontext():
        assert asyncio.run(drain(manager, obj)) == ["output"]
    assert manager.states == left


@pytest.mark.parametrize(("value", "on_cpu"), [("1", True), ("0", False), (None, False)])
def test_the_environment_says_where_sglang_serves(
    monkeypatch: pytest.MonkeyPatch, value: str | None, on_cpu: bool
) -> None:
    monkeypatch.delenv(compat.CPU_ENGINE_VAR, raising=False)
    if value is not None:
        monkeypatch.setenv(compat.CPU_ENGINE_VAR, value)
    assert compat.serves_on_cpu() is on_cpu


def test_the_context_is_the_option_or_what_sglang_derives(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = SimpleNamespace(get_context_length=lambda config: config.max_position_embeddings)
    monkeypatch.setattr(compat.importlib, "import_module", lambda _name: reader)
    model = SimpleNamespace(max_position_embeddings=4096)
    assert compat.context_length(SimpleNamespace(context_length=None), model) == 4096
    assert compat.context_length(SimpleNamespace(context_length=512), model) == 512


def test_extra_context_is_what_sglang_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    sizing = SimpleNamespace(get_req_to_token_extra_context_len=lambda args: 4 + args.drafts)
    monkeypatch.setattr(compat.importlib, "import_module", lambda _name: sizing)
    assert compat.extra_context(SimpleNamespace(drafts=3)) == 7


@pytest.mark.parametrize(
    ("chosen", "wanted", "meanwhile"),
    [(None, True, "true"), (None, False, None), ("false", True, "false"), ("true", False, "true")],
)
def test_dense_decode_is_on_tensor_cores_unless_the_user_chose(
    monkeypatch: pytest.MonkeyPatch, chosen: str | None, wanted: bool, meanwhile: str | None
) -> None:
    monkeypatch.delenv(compat.TENSOR_CORE_VAR, raising=False)
    if chosen is not None:
        monkeypatch.setenv(compat.TENSOR_CORE_VAR, chosen)
    seen = []

    def make_backend() -> None:
        with compat.decode_on_tensor_cores(wanted=wanted):
            seen.append(os.environ.get(compat.TENSOR_CORE_VAR))
            raise KeyError

    with pytest.raises(KeyError):
        make_backend()
    assert [*seen, os.environ.get(compat.TENSOR_CORE_VAR)] == [meanwhile, chosen]


@pytest.mark.parametrize(("on_cpu", "compiled"), [(True, 0), (False, 1)])
def test_penalties_and_masks_are_compiled_on_a_gpu_only(
    monkeypatch: pytest.MonkeyPatch, on_cpu: bool, compiled: int
) -> None:
    ran = []

    def plain(logits: str, scaling: str) -> None:
        ran.append((logits, scaling))

    @wraps(plain)
    def compiling(*arguments: str) -> None:
        ran.append("compiled")
        plain(*arguments)

    monkeypatch.setattr(mends, "serves_on_cpu", lambda: on_cpu)
    mends.without_compiler(compiling, "logits", "scaling")
    assert ran == ["compiled"] * compiled + [("logits", "scaling")]


@pytest.mark.parametrize("on_cpu", [True, False])
def test_ranks_of_a_cpu_have_no_nccl(monkeypatch: pytest.MonkeyPatch, on_cpu: bool) -> None:
    monkeypatch.setattr(mends, "serves_on_cpu", lambda: on_cpu)
    given = {"use_pynccl": True, "group_name": "tp"}
    made = mends.group_without_nccl(lambda *_, **words: words, [[0, 1]], 0, "gloo", **given)
    assert made == given | ({"use_pynccl": False, "use_custom_allreduce": False} if on_cpu else {})


@pytest.mark.parametrize(
    ("cores", "ranks", "shares"),
    [
        ([0, 1], 2, [[0], [1]]),
        ([3, 4, 8, 9, 10], 2, [[3, 4], [8, 9]]),
        ([5, 6], 3, [[5], [6], [5]]),
    ],
)
def test_ranks_share_the_cores(cores: list[int], ranks: int, shares: list[list[int]]) -> None:
    assert mends.cores_of_ranks(cores, ranks) == shares


@pytest.mark.parametrize(
    ("ranks", "given", "found", "threads"),
    [
        (1, {}, {}, []),
        (2, {}, {"SGLANG_CPU_OMP_THREADS_BIND": "0,1|2,3"}, [2]),
        (2, {"OMP_NUM_THREADS": "1"}, {"SGLANG_CPU_OMP_THREADS_BIND": "0,1|2,3"}, []),
        (
            *(2, {"SGLANG_CPU_OMP_THREADS_BIND": "8|9"}),
            *({"SGLANG_CPU_OMP_THREADS_BIND": "8|9"}, [2]),
        ),
    ],
)
def test_a_rank_of_a_cpu_keeps_to_its_cores(
    monkeypatch: pytest.MonkeyPatch,
    ranks: int,
    given: dict[str, str],
    found: dict[str, str],
    threads: list[int],
) -> None:
    environment, set_to = dict(given), []
    monkeypatch.setattr(mends, "serves_on_cpu", lambda: True)
    monkeypatch.setattr(mends.os, "sched_getaffinity", lambda _: {3, 1, 2, 0})
    monkeypatch.setattr(mends.os, "environ", environment)
    monkeypatch.setattr(mends, "resolve", lambda _path: set_to.append)
    mends.bind_rank(SimpleNamespace(server_args=SimpleNamespace(tp_size=ranks)))
    assert environment == given | found
    assert set_to == threads


@pytest.mark.parametrize(
    ("on_cpu", "chosen", "served"),
    [
        (True, None, "llguidance"),
        (True, "none", "none"),
        (False, None, None),
        (False, "xgrammar", "xgrammar"),
    ],
)
def test_a_cpu_gets_a_grammar_backend_that_it_can_run(
    monkeypatch: pytest.MonkeyPatch, on_cpu: bool, chosen: str | None, served: str | None
) -> None:
    monkeypatch.setattr(mends, "serves_on_cpu", lambda: on_cpu)
    server_args = SimpleNamespace(grammar_backend=chosen)
    mends.use_grammars_of_cpu(server_args)
    assert server_args.grammar_backend == served


def test_a_tokenizer_that_llguidance_cannot_read_leaves_a_server_without_grammars() -> None:
    def refuse(_server_args: Any, tokenizer: str, _vocab_size: int) -> str:
        if tokenizer == "words":
            raise ValueError("no decoder")
        return "backend"

    cpu, gpu = (SimpleNamespace(grammar_backend=name) for name in ("llguidance", "xgrammar"))
    assert mends.grammars_or_none(refuse, cpu, "bytes", 512) == "backend"
    assert mends.grammars_or_none(refuse, cpu, "words", 512) is None
    with pytest.raises(ValueError, match="no decoder"):
        mends.grammars_or_none(refuse, gpu, "words", 512)


VOCAB_SIZE = 70
"""Tokens of a made-up grammar: two whole words of a mask, and six bits."""


class Grammar:
    """A grammar that allows some tokens, or fails."""

    vocab_size = VOCAB_SIZE
    lim_stuck: str | None

    def __init__(self, words: list[int] | None) -> None:
        self._words = words

    def copy(self) -> "Grammar":
        """Return another at the same place."""
        return Grammar(self._words)

    @staticmethod
    def allocate_vocab_mask(vocab_size: int, batch_size: int, device: str) -> torch.Tensor:
        """Return a mask that allows everything."""
        return torch.full((batch_size, -(-vocab_size // 32)), -1, dtype=torch.int32, device=device)

    def fill(self, vocab_mask: torch.Tensor, idx: int) -> None:
        """Write the words of the mask."""
        if self._words is None:
            raise ValueError("too many items\nand a state")
        vocab_mask[idx] = torch.tensor(self._words, dtype=torch.int32)

    def fill_vocab_mask(self, vocab_mask: torch.Tensor, idx: int) -> None:
        """Fill a row through the mend."""
        mends.fill_mask_or_allow_all(Grammar.fill, self, vocab_mask, idx)


@pytest.mark.parametrize(
    ("words", "stuck"),
    [
        ([0, 1, 0], None),
        ([0, 0, 1 << 5], None),
        ([0, 0, 0], "the grammar allows no token"),
        ([0, 0, 1 << 6], "the grammar allows no token"),  # a bit beyond the vocabulary
        (None, "too many items"),
    ],
)
def test_a_grammar_without_a_token_is_refused_or_lets_all_pass(
    monkeypatch: pytest.MonkeyPatch, words: list[int] | None, stuck: str | None
) -> None:
    monkeypatch.setattr(mends, "resolve", lambda _path: lambda reason: ("invalid", reason))
    grammar = Grammar(words)
    compiled = mends.grammar_that_can_begin(lambda *_: grammar, None, ("json", "{}"), False)
    assert compiled == (("invalid", stuck) if stuck else grammar)

    mask = Grammar.allocate_vocab_mask(VOCAB_SIZE, 2, "cpu").fill_(0)
    grammar.fill_vocab_mask(mask, 1)
    assert mask.tolist() == [[0] * 3, [-1] * 3 if stuck else words]


def test_what_is_no_grammar_of_bits_is_left_alone() -> None:
    for other in (None, SimpleNamespace(error_message="bad")):
        assert mends.grammar_that_can_begin(lambda *_, o=other: o, None, ("a", "b"), False) is other


@pytest.mark.parametrize(("length", "shown"), [(10**30, 4096), (8192, 8192)])
def test_a_tokenizer_without_a_length_gets_the_models(length: int, shown: int) -> None:
    manager = SimpleNamespace(tokenizer=SimpleNamespace(model_max_length=length), context_len=4096)
    mends.bound_tokenizer(None, manager)
    assert manager.tokenizer.model_max_length == shown
    mends.bound_tokenizer(None, SimpleNamespace(tokenizer=None))


@pytest.mark.parametrize(
    ("pattern", "text", "found"),
    [("b$", "ab", True), ("c", "ab", False), ("(a+)+$", "a" * 60 + "b", True)],
)
def test_a_stop_pattern_that_takes_too_long_ends_its_request_alone(
    monkeypatch: pytest.MonkeyPatch, pattern: str, text: str, found: bool
) -> None:
    monkeypatch.setattr(mends, "resolve", lambda _: lambda why, *_: why)  # loads for seconds
    request = SimpleNamespace(
        sampling_params=SimpleNamespace(stop_regex_strs=[pattern]), finished_reason=None
    )

    def look(_request: Any, _new_accepted_len: int) -> bool:
        return re.search(pattern, text) is not None

    began_s = time.monotonic()
    assert mends.stops_within_time(look, request, 1) == found
    assert time.monotonic() - began_s < 5
    assert ("stop_regex" in (request.finished_reason or "")) == (pattern == "(a+)+$")
    time.sleep(2 * mends.MAX_MATCH_S)  # no alarm comes afterwards
