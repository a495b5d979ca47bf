"""Defects that are planted into a server with lossless drafting, to see that tests catch them.

`sitecustomize(folder)` makes every Python process whose `PYTHONPATH` begins with the folder change
the worker's module right after its import, by the function that `LIM_TEST_DEFECT` names.
"""

from collections.abc import Callable, Mapping
from inspect import unwrap
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SITECUSTOMIZE = """
import importlib.abc, importlib.machinery, os, sys

class Planter(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "lim_sglang.lossless.worker":
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


def sitecustomize(folder: Path, change: str) -> dict[str, str]:
    """Write the module into a folder; return the environment that plants a change."""
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
    root = Path(__file__).parents[2]
    return {"PYTHONPATH": f"{folder}:{root}", "LIM_TEST_DEFECT": change}


def _around(owner: Any, name: str, function: Callable[..., Any]) -> None:
    original = getattr(owner, name)
    setattr(owner, name, lambda *arguments, **words: function(original, *arguments, **words))


def _accept(change: Callable[[Tensor, int], Tensor]) -> Callable[[Any], None]:
    def plant(worker: Any) -> None:
        def count(original: Any, drafts: Tensor, picks: Tensor) -> Tensor:
            return change(original(drafts, picks), picks.shape[1])

        _around(worker, "count_accepted", count)

    return plant


def _forward(change: Callable[..., tuple[Any, ...]]) -> Callable[[Any], None]:
    """Change the arguments of a model pass: `change(worker, batch, tokens, positions, slots)`."""

    def plant(worker: Any) -> None:
        def forward(original: Any, self: Any, *arguments: Any) -> Any:
            return original(self, *change(self, *arguments))

        _around(worker.LosslessWorker, "_forward", forward)

    return plant


def _draft_below(self: Any, batch: Any, tokens: Any, positions: Any, slots: Any) -> tuple[Any, ...]:
    if self._backend._lists is not None:
        table = self.req_to_token_pool.req_to_token
        slots = table[batch.req_pool_indices[:, None], positions - 1].long()
    return batch, tokens, positions, slots


def _shift_slots(_: Any, batch: Any, tokens: Any, positions: Any, slots: Any) -> tuple[Any, ...]:
    return batch, tokens, positions, slots.roll(1, 1)


def _keep_draft_keys(worker: Any) -> None:
    """Let verification attend without writing keys and values."""
    from lim_sglang.lossless.cpu_backend import LosslessCpuBackend

    verifying = [False]

    def forward(original: Any, self: Any, batch: Any, tokens: Tensor, *rest: Any) -> Any:
        verifying[0] = tokens.shape[1] > 1
        try:
            return original(self, batch, tokens, *rest)
        finally:
            verifying[0] = False

    def attend(original: Any, self: Any, *arguments: Any, **_: Any) -> Any:
        return original(self, *arguments[:5], not verifying[0])

    _around(worker.LosslessWorker, "_forward", forward)
    _around(LosslessCpuBackend, "forward_decode", attend)


def _share_rejected_keys(_: Any) -> None:
    """Put one token more into the radix tree than was verified."""
    from sglang.srt.managers.schedule_batch import Req

    def length(original: Any, req: Any) -> int:
        return min(original(req) + 1, len(req.origin_input_ids) + len(req.output_ids))

    _around(Req, "effective_kv_committed_len", length)


def _newest(choose: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Callable[[Any], None]:
    """Change the newest tokens: `choose(newest, drafts, picks, rows)`, all of one cycle."""

    def plant(worker: Any) -> None:
        seen: dict[str, Tensor] = {}

        def forward(original: Any, self: Any, batch: Any, tokens: Tensor, *rest: Any) -> Any:
            seen["tokens"] = tokens
            return original(self, batch, tokens, *rest)

        def verify(original: Any, self: Any, *arguments: Any) -> Tensor:
            seen["picks"] = original(self, *arguments)
            return seen["picks"]

        def keep(original: Any, self: Any, requests: Any, newest: Any, rows: Tensor) -> None:
            if seen and len(seen["picks"]) == len(requests):
                chosen = choose(torch.tensor(newest), seen["tokens"], seen["picks"], rows)
                newest = chosen.tolist()
            original(self, requests, newest, rows)
            seen.clear()

        _around(worker.LosslessWorker, "_forward", forward)
        _around(worker.RunSampling, "verify", verify)
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


def _wrong_stride(result: Any) -> None:
    if result.speculative_num_draft_tokens > 1:
        result.speculative_num_draft_tokens -= 1


def _queries(change: Callable[[Any], None]) -> Callable[[Any], None]:
    """Change what is kept of a pass: `change(worker)` after each."""

    def plant(worker: Any) -> None:
        def keep(original: Any, self: Any, *arguments: Any) -> None:
            original(self, *arguments)
            change(self)

        _around(worker.LosslessWorker, "_keep", keep)

    return plant


def _swap_queries(self: Any) -> None:
    kept = list(self._queries.values())
    self._queries.update(zip(self._queries, [*kept[1:], kept[0]], strict=True))


def _lists(change: Callable[..., list[list[Tensor]]]) -> Callable[[Any], None]:
    """Change the lists of a cycle: `change(worker, batch, requests, lists)`."""

    def plant(worker: Any) -> None:
        def select(original: Any, self: Any, batch: Any, requests: Any) -> Any:
            return change(self, batch, requests, original(self, batch, requests))

        _around(worker.LosslessWorker, "_select_lists", select)

    return plant


def _old_lists(self: Any, _: Any, requests: Any, lists: list[list[Tensor]]) -> list[list[Tensor]]:
    """Use each list in the next cycle, too."""
    old: dict[int, list[Tensor]] = self.__dict__.setdefault("planted", {})
    for row, request in enumerate(requests):
        if request in old:
            for of_layer, kept in zip(lists, old.pop(request), strict=True):
                of_layer[row] = kept
        else:
            old[request] = [of_layer[row] for of_layer in lists]
    return lists


def _all_slots(
    self: Any, batch: Any, requests: Any, lists: list[list[Tensor]]
) -> list[list[Tensor]]:
    table = self.req_to_token_pool.req_to_token
    rows = list(zip(requests, batch.seq_lens.tolist(), strict=True))
    return [[table[request, :length].long() for request, length in rows] for _ in lists]


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


def _random_slots(self: Any, _: Any, __: Any, lists: list[list[Tensor]]) -> list[list[Tensor]]:
    slots = len(self._runner.token_to_kv_pool.get_key_buffer(0))
    return [[torch.randint(0, slots, kept.shape) for kept in of_layer] for of_layer in lists]


def _slot_zero(_: Any, __: Any, ___: Any, lists: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[torch.zeros_like(kept) for kept in of_layer] for of_layer in lists]


def _others_lists(_: Any, __: Any, ___: Any, lists: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[*of_layer[1:], of_layer[0]] for of_layer in lists]


DEFECTS: Mapping[str, Callable[[Any], None]] = {
    "run-too-long": _accept(lambda count, width: (count + 1).clamp(max=width)),
    "run-too-short": _accept(lambda count, _: (count - 1).clamp(min=1)),
    "draft-keys-below": _forward(_draft_below),
    "draft-keys-stay": _keep_draft_keys,
    "verified-slots-shifted": _forward(_shift_slots),
    "rejected-keys-shared": _share_rejected_keys,
    "newest-from-draft": _newest(_next_draft),
    "newest-of-next-row": _newest(_next_pick),
    "noise-later": _verify_positions(1),
    "noise-earlier": _verify_positions(-1),
    "seeds-lost": _lose_seeds,
    "stride-not-width": _cycle(_wrong_stride),
    "query-of-another": _queries(_swap_queries),
    "set-of-last-cycle": _lists(_old_lists),
    "drafts-read-all": _lists(_all_slots),
    "rows-without-room": _rows_without_room,
    "stop-at-run-end": _as_sglang_finishes(by_run=False),
    "length-before-end-token": _as_sglang_finishes(by_run=True),
}
"""Each has to be caught."""
WRONG_SETS: Mapping[str, Callable[[Any], None]] = {
    "random-slots": _lists(_random_slots),
    "slot-zero": _lists(_slot_zero),
    "lists-of-others": _lists(_others_lists),
}
"""Each costs acceptance and changes no token."""
CHANGES = {**DEFECTS, **WRONG_SETS}
