"""The records that describe a decoder to the one-token kernels: numbers and addresses.

Every weight is given by its address (0: there is none); :mod:`cpu_experts.decoder.layers` fills the
records in and keeps the arrays alive.
"""

from __future__ import annotations

import numpy as np

from cpu_experts.kernels.records import EXPERTS

#: A packed matrix ``[rows, cols]``: ``format`` is its table's address, ``inner`` are the units of a
#: strip; ``threads`` share its strips out, ``strips`` at least at a time.
MATRIX = np.dtype(
    [
        ("at", "i8"),
        ("bias", "i8"),
        ("rows", "i8"),
        ("cols", "i8"),
        ("format", "i8"),
        ("strip_bytes", "i8"),
        ("inner", "i8"),
        ("strips", "i8"),
        ("threads", "i8"),
    ],
    align=True,
)

#: ``(x - mean) / sqrt(mean of squares + eps) * weight + bias``; the mean only if ``centered``.
NORM = np.dtype(
    [("weight", "i8"), ("bias", "i8"), ("size", "i8"), ("centered", "i8"), ("eps", "f4")],
    align=True,
)

#: How a router's numbers become weights.
SOFTMAX, SOFTMAX_OF_CHOSEN, SIGMOID, SPARSEMIXER = range(4)

#: ``top_k`` 0: the layer has no router. ``gated_shared``: one more row weighs the shared expert.
ROUTER = np.dtype(
    [
        ("matrix", MATRIX),
        ("correction", "i8"),
        ("scoring", "i8"),
        ("experts", "i8"),
        ("top_k", "i8"),
        ("groups", "i8"),
        ("top_groups", "i8"),
        ("of_group", "i8"),
        ("normalize", "i8"),
        ("gated_shared", "i8"),
        ("floor", "f4"),
        ("scale", "f4"),
        ("jitter", "f4"),
    ],
    align=True,
)

#: A compressed cache, see :mod:`cpu_experts.decoder.mla`; ``rank`` 0: there is none. Without
#: ``q_b`` rows, queries are a single product.
LATENT = np.dtype(
    [
        ("rank", "i8"),
        ("rope", "i8"),
        ("nope", "i8"),
        ("value", "i8"),
        ("apart", "i8"),
        ("q_norm", NORM),
        ("q_b", MATRIX),
        ("kv_norm", NORM),
        ("absorb", MATRIX),
        ("kv_b", MATRIX),
    ],
    align=True,
)

#: A gated delta net, see :mod:`cpu_experts.decoder.delta`; ``key_heads`` 0: the layer has none.
#: ``q``, ``k``, ``v``, ``z``, ``b`` and ``a`` are where a first head's numbers lie in the layer's
#: first products, and the ``_step``\ s how far the next key head's are behind.
DELTA = np.dtype(
    [
        ("key_heads", "i8"),
        ("value_heads", "i8"),
        ("key_dim", "i8"),
        ("value_dim", "i8"),
        ("taps", "i8"),
        ("channels", "i8"),
        ("q", "i8"),
        ("q_step", "i8"),
        ("k", "i8"),
        ("k_step", "i8"),
        ("v", "i8"),
        ("v_step", "i8"),
        ("z", "i8"),
        ("z_step", "i8"),
        ("b", "i8"),
        ("a", "i8"),
        ("a_step", "i8"),
        ("conv", "i8"),
        ("bias", "i8"),
        ("forgets", "i8"),
        ("steps", "i8"),
        ("norm", "i8"),
        ("eps", "f4"),
    ],
    align=True,
)

#: One decoder layer. ``gated``: every query head has a gate behind it. ``window`` 0: attention sees
#: everything. ``clip`` bounds q, k and v.
LAYER = np.dtype(
    [
        ("norm", NORM),
        ("q", MATRIX),
        ("k", MATRIX),
        ("v", MATRIX),
        ("o", MATRIX),
        ("q_norm", NORM),
        ("k_norm", NORM),
        ("sinks", "i8"),
        ("heads", "i8"),
        ("kv_heads", "i8"),
        ("head_dim", "i8"),
        ("window", "i8"),
        ("gated", "i8"),
        ("latent", LATENT),
        ("delta", DELTA),
        ("ffn_norm", NORM),
        ("router", ROUTER),
        ("experts", EXPERTS),
        ("shared", EXPERTS),
        ("scaling", "f4"),
        ("clip", "f4"),
        ("residual", "f4"),
    ],
    align=True,
)

#: What follows the last layer. ``scale`` multiplies the logits.
HEAD = np.dtype([("norm", NORM), ("matrix", MATRIX), ("scale", "f4")], align=True)

#: One layer's keys and values: ``length`` positions are filled, the next token comes behind. They
#: lie in pages of ``page`` positions, a multiple of 16: ``table`` is the address of a word for
#: each, how many bytes behind ``keys`` and ``values`` it is. Of a gated delta net ``inputs`` and
#: ``memory`` are read, and what they are next is written ``_after``.
STATE = np.dtype(
    [
        ("keys", "i8"),
        ("values", "i8"),
        ("capacity", "i8"),
        ("length", "i8"),
        ("beyond", "i8"),
        ("table", "i8"),
        ("page", "i8"),
        ("inputs", "i8"),
        ("inputs_after", "i8"),
        ("memory", "i8"),
        ("memory_after", "i8"),
    ],
    align=True,
)

#: What a text has of a step: ``tokens`` from the ``first`` on. Its keys and values are those of the
#: ``row`` of states, where it has the heads of ``place``, texts of as many heads before it.
#: Relative to its next position, it ``begins``: what lies before that is no part of it.
TEXT = np.dtype(
    [("first", "i8"), ("tokens", "i8"), ("row", "i8"), ("place", "i8"), ("begins", "i8")],
    align=True,
)
