"""recordbook/plots.py: what the picture of a comparison shows, read back from the figure itself."""

import itertools

import pytest

import compare_runs as cr
from recordbook import plots
from recordbook.drift import drift
from tests.test_compare_runs import our_log, write_arm

TIMES = {"base": [1000, 1012, 1009, 1021], "new": [960, 958, 975, 981]}
LOSSES = {"base": [3.271, 3.275, 3.272, 3.279], "new": [3.272, 3.274, 3.276, 3.27]}


@pytest.fixture
def arms(tmp_path):
    """Two arms that started in turn, base first."""
    folders = []
    for place, name in enumerate(TIMES):
        folder = tmp_path / name
        folder.mkdir()
        for i, (loss, ms) in enumerate(zip(LOSSES[name], TIMES[name], strict=True)):
            start = f"2026-02-01T10:{2 * i + place:02d}:00"
            text = our_log(loss, ms, seed=i + 1, source=f"x = {place}\n", run_id=f"{name}{i}", started=start)
            (folder / f"run{i}.txt").write_text(text)
        folders.append(cr.load_arm(str(folder)))
    cr.name_arms(folders)
    return folders


def titled(figure, title: str):
    """The panels whose x axis says so."""
    return [axes for axes in figure.axes if axes.get_xlabel() == title]


def test_every_panel_is_there(arms):
    figure = plots.figure_of(arms, 3.28)
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "training time (s)", "training step", "final time (s)",
        "final time (s)", "final validation loss", "run, in the order of the starts",
    ]  # fmt: skip
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["base", "new", "target 3.28"]
    by_time = figure.axes[0]
    thick = [line for line in by_time.lines if line.get_linewidth() > 1]
    assert list(thick[0].get_ydata()) == pytest.approx([6.27425, 5.27425, 4.27425, 3.27425])
    assert list(thick[0].get_xdata())[-1] == pytest.approx(1.0105)
    assert by_time.lines[-1].get_ydata() == [3.28, 3.28]


def test_strips_state_mean_and_interval(arms):
    """Half widths: Student's t of 3 degrees of freedom is 3.1824463 at 97.5 %."""
    times, losses = plots.figure_of(arms, 3.28).axes[3:5]
    labels = [text.get_text() for text in times.get_yticklabels()]
    sd = (((1000 - 1010.5) ** 2 + 1.5**2 + 1.5**2 + 10.5**2) / 3) ** 0.5 / 1000
    assert labels[0] == f"base\n1.010 ± {3.1824463 * sd / 2:.3f}, n = 4"
    assert losses.get_yticklabels()[1].get_text().startswith("new\n3.2730 ± 0.00")
    assert sorted(times.lines[0].get_xdata()) == [1.0, 1.009, 1.012, 1.021]
    assert losses.lines[-1].get_xdata() == [3.28, 3.28]


def test_drift_lines_have_the_slope_of_the_finding(arms):
    axes = plots.figure_of(arms, 3.28).axes[5]
    in_order = [ms / 1000 for pair in zip(*TIMES.values(), strict=True) for ms in pair]
    found = drift(in_order, ["base", "new"] * 4)
    points, lines = axes.lines[::2], axes.lines[1::2]
    assert [list(p.get_xdata()) for p in points] == [[1, 3, 5, 7], [2, 4, 6, 8]]
    for line in lines:
        (x0, x1), (y0, y1) = line.get_data()
        assert (y1 - y0) / (x1 - x0) == pytest.approx(found.slope)
    assert f"{found.slope:+.4f} s a run" in axes.get_title()


def test_unknown_order_has_no_line(tmp_path):
    folder = write_arm(tmp_path / "arm", [3.2, 3.3, 3.4], [1000, 1010, 1020], started=None)
    arm = cr.load_arm(str(folder))
    axes = plots.figure_of([arm], 3.28).axes[5]
    assert not axes.lines
    assert [text.get_text() for text in axes.texts] == ["run order unknown"]


def test_logs_without_times_leave_two_panels(tmp_path):
    (tmp_path / "arm").mkdir()
    for i in range(3):
        lines = [f"s:{step} tel:{3.2 + i / 100 + 5 / (step + 1):.6f}" for step in (0, 250, 500)]
        (tmp_path / "arm" / f"{i}.log").write_text("\n".join(lines) + "\n")
    figure = plots.figure_of([cr.load_arm(str(tmp_path / "arm"))], None)
    assert [axes.get_xlabel() for axes in figure.axes] == ["training step", "final validation loss"]


def test_target_of_another_metric_is_not_drawn_at_the_losses(arms):
    for arm in arms:
        arm.metric = "val_bpb"
    axes = plots.figure_of(arms, 1.1).axes
    assert all(list(line.get_ydata()) != [1.1, 1.1] for line in axes[0].lines)
    assert axes[4].lines[-1].get_xdata() == [1.1, 1.1]
    assert axes[4].get_xlabel() == "final val_bpb"


def test_the_legend_covers_nothing(arms):
    """Not even with eight arms of long names."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    many = [cr.Arm("", f"{'long-' * 20}{i}", arms[i % 2].runs, set()) for i in range(8)]
    figure = plots.figure_of(many, 3.28)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    legend = figure.legends[0].get_window_extent()
    tight = [axes.get_tightbbox(canvas.get_renderer()) for axes in figure.axes]
    assert not any(legend.overlaps(box) for box in tight)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(tight, 2))
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 for box in [legend, *tight])


@pytest.mark.parametrize("name", ["_hidden", "$x_$y$", "a\\b^", "\u8a13\u7df4"])
def test_names_are_shown_as_they_are(tmp_path, capsys, recwarn, name):
    folder, path = write_arm(tmp_path / name, [3.2, 3.3], [1000, 1010]), tmp_path / "plot.svg"
    figure = plots.figure_of([cr.Arm("", name, cr.load_arm(str(folder)).runs, set())], 3.28)
    assert figure.legends[0].get_texts()[0].get_text() == name
    assert cr.main([str(folder), "--plot", str(path)]) == 0
    assert path.stat().st_size > 5000
    assert capsys.readouterr().err == ""
    assert not recwarn.list


def test_short_names_stay_apart():
    long = ["x" * 40 + "a" + "y" * 40, "x" * 40 + "b" + "y" * 40, "short", "short" * 10]
    found = plots.shortened(long)
    assert len(set(found)) == 4
    assert found[2] == "short"
    assert max(map(len, found)) <= plots.LONGEST_NAME + 4


def test_arms_look_different():
    looks = [tuple(plots.look(i).values()) for i in range(42)]
    assert len(set(looks)) == 42
