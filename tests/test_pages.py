"""Every Python snippet of README and docs runs as it stands, in a process of its own."""

import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

from lmf_multi import reference
from tests.frameworks import load
from tests.pages import PAGES, ROOT, page, prose, snippets

README, API = page("README.md"), page("docs/api/index.md")
SNIPPETS = {
    f"{path.relative_to(ROOT)}-{i}": snippet
    for path in PAGES
    for i, snippet in enumerate(snippets(path.read_text(encoding="utf-8")))
}
FRAMEWORKS = ("torch", "jax", "keras")


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("snippet", SNIPPETS.values(), ids=SNIPPETS)
def test_snippet_runs(snippet: str) -> None:
    for framework in FRAMEWORKS:
        if f"lmf_multi.{framework}" in snippet:
            load(framework)
    done = run(snippet)
    assert done.returncode == 0, done.stderr


def test_every_framework_has_its_lines_in_readme() -> None:
    for module in ("torch", "jax", "keras"):
        assert any(f"lmf_multi.{module}" in snippet for snippet in snippets(README)), module


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


def test_a_broken_snippet_would_fail() -> None:
    assert run("from lmf_multi import no_such_name").returncode != 0


def test_class_count_comments_are_true() -> None:
    """The numbers in the snippet's comments are what its lines return."""
    namespace: dict[str, object] = {}
    lines = snippets(API)[-1].splitlines()
    checked = 0
    for line in lines:
        code, _, comment = line.partition("  # array(")
        if comment:
            shown = [float(number) for number in re.findall(r"[\d.]+", comment)]
            value = eval(code, namespace)
            assert value.tolist() == pytest.approx(shown, rel=1e-7)
            checked += 1
        else:
            exec(line, namespace)
    assert checked == 2


def test_what_is_said_of_the_scale() -> None:
    """What an example costs in LDAM at scale 30 by how it keeps its margin, and focal's p range."""
    said = prose(page("docs/tasks/cosine-head.md"))
    words = "keeps its margin by 0.2 costs next to nothing, one that misses it by 1 costs 30 nats"
    assert words in said
    margin, options = 0.5, {"scale": 30.0, "reduction": "sum"}

    def cost(kept_by: float) -> float:
        return float(
            reference.ldam_loss([[margin + kept_by, 0.0]], [0], [margin, margin], **options)
        )

    assert cost(0.2) < 0.005
    assert cost(-1.0) == pytest.approx(30, abs=0.005)
    assert "p stays between 1/(1 + (C − 1) e²) and 1/(1 + (C − 1) e⁻²)" in said
    for C in (2, 7):
        for sign in (1, -1):
            cosines = np.full((1, C), -sign)
            cosines[0, 0] = sign
            p = np.exp(-reference.focal_loss(cosines.astype(float), [0], gamma=0.0))
            assert p == pytest.approx(1 / (1 + (C - 1) * np.exp(-2 * sign)))


def test_feature_table_names_tests_that_exist() -> None:
    """Every link in the table leads to a test of that name; every row has one."""
    (table,) = (part for part in API.split("\n\n") if part.startswith("| | NumPy"))
    table = table.splitlines()[2:]
    assert len(table) > 10
    for row in table:
        links = re.findall(r"\[`(\w+)`\]\(\.\./\.\./([\w/.]+)\)", row)
        assert links, row
        for name, path in links:
            source = (ROOT / path).read_text(encoding="utf-8")
            assert f"def {name}(" in source, f"{path} has no {name}"


def test_flags_of_the_trainers_exist() -> None:
    """Every flag and loss that the section on training names is one of the trainers'."""
    from examples.training.settings import LOSSES, parse

    section = page("docs/train.md").split("\n## An image classifier")[1].split("\n## ")[0]
    section = section.replace("\\\n", "")
    for framework, line in re.findall(r"^python -m examples\.train_(\w+) +(.*)$", section, re.M):
        arguments = shlex.split(line, comments=True)
        assert parse(framework, arguments, "").data == arguments[1]
    known = {
        flag
        for framework in ("torch", "flax", "keras")
        for flag in re.findall(r"--[a-z-]+", help_of(framework))
    }
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", section))
    assert len(named) > 10 and named <= known
    assert all(f"`{loss}`" in section for loss in LOSSES)


def help_of(framework: str) -> str:
    code = f"from examples.training.settings import parse; parse({framework!r}, ['-h'], '')"
    return run(code).stdout
