"""Compiles every kernel for GPUs that need not be there; prints shared memory as JSON.

Run by `test_compiled.py` in a process of its own: the test process decorates for the interpreter.
"""

import json
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lim_sglang.kernels import launch, lengths, rank, score, union

ARCHITECTURES = (80, 90, 100)
FP8_FROM = 89
"""The first architecture whose compiler takes fp8 of the kind that KV caches use."""
POINTERS = {
    **dict.fromkeys(("indptr", "slots", "ranking", "first_turn", "last_turn"), "*i32"),
    **dict.fromkeys(("kept_indptr", "kept"), "*i32"),
    "lengths": "*i64",
    "scores": "*fp32",
}


def shared_memory(
    kernel: Any, architecture: int, constants: dict[str, Any], warps: int = 4, **types: str
) -> int:
    """Bytes of shared memory that a program of the compiled kernel takes."""
    pointers = POINTERS | types
    signature = {name: pointers.get(name, "i32") for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": warps},
    )
    shared: int = compiled.metadata.shared
    return shared


def compile_scores(architecture: int) -> dict[str, int]:
    """Each dtype, head dimension and group size that the serving models have."""
    found = {}
    for query, keys in (("bf16", "bf16"), ("fp16", "fp16"), ("bf16", "fp8e4nv")):
        for dim in (64, 128, 256):
            for group in (1, 16, 32):
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
                    score._score, architecture, constants, query=f"*{query}", keys=f"*{keys}"
                )
    return found


def compile_rest(architecture: int) -> dict[str, int]:
    """Ranking for budgets of 256, 2,048 and 6,144, the union, and the kept lengths."""
    found = {}
    for k in (192, 1536, 4608):
        padded = triton.next_power_of_2(k)
        constants = {"PADDED_K": padded, "BLOCK": launch.RANK_BLOCK}
        found[f"rank {k}"] = shared_memory(
            rank._rank, architecture, constants, warps=launch.rank_warps(padded)
        )
    name = lengths._count_kept.fn.__name__
    constants = {"BLOCK": launch.LENGTH_BLOCK}
    found[name] = shared_memory(lengths._count_kept, architecture, constants)
    for kernel in (union._take_turns, union._cut, union._compact):
        name = kernel.fn.__name__
        found[name] = shared_memory(kernel, architecture, {"BLOCK": launch.UNION_BLOCK})
    return found


def main() -> None:
    """Compile for every architecture."""
    found = {a: compile_scores(a) | compile_rest(a) for a in ARCHITECTURES}
    sys.stdout.write("\n" + json.dumps(found))


if __name__ == "__main__":
    main()
