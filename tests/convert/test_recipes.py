import dataclasses
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ppx.convert.bundle import recipe_file, shipped
from ppx.convert.bundle.plan import inventory_of_7b, make_plan
from ppx.convert.bundle.ranges import format_ranges, parse_ranges, ranges_of
from ppx.convert.bundle.recipe import Recipe, Rule, uniform
from ppx.convert.bundle.recipe_file import limits_in, to_toml
from ppx.convert.bundle.targets import TARGETS
from ppx.convert.errors import UserError
from ppx.quant.affine import QuantizationConfig

SEVEN_B = inventory_of_7b("x/y")


def without_lines(recipe: Recipe) -> Recipe:
    return dataclasses.replace(
        recipe, original="", rules=tuple(dataclasses.replace(rule, line=0) for rule in recipe.rules)
    )


@pytest.mark.parametrize("name", shipped.names())
def test_shipped_recipes_can_be_loaded_by_their_target(name):
    recipe = shipped.load(name)
    plan = make_plan(SEVEN_B, recipe)
    assert plan.target.name == recipe.target
    assert recipe.description
    assert not recipe.parity  # what may be lost depends on the checkpoint


@pytest.mark.parametrize("name", shipped.names())
def test_a_recipe_survives_the_way_to_toml_and_back(name):
    recipe = shipped.load(name)
    assert without_lines(recipe_file.parse(to_toml(recipe), name, name)) == without_lines(recipe)


def test_the_first_rule_that_matches_decides():
    plan = make_plan(SEVEN_B, shipped.load("mixed"))
    bits = {output.path: output.quantization.bits for output in plan.outputs if output.quantization}
    assert bits["transformer.layers.0.self_attn.in_proj"] == 6
    assert bits["transformer.layers.1.self_attn.in_proj"] == 5
    assert bits["depformer.slices.7.transformer.layers.3.gating.linear_in"] == 6
    assert {
        output.quantization and output.quantization.bits for output in plan.outputs if output.role.kind == "embedding"
    } == {5}
    assert not any(path.startswith("depformer.slices.8.") for path in bits)


def test_all_mistakes_are_listed_with_their_lines():
    text = """target = "nope"
dtype = 3
foo = 1
[[rules]]
components = ["temporal", "x"]
bits = 7
[[rules]]
layers = "3-1"
keep = true
bits = 4
[[rules]]
modules = 3
steps = "a"
bits = 4
group_size = 48
method = "best"
[parity]
zz = 1
agent_kl = -1
"""
    with pytest.raises(UserError) as caught:
        recipe_file.parse(text, "t", "t.toml")
    expected = [
        (1, "target is 'nope'"), (2, "dtype is 3"), (3, "unknown key 'foo'"), (4, "no group_size"),
        (5, "unknown component 'x'"), (6, "bits is 7"), (8, "runs backwards"), (10, "bits beside keep"),
        (12, "modules is 3"), (13, "steps is 'a'"), (15, "group_size is 48"), (16, "method is 'best'"),
        (18, "unknown limit 'zz'"), (19, "agent_kl is -1"),
    ]  # fmt: skip
    assert len(caught.value.problems) == len(expected)
    for problem, (line, what) in zip(caught.value.problems, expected, strict=True):
        assert problem.place == f"t.toml, line {line}"
        assert what in problem.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('target = ["mlx"]', r"target is \['mlx'\]"),
        ('target = "mlx"\ndtype = [1]', r"dtype is \[1\]"),
        (
            'target = "mlx"\n[[rules]]\nbits = 4.0\ngroup_size = 64.0',
            r"bits is 4\.0(.|\n)*line 4: group_size is 64\.0",
        ),
        ('target = "mlx"\n[[rules]]\nbits = true\ngroup_size = 64', "bits is True"),
        ('target = "mlx"\n[parity]\nagent_kl = nan', "agent_kl is nan"),
        (f"x = {'1' * 5000}", "not TOML"),
        (f"x = {'[' * 5000}", "not TOML"),
    ],
)
def test_odd_values_are_mistakes_too(text, message):
    with pytest.raises(UserError, match=message):
        recipe_file.parse(text, "t", "t.toml")


def test_what_is_no_toml_says_where():
    with pytest.raises(UserError, match=r"not TOML.*line 2"):
        recipe_file.parse('target = "mlx"\nrules = = []', "t", "t.toml")
    with pytest.raises(UserError, match="no such recipe or file: shipped are 4bit"):
        shipped.load("gibberish")


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            uniform(QuantizationConfig(4, 64), "moshi-mlx", "bfloat16", TARGETS["moshi-mlx"].uniform),
            "moshi-q4, moshi-q8 or bf16",
        ),
        (uniform(QuantizationConfig(4, 32), "moshi-mlx", "bfloat16", ("temporal",)), "every linear and embedding"),
        (uniform(QuantizationConfig(4, 64), "speech-swift", "float16", ("temporal", "heads")), "loads heads as floats"),
        (uniform(QuantizationConfig(4, 64), "speech-swift", "float16", ("depformer",)), "quantize both"),
        (
            Recipe(
                "r",
                "speech-swift",
                "float16",
                (Rule(QuantizationConfig(6, 64), layers=((0, 3),)), Rule(QuantizationConfig(4, 64))),
            ),
            "one setting for all quantized layers, not 4 bit group 64, 6 bit group 64",
        ),
        (
            Recipe("r", "speech-swift", "float16", (Rule(QuantizationConfig(4, 64), ("temporal",), layers=((0, 3),)),)),
            "all linear layers of the temporal quantized or none",
        ),
        (
            Recipe("r", "mlx", "float16", (Rule(QuantizationConfig(4, 64), layers=((40, 50),), line=7),)),
            r"a rule \(line 7\) matches no tensor",
        ),
    ],
)
def test_what_a_target_cannot_load_is_refused(recipe, message):
    with pytest.raises(UserError, match=message):
        make_plan(SEVEN_B, recipe)


def test_rows_that_a_group_does_not_divide_are_all_named(pico):
    from ppx.convert.preparation import inventory
    from ppx.convert.source.source import locate, open_source

    with open_source(locate(str(pico))) as source:
        plain = inventory(source)
    with pytest.raises(UserError) as caught:
        make_plan(plain, uniform(QuantizationConfig(4, 128), "mlx", "bfloat16", ("temporal", "depformer")))
    said = str(caught.value)
    assert "temporal gating.linear_out: rows of 704 weights are not divided by groups of 128 (2 tensors)" in said
    assert "use group size 64 or 32" in said


@given(st.sets(st.integers(0, 9999), min_size=1))
def test_ranges_survive_the_way_to_text_and_back(numbers):
    ranges = ranges_of(numbers)
    assert {number for first, last in ranges for number in range(first, last + 1)} == numbers
    assert all(before[1] + 1 < after[0] for before, after in pairwise(ranges)), "ranges that touch are one"
    assert parse_ranges(format_ranges(ranges)) == ranges


def test_ranges_are_written_as_people_write_them():
    assert format_ranges(ranges_of([31, 2, 1, 0, 3])) == "0-3,31"
    assert parse_ranges("31, 0-3") == ((31, 31), (0, 3))
    for wrong in ("", "a", "1-", "-1", "1--2", "1,,2", "1;2", "12345", "3-1"):
        with pytest.raises(ValueError, match="range"):
            parse_ranges(wrong)


def test_limits_are_read_from_recipes_of_any_version():
    text = '{}[parity]\ntext_kl = 1\nagent_kl = -1\ncodebook0_kl = true\nagent_top1 = "x"\nsomething = 2\n'
    assert limits_in(text.format("a_key_of_tomorrow = 1\n")) == {"text_kl": 1}
    for none in ("", "parity = 3", "not TOML", "x = " + "[" * 5000):
        assert limits_in(none) == {}
