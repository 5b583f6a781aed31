"""Text a piece at a time: the pieces are the text, whatever the bytes; and what stop strings cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from nanovllm.engine.detokenizer import IncrementalDetokenizer, StopWatcher
from tests.cpu.tiny import EOS, NUM_KNOWN_IDS, SPECIALS, VOCAB_SIZE, WORDS, make_tokenizer

TOKENIZER: Tokenizer = make_tokenizer()
Decode = Callable[[Sequence[int]], str]


def decode(ids: Sequence[int]) -> str:
    return TOKENIZER.decode(list(ids), skip_special_tokens=True)


def decode_all(ids: Sequence[int]) -> str:
    return TOKENIZER.decode(list(ids), skip_special_tokens=False)


def test_the_tokenizer_of_these_tests() -> None:
    assert TOKENIZER.get_vocab_size() == NUM_KNOWN_IDS and TOKENIZER.token_to_id(SPECIALS[2]) == EOS
    assert TOKENIZER.encode("é the").ids == [0xC3, 0xA9, TOKENIZER.token_to_id("Ġthe")]
    for word in WORDS:
        assert len(TOKENIZER.encode(word).ids) == 1 and decode(TOKENIZER.encode(word).ids) == word


def stable_part(whole: str) -> str:
    """All but a last character that later bytes may still change."""
    return whole[:-1] if whole.endswith("\ufffd") else whole


# Bytes, words and special tokens; and mostly whole characters, some of them cut short.
any_ids = st.lists(st.one_of(st.integers(0, 255), st.integers(0, VOCAB_SIZE - 1)), max_size=40)
broken_text = st.lists(
    st.one_of(
        st.text(st.sampled_from("aé中🙂\ufffd "), max_size=4).map(str.encode),
        st.sampled_from([b"\xf0\x9f", b"\xe4\xb8", b"\xff", b"\x80", b"\xc3", b"\xed\xa0\x80"]),
    ),
    max_size=12,
).map(lambda pieces: list(b"".join(pieces)))


def check_pieces(ids: list[int], sizes: list[int], decode: Decode) -> None:
    detokenizer, pieces, at = IncrementalDetokenizer(decode), [], 0
    for size in [*sizes, len(ids)]:
        pieces.append(detokenizer.push(ids[at : at + size]))
        at = min(at + size, len(ids))
        assert "".join(pieces) == detokenizer.text == stable_part(decode(ids[:at]))
    pieces.append(detokenizer.flush())
    assert "".join(pieces) == detokenizer.text == decode(ids)
    assert detokenizer.flush() == ""


@given(st.text(), st.lists(st.integers(1, 5), max_size=60))
@settings(max_examples=200, deadline=None)
def test_pieces_of_valid_text(text: str, sizes: list[int]) -> None:
    ids = TOKENIZER.encode(text).ids
    assert decode_all(ids) == text
    check_pieces(ids, sizes, decode_all)


@given(st.one_of(any_ids, broken_text), st.lists(st.integers(0, 4), max_size=60), st.sampled_from([decode, decode_all]))
@settings(max_examples=400, deadline=None)
def test_pieces_of_arbitrary_ids(ids: list[int], sizes: list[int], decode: Decode) -> None:
    """Not only at the end: after every push, all that is certain is out, and nothing else."""
    check_pieces(ids, sizes, decode)


def test_a_character_comes_out_with_its_last_byte() -> None:
    detokenizer = IncrementalDetokenizer(decode)
    assert [detokenizer.push([byte]) for byte in "é🙂".encode()] == ["", "é", "", "", "", "🙂"]


def test_invalid_bytes_are_not_held_back_beyond_the_last() -> None:
    detokenizer = IncrementalDetokenizer(decode)
    assert "".join(detokenizer.push([0xFF]) for _ in range(20)) == "\ufffd" * 19
    assert detokenizer.flush() == "\ufffd"


def test_cost_of_a_token_does_not_grow_with_the_text() -> None:
    longest = 0

    def counted(ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    detokenizer = IncrementalDetokenizer(counted)
    for byte in ("中a" * 200).encode():
        detokenizer.push([byte])
    assert longest <= 8


# -- stop strings


def watch(ids: list[int], stop: list[str], include: bool = False, min_tokens: int = 0) -> tuple[str, str | None, int]:
    """(text, what stopped it, tokens read), as the engine uses a watcher."""
    watcher = StopWatcher(decode, stop, include)
    for count, token in enumerate(ids, 1):
        if watcher.push(token, search=count > min_tokens) is not None:
            return watcher.text, watcher.found, count
    watcher.flush()
    return watcher.text, watcher.found, len(ids)


@given(st.lists(st.sampled_from(list(b"abc") + [0xC3, 0xA9, 0xFF]), max_size=20),
       st.lists(st.text("abcé", min_size=1, max_size=4), min_size=1, max_size=3), st.booleans())  # fmt: skip
@settings(max_examples=400, deadline=None)
def test_watcher_against_a_search_of_the_whole_text(ids: list[int], stop: list[str], include: bool) -> None:
    """The first token after which the certain text contains a stop string ends it, before the earliest of them."""
    for count in range(1, len(ids) + 1):
        text = stable_part(decode(ids[:count]))
        hits = [(text.index(string), order, string) for order, string in enumerate(stop) if string in text]
        if hits:
            at, _, string = min(hits)
            assert watch(ids, stop, include) == (text[: at + len(string) * include], string, count)
            return
    assert watch(ids, stop, include) == (decode(ids), None, len(ids))


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("xxab", ["ab"], ("xx", "ab")),
        ("xxab", ["b", "ab"], ("xx", "ab")),  # both end with the same token: the one that begins first counts
        ("abab", ["ba"], ("a", "ba")),
        ("aaab", ["aab"], ("a", "aab")),
        ("xyz", ["q"], ("xyz", None)),
    ],
)
def test_where_the_text_is_cut(text: str, stop: list[str], expected: tuple[str, str | None]) -> None:
    assert watch(list(text.encode()), stop)[:2] == expected


def test_of_two_that_begin_together_the_first_listed_counts() -> None:
    the = TOKENIZER.encode("the").ids
    assert watch(the, ["the", "t"])[1] == "the" and watch(the, ["t", "the"])[1] == "t"


def test_stop_string_inside_one_token_and_across_tokens() -> None:
    ids = TOKENIZER.encode("q the in and").ids
    assert watch(ids, ["he"])[:2] == ("q t", "he")
    assert watch(ids, ["e i"])[:2] == ("q th", "e i")
    assert watch(ids, ["e i"], include=True)[:2] == ("q the i", "e i")


def test_min_tokens_protects_a_stop_string_within_them_and_not_one_across() -> None:
    ids = list(b"abcdefgh")
    assert watch(ids, ["ab", "0123456789"], min_tokens=2) == ("abcdefgh", None, 8)
    assert watch(ids, ["bc"], min_tokens=2) == ("a", "bc", 3)
    assert watch(ids, ["bc"], min_tokens=3) == ("abcdefgh", None, 8)


def test_special_and_unknown_ids_have_no_text_to_stop_at() -> None:
    assert watch([*b"a", EOS, *b"b"], ["ab"])[:2] == ("", "ab")
    assert watch([VOCAB_SIZE - 1, *b"a"], ["a"])[:2] == ("", "a")
