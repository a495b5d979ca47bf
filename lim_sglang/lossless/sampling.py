"""Tokens of drafts and of verified rows, drawn as the dense server draws them.

The draw is a function of logits, seed and position (`kernels/reference_sampling.py`). What a
request asks for beyond it is either applied to each row, or known of the first row of a run alone:
then the request's run is capped at that row.

Shapes: B requests, w rows of each, V tokens of the vocabulary.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lim_sglang.mends import NO_PENALTY


def reason_to_cap(request: Any) -> str | None:
    """Return why a request's runs have one token, None if they need not.

    Each of these changes with every token, or needs what only a dense step of one row gives.
    """
    parameters = request.sampling_params
    if request.grammar is not None:
        return "grammar"
    if any(getattr(parameters, f"{kind}_penalty") != none for kind, none in NO_PENALTY.items()):
        return "penalty"
    if request.custom_logit_processor:
        return "logit_processor"
    return "hidden_states" if request.return_hidden_states else None


class RunSampling:
    """Sampling of one cycle: parameters of its requests, ready to draw from any of their rows."""

    def __init__(self, requests: Sequence[Any], info: Any, sampler: Any) -> None:
        """Read the requests.

        Args:
            info: SGLang's sampling parameters of the batch.
            sampler: SGLang's live sampler, which must be the coupled one.
        """
        self.info, self._sampler = info, sampler
        reasons = [reason_to_cap(request) for request in requests]
        self.capped = {row: reason for row, reason in enumerate(reasons) if reason}
        """Reasons by the index of the request."""
        self._at_least = {
            row: (_first_stop(request), self._on_device(_stop_tokens(request)))
            for row, request in enumerate(requests)
            if row not in self.capped and request.kv_committed_len < _first_stop(request)
        }
        """Position of the first query that a stop may follow, and the ids that stop, of each
        request that asks for a least number of tokens."""

    @cached_property
    def _capped(self) -> Tensor:
        """[n] int64, rows of capped requests."""
        return self._on_device(list(self.capped))

    def draft(self, logits: Tensor, positions: Tensor) -> Tensor:
        """Draw a draft of each request.

        Args:
            logits: [B, V]; changed to what is drawn from.
            positions: [B], of the queries.

        Returns:
            [B] int64.
        """
        return self._pick(logits[:, None], positions[:, None])[:, 0]

    def verify(self, logits: Tensor, positions: Tensor) -> Tensor:
        """Draw the token after each row of a run, as the dense server does.

        Args:
            logits: [B, w, V]; changed to what is drawn from.
            positions: [B, w], of the queries.

        Returns:
            [B, w] int64; of a capped request the first counts alone.
        """
        if self.capped:
            rows = self._capped
            logits[rows, 0] = self._as_dense(logits[:, 0].clone())[rows]
        return self._pick(logits, positions)

    def cap(self, counts: Tensor) -> Tensor:
        """Cap the runs of requests that have a reason; changes the counts, [B]."""
        if self.capped:
            counts[self._capped] = 1
        return counts

    def _pick(self, logits: Tensor, positions: Tensor) -> Tensor:
        """Draw from logits of [B, w, V] after queries at [B, w] positions."""
        width = logits.shape[1]
        if (bias := self.info.logit_bias) is not None:
            rows = self._on_device([row for row in range(len(logits)) if row not in self.capped])
            logits[rows] += bias[rows, None]
        for row, (first, stops) in self._at_least.items():
            run, is_early = logits[row], positions[row] < first
            run[:, stops] = run[:, stops].masked_fill(is_early[:, None], -torch.inf)
        of_rows = positions.flatten().contiguous()
        drawn: Tensor = self._sampler.draw(logits.flatten(0, 1), self.info, of_rows, width)
        return drawn.view(-1, width)

    def _on_device(self, numbers: Sequence[int]) -> Tensor:
        """Return numbers on the batch's device, without waiting for it: [n] int64."""
        device, found = self.info.temperatures.device, torch.tensor(numbers, dtype=torch.int64)
        return found if device.type == "cpu" else found.pin_memory().to(device, non_blocking=True)

    def _as_dense(self, logits: Tensor) -> Tensor:
        """Apply everything that requests ask for to the [B, V] logits of their first rows."""
        self.info.update_regex_vocab_mask()
        self.info.apply_logits_bias(logits)
        self.info.vocab_mask = None
        processed: Tensor = self._sampler._preprocess_logits(logits, self.info)
        return processed


def _first_stop(request: Any) -> int:
    """Return the position of the query after which a request has its `min_new_tokens`."""
    return len(request.origin_input_ids) + int(request.sampling_params.min_new_tokens) - 1


def _stop_tokens(request: Any) -> list[int]:
    """Return the tokens that may not come before a request's `min_new_tokens`, as SGLang's dense
    step has them."""
    parameters, tokenizer = request.sampling_params, request.tokenizer
    stops = set(parameters.stop_token_ids or ()) | {tokenizer.eos_token_id}
    return sorted(stops | set(tokenizer.additional_stop_token_ids or ()))
