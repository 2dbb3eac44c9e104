"""Charts as SVG text, for a page that needs no network, no script and no font.

They are written here and not by matplotlib, whose import and two dozen figures would take longer than the page may:
colours are CSS variables, so that one picture serves light, dark and print; a point carries its numbers as a tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from contrastive_align.report.history import MOST_POINTS, Curve, Point
from contrastive_align.report.summary import show
from contrastive_align.report.texts import clean


WIDTH, HEIGHT = 390, 215
LEFT, RIGHT, TOP, BOTTOM = 50, 10, 8, 31
COLOURS = 7  # of the palette of Okabe and Ito, told apart by colour-blind readers: --c0 to --c6 of the page
DASHES = ("", "7 3", "2 3", "9 3 2 3")  # a second sign beside the colour


@dataclass
class Line:
    """A line of a chart with its band."""

    label: str
    points: Sequence[Point]
    colour: int = 0
    dash: int = 0
    note: str = ""  # in the legend, after the label

    @classmethod
    def of(cls, label: str, curve: Curve, place: int) -> Line:
        """Draw a curve in the place-th colour and, once colours repeat, with another dash."""
        points = curve.points
        while len(points) > MOST_POINTS:
            pairs = [a.join(b) for a, b in zip(points[::2], points[1::2], strict=False)]
            points = pairs + list(points[len(points) // 2 * 2 :])
        note = f"{curve.not_finite} not finite" if curve.not_finite else ""
        return cls(label, points, place % COLOURS, place // COLOURS % len(DASHES), note)


@dataclass
class Chart:
    """A chart: lines over the steps, and horizontal lines at wanted values."""

    title: str
    about: str  # one sentence: what it shows, and how it should look
    lines: list[Line]
    unit: str = ""
    wanted: list[tuple[str, float, int]] = field(default_factory=list)  # label, value, colour
    x: str = "step"
    most: float = math.inf  # that the values can be

    def svg(self) -> Markup:
        """Write the chart."""
        points = [point for line in self.lines for point in line.points]
        xs = [x for point in points for x in (point.first, point.last)]
        ys = [y for point in points for y in (point.low, point.high)] + [value for _, value, _ in self.wanted]
        across, up = _scale(min(xs), max(xs), 5, whole=True), _scale(min(ys), min(max(ys), self.most), 5)
        least = 0.0 if min(ys) >= 0 else -math.inf
        plot = _Plot(across, [value for value in up if least <= value <= self.most])
        parts = [plot.axes(self.x)]
        parts += [plot.wanted(value, colour) for _, value, colour in self.wanted]
        parts += [plot.band(line) for line in self.lines]
        parts += [plot.line(line) for line in self.lines]
        label = escape(clean(f"{self.title}: {', '.join(line.label for line in self.lines)}"))
        return Markup(
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}" xmlns="http://www.w3.org/2000/svg">'
            f"{''.join(parts)}</svg>"
        )


def swatch(colour: int, dash: int = 0, *, dotted: bool = False) -> Markup:
    """Draw the sign of a line for the legend."""
    pattern = "1 3" if dotted else DASHES[dash]
    return Markup(
        '<svg class="swatch" viewBox="0 0 22 8" aria-hidden="true">'
        f'<line x1="0" x2="22" y1="4" y2="4" class="l" stroke="var(--c{colour})" stroke-dasharray="{pattern}"/></svg>'
    )


class _Plot:
    """The coordinates of a chart."""

    def __init__(self, across: list[float], up: list[float]) -> None:
        self.across, self.up = across, up

    def x(self, value: float) -> str:
        low, high = self.across[0], self.across[-1]
        return f"{LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT):.1f}"

    def y(self, value: float) -> str:
        low, high = self.up[0], self.up[-1]
        value = min(value, high)  # a band may reach over what can be
        return f"{HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM):.1f}"

    def axes(self, name: str) -> str:
        parts = []
        for value in self.up:
            zero = ' class="zero"' if value == 0 else ' class="grid"'
            parts.append(f'<path d="M{LEFT} {self.y(value)}H{WIDTH - RIGHT}"{zero}/>')
            parts.append(f'<text x="{LEFT - 6}" y="{self.y(value)}" class="t e m">{tick(value, self.up)}</text>')
        for value in self.across:
            parts.append(
                f'<text x="{self.x(value)}" y="{HEIGHT - BOTTOM + 14}" class="t c">{tick(value, self.across)}</text>'
            )
        parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}" class="t c">{escape(name)}</text>')
        return "".join(parts)

    def wanted(self, value: float, colour: int) -> str:
        place = f"M{LEFT} {self.y(value)}H{WIDTH - RIGHT}"
        return f'<path d="{place}" class="l" stroke="var(--c{colour})" stroke-dasharray="1 3"/>'

    def band(self, line: Line) -> str:
        if all(point.low == point.high for point in line.points):
            return ""
        over = " ".join(f"{self.x(p.step)},{self.y(p.high)}" for p in line.points)
        under = " ".join(f"{self.x(p.step)},{self.y(p.low)}" for p in reversed(line.points))
        return f'<polygon points="{over} {under}" class="b" fill="var(--c{line.colour})"/>'

    def line(self, line: Line) -> str:
        path = " ".join(f"{self.x(p.step)},{self.y(p.mean)}" for p in line.points)
        colour = f"var(--c{line.colour})"
        dash = f' stroke-dasharray="{DASHES[line.dash]}"' if line.dash else ""
        drawn = f'<polyline points="{path}" class="l" stroke="{colour}"{dash}/>'
        if len(line.points) > 30:
            return drawn
        for p in line.points:
            said = escape(clean(f"{line.label}: {show(p.mean)} at {p.step:g}"))
            drawn += f'<circle cx="{self.x(p.step)}" cy="{self.y(p.mean)}" r="2.4" fill="{colour}">'
            drawn += f"<title>{said}</title></circle>"
        return drawn


def _scale(low: float, high: float, parts: int, *, whole: bool = False) -> list[float]:
    """Return the ticks of an axis, which reach over both ends.

    >>> _scale(0.1, 0.93, 5), _scale(7, 7, 5, whole=True)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [6.0, 7.0, 8.0])
    """
    if high - low < 1e-12 * max(1.0, abs(low)):
        pad = 1.0 if whole or not low else max(abs(low) * 0.1, 1e-3)
        low, high = low - pad, high + pad
    raw = (high - low) / parts
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999 and not (whole and m == 2.5))
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-3), math.ceil(high / step - 1e-3)  # rounding errors are no tick
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


def tick(value: float, ticks: Sequence[float]) -> str:
    """Write a number of an axis with as many digits as its ticks need.

    >>> tick(0.25, [0.0, 0.25, 0.5]), tick(20000, [0, 20000]), tick(1e-4, [0.0, 1e-4]), tick(1.385, [1.3845, 1.385])
    ('0.25', '20k', '0.0001', '1.385')
    """
    step = ticks[1] - ticks[0]
    if abs(value) >= 1e4 and step >= 100:
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    if 0 < step < 1e-3:
        digits = 2 + math.floor(math.log10(max(map(abs, ticks)))) - math.floor(math.log10(step))
        return f"{value:.{digits}g}" if value else "0"
    return f"{value:.6g}"
