"""Run-length encoding against pycocotools."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_strategies
from pycocotools import mask as coco

from modeling_gkc.run_length import checked_runs, decode_rle, encode_rle


@settings(deadline=None, max_examples=300)
@given(numpy_strategies.arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40))))
def test_equals_pycocotools(mask):
    theirs = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    ours = encode_rle(mask)
    assert ours == {"size": list(mask.shape), "counts": theirs["counts"].decode()}
    np.testing.assert_array_equal(decode_rle(ours), mask)
    np.testing.assert_array_equal(decode_rle(theirs), mask)


@pytest.mark.parametrize("shape", [(1, 1), (2000, 1500), (1, 70000), (70000, 1)])
@pytest.mark.parametrize("density", [0.0, 0.0005, 0.5, 1.0])
def test_long_runs(shape, density):
    mask = np.random.default_rng(0).random(shape) < density
    theirs = coco.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode()
    assert encode_rle(torch.from_numpy(mask))["counts"] == theirs
    np.testing.assert_array_equal(decode_rle(encode_rle(mask)), mask)


@pytest.mark.parametrize(
    ("counts", "size", "message"),
    [("", [1, 1], "break off"), ("52P", [2, 2], "break off"), ("52", [2, 4], "cover 7 pixels")],
)
def test_invalid_encodings_raise(counts, size, message):
    with pytest.raises(ValueError, match=message):
        decode_rle({"size": size, "counts": counts})


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools with numpy 2
@settings(deadline=None, max_examples=50)
@given(numpy_strategies.arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_uncompressed_runs_are_those_of_pycocotools(mask):
    flat = mask.flatten(order="F")
    runs, value = [0], False
    for pixel in flat:
        if pixel != value:
            runs, value = [*runs, 0], pixel
        runs[-1] += 1
    rle = {"size": list(mask.shape), "counts": runs}
    np.testing.assert_array_equal(coco.decode(coco.frPyObjects(rle, *mask.shape)).astype(bool), mask)
    np.testing.assert_array_equal(decode_rle(rle), mask)


@pytest.mark.parametrize(
    ("counts", "message"),
    [([3, 2], "cover 5 pixels"), ([-1, 7], "0 or more"), ([1.5, 4.5], "0 or more"), (7, "a list"), ([], "cover 0")],
)
def test_invalid_runs_raise(counts, message):
    with pytest.raises(ValueError, match=message):
        decode_rle({"size": [2, 3], "counts": counts})


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), ()])
def test_only_one_mask_is_encoded(shape):
    with pytest.raises(ValueError, match=r"`mask` must be \(height, width\), got the shape"):
        encode_rle(np.ones(shape, dtype=bool))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ({"size": [20, 24], "counts": [10]}, "cover 10 pixels"),
        ({"size": [2, 3], "counts": [2.0, 4.0]}, "whole numbers"),
        ({"size": [2, 3], "counts": [True, 5]}, "whole numbers"),
        ({"size": [2, 3], "counts": [float("nan"), 6]}, "whole numbers"),
        ({"size": [2, 3], "counts": [10**30]}, "whole numbers"),
        ({"size": [2, 3], "counts": [2**63 - 1, 2**63 - 1, 8]}, "more than a mask has"),
        ({"size": [2, 3], "counts": [[6]]}, "whole numbers"),
        ({"size": [2, 3], "counts": "0\xe9"}, "characters"),
        ({"size": [2, 3], "counts": "0 6"}, "characters"),
        ({"size": [2, 3], "counts": "oooooooooo0"}, "more pixels than a mask has"),
        ({"size": [2**20, 2**20], "counts": [2**40]}, r"fewer than 2\*\*31"),
        ({"size": [-2, -3], "counts": [6]}, "whole numbers"),
        ({"size": [2.0, 3], "counts": [6]}, "whole numbers"),
        ({"size": "23", "counts": [6]}, "whole numbers"),
        ({"size": [6], "counts": [6]}, "whole numbers"),
        ({"size": [2, 3]}, "needs the keys"),
        ([6], "needs the keys"),
    ],
)
def test_encodings_beyond_the_mask_raise(code, message):
    with pytest.raises(ValueError, match=message):
        decode_rle(code)


def test_an_encoding_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\(2, 3\) \(height, width\), its image \(3, 2\)"):
        checked_runs({"size": [2, 3], "counts": [6]}, (3, 2))
