"""Writes what is installed as a CycloneDX 1.6 document, with versions and licences, from the packages' own metadata.

    python tools/sbom.py [--extra test] [--output build/sbom.cdx.json] [--licences build/licences.md]

It lists aer-megatron and everything that it needs, directly or not, as this environment has it, and what the repository
holds of others (scope "excluded": it is not installed). The same environment gives the same bytes: there is no time in
it. Exit code 1 where a needed package is not installed (each is named).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import uuid
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT_PACKAGE = "aer-megatron"
_NAMESPACE = uuid.UUID("6ba7b811-9dad-11d1-80b4-00c04fd430c8")  # uuid's own for URLs
_NO_LICENCE = "not stated"
# cpp/third_party, which is not installed, and aer_megatron/report/assets, which is
_IN_THE_REPOSITORY: tuple[dict[str, Any], ...] = (
    {
        "type": "library",
        "bom-ref": "pkg:github/doctest/doctest@v2.5.2",
        "name": "doctest",
        "version": "2.5.2",
        "scope": "excluded",
        "licenses": [{"expression": "MIT"}],
        "purl": "pkg:github/doctest/doctest@v2.5.2",
    },
    {
        "type": "library",
        "bom-ref": "pkg:npm/uplot@1.6.32",
        "name": "uplot",
        "version": "1.6.32",
        "licenses": [{"expression": "MIT"}],
        "purl": "pkg:npm/uplot@1.6.32",
    },
)


def normal(name: str) -> str:
    """Returns the name under which the package index knows a distribution."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, metadata.Distribution]:
    """Returns the distributions of this environment by their normalised names; the first on the path counts."""
    found: dict[str, metadata.Distribution] = {}
    for distribution in metadata.distributions():
        if distribution.metadata["Name"]:
            found.setdefault(normal(distribution.metadata["Name"]), distribution)
    return found


def needs(distribution: metadata.Distribution, extras: Iterable[str]) -> set[tuple[str, frozenset[str]]]:
    """Returns (name, extras) of what a distribution requires here."""
    found = set()
    for text in distribution.requires or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            found.add((normal(requirement.name), frozenset(requirement.extras)))
    return found


def closure(root: str, extras: Iterable[str]) -> tuple[dict[str, set[str]], set[str]]:
    """Returns (name -> names of what it needs, names that are needed and not installed)."""
    here = installed()
    graph: dict[str, set[str]] = {}
    missing: set[str] = set()
    waiting = [(normal(root), frozenset(extras))]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        name, wanted = waiting.pop()
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        if name not in here:
            missing.add(name)
            continue
        required = needs(here[name], wanted)
        graph.setdefault(name, set()).update(other for other, _ in required if other in here)
        waiting += sorted(required, key=lambda item: item[0])
    return graph, missing


def licence(distribution: metadata.Distribution) -> dict[str, Any]:
    """Returns CycloneDX's entry for the licence that the metadata states: an SPDX expression, or its name as text."""
    names = ("License-Expression", "License", "Classifier")
    fields = {name: distribution.metadata.get_all(name) or [] for name in names}
    if fields["License-Expression"]:
        return {"expression": fields["License-Expression"][0]}
    classifiers = [text for text in fields["Classifier"] if text.startswith("License ::")]
    known = sorted({text.rsplit(" :: ", 1)[-1] for text in classifiers} - {"OSI Approved"})
    stated = "".join(fields["License"][:1]).strip()
    if not known and stated:
        known = [stated.splitlines()[0].strip()[:120]]
    return {"license": {"name": " AND ".join(known) or _NO_LICENCE}}


def licence_text(entry: dict[str, Any]) -> str:
    """Returns the words of a licence entry."""
    return str(entry.get("expression") or entry["license"]["name"])


def purl(distribution: metadata.Distribution) -> str:
    """Returns the package URL of a distribution."""
    return f"pkg:pypi/{normal(distribution.metadata['Name'])}@{distribution.version.replace('+', '%2B')}"


def component(distribution: metadata.Distribution, kind: str = "library") -> dict[str, Any]:
    """Returns the document's entry for a distribution."""
    reference = purl(distribution)
    return {
        "type": kind,
        "bom-ref": reference,
        "name": normal(distribution.metadata["Name"]),
        "version": distribution.version,
        "licenses": [licence(distribution)],
        "purl": reference,
    }


def document(graph: dict[str, set[str]]) -> dict[str, Any]:
    """Returns the CycloneDX document of a dependency graph over installed distributions."""
    here = installed()
    names = sorted(graph)
    body = {
        "metadata": {
            "component": component(here[normal(ROOT_PACKAGE)], "application"),
            "tools": {"components": [{"type": "application", "name": "tools/sbom.py of aer-megatron"}]},
        },
        "components": [*(component(here[name]) for name in names if name != normal(ROOT_PACKAGE)), *_IN_THE_REPOSITORY],
        "dependencies": [
            *(
                {"ref": purl(here[name]), "dependsOn": sorted(purl(here[other]) for other in graph[name])}
                for name in names
            ),
            *({"ref": item["bom-ref"], "dependsOn": []} for item in _IN_THE_REPOSITORY),
        ],
    }
    serial = uuid.uuid5(_NAMESPACE, json.dumps(body, sort_keys=True))
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{serial}",
        "version": 1,
        **body,
    }


def licence_table(bom: dict[str, Any]) -> str:
    """Returns a Markdown table of packages, versions and licences."""
    rows = [
        f"| {item['name']} | {item['version']} | {licence_text(item['licenses'][0])} |" for item in bom["components"]
    ]
    return "\n".join(["| package | version | licence |", "|---|---|---|", *rows]) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extra", action="append", default=[], help="an extra of aer-megatron; may be repeated")
    parser.add_argument("--output", type=Path, default=Path("build/sbom.cdx.json"), help="default %(default)s")
    parser.add_argument("--licences", type=Path, default=Path("build/licences.md"), help="default %(default)s")
    options = parser.parse_args(arguments)
    graph, missing = closure(ROOT_PACKAGE, options.extra)
    if missing:
        print(f"sbom: not installed: {', '.join(sorted(missing))}; run make install first", file=sys.stderr)
        return 1
    bom = document(graph)
    for path, text in ((options.output, json.dumps(bom, indent=1) + "\n"), (options.licences, licence_table(bom))):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    silent = [item["name"] for item in bom["components"] if licence_text(item["licenses"][0]) == _NO_LICENCE]
    print(f"{options.output}: {len(bom['components'])} packages; {options.licences}")
    if silent:
        print(f"no licence in their metadata: {', '.join(silent)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
