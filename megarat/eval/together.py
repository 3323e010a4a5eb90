"""Work of ranks that share a model: the first of them takes items from the common work, the others compute each along with it.

Between two items the others wait for the first rank's word, and what it raises there is told to them. In the middle of an item they wait for it in a
collective of the model, where no word would be heard: a rank that fails there leaves, and that ends what the others wait in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
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
        self._amid_item = False

    def run(self, items: Sequence[Item], on_done: Callable[[int], object] = lambda _: None) -> Results:
        """As ``Work.run``. What is raised on one rank ends the others as well."""
        if comm.size(self._group) == 1:
            return self._work.run(items, on_done)
        if comm.rank(self._group) > 0:
            return self._follow(items)
        try:
            results = self._work.run([self._led(index, item) for index, item in enumerate(items)], on_done)
        except BaseException as error:
            if not self._amid_item:
                with suppress(RuntimeError):  # nobody may be left to hear it
                    self._tell(error)
            raise
        self._tell(results)
        return results

    def _led(self, index: int, item: Item) -> Item:
        """The item, with a word to the others before it begins."""

        def run(compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
            self._tell(index)
            self._amid_item = True
            result = compute()
            self._amid_item = False
            return result

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
