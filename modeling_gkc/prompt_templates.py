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
"""Prompt templates: sentences into which class names are inserted before they are encoded by the text encoder."""

import difflib
import re
import unicodedata
from collections.abc import Sequence

from .label_text import normalize_label, shown

TemplatesLike = str | Sequence[str]

# In a template, a no-break space between "a" and the name keeps the article as it is, whatever the name's sound.
NO_BREAK_SPACE = "\u00a0"
# "vild14" is the set of ViLD (Gu et al., 2022) with which ODISE, SAN and FC-CLIP report their results; there every
# name is preceded by "a".
PROMPT_TEMPLATES: dict[str, tuple[str, ...]] = {
    "plain": ("{}",),
    "photo": ("a photo of a {}.",),
    "vild14": (
        "a photo of a {}.",
        "This is a photo of a {}",
        "There is a {} in the scene",
        "There is the {} in the scene",
        "a photo of a {} in the scene",
        "a photo of a small {}.",
        "a photo of a medium {}.",
        "a photo of a large {}.",
        "This is a photo of a small {}.",
        "This is a photo of a medium {}.",
        "This is a photo of a large {}.",
        "There is a small {} in the scene.",
        "There is a medium {} in the scene.",
        "There is a large {} in the scene.",
    ),
}

# FC-CLIP's text encoding puts "a" before every name.
PROMPT_TEMPLATES["fc_clip"] = tuple(
    template.replace("a {}", f"a{NO_BREAK_SPACE}{{}}") for template in PROMPT_TEMPLATES["vild14"]
)

_ARTICLE = re.compile(r"\b([Aa])n? \{\}")
_LETTERS_SPELLED_WITH_A_VOWEL = set("aefhilmnorsx")
_CONSONANT_SOUND = re.compile(
    r"""
    (?:one|ones|once|onesie|ouija)$
    | (?:mr|mrs|ms|mt|st|uav|ufo|ups|us|usb)s?$
    | eu | ewe
    | unidirectional | uni(?![dmn])
    | ubi | uk | ur[aeiou] | us[aeu] | ut[aeio] | uv
    """,
    re.VERBOSE,
)
_VOWEL_SOUND = re.compile(
    r"""
    heir | honest | honou?r | hour
    | hors$
    | (?:faq|fbi|hdmi|led|mri|nba|sos|suv|xbox|xray)s?$
    """,
    re.VERBOSE,
)


def resolve_templates(value: TemplatesLike) -> list[str]:
    """Return the list of templates of a set name, a template, or a sequence of templates.

    Args:
        value: Name of a set in `PROMPT_TEMPLATES`, one template, or a sequence of templates. Each template has one
            `{}` as the placeholder of the class name.

    Returns:
        The templates.

    Raises:
        ValueError: If the set is unknown, there is no template, or a template does not contain exactly one `{}`.
    """
    if isinstance(value, str):
        value = [value] if "{}" in value else _named_set(value)
    if not isinstance(value, Sequence) or not value:
        raise ValueError(
            "No prompt template was given: name a set "
            f"({', '.join(PROMPT_TEMPLATES)}) or list templates; the plain name is the template '{{}}'."
        )
    for template in value:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise ValueError(f"A prompt template needs exactly one '{{}}' for the name, got {shown(template)}.")
        try:
            normalize_label(template)
        except ValueError as error:
            raise ValueError(f"The prompt template {shown(template)} {error}") from error
    return list(value)


def fill_template(template: str, name: str) -> str:
    """Insert a class name into a template.

    "a" or "an" directly before the `{}` is adapted to the sound of the name: "a photo of a {}." gives "a photo of an
    umbrella." and "a photo of a unicorn.".

    Args:
        template: Sentence with one `{}`.
        name: Name of a class.

    Returns:
        The prompt.
    """
    article = _ARTICLE.search(template)
    if article:
        sound = "n" if starts_with_vowel_sound(name) else ""
        template = f"{template[: article.start()]}{article[1]}{sound} {{}}{template[article.end() :]}"
    return template.replace(NO_BREAK_SPACE, " ").replace("{}", name)


def starts_with_vowel_sound(name: str) -> bool:
    """Return whether an English name starts with a vowel sound, so that its article is "an".

    The first letter decides, with exceptions for other sounds: hour, honest and heir; university, European, one-way
    and utensil; letters and abbreviations that are spelled out (X-ray, T-shirt, SUV, LCD); 8, 11 and 18. "Herb"
    follows British pronunciation; letters of other scripts count as consonants.
    """
    plain = "".join(char for char in unicodedata.normalize("NFKD", name) if not unicodedata.combining(char))
    start = re.search(r"[^\W\d_]+|\d+", plain.casefold())
    if start is None:
        return False
    word = start[0]
    if word.isdigit():
        return word.startswith("8") or word in ("11", "18")
    if _VOWEL_SOUND.match(word):
        return True
    if _CONSONANT_SOUND.match(word):
        return False
    spelled = len(word) == 1 or not set(word) & set("aeiouy")
    return word[0] in (_LETTERS_SPELLED_WITH_A_VOWEL if spelled else "aeiou")


def _named_set(name: str) -> tuple[str, ...]:
    if name not in PROMPT_TEMPLATES:
        close = difflib.get_close_matches(name, PROMPT_TEMPLATES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(PROMPT_TEMPLATES)}."
        raise ValueError(f"{shown(name)} is neither a set of prompt templates nor a template with '{{}}'; {hint}")
    return PROMPT_TEMPLATES[name]


__all__ = ["PROMPT_TEMPLATES", "TemplatesLike", "fill_template", "resolve_templates", "starts_with_vowel_sound"]
