"""Compile every kernel for GPUs that need not be there; print what its programs take as JSON.

`test_compiled.py` runs this in a process of its own: the test process decorates kernels for the
interpreter.
"""

import json
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from tempfile import NamedTemporaryFile
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lim_sglang.kernels import (
    compact,
    coupled_sampling,
    decode_layer,
    exchange,
    full_ranking,
    launch,
    mass,
    run_attention,
    scores,
    shortlist,
    sparse_attention,
)

ARCHITECTURES = (80, 90, 100, 120)
SM_SHARED_BYTES = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10}
"""Shared memory of an SM, by architecture: NVIDIA's CUDA programming guide."""
LEAST_SHARED_MEMORY = 120
"""Architecture whose programs may take the least shared memory. Large sorts are compiled for it
alone: they take the same memory everywhere, and 38 s of CPU time."""
FP8_FROM = 89
"""First architecture whose compiler takes the fp8 dtype e4m3 of KV caches."""
DEFAULT_STAGES = 3
"""Pipeline stages where a launch names none."""
POINTERS = {
    **dict.fromkeys(("indptr", "starts", "ends", "slots", "first_turn", "last_turn"), "*i32"),
    **dict.fromkeys(("ranking", "kept_indptr", "kept", "depth", "candidates", "listed"), "*i32"),
    **dict.fromkeys(("chosen_counts", "new_tokens_per_rank", "block_counters"), "*i32"),
    **dict.fromkeys(("lengths", "rows_fully_ranked"), "*i64"),
    **dict.fromkeys(("scores", "lse", "mass", "split_outputs", "split_lse"), "*fp32"),
    **dict.fromkeys(("probs", "top_ps", "min_ps", "ratios", "masses", "largest"), "*fp32"),
    **dict.fromkeys(("seeds", "positions", "picks"), "*i64"),
    **dict.fromkeys(("top_ks", "tokens", "counts"), "*i32"),
    **dict.fromkeys(("scale", "soft_cap", "value_scale"), "fp32"),
}
"""Types of the parameters that are no i32."""


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes."""

    shared_bytes: int
    """Of a program."""
    registers: int
    """Of a thread."""
    stack_bytes: int
    """Of a thread: values that found no register, and arrays."""
    warps: int
    """Of a program."""


def compile_kernel(
    architecture: int,
    kernel: Any,
    constants: dict[str, Any],
    warps: int = 4,
    stages: int = DEFAULT_STAGES,
    max_registers: int | None = None,
    **types: str,
) -> Usage:
    """Compile a kernel as it is launched.

    Args:
        architecture: compute capability, 90 for 9.0.
        kernel: decorated function.
        constants: compile-time parameters.
        warps, stages, max_registers: launch options.
        types: of parameters that differ from `POINTERS`.
    """
    pointers = POINTERS | types
    signature = {name: pointers.get(name, "i32") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    # Triton learns from the real arguments which addresses and sizes are multiples of 16.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if pointers.get(name, "").startswith("*") or name.endswith(("_stride", "_features"))
    }
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": warps, "num_stages": stages, "maxnreg": max_registers},
    )
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", shown)
    assert found, shown
    return Usage(compiled.metadata.shared, int(found[1]), int(found[2]), warps)


def compile_scores(architecture: int) -> dict[str, Usage]:
    """Compile for each dtype, head dimension and group size that served models have."""
    found = {}
    for query, keys in (("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "fp8e4nv")):
        if keys == "fp8e4nv" and architecture < FP8_FROM:
            continue
        for dim in (64, 128, 256):
            for group in (1, 16):
                constants = {
                    "GROUP": group,
                    "PADDED_GROUP": launch.padded_group(group, 1),
                    "DIM": dim,
                    "BLOCK": launch.SCORE_BLOCK,
                    "SPLITS": launch.SCORE_SPLITS,
                    "UPCAST": False,
                }
                found[f"score_tokens {query} {keys} {dim} {group}"] = compile_kernel(
                    architecture,
                    scores._score_tokens,
                    constants,
                    stages=launch.SCORE_STAGES,
                    query=f"*{query}",
                    keys=f"*{keys}",
                )
    return found


def compile_attention(architecture: int) -> dict[str, Usage]:
    """Compile sparse attention for the same, and with a soft-cap."""
    found = {}
    for query, cache, dim, group, capped, programs_per_sm in (
        ("bf16", "bf16", 128, 4, False, 1),
        ("bf16", "bf16", 128, 7, True, 8),
        ("bf16", "bf16", 256, 32, True, 1),
        ("fp16", "fp16", 64, 1, False, 8),
        ("fp16", "fp16", 64, 7, False, 1),
        ("fp16", "fp8e5", 256, 2, False, 1),
        ("bf16", "fp8e4nv", 128, 16, False, 1),
    ):
        if cache == "fp8e4nv" and architecture < FP8_FROM:
            continue
        combined_group = triton.next_power_of_2(group)
        cache_bytes = 1 if cache.startswith("fp8") else 2
        constants = {
            "GROUP": group,
            "COMBINED_GROUP": combined_group,
            "PADDED_GROUP": launch.padded_group(group, 1),
            "DIM": dim,
            "BLOCK": launch.attend_block(dim, group, cache_bytes, programs_per_sm),
            "SPLIT_ALIGNMENT": launch.SPLIT_ALIGNMENT,
            "MAX_SPLITS": launch.MAX_SPLITS,
            "SPLIT_BLOCK": max(1, launch.COMBINED_HEADS // combined_group),
            "UNITS_PER_KV_HEAD": 4 if group == 1 else 1,  # a list each query head
            "IS_SHARED": group != 1,
            "CAPPED": capped,
            "UPCAST": False,
        }
        types = {"query": f"*{query}", "output": f"*{query}"}
        types |= dict.fromkeys(("keys", "values"), f"*{cache}")
        found[f"attend_tokens {query} {cache} {dim} {group}"] = compile_kernel(
            architecture,
            sparse_attention._attend_tokens,
            constants,
            launch.ATTEND_WARPS,
            launch.ATTEND_STAGES,
            **types,
        )
    return found


def compile_runs(architecture: int) -> dict[str, Usage]:
    """Compile the attention of runs for each number of query rows, and for wide heads and fp8."""
    found = {}
    tile_bytes = launch.run_tile_bytes(SM_SHARED_BYTES[architecture])
    for query, cache, dim, width, group in (
        ("bf16", "bf16", 128, 9, 4),
        ("bf16", "bf16", 128, 9, 7),
        ("bf16", "bf16", 128, 5, 5),
        ("bf16", "bf16", 128, 9, 1),
        ("fp16", "fp16", 64, 8, 8),
        ("bf16", "bf16", 256, 8, 8),
        ("fp16", "fp8e5", 128, 16, 4),
        ("bf16", "fp8e4nv", 128, 16, 4),
    ):
        if cache == "fp8e4nv" and architecture < FP8_FROM:
            continue
        rows = run_attention.padded_run(width, group)
        constants = {
            "GROUP": group,
            "ROWS": rows,
            "DIM": dim,
            "BLOCK": launch.run_block(dim, 2, tile_bytes),
            "PADDED_REQUESTS": launch.MAX_REQUESTS if group == 7 else launch.MIN_REQUESTS,
            "MIN_TILES": launch.MIN_RUN_TILES,
        }
        types = {"query": f"*{query}", "output": f"*{query}"}
        types |= dict.fromkeys(("keys", "values"), f"*{cache}")
        found[f"attend_runs {query} {cache} {dim} {rows} {group}"] = compile_kernel(
            architecture,
            run_attention._attend_runs,
            constants | {"CAPPED": group == 7, "UPCAST": False},
            launch.run_warps(dim),
            launch.RUN_STAGES,
            **types,
        )
        combined = {"SPLITS": launch.COMBINED_SPLITS, "COMBINED_ROWS": launch.COMBINED_ROWS}
        found[f"combine_splits {query} {dim} {rows} {group}"] = compile_kernel(
            architecture,
            run_attention._combine_splits,
            constants | combined,
            launch.COMBINE_WARPS,
            output=f"*{query}",
        )
    return found


def compile_selection(architecture: int) -> dict[str, Usage]:
    """Compile selection for 32 heads, budget 256; also 2,048 and 6,144 where memory is least."""
    pdl = {"USE_PDL": architecture >= 10 * launch.PDL_CAPABILITY[0]}
    compile_one = partial(compile_kernel, architecture)
    found = {
        "log_sum_exp": compile_one(mass._log_sum_exp, {"BLOCK": launch.LSE_BLOCK}),
        **{
            f"softmax_mass {page}": compile_one(
                mass._softmax_mass,
                pdl
                | {"BLOCK": launch.MASS_BLOCK, "HEADS": launch.MASS_HEADS}
                | {"PAGE": page, "BY_LARGEST": page > 1},
            )
            for page in (1, 16)
        },
        "copy_window": compile_one(compact._copy_window, {"BLOCK": launch.COMPACT_BLOCK}),
        "compact_slots": compile_one(
            compact._compact_slots,
            pdl | {"BLOCK": launch.COMPACT_BLOCK, "PADDED_COUNTS": 64, "NO_TURN": launch.NO_TURN},
            launch.WIDE_WARPS,
            max_registers=launch.COMPACT_REGISTERS,
        ),
        **{
            f"pick_coupled race {race}": compile_one(
                coupled_sampling._race_blocks,
                {"BLOCK": coupled_sampling.PICK_BLOCK, "BLOCKS": 64, "RACE": race},
                coupled_sampling.PICK_WARPS,
            )
            for race in range(coupled_sampling.PICK_RACES)
        },
        "pick_coupled settle": compile_one(
            coupled_sampling._settle,
            {"BLOCK": coupled_sampling.SETTLE_BLOCK, "BLOCKS": 64}
            | {"RACES": coupled_sampling.PICK_RACES},
            coupled_sampling.SETTLE_WARPS,
        ),
        "count_kept": compile_one(compact._count_kept, {"BLOCK": launch.LENGTH_BLOCK, "PAGE": 1}),
        "list_turns": compile_one(
            exchange._list_turns,
            {"BLOCK": launch.COMPACT_BLOCK, "PADDED_COUNTS": 64},
            launch.WIDE_WARPS,
        ),
    }
    for selected in (192, 1536, 4608) if architecture == LEAST_SHARED_MEMORY else (192,):
        capacity = shortlist.shortlist_capacity(selected)
        ranks = full_ranking.padded_ranks(selected)
        union = pdl | {
            "NEEDS_FULL_RANKING": launch.NEEDS_FULL_RANKING,
            "PADDED_HEADS": 32,
            "COUNTED_RANKS": max(capacity, ranks),
        }
        found[f"shortlist_tokens {selected}"] = compile_one(
            shortlist._shortlist_tokens,
            union
            | {
                "CAPACITY": capacity,
                "SORTED_AT_ONCE": shortlist.sorted_at_once(selected),
                "SAMPLE": launch.SHORTLIST_SAMPLE,
                "DENSE": True,
                "BLOCK": launch.SHORTLIST_BLOCK,
            },
            launch.sort_warps(capacity),
            max_registers=launch.MAX_REGISTERS,
        )
        found[f"rank_tokens {selected}"] = compile_one(
            full_ranking._rank_tokens,
            union
            | {
                "PADDED_RANKS": ranks,
                "BLOCK": launch.RADIX_BLOCK,
                "COUNTED_BLOCK": launch.COMPACT_BLOCK,
            },
            launch.full_ranking_warps(ranks),
        )
        found[f"merge_turns {selected}"] = compile_one(
            exchange._merge_turns,
            {
                "PADDED_HEADS": 32,
                "COUNTED_RANKS": max(capacity, ranks),
                "PADDED_COUNTS": 64,
                "COUNTED_BLOCK": launch.COMPACT_BLOCK,
                "BLOCK": launch.MERGE_BLOCK,
            },
            launch.WIDE_WARPS,
        )
        capacity = mass.candidate_capacity(selected)
        found[f"topk_by_mass {selected}"] = compile_one(
            mass._topk_by_mass,
            pdl
            | {
                "CAPACITY": capacity,
                "SAMPLE": launch.MAX_SAMPLE,
                "BLOCK": launch.TOPK_BLOCK,
                "SMALL_BLOCK": launch.TOPK_SMALL_BLOCK,
                "PAGE": 1,
                "HEADS": 1,
            },
            launch.sort_warps(capacity),
        )
    return found


def compile_layers(architecture: int) -> dict[str, Usage]:
    """Compile the kernels of a decode layer for the architecture that they serve; products of few
    rows as a program has an SM to itself and as two share one."""
    if divmod(architecture, 10) != decode_layer.MEASURED_CAPABILITY:
        return {}
    found = {}
    tiles = [
        (rows, sharing, tile)
        for rows, of_rows in decode_layer.SKINNY_TILES.items()
        for sharing, tile in zip(("alone", "shared"), of_rows, strict=True)
    ]
    for rows, sharing, tile in tiles:
        constants = {
            "HAS_BIAS": True,
            "ROWS": rows,
            "FEATURES": decode_layer.SKINNY_FEATURES,
            "DEPTH": tile.depth,
            "STAGES": tile.stages,
            "USE_PDL": True,
            "UPCAST": False,
        }
        types = dict.fromkeys(("rows", "weight", "bias", "out"), "*bf16")
        found[f"multiply {sharing} {rows}"] = compile_kernel(
            architecture, decode_layer._multiply, constants, decode_layer.SKINNY_WARPS, **types
        )
    types = dict.fromkeys(("qkv", "query", "query_weight", "key_weight", "keys", "values"), "*bf16")
    for has_norms in (True, False):
        constants = {"HEADS": 32, "KV_HEADS": 8, "DIM": 128, "HAS_NORMS": has_norms}
        found[f"norm_rotate_store {has_norms}"] = compile_kernel(
            architecture,
            decode_layer._norm_rotate_store,
            {**constants, "USE_PDL": True},
            warps=1,
            epsilon="fp32",
            cos_sin="*fp32",
            positions="*i64",
            slots="*i64",
            **types,
        )
    return found


def compile_for(architecture: int) -> dict[str, Usage]:
    """Compile every kernel; return what each takes by kernel and shape."""
    return (
        compile_scores(architecture)
        | compile_attention(architecture)
        | compile_runs(architecture)
        | compile_selection(architecture)
        | compile_layers(architecture)
    )


def main() -> None:
    """Compile for every architecture, one per core at a time."""
    with ProcessPoolExecutor() as processes:
        found = dict(zip(ARCHITECTURES, processes.map(compile_for, ARCHITECTURES), strict=True))
    sys.stdout.write("\n" + json.dumps(found, default=asdict))


if __name__ == "__main__":
    main()
