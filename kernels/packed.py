"""Rows of different lengths, packed one behind the other: scores, masses and first turns.

Room for the longest row that a model allows would hold few rows where contexts are long. Packed,
all rows of a batch take as much as they have tokens, which the KV cache's size bounds. Where a row
begins follows from the step's `indptr`, so kernels find it on the device and a CUDA graph serves
rows of any length.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from lim_sglang.kernels.launch import RowBuffers

ALIGNMENT = 32
"""Lists of a row begin at multiples of this many elements, for wide loads."""
_ALIGNMENT: tl.constexpr = tl.constexpr(ALIGNMENT)


def row_ends(lengths: Iterable[int]) -> list[int]:
    """Return the `indptr` of rows of these lengths, [B + 1], on the host."""
    return [0, *itertools.accumulate(lengths)]


@dataclass(frozen=True)
class PackedRows(RowBuffers):
    """Values of up to `max_rows` rows: of each row its lists, of each list its columns.

    A column is a token, or a page of tokens.
    """

    values: Tensor
    """[lists * columns of all rows]."""
    lists: int
    """Lists of a row, such as its query heads."""
    max_rows: int
    """Most rows."""
    tokens: int
    """Most tokens of all rows together."""
    longest: int
    """Tokens of the longest row that there can be."""
    page: int = 1
    """Tokens of a column."""

    @property
    def columns(self) -> int:
        """Columns of the longest row."""
        return triton.cdiv(self.longest, self.page)

    def fits(self, num_tokens: int) -> bool:
        """Return True if a step of so many tokens fits, chunk by chunk of `max_rows` rows."""
        return num_tokens <= self.tokens or self.max_rows * self.longest <= self.tokens

    @classmethod
    def allocate(
        cls,
        *,
        lists: int,
        max_rows: int,
        longest: int,
        tokens: int,
        device: torch.device | str,
        page: int = 1,
    ) -> Self:
        """Allocate float32 for rows of up to `longest` tokens, `tokens` at most of all rows."""
        nothing = torch.zeros(0, device=device)
        tokens = min(tokens, max_rows * longest)
        rows = cls(nothing, lists, max_rows, tokens, longest, page)
        return replace(rows, values=nothing.new_zeros(rows.most_values))

    @property
    def most_values(self) -> int:
        """Values that rows may take, all of them together, from the first one on."""
        tokens = min(self.tokens, self.max_rows * self.longest)
        # A row may waste an alignment; a row that pads a graph's batch has a token more.
        room = triton.cdiv(tokens + self.max_rows, self.page) + self.max_rows * ALIGNMENT
        return self.lists * triton.cdiv(room, ALIGNMENT) * ALIGNMENT

    def first_rows(self, num_rows: int) -> Self:
        """Return the same memory for fewer rows."""
        return replace(self, max_rows=num_rows)

    def rows(self, ends: Sequence[int]) -> list[Tensor]:
        """Return each row's values, [lists, columns rounded up to the alignment].

        Args:
            ends: [B + 1], a step's `indptr`.
        """
        views = []
        for row, (first, last) in enumerate(itertools.pairwise(ends)):
            before = triton.cdiv(first - ends[0], self.page) // ALIGNMENT + row
            blocks = triton.cdiv(triton.cdiv(last - first, self.page), ALIGNMENT)
            begin, size = before * ALIGNMENT * self.lists, blocks * ALIGNMENT * self.lists
            views.append(self.values[begin : begin + size].view(self.lists, -1))
        return views

    def used(self, ends: Sequence[int]) -> Self:
        """Return a copy of the values of a step's rows.

        Args:
            ends: [B + 1], the step's `indptr`.
        """
        last = self.rows(ends)[-1]
        size = last.storage_offset() - self.values.storage_offset() + last.numel()
        return replace(self, values=self.values[:size].clone())


@triton.jit
def packed_row(indptr, row, PAGE: tl.constexpr):
    """Return the columns before a row, and the columns from one of its lists to the next.

    Element `before * lists + list * pitch + column` of `PackedRows.values` is the row's.
    """
    first = tl.load(indptr)
    begin = tl.load(indptr + row) - first
    length = tl.load(indptr + row + 1) - first - begin
    before = (tl.cdiv(begin, PAGE) // _ALIGNMENT + row) * _ALIGNMENT
    pitch = tl.cdiv(tl.cdiv(length, PAGE), _ALIGNMENT).to(tl.int64) * _ALIGNMENT
    return before, pitch
