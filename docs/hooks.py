"""What mkdocs is taught: formulas without JavaScript, pages that stand elsewhere (README, what
``examples.html_report`` writes), and that no public name lacks a docstring or a place."""

import posixpath
import re
from pathlib import Path

import griffe
from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
ELSEWHERE = {  # files of the project, and which pages they are
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
}
STUDIES = ("heads", "cnn", "ham10000")
MODULES = ("lmf_multi", *(f"lmf_multi.{name}" for name in ("reference", "torch", "jax", "keras")))


def on_config(config):
    """Draw what stands under ```math, which GitHub draws too."""
    formula = {"name": "math", "class": "math", "format": formula_of}
    config.mdx_configs.setdefault("pymdownx.superfences", {})["custom_fences"] = [formula]
    return config


def formula_of(source, *_arguments, **_options):
    """MathML, which browsers draw themselves; its writer knows ``aligned`` as ``split``."""
    mathml = convert(source.replace("{aligned}", "{split}"), display="block")
    return f'<div class="formula">{mathml}</div>'


def on_files(files, config):
    """Add what stands elsewhere; studies' pages where ``nox -s docs`` has made them."""
    for name, page in ELSEWHERE.items():
        if files.get_file_from_path(page) is None:
            files.append(File.generated(config, page, content=placed(name)))
    for study in STUDIES:
        page = ROOT / "examples" / "study" / study / "report.html"
        if page.exists():
            files.append(File.generated(config, f"study/{study}.html", abs_src_path=str(page)))
    return files


def placed(name):
    """A Markdown file of the project as a page: its links lead where they lead from docs."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return LINK.sub(lambda found: f"]({posixpath.relpath(found['path'], 'docs')}", text)


LINK = re.compile(r"\]\((?P<path>(?![a-z]+:|#)[^)#\s]+)")


def on_page_markdown(markdown, page, **_options):
    """Lead links to the project's files to their pages; leave the words of those without one."""
    here = posixpath.dirname(page.file.src_uri)

    def replaced(found):
        path = posixpath.normpath(posixpath.join("docs", here, found["path"]))
        if path.startswith("docs/"):
            return found[0]
        if path in ELSEWHERE:
            target = posixpath.relpath(ELSEWHERE[path], here or ".")
            return f"[{found['words']}]({target}{found['anchor'] or ''})"
        if not (ROOT / path).exists():
            raise PluginError(f"{page.file.src_uri} links to {found['path']}, which is not there")
        return found["words"]

    return WHOLE_LINK.sub(replaced, markdown)


WHOLE_LINK = re.compile(
    r"(?<!!)\[(?P<words>[^\]]+)\]\((?P<path>(?![a-z]+:|#)[^)#\s]+)(?P<anchor>#[^)\s]*)?\)"
)


def on_env(env, config, files):
    """Stop where a public name is undocumented."""
    shown = set(config.plugins["mkdocstrings"].handlers.inventory)
    missing = undocumented(shown)
    if missing:
        raise PluginError(
            "Every public name needs a docstring and a place in docs/api; these lack one: "
            + ", ".join(missing)
        )
    return env


def undocumented(shown):
    """Public names, and public methods, that have no docstring or are not in ``shown``."""
    package = griffe.load("lmf_multi", search_paths=[str(ROOT)], try_relative_path=False)
    missing = []
    for module in MODULES:
        within = package if module == package.name else package[module.partition(".")[2]]
        for name in map(str, within.exports):
            documented = within[name]
            if name.startswith("__"):
                continue  # the version
            path = f"{module}.{name}"
            if path not in shown or not documented.has_docstring:
                missing.append(path)
            elif documented.is_class:
                missing += [f"{path}.{method}" for method in bare_methods(documented)]
    return missing


def bare_methods(documented):
    """Public methods of a class, its bases' in this package too, without a docstring."""
    return [
        name
        for name, member in documented.all_members.items()
        if not name.startswith("_") and member.is_function and not member.has_docstring
    ]
