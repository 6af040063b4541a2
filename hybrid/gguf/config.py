"""Makes the ``config.json`` that transformers would have of what a GGUF file's metadata says."""

from __future__ import annotations

from typing import Any

from hybrid.errors import CheckpointError, UnsupportedModelError
from hybrid.gguf.architectures import Architecture, architecture_of, known_names
from hybrid.gguf.header import GgufHeader
from hybrid.gguf.rope import rope_parameters

#: What files hold that are no model of text, by ``general.type``.
_OTHER_TYPES = {
    "adapter": ("a LoRA adapter, not a model", "merge it with llama.cpp's llama-export-lora first"),
    "mmproj": (
        "the projector of images or sound of a model, not its text",
        "name the other GGUF file of the same model",
    ),
    "imatrix": ("an importance matrix, not a model", "name the model's file"),
    "vocab": ("a vocabulary without weights", "name the model's file"),
}
#: Architectures of embeddings, encoders and towers, by how their names begin.
_ENCODERS = {
    **dict.fromkeys(
        ("bert", "nomic-bert", "jina-bert", "modern-bert", "neo-bert", "eurobert"),
        "an embedding model",
    ),
    **dict.fromkeys(("gemma-embedding", "llama-embed"), "an embedding model"),
    "t5encoder": "an encoder",
    "clip": "a vision tower",
    "wavtokenizer": "a decoder of sound",
}


def config_of(header: GgufHeader) -> dict[str, Any]:
    """Return the table that a Hugging Face model of the same weights has as ``config.json``.

    Raises
    ------
    UnsupportedModelError
        When it is no model of text, or of an architecture that is not read.
    CheckpointError
        When a value is missing or cannot be.
    """
    architecture = check_kind(header)
    try:
        return _common(header, architecture) | architecture.settings(header)
    except (KeyError, TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{header.path} lacks settings of {header.architecture}, or has odd ones "
            f"({type(error).__name__}: {error})",
            hint="download the file again, or a newer one: old converters left values out",
        ) from error


def check_kind(header: GgufHeader) -> Architecture:
    """Return a file's architecture, which is one that writes text and is read.

    Raises
    ------
    UnsupportedModelError
        Naming what the file is, and the architectures that are read.
    """
    kind, name = str(header.metadata.get("general.type", "model")), header.architecture
    what, hint = _OTHER_TYPES.get(kind, ("", ""))
    if not what:
        what = next((told for start, told in _ENCODERS.items() if name.startswith(start)), "")
        if not what and header.get("pooling_type", 0):
            what = "an embedding model"
        hint = "models that write text run here"
    if what:
        raise UnsupportedModelError(f"{header.path} is {what} ({name or kind})", hint=hint)
    known = architecture_of(header)
    if known is None:
        raise UnsupportedModelError(
            f"{header.path} is of the architecture {name!r}, which is not read from GGUF",
            hint=f"read are: {', '.join(known_names())}; others run from safetensors files",
        )
    return known


def _common(header: GgufHeader, architecture: Architecture) -> dict[str, Any]:
    """Return what every architecture has."""
    hidden, heads = int(header.get("embedding_length")), int(header.get("attention.head_count"))
    kv_heads = header.get("attention.head_count_kv", heads)
    head_dim = int(header.get("attention.key_length") or hidden // heads)
    width = header.get("feed_forward_length", 0)
    found = {
        "model_type": architecture.model_type,
        "hidden_size": hidden,
        "num_hidden_layers": layers_of(header),
        "intermediate_size": max(width) if isinstance(width, list) else int(width),
        "num_attention_heads": heads,
        "num_key_value_heads": max(kv_heads) if isinstance(kv_heads, list) else int(kv_heads),
        "head_dim": head_dim,
        "rms_norm_eps": float(
            header.get("attention.layer_norm_rms_epsilon")
            or header.get("attention.layer_norm_epsilon", 1e-5)
        ),
        "max_position_embeddings": int(header.get("context_length")),
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "rope_parameters": _rope(header, architecture, head_dim),
        "dtype": "float32",
    }
    for name in ("bos", "eos"):
        found[f"{name}_token_id"] = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
    found["pad_token_id"] = header.metadata.get("tokenizer.ggml.padding_token_id")
    return found


def _rope(header: GgufHeader, architecture: Architecture, head_dim: int) -> dict[str, Any]:
    """Return the rotary embedding's settings; those of Gemma 3 by kind of layer."""
    found = rope_parameters(header, head_dim)
    if architecture.model_type != "gemma3_text":
        return found
    local = {
        "rope_type": "default",
        "rope_theta": float(header.get("rope.freq_base_swa", 10000.0)),
    }
    return {"full_attention": found, "sliding_attention": local}


def layers_of(header: GgufHeader) -> int:
    """Return how many layers write text: files count those that foretell tokens, too."""
    return int(header.get("block_count")) - int(header.get("nextn_predict_layers", 0))
