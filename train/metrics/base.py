"""Base class of all metrics, with sums that merge exactly, and helpers for checking arguments."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np

ABSENT = ("left_out", "zero")
State = dict[str, np.ndarray]

_FRACTION_BITS = 52
_WORD = 32  # number of bits in the low word of an exact sum


class Metric:
    """Metric of settings and sums, with bit-identical results for any order of updates and number of processes.

    Attributes:
        settings: Names of the constructor arguments, which are stored as attributes.
        sums: Names of the int64 arrays that are added when two metrics are merged.
        exact_sums: Names among `sums` that contain fractions; see `exact_sum`.
    """

    settings: ClassVar[tuple[str, ...]] = ()
    sums: ClassVar[tuple[str, ...]] = ()
    exact_sums: ClassVar[tuple[str, ...]] = ()

    def merge(self, other: Self) -> None:
        """Add the sums of another metric.

        Raises:
            ValueError: If the other metric has another type or other settings.
        """
        self._check_like(other)
        for name in self.sums:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in self.exact_sums:
            _carry(getattr(self, name))

    def state(self) -> State:
        """Return the settings and sums as arrays for `np.savez`."""
        return {name: np.array(getattr(self, name)) for name in (*self.settings, *self.sums)}

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> Self:
        """Restore a metric from its state, such as the result of `np.load`.

        Raises:
            ValueError: If the state lacks an array.
        """
        metric = cls._from_settings(state)
        for name in cls.sums:
            setattr(metric, name, np.array(state[name], dtype=np.int64))
        return metric

    @classmethod
    def _from_settings(cls, state: Mapping[str, np.ndarray]) -> Self:
        missing = sorted({*cls.settings, *cls.sums} - set(state))
        if missing:
            raise ValueError(f"Invalid state of {cls.__name__}: it lacks {missing}.")
        return cls(**{name: np.asarray(state[name]).tolist() for name in cls.settings})

    def compute(self) -> dict[str, Any]:
        """Compute the scores of all images added so far."""
        raise NotImplementedError

    def _check_like(self, other: "Metric") -> None:
        if type(other) is not type(self):
            raise ValueError(f"A {type(other).__name__} cannot be merged into a {type(self).__name__}.")
        for name in self.settings:
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise ValueError(f"Metrics of different {name} cannot be merged: {ours} and {theirs}.")


def exact_sum(*shape: int) -> np.ndarray:
    """Create sums of fractions as multiples of 2**-52, in a high word and a low word of 32 bits.

    Unlike a sum of floats, the result does not depend on the order of the summands.

    Returns:
        Zeros (*shape, 2) int64.
    """
    return np.zeros((*shape, 2), dtype=np.int64)


def as_fixed(numerator: int, denominator: int) -> int:
    """Return numerator / denominator as an integer multiple of 2**-52, rounded down."""
    return (int(numerator) << _FRACTION_BITS) // int(denominator)


def add_fixed(sums: np.ndarray, index: int, value: int) -> None:
    """Add a value of `as_fixed` to one entry of an exact sum."""
    sums[index, 0] += value >> _WORD
    sums[index, 1] += value & ((1 << _WORD) - 1)
    _carry(sums[index])


def exact_values(sums: np.ndarray) -> list[float]:
    """Convert the entries (N, 2) of an exact sum to floats, each rounded once."""
    return [((high << _WORD) + low) / (1 << _FRACTION_BITS) for high, low in sums.tolist()]


def _carry(sums: np.ndarray) -> None:
    sums[..., 0] += sums[..., 1] >> _WORD
    sums[..., 1] &= (1 << _WORD) - 1


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None, independent of their order, or None without values."""
    present = [value for value in values if value is not None]
    return math.fsum(present) / len(present) if present else None


def ratio(numerator: int, denominator: int) -> float | None:
    """Return numerator / denominator, or None for a zero denominator."""
    return int(numerator) / int(denominator) if denominator else None


def harmonic_mean(*values: float | None) -> float | None:
    """Return the harmonic mean, for example of base and novel classes; 0 if a value is 0, None if one is None."""
    if any(value is None for value in values):
        return None
    return len(values) / math.fsum(1 / value for value in values) if all(values) else 0.0


def chosen_classes(classes: Sequence[int] | None, num_classes: int) -> list[int]:
    """Return the checked class indices that a score averages, all classes for None.

    Raises:
        ValueError: If an index is not a class or is repeated.
    """
    if classes is None:
        return list(range(num_classes))
    chosen = [int(index) for index in classes]
    wrong = sorted(index for index in set(chosen) if not 0 <= index < num_classes)
    if wrong or len(set(chosen)) < len(chosen):
        raise ValueError(f"`classes` must be different integers from 0 to {num_classes - 1}, got {chosen}.")
    return chosen


def check_absent(absent: str) -> None:
    """Check the convention for classes without ground truth."""
    if absent not in ABSENT:
        raise ValueError(f"`absent` must be one of {list(ABSENT)}, got {absent!r}.")


def check_num_classes(num_classes: int) -> int:
    """Check and return the number of classes, which must be at least 1."""
    if num_classes < 1:
        raise ValueError(f"`num_classes` must be at least 1, got {num_classes}.")
    return int(num_classes)


def check_is_thing(is_thing: Sequence[bool]) -> list[bool]:
    """Check and return which classes are things; there must be at least one class."""
    if not len(is_thing):
        raise ValueError("`is_thing` must have at least one class.")
    return [bool(thing) for thing in is_thing]


def class_ious(right: Sequence[int], true: Sequence[int], predicted: Sequence[int], absent: str) -> list[float | None]:
    """Return the IoU of each class, None for classes that `absent` leaves out.

    Args:
        right: Number of pixels of each class that are predicted as that class.
        true: Number of pixels of each class in the ground truth.
        predicted: Number of pixels of each class in the prediction.
        absent: Treatment of classes without ground truth, see `check_absent`.
    """
    unions = [a + b - c for a, b, c in zip(true, predicted, right, strict=True)]
    scored = true if absent == "left_out" else unions
    return [ratio(a, b) if chosen else None for a, b, chosen in zip(right, unions, scored, strict=True)]


def check_windows(windows: Sequence[int]) -> list[int]:
    """Check and return window lengths in frames, which must be different and at least 1."""
    frames = [int(window) for window in windows]
    if not frames or min(frames) < 1 or len(set(frames)) < len(frames):
        raise ValueError(f"`windows` must be different numbers of frames, each at least 1, got {list(windows)}.")
    return frames


def check_maps(prediction: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Convert prediction and ground truth to arrays, and check that they are integers (H, W) of the same size."""
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    if prediction.ndim != 2 or prediction.shape != truth.shape:
        raise ValueError(
            f"Prediction and ground truth must have the same size (height, width), got {prediction.shape} and "
            f"{truth.shape}: resize the prediction to the ground truth."
        )
    for name, array in (("prediction", prediction), ("ground truth", truth)):
        if not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"The {name} must contain integers, got {array.dtype}.")
    return prediction, truth


def check_truth(truth: np.ndarray, num_classes: int) -> None:
    """Check that the ground truth has no class index beyond the last, such as an unmapped ignore value."""
    if truth.size and truth.max() >= num_classes:
        raise ValueError(
            f"The ground truth contains class {truth.max()}, but there are {num_classes} classes, numbered from 0: "
            "set ignored pixels to a negative value."
        )
