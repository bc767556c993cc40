#!/usr/bin/env bash
# Asks pip-audit for known vulnerabilities of every pin: bash tools/audit.sh PYTHON. It needs a package index and the
# advisory service; AUDIT_OFFLINE=1 leaves it out and says so. pip-audit gets an environment of its own, build/pip-audit.
# Exit code 0: none found; 1: some found, or it could not be asked.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${1:-.venv/bin/python}

if [ -n "${AUDIT_OFFLINE:-}" ]; then
    echo "audit: AUDIT_OFFLINE is set: vulnerabilities were NOT looked up"
    exit 0
fi
if [ ! -x build/pip-audit/bin/pip-audit ]; then
    "$python" -m venv build/pip-audit
    if ! build/pip-audit/bin/python -m pip --quiet --disable-pip-version-check install 'pip-audit>=2.9,<3'; then
        rm -rf build/pip-audit
        echo "audit: pip-audit cannot be installed: vulnerabilities were NOT looked up (AUDIT_OFFLINE=1 leaves them out)" >&2
        exit 1
    fi
fi
found=0
for pins in constraints/*.txt; do
    echo "audit: $pins"
    # CVE-2025-69872 (diskcache) is not reached: docs/security.md
    build/pip-audit/bin/pip-audit --requirement "$pins" --no-deps --disable-pip \
        --ignore-vuln CVE-2025-69872 --progress-spinner off || found=1
done
exit $found
