"""Finds the small trained model that ships with the package; holds the scripts that made it.

The model is an ordinary Hugging Face directory: a Qwen3-MoE with 6 layers of 16 experts (4 per
token), trained on the sources of the Python standard library. It continues Python code and knows
nothing else.
"""

from pathlib import Path

__all__ = ["demo_path"]


def demo_path() -> Path:
    """Directory of the shipped model: config, tokenizer and bf16 safetensors."""
    return Path(__file__).parent / "model"
