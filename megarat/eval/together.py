"""Work of ranks that share a model: the first of them takes items from the common work, the others compute each along with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import distributed
from torch.distributed import ProcessGroup

from megarat import comm
from megarat.eval.queue import Item, Work

Results = list[dict[str, Any]]


class Together:
    """``Work`` of a group of ranks, each of which lists the same items; ``run`` returns the same results on all of them."""

    def __init__(self, work: Work, group: ProcessGroup | None) -> None:
        self._work, self._group = work, group

    def run(self, items: Sequence[Item], on_done: Callable[[int], object] = lambda _: None) -> Results:
        """As ``Work.run``. What is raised on the first rank ends the others as well."""
        if comm.size(self._group) == 1:
            return self._work.run(items, on_done)
        if comm.rank(self._group) > 0:
            return self._follow(items)
        told: Results | BaseException = RuntimeError("the first rank has ended")
        try:
            told = self._work.run([self._led(index, item) for index, item in enumerate(items)], on_done)
        except BaseException as error:
            told = error
            raise
        finally:
            self._tell(told)
        return told

    def _led(self, index: int, item: Item) -> Item:
        """The item, with a word to the others before it begins."""

        def run(compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
            self._tell(index)
            return compute()

        return item._replace(run=partial(run, item.run))

    def _follow(self, items: Sequence[Item]) -> Results:
        while True:
            told = self._tell(None)
            if isinstance(told, BaseException):
                raise told
            if isinstance(told, list):
                return told
            items[told].run()

    def _tell(self, what: Any) -> Any:
        """Hand the first rank's word to all."""
        said = [what]
        distributed.broadcast_object_list(said, group=self._group, group_src=0)
        return said[0]
