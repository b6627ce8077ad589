"""Recipes are read strictly, and the first rule that fits a site decides."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from halfbin.errors import RecipeError
from halfbin.models import Site
from halfbin.planning import load_recipe, parse_recipe, preset_names
from halfbin.planning.options import Options
from halfbin.planning.recipe import rounding
from halfbin.tensor import Scheme, parse_scheme

RULE = '[[rule]]\nmatch = "*"\nweights = "int4-g32"\n'


def site(name: str = "model.layers.0.mlp.up_proj", role: str = "linear", module_class: str = "Linear") -> Site:
    return Site(name, f"{name}.weight", (64, 64), torch.float32, role, module_class)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_read_and_says_what_it_does(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert recipe.rule_for(site()) is not None


def test_a_file_is_read_and_named_after_itself(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(f'remainder = "row"\nothers = "bf16"\nlayout = "halfbin"\n{RULE}')
    recipe = load_recipe(tmp_path / "mine.toml")
    assert (recipe.name, recipe.remainder, recipe.others, recipe.layout) == ("mine", "row", torch.bfloat16, "halfbin")


def test_the_first_rule_that_fits_decides() -> None:
    recipe = parse_recipe(
        '[[rule]]\nmatch = "*.down_proj"\nweights = "int8-channel"\n'
        '[[rule]]\nmatch = "class:Conv2d"\nweights = "keep"\n'
        '[[rule]]\nmatch = "role:head"\nweights = "bf16"\n'
        f"{RULE}",
        source="mine",
    )

    def weights(found: Site) -> object:
        rule = recipe.rule_for(found)
        return "none" if rule is None else rule.weights

    assert weights(site("a.down_proj")) == parse_scheme("int8-channel")
    assert weights(site("a.up_proj")) == parse_scheme("int4-g32")
    assert weights(site("stem", "convolution", "Conv2d")) is None
    assert weights(site("lm_head", "head")) == torch.bfloat16


@pytest.mark.parametrize("role", ["embedding", "head", "router"])
def test_protected_sites_are_reached_by_their_full_name_or_role_alone(role: str) -> None:
    protected = site("model.thing", role)
    for match, reached in [
        ("*", False),
        ("model.*", False),
        ("class:Linear", False),
        ("model.thing", True),
        (f"role:{role}", True),
    ]:
        recipe = parse_recipe(f'[[rule]]\nmatch = "{match}"\nweights = "int8-channel"\n', source="x")
        assert (recipe.rule_for(protected) is not None) == reached, match


def test_scales_take_the_models_type_unless_the_scheme_says_otherwise() -> None:
    for text, stated in (("int4-g32", False), ("int4-g32-f16", True), ("mxfp4", True)):
        rule = parse_recipe(f'[[rule]]\nmatch = "*"\nweights = "{text}"\n', source="x").rules[0]
        assert rule.scale_is_stated == stated


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param("", "no [[rule]]", id="empty"),
        pytest.param("rule = 3", "no [[rule]]", id="rule is no list"),
        pytest.param("[[rule]\n", "not valid TOML", id="no TOML"),
        pytest.param(f"remander = 'row'\n{RULE}", "remainder", id="unknown key"),
        pytest.param(f"remainder = 'rows'\n{RULE}", "row", id="unknown choice"),
        pytest.param(f"others = 'float16'\n{RULE}", "fp16", id="unknown cast"),
        pytest.param(f"name = 3\n{RULE}", "must be text", id="name is no text"),
        pytest.param('[[rule]]\nmatch = "*"\n', "weights = None is missing", id="no weights"),
        pytest.param('[[rule]]\nweights = "int4"\n', "match = None is missing", id="no match"),
        pytest.param('[[rule]]\nmatch = 3\nweights = "int4"\n', "match = 3", id="match is no text"),
        pytest.param('[[rule]]\nmatch = "role:heads"\nweights = "int4"\n', "head", id="unknown role"),
        pytest.param('[[rule]]\nmatch = "*"\nweights = "in4-g32"\n', "int4", id="unknown format"),
        pytest.param('[[rule]]\nmatch = "*"\nweights = "float16"\n', "fp16", id="another name for a cast"),
        pytest.param(f'{RULE}method = "hqqq"\n', "hqq", id="unknown method"),
        pytest.param(f'{RULE}estimator = "mce"\n', "mse", id="unknown estimator"),
        pytest.param(f'{RULE}method = "hqq"\nestimator = "mse"\n', "goes with rtn, gptq", id="hqq with a range"),
        pytest.param('[[rule]]\nmatch = "*"\nweights = "keep"\nmethod = "hqq"\n', "rounds nothing", id="idle method"),
    ],
)
def test_what_is_not_understood_is_refused_with_the_nearest_word(text: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(text, source="mine")
    assert words in str(caught.value)
    assert "recipe mine" in str(caught.value)


def test_a_name_that_is_neither_preset_nor_file_is_answered_with_the_nearest_preset() -> None:
    with pytest.raises(RecipeError, match="'in8' is neither a preset nor a recipe file.*int8"):
        load_recipe("in8")


def test_a_weight_file_is_not_taken_for_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(2**20 + 1))
    with pytest.raises(RecipeError, match="is it another file"):
        load_recipe(tmp_path / "model.safetensors")
    (tmp_path / "short").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_recipe(tmp_path / "short")


def test_a_method_is_one_function_however_often_it_is_asked_for() -> None:
    assert rounding("rtn", "mse") is rounding("rtn", "mse")
    weight, scheme = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)), parse_scheme("int3-channel")
    assert isinstance(scheme, Scheme)
    assert not torch.equal(
        rounding("rtn", "mse")(weight, scheme).scale, rounding("rtn", "minmax")(weight, scheme).scale
    )


def test_inputs_transforms_and_calibrated_methods_are_understood() -> None:
    text = f'{RULE}method = "gptq+autoround"\nestimator = "clip"\ninputs = "int8-token"\ntransforms = ["awq", "awq"]\n'
    (rule,) = parse_recipe(text, source="mine").rules
    assert (rule.method, rule.estimator, rule.transforms) == ("gptq+autoround", "clip", ("awq",))
    assert str(rule.inputs) == "int8-token"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        pytest.param('transforms = ["awg"]', "awq", id="unknown transform"),
        pytest.param('transforms = "awq"', "must be a list", id="no list"),
        pytest.param("correction = 1.5", "from 0, none, to 1", id="correction beyond all"),
        pytest.param("correction = true", "from 0, none, to 1", id="correction is no number"),
        pytest.param('inputs = "int8-tokn"', "token", id="unknown granularity"),
        pytest.param("inputs = 8", "must be text", id="no text"),
        pytest.param('input_estimator = "mse"', "there are no inputs", id="a range of nothing"),
        pytest.param(
            'inputs = "int8-token"\ninput_estimator = "mse"', "are dynamic", id="a range that nobody asks for"
        ),
    ],
)
def test_inputs_and_transforms_that_mean_nothing_are_refused(line: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse_recipe(f"{RULE}{line}\n", source="mine")


def test_options_of_methods_and_transforms_are_understood() -> None:
    text = (
        f'{RULE}method = "gptq+autoround"\ntransforms = ["smoothquant"]\nact_order = false\ndamping = 0.1\n'
        'group_scales = "recomputed"\nalpha = 1\nsteps = 7\n'
    )
    (rule,) = parse_recipe(text, source="mine").rules
    assert rule.options == Options(act_order=False, damping=0.1, group_scales="recomputed", alpha=1.0, steps=7)
    assert parse_recipe(RULE, source="mine").rules[0].options == Options()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        pytest.param("act_order = true", "act_order = True goes with method = .gptq.", id="an order of nothing"),
        pytest.param('method = "autoround"\ndamping = 0.1', "damping = 0.1 goes with", id="damping of nothing"),
        pytest.param('group_scales = "fixed"', "goes with method = .gptq.", id="scales of another method"),
        pytest.param('transforms = ["awq"]\nalpha = 0.5', "goes with transforms", id="alpha of another transform"),
        pytest.param('method = "gptq"\nsteps = 5', "goes with method = .autoround.", id="steps of another method"),
        pytest.param('method = "gptq"\nact_order = 1', "must be true or false", id="act_order is a number"),
        pytest.param('method = "gptq"\ndamping = 2.0', "a number from 0 to 1", id="too much damping"),
        pytest.param('method = "gptq"\ndamping = nan', "a number from 0 to 1", id="damping is no number"),
        pytest.param('method = "gptq"\ngroup_scales = "fix"', "did you mean .*fixed", id="scales misspelt"),
        pytest.param(
            'method = "gptq"\nestimator = "clip"\ngroup_scales = "recomputed"', "leave one of them out", id="both"
        ),
        pytest.param('transforms = ["smoothquant"]\nalpha = -0.1', "a number from 0 to 1", id="alpha below 0"),
        pytest.param('method = "autoround"\nsteps = 0', "a whole number from 1", id="no steps"),
        pytest.param('method = "autoround"\nsteps = 2.5', "a whole number from 1", id="half a step"),
        pytest.param('method = "gptq"\ndampng = 0.1', "damping", id="a misspelt option"),
    ],
)
def test_options_that_mean_nothing_or_that_nobody_reads_are_refused(lines: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse_recipe(f"{RULE}{lines}\n", source="mine")
