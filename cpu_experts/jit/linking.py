"""How kernels call kernels: linked first, then optimized and assembled together, once.

numba optimizes and assembles every function before it links it into those that call it, and
these again with all that they call; what it makes of a parallel loop is three callers more. The
fifty kernels of a decoder would be compiled five times over, which takes most of a minute.

So every kernel has two dispatchers. The one that Python calls compiles it as a whole. The one
that other kernels call only translates it: it has no machine code of its own, hence neither a
way to be called from Python nor a file in the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba.core import types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.registry import CPUDispatcher


class _Part(JITCodeLibrary):  # type: ignore[misc]
    """Code for linking: what it is linked into is optimized and assembled."""

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        return 0  # numba's word for a function that is not there


class _PartsOnly:
    """A code generator whose libraries are all for linking."""

    def __init__(self, codegen: Any) -> None:
        self._codegen = codegen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._codegen, name)

    def create_library(self, name: str) -> _Part:
        return _Part(self, name)

    def set_env(self, name: str, environment: Any) -> None:
        """The variable for it is not in memory before the whole is: see :class:`_WholeCompiler`."""


class _PartCompiler(Compiler):  # type: ignore[misc]
    """Translates a function, and what numba derives from it, for linking."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        target = self.state.targetctx
        self._codegen = target.codegen()
        self.state.targetctx = target.subtarget(_internal_codegen=_PartsOnly(self._codegen))


class _WholeCompiler(_PartCompiler):
    """The same, but the function itself becomes machine code, with all that it calls."""

    def compile_extra(self, function: Callable[..., Any]) -> Any:
        library = self._codegen.create_library(function.__qualname__)
        library.enable_object_caching()
        self.state.library = library
        result = super().compile_extra(function)
        for environment in result._find_referenced_environments():
            self._codegen.set_env(environment.env_name, environment)
        return result


class Kernel(CPUDispatcher):  # type: ignore[misc]
    """A function that Python calls as compiled here, and other kernels as a part of theirs."""

    def __init__(self, function: Callable[..., Any], options: dict[str, Any]) -> None:
        alone = options | {"no_cfunc_wrapper": True}
        super().__init__(function, targetoptions=alone, pipeline_class=_WholeCompiler)
        linked = alone | {"no_cpython_wrapper": True}
        self._part = CPUDispatcher(function, targetoptions=linked, pipeline_class=_PartCompiler)

    @property
    def _numba_type_(self) -> Any:
        """What compiled code sees in this object's place."""
        return types.Dispatcher(self._part)
