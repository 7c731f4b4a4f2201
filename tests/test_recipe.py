import re
from pathlib import Path

import pytest
import yaml

from harden.entry import parse_recipe, recipe_parser
from harden.errors import HardenError
from harden.policy import load_policy
from harden.recipe import Recipe, load_recipe, read_overrides

ROOT = Path(__file__).parents[1]
RECIPES = [p for p in sorted((ROOT / "recipes").rglob("*.yaml")) if p.parent.name not in ("accelerate", "gate")]
MINIMAL = {"name": "x", "output": "runs/x", "model": {"name": "planted-neuron"}}


def write(folder, data):
    path = folder / "recipe.yaml"
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_shipped_recipe_parses_and_resolves_to_itself(path, tmp_path):
    recipe = load_recipe(path)
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe


def test_the_fragments_in_the_documentation_parse(tmp_path):
    fragments = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "docs/judges.md").read_text(), re.DOTALL | re.MULTILINE)
    judges = [load_recipe(write(tmp_path, {**MINIMAL, **yaml.safe_load(text)})).judge for text in fragments]
    assert [judge.second and judge.second.name for judge in judges] == [None, "wildguard", "endpoint"]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes/accelerate").glob("*.yaml")), ids=lambda p: p.name)
def test_every_launch_configuration_is_one_that_accelerate_reads(path):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).num_processes >= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trian": {}}, "unknown key 'trian'; did you mean 'train'?"),
        ({"train": {"lerning_rate": 1}}, "unknown key 'train.lerning_rate'; did you mean 'train.learning_rate'?"),
        ({"learning_rate": 1}, "unknown key 'learning_rate'; did you mean 'train.learning_rate'?"),
        ({"train": {"clamps": {"shares": 1}}}, "did you mean 'train.clamps.share'?"),
        ({"train": {"steps": "many"}}, "'train.steps': .* got 'many'"),
        ({"train": {"steps": 0}}, "'train.steps': .*greater than 0"),
        ({"name": None}, "'name': "),
        ({"rounds": 3}, "'rounds': should be a section of keys, got 3"),
        ({"refusal": {"phrases": [False]}}, "'refusal.phrases.0': .*got False .YAML reads No.*in quotes"),
        ({"train": {"mask": {"share": 0.25}, "refusal": {"weight": 0}}}, "mask.share 0.25 without refusal.weight"),
        ({"train": {"mask": {"share": 0.01}}}, "mask.share 0.01 of 8 harmful rows is no row"),
        ({"train": {"mask": {"locator": "random", "relocate_every": 3}}}, "drawn for every row anyway"),
        ({"train": {"mask": {"neurons": 0}}}, "'train.mask.neurons': "),
        ({"train": {"spread": {"order": 3}}}, "'train.spread.order': "),
        ({"train": {"clamps": {"sizes": []}}}, "'train.clamps.sizes': "),
        ({"attack": {"sizes": [4, 0]}}, "'attack.sizes.1': must not be 0"),
        ({"attack": {"strengths": [0.25, -0.5]}}, "'attack.strengths.1': "),
        ({"train": {"twins": {"below": 0.5, "ceiling": 0.5}}}, "ceiling 0.5: must be more than below"),
        ({"train": {"learning_rate": float("nan")}}, "'train.learning_rate': .*finite"),
        (
            {"train": {"refusal": {"weight": 0}, "spread": {"weight": 0}, "benign": {"weight": 0}}},
            "'train': every term has weight 0",
        ),
        ({"judge": {"second": {"name": "oracle"}}}, "'judge.second.name': .*'wildguard'.* got 'oracle'"),
        ({"judge": {"second": {"name": "endpoint"}}}, "the judge endpoint needs base_url and model"),
        ({"judge": {"second": {"name": "wildguard", "model": "x"}}}, "the judge wildguard does not read model"),
        ({"judge": {"second": {"name": "wildguard", "paht": "x"}}}, "did you mean 'judge.second.path'?"),
        ({"prompts": {"train_share": 0.7, "selection_share": 0.3}}, "leave something for the test split"),
    ],
)
def test_bad_values_are_named(tmp_path, change, message):
    with pytest.raises(HardenError, match=message):
        load_recipe(write(tmp_path, {**MINIMAL, **change}))


def test_all_problems_are_told_at_once(tmp_path):
    with pytest.raises(HardenError, match=r"'model' is missing.*trian") as caught:
        load_recipe(write(tmp_path, {"name": "x", "output": "y", "trian": 1}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2", ""])
def test_files_that_are_no_recipe(tmp_path, text):
    with pytest.raises(HardenError, match="recipe"):
        load_recipe(write(tmp_path, text))


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(HardenError, match="no such recipe: .*none.yaml"):
        load_recipe(tmp_path / "none.yaml")


def test_overrides_win_over_the_file_and_are_typed(tmp_path):
    arguments = ["--train.learning_rate", "1e-4", "--train.clamps.sizes", "[1, 2]", "--save.merged", "true"]
    overrides = read_overrides([*arguments, "--rounds.max=7"], "test")
    recipe = load_recipe(write(tmp_path, {**MINIMAL, "rounds": {"max": 1, "tolerance": 0.3}}), overrides)
    assert recipe.train.learning_rate == 1e-4 and recipe.train.clamps.sizes == (1.0, 2.0)
    assert recipe.save.merged is True and recipe.rounds.max == 7 and recipe.rounds.tolerance == 0.3


@pytest.mark.parametrize("items", ["['1:20', '3:4']", '["1:20", "3:4"]', "[1:20, 3:4]"])
def test_items_of_a_list_are_quoted_or_not(items):
    for arguments in (["--attack.neurons", items], [f"--attack.neurons={items}"]):
        assert read_overrides(arguments, "test") == {"attack": {"neurons": ["1:20", "3:4"]}}


@pytest.mark.parametrize("items", ["[I can't, I won't]", '["I can\'t", "I won\'t"]'])
def test_apostrophes_are_no_quotes(items):
    assert read_overrides(["--refusal.phrases", items], "test") == {"refusal": {"phrases": ["I can't", "I won't"]}}


@pytest.mark.parametrize("clamp", ["1:2", "1:2=big", "1:2=1e400", "1:2=-1e39"])
def test_a_clamp_without_a_finite_value_is_refused(tmp_path, clamp):
    with pytest.raises(HardenError, match="'attack.clamps.*'1:2"):
        load_recipe(write(tmp_path, {**MINIMAL, "attack": {"clamps": [clamp]}}))


def test_null_on_the_command_line_is_none(tmp_path):
    path = write(tmp_path, {**MINIMAL, "model": {"name": "x", "adapter": "some/adapter"}})
    assert load_recipe(path, read_overrides(["--model.adapter", "null"], "test")).model.adapter is None


def test_a_second_judge_is_set_and_removed_on_the_command_line(tmp_path):
    path = write(tmp_path, {**MINIMAL, "judge": {"second": {"name": "wildguard", "path": "x"}}})
    overrides = read_overrides(["--judge.second.name", "harmbench"], "test")
    recipe = load_recipe(path, overrides)
    assert (recipe.judge.second.name, recipe.judge.second.path) == ("harmbench", "x")
    assert load_recipe(write(tmp_path, recipe.to_yaml())) == recipe
    assert load_recipe(path, read_overrides(["--judge.second", "null"], "test")).judge.second is None


def test_unknown_options_name_the_nearest():
    with pytest.raises(HardenError, match=r"unknown option '--train.stpes'; did you mean '--train.steps'\?"):
        read_overrides(["--train.stpes", "3"], "test")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--base", "x.yaml"], "'base' stands in a recipe and is no option"),
        (["--keep-completions"], "'--keep-completions' is an option of harden attack alone"),
        (["--thresholds", "1"], "unknown option '--thresholds'"),
        (["extra"], "'extra' belongs to no option; options begin with --"),
        (["--conf", "x.yaml"], "unknown option '--conf'; did you mean '--config'?"),
        (["--train.lora", "{rank: 2}"], "cannot read an option of 'train': give sections key by key"),
    ],
)
def test_options_that_cannot_be_read_say_what_can(arguments, message):
    with pytest.raises(HardenError) as raised:
        read_overrides(arguments, "test")
    assert message in str(raised.value)


def test_a_policy_and_a_folder_are_told_from_a_recipe(tmp_path):
    with pytest.raises(HardenError, match="is a policy, not a recipe: harden gate --policy"):
        load_recipe(ROOT / "recipes/gate/quick.yaml")
    with pytest.raises(HardenError, match="is a folder; give a recipe file"):
        load_recipe(tmp_path)
    with pytest.raises(HardenError, match="is a recipe, not a policy"):
        load_policy(ROOT / "recipes/planted/harden.yaml")


def test_a_recipe_without_its_option_is_told_where_it_belongs():
    with pytest.raises(HardenError, match="'r.yaml' stands alone; give it as --config r.yaml"):
        parse_recipe(recipe_parser("harden train", None), ["r.yaml", "--seed", "1"])
    with pytest.raises(HardenError, match="no recipe given"):
        parse_recipe(recipe_parser("harden train", None), ["--prompts.harmful.path", "mine.yaml"])


def test_a_key_given_twice_is_an_error(tmp_path):
    path = tmp_path / "r.yaml"
    start = "name: x\noutput: y\nmodel: {name: m}\n"
    for text, message in (
        ("train: {steps: 4, learning_rate: 0.1, steps: 5}", "the key 'steps' in line 4 is given twice"),
        ("train:\n  steps: 4\n  lora:\n    rank: 2\n    rank: 3", "the key 'rank' in line 8 is given twice"),
        ("train: {steps: 4}\nseed: 1\ntrain: {steps: 5}", "the key 'train' in line 6 is given twice"),
    ):
        path.write_text(start + text)
        with pytest.raises(HardenError, match=f"r.yaml: {message}"):
            load_recipe(path)
    path.write_text(start + "train: &some\n  lora: *some")
    with pytest.raises(HardenError, match="an alias .* stands inside what it names"):
        load_recipe(path)
    path.write_text(start + "train:\n  twins: &some {weight: 1, rows: 2}\n  margin:\n    <<: *some\n    rows: 3")
    assert load_recipe(path).train.margin.rows == 3


def test_a_bad_value_of_an_option_is_not_put_down_to_the_file_alone(tmp_path):
    with pytest.raises(HardenError, match="with the options given: 'train.steps'"):
        load_recipe(write(tmp_path, MINIMAL), {"train": {"steps": "many"}})


def test_environment_variables_do_not_leak_into_a_recipe(monkeypatch):
    monkeypatch.setenv("NAME", "from the environment")
    monkeypatch.setenv("OUTPUT", "elsewhere")
    assert read_overrides([], "test") == {}


def test_paths_beside_the_recipe_are_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("a\nb\n")
    data = {**MINIMAL, "prompts": {"harmful": {"path": "mine.txt"}, "benign": {"path": "some/dataset"}}}
    path = write(tmp_path, data)
    monkeypatch.chdir("/")
    recipe = load_recipe(path)
    assert recipe.prompts.harmful.path == str(tmp_path / "mine.txt") and recipe.prompts.benign.path == "some/dataset"


def test_an_address_that_yaml_reads_as_a_number_is_explained(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("{name: x, output: y, model: {name: m}, attack: {neurons: [1:17]}}")
    with pytest.raises(HardenError, match="number 77; put it in quotes"):
        load_recipe(path)
    path.write_text("{name: x, output: y, model: {name: m}, attack: {neurons: ['1:17']}}")
    assert load_recipe(path).attack.neurons == ("1:17",)


# -- a recipe laid over another ----------------------------------------------------------------------------------------


def test_a_recipe_is_laid_over_its_base_and_paths_are_each_files_own(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "mine.jsonl").touch()
    base = {**MINIMAL, "seed": 3, "prompts": {"harmful": {"path": "mine.jsonl"}}, "train": {"steps": 5}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "deep/middle.yaml").write_text("base: ../base.yaml\nname: middle\ntrain: {learning_rate: 0.5}\n")
    (tmp_path / "deep/recipe.yaml").write_text("base: middle.yaml\nseed: 4\n")
    recipe = load_recipe(tmp_path / "deep/recipe.yaml", {"train": {"steps": 7}})
    assert (recipe.name, recipe.seed, recipe.train.steps, recipe.train.learning_rate) == ("middle", 4, 7, 0.5)
    assert recipe.prompts.harmful.path == str(tmp_path / "mine.jsonl")
    assert "base:" not in recipe.to_yaml()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: recipe.yaml\nname: x\n", "leads back to it"),
        ("base: other.yaml\nname: x\n", "leads back to it"),
        ("base: missing.yaml\n", "no such recipe: .*missing.yaml"),
        ("base: [a]\n", r"base is \['a'\], and must be the path of a recipe"),
    ],
)
def test_bases_that_are_none_are_named(tmp_path, text, message):
    (tmp_path / "other.yaml").write_text("base: recipe.yaml\n")
    with pytest.raises(HardenError, match=message):
        load_recipe(write(tmp_path, text))


def test_every_key_says_what_it_means(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_recipe(recipe_parser("harden train", None), ["--help-keys"])
    listed = capsys.readouterr().out
    entries = re.findall(r"^--([a-z_.]+) \((.*)\)\n    (\S)", listed, re.MULTILINE)
    assert not stopped.value.code and len(entries) == listed.count("\n--") > 150
    defaults = {key: default for key, default, _ in entries}
    required = [key for key, default in defaults.items() if default == "required"]
    assert required == ["name", "output", "model.name"]
    assert defaults["judge.second.name"] == "required with judge.second"
    assert defaults["prompts.harmful.path"] == '"embedded"' and defaults["model.adapter"] == "null"


def test_readers_are_told_where_the_prompts_are_divided_by_another_seed():
    recipes = [Recipe.model_validate({**MINIMAL, "seed": 3, "prompts": {"split_seed": seed}}) for seed in (None, 3, 0)]
    assert [recipe.seeds for recipe in recipes] == ["seed 3", "seed 3", "seed 3, prompts divided by 0"]
