"""What a verdict's label may be: snake_case, short, and few of them, because each becomes the name of a metric.

Verifiers write what they like; nothing else in the project sees a label that did not pass here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

OTHER = "other"
MAX_LENGTH = 48
MAX_LABELS = 32

_READ = 200  # characters looked at: a label of a megabyte costs nothing
_WORD_STARTS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_NO_LABEL = re.compile(r"[^a-z0-9]+")


def to_label(text: str) -> str:
    """Returns ``text`` as a label of at most 48 characters ``[a-z][a-z0-9_]*``; "other" where nothing is left of it.

    Example: ``to_label("Wrong format") == "wrong_format"``, ``to_label("HTTPError") == "http_error"``,
    ``to_label("404") == "reason_404"``
    """
    words = _WORD_STARTS.sub("_", text[:_READ]).lower()
    label = _NO_LABEL.sub("_", words).strip("_")
    if label[:1].isdigit():
        label = f"reason_{label}"
    return label[:MAX_LENGTH].rstrip("_") or OTHER


def error_label(error: BaseException) -> str:
    """Returns the label of an exception that a verifier raised, for example ``verifier_error_key_error``."""
    return to_label(f"verifier_error_{type(error).__name__}")


def bound_counts(counts: Mapping[str, int]) -> dict[str, int]:
    """Returns the 32 most frequent labels, most frequent first, ties by name; the rest is counted as "other".

    Example: ``bound_counts({"wrong": 3, "correct": 5}) == {"correct": 5, "wrong": 3}``
    """
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    kept, rest = dict(ranked[:MAX_LABELS]), sum(count for _, count in ranked[MAX_LABELS:])
    if rest:
        kept[OTHER] = kept.get(OTHER, 0) + rest
    return kept
