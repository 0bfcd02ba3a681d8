"""The report in a real browser: what can be done with it, and how it looks where it is narrow.

Without Chromium these tests are skipped, unless ``CL_MERGE_TEST_BROWSER=required``.
"""

import json
import os
import shutil
import statistics

import pytest
from report_cases import drawing, fill, suite_of

from cl_merge.benchmarks.methods.method import METHODS as EVERY
from cl_merge.benchmarks.reports.figures.style import figure_style, new_canvas, svg_element
from cl_merge.benchmarks.reports.html import write_report
from cl_merge.benchmarks.reports.summary import METRICS, summarize

pytestmark = pytest.mark.slow

SETTINGS = [("cifar100", 5), ("cars", 5), ("cifar100", 10), ("cifar100", 20), ("cifar100", 50)]
FAILS = [f"cars-5/seed{seed}/independent" for seed in (5, 6, 7)]
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update"
)
METHODS = {
    name: EVERY[name]
    for name in (
        "zero-shot",
        "joint",
        "sequential",
        "lwf",
        "magmax",
        "lwf-magmax",
        "average",
        "ties",
    )
}
WIDTHS = (360, 1440)
SLOW = 0.5  # seconds


def programs():
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return next(filter(None, map(shutil.which, names)), None), shutil.which("chromedriver")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    required = os.environ.get("CL_MERGE_TEST_BROWSER") == "required"
    chromium, driver = programs()
    if not (chromium and driver):
        (pytest.fail if required else pytest.skip)("Chromium or chromedriver is not installed")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(driver)
    with webdriver.Chrome(options=options, service=service) as started:
        yield started


def draw(name: str, seed: int) -> str:
    """A picture as figures are written."""
    with figure_style():
        canvas = new_canvas(3)
        axes = canvas.add_subplot()
        axes.plot([1, 2, 3], [seed, 4, 2], marker="o", label="a line")
        axes.imshow([[1, 2], [3, 4]], extent=(1, 2, 1, 2))
        axes.legend()
        return svg_element(canvas, name, "a line that falls")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    suite = suite_of(SETTINGS, methods=METHODS)
    missing = ["cifar100-10/seed6/sequential", "cifar100-20/seed5/lwf", "cifar100-20/seed6/lwf"]
    missing += ["cifar100-20/seed7/lwf"]
    folder = fill(tmp_path_factory.mktemp("browser") / "made up #1", suite, FAILS, missing)
    columns, rows = ("task", *"abcdefghijklmnop"), (("1", *map(float, range(16))),) * 3
    figures = [
        drawing(f"Picture {i} of {name}", name, draw(f"{i}-{name}", i), columns=columns, rows=rows)
        for name in ("cifar100-5", "cars-5", "cifar100")
        for i in range(3)
    ]
    write_report(summarize(suite, folder), figures, folder / "report.html")
    return folder


@pytest.fixture(autouse=True)
def quiet(browser):
    """Whatever a test does, the console stays empty."""
    browser.get_log("browser")
    yield
    assert browser.get_log("browser") == []


def device(browser, width=1440, theme="light"):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    wanted = {"prefers-color-scheme": theme, "prefers-reduced-motion": "reduce"}
    media = {"features": [{"name": n, "value": v} for n, v in wanted.items()]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


@pytest.fixture
def page(browser, folder):
    from selenium.webdriver.support.ui import WebDriverWait

    device(browser)
    browser.get("about:blank")
    browser.get((folder / "report.html").as_uri())
    # On a busy machine the driver may come back before the page's script has run.
    WebDriverWait(browser, 30).until(lambda found: button(found, 0))
    return browser


def figures_of(folder, setting, metric):
    """Means by method, read from the files."""
    found = {}
    for method in METHODS.values():
        of_data = METHODS[method.name].training == "joint"
        place = setting.partition("-")[0] if of_data else setting
        training = method.training or "sequential"
        values = [
            json.loads(file.read_text())["methods"][method.name]["metrics"][metric]
            for file in sorted(folder.glob(f"{place}/seed*/{training}/results.json"))
        ]
        if of_data and metric != "accuracy":
            values = []
        found[method.name] = statistics.mean(values) if values else None
    return found


COLUMNS = ["cifar100-5", "cifar100-10", "cifar100-20", "cifar100-50", "cars-5"]


def shown(browser):
    """Names of the rows from top to bottom, groups left out."""
    return browser.execute_script(
        "return [...document.querySelectorAll('#results tbody:not([hidden]) tr:not(.group)')]"
        ".filter(r => r.getClientRects().length).map(r => r.cells[0].textContent)"
    )


def texts(browser, column):
    """What each method has in a column."""
    found = browser.execute_script(
        "return [...document.querySelectorAll('#results tbody tr:not(.group)')]"
        f".map(r => [r.cells[0].textContent, r.cells[{column + 1}].innerText])"
    )
    return dict(found)


def button(browser, column):
    """What sorts by a column; -1 is that of the methods."""
    selector = "#by-method .sort" if column < 0 else "#results th.by .sort"
    found = browser.find_elements("css selector", selector)
    return found[max(column, 0)] if found else None


def directions(browser):
    return browser.execute_script(
        "return [...document.querySelectorAll('#results th[aria-sort]')]"
        ".map(th => [th.textContent, th.getAttribute('aria-sort')])"
    )


def by_mouse(element):
    element.click()


def by_enter(element):
    from selenium.webdriver.common.keys import Keys

    element.send_keys(Keys.ENTER)


def by_space(element):
    from selenium.webdriver.common.keys import Keys

    element.send_keys(Keys.SPACE)


@pytest.mark.parametrize("press", [by_mouse, by_enter, by_space])
@pytest.mark.parametrize("metric", ["accuracy", "forgetting", "backward_transfer"])
def test_columns_sort_as_numbers_with_what_is_missing_last(page, folder, press, metric):
    choose(page, metric)
    column = COLUMNS.index("cifar100-20")  # without runs of LwF
    before, means = shown(page), figures_of(folder, "cifar100-20", metric)
    there = [name for name in before if means[name] is not None]
    missing = [name for name in before if means[name] is None]
    assert len(missing) >= 2
    press(button(page, column))
    assert shown(page) == sorted(there, key=lambda n: -means[n]) + missing
    assert directions(page) == [["20 tasks", "descending"]]
    press(button(page, column))
    assert shown(page) == sorted(there, key=lambda n: means[n]) + missing
    assert directions(page) == [["20 tasks", "ascending"]]
    press(button(page, column))
    assert shown(page) == before
    assert directions(page) == []


def test_sorting_keeps_the_focus_on_its_button(page):
    element = button(page, 1)
    by_enter(element)
    assert page.switch_to.active_element == element


def test_equal_figures_keep_the_order_of_the_table(page):
    choose(page, "peak_memory")  # the same for all runs
    before = shown(page)
    column = COLUMNS.index("cifar100-5")
    for _ in range(2):
        button(page, column).click()
        assert shown(page) == before


def test_methods_sort_by_name(page):
    names = shown(page)
    button(page, -1).click()
    assert shown(page) == sorted(names)
    button(page, -1).click()
    assert shown(page) == sorted(names)[::-1]


def test_a_column_stays_sorted_when_the_metric_changes(page, folder):
    button(page, 0).click()
    choose(page, "task_aware_accuracy")
    means = figures_of(folder, "cifar100-5", "task_aware_accuracy")
    there = [name for name in METHODS if means[name] is not None]
    assert shown(page)[: len(there)] == sorted(there, key=lambda n: -means[n])


def choose(browser, metric):
    from selenium.webdriver.support.select import Select

    Select(browser.find_element("id", "metric")).select_by_value(metric)


@pytest.mark.parametrize("metric", ["average_incremental_accuracy", "forward_transfer"])
def test_the_selector_shows_another_metric_and_says_what_it_is(page, folder, metric):
    choose(page, metric)
    assert METRICS[metric].about in page.find_element("id", "meaning").text
    for column, setting in enumerate(COLUMNS):
        means = figures_of(folder, setting, metric)
        for method, text in texts(page, column).items():
            if means[method] is None:
                assert text in ("failed", "not run", "\N{EN DASH}")
            else:
                number = f"{means[method]:.1f}".replace("-", "\N{MINUS SIGN}")
                assert number in text.replace("\n", " ").split()
            assert "paper" not in text


def test_the_selector_comes_back_to_what_was_written(page):
    read = "return [...document.querySelectorAll('#results td, caption')].map(e => e.innerHTML)"
    before = page.execute_script(read)
    choose(page, "forgetting")
    assert page.execute_script(read) != before
    choose(page, "accuracy")
    assert page.execute_script(read) == before


def test_every_metric_can_be_chosen(page):
    from selenium.webdriver.support.select import Select

    options = Select(page.find_element("id", "metric")).options
    assert [option.get_attribute("value") for option in options] == list(METRICS)


@pytest.mark.parametrize("press", [by_mouse, by_enter])
def test_details_open_close_with_escape_and_give_the_focus_back(page, press):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    link = page.find_element("css selector", "#results a[href='#at-cifar100-5-magmax']")
    dialog = page.find_element("id", "cell")
    assert not dialog.is_displayed()
    press(link)
    assert dialog.is_displayed()
    assert page.find_element("id", "cell-title").text == "magmax on cifar100-5"
    assert page.execute_script("return location.hash") == "#at-cifar100-5-magmax"
    assert page.execute_script("return document.activeElement.closest('dialog') !== null")
    ActionChains(page).send_keys(Keys.ESCAPE).perform()
    assert not dialog.is_displayed()
    assert page.switch_to.active_element == link
    assert page.execute_script("return location.hash") == ""


def test_details_have_every_seed_every_metric_and_the_matrix(page, folder):
    page.find_element("css selector", "#results a[href='#at-cifar100-5-ties']").click()
    body = page.find_element("id", "cell-body")
    content = json.loads((folder / "cifar100-5/seed5/independent/results.json").read_text())
    own = content["methods"]["ties"]
    for name in ("accuracy", "forgetting", "backward_transfer"):
        assert f"{own['metrics'][name]:.2f}".replace("-", "\N{MINUS SIGN}") in body.text
    read = (
        "return [...document.querySelectorAll('.heat tbody tr')]"
        ".map(r => [...r.cells].slice(1).map(c => c.textContent))"
    )
    assert page.execute_script(read) == [[f"{v:.1f}" for v in row] for row in own["matrix"]]
    page.find_element("css selector", "#cell-body option[value=aware]").click()
    aware = own["matrix_task_aware"]
    assert page.execute_script(read) == [[f"{v:.1f}" for v in row] for row in aware]
    page.find_elements("css selector", "#cell-body select")[1].send_keys("7")
    content = json.loads((folder / "cifar100-5/seed7/independent/results.json").read_text())
    aware = content["methods"]["ties"]["matrix_task_aware"]
    assert page.execute_script(read) == [[f"{v:.1f}" for v in row] for row in aware]
    links = [link.get_attribute("href") for link in body.find_elements("tag name", "a")]
    place = (folder / "cifar100-5/seed5/independent").as_uri()
    names = ("results.json", "config.yaml", "log.txt")
    assert links[:3] == [f"{place}/{name}" for name in names]


def test_details_of_what_failed_say_why(page):
    page.find_element("css selector", "#results a[href='#at-cars-5-ties']").click()
    assert "no space left <on> device" in page.find_element("id", "cell-body").text


def test_an_address_opens_the_details(page):
    address = page.current_url + "#at-cars-5-magmax"
    page.get("about:blank")
    page.get(address)
    assert page.find_element("id", "cell-title").text == "magmax on cars-5"
    page.find_element("css selector", "#cell button").click()
    assert not page.find_element("id", "cell").is_displayed()


@pytest.mark.parametrize("width", WIDTHS)
def test_every_figure_shows_within_the_page(page, width):
    device(page, width)
    boxes = page.execute_script(
        "return [...document.querySelectorAll('figure svg')].map(s => {"
        "const b = s.getBoundingClientRect(), d = s.querySelector('path[clip-path]');"
        "const i = d.getBoundingClientRect();"
        "return [b.left, b.right, b.width, b.height, i.width + i.height];})"
    )
    assert len(boxes) == 9
    for left, right, wide, high, inner in boxes:
        assert left >= 0
        assert right <= width
        assert wide > 200
        assert high > 100
        assert inner > 0


OUTSIDE = """
const inside = (e) => e.closest('.scroll, nav ul, pre, svg, .unseen, .skip, dialog:not([open])');
return [...document.body.querySelectorAll('*')].filter(e => {
  if (inside(e.parentElement) || e.matches('.unseen, .skip')) return false;
  const b = e.getBoundingClientRect();
  return b.width && (b.left < -0.5 || b.right > innerWidth + 0.5);
}).map(e => e.outerHTML.slice(0, 200));
"""


@pytest.mark.parametrize("width", [320, *WIDTHS])
@pytest.mark.parametrize("details", [False, True])
def test_nothing_is_wider_than_the_page(page, width, details):
    device(page, width)
    page.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    if details:
        by_enter(page.find_element("css selector", "#results a[href='#at-cifar100-50-magmax']"))
        page.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    read = "return document.scrollingElement.scrollWidth"
    assert page.execute_script(read) <= page.execute_script("return innerWidth") == width
    assert page.execute_script(OUTSIDE) == []
    if details:
        wide = "const d = document.getElementById('cell'); return d.scrollWidth - d.clientWidth"
        assert page.execute_script(wide) == 0


def test_the_methods_stay_in_sight_when_the_table_is_scrolled(page):
    device(page, 360)
    left = page.execute_script(
        "const t = document.getElementById('results'); t.parentElement.scrollLeft = 300;"
        "return [t.parentElement.scrollLeft, t.querySelector('tbody tr:nth-child(3) th')"
        ".getBoundingClientRect().left - t.parentElement.getBoundingClientRect().left]"
    )
    assert left[0] == 300
    assert 0 <= left[1] <= 2


def test_nothing_is_requested(page):
    page.find_element("css selector", "#results a[href='#at-cifar100-5-magmax']").click()
    entries = "return performance.getEntriesByType('resource').map(e => e.name)"
    assert page.execute_script(entries) == []


# Colours as the browser blends them; relative luminance and ratio as WCAG 2.2 defines them.
CONTRASTS = """
const canvas = document.createElement('canvas'); canvas.width = canvas.height = 1;
const ctx = canvas.getContext('2d', { willReadFrequently: true });
function rgba(css) {
  ctx.clearRect(0, 0, 1, 1); ctx.fillStyle = css; ctx.fillRect(0, 0, 1, 1);
  return [...ctx.getImageData(0, 0, 1, 1).data];
}
function behind(e) {
  for (; e; e = e.parentElement) {
    const found = rgba(getComputedStyle(e).backgroundColor);
    if (found[3] === 255) return found;
  }
  return [0, 0, 0, 0];
}
function light([r, g, b]) {
  const [x, y, z] = [r, g, b].map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  return 0.2126 * x + 0.7152 * y + 0.0722 * z;
}
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
const found = [];
while (walker.nextNode()) {
  const e = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || e.closest('svg, script, .unseen') ||
      !e.getClientRects().length) continue;
  const back = behind(e);
  const [a, b] = [light(rgba(getComputedStyle(e).color)), light(back)].sort((x, y) => y - x);
  found.push([back[3] ? (a + 0.05) / (b + 0.05) : 0, e.className, e.textContent.slice(0, 40)]);
}
return found;
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("details", [False, True])
def test_all_text_stands_out_in_both_themes(page, theme, details):
    device(page, theme=theme)
    if details:
        page.find_element("css selector", "#results a[href='#at-cifar100-10-ties']").click()
    found = page.execute_script(CONTRASTS)
    assert len(found) > 150
    assert [entry for entry in found if entry[0] < 4.5] == []


BACKGROUND = "return getComputedStyle(document.body).backgroundColor"


def test_the_theme_follows_the_system_until_one_is_chosen_and_is_remembered(page):
    from selenium.webdriver.support.select import Select

    light = page.execute_script(BACKGROUND)
    device(page, theme="dark")
    dark = page.execute_script(BACKGROUND)
    assert light != dark
    Select(page.find_element("id", "theme")).select_by_value("light")
    assert page.execute_script(BACKGROUND) == light
    page.refresh()
    assert page.execute_script(BACKGROUND) == light
    Select(page.find_element("id", "theme")).select_by_value("")
    assert page.execute_script(BACKGROUND) == dark


def test_it_works_where_nothing_can_be_stored(browser, folder):
    from selenium.webdriver.support.select import Select

    refuse = "Object.defineProperty(window, 'localStorage', {get() { throw new Error('no'); }})"
    command = "Page.addScriptToEvaluateOnNewDocument"
    script = browser.execute_cdp_cmd(command, {"source": refuse})
    try:
        device(browser)
        browser.get("about:blank")
        browser.get((folder / "report.html").as_uri())
        light = browser.execute_script(BACKGROUND)
        Select(browser.find_element("id", "theme")).select_by_value("dark")
        assert browser.execute_script(BACKGROUND) != light
        button(browser, 0).click()
        assert directions(browser) == [["5 tasks", "descending"]]
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


def test_without_scripts_all_tables_and_figures_are_there(browser, folder):
    disable = "Emulation.setScriptExecutionDisabled"
    device(browser)
    browser.execute_cdp_cmd(disable, {"value": True})
    try:
        browser.get("about:blank")
        browser.get((folder / "report.html").as_uri())
        assert not browser.find_element("id", "metric").is_displayed()
        cells = browser.find_elements("css selector", "#results td")
        assert len(cells) == len(METHODS) * len(SETTINGS)
        assert all(cell.text for cell in cells[:20])
        assert browser.find_element("css selector", ".metrics").is_displayed()
    finally:
        browser.execute_cdp_cmd(disable, {"value": False})


def test_the_first_tab_skips_to_the_table(page):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    ActionChains(page).send_keys(Keys.TAB).perform()
    skip = page.switch_to.active_element
    assert skip.text == "Skip to the table"
    assert skip.location["x"] >= 0
    skip.send_keys(Keys.ENTER)
    assert page.switch_to.active_element.tag_name == "main"


def test_sorting_and_choosing_are_immediate(page):
    seconds = page.execute_script(
        "const began = performance.now(), m = document.getElementById('metric');"
        "document.querySelectorAll('#results .sort').forEach(b => b.click());"
        "for (const o of m.options) { m.value = o.value; m.dispatchEvent(new Event('change')); }"
        "document.body.offsetHeight;"
        "return (performance.now() - began) / 1000 / (m.options.length + 6)"
    )
    assert seconds < SLOW
