"""A study's page: complete, free of other files, and at work in a browser."""

import doctest
import json
import re

import pytest

from tests.frameworks import load

for package in ("matplotlib", "sklearn", "rich", "tensorboard"):
    load(package)

from examples import html_report  # noqa: E402
from examples.study import planning  # noqa: E402
from tests.browser import visit  # noqa: E402
from tests.examples.studies import made_up  # noqa: E402

SCORES = {"ce": [0.5, 0.6, 0.7], "lmf": [0.7, 0.9, 0.8], "lmf:scale=5": [0.1, 0.2, 0.15]}

# Reads the page as a visitor does, and leaves what it saw in the page.
VISITOR = """<script>
const scores = document.getElementById("scores");
function column(name) {
  const index = [...scores.tHead.rows[0].cells].findIndex((c) => c.textContent === name);
  return {
    click: () => scores.tHead.rows[0].cells[index].querySelector("button").click(),
    read: () => [...scores.querySelectorAll("tbody tr:not(.kind)")].map(
      (row) => row.cells[index].textContent
    ),
  };
}
const f1 = column("macro-F1"), loss = column("loss");
const seen = { before: f1.read() };
f1.click(); seen.up = f1.read();
f1.click(); seen.down = f1.read();
loss.click(); seen.losses = loss.read();
seen.tables = [...document.querySelectorAll("table")].map((t) => [t.id, t.tBodies[0].rows.length]);
seen.figures = [...document.querySelectorAll("svg")].map(
  (f) => [f.ariaLabel, f.getBoundingClientRect().width]
);
// folded tables too, which have no width otherwise
for (const folded of document.querySelectorAll("details")) folded.open = true;
seen.page = document.documentElement.clientWidth;
seen.widths = [...document.querySelectorAll("table, svg")].map(
  (e) => e.getBoundingClientRect().right
);
const colour = (e, name) => getComputedStyle(e)[name];
seen.colours = [colour(document.body, "backgroundColor"), colour(document.body, "color")];
seen.ink = colour(document.querySelector("svg text, svg use"), "fill");
document.body.dataset.seen = JSON.stringify(seen);
</script>"""


# Sorts the scores, and leaves what stands in each part of the table.
SORTER = """<script>
const table = document.getElementById("scores");
const index = [...table.tHead.rows[0].cells].findIndex((c) => c.textContent === "macro-F1");
table.tHead.rows[0].cells[index].querySelector("button").click();
const parts = [...table.tBodies].map((body) =>
  [...body.rows].map((row) => (row.className ? row : row.cells[index]).textContent)
);
document.body.dataset.seen = JSON.stringify(parts);
</script>"""
FIGURES = [
    "How much macro-F1 differs from cross-entropy's on a&b",
    "F1 of each class",
    "Macro-F1 of each loss on a&b",
    "Training images of each class of a&b.",
    "Macro-F1 of LMF over scale",
    "Confusion matrices",
]


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
    opening = page.index(
        '<p class="advice">a&amp;b: 3 seeds are too few to say what to train with; '
    )
    assert "is lmf&#x27;s, macro-F1 +0.200 (+0.1" in page
    assert page.count("<p ") > 1 and opening == page.index("<p ")  # it opens with it
    assert "lmf:<wbr>scale=<wbr>5" in page
    assert "<strong>Missing: 1 of 10 trainings</strong>" in page
    assert "<pre>python -m examples.compare\na second command</pre>" in page
    assert "Hardware: a made-up CPU, 2 cores<" in page
    assert "Versions: flax 1.2.3; python 3.11.7<" in page
    assert "0.188" in page  # hours: nine trainings of 75 s
    assert (folder / "tables.md").exists()
    assert len(list((folder / "figures").glob("*.png"))) == len(FIGURES)


def test_the_page_needs_no_other_file(folder):
    page = (folder / "report.html").read_text()
    assert re.findall(r'(?:src|href)="(?!data:image/png;base64,|#)[^"]*"', page) == []
    assert "http" not in page and "@import" not in page
    assert re.findall(r"url\((?!#)", page) == []


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
        ["against-ce", 2],
        ["against-ce-balanced-accuracy", 2],
        ["scores", 3],
        ["per-class-a&b", 9],
        ["costs", 1],
        ["missing", 1],
    ]
    assert [label.split(",")[0].split(":")[0] for label, _ in seen["figures"]] == FIGURES
    for _, width in seen["figures"]:
        assert width >= 300


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The page of a study with predictions, two kinds, and losses with long names."""
    folder = tmp_path_factory.mktemp("tuned")
    losses = ["ce", "bwcce", "ce:sampler=balanced", "lmf:scale=5:head=cosine:logit-adjustment=1"]
    made_up(folder, losses, seeds=5, frameworks=["flax", "torch"])
    assert html_report.main([str(folder)]) == 0
    return (folder / "report.html").read_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_800_pixels_and_is_legible_in_both_schemes(tuned, scheme, tmp_path):
    page = tuned.replace("</body>", f"{VISITOR}</body>")
    dom, console = visit(tmp_path, page, scheme)
    assert console == []
    seen = json.loads(re.search(r'data-seen="([^"]*)"', dom)[1].replace("&quot;", '"'))
    assert seen["page"] == 800 and len(seen["widths"]) > 15
    assert max(seen["widths"]) <= 800
    ground, text = (sum(map(int, re.findall(r"\d+", c)[:3])) / 765 for c in seen["colours"])
    assert (ground > 0.9 and text < 0.2) if scheme == "light" else (ground < 0.1 and text > 0.8)
    assert seen["ink"] == seen["colours"][1]


def test_rows_are_sorted_within_their_kind(tuned, tmp_path):
    dom, _ = visit(tmp_path, tuned.replace("</body>", f"{SORTER}</body>"))
    kinds = json.loads(re.search(r'data-seen="([^"]*)"', dom)[1].replace("&quot;", '"'))
    assert [rows[0] for rows in kinds] == ["digits, small, flax", "digits, small, torch"]
    for _, *values in kinds:
        assert len(values) == 4 and values == sorted(values)


def test_the_page_needs_no_script(tuned, tmp_path):
    without = re.sub(r"<script>.*?</script>", "", tuned, flags=re.S)
    dom, console = visit(tmp_path, without)
    assert console == [] and dom.count("<table") == tuned.count("<table")


def test_an_error_in_the_page_would_be_seen(folder, tmp_path):
    broken = (folder / "report.html").read_text().replace("function sort(", "function sort{")
    _, console = visit(tmp_path, broken)
    assert len(console) == 1 and "SyntaxError" in console[0]
