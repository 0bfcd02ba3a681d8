"""Pictures on disk: SVG that fits into any page, the same bytes each time, and PNG."""

from __future__ import annotations

import re
from html import escape
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from cl_merge.benchmarks.reports.figures.style import INK
from cl_merge.storage.files import atomic_write

if TYPE_CHECKING:
    import matplotlib.figure

_DPI = 200
_FONTS = "system-ui, sans-serif"


def save_png(canvas: matplotlib.figure.Figure, file: Path) -> None:
    """Write a picture as PNG on white.

    Args:
        canvas: The picture.
        file: Where to.
    """
    with atomic_write(file) as temporary:
        canvas.savefig(
            temporary, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None}
        )


def save_svg(canvas: matplotlib.figure.Figure, file: Path, title: str, alt: str) -> None:
    """Write a picture as SVG for the inside of a page.

    The background is transparent, letters and axes have the colour of the text around the picture,
    and ids begin with the file's name, so that many pictures can be in one page.

    Args:
        canvas: The picture.
        file: Where to.
        title: For readers of the screen.
        alt: What it shows, for them.
    """
    written = BytesIO()
    canvas.savefig(written, format="svg", metadata=_NO_METADATA)
    with atomic_write(file) as temporary:
        temporary.write_text(
            inlined(written.getvalue().decode(), file.stem, title, alt), encoding="utf-8"
        )


def inlined(svg: str, name: str, title: str, alt: str) -> str:
    """Turn a file that matplotlib wrote into an element of a page.

    Args:
        svg: What it wrote.
        name: What ids shall begin with.
        title: For readers of the screen.
        alt: What it shows, for them.

    Returns:
        An ``<svg>`` element, which is a file of its own, too.
    """
    name = re.sub(r"[^A-Za-z0-9_-]", "-", name)
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.S)
    # A rule for every element of the page; what it says is inherited from the root as well.
    svg = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.S)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", _FONTS, svg)
    svg = svg.replace(INK, "currentColor")
    labels = f'role="img" aria-labelledby="{name}-title {name}-alt"'
    style = 'style="stroke-linejoin: round; stroke-linecap: butt"'
    svg = svg.replace("<svg ", f"<svg {labels} {style} ", 1)
    head = f'<title id="{name}-title">{escape(title)}</title>\n'
    head += f' <desc id="{name}-alt">{escape(alt)}</desc>'
    return re.sub(r"(<svg [^>]*>)", lambda found: f"{found[1]}\n {head}", svg, count=1)


_NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}
