"""Explains a forecast: what binds, why experts run where they do, what would help or fit.

Nothing here changes a prediction; it reads the cost model and a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from hybrid.formats.registry import advised_formats, bits_per_weight
from planner.cost.cost import CostModel
from planner.describe.terms import CALL, CPU, DECIDING, DISK, GPU, HEAD, JOINING, LINK, MIXER
from planner.foretell.run import Run

if TYPE_CHECKING:
    from planner.foretell.request import Request

GIB = 2**30


def binding_resource(cost: CostModel, terms: dict[str, float], tokens: int) -> str:
    """Name the resource the largest term of a step waits for.

    Parameters
    ----------
    cost
        Durations.
    terms
        Seconds per term.
    tokens
        Tokens of the step.
    """
    shape = cost.model.experts
    load = max(1, tokens * shape.top_k // max(1, shape.count))
    term = max(terms, key=lambda name: terms[name])
    hardware, experts = cost.hardware, cost.experts
    if term == LINK:
        return "the link between RAM and GPU (copies)"
    if term == DISK:
        return "the disk (experts that RAM cannot hold)"
    if term == CPU:
        bound = experts.cpu_s(load) > experts.cpu_s(1) * 1.01
        return "CPU compute (experts)" if bound else "RAM bandwidth (experts on the CPU)"
    if term == GPU:
        bound = experts.gpu_s(load) > experts.gpu_s(1) * 1.01
        return "GPU compute (experts)" if bound else "VRAM bandwidth (experts on the GPU)"
    if term == CALL:
        return "the host (Python's work per step)"
    if term in (DECIDING, JOINING):
        return "the host (Python's work per layer)"
    side = "GPU" if cost.on_gpu else "CPU"
    memory = "VRAM" if cost.on_gpu else "RAM"
    if term == MIXER:
        layer = cost.model.layers[-1]
        work_s = cost.dense(layer.mixer.params, tokens).value
        host_s = hardware.cpu.layer_overhead_s.value
        if cost.on_gpu and cost.knows():
            host_s = cost.mixer(layer, tokens, tokens).value - work_s
        if work_s < host_s:
            return "the host (Python's work per layer)"
    params = cost.model.head_params if term == HEAD else cost.model.layers[-1].mixer.params
    one, many = cost.dense(params, 1).value, cost.dense(params, tokens).value
    return (
        f"{side} compute (dense layers)"
        if many > one * 1.01
        else (f"{memory} bandwidth (dense layers)")
    )


def explain(run: Run, cost: CostModel) -> Iterator[str]:
    """Yield reasons for the placement of experts in the last decode step.

    One layer speaks for all: the first, from the middle on, that uses the most lanes.
    """
    if not cost.model.moe_layers:
        yield "no experts to share: every token passes through all weights"
        return
    if not cost.on_gpu:
        yield "every expert on the CPU: this machine has no GPU"
        return
    middle = len(run.plans) // 2
    plans = run.plans[middle:] + run.plans[:middle]
    plan = max(plans, key=lambda p: bool(p.cpu) + bool(p.copies) + (len(p.gpu) > len(p.copies)))
    experts = cost.experts
    cpu_ms, gpu_ms = (experts.cpu_s(1) * 1e3, experts.gpu_s(1) * 1e3)
    fetch_ms = experts.copy_s() * 1e3 + gpu_ms
    resident = [expert for expert in plan.gpu if expert not in plan.copies]
    place = f"layer {plan.layer}, expert"
    for expert in resident[:1]:
        yield (
            f"{place} {expert} on the GPU: resident, {gpu_ms:.3f} ms against {cpu_ms:.3f} ms on "
            "the CPU"
        )
    for expert in plan.cpu[:1]:
        yield f"{place} {expert} on the CPU: {cpu_ms:.3f} ms against {fetch_ms:.3f} ms to fetch"
    if len(plan.cpu) > 1:
        yield (
            f"layer {plan.layer}, {len(plan.cpu)} experts on the CPU: together "
            f"{plan.cpu_end_s * 1e3:.3f} ms; the GPU is done after {plan.gpu_end_s * 1e3:.3f} ms"
        )
    for expert in plan.copies[:1]:
        queue_ms = (plan.cpu_end_s + experts.cpu_s(1)) * 1e3
        yield (
            f"{place} {expert} copied: there after {fetch_ms:.3f} ms, while the CPU would "
            f"be done with it after {queue_ms:.3f} ms"
        )
    yield (
        f"layer {plan.layer} ends after {plan.makespan_s * 1e3:.3f} ms; no placement can be "
        f"faster than {plan.lower_bound_s * 1e3:.3f} ms"
    )


def variants(request: Request) -> Iterator[tuple[str, bool, Request]]:
    """Yield changes worth trying: what, whether it changes the output, and the new request."""
    hardware = request.hardware
    for fmt in advised_formats():
        smaller = bits_per_weight(fmt) < bits_per_weight(request.experts)
        if smaller and request.model.moe_layers:
            yield f"experts in {fmt}", True, replace(request, experts=fmt)
        if fmt in _smaller_dense(request):
            yield f"dense weights in {fmt}", True, replace(request, dense=fmt, dense_bytes=None)
    half = max(request.prompt, request.context // 2)
    if half < request.context:
        yield f"context {half}", False, replace(request, context=half)
    if hardware.gpu and hardware.link:
        vram = hardware.gpu.vram_bytes.value * 1.5
        more = hardware.with_values("gpu", vram_bytes=vram)
        yield f"{vram / GIB:.0f} GiB of VRAM", False, replace(request, hardware=more)
        rate = hardware.link.bytes_per_s.value * 2
        faster = hardware.with_values("link", bytes_per_s=rate)
        yield f"link of {rate / 1e9:.0f} GB/s", False, replace(request, hardware=faster)
    rate = hardware.cpu.memory_bytes_per_s.value * 1.5
    faster = hardware.with_values("cpu", memory_bytes_per_s=rate)
    yield f"RAM of {rate / 1e9:.0f} GB/s", False, replace(request, hardware=faster)
    if request.fit().in_ram < 1:
        ram = hardware.cpu.ram_bytes.value * 2
        more = hardware.with_values("cpu", ram_bytes=ram)
        yield f"{ram / GIB:.0f} GiB of RAM", False, replace(request, hardware=more)


def remedies(request: Request) -> Iterator[str]:
    """Yield what makes a model fit that does not: the mildest of each kind of change first."""
    contexts = [c for c in (32768, 16384, 8192, 4096, 2048, 1024, 512) if c < request.context]
    contexts = [c for c in contexts if c >= request.prompt]
    formats = _smaller_dense(request)
    found = False
    for context in contexts:
        if replace(request, context=context).fit().fits:
            found = True
            yield f"--context {context}"
            break
    for fmt in formats:
        if replace(request, dense=fmt, dense_bytes=None).fit().fits:
            found = True
            yield f"--dense {fmt} (changes the output slightly)"
            break
    if request.hardware.gpu:
        alone = replace(request.hardware, gpu=None, link=None)
        if replace(request, hardware=alone).fit().fits:
            found = True
            yield "--vram 0 (the CPU alone)"
    if found:
        return
    for fmt in formats:
        for context in contexts:
            if replace(request, dense=fmt, context=context).fit().fits:
                yield f"--dense {fmt} --context {context} (changes the output slightly)"
                return
    yield f"more memory: {request.fit().shortage}"


def _smaller_dense(request: Request) -> list[str]:
    """Return the formats in which dense weights would take less where they lie."""
    if request.widens:
        return []
    most = bits_per_weight(request.dense)
    return [fmt for fmt in advised_formats() if bits_per_weight(fmt) < most]
