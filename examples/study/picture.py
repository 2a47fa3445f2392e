"""What the figures of a study share: colours, small multiples, and files of two kinds."""

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 120
WIDTH = 8.0  # inches that a figure has at most: 768 pixels of a page
INK = "#1b1c1d"  # of lines and letters; on a page they have its own text's
# Okabe and Ito's, which the colour-blind can tell apart, without those that are faint on white;
# whatever has them is told apart by its shape as well
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
SHADES = "cividis"  # of a heat map: as light as the number is large, to every eye
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "+++", "ooo", "---")
LINES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P")
INKED = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
matplotlib.rcParams.update(dict.fromkeys(INKED, INK))
matplotlib.rcParams.update({"axes.facecolor": "none", "legend.frameon": False})


@dataclass(frozen=True)
class Picture:
    """A figure, the name of its file, and a sentence that says what it shows."""

    name: str
    caption: str
    figure: Figure

    def png(self) -> bytes:
        """A file."""
        stream = io.BytesIO()
        self.figure.savefig(stream, format="png", dpi=DPI, facecolor="white")
        return stream.getvalue()

    def svg(self) -> str:
        """An element of a page, on its background and in its text's colour."""
        stream = io.StringIO()
        with matplotlib.rc_context({"svg.hashsalt": self.name}):  # so that no two share an id
            self.figure.savefig(stream, format="svg", transparent=True)
        element = stream.getvalue()
        element = element[element.index("<svg") :].replace(INK, "currentColor")
        return re.sub(r'<metadata>.*?</metadata>|xmlns(:xlink)?="[^"]*"', "", element, flags=re.S)


def grid(
    number: int,
    width: float = 2.6,
    height: float = 2.6,
    *,
    columns: int | None = None,
    **subplots: Any,
) -> tuple[Figure, list[Axes]]:
    """A figure of axes in rows, by default as many as fit; the sizes, of each, in inches."""
    columns = columns or min(number, max(1, int(WIDTH / width)))
    rows = -(-number // columns)
    size = (min(columns * width, WIDTH), rows * height)
    figure = Figure(size, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **subplots).flat)
    for unused in axes[number:]:
        unused.set_axis_off()
    for lowest in axes[max(number - columns, 0) : number]:
        lowest.tick_params(labelbottom=True)  # above unused ones, too
    return figure, axes[:number]


def in_lines(loss: str, width: int = 24) -> str:
    """A loss's name, broken at its colons where it is longer than a line.

    >>> in_lines("lmf:scale=1"), in_lines("ldam:scale=1:logit-adjustment=1")
    ('lmf:scale=1', 'ldam:scale=1:\\nlogit-adjustment=1')
    """
    lines = [""]
    for part in re.findall("[^:]+:?", loss):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def bar_styles() -> Iterator[dict[str, Any]]:
    """Of bars beside each other, without end."""
    for hatch, colour in zip(cycle(HATCHES), cycle(COLOURS), strict=False):
        yield {"hatch": hatch, "color": colour, "edgecolor": INK}


def line_styles() -> Iterator[dict[str, Any]]:
    """Of lines in one set of axes, without end."""
    for line, marker, colour in zip(cycle(LINES), cycle(MARKERS), cycle(COLOURS), strict=False):
        yield {"linestyle": line, "marker": marker, "color": colour, "markersize": 5}
