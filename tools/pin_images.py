"""Writes the digests of the base images into the Dockerfile's arguments, so that a tag that moves changes no build.

    python tools/pin_images.py [--docker docker] [--check]

`docker buildx imagetools inspect` asks the registry; no image is downloaded. ARG CUDA=nvidia/cuda:13.0.2-... becomes
ARG CUDA=nvidia/cuda:13.0.2-...@sha256:...; one that is pinned is asked for anew by its tag. With --check nothing is
written.

Exit codes: 0 all pinned (with --check: and current), 1 with --check: some are not, 2 the registry cannot be asked.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

DOCKERFILE = Path(__file__).resolve().parents[1] / "Dockerfile"
_BASE = re.compile(r"^ARG (\w+)=([\w./-]+:[\w.-]+)(@sha256:[0-9a-f]{64})?$", re.MULTILINE)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def base_images(text: str) -> dict[str, tuple[str, str]]:
    """Returns argument -> (image with tag, "@sha256:..." or "") of the Dockerfile ``text``."""
    return {name: (image, digest) for name, image, digest in _BASE.findall(text)}


def registry_digest(docker: str, image: str) -> str:
    """Returns the digest of ``image``, all platforms together.

    Raises:
        RuntimeError: docker is not there, or the registry does not answer.
    """
    command = [docker, "buildx", "imagetools", "inspect", "--format", "{{.Manifest.Digest}}", image]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{docker} cannot be asked for {image}: {error}") from None
    digest = done.stdout.strip()
    if done.returncode or not _DIGEST.fullmatch(digest):
        raise RuntimeError(f"no digest of {image}: {(done.stderr or digest).strip()[:300]}")
    return digest


def pinned(text: str, digests: dict[str, str]) -> str:
    """Returns ``text`` with the digest of every argument in ``digests``."""
    return _BASE.sub(lambda m: f"ARG {m[1]}={m[2]}@{digests[m[1]]}" if m[1] in digests else m[0], text)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docker", default="docker", help="default %(default)s")
    parser.add_argument("--dockerfile", type=Path, default=DOCKERFILE, help="default: the project's")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a digest is not current")
    options = parser.parse_args(arguments)
    try:
        text = options.dockerfile.read_text(encoding="utf-8")
        images = base_images(text)
        digests = {name: registry_digest(options.docker, image) for name, (image, _) in images.items()}
    except (OSError, RuntimeError) as error:
        print(f"pin_images: {error}", file=sys.stderr)
        return 2
    for name, (image, _) in images.items():
        print(f"{name}={image}@{digests[name]}")
    changed = pinned(text, digests)
    if options.check:
        return int(changed != text)
    options.dockerfile.write_text(changed, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
