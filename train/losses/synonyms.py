"""Text diversification: the same regions classified under other words for their classes.

Letters: B images, Q queries, N annotated regions of an image, K classes, P prompts (all words of all classes),
M most words of a class, S slots of an image (K of the classes, then extra ones). Logits end with the no-object column.
"""

import torch
from torch import Tensor

from modeling_gkc.loss_gkc import Matches, classification_loss
from modeling_gkc.modeling_gkc import reduce_prompt_logits

CLUSTER_REDUCTIONS = {"average": "mean", "max": "max"}
SYNONYM_MODES = (*CLUSTER_REDUCTIONS, "sample")


def clustered_synonym_loss(
    prompt_logits: Tensor,
    class_ids: Tensor,
    class_labels: list[Tensor],
    matches: Matches,
    no_object_weight: float,
    mode: str,
    num_classes: int | None = None,
    divisor: Tensor | None = None,
) -> Tensor:
    """Cross-entropy over the per-class mean (`average`) or maximum (`max`) of the logits of a class's words.

    Args:
        prompt_logits: (B, Q, P + 1).
        class_ids: (P,) class of each prompt.
        class_labels: per image (N,) classes of the regions.
        matches: per image the matched queries and regions.
        no_object_weight: weight of the no-object class.
        mode: `average` or `max`.
        num_classes: K, if it is known: a training step then need not count and check `class_ids` at every stage.
        divisor: see `modeling_gkc.loss_gkc.classification_loss`.
    """
    if mode not in CLUSTER_REDUCTIONS:
        raise ValueError(f"`mode` must be one of {', '.join(CLUSTER_REDUCTIONS)}, got {mode!r}.")
    logits = reduce_prompt_logits(prompt_logits, class_ids, CLUSTER_REDUCTIONS[mode], num_classes)
    return classification_loss(logits, class_labels, matches, no_object_weight, divisor)


def sampled_synonym_loss(
    prompt_logits: Tensor,
    slot_prompts: list[Tensor],
    slot_labels: list[Tensor],
    matches: Matches,
    no_object_weight: float,
    divisor: Tensor | None = None,
) -> Tensor:
    """Cross-entropy over each image's own slots.

    Args:
        prompt_logits: (B, Q, P + 1).
        slot_prompts: per image (S,) the prompt in each slot, from `assign_slots`.
        slot_labels: per image (N,) the slot of each region.
        matches: per image the matched queries and regions.
        no_object_weight: weight of the no-object class.
        divisor: see `modeling_gkc.loss_gkc.classification_loss`.
    """
    logits = gather_slot_logits(prompt_logits, slot_prompts)
    return classification_loss(logits, slot_labels, matches, no_object_weight, divisor)


def gather_slot_logits(prompt_logits: Tensor, slot_prompts: list[Tensor]) -> Tensor:
    """(B, Q, P + 1) -> (B, Q, S + 1); slots that only other images have can never be chosen."""
    slots = torch.nn.utils.rnn.pad_sequence(slot_prompts, batch_first=True, padding_value=-1)  # (B, S)
    slots = slots.to(prompt_logits.device)[:, None].expand(-1, prompt_logits.shape[1], -1)
    logits = prompt_logits.gather(2, slots.clamp(min=0))
    logits = logits.masked_fill(slots < 0, torch.finfo(logits.dtype).min)
    return torch.cat([logits, prompt_logits[..., -1:]], dim=-1)


def draw_synonyms(
    class_labels: Tensor,
    table: Tensor,
    generator: torch.Generator,
    probabilities: Tensor | None = None,
    threshold: float = 0.1,
) -> Tensor:
    """Draw one word for each region, uniformly among those that are probable enough for this region.

    Args:
        class_labels: (N,) classes of the regions.
        table: (K, M) prompts of each class, -1 where it has fewer, from `synonym_table`.
        generator: source of all randomness; on the CPU.
        probabilities: (N, M) probability of each word of the region's class for the region; all words count as
            probable without it. Where none exceeds the threshold the most probable word is taken.
        threshold: what a probability must exceed.

    Returns:
        (N,) the drawn prompts.
    """
    words = table.cpu()[class_labels.cpu()]  # (N, M)
    eligible = words >= 0
    if probabilities is not None:
        probabilities = probabilities.cpu().masked_fill(~eligible, -1)
        best = torch.zeros_like(eligible).scatter(1, probabilities.argmax(dim=1, keepdim=True), True)
        probable = eligible & (probabilities > threshold)
        eligible = torch.where(probable.any(dim=1, keepdim=True), probable, best)
    # The highest of independent uniform numbers is a uniform draw, and works without rows too.
    lots = torch.rand(words.shape, generator=generator).masked_fill(~eligible, -1)
    return words.gather(1, lots.argmax(dim=1, keepdim=True)).flatten().to(class_labels.device)


def assign_slots(class_labels: Tensor, prompts: Tensor, name_prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Give the regions of one image slots that hold their words.

    Every class starts with one slot that holds its name. The first region of a class puts its word there; a later
    region with another word takes a new slot, one with a word that its class already holds shares that slot.

    Args:
        class_labels: (N,) classes of the regions.
        prompts: (N,) their words.
        name_prompts: (K,) prompt of each class's name.

    Returns:
        (S,) the prompt in each slot, S >= K, and (N,) the slot of each region.
    """
    slots: list[int] = name_prompts.tolist()
    slot_of: dict[tuple[int, int], int] = {}
    renamed: set[int] = set()
    labels = []
    for label, prompt in zip(class_labels.tolist(), prompts.tolist(), strict=True):
        if (label, prompt) not in slot_of and label not in renamed:
            slot_of[label, prompt], slots[label] = label, prompt
            renamed.add(label)
        elif (label, prompt) not in slot_of:
            slot_of[label, prompt] = len(slots)
            slots.append(prompt)
        labels.append(slot_of[label, prompt])
    return torch.tensor(slots), torch.tensor(labels, dtype=torch.int64)
