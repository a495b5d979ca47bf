"""The result of a serving benchmark: one row a policy and concurrency, as a table and as JSON."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.table import Table

from lim_sglang.bench.driver import Occupancy, Run
from lim_sglang.bench.load import Load
from lim_sglang.bench.streams import (
    Curve,
    Latencies,
    Stretch,
    arrivals,
    measured_stretch,
    speedup,
    token_latencies,
    tokens_per_bin,
)
from lim_sglang.bench.timeline import Strip, Timeline
from lim_sglang.errors import LimError

BIN_S = 5.0
NONE = "-"
BUSY = 0.8
"""Share of a core from which on the client may have been too slow for the server."""


@dataclass(frozen=True)
class Bin:
    """A few seconds of a run; seconds count from the start of the measured stretch."""

    from_s: float
    to_s: float
    tokens_per_s: float
    occupancy: Occupancy | None
    """The last one that the server told in this time."""


@dataclass(frozen=True)
class ServeRow:
    """One policy under one load."""

    policy: str
    concurrency: int
    tokens_per_s: float
    """Decoded tokens over the measured stretch."""
    itl_ms: Latencies
    kv_share: float | None
    """Of the KV cache, at its fullest; None for a stretch too short to be told of."""
    waiting: int
    """The most requests that had no room, within the measured stretch."""
    retractions: int
    num_tokens: int
    """Decoded tokens of the measured stretch: each stream's first chunk is not among them."""
    seconds: float
    """Length of the measured stretch."""
    cut: bool
    """The time limit came before the last token."""
    sparse_rows: int | None
    """Rows that read less than everything, by our server's count; None for a dense one."""
    client_share: float
    """Of one core that the client took."""
    bins: tuple[Bin, ...]
    speedup: float | None = None
    """Seconds of the fastest dense policy over this one's, for as many tokens as both decoded;
    None for a dense one, and where none was measured."""
    timeline: Timeline | None = None
    """Of a run of its own, which was profiled; None where none was."""
    timeline_error: str | None = None
    """Why that run came to nothing."""
    strip: Strip | None = None
    """Some of its steps, to be drawn; not recorded."""


def make_row(
    policy: str, load: Load, run: Run, *, dense: Sequence[Curve], sparse_rows: int | None
) -> tuple[ServeRow, Curve]:
    """What a run says, and its curve, with which later ones are compared.

    Args:
        dense: curves of the dense policies under this load; none for a dense one itself.

    Raises:
        LimError: too few tokens came to be timed.
    """
    stretch = measured_stretch(run.streams)
    latencies = token_latencies(run.streams, stretch) if stretch else None
    if stretch is None or latencies is None:
        raise LimError(
            f"{policy}, {load.concurrency} requests: too few tokens came to be timed: "
            "use more --new-tokens, or a longer --limit-seconds"
        )
    found = arrivals(run.streams, stretch)
    num_tokens = sum(new for _, new in found)
    curve = Curve.of(found, stretch.seconds)
    within = [o for o in run.occupancies if stretch.start_s <= o.at_s <= stretch.end_s]
    row = ServeRow(
        policy=policy,
        concurrency=load.concurrency,
        tokens_per_s=num_tokens / stretch.seconds,
        itl_ms=latencies,
        kv_share=max((o.kv_share for o in within), default=None),
        waiting=max((o.waiting for o in within), default=0),
        retractions=sum(stream.retractions for stream in run.streams),
        num_tokens=num_tokens,
        seconds=stretch.seconds,
        cut=run.cut,
        sparse_rows=sparse_rows,
        client_share=run.client_share,
        bins=make_bins(found, stretch, within),
        speedup=min((speedup(each, curve) for each in dense), default=None),
    )
    return row, curve


def make_bins(
    found: Sequence[tuple[float, int]], stretch: Stretch, occupancies: Sequence[Occupancy]
) -> tuple[Bin, ...]:
    """Speed and occupancy over time.

    Args:
        found: `arrivals` of the stretch.
        occupancies: within the stretch, in order.
    """
    bins = []
    for number, num_tokens in enumerate(tokens_per_bin(found, stretch.seconds, BIN_S)):
        from_s = number * BIN_S
        to_s = min(from_s + BIN_S, stretch.seconds)
        told = [o for o in occupancies if from_s < o.at_s - stretch.start_s <= to_s]
        bins.append(Bin(from_s, to_s, num_tokens / (to_s - from_s), told[-1] if told else None))
    return tuple(bins)


def json_line(row: ServeRow, conditions: Mapping[str, Any]) -> str:
    """One row with all that it depends on; clock readings of the client, and what is only drawn,
    are left out."""
    fields = asdict(replace(row, strip=None))
    del fields["strip"]
    for each in fields["bins"]:
        if each["occupancy"]:
            del each["occupancy"]["at_s"]
    return json.dumps({"serve": fields, "conditions": dict(conditions)})


def make_table(rows: Sequence[ServeRow], *, title: str) -> Table:
    """All rows, for people: by concurrency, in the order in which they were measured."""
    table = Table(title=title, title_justify="left")
    table.add_column("requests", justify="right")
    table.add_column("policy")
    for heading in (
        "tokens/s",
        "speed-up",
        "ITL p50, ms",
        "p99",
        "KV at most",
        "waiting",
        "retracted",
        "seconds",
    ):
        table.add_column(heading, justify="right")
    table.add_column("run")
    last = None
    for row in sorted(rows, key=lambda row: row.concurrency):
        if last not in (None, row.concurrency):
            table.add_section()
        last = row.concurrency
        table.add_row(*cells(row))
    return table


def cells(row: ServeRow) -> list[str]:
    """One line of the table."""
    return [
        f"{row.concurrency}",
        row.policy,
        f"{row.tokens_per_s:,.0f}",
        NONE if row.speedup is None else f"{row.speedup:.2f}",
        f"{row.itl_ms.p50:.2f}",
        f"{row.itl_ms.p99:.2f}",
        NONE if row.kv_share is None else f"{100 * row.kv_share:.0f} %",
        f"{row.waiting}",
        f"{row.retractions}",
        f"{row.seconds:.1f}",
        "cut" if row.cut else "whole",
    ]


def one_line(row: ServeRow) -> str:
    """A row as it is measured, before the table is complete."""
    speed = f", {row.speedup:.2f} x" if row.speedup else ""
    return (
        f"{row.policy}, {row.concurrency} requests: {row.tokens_per_s:,.0f} tokens/s{speed}, "
        f"{row.itl_ms.p50:.2f} ms a token (p99 {row.itl_ms.p99:.2f}), "
        f"{row.seconds:.1f} s{', cut' if row.cut else ''}"
    )


def timeline_line(row: ServeRow) -> str | None:
    """What the GPU did during decode steps; None where no run was profiled."""
    found = row.timeline
    if found is None:
        return None
    ahead = ""
    if found.ahead_p50_us is not None:
        ahead = (
            f", launched {found.ahead_p50_us:,.0f} µs ahead (at least {found.ahead_least_us:,.0f})"
        )
    return (
        f"{row.policy}, {row.concurrency} requests: GPU busy {100 * found.busy_share:.1f} % over "
        f"{found.steps} steps of {found.step_us:,.0f} µs, "
        f"{found.idle_us_per_step:,.0f} µs idle a step "
        f"({found.between_us_per_step:,.0f} between replays), longest gap of a step "
        f"{found.gap_p50_us:,.0f} µs (p99 {found.gap_p99_us:,.0f}), largest "
        f"{found.largest_gap_us:,.0f}{ahead}"
    )


def warnings(rows: Iterable[ServeRow]) -> list[str]:
    """What to know of rows that show less than they seem to."""
    found = []
    for row in rows:
        where = f"{row.policy}, {row.concurrency} requests"
        if row.waiting or row.retractions:
            found.append(
                f"{where}: the KV cache had no room for all: up to {row.waiting} waited and "
                f"{row.retractions} retractions; use fewer requests or --new-tokens"
            )
        if row.client_share > BUSY:
            found.append(
                f"{where}: the client took {100 * row.client_share:.0f} % of a core, so it may "
                "have been what was measured: use --stream-interval 8"
            )
        if row.timeline_error:
            found.append(f"{where}: no timeline: {row.timeline_error}")
    return found


def under_table(conditions: Mapping[str, Any]) -> str:
    """The conditions that people look for first; the JSON lines have all of them."""
    versions = conditions["versions"]
    shown = ("torch", "flashinfer-python", "sglang")
    return "\n".join(
        [
            f"{conditions['gpu']}, driver {conditions['driver']}, commit {conditions['commit']}",
            ", ".join(f"{name} {versions.get(name)}" for name in shown),
            f"{conditions['prompt_tokens']:,} prompt tokens and {conditions['new_tokens']:,} new "
            f"ones a request; {'; '.join(conditions['notes'])}",
        ]
    )
