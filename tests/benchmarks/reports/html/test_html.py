"""The report without a browser: what the file says, and what it must never say."""

import json
import re
import statistics
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from urllib.parse import unquote

import pytest
from report_cases import drawing, fill, suite_of

from cl_merge.benchmarks.methods.method import METHODS, Method
from cl_merge.benchmarks.reports.html import write_report
from cl_merge.benchmarks.reports.run_pictures import pictures_of_run
from cl_merge.benchmarks.reports.summary import Summary, summarize, summary_of_run
from cl_merge.benchmarks.suites.definition import Setting
from cl_merge.benchmarks.suites.plan import FAILED
from cl_merge.errors import InputError

pytestmark = pytest.mark.slow

SETTINGS = [("cifar100", 5), ("cars", 5), ("cifar100", 10)]
FAILS = ["cars-5/seed5/independent", "cars-5/seed6/independent", "cars-5/seed7/independent"]
VOID = {"meta", "link", "br", "hr", "img", "input"}
HOSTILE = "</script><script>alert('1')</script> & \"<b onclick=x>\" ${x} {{ x }} <!--"
SVG = '<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="a"><path d="M0 0L9 9"/></svg>'


class Page(HTMLParser):
    """Elements of a page, with the texts in them; says what is not closed as it was opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict, list]] = []
        self.wrong: list[str] = []
        self._open: list[tuple[str, dict, list]] = []
        self.feed(text)
        self.close()
        self.wrong += [f"<{tag}> is left open" for tag, _, _ in self._open]

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        if len(set(names)) < len(names):
            self.wrong.append(f"<{tag}> has an attribute twice")
        element = (tag, dict(attributes), [])
        self.found.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes), []))

    def handle_endtag(self, tag):
        if not self._open or self._open[-1][0] != tag:
            self.wrong.append(f"</{tag}> at {self.getpos()} closes nothing")
        else:
            self._open.pop()

    def handle_data(self, data):
        for _, _, texts in self._open:
            texts.append(data)

    def all(self, tag, **attributes):
        return [
            (own, " ".join(" ".join(texts).split()))
            for name, own, texts in self.found
            if name == tag and all(own.get(k.rstrip("_")) == v for k, v in attributes.items())
        ]

    @property
    def data(self):
        return next(
            json.loads("".join(texts))
            for tag, own, texts in self.found
            if tag == "script" and own.get("id") == "data"
        )


def written(summary, path, figures=()):
    write_report(summary, figures, path)
    return Page(path.read_text())


@pytest.fixture(scope="module")
def suite():
    return suite_of(SETTINGS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, suite):
    missing = ["cifar100-10/seed6/sequential"]
    return fill(tmp_path_factory.mktemp("suite") / "made up", suite, FAILS, missing)


@pytest.fixture(scope="module")
def summary(suite, folder):
    return summarize(suite, folder)


@pytest.fixture(scope="module")
def page(summary, folder):
    return written(summary, folder / "report.html")


def accuracies(folder, setting, method):
    """What the files say, read without the library."""
    name = "cifar100" if method == "joint" and "cifar100" in setting else setting
    name = "cars" if method == "joint" and "cars" in setting else name
    found = {}
    for file in folder.glob(f"{name}/seed*/*/results.json"):
        content = json.loads(file.read_text())
        training = METHODS[method].training or "sequential"
        if file.parent.name == training and method in content["methods"]:
            found[content["seed"]] = content["methods"][method]["metrics"]["accuracy"]
    return [found[seed] for seed in sorted(found)]


def cell_of(page, method, setting):
    data = page.data
    row = [name for name, _ in data["methods"]].index(method)
    return data["cells"][row][data["settings"].index(setting)]


def test_the_page_is_well_formed(page):
    assert page.wrong == []


def test_ids_are_unique_and_every_link_inside_leads_somewhere(page):
    ids = [own["id"] for _, own, _ in page.found if "id" in own]
    inside = {own["href"][1:] for own, _ in page.all("a") if own["href"].startswith("#")}
    assert len(ids) == len(set(ids))
    assert inside
    assert inside <= set(ids)


def test_links_to_files_are_relative_and_lead_to_them(page, folder):
    links = {own["href"] for own, _ in page.all("a") if not own["href"].startswith("#")}
    links |= {link for run in page.data["runs"] for link in run["links"].values()}
    assert all(link.startswith("./") for link in links)
    found = {(folder / unquote(link)).name for link in links if (folder / unquote(link)).is_file()}
    assert found == {"results.json", "config.yaml", "log.txt"}
    assert all((folder / unquote(link)).is_file() for link in links)


def test_links_lead_to_the_files_from_another_folder_too(summary, folder, tmp_path):
    where = tmp_path / "else where"
    page = written(summary, where / "page.html")
    links = [link for run in page.data["runs"] for link in run["links"].values()]
    assert links
    assert all((where / unquote(link)).resolve().is_file() for link in links)


def test_every_cell_says_mean_deviation_and_difference_to_the_paper(page, suite, folder, summary):
    table = page.found.index(next(e for e in page.found if e[1].get("id") == "results"))
    texts = [
        " ".join("".join(e[2]).split()) for e in page.found[table:] if "at-" in e[1].get("href", "")
    ]
    columns = ["cifar100-5", "cifar100-10", "cars-5"]
    methods = [m for m in METHODS if m in suite.methods]
    assert len(texts) == len(columns) * len(methods)
    for number, text in enumerate(texts):
        method, setting = methods[number // 3], columns[number % 3]
        values = accuracies(folder, setting, method)
        if not values:
            assert text == "failed"
            continue
        mean, std = statistics.mean(values), statistics.stdev(values)
        assert f"{mean:.1f} ± {std:.1f}" in text, (method, setting)
        assert ("2 of 3 seeds" in text) == (len(values) == 2)
        paper = summary.entries[setting, method].paper
        if paper is not None:
            sign = "+" if mean > paper else "\N{MINUS SIGN}"
            assert f"paper {paper:.1f} {sign}{abs(mean - paper):.1f}" in text


def test_best_and_second_best_are_marked_in_words_and_only_where_methods_merge(page, folder):
    for setting in ("cifar100-5", "cifar100-10"):
        means = {
            method: statistics.mean(accuracies(folder, setting, method))
            for method in ("magmax", "average", "ties")
        }
        first, second = sorted(means, key=means.get, reverse=True)[:2]
        for method in page.data["methods"]:
            rank = {first: 1, second: 2}.get(method[0])
            assert cell_of(page, method[0], setting)["figures"]["accuracy"]["rank"] == rank
    cells = [text for own, text in page.all("a") if own["href"].startswith("#at-")]
    # Of the third setting only one method that merges is left.
    assert sum("(best)" in text for text in cells) == 3
    assert sum("(second best)" in text for text in cells) == 2


def test_lower_forgetting_is_better(page):
    figures = {
        method: cell_of(page, method, "cifar100-5")["figures"]["forgetting"]
        for method in ("magmax", "average", "ties")
    }
    best = min(figures, key=lambda method: figures[method]["order"])
    assert [method for method in figures if figures[method]["rank"] == 1] == [best]


def test_a_failed_run_says_why_in_words(page):
    ((_, text),) = page.all("section", id="failed")
    assert text.count("no space left <on> device") == len(FAILS)
    assert cell_of(page, "ties", "cars-5")["seeds"][0]["reason"] == "no space left <on> device"


def test_one_seed_shows_no_deviation(tmp_path):
    suite = suite_of([("cifar100", 5)], seeds=(5,))
    fill(tmp_path, suite)
    page = written(summarize(suite, tmp_path), tmp_path / "report.html")
    assert page.wrong == []
    assert not any("±" in text for _, text in page.all("td"))


def test_a_suite_of_which_nothing_has_run_says_so(tmp_path):
    suite = suite_of(SETTINGS)
    page = written(summarize(suite, tmp_path), tmp_path / "report.html")
    assert page.wrong == []
    assert "Not run: all methods." in [text for _, text in page.all("p")]
    assert "0 of 54 done, 54 not run" in [text for _, text in page.all("dd")]


def test_it_is_readable_without_scripts(page):
    controls = [own for tag, own, _ in page.found if own.get("class") in ("theme", "metric")]
    assert len(controls) == 2
    assert all("hidden" in own for own in controls)
    tables = [text for own, text in page.all("table", class_="metrics")]
    assert len(tables) == 3
    assert all("forward transfer" in text for text in tables)


def test_headings_are_in_order_and_tables_have_captions_and_scopes(page):
    levels = [int(tag[1]) for tag, _, _ in page.found if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(later <= former + 1 for former, later in pairwise(levels))
    assert len(page.all("table")) == len(page.all("caption"))
    assert all("scope" in own for own, _ in page.all("th"))


def test_nothing_is_loaded_from_elsewhere(page, folder):
    text = (folder / "report.html").read_text()
    loading = {"src", "srcset", "action", "data", "poster"}
    for tag, own, _ in page.found:
        assert not loading & set(own), tag
        assert tag not in ("iframe", "object", "embed", "base", "img")
        assert not own.get("href", "#").startswith(("http", "//", "javascript")), own
    assert [own["href"] for own, _ in page.all("link")] == ["data:,"]
    assert not re.search(r"@import|https?://|url\(|fetch\(|XMLHttpRequest|import\(", text)


def test_the_same_input_gives_the_same_bytes(summary, folder, suite):
    write_report(summary, [], folder / "first.html")
    write_report(summarize(suite, folder), [], folder / "second.html")
    assert (folder / "first.html").read_bytes() == (folder / "second.html").read_bytes()


def test_hostile_words_stay_words(tmp_path):
    suite = replace(
        suite_of([('<i>"&', 3)], seeds=(1,), paper=None, methods=("magmax", "ties")),
        name=HOSTILE,
        about=HOSTILE,
    )
    fill(tmp_path, suite)
    for file in tmp_path.rglob("results.json"):
        content = json.loads(file.read_text()) | {"model": HOSTILE}
        content["tasks"][0]["name"] = HOSTILE
        content["versions"]["torch"] = HOSTILE
        file.write_text(json.dumps(content))
        file.with_name("config.yaml").write_text(HOSTILE)
    summary = summarize(suite, tmp_path)
    entry = summary.entries['<i>"&-3', "ties"]
    failed = replace(entry.cells[0], state=FAILED, reason=HOSTILE, result={}, metrics={})
    entries = dict(summary.entries)
    entries['<i>"&-3', HOSTILE] = replace(
        entry, method=Method(HOSTILE, "independent"), cells=(failed,), metrics={}
    )
    figure = drawing(HOSTILE, "", SVG, caption=HOSTILE, columns=(HOSTILE,), rows=((HOSTILE,),))
    page = written(replace(summary, entries=entries), tmp_path / "report.html", [figure])
    assert page.wrong == []
    assert len(page.all("script")) == 2
    assert not page.all("b")
    assert not page.all("i")
    assert not [own for _, own, _ in page.found if any(name.startswith("on") for name in own)]
    words = " ".join(HOSTILE.split())
    for tag in ("h1", "title", "p", "td", "dd", "th", "strong", "figcaption"):
        assert any(words in text for _, text in page.all(tag)), tag
    assert page.data["runs"][0]["config"] == HOSTILE
    assert page.data["methods"][-1][0] == HOSTILE


def test_figures_stand_with_their_settings_and_say_their_numbers(summary, folder, tmp_path):
    figures = [drawing("one", "cifar100-5", SVG), drawing("both", "cifar100", SVG)]
    page = written(summary, tmp_path / "report.html", figures)
    assert page.wrong == []
    sections = {own["id"]: text for own, text in page.all("section")}
    assert "one what is drawn" in sections["setting-cifar100-5"]
    assert "both what is drawn" in sections["figures"]
    assert "both" not in sections["setting-cifar100-5"]
    assert "task accuracy 1 91.25 2" in sections["figures"]
    assert [own["role"] for own, _ in page.all("svg")] == ["img", "img"]


def test_a_run_brings_its_own_pictures(folder):
    run = folder / "cifar100-5/seed6/sequential"
    summary = summary_of_run(run)
    pictures = pictures_of_run(run, summary.suite.settings[0].name)
    assert [picture.kind for picture in pictures] == ["accuracy_by_task", "accuracy_matrix"]
    page = written(summary, run / "report.html", pictures)
    assert page.wrong == []
    labels = [own["aria-label"] for own, _ in page.all("svg")]
    assert labels == [picture.title for picture in pictures]
    matrix = json.loads((run / "results.json").read_text())["methods"]["magmax"]["matrix"]
    sections = {own["id"]: text for own, text in page.all("section")}
    assert f"5 {' '.join(f'{v:.6g}' for v in matrix[-1])}" in sections["setting-cifar100-5"]


def test_matrices_are_in_the_page_in_tenths_and_once_where_tasks_change_nothing(page, folder):
    file = folder / "cifar100-5/seed5/sequential/results.json"
    own = json.loads(file.read_text())["methods"]["magmax"]
    found = cell_of(page, "magmax", "cifar100-5")["seeds"][0]["matrix"]
    assert found["rows"] == [[round(value, 1) for value in row] for row in own["matrix"]]
    joint = cell_of(page, "joint", "cifar100-5")["seeds"][0]["matrix"]
    assert len(joint["rows"]) == 1


def test_a_single_run_reads_like_a_suite_of_its_own(folder, summary):
    run = folder / "cifar100-5/seed6/sequential"
    found = summary_of_run(run)
    assert [s.name for s in found.suite.settings] == ["cifar100-5"]
    assert found.suite.seeds == (6,)
    of_suite = summary.entries["cifar100-5", "magmax"].metrics
    own = found.entries["cifar100-5", "magmax"].metrics
    assert {name: f.values for name, f in own.items()} == {
        name: {6: f.values[6]} for name, f in of_suite.items()
    }
    page = written(found, run / "report.html")
    assert page.wrong == []
    assert page.data["runs"][0]["links"]["results.json"] == "./results.json"


def test_a_single_run_keeps_methods_of_users(folder, tmp_path):
    merger = tmp_path / "own.py"
    merger.write_text(
        "from cl_merge.mergers import MERGERS\n\nclass Mine(MERGERS['average']):\n    name = 'mine'\n"
    )
    results = json.loads((folder / "cifar100-5/seed6/sequential/results.json").read_text())
    results["methods"]["mine"] = results["methods"]["magmax"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "config.yaml").write_text(f"method: magmax\ncompare: ['{merger}:Mine']\n")
    found = summary_of_run(tmp_path)
    assert [m.name for m in found.suite.rows] == list(results["methods"])


def test_a_folder_without_results_is_no_run(tmp_path):
    with pytest.raises(InputError, match="holds no run: there is no config.yaml"):
        summary_of_run(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(InputError, match="results.json"):
        summary_of_run(tmp_path)


def test_all_methods_on_eleven_settings_of_fifty_tasks_stay_small(tmp_path):
    names = [f"data{number}" for number in range(11)]
    one = suite_of([("cars", 50)], methods=METHODS, seeds=(5,), paper=None)
    fill(tmp_path, one)
    entries = summarize(one, tmp_path).entries
    large = {
        (f"{name}-50", method): replace(entry, setting=Setting(name, 50))
        for name in names
        for (_, method), entry in entries.items()
    }
    suite = replace(one, settings=tuple(Setting(name, 50) for name in names))
    page = written(Summary(suite, tmp_path, large), tmp_path / "report.html")
    assert [len(row) for row in page.data["cells"]] == [11] * len(METHODS)
    assert (tmp_path / "report.html").stat().st_size < 8e6
