"""What mkdocs does beyond docs/: a hook of mkdocs.yml.

Pages link to code, examples and measured tables by relative path, as a reader of the repository needs it. In the site
the tables of benchmarks/results are pages below results/, and a link to any other file outside docs/ shows the path.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)\s]+)\)")
_RESULTS = "../benchmarks/results/"


def on_files(files: Files, config: Any) -> Files:
    """Adds the tables of benchmarks/results and their pictures to the site."""
    folder = Path(config["config_file_path"]).parent / "benchmarks" / "results"
    for path in sorted(folder.iterdir()):
        if path.suffix in (".md", ".png"):
            files.append(File.generated(config, f"results/{path.name}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Returns the page with the links that leave docs/ rewritten."""
    place = posixpath.dirname(page.file.src_uri)
    return _LINK.sub(lambda link: _rewritten(link[0], link[1], link[2], place), markdown)


def _rewritten(link: str, text: str, target: str, place: str) -> str:
    path, hash_, anchor = target.partition("#")
    path = posixpath.normpath(posixpath.join(place, path))
    if not path.startswith("../"):
        return link
    if path.startswith(_RESULTS) and path.endswith(".md"):
        path = posixpath.relpath(f"results/{path.removeprefix(_RESULTS)}", place or ".")
        return f"[{text}]({path}{hash_}{anchor})"
    shown = path.removeprefix("../")
    return text if shown.endswith(text.strip("`")) else f"{text} (`{shown}`)"
