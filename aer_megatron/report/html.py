"""report.html: runs in one self-contained page, which loads nothing and runs no script but its own.

What a run recorded is hostile here: it enters the page as one block of JSON that no character in it can end, and the
document by textContent alone (assets/page.js); the content security policy admits the page's own scripts alone.

This file does NOT read run folders (page_data.py) or draw (assets/page.js, with uPlot).
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from aer_megatron.files.whole_files import replace_file
from aer_megatron.report.page_data import page_data

HTML_FILE = "report.html"
SCRIPTS = ("uPlot.iife.min.js", "page.js", "samples.js")
STYLES = ("uPlot.min.css", "page.css")


def write_html(run_folders: Sequence[str | Path], output: str | Path) -> Path:
    """Returns ``output``, replaced by the page of one run, or of several laid over one another.

    Raises:
        ValueError: a folder holds no record of a step, or a damaged one.
    """
    replace_file(Path(output), page(run_folders))
    return Path(output)


def page(run_folders: Sequence[str | Path]) -> str:
    """Returns the text of the page; raises ValueError as ``write_html``."""
    data = page_data([Path(folder) for folder in run_folders])
    labels = [str(run["label"]) for run in data["runs"]]
    title = labels[0] if len(labels) == 1 else f"{len(labels)} runs"
    styles, scripts = [_asset(name) for name in STYLES], [_asset(name) for name in SCRIPTS]
    return "\n".join(
        [
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy()}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="referrer" content="no-referrer">',
            f"<title>{html.escape(title)}</title>",
            *(f"<style>{text}</style>" for text in styles),
            '</head><body><noscript>This report draws itself: allow its scripts.</noscript><div id="page"></div>',
            f'<script type="application/json" id="data">{embedded(data)}</script>',
            *(f"<script>{text}</script>" for text in scripts),
            "</body></html>\n",
        ]
    )


def policy() -> str:
    """Returns the content security policy: the page's own scripts and styles, and where it is served its server."""
    scripts, styles = (" ".join(_digest(_asset(name)) for name in names) for names in (SCRIPTS, STYLES))
    return (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'"
    )


def embedded(data: Any) -> str:
    """Returns ``data`` as JSON that can stand in a script element: ASCII, without ``<``, ``>`` and ``&``."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _asset(name: str) -> str:
    return (resources.files("aer_megatron.report") / "assets" / name).read_text(encoding="utf-8").strip()


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
