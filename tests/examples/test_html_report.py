"""A study's page: complete, free of other files, and at work in a browser."""

import doctest
import json
import os
import re
import shutil
import subprocess

import pytest

from tests.frameworks import load

for package in ("matplotlib", "sklearn", "rich", "tensorboard"):
    load(package)

from examples import html_report  # noqa: E402
from examples.study import planning  # noqa: E402
from tests.examples.studies import made_up  # noqa: E402

SCORES = {"ce": [0.5, 0.6, 0.7], "lmf": [0.7, 0.9, 0.8], "lmf:scale=5": [0.1, 0.2, 0.15]}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
FLAGS += "--disable-background-networking --disable-component-update --enable-logging=stderr"

# Reads the page as a visitor does, and leaves what it saw in the page.
VISITOR = """<script>
const scores = document.getElementById("scores");
function column(name) {
  const index = [...scores.tHead.rows[0].cells].findIndex((c) => c.textContent === name);
  return {
    click: () => scores.tHead.rows[0].cells[index].querySelector("button").click(),
    read: () => [...scores.tBodies[0].rows].map((row) => row.cells[index].textContent),
  };
}
const f1 = column("macro-F1"), loss = column("loss");
const seen = { before: f1.read() };
f1.click(); seen.up = f1.read();
f1.click(); seen.down = f1.read();
loss.click(); seen.losses = loss.read();
seen.tables = [...document.querySelectorAll("table")].map((t) => [t.id, t.tBodies[0].rows.length]);
seen.images = [...document.images].map((i) => [i.alt, i.complete && i.naturalWidth]);
document.body.dataset.seen = JSON.stringify(seen);
</script>"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a study whose report is written: two frameworks, and a training that is missing."""
    folder = tmp_path_factory.mktemp("study")
    made_up(folder, list(SCORES), seeds=3, scores=SCORES, frameworks=["flax"], data=["a&b.npz"])
    planning.remember(
        folder, "a second command", [planning.planned("a&b.npz", "small", "flax", "focal", 0, [])]
    )
    assert html_report.main([str(folder)]) == 0
    return folder


def test_the_page_says_what_the_tables_say_and_how_to_repeat_it(folder):
    page = (folder / "report.html").read_text()
    assert "<title>Losses compared: a&amp;b</title>" in page
    chance = "3 seeds, perhaps by chance"
    assert f"a&amp;b, small, flax: lmf against ce: {chance} (+0.200, 95 % interval +0.1" in page
    assert f"a&amp;b, small, flax: lmf:scale=5 against ce: {chance} (-0.450, 95 % interval" in page
    assert "<strong>Missing: 1 of 10 trainings</strong>" in page
    assert "<pre>python -m examples.compare\na second command</pre>" in page
    assert "Hardware: a made-up CPU, 2 cores<" in page
    assert "Versions: flax 1.2.3; python 3.11.7<" in page
    assert "0.188" in page  # hours: nine trainings of 75 s
    assert (folder / "tables.md").exists()
    assert len(list((folder / "figures").glob("*.png"))) == 6


def test_the_page_needs_no_other_file(folder):
    page = (folder / "report.html").read_text()
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,)[^"]*"', page) == []
    assert "http" not in page and "@import" not in page and "url(" not in page


def test_a_study_without_results_is_one_sentence(tmp_path):
    planning.remember(tmp_path, "", [planning.planned("digits", "small", "torch", "ce", 0, [])])
    with pytest.raises(SystemExit) as stopped:
        html_report.main([str(tmp_path)])
    assert str(stopped.value) == (
        f"error: {tmp_path} must hold a finished training, got none; examples.compare goes on"
    )


def test_doctests():
    assert doctest.testmod(html_report).attempted > 0
    assert doctest.testmod(html_report).failed == 0


# --- in headless Chromium


def visit(tmp_path, page):
    """The page's own text after its scripts have run, and what its console says."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        absent = pytest.fail if "LMF_MULTI_REQUIRE_BROWSER" in os.environ else pytest.skip
        absent("Chromium is not installed")
    file = tmp_path / "page.html"
    file.write_text(page)
    command = [browser, *FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [*command, file.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_tables_sort_and_pictures_show_in_a_browser(folder, tmp_path):
    page = (folder / "report.html").read_text().replace("</body>", f"{VISITOR}</body>")
    dom, console = visit(tmp_path, page)
    assert console == []
    seen = re.search(r'data-seen="([^"]*)"', dom)[1].replace("&quot;", '"').replace("&amp;", "&")
    seen = json.loads(seen)
    means = ["0.600 ± 0.100", "0.800 ± 0.100", "0.150 ± 0.050"]
    assert seen["before"] == means
    assert seen["up"] == [means[2], means[0], means[1]]
    assert seen["down"] == seen["up"][::-1]
    assert seen["losses"] == ["ce", "lmf", "lmf:scale=5"]
    assert seen["tables"] == [
        ["scores", 3],
        ["per-class-a&b", 3],
        ["against-ce", 2],
        ["costs", 1],
        ["missing", 1],
    ]
    assert len(seen["images"]) == 6
    for alt, width in seen["images"]:
        assert alt and width >= 300


def test_an_error_in_the_page_would_be_seen(folder, tmp_path):
    broken = (folder / "report.html").read_text().replace("function sort(", "function sort{")
    _, console = visit(tmp_path, broken)
    assert len(console) == 1 and "SyntaxError" in console[0]
