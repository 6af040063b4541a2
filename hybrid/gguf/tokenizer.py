"""Makes the files of a Hugging Face tokenizer of what a GGUF file's metadata say.

Two kinds of vocabularies are read: byte-level BPE with merges (``gpt2``), whose texts are first
split by an expression that goes by the name ``tokenizer.ggml.pre``, and SentencePiece's BPE by
scores (``llama``). The expressions are those of the publishers' own tokenizers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hybrid.errors import CheckpointError, UnsupportedModelError
from hybrid.gguf.header import GgufHeader

#: Kinds of tokens by their number in files.
_UNKNOWN, _CONTROL, _OWN, _BYTE = 2, 3, 4, 6
_SPACE = "\u2581"

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS|" + _REST
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = f"{_CONTRACTIONS}|{_WORDS.replace('DIGITS', '')}"
_LLAMA3 = f"{_CONTRACTIONS}|{_WORDS.replace('DIGITS', '{1,3}')}"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+SHORT"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*SHORT"
    r"|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT4O = _CASED.replace("SHORT", f"{_CONTRACTIONS}?").replace("DIGITS", "{1,3}")
_TEKKEN = _CASED.replace("SHORT", "").replace("DIGITS", "")
_DEEPSEEK = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
#: What texts are split by, one after the other, by ``tokenizer.ggml.pre``.
_SPLITS = {
    **dict.fromkeys(("gpt-2", "olmo", "mpt", "granite-docling"), (_GPT2,)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "mellum2"), (r"\p{N}", _GPT2)
    ),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan"), (_QWEN2,)),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "dbrx", "smaug-bpe", "glm4", "chatglm-bpe", "lfm2"),
        (_LLAMA3,),
    ),
    **dict.fromkeys(("gpt-4o", "llama4", "minimax-m2", "kanana2"), (_GPT4O,)),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), _DEEPSEEK),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), (_BAILING,)),
    "tekken": (_TEKKEN,),
}
#: Whose tokenizers take a word that is a token as it is, whatever the merges would make of it.
_WHOLE_WORDS = ("llama3", "llama-v3", "llama-bpe", "glm4", "chatglm-bpe", "tekken", "lfm2")
#: Whose texts begin with a token for that unless files say otherwise.
_BEGUN = ("llama3", "llama-v3", "llama-bpe", "tekken")

#: Tokens that end a turn or a text in some family, whatever metadata call the end.
_ENDS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>"),
    *(
        "</s>",
        "<|endoftext|>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
    ),
    *("<end_of_utterance>", "<eos>", "<turn|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "[e~["),
)
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def tokenizer_files(header: GgufHeader) -> dict[str, Any]:
    """Return the content of the files that a tokenizer is loaded from, by their names.

    ``tokenizer.json`` and ``tokenizer_config.json`` are tables, ``chat_template.jinja`` is text.

    Raises
    ------
    CheckpointError
        When something of the vocabulary is missing.
    UnsupportedModelError
        When it is of a kind that is not read.
    """
    found: dict[str, Any] = {
        "tokenizer.json": _tokenizer(header),
        "tokenizer_config.json": _settings(header),
    }
    template = header.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        found["chat_template.jinja"] = template
    return found


def generation_settings(header: GgufHeader) -> dict[str, Any]:
    """Return the ``generation_config.json`` of a file: the tokens that begin and end a text."""
    found: dict[str, Any] = {"eos_token_id": ends(header)}
    for name in ("bos_token_id", "padding_token_id"):
        number = _value(header, name)
        if number is not None:
            found[name.replace("padding", "pad")] = int(number)
    return found


def ends(header: GgufHeader) -> list[int]:
    """Return the tokens after which llama.cpp ends a text: those that are named, and the usual."""
    named = (_value(header, f"{name}_token_id") for name in ("eos", "eot", "eom"))
    found = [int(number) for number in named if number is not None]
    kinds = _value(header, "token_type") or []
    for number, (token, kind) in enumerate(zip(_tokens(header), kinds, strict=False)):
        if kind in (_CONTROL, _OWN) and token in _ENDS:
            found.append(number)
    return sorted(set(found))


def _value(header: GgufHeader, name: str) -> Any:
    return header.metadata.get(f"tokenizer.ggml.{name}")


def _tokens(header: GgufHeader) -> list[str]:
    tokens = _value(header, "tokens")
    if not isinstance(tokens, list) or not tokens:
        raise CheckpointError(
            f"{header.path} has no vocabulary",
            hint="download another file of the model, with its tokenizer",
        )
    return tokens


def _tokenizer(header: GgufHeader) -> dict[str, Any]:
    kind = _value(header, "model")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModelError(
            f"{header.path} has a tokenizer of the kind {kind!r}",
            hint="read are: gpt2 (BPE with merges) and llama (SentencePiece)",
        )
    parts = _bpe(header) if kind == "gpt2" else _sentencepiece(header)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": list(_added(header)),
        **parts,
        "post_processor": _around(header, parts["decoder"]),
    }


def _added(header: GgufHeader) -> Iterator[dict[str, Any]]:
    """Yield the tokens that are looked for in a text before it is split."""
    kinds = _value(header, "token_type") or []
    for number, (token, kind) in enumerate(zip(_tokens(header), kinds, strict=False)):
        if kind in (_CONTROL, _OWN, _UNKNOWN):
            yield {
                "id": number,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": kind != _OWN,
            }


def _bpe(header: GgufHeader) -> dict[str, Any]:
    name = str(_value(header, "pre") or "default")
    if name not in _SPLITS:
        raise UnsupportedModelError(
            f"{header.path} splits texts into words in a way called {name!r}, which is not read",
            hint=f"read are: {', '.join(sorted(_SPLITS))}; use the publisher's safetensors files",
        )
    splits = [
        {"type": "Split", "pattern": {"Regex": one}, "behavior": "Isolated", "invert": False}
        for one in _SPLITS[name]
    ]
    bytes_: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    return {
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*splits, {**bytes_, "use_regex": False}],
        },
        "decoder": {**bytes_, "use_regex": False},
        "model": _model(
            header,
            [merge.split(" ") for merge in _value(header, "merges") or []],
            ignore_merges=name in _WHOLE_WORDS,
        ),
    }


def _sentencepiece(header: GgufHeader) -> dict[str, Any]:
    prefixed = bool(_first(_value(header, "add_space_prefix"), True))
    space = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    first = [{"type": "Prepend", "prepend": _SPACE}] if prefixed else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else []
    unknown = _value(header, "unknown_token_id")
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*first, space]},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": _model(
            header,
            _merges_by_score(header),
            byte_fallback=True,
            fuse_unk=True,
            unk_token=None if unknown is None else _tokens(header)[int(unknown)],
        ),
    }


def _model(header: GgufHeader, merges: list[list[str]], **more: Any) -> dict[str, Any]:
    vocabulary: dict[str, int] = {}
    for number, token in enumerate(_tokens(header)):
        vocabulary.setdefault(token, number)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
        **more,
    }


def _merges_by_score(header: GgufHeader) -> list[list[str]]:
    """Return the merges that make every token of two others, best score first.

    SentencePiece merges the neighbours that make the token of the best score.
    """
    tokens, scores = _tokens(header), _value(header, "scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise CheckpointError(
            f"{header.path} has {len(tokens)} tokens and "
            f"{len(scores) if isinstance(scores, list) else 'no'} scores",
            hint="download the file again",
        )
    kinds = _value(header, "token_type") or [1] * len(tokens)
    plain = {
        token: score
        for token, score, kind in zip(tokens, scores, kinds, strict=True)
        if kind not in (_UNKNOWN, _CONTROL, _BYTE)
    }
    found = [
        (-score, token[:cut], token[cut:])
        for token, score in plain.items()
        for cut in range(1, len(token))
        if token[:cut] in plain and token[cut:] in plain
    ]
    found.sort(key=lambda merge: merge[0])
    return [[left, right] for _, left, right in found]


def _around(header: GgufHeader, decoder: dict[str, Any]) -> dict[str, Any] | None:
    """Return what puts tokens around every text."""
    before = ["bos_token"] if _adds(header, "bos") else []
    after = ["eos_token"] if _adds(header, "eos") else []
    if not before and not after:
        return decoder if decoder["type"] == "ByteLevel" else None
    tokens = _tokens(header)
    numbers = {name: int(_value(header, _SPECIAL[name])) for name in (*before, *after)}
    marks = {
        name: {"SpecialToken": {"id": tokens[at], "type_id": 0}} for name, at in numbers.items()
    }
    text = {"Sequence": {"id": "A", "type_id": 0}}
    other = {"Sequence": {"id": "B", "type_id": 1}}
    around = [[marks[name] for name in names] for names in (before, after)]
    return {
        "type": "TemplateProcessing",
        "single": [*around[0], text, *around[1]],
        "pair": [*around[0], text, *around[1], *around[0], other, *around[1]],
        "special_tokens": {
            tokens[at]: {"id": tokens[at], "ids": [at], "tokens": [tokens[at]]}
            for at in numbers.values()
        },
    }


def _adds(header: GgufHeader, which: str) -> bool:
    """Whether a text begins with the token for that, or ends with its own."""
    told = _value(header, f"add_{which}_token")
    if told is None and which == "bos":
        told = _value(header, "model") == "llama" or _value(header, "pre") in _BEGUN
    return bool(told) and _value(header, f"{which}_token_id") is not None


def _settings(header: GgufHeader) -> dict[str, Any]:
    """Return ``tokenizer_config.json``."""
    tokens = _tokens(header)
    found: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": int(header.get("context_length", 1 << 30)),
        "clean_up_tokenization_spaces": False,
        "add_bos_token": _adds(header, "bos"),
        "add_eos_token": _adds(header, "eos"),
    }
    for name, key in _SPECIAL.items():
        number = _value(header, key)
        if number is not None and 0 <= int(number) < len(tokens):
            found[name] = tokens[int(number)]
    return found


def _first(value: Any, default: Any) -> Any:
    return default if value is None else value
