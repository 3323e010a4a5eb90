"""Continuous batching against one request at a time; ends, seeds, cancelling, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models

from megarat.config import ModelConfig
from megarat.errors import UserError
from megarat.infer import decoder as decoder_module
from megarat.infer import engine as engine_module
from megarat.infer import memory
from megarat.infer.cache import SparseCache, cache_bytes
from megarat.infer.engine import Engine, Request
from megarat.infer.generate import generate
from megarat.infer.reading import read_as
from megarat.infer.sampling import GREEDY, Sampling
from megarat.model.lm import RATPlusLM

SHAPE = ModelConfig(layers=2, hidden=16, heads=2, vocab=140, init_std=0.5)
READINGS = ["dense", "D=4,W=3,I=1", "D=-1 + topk blocks=3,size=4"]


class Bytes:
    """A tokenizer whose ids are the bytes of ASCII; the model has more rows than it has entries. 0 is EOS."""

    eos_id, vocab_size, file = 0, 128, Path("bytes")

    def decode(self, ids):
        return bytes(ids).decode(errors="replace")


class Utf8(Bytes):
    vocab_size = 256


@pytest.fixture(scope="module")
def model() -> RATPlusLM:
    return RATPlusLM(SHAPE).double().initialise(5)


def engine(model, spec="D=4,W=3,I=1", rows=2, capacity=64) -> Engine:
    return Engine(model, read_as(spec, SHAPE), Bytes(), rows=rows, capacity=capacity)


def alone(model, request: Request, spec="D=4,W=3,I=1") -> list[int]:
    """What `generate` makes of one prompt."""
    ids = torch.tensor([request.ids])
    made = generate(
        model, ids, request.max_new_tokens, read_as(spec, SHAPE), sampling=request.sampling, vocabulary=Bytes.vocab_size
    )
    return made[0].tolist()


def requests() -> list[Request]:
    """Prompts and lengths that share two rows in every possible way, greedy and sampled."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for index, (prompt, new) in enumerate([(5, 9), (17, 2), (1, 20), (30, 1), (8, 12), (3, 3), (12, 7)]):
        sampling = [GREEDY, Sampling(0.8, 0.9, 1.1, seed=index), Sampling(repetition_penalty=1.5)][index % 3]
        made.append(Request(torch.randint(1, 128, (prompt,), generator=generator).tolist(), new, sampling))
    return made


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("spec", READINGS)
def test_requests_that_share_a_batch_get_what_each_gets_alone(model, spec, rows):
    done = []
    generations = engine(model, spec, rows).run(requests(), done.append)
    assert [generation.ids for generation in generations] == [alone(model, request, spec) for request in requests()]
    assert {generation.finish for generation in generations} == {"length"} and sum(done) == 7
    assert all(generation.text == Bytes().decode(generation.ids) for generation in generations)


@pytest.mark.parametrize("spec", READINGS)
def test_buckets_of_rows_give_what_the_whole_batch_gives(model, spec):
    """Powers of two, awkward buckets and one for all rows; a row is moved down as others end, and steps go through several buckets."""
    found = {}
    for buckets in (None, (3, 7), (7,)):
        running = Engine(model, read_as(spec, SHAPE), Bytes(), rows=7, capacity=64, buckets=buckets)
        used = []
        run = running.decoder._run
        running.decoder._run = lambda bucket, greedy, run=run, used=used: (used.append((bucket, greedy)), run(bucket, greedy))
        found[buckets] = [generation.ids for generation in running.run(requests())]
        sizes = {bucket for bucket, _ in used}
        assert sizes == {None: {1, 2, 4, 7}, (3, 7): {3, 7}, (7,): {7}}[buckets]
    assert found[None] == found[3, 7] == found[7,] == [alone(model, request, spec) for request in requests()]


@pytest.mark.parametrize("spec", READINGS)
def test_one_prompt_of_several_requests_is_read_once(model, spec, monkeypatch):
    read = []
    prefill = decoder_module.prefill
    monkeypatch.setattr(decoder_module, "prefill", lambda lm, ids, *rest: (read.append(len(ids)), prefill(lm, ids, *rest))[1])
    prompt = [70, 71, 72, 73, 74]
    asked = [Request(prompt, 6, Sampling(1.0, seed=seed)) for seed in range(4)]
    asked += [Request([9, 8], 3), Request([7, 7, 7], 3), Request(list(prompt), 6)]
    generations = engine(model, spec, rows=5).run(asked)
    assert read[0] == 1 and sum(read) == 4  # the four together, the two others, and again the first, later
    assert [generation.ids for generation in generations] == [alone(model, request, spec) for request in asked]


def test_prompts_are_read_in_chunks(model, monkeypatch):
    monkeypatch.setattr(decoder_module, "prefill_chunk", lambda config: 4)
    generations = engine(model).run(requests())
    assert [generation.ids for generation in generations] == [alone(model, request) for request in requests()]


def test_the_same_seed_gives_the_same_text_in_any_company_and_another_another(model):
    prompt, hot = [65, 66, 67], Sampling(temperature=2.0, seed=4)
    first = engine(model).run([Request(prompt, 16, hot)])[0].ids
    crowd = engine(model, rows=3).run(
        [*requests(), Request(prompt, 16, hot), Request(prompt, 16, Sampling(temperature=2.0, seed=5))]
    )
    assert crowd[-2].ids == first != crowd[-1].ids


def test_any_of_several_stop_ids_ends_a_generation_and_is_left_out(model):
    free = alone(model, Request([65], 20))
    stops = (free[7], free[4])
    [generation] = engine(model).run([Request([65], 20, stop_ids=stops)])
    end = min(free.index(stop) for stop in stops)
    assert (generation.ids, generation.finish) == (free[:end], "stop")


def test_text_stops_before_a_stop_string_and_never_shows_part_of_it(model):
    free = Bytes().decode(alone(model, Request([65], 20)))
    stop = free[6:9]
    running = engine(model)
    generation = running.submit(Request([65], 20, stops=("never there", stop)))
    shown = []
    while running.busy:
        running.step()
        shown.append(generation.text)
    end = free.index(stop)
    assert (generation.text, generation.finish) == (free[:end], "stop")
    assert all(free[:end].startswith(text) for text in shown) and shown == sorted(shown, key=len)


def test_half_a_character_is_not_shown():
    generation = engine_module.Generation(Request([65], 3), Utf8())
    shown = []
    for byte in "é!".encode():
        generation.add(byte)
        shown.append(generation.text)
    assert shown == ["", "é", "é!"] and generation.finish == "length"


class ByteFallback:
    """Llama's way with a `tokenizer.json`: a run of bytes is text as a whole or not at all, and the first space is left out."""

    def __init__(self) -> None:
        words = ["<s>", "\u2581one", "\u2581two", "!"]
        vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {word: 256 + n for n, word in enumerate(words)}
        self._tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
        self._tokenizer.add_special_tokens(["<s>"])
        steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        self._tokenizer.decoder = decoders.Sequence(steps)

    def decode(self, ids):
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)


BOS, ONE, TWO, MARK = range(256, 260)


@pytest.mark.parametrize(
    ("prompt", "answer", "texts"),
    [
        ([ONE, *"é".encode()], [0xFF, MARK], ["", "\ufffd!"]),  # a byte that fits no character does not say the prompt again
        ([ONE, *"€".encode()[:1]], [*"€".encode()[1:], MARK], ["", "€", "€!"]),  # a character that began in the prompt
        ([ONE], [*"é".encode(), 0xFF, TWO], ["", "é", "é", "é\ufffd two"]),
        ([ONE], [MARK, BOS, TWO], ["!", "!", "! two"]),  # a token without text leaves the space in front of the next
    ],
)
def test_what_was_read_or_shown_is_not_shown_again_and_no_space_is_lost(prompt, answer, texts):
    generation = engine_module.Generation(Request(prompt, len(answer) + 1), ByteFallback())
    shown = []
    for token in answer:
        generation.add(token)
        shown.append(generation.text)
    assert shown == texts


def test_a_cancelled_request_frees_its_row_and_disturbs_nobody(model):
    running = engine(model, rows=1)
    first, second, third = (running.submit(request) for request in requests()[:3])
    running.step()
    running.step()
    first.cancel()
    second.cancel()
    while running.busy:
        running.step()
    assert (first.finish, len(first.ids), second.finish, second.ids) == ("cancelled", 2, "cancelled", [])
    assert third.ids == alone(model, requests()[2])
    third.cancel()
    assert third.finish == "length"


def test_step_tells_who_went_on(model):
    running = engine(model)
    first, second = running.submit(Request([65], 2)), running.submit(Request([66, 67], 1))
    assert running.step() == [first, second] and second.finish == "length"
    third = running.submit(Request([68], 1))
    assert running.step() == [third] or first.finish == "length"
    assert not running.busy


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], 4), "prompt: it is empty"),
        (Request([1], 0), "max_new_tokens is 0"),
        (Request([1] * 60, 5), "prompt: 60 tokens and 5 new ones are more than the 64 allowed together"),
        (Request([1, 140], 5), "token ids outside the model's vocabulary of 140"),
        (Request([-1], 5), "token ids outside"),
    ],
)
def test_impossible_requests_are_refused_and_the_engine_goes_on(model, request_, message):
    running = engine(model)
    with pytest.raises(UserError) as error:
        running.submit(request_)
    assert message in str(error.value)
    assert running.run([Request([65], 3)])[0].ids == alone(model, Request([65], 3))


def test_a_tokenizer_of_another_vocabulary_is_refused(model):
    with pytest.raises(UserError, match="bytes: has 256 entries, but the model's vocabulary has 140"):
        Engine(model, read_as("dense", SHAPE), Utf8(), rows=1, capacity=8)


def test_what_does_not_fit_is_refused_with_the_largest_batch_that_does(monkeypatch):
    each = cache_bytes(SHAPE, read_as("D=4", SHAPE), 1000, torch.float32)
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(3.5 * each / 0.9) + 1)
    SparseCache(SHAPE, read_as("D=4", SHAPE), 3, 1000, torch.float32, "cpu")
    with pytest.raises(UserError, match=r"4 sequences of 1000 tokens need .* the largest batch that fits is 3"):
        SparseCache(SHAPE, read_as("D=4", SHAPE), 4, 1000, torch.float32, "cpu")
    with pytest.raises(UserError, match="not even one sequence fits"):
        SparseCache(SHAPE, read_as("dense", SHAPE), 1, 1000, torch.float32, "cpu")


def test_free_memory_is_what_the_system_says():
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:"))
    assert 2**20 < memory.free_bytes("cpu") <= total
