"""Makes token ids of a prompt: a text, or the messages of a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hybrid.errors import UsageError
from hybrid.session.chat_template import templated

_LONG = 1_000_000
"""Letters of a text that are worth a look before it is cut into tokens, which takes seconds."""


def text_ids(tokenizer: Any, text: str, context: int | None) -> list[int]:
    """Return the ids of a text, special tokens added as the model wants them.

    A text that has the token for its beginning already gets no second one.

    Raises
    ------
    UsageError
        When it is no text, or too long for the ``context`` whatever its tokens are.
    """
    _check(tokenizer, text, context)
    ids = _ids(tokenizer, text)
    begin = tokenizer.bos_token
    if begin and text.startswith(begin) and ids[:2] == [tokenizer.bos_token_id] * 2:
        ids = ids[1:]
    return ids


def chat_ids(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    context: int | None,
) -> list[int]:
    """Return the ids that ask for the answer to ``messages``.

    Raises
    ------
    UsageError
        When the chat template refuses them, or as :func:`text_ids`.
    """
    text = templated(tokenizer, messages, variables)
    _check(tokenizer, text, context)
    return _ids(tokenizer, text, add_special_tokens=False)


def check_known(ids: Tensor, rows: int, tokenizer: Any) -> None:
    """Refuse ids that an embedding of so many ``rows`` does not have.

    Raises
    ------
    UsageError
        Naming the first, by its text where the tokenizer has one.
    """
    odd = ids[(ids < 0) | (ids >= rows)].flatten()
    if not len(odd):
        return
    number = int(odd[0])
    word = None
    if tokenizer is not None and 0 <= number < len(tokenizer):
        word = tokenizer.convert_ids_to_tokens(number)
    named = f"token {word!r} has id {number}" if word else f"there is a token id {number}"
    raise UsageError(
        f"in the prompt {named}, the model's embedding has {rows} rows: ids 0 to {rows - 1}",
        hint="leave it out, or take the tokenizer and weights of one model",
    )


def _ids(tokenizer: Any, text: str, **options: Any) -> list[int]:
    """Return a text's ids; how long it may be is checked by whoever knows the model's context."""
    found: list[int] = tokenizer(text, verbose=False, **options)["input_ids"]
    return found


def _check(tokenizer: Any, text: str, context: int | None) -> None:
    """Refuse what no tokenizer takes: bytes that are no text, and what is too long in any case.

    How long it is in tokens is known when it is cut into them, which takes minutes for some.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the text is not UTF-8 at letter {error.start}: {text[error.start]!r}",
            hint="save it as UTF-8, or set the terminal to UTF-8",
        ) from error
    if context is None or len(text) < _LONG:
        return
    least = len(text) // max(map(len, tokenizer.get_vocab()), default=1)
    if least >= context:
        raise UsageError(
            f"the prompt has {len(text)} letters, {least} tokens or more, and the model's "
            f"context is {context}",
            hint="shorten the prompt",
        )
