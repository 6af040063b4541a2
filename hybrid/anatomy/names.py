"""Names that families give to the parts of a decoder layer, where nothing else tells them apart."""

from __future__ import annotations

SHARED_EXPERTS = ("shared_expert", "shared_experts", "shared_mlp")
"""The MLP that every token goes through beside its experts."""
SHARED_GATE = "shared_expert_gate"
"""What weighs a shared expert's output."""
EXPERTS_BLOCKS = ("mlp", "block_sparse_moe")
"""What holds the router and the experts, or, in a layer without, is the MLP."""
FEED_FORWARDS = (*EXPERTS_BLOCKS, "feed_forward", "ffn")
"""What is the MLP of a layer without experts."""
MLP_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""The linear layers of a gated MLP."""


def is_router(name: str) -> bool:
    """Whether a module of an experts block is its router, by its name there."""
    return name == "gate" or "router" in name
