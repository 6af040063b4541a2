"""Names the terms that a step's time is made of: for plans, reports, benchmarks, calibrations."""

from __future__ import annotations

MIXER, DECIDING, DENSE, CPU, GPU, LINK, JOINING, DISK, HEAD, CALL = TERMS = (
    "attention and router",
    "deciding",
    "shared and dense layers",
    "experts on the CPU",
    "experts on the GPU",
    "copies to the GPU",
    "joining",
    "reads from disk",
    "output head",
    "around the layers",
)
"""What a step's time is made of; they add up to it. A layer's experts count for the lane that
ends last."""

EXPERTS = "experts"
"""What a clock on the host sees of a layer between deciding and the sum of its experts."""

WITHIN_EXPERTS = (DENSE, CPU, GPU, LINK, DISK, JOINING)
"""The terms that ``EXPERTS`` consists of in a layer with experts."""

SAMPLING, TEXT = EXTRAS = ("sampling", "text")
"""What is done for a token besides, around the layers, where it is asked for: drawing it instead of
taking the likeliest one, and writing it."""

HANDING = "handing"
"""By how much every expert to copy makes deciding longer."""

CALIBRATED = (MIXER, DENSE, HEAD, CALL, SAMPLING, TEXT, CPU, DECIDING, HANDING, JOINING)
"""What a calibration measures: of ``CPU`` what one expert adds to a single token's layer."""
