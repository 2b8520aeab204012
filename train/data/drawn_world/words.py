"""Concepts of the mini-world, with six words each.

The first word of a concept is its name. Words 0 to 3 are for training the segmenter. Words 4 and 5 are held out: only
the tiny CLIP is trained on them.
"""

from typing import TypedDict

import numpy as np


class Attributes(TypedDict):
    """Ground-truth properties of one region, never shown to the segmenter; None where they do not apply to stuff."""

    kind: str  # "shape" or "stuff"
    concept: str  # one of SHAPES or STUFFS
    colour: str | None
    fill: str | None
    radius: float | None  # in world units; a scene is 96 world units wide
    aspect: float | None  # stretch from a clipped standard normal; 0 is not stretched
    latents: list[float]  # three clipped standard normal values that no word describes


def _table(text: str) -> dict[str, tuple[str, ...]]:
    """Parse rows of six words into a mapping from the first word of each row to its words."""
    rows = [tuple(line.split()) for line in text.strip().splitlines()]
    return {words[0]: words for words in rows}


COLOR_WORDS = _table("""
    red crimson scarlet ruby cherry vermilion
    orange tangerine apricot rust amber carrot
    yellow golden lemon mustard canary blond
    green emerald jade lime olive viridian
    cyan teal turquoise aqua aquamarine cerulean
    blue azure navy cobalt sapphire indigo
    purple violet lavender plum mauve amethyst
    pink rose magenta fuchsia salmon blush
""")
FILL_WORDS = _table("""
    solid uniform plain flat filled whole
    striped banded lined streaked ribbed stripy
    dotted spotted speckled flecked stippled peppered
    checkered chequered tiled gridded plaid checked
""")
SHAPE_WORDS = _table("""
    circle disc dot spot button coin
    ring hoop annulus donut band bagel
    square box block tile quadrat cube
    triangle wedge pyramid delta trigon gable
    star asterisk starlet pentagram pentacle estoile
    cross plus crucifix rood crossing saltire
    crescent moon sickle lune croissant halfmoon
    bar stick rod beam pole slab
    heart valentine love cardioid sweetheart ticker
    arrow pointer dart cursor bolt vane
    hexagon hex honeycomb nut sexangle cell
    drop tear droplet bead drip blob
""")
STUFF_WORDS = _table("""
    grass lawn meadow turf pasture sward
    sky heaven air clouds firmament welkin
    brick masonry brickwork clinker adobe stonework
    wood timber plank lumber board parquet
    water sea lake pond river ocean
    sand beach desert dune shore grit
""")
HYPERNYM_WORDS = _table("""
    round circular rounded rotund orbed roundish
    wall barrier partition facade panel rampart
""")
SIZE_WORDS = _table("""
    small little tiny compact petite minute
    large big huge giant bulky massive
""")
WORDS = COLOR_WORDS | FILL_WORDS | SHAPE_WORDS | STUFF_WORDS | HYPERNYM_WORDS | SIZE_WORDS
WORD_PRIOR = np.array([0.34, 0.18, 0.15, 0.12, 0.11, 0.10])
TRAINING_WORDS = slice(0, 4)
HELD_OUT_WORDS = slice(4, 6)
CAPTION_WORDS = ("a", "the", "of", "on", "photo", "picture", "thing")  # words without a concept

COLORS, FILLS = tuple(COLOR_WORDS), tuple(FILL_WORDS)
SHAPES, STUFFS = tuple(SHAPE_WORDS), tuple(STUFF_WORDS)
CONCEPTS = SHAPES + STUFFS
HYPERNYMS = {"circle": "round", "ring": "round", "brick": "wall", "wood": "wall"}

COARSE_SHAPES = ("round", "square", "triangle", "star", "cross", "crescent", "bar")
COARSE_STUFFS = ("grass", "sky", "wall")
COARSE = COARSE_SHAPES + COARSE_STUFFS  # training labels
SUB = tuple(HYPERNYMS)  # labeled with their hypernym in training
VOID = ("heart", "arrow", "water")  # drawn in training scenes, but never labeled
NEVER_SEEN = ("hexagon", "drop", "sand")  # never drawn in training scenes
KEPT = tuple(
    concept for concept in CONCEPTS if concept not in SUB + VOID + NEVER_SEEN
)  # labeled with their own name in training


def coarse_label(concept: str) -> str | None:
    """Return the training label of a concept, or None if it is unlabeled in training."""
    return None if concept in VOID + NEVER_SEEN else HYPERNYMS.get(concept, concept)
