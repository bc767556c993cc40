"""Stand-ins for the programs that launch scripts call: aer, SGLang's server, srun and scontrol.

Each writes what it was given to a JSON file of the folder ``$RECORD``; the server also answers /health.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

_READ_BY_SCRIPTS = (
    "SLURM_", "SERVER_", "NNODES", "MASTER_", "NODE_RANK", "LOCAL_ADDR", "GPUS_PER_NODE", "SGLANG_", "GLOO_", "NCCL_",
    "OMP_",
)  # fmt: skip
_RECORD = """\
import json, os, sys
names = ("CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "OMP_NUM_THREADS", "SERVER_API_KEY")
names += ("no_proxy",)
def record(name):
    seen = {"arguments": sys.argv[1:], "environment": {key: os.environ[key] for key in names if key in os.environ}}
    path = os.path.join(os.environ["RECORD"], name)
    with open(path + ".new", "w") as file:
        json.dump(seen, file)
    os.replace(path + ".new", path + ".json")
"""
_AER = (
    _RECORD
    + """\
import signal, time
def stop(number, frame):  # a launch that stops as it was told to, after a step
    time.sleep(0.5)
    record(f"aer-{number}")
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
record("aer")
time.sleep(float(os.environ.get("FAKE_RUN_S", "0")))
sys.exit(int(os.environ.get("FAKE_EXIT_CODE", "0")))
"""
)
_SERVER = (
    _RECORD
    + """\
import http.server, subprocess
port = int(sys.argv[sys.argv.index("--port") + 1])
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])  # servers have children
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def log_message(self, *arguments): ...
server = http.server.HTTPServer(("0.0.0.0", port), Health)
record(f"server-{port}")
server.serve_forever()
"""
)
_SCONTROL = """\
import os, sys
assert sys.argv[1:3] == ["show", "hostnames"]
print(*os.environ["FAKE_NODES"].split(), sep="\\n")
"""
_SRUN = (
    _RECORD
    + """\
command = sys.argv[1:]
while command[0].startswith("--"):
    command.pop(0)
record("srun-" + os.path.basename(command[1]))
os.execvp(command[0], command)
"""
)


def install(folder: Path) -> dict[str, str]:
    """Returns the environment under which scripts find the stand-ins of ``folder``/bin first."""
    binaries, records = folder / "bin", folder / "records"
    binaries.mkdir()
    records.mkdir()
    for name, text in {"aer": _AER, "server": _SERVER, "scontrol": _SCONTROL, "srun": _SRUN}.items():
        file = binaries / name
        file.write_text(f"#!{sys.executable}\n{text}")
        file.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_READ_BY_SCRIPTS)}
    python = Path(sys.executable).parent
    return kept | {
        "PATH": f"{binaries}:{python}:{os.environ['PATH']}",
        "RECORD": str(records),
        "SGLANG_PYTHON": str(binaries / "server"),
        "SERVER_START_TIMEOUT_S": "60",
    }


def recorded(environment: dict[str, str], name: str) -> dict[str, Any]:
    """Returns what the stand-in ``name`` was given."""
    table: dict[str, Any] = json.loads((Path(environment["RECORD"]) / f"{name}.json").read_text())
    return table


def free_ports(count: int) -> int:
    """Returns the first of ``count`` ports in a row that are free now."""
    for first in range(31000 + os.getpid() % 500 * 20, 60000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("0.0.0.0", port))
        except OSError:
            continue
        return first
    raise RuntimeError("no free ports")
