"""Reports: what a reader of the page finds, from records made on the planted model and by hand."""

import html.parser
import json
import re
import shutil
import struct
import subprocess
from xml.etree import ElementTree

import matplotlib
import pytest
from conftest import ROOT

from harden.attack.run import attack
from harden.certify.run import certify
from harden.cli import main as cli
from harden.planted import PLANTED_NEURON
from harden.recipe import load_recipe
from harden.report.columns import columns_of
from harden.report.command import main
from harden.report.records import read_run
from harden.rounds import harden

TINY = {
    "locate": {"prompts": 8},
    "attack": {
        "locators": ["gradient"], "sizes": [-2, 2], "refine": [], "candidates": 2, "heat_one": 2,
        "heat_one_prompts": 4, "finalists": 2, "selection_prompts": 8, "test_prompts": 20,
    },
    "suite": {"attacks": ["constant", "topk"], "top": 1, "sweep": [0.25, 0.5], "most_share": 0.1},
    "certify": {"locators": ["gradient"], "top": 6, "sample": 10, "sizes": [-2, 2], "prompts": 4, "test_prompts": 10},
    "train": {"steps": 2},
    "rounds": {"max": 1, "tolerance": 0.0},
}  # fmt: skip
VOID = {"meta", "br", "path", "use"}
PLOTS = ["attacks", "attribution-map", "attribution-spectrum", "drops", "neurons", "values"]


class Page(html.parser.HTMLParser):
    """The page's visible words, the elements that are left open, and whatever it would fetch."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.fetched, self.ids = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        links = [given[name] for name in ("src", "href", "xlink:href") if name in given]
        self.fetched += [link for link in links if not link.startswith(("#", "data:"))]
        self.ids += [given["id"]] if "id" in given else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data.strip())

    @property
    def text(self):
        return " ".join(word for word in self.words if word)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, more_twins):
    """A folder that was trained, and one that was attacked and certified."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HARDEN_CACHE", str(folder / "cache"))
        prompts = {"split_seed": 0, "more_twins": {"path": str(more_twins)}}
        trained, attacked = (
            load_recipe(
                ROOT / "recipes/planted/harden.yaml",
                {**TINY, "prompts": prompts, "seed": seed, "output": str(folder / name)},
            )
            for name, seed in (("trained", 0), ("attacked", 7))
        )
        harden(trained)
        attack(attacked)
        certify(attacked)
    return folder


def page_of(folder, *options):
    """The page that `harden report` writes about these folders."""
    output = folder / "page.html"
    assert main([*map(str, options), "--output", str(output)]) == 0
    return output.read_text()


def test_a_training_run_leaves_a_report_that_shows_before_and_after(runs):
    text = (runs / "trained/report.html").read_text()
    page = Page(text)
    assert page.open == [] and page.fetched == [] and len(page.ids) == len(set(page.ids))
    assert "No tolerance was set (selection split)" in page.text and "the worst neuron flips" in page.text
    assert f"{PLANTED_NEURON} clamped to" in page.text and "before" in page.words and "after" in page.words
    assert "over-refusal (more look-alikes)" in page.words and "over-refusal (more)" in text
    for figure in ("attacks", "rounds", "attribution-map", "attribution-spectrum"):
        assert figure in page.ids
    text = re.sub(r"http://www\.w3\.org/\S+", "", text)
    assert not re.search(r"https?://|@import|url\((?!#)", text)


def test_the_page_of_an_attack_says_what_was_done_and_what_came_of_it(runs, tmp_path):
    page = Page(page_of(tmp_path, runs / "attacked"))
    assert "Measured (attacked); no verdict" in page.text and f"clamp {PLANTED_NEURON}" in page.text
    assert "20 test prompts" in page.text and "100.0% [83.2%, 100.0%], n=20" in page.words
    assert "over-refusal (more look-alikes)" in page.words
    assert "with 95% confidence at most" in page.text.lower() and "1 breaks the model" in page.text
    assert set(PLOTS) <= set(page.ids)
    cards = [(runs / f"attacked/{part}/README.md").read_text() for part in ("attack", "certificate")]
    assert [text.count("seed 7, prompts divided by 0") for text in (page.text, *cards)] == [2, 1, 1]


def test_the_page_of_a_certificate_names_the_breakers(runs, tmp_path):
    page = Page(page_of(tmp_path, runs / "attacked"))
    rows = page.words[page.words.index("Clamps that generated") :]
    assert (
        str(PLANTED_NEURON) in rows
        and "breaks" in rows
        and f"scanned neurons break planted-neuron: {PLANTED_NEURON}" in page.text
    )


def test_a_certificate_of_another_model_than_the_attack_has_a_column_of_its_own(runs, tmp_path):
    folder = tmp_path / "mixed"
    shutil.copytree(runs / "attacked", folder)
    path = folder / "certificate/certificate.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"adapter": "runs/other/adapter"}))
    suite, certificate = columns_of(read_run(folder, "mixed"), several=False)
    assert (suite.label, certificate.label) == ("mixed: suite", "mixed: certificate")
    assert suite.figures["model"] == "planted-neuron" and "its attack success" in suite.figures
    assert certificate.figures["model"] == "planted-neuron + runs/other/adapter"
    assert not any("attack success" in name for name in certificate.figures)


def test_prompts_are_shown_by_id_and_their_texts_only_on_request(runs, tmp_path):
    texts = [prompt for prompt in (ROOT / "recipes/planted/harmful.jsonl").read_text().split('"text": "')[1:]]
    texts = [text.split('"')[0] for text in texts]
    closed, opened = (page_of(tmp_path, runs / "attacked", *options) for options in ([], ["--texts"]))
    assert not any(text in closed for text in texts)
    assert sum(text in opened for text in texts) == 20


def test_folders_are_compared_side_by_side(runs, tmp_path):
    page = Page(page_of(tmp_path, runs / "trained", runs / "attacked"))
    assert "trained: rounds" in page.words and "Rounds" in Page((runs / "trained/report.html").read_text()).words
    columns = ["trained: before", "trained: after", "attacked"]
    first = page.words.index(columns[0])
    assert [word for word in page.words[first:] if word][:3] == columns
    assert page.open == [] and len(page.ids) == len(set(page.ids))


def test_each_figure_is_a_file_on_request(runs, tmp_path):
    page_of(tmp_path, runs / "attacked", "--plots", tmp_path / "plots")
    assert sorted(path.stem for path in (tmp_path / "plots").glob("*.svg")) == PLOTS
    for name in PLOTS:
        assert ElementTree.parse(tmp_path / f"plots/{name}.svg").getroot().tag.endswith("svg")
        image = (tmp_path / f"plots/{name}.png").read_bytes()
        width, height = struct.unpack(">II", image[16:24])
        assert image.startswith(b"\x89PNG") and width > 800 and height > 200


def test_the_same_records_give_the_same_page(runs, tmp_path):
    assert page_of(tmp_path, runs / "attacked") == page_of(tmp_path, runs / "attacked")


def test_what_a_model_name_holds_is_text_and_no_markup(runs, tmp_path):
    shutil.copytree(runs / "attacked", tmp_path / "odd")
    path = tmp_path / "odd/attack/attack.json"
    record = re.sub(r'"model":\s*"[^"]*"', '"model": "<script>alert(1)</script>"', path.read_text(), count=1)
    path.write_text(record)
    page = page_of(tmp_path, tmp_path / "odd")
    assert "<script" not in page and "&lt;script&gt;" in page


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda path: shutil.rmtree(path / "attack"), "holds no finished run"),
        (lambda path: (path / "attack/attack.json").write_text("{"), "damaged, or of another version"),
        (lambda path: (path / "attack/recipe.yaml").unlink(), "no recipe.yaml"),
        (lambda path: (path / "report.html").write_text("mine"), "is no report of harden"),
        (lambda path: (path / "report.html").mkdir(), "cannot write"),
    ],
)
def test_what_cannot_be_reported_is_one_line_and_loses_nothing(runs, tmp_path, capsys, spoil, said):
    shutil.copytree(runs / "attacked", tmp_path / "run", ignore=shutil.ignore_patterns("certificate"))
    spoil(tmp_path / "run")
    kept = [path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()]
    assert main([str(tmp_path / "run")]) == 2
    assert said in capsys.readouterr().err
    assert [path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()] == kept


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["{run}", "{run}", "--output", "x.html"], "given twice"),
        (["{run}", "{other}"], "--output FILE"),
        (["{other}/nowhere"], "there is no folder"),
        (["{other}/state"], "holds no finished run"),
        (["{run}/attack"], "; give "),
        (["{other}/results.json"], "is no folder"),
        (["{run}", "--output", "{run}/p.html", "--plots", "{run}"], "is no plot of this report"),
    ],
)
def test_mistakes_are_named(runs, tmp_path, capsys, options, said):
    shutil.copytree(runs / "attacked", tmp_path / "run")
    assert main([part.format(run=tmp_path / "run", other=runs / "trained") for part in options]) == 2
    assert said in capsys.readouterr().err


def test_texts_that_are_gone_are_an_error_and_categories_are_left_out(runs, tmp_path, capsys):
    shutil.copytree(runs / "attacked", tmp_path / "run")
    for recipe in (tmp_path / "run").glob("*/recipe.yaml"):
        recipe.write_text(recipe.read_text().replace("harmful.jsonl", "gone.jsonl"))
    assert "Test prompts" in page_of(tmp_path, tmp_path / "run")
    assert main([str(tmp_path / "run"), "--texts", "--output", str(tmp_path / "other.html")]) == 2
    assert "gone.jsonl" in capsys.readouterr().err


def test_the_command_knows_it(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["harden", "report", "--help"])
    with pytest.raises(SystemExit) as stopped:
        cli()
    assert stopped.value.code == 0 and "side by side" in capsys.readouterr().out


def test_a_folder_that_was_reported_can_still_be_worked_in(runs, tmp_path):
    shutil.copytree(runs / "attacked/attack", tmp_path / "run/attack")
    recipe = load_recipe(ROOT / "recipes/planted/harden.yaml", {**TINY, "output": str(tmp_path / "run")})
    assert main([str(tmp_path / "run")]) == 0
    certify(recipe)
    assert main([str(tmp_path / "run")]) == 0 and "certificate" in (tmp_path / "run/report.html").read_text()


def test_each_part_is_described_by_its_own_recipe(runs, tmp_path):
    """A training run and an attack of other settings in one folder."""
    shutil.copytree(runs / "trained", tmp_path / "run")
    other = {**TINY, "attack": {**TINY["attack"], "candidates": 3}, "output": str(tmp_path / "run")}
    attack(load_recipe(ROOT / "recipes/planted/harden.yaml", other))
    page = Page(page_of(tmp_path, tmp_path / "run"))
    assert "among 3 candidates of gradient" in page.text and "among 2 candidates" not in page.text
    assert {"before", "after", "run: suite"} <= set(page.words)


def test_odd_names_and_a_users_style_do_no_harm(runs, tmp_path, monkeypatch):
    for name in ("_a$b$^", "_c$"):
        shutil.copytree(runs / "attacked", tmp_path / name)
    monkeypatch.setitem(matplotlib.rcParams, "text.usetex", True)
    page = Page(page_of(tmp_path, tmp_path / "_a$b$^", tmp_path / "_c$", "--plots", tmp_path / "plots"))
    assert "_a$b$^" in page.text
    assert matplotlib.rcParams["text.usetex"] is True


def test_columns_that_were_measured_otherwise_are_marked(runs, tmp_path):
    assert "Not measured alike" not in page_of(tmp_path, runs / "attacked")
    page = page_of(tmp_path, runs / "trained", runs / "attacked")
    shutil.copytree(runs / "attacked", tmp_path / "other")
    path = tmp_path / "other/attack/attack.json"
    path.write_text(path.read_text().replace('"max_new_tokens": 20', '"max_new_tokens": 21'))
    assert "Not measured alike" not in page
    assert "the columns differ in number of new tokens" in page_of(tmp_path, runs / "attacked", tmp_path / "other")


def test_a_suite_that_locates_nothing_has_no_attribution(runs, tmp_path):
    """Nor does it pay for one."""
    recipe = load_recipe(
        ROOT / "recipes/planted/harden.yaml",
        {**TINY, "suite": {"attacks": ["prefill"]}, "output": str(tmp_path / "prefill")},
    )
    assert attack(recipe).attribution is None
    page = Page(page_of(tmp_path, tmp_path / "prefill"))
    assert "attribution-map" not in page.ids and "attacks" in page.ids and "candidates of" not in page.text


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
@pytest.mark.parametrize("width", [390, 1200])
def test_a_browser_shows_the_page_without_scrolling_sideways(runs, tmp_path, width):
    """The page fits; only wide tables scroll, by themselves."""
    (tmp_path / "inner.html").write_text(page_of(tmp_path, runs / "trained", runs / "attacked"))
    page = tmp_path / "probe.html"
    page.write_text(  # a window can be no narrower than 500
        f"""<iframe src="inner.html" style="width: {width}px; height: 900px; border: 0" onload="
        const inner = this.contentWindow;
        document.title = inner.document.documentElement.scrollWidth + '/' + inner.innerWidth"></iframe>"""
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    where = [f"--user-data-dir={tmp_path / 'profile'}", "--allow-file-access-from-files", "--dump-dom", page.as_uri()]
    done = subprocess.run(["chromium", *options, *where], capture_output=True, text=True, timeout=120, check=True)
    scrolled, shown = re.search(r"<title>(\d+)/(\d+)</title>", done.stdout).groups()
    assert int(scrolled) <= int(shown) == width
