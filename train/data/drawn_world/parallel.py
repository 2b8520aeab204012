"""Drawing many scenes with several processes."""

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
    """`function(index)` for every scene in order, with a progress bar; `num_proc` > 1 needs a picklable function."""
    progress = {"desc": title, "total": scenes, "unit": "scene", "disable": not show_progress}
    if num_proc <= 1:
        yield from tqdm(map(function, range(scenes)), **progress)
        return
    with get_context("spawn").Pool(num_proc) as pool:
        yield from tqdm(pool.imap(function, range(scenes), chunksize=32), **progress)
