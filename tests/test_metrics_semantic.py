"""Tests of mIoU, related metrics and boundary IoU against manual results, plain loops and independent libraries."""

import math
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import accuracy_score, balanced_accuracy_score, jaccard_score
from sklearn.metrics import confusion_matrix as sklearn_confusion

from train.metrics import (
    BoundaryMetric,
    SemanticMetric,
    boundary_counts,
    confusion_matrix,
    describe,
    harmonic_mean,
    semantic_scores,
)
from train.metrics.base import add_fixed, as_fixed, exact_sum, exact_values
from train.metrics.boundary import band_width

quick = settings(max_examples=40, deadline=None)
CLASSES = 5


@st.composite
def map_pairs(draw, least=-1):
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=2, max_side=6))
    ints = st.integers(least, CLASSES - 1)
    return draw(hnp.arrays(np.int32, shape, elements=ints)), draw(hnp.arrays(np.int32, shape, elements=ints))


def scored(pairs, metric_class=SemanticMetric, **settings_of_metric):
    metric = metric_class(**({"num_classes": CLASSES} | settings_of_metric))
    for prediction, truth in pairs:
        metric.update(prediction, truth)
    return metric


def random_pairs(number=6, side=23, classes=CLASSES, seed=0):
    draw = np.random.default_rng(seed)
    return [
        (draw.integers(-1, classes, (side, side + i)), draw.integers(-1, classes, (side, side + i)))
        for i in range(number)
    ]


def walked(pairs, num_classes, absent):
    """Compute mIoU from sets of pixel positions, one class at a time."""
    scores = []
    for index in range(num_classes):
        true, found = set(), set()
        for image, (prediction, truth) in enumerate(pairs):
            for y in range(truth.shape[0]):
                for x in range(truth.shape[1]):
                    if truth[y, x] >= 0:
                        true |= {(image, y, x)} if truth[y, x] == index else set()
                        found |= {(image, y, x)} if prediction[y, x] == index else set()
        if true or (absent == "zero" and found):
            scores.append(len(true & found) / len(true | found))
    return sum(scores) / len(scores) if scores else None


def test_manual_example():
    truth = np.array([[0, 0, 0, 1], [0, 1, 1, 1], [-1, -1, 2, 2]])
    prediction = np.array([[0, 0, 1, 1], [0, 1, 1, 3], [0, 3, 2, -1]])
    scores = scored([(prediction, truth)], num_classes=4).compute()
    # Class 0: 3 of 4 pixels are correct, without false positives (void is ignored). Class 1: 3 correct of 4 and 4.
    # Class 2: 1 of 2 pixels is correct, the other has no predicted class. Class 3 is not in the truth.
    assert scores["iou"] == [3 / 4, 3 / 5, 1 / 2, None]
    assert scores["accuracy"] == [3 / 4, 3 / 4, 1 / 2, None]
    assert scores["pixels"] == [4, 4, 2, 0]
    assert scores["miou"] == pytest.approx((0.75 + 0.6 + 0.5) / 3, abs=1e-15)
    assert scores["pixel_accuracy"] == 7 / 10
    assert scores["mean_accuracy"] == pytest.approx(2 / 3, abs=1e-15)
    assert scores["frequency_weighted_iou"] == pytest.approx(0.4 * 0.75 + 0.4 * 0.6 + 0.2 * 0.5, abs=1e-15)


def test_conventions_for_classes_without_ground_truth():
    metric = scored([(np.array([[0, 1, 2]]), np.array([[0, 0, -1]]))], num_classes=4)
    assert metric.compute()["miou"] == 1 / 2
    zero = metric.compute(absent="zero")
    assert zero["miou"] == 1 / 4  # class 1 is predicted on a labeled pixel, class 2 on void only, class 3 nowhere
    assert zero["iou"] == [1 / 2, 0.0, None, None]
    with pytest.raises(ValueError, match="`absent` must be one of"):
        metric.compute(absent="ignore")


def test_iou_is_computed_over_the_dataset():
    pairs = [(np.array([[0, 0, 0, 0]]), np.array([[0, 0, 0, 1]])), (np.array([[1]]), np.array([[1]]))]
    assert scored(pairs).compute()["miou"] == pytest.approx((3 / 4 + 1 / 2) / 2)  # the mean over images is 0.6875


def test_subset_of_classes():
    pairs = random_pairs()
    everything, novel = scored(pairs).compute(), scored(pairs).compute(classes=[1, 3])
    assert novel["miou"] == (everything["iou"][1] + everything["iou"][3]) / 2
    assert novel["iou"] == everything["iou"]
    truth = np.concatenate([truth.ravel() for _, truth in pairs])
    prediction = np.concatenate([prediction.ravel() for prediction, _ in pairs])
    among = np.isin(truth, [1, 3])
    assert novel["pixel_accuracy"] == (truth == prediction)[among].mean()
    for wrong in ([5], [-1], [1, 1]):
        with pytest.raises(ValueError, match="different integers from 0 to 4"):
            scored(pairs).compute(classes=wrong)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_matches_scikit_learn(within):
    pairs = random_pairs()
    truth, prediction = (np.concatenate([pair[i].ravel() for pair in pairs]) for i in (1, 0))
    truth, prediction = truth[truth >= 0], prediction[truth >= 0]
    metric, classes = scored(pairs), list(range(CLASSES))
    with_void = sklearn_confusion(truth, prediction % (CLASSES + 1), labels=[*classes, CLASSES])  # -1 -> K
    assert np.array_equal(metric.confusion, with_void[:CLASSES])
    scores = metric.compute()
    iou = jaccard_score(truth, prediction, labels=classes, average=None)
    within("IoU of classes: scikit-learn", np.abs(iou - scores["iou"]).max(), 1e-15)
    within("mIoU: scikit-learn", abs(iou.mean() - scores["miou"]), 1e-15)
    within("pixel accuracy: scikit-learn", abs(accuracy_score(truth, prediction) - scores["pixel_accuracy"]), 1e-15)
    mean_accuracy = balanced_accuracy_score(truth, prediction)
    within("mean accuracy: scikit-learn", abs(mean_accuracy - scores["mean_accuracy"]), 1e-15)
    weighted = jaccard_score(truth, prediction, labels=classes, average="weighted")
    within("frequency-weighted IoU: scikit-learn", abs(weighted - scores["frequency_weighted_iou"]), 1e-15)


@quick
@given(st.lists(map_pairs(), max_size=3), st.sampled_from(["left_out", "zero"]))
def test_matches_a_loop_over_pixels(pairs, absent):
    ours, walk = scored(pairs).compute(absent)["miou"], walked(pairs, CLASSES, absent)
    assert (ours is None) == (walk is None)
    assert ours is None or abs(ours - walk) < 1e-14


@pytest.mark.parametrize("metric_class", [SemanticMetric, BoundaryMetric])
def test_scores_without_labeled_pixels_are_none(metric_class):
    metric = scored([(np.array([[1, 2]]), np.array([[-1, -7]]))], metric_class)
    assert {type(value) for value in metric.compute().values() if not isinstance(value, list)} == {type(None)}
    assert metric.compute()["iou"] == [None] * CLASSES


@pytest.mark.parametrize("metric_class", [SemanticMetric, BoundaryMetric])
def test_one_pixel_and_predictions_without_any_class(metric_class):
    name = {SemanticMetric: "miou", BoundaryMetric: "boundary_iou"}[metric_class]
    one = np.array([[3]])
    assert scored([(one, one)], metric_class).compute()[name] == 1.0
    for nothing in (-1, 5, 255):
        assert scored([(np.full_like(one, nothing), one)], metric_class).compute()[name] == 0.0


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int64])
def test_all_integer_types_give_equal_scores(dtype):
    (prediction, truth), *_ = random_pairs()
    prediction, truth = np.where(prediction < 0, 9, prediction), np.where(truth < 0, 0, truth)
    assert np.array_equal(
        confusion_matrix(prediction.astype(dtype), truth.astype(dtype), CLASSES),
        confusion_matrix(prediction, truth, CLASSES),
    )


def test_847_classes():
    (pair,) = random_pairs(1, side=150, classes=847)
    metric = scored([pair, pair], num_classes=847)
    truth, prediction = pair[1][pair[1] >= 0], pair[0][pair[1] >= 0]
    expected = np.zeros((847, 848), dtype=np.int64)
    np.add.at(expected, (truth, prediction), 2)
    assert np.array_equal(metric.confusion, expected)
    assert sum(array.nbytes for array in metric.state().values()) < 6e6
    perfect = scored([(pair[1], pair[1])], num_classes=847).compute()
    assert perfect["miou"] == perfect["frequency_weighted_iou"] == perfect["mean_accuracy"] == 1.0


@pytest.mark.parametrize("metric_class", [SemanticMetric, BoundaryMetric])
def test_invalid_input_raises(metric_class):
    metric, good = metric_class(CLASSES), np.zeros((2, 3), dtype=int)
    with pytest.raises(ValueError, match=r"contains class 255, but there are 5 classes"):
        metric.update(good, good + 255)
    with pytest.raises(ValueError, match=r"same size .*, got \(2, 3\) and \(3, 2\)"):
        metric.update(good, good.T)
    with pytest.raises(ValueError, match="prediction must contain integers, got float64"):
        metric.update(good * 1.0, good)
    with pytest.raises(ValueError, match="`num_classes` must be at least 1"):
        metric_class(0)
    with pytest.raises(ValueError, match="different num_classes cannot be merged: 5 and 6"):
        metric.merge(metric_class(6))
    with pytest.raises(ValueError, match="it lacks"):
        metric_class.from_state({"num_classes": np.array(5)})


@pytest.mark.parametrize("metric_class", [SemanticMetric, BoundaryMetric])
def test_merging_is_exact_in_any_order_and_through_files(metric_class, tmp_path):
    pairs = random_pairs(4)
    whole = scored(pairs, metric_class).compute()
    parts = [scored(pairs[:1], metric_class), scored(pairs[1:3], metric_class), scored(pairs[3:], metric_class)]
    for place, part in enumerate(parts):
        np.savez(tmp_path / f"{place}.npz", **part.state())
    for order in permutations(range(3)):
        merged = metric_class(CLASSES)
        for place in order:
            with np.load(tmp_path / f"{place}.npz") as state:
                merged.merge(metric_class.from_state(state))
        assert merged.compute() == whole


@quick
@given(st.lists(map_pairs(), min_size=3, max_size=3))
def test_merging_is_associative_and_keeps_its_argument(pairs):
    for metric_class in (SemanticMetric, BoundaryMetric):
        (a, b, c), (d, e, f) = ([scored([pair], metric_class) for pair in pairs] for _ in range(2))
        b.merge(c)
        a.merge(b)
        d.merge(e)
        d.merge(f)
        assert a.compute() == d.compute()
        assert b.compute() == scored(pairs[1:], metric_class).compute()
        assert c.compute() == f.compute() == scored(pairs[2:], metric_class).compute()


@quick
@given(map_pairs(), st.permutations(range(CLASSES)))
def test_permuting_classes_permutes_scores(pair, order):
    table = np.array([*order, -1])  # -1 stays
    for metric_class, mean in ((SemanticMetric, "miou"), (BoundaryMetric, "boundary_iou")):
        scores = scored([pair], metric_class).compute()
        permuted = scored([(table[pair[0]], table[pair[1]])], metric_class).compute()
        assert [permuted["iou"][new] for new in order] == scores["iou"]
        assert permuted[mean] == scores[mean]


@quick
@given(map_pairs(least=0))
def test_perfect_prediction_scores_one(pair):
    _, truth = pair
    scores = scored([(truth, truth)]).compute()
    means = [scores[name] for name in ("miou", "pixel_accuracy", "mean_accuracy", "frequency_weighted_iou")]
    assert means == [1.0] * 4
    assert scored([(truth, truth)], BoundaryMetric).compute()["boundary_iou"] == 1.0


def walked_band(mask, distance):
    """Return the pixels of a mask with another pixel, or the border, within a square around them."""
    height, width = mask.shape
    band = np.zeros_like(mask)
    for y, x in np.argwhere(mask):
        for v in range(y - distance, y + distance + 1):
            for u in range(x - distance, x + distance + 1):
                band[y, x] |= not (0 <= v < height and 0 <= u < width) or not mask[v, u]
    return band


@pytest.mark.parametrize("width", [0.02, 0.1, 0.3])
def test_boundary_bands_match_a_loop_over_pixels(width):
    draw = np.random.default_rng(1)
    for shape in ((17, 24), (1, 9), (30, 11), (3, 36)):
        truth, prediction = (np.kron(draw.integers(-1, 4, (4, 4)), np.ones((9, 9), int)) for _ in range(2))
        truth, prediction = truth[: shape[0], : shape[1]], prediction[: shape[0], : shape[1]]
        distance = band_width(shape, width)
        known = truth >= 0
        for index in range(4):
            true, found = walked_band(truth == index, distance), walked_band((prediction == index) & known, distance)
            counted = boundary_counts(prediction, truth, 4, width)[:, index]
            assert counted.tolist() == [(true & found).sum(), true.sum(), found.sum()]


def test_boundary_iou_manual_example():
    assert band_width((100, 100)) == 3
    assert band_width((480, 640)) == 16
    assert band_width((1, 1)) == 1
    truth, prediction = np.zeros((2, 100, 100), dtype=int)
    truth[20:60, 20:60] = 1  # 40 x 40, its band 3 wide: 1600 - 34 x 34 = 444 pixels
    prediction[20:60, 24:64] = 1  # shifted by 4: only the horizontal sides overlap, in 36 columns
    metric = scored([(prediction, truth)], BoundaryMetric, num_classes=2)
    shared = 2 * 3 * 36
    assert metric.counts[:, 1].tolist() == [shared, 444, 444]
    assert metric.compute()["iou"][1] == shared / (2 * 444 - shared)
    assert scored([(prediction, truth)], num_classes=2).compute()["iou"][1] > 0.8  # the IoU of the masks is high


def test_predictions_on_void_do_not_change_boundary_bands():
    truth = np.full((20, 20), -1)
    truth[:, :10] = 2
    for on_void in (-1, 2, 4):
        prediction = np.where(truth < 0, on_void, truth)
        assert scored([(prediction, truth)], BoundaryMetric).compute("zero")["boundary_iou"] == 1.0


@pytest.mark.parametrize("width", [0, 1, -0.1, math.nan])
def test_invalid_boundary_width_raises(width):
    with pytest.raises(ValueError, match="fraction of the image diagonal"):
        BoundaryMetric(2, width)


def test_harmonic_mean():
    assert harmonic_mean(0.5, 0.25) == pytest.approx(1 / 3)
    assert harmonic_mean(0.5, 0.0) == 0.0
    assert harmonic_mean(0.5, None) is None


@quick
@given(st.lists(st.tuples(st.integers(1, 2**31), st.integers(1, 2**31)), max_size=30), st.randoms())
def test_exact_sums_are_independent_of_order(fractions, random):
    values = [as_fixed(min(pair), max(pair)) for pair in fractions]
    forward, shuffled = exact_sum(1), exact_sum(1)
    for value in values:
        add_fixed(forward, 0, value)
    for value in random.sample(values, len(values)):
        add_fixed(shuffled, 0, value)
    assert np.array_equal(forward, shuffled)
    assert exact_values(forward) == [sum(values) / 2**52]
    assert abs(exact_values(forward)[0] - math.fsum(min(p) / max(p) for p in fractions)) <= 30 * 2**-52


def test_float_sums_depend_on_order():
    assert (0.1 + 0.2) + 0.3 != (0.3 + 0.2) + 0.1  # without sum(), which compensates since Python 3.12


def test_descriptions_cover_all_scores():
    text = describe()
    for word in ("`miou`", "Boundary IoU", "PQ", "`ap50`", "VPQ", "STQ", "mVCn", "without ground truth"):
        assert word in text


def test_scores_of_a_confusion_matrix():
    assert semantic_scores(np.array([[3, 1, 0], [0, 4, 0]]))["iou"] == [3 / 4, 4 / 5]


def test_scored_share_survives_merging():
    """Check that `predicted` and `scored_share` reveal a constant prediction and a truth that is mostly void."""
    first, second = SemanticMetric(2), SemanticMetric(2)
    first.update(np.zeros((2, 4), dtype=int), np.array([[0, 0, 0, 1], [-1, -1, -1, -1]]))
    second.update(np.zeros((1, 8), dtype=int), np.full((1, 8), -1))
    first.merge(SemanticMetric.from_state(second.state()))
    scores = first.compute()
    assert scores["scored_share"] == 0.25 and scores["predicted"] == [4, 0] and scores["pixels"] == [3, 1]
    assert SemanticMetric(2).compute()["scored_share"] is None
