"""The terms that a step's time is made of, everywhere by the same names."""

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
