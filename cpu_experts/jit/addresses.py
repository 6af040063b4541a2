"""Arrays at addresses, so that one table of numbers can describe a whole model's weights.

Whoever puts an address into a table keeps the array behind it alive.
"""

# numba calls the intrinsics with its own types and compiler state.
# mypy: disable-error-code="no-untyped-def, misc, untyped-decorator"

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, config, njit, types
from numba.extending import intrinsic


def _pointer_to(kind: Any, element: Any) -> Any:
    @intrinsic
    def pointer(typingctx, address):
        def codegen(context, b, signature, args):
            return b.inttoptr(args[0], element.as_pointer())

        return types.CPointer(kind)(types.int64), codegen

    return pointer


if config.DISABLE_JIT:

    def bytes_at(address: Any, size: Any) -> Any:
        """Return the uint8 array ``[size]`` at an address; at 0 there is none."""
        if not address:
            return np.zeros(0, np.uint8)
        pointer = ctypes.cast(int(address), ctypes.POINTER(ctypes.c_uint8))
        return np.ctypeslib.as_array(pointer, (int(size),))

    def floats_at(address: Any, size: Any) -> Any:
        """Return the float32 array ``[size]`` at an address; at 0 there is none."""
        if not address:
            return np.zeros(0, np.float32)
        pointer = ctypes.cast(int(address), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, (int(size),))

    def words_at(address: Any, size: Any) -> Any:
        """Return the int64 array ``[size]`` at an address."""
        pointer = ctypes.cast(int(address), ctypes.POINTER(ctypes.c_int64))
        return np.ctypeslib.as_array(pointer, (int(size),))

else:
    _byte_pointer = _pointer_to(types.uint8, ir.IntType(8))
    _float_pointer = _pointer_to(types.float32, ir.FloatType())
    _word_pointer = _pointer_to(types.int64, ir.IntType(64))

    @njit(nogil=True)
    def bytes_at(address: Any, size: Any) -> Any:
        """Return the uint8 array ``[size]`` at an address."""
        return carray(_byte_pointer(address), (size,))

    @njit(nogil=True)
    def floats_at(address: Any, size: Any) -> Any:
        """Return the float32 array ``[size]`` at an address."""
        return carray(_float_pointer(address), (size,))

    @njit(nogil=True)
    def words_at(address: Any, size: Any) -> Any:
        """Return the int64 array ``[size]`` at an address."""
        return carray(_word_pointer(address), (size,))
