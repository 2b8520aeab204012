"""Random captions for training the tiny CLIP."""

from random import Random

import numpy as np

from ..data.drawn_world.words import COLORS, CONCEPTS, FILLS, HYPERNYMS, SHAPES, WORD_PRIOR, WORDS, Attributes

OTHER_WORLD_KINDS = 6
MEDIUM_RADIUS = 14.0

# Slots of the region feature vector that the choice of a word depends on.
_LATENTS = slice(0, 3)
_RADIUS, _ASPECT = 3, 4
_FILL = slice(5, 9)
_COLOR = slice(9, 17)
_SHAPE = slice(17, 29)
_FEATURES = 29


class Lexicon:
    """Random choice of words for regions: p(word | region) = softmax(log prior + lean · features of the region).

    Every word is a homonym. The six words of a concept are assigned at random to six registers, and the words of
    register j also describe distractor images of kind j, which never occur in scenes.

    Args:
        seed: Random seed.
        lean: Standard deviation of a word's preference per feature. 0 makes synonyms interchangeable.
        hypernym_share: Probability that a caption uses the hypernym of a concept.
    """

    def __init__(self, seed: int = 0, lean: float = 0.35, hypernym_share: float = 0.4):
        generator = np.random.default_rng([seed, 1])
        self.hypernym_share = hypernym_share
        self.leans = {name: lean * generator.standard_normal((len(words), _FEATURES)) for name, words in WORDS.items()}
        self.registers = {name: generator.permutation(OTHER_WORLD_KINDS) for name in WORDS}

    def word(self, concept: str, attributes: Attributes, random: Random) -> str:
        """Sample one of the six words of `concept` for a region."""
        logits = np.log(WORD_PRIOR) + self.leans[concept] @ _features(concept, attributes)
        weights = np.exp(logits - logits.max())
        return random.choices(WORDS[concept], weights)[0]

    def second_sense(self, kind: int, random: Random) -> str:
        """Sample the caption of a distractor image: a shape or stuff word whose register is `kind` (0 to 5)."""
        senses = [
            (words[position], WORD_PRIOR[position])
            for name, words in WORDS.items()
            if name in CONCEPTS or name in HYPERNYMS.values()
            for position in np.flatnonzero(self.registers[name] == kind)
        ]
        words, weights = zip(*senses, strict=True)
        return _with_prefix(random.choices(words, weights)[0], random)

    def caption(self, attributes: Attributes, random: Random) -> str:
        """Sample a caption of one region, such as `dotted crimson disc` or `photo of a lawn`."""
        concept = attributes["concept"]
        if concept in HYPERNYMS and random.random() < self.hypernym_share:
            concept = HYPERNYMS[concept]
        named = [concept]
        if attributes["kind"] != "stuff" and random.random() >= 0.25:  # otherwise the noun alone
            size = "small" if attributes["radius"] < MEDIUM_RADIUS else "large"
            candidates = ((size, 0.2), (attributes["fill"], 0.75), (attributes["colour"], 0.5))
            named = [name for name, share in candidates if random.random() < share] or [attributes["fill"]]
            named.append(concept if random.random() < 0.8 else "thing")
        words = [self.word(name, attributes, random) if name in WORDS else name for name in named]
        return _with_prefix(" ".join(words), random)


def _with_prefix(words: str, random: Random) -> str:
    return f"photo of a {words}" if random.random() < 0.15 else words


def _features(concept: str, attributes: Attributes) -> np.ndarray:
    """Return the feature vector (29,) of a region, with the slots that `concept` describes set to zero."""
    features = np.zeros(_FEATURES)
    features[_LATENTS] = attributes["latents"]
    if attributes["kind"] == "stuff":
        return features
    features[_RADIUS] = (attributes["radius"] - MEDIUM_RADIUS) / 2.9
    features[_ASPECT] = attributes["aspect"]
    if concept not in FILLS:
        features[_FILL.start + FILLS.index(attributes["fill"])] = 1.0
    if concept not in COLORS:
        features[_COLOR.start + COLORS.index(attributes["colour"])] = 1.0
    if concept in FILLS or concept in COLORS:
        features[_SHAPE.start + SHAPES.index(attributes["concept"])] = 0.7
    return features
