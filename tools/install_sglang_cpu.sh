#!/usr/bin/env bash
# Makes VENV (default .venv-sglang) with an SGLang server that runs without a GPU; nothing to do when it is current.
# Usage: install_sglang_cpu.sh [VENV] [PYTHON]
#
# Packages come from pip as it is configured; torch has to resolve to its CPU build (pip's find-links or index options).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${1:-.venv-sglang}
python=${2:-.venv/bin/python}
pins=constraints/sglang-cpu.txt
shim=tools/sglang_cpu
stamp=$venv/.installed

if [ -f "$stamp" ] && [ -z "$(find "$pins" "$shim" tools/install_sglang_cpu.sh -type f ! -name '*.pyc' -newer "$stamp")" ]; then
    exit 0
fi
"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || {
    echo "install_sglang_cpu: the pins are for Python 3.11, but $python is another version; pass a Python 3.11" >&2
    exit 1
}
echo "install_sglang_cpu: SGLang into $venv (two minutes)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
echo '*' >"$venv/.gitignore"
"$venv/bin/python" -m pip --quiet --quiet --disable-pip-version-check install --no-deps --requirement "$pins" || {
    echo "install_sglang_cpu: pip could not install $pins (its message is above); no configured package index or" >&2
    echo "  find-links folder has the pinned packages, or it cannot be reached: see 'python -m pip config list'" >&2
    exit 1
}
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
cp -r "$shim/aer_sglang_cpu.py" "$shim/sgl_kernel" "$site/"
echo 'import aer_sglang_cpu' >"$site/aer_sglang_cpu.pth"
SGLANG_USE_CPU_ENGINE=1 "$venv/bin/python" - <<'EOF' || {
import torch
assert torch.version.cuda is None, f"torch {torch.__version__} is a CUDA build"
import sglang.srt.server_args
EOF
    echo "install_sglang_cpu: the server's packages do not import; is torch its CPU build? (pip config: find-links)" >&2
    exit 1
}
touch "$stamp"
echo "install_sglang_cpu: done"
