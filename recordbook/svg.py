"""Small charts as inline SVG: axes, lines and points. Text stays text, colours come from the page.

A chart is drawn on 360 x 240 units, about the pixels of a phone, and grows with the page. Its classes are
coloured by the page's style sheet, so it follows a dark mode. Order of this file: axes, marks, chart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 360, 240
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 26, 42  # margins around the axes
POINT = 3.5  # radius of a point
Pair = tuple[float, float]


# 1. axes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Axis:
    """A range of values, its name and (value, text) of its ticks."""

    label: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]


def round_ticks(low: float, high: float, most: int = 5) -> tuple[tuple[float, str], ...]:
    """At most `most` + 1 ticks in [low, high] at whole multiples of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * most >= (high - low) * 0.999)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple((i * step, f"{i * step:.{digits}f}") for i in range(first, last + 1))


def widened(found: Iterable[float], share: float = 0.06) -> Pair:
    """(low, high) of the values with some room on both sides; a range even if all are equal."""
    low, high = min(found := list(found)), max(found)
    room = share * (high - low) or 0.01 * abs(high) or 1.0
    return low - room, high + room


def axis_of(label: str, found: Iterable[float], from_zero: bool = False) -> Axis:
    """The axis of these values; from zero if none is below it."""
    low, high = widened(found := list(found))
    low = 0.0 if from_zero and min(found) >= 0 else low
    return Axis(label, low, high, round_ticks(low, high))


@dataclass(frozen=True)
class Frame:
    """Where values lie on the drawing."""

    x_axis: Axis
    y_axis: Axis

    def x(self, value: float) -> float:
        axis = self.x_axis
        return LEFT + (value - axis.low) / (axis.high - axis.low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        axis = self.y_axis
        return HEIGHT - BOTTOM - (value - axis.low) / (axis.high - axis.low) * (HEIGHT - TOP - BOTTOM)


# 2. marks -------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """A coordinate, to a tenth."""
    return f"{value:.1f}".removesuffix(".0")


def path(frame: Frame, points: Sequence[Pair], kind: str) -> str:
    """A line through the points; '' for fewer than two."""
    if len(points) < 2:
        return ""
    steps = " ".join(f"{number(frame.x(x))} {number(frame.y(y))}" for x, y in points)
    return f'<path class="{kind}" d="M{steps}"/>'


def level(frame: Frame, y: float, kind: str) -> str:
    """A line over the whole width."""
    return path(frame, [(frame.x_axis.low, y), (frame.x_axis.high, y)], kind)


def point(frame: Frame, x: float, y: float, kind: str, square: bool = False) -> str:
    """A round or square point."""
    at_x, at_y, r = frame.x(x), frame.y(y), POINT
    if square:
        side = number(2 * r)
        corner = f'x="{number(at_x - r)}" y="{number(at_y - r)}"'
        return f'<rect class="{kind}" {corner} width="{side}" height="{side}"/>'
    return f'<circle class="{kind}" cx="{number(at_x)}" cy="{number(at_y)}" r="{number(r)}"/>'


def cross(frame: Frame, x: float, y: float, kind: str) -> str:
    """An upright cross, twice the size of a point."""
    at_x, at_y, r = frame.x(x), frame.y(y), 2 * POINT
    across = f"M{number(at_x - r)} {number(at_y)}h{number(2 * r)}"
    down = f"M{number(at_x)} {number(at_y - r)}v{number(2 * r)}"
    return f'<path class="{kind}" d="{across}{down}"/>'


# 3. chart -------------------------------------------------------------------------------------------------


def text(x: float, y: float, anchor: str, words: str) -> str:
    """One line of text."""
    where = f'x="{number(x)}" y="{number(y)}" text-anchor="{anchor}"'
    return f"<text {where}>{escape(words)}</text>"


def axes_of(frame: Frame) -> list[str]:
    """Grid, ticks and names of both axes; the name of the upright one stands above it, to be read level."""
    left, right, bottom = LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM
    marks = []
    for value, words in frame.y_axis.ticks:
        at = frame.y(value)
        marks.append(f'<path class="grid" d="M{left} {number(at)}H{right}"/>')
        marks.append(text(left - 6, at + 4, "end", words))
    for value, words in frame.x_axis.ticks:
        at = frame.x(value)
        marks.append(f'<path class="grid" d="M{number(at)} {TOP}V{bottom}"/>')
        reach = 3.3 * len(words)  # half the width of the words, about
        anchor = "end" if at + reach > WIDTH else "middle"
        marks.append(
            text(min(at, WIDTH - 2) if anchor == "middle" else WIDTH - 2, bottom + 16, anchor, words)
        )
    marks.append(text(2, 14, "start", frame.y_axis.label))
    marks.append(text((left + right) / 2, HEIGHT - 6, "middle", frame.x_axis.label))
    return marks


def chart(name: str, title: str, summary: str, frame: Frame, marks: Iterable[str]) -> str:
    """A whole drawing. `name` is unique on the page; title and summary are what a screen reader says."""
    head = f'<title id="{name}-t">{escape(title)}</title><desc id="{name}-d">{escape(summary)}</desc>'
    what = f'role="img" aria-labelledby="{name}-t {name}-d" viewBox="0 0 {WIDTH} {HEIGHT}"'
    return "\n".join([f"<svg {what}>{head}", *axes_of(frame), *filter(None, marks), "</svg>"])
