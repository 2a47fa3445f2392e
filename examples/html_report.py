"""A study as one page: what to train with, every table and figure, and how to repeat it.

    python -m examples.html_report runs/study

``DIR/report.html`` needs no other file, so that it can be sent; tables and figures are written
beside it as well. From ``DIR/study.json``, ``DIR/results.jsonl`` and ``DIR/predicted.npz`` tables
and page can be made again: these are what is worth keeping.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template
from typing import Any

from examples.study import figures, tables
from examples.study.comparisons import advice
from examples.study.picture import Picture
from examples.study.planning import Study, gather, named
from examples.study.tables import Table
from examples.training.checkpoints import write_atomically
from examples.training.start import one_sentence

PAGE = Path(__file__).parent / "study" / "report_page.html"
UNFOLDED = 40  # rows that a table has at most, of those that are open from the start


def tell(study: Study) -> None:
    """Print what the study says, and where the page is that is written now.

    Raises:
        ValueError: there is no result yet.
    """
    page = write(study)
    for sentence in advice(study, study.results()):
        print(sentence)
    print(f"All of it is in {page}")


def write(study: Study) -> Path:
    """The page, and beside it the tables' and the figures' own files.

    Raises:
        ValueError: there is no result yet.
    """
    if not study.results():
        raise ValueError(
            f"{study.folder} must hold a finished training, got none; examples.compare goes on"
        )
    gather(study)
    found = tables.tables(study)
    tables.write(study, found)
    parts = [f'<p class="advice">{escape(line)}</p>' for line in advice(study, study.results())]
    for each in found:
        if each.name == "missing":
            parts.append(f"<p><strong>{escape(each.title)}</strong>, listed below.</p>")
    parts += [figure(study, picture) for picture in figures.findings(study)]
    parts += map(table, found)
    parts += [figure(study, picture) for picture in figures.details(study)]
    parts += repeating(study)
    title = f"Losses compared: {', '.join(dict.fromkeys(t.data for t in study.trainings))}"
    page = Template(PAGE.read_text()).substitute(title=escape(title), body="\n".join(parts))
    file = study.folder / "report.html"
    write_atomically(file, page.encode())
    return file


def table(found: Table) -> str:
    """With headings that sort it; one of many rows is folded.

    What its rows are of, where that differs, stands above them, which saves three columns.
    """
    kinds = {row[: found.common] for row in found.rows}
    headings = found.headings[found.common :]
    named = "".join(f'<th scope="col"><button>{escape(h)}</button></th>' for h in headings)
    bodies = ""
    for kind, rows in groupby(found.rows, lambda row: row[: found.common]):
        above = (
            f'<tr class="kind"><th colspan="{len(headings)}">{escape(", ".join(kind))}</th></tr>'
        )
        cells = ("".join(map(cell, row[found.common :])) for row in rows)
        body = "".join(f"<tr>{row}</tr>" for row in cells)
        bodies += f"<tbody>{above if len(kinds) > 1 else ''}{body}</tbody>"
    whole = (
        f'<div class="wide"><table id="{escape(found.name)}"><thead><tr>{named}</tr></thead>'
        f'{bodies}</table></div><p class="note">{escape(found.note)}</p>'
    )
    if len(found.rows) > UNFOLDED:
        whole = f"<details><summary>{len(found.rows)} rows</summary>{whole}</details>"
    return f"<h2>{escape(found.title)}</h2>{whole}"


def cell(content: Any) -> str:
    """What is shown, and what it is sorted by: several seeds by their mean.

    >>> cell((0.5, 0.7))
    '<td class="number" data-value="0.6">0.600 <span>± 0.141</span></td>'
    """
    kind = "" if isinstance(content, str) else ' class="number"'
    value = escape(str(tables.numbers(content)[0]))
    text = escape(tables.text(content))
    if not kind:
        text = re.sub(r"([:=])", r"\1<wbr>", text)  # where a long loss may be broken
    mean, sign, spread = text.partition(" ± ")
    spread = f" <span>± {spread}</span>" if sign else ""  # which a narrow page has in a second line
    return f'<td{kind} data-value="{value}">{mean}{spread}</td>'


def figure(study: Study, picture: Picture) -> str:
    """A picture, embedded; its file is written as well."""
    figures.write(study, picture)
    caption = escape(picture.caption)
    drawn = picture.svg().replace("<svg", f'<svg role="img" aria-label="{caption}"', 1)
    return f"<figure>{drawn}<figcaption>{caption}</figcaption></figure>"


def repeating(study: Study) -> Iterator[str]:
    """The commands, and what they ran with."""
    results = list(study.results().values())
    versions = {" ".join(v) for result in results for v in result["versions"].items()}
    yield "<h2>How to repeat it</h2>"
    yield f"<pre>{escape(chr(10).join(study.commands))}</pre>"
    yield f"<p>Hardware: {listed(result['device'] for result in results)}</p>"
    yield f"<p>Versions: {listed(sorted(versions))}</p>"


def listed(words: Iterable[str]) -> str:
    """Each once."""
    return escape("; ".join(dict.fromkeys(words)))


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report, and print what it says and where it is."""
    study = named(argv, "examples.html_report", "A study as one page.")
    with one_sentence():
        tell(study)
    return 0


if __name__ == "__main__":
    sys.exit(main())
