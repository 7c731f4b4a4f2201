"""Writing reports without losing what is there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from harden.errors import HardenError
from harden.files import write_atomically
from harden.report.figures import png, svg
from harden.report.page import GENERATOR


def write_page(path: Path, html: str) -> None:
    """Write the page, over an earlier report only. HardenError where something else stands there, or it is evidence."""
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else None
        if before == html:
            return
        if before is not None and f'content="{GENERATOR}' not in before:
            raise HardenError(f"{path} exists and is no report of harden; give another --output")
        if before is not None and (path.parent / "attestation.json").exists():
            raise HardenError(f"{path} is part of a gate's evidence, and would change; give another --output")
        write_atomically(path, html)
    except (OSError, UnicodeDecodeError) as error:
        raise HardenError(f"cannot write {path}: {error}") from None


def write_plots(folder: Path, figures: Mapping[str, Figure]) -> list[Path]:
    """Write each figure as NAME.svg and NAME.png; HardenError where the folder holds anything else."""
    names = {f"{name}.{kind}" for name in figures for kind in ("svg", "png")}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        others = sorted(path.name for path in folder.iterdir() if path.name not in names)
        if others:
            raise HardenError(f"{folder} holds {others[0]}, which is no plot of this report; give another --plots")
        for name, figure in figures.items():
            write_atomically(folder / f"{name}.svg", standalone(figure, name))
            write_atomically(folder / f"{name}.png", png(figure))
    except OSError as error:
        raise HardenError(f"cannot write plots into {folder}: {error}") from None
    return [folder / name for name in sorted(names)]


def standalone(figure: Figure, name: str) -> str:
    """The SVG as a file of its own."""
    return '<?xml version="1.0" encoding="utf-8"?>\n' + svg(figure, name)
