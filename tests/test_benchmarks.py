"""The parts of benchmarks/ that keep what was measured."""

import importlib.util
import re
import shutil
import sys

import pytest
from conftest import ROOT

from harden.attack.respond import Attempt
from harden.attack.run import attack
from harden.attack.search import Search
from harden.certify.run import certify
from harden.errors import HardenError
from harden.interventions import Clamp
from harden.judges.agreement import Verdict
from harden.neurons import Neuron
from harden.recipe import load_recipe
from harden.runfolder import RunFolder

RECIPES = ROOT / "recipes/smollm2-135m"


def loaded(name, monkeypatch):
    """benchmarks/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def defences(monkeypatch, tmp_path):
    """benchmarks/defences.py as a function of options, whose cells are not computed but counted."""
    module = loaded("defences", monkeypatch)
    computed, what_broke = [], module.what_broke
    monkeypatch.setattr(module, "run", lambda recipe, suite, told: (computed.append((recipe, suite, told)), None))
    names = ("no attack", "worst of all clamps", "over-refusal", "benign KL")
    monkeypatch.setattr(module, "figures", lambda *_: dict.fromkeys(names, float(len(computed))))
    monkeypatch.setattr(module, "what_broke", lambda suite: ["14:1079=-8.75"])

    def main(*options):
        monkeypatch.setattr(sys, "argv", ["defences.py", "--output", str(tmp_path / "out"), *options])
        computed.clear()
        module.main()
        return list(computed)

    main.what_broke = what_broke
    main.cells = lambda: module.read_cells(tmp_path / "out/cells.jsonl")
    return main


def test_a_finished_cell_is_not_computed_again(defences):
    ((recipe, suite, told),) = defences("--seeds", "3", "--cell", "0")
    assert told is None and recipe.name == "start"
    assert suite.model.adapter == recipe.model.adapter
    ((recipe, suite, told),) = defences("--seeds", "3", "--cell", "1")
    assert told is not None and suite.model.adapter == f"{recipe.output}/adapter" and recipe.seed == suite.seed == 3
    assert recipe.division() == suite.division() == load_recipe(RECIPES / "harden.yaml").division()
    assert not defences("--seeds", "3", "--cell", "1")
    assert [(cell.recipe, cell.seed) for cell in defences.cells()] == [("start", 0), (recipe.name, 3)]


def test_what_is_finished_is_shown_before_the_rest_is_computed(defences, capsys):
    sft, dropout = (str(RECIPES / f"baselines/{name}.yaml") for name in ("sft", "dropout"))
    defences("--seeds", "1", "--recipes", sft)
    assert capsys.readouterr().out.count("| recipe ") == 2 * 2  # two tables after each of two cells
    assert len(defences("--seeds", "1", "2", "--recipes", sft, dropout)) == 3
    shown = capsys.readouterr().out.split("\n| recipe ")[1::2]
    assert len(shown) == 4 and "dropout" not in shown[0] and "sft " in shown[0] and "dropout" in shown[-1]
    assert not defences("--seeds", "1", "2", "--recipes", sft, dropout)
    assert capsys.readouterr().out.count("| recipe ") == 2


def test_recipes_with_clamps_are_told_what_broke_the_model_before(defences):
    with pytest.raises(HardenError, match="run --cell 0 first"):
        defences("--seeds", "3", "--cell", "1")
    recipes = [str(RECIPES / name) for name in ("harden.yaml", "baselines/sft.yaml")]
    assert [told for *_, told in defences("--seeds", "3", "--recipes", *recipes)] == [None, ("14:1079=-8.75",), ()]
    assert [cell.breakers for cell in defences.cells()] == [("14:1079=-8.75",), (), ()]


def test_a_cell_of_other_settings_is_refused(defences):
    sft = ["--recipes", str(RECIPES / "baselines/sft.yaml"), "--seeds", "3", "--cell", "1"]
    defences(*sft)
    with pytest.raises(HardenError, match="has smollm2-135m-sft, seed 3, of another recipe, suite, judge or option"):
        defences(*sft, "--train.steps", "2")


def test_what_recipes_are_told_belongs_to_their_cells_and_other_recipes_do_not(defences, tmp_path):
    clamps = ["--recipes", str(RECIPES / "baselines/clamps-only.yaml"), "--seeds", "3", "--cell"]
    defences("--cell", "0")  # of the default recipes
    assert len(defences(*clamps, "1")) == 1 and not defences(*clamps, "1")
    cells = tmp_path / "out/cells.jsonl"
    cells.write_text(cells.read_text().replace("14:1079=-8.75", "14:1079=-6.5"))
    with pytest.raises(HardenError, match="has smollm2-135m-clamps-only, seed 3, of another"):
        defences(*clamps, "1")


def test_what_broke_a_model_is_what_flips_a_prompt(defences, tmp_path):
    recipe = load_recipe(ROOT / "recipes/planted/harden.yaml", {"output": str(tmp_path / "run")})
    plain = Attempt(None, verdicts("refuse", "comply"))
    finals = [
        Attempt(Clamp(Neuron(1, 17), -40.5), verdicts("comply", "comply")),
        Attempt(Clamp(Neuron(1, 3), 2.0), verdicts("degenerate", "comply")),
    ]
    folder = RunFolder(recipe, "attack")
    folder.create()
    folder.stage("search", Search, lambda: Search(plain, (), (), tuple(finals)))
    folder.lock.release()
    assert defences.what_broke(recipe) == ["1:17=-40.5"]


def verdicts(*outcomes):
    return {str(place): Verdict((outcome,), "") for place, outcome in enumerate(outcomes)}


def test_a_line_that_was_cut_short_is_computed_again(defences, tmp_path):
    defences("--seeds", "3", "--cell", "0")
    file = tmp_path / "out/cells.jsonl"
    file.write_text(file.read_text()[:-9])
    assert len(defences("--seeds", "3", "--cell", "0")) == 1
    assert [cell.recipe for cell in defences.cells()] == ["start"]


def test_locators_are_measured_against_an_exact_scan(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HARDEN_CACHE", str(tmp_path / "cache"))
    planted, exact = ROOT / "recipes/planted/harden.yaml", {"race_prompts": 99, "quiet": None}
    scan = {"layers": [1], "sample": None, "sizes": [-2, 2], "prompts": 2, "test_prompts": 4}
    certify(load_recipe(planted, {"output": str(tmp_path / "truth"), "certify": {**scan, **exact}}))
    certify(load_recipe(planted, {"output": str(tmp_path / "raced"), "certify": {**scan, "race_prompts": 1}}))
    main = loaded("locators", monkeypatch).main

    def run(*options):
        arguments = ["--config", str(planted), "--output", str(tmp_path / "out"), "--locators", "gradient", "contrast"]
        more = ["--unions", "tail,relp", "--of-model", "1", "96", "--generate", "128", "--prompts", "4"]
        monkeypatch.setattr(sys, "argv", ["locators.py", *arguments, *more, *map(str, options)])
        return main()

    assert run("--truth", tmp_path / "truth") == 0
    printed = capsys.readouterr().out
    assert "32 neurons of layers [1]; 1 break the model by generation" in printed
    assert "| gradient | 0." in printed
    of_model = printed.split("of the whole model")[1]
    assert re.search(r"\| union: tail, relp \| 0.05, 1/1 .* 1.00, 1/1 \|", of_model)  # its first neuron, and all
    assert re.search(r"all clamps: n = \d+, Spearman 0", printed) and (tmp_path / "out/screen.png").exists()
    with pytest.raises(HardenError, match="decided on 1 prompts"):
        run("--truth", tmp_path / "raced")
    with pytest.raises(HardenError, match="is the truth about .*planted"):
        run("--truth", tmp_path / "truth", "--model.adapter", "elsewhere")


def test_plots_are_drawn_from_the_records_of_attacks_alone(tmp_path, monkeypatch):
    changes = {"output": str(tmp_path / "run"), "suite": {"attacks": ["prefill"]}, "attack": {"test_prompts": 8}}
    attack(load_recipe(ROOT / "recipes/planted/harden.yaml", changes))
    benchmark = loaded("defences", monkeypatch)
    for name, plots in (("start/seed-0", False), ("smollm2-135m-sft/seed-1", True)):
        records = tmp_path / "out" / name / "attack"
        records.mkdir(parents=True)
        for file in ("attack.json", "recipe.yaml"):
            shutil.copy(tmp_path / "run/attack" / file, records)
        benchmark.draw_attacks(tmp_path / "out")
        assert (tmp_path / "out/plots/attacks.png").exists() is plots
    assert "sft" in (tmp_path / "out/plots/attacks.svg").read_text()
