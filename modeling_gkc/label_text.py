# Copyright 2026 The GKC Authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Text of labels: normalization, comparison, invisible characters and separators; values and errors in messages."""

import functools
import math
import re
import unicodedata
from typing import Any

# Format characters without width or meaning, often copied along with text from web pages and tables.
_DROPPED = dict.fromkeys(
    [0xAD, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), 0x2060, *range(0x2066, 0x206A), 0xFEFF]
)
# Joiners of some scripts and emoji, and fillers: they are kept, but ignored when labels are compared.
_FILLERS = {0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0, *range(0x180B, 0x1810)}
_FILLERS |= {*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)}
_INVISIBLE_CATEGORIES = ("Cc", "Cf", "Zs", "Zl", "Zp")

# "|" and full stops are the separators of Grounding DINO and GLIP, the others those of other keyboards.
_SEPARATORS = re.compile(r"[；﹔؛|｜¦，﹐、､،]|\s[.·•](?=\s|$)|\.(?=\s.*\.\s*$)")
# Tabs, which separate the columns of a copied table, and other control characters that Python counts as spaces. After
# the colon of a numbered list ("2:\twall") they separate nothing.
_COLUMN_BREAK = re.compile(r"[^\s;,:] *([\t\v\f\x1c-\x1f])[^\S\r\n]*[^\s;,]")
# Marks that may be meant as separators where they stand between two words, but may also belong to a label.
_LONE_MARK = re.compile(r"\w\s+[-/\\&+*:=>~→–—]+\s+\w")
# A stored vocabulary is checked again whenever it is read, with the same labels.
_CACHED_LABELS = 1 << 14


@functools.lru_cache(_CACHED_LABELS)
def normalize_label(label: str) -> str:
    """Remove format characters without width, strip the label, and collapse repeated spaces.

    Args:
        label: Text of a label.

    Returns:
        The normalized label.

    Raises:
        ValueError: If the label contains an unpaired surrogate or invisible characters only. The message is a
            predicate, to which the caller adds the subject.
    """
    surrogate = re.search("[\ud800-\udfff]", label)
    if surrogate:
        raise ValueError(f"contains U+{ord(surrogate[0]):04X}, half of a surrogate pair: write the whole character.")
    tidied = " ".join(label.translate(_DROPPED).split())
    if not comparison_key(tidied) and label.strip():
        codes = ", ".join(dict.fromkeys(f"U+{ord(char):04X}" for char in label if not char.isspace()))
        raise ValueError(f"contains only invisible characters ({codes[:100]}): give every class a visible name.")
    return tidied


@functools.lru_cache(_CACHED_LABELS)
def comparison_key(label: str) -> str:
    """Return a key that is equal for labels that look the same regardless of case.

    The key is case-folded, in Unicode normalization form C, and without fillers.
    """
    folded = unicodedata.normalize("NFC", unicodedata.normalize("NFD", label).casefold())
    seen = (char for char in folded if char.isspace() or not is_invisible(char))
    return " ".join("".join(seen).split())


def is_invisible(char: str) -> bool:
    """Return whether a character is invisible: a space, control character, format character or filler."""
    return ord(char) in _FILLERS or unicodedata.category(char) in _INVISIBLE_CATEGORIES


def check_separators(text: str) -> None:
    """Check that typed labels are separated by ';' and ',' only.

    Args:
        text: Labels typed as one string.

    Raises:
        ValueError: If the text uses another separator, is a JSON list, or has a tab between two words.
    """
    if re.match(r"\s*[\[{]\s*[\"'\[{]", text):
        raise ValueError(
            f"Labels in a string must not be a JSON list, got {text.strip()[:200]!r}: write 'dog; sofa, couch; lamp'."
        )
    column_break = _COLUMN_BREAK.search(text)
    if column_break:
        mark = column_break[1]
        kind = "a tab" if mark == "\t" else f"U+{ord(mark):04X}"
        raise ValueError(
            f"Classes are separated by ';' and several names of one class by ',', not by {kind}: "
            f"{text.strip()[:200]!r}. Replace it by ';', or by a space within a label."
        )
    found = _SEPARATORS.search(text)
    if found:
        mark = found[0].strip()
        raise ValueError(
            f"Classes are separated by ';' and several names of one class by ',', not by {mark!r} "
            f"(U+{ord(mark):04X}): {text.strip()[:200]!r}. (A label that contains {mark!r} can be given in a list or "
            "a .json file.)"
        )


def has_lone_mark(text: str) -> bool:
    """Return whether a mark is surrounded by spaces, as in "red disc / sky" or "black & white".

    Such text may be meant as two labels or as one.
    """
    return _LONE_MARK.search(text) is not None


def shortened(text: str, limit: int = 2000) -> str:
    """Return a text of at most `limit` characters, with "..." in place of the middle of a longer text."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]}...{text[-(limit - limit // 2 - 3) :]}"


def shown(value: Any, limit: int = 200) -> str:
    """Return a short representation of a value for an error message; never raises, whatever the value is."""
    try:
        shape = getattr(value, "shape", None)
        if isinstance(shape, tuple) and math.prod(shape) > 8:
            return f"a {type(value).__name__} of shape {tuple(shape)}"
        text = repr(value)
    except Exception:  # for example an integer with more digits than Python prints
        text = f"a {type(value).__name__}"
    return text if len(text) <= limit else f"{text[:limit]}..."


def error_line(error: BaseException) -> str:
    """Return the message of an error in one line.

    Returns:
        File and reason of an OSError of the operating system; of other errors the first line of the message, prefixed
        by the type unless it is a ValueError, OSError or RuntimeError. At most 2000 characters.
    """
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
        return shortened(text)
    text = str(error).encode("utf-8", "backslashreplace").decode()  # unpaired surrogates cannot be printed
    line = shortened(next((line.strip() for line in text.splitlines() if line.strip()), ""))
    if (isinstance(error, ValueError | OSError) or type(error) is RuntimeError) and line:
        return line
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


__all__ = [
    "check_separators",
    "comparison_key",
    "error_line",
    "has_lone_mark",
    "is_invisible",
    "normalize_label",
    "shortened",
    "shown",
]
