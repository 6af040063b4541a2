"""What can be known of a checkpoint's files before work starts: one list of cheap checks.

Nothing is read but JSON and the headers of weight files. ``hybrid convert`` and the first
``hybrid run`` of a checkpoint refuse by this list before they write a byte, ``hybrid plan``
tells beside its plan what it found, and ``hybrid convert --check`` runs it alone. What needs
the model itself (its tokenizer, the tensors that it takes) comes after it, in
:func:`hybrid.weights.checkpoint.check`.

Loads neither torch nor transformers.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from hybrid.ask.formats import QUANT_METHOD
from hybrid.ask.names import directory_name
from hybrid.errors import CheckpointError, UnsupportedModelError
from hybrid.formats.errors import HybridError
from hybrid.weights.declared_formats import check_format
from hybrid.weights.sizes import check_layers_alike, check_stated_sizes
from hybrid.weights.source_files import (
    INDEX_NAME,
    TensorInfo,
    check_index,
    few,
    identity,
    read_header,
    read_object,
    weight_files,
)

TOKENIZER_SETTINGS = "tokenizer_config.json"
#: What holds a vocabulary; any of them will do.
VOCABULARIES = (
    *("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model"),
    *("tekken.json", "spiece.model", "sentencepiece.bpe.model", "spm.model"),
)
#: Files of settings that transformers reads where they are; a damaged one it may pass over.
SETTINGS = (
    *(TOKENIZER_SETTINGS, "tokenizer.json", "special_tokens_map.json", "added_tokens.json"),
    *("generation_config.json", "chat_template.json"),
)
#: Files of models that embed texts, and what they are.
_BESIDE_TEXT = {
    "config_sentence_transformers.json": "an embedding model",
    "sentence_bert_config.json": "an embedding model",
}
#: How classes are called that are a model without its head, or with another one.
_OTHER_HEADS = re.compile(
    r"(?<!LMHead)Model$|Encoder$|MaskedLM$|Classification$|QuestionAnswering$|Embeddings?$"
)
#: Settings that other versions of transformers write as lists, where ours takes tables.
_TABLES = ("added_tokens_decoder", "model_specific_special_tokens")


class Checkpoint:
    """A checkpoint directory, of which each part is read when it is first asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def config(self) -> dict[str, Any]:
        """Its ``config.json``."""
        return read_object(self.path / "config.json")

    @cached_property
    def files(self) -> list[Path]:
        """Its weight files."""
        return weight_files(self.path)

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor in its weight files, by key."""
        found: dict[str, TensorInfo] = {}
        for file in self.files:
            for key, info in read_header(file).items():
                if key in found:
                    raise CheckpointError(
                        f"{key} is in both {found[key].path.name} and {file.name}",
                        hint=f"keep one set of weights in {self.path}",
                    )
                found[key] = info
        return found

    @property
    def name(self) -> str:
        """What it is called."""
        return directory_name(self.path)

    @property
    def checks(self) -> tuple[Check, ...]:
        """What can be known of it before work starts."""
        return CHECKS

    def identity(self) -> str:
        """Return a digest that tells its weights from others."""
        return identity(self.path / "config.json", self.files)

    def place(self, info: TensorInfo) -> Path:
        """Return the file that a tensor can be read from now."""
        return info.path

    @property
    def has_weights(self) -> bool:
        """Whether there is any file of weights, whole or not."""
        return any(self.path.glob("*.safetensors*"))

    @property
    def has_tokenizer(self) -> bool:
        """Whether there is any file of a tokenizer, loadable or not."""
        return any((self.path / name).is_file() for name in (TOKENIZER_SETTINGS, *VOCABULARIES))


def check_directory(checkpoint: Checkpoint) -> Iterator[str]:
    """The directory is there, and is not converted already."""
    path = checkpoint.path
    if not path.is_dir():
        raise CheckpointError(
            f"there is no model directory {str(path)!r}",
            hint="give a directory with a config.json, or ORG/NAME of the hub",
        )
    if is_converted(checkpoint.config):
        raise CheckpointError(
            f"{path} is converted already: its experts are in "
            f"{checkpoint.config['quantization_config'].get('experts')}",
            hint="name the original checkpoint instead",
        )
    yield from ()


def check_name(checkpoint: Checkpoint) -> Iterator[str]:
    """Its path can be handed to libraries that take UTF-8 only, as those of tokenizers do."""
    path = str(checkpoint.path.absolute())
    try:
        path.encode()
    except UnicodeEncodeError as error:
        coding = sys.getfilesystemencoding()
        ours = coding.lower().replace("-", "") == "utf8"
        raise CheckpointError(
            f"the name {path!r} is not valid {coding}: what is in it cannot be opened",
            hint="rename that folder"
            if ours
            else "set PYTHONUTF8=1 or a UTF-8 locale, or rename that folder",
        ) from error
    yield from ()


def check_writes_text(checkpoint: Checkpoint) -> Iterator[str]:
    """It is a model that writes text: no embedding model, no encoder, no tower alone."""
    path, names = checkpoint.path, checkpoint.config.get("architectures")
    named = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    what = next((told for name, told in _BESIDE_TEXT.items() if (path / name).is_file()), "")
    if not what and named and all(_OTHER_HEADS.search(name) for name in named):
        what = "without a head that writes text"
    if not what and checkpoint.config.get("is_encoder_decoder") is True:
        what = "an encoder with a decoder"
    if what:
        kind = checkpoint.config.get("model_type")
        raise UnsupportedModelError(
            f"{path} is {what} ({', '.join(named) or kind})",
            hint="models that write text run here; run this one with transformers or what made it",
        )
    yield from ()


def check_declared_format(checkpoint: Checkpoint) -> Iterator[str]:
    """The format that its weights are declared in can be read."""
    check_format(checkpoint.path, checkpoint.config)
    yield from ()


def check_weight_files(checkpoint: Checkpoint) -> Iterator[str]:
    """Every weight file is there, whole, and of the checkpoint that the index is of."""
    names = {file.name for file in checkpoint.files}
    others = {path.name for path in checkpoint.path.glob("*.safetensors")} - names
    if others:
        yield f"not used: {few(sorted(others))}, beside {few(sorted(names))}"
    tensors = checkpoint.tensors  # reads the headers
    if (checkpoint.path / INDEX_NAME).exists() and len(names) > 1:
        check_index(checkpoint.path, tensors)


def check_format_of_tensors(checkpoint: Checkpoint) -> Iterator[str]:
    """Its tensors are not of a format that is declared nowhere."""
    check_format(checkpoint.path, checkpoint.config, checkpoint.tensors)
    yield from ()


def check_sizes(checkpoint: Checkpoint) -> Iterator[str]:
    """The model that config.json describes is no larger than its files are."""
    check_stated_sizes(checkpoint.path / "config.json", checkpoint.config, checkpoint.tensors)
    check_layers_alike(checkpoint.path, checkpoint.config)
    yield from ()


def check_settings(checkpoint: Checkpoint) -> Iterator[str]:
    """Files of settings are tables, and none is cut short."""
    for name in SETTINGS:
        if os.path.lexists(checkpoint.path / name):  # a link that leads nowhere is passed over
            read_object(checkpoint.path / name)
    yield from ()


def check_tokenizer_files(checkpoint: Checkpoint) -> Iterator[str]:
    """The tokenizer needs no code of its own, and its settings are of the shape that they have."""
    file = checkpoint.path / TOKENIZER_SETTINGS
    settings = read_object(file) if file.is_file() else {}
    for name in _TABLES:
        if not isinstance(settings.get(name), dict | None):
            raise CheckpointError(
                f"{file}: {name} is a {type(settings[name]).__name__}, transformers takes a table",
                hint=f"another version wrote it: leave {name} out, or write it as a table",
            )
    code = _own_code(settings)
    if code and not (checkpoint.path / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{checkpoint.path} has no tokenizer that can be loaded: it is code of the model's "
            f"own ({code}), which is not run",
            hint="put a tokenizer.json there, of a copy of the model that has one",
        )
    yield from ()


def _own_code(settings: dict[str, Any]) -> str:
    """Return what a tokenizer's settings call its code; empty for transformers' own."""
    named = settings.get("auto_map")
    named = named.get("AutoTokenizer") if isinstance(named, dict) else named
    parts = named if isinstance(named, list) else [named]
    return next((part for part in parts if isinstance(part, str)), "")


Check = Callable[[Checkpoint], Iterator[str]]

#: In this order: what is wrong first would make all after it fail for a reason less plain.
CHECKS: tuple[Check, ...] = (
    check_directory,
    check_name,
    check_writes_text,
    check_declared_format,
    check_weight_files,
    check_format_of_tensors,
    check_sizes,
    check_settings,
    check_tokenizer_files,
)


#: What a converted directory has to pass as well.
CONVERTED_CHECKS: tuple[Check, ...] = (
    check_name,
    check_weight_files,
    check_sizes,
    check_settings,
)


def check_files(checkpoint: Checkpoint) -> list[str]:
    """Run all checks; return what is odd about the files and hinders nothing.

    Raises
    ------
    CheckpointError, UnsupportedModelError
        The first thing that hinders a conversion.
    """
    return [note for check in checkpoint.checks for note in check(checkpoint)]


def findings(
    checkpoint: Checkpoint, checks: Iterable[Check]
) -> tuple[list[HybridError], list[str]]:
    """Run some checks; return what they refuse, each once, and what they find odd."""
    errors: dict[str, HybridError] = {}
    notes: list[str] = []
    for check in checks:
        try:
            notes += check(checkpoint)
        except HybridError as error:  # the same may hinder several checks
            errors.setdefault(str(error), error)
    return list(errors.values()), notes


def check_converted(checkpoint: Checkpoint) -> None:
    """Refuse a converted directory whose files are damaged or not all there.

    What its store holds is checked where that is opened.

    Raises
    ------
    CheckpointError
        Naming the file.
    """
    for check in CONVERTED_CHECKS:
        list(check(checkpoint))


def check_before_loading(directory: Path) -> None:
    """Refuse what can be known to end badly of a directory's files, converted or not.

    Raises
    ------
    CheckpointError, UnsupportedModelError
        The first thing that hinders a run.
    """
    checkpoint = Checkpoint(directory)
    if is_converted(checkpoint.config):
        check_converted(checkpoint)
    else:
        check_files(checkpoint)


def is_converted(config: dict[str, Any]) -> bool:
    """Whether a directory with this ``config.json`` has an expert store."""
    settings = config.get("quantization_config")
    return isinstance(settings, dict) and settings.get("quant_method") == QUANT_METHOD
