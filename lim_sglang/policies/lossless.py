"""Lossless: the kept set of LessIsMore drafts tokens, and the dense model verifies them."""

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any, ClassVar

from lim_sglang.policies.lessismore import LessIsMore
from lim_sglang.policies.policy import Role

AUTO = "auto"
MAX_DRAFT_TOKENS = 15
"""Most tokens that a cycle drafts."""
CPU_DRAFT_TOKENS = 8
"""Tokens that a cycle drafts on a CPU under `auto`."""
AUTO_CHOICES = (0, 4, 8, 12, MAX_DRAFT_TOKENS)
"""Tokens that a cycle may draft on a GPU under `auto`."""


@dataclass(frozen=True, kw_only=True)
class Lossless(LessIsMore):
    """The dense model's output: tokens are drafted by sparse steps, and one dense step over all of
    them decides which stand.

    All layers of a draft read one list a request, chosen once a cycle by each SELECT layer from the
    query of the newest verified token, and the drafts so far. Settings are those of LessIsMore.
    """

    title: ClassVar[str] = "Lossless"
    may_pick: ClassVar[bool] = False

    budget: int = 1024
    dense_layers: tuple[int, ...] = ()
    """None: a layer that reads everything would make a draft as slow as a dense step."""
    draft_tokens: int | str = AUTO
    """Tokens drafted in each cycle in which a request is longer than the budget; `auto` for those
    that promise most tokens a second."""

    def problems(self) -> list[str]:
        """Name what leaves nothing to draft with."""
        found = super().problems()
        if self.dense_layers:
            found.append("policy lossless has no dense_layers: no layer of a draft is dense")
        if self.pick_layers:
            found.append(
                "policy lossless has no pick_layers: name them in select_layers, which score keys "
                "that the verification reads in any case"
            )
        if self.select_layers == ():
            found.append("policy lossless needs at least one of select_layers")
        return found

    def reasons_against_model(self, model_config: Any) -> list[str]:
        """Refuse RoPE of several dimensions, whose positions a draft does not have."""
        ropes = (getattr(model_config, name, None) for name in ("rope_parameters", "rope_scaling"))
        if not any(rope and "mrope_section" in rope for rope in ropes):
            return []
        return ["the model has multimodal RoPE, which policy lossless does not draft with yet"]

    def choices(self, *, on_cpu: bool, most: int = MAX_DRAFT_TOKENS) -> tuple[int, ...]:
        """Return the numbers of tokens that a cycle may draft, ascending; one, if it is given.

        Args:
            most: tokens that a cycle can draft.
        """
        if not isinstance(self.draft_tokens, str):
            return (min(self.draft_tokens, most),)
        auto = (CPU_DRAFT_TOKENS,) if on_cpu else AUTO_CHOICES
        return tuple(sorted({min(number, most) for number in auto}))

    def roles(self, depth: int) -> tuple[Role, ...]:
        """Return FULL: what is served is dense; only drafts are sparse."""
        self.selecting(depth)
        return (Role.FULL,) * depth

    def list_of_layer(self, depth: int) -> tuple[int, ...]:
        """Return for each layer the index of the SELECT layer whose list a draft reads there: the
        last one up to the layer, and the first one below it.
        """
        select = self.selecting(depth)
        return tuple(max(0, bisect_right(select, layer) - 1) for layer in range(depth))
