"""Which parts of a loaded model run slower than they could, why, and what helps."""

from __future__ import annotations

from collections.abc import Iterator

import numba
import torch

from cpu_experts.jit import hostcpu, simd_level
from hybrid.errors import UsageError
from hybrid.fast.attach import LOST, UNTESTED, FastPath
from hybrid.formats.notes import Note
from hybrid.machine.compute_dtype import automatic_dtype
from hybrid.machine.host import has_native_bf16
from hybrid.model import Model
from planner.errors import PlannerError


def _threading_layer() -> str | None:
    """What numba runs parallel kernels on; None before the first of them ran."""
    try:
        return str(numba.threading_layer())
    except ValueError:
        return None


def slow_paths(loaded: Model) -> Iterator[Note]:
    """Name everything that runs slower in a model than it could on some machine."""
    model = loaded.network
    yield from _as_another_processor(model.dtype)
    if simd_level.LEVEL == hostcpu.actual().level == "portable":
        yield Note(
            "expert kernels at portable",
            "there are no vector kernels for this processor",
            "use an x86 processor with AVX2 or newer",
        )
    if _threading_layer() == "workqueue":
        yield Note(
            "the kernels' threads",
            "numba runs them with its own work queue, which wakes them slowly: it found no OpenMP",
            "install OpenMP (on Debian libgomp1), and leave NUMBA_THREADING_LAYER unset",
        )
    if model.dtype == torch.bfloat16 and not has_native_bf16():
        yield Note(
            "dense layers in bfloat16",
            "this processor does not multiply it natively",
            "load with dtype float32",
        )
    on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
    if model.dtype == torch.float32 and on_cpu and _automatic_dtype(loaded) == "bfloat16":
        yield Note(
            "dense layers in float32",
            "this processor multiplies bfloat16 natively, which is faster on prompts",
            "load with dtype bfloat16 or auto",
        )
    apart = [layer for layer in loaded.layers if layer.own_gating]
    if apart:
        yield Note(
            f"experts of {len(apart)} layers in three steps",
            "the kernels have no parameters for this family's activation",
            "none yet: the family's own code runs between the projections",
        )
    yield from _calls_past_the_fast_path(loaded.fast)
    attention = model.config.get_text_config()._attn_implementation
    if attention == "eager":
        yield Note(
            "attention in eager mode",
            "transformers has no fused attention for this family",
            "none yet",
        )


def _automatic_dtype(loaded: Model) -> str:
    """What a model is computed in on this processor unless something else is asked for."""
    try:
        return automatic_dtype(loaded.spec)
    except (PlannerError, UsageError):
        return automatic_dtype(None)


def _as_another_processor(dtype: torch.dtype) -> Iterator[Note]:
    """Say what runs otherwise because the environment takes this processor for another one."""
    level, actual, counted = simd_level.LEVEL, hostcpu.actual(), hostcpu.processor().units
    variable = hostcpu.ENVIRONMENT_VARIABLE
    if simd_level.EMULATED:
        why = "its dot product is emulated for a check"
        yield Note(f"expert kernels at {level}", why, f"unset {variable}")
    elif level != actual.level:
        why = f"{variable} asks for it, this processor runs {actual.level}"
        yield Note(f"expert kernels at {level}", why, f"unset {variable}")
    if actual.units and not counted:
        units = ", ".join(sorted(actual.units))
        yield Note(
            "dense layers and long prompts without bfloat16 units",
            f"{variable} hides those of this processor ({units})",
            f"name them there or unset {variable}",
        )
    if dtype == torch.bfloat16 and counted and not actual.units:
        yield Note(
            "dense layers in bfloat16",
            f"{variable} counts on {', '.join(sorted(counted))}, this processor has no such units",
            f"unset {variable}",
        )


def _calls_past_the_fast_path(fast: FastPath) -> Iterator[Note]:
    if fast.path == UNTESTED:
        return
    if not fast.path.fast:
        yield from tuple(fast.notes()) or (Note(LOST, fast.path.reason, fast.path.remedy),)
    yield from refusals(fast)


def refusals(fast: FastPath) -> Iterator[Note]:
    """Name the steps that went to transformers' code although there is a fast path."""
    for reason, count in fast.refused.items():
        yield Note(
            f"{count} of the model's steps in transformers' code",
            reason,
            "none yet: the fast path computes new tokens and prompts of one text, and nothing else"
            " but new tokens of a batch",
        )
