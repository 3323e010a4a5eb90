"""Fine-tuning on needle tasks: what a sequence holds and scores, who gets which, and a run that stops and resumes."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch

from megarat import cli
from megarat.config import Config
from megarat.data.tokenizer import Tokenizer, load_tokenizer
from megarat.errors import StoppedEarly, UserError
from megarat.eval.needle import NeedleMaker
from megarat.train import loop
from megarat.train.adapt import adapt
from megarat.train.loop import pretrain
from megarat.train.task_data import TaskLoader, needle_tasks

LENGTH, VOCAB = 900, 128


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """A corpus whose tokenizer takes every character for a token; id 2 is EOS."""
    from tokenizers import Tokenizer as HF
    from tokenizers import decoders, models

    folder = tiny_run.write_shards(tmp_path_factory.mktemp("shards"))
    alphabet = ["<unk>", "<s>", "</s>", *map(chr, range(32, 127)), "\n"]
    made = HF(models.BPE({piece: i for i, piece in enumerate(alphabet)}, [], unk_token="<unk>"))
    made.decoder = decoders.Fuse()
    (folder / "tokenizer").mkdir()
    made.save(str(folder / "tokenizer" / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def tokenizer(shards) -> Tokenizer:
    return load_tokenizer(shards / "tokenizer")


def config(shards: Path, run_dir: Path | str = "unused", **changes) -> Config:
    given = {"shards": str(shards), "task": "needle:single_1,multivalue,multikey_2", "sequence_length": LENGTH}
    data = {**given, **changes.pop("data", {})}
    train = {"pairs": 3, "precision": "fp32", **changes.pop("train", {})}
    return tiny_run.config(run={"dir": str(run_dir)}, data=data, train=train, model={"vocab": VOCAB}, **changes)


def test_a_sequence_is_prompt_answer_eos_with_the_loss_on_answer_and_eos(shards, tokenizer):
    loader = TaskLoader(config(shards), tokenizer)
    made = NeedleMaker(tokenizer, LENGTH - 128, seed=7)
    batch = loader.pair(2)
    assert [inputs.shape for inputs, _ in batch.micro_batches] == [(2, LENGTH)] * 2 and batch.tokens == 4 * LENGTH
    tasks = set()
    for row in range(4):
        inputs, labels = (part[row % 2] for part in batch.micro_batches[row // 2])
        scored = torch.nonzero(labels != -100)[:, 0]
        assert scored.tolist() == list(range(int(scored[0]), int(scored[-1]) + 1))
        start = int(scored[0]) + 1
        matches = [
            task
            for task in needle_tasks("needle")
            if made.sample(task, "train", 8 + row).prompt == tokenizer.decode(inputs[:start].tolist())
        ]
        [task] = matches
        tasks.add(task)
        answer = made.sample(task, "train", 8 + row).answers
        assert tokenizer.decode(labels[scored[:-1]].tolist()) == ",".join(answer) and int(labels[scored[-1]]) == tokenizer.eos_id
        assert torch.equal(inputs[start : start + len(scored) - 1], labels[scored[:-1]])  # what is predicted is read next
        assert set(inputs[start + len(scored) - 1 :].tolist()) == {tokenizer.eos_id}
    assert tasks <= {"single_1", "multivalue", "multikey_2"}


def test_every_task_is_drawn_and_no_sample_twice(shards, tokenizer):
    loader = TaskLoader(config(shards), tokenizer)
    prompts = [loader.sample(position)[0].tobytes() for position in range(30)]
    assert len(set(prompts)) == 30
    asked = b"".join(tokenizer.decode(np.frombuffer(p, np.uint16).tolist()).encode() for p in prompts)
    assert asked.count(b"What are all") > 3 and asked.count(b"The grass is green") > 3


def test_ranks_and_micro_batches_share_the_same_samples(shards, tokenizer):
    def rows(size: int, micro: int):
        settings = config(shards, train={"micro_batch": micro})
        pairs = [TaskLoader(settings, tokenizer, rank, size).pair(1) for rank in range(size)]
        inputs = torch.cat([inputs for step in zip(*(pair.micro_batches for pair in pairs), strict=True) for inputs, _ in step])
        return inputs, sum(pair.digest for pair in pairs) % 2**64

    alone, digest = rows(1, 2)
    for size, micro in ((2, 2), (2, 1), (4, 1)):
        shared, shared_digest = rows(size, micro)
        assert torch.equal(shared, alone) and shared_digest == digest


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("ppl", "data.task is 'ppl'; expected needle"),
        ("needle,ppl", "expected needle"),
        ("hay", "unknown task 'hay'"),
        ("needle:single_4", "needle:single_4 is unknown"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(task, message):
    with pytest.raises(UserError) as error:
        needle_tasks(task)
    assert message in str(error.value)


def test_sft_is_another_word_for_the_needle_tasks():
    assert needle_tasks("sft") == needle_tasks("needle") and len(needle_tasks("sft")) == 8
    assert needle_tasks("sft:single_1,multikey_2") == ("single_1", "multikey_2")


def test_a_tokenizer_beyond_the_model_is_refused(shards, tokenizer):
    settings = tiny_run.config(data={"task": "needle"}, model={"vocab": 64})
    with pytest.raises(UserError, match=r"has 99 entries, but model.vocab is 64"):
        TaskLoader(settings, tokenizer)


def test_a_text_that_is_none_is_named_by_its_setting(shards, tokenizer):
    with pytest.raises(UserError, match=r"^data\.task_text /nowhere: cannot read it"):
        TaskLoader(config(shards, data={"task_text": "/nowhere"}), tokenizer)


def test_an_answer_longer_than_its_room_is_refused(shards, tokenizer, monkeypatch):
    monkeypatch.setattr("megarat.train.task_data.ANSWER_TOKENS", -200)  # so that prompts leave no room at all
    with pytest.raises(UserError, match=r"has 7 tokens of tokenizer\.json, more than the"):
        TaskLoader(config(shards, data={"task": "needle:single_1"}), tokenizer, 0, 1).sample(0)


@pytest.fixture(scope="module")
def parent(mesh, shards, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parent")
    settings = config(shards, folder, data={"task": "", "sequence_length": 16}, train={"pairs": 1})
    pretrain(settings)
    return folder


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_a_fine_tuning_stopped_and_resumed_equals_an_uninterrupted_one(parent, shards, tmp_path, monkeypatch):
    adapt(config(shards, tmp_path / "whole"), parent)
    original = loop.train_pair

    def stop(*args):
        os.kill(os.getpid(), signal.SIGUSR1)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_pair", stop)
        with pytest.raises(StoppedEarly, match="after pair 1 of 3"):
            adapt(config(shards, tmp_path / "run"), parent)
    adapt(config(shards, tmp_path / "run"), parent)
    for key in ("pair", "loss_dense", "grad_norm_dense", "stream_hash"):
        assert [line[key] for line in lines(tmp_path / "run")] == [line[key] for line in lines(tmp_path / "whole")]
    assert all(line["loss_sparse"] is None for line in lines(tmp_path / "run"))


def test_the_command_fine_tunes_with_the_sparse_pass_where_asked(parent, shards, tmp_path, capsys):
    path = tmp_path / "sft.yaml"
    path.write_text(config(shards, tmp_path / "run", data={"task": ""}, train={"pairs": 1}).to_yaml())
    arguments = ["--from", str(parent), "--task", "needle:single_1", "--sparse-pass", "--pattern", "D=8"]
    assert cli.main(["adapt", str(path), *arguments]) == 0
    [line] = lines(tmp_path / "run")
    assert line["loss_sparse"] > 0 and line["loss_dense"] > 0 and line["tokens"] == 4 * LENGTH
