"""The model that is served: what it is called, how long its texts may be, its prompts' ids."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from hybrid.errors import UsageError
from hybrid.serve.constraints import Constraints
from hybrid.serve.refusals import Refusal, of_error, shown, too_long
from hybrid.session.generation_options import DEFAULT_NEW_TOKENS, end_tokens
from hybrid.session.model import HybridModel, Message
from hybrid.session.prompt_ids import check_known

_SAMPLING = (
    *("do_sample", "temperature", "top_p", "top_k", "min_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)


class Served:
    """A model, as its clients see it.

    Parameters
    ----------
    model
        The model.
    name
        What requests call it.
    context
        Tokens that a request may have with its answer, if fewer than the model takes.

    Attributes
    ----------
    context
        The most tokens of a request with its answer; None where nobody says.
    constraints
        Holds answers to a form.
    """

    def __init__(self, model: HybridModel, name: str, context: int | None = None) -> None:
        self.model, self.name = model, name
        known = [tokens for tokens in (context, model.context) if tokens is not None]
        self.context = min(known, default=None)
        self.created = int(time.time())
        self._turn = threading.Lock()  # tokenizers take one text at a time
        ends = end_tokens(model.model, model.tokenizer)
        self.constraints = Constraints(model.tokenizer, model.loaded.vocabulary, ends)
        with suppress(UsageError):  # settings of its file, which the first text changes
            self.encode("a")

    @property
    def template(self) -> str:
        """The chat template's text; empty without."""
        return str(self.model.tokenizer.chat_template or "")

    @property
    def sampling(self) -> dict[str, Any]:
        """How tokens are chosen where a request does not say: the model's own settings."""
        config = self.model.model.generation_config
        found = {name: getattr(config, name, None) for name in _SAMPLING}
        return {name: value for name, value in found.items() if value is not None}

    def check_name(self, name: str | None) -> None:
        """Refuse a request for another model; one that names none is for this one."""
        if name is not None and name != self.name:
            raise Refusal(
                f"model: there is no model {name!r:.100} here, this server has {self.name!r}",
                status=404,
                param="model",
                code="model_not_found",
            )

    def encode(self, text: str) -> Tensor:
        """Return the ids ``[1, T]`` of a text."""
        with self._turn:
            return self.model.encode(text)

    def encode_chat(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> Tensor:
        """Return the ids ``[1, T]`` that ask for the answer to messages."""
        with self._turn:
            return self.model.encode_chat(messages, **variables)

    def prompt_ids(self, numbers: list[int], field: str = "prompt") -> Tensor:
        """Return ids that a request gave as numbers in a field as ``[1, T]``.

        Raises
        ------
        Refusal
            When the model does not have one of them.
        """
        rows = self.model.loaded.vocabulary
        odd = next((number for number in numbers if not 0 <= number < rows), None)
        if odd is not None:
            raise Refusal(
                f"{field}: there is no token {shown(odd)}, the model has tokens 0 to {rows - 1}",
                param=field,
                code="invalid_value",
            )
        return torch.tensor([numbers], dtype=torch.long)

    def room(self, ids: Tensor, most: int | None, usual: int | None, field: str) -> int:
        """Return how many new tokens a prompt ``[1, T]`` may have.

        That is ``most``, where that is asked for, or what is ``usual``, or all that fit.

        Raises
        ------
        Refusal
            When the prompt is empty, has an unknown token, or leaves no room for an answer.
        """
        tokens = ids.shape[1]
        if not tokens:
            raise Refusal(f"{field}: the prompt has 0 tokens", param=field, code="invalid_value")
        try:
            check_known(ids, self.model.loaded.vocabulary, self.model.tokenizer)
        except UsageError as error:
            raise of_error(error, field) from error
        if self.context is None:
            return most or usual or DEFAULT_NEW_TOKENS
        if tokens >= self.context:
            raise too_long(tokens, self.context, field)
        return min(most or usual or self.context, self.context - tokens)

    def ids_of(self, text: str) -> list[int]:
        """Return the ids of a text without the tokens that begin or end one."""
        with self._turn:
            found: list[int] = self.model.tokenizer.encode(text, add_special_tokens=False)
        return found

    def decode(self, ids: list[int]) -> str:
        """Return the text of ids, special tokens as well."""
        with self._turn:
            text: str = self.model.tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def text_of(self, token: int) -> str:
        """Return a token's text, also a special one's."""
        text: str = self.model.tokenizer.decode([token], skip_special_tokens=False)
        return text

    def reserved(self) -> set[str]:
        """Return names that a request's variables of the chat template may not have."""
        taken = inspect.signature(self.model.tokenizer.apply_chat_template).parameters
        return {"self", "messages", *taken}

    def card(self) -> dict[str, Any]:
        """Return what clients are told of the model."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "hybrid",
            "context_length": self.context,
            "sampling": self.sampling,
        }
