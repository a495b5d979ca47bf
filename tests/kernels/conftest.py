"""Speed-up of Triton's interpreter (3.6), threefold for the kernels of this project.

Two slow paths are replaced, with the same results: Triton patches `triton.language` again at every
call of a device function, and reduces an xor, the heart of `tl.sort`, element by element.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from lim_sglang.kernels.launch import interpreted

_patch_language = interpreter._patch_lang
_reduce = interpreter.ReduceOps.apply_impl
_patched: set[tuple[int, ...]] = set()


def patch_language_once(function: Any) -> Any:
    """Patch the language modules that a function sees, unless they are patched already."""
    modules = tuple(id(each) for each in function.__globals__.values() if each in (tl, tl.core))
    if modules not in _patched:
        _patched.add(modules)
        _patch_language(function)
    return interpreter._LangPatchScope()  # nothing to restore


def reduce_xor_at_once(self: Any, tensors: Any) -> Any:
    """Reduce an xor with NumPy, everything else as Triton does."""
    if self.combine_fn is not tl.standard._xor_combine:
        return _reduce(self, tensors)
    (tensor,) = tensors
    data = np.bitwise_xor.reduce(tensor.handle.data, axis=self.axis, keepdims=self.keep_dims)
    return (self.to_tensor(data, tensor.dtype),)


if interpreted():
    interpreter._patch_lang = patch_language_once
    interpreter.ReduceOps.apply_impl = reduce_xor_at_once
