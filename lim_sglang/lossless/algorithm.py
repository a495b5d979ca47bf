"""Lossless drafting as one of SGLang's speculative algorithms: its name, settings and batch state.

SGLang's scheduler then reserves slots for the drafts, hands decode batches to `LosslessWorker`, and
takes runs of tokens back.
"""

from typing import Any

from lim_sglang import compat
from lim_sglang.lossless import internals
from lim_sglang.policies.lossless import Lossless
from lim_sglang.validation import DRAFTING


class LosslessAlgorithm(compat.CustomSpecAlgo):
    """Answers of the algorithm to SGLang, with those that SGLang 0.5.16 forgets in its own class
    for plugins."""

    def carries_draft_hidden_states(self) -> bool:
        """Drafts come from the served model itself."""
        return False

    def need_topk(self) -> bool:
        """Drafts are a chain, not a tree."""
        return False

    def create_future_map(self, device: Any, req_to_token_pool: Any, **options: Any) -> Any:
        """Build the map of results that are not there yet, as SGLang does for its own.

        The host does not wait for lengths: the worker launches a cycle while another runs.
        """
        return compat.FutureMap(
            device,
            self,
            req_to_token_pool,
            False,
            options.get("needs_confidence_relay", False),
        )


def register() -> None:
    """Make the algorithm known to SGLang."""
    internals.register_drafting(DRAFTING, LosslessAlgorithm, _worker_class)


def _worker_class(_server_args: Any) -> type:
    from lim_sglang.lossless.worker import LosslessWorker

    return LosslessWorker


def prepare_arguments(server_args: Any, policy: Lossless, backend: str) -> None:
    """Set the arguments by which SGLang serves the policy, before SGLang completes them.

    Args:
        backend: the name of our sampling backend.
    """
    server_args.speculative_algorithm = DRAFTING
    server_args.speculative_eagle_topk = 1
    most = policy.choices(on_cpu=compat.serves_on_cpu())[-1]
    server_args.speculative_num_steps = most
    server_args.speculative_num_draft_tokens = most + 1
    server_args.speculative_attention_mode = "decode"
    server_args.sampling_backend = backend
    if compat.serves_on_cpu():
        server_args.disable_overlap_schedule = True  # there is nothing beside the host


def room_of_row(original: Any, server_args: Any) -> int:
    """Return how much longer than the context a row of `req_to_token` is: enough for the slots that
    SGLang reserves, which is twice the width of a cycle.

    SGLang 0.5.16 adds the width once, and writes the rest into the neighbour's row.
    """
    extra: int = original(server_args)
    if server_args.speculative_algorithm != DRAFTING:
        return extra
    return extra + 2 * int(server_args.speculative_num_draft_tokens)
