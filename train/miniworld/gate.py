"""Quality gate of the tiny CLIP: its zero-shot accuracy and embedding collapse on region crops.

The gate is measured before a segmenter is trained. A teacher that cannot distinguish fills cannot teach them, and one
whose region embeddings have collapsed (cosine similarity to the class mean near 1) adds nothing to the class labels.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_gkc.atomic_files import atomic_write_json

from ..data.drawn_world.words import COARSE, COLORS, CONCEPTS, FILLS, HELD_OUT_WORDS, WORDS, Attributes
from .protocols import all_protocols

LEAST_ACCURACY = 0.85
HIGHEST_COLLAPSE = 0.85
ROWS = {  # row of the table -> (protocol, group of its classes)
    "coarse": ("seen", "seen"),
    "colour": ("colour", "colour"),
    "fill": ("fill", "fill"),
    "sub": ("all", "all/sub"),
    "void": ("all", "all/void"),
    "never": ("all", "all/never"),
}
WITHOUT_TARGET = ("never",)

TextEncoder = Callable[[Sequence[str]], Tensor]


def measure_gate(image_embeds: Tensor, attributes: Sequence[Attributes], encode_texts: TextEncoder) -> dict:
    """Evaluate a CLIP model on region crops.

    Args:
        image_embeds: Embeddings (N, D) of the crops of N regions.
        attributes: Attributes of the N regions.
        encode_texts: Function that maps M texts to embeddings (M, D).

    Returns:
        A dictionary of `rows`, the zero-shot `accuracy`, the `collapse` (mean cosine similarity of a region to the
        mean embedding of its class) and the number of `regions` of each group of classes; `synonyms`, the mean cosine
        similarities of names and synonyms; and `misses`, descriptions of the missed targets.
    """
    image_embeds = F.normalize(image_embeds.float(), dim=-1)
    protocols = {protocol.name: protocol for protocol in all_protocols()}
    rows = {}
    for row, (name, group) in ROWS.items():
        protocol = protocols[name]
        labels = torch.tensor([protocol.class_of(region) for region in attributes])
        kept = torch.isin(labels, torch.tensor(protocol.groups[group]))
        if not kept.any():
            rows[row] = {"accuracy": None, "collapse": None, "regions": 0}
            continue
        embeds, labels = image_embeds[kept], labels[kept]
        class_embeds = F.normalize(encode_texts([prompts[0] for prompts in protocol.prompts]).float(), dim=-1)
        right = (embeds @ class_embeds.T).argmax(dim=1) == labels
        means = torch.zeros(len(protocol.prompts), embeds.shape[1]).index_add(0, labels, embeds)
        collapse = F.cosine_similarity(embeds, means[labels]).mean()
        rows[row] = {"accuracy": right.float().mean().item(), "collapse": collapse.item(), "regions": len(labels)}
    cosines = {}
    for kind, names in {"coarse": COARSE, "concepts": CONCEPTS, "colours": COLORS, "fills": FILLS}.items():
        embeds = torch.stack([F.normalize(encode_texts(WORDS[name]).float(), dim=-1) for name in names])  # (K, 6, D)
        similarity = torch.einsum("kd,ksd->ks", embeds[:, 0], embeds)
        cosines[kind] = similarity[:, 1:].mean().item()
        cosines[f"{kind}, held out"] = similarity[:, HELD_OUT_WORDS].mean().item()
    misses = []
    for row, measured in rows.items():
        if row in WITHOUT_TARGET:
            continue
        if measured["regions"] == 0:
            misses.append(f"{row}: no region to measure on")
            continue
        if measured["accuracy"] < LEAST_ACCURACY:
            misses.append(f"{row}: accuracy {measured['accuracy']:.3f} < {LEAST_ACCURACY}")
        if measured["collapse"] > HIGHEST_COLLAPSE:
            misses.append(f"{row}: cos(image, class mean) {measured['collapse']:.3f} > {HIGHEST_COLLAPSE}")
    return {"rows": rows, "synonyms": cosines, "misses": misses}


def format_gate(gate: dict) -> str:
    """Format the gate as a readable table."""
    lines = [f"{'region names':<14}{'zero-shot':>12}{'':6}{'cos(image, class mean)':>24}{'':6}{'regions':>9}"]
    for row, measured in gate["rows"].items():
        accuracy, collapse = measured["accuracy"], measured["collapse"]
        if accuracy is None:
            lines.append(f"{row:<14}{'no region':>12}")
            continue
        accuracy_mark = _mark(row, accuracy >= LEAST_ACCURACY)
        collapse_mark = _mark(row, collapse <= HIGHEST_COLLAPSE)
        lines.append(
            f"{row:<14}{accuracy:>12.3f} {accuracy_mark:<5}{collapse:>24.3f} {collapse_mark:<5}"
            f"{measured['regions']:>9}"
        )
    lines.append(f"targets: zero-shot >= {LEAST_ACCURACY}, cos(image, class mean) <= {HIGHEST_COLLAPSE}")
    synonyms = ", ".join(f"{kind} {cosine:.2f}" for kind, cosine in gate["synonyms"].items())
    lines.append(f"cos(name, synonym): {synonyms}")
    lines.append("gate: " + ("passed" if not gate["misses"] else "MISSED - " + "; ".join(gate["misses"])))
    return "\n".join(lines)


def _mark(row: str, reached: bool) -> str:
    if row in WITHOUT_TARGET:
        return ""
    return "pass" if reached else "MISS"


def save_gate(gate: dict, path: str | Path) -> None:
    """Write the gate to a JSON file."""
    atomic_write_json(path, gate)
