"""A model in plain torch behind the parts of SGLang's runner that forced decode steps use."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lim_sglang import compat
from lim_sglang.bench import model_runner
from lim_sglang.config import LimConfig

VOCABULARY, LENGTH, STEPS, ROWS = 40, 30, 6, 3


class Runner:
    """Stands in for `LimModelRunner`: a model whose next token hangs on each token that it reads.

    The cache holds, for each slot, the token and the pass that wrote it, and a read asserts that
    the prefix is the dense pass's and the rest the live pass's own.
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(LENGTH, VOCABULARY, VOCABULARY, generator=generator)
        self.cache = torch.full((2, 1 + ROWS * LENGTH), -1)
        self.live = self.num_passes = 0
        self.budget = LENGTH
        self.device = "cpu"
        self.page_size = 1
        self.spec_algorithm = None
        self.model_config = SimpleNamespace(vocab_size=VOCABULARY)
        self.token_to_kv_pool_allocator = SimpleNamespace(
            alloc=lambda need: torch.arange(1, need + 1), clear=lambda: None
        )
        self.req_to_token_pool = SimpleNamespace(
            free_slots=[1, 2, 3], req_to_token=torch.zeros(4, LENGTH, dtype=torch.int32)
        )

    def logits(self, tokens: list[int], budget: int) -> torch.Tensor:
        """Return the logits after some tokens, of which the newest `budget` are read."""
        read = range(max(0, len(tokens) - budget), len(tokens))
        return sum((self.table[n, tokens[n]] for n in read), torch.zeros(VOCABULARY))

    def forward(self, batch: Any) -> Any:
        """Run one step, or a prefill."""
        self.cache[0, batch.out_cache_loc] = batch.input_ids
        self.cache[1, batch.out_cache_loc] = self.live
        if batch.forward_mode == "extend":
            assert self.live == 0
            return None
        rows = []
        for request, length in zip(batch.req_pool_indices, batch.seq_lens.tolist(), strict=True):
            slots = self.req_to_token_pool.req_to_token[request, :length].long()
            tokens, writers = self.cache[:, slots]
            assert writers[: LENGTH - STEPS].eq(0).all()
            assert writers[LENGTH - STEPS :].eq(self.live).all()
            rows.append(self.logits(tokens.tolist(), self.budget))
        output = SimpleNamespace(next_token_logits=torch.stack(rows))
        return SimpleNamespace(can_run_graph=True, logits_output=output)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Runner:
    """Return the model; policies read the newest tokens of their budget."""
    made = Runner()
    fakes = {
        "ForwardBatch": SimpleNamespace,
        "ForwardMode": SimpleNamespace(DECODE="decode", EXTEND="extend"),
        "CaptureHiddenMode": SimpleNamespace(NULL="none"),
    }
    for name, fake in fakes.items():
        monkeypatch.setitem(vars(compat), name, fake)

    def make_contender(runner: Runner, name: str, config: LimConfig | None = None) -> Any:
        if config is None:
            return Dense()
        runner.num_passes += 1
        runner.live, runner.budget = runner.num_passes, config.budget or LENGTH
        runner.lim_config = config  # type: ignore[attr-defined]
        return SimpleNamespace(state={})

    monkeypatch.setattr(model_runner, "make_contender", make_contender)
    return made


class Dense:
    """Stands in for the dense policy's `Contender`."""

    def take_over(self, runner: Runner) -> None:
        """Let the dense policy serve."""
        runner.live, runner.budget = 0, LENGTH
