"""Loads a model's tokenizer, and tells what is wrong with it before anything else is done."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hybrid.errors import CheckpointError, first_line
from hybrid.gguf.tokenizer import tokenizer_files
from hybrid.weights.checks import Checkpoint, check_settings, check_tokenizer_files
from hybrid.weights.gguf_checkpoint import GgufCheckpoint

_PUT_THERE = "put the model's tokenizer files there (tokenizer.json, tokenizer_config.json)"
#: A token of a template's own, as most are written.
_TEMPLATE_TOKEN = re.compile("<[|\uff5c][^<>|\uff5c\\s]{1,60}[|\uff5c]>")


def load_tokenizer(directory: Path) -> Any:
    """Load a directory's tokenizer.

    Raises
    ------
    CheckpointError
        When there is none, it is damaged, or this version of transformers cannot load it.
    """
    checkpoint = Checkpoint(directory)
    for check in (check_settings, check_tokenizer_files):
        list(check(checkpoint))
    if not checkpoint.has_tokenizer:
        raise CheckpointError(f"{directory} has no tokenizer", hint=_PUT_THERE)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        tokenizer("a")  # some settings are used only now
        vocabulary = len(tokenizer) - len(tokenizer.added_tokens_decoder)
    except Exception as error:  # whatever files of any kind make of transformers' code
        raise CheckpointError(
            f"{directory} has no tokenizer that transformers can load: {first_line(error)}",
            hint=_PUT_THERE,
        ) from error
    # Without files transformers makes a tokenizer that knows its special tokens only.
    if vocabulary < 2:
        raise CheckpointError(f"{directory} has no tokenizer", hint=_PUT_THERE)
    return tokenizer


def made_tokenizer(checkpoint: GgufCheckpoint) -> Any:
    """Make the tokenizer that a GGUF file's metadata describe.

    Raises
    ------
    CheckpointError, UnsupportedModelError
        When they make none.
    """
    files = tokenizer_files(checkpoint.header)
    try:
        parsed = Tokenizer.from_str(json.dumps(files["tokenizer.json"]))
    except Exception as error:  # whatever metadata of any kind make of its code
        raise CheckpointError(
            f"{checkpoint.path} has no tokenizer that can be made: {first_line(error)}",
            hint="download the file again, or one that another publisher made",
        ) from error
    settings = files["tokenizer_config.json"]
    special = {name: settings[name] for name in settings if name.endswith("_token")}
    template = files.get("chat_template.jinja")
    kind: Any = PreTrainedTokenizerFast
    return kind(tokenizer_object=parsed, chat_template=template, **special)


def check_tokenizer(checkpoint: Checkpoint, rows: int | None) -> Iterator[str]:
    """Load a tokenizer, compare it with the model, and yield what is odd about it.

    Parameters
    ----------
    rows
        Of the model's embedding: its tokens' ids are less. None is unknown.

    Raises
    ------
    CheckpointError
        As :func:`load_tokenizer`, and when its vocabulary is larger than the embedding.
    """
    directory = checkpoint.path
    if not checkpoint.has_tokenizer:
        yield "there is no tokenizer: texts need one beside the weights, token ids do not"
        return
    tokenizer = (
        made_tokenizer(checkpoint)
        if isinstance(checkpoint, GgufCheckpoint)
        else load_tokenizer(directory)
    )
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    if rows is not None:
        if tokenizer.vocab_size > rows:
            raise CheckpointError(
                f"the tokenizer in {directory} has {tokenizer.vocab_size} tokens, the model's "
                f"embedding {rows}: it is of another model",
                hint="put the tokenizer of this model there",
            )
        beyond = sorted(token for token, number in added.items() if number >= rows)
        if beyond:
            yield (
                f"the tokenizer gives {', '.join(beyond[:5])} ids beyond the model's {rows} "
                "tokens: texts with them cannot be read"
            )
    split = {token: _ids(tokenizer, token) for token in _template_tokens(tokenizer, added)}
    for token, ids in split.items():
        if len(ids) != 1:
            yield (
                f"the chat template writes {token}, which the tokenizer takes for {len(ids)} "
                "tokens instead of one: answers to chats may be poor"
            )


def _ids(tokenizer: Any, token: str) -> list[int]:
    ids: list[int] = tokenizer(token, add_special_tokens=False)["input_ids"]
    return ids


def _template_tokens(tokenizer: Any, added: dict[str, int]) -> list[str]:
    """Return the special tokens that a chat template writes."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = "\n".join(map(str, template.values()))
    if not isinstance(template, str):
        return []
    known = [token for token in added if token and token in template]
    return sorted({*known, *_TEMPLATE_TOKEN.findall(template)})
