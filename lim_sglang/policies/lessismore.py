"""LessIsMore: two layers select tokens, all heads share the set, a fixed share is recent."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lim_sglang.errors import ConfigError
from lim_sglang.policies.policy import SINKS, LayerInputs, SplitBudgetPolicy

if TYPE_CHECKING:
    from torch import Tensor

    from lim_sglang.kernels.selector import Room, Selector

RANKINGS = ("rank", "mass")


@dataclass(frozen=True, kw_only=True)
class LessIsMore(SplitBudgetPolicy):
    """The paper's method. `budget` is its K, `recent_ratio` its r.

    Source: Yang et al., "Less Is More", arXiv 2508.07101.
    """

    title: ClassVar[str] = "LessIsMore"
    may_pick: ClassVar[bool] = True

    recent_ratio: float = 0.25
    sinks: int = SINKS
    ranking: str = "rank"
    """Order of tokens at a SELECT layer: `rank` is the paper's, where heads take turns; `mass` sums
    the heads' softmax weights, which is not the paper's."""
    pick_layers: tuple[int, ...] | None = None
    """Layers that score all keys to select anew, but read the values of the selected tokens alone:
    half the bytes of a SELECT layer. Not the paper's. None: those of the preset, if it has any."""

    def problems(self) -> list[str]:
        """Name layers of two roles, too."""
        found = super().problems()
        for name in ("select_layers", "dense_layers"):
            if twice := sorted({*(self.pick_layers or ())} & {*(getattr(self, name) or ())}):
                layers = ", ".join(map(str, twice))
                found.append(f"pick_layers and {name} both name {layers}: name a layer in one")
        return found

    def picking(self, depth: int) -> tuple[int, ...]:
        """Return `pick_layers`, if there are any.

        Raises:
            ConfigError: the model has no such layer, or its preset lets the layer read everything.
        """
        pick = self.pick_layers or ()
        self._check_layers(pick, depth, "pick_layers")
        if twice := sorted({*pick} & {*self.selecting(depth)}):
            raise ConfigError(
                f"pick_layers names {', '.join(map(str, twice))}, a SELECT layer of this model: "
                "name select_layers, too, without it"
            )
        return pick

    @property
    def weighs_by_softmax(self) -> bool:
        """True for the ranking by mass."""
        return self.ranking == "mass"

    def keep(self, inputs: LayerInputs) -> "Tensor":
        """Rank the candidates and keep the first of them, the sinks and the newest tokens."""
        from lim_sglang.kernels.reference import keep_tokens, score_tokens

        if self.ranking == "mass":
            return super().keep(inputs)
        return keep_tokens(score_tokens(inputs.query, inputs.keys), self.budget_split)[None]

    def part_of_rank(self, inputs: LayerInputs) -> "Tensor":
        """Return the rank's first tokens with their turns, [selected, 2], or the mass that its
        heads give each token, [S]."""
        from lim_sglang.kernels.reference import score_tokens, softmax_mass, turns_of_rank

        scores = score_tokens(inputs.query, inputs.keys)
        if self.ranking == "mass":
            return softmax_mass(scores, inputs.scale)
        return turns_of_rank(scores, self.budget_split, inputs.rank, inputs.num_ranks)

    def keep_by_parts(self, parts: "Tensor", length: int) -> "Tensor":
        """Merge the turns, or sum the masses in rank order, so that all ranks have equal bits."""
        from lim_sglang.kernels.reference import keep_by_turns, topk_by_mass

        if self.ranking == "mass":
            return topk_by_mass(sum(parts[1:], start=parts[0]), self.budget_split)[None]
        return keep_by_turns(parts, length, self.budget_split)[None]

    def allocate(self, room: "Room") -> "Selector":
        """Allocate for the ranking."""
        from lim_sglang.kernels.selector import MassSelector, RankSelector

        kind = MassSelector if self.ranking == "mass" else RankSelector
        return kind.allocate(self.budget_split, room)
