"""Quest: each layer picks pages by a bound on their scores, and reads only those."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from lim_sglang.policies.policy import LayerInputs, Role, SharedBy, SparsePolicy

if TYPE_CHECKING:
    from torch import Tensor

    from lim_sglang.kernels.selector import Room, Selector

PAGE = 16
FEWEST_PAGES = 3


@dataclass(frozen=True, kw_only=True)
class Quest(SparsePolicy):
    """Pages by the largest score that a key between a page's least and greatest could have.

    Source: Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference",
    arXiv 2406.10774.
    """

    title: ClassVar[str] = "Quest"
    block: ClassVar[int] = PAGE

    shared_by: str = SharedBy.QUERY_HEAD.value
    """`query_head` is the paper's; `kv_head` and `all` share the pages of the largest bound."""

    def problems(self) -> list[str]:
        """Name a budget that is no number of pages, or of too few."""
        least = PAGE * FEWEST_PAGES
        if self.budget % PAGE == 0 and self.budget >= least:
            return []
        return [
            f"budget must be a multiple of {PAGE} of at least {least} under policy quest, "
            f"not {self.budget}"
        ]

    @property
    def sharing(self) -> SharedBy:
        """The heads that read one list."""
        return SharedBy(self.shared_by)

    def summary_shape(self, num_kv_heads: int, head_dim: int) -> tuple[int, ...] | None:
        """Return the least and the greatest key of each KV head."""
        return (2, num_kv_heads, head_dim)

    def roles(self, depth: int) -> tuple[Role, ...]:
        """Return PICK for all layers but the dense ones."""
        return self._all_but_dense(Role.PICK, depth)

    def part_of_rank(self, inputs: LayerInputs) -> "Tensor":
        """Return the largest bound of each page, [lists, pages]."""
        from lim_sglang.kernels.reference_rivals import page_bounds, share_scores, summarize_pages

        least, most = summarize_pages(inputs.keys, PAGE)
        bounds = page_bounds(inputs.query, least, most)
        return share_scores(bounds, self.shared_by, num_groups=least.shape[1])

    def keep_by_parts(self, parts: "Tensor", length: int) -> "Tensor":
        """Keep the newest page and the others of largest bound."""
        from lim_sglang.kernels.reference_rivals import keep_pages

        return keep_pages(parts.amax(dim=0), length, self.budget, PAGE)

    def allocate(self, room: "Room") -> "Selector":
        """Allocate for bounds of pages."""
        from lim_sglang.kernels.page_selector import BoundSelector
        from lim_sglang.kernels.reference import BudgetSplit

        split = BudgetSplit(sinks=0, selected=self.num_ranked, recent=1)
        lists = self.sharing.num_lists(room.num_heads, room.num_kv_heads)
        return BoundSelector.allocate(split, room, lists=lists, page=PAGE)
