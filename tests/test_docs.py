"""The documentation: what its build refuses, and that its pictures show what is so."""

import importlib.util
import json

import numpy as np
import pytest

from tests.frameworks import load
from tests.pages import ROOT

for package in ("griffe", "latex2mathml", "mkdocs", "matplotlib", "scipy", "sklearn"):
    load(package)


def of_docs(name):
    """A module beside the pages, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks, docstrings, figures = map(of_docs, ("hooks", "docstrings", "figures"))


def test_a_name_that_no_page_shows_is_missed():
    missing = hooks.undocumented(set())
    assert {"lmf_multi.LMFSpec", "lmf_multi.jax.stack_losses", "lmf_multi.keras.LMFLoss"} <= set(
        missing
    )
    others = hooks.undocumented(set(missing) - {"lmf_multi.torch.CosineLinear"})
    assert others == ["lmf_multi.torch.CosineLinear"]


def test_a_method_without_a_docstring_is_missed(tmp_path, monkeypatch):
    for name in ("reference", "torch", "jax", "keras"):
        (tmp_path / "lmf_multi" / name).mkdir(parents=True)
        (tmp_path / "lmf_multi" / name / "__init__.py").write_text("__all__ = []")
    source = """
        class Loss:
            'It has one.'
            def told(self): 'This one too.'
            def bare(self): pass
            def _private(self): pass
        __all__ = ["Loss"]
    """
    file = tmp_path / "lmf_multi" / "__init__.py"
    file.write_text("\n".join(line[8:] for line in source.splitlines()))
    monkeypatch.setattr(hooks, "ROOT", tmp_path)
    assert hooks.undocumented({"lmf_multi.Loss"}) == ["lmf_multi.Loss.bare"]


def test_links_out_of_docs():
    class Page:
        class file:
            src_uri = "tasks/sweeps.md"

    def led(text):
        return hooks.on_page_markdown(text, Page)

    assert led("[a](../../README.md#use-it)") == "[a](../index.md#use-it)"
    assert led("[`test`](../../tests/test_docs.py)") == "`test`"
    kept = "[b](../speed.md) [c](https://arxiv.org/abs/2212.12741) [d](#sweeps)"
    assert led(kept) == kept
    with pytest.raises(hooks.PluginError, match="which is not there"):
        led("[e](../../absent.py)")


def test_readme_as_a_page():
    text = hooks.placed("README.md")
    assert "](choose-a-loss.md)" in text and "](images/which-loss.svg)" in text
    assert "](docs/" not in text


def test_docstrings_become_markdown():
    text = """Losses, as :func:`lmf_loss`.

    .. math:: a = b

    .. math::
        a &= b \\\\
          &= c

    >>> f(1)
    2
    """.replace("    ", "")
    made = docstrings.markdown(text, "lmf_multi.jax")
    assert "[`lmf_loss`][lmf_multi.jax.lmf_loss]" in made
    assert "```math\na = b\n```" in made
    assert "```pycon\n>>> f(1)\n2\n```" in made


def test_tables_in_docstrings():
    text = "    ==== =====\n    none all 1\n    some given\n    ==== ====="
    expected = "    |  |  |\n    | --- | --- |\n    | none | all 1 |\n    | some | given |"
    assert docstrings.markdown(text, "lmf_multi") == expected


def test_formulas_are_mathml():
    made = hooks.formula_of("\\begin{aligned} a &= \\frac{b}{c} \\\\ d &= e \\end{aligned}")
    assert made.count("<mtr>") == 2 and "<mfrac>" in made and "&=" not in made


@pytest.mark.parametrize("name", figures.PICTURES)
def test_a_picture_is_drawn_of_what_is_so(name):
    _, numbers = figures.PICTURES[name]()
    stored = figures.description(name)
    assert leaves(stored).size > 20
    np.testing.assert_allclose(leaves(stored), leaves(numbers), rtol=0, atol=2e-6)
    assert keys(stored) == keys(json.loads(json.dumps(numbers, default=float)))


def leaves(numbers):
    """All of them, in order."""
    if isinstance(numbers, dict):
        return np.concatenate([leaves(each) for each in numbers.values()])
    return np.asarray(numbers, float).ravel()


def keys(numbers):
    """The names that they stand under."""
    return {k: keys(each) for k, each in numbers.items()} if isinstance(numbers, dict) else None
