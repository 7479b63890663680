"""Text as foretell reads it: identity and normalisation."""

import hashlib
import html
import math
import re
import unicodedata

_TAG = re.compile(r"<(?:!--.*?--|/?[a-zA-Z][^<>]*)>", re.DOTALL)
_SPACE = re.compile(r"\s+")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


def text_id(text: str) -> str:
    """The id of a behavior text in the collection `behaviors`: 32 hexadecimal digits."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def clean_text(text: str) -> str:
    """Removes HTML tags, entities and control characters; one space between words; Unicode NFC."""
    return plain_text(html.unescape(_TAG.sub(" ", text)))


def number_of(text: str) -> float | None:
    """The number that all of a text is, as `Condition.range` of the contract reads attributes."""
    if not _NUMBER.fullmatch(text):
        return None
    number = float(text)
    return number if math.isfinite(number) else None


def plain_text(text: str) -> str:
    """Removes control characters; one space between words; Unicode NFC. Leaves HTML alone.

    NFC, not NFKC: compatibility forms such as the fraction 1/2 or the trademark sign carry
    meaning in product texts.
    """
    text = unicodedata.normalize("NFC", text)
    if not text.isprintable():  # what is printable has no control character
        text = "".join(
            " " if unicodedata.category(char) in _DROPPED and not char.isspace() else char
            for char in text
        )
    return _SPACE.sub(" ", text).strip()


_DROPPED = frozenset({"Cc", "Cs", "Co", "Cn"})
"""Unicode categories without a printable meaning: control, surrogate, private use, unassigned."""
