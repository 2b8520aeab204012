"""What all metrics share: settings, sums that merge exactly, and their storage as arrays."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np

ABSENT = ("left_out", "zero")
State = dict[str, np.ndarray]

_FRACTION_BITS = 52
_WORD = 32  # bits of the low one of the two int64 words of an exact sum


class Metric:
    """A metric as settings and sums. Adding in any order, in any number of processes, gives the same bits.

    Attributes:
        settings: names of the arguments of the constructor, kept as attributes.
        sums: names of int64 arrays that are added when two metrics merge.
        exact_sums: those among `sums` that hold fractions, see `exact_sum`.
    """

    settings: ClassVar[tuple[str, ...]] = ()
    sums: ClassVar[tuple[str, ...]] = ()
    exact_sums: ClassVar[tuple[str, ...]] = ()

    def merge(self, other: Self) -> None:
        """Add all that another metric has counted.

        Raises:
            ValueError: it is of another kind or was made with other settings.
        """
        self._check_like(other)
        for name in self.sums:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in self.exact_sums:
            _carry(getattr(self, name))

    def state(self) -> State:
        """Settings and sums as arrays, fit for `np.savez`."""
        return {name: np.array(getattr(self, name)) for name in (*self.settings, *self.sums)}

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> Self:
        """The metric that gave this state, which may come from `np.load`.

        Raises:
            ValueError: the state lacks an array; it is named.
        """
        metric = cls._from_settings(state)
        for name in cls.sums:
            setattr(metric, name, np.array(state[name], dtype=np.int64))
        return metric

    @classmethod
    def _from_settings(cls, state: Mapping[str, np.ndarray]) -> Self:
        missing = sorted({*cls.settings, *cls.sums} - set(state))
        if missing:
            raise ValueError(f"This is no state of {cls.__name__}: it lacks {missing}.")
        return cls(**{name: np.asarray(state[name]).tolist() for name in cls.settings})

    def compute(self) -> dict[str, Any]:
        """The scores of all that was added so far."""
        raise NotImplementedError

    def _check_like(self, other: "Metric") -> None:
        if type(other) is not type(self):
            raise ValueError(f"A {type(other).__name__} cannot be merged into a {type(self).__name__}.")
        for name in self.settings:
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise ValueError(f"Metrics of different {name} cannot be merged: {ours} and {theirs}.")


def exact_sum(*shape: int) -> np.ndarray:
    """(*shape, 2) int64 zeros: sums of fractions as whole multiples of 2**-52, in a high and a low word of 32 bits.

    A sum of floats depends on its order in the last bits; this one does not.
    """
    return np.zeros((*shape, 2), dtype=np.int64)


def as_fixed(numerator: int, denominator: int) -> int:
    """numerator / denominator as a multiple of 2**-52, rounded down."""
    return (int(numerator) << _FRACTION_BITS) // int(denominator)


def add_fixed(sums: np.ndarray, index: int, value: int) -> None:
    """Add a value of `as_fixed` to one entry of an exact sum."""
    sums[index, 0] += value >> _WORD
    sums[index, 1] += value & ((1 << _WORD) - 1)
    _carry(sums[index])


def exact_values(sums: np.ndarray) -> list[float]:
    """The entries (N, 2) of an exact sum as floats, each rounded once."""
    return [((high << _WORD) + low) / (1 << _FRACTION_BITS) for high, low in sums.tolist()]


def _carry(sums: np.ndarray) -> None:
    sums[..., 0] += sums[..., 1] >> _WORD
    sums[..., 1] &= (1 << _WORD) - 1


def mean(values: Iterable[float | None]) -> float | None:
    """The mean of those values that are there, independent of their order; None if there are none."""
    present = [value for value in values if value is not None]
    return math.fsum(present) / len(present) if present else None


def ratio(numerator: int, denominator: int) -> float | None:
    """A share; None of nothing."""
    return int(numerator) / int(denominator) if denominator else None


def harmonic_mean(*values: float | None) -> float | None:
    """The harmonic mean, as of base and novel classes; 0 where one of them is 0, None where one is missing."""
    if any(value is None for value in values):
        return None
    return len(values) / math.fsum(1 / value for value in values) if all(values) else 0.0


def chosen_classes(classes: Sequence[int] | None, num_classes: int) -> list[int]:
    """The classes that a score is taken over; all of them for None.

    Raises:
        ValueError: one is not a class, or stands there twice.
    """
    if classes is None:
        return list(range(num_classes))
    chosen = [int(index) for index in classes]
    wrong = sorted(index for index in set(chosen) if not 0 <= index < num_classes)
    if wrong or len(set(chosen)) < len(chosen):
        raise ValueError(f"classes must be different numbers from 0 to {num_classes - 1}, got {chosen}.")
    return chosen


def check_absent(absent: str) -> None:
    """Refuse an unknown convention for classes without ground truth."""
    if absent not in ABSENT:
        raise ValueError(f"absent must be one of {list(ABSENT)}, got {absent!r}.")


def check_num_classes(num_classes: int) -> int:
    """Refuse a number of classes below one."""
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}.")
    return int(num_classes)


def check_windows(windows: Sequence[int]) -> list[int]:
    """Refuse numbers of frames below one or given twice."""
    frames = [int(window) for window in windows]
    if not frames or min(frames) < 1 or len(set(frames)) < len(frames):
        raise ValueError(f"windows must be different numbers of frames, each at least 1, got {list(windows)}.")
    return frames


def check_maps(prediction: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays; refuse what are not whole numbers (H, W) of one size."""
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    if prediction.ndim != 2 or prediction.shape != truth.shape:
        raise ValueError(
            f"Prediction and truth must be (height, width) and of one size, got {prediction.shape} and {truth.shape}; "
            "resize the prediction to the truth."
        )
    for name, array in (("prediction", prediction), ("truth", truth)):
        if not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"The {name} must hold whole numbers, got {array.dtype}.")
    return prediction, truth


def check_truth(truth: np.ndarray, num_classes: int) -> None:
    """Refuse classes beyond the last, most often a value for "ignore" that was left standing."""
    if truth.size and truth.max() >= num_classes:
        raise ValueError(
            f"The truth holds {truth.max()}, but there are {num_classes} classes, counted from 0; "
            "pixels that are not scored must be negative."
        )
