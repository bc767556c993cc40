"""Data sets of the Hugging Face hub as local Parquet files, by huggingface_hub: the hub's own conversion of each set.

The hub converts public sets to Parquet, on the branch refs/convert/parquet, as SUBSET/SPLIT/0000.parquet. So no code of
a set is ever run, and one reader serves them all. Files stay in the cache of huggingface_hub (HF_HOME), which serves
them without a network, too; HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are its own.

This file does NOT read the files (data/rows.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

_BRANCH = "refs/convert/parquet"
_FILE = re.compile(r"(\w[\w.-]*)/(\w[\w.-]*)/[0-9]{4,6}\.parquet", re.ASCII)
_MAX_LISTED = 100_000
_MAX_BYTES = 8 << 30


def dataset_files(dataset: str, *, split: str, subset: str | None = None) -> list[Path]:
    """Returns the Parquet files of a split, in order, downloaded unless the cache has them.

    Raises:
        ValueError: the hub has no such set, subset or split, or it is not public, not converted whole, or too large.
        RuntimeError: the hub cannot be reached, and the cache does not hold the split.
    """
    # half a second to import, for this source only
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    name = f"dataset={dataset!r}"
    try:
        sizes = _listed(dataset)
        chosen = _choose(sizes, name, split, subset)
        folder = snapshot_download(
            dataset, repo_type="dataset", revision=_BRANCH, allow_patterns=chosen, tqdm_class=_TerminalBar
        )
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"{name} is no set that the hub gives: {_reason(error)}; see HF_TOKEN and HF_ENDPOINT"
        ) from None
    except RevisionNotFoundError:
        raise ValueError(f"{name} has no Parquet form on the hub; download its files and give the path") from None
    except (HTTPError, OSError) as error:  # no network, or a hub that fails: what an earlier run left will do
        folder, sizes = _cached(dataset, split, subset, error)
        chosen = _choose(sizes, name, split, subset)
    return [Path(folder) / file for file in chosen]


def _listed(dataset: str) -> dict[str, int]:
    """Returns {file: bytes} of the set's Parquet form; errors as huggingface_hub's, RuntimeError for what is no hub."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, HTTPError

    try:
        # the first request fails at once where there is no network; the listing would be tried for half a minute
        commit = HfApi().dataset_info(dataset, revision=_BRANCH).sha
        tree = HfApi().list_repo_tree(dataset, recursive=True, revision=commit, repo_type="dataset")
        sizes = {item.path: getattr(item, "size", None) for item in islice(tree, _MAX_LISTED)}
        return {str(path): size for path, size in sizes.items() if isinstance(size, int)}
    except (HTTPError, HFValidationError):
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RuntimeError(
            f"{constants.ENDPOINT} answers what no hub does: {_reason(error)}; see HF_ENDPOINT"
        ) from None


def _cached(dataset: str, split: str, subset: str | None, error: Exception) -> tuple[str, dict[str, int]]:
    """Returns the folder of the cache that holds the split whole, and {file: bytes}."""
    from huggingface_hub import constants, snapshot_download

    wanted = f"{subset or '*'}/{split}/*.parquet"
    try:
        folder = snapshot_download(
            dataset, repo_type="dataset", revision=_BRANCH, allow_patterns=wanted, local_files_only=True
        )
    except OSError:
        raise RuntimeError(
            f"dataset={dataset!r} is not in the cache and {constants.ENDPOINT} cannot give it: {_reason(error)}; "
            "give the machine a network, or download the set elsewhere and give its path"
        ) from error
    files = Path(folder).glob("*/*/*.parquet")
    return folder, {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def _choose(sizes: Mapping[str, int], name: str, split: str, subset: str | None) -> list[str]:
    """Returns the files of one split of one subset; raises ValueError with what there is instead."""
    found = {file: match.groups() for file in sorted(sizes) if (match := _FILE.fullmatch(file))}
    subsets = sorted({has for has, _ in found.values()})
    if subset is None and len(subsets) != 1:
        raise ValueError(f"{name} has {_list_of(subsets, 'subset')}; give subset")
    subset = subset or subsets[0]
    chosen = [file for file, place in found.items() if place == (subset, split)]
    splits = sorted({has for within, has in found.values() if within == subset})
    if not splits:
        raise ValueError(f"subset={subset!r} is none of {name}, which has {_list_of(subsets, 'subset')}")
    if not chosen:
        hint = ", of which the hub's Parquet form is cut" if f"partial-{split}" in splits else ""
        raise ValueError(
            f"split={split!r} is none of {name}, subset {subset!r}{hint}; it has {_list_of(splits, 'split')}"
        )
    num_bytes = sum(sizes[file] for file in chosen)
    if num_bytes > _MAX_BYTES:
        raise ValueError(f"{name}, split {split!r} has {num_bytes} bytes; at most {_MAX_BYTES} are read: give a path")
    return chosen


def _list_of(names: list[str], what: str) -> str:
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return f"the {what}s {', '.join(names[:20])}{more}" if names else f"no {what}"


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class _TerminalBar(tqdm):  # type: ignore[type-arg]
    """A progress bar that is not drawn into a file: every rank of a run downloads."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options | {"disable": None})
