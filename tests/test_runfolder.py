import subprocess
import sys
from pathlib import Path

import pytest

from harden.errors import HardenError
from harden.recipe import Recipe
from harden.runfolder import RunFolder


def recipe(path, **changes):
    return Recipe.model_validate({"name": "x", "output": str(path), "model": {"name": "planted-neuron"}, **changes})


def opened(path, **changes):
    folder = RunFolder(recipe(path, **changes))
    folder.create()
    return folder


def test_a_stage_runs_once_and_is_read_back(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return [1.5, 2.5]

    assert opened(tmp_path / "run").stage("a/b", list[float], make) == [1.5, 2.5]
    assert opened(tmp_path / "run").stage("a/b", list[float], make) == [1.5, 2.5]
    assert len(calls) == 1


def test_a_stage_that_fails_leaves_nothing(tmp_path):
    folder = opened(tmp_path / "run")
    with pytest.raises(RuntimeError):
        folder.stage("a", int, lambda: (_ for _ in ()).throw(RuntimeError()))
    assert folder.stage("a", int, lambda: 3) == 3


@pytest.mark.parametrize("text", ["[1, 2", '{"a": 1}', ""])
def test_a_stage_of_another_version_is_named_and_kept(tmp_path, text):
    folder = opened(tmp_path / "run")
    path = folder.state / "a.json"
    path.write_text(text)
    for read in (lambda: folder.stage("a", list[int], lambda: [3]), lambda: folder.saved("a", list[int])):
        with pytest.raises(HardenError, match=r"a\.json is damaged or of another version"):
            read()
    assert path.read_text() == text


def test_looking_at_a_folder_makes_nothing(tmp_path):
    RunFolder(recipe(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_another_recipe_is_refused_and_the_difference_named(tmp_path):
    opened(tmp_path / "run")
    with pytest.raises(HardenError, match="another recipe .seed was 0, now 1"):
        RunFolder(recipe(tmp_path / "run", seed=1))
    RunFolder(recipe(tmp_path / "run", generation={"batch_size": 7}))  # a machine with less memory goes on
    with pytest.raises(HardenError, match="generation.max_new_tokens was"):
        RunFolder(recipe(tmp_path / "run", generation={"max_new_tokens": 7}))


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(HardenError, match="is no run folder"):
        RunFolder(recipe(tmp_path / "run"))
    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"


def test_a_run_killed_while_it_made_its_folder_can_be_started_again(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".recipe.yaml.part").write_text("nam")
    assert opened(tmp_path / "run").saved_recipe.exists()


def test_a_line_cut_short_in_the_log_is_passed_over(tmp_path):
    folder = opened(tmp_path / "run")
    folder.stage("a", int, lambda: 1)
    with (folder.path / "log.jsonl").open("a") as log:
        log.write('{"time": 1, "ev')
    folder.stage("b", int, lambda: 2)
    assert 0 <= folder.seconds() < 5
    assert [line[:12] for line in (folder.path / "log.jsonl").read_text().splitlines()][1] == '{"time": 1, '
    (folder.path / "log.jsonl").unlink()
    assert folder.seconds() == 0


def test_a_folder_in_which_another_process_works_is_refused(tmp_path):
    """A launcher that was killed may leave its child at work."""
    path = str(tmp_path / "run")
    hold = (
        f"import sys; from test_runfolder import opened; f = opened({path!r}); print(1, flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", hold], cwd=Path(__file__).parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    other.stdout.readline()
    with pytest.raises(HardenError, match="another process is running"):
        opened(path)
    other.kill()
    other.communicate()
    opened(path)


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "run").write_text("mine")
    with pytest.raises(HardenError, match="is no run folder"):
        RunFolder(recipe(tmp_path / "run"))


def test_events_are_appended(tmp_path):
    opened(tmp_path / "run").log({"event": "a"})
    opened(tmp_path / "run").log({"event": "b"})
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert ['"a"' in lines[0], '"b"' in lines[1], len(lines)] == [True, True, 2]


def test_an_attack_run_has_a_folder_of_its_own_and_touches_nothing_else(tmp_path):
    trained = opened(tmp_path / "run")
    trained.stage("a", int, lambda: 1)
    before = sorted(p for p in trained.path.rglob("*"))
    attacked = RunFolder(
        recipe(tmp_path / "run", seed=1), part="attack"
    )  # another recipe: it may attack what was trained
    attacked.create()
    attacked.stage("a", int, lambda: 2)
    assert attacked.path == tmp_path / "run/attack" and opened(tmp_path / "other").path.exists()
    assert [p for p in sorted(trained.path.rglob("*")) if "attack" not in p.parts] == before
    assert trained.stage("a", int, lambda: 3) == 1


def test_a_part_that_measures_another_model_than_was_trained_there_says_so(tmp_path, caplog):
    (tmp_path / "run/adapter").mkdir(parents=True)
    (tmp_path / "run/recipe.yaml").touch()

    def warned(**model):
        caplog.clear()
        RunFolder(recipe(tmp_path / "run", model=model), part="attack").warn_of_another_model()
        return "not the one trained in this folder" in caplog.text

    assert warned(name="planted-neuron") and warned(name="planted-neuron", adapter="elsewhere/adapter")
    assert not warned(name="planted-neuron", adapter=str(tmp_path / "run/adapter"))
    assert not warned(name=str(tmp_path / "run/model"))


def test_a_run_may_begin_where_the_starting_model_was_attacked(tmp_path):
    RunFolder(recipe(tmp_path / "run"), part="attack").create()
    assert opened(tmp_path / "run").stage("a", int, lambda: 3) == 3


def test_an_attack_run_does_not_settle_in_a_folder_of_something_else(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.txt").write_text("mine")
    with pytest.raises(HardenError, match="is no run folder"):
        RunFolder(recipe(tmp_path / "thesis"), part="attack")
    assert not (tmp_path / "thesis/attack").exists()


def test_a_report_of_runs_that_are_there_is_no_something_else(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/report.html").write_text("mine")
    with pytest.raises(HardenError, match="is no run folder"):
        RunFolder(recipe(tmp_path / "run"), part="certificate")
    (tmp_path / "run/attack").mkdir()
    RunFolder(recipe(tmp_path / "run"), part="certificate")


def test_stages_inside_a_stage_count_once(tmp_path, monkeypatch):
    folder = opened(tmp_path / "run")
    clock = iter([0.0, 10.0, 14.0, 20.0])  # outer begins, inner begins, inner ends, outer ends
    monkeypatch.setattr("harden.runfolder.time.monotonic", lambda: next(clock))
    folder.stage("outer", int, lambda: folder.stage("inner", int, lambda: 1))
    monkeypatch.undo()
    assert folder.seconds() == 20.0
