"""Compiles grammars for a model's tokens, within limits of size and work; needs llguidance."""

from __future__ import annotations

import json
import threading
from importlib.util import find_spec
from typing import Any

from hybrid.serve.guides import first_line
from hybrid.serve.refusals import Refusal, not_taken

MOST_SCHEMA_BYTES = 64 << 10
"""Bytes of a schema, as JSON; more are refused."""
_MOST_SYMBOLS = 50_000
_MOST_WORK = 500_000
_STEP_WORK = 200_000
"""Of llguidance's units: about 10 ms each."""
_MOST_STATES = 50_000


class Constraints:
    """The model's tokens as llguidance knows them, read when they are first needed.

    Parameters
    ----------
    tokenizer
        Of the model.
    vocabulary
        How many logits there are.
    ends
        Tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: list[int]) -> None:
        self._tokenizer, self._vocabulary, self._ends = tokenizer, vocabulary, ends
        self._known: Any = None
        self._turn = threading.Lock()

    @property
    def special(self) -> dict[str, int]:
        """Ids of the special tokens by their texts."""
        added = getattr(self._tokenizer, "added_tokens_decoder", {})
        return {each.content: token for token, each in added.items() if each.special}

    def matcher(self, grammar: str, field: str) -> Any:
        """Return what follows a grammar token by token.

        Raises
        ------
        Refusal
            When llguidance is missing, the grammar is damaged or takes more than the limits, or no
            text satisfies it.
        """
        if find_spec("llguidance") is None:
            why = "needs llguidance, which is not installed here: pip install 'hybrid-moe[serve]'"
            raise not_taken(field, why)
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(
            initial_lexer_fuel=_MOST_WORK,
            step_lexer_fuel=_STEP_WORK,
            max_lexer_states=_MOST_STATES,
            max_grammar_size=_MOST_SYMBOLS,
            verbose_errors=False,
        )
        matcher = LLMatcher(self._tokens(field), grammar, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            raise _refused(field, first_line(matcher))
        if matcher.is_stopped() and not matcher.is_accepting():
            raise _refused(field, "no text satisfies it")
        return matcher

    def _tokens(self, field: str) -> Any:
        from llguidance.hf import from_tokenizer

        with self._turn:
            if self._known is None:
                try:
                    self._known = from_tokenizer(
                        self._tokenizer, n_vocab=self._vocabulary, eos_token=self._ends or None
                    )
                except (ValueError, TypeError) as error:
                    why = f"the model's tokenizer cannot be held to a form ({error})"
                    raise not_taken(field, why) from error
            return self._known


def check_schema(schema: Any, field: str) -> None:
    """Refuse what is no schema, or a larger one than may be.

    Raises
    ------
    Refusal
        Naming the field.
    """
    if not isinstance(schema, dict):
        raise _refused(field, f"it is of type {type(schema).__name__}, not a JSON object")
    try:
        size = len(json.dumps(schema))
    except (ValueError, RecursionError) as error:
        raise _refused(field, "it is nested too deeply") from error
    if size > MOST_SCHEMA_BYTES:
        told = f"it has {size} bytes, the most is {MOST_SCHEMA_BYTES}: shorten it"
        raise _refused(field, told)


def _refused(field: str, why: str) -> Refusal:
    return Refusal(
        f"{field}: the schema cannot be kept to: {why}", param=field, code="invalid_schema"
    )
