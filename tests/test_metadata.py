"""What the files about the project say: the version, the names, the sessions, the switches."""

import ast
import importlib
import re
import tomllib
from datetime import date
from functools import reduce
from importlib.util import find_spec
from pathlib import Path

import pytest

import lmf_multi
from tests.frameworks import load

ROOT = Path(__file__).parents[1]
TEXTS = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "SECURITY.md")
}
VERSIONS = re.split(r"^## ", TEXTS["CHANGELOG.md"], flags=re.M)[1:]
NEWEST = VERSIONS[0]
CHANGES = dict(part.split("\n", 1) for part in re.split(r"^### ", NEWEST, flags=re.M)[1:])
FRAMEWORKS = ("torch", "jax", "keras")


def named(text, package):
    """The names in backquotes that begin with the package's."""
    return sorted(set(re.findall(rf"`({package}(?:\.\w+)+)`", text)))


# --- the version


def test_the_newest_version_of_the_changelog_is_that_of_the_package():
    assert re.match(r"\[(.+?)\] - ", NEWEST)[1] == lmf_multi.__version__


def test_the_changelog_has_each_version_once_newest_first():
    numbers = [re.match(r"\[(\d+)\.(\d+)\.(\d+)\]", part).groups() for part in VERSIONS]
    numbers = [tuple(map(int, each)) for each in numbers]
    assert numbers == sorted(set(numbers), reverse=True)


def test_the_citation_is_of_the_newest_version():
    cited = dict(re.findall(r"^(version|date-released): (\S+)$", TEXTS["CITATION.cff"], flags=re.M))
    assert cited["version"] == lmf_multi.__version__
    assert date.fromisoformat(cited["date-released"]).isoformat() in NEWEST.splitlines()[0]


def test_the_supported_version_is_the_newest():
    minor = lmf_multi.__version__.rpartition(".")[0]
    assert f"That is {minor} now." in TEXTS["SECURITY.md"]


# --- names


@pytest.mark.parametrize("name", named(CHANGES["Added"], "lmf_multi"))
def test_what_the_changelog_adds_to_the_library_is_there(name):
    _, first, *rest = name.split(".")
    if first in FRAMEWORKS:
        load(first)
        module, path = importlib.import_module(f"lmf_multi.{first}"), rest
    else:
        module, path = lmf_multi, [first, *rest]
    assert path[0] in module.__all__
    assert callable(reduce(getattr, path, module))


def test_the_changelog_adds_names_that_can_be_looked_up():
    assert "lmf_multi.jax.stack_losses" in named(CHANGES["Added"], "lmf_multi")


@pytest.mark.parametrize("name", named(CHANGES["Added"], "examples"))
def test_what_the_changelog_adds_to_the_examples_is_there(name):
    assert module_file(name).is_file()


def module_file(name):
    return ROOT.joinpath(*name.split(".")).with_suffix(".py")


MOVED = re.findall(r"^\| `(examples\.\w+)` \| `(examples[.\w]+)` \|$", CHANGES["Changed"], re.M)


def test_every_module_of_the_examples_is_where_the_changelog_says():
    assert dict(MOVED)["examples.settings"] == "examples.training.settings"
    for before, after in MOVED:
        assert not module_file(before).exists(), f"{before} has not moved"
        assert module_file(after).is_file(), f"{after} is not there"


# --- sessions and switches


def sessions():
    """The functions that noxfile.py gives to nox, read, as nox is not among the tests' tools."""
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        and any("nox.session" in ast.unparse(each) for each in node.decorator_list)
    }


def test_the_sessions_that_contributing_lists_exist():
    listed = re.findall(r"^- `(\w+)`: ", TEXTS["CONTRIBUTING.md"], re.M)
    assert "tests" in listed
    assert set(listed) <= sessions()


def test_what_contributing_installs_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    groups = re.findall(r"--group (\w+)", TEXTS["CONTRIBUTING.md"])
    assert groups
    assert set(groups) <= set(project["dependency-groups"])
    (extra,) = re.findall(r"'\.\[(\w+)\]'", TEXTS["CONTRIBUTING.md"])
    assert extra in project["project"]["optional-dependencies"]


@pytest.mark.parametrize("name", ["CHANGELOG.md", "SECURITY.md"])
def test_the_switches_that_are_told_of_exist(name):
    sources = [*Path(find_spec("lmf_multi").origin).parent.rglob("*.py"), ROOT / "setup.py"]
    told = set(re.findall(r"LMF_MULTI_\w+", TEXTS[name]))
    assert "LMF_MULTI_CPU_KERNEL" in told
    code = "\n".join(source.read_text(encoding="utf-8") for source in sources)
    assert told <= set(re.findall(r"LMF_MULTI_\w+", code))
