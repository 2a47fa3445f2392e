"""What README and the pages of docs say, for the tests that compare it with what is so."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def page(name):
    """The text of a page, called as it is from the project's folder."""
    return (ROOT / name).read_text(encoding="utf-8")


def prose(text):
    """It in one line, as sentences do not mind where lines end."""
    return " ".join(text.split())


def snippets(text, language="python"):
    """The blocks of code of a page."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
