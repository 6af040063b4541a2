"""How a served model marks its thoughts, and with what text its template ends them."""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import Tensor

from hybrid.serve.call_formats import CHANNEL, MESSAGE
from hybrid.serve.guides import Thoughts
from hybrid.serve.served import Served
from hybrid.session.answer_stream import TAGS

_PROMPT_END = 16
_CHANNEL_TAGS = (f"{CHANNEL}analysis{MESSAGE}", "<|end|>")


class Marks(NamedTuple):
    """The tags around thoughts, and the text that ends them in the template's own history."""

    begin: str
    end: str
    closing: str


def marks_of(served: Served) -> Marks | None:
    """Return how thoughts are marked; None where the template and the tokenizer know nothing."""
    template = served.template
    if CHANNEL in template:
        return Marks(*_CHANNEL_TAGS, _CHANNEL_TAGS[1])
    added = served.model.tokenizer.get_added_vocab()
    for begin, end in TAGS:
        if end in template or end in added:
            written = re.search(rf"((?:\\n)+){re.escape(end)}((?:\\n)*)", template)
            before, after = written.groups() if written else ("\\n", "\\n\\n")
            closing = f"{before}{end}{after}".replace("\\n", "\n")
            return Marks(begin, end, closing)
    return None


def thoughts_of(served: Served, marks: Marks, ids: Tensor) -> Thoughts:
    """Return what follows the thoughts after a prompt ``[1, T]``, which may have begun one."""
    words = served.model.tokenizer
    end = words.decode(ids[0, -_PROMPT_END:].tolist(), skip_special_tokens=False)
    begun = end.rstrip().endswith(marks.begin)
    return Thoughts(served.ids_of(marks.begin), served.ids_of(marks.end), open=begun)
