"""Compiles every kernel for GPUs that need not be there; prints shared memory as JSON.

Run by `test_compiled.py` in a process of its own: the test process decorates for the interpreter.
"""

import json
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lim_sglang.kernels import (
    compact,
    full_ranking,
    launch,
    mass,
    scores,
    shortlist,
    sparse_attention,
)
from lim_sglang.kernels.launch import PDL_CAPABILITY

ARCHITECTURES = (80, 90, 100, 120)
FP8_FROM = 89
"""The first architecture whose compiler takes fp8 of the kind that KV caches use."""
POINTERS = {
    **dict.fromkeys(("indptr", "slots", "ranking", "first_turn", "last_turn"), "*i32"),
    **dict.fromkeys(("kept_indptr", "kept", "depth", "candidates"), "*i32"),
    **dict.fromkeys(("chosen_counts", "met_counts", "arrivals"), "*i32"),
    **dict.fromkeys(("lengths", "undecided_rows"), "*i64"),
    **dict.fromkeys(("scores", "lse", "mass", "part_outputs", "part_lse"), "*fp32"),
    **dict.fromkeys(("scale", "soft_cap", "value_scale"), "fp32"),
}


def shared_memory(
    kernel: Any,
    architecture: int,
    constants: dict[str, Any],
    warps: int = 4,
    stages: int = launch.NUM_STAGES,
    **types: str,
) -> int:
    """Bytes of shared memory that a program of the kernel takes, compiled as it is launched."""
    pointers = POINTERS | types
    signature = {name: pointers.get(name, "i32") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    # What Triton learns from real arguments: addresses and strides are multiples of 16.
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if pointers.get(name, "").startswith("*") or name.endswith("_stride")
    }
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    shared: int = compiled.metadata.shared
    return shared


def compile_scores(architecture: int) -> dict[str, int]:
    """Each dtype, head dimension and group size that the serving models have."""
    found = {}
    for query, keys in (("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "fp8e4nv")):
        for dim in (64, 128, 256):
            for group in (1, 16):
                if keys == "fp8e4nv" and architecture < FP8_FROM:
                    continue
                constants = {
                    "GROUP": group,
                    "PADDED_GROUP": launch.padded_group(group, 1),
                    "DIM": dim,
                    "BLOCK": launch.SCORE_BLOCK,
                    "SPLITS": launch.SCORE_SPLITS,
                    "UPCAST": False,
                }
                name = f"score {query} {keys} {dim} {group}"
                found[name] = shared_memory(
                    scores._score, architecture, constants, query=f"*{query}", keys=f"*{keys}"
                )
    return found


def compile_attention(architecture: int) -> dict[str, int]:
    """The same for attention over a kept set, with a soft-cap, too."""
    found = {}
    for query, cache, dim, group, capped, per_processor in (
        *(("bf16", "bf16", 128, 4, False, 1), ("bf16", "bf16", 128, 7, True, 8)),
        *(("bf16", "bf16", 256, 32, True, 1), ("fp16", "fp16", 64, 1, False, 8)),
        *(("fp16", "fp16", 64, 7, False, 1), ("fp16", "fp8e5", 256, 2, False, 1)),
        ("bf16", "fp8e4nv", 128, 16, False, 1),
    ):
        if cache == "fp8e4nv" and architecture < FP8_FROM:
            continue
        combined_group = triton.next_power_of_2(group)
        cache_bytes = 1 if cache.startswith("fp8") else 2
        constants = {
            "GROUP": group,
            "MERGED_GROUP": combined_group,
            "PADDED_GROUP": launch.padded_group(group, 1),
            "DIM": dim,
            "BLOCK": launch.attend_block(dim, group, cache_bytes, per_processor),
            "PART_ALIGNMENT": launch.SPLIT_ALIGNMENT,
            "MAX_PARTS": launch.MAX_SPLITS,
            "AT_ONCE": max(1, launch.SPLITS_AT_ONCE // combined_group),
            "CAPPED": capped,
            "UPCAST": False,
        }
        types = {"query": f"*{query}", "output": f"*{query}"}
        types |= dict.fromkeys(("keys", "values"), f"*{cache}")
        found[f"attend {query} {cache} {dim} {group}"] = shared_memory(
            sparse_attention._attend,
            architecture,
            constants,
            launch.ATTEND_WARPS,
            launch.ATTEND_STAGES,
            **types,
        )
    return found


def compile_rest(architecture: int) -> dict[str, int]:
    """The rest for budgets of 256, 2,048 and 6,144 of 32 heads."""
    found = {}
    pdl_options = {"FOLLOWS": architecture >= 10 * PDL_CAPABILITY[0]}
    for selected in (192, 1536, 4608):
        capacity = shortlist.shortlist_capacity(selected)
        cutting = {
            "UNDECIDED": launch.NEEDS_FULL_RANKING,
            "PADDED_HEADS": 32,
            "MET_RANKS": shortlist.counted_ranks(selected),
        }
        cutting |= pdl_options
        constants = cutting | {
            "CAPACITY": capacity,
            "SORTED_AT_ONCE": full_ranking.padded_ranks(selected),
            "SAMPLE": launch.MAX_SAMPLE,
            "BLOCK": launch.SHORTLIST_BLOCK,
        }
        found[f"shortlist {selected}"] = shared_memory(
            shortlist._shortlist, architecture, constants, launch.sort_warps(capacity)
        )
        padded = full_ranking.padded_ranks(selected)
        constants = cutting | {
            "PADDED_RANKS": padded,
            "BLOCK": launch.RANK_BLOCK,
            "COUNTED": launch.COMPACT_BLOCK,
        }
        found[f"rank {selected}"] = shared_memory(
            full_ranking._rank, architecture, constants, launch.rank_warps(padded)
        )
        capacity = mass.candidate_capacity(selected)
        constants = pdl_options | {
            "CAPACITY": capacity,
            "SAMPLE": launch.MAX_SAMPLE,
            "BLOCK": launch.HEAVIEST_BLOCK,
            "SMALL_BLOCK": launch.HEAVIEST_SMALL_BLOCK,
        }
        found[f"heaviest {selected}"] = shared_memory(
            mass._topk_by_mass, architecture, constants, launch.sort_warps(capacity)
        )
    blocks = {"BLOCK": launch.LSE_BLOCK}
    found["log_sum_exp"] = shared_memory(mass._log_sum_exp, architecture, blocks)
    blocks = {"BLOCK": launch.POOL_BLOCK, "HEADS": launch.POOL_HEADS} | pdl_options
    found["pool"] = shared_memory(mass._pool, architecture, blocks)
    blocks = {"BLOCK": launch.COMPACT_BLOCK, "PADDED_COUNTS": 64, "NO_TURN": launch.NEVER}
    blocks |= pdl_options
    found["compact"] = shared_memory(compact._compact, architecture, blocks, launch.WIDE_WARPS)
    blocks = {"BLOCK": launch.LENGTH_BLOCK}
    found["count_kept"] = shared_memory(compact._count_kept, architecture, blocks)
    return found


def compile_for(architecture: int) -> dict[str, int]:
    """Every kernel."""
    return (
        compile_scores(architecture) | compile_attention(architecture) | compile_rest(architecture)
    )


def main() -> None:
    """Compile for every architecture, as many at a time as there are cores."""
    with ProcessPoolExecutor() as mass:
        found = dict(zip(ARCHITECTURES, mass.map(compile_for, ARCHITECTURES), strict=True))
    sys.stdout.write("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
