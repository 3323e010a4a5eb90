"""Forward and backward of a micro-batch recorded once as a CUDA graph and replayed: no Python, no launches one by one.

What a graph does is fixed when it is recorded: the pattern, the shape, and the memory that everything lies in. So there is one graph a
pattern, with its own inputs and its own activations; gradients go where the engine's hooks add them up, which never moves. The last
micro-batch of an update is left to the engine: it reduces gradients over ranks and does DeepSpeed's bookkeeping. Activations are
therefore held twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megarat.model.pattern import Patterns

Replay = Callable[[], None]
Record = Callable[[Replay], Replay]


class _Recorded(NamedTuple):
    ids_BT: Tensor
    labels_BT: Tensor
    loss: Tensor
    replay: Replay


class RecordedMicroBatches:
    """Micro-batches of one shape through one model, by graphs that are recorded as patterns are met again."""

    def __init__(self, model: nn.Module, micro_batches: int, record: Record) -> None:
        """``micro_batches`` an update; each one's gradients count that much less. ``record`` runs a function to make its replay."""
        self._model = model
        self._share = 1.0 / micro_batches
        self.record = record
        self._recorded: dict[Patterns, _Recorded] = {}
        self._met: set[Patterns] = set()

    def loss(self, micro_batch: Sequence[Tensor], patterns: Patterns) -> Tensor | None:
        """Adds the gradients of a micro-batch (inputs, labels) and returns its loss.

        None where it is left to the caller: under patterns met for the first time, since kernels are compiled and libraries set up on
        first use, which no graph can hold.
        """
        if patterns not in self._met:
            return None
        ids_BT, labels_BT = micro_batch
        if patterns not in self._recorded:
            self._recorded[patterns] = self._recording(ids_BT, labels_BT, patterns)
        recorded = self._recorded[patterns]
        recorded.ids_BT.copy_(ids_BT)
        recorded.labels_BT.copy_(labels_BT)
        recorded.replay()
        return recorded.loss.clone()

    def met(self, patterns: Patterns) -> None:
        """A whole micro-batch has run under these patterns without a graph."""
        self._met.add(patterns)

    def _recording(self, ids_BT: Tensor, labels_BT: Tensor, patterns: Patterns) -> _Recorded:
        ids_BT, labels_BT = ids_BT.clone(), labels_BT.clone()
        held = torch.zeros((), device=ids_BT.device)

        def run() -> None:
            loss = self._model(ids_BT, patterns=patterns, labels_BT=labels_BT)
            (loss * self._share).backward()
            held.copy_(loss.detach())

        return _Recorded(ids_BT, labels_BT, held, self.record(run))


class Recorder:
    """Records on a GPU; all graphs share one pool of memory, as they run one behind the other.

    The node that takes a parameter's gradient runs on the stream that was current when it was made, whatever stream its backward runs on,
    and a graph holds one stream alone: ``stream`` must be the one on which the parameters' first backward nodes (DeepSpeed's hooks hang on
    them) were made, and not the default one, which nothing can be recorded on.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Replay) -> Replay:
        """Record what ``run`` launches; calling the result launches it again."""
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            run()
        return graph.replay
