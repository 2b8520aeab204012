"""Tests of panoptic quality against manual examples, a loop over pixels, and torchmetrics."""

from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchmetrics.detection import PanopticQuality

from train.metrics import PanopticMetric, match_image

quick = settings(max_examples=30, deadline=None)
IS_THING = [True, True, False, False]
THINGS, STUFF = [0, 1], [2, 3]


def segment(segment_id, category_id, iscrowd=False):
    return {"id": segment_id, "category_id": category_id, "iscrowd": iscrowd}


def row(text):
    """Return one row of ids for a string such as "1 1 2"."""
    return np.array([[int(word) for word in text.split()]])


def scored(*images, is_thing=IS_THING):
    metric = PanopticMetric(is_thing)
    for image in images:
        metric.update(*image)
    return metric


def counts(scores, index):
    of_class = scores["per_class"][index]
    return tuple(of_class[f"{name}s"] for name in ("true_positive", "false_positive", "false_negative"))


@st.composite
def panoptic_images(draw, crowd=True, least_class=-1):
    """Draw a predicted and a true map with few ids on few pixels, so that all kinds of overlap occur."""
    shape = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    sides = []
    for is_truth in (False, True):
        ids = np.array(draw(st.lists(st.integers(0, 4), min_size=shape[0] * shape[1], max_size=shape[0] * shape[1])))
        names = draw(st.lists(st.integers(1, 2**24 - 1), min_size=5, max_size=5, unique=True))
        segments = [
            segment(names[i], draw(st.integers(least_class, 3)), is_truth and crowd and draw(st.booleans()))
            for i in range(1, 5)
        ]
        sides += [np.array([0, *names[1:]])[ids].reshape(shape), segments]
    return tuple(sides)


def walked(images, is_thing=IS_THING):
    """Compute TP, FP, FN and the IoU sum of each class from sets of pixels, one pair of segments at a time."""
    totals = [[0, 0, 0, Fraction(0)] for _ in is_thing]
    for ids, segments, truth_ids, truth_segments in images:

        def pixels(array, wanted):
            return {(y, x) for y, x in np.ndindex(array.shape) if array[y, x] == wanted}

        void = pixels(truth_ids, 0)
        for true in truth_segments:
            void |= pixels(truth_ids, true["id"]) if true["category_id"] == -1 else set()
        matched_truth, matched = set(), set()
        for found in segments:
            for true in truth_segments:
                if true["category_id"] != found["category_id"] or true["category_id"] == -1 or true["iscrowd"]:
                    continue
                p, g = pixels(ids, found["id"]) - void, pixels(truth_ids, true["id"])
                if g | p and Fraction(len(p & g), len(p | g)) > Fraction(1, 2):
                    assert found["id"] not in matched and true["id"] not in matched_truth
                    matched.add(found["id"])
                    matched_truth.add(true["id"])
                    totals[found["category_id"]][0] += 1
                    totals[found["category_id"]][3] += Fraction(len(p & g), len(p | g))
        for found in segments:
            p = pixels(ids, found["id"])
            if found["category_id"] == -1 or found["id"] in matched or not p:
                continue
            excused = set(void)
            for true in truth_segments:
                if true["iscrowd"] and true["category_id"] == found["category_id"]:
                    excused |= pixels(truth_ids, true["id"])
            totals[found["category_id"]][1] += Fraction(len(p & excused), len(p)) <= Fraction(1, 2)
        for true in truth_segments:
            is_missed = pixels(truth_ids, true["id"]) and not true["iscrowd"] and true["id"] not in matched_truth
            if is_missed and true["category_id"] != -1:
                totals[true["category_id"]][2] += 1
    return totals


def test_manual_example():
    truth = row("1 1 1 1 2 2 2 2 3 3 3 3 4 4 4 4")
    found = row("7 7 7 8 8 8 8 8 9 9 9 9 9 9 5 5")
    truths = [segment(1, 0), segment(2, 0), segment(3, 2), segment(4, 3)]
    founds = [segment(7, 0), segment(8, 0), segment(9, 2), segment(5, 2)]
    scores = scored((found, founds, truth, truths)).compute()
    # 7 meets 1 in 3 of 4, 8 meets 2 in 4 of 5, 9 meets 3 in 4 of 6; 5 is stuff of the wrong class, 4 is missing.
    assert counts(scores, 0) == (2, 0, 0)
    assert counts(scores, 2) == (1, 1, 0)
    assert counts(scores, 3) == (0, 0, 1)
    assert scores["per_class"][0]["pq"] == scores["per_class"][0]["sq"] == pytest.approx((3 / 4 + 4 / 5) / 2)
    assert scores["per_class"][2]["pq"] == pytest.approx((4 / 6) / 1.5)
    assert scores["per_class"][2]["rq"] == pytest.approx(1 / 1.5)
    assert scores["per_class"][3]["pq"] == scores["per_class"][3]["sq"] == 0.0
    assert scores["per_class"][1]["pq"] is None  # absent from truth and prediction
    assert scores["pq"] == pytest.approx((0.775 + 4 / 9 + 0) / 3)
    assert scores["things"]["pq"] == pytest.approx(0.775)
    assert scores["stuff"]["pq"] == pytest.approx((4 / 9 + 0) / 2)


def test_iou_of_one_half_is_not_a_match():
    truths, founds = [segment(1, 0)], [segment(1, 0)]
    half = scored((row("1 1 0 0"), founds, row("1 1 1 1"), truths)).compute()
    assert counts(half, 0) == (0, 1, 1)
    more = scored((row("1 1 1 0"), founds, row("1 1 1 1"), truths)).compute()
    assert counts(more, 0) == (1, 0, 0)


def test_void_is_excluded_from_the_union():
    found, truths = row("1 1 1 1 1 1"), [segment(1, 2)]
    on_void = scored((found, [segment(1, 2)], row("1 1 1 0 0 0"), truths)).compute()
    assert counts(on_void, 2) == (1, 0, 0)
    assert on_void["pq"] == 1.0
    on_no_class = [segment(1, 2), segment(2, -1), segment(3, -1, True)]
    assert scored((found, [segment(1, 2)], row("1 1 1 2 3 3"), on_no_class)).compute()["pq"] == 1.0
    on_other = scored((found, [segment(1, 2)], row("1 1 1 2 2 2"), [segment(1, 2), segment(2, 3)])).compute()
    assert counts(on_other, 2) == (0, 1, 1)


def test_segment_on_void_or_crowd_is_not_a_false_positive():
    truths = [segment(1, 0, True), segment(2, 1, True), segment(3, 2)]

    def false_positives(truth, found_class=0):
        found = np.where(truth > 0, 9, 9)
        scores = scored((found, [segment(9, found_class)], truth, truths)).compute()
        return counts(scores, found_class)[1]

    assert false_positives(row("0 0 0 3 3")) == 0
    assert false_positives(row("0 0 3 3")) == 1  # exactly half of the segment
    assert false_positives(row("1 1 1 3 3")) == 0
    assert false_positives(row("1 0 0 3 3")) == 0  # void and crowd together
    assert false_positives(row("2 2 2 3 3")) == 1  # crowd of another class
    assert false_positives(row("2 2 2 3 3"), 1) == 0


def test_crowd_is_neither_matched_nor_a_false_negative():
    truth, truths = row("1 1 1 2"), [segment(1, 0, True), segment(2, 0)]
    scores = scored((row("1 1 1 0"), [segment(1, 0)], truth, truths)).compute()
    assert counts(scores, 0) == (0, 0, 1)
    all_crowd = scored((row("1 1 1 1"), [segment(1, 0)], row("1 1 1 1"), [segment(1, 0, True)])).compute()
    assert all_crowd["pq"] is None
    assert counts(all_crowd, 0) == (0, 0, 0)


def test_crowd_stays_in_the_union():
    truth, truths = row("1 1 2 2 2"), [segment(1, 0), segment(2, 0, True)]
    scores = scored((row("1 1 1 0 0"), [segment(1, 0)], truth, truths)).compute()
    assert scores["sq"] == pytest.approx(2 / 3)


def test_empty_prediction_and_void_truth():
    truth, truths = row("1 1 2 2"), [segment(1, 0), segment(2, 2)]
    nothing = scored((np.zeros_like(truth), [], truth, truths)).compute()
    assert nothing["pq"] == nothing["sq"] == nothing["rq"] == 0.0
    void = scored((truth, truths, np.zeros_like(truth), [])).compute()
    assert void["pq"] is None and void["things"]["pq"] is None
    assert scored().compute()["pq"] is None


def test_one_pixel():
    one = (row("4"), [segment(4, 1)])
    assert scored((*one, *one)).compute()["pq"] == 1.0
    assert scored((*one, row("4"), [segment(4, 0)])).compute()["pq"] == 0.0


def test_segments_without_pixels_are_ignored():
    scores = scored((row("1"), [segment(1, 0), segment(2, 1)], row("1"), [segment(1, 0), segment(9, 2)])).compute()
    assert scores["pq"] == 1.0


def test_847_classes_and_large_ids():
    side = 120
    ids = np.arange(side * side).reshape(side, side) // 17 * 19_000 + 1
    names = np.unique(ids).tolist()
    segments = [segment(name, place % 847) for place, name in enumerate(names)]
    metric = scored((ids, segments, ids, segments), is_thing=[True] * 500 + [False] * 347)
    scores = metric.compute()
    assert scores["pq"] == scores["things"]["pq"] == scores["stuff"]["pq"] == 1.0
    assert metric.counts.sum() == len(names) == 848
    assert sum(array.nbytes for array in metric.state().values()) < 50_000


def test_subset_of_classes():
    truth = row("1 1 2 2 3 3")
    truths = [segment(1, 0), segment(2, 2), segment(3, 3)]
    scores = scored((row("1 1 2 2 0 0"), truths[:2], truth, truths)).compute(classes=[0, 3])
    assert scores["pq"] == 0.5
    assert scores["stuff"]["pq"] == 0.0


def test_invalid_input_raises():
    metric, good, one = PanopticMetric(IS_THING), row("1 0"), [segment(1, 0)]
    with pytest.raises(ValueError, match=r"Ids \[5, 6\] of the prediction are not in its segments \[1\]"):
        metric.update(row("5 6"), one, good, one)
    with pytest.raises(ValueError, match=r"Ids \[-1\] of the truth are not in its segments"):
        metric.update(good, one, row("-1 1"), one)
    with pytest.raises(ValueError, match="Ids of the truth must be positive and different"):
        metric.update(good, one, good, [*one, *one])
    with pytest.raises(ValueError, match="Ids of the prediction must be positive"):
        metric.update(good, [segment(0, 0)], good, one)
    with pytest.raises(ValueError, match=r"Classes of the prediction must be from -1 \(none\) to 3"):
        metric.update(good, [segment(1, 4)], good, one)
    with pytest.raises(ValueError, match="the same size"):
        metric.update(good.T, one, good, one)
    with pytest.raises(ValueError, match="ids of the prediction must be integers"):
        metric.update(good * 1.0, one, good, one)
    with pytest.raises(ValueError, match="different is_thing"):
        metric.merge(PanopticMetric([True]))
    assert metric.compute()["pq"] is None  # no partial update


@settings(max_examples=50, deadline=None)
@given(st.lists(panoptic_images(), min_size=1, max_size=3))
def test_matches_a_loop_over_pixels(images):
    metric, totals = scored(*images), walked(images)
    scores = metric.compute()
    for index, (*expected, iou) in enumerate(totals):
        assert list(counts(scores, index)) == expected
        weight = expected[0] + Fraction(expected[1] + expected[2], 2)
        ours = scores["per_class"][index]["pq"]
        assert (ours is None) == (weight == 0)
        assert ours is None or abs(ours - iou / weight) < 1e-14
        assert ours is None or abs(ours - scores["per_class"][index]["sq"] * scores["per_class"][index]["rq"]) < 1e-14


@settings(max_examples=15, deadline=None)
@given(st.lists(panoptic_images(), min_size=3, max_size=3))
def test_merging_is_exact_in_any_order(images):
    whole = scored(*images)
    for order in permutations(range(3)):
        left, right = scored(images[order[0]]), scored(images[order[1]], images[order[2]])
        right.merge(left)
        merged = PanopticMetric.from_state(right.state())
        assert merged.compute() == whole.compute()
        assert all(np.array_equal(merged.state()[name], array) for name, array in whole.state().items())


@quick
@given(panoptic_images(), st.permutations(range(4)))
def test_permuting_classes_permutes_scores(image, order):
    def renamed(segments):
        return [{**s, "category_id": [*order, -1][s["category_id"]]} for s in segments]

    ids, segments, truth_ids, truth_segments = image
    scores = scored(image).compute()
    is_thing = [IS_THING[order.index(new)] for new in range(4)]
    changed = scored((ids, renamed(segments), truth_ids, renamed(truth_segments)), is_thing=is_thing).compute()
    assert [changed["per_class"][new] for new in order] == scores["per_class"]
    assert {name: changed[name] for name in ("pq", "sq", "rq", "things", "stuff")} == {
        name: scores[name] for name in ("pq", "sq", "rq", "things", "stuff")
    }


@quick
@given(panoptic_images(crowd=False))
def test_perfect_prediction_scores_one(image):
    _, _, truth_ids, truths = image
    scores = scored((truth_ids, truths, truth_ids, truths)).compute()
    there = {s["category_id"] for s in truths if (truth_ids == s["id"]).any()} - {-1}
    assert [scores[name] for name in ("pq", "sq", "rq")] == [1.0 if there else None] * 3


def torchmetrics_maps(image):
    """Convert to the input of torchmetrics: (1, H, W, 2) class and id, with class 9 for void."""
    ids, segments, truth_ids, truths = image
    maps = []
    for array, listed in ((ids, segments), (truth_ids, truths)):
        classes = np.full(array.shape, 9)
        for s in listed:
            if s["category_id"] >= 0:
                classes[array == s["id"]] = s["category_id"]
        maps.append(torch.from_numpy(np.stack([classes, array], axis=-1))[None])
    return maps


def test_matches_torchmetrics(within):
    """Compare with torchmetrics on predictions without void, images without crowds, and one segment per stuff class.

    Torchmetrics excludes predicted void from the union (the paper excludes only void of the ground truth), has no
    crowds and merges the stuff of a class.
    """
    draw = np.random.default_rng(3)
    theirs, ours = (
        PanopticQuality(
            set(THINGS), set(STUFF), allow_unknown_preds_category=True, return_sq_and_rq=True, return_per_class=True
        ),
        PanopticMetric(IS_THING),
    )
    for _ in range(40):
        truth_ids = np.kron(draw.integers(0, 7, (4, 4)), np.ones((6, 6), dtype=int))
        ids = np.where((truth_ids == 0) | (draw.random((24, 24)) < 0.15), draw.integers(1, 7, (24, 24)), truth_ids)
        truths = [segment(i, c) for i, c in zip(range(1, 7), (0, 0, 1, 1, 2, 3), strict=True)]
        founds = [segment(i, c) for i, c in zip(range(1, 7), (0, 0, 1, draw.integers(2), 2, 3), strict=True)]
        image = (ids, founds, truth_ids, truths)
        theirs.update(*torchmetrics_maps(image))
        ours.update(*image)
    expected = theirs.compute().numpy()  # (4, 3) per class pq, sq, rq
    scores = ours.compute()["per_class"]
    found = np.array([[of_class[name] for name in ("pq", "sq", "rq")] for of_class in scores])
    assert 0.2 < found.min() < 0.7 < found.mean() < 0.9  # neither perfect nor empty
    within("PQ, SQ, RQ of classes: torchmetrics", np.abs(found - expected).max(), 1e-6)


def test_matches_of_one_image():
    matches = match_image(row("1 1 1 2"), [segment(1, 0), segment(2, 1)], row("3 3 3 3"), [segment(3, 0)], 4)
    assert (matches.true_positives, matches.false_positives, matches.false_negatives) == ([(0, 3, 4)], [1], [])
