"""A study as one page: what it says, every table and figure, and how to repeat it.

    python -m examples.html_report runs/study

``DIR/report.html`` needs no other file, so that it can be sent; tables and figures are written
beside it as well, and ``DIR/results.jsonl``, which gathers the results. From it and from
``DIR/study.json`` tables and page can be made again: these two are what is worth keeping.
"""

import sys
from base64 import b64encode
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from examples.study import figures, tables
from examples.study.planning import Study, gather, named
from examples.study.tables import Table
from examples.training.checkpoints import write_atomically
from examples.training.run import one_sentence

PAGE = Path(__file__).parent / "study" / "report_page.html"


def tell(study: Study) -> None:
    """Print what the study says, and where the page is that is written now.

    Raises:
        ValueError: there is no result yet.
    """
    found = tables.tables(study)
    page = write(study, found)
    for line in sentences(found):
        print(line)
    print(f"All of it is in {page}")


def write(study: Study, found: Sequence[Table]) -> Path:
    """The page, and beside it the tables' and the figures' own files.

    Raises:
        ValueError: there is no result yet.
    """
    if not study.results():
        raise ValueError(
            f"{study.folder} must hold a finished training, got none; examples.compare goes on"
        )
    gather(study)
    tables.write(study, found)
    parts = [*summary(found), *map(table, found)]
    for picture in figures.pictures(study):
        parts.append(figure(figures.write(study, picture), picture.caption))
    parts += repeating(study)
    title = f"Losses compared: {', '.join(dict.fromkeys(t.data for t in study.trainings))}"
    page = Template(PAGE.read_text()).substitute(title=escape(title), body="\n".join(parts))
    file = study.folder / "report.html"
    write_atomically(file, page.encode())
    return file


def summary(found: Sequence[Table]) -> Iterator[str]:
    """What is missing, and what the rest says."""
    for each in found:
        if each.name == "missing":
            yield f"<p><strong>{escape(each.title)}</strong>, listed below.</p>"
    if lines := [f"<li>{escape(line)}</li>" for line in sentences(found)]:
        yield f"<h2>What it says</h2><ul>{''.join(lines)}</ul>"


def sentences(found: Sequence[Table]) -> list[str]:
    """What the differences from cross-entropy say, one for each."""
    return [sentence(row) for each in found if each.name == "against-ce" for row in each.rows]


def sentence(row: Sequence[Any]) -> str:
    """A row of the table of differences in words.

    >>> sentence(("digits", "small", "torch", "lmf", 5, 0.1, 0.05, 0.15, 0.06, "better"))[:61]
    'digits, small, torch: lmf against ce: better (+0.100, 95 % in'
    """
    *kind, loss, seeds, gain, low, high, p, verdict = row
    numbers = f"{gain:+.3f}"
    if low is not None:
        numbers += f", 95 % interval {low:+.3f} to {high:+.3f}, p {p:.3f}; {seeds} seeds"
    return f"{', '.join(kind)}: {loss} against {tables.BASELINE}: {verdict} ({numbers})"


def table(found: Table) -> str:
    """With headings that sort it."""
    headings = "".join(f"<th><button>{escape(h)}</button></th>" for h in found.headings)
    rows = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in found.rows)
    return (
        f"<h2>{escape(found.title)}</h2>"
        f'<div class="wide"><table id="{escape(found.name)}"><thead><tr>{headings}</tr></thead>'
        f'<tbody>{rows}</tbody></table></div><p class="note">{escape(found.note)}</p>'
    )


def cell(content: Any) -> str:
    """What is shown, and what it is sorted by: several seeds by their mean."""
    kind = "" if isinstance(content, str) else ' class="number"'
    value = escape(str(tables.numbers(content)[0]))
    return f'<td{kind} data-value="{value}">{escape(tables.text(content))}</td>'


def figure(file: Path, caption: str) -> str:
    """A PNG file, embedded."""
    data = b64encode(file.read_bytes()).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


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
