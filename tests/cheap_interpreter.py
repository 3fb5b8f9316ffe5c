"""Triton's interpreter at half its price, with the same results.

It runs a program in Python, some 0.1 ms an operation, and a third of that goes into three things that no test needs:
patching `triton.language` anew for each call of a device function (`tl.sum` is one), a check of every integer sum for
overflow, which costs a second sum in 64 bits and reports nothing unless a kernel is compiled for debugging, and a table
of dtypes built at each use of it.
"""

import inspect
from dataclasses import replace

import numpy as np


def make_cheap() -> None:
    """For the rest of this process, which can then interpret kernels and compile none."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)

    patch, patched = interpreter._patch_lang, set()

    def patch_once(function):
        modules = frozenset(id(m) for m in function.__globals__.values() if inspect.ismodule(m) and m in (tl, tl.core))
        if modules not in patched:
            patch(function)
            patched.add(modules)
        # What a caller restores: nothing.
        return interpreter._LangPatchScope()

    dtype_of, dtypes, address = interpreter._get_np_dtype, {}, np.dtype(np.uint64)

    def dtype_once(kind):
        kind = kind.element_ty if isinstance(kind, tl.block_type) else kind
        if isinstance(kind, tl.pointer_type):
            return address
        if kind.name not in dtypes:
            dtypes[kind.name] = dtype_of(kind)
        return dtypes[kind.name]

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, dtype_once
