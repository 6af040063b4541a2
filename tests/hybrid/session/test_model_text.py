"""Streaming text against decoding everything at once, byte by byte and with stop strings."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from hybrid.textstream import TextStream
from tiny_model import byte_tokenizer


@cache
def byte_level() -> Any:
    return byte_tokenizer()


@cache
def byte_ids() -> list[int]:
    """The id of each byte: byte-level tokenizers write the unprintable ones from U+0100 on."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = iter(range(256, 512))
    chars = [chr(byte if byte in visible else next(hidden)) for byte in range(256)]
    return list(byte_level().convert_tokens_to_ids(chars))


@cache
def byte_fallback() -> Any:
    """As in Llama 2 and Mixtral: words with a leading space mark, bytes for all the rest."""
    words = ["<s>", "▁a", "▁def", "b", "x"] + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def stream(
    tokenizer: Any, prompt: list[int], new: list[int], stops: tuple[str, ...] = ()
) -> list[str]:
    """The pieces of ``new``, one token a call, and what comes at the end."""
    text = TextStream(tokenizer, prompt, stops)
    pieces = [text.put([token]) for token in new]
    return [*pieces, text.finish()]


@given(prompt=st.text(max_size=4), text=st.text(max_size=12))
@example(prompt="é", text="€😀ü")
def test_characters_arrive_whole_and_at_once(prompt: str, text: str) -> None:
    """Every character comes with its last byte, never earlier in part, never later."""
    ids = byte_ids()
    pieces = stream(
        byte_level(), [ids[b] for b in prompt.encode()], [ids[b] for b in text.encode()]
    )
    expected = [piece for char in text for piece in [""] * (len(char.encode()) - 1) + [char]]
    if "\ufffd" not in text:
        assert pieces == [*expected, ""]
    assert "".join(pieces) == text


@given(data=st.binary(max_size=16))
@example(data=b"\xe2\x82")
@example(data=b"\xff\xff\xff\xff\xe2\x82\xacx")
def test_bytes_that_are_no_text_become_what_decoding_all_of_them_gives(data: bytes) -> None:
    """Invalid and unfinished characters end up as Python's ``errors="replace"`` writes them."""
    assert "".join(stream(byte_level(), [], [byte_ids()[byte] for byte in data])) == data.decode(
        errors="replace"
    )


@given(
    prompt=st.lists(st.sampled_from(["▁a", "▁def", "b", "€"]), max_size=3),
    new=st.lists(st.sampled_from(["▁a", "▁def", "b", "x", "€", "😀", "€€", "<s>"]), max_size=8),
)
@example(prompt=[], new=["▁a", "<s>", "▁a"])
@example(prompt=["€"], new=["€€", "▁a"])
def test_spaces_and_fallback_bytes_come_out_as_in_the_whole_text(
    prompt: list[str], new: list[str]
) -> None:
    """A tokenizer that strips the first space, and spells characters in bytes, streams alike."""
    tokenizer = byte_fallback()

    def ids(words: list[str]) -> list[int]:
        tokens = [
            token
            for word in words
            for token in (
                [word]
                if word.isascii() or word[0] == "▁"
                else map("<0x{:02X}>".format, word.encode())
            )
        ]
        return list(tokenizer.convert_tokens_to_ids(tokens))

    before = tokenizer.decode(ids(prompt), skip_special_tokens=True)
    whole = tokenizer.decode(ids(prompt) + ids(new), skip_special_tokens=True)
    assert before + "".join(stream(tokenizer, ids(prompt), ids(new))) == whole


def cut_at_first_complete(text: str, stops: tuple[str, ...]) -> str:
    """Naive twin: read on letter by letter; cut where the first stop string to be seen begins."""
    for end in range(len(text) + 1):
        found = [at for stop in stops if (at := text[:end].find(stop)) >= 0]
        if found:
            return text[: min(found)]
    return text


@given(
    text=st.text(alphabet="ab\n", max_size=20),
    stops=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3).map(tuple),
)
@example(text="aab", stops=("ab",))
def test_stop_strings_cut_the_text(text: str, stops: tuple[str, ...]) -> None:
    """The pieces make the text before the first stop string; none of it was told too early."""
    ids = byte_ids()
    pieces = stream(byte_level(), [], [ids[b] for b in text.encode()], stops)
    assert "".join(pieces) == cut_at_first_complete(text, stops)


def test_only_what_may_become_a_stop_string_waits() -> None:
    """Letters that cannot start the stop string any more come with the next token."""
    ids = byte_ids()
    pieces = stream(byte_level(), [], [ids[b] for b in b"aabac"], ("abb",))
    assert pieces == ["", "a", "", "ab", "ac", ""]


def test_endless_nonsense_is_told_in_time() -> None:
    """A model that writes no text at all does not make the stream wait for its end."""
    ids = [byte_ids()[0xFF]] * 200
    pieces = stream(byte_level(), [], ids)
    assert "".join(pieces) == "\ufffd" * 200
    assert max(map(len, pieces)) <= 32


class Counting:
    """A tokenizer that counts the ids it decodes."""

    decoded = 0

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        self.decoded += len(token_ids)
        return str(byte_level().decode(token_ids, skip_special_tokens=skip_special_tokens))


@pytest.mark.parametrize("byte", [0x61, 0xFF])
def test_the_work_does_not_grow_with_the_text(byte: int) -> None:
    """Twice the ids are twice the work, for text and for bytes that are none."""
    work = []
    for count in (500, 1000):
        tokenizer = Counting()
        stream(tokenizer, [], [byte_ids()[byte]] * count)
        work.append(tokenizer.decoded)
    assert work[1] < 2.2 * work[0]
