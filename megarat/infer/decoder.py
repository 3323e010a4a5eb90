"""The device's part of generation: rows of a cache, what each draws with, and a step that the host only has to start.

A step is captured in one CUDA graph for each bucket (1, 2, 4, … rows, then all) and way of drawing (greedy, or anything). Buffers
are static, lengths come from the device, tokens are drawn there: the host launches a step before it has seen the tokens of the one before.

    snapshot = decoder.snapshot(n)    the newest tokens of the first n rows, on their way to the host
    decoder.step(rows, greedy=…)      the device goes on
    snapshot.tokens()                 waits for the copy only

Shapes: B rows, T tokens of a prompt, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megarat.config import ModelConfig
from megarat.infer.cache import SparseCache
from megarat.infer.forward import decode_step, prefill
from megarat.infer.reading import Reading
from megarat.infer.sampling import Draws, Sampling, draw
from megarat.model.lm import RATPlusLM

_PREFILL_BYTES = 8 << 30  # of activations while a prompt is read; longer ones are read in chunks


class Snapshot:
    """Tokens on their way to the host."""

    def __init__(self, ids_B: Tensor, host_B: Tensor | None) -> None:
        self._event: torch.cuda.Event | None = None
        if host_B is None:
            self._ids_B = ids_B.clone()
            return
        self._ids_B = host_B[: len(ids_B)]
        self._ids_B.copy_(ids_B, non_blocking=True)
        self._event = torch.cuda.Event()
        self._event.record()

    def tokens(self) -> list[int]:
        """Wait for them. A decoder has one place for its snapshots: read one before the next is taken."""
        if self._event is not None:
            self._event.synchronize()
        tokens: list[int] = self._ids_B.tolist()
        return tokens


class Decoder:
    """``rows`` sequences of at most ``capacity`` tokens under one reading.

    ``buckets`` are the batch sizes a step is made for (default: powers of two, and ``rows``); only ids below ``vocabulary`` are drawn.
    ``graphs``: whether steps are captured in CUDA graphs. On CPUs and where ranks share the model, steps are always plain calls. Raises
    ``UserError`` where that many rows do not fit into memory.
    """

    def __init__(
        self,
        model: RATPlusLM,
        reading: Reading,
        rows: int,
        capacity: int,
        vocabulary: int | None = None,
        *,
        buckets: Sequence[int] | None = None,
        graphs: bool = True,
    ) -> None:
        weight = model.embedding.weight
        self._model = model
        self._vocabulary = vocabulary or model.config.vocab
        self.cache = SparseCache(model.config, reading, rows, capacity, weight.dtype, weight.device, model.own_heads)
        self.draws = Draws.of(rows, self._vocabulary, weight.device)
        self.ids_B = torch.zeros(
            rows, dtype=torch.int64, device=weight.device
        )  # the newest token of each row, not yet in the cache
        self.buckets = tuple(buckets or powers_of_two(rows))
        self._active_B = torch.zeros(rows, dtype=torch.int64, device=weight.device)
        self._active: list[int] = []
        is_cuda = weight.device.type == "cuda"
        self._host_B = torch.zeros(rows, dtype=torch.int64, pin_memory=True) if is_cuda else None
        self._capturing = graphs and is_cuda and model.ranks.size == 1
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph | None] = {}
        self._pool = torch.cuda.graph_pool_handle() if self._capturing else None
        self._chunk = prefill_chunk(model.config)

    def bucket(self, rows: int) -> int:
        """The smallest bucket that holds so many rows."""
        return next(size for size in self.buckets if size >= rows)

    @torch.no_grad()
    def read(self, first: int, prompts: Sequence[Sequence[int]], samplings: Sequence[Sampling]) -> None:
        """Read prompts into the rows from ``first`` on, as one batch, and draw the first token of each. One prompt may serve all rows."""
        longest = max(map(len, prompts))
        ids_BT = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in prompts])
        lengths_B = torch.tensor([len(ids) for ids in prompts])
        self.read_padded(first, ids_BT, lengths_B, samplings, padded=min(map(len, prompts)) < longest)

    @torch.no_grad()
    def read_padded(
        self, first: int, ids_BT: Tensor, lengths_B: Tensor, samplings: Sequence[Sampling], padded: bool = True
    ) -> None:
        """The same for token ids (B, T), int64, right-padded, of ``lengths_B`` tokens each."""
        device, end = self.ids_B.device, first + len(samplings)
        own = self.cache.rows(first, first + len(ids_BT))
        logits_BV = self._prefill(ids_BT.to(device), lengths_B.to(device), own, padded)
        if len(ids_BT) < len(samplings):
            self.cache.rows(first + 1, end).copy_(own)
            logits_BV = logits_BV.expand(len(samplings), -1)
        draws = self.draws.rows(first, end)
        draws.start(samplings)
        self._draw(logits_BV, draws, self.ids_B[first:end], all(sampling.takes_the_likeliest for sampling in samplings))

    def _prefill(self, ids_BT: Tensor, lengths_B: Tensor, cache: SparseCache, padded: bool) -> Tensor:
        """Logits behind each prompt, of as many prompts at a time as their activations allow."""
        many = max(1, self._chunk // ids_BT.shape[1])
        parts = [
            prefill(self._model, ids_BT[n : n + many], lengths_B[n : n + many], cache.rows(n, n + many), self._chunk, padded)
            for n in range(0, len(ids_BT), many)
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def move(self, row: int, target: int) -> None:
        """Put a row's sequence into another row."""
        self.cache.rows(target, target + 1).copy_(self.cache.rows(row, row + 1))
        for part in (self.ids_B, *self.draws):
            part[target].copy_(part[row])

    def snapshot(self, rows: int) -> Snapshot:
        """The newest tokens of the first rows."""
        return Snapshot(self.ids_B[:rows], self._host_B)

    @torch.no_grad()
    def step(self, rows: list[int], greedy: bool) -> None:
        """Decode the newest token of these rows (ascending) and draw the next; of the others nothing that counts changes but their length, to 0.

        ``greedy`` vouches that all of them take the likeliest token.
        """
        if rows != self._active:
            self._active = rows
            active_B = torch.zeros(len(self._active_B), dtype=torch.int64)
            active_B[rows] = 1
            self._active_B.copy_(active_B)
            self.cache.lengths_B.mul_(self._active_B)  # rows that nobody reads are short: they cost nothing
        key = (self.bucket(rows[-1] + 1), greedy)
        graph = self._graphs.get(key)
        if graph is None and key in self._graphs:  # its kernels are compiled and chosen by now: capturing runs nothing
            graph = self._graphs[key] = self._captured(*key)
        if graph is None:
            self._run(*key)
            if self._capturing:
                self._graphs[key] = None
        else:
            graph.replay()

    def _captured(self, bucket: int, greedy: bool) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            self._run(bucket, greedy)
        return graph

    def _run(self, bucket: int, greedy: bool) -> None:
        logits_BV = decode_step(self._model, self.ids_B[:bucket], self.cache.rows(0, bucket), self._active_B[:bucket])
        self._draw(logits_BV, self.draws.rows(0, bucket), self.ids_B[:bucket], greedy)

    def _draw(self, logits_BV: Tensor, draws: Draws, ids_B: Tensor, greedy: bool) -> None:
        logits_BV = logits_BV[:, : self._vocabulary]
        ids_B.copy_(logits_BV.argmax(dim=-1) if greedy else draw(logits_BV, draws))


def powers_of_two(rows: int) -> list[int]:
    """1, 2, 4, … below ``rows``, and ``rows``."""
    return [*(1 << n for n in range((rows - 1).bit_length())), rows]


def prefill_chunk(config: ModelConfig) -> int:
    """Tokens read at a time: about 26 bytes a channel are alive at once (fp32 residuals, the fused projection, the FFN)."""
    return max(1024, _PREFILL_BYTES // (26 * config.hidden) // 1024 * 1024)
