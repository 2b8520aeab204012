"""Tests of VPQ, STQ and video consistency against manual examples and loops over pixels."""

import math
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.metrics import (
    PanopticMetric,
    SemanticMetric,
    TrackingQualityMetric,
    VideoConsistencyMetric,
    VideoPanopticMetric,
    video_consistency,
)

IS_THING = [True, True, False, False]


def segment(segment_id, category_id, iscrowd=False):
    return {"id": segment_id, "category_id": category_id, "iscrowd": iscrowd}


def row(text):
    """Return one row of ids for a string such as "1 1 2"."""
    return np.array([[int(word) for word in text.split()]])


def video(found, founds, truth, truths):
    """Return a video with one row of ids per frame, and the segments of all frames."""
    return [(row(ids), founds, row(truth_ids), truths) for ids, truth_ids in zip(found, truth, strict=True)]


def random_video(seed, frames=7, side=6, crowd=True):
    draw = np.random.default_rng(seed)
    names, truth_names = np.append(0, draw.permutation(20)[:5] + 1), np.append(0, draw.permutation(20)[:5] + 1)
    classes = draw.integers(-1, 4, 6)
    founds = [segment(int(names[i]), int(classes[i] if i < 4 else draw.integers(4))) for i in range(1, 6)]
    truths = [segment(int(truth_names[i]), int(classes[i]), bool(crowd and i == 5)) for i in range(1, 6)]
    picture, made = draw.integers(0, 6, (side, side)), []
    for _ in range(frames):
        picture = np.where(draw.random((side, side)) < 0.2, draw.integers(0, 6, (side, side)), picture)
        guess = np.where(draw.random((side, side)) < 0.2, draw.integers(0, 6, (side, side)), picture)
        made.append((names[guess], founds, truth_names[picture], truths))
    return made


def scored(metric, *videos):
    for one in videos:
        metric.update(one)
    return metric


def side_by_side(frames):
    """Join the frames of a window into one image, whose segments are the tubes."""
    ids, segments, truth_ids, truths = zip(*frames, strict=True)
    return np.concatenate(ids, axis=1), segments[0], np.concatenate(truth_ids, axis=1), truths[0]


# VPQ


def test_vpq_manual_example():
    truths, founds = [segment(1, 0), segment(2, 2)], [segment(5, 0), segment(6, 0), segment(7, 2)]
    # The prediction follows object 1 as 5 in the first two frames, then as 6.
    frames = video(["5 5 7 7", "5 5 7 7", "6 6 7 7"], founds, ["1 1 2 2"] * 3, truths)
    scores = scored(VideoPanopticMetric(IS_THING, (1, 2, 3)), frames).compute()
    assert scores["windows"]["1"]["pq"] == 1.0
    # Windows of two: frames 0, 1 match; in frames 1, 2 the tubes 5 and 6 hold half of 1 each, which is not a match.
    things = scores["windows"]["2"]["per_class"][0]
    assert (things["true_positives"], things["false_positives"], things["false_negatives"]) == (1, 2, 1)
    assert things["pq"] == 1 / 2.5
    # The window of three: 5 holds two thirds.
    things = scores["windows"]["3"]["per_class"][0]
    assert (things["true_positives"], things["false_positives"], things["false_negatives"]) == (1, 1, 0)
    assert things["pq"] == pytest.approx((2 / 3) / 1.5)
    assert scores["vpq_stuff"] == 1.0
    assert scores["vpq_things"] == pytest.approx((1 + 0.4 + 4 / 9) / 3)
    assert scores["vpq"] == pytest.approx((1 + (0.4 + 1) / 2 + (4 / 9 + 1) / 2) / 3)


@pytest.mark.parametrize("window", [1, 2, 4, 6])
def test_window_vpq_matches_pq_of_joined_frames(window):
    videos = [random_video(seed, frames) for seed, frames in ((0, 7), (1, 5), (2, 3), (3, 1))]
    images = PanopticMetric(IS_THING)
    for one in videos:
        for start in range(len(one) - window + 1):
            images.update(*side_by_side(one[start : start + window]))
    scores = scored(VideoPanopticMetric(IS_THING, (window,)), *videos).compute()
    assert scores["windows"][str(window)] == images.compute()
    assert 0 < scores["vpq"] < 1


def test_videos_shorter_than_the_window_are_ignored():
    short = random_video(4, frames=3, crowd=False)
    scores = scored(VideoPanopticMetric(IS_THING), short).compute()
    assert [scores["windows"][k]["pq"] is None for k in ("1", "2", "4", "6")] == [False, False, True, True]
    assert scores["vpq"] == (scores["windows"]["1"]["pq"] + scores["windows"]["2"]["pq"]) / 2
    assert scored(VideoPanopticMetric(IS_THING), []).compute()["vpq"] is None


def test_segments_may_be_listed_per_frame():
    one = random_video(5)
    listed = [
        (ids, [s for s in founds if s["id"] in ids], truth_ids, [s for s in truths if s["id"] in truth_ids])
        for ids, founds, truth_ids, truths in one
    ]
    assert scored(VideoPanopticMetric(IS_THING), one).compute() == (
        scored(VideoPanopticMetric(IS_THING), listed).compute()
    )


def test_invalid_videos_raise():
    one = [segment(1, 0)]
    frames = [(row("1"), one, row("1"), one), (row("1"), [segment(1, 1)], row("1"), one)]
    with pytest.raises(ValueError, match="Id 1 of the prediction has the classes 0 and 1 in one video"):
        VideoPanopticMetric(IS_THING).update(frames)
    with pytest.raises(ValueError, match="`windows` must be different numbers of frames"):
        VideoPanopticMetric(IS_THING, (2, 0))
    with pytest.raises(ValueError, match="different windows cannot be merged"):
        VideoPanopticMetric(IS_THING).merge(VideoPanopticMetric(IS_THING, (1,)))
    for metric in (VideoPanopticMetric(IS_THING), TrackingQualityMetric(IS_THING)):
        with pytest.raises(ValueError, match=r"Ids \[3\] of the prediction are not in its segments"):
            metric.update([(row("3"), one, row("1"), one)])
        with pytest.raises(ValueError, match=r"different within a frame|positive and different"):
            metric.update([(row("1"), one * 2, row("1"), one)])


# STQ


def walked_tracking(videos, num_classes=4):
    """Compute SQ and AQ from sets of pixels (frame, y, x)."""
    semantic, total, tracks = SemanticMetric(num_classes), Fraction(0), 0
    for frames in videos:
        things, crowd, found_things = {}, set(), {}
        for time, (ids, founds, truth_ids, truths) in enumerate(frames):
            classes = {s["id"]: s["category_id"] for s in founds}
            truth_classes = {s["id"]: s["category_id"] for s in truths}
            maps = (
                np.array([[of.get(name, -1) for name in line] for line in array])
                for of, array in ((classes, ids.tolist()), (truth_classes, truth_ids.tolist()))
            )
            found_map, truth_map = maps
            semantic.update(found_map, truth_map)
            crowds = {s["id"] for s in truths if s["iscrowd"]}
            for y, x in np.ndindex(ids.shape):
                true, found = truth_map[y, x], found_map[y, x]
                if true < 0 or (IS_THING[true] and truth_ids[y, x] in crowds):
                    crowd.add((time, y, x))
                elif IS_THING[true]:
                    things.setdefault(truth_ids[y, x], set()).add((time, y, x))
                if found >= 0 and IS_THING[found]:
                    found_things.setdefault(ids[y, x], set()).add((time, y, x))
        tracks += len(things)
        for g in things.values():
            for p in (pixels - crowd for pixels in found_things.values()):
                total += Fraction(len(p & g), len(g)) * Fraction(len(p & g), len(p | g))
    return semantic.compute()["miou"], float(total / tracks) if tracks else None


def test_stq_manual_example():
    truths, founds = [segment(1, 0), segment(2, 2)], [segment(5, 0), segment(6, 0), segment(7, 2)]
    frames = video(["5 5 7 7", "5 5 7 7", "6 6 7 7"], founds, ["1 1 2 2"] * 3, truths)
    scores = scored(TrackingQualityMetric(IS_THING), frames).compute()
    # Track 1 has 6 pixels: 5 holds 4 of them (IoU 4 / 6), 6 holds 2 (IoU 2 / 6).
    assert scores["aq"] == pytest.approx((4 * 4 / 6 + 2 * 2 / 6) / 6)
    assert (scores["sq"], scores["tracks"]) == (1.0, 1)
    assert scores["stq"] == pytest.approx(math.sqrt(scores["aq"]))


def test_association_ignores_the_class():
    frames = video(["5 5"] * 2, [segment(5, 1)], ["1 1"] * 2, [segment(1, 0)])
    scores = scored(TrackingQualityMetric(IS_THING), frames).compute()
    assert (scores["aq"], scores["sq"], scores["stq"]) == (1.0, 0.0, 0.0)
    stuff = video(["5 5"] * 2, [segment(5, 2)], ["1 1"] * 2, [segment(1, 0)])  # stuff has no tracks
    assert scored(TrackingQualityMetric(IS_THING), stuff).compute()["aq"] == 0.0


def test_association_excludes_void_and_crowd_but_not_other_classes():
    def association(truth, truths):
        frames = video(["5 5 5 5"], [segment(5, 0)], [truth], [segment(1, 0), *truths])
        return scored(TrackingQualityMetric(IS_THING), frames).compute()["aq"]

    assert association("1 1 2 2", [segment(2, 2)]) == 1 / 2
    assert association("1 1 0 0", []) == 1.0
    assert association("1 1 2 2", [segment(2, -1)]) == 1.0
    assert association("1 1 2 2", [segment(2, 1, True)]) == 1.0


def test_stq_matches_a_loop_over_pixels(within):
    for seed in range(6):
        videos = [random_video(seed, 4), random_video(seed + 50, 2)]
        scores = scored(TrackingQualityMetric(IS_THING), *videos).compute()
        sq, aq = walked_tracking(videos)
        assert scores["sq"] == sq
        within("AQ: walking over pixels", abs(scores["aq"] - aq), 1e-14)
        within("STQ: walking over pixels", abs(scores["stq"] - math.sqrt(sq * aq)), 1e-14)


def test_stq_without_tracks_is_none():
    frames = video(["1 2"], [segment(1, 2), segment(2, 0)], ["1 1"], [segment(1, 2)])
    scores = scored(TrackingQualityMetric(IS_THING), frames).compute()
    assert (scores["stq"], scores["aq"], scores["sq"], scores["tracks"]) == (None, None, 0.5, 0)
    assert scored(TrackingQualityMetric(IS_THING), frames).compute(absent="zero")["sq"] == 0.25
    crowd = video(["1 1"], [segment(1, 0)], ["1 1"], [segment(1, 0, True)])
    assert scored(TrackingQualityMetric(IS_THING), crowd).compute()["tracks"] == 0
    assert scored(TrackingQualityMetric(IS_THING), []).compute()["stq"] is None


# Video consistency


def walked_consistency(predictions, truths, window):
    """Return the mean over windows of the fraction of constant pixels with constant and right prediction."""
    shares = []
    for start in range(len(truths) - window + 1):
        constant = right = 0
        for y, x in np.ndindex(truths.shape[1:]):
            true = set(truths[start : start + window, y, x].tolist())
            if len(true) == 1 and min(true) >= 0:
                constant += 1
                right += set(predictions[start : start + window, y, x].tolist()) == true
        if constant:
            shares.append(Fraction(right, constant))
    return float(sum(shares) / len(shares)) if shares else None


def random_maps(seed, frames=9, change=0.05):
    draw = np.random.default_rng(seed)
    truths = np.repeat(draw.integers(-1, 3, (1, 6, 7)), frames, axis=0)
    truths = np.where(draw.random(truths.shape) < change, draw.integers(-1, 3, truths.shape), truths)
    return np.where(draw.random(truths.shape) < change, draw.integers(-1, 3, truths.shape), truths), truths


def test_consistency_manual_example():
    # Three frames of four pixels; the truth of the last pixel changes, that of the third is void.
    truths = np.array([[[0, 1, -1, 1]], [[0, 1, -1, 1]], [[0, 1, -1, 2]]])
    predictions = np.array([[[0, 1, 0, 1]], [[0, 2, 0, 1]], [[0, 1, 0, 2]]])
    metric = VideoConsistencyMetric((1, 2, 3))
    metric.update(predictions, truths)
    scores = metric.compute()
    assert scores["mVC1"] == pytest.approx((3 / 3 + 2 / 3 + 3 / 3) / 3)
    assert scores["mVC2"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert scores["mVC3"] == 1 / 2
    assert scores["videos"] == {"1": 1, "2": 1, "3": 1}


def test_constant_wrong_prediction_is_not_consistent():
    truths = np.zeros((8, 2, 2), dtype=int)
    assert video_consistency(truths + 1, truths, (8,)) == [0]
    assert video_consistency(truths, truths, (8,)) == [2**52]


@pytest.mark.parametrize("window", [1, 2, 4, 8])
def test_consistency_matches_a_loop_over_pixels(window, within):
    metric, expected = VideoConsistencyMetric((window,)), []
    for seed, frames in enumerate((9, 12, 3, 8)):
        maps = random_maps(seed, frames)
        metric.update(*maps)
        expected.append(walked_consistency(*maps, window))
    scores = [value for value in expected if value is not None]
    assert len(scores) == (4 if window < 4 else 3)
    error = abs(metric.compute()[f"mVC{window}"] - sum(scores) / len(scores))
    within("mVC: walking over pixels", error, 1e-14)
    assert metric.compute()["videos"] == {str(window): len(scores)}


def test_consistency_without_constant_pixels_is_none():
    metric = VideoConsistencyMetric((2,))
    metric.update(np.zeros((1, 2, 2), int), np.zeros((1, 2, 2), int))
    metric.update(np.zeros((3, 2, 2), int), np.full((3, 2, 2), -1))
    metric.update(np.zeros((3, 1, 1), int), np.arange(3).reshape(3, 1, 1))
    metric.update([], [])
    assert metric.compute() == {"mVC2": None, "videos": {"2": 0}}


def test_invalid_class_maps_raise():
    metric, good = VideoConsistencyMetric(), np.zeros((3, 2, 2), int)
    with pytest.raises(ValueError, match="A video has 3 predictions and 2 ground truth maps"):
        metric.update(good, good[:2])
    with pytest.raises(ValueError, match="frames of a video must have the same size"):
        metric.update([good[0], good[0, :1]], [good[0], good[0, :1]])
    with pytest.raises(ValueError, match="`windows` must be different"):
        VideoConsistencyMetric(())


# All three


def with_swapped(frames, order):
    def renamed(segments):
        return [{**s, "category_id": [*order, -1][s["category_id"]]} for s in segments]

    return [(ids, renamed(founds), truth_ids, renamed(truths)) for ids, founds, truth_ids, truths in frames]


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(4)), st.integers(0, 100))
def test_permuting_classes_permutes_scores(order, seed):
    frames, is_thing = random_video(seed, 3), [IS_THING[order.index(new)] for new in range(4)]
    scores = scored(VideoPanopticMetric(IS_THING, (1, 2)), frames).compute()
    changed = scored(VideoPanopticMetric(is_thing, (1, 2)), with_swapped(frames, order)).compute()
    for window in ("1", "2"):
        per_class = changed["windows"][window]["per_class"]
        assert [per_class[new] for new in order] == scores["windows"][window]["per_class"]
    assert changed["vpq"] == scores["vpq"]
    scores = scored(TrackingQualityMetric(IS_THING), frames).compute()
    changed = scored(TrackingQualityMetric(is_thing), with_swapped(frames, order)).compute()
    assert (changed["stq"], changed["aq"]) == (scores["stq"], scores["aq"])


@pytest.mark.parametrize("seed", range(4))
def test_perfect_prediction_scores_one(seed):
    frames = [(truth_ids, truths, truth_ids, truths) for _, _, truth_ids, truths in random_video(seed, crowd=False)]
    assert scored(VideoPanopticMetric(IS_THING), frames).compute()["vpq"] == 1.0
    quality = scored(TrackingQualityMetric([True] * 4), frames).compute()
    assert (quality["stq"], quality["sq"], quality["aq"]) == (1.0, 1.0, 1.0)
    metric = VideoConsistencyMetric((2, 8))
    _, truths = random_maps(seed)
    metric.update(truths, truths)
    assert (metric.compute()["mVC2"], metric.compute()["mVC8"]) == (1.0, 1.0)


class Maps(VideoConsistencyMetric):
    """Metric that takes a video as one argument, as the others do."""

    def update(self, maps):
        super().update(*maps)


@pytest.mark.parametrize(
    ("make", "draw"),
    [
        (lambda: VideoPanopticMetric(IS_THING), random_video),
        (lambda: TrackingQualityMetric(IS_THING), random_video),
        (lambda: Maps((2, 4)), random_maps),
    ],
)
def test_merging_is_exact_in_any_order_and_through_files(make, draw, tmp_path):
    videos = [draw(seed) for seed in range(4)]
    whole = scored(make(), *videos)
    for place, part in enumerate((videos[:1], videos[1:3], videos[3:])):
        np.savez(tmp_path / f"{place}.npz", **scored(make(), *part).state())
    for order in permutations(range(3)):
        merged = make()
        for place in order:
            with np.load(tmp_path / f"{place}.npz") as state:
                merged.merge(type(merged).from_state(state))
        assert merged.compute() == whole.compute()
        assert all(np.array_equal(merged.state()[name], array) for name, array in whole.state().items())
