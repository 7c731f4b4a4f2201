import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from harden.errors import HardenError
from harden.prompts import load_prompts, load_splits, split_prompts
from harden.recipe import load_recipe

RECIPE = Path(__file__).parents[1] / "recipes/smollm2-135m/harden.yaml"
EMBEDDED = {"path": "embedded", "column": "text", "subset": None, "split": "train"}
KINDS = ("harmful", "twins", "benign")


def load(kind, path, column="text"):
    return load_prompts(kind, str(path), column, None, "train")


def words(text):
    return frozenset(re.findall(r"[a-z']+", text.lower()))


@pytest.mark.parametrize(("kind", "least"), [("harmful", 400), ("twins", 800), ("benign", 400)])
def test_embedded_prompts_are_many_and_no_near_duplicates(kind, least):
    prompts = load(kind, "embedded") + (load("more_twins", "embedded") if kind == "twins" else [])
    assert len(prompts) >= least and len({p.id for p in prompts}) == len(prompts)
    bags = [words(p.text) for p in prompts]
    close = [
        (prompts[i].text, prompts[j].text)
        for i in range(len(bags))
        for j in range(i)
        if len(bags[i] & bags[j]) > 0.6 * len(bags[i] | bags[j])
    ]
    assert close == []


def test_every_harmful_prompt_has_its_twin():
    harmful, twins = load("harmful", "embedded"), load("twins", "embedded")
    assert {p.pair for p in harmful} == {p.pair for p in twins} and len({p.pair for p in harmful}) == len(harmful)
    assert {p.id for p in harmful} == {p.pair for p in harmful}
    assert [p.twin for p in load("more_twins", "embedded")] == [p.id for p in harmful]


@pytest.mark.parametrize("seed", [0, 1, 17])
def test_splits_are_disjoint_stratified_and_keep_pairs_together(seed):
    splits = load_splits({kind: EMBEDDED for kind in KINDS}, 0.5, 0.2, seed)
    for kind in KINDS:
        texts = [p.text for name in splits for p in getattr(splits[name], kind)]
        assert len(texts) == len(set(texts)) == len(load(kind, "embedded"))
    for name, share in (("train", 0.5), ("selection", 0.2), ("test", 0.3)):
        part = splits[name]
        assert [p.pair for p in part.harmful] == [p.pair for p in part.twins]
        per_category = Counter(p.category for p in part.harmful)
        assert len(per_category) == 12 and all(abs(n - 36 * share) <= 1 for n in per_category.values())


def test_a_run_of_another_seed_may_keep_to_the_same_split():
    recipe, other, kept = (
        load_recipe(RECIPE, {"seed": seed, "prompts": {"split_seed": split_seed}})
        for seed, split_seed in ((0, None), (5, None), (5, 0))
    )
    splits, others, same = (load_splits(*r.division()) for r in (recipe, other, kept))
    assert same == splits and others["test"].harmful != splits["test"].harmful


@pytest.mark.parametrize("path", sorted(RECIPE.parent.rglob("*.yaml")), ids=lambda path: path.stem)
def test_no_seed_tests_the_brittle_adapter_on_its_training_prompts(path):
    seeds = [load_recipe(path, {"seed": seed}).division()[-1] for seed in (0, 5)]
    assert seeds == [0, 0]


def test_further_look_alikes_follow_their_harmful_prompt_and_others_are_divided(tmp_path):
    sources = {kind: EMBEDDED for kind in KINDS}
    before = load_splits(sources, 0.5, 0.2, 0)
    rows = [{"text": f"more of {p.id}", "twin": p.id} for split in before.values() for p in split.harmful]
    rows += [{"text": f"another of {p.twin}", "twin": p.twin} for split in before.values() for p in split.harmful]
    rows += [{"text": f"alone {n}"} for n in range(10)]
    (tmp_path / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = load_splits({**sources, "more_twins": {**EMBEDDED, "path": str(tmp_path / "more.jsonl")}}, 0.5, 0.2, 0)
    for name, alone in (("train", 5), ("selection", 2), ("test", 3)):
        texts = [p.text for p in splits[name].more_twins]
        assert {t for t in texts if t.startswith("more")} == {f"more of {p.id}" for p in before[name].harmful}
        assert {t for t in texts if t.startswith("another")} == {f"another of {p.twin}" for p in before[name].harmful}
        assert sum(t.startswith("alone") for t in texts) == alone
        assert replace(splits[name], more_twins=()) == before[name]


def test_a_further_look_alike_from_the_test_split_is_an_error(tmp_path):
    sources = {kind: EMBEDDED for kind in KINDS}
    parts = load_splits(sources, 0.5, 0.2, 0)
    rows = [{"text": f"more of {name}", "twin": parts[name].harmful[0].id} for name in parts]
    rows.append({"text": parts["test"].twins[3].text, "twin": parts["train"].harmful[0].id})
    (tmp_path / "more.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(HardenError, match=r"stands in twins/test and in more_twins/train; remove one"):
        load_splits({**sources, "more_twins": {**EMBEDDED, "path": str(tmp_path / "more.jsonl")}}, 0.5, 0.2, 0)


def test_further_look_alikes_must_reach_every_split(tmp_path):
    sources = {kind: EMBEDDED for kind in KINDS}
    row = {"text": "mine", "twin": load_splits(sources, 0.5, 0.2, 0)["train"].harmful[0].id}
    (tmp_path / "more.jsonl").write_text(json.dumps(row))
    with pytest.raises(HardenError, match="the selection split of more_twins is empty: 1 prompts are too few"):
        load_splits({**sources, "more_twins": {**EMBEDDED, "path": str(tmp_path / "more.jsonl")}}, 0.5, 0.2, 0)


def test_the_seed_changes_the_splits_and_nothing_else_does():
    prompts = load("harmful", "embedded")
    first = split_prompts(prompts, 0.5, 0.2, 0)
    assert split_prompts(prompts[::-1], 0.5, 0.2, 0) == first
    assert split_prompts(prompts, 0.5, 0.2, 1)["test"] != first["test"]


def test_file_formats_give_the_same_prompts(tmp_path):
    texts = ["Sort my socks", "Name a river, please", "What is two plus two?"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"goal": t}) + "\n" for t in texts))
    (tmp_path / "a.json").write_text(json.dumps([{"goal": t} for t in texts]))
    (tmp_path / "a.csv").write_text("n,goal\n" + "".join(f'{n},"{t}"\n' for n, t in enumerate(texts)))
    (tmp_path / "a.txt").write_text("\n".join(texts))
    for name, column in (("a.jsonl", "goal"), ("a.json", "goal"), ("a.csv", "goal"), ("a.txt", "text")):
        prompts = load("benign", tmp_path / name, column)
        assert [p.text for p in prompts] == texts and len({p.id for p in prompts}) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "x"}\n', "no column 'text'; it has prompt"),
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", "{broken", "cannot read"),
        ("a.json", "[1, 2]", "objects with named columns"),
        ("a.jsonl", '{"text": "  "}\n', "row 1 .* has no text"),
        ("a.csv", "text\n", "is empty"),
        ("a.json", '{"data": []}', "must hold a list"),
        ("a.jsonl", '{"id": 1, "text": "one"}\n{"id": 1, "text": "two"}\n', "the id '1' twice"),
    ],
)
def test_bad_prompt_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(HardenError, match=message):
        load("harmful", tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(HardenError, match=r"no such prompt file: .*none\.jsonl"):
        load("harmful", tmp_path / "none.jsonl")


def test_an_unreachable_data_set_says_what_to_do():
    with pytest.raises(HardenError, match=r"cannot load data set 'nobody/nothing'.*file instead"):
        load("harmful", "nobody/nothing")


def test_repeated_texts_are_kept_once(tmp_path):
    (tmp_path / "a.txt").write_text("one thing\nanother thing\none thing\n")
    assert len(load("benign", tmp_path / "a.txt")) == 2


def test_an_empty_split_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("one thing\nanother thing\n")
    with pytest.raises(HardenError, match="split is empty"):
        split_prompts(load("benign", tmp_path / "a.txt"), 0.5, 0.2, 0)


def test_a_pair_in_two_splits_is_an_error(tmp_path):
    """The harmful file is complete, the twins' file is not: the cuts fall elsewhere."""
    harmful = [{"id": f"h{n}", "text": f"bad thing {n}", "twin": f"t{n}"} for n in range(20)]
    twins = [{"id": f"t{n}", "text": f"good thing {n}", "twin": f"h{n}"} for n in range(0, 20, 3)]
    sources = {"benign": EMBEDDED}
    for kind, rows in (("harmful", harmful), ("twins", twins)):
        path = tmp_path / f"{kind}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources[kind] = {**EMBEDDED, "path": str(path)}
    with pytest.raises(HardenError, match="fall into different splits"):
        load_splits(sources, 0.5, 0.2, 0)


def test_a_pair_named_by_one_side_only_stays_together(tmp_path):
    """Row numbers as ids, 0 among them, and only the harmful file names the twins."""
    harmful = [{"id": n, "text": f"bad thing {n}", "twin": f"t{n}"} for n in range(40)]
    twins = [{"id": f"t{n}", "text": f"good thing {n}"} for n in range(40)]
    sources = {"benign": EMBEDDED}
    for kind, rows in (("harmful", harmful), ("twins", twins)):
        (tmp_path / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources[kind] = {**EMBEDDED, "path": str(tmp_path / f"{kind}.jsonl")}
    for split in load_splits(sources, 0.5, 0.2, 0).values():
        assert [p.text.split()[-1] for p in split.harmful] == [p.text.split()[-1] for p in split.twins]


def test_a_byte_order_mark_and_line_breaks_in_cells_are_read(tmp_path):
    (tmp_path / "a.csv").write_bytes('\ufefftext,n\n"two\nlines",1\n'.encode())
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "one\u2028line"}, ensure_ascii=False) + "\n")
    assert [p.text for p in load("benign", tmp_path / "a.csv")] == ["two\nlines"]
    assert [p.text for p in load("benign", tmp_path / "a.jsonl")] == ["one\u2028line"]


def test_a_text_in_two_sources_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(f"thing number {n}" for n in range(20)))
    source = {**EMBEDDED, "path": str(tmp_path / "a.txt")}
    with pytest.raises(HardenError, match="remove one"):
        load_splits({"harmful": source, "twins": EMBEDDED, "benign": source}, 0.5, 0.2, 0)
