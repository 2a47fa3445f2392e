"""Docstrings as Markdown has them: formulas, doctests and references."""

import re
import textwrap

import griffe

FORMULA = re.compile(
    r"^(?P<indent> *)\.\. math::(?P<first>.*)\n(?P<rest>(?:(?P=indent) +.*\n)*)", re.M
)
DOCTEST = re.compile(r"^(?P<indent> *)>>> .*(?:\n(?P=indent)\S.*)*", re.M)
TABLE = re.compile(
    r"^(?P<indent> *)(?P<rule>=+(?: +=+)+)\n(?P<rows>(?:.*\n)*?)(?P=indent)(?P=rule)$", re.M
)
REFERENCE = re.compile(r":func:`(?P<name>[\w.]+)`")
FRAMEWORK = re.compile(r"lmf_multi\.(?:reference|torch|jax|keras)\b")


class Markdown(griffe.Extension):
    """Rewrite each docstring as it is read."""

    def on_instance(self, *, obj, **_options):
        """Of modules, classes and functions alike."""
        if obj.docstring is not None and not obj.is_alias:
            found = FRAMEWORK.match(obj.path)
            module = found[0] if found else "lmf_multi"
            obj.docstring.value = markdown(obj.docstring.value, module)


def markdown(text, module):
    """The text with formulas and doctests in fences, and names of functions as links."""
    text = FORMULA.sub(formula, f"{text}\n")
    text = TABLE.sub(table, text)
    text = DOCTEST.sub(lambda found: fenced("pycon", found[0], found["indent"]), text)
    return REFERENCE.sub(lambda found: link(found["name"], module), text).rstrip("\n")


def formula(found):
    """A ``.. math::`` block, or line, in a fence; several lines aligned at their &."""
    lines = f"{found['first'].strip()}\n{textwrap.dedent(found['rest'])}".strip()
    if r"\\" in lines or "&" in lines:
        lines = f"\\begin{{aligned}}\n{lines}\n\\end{{aligned}}"
    block = textwrap.indent(lines, found["indent"])
    return fenced("math", block, found["indent"]) + "\n"


def table(found):
    """A table between two rules, without a header."""
    starts = [part.start() for part in re.finditer("=+", found["rule"])]
    lines = [line.removeprefix(found["indent"]) for line in found["rows"].splitlines()]
    ends = [*starts[1:], None]
    rows = [[line[a:b].strip() for a, b in zip(starts, ends, strict=True)] for line in lines]
    rows = [[""] * len(starts), ["---"] * len(starts), *rows]
    return "\n".join(f"{found['indent']}| {' | '.join(row)} |" for row in rows)


def fenced(language, block, indent):
    """A block between fences, indented as it is."""
    return f"\n{indent}```{language}\n{block}\n{indent}```"


def link(name, module):
    """A reference for mkdocstrings; a name alone is of the module whose docstring it is in."""
    path = name if "." in name else f"{module}.{name}"
    return f"[`{name}`][{path}]"
