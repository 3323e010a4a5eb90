from __future__ import annotations

import itertools

import pytest

from megarat.errors import UserError
from megarat.model.pattern import LayerPattern, Pattern, describe, layer_groups, resolve


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("dense", (1, 0, 0)),
        (" Dense ", (1, 0, 0)),
        ("D=16,W=256,I=4", (16, 256, 4)),
        ("D=16", (16, 0, 0)),
        ("i=4, w=32 ,d=8", (8, 32, 4)),
        ("D=-1,W=32,I=4", (-1, 32, 4)),
        ("D=-1", (-1, 0, 0)),
        ("D=1,W=7", (1, 7, 0)),
        ("D=+2", (2, 0, 0)),
    ],
)
def test_text_becomes_a_pattern(text, pattern):
    assert Pattern.parse(text) == pattern


@pytest.mark.parametrize("pattern", [Pattern(), Pattern(16, 256, 4), Pattern(-1, 32, 0), Pattern(1, 5, 0)])
def test_a_pattern_prints_as_text_that_reads_back(pattern):
    assert Pattern.parse(str(pattern)) == pattern


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "''"),
        ("sparse", "'sparse'"),
        ("16", "'16'"),
        ("D=x", "'D=x'"),
        ("D=1.5", "'D=1.5'"),
        ("D=--5", "'D=--5'"),
        ("D=²", "'D=²'"),
        ("D=", "'D='"),
        ("D=4,", "''"),
        ("D=4,D=8", "'D=8'"),
        ("D=4,X=2", "'X=2'"),
        ("D=4;W=2", "'D=4;W=2'"),
        ("W=32,I=4", "dilation D is missing"),
        ("D=0", "must be 1 (dense) or more, or -1"),
        ("D=-2", "must be 1 (dense) or more, or -1"),
        ("D=4,W=-1", "must not be negative"),
        ("D=4,I=-3", "must not be negative"),
        ("D=99999999999999999999", "longer than any sequence"),
    ],
)
def test_what_is_no_pattern_is_refused_by_naming_the_part(text, named):
    with pytest.raises(UserError) as error:
        Pattern.parse(text)
    assert named in str(error.value) and "\n" not in str(error.value)


def test_one_pattern_serves_all_layers_and_heads():
    patterns = resolve("D=16,W=32,I=4", layers=3, heads=2)
    assert [layer.per_head for layer in patterns] == [(Pattern(16, 32, 4),) * 2] * 3


def test_a_list_gives_each_layer_its_pattern_and_a_nested_list_each_head():
    patterns = resolve(["dense", ["D=4", "D=-1,W=8", "D=4"]], layers=2, heads=3)
    assert [layer.per_head for layer in patterns] == [
        (Pattern(),) * 3,
        (Pattern(4), Pattern(-1, 8), Pattern(4)),
    ]


def test_heads_of_one_pattern_form_one_group_and_all_dense_forms_are_one():
    layer = LayerPattern.of([Pattern(4), Pattern(1, 7, 2), Pattern(4), Pattern()])
    assert [(group.pattern, group.heads) for group in layer] == [(Pattern(4), (0, 2)), (Pattern(), (1, 3))]


def test_layer_groups_lists_every_head_of_every_layer_once():
    patterns = resolve(["D=2", ["D=4", "dense", "D=4", "D=8"]], layers=2, heads=4)
    heads = sorted((layer, head) for layer, group in layer_groups(patterns) for head in group.heads)
    assert heads == list(itertools.product(range(2), range(4)))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (["dense"], "1 entries for 2 layers"),
        (["dense"] * 3, "3 entries for 2 layers"),
        ([], "0 entries for 2 layers"),
        (["dense", ["D=4"]], "layer 1: found 1 entries for 2 heads"),
        (["dense", ["D=4"] * 3], "layer 1: found 3 entries for 2 heads"),
        (["dense", 64], "found 64"),
        ([1, 64], "found 1"),
        (["dense", None], "found None"),
        (["dense", {"D": 4}], "found {'D': 4}"),
        (["dense", ["D=4", 7]], "found 7"),
        (64, "found 64"),
        (["dense", ["D=4", ["D=8"]]], "found ['D=8']"),
        (["dense", Pattern(0, 0, 0)], "must be 1 (dense) or more"),
    ],
)
def test_a_list_that_does_not_fit_the_model_is_refused(spec, message):
    with pytest.raises(UserError) as error:
        resolve(spec, layers=2, heads=2)
    assert message in str(error.value)


def test_a_description_counts_repeated_layers():
    assert describe(resolve("D=16", 4, 2)) == "D=16,W=0,I=0"
    assert describe(resolve(["dense", "dense", "D=64", ["D=2", "D=4"]], 4, 2)) == (
        "2x dense | D=64,W=0,I=0 | [D=2,W=0,I=0; D=4,W=0,I=0]"
    )


def kept_positions(pattern: Pattern, length: int) -> tuple[set[int], set[int], set[int]]:
    """Initial tokens, the last W and the dilated ones behind I, found one position at a time."""
    dilation, window, initial = pattern
    first = {p for p in range(length) if p < initial}
    ring = {p for p in range(length) if p >= length - window}
    far = {p for p in range(length) if dilation != -1 and (p + 1) % dilation == 0 and p >= initial}
    return first, ring, far


@pytest.mark.parametrize("dilation", [-1, 2, 3, 5, 16])
def test_cache_slots_count_the_positions_that_must_be_kept(dilation):
    for window, initial, length in itertools.product((0, 1, 3, 7, 40), (0, 1, 4, 5, 17, 40), (1, 2, 5, 16, 31)):
        pattern = Pattern(dilation, window, initial)
        first, ring, far = kept_positions(pattern, length)
        assert pattern.far_slots(length) == len(far)
        assert pattern.cache_slots(length) == len(first) + len(ring) + len(far)


def test_a_dense_cache_keeps_each_token_once_whatever_window_and_initial_say():
    assert [Pattern(1, window, initial).cache_slots(33) for window, initial in ((0, 0), (5, 0), (5, 4))] == [33] * 3
