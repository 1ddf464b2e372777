"""The picture of a comparison: loss curves, final times and losses of each arm, and time against run order.

An arm is told by its colour and by the shape of its marker: six colours that stay apart for colour-blind
eyes and seven shapes, so that 42 arms differ. Needs matplotlib and no display.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING

from compare_runs import Arm, Run, mean, values
from recordbook import drift, integrity, statistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito, 2008
MARKERS = "osD^vPX"
LONGEST_NAME = 30
MARKS_OF_A_CURVE = 12  # markers on a mean curve, at most twice as many
LOSS = "validation loss"
TARGET_LINE = {"color": "black", "lw": 1, "ls": "--"}


def shortened(names: Sequence[str], longest: int = LONGEST_NAME) -> list[str]:
    """Names of at most `longest` characters, the middle left out; those that become equal are numbered."""
    half = (longest - 3) // 2
    cut = [name if len(name) <= longest else f"{name[:half]}...{name[-half:]}" for name in names]
    return [f"{name} [{i}]" if cut.count(name) > 1 else name for i, name in enumerate(cut, 1)]


def look(place: int) -> dict[str, str]:
    """Colour and marker of the arm at this place."""
    return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)]}


def mean_curve(runs: list[Run], use_time: bool) -> tuple[list[float], list[float]]:
    """Mean loss at each validation step that every run reached, against the mean time or the step."""
    by_step = defaultdict(list)
    for run in runs:
        for point in run.val:
            if point.seconds is not None or not use_time:
                by_step[point.step].append(point)
    shared = [(step, found) for step, found in sorted(by_step.items()) if len(found) == len(runs)]
    xs = [mean([p.seconds for p in found]) if use_time else step for step, found in shared]
    return xs, [mean([p.loss for p in found]) for _, found in shared]


def loss_range(arms: Sequence[Arm], target: float | None) -> tuple[float, float] | None:
    """(low, high) of the curves without the large drop in the first tenth; None if that is no range."""
    shown = [target] if target is not None else []
    for run in (run for arm in arms for run in arm.attempts if run.val):
        after = run.val[-1].step / 10
        shown += [p.loss for p in run.val if math.isfinite(p.loss) and p.step >= after]
    low, high = min(shown, default=0), max(shown, default=0)
    margin = 0.04 * (high - low)
    return (low - margin, high + margin) if margin else None


def draw_curves(axes: Axes, arms: Sequence[Arm], target: float | None, use_time: bool) -> None:
    """Loss of every run, thin (dotted if not counted), the mean of each arm thick, the target dashed."""
    right = 0.0
    for place, arm in enumerate(arms):
        style = look(place)
        for run in arm.attempts:
            kept = [p for p in run.val if math.isfinite(p.loss) and (not use_time or p.seconds is not None)]
            xs = [p.seconds if use_time else p.step for p in kept]
            ls = "-" if run.complete else ":"
            axes.plot(xs, [p.loss for p in kept], color=style["color"], lw=0.6, alpha=0.5, ls=ls)
            right = max([right, *xs])
        if not use_time or values(arm, "seconds"):
            xs, ys = mean_curve(arm.counted, use_time)
            every = max(1, len(xs) // MARKS_OF_A_CURVE)
            axes.plot(xs, ys, **style, lw=1.8, ms=4, markevery=every)
    if target is not None:
        axes.axhline(target, **TARGET_LINE)
    if limits := loss_range(arms, target):
        axes.set_ylim(*limits)
    axes.set_xlim(0, right * 1.02 or 1)
    axes.set(xlabel="training time (s)" if use_time else "training step", ylabel=LOSS)
    axes.grid(alpha=0.3)


def plain_ticks(axes: Axes, axis: str = "both") -> None:
    """A few whole numbers on an axis, none as an offset from another."""
    axes.ticklabel_format(useOffset=False, axis=axis)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(alpha=0.3)


def draw_ends(axes: Axes, arms: Sequence[Arm], target: float | None) -> None:
    """Final time and value of the metric of every counted run; crosses are means."""
    for place, arm in enumerate(arms):
        if times := values(arm, "seconds"):
            found, style = values(arm, "metric"), look(place)
            axes.plot(times, found, **style, ls="", ms=5, alpha=0.6, mew=0)
            axes.plot(mean(times), mean(found), "x", color=style["color"], ms=10, mew=2.5)
    if target is not None:
        axes.axhline(target, **TARGET_LINE)
    axes.margins(0.1)
    axes.set(xlabel="final time (s)", ylabel=measure_name(arms))
    axes.set_title("last validation of each run; x: mean of an arm", fontsize=9)
    plain_ticks(axes)


def measure_name(arms: Sequence[Arm]) -> str:
    """What the metric is called on an axis."""
    return f"final {LOSS}" if arms[0].metric == "val_loss" else f"final {arms[0].metric}"


def draw_strip(
    axes: Axes,
    arms: Sequence[Arm],
    key: str,  # of values()
    title: str,
    names: Sequence[str],
    target: float | None = None,
) -> None:
    """Each run as a point, the arms below each other, runs as they are listed; black: mean and interval."""
    labels = []
    for place, (arm, name) in enumerate(zip(arms, names, strict=True)):
        if not (found := values(arm, key)):
            labels.append(f"{name}\nno times")
            continue
        last = max(len(found) - 1, 1)
        rows = [place + 0.34 * (2 * i / last - 1) for i in range(len(found))]
        axes.plot(found, rows, **look(place), ls="", ms=4.5, alpha=0.7, mew=0, zorder=3)
        centre, half = mean(found), statistics.half_interval(found)
        axes.errorbar(centre, place, xerr=half, color="black", capsize=5, lw=1.6, marker="|", ms=16, mew=1.6)
        digits = 3 if key == "seconds" else 4
        labels.append(f"{name}\n{centre:.{digits}f} ± {half:.{digits}f}, n = {len(found)}")
    if target is not None:
        axes.axvline(target, **TARGET_LINE)
    axes.set_yticks(range(len(arms)), labels, fontsize=8, parse_math=False)
    axes.set_ylim(len(arms) - 0.4, -0.6)
    axes.set_xlabel(title)
    axes.set_title("a point a run, first run on top; black: mean and 95 % interval", fontsize=9)
    plain_ticks(axes, "x")


def draw_order(axes: Axes, arms: Sequence[Arm]) -> None:
    """Time of each run in the order of their starts, with the drift line of each arm.

    The slope is the Theil-Sen slope within arms that the finding on drift states; each arm has the line of
    that slope that leaves half of its runs on either side.
    """
    runs, origin = integrity.run_order(arms)
    axes.set(xlabel="run, in the order of the starts", ylabel="final time (s)")
    if not runs:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "run order unknown", ha="center", transform=axes.transAxes)
        return
    labels, times = [arm.name for arm, _ in runs], [run.seconds for _, run in runs]
    found = drift.drift(times, labels) if max(map(labels.count, set(labels))) >= 3 else None
    for place, arm in enumerate(arms):
        at = [i for i, label in enumerate(labels) if label == arm.name]
        style = look(place)
        axes.plot([i + 1 for i in at], [times[i] for i in at], **style, ls="", ms=5, alpha=0.8, mew=0)
        if found:
            level = median(times[i] - found.slope * i for i in at)
            ends = [at[0], at[-1]]
            axes.plot([i + 1 for i in ends], [level + found.slope * i for i in ends], color=style["color"])
    what = "no drift line: no arm has 3 runs"
    if found:
        interval = f"{found.low:+.4f} to {found.high:+.4f}"
        what = f"drift {found.slope:+.4f} s a run ({found.level:.0%}: {interval}), p {found.p:.2g}"
    axes.set_title(f"{what}\norder: {origin}", fontsize=9)
    plain_ticks(axes)


def panels_of(figure: Figure, heights: Sequence[float], timed: bool) -> dict[str, Axes]:
    """The panels by name: two rows, each with a layout of its own, or the two panels that need no clock."""
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    rows = [["time", "step", "ends"], ["times", "values", "order"]] if timed else [["step", "values"]]
    panels = {}
    for row, part in zip(
        rows, figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False), strict=True
    ):
        panels |= part[0].subplot_mosaic([row])
    return panels


def figure_of(arms: Sequence[Arm], target: float | None) -> Figure:
    """The picture. `target` is that of the metric, None if there is none."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    names = shortened([arm.name for arm in arms])
    timed = [arm for arm in arms if values(arm, "seconds")]
    on_loss = target if arms[0].metric == "val_loss" else None
    strips = max(4.0, 0.55 * len(arms))
    heights = [4.4, strips] if timed else [max(4.4, strips)]
    legend_rows = math.ceil((len(arms) + 1) / 4)
    figure = Figure((16, sum(heights) + 0.3 + 0.25 * legend_rows), dpi=110, layout="constrained")
    draw: dict[str, Callable[[Axes], None]] = {
        "time": lambda axes: draw_curves(axes, arms, on_loss, use_time=True),
        "step": lambda axes: draw_curves(axes, arms, on_loss, use_time=False),
        "ends": lambda axes: draw_ends(axes, arms, target),
        "times": lambda axes: draw_strip(axes, arms, "seconds", "final time (s)", names),
        "values": lambda axes: draw_strip(axes, arms, "metric", measure_name(arms), names, target),
        "order": lambda axes: draw_order(axes, timed),
    }
    for name, axes in panels_of(figure, heights, bool(timed)).items():
        draw[name](axes)
        if name == "time" and len(timed) < len(arms):
            axes.set_title("logs without times are only in the panels without time", fontsize=9)
    entries = [Line2D([], [], **look(i), label="arm") for i in range(len(names))]
    if target is not None:
        entries.append(Line2D([], [], **TARGET_LINE, label=f"target {target:g}"))
    legend = figure.legend(
        handles=entries, loc="outside upper center", ncols=min(4, len(entries)), frameon=False
    )
    for text, name in zip(legend.get_texts(), names, strict=False):
        text.set(text=name, parse_math=False)  # as a label, _name would be left out and $name$ be a formula
    return figure
