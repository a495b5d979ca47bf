"""Defects that are planted into a server, to see that tests catch them.

`sitecustomize(folder)` makes every Python process whose `PYTHONPATH` begins with the folder change
a module right after its import, by the function that `LIM_TEST_DEFECT` names.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from inspect import unwrap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lim_sglang.lossless.passes import CycleRows
from tests.server import interpreted_passes

SITECUSTOMIZE = """
import importlib.abc, importlib.machinery, os, sys

class Planter(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != os.environ["LIM_TEST_DEFECTIVE"]:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module
        def exec_module(module):
            run(module)
            from tests.server.planted import CHANGES
            CHANGES[os.environ["LIM_TEST_DEFECT"]](module)
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Planter())
"""


WORKER, EXCHANGE = "lim_sglang.lossless.worker", "lim_sglang.kernels.exchange"
RUNNER = "lim_sglang.model_runner"
"""Modules that are changed: of lossless drafting, of ranks that share query heads, of a server's
start."""


def sitecustomize(folder: Path, change: str, module: str = WORKER) -> dict[str, str]:
    """Write the module into a folder; return the environment that plants a change."""
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    paths = [str(folder), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "LIM_TEST_DEFECT": change,
        "LIM_TEST_DEFECTIVE": module,
    }


def _around(owner: Any, name: str, function: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    setattr(owner, name, lambda *arguments, **words: function(original, *arguments, **words))


def _accept(change: Callable[[Tensor, int], Tensor]) -> Callable[[Any], None]:
    def plant(worker: Any) -> None:
        def count(original: Any, drafts: Tensor, picks: Tensor) -> Tensor:
            return change(original(drafts, picks), picks.shape[1])

        _around(worker, "count_accepted", count)

    return plant


def _slots(pass_name: str, change: Callable[[Any, CycleRows], Tensor]) -> Callable[[Any], None]:
    """Let a pass, `draft_step` or `verify`, write elsewhere: `change(passes, rows)`."""

    def plant(_: Any) -> None:
        def run(original: Any, self: Any, *arguments: Any) -> Any:
            rows = self.rows
            self.rows = replace(rows, slots=change(self, rows))
            try:
                return original(self, *arguments)
            finally:
                self.rows = rows

        _around(_cpu_passes(), pass_name, run)

    return plant


def _cpu_passes() -> Any:
    from lim_sglang.lossless.cpu_passes import CpuPasses

    return CpuPasses


def _slots_below(self: Any, rows: CycleRows) -> Tensor:
    return self.req_to_token[rows.requests[:, None], rows.positions - 1].long()


def _keep_draft_keys(_: Any) -> None:
    """Let verification attend without writing keys and values."""
    from lim_sglang.lossless.cpu_passes import LosslessCpuBackend

    verifying = [False]

    def verify(original: Any, self: Any, tokens: Tensor) -> Any:
        verifying[0] = tokens.shape[1] > 1
        try:
            return original(self, tokens)
        finally:
            verifying[0] = False

    def attend(original: Any, self: Any, *arguments: Any, **_: Any) -> Any:
        return original(self, *arguments[:5], not verifying[0])

    _around(_cpu_passes(), "verify", verify)
    _around(LosslessCpuBackend, "forward_decode", attend)


def _share_rejected_keys(_: Any) -> None:
    """Put one token more into the radix tree than was verified, where the request has its slot."""
    from sglang.srt.managers.schedule_batch import Req

    def length(original: Any, req: Any) -> int:
        longest = len(req.origin_input_ids) + len(req.output_ids)
        return min(original(req) + 1, longest, req.kv.kv_allocated_len)

    _around(Req, "effective_kv_committed_len", length)


def _newest(choose: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Callable[[Any], None]:
    """Change the newest tokens: `choose(newest, drafts, picks, rows)`, all of one cycle."""

    def plant(worker: Any) -> None:
        seen: dict[str, Tensor] = {}

        def verify(original: Any, self: Any, tokens: Tensor) -> Any:
            seen["tokens"] = tokens
            return original(self, tokens)

        def pick(original: Any, self: Any, *arguments: Any) -> Tensor:
            seen["picks"] = original(self, *arguments)
            return seen["picks"]

        def find(original: Any, self: Any, rows: Tensor) -> Tensor:
            seen["rows"] = rows
            return original(self, rows)

        def keep(original: Any, self: Any, requests: Any, newest: Tensor, queries: Any) -> None:
            if seen:
                newest = choose(newest, seen["tokens"], seen["picks"], seen["rows"])
            original(self, requests, newest, queries)
            seen.clear()

        _around(_cpu_passes(), "verify", verify)
        _around(_cpu_passes(), "queries_of", find)
        _around(worker.RunSampling, "verify", pick)
        _around(worker.LosslessWorker, "_keep", keep)

    return plant


def _next_draft(newest: Tensor, drafts: Tensor, _: Tensor, rows: Tensor) -> Tensor:
    width = drafts.shape[1]
    place = rows % width + 1
    return torch.where(place < width, drafts.flatten()[(rows + 1) % drafts.numel()], newest)


def _next_pick(newest: Tensor, _: Tensor, picks: Tensor, rows: Tensor) -> Tensor:
    width = picks.shape[1]
    place = rows % width + 1
    return torch.where(place < width, picks.flatten()[(rows + 1) % picks.numel()], newest)


def _verify_positions(by: int) -> Callable[[Any], None]:
    def plant(worker: Any) -> None:
        def verify(original: Any, self: Any, logits: Tensor, positions: Tensor) -> Tensor:
            picked: Tensor = original(self, logits, positions + by)
            return picked

        _around(worker.RunSampling, "verify", verify)

    return plant


def _lose_seeds(worker: Any) -> None:
    def begin(original: Any, self: Any, requests: Any, info: Any, sampler: Any) -> None:
        info.sampling_seed = info.sampling_seed.roll(1)
        original(self, requests, info, sampler)

    _around(worker.RunSampling, "__init__", begin)


def _cycle(change: Callable[[Any], None]) -> Callable[[Any], None]:
    """Change a cycle's result."""

    def plant(worker: Any) -> None:
        def run(original: Any, *arguments: Any) -> Any:
            result = original(*arguments)
            change(result)
            return result

        _around(worker.LosslessWorker, "_run_cycle", run)

    return plant


def _bias_twice(worker: Any) -> None:
    """Add the bias to capped rows again, which have theirs with all else that they ask for."""

    def pick(original: Any, self: Any, logits: Tensor, positions: Tensor) -> Tensor:
        if self.capped and self.info.logit_bias is not None:
            rows = list(self.capped)
            logits[rows] += self.info.logit_bias[rows, None]
        picked: Tensor = original(self, logits, positions)
        return picked

    _around(worker.RunSampling, "_pick", pick)


def _prefill(change: Callable[[Any, Any, Tensor, Tensor], None]) -> Callable[[Any], None]:
    """Change what a prefill keeps: `change(worker, batch, newest, queries)`, both as they were."""

    def plant(worker: Any) -> None:
        def run(original: Any, self: Any, batch: Any) -> Any:
            rows = batch.req_pool_indices
            before = self._newest[rows].clone(), self._queries[rows].clone()
            result = original(self, batch)
            change(self, batch, *before)
            return result

        _around(worker.LosslessWorker, "_prefill", run)

    return plant


def _stale_newest(self: Any, batch: Any, newest: Tensor, _: Tensor) -> None:
    """Go on from the token before where a request was retracted."""
    for row, request in enumerate(batch.reqs):
        if request.output_ids:
            self._newest[batch.req_pool_indices[row]] = newest[row]


def _lost_queries(self: Any, batch: Any, _: Tensor, queries: Tensor) -> None:
    """Keep no query where the radix tree had a part of the prompt."""
    for row, request in enumerate(batch.reqs):
        if len(request.prefix_indices) > 0:
            self._queries[batch.req_pool_indices[row]] = queries[row]


def _save_keys(_: Any) -> None:
    """Save keys and values of each request that ends, of all tokens that go into the tree, to a
    file named by the number of these tokens."""
    from sglang.srt.mem_cache.radix_cache import RadixCache

    folder = Path(os.environ[KEYS_VAR])

    def cache(original: Any, self: Any, req: Any, *arguments: Any, **words: Any) -> None:
        length, pool = words["kv_len_to_handle"], self.token_to_kv_pool_allocator.get_kvcache()
        slots = self.req_to_token_pool.req_to_token[req.req_pool_idx, :length].long()
        layers = range(pool.layer_num)
        found = {
            "tokens": list(req.origin_input_ids + req.output_ids)[:length],
            "keys": torch.stack([pool.get_key_buffer(layer)[slots] for layer in layers]),
            "values": torch.stack([pool.get_value_buffer(layer)[slots] for layer in layers]),
        }
        torch.save(found, folder / f"{length}.pt")
        original(self, req, *arguments, **words)

    _around(RadixCache, "cache_finished_req", cache)


def _wrong_stride(result: Any) -> None:
    if result.speculative_num_draft_tokens > 1:
        result.speculative_num_draft_tokens -= 1


def _swap_queries(_: Any) -> None:
    """Give each request the queries of another."""

    def begin(original: Any, self: Any, rows: CycleRows, queries: Tensor | None) -> None:
        original(self, rows, None if queries is None else queries.roll(1, 0))

    _around(_cpu_passes(), "begin", begin)


def _lists(change: Callable[..., list[list[Tensor]]]) -> Callable[[Any], None]:
    """Change the lists of a cycle: `change(passes, rows, lists)`."""

    def plant(_: Any) -> None:
        def select(original: Any, self: Any, rows: CycleRows, queries: Tensor) -> Any:
            return change(self, rows, original(self, rows, queries))

        _around(_cpu_passes(), "_select_lists", select)

    return plant


def _old_lists(self: Any, rows: CycleRows, lists: list[list[Tensor]]) -> list[list[Tensor]]:
    """Use each list in the next cycle, too."""
    old: dict[int, list[Tensor]] = self.__dict__.setdefault("planted", {})
    for row, request in enumerate(rows.requests.tolist()):
        if request in old:
            for of_layer, kept in zip(lists, old.pop(request), strict=True):
                of_layer[row] = kept
        else:
            old[request] = [of_layer[row] for of_layer in lists]
    return lists


def _all_slots(self: Any, rows: CycleRows, lists: list[list[Tensor]]) -> list[list[Tensor]]:
    table = self.req_to_token
    each = list(zip(rows.requests.tolist(), rows.lengths.tolist(), strict=True))
    return [[table[request, :length].long() for request, length in each] for _ in lists]


def _merge_alone(exchange: Any) -> None:
    """Let the second rank take its own turns, masses and bounds for those of all."""

    def merge(original: Any, self: Any, *arguments: Any) -> None:
        *others, gathered = arguments
        if self.ranks.rank == 1:
            gathered.view(self.ranks.size, -1).copy_(self.own.view(1, -1))
        original(self, *others, gathered)

    def unite(original: Any, self: Any, out: Any) -> None:
        original(self, out)
        if self.ranks.rank == 1:
            out.values[: self.own.most_values].copy_(self.own.values[: self.own.most_values])

    _around(exchange.TurnExchange, "merge_turns", merge)
    _around(exchange.ScoreExchange, "unite", unite)


def _use_layer_kernels(runner: Any) -> None:
    """Let the layers of a CPU server run by the kernels, which are interpreted."""
    runner.uses_layer_kernels = lambda: True


def _as_sglang_finishes(*, by_run: bool) -> Callable[[Any], None]:
    """Take the mend of a run's end back; or look at the last token of a run alone."""

    def plant(_: Any) -> None:
        from sglang.srt.managers.schedule_batch import Req

        original = unwrap(Req.update_finish_state)
        length = (lambda count: count) if by_run else (lambda _: 1)
        Req.update_finish_state = lambda req, count=1: original(req, length(count))

    return plant


def _rows_without_room(_: Any) -> None:
    """Take the mend of the rows' length back."""
    from sglang.srt.mem_cache import kv_cache_configurator as module

    original = unwrap(module.get_req_to_token_extra_context_len)
    module.get_req_to_token_extra_context_len = original


def _random_slots(self: Any, _: Any, lists: list[list[Tensor]]) -> list[list[Tensor]]:
    slots = len(self.runner.token_to_kv_pool.get_key_buffer(0))
    return [[torch.randint(0, slots, kept.shape) for kept in of_layer] for of_layer in lists]


def _slot_zero(_: Any, __: Any, lists: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[torch.zeros_like(kept) for kept in of_layer] for of_layer in lists]


def _others_lists(_: Any, __: Any, lists: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[*of_layer[1:], of_layer[0]] for of_layer in lists]


@dataclass(frozen=True)
class Defect:
    """A change that has to be caught."""

    plant: Callable[[Any], None]
    caught_by: tuple[str, ...]
    """Checks of `test_lossless_e2e.py` that find it; or `death`: SGLang ends, as by a row of slots
    that is written past its end."""
    options: tuple[str, ...] = ()
    """Options of the server, without which nothing meets the change."""


SMALL_POOL = ("--max-total-tokens", "2200", "--schedule-conservativeness", "0")
"""Options of a server that retracts requests."""
DEFECTS: Mapping[str, Defect] = {
    "run-too-long": Defect(
        _accept(lambda count, width: (count + 1).clamp(max=width)), ("answers",)
    ),
    "run-too-short": Defect(_accept(lambda count, _: (count - 1).clamp(min=1)), ("cycles",)),
    "draft-keys-below": Defect(_slots("draft_step", _slots_below), ("answers",)),
    "draft-keys-stay": Defect(_keep_draft_keys, ("answers",)),
    "verified-slots-shifted": Defect(
        _slots("verify", lambda _, rows: rows.slots.roll(1, 1)), ("answers",)
    ),
    "rejected-keys-shared": Defect(_share_rejected_keys, ("keys",)),
    "newest-from-draft": Defect(_newest(_next_draft), ("answers",)),
    "newest-of-next-row": Defect(_newest(_next_pick), ("answers",)),
    "noise-later": Defect(_verify_positions(1), ("answers",)),
    "noise-earlier": Defect(_verify_positions(-1), ("answers",)),
    "seeds-lost": Defect(_lose_seeds, ("answers",)),
    "stride-not-width": Defect(_cycle(_wrong_stride), ("answers",)),
    "query-of-another": Defect(_swap_queries, ("cycles",)),
    "set-of-last-cycle": Defect(_lists(_old_lists), ("cycles",)),
    "drafts-read-all": Defect(_lists(_all_slots), ("cycles",)),
    "rows-without-room": Defect(_rows_without_room, ("death",)),
    "stop-at-run-end": Defect(_as_sglang_finishes(by_run=False), ("answers",)),
    "length-before-end-token": Defect(_as_sglang_finishes(by_run=True), ("answers",)),
    "bias-twice": Defect(_bias_twice, ("answers",)),
    "query-lost-behind-prefix": Defect(_prefill(_lost_queries), ("cycles",)),
    "newest-stale-after-retraction": Defect(
        _prefill(_stale_newest), ("answers",), options=SMALL_POOL
    ),
}
WRONG_SETS: Mapping[str, Callable[[Any], None]] = {
    "random-slots": _lists(_random_slots),
    "slot-zero": _lists(_slot_zero),
    "lists-of-others": _lists(_others_lists),
}
"""Each costs acceptance and changes no token."""
ALONE = "a rank merges its own turns alone"
LAYER_KERNELS = "layers run by our kernels"
KEYS_VAR, SAVED_KEYS = "LIM_TEST_KEYS", "keys of each request are saved"
CHANGES = {
    **{name: defect.plant for name, defect in DEFECTS.items()},
    SAVED_KEYS: _save_keys,
    **WRONG_SETS,
    interpreted_passes.NAME: interpreted_passes.serve,
    ALONE: _merge_alone,
    LAYER_KERNELS: _use_layer_kernels,
}
