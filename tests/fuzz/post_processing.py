"""Fuzzer of post-processing with arguments of every kind, compared with a plain implementation in fp64.

Each input is a call of a public function or processor method. Either all of its arguments are valid, and the result
must equal that of the plain implementation; or one of them is invalid, and a ValueError must name it.
"""

import contextlib
import itertools
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from modeling_gkc import GKCImageProcessor
from modeling_gkc.argument_checks import shown
from modeling_gkc.mask_resampling import resize_masks
from modeling_gkc.post_processing import (
    decode_rle,
    instance_segmentation,
    panoptic_segmentation,
    semantic_scores,
    semantic_segmentation,
    semantic_segments,
    void_label,
)

INVALID_FRACTIONS = [
    math.nan,
    math.inf,
    -math.inf,
    -0.1,
    "0.5",
    True,
    [0.5],
    torch.tensor([0.1, 0.2]),
    10**400,
    1j,
    {},
]
INVALID_SIZES = [
    "ab",
    3,
    (3,),
    (3, 4, 5),
    (3, 4.5),
    (0, 3),
    (-1, 3),
    (2**20, 2**20),
    (math.nan, 3),
    ("3", "4"),
    {3, 4},
]
INVALID_IDS = [5, "12", b"\1", [-1], [99], [0.5], ["0"], [[0]], torch.tensor(1), np.array(1), [math.nan], [True], None]
INVALID_VOID_IDS = [math.nan, 2.5, "0", 2**70, [3], True, math.inf]
INVALID_FLAGS = ["no", 1, None, [], 0.0, "False"]
INVALID_COUNTS = [0, -1, 1.5, "5", None, math.nan, math.inf, True, [3]]
INVALID_LOGITS = [
    "text",
    None,
    5,
    [[1.0, 2.0]],
    np.zeros((3, 4), dtype=np.float32),
    torch.zeros(3, 4, dtype=torch.int64),
]
INVALID_LOGITS += [torch.zeros(3, 4, dtype=torch.bool), torch.zeros(3, 4, dtype=torch.complex64), torch.zeros(())]
TOLERANCE = 1e-5


class Ambiguous(Exception):
    """Error raised when a value is so close to its threshold that rounding decides."""


@dataclass
class Call:
    """Call of a function.

    Args:
        name: Name of the function, see `_run`.
        arguments: Its arguments.
        invalid: Names of which the error must contain one; empty if the call must be accepted.
    """

    name: str
    arguments: dict[str, Any]
    invalid: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        arguments = ", ".join(f"{name}={shown(value)}" for name, value in self.arguments.items())
        return f"{self.name}({arguments}), invalid: {self.invalid}"


def setup(folder: Path) -> GKCImageProcessor:
    torch.set_num_threads(1)
    return GKCImageProcessor()


def check(processor: GKCImageProcessor, rng: random.Random) -> str:
    call = _draw(rng)
    if rng.random() < 0.55:
        _spoil(call, rng)
    try:
        result = _run(processor, call)
    except ValueError as error:
        assert call.invalid, f"{call} was rejected: {error}"
        assert any(name in str(error) for name in call.invalid), (
            f"{call}: the error does not name the argument: {error}"
        )
        return "refused"
    assert not call.invalid, f"{call.name}: an invalid {call.invalid[0]} was accepted: {call}"
    with contextlib.suppress(Ambiguous):
        _compare(call, result)
    return "accepted"


def _draw(rng: random.Random) -> Call:
    name = rng.choice(["semantic", "panoptic", "instance", "scores", "resize", "segments", "void_label"])
    if name == "void_label":
        return Call(name, {"num_classes": rng.choice([0, 1, 255, 256, 65535, 65536, np.int64(7), 2**31 - 1])})
    torch.manual_seed(rng.randrange(2**31))
    queries, classes, grid = rng.randint(1, 6), rng.choice([1, 2, 5, 70]), (rng.randint(1, 7), rng.randint(1, 9))
    spread = rng.choice([0.3, 2.0, 4.0])
    dtype = rng.choice([torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16])
    class_logits = (spread * torch.randn(queries, classes + 1)).to(dtype)
    mask_logits = (spread * torch.randn(queries, *grid)).to(dtype)
    content = rng.choice([None, tuple(rng.randint(1, 4 * side) for side in grid)])
    target = rng.choice([None, (rng.randint(1, 20), rng.randint(1, 20)), np.array([5, 6]), torch.tensor([3, 8])])
    sizes = {"content_size": content, "target_size": target}
    if name == "segments":
        shape = (rng.randint(1, 9), rng.randint(1, 9))
        return Call(
            name,
            {
                "class_map": torch.randint(-1, classes + 2, shape),
                "scores": torch.rand(shape),
                "num_classes": classes,
            },
        )
    if name == "resize":
        return Call(name, {"mask_logits": mask_logits, **sizes})
    arguments = {"class_logits": class_logits, "mask_logits": mask_logits, **sizes}
    if name == "scores":
        return Call(name, arguments)
    void_ids = rng.sample(range(classes), rng.randint(0, min(classes, 2)))
    arguments["void_label_ids"] = rng.choice([void_ids, tuple(void_ids), set(void_ids), torch.tensor(void_ids).long()])
    arguments["void_id"] = rng.choice([None, -7, 2**31 - 1, np.int64(-1), -3.0])
    limit = queries if name == "semantic" else 1
    arguments["void_threshold"] = rng.choice([None, 0, limit * rng.random(), np.float32(limit * rng.random()), limit])
    if name == "semantic":
        return Call(name, arguments)
    for threshold in ("threshold", "mask_threshold", "overlap_mask_area_threshold"):
        arguments[threshold] = rng.choice([0, 0.5, rng.random(), np.float64(rng.random()), torch.tensor(0.3), 1])
    if name == "panoptic":
        arguments["label_ids_to_fuse"] = rng.sample(range(classes), rng.randint(0, classes))
    else:
        arguments["top_k"] = rng.choice([1, 5, 100, np.int64(3), 10**12, 4.0])
        arguments[rng.choice(["return_binary_maps", "return_coco_annotation"])] = rng.choice([True, False, np.True_])
    return Call(name, arguments)


def _spoil(call: Call, rng: random.Random) -> None:
    """Replace one argument by an invalid one."""
    name = rng.choice(sorted(call.arguments))
    if name in ("class_map", "scores"):
        return _spoil_map(call, name, rng)
    good = call.arguments[name]
    call.invalid = [name]
    if name == "class_logits":
        value = rng.choice(
            [*INVALID_LOGITS, good[:, :1], good[:0], good[None], good.repeat(2, 1), *_spoiled(good, rng)]
        )
        call.invalid = ["class_logits", "class logits"]
    elif name == "mask_logits":
        value = rng.choice([*INVALID_LOGITS, good[0], good[None], good[:, :0], *_spoiled(good, rng)])
        call.invalid = ["mask_logits", "mask logits", "masks of"]
        if call.name == "resize":
            value = rng.choice([*INVALID_LOGITS, good[0], good[None], good[:, :, :0]])
    elif name in ("content_size", "target_size"):
        grid = call.arguments["mask_logits"].shape[-2:]
        too_large = [(4 * grid[0] + 1, 4), (10**9, 1)] if name == "content_size" else []
        value = rng.choice([*INVALID_SIZES, *too_large])
        call.invalid = [name, "`content_size`"]
    elif name in ("void_label_ids", "label_ids_to_fuse"):
        value = rng.choice(INVALID_IDS)
    elif name == "void_id":
        shown = set(range(call.arguments["class_logits"].shape[1] - 1))
        shown -= {int(index) for index in call.arguments["void_label_ids"]}
        taken = sorted(shown)[:1] if call.name == "semantic" else [1]
        value = rng.choice([*INVALID_VOID_IDS, *taken])
    elif name.startswith("return_"):
        value = rng.choice(INVALID_FLAGS)
    elif name in ("top_k", "num_classes"):
        value = rng.choice(
            [*INVALID_COUNTS[1 if call.name == "void_label" else 0 :], *([2**31] * (call.name == "void_label"))]
        )
    else:
        above = len(call.arguments["class_logits"]) + 0.5 if call.name == "semantic" else 1.5
        value = rng.choice([*INVALID_FRACTIONS, above, *([None] * (name != "void_threshold"))])
    call.arguments[name] = value
    return None


def _spoiled(logits: torch.Tensor, rng: random.Random) -> list[torch.Tensor]:
    """Return logits of which one is not finite."""
    spoiled = logits.clone()
    spoiled[(..., *(rng.randrange(side) for side in spoiled.shape))] = rng.choice([math.nan, math.inf])
    return [spoiled]


def _spoil_map(call: Call, name: str, rng: random.Random) -> None:
    class_map, scores = call.arguments["class_map"], call.arguments["scores"]
    values = {
        "class_map": [class_map.float(), class_map > 0, class_map[0], class_map.numpy(), "map", None],
        "scores": [scores.long(), scores[:, :-1], scores.numpy(), scores * math.nan, scores / 0, 0.5, None],
    }
    call.arguments[name], call.invalid = rng.choice(values[name]), [name]


def _run(processor: GKCImageProcessor, call: Call) -> Any:
    functions = {
        "semantic": semantic_segmentation,
        "panoptic": panoptic_segmentation,
        "instance": instance_segmentation,
        "scores": semantic_scores,
        "resize": resize_masks,
        "segments": semantic_segments,
        "void_label": void_label,
    }
    result = functions[call.name](**call.arguments)
    if call.name in ("semantic", "panoptic", "instance") and not call.invalid:
        by_method = _by_method(processor, call)
        expected = result[0] if call.name == "semantic" else result["segmentation"]
        got = by_method if call.name == "semantic" else by_method["segmentation"]
        assert torch.equal(got, expected) if torch.is_tensor(expected) else got == expected, f"{call}: method"
    return result


def _by_method(processor: GKCImageProcessor, call: Call) -> Any:
    """Run the processor's method on a batch, with the call's arguments for the second image."""
    arguments = dict(call.arguments)
    class_logits, masks = arguments.pop("class_logits"), arguments.pop("mask_logits")
    content, target = arguments.pop("content_size"), arguments.pop("target_size")
    outputs = {
        "class_queries_logits": class_logits.expand(2, -1, -1),
        "masks_queries_logits": masks.expand(2, -1, -1, -1),
        "content_sizes": [None, content],
    }
    method = getattr(processor, f"post_process_{call.name}_segmentation")
    return method(outputs, target_sizes=[(1, 1), target], **arguments)[1]


def _compare(call: Call, result: Any) -> None:
    arguments = call.arguments
    if call.name == "void_label":
        assert result >= arguments["num_classes"] and result in (255, 65535, 2**31 - 1), f"{call}: {result}"
    elif call.name == "segments":
        assert result == _direct_segments(**arguments), f"{call}: {result}"
    elif call.name == "resize":
        masks = _resized(arguments["mask_logits"], arguments["content_size"], arguments["target_size"])
        np.testing.assert_allclose(result.numpy(), masks, rtol=0, atol=1e-3)
    else:
        masks = _sigmoid(_resized(arguments["mask_logits"], arguments["content_size"], arguments["target_size"]))
        logits = arguments["class_logits"].double().numpy()
        scores = np.exp(logits - logits.max(1, keepdims=True))
        scores /= scores.sum(1, keepdims=True)
        {
            "scores": _check_scores,
            "semantic": _check_semantic,
            "panoptic": _check_panoptic,
            "instance": _check_instance,
        }[call.name](call, result, scores, masks)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits))


def _resized(masks: torch.Tensor, content: Any, target: Any) -> np.ndarray:
    """Interpolate bilinearly between pixel centers in fp64."""
    masks = masks.double().numpy()
    extent = [side / 4 for side in content] if content is not None else list(masks.shape[1:])
    cut = [math.ceil(side) for side in extent]
    masks = masks[:, : cut[0], : cut[1]]
    if target is None:
        return masks
    for axis in (0, 1):
        size = int(target[axis])
        position = np.clip((np.arange(size) + 0.5) * extent[axis] / size - 0.5, 0, cut[axis] - 1)
        below = np.minimum(np.floor(position).astype(int), cut[axis] - 1)
        above, share = np.minimum(below + 1, cut[axis] - 1), position - below
        shape = (1, -1, 1) if axis == 0 else (1, 1, -1)
        share = share.reshape(shape)
        masks = masks.take(below, axis + 1) * (1 - share) + masks.take(above, axis + 1) * share
    return masks


def _reaches(values: Any, threshold: float) -> Any:
    """Return values >= threshold unless rounding decides."""
    if np.any(np.abs(np.asarray(values) - threshold) < TOLERANCE):
        raise Ambiguous
    return values >= threshold


def _best(values: np.ndarray) -> np.ndarray:
    """Return the argmax along the first axis unless rounding decides."""
    ordered = np.sort(values, axis=0)
    if len(values) > 1 and np.any(ordered[-1] - ordered[-2] < TOLERANCE):
        raise Ambiguous
    return values.argmax(0)


def _check_scores(call: Call, result: torch.Tensor, scores: np.ndarray, masks: np.ndarray) -> None:
    expected = np.einsum("qk,qhw->khw", scores[:, :-1], masks)
    assert np.abs(result.numpy() - expected).max() < 1e-3, f"{call}"


def _check_semantic(call: Call, result: Any, scores: np.ndarray, masks: np.ndarray) -> None:
    labels, best = result
    sums = np.einsum("qk,qhw->khw", scores[:, :-1], masks)
    assert np.abs(best.numpy() - sums.max(0)).max() < 1e-3, f"{call}"
    winners = _best(sums)
    void = np.isin(winners, [int(index) for index in call.arguments["void_label_ids"]])
    if call.arguments["void_threshold"] is not None:
        void |= ~_reaches(sums.max(0), float(call.arguments["void_threshold"]))
    void_id = call.arguments["void_id"]
    value = labels.numpy()[void]
    assert np.array_equal(labels.numpy()[~void], winners[~void]), f"{call}: {labels} instead of {winners}"
    assert np.all(value == (255 if void_id is None else int(void_id))), f"{call}: void is {np.unique(value)}"


def _check_panoptic(call: Call, result: Any, scores: np.ndarray, masks: np.ndarray) -> None:
    given = {name: value for name, value in call.arguments.items() if "threshold" in name}
    given = {name: None if value is None else float(value) for name, value in given.items()}
    void_classes = {int(index) for index in call.arguments["void_label_ids"]}
    labels, best = _best(scores.T), scores.max(1)
    is_class = labels < scores.shape[1] - 1
    kept = np.flatnonzero(is_class & (_reaches(best, given["threshold"]) | ~is_class))
    void_id = 0 if call.arguments["void_id"] is None else int(call.arguments["void_id"])
    expected, segments, fused = np.full(masks.shape[1:], void_id), [], {}
    if len(kept):
        weighted = best[kept, None, None] * masks[kept]
        winner = _best(weighted)
        inside = _reaches(masks[kept], given["mask_threshold"])
        clear = np.ones(winner.shape, bool)
        if given["void_threshold"] is not None:
            clear = _reaches(weighted.max(0), given["void_threshold"])
        for index, query in enumerate(kept):
            shows = (winner == index) & inside[index] & clear
            share = (winner == index).sum() >= given["overlap_mask_area_threshold"] * inside[index].sum()
            label = int(labels[query])
            if not (shows.any() and share) or label in void_classes:
                continue
            if label not in fused:
                is_fused = label in call.arguments["label_ids_to_fuse"]
                segments.append({"label_id": label, "was_fused": is_fused, "score": best[query]})
                number = len(segments)
                fused |= {label: number} if is_fused else {}
            else:
                number = fused[label]
                segments[number - 1]["score"] = max(segments[number - 1]["score"], best[query])
            expected[shows] = number
    assert np.array_equal(result["segmentation"].numpy(), expected), f"{call}: {result} instead of {expected}"
    _compare_segments(call, result["segments_info"], segments)


def _compare_segments(call: Call, found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [segment["id"] for segment in found] == list(range(1, len(expected) + 1)), f"{call}: {found}"
    for segment, other in zip(found, expected, strict=True):
        assert (segment["label_id"], segment["was_fused"]) == (other["label_id"], other["was_fused"]), (
            f"{call}: {found}"
        )
        assert abs(segment["score"] - other["score"]) < 1e-3, f"{call}: {found}"


def _check_instance(call: Call, result: Any, scores: np.ndarray, masks: np.ndarray) -> None:
    given = {name: value for name, value in call.arguments.items() if "threshold" in name}
    given = {name: None if value is None else float(value) for name, value in given.items()}
    void_classes = {int(index) for index in call.arguments["void_label_ids"]}
    pairs = [(scores[query, label], query, label) for query, label in np.ndindex(len(scores), scores.shape[1] - 1)]
    pairs = sorted(pairs, key=lambda item: -item[0])
    count = min(int(call.arguments["top_k"]), len(pairs))
    if count < len(pairs) and pairs[count - 1][0] - pairs[count][0] < TOLERANCE:
        raise Ambiguous
    inside = _reaches(masks, given["mask_threshold"])
    ranked = []
    for class_score, query, label in pairs[:count]:
        area = inside[query].sum()
        score = class_score * masks[query][inside[query]].mean() if area else 0.0
        if area and _reaches(class_score, given["threshold"]) and _reaches(score, given["threshold"]):
            ranked.append((score, class_score, query, label))
    ranked.sort(key=lambda item: -item[0])
    if any(first[0] - second[0] < TOLERANCE for first, second in itertools.pairwise(ranked)):
        raise Ambiguous
    whole = call.arguments.get("return_binary_maps") or call.arguments.get("return_coco_annotation")
    taken, void_taken = np.zeros((2, *masks.shape[1:]), bool)
    visible_parts, segments = [], []
    for score, class_score, query, label in ranked:
        visible = inside[query] & ~(void_taken if whole else taken)
        clear = visible.copy()
        if given["void_threshold"] is not None:
            clear &= _reaches(class_score * masks[query], given["void_threshold"])
        share = whole or visible.sum() >= given["overlap_mask_area_threshold"] * inside[query].sum()
        if clear.any() and share and label not in void_classes:
            segments.append({"label_id": label, "was_fused": False, "score": score})
            visible_parts.append(clear)
        taken |= inside[query]
        void_taken |= inside[query] & (label in void_classes)
    _compare_segments(call, result["segments_info"], segments)
    if whole:
        found = result["segmentation"]
        found = found.numpy() if torch.is_tensor(found) else [decode_rle(code) for code in found]
        assert len(found) == len(visible_parts) and all(map(np.array_equal, found, visible_parts)), f"{call}: {found}"
        return
    void_id = call.arguments["void_id"]
    expected = np.full(masks.shape[1:], -1 if void_id is None else int(void_id))
    for number, mask in enumerate(visible_parts, start=1):
        expected[mask] = number
    assert np.array_equal(result["segmentation"].numpy(), expected), f"{call}: {result} instead of {expected}"


def _direct_segments(class_map: torch.Tensor, scores: torch.Tensor, num_classes: int) -> list[dict[str, Any]]:
    found = []
    for index in range(num_classes):
        inside = class_map == index
        if inside.any():
            found.append(
                {"id": index, "label_id": index, "score": float(scores[inside].double().sum() / inside.sum())}
            )
    return found
