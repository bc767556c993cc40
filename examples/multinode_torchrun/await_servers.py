"""Returns once every SGLang server answers that it is healthy: python await_servers.py TIMEOUT_S URL [URL ...]

Exit code 1 and the first address that is not up, where the time is over. Standard library only.
"""

from __future__ import annotations

import sys
import time
import urllib.error
import urllib.request


def is_healthy(url: str) -> bool:
    """Returns whether the server at ``url`` takes requests."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    if len(arguments) < 2:
        print("usage: await_servers.py TIMEOUT_S URL [URL ...]", file=sys.stderr)
        return 2
    deadline = time.monotonic() + float(arguments[0])
    for url in arguments[1:]:
        while not is_healthy(url):
            if time.monotonic() > deadline:
                print(f"await_servers: {url} is not healthy after {arguments[0]} s; see its log", file=sys.stderr)
                return 1
            time.sleep(0.5)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
