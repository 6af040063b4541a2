"""A checkpoint whose config transformers can read, and the model that it is of."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from hybrid.errors import CheckpointError, UnsupportedModelError, first_line
from hybrid.formats.errors import HybridError
from hybrid.transformers_api import auto_class
from hybrid.weights.checks import Checkpoint
from hybrid.weights.gguf_checkpoint import GgufCheckpoint, checkpoint_at
from hybrid.weights.source_config import read_config

#: Families that transformers has as decoders, too, which their checkpoints seldom are.
_ENCODERS = (
    "bert",
    "roberta",
    "xlm-roberta",
    "camembert",
    "electra",
    "ernie",
    "rembert",
    "big_bird",
)


@dataclass(frozen=True)
class Source:
    """A checkpoint whose config could be read."""

    checkpoint: Checkpoint
    raw_config: dict[str, Any]
    config: Any
    files: list[Path]

    @classmethod
    def open(cls, path: Path) -> Source:
        """Read a checkpoint's config and list its weights.

        Raises
        ------
        CheckpointError
            When it is missing, empty, unreadable, of an unknown kind, or converted already.
        """
        return cls.of(checkpoint_at(path))

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Source:
        """Read the config of a checkpoint of which some was read before, as :meth:`open` does."""
        list(checkpoint.checks[0](checkpoint))
        path, raw, files = checkpoint.path, checkpoint.config, checkpoint.files
        made = isinstance(checkpoint, GgufCheckpoint)
        try:
            config = transformers.AutoConfig.for_model(**raw) if made else read_config(path, raw)
        except HybridError:
            raise
        except Exception as error:  # whatever settings of any kind make of transformers' code
            raise CheckpointError(
                f"transformers {transformers.__version__} cannot use "
                f"{f'the metadata of {path}' if made else path / 'config.json'}: "
                f"{first_line(error)}",
                hint="a newer transformers may know this model",
            ) from error
        return cls(checkpoint, raw, config, files)

    @property
    def path(self) -> Path:
        return self.checkpoint.path

    @property
    def name(self) -> str:
        return self.checkpoint.name

    def identity(self) -> str:
        return self.checkpoint.identity()

    def empty_model(self) -> Any:
        """Build the model without memory for its weights."""
        kind = auto_class(self.config)
        if kind is None or (self.config.model_type in _ENCODERS and not self.config.is_decoder):
            names = getattr(self.config, "architectures", None) or [self.config.model_type]
            raise UnsupportedModelError(
                f"transformers {transformers.__version__} has no class that writes text for "
                f"{', '.join(map(str, names))}",
                hint="models with code of their own cannot be converted",
            )
        try:
            with torch.device("meta"):
                # Made from a copy: what it is made of is changed on the way.
                return kind.from_config(copy.deepcopy(self.config))
        except Exception as error:  # whatever settings of any kind make of transformers' code
            raise CheckpointError(
                f"transformers {transformers.__version__} cannot make a model of what {self.path} "
                f"says it is: {first_line(error)}",
                hint="compare with the publisher's own, complete config.json",
            ) from error
