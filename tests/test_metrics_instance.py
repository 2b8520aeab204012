"""Tests of average precision against manual examples and pycocotools, and tests of merging."""

import json
import math
from itertools import permutations

import numpy as np
import pytest
from pycocotools import mask as coder
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from train.metrics import InstanceMetric

CLASSES = 4
# pycocotools divides by the sum of right and wrong detections and a smallest float: a perfect score is 1 - 2e-16.
ROUNDED = 1e-12


def segment(segment_id, category_id, iscrowd=False):
    return {"id": segment_id, "category_id": category_id, "iscrowd": iscrowd}


def row(text):
    """Return one row of ids for a string such as "1 1 2"."""
    return np.array([[int(word) for word in text.split()]])


def found(ids, wanted, category_id, score):
    return {"category_id": category_id, "score": score, "mask": ids == wanted}


def scored(*images, num_classes=CLASSES, **options):
    metric = InstanceMetric(num_classes, **options)
    for image in images:
        metric.update(*image)
    return metric


def random_images(number=6, side=32, seed=0):
    """Draw rectangles of four classes, some of them crowds, and shifted or misclassified detections of them."""
    draw = np.random.default_rng(seed)
    for image in range(number):
        ids, truths, detections = np.zeros((side, side + 3), dtype=np.int32), [], []
        for name in range(1, 8):
            y, x, height, width = *draw.integers(0, side - 12, 2), *draw.integers(6, 13, 2)
            truths.append(segment(name * 1000, int(draw.integers(-1, CLASSES)), bool(draw.random() < 1 / 6)))
            ids[y : y + height, x : x + width] = name * 1000
        for true in truths * 2:
            mask = np.roll(ids == true["id"], draw.integers(-1, 2, 2), (0, 1))
            category = true["category_id"] if draw.random() < 0.8 else draw.integers(CLASSES)
            if mask.any() and category >= 0:
                detections.append({"category_id": category, "score": draw.integers(1, 9) / 8, "mask": mask})
        yield f"image {image:03}", detections, ids, truths


def by_file(images, folder, num_classes=CLASSES):
    """Run pycocotools as published: two JSON files and its default parameters."""
    annotations, results, sizes = [], [], []
    for place, (_, detections, ids, truths) in enumerate(images):
        sizes.append({"id": place, "height": ids.shape[0], "width": ids.shape[1]})
        masks = [(true["category_id"], true["iscrowd"], ids == true["id"], None) for true in truths]
        masks += [(one["category_id"], False, one["mask"], one["score"]) for one in detections]
        for category, crowd, mask, score in masks:
            if category < 0 or not mask.any():
                continue
            code = coder.encode(np.asfortranarray(mask.astype(np.uint8)))
            entry = {
                "image_id": place,
                "category_id": int(category) + 1,
                "segmentation": {"size": code["size"], "counts": code["counts"].decode()},
            }
            if score is None:
                box, area = coder.toBbox(code).tolist(), int(mask.sum())
                annotations.append(
                    entry | {"id": len(annotations) + 1, "iscrowd": int(crowd), "bbox": box, "area": area}
                )
            else:
                results.append(entry | {"score": float(score)})
    categories = [{"id": index + 1, "name": str(index)} for index in range(num_classes)]
    truth = {"images": sizes, "annotations": annotations, "categories": categories}
    (folder / "truth.json").write_text(json.dumps(truth))
    (folder / "results.json").write_text(json.dumps(results))
    annotated = COCO(str(folder / "truth.json"))
    evaluation = COCOeval(annotated, annotated.loadRes(str(folder / "results.json")), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return evaluation


def test_manual_example():
    ids = row("1 1 1 1 2 2 2 2 0 0 0 0")
    truths = [segment(1, 0), segment(2, 0)]
    half = np.zeros(ids.shape, dtype=bool)
    half[0, 4:7] = True  # 3 of 4 pixels: correct up to IoU 0.75
    detections = [
        found(ids, 1, 0, 0.9),
        found(ids, 0, 0, 0.8),  # on background
        {"category_id": 0, "score": 0.7, "mask": half},
    ]
    scores = scored(("a", detections, ids, truths)).compute()
    # Precision 1 up to recall 1/2 (51 of 101 recalls), then 2/3 at thresholds where the third is correct, else 0.
    right, wrong = (51 + 50 * 2 / 3) / 101, 51 / 101
    assert scores["ap50"] == pytest.approx(right, abs=ROUNDED)
    assert scores["ap75"] == pytest.approx(right, abs=ROUNDED)
    assert scores["ap"] == pytest.approx(0.6 * right + 0.4 * wrong, abs=ROUNDED)
    assert scores["per_class"]["ap50"] == [pytest.approx(right), None, None, None]


def test_crowd_regions_are_ignored():
    ids = row("1 1 1 1 2 2 2 2")
    on_crowd, right = found(ids, 2, 0, 0.9), found(ids, 1, 0, 0.5)
    crowd = scored(("a", [on_crowd, right], ids, [segment(1, 0), segment(2, 0, True)])).compute()
    assert crowd["ap"] == pytest.approx(1.0, abs=ROUNDED)
    other = scored(("a", [on_crowd, right], ids, [segment(1, 0), segment(2, 1, True)])).compute()
    assert other["ap"] == pytest.approx(0.5, abs=ROUNDED)
    all_crowd = scored(("a", [on_crowd], ids, [segment(1, 0, True), segment(2, 0, True)])).compute()
    assert all_crowd["ap"] is None
    assert all_crowd["per_class"]["ap"] == [None] * CLASSES


def test_void_is_background():
    ids = row("1 1 1 1 2 2 2 2")
    detections = [found(ids, 2, 0, 0.9), found(ids, 1, 0, 0.5)]
    assert scored(("a", detections, ids, [segment(1, 0), segment(2, -1)])).compute()["ap"] == pytest.approx(
        0.5, abs=ROUNDED
    )


def test_empty_predictions_empty_truth_and_one_pixel():
    ids, truths = row("1 1 0"), [segment(1, 2)]
    assert scored(("a", [], ids, truths)).compute()["ap"] == 0.0
    assert scored(("a", [], ids * 0, [])).compute()["ap"] is None
    assert scored(("a", [found(ids, 0, 2, 0.5)], ids * 0, truths)).compute()["ap"] is None  # a segment without pixels
    assert scored().compute() == {
        **{name: None for name in ("ap", "ap50", "ap75")},
        "per_class": {name: [None] * CLASSES for name in ("ap", "ap50", "ap75")},
    }
    one = row("7")
    assert scored(("a", [found(one, 7, 3, 0.1)], one, [segment(7, 3)])).compute()["ap"] == pytest.approx(
        1.0, abs=ROUNDED
    )


def test_matches_pycocotools(tmp_path, within, capsys):
    images = list(random_images(12))
    scores = scored(*images).compute()
    assert capsys.readouterr().out == ""
    evaluation = by_file(images, tmp_path)
    within("AP, AP50, AP75: pycocotools", np.abs(evaluation.stats[:3] - list(scores.values())[:3]).max(), 1e-15)
    assert 0.1 < scores["ap"] < scores["ap50"] < 0.9
    for index, ours in enumerate(scores["per_class"]["ap"]):
        precision = evaluation.eval["precision"][:, :, index, 0, -1]
        within("AP of classes: pycocotools", abs(math.fsum(precision.flat) / precision.size - ours), 1e-15)


def test_all_kinds_of_run_lengths_are_accepted():
    ids = np.zeros((5, 6), dtype=np.uint8)
    ids[1:3, 2:5] = 1
    packed = coder.encode(np.asfortranarray(ids))
    counts = [11, 2, 3, 2, 3, 2, 7]  # in column order, starting with background
    masks = [
        ids.astype(bool),
        packed,
        {"size": [5, 6], "counts": packed["counts"].decode()},
        {"size": [5, 6], "counts": counts},
    ]
    states = []
    for mask in masks:
        metric = scored(("a", [{"category_id": 0, "score": 0.5, "mask": mask}], ids, [segment(1, 0)]))
        assert metric.compute()["ap"] == pytest.approx(1.0, abs=ROUNDED)
        states.append({name: array.tolist() for name, array in metric.state().items()})
    assert states == [states[0]] * 4


@pytest.mark.parametrize("counts", [[10], [-1, 31], [1.5, 28.5], "0", b"oooooooo0", None])
def test_invalid_run_lengths_raise(counts):
    ids = np.ones((5, 6), dtype=np.uint8)
    detection = {"category_id": 0, "score": 0.5, "mask": {"size": [5, 6], "counts": counts}}
    with pytest.raises(ValueError, match="of the encoding"):
        scored(("a", [detection], ids, [segment(1, 0)]))


def test_state_with_invalid_run_lengths_raises():
    ids = np.ones((5, 6), dtype=np.uint8)
    state = scored(("a", [found(ids, 1, 0, 0.5)], ids, [segment(1, 0)])).state()
    state["detections_runs"][-1] += 1
    with pytest.raises(ValueError, match="of the encoding"):
        InstanceMetric.from_state(state)


def test_scores_of_things_only():
    ids = row("1 1 2 2")
    image = ("a", [found(ids, 1, 0, 0.5)], ids, [segment(1, 0), segment(2, 3)])
    assert scored(image).compute()["ap"] == pytest.approx(0.5, abs=ROUNDED)
    assert scored(image).compute(classes=[0, 1])["ap"] == pytest.approx(1.0, abs=ROUNDED)
    things = scored(image, is_thing=[True, True, True, False])
    assert things.compute()["ap"] == pytest.approx(1.0, abs=ROUNDED)
    assert InstanceMetric.from_state(things.state()).compute() == things.compute()


def test_847_classes():
    ids = np.arange(1, 848).reshape(7, 121)
    truths = [segment(int(name), int(name) - 1) for name in ids.ravel()]
    detections = [found(ids, name, name - 1, 0.5) for name in range(1, 848, 2)]
    scores = scored(("a", detections, ids, truths), num_classes=847).compute()
    assert scores["ap"] == pytest.approx(424 / 847, abs=ROUNDED)
    assert scores["per_class"]["ap"] == pytest.approx([1.0, 0.0] * 423 + [1.0], abs=ROUNDED)


def test_merging_is_exact_in_any_order_and_through_files(tmp_path):
    images = list(random_images())
    whole = scored(*images)
    expected = whole.compute()
    for place, part in enumerate((images[:1], images[1:4], images[4:])):
        np.savez(tmp_path / f"{place}.npz", **scored(*part).state())
    for order in permutations(range(3)):
        merged = InstanceMetric(CLASSES)
        for place in order:
            with np.load(tmp_path / f"{place}.npz") as state:
                merged.merge(InstanceMetric.from_state(state))
        assert all(np.array_equal(merged.state()[name], array) for name, array in whole.state().items())
        assert merged.compute() == expected


def test_permuting_classes_permutes_scores():
    order = [2, 0, 3, 1]
    images, changed = list(random_images()), []
    for image_id, detections, ids, truths in images:
        renamed = (
            [{**entry, "category_id": [*order, -1][entry["category_id"]]} for entry in entries]
            for entries in (detections, truths)
        )
        detections, truths = renamed
        changed.append((image_id, detections, ids, truths))
    scores, permuted = scored(*images).compute(), scored(*changed).compute()
    assert [permuted["per_class"]["ap"][new] for new in order] == scores["per_class"]["ap"]
    assert permuted["ap"] == scores["ap"]


def test_perfect_prediction_scores_one():
    images = []
    for image_id, _, ids, truths in random_images():
        truths = [segment(true["id"], max(true["category_id"], 0)) for true in truths]
        detections = [found(ids, true["id"], true["category_id"], 0.3) for true in truths if true["id"] in ids]
        images.append((image_id, detections, ids, truths))
    assert scored(*images).compute()["ap"] == pytest.approx(1.0, abs=ROUNDED)


def test_invalid_input_raises():
    ids, truths = row("1 1 0"), [segment(1, 2)]
    metric = scored(("a", [], ids, truths))
    with pytest.raises(ValueError, match="Image 'a' was added before"):
        metric.update("a", [], ids, truths)
    with pytest.raises(ValueError, match=r"1 images are in both metrics, such as \['a'\]"):
        metric.merge(scored(("a", [], ids, truths)))
    with pytest.raises(ValueError, match=r"A mask is \(1, 2\) \(height, width\), its image \(1, 3\)"):
        metric.update("b", [{"category_id": 0, "score": 1, "mask": np.ones((1, 2), bool)}], ids, truths)
    for category_id, score in ((4, 0.5), (-1, 0.5), (0, np.nan)):
        with pytest.raises(ValueError, match="'b': a detection needs a class from 0 to 3 and a finite score"):
            metric.update("b", [found(ids, 1, category_id, score)], ids, truths)
    with pytest.raises(ValueError, match=r"Ids \[1\] of the truth are not in its segments \[5\]"):
        metric.update("b", [], ids, [segment(5, 2)])
    with pytest.raises(ValueError, match="`is_thing` has 1 entries"):
        InstanceMetric(2, [True])
    with pytest.raises(ValueError, match="it lacks"):
        InstanceMetric.from_state({"num_classes": np.array(2)})
    assert len(metric.images) == 1
