"""A run's data from its config: one corpus, a blend, a remote one; the budget of epochs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import make_corpus

from megarat import config as configuration
from megarat.config import Config
from megarat.data.corpus import Corpus, check_budget, open_corpus
from megarat.data.loader import Loader, chain
from megarat.errors import UserError

T, GLOBAL_BATCH = 16, 12


def config_of(shards: Any, pairs: int = 6, **data: Any) -> Config:
    return configuration.from_dict(
        {
            "run": {"dir": "unused"},
            "model": {"vocab": 1000, "hidden": 16, "heads": 2},
            "data": {"shards": shards, "sequence_length": T, **data},
            "train": {"pairs": pairs, "global_batch": GLOBAL_BATCH, "micro_batch": 1, "seed": 4},
        }
    )


def loader_of(corpus: Corpus, rank: int = 0, size: int = 1) -> Loader:
    return Loader(
        corpus.reader, corpus.plan, sequence_length=T, global_batch=GLOBAL_BATCH, micro_batch=1, data_rank=rank, data_size=size
    )


def stream_hash(config: Config, sizes: list[int]) -> str:
    """Hash over the pairs 0, 1, …: pair n is read by sizes[n] ranks, each from a corpus opened anew."""
    value = ""
    for n, size in enumerate(sizes):
        digests = [loader_of(open_corpus(config), rank, size).pair(n).digest for rank in range(size)]
        value = chain(value, sum(digests) % 2**64)
    return value


@pytest.fixture
def two(tmp_path: Path) -> tuple[str, str]:
    for name, seed in (("a", 1), ("b", 2)):
        make_corpus(tmp_path / name / "train", seed=seed, documents=40 if name == "a" else 13)
    return str(tmp_path / "a"), str(tmp_path / "b")


@pytest.mark.parametrize("data", [{}, {"shuffle_run": 2, "shuffle_window": 3}, {"order": "random_offsets"}])
@pytest.mark.parametrize("blend", [False, True])
def test_the_stream_hash_survives_restarts_on_any_number_of_ranks(
    two: tuple[str, str], blend: bool, data: dict[str, Any]
) -> None:
    config = config_of({two[0]: 0.75, two[1]: 0.25} if blend else two[0], **data)
    alone = stream_hash(config, [1] * 6)
    assert stream_hash(config, [1, 2, 4, 3, 12, 1]) == alone
    other = config_of(two[1], **data)
    assert stream_hash(other, [1] * 6) != alone


def test_a_blend_reads_each_corpus_in_the_proportion_of_the_weights(two: tuple[str, str]) -> None:
    corpus = open_corpus(config_of({two[0]: 3, two[1]: 1}))
    sizes = [part.num_tokens for part in corpus.parts]
    starts = corpus.plan.starts(np.arange(100 * 4))
    assert np.count_nonzero(starts < sizes[0]) == 300
    assert corpus.counts(400) == [300, 100]
    for start in starts.tolist():  # and no sample crosses from one corpus into the next
        assert (start < sizes[0]) == (start + T < sizes[0])
        assert len(corpus.reader.read(start, T + 1)) == T + 1


def test_the_identity_of_a_blend_depends_on_indexes_weights_and_order(two: tuple[str, str], tmp_path: Path) -> None:
    make_corpus(tmp_path / "c" / "train", seed=3)
    blends: list[Any] = [two[0], two[1], {two[0]: 1, two[1]: 1}, {two[1]: 1, two[0]: 1}, {two[0]: 1, two[1]: 2}]
    blends.append({two[0]: 1, str(tmp_path / "c"): 1})
    assert len({open_corpus(config_of(blend)).reader.identity for blend in blends}) == len(blends)
    moved = tmp_path / "moved"
    Path(two[0]).rename(moved)
    again = {str(moved): 1.0, two[1]: 1.0}
    (tmp_path / "a").symlink_to(moved)
    assert open_corpus(config_of(again)).reader.identity == open_corpus(config_of({two[0]: 1, two[1]: 1})).reader.identity


def test_a_corpus_behind_a_command_is_the_same_as_its_folder(two: tuple[str, str], tmp_path: Path) -> None:
    remote = config_of(f"pipe:cat {two[0]}/{{}}", cache=str(tmp_path / "cache"), cache_gb=0.001)
    assert stream_hash(remote, [2, 1, 3]) == stream_hash(config_of(two[0]), [1, 1, 1])
    assert list((tmp_path / "cache").rglob("*.tar"))


def test_corpora_of_different_tokenizers_do_not_blend(two: tuple[str, str]) -> None:
    index = Path(two[1]) / "train" / "index.json"
    index.write_text(index.read_text().replace("0" * 64, "1" * 64))
    with pytest.raises(UserError, match=r"b/train was made with test\.model \(SHA-256 1{64}\), but .*a/train with"):
        open_corpus(config_of({two[0]: 1, two[1]: 1}))


def test_corpora_whose_documents_end_with_different_ids_do_not_blend(two: tuple[str, str]) -> None:
    index = Path(two[1]) / "train" / "index.json"
    index.write_text(index.read_text().replace('"eos_id": 2', '"eos_id": 7'))
    with pytest.raises(UserError, match=r"documents of .*b/train end with id 7, those of .*a/train with 2"):
        open_corpus(config_of({two[0]: 1, two[1]: 1}))


def test_a_limit_in_tokens_keeps_the_rest_of_every_corpus_out(two: tuple[str, str]) -> None:
    limit = 100
    corpus = open_corpus(config_of({two[0]: 1, two[1]: 1}, limit_tokens=limit))
    assert [part.num_tokens for part in corpus.parts] == [limit, limit]
    whole = open_corpus(config_of({two[0]: 1, two[1]: 1}))
    second = whole.parts[0].num_tokens  # where the second corpus begins in the address space
    starts = np.unique(corpus.plan.starts(np.arange(200))).tolist()
    assert starts == [*range(0, limit - T, T), *range(second, second + limit - T, T)]
    with pytest.raises(UserError, match="corpus of 10 tokens is shorter than one sequence"):
        open_corpus(config_of(two[0], limit_tokens=10))


def test_another_tokenizer_beside_the_shards_than_theirs_is_refused(two: tuple[str, str]) -> None:
    (Path(two[0]) / "tokenizer").mkdir()
    (Path(two[0]) / "tokenizer" / "test.model").write_text("another")
    with pytest.raises(UserError, match=r"a/tokenizer/test\.model: SHA-256 .* is not that of the tokenizer the shards"):
        open_corpus(config_of(two[0]))


def test_the_budget_says_how_many_epochs_a_run_reads_and_holds_it_to_the_limit(two: tuple[str, str]) -> None:
    config = config_of({two[0]: 0.5, two[1]: 0.5}, pairs=100)
    corpus = open_corpus(config)
    lines = check_budget(config, corpus)
    read = 100 * GLOBAL_BATCH * T // 2
    for line, part in zip(lines, corpus.parts, strict=True):
        assert line.startswith(f"{part.location}: the run reads {read:,} tokens of {part.num_tokens:,}")
        assert line.endswith(f"{read / part.num_tokens:.3g} epochs")
    config.data.max_epochs = 2.0
    with pytest.raises(UserError, match=r"a/train: .* but data\.max_epochs is 2: lower train\.pairs from 100 to (\d+)") as error:
        check_budget(config, corpus)
    config.train.pairs = int(str(error.value).split(" to ")[1].split(",")[0])
    with pytest.raises(UserError, match="b/train"):  # the smaller one allows fewer
        check_budget(config, corpus)
    config.data.max_epochs = 100.0
    assert len(check_budget(config, corpus)) == 2


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ({}, r"data\.shards"),
        ({"a": 0}, r"data\.shards\.a is 0\.0; a weight must be greater than 0"),
        ({"a": "x"}, r"data\.shards\.a is 'x'"),
        ({1: 1.0}, r"data\.shards: found"),
        (["a", "b"], r"data\.shards: found \['a', 'b'\]; write a folder or URL, or a mapping"),
    ],
)
def test_a_bad_blend_is_refused_by_its_key(shards: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config_of(shards)
