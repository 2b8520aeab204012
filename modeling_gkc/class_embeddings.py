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
"""Text embeddings of prompts, names and classes: caching, checks and reductions.

Letters: P prompts, N names (a prompt is a name put into a template), K classes, D text-embedding width; P >= N >= K.
"""

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.utils import ModelOutput
from transformers.utils.import_utils import is_tracing

from .argument_checks import check_tensor

MAX_CACHED_PROMPTS = 32_768
WEIGHTS_SAMPLED = 16
# Maximum cosine distance between embeddings of the same text, which differ by rounding between batches.
SAME_TEXT = 1e-6
SAME_TEXT_IN_HALF = 2e-5


@dataclass
class GKCClassEmbeddings(ModelOutput):
    """Text embeddings of a vocabulary without its names, see `EncodedVocabulary`.

    Attributes:
        class_embeds: (N, D) L2-normalized text embeddings of the names.
        class_ids: (N,) class of each name, 0..K-1.
        names_per_class: (K,) number of names of each class. Its shape gives the number of classes, so that `forward`
            does not read the values of `class_ids`, which a compiled or exported graph cannot do.
    """

    class_embeds: Tensor | None = None
    class_ids: Tensor | None = None
    names_per_class: Tensor | None = None


class TextEmbeddingCache:
    """Thread-safe cache of text embeddings by their tokens, which evicts the least recently used embeddings.

    A copy or a pickle of it starts empty.

    Args:
        max_prompts: Maximum number of embeddings.
    """

    def __init__(self, max_prompts: int = MAX_CACHED_PROMPTS):
        self.max_prompts = max_prompts
        self._entries: OrderedDict[bytes, Tensor] = OrderedDict()
        self._state: Hashable = None
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def __reduce__(self):
        return type(self), (self.max_prompts,)

    def clear(self) -> None:
        """Remove all embeddings."""
        with self._lock:
            self._entries.clear()

    def embed(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        encode: Callable[[Tensor, Tensor | None], Tensor],
        state: Hashable,
    ) -> Tensor:
        """Return the embeddings (P, D) of tokenized prompts, and encode each prompt that is not cached once.

        Args:
            input_ids: (P, L) tokens.
            attention_mask: (P, L) mask, 0 at padding, which is not part of the cache key; None keeps all tokens.
            encode: Function that encodes some rows of `input_ids` and `attention_mask` as embeddings (p, D).
            state: Everything else that the embeddings depend on, such as weights; a change empties the cache.
        """
        keys = _prompt_keys(input_ids, attention_mask)
        known = self._recall(keys, state)
        first_rows: dict[bytes, int] = {}
        for row, key in enumerate(keys):
            if key not in known:
                first_rows.setdefault(key, row)
        if first_rows:
            rows = torch.tensor(list(first_rows.values()), device=input_ids.device)
            encoded = encode(input_ids[rows], None if attention_mask is None else attention_mask[rows])
            # A view of one row would keep the memory of all rows of the forward pass.
            new = {key: row.clone() for key, row in zip(first_rows, encoded, strict=True)}
            self._remember(new, state)
            known |= new
        return torch.stack([known[key] for key in keys])

    def _recall(self, keys: list[bytes], state: Hashable) -> dict[bytes, Tensor]:
        with self._lock:
            if state != self._state:
                self._entries.clear()
                self._state = state
            known = {key: self._entries[key] for key in keys if key in self._entries}
            for key in known:
                self._entries.move_to_end(key)
            return known

    def _remember(self, new: dict[bytes, Tensor], state: Hashable) -> None:
        with self._lock:
            if state != self._state:  # another thread has changed the model in the meantime
                return
            self._entries.update(new)
            while len(self._entries) > self.max_prompts:
                self._entries.popitem(last=False)


def _prompt_keys(input_ids: Tensor, attention_mask: Tensor | None) -> list[bytes]:
    """Return the cache key of each prompt: its tokens without right padding, with the mask for other padding."""
    ids = input_ids.cpu().long().numpy()
    if attention_mask is None:
        return [row.tobytes() for row in ids]
    mask = attention_mask.cpu().bool().numpy()
    lengths = [int(seen.sum()) for seen in mask]
    return [
        row[:length].tobytes() if seen[:length].all() else row.tobytes() + seen.tobytes()
        for row, seen, length in zip(ids, mask, lengths, strict=True)
    ]


def weights_state(module: nn.Module) -> tuple | None:
    """Return a value that changes if the weights of a module change, without reading all of them.

    In-place changes increase the version of a tensor, except through `.data`, as when adapters are merged; a sample of
    the values detects those. For quantized weights, the stored tensors are inspected.

    Returns:
        The state; None if weights cannot be inspected, so that their outputs must not be cached.
    """
    if any(isinstance(value, torch.ScriptObject) for layer in module.modules() for value in vars(layer).values()):
        return None
    try:
        weights = [part for weight in chain(module.parameters(), module.buffers()) for part in _stored_parts(weight)]
        versions = [
            (weight.data_ptr(), 0 if weight.is_inference() else weight._version, weight.dtype) for weight in weights
        ]
        return tuple(versions), _samples(weights)
    except (RuntimeError, TypeError):  # tensor types without accessible memory
        return None


def _stored_parts(weight: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors that store a weight: itself, or the tensors inside a quantized or sharded weight."""
    if is_traceable_wrapper_subclass(weight):
        for name in weight.__tensor_flatten__()[0]:
            yield from _stored_parts(getattr(weight, name))
    else:
        yield weight


def _samples(weights: list[Tensor]) -> tuple[float, ...]:
    """Sample some values of each tensor, with one transfer per device."""
    samples = defaultdict(list)
    for weight in weights:
        if weight.device.type != "meta":  # offloaded weights are loaded again for each use
            values = weight.detach().flatten()
            samples[weight.device].append(values[:: max(1, len(values) // WEIGHTS_SAMPLED)].float())
    return tuple(value for parts in samples.values() for value in torch.cat(parts).tolist())


def has_adapters(module: nn.Module) -> bool:
    """Return whether layers of a module are wrapped by adapters, whose activation `weights_state` cannot detect."""
    return any(hasattr(layer, "base_layer") for layer in module.modules())


def count_classes(
    class_ids: Tensor,
    num_prompts: int,
    name: str = "class_ids",
    counts: Tensor | None = None,
    counts_name: str = "names_per_class",
) -> int:
    """Check class ids and return the number K of classes.

    Args:
        class_ids: (P,) class of each prompt.
        num_prompts: P.
        name: Name of `class_ids` in error messages.
        counts: (K,) number of prompts of each class. If given, the ids are not read where that is impossible (in a
            traced graph) or slow (on an accelerator).
        counts_name: Name of `counts` in error messages.

    Raises:
        ValueError: The ids do not have shape (P,) or do not cover 0..K-1, they do not match `counts`, or they would
            have to be read in a traced graph.
    """
    if not is_tracing(class_ids):
        check_tensor(name, class_ids, "(P,)", "integers")
        if counts is not None:
            check_tensor(counts_name, counts, "(K,)", "integers")
    if class_ids.shape != (num_prompts,):
        raise ValueError(f"`{name}` must have shape ({num_prompts},), got {tuple(class_ids.shape)}.")
    if counts is not None and (is_tracing(class_ids) or class_ids.device.type != "cpu"):
        return counts.shape[0]
    if is_tracing(class_ids) and not torch.jit.is_tracing():
        raise ValueError(
            f"A compiled or exported model cannot read how many classes `{name}` hold: give `{counts_name}` too, as "
            "`model.get_class_embeddings` and GKCProcessor do; pass on all tensors that they return."
        )
    present = class_ids.unique().tolist()
    # Find the first missing ids without a list as long as the largest id, which may be any number.
    missing = sorted(set(range(min(present[-1], len(present) + 10))) - set(present))[:10]
    if present[0] < 0 or missing:
        raise ValueError(f"`{name}` must contain every number from 0: smallest {present[0]}, missing {missing}.")
    if counts is not None and counts.tolist() != class_ids.bincount().tolist():
        raise ValueError(f"`{counts_name}` does not match `{name}`: pass tensors of the same vocabulary.")
    return len(present)


def check_class_embeds(class_embeds: Tensor, width: int | None = None, read: bool = False) -> None:
    """Check the shape, type and values of text embeddings.

    Args:
        class_embeds: (P, D) embeddings.
        width: D, if known.
        read: Whether to check embeddings on an accelerator for NaN and infinity too, which synchronizes it. Those on
            the CPU are always checked, except in a traced graph.

    Raises:
        ValueError: The embeddings are not a finite floating-point tensor of this shape.
    """
    shape = f"(prompts, {'D' if width is None else width})"
    if is_tracing(class_embeds):
        return
    check_tensor("class_embeds", class_embeds, shape)
    if width not in (None, class_embeds.shape[1]):
        raise ValueError(f"`class_embeds` must be {shape}, got {tuple(class_embeds.shape)}.")
    if (read or class_embeds.device.type == "cpu") and not class_embeds.isfinite().all():
        rows = (~class_embeds.isfinite().all(dim=1)).nonzero().flatten().tolist()
        raise ValueError(
            f"`class_embeds` must be finite, but {len(rows)} of {len(class_embeds)} rows hold NaN or infinity, such "
            f"as row {rows[0]}: encode the vocabulary again, and check the weights of the text encoder."
        )


def check_prompts(input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
    """Check the shape and type of tokenized prompts (P, L), except in a traced graph.

    Raises:
        ValueError: The tokens are not an integer tensor (P, L) with P, L >= 1, or the mask has another shape.
    """
    if is_tracing(input_ids):
        return
    check_tensor("input_ids", input_ids, "(P, L)", "integers")
    if 0 in input_ids.shape:
        raise ValueError(
            f"`input_ids` must hold at least one prompt and token, got the shape {tuple(input_ids.shape)}."
        )
    if attention_mask is not None:
        check_tensor("attention_mask", attention_mask, "(P, L)", "numbers")
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"`attention_mask` must have the shape of `input_ids`, {tuple(input_ids.shape)}, got "
                f"{tuple(attention_mask.shape)}."
            )


def reduce_prompt_logits(logits: Tensor, class_ids: Tensor, reduction: str, num_classes: int | None = None) -> Tensor:
    """Reduce the logits of several prompts of a class to one logit.

    Args:
        logits: (..., P + 1) logits of P prompts and of "no object".
        class_ids: (P,) class of each prompt; every class 0..K-1 has at least one prompt.
        reduction: `mean` or `max`.
        num_classes: K, if known; `class_ids` are not checked then.

    Returns:
        (..., K + 1) logits of K classes and of "no object".

    Raises:
        ValueError: The reduction is unknown, or `class_ids` do not match the logits or do not cover 0..K-1.
    """
    if reduction not in ("mean", "max"):
        raise ValueError(f"`reduction` of logits must be 'mean' or 'max', got {reduction!r}.")
    if num_classes is None:
        num_classes = count_classes(class_ids, logits.shape[-1] - 1)
    prompts, no_object = logits[..., :-1], logits[..., -1:]
    if torch.jit.is_tracing():
        return torch.cat([_reduce_without_scattering(prompts, class_ids, reduction, num_classes), no_object], dim=-1)
    index = class_ids.to(logits.device).expand_as(prompts)
    reduced = prompts.new_zeros(*prompts.shape[:-1], num_classes)
    reduced = reduced.scatter_reduce(-1, index, prompts, "mean" if reduction == "mean" else "amax", include_self=False)
    return torch.cat([reduced, no_object], dim=-1)


def _reduce_without_scattering(prompts: Tensor, class_ids: Tensor, reduction: str, num_classes: int) -> Tensor:
    """Reduce (..., P) to (..., K) by comparing all pairs of ids, since ONNX has no equivalent of `scatter_reduce`."""
    is_member = class_ids[:, None] == torch.arange(num_classes, device=class_ids.device)  # (P, K)
    if reduction == "max":
        return torch.where(is_member, prompts[..., None], -torch.inf).amax(dim=-2)
    return torch.where(is_member, prompts[..., None], 0.0).sum(dim=-2) / is_member.sum(dim=0)


def average_class_embeds(class_embeds: Tensor, class_ids: Tensor, num_classes: int | None = None) -> Tensor:
    """Average the prompt embeddings of each class and normalize the averages.

    Args:
        class_embeds: (P, D) embeddings of prompts.
        class_ids: (P,) class of each prompt, 0..K-1.
        num_classes: K, if known; `class_ids` are not checked then.

    Returns:
        (K, D) L2-normalized embeddings.
    """
    if num_classes is None:
        num_classes = count_classes(class_ids, len(class_embeds))
    if torch.jit.is_tracing():
        return F.normalize(_reduce_without_scattering(class_embeds.T, class_ids, "mean", num_classes).T, dim=-1)
    sums = class_embeds.new_zeros(num_classes, class_embeds.shape[-1])
    return F.normalize(sums.index_add(0, class_ids.to(class_embeds.device), class_embeds), dim=-1)


def average_templates(
    prompt_embeds: Tensor, class_ids: Tensor | None, name_ids: Tensor, prompts_per_name: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Average the embeddings of each name over its prompts, one per template.

    Args:
        prompt_embeds: (P, D) embeddings of prompts.
        class_ids: (P,) class of each prompt, or None if each name is a class.
        name_ids: (P,) name of each prompt, 0..N-1.
        prompts_per_name: (N,) number of prompts of each name; required in a traced graph, see `count_classes`.

    Returns:
        (N, D) L2-normalized embeddings of the names, and the class (N,) of each name or None.

    Raises:
        ValueError: `name_ids` do not cover 0..N-1, or a name has prompts of several classes.
    """
    num_names = count_classes(name_ids, len(prompt_embeds), "name_ids", prompts_per_name, "prompts_per_name")
    embeds = average_class_embeds(prompt_embeds, name_ids, num_names)
    if class_ids is None:
        return embeds, None
    classes = class_ids.new_zeros(num_names).scatter_(0, name_ids, class_ids)
    if not is_tracing(class_ids) and not torch.equal(classes[name_ids], class_ids):
        raise ValueError("`name_ids` assigns prompts of several classes to one name: give each class its own names.")
    return embeds, classes


def equal_classes(class_embeds: Tensor, class_ids: Tensor) -> list[list[int]]:
    """Find groups of classes whose sets of name embeddings are equal up to rounding.

    Two classes that share a name are not equal if one of them has a further name.

    Args:
        class_embeds: (N, D) embeddings of names.
        class_ids: (N,) class of each name.

    Returns:
        Groups of two or more classes, by index.
    """
    tolerance = SAME_TEXT if class_embeds.dtype in (torch.float32, torch.float64) else SAME_TEXT_IN_HALF
    units = F.normalize(class_embeds.detach().cpu().double(), dim=-1)
    first_equal = torch.cat([(part @ units.T >= 1 - tolerance).int().argmax(dim=1) for part in units.split(1024)])
    texts: dict[int, set[int]] = {}
    for class_id, text in zip(class_ids.tolist(), first_equal.tolist(), strict=True):
        texts.setdefault(class_id, set()).add(text)
    groups: dict[frozenset[int], list[int]] = {}
    for class_id in sorted(texts):
        groups.setdefault(frozenset(texts[class_id]), []).append(class_id)
    return [group for group in groups.values() if len(group) > 1]


__all__ = [
    "GKCClassEmbeddings",
    "TextEmbeddingCache",
    "average_class_embeds",
    "average_templates",
    "check_class_embeds",
    "check_prompts",
    "count_classes",
    "equal_classes",
    "has_adapters",
    "reduce_prompt_logits",
    "weights_state",
]
