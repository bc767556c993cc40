"""Twenty AER updates with two real SGLang servers and TP=2 training, per transport; marker ``sglang``."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from aer_megatron._C import DifficultyLedger
from aer_megatron.sglang.server import ServerGroup
from aer_megatron.sglang.transports import TRANSPORTS
from tests.support.real_servers import (
    export_last_checkpoint,
    processes_writing,
    real_server_options,
    served,
    served_difference,
)
from tests.support.runs import ROOT, environment, metric_lines, train, train_command, write_run_file

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(1800)]

NUM_UPDATES = 20
NUM_STEPS = NUM_UPDATES + 1  # the last one measures what the 20th update left
REQUESTS_PER_STEP = 8 * 4


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run file and a supervised base model."""
    folder = tmp_path_factory.mktemp("sglang")
    run_file = write_run_file(folder)
    made = train(run_file, "--stage=sft")
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="module")
def urls(base: Path) -> Iterator[list[str]]:
    """Two servers for all transports: what one left on them must not disturb the next."""
    with ServerGroup(2, real_server_options(base / "base", base / "logs")) as group:
        yield group.start()
    assert processes_writing(base / "logs") == []


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_served_weights_and_log_probabilities_are_the_trainer_s(transport: str, urls: list[str], base: Path) -> None:
    output, model = base / transport, base / "base"
    command = train_command(
        base / "run.toml",
        "--rollout.engine=sglang",
        f"--sglang.urls={json.dumps(urls)}",
        f"--sglang.transport={transport}",
        "--parallel.tp=2",
        f"--run.num_steps={NUM_STEPS}",
        "--eval.sets={}",
        "--run.checkpoint_every=0",
        f"--run.output_dir={output}",
        ranks=2,
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, env=environment(), cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = metric_lines(output)
    assert [line["step"] for line in lines] == list(range(NUM_STEPS))
    for line in lines:  # step 0, and after every update
        assert line["rollout/logprob_diff_max"] < 1e-3
        assert sum(count for name, count in line.items() if name.startswith("rewards/reason/")) == REQUESTS_PER_STEP
    exported = export_last_checkpoint(output, model, output / "exported")
    ranks, versions = served(urls)
    assert [version.partition("/")[2] for version in versions] == [str(NUM_STEPS)] * 2
    assert [served_difference(exported, of_server) for of_server in ranks] == ["", ""]
    (checkpoint,) = (output / "checkpoints").glob("step_*")
    ledger = DifficultyLedger.load(str(checkpoint / "ledger"))
    assert ledger.export().attempts.sum() == NUM_STEPS * REQUESTS_PER_STEP
    assert not (output / "weights").exists()
