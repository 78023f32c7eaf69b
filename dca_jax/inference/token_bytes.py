"""The bytes of tokens, which show where characters begin and end.

A decoder writes U+FFFD for an incomplete character, but a text may also contain that character. So
whether a token ends inside a character is determined from its bytes.
"""

import codecs
import json
from collections.abc import Sequence
from typing import Any

LONGEST = 4  # maximum bytes of a character in UTF-8


def _byte_of_letter() -> dict[str, int]:
    """The letter for each byte in vocabularies of byte-level BPE, such as GPT-2's.

    A byte that is printable in Latin-1 stands for itself; the others are U+0100 and up, in order.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTE_OF_LETTER = _byte_of_letter()


class TokenBytes:
    """The bytes of the tokens of a `transformers` tokenizer.

    Args:
        tokenizer: with None, or with a decoder of neither kind below, every token is assumed to
            consist of whole characters.

    Attributes:
        special: the special tokens by id; they are not text.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = {} if tokenizer is None else tokenizer.added_tokens_decoder
        self._added = frozenset(added)
        self.special = {id: token.content for id, token in added.items() if token.special}
        kinds = _decoder_kinds(tokenizer)
        self._byte_level, self._byte_fallback = "ByteLevel" in kinds, "ByteFallback" in kinds

    def inside_character(self, tokens: Sequence[int]) -> bool:
        """Whether the text of these tokens ends with an incomplete character."""
        end = b""
        for token in reversed(tokens):
            if token in self.special:
                continue
            found = self.of(token)
            if found is None:
                break
            end = found + end
            if len(end) >= LONGEST:
                break
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(end)
        pending, _ = decoder.getstate()
        return bool(pending)

    def continues_character(self, token: int) -> bool:
        """Whether the token begins inside a character."""
        found = self.of(token)
        return bool(found) and 0x80 <= found[0] < 0xC0

    def of(self, token: int) -> bytes | None:
        """The bytes of a token; None if it consists of whole characters."""
        if token in self._added or not (self._byte_level or self._byte_fallback):
            return None
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # an id without a token, as in a padded vocabulary
            return None
        if self._byte_fallback and len(piece) == 6 and piece.startswith("<0x"):
            return bytes.fromhex(piece[3:5])
        if self._byte_level and all(letter in _BYTE_OF_LETTER for letter in piece):
            return bytes(_BYTE_OF_LETTER[letter] for letter in piece)
        return None


def _decoder_kinds(tokenizer: Any) -> set[str]:
    """The types of the components of the tokenizer's decoder."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return set()
    state = json.loads(backend.decoder.__getstate__())
    return {part["type"] for part in [state, *state.get("decoders", [])]}
