"""Kernels that a step launches: those in its CUDA graph."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch

_CudaGraph: Any = torch.cuda.CUDAGraph  # its types leave out the argument that counts here


class ListedGraph(_CudaGraph):
    """A CUDA graph whose nodes can still be listed after its capture, and that replays the same."""

    def __new__(cls) -> Self:
        return super().__new__(cls, keep_graph=True)

    def __init__(self) -> None:
        super().__init__(keep_graph=True)


@contextmanager
def listed_graphs() -> Iterator[None]:
    """Let SGLang capture graphs of this kind, for as long as the block lasts."""
    module: Any = torch.cuda
    original = module.CUDAGraph
    module.CUDAGraph = ListedGraph
    try:
        yield
    finally:
        module.CUDAGraph = original


def count_kernels(graph: ListedGraph) -> int:
    """Kernel nodes of a captured graph.

    Raises:
        RuntimeError: the graph was captured as another kind, or the driver's words.
        ImportError: there is no cuda-python, which SGLang needs.
    """
    driver = importlib.import_module("cuda.bindings.driver")
    return count_nodes(driver, driver.CUgraph(init_value=graph.raw_cuda_graph()))


def count_nodes(driver: Any, graph: Any) -> int:
    """Kernel nodes of a `CUgraph` and of the graphs within it. `driver`: CUDA's driver API."""
    _, num_nodes = _checked(driver.cuGraphGetNodes(graph))
    nodes, _ = _checked(driver.cuGraphGetNodes(graph, num_nodes))
    kinds, found = driver.CUgraphNodeType, 0
    for node in nodes[:num_nodes]:
        (kind,) = _checked(driver.cuGraphNodeGetType(node))
        if kind == kinds.CU_GRAPH_NODE_TYPE_KERNEL:
            found += 1
        elif kind == kinds.CU_GRAPH_NODE_TYPE_GRAPH:
            found += count_nodes(driver, *_checked(driver.cuGraphChildGraphNodeGetGraph(node)))
    return found


def _checked(result: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a call of the driver returned besides its error code."""
    error, *values = result
    if int(error):
        raise RuntimeError(f"CUDA's driver says {error.name}")
    return tuple(values)
