"""A checkpoint of one mesh, read by ranks that share the model: the same logits, tokens and losses as on one process."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
import tiny_run
import torch

import megarat
from megarat import cli, mesh
from megarat.errors import UserError
from megarat.eval.perplexity import batch_loss
from megarat.infer import text
from megarat.infer.load import LoadedModel, load
from megarat.infer.sampling import Sampling
from megarat.parallel import worlds
from megarat.parallel.tensor import ALONE, TensorParallel
from megarat.train.loop import pretrain

READINGS = ("dense", "D=4,W=3,I=2", [["dense", "D=4"], ["D=2,W=3", "D=-1,W=5,I=2"]], "D=4 + topk blocks=2,size=4,score=max")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Written by two pipeline stages."""
    folder = tmp_path_factory.mktemp("pipelined")
    shards = tiny_run.write_shards(folder / "corpus")
    data, training, stages = {"shards": str(shards)}, {"pairs": 2}, {"pipeline": 2}
    worlds.run(2, pretrain, tiny_run.config(run={"dir": str(folder / "run")}, data=data, train=training, parallel=stages))
    return folder / "run"


def prompts() -> torch.Tensor:
    return torch.randint(0, tiny_run.VOCAB, (3, 20), generator=torch.Generator().manual_seed(0))


def answers(model: LoadedModel) -> list[dict[str, torch.Tensor]]:
    """Of each reading: logits, greedy and drawn tokens, and the summed loss."""
    found = []
    for spec in READINGS:
        reading, ids = model.reading(spec), prompts()
        mask = torch.ones_like(ids)
        mask[1, 15:] = 0
        found.append(
            {
                "logits": model(ids, reading),
                "greedy": model.generate(ids, 12, reading, attention_mask=mask),
                "drawn": model.generate(ids, 12, reading, sampling=Sampling(temperature=1.0, seed=3)),
                "loss": torch.tensor(batch_loss(model.lm, ids[:, :-1], ids[:, 1:], reading)),
            }
        )
    return found


def on_ranks(checkpoint: Path, tensor: int) -> tuple[int, list[dict[str, torch.Tensor]]]:
    """Elements that this rank holds, and its answers."""
    ranks = TensorParallel(mesh.start("cpu", tensor=tensor).group(mesh.TENSOR))
    model = load(checkpoint, device="cpu", ranks=ranks)
    return sum(parameter.numel() for parameter in model.parameters()), answers(model)


def test_ranks_that_share_a_model_answer_like_one_process(checkpoint):
    model = megarat.load(checkpoint, device="cpu")
    whole, expected = sum(parameter.numel() for parameter in model.parameters()), answers(model)
    for held, found in worlds.run(2, on_ranks, checkpoint, 2):
        assert held < 0.51 * whole  # all matrices are cut; norms are not
        for ours, theirs in zip(found, expected, strict=True):
            # Sums of fp32 products in another order; the tokens' logits differ by far more than that.
            torch.testing.assert_close(ours["logits"], theirs["logits"], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(ours["loss"], theirs["loss"], rtol=1e-6, atol=0)
            assert torch.equal(ours["greedy"], theirs["greedy"])
            assert torch.equal(ours["drawn"], theirs["drawn"])


def test_replicas_of_shared_models(checkpoint):
    answers_by_rank = [found for _, found in worlds.run(4, on_ranks, checkpoint, 2)]
    for found in answers_by_rank[1:]:
        for ours, theirs in zip(found, answers_by_rank[0], strict=True):
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_shares_that_are_not_even_are_refused(checkpoint):
    class Three(TensorParallel):
        size = 3

    with pytest.raises(UserError, match=r"--tensor 3: the checkpoint's model\.heads is 2"):
        load(checkpoint, device="cpu", ranks=Three())
    with pytest.raises(UserError, match="--tensor 2: 1 process was started"):
        mesh.start("cpu", tensor=2)
    assert ALONE.size == 1


def command(arguments: list[str]) -> tuple[int, str]:
    """One rank of ``megarat``: the exit code and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = cli.main(arguments)
    return code, out.getvalue()


def test_eval_by_ranks_that_share_a_model_says_what_one_process_says(checkpoint, tmp_path):
    shards = checkpoint.parent / "corpus"
    common = ["eval", str(checkpoint), "--device", "cpu", "--shards", str(shards), "--split", "train", "--limit-tokens", "320"]
    common += ["--pattern", "dense", "--pattern", "D=4"]
    assert command([*common, "--out", str(tmp_path / "one")])[0] == 0
    ended = worlds.run(4, command, [*common, "--out", str(tmp_path / "shared"), "--tensor", "2"])
    assert [code for code, _ in ended] == [0] * 4
    assert ended[0][1]
    assert not any(printed for _, printed in ended[1:])
    one, shared = (json.loads((tmp_path / name / "results.json").read_text())["tasks"]["ppl"] for name in ("one", "shared"))
    for ours, theirs in zip(shared, one, strict=True):
        assert ours["tokens"] == theirs["tokens"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)


class Letters:
    """A tokenizer without a file."""

    eos_id, vocab_size, file = 2, tiny_run.VOCAB, Path("letters")

    def encode(self, texts):
        return [[3 + ord(letter) % (self.vocab_size - 3) for letter in text] for text in texts]

    def decode(self, ids):
        return "".join(chr(64 + id_) for id_ in ids)


def continued(arguments: list[str]) -> tuple[int, str]:
    text.find_tokenizer = lambda model, named: Letters()
    return command(arguments)


def test_generate_by_ranks_that_share_a_model_prints_once_what_one_process_prints(checkpoint):
    common = ["generate", str(checkpoint), "--device", "cpu", "--prompt", "abc", "--pattern", "D=4,W=2", "--max-new-tokens", "16"]
    alone = worlds.run(1, continued, common)[0]
    assert alone[0] == 0
    assert len(alone[1]) > len("abc")
    assert worlds.run(2, continued, [*common, "--tensor", "2"]) == [alone, (0, "")]


def test_what_ends_the_first_rank_ends_the_others(checkpoint):
    """Both ranks of a shared model hear that there is no such corpus, or that the first was stopped."""
    (first, _), (second, _) = worlds.run(
        2, command, ["eval", str(checkpoint), "--device", "cpu", "--shards", "nowhere", "--tensor", "2"]
    )
    assert (first, second) == (2, 2)
