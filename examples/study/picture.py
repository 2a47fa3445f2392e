"""What the figures of a study share: small multiples that stay readable in grey, and PNG files."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 120
COLUMNS = 4  # of small multiples
# each told from the others without colour
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "+++", "ooo", "---")
BAR_SHADES = ("0.75", "0.95", "0.55", "0.85")
LINE_SHADES = ("0.1", "0.6", "0.4")
LINES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P")


@dataclass(frozen=True)
class Picture:
    """A figure, the name of its file, and a sentence that says what it shows."""

    name: str
    caption: str
    figure: Figure

    def png(self) -> bytes:
        """The file."""
        stream = io.BytesIO()
        self.figure.savefig(stream, format="png", dpi=DPI)
        return stream.getvalue()


def grid(
    number: int,
    width: float = 3.0,
    height: float = 3.0,
    *,
    columns: int = COLUMNS,
    **subplots: Any,
) -> tuple[Figure, list[Axes]]:
    """A figure of axes in rows; the sizes, of each, in inches."""
    columns = min(number, columns)
    rows = -(-number // columns)
    figure = Figure((columns * width, rows * height), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **subplots).flat)
    for unused in axes[number:]:
        unused.set_axis_off()
    for lowest in axes[max(number - columns, 0) : number]:
        lowest.tick_params(labelbottom=True)  # above unused ones, too
    return figure, axes[:number]


def bar_styles() -> Iterator[dict[str, Any]]:
    """Of bars beside each other, without end."""
    for hatch, shade in zip(cycle(HATCHES), cycle(BAR_SHADES), strict=False):
        yield {"hatch": hatch, "color": shade, "edgecolor": "black"}


def line_styles() -> Iterator[dict[str, Any]]:
    """Of lines in one set of axes, without end."""
    for line, marker, shade in zip(cycle(LINES), cycle(MARKERS), cycle(LINE_SHADES), strict=False):
        yield {"linestyle": line, "marker": marker, "color": shade, "markeredgecolor": "black"}
