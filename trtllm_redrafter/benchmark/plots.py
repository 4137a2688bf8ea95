"""Plots as SVG elements to be embedded in a page, which determines their fonts and colours.

matplotlib draws with placeholder colours that are replaced by the page's CSS variables, so one drawing serves light and
dark. Text stays text. Needs the `report` extra; it is imported when a plot is drawn.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trtllm_redrafter.benchmark.prediction import Prediction, frontier
from trtllm_redrafter.benchmark.records import AUTOREGRESSION, DRAFTING
from trtllm_redrafter.benchmark.summary import BatchSummary, BenchSummary
from trtllm_redrafter.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Callable

WIDTH, HEIGHT = 5.2, 3.1
"""Inches; 374 points wide, which fits a phone without scaling."""

INK, FAINT, ACCENT, SECOND, CARD = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES = {INK: "--ink", FAINT: "--faint", ACCENT: "--accent", SECOND: "--second", CARD: "--card"}


_FEWEST_TICKS, _MOST_TICKS = 3, 10


def require_matplotlib() -> None:
    """Raise before anything is measured, if matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise BackendError(
            "the report needs matplotlib", why=str(error), remedy="pip install 'trtllm-redrafter[report]'"
        ) from error


def draw(name: str, paint: Callable[[Any, Any], None], *, height: float = HEIGHT, title: str) -> str:
    """The axis drawn by `paint(figure, axis)`, as an `<svg>` element whose ids begin with `name`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # Category names are the user's: a dollar sign in them is not the start of a formula.
    style = {"text.parse_math": False,
             "svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif", "font.size": 10,
             "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT, "xtick.color": INK,
             "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.facecolor": "none",
             "figure.facecolor": "none", "grid.color": FAINT, "grid.linewidth": 0.5}  # fmt: skip
    with rc_context(style):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        paint(figure, figure.subplots())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    return _for_page(buffer.getvalue(), name, title)


def _for_page(svg: str, name: str, title: str) -> str:
    """Strip what only a standalone file needs, and make ids unique on the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\s(xmlns(:\w+)?|version|width|height)="[^"]*"', "", svg[: svg.index(">")]) + svg[svg.index(">") :]
    svg = svg.replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-")
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1).strip()


def speedup_by_batch(summary: BenchSummary) -> str:
    rows = [b for b in summary.batches if b.figures.speedup.value == b.figures.speedup.value]

    def paint(figure: Any, axis: Any) -> None:
        axis.axhline(1, color=INK, linewidth=1, linestyle="--")
        places = range(len(rows))
        values = [b.figures.speedup.value for b in rows]
        _intervals(axis, list(places), [b.figures.speedup for b in rows], vertical=True)
        for x, value in zip(places, values, strict=True):
            axis.annotate(f"{value:.2f}", (x, value), (9, 0), textcoords="offset points", va="center", color=INK,
                          bbox={"facecolor": CARD, "edgecolor": "none", "pad": 1})  # fmt: skip
        axis.set_xticks(list(places), [str(b.figures.batch) for b in rows])
        axis.set_xlim(-0.6, len(rows) - 0.4)
        axis.set_ylim(bottom=0, top=1.1 * max([1.2, *(b.figures.speedup.high for b in rows)]))
        axis.set_xlabel("requests together")
        axis.set_ylabel("speed-up")

    kinds = max(len(b.figures.categories) for b in rows) if rows else 0
    return draw("batch", paint, height=_category_height(kinds), title="Speed-up by batch size, with intervals")


def _intervals(axis: Any, places: Sequence[float], estimates: Sequence[Any], *, vertical: bool) -> None:
    values = [e.value for e in estimates]
    errors = [[max(0.0, e.value - e.low) for e in estimates], [max(0.0, e.high - e.value) for e in estimates]]
    look = {"fmt": "o", "color": ACCENT, "capsize": 4, "markersize": 6}
    if vertical:
        axis.errorbar(places, values, yerr=errors, **look)
    else:
        axis.errorbar(values, places, xerr=errors, **look)


def _category_height(kinds: int) -> float:
    """Also of the plot beside it."""
    return 1 + 0.4 * max(4, kinds)


def speedup_by_category(batch: BatchSummary) -> str:
    rows = sorted(batch.figures.categories.items(), key=lambda entry: entry[1].speedup.value)

    def paint(figure: Any, axis: Any) -> None:
        axis.axvline(1, color=INK, linewidth=1, linestyle="--")
        _intervals(axis, list(range(len(rows))), [c.speedup for _, c in rows], vertical=False)
        axis.set_yticks(range(len(rows)), [name.replace(" ", "\n", 1) for name, _ in rows])
        axis.set_ylim(-0.6, len(rows) - 0.4)
        axis.set_xlim(left=0)
        axis.set_xlabel(f"speed-up, batch {batch.figures.batch}")

    return draw("category", paint, height=_category_height(len(rows)), title="Speed-up by kind of prompt")


def acceptance_by_position(summary: BenchSummary) -> str:
    shares = summary.batches[0].figures.drafting.acceptance_rate_per_position

    def paint(figure: Any, axis: Any) -> None:
        bars = axis.bar(range(1, len(shares) + 1), [100 * s for s in shares], color=ACCENT, width=0.6)
        axis.bar_label(bars, fmt="%.0f", color=INK, padding=2)
        axis.set_xticks(range(1, len(shares) + 1))
        axis.set_ylim(0, 105)
        axis.set_xlabel("drafted position")
        axis.set_ylabel("steps that accept it, %")

    return draw("position", paint, title="Share of steps that accept each drafted position")


def latency_distribution(batch: BatchSummary, summary: BenchSummary) -> str:
    records = next(b for b in summary.result.batches if b.batch == batch.figures.batch)

    def paint(figure: Any, axis: Any) -> None:
        for side, colour, dash in ((AUTOREGRESSION, SECOND, "--"), (DRAFTING, ACCENT, "-")):
            gaps = sorted(1e3 * g for g in records.side(side).gaps)
            step = max(1, len(gaps) // 400)  # a curve needs no more points
            share = [100 * (i + 1) / len(gaps) for i in range(len(gaps))]
            x, y = gaps[::step] + gaps[-1:], share[::step] + share[-1:]  # including the longest wait
            axis.plot(x, y, color=colour, linestyle=dash, linewidth=2, label=side)
        axis.set_xscale("log")
        _readable_ticks(axis)
        axis.set_ylim(0, 101)
        axis.grid(True, axis="y")
        axis.set_xlabel(f"milliseconds between updates, batch {batch.figures.batch}")
        axis.set_ylabel("updates up to that, %")
        figure.legend(frameon=False, loc="outside upper center", ncols=2)

    return draw("latency", paint, title="Distribution of the time between updates")


def _readable_ticks(axis: Any) -> None:
    """Label every tick of a logarithmic axis."""
    from matplotlib.ticker import NullLocator

    ticks = log_ticks(*axis.get_xlim())
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two positive ones: 1, 2, 5, 10, 20, ...; over a wide range 1, 10, 100; over a narrow
    one, where there would be too few, even steps.
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1,)):
        found = [tick for n in powers for d in digits if low <= (tick := float(f"{d}e{n}")) <= high]
        if _FEWEST_TICKS <= len(found) <= _MOST_TICKS:
            return found
    if len(found) > _MOST_TICKS:
        return found[:: -(-len(found) // _MOST_TICKS)]
    power = 10.0 ** math.floor(math.log10((high - low) / _FEWEST_TICKS))
    step = next(d * power for d in (1, 2, 5, 10) if (high - low) / (d * power) <= 2 * _FEWEST_TICKS)
    return [float(f"{n * step:.6g}") for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def roofline(summary: BenchSummary) -> str | None:
    """Steps relative to the bandwidth roofline; None if the bandwidth is not known."""
    rows = [b for b in summary.batches if b.roof is not None]
    if not rows:
        return None

    def paint(figure: Any, axis: Any) -> None:
        for offset, colour, label in ((-0.2, SECOND, AUTOREGRESSION), (0.2, ACCENT, DRAFTING)):
            shares = [100 * (b.roof.plain if colour == SECOND else b.roof.drafting) for b in rows if b.roof]
            bars = axis.barh([i + offset for i in range(len(rows))], shares, height=0.36, color=colour, label=label)
            axis.bar_label(bars, fmt="%.0f", color=INK, padding=3)
        axis.axvline(100, color=INK, linewidth=1, linestyle="--")
        axis.set_yticks(range(len(rows)), [f"batch {b.figures.batch}" for b in rows])
        axis.set_ylim(len(rows) - 0.4, -0.6)
        axis.set_xlim(0, 115)
        axis.set_xlabel("base weights per step time, % of memory bandwidth")
        figure.legend(frameon=False, loc="outside upper center", ncols=2)

    height = 1.5 + 0.6 * len(rows)
    return draw("roof", paint, height=height, title="Share of the memory bandwidth that steps reach")


def grid_heat_map(predictions: Sequence[Prediction], batch: int) -> str:
    """Speed-up by number of beams and draft length; cells outside the grid are empty."""
    here = {(p.shape.num_beams, p.shape.draft_len): p.speedup.value for p in predictions if p.batch == batch}
    beams, lengths = (sorted({key[i] for key in here}) for i in (0, 1))
    best = max(here.values())

    def paint(figure: Any, axis: Any) -> None:
        for (k, length), value in here.items():
            x, y = lengths.index(length), beams.index(k)
            strength = min(1.0, max(0.0, (value - 0.5) / max(0.01, best - 0.5)))
            axis.barh(y, 0.94, left=x - 0.47, height=0.9, color=ACCENT, alpha=0.08 + 0.6 * strength**2)
            weight = "bold" if value == best else "normal"
            axis.text(x, y, f"{value:.2f}", ha="center", va="center", color=INK, fontweight=weight)
        axis.set_xticks(range(len(lengths)), [str(n) for n in lengths])
        axis.set_yticks(range(len(beams)), [str(n) for n in beams])
        axis.set_xlim(-0.5, len(lengths) - 0.5)
        axis.set_ylim(-0.5, len(beams) - 0.5)
        axis.set_xlabel("draft length")
        axis.set_ylabel("beams")

    height = 1.2 + 0.4 * max(3, len(beams))
    return draw(f"grid{batch}", paint, height=height, title=f"Predicted speed-up at batch {batch}")


def user_against_total(predictions: Sequence[Prediction]) -> str:
    """Speed per user against total throughput; the frontier is a line."""
    best = frontier(predictions)

    def paint(figure: Any, axis: Any) -> None:
        axis.scatter(
            [p.user_tokens_per_second for p in predictions],
            [p.total_tokens_per_second for p in predictions],
            color=SECOND, s=18, alpha=0.7, label="settings",
        )  # fmt: skip
        plain = sorted({(p.plain_tokens_per_second, p.batch * p.plain_tokens_per_second) for p in predictions})
        axis.scatter([x for x, _ in plain], [y for _, y in plain], color=INK, marker="x", s=30, label="no drafting")
        axis.plot([p.user_tokens_per_second for p in best], [p.total_tokens_per_second for p in best],
                  color=ACCENT, marker="o", linewidth=1.5, label="frontier")  # fmt: skip
        for p in best[:6]:
            place = (p.user_tokens_per_second, p.total_tokens_per_second)
            axis.annotate(f"{p.name}, batch {p.batch}", place, (5, 5), textcoords="offset points", color=INK,
                          fontsize=8)  # fmt: skip
        axis.margins(x=0.25, y=0.15)
        axis.set_xlabel("tokens/s of one user")
        axis.set_ylabel("tokens/s of all")
        figure.legend(frameon=False, loc="outside upper center", ncols=3)

    return draw("frontier", paint, title="Tokens per second of one user against all users")
