"""Work that threads begin before its result is asked for."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["ahead_of"]

Item, Result = TypeVar("Item"), TypeVar("Result")


def ahead_of(work: Callable[[Item], Result], items: Iterable[Item], threads: int, depth: int) -> Iterator[Result]:
    """``map(work, items)``, with up to ``depth`` items begun and not yet taken. An error is raised in its item's
    place."""
    with ThreadPoolExecutor(threads, thread_name_prefix="kd-cache") as pool:
        begun: collections.deque[Future[Result]] = collections.deque()
        try:
            for item in items:
                begun.append(pool.submit(work, item))
                if len(begun) >= depth:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:  # the taker has gone: what has not begun never does
                future.cancel()
