"""The README's part on decode speed, written from what was recorded, between two markers."""

from lim_sglang.bench.points import Point
from lim_sglang.bench.recorded import Recorded, RecordedRow
from lim_sglang.markdown_section import MarkdownSection, short_commit

PART = MarkdownSection("lim bench decode")
NONE = "-"
TIMES = "\N{MULTIPLICATION SIGN}"
NAMES = {"flashinfer": "FlashInfer", "triton": "Triton", "fa3": "FlashAttention 3"}


def make_section(recorded: Recorded, plot: str | None = None) -> str:
    """A table in Markdown, a row a point, and a line with its conditions.

    Args:
        plot: where the README finds the plot of the same rows.
    """
    dense = [f"dense {NAMES[backend]}, ms" for backend in recorded.dense_backends]
    share = "of the byte limit, dense \N{MIDDLE DOT} LessIsMore"
    titles = [f"decode step, B {TIMES} S", *dense, "LessIsMore, ms", "speed-up", share]
    lines = [_line(titles), _line(["---"] * len(titles))]
    lines += [_line(_cells(recorded, point)) for point in recorded.points]
    table = "\n".join(lines)
    picture = f"\n\n![Step time over context]({plot})" if plot else ""
    return f"{table}\n\n{_conditions(recorded)}{picture}"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(recorded: Recorded, point: Point) -> list[str]:
    """One point's row; what was not measured is a dash."""
    dense, lim = recorded.fastest_dense(point), recorded.lim(point)
    return [
        _name(point),
        *(_ms(recorded.rows.get((point, name))) for name in recorded.dense_backends),
        _ms(lim),
        f"{dense.step_ms / lim.step_ms:.2f}" if dense and lim else NONE,
        f"{_share(dense)} \N{MIDDLE DOT} {_share(lim)}",
    ]


def _name(point: Point) -> str:
    return " + ".join(f"{batch} {TIMES} {_tokens(context)}" for batch, context in point.groups)


def _tokens(context: int) -> str:
    whole, rest = divmod(context, 1024)
    return f"{context:,}" if rest else f"{whole}K"


def _ms(row: RecordedRow | None) -> str:
    return NONE if row is None else f"{row.step_ms:.2f}"


def _share(row: RecordedRow | None) -> str:
    """Marked where it cannot be."""
    if row is None:
        return NONE
    return f"{100 * row.limit_share:.0f} %{' (!)' if row.limit_share > 1 else ''}"


def _conditions(recorded: Recorded) -> str:
    found = recorded.conditions
    versions = found["versions"]
    names = {"torch": "torch", "triton": "Triton", "flashinfer-python": "FlashInfer"}
    stack = [f"{shown} {versions.get(name)}" for name, shown in names.items()]
    dates = " to ".join(dict.fromkeys([recorded.dates[0], recorded.dates[-1]]))
    shape = f"{found['model']} shape, dummy weights" if found["dummy_weights"] else found["model"]
    return (
        f"{shape}{recorded.formats}, {found['gpu']}, budget {found['budget']:,}; B requests of S "
        f"tokens. By `lim bench decode` on {dates}, commit {short_commit(found['commit'])}, driver "
        f"{found['driver']}, {', '.join(stack)}, SGLang {versions.get('sglang')}; medians of "
        f"{found['windows']} windows of {found['steps']} steps in CUDA graphs, backends in turns; "
        "speed-up over the fastest dense backend; byte limit at the measured copy speed of "
        f"{found['copy_gb_per_s']:,.0f} GB/s."
    )
