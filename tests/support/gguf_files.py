"""Writes small GGUF files of random weights by recipes: metadata, and tensors with their shapes.

A recipe (``tests/cases/gguf/*.json``) is what llama.cpp's converter wrote for a tiny model of a
family, without the weights. These are drawn here, always the same for a name and a shape, so that
the recipe can hold the logits and the text that llama.cpp has of the file.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

CASES = Path(__file__).parents[1] / "cases" / "gguf"
#: Tokens whose logits and continuation recipes have.
PROMPT = (5, 17, 88, 200, 31, 77, 150, 9, 42, 64, 12, 99)


def recipe(name: str) -> dict[str, Any]:
    """Read a recipe."""
    found: dict[str, Any] = json.loads((CASES / f"{name}.json").read_text())
    return found


def write_gguf(
    path: Path, made_by: dict[str, Any], *, matrices: str = "F32", **metadata: Any
) -> Path:
    """Write a recipe's file.

    Parameters
    ----------
    matrices
        The type of everything that has two dimensions or more and fits into its blocks.
    metadata
        Values that replace the recipe's, or come beside them; ``__`` stands for a dot.
    """
    values = made_by["metadata"] | {key.replace("__", "."): v for key, v in metadata.items()}
    writer = gguf.GGUFWriter(path, values["general.architecture"])
    for key, value in values.items():
        if key != "general.architecture":
            _add(writer, key, value)
    for key, value in vocabulary(made_by["vocabulary"]).items():
        if key not in values:
            _add(writer, key, value)
    for name, shape in made_by["tensors"].items():
        given = made_by.get("values", {}).get(name)
        weights = (
            drawn(made_by.get("seed", "") + name, shape)
            if given is None
            else np.array(given, np.float32)
        )
        kind = gguf.GGMLQuantizationType[matrices]
        block = gguf.GGML_QUANT_SIZES[kind][0]
        if len(shape) > 1 and kind.name != "F32" and shape[-1] % block == 0:
            writer.add_tensor(name, gguf.quantize(weights, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def drawn(name: str, shape: list[int]) -> NDArray[np.float32]:
    """Draw a tensor's weights, always the same for its name and shape."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith("ssm_a"):
        values = -np.abs(values) - 0.5
    elif len(shape) > 1:
        values *= 1.5 / np.sqrt(shape[-1])
    elif name.endswith("norm.weight"):
        values = 1 + 0.1 * values
    else:
        values *= 0.2
    return values.astype(np.float32)


def vocabulary(size: int) -> dict[str, Any]:
    """Metadata of a byte-level vocabulary with a few merges and ``<s>``, ``</s>``, ``<pad>``."""
    letters = {
        byte: chr(byte if 33 <= byte < 127 or byte > 173 else 256 + byte) for byte in range(256)
    }
    tokens = [letters[byte] for byte in range(256)]
    tokens += ["<s>", "</s>", "<pad>", "th", "the", letters[32] + "the", "in"]
    merges = ["t h", "th e", f"{letters[32]} the", "i n"]
    kinds = [3 if 256 <= number < 259 else 1 for number in range(len(tokens))]
    tokens += [f"<{number}>" for number in range(len(tokens), size)]
    kinds += [5] * (size - len(kinds))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": 257,
        "tokenizer.ggml.padding_token_id": 258,
        "tokenizer.ggml.add_bos_token": False,
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, str: writer.add_string, float: writer.add_float32}
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, int) and not isinstance(value, bool):
        writer.add_uint32(key, value)
    else:
        kinds[type(value)](key, value)


def llama_cpp_says(path: Path, tokens: int) -> tuple[NDArray[np.float32], list[int]]:
    """Return llama.cpp's logits after every token of ``PROMPT``, and its greedy continuation."""
    from llama_cpp import Llama

    model = Llama(
        str(path), n_ctx=128, verbose=False, logits_all=True, n_threads=1, type_k=0, type_v=0
    )
    model.eval(PROMPT)
    logits = np.array(model.scores[: len(PROMPT)], np.float32)
    model.reset()
    text = []
    for token in model.generate(PROMPT, temp=0.0, top_k=1, repeat_penalty=1.0):
        text.append(int(token))
        if len(text) == tokens:
            break
    return logits, text
