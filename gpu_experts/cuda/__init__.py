"""Experts on a GPU through torch.cuda: NVIDIA's, and AMD's where torch is built for ROCm."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from gpu_experts.backend import Backend, StandIn

if TYPE_CHECKING:
    from gpu_experts.device import Device


def _count() -> int:
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _open(number: int, stand_in: StandIn) -> Device:
    from gpu_experts.cuda.device import CudaDevice

    return CudaDevice(number)


def _ran_out_of_memory(error: BaseException) -> bool:
    from gpu_experts.cuda.runtime import ran_out_of_memory

    return ran_out_of_memory(error)


def _software() -> dict[str, str | None]:
    import torch

    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = None
    return {"cuda": torch.version.cuda, "torch": torch.__version__, "triton": triton}


CUDA = Backend(
    name="cuda",
    count=_count,
    absent="torch finds {count} CUDA devices",
    remedy="install a torch that is built for CUDA",
    open=_open,
    ran_out_of_memory=_ran_out_of_memory,
    software=_software,
)
