"""The figures of a report, from records alone: each is a matplotlib figure that fits any background.

Text and axes are drawn in `INK`, which an SVG inside a page replaces by the page's own text colour.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from harden.results import AttributionRecord, Certificate, Rate

INK = "#1f2328"
COLOURS = {"comply": "#d9541e", "refuse": "#3b7dd8", "degenerate": "#9aa0a6", "unjudged": "#b26fc4"}
SERIES = ("#8c959f", "#3b7dd8", "#d9541e", "#2f9e69", "#b26fc4", "#c99700")
WIDTH = 5.6  # inches; legible on a phone, two side by side on a screen
PANEL_CHARACTERS = 36  # of a title, where two panels stand side by side
LEGEND_LINE = 0.19  # inches
STYLE = {
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "font.size": 9,
    "axes.titlesize": 9,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "text.parse_math": False,
}
STYLED = style.context(["default", STYLE])  # a decorator; whatever the user's matplotlibrc says


@dataclass(frozen=True)
class Sweep:
    """One neuron clamped to several values, on one set of prompts; the value None is no attack."""

    label: str
    rates: Mapping[float | None, Mapping[str, Rate]]
    """By value, by outcome."""


def svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element whose text and axes take the colour of the text around it."""
    buffer = io.StringIO()
    with style.context(["default", {**STYLE, "svg.hashsalt": name}]):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = re.sub(r'<g id="[^"]*"', "<g", buffer.getvalue())  # of no use, and the same in every figure of a page
    text = re.sub("<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return text[text.index("<svg") :].replace(INK, "currentColor")


def png(figure: Figure) -> bytes:
    """The figure as a PNG, dark on white."""
    buffer = io.BytesIO()
    with style.context(["default", STYLE]):
        figure.savefig(buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


@STYLED
def attack_bars(groups: Mapping[str, Mapping[str, Rate]]) -> Figure:
    """Attack success by attack, one bar per model; groups: model -> attack -> rate."""
    attacks = list(dict.fromkeys(attack for rates in groups.values() for attack in rates))
    figure, axes = _figure(1, 0.9 + 0.26 * len(attacks) * max(1.0, 0.55 * len(groups)))
    height = 0.8 / len(groups)
    for place, (model, rates) in enumerate(groups.items()):
        known = [(row, rates[attack]) for row, attack in enumerate(attacks) if attack in rates]
        axes[0].barh(
            [row + (place - (len(groups) - 1) / 2) * height for row, _ in known],
            [100 * rate.rate for _, rate in known],
            height * 0.9,
            xerr=_errors([rate for _, rate in known]),
            color=SERIES[(place + (len(groups) == 1)) % len(SERIES)],
            error_kw={"ecolor": INK, "elinewidth": 0.8, "capsize": 2},
            label=_named(model),
        )
    axes[0].set_yticks(range(len(attacks)), attacks)
    axes[0].invert_yaxis()
    axes[0].set_xlim(0, 100)
    axes[0].set_xlabel("attack success on the test split, % (95% interval)")
    if len(groups) > 1:
        _legend_above(figure, axes)
    return figure


@STYLED
def outcomes_by_value(sweeps: Sequence[Sweep]) -> Figure:
    """Refuse / comply / degenerate, stacked, against the value that a neuron is clamped to, from small to large; where
    all are negative, from the one next to 0."""
    figure, axes = _figure(len(sweeps), 2.6, columns=2)
    for each, sweep in zip(axes, sweeps, strict=True):
        known = [value for value in sweep.rates if value is not None]
        values = [None] * (None in sweep.rates) + sorted(known, reverse=all(value < 0 for value in known))
        bottom = [0.0] * len(values)
        for kind, colour in COLOURS.items():
            shares = [100 * sweep.rates[value][kind].rate for value in values]
            if kind != "unjudged" or any(shares):
                each.bar(range(len(values)), shares, 0.86, bottom=bottom, color=colour, label=kind)
            bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
        names = ["none" if value is None else f"{value:.3g}" for value in values]
        each.set_xticks(range(len(values)), names, rotation=45 if len(values) > 5 else 0)
        each.set_title(_title(sweep.label, len(sweeps)))
        each.set_xlabel("clamped to")
        each.set_ylim(0, 100)
    axes[0].set_ylabel("% of prompts")
    _legend_above(figure, axes)
    return figure


@STYLED
def success_by_k(curves: Mapping[str, Mapping[int, Mapping[str, Rate]]]) -> Figure:
    """Attack success, and the degenerate share, against the number k of silenced neurons; by model, by k."""
    figure, axes = _figure(1, 2.6)
    for place, (model, by_k) in enumerate(curves.items()):
        colour = SERIES[(place + (len(curves) == 1)) % len(SERIES)]
        ks = sorted(by_k)
        rates = [by_k[k]["comply"] for k in ks]
        axes[0].fill_between(ks, [100 * r.low for r in rates], [100 * r.high for r in rates], color=colour, alpha=0.15)
        axes[0].plot(ks, [100 * r.rate for r in rates], "o-", color=colour, ms=3,
                     label=_named(model) if len(curves) > 1 else None)  # fmt: skip
        shares = [100 * by_k[k]["degenerate"].rate for k in ks]
        axes[0].plot(ks, shares, "x:", color=colour, ms=3)
    for outcome, line in (("comply", "o-"), ("degenerate", "x:")):
        axes[0].plot([], [], line, color=INK, ms=3, label=outcome)
    axes[0].set_xscale("log", base=2)
    axes[0].xaxis.set_major_formatter("{x:g}")
    axes[0].set_ylim(0, 100)
    axes[0].set_xlabel("neurons silenced (largest contrast first)")
    axes[0].set_ylabel("% of test prompts")
    _legend_above(figure, axes)
    return figure


@STYLED
def attribution_map(records: Mapping[str, AttributionRecord]) -> Figure:
    """Layer x neuron: the largest attribution in each run of neurons, as a share of the model's, by model."""
    figure, axes = _figure(len(records), 3.2, columns=2, alike=False)
    largest = max(max(map(max, record.map)) for record in records.values())
    norm = matplotlib.colors.PowerNorm(0.5, 0, 100 * largest or 1.0)
    for each, (model, record) in zip(axes, records.items(), strict=True):
        width = max(map(len, record.map))
        cells = [[100 * share for share in row] + [math.nan] * (width - len(row)) for row in record.map]
        image = each.imshow(cells, aspect="auto", cmap="magma", norm=norm, interpolation="nearest", origin="lower")
        each.set_title(_title(model, len(records)))
        each.set_xlabel("neurons by index")
        each.set_xticks([])
        each.set_ylabel("layer")
        each.yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=list(axes), label="share of all attribution, %", fraction=0.05)
    return figure


@STYLED
def attribution_spectrum(records: Mapping[str, AttributionRecord]) -> Figure:
    """Share of all attribution that the k largest neurons hold, against k; by model."""
    figure, axes = _figure(1, 2.6)
    for place, (model, record) in enumerate(records.items()):
        colour = SERIES[(place + (len(records) == 1)) % len(SERIES)]
        ks = sorted(record.top_shares)
        label = f"{_named(model)}: {record.effective_neurons:.0f} effective neurons"
        axes[0].plot(ks, [100 * record.top_shares[k] for k in ks], "o-", color=colour, ms=3, label=label)
    axes[0].set_xscale("log")
    axes[0].xaxis.set_major_formatter("{x:g}")
    axes[0].set_ylim(0, 100)
    axes[0].set_xlabel("the k neurons with the largest attribution")
    axes[0].set_ylabel("share of all attribution, %")
    _legend_above(figure, axes)
    return figure


@STYLED
def drop_map(certificate: Certificate) -> Figure:
    """Layer x neuron: how far the exact refusal log-odds fall at each scanned neuron's worst value; breakers ringed."""
    figure, axes = _figure(1, 3.2)
    drops = dict(reversed(certificate.largest_drops.items()))  # the largest on top
    top = max(drops.values(), default=0.0) or 1.0
    spots = axes[0].scatter(
        *_places(drops),
        s=[4 + 60 * max(0.0, drop) / top for drop in drops.values()],
        c=list(drops.values()),
        cmap="viridis_r",
        edgecolors=INK,
        linewidths=0.4,
    )
    if certificate.breakers:
        axes[0].scatter(*_places(certificate.breakers), s=90, facecolors="none", edgecolors=COLOURS["comply"],
                        linewidths=1.4, label="breaks the model")  # fmt: skip
        _legend_above(figure, axes)
    axes[0].set_xlabel("neuron")
    axes[0].set_ylabel("layer")
    axes[0].yaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(spots, ax=axes[0], label="drop of log-odds, nats", fraction=0.05)
    return figure


@STYLED
def rounds(series: Mapping[str, Sequence[Rate]], divergence: Sequence[float]) -> Figure:
    """Round by round, on the selection split: rates with their intervals, and benign KL (nats per token) below."""
    figure, axes = _figure(2, 2.0, columns=1)
    numbers = range(len(divergence))
    colours = dict(zip(series, (COLOURS["comply"], SERIES[0], SERIES[3], SERIES[4]), strict=False))
    for name, rates in series.items():
        axes[0].errorbar(numbers, [100 * r.rate for r in rates], yerr=_errors(rates), fmt="o-", ms=3.5, capsize=2,
                         elinewidth=0.8, color=colours[name], label=name)  # fmt: skip
    axes[0].set_ylim(0, 100)
    axes[0].set_ylabel("% of prompts")
    axes[1].bar(numbers, divergence, 0.4, color=SERIES[1])
    axes[1].set_ylabel("benign KL,\nnats per token")
    axes[1].set_xlabel("round")
    for each in axes:
        each.set_xticks(numbers)
        each.set_xlim(-0.5, len(divergence) - 0.5)
    _legend_above(figure, axes)
    return figure


def _figure(panels: int, height: float, columns: int = 1, alike: bool = True) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels, `height` inches each, in rows of columns; alike: with the same y axis."""
    columns = min(columns, panels)
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=alike and columns > 1).flatten().tolist()
    for unused in axes[panels:]:
        unused.remove()
    return figure, axes[:panels]


def _title(label: str, panels: int) -> str:
    return label if panels == 1 else textwrap.fill(label, PANEL_CHARACTERS)


def _places(neurons: Iterable[str]) -> tuple[list[int], list[int]]:
    """Index and layer of each `layer:index`."""
    pairs = [tuple(map(int, neuron.split(":"))) for neuron in neurons]
    return [index for _, index in pairs], [layer for layer, _ in pairs]


def _errors(rates: Sequence[Rate]) -> list[list[float]]:
    return [
        [100 * max(0.0, r.rate - r.low) for r in rates],
        [100 * max(0.0, r.high - r.rate) for r in rates],
    ]


def _named(label: str) -> str:
    """A label that a legend shows: those that begin with an underscore are left out."""
    return f"\u200b{label}" if label.startswith("_") else label


def _legend_above(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend of what any of the axes shows."""
    found: dict[str, Any] = {}
    for each in axes:
        for handle, label in zip(*each.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        columns = max(1, min(len(found), 70 // (max(map(len, found)) + 6)))
        figure.set_figheight(figure.get_figheight() + LEGEND_LINE * (math.ceil(len(found) / columns) - 1))
        figure.legend(list(found.values()), list(found), loc="outside upper left", ncols=columns)
