"""Parallel drawing of scenes with several processes."""

from collections.abc import Callable, Iterator
from multiprocessing import get_context
from typing import TypeVar

from tqdm.auto import tqdm

Result = TypeVar("Result")


def map_scenes(
    function: Callable[[int], Result],
    scenes: int,
    num_proc: int = 1,
    title: str = "scenes",
    show_progress: bool = True,
) -> Iterator[Result]:
    """Yield `function(index)` of every scene in order, with a progress bar.

    Args:
        function: Function of the scene index. It must be picklable if `num_proc` is above 1.
        scenes: Number of scenes.
        num_proc: Number of processes.
        title: Title of the progress bar.
        show_progress: Whether to show the progress bar.
    """
    progress = {"desc": title, "total": scenes, "unit": "scene", "disable": not show_progress}
    if num_proc <= 1:
        yield from tqdm(map(function, range(scenes)), **progress)
        return
    with get_context("spawn").Pool(num_proc) as pool:
        yield from tqdm(pool.imap(function, range(scenes), chunksize=32), **progress)
