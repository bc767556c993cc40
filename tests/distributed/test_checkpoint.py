"""Checkpoints: resumed == never interrupted, bit for bit; damage and foreign checkpoints stop every rank alike.

Each group of processes runs all its scenarios once (importing Megatron-Core costs more than they do); the tests look at
what the ranks brought back.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from aer_megatron.parallel.platform import install_platform
from tests.support.actor_snapshots import differences, snapshot
from tests.support.policies import build_actor, fixed_batch, policy_config, tiny_hf_model
from tests.support.spawn import run_distributed

STATE = {"controller": {"alpha": 0.1 + 0.2, "initial_entropy": None}, "cursor": {"epoch": 1, "position": 7}}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "tp1-fp32": {"world": 1},
    "tp1-bf16": {"world": 1, "dtype": "bf16"},
    "tp1-fp32-dropout": {"world": 1, "megatron": DROPOUT},
    "tp2-fp32": {"world": 2, "tp": 2},
    "tp2-bf16": {"world": 2, "tp": 2, "dtype": "bf16"},
    "tp2-fp32-dropout": {"world": 2, "tp": 2, "megatron": DROPOUT},
    "dp2-fp32": {"world": 2},
    "dp2-bf16": {"world": 2, "dtype": "bf16"},
    "dp2-bf16-dropout": {"world": 2, "dtype": "bf16", "megatron": DROPOUT},
    "pp2-fp32": {"world": 2, "pp": 2},
    "vpp2-bf16": {"world": 2, "pp": 2, "vpp": 2, "dtype": "bf16", "num_layers": 4},
    "cp2-fp32-packed": {"world": 2, "cp": 2, "tokens_per_micro_batch": 64},
}
BESIDE = ("tp2-bf16", "dp2-fp32")
PLACES = ("in place", "beside")
RESHARDINGS = {
    "tp2-dp2-tied-fp32": ({"tp": 2}, {}, True),
    "tp2-pp2-tied-bf16": ({"tp": 2, "dtype": "bf16"}, {"pp": 2, "dtype": "bf16"}, True),
    "pp2-dp2-untied-bf16": ({"pp": 2, "dtype": "bf16"}, {"dtype": "bf16"}, False),
    "dp2-tp2-untied-fp32": ({}, {"tp": 2}, False),
    "vpp2-cp2-tied-fp32": ({"pp": 2, "vpp": 2, "num_layers": 4}, {"cp": 2, "num_layers": 4}, True),
    "cp2-dp2-untied-bf16": ({"cp": 2, "dtype": "bf16"}, {"dtype": "bf16"}, False),
    "tp2-vpp2-untied-fp32": ({"tp": 2, "num_layers": 4}, {"pp": 2, "vpp": 2, "num_layers": 4}, False),
}


def _config(*, dtype: str = "fp32", megatron: dict[str, Any] | None = None, **case: Any) -> Any:
    names = ("tp", "pp", "vpp", "cp", "tokens_per_micro_batch")
    return policy_config(
        model={"dtype": dtype},
        parallel={name: case[name] for name in names if name in case},
        data={"max_prompt_tokens": 8},
        rollout={"max_new_tokens": 8},
        optimizer={"decay": "linear", "warmup_steps": 3},  # every update has its own learning rate
        megatron=megatron or {},
    )


def _actor(*, poisoned: bool = False, tied: bool = True, **case: Any) -> Any:
    from aer_megatron.checkpoint.tensors import optimizer_pieces

    model = tiny_hf_model(tied=tied, num_layers=case.get("num_layers", 2))
    actor = build_actor(_config(**case), model=model)
    if poisoned:  # whatever a load forgets is seen
        with torch.no_grad():
            for parameter in actor.model.parameters():
                parameter.fill_(float("nan"))
            for piece in optimizer_pieces(actor):
                piece.tensors()["param"].fill_(float("nan"))
    return actor


def _store(actor: Any, folder: Path, keep: int = 2) -> Any:
    from aer_megatron.checkpoint.store import CheckpointStore

    return CheckpointStore(folder, topology=actor.topology, device=torch.device("cpu"), keep=keep)


def _train(actor: Any, updates: range) -> list[tuple[Any, ...]]:
    stats = [actor.train(fixed_batch(seed=seed), seed=seed, entropy_gradient=True) for seed in updates]
    return [(s.grad_norm, s.learning_rate, dict(s.sums)) for s in stats]


def _resume(folder: Path, case: dict[str, Any]) -> dict[str, Any]:
    """Two updates, save, two more; then the same two more by a new actor that loaded the checkpoint."""
    from aer_megatron.checkpoint.tensors import set_rng

    actor = _actor(**case)
    _train(actor, range(2))
    at_save = snapshot(actor)
    store = _store(actor, folder)
    store.save(actor, step=2, state=STATE, files={"ledger": lambda path: path.write_bytes(b"ledger")})
    result: dict[str, Any] = {"save_changed": differences(at_save, snapshot(actor))}
    straight_stats, straight = _train(actor, range(2, 4)), snapshot(actor)

    resumed = _actor(poisoned=True, **case)
    store = _store(resumed, folder)
    checkpoint = store.latest()
    result["state"] = store.load(checkpoint, resumed)
    result["ledger"] = checkpoint.path_of("ledger").read_bytes()
    result["num_updates"] = resumed.num_updates
    result["after_load"] = differences(at_save, snapshot(resumed))
    result["stats"] = (straight_stats, _train(resumed, range(2, 4)))
    result["after_training"] = differences(straight, snapshot(resumed))

    reseeded = _actor(poisoned=True, **case)
    fresh_rng = {name: value for name, value in snapshot(reseeded).items() if name.startswith("rng/")}
    store.load(checkpoint, reseeded)
    set_rng({name.removeprefix("rng/"): value for name, value in fresh_rng.items()})
    _train(reseeded, range(2, 4))
    result["with_other_rng"] = [n for n in differences(straight, snapshot(reseeded)) if n.startswith("model/")]
    return result


def _all_resumes(folder: str, world_size: int) -> dict[str, Any]:
    cases = {name: case for name, case in CASES.items() if case["world"] == world_size}
    return {name: _resume(Path(folder) / name, case) for name, case in cases.items()}


def _reshard(folder: Path, one: dict[str, Any], two: dict[str, Any], tied: bool) -> dict[str, Any]:
    """Layout one -> layout two -> layout one: the way there and back must change nothing at all."""
    first = _actor(tied=tied, **one)
    _train(first, range(2))
    _store(first, folder / "one").save(first, step=2, state=STATE, files={})
    at_save = snapshot(first)
    weights = {name: tensor.clone() for name, tensor in first.hf_weights()}
    straight = _train(first, range(2, 4))

    second = _actor(tied=tied, poisoned=True, **two)
    store = _store(second, folder / "one")
    store.load(store.latest(), second)
    loaded = {name: tensor.clone() for name, tensor in second.hf_weights()}
    _store(second, folder / "two").save(second, step=2, state=STATE, files={})
    resumed = _train(second, range(2, 4))

    third = _actor(tied=tied, poisoned=True, **one)
    store = _store(third, folder / "two")
    store.load(store.latest(), third)
    there_and_back = [name for name in differences(at_save, snapshot(third)) if not name.startswith("rng/")]
    return {
        "weights": differences(weights, loaded),
        "there_and_back": there_and_back,
        "grad_norms": ([s[0] for s in straight], [s[0] for s in resumed]),
        "rates": ([s[1] for s in straight], [s[1] for s in resumed]),
    }


def _refused(work: Callable[[], Any]) -> str:
    """The exception's text; "" where there was none."""
    try:
        work()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _damaged_loads(folder: Path, rank: int) -> dict[str, str]:
    """What a load says after one file was damaged; rank 0 damages, the file is rank 1's."""
    actor = _actor(tp=2)
    _train(actor, range(1))
    store = _store(actor, folder, keep=1)
    checkpoint = store.save(actor, step=1, state=STATE, files={"ledger": lambda path: path.write_bytes(b"ledger")})
    target = _actor(tp=2)
    before = snapshot(target)
    theirs = checkpoint.folder / "optimizer-tp01-pp00-dp000.safetensors"
    content = theirs.read_bytes()
    damages: dict[str, tuple[Path, bytes | None]] = {
        "truncated": (theirs, content[:-100]),
        "changed": (theirs, content[:-1] + bytes([content[-1] ^ 1])),
        "missing": (theirs, None),
        "ledger": (checkpoint.folder / "ledger", b"led"),
    }
    messages = {}
    for name, (path, damaged) in damages.items():
        intact = path.read_bytes()
        torch.distributed.barrier()
        if rank == 0:
            path.unlink() if damaged is None else path.write_bytes(damaged)
        torch.distributed.barrier()
        messages[name] = _refused(lambda: store.load(checkpoint, target))
        torch.distributed.barrier()
        if rank == 0:
            path.write_bytes(intact)
    torch.distributed.barrier()
    messages["untouched"] = ",".join(differences(before, snapshot(target)))
    messages["intact"] = _refused(lambda: store.load(checkpoint, target))

    torch.distributed.barrier()
    manifest = checkpoint.folder / "manifest.json"
    if rank == 0:
        manifest.write_bytes(manifest.read_bytes()[:500])
    torch.distributed.barrier()
    messages["manifest"] = _refused(store.latest)
    return messages


def _foreign_loads(folder: Path) -> dict[str, str]:
    actor = _actor(tp=2)
    store = _store(actor, folder)
    checkpoint = store.save(actor, step=1, state=STATE, files={})
    messages = {"dtype": _refused(lambda: store.load(checkpoint, _actor(tp=2, dtype="bf16")))}
    messages["model"] = _refused(lambda: store.load(checkpoint, _actor(tp=2, tied=False)))
    messages["path_of"] = _refused(lambda: checkpoint.path_of("ledger"))
    return messages


def _failing_saves(folder: Path, rank: int) -> dict[str, Any]:
    """A full disk on either rank: both hear of it and the checkpoint before it stays the newest."""
    actor = _actor(tp=2)
    store = _store(actor, folder, keep=2)
    result: dict[str, Any] = {"empty": store.latest()}
    for step in (1, 2, 3):
        store.save(actor, step=step, state={"step": step}, files={})
    result["kept"] = sorted(path.name for path in folder.iterdir())
    torch.distributed.barrier()  # the next save writes into the folder

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    result["file"] = _refused(lambda: store.save(actor, step=4, state={}, files={"ledger": full}))
    result["tensors"] = _refused(lambda: _save_on_broken_disk(store, actor, broken=rank == 1))
    result["latest"] = store.latest().state
    result["earlier"] = _refused(lambda: store.save(actor, step=2, state={}, files={}))
    result["name"] = _refused(lambda: store.save(actor, step=5, state={}, files={"../ledger": full}))
    store.save(actor, step=3, state={"step": "again"}, files={})
    result["again"] = store.latest().state
    result["left"] = sorted(path.name for path in folder.iterdir())
    return result


def _save_on_broken_disk(store: Any, actor: Any, *, broken: bool) -> None:
    from aer_megatron.checkpoint import buffer as checkpoint_buffer

    def failing(path: Path) -> Any:
        raise OSError(28, "No space left on device", str(path))

    working = checkpoint_buffer.new_file
    checkpoint_buffer.new_file = failing if broken else working  # type: ignore[assignment]
    try:
        store.save(actor, step=4, state={}, files={})
    finally:
        checkpoint_buffer.new_file = working


def _beside(folder: Path, rank: int, case: dict[str, Any]) -> dict[str, Any]:
    """Saves of the same moment, one in place and one beside training, whose files are written only after it."""
    from aer_megatron.checkpoint import buffer as checkpoint_buffer

    actor = _actor(**case)
    _train(actor, range(1))
    files = {"ledger": lambda path: path.write_bytes(b"ledger")}
    _store(actor, folder / "in place").save(actor, step=1, state=STATE, files=files)
    trained, whole = threading.Event(), checkpoint_buffer.new_file
    store = _store(actor, folder / "beside")

    def late(path: Path) -> Any:
        assert trained.wait(60)
        return whole(path)

    checkpoint_buffer.new_file = late  # type: ignore[assignment]
    try:
        store.begin(actor, step=1, state=STATE, files=files, beside=True)
        twice = _refused(lambda: store.begin(actor, step=2, state=STATE, files=files, beside=True))
        while_written = store.newest()
        _train(actor, range(1, 3))
        trained.set()
        store.wait()
    finally:
        checkpoint_buffer.new_file = whole
    torch.distributed.barrier()
    one, two = ({p.name: p.read_bytes() for p in (folder / kind / "step_00000001").iterdir()} for kind in PLACES)
    result: dict[str, Any] = {
        "names": (sorted(one), sorted(two)),
        "differ": [name for name in one if one[name] != two.get(name)],
        "twice": twice,
        "while_written": while_written,
    }

    def broken(path: Path) -> Any:
        raise OSError(28, "No space left on device", str(path))

    checkpoint_buffer.new_file = broken if rank == 1 else whole  # type: ignore[assignment]
    try:
        store.begin(actor, step=2, state=STATE, files=files, beside=True)
        _train(actor, range(3, 4))
        result["broken"] = _refused(store.wait)
    finally:
        checkpoint_buffer.new_file = whole
    torch.distributed.barrier()
    result["left"] = sorted(path.name for path in (folder / "beside").iterdir())
    torch.distributed.barrier()
    store.begin(actor, step=3, state=STATE, files=files, beside=True)
    store.wait()
    result["again"] = store.newest()
    return result


def _one_rank(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    install_platform()
    return {"resume": _all_resumes(folder, world_size)}


def _two_ranks(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    install_platform()
    path = Path(folder)
    return {
        "resume": _all_resumes(folder, world_size),
        "reshard": {name: _reshard(path / name, *layouts) for name, layouts in RESHARDINGS.items()},
        "damaged": _damaged_loads(path / "damaged", rank),
        "foreign": _foreign_loads(path / "foreign"),
        "failing": _failing_saves(path / "failing", rank),
        "beside": {name: _beside(path / f"beside-{name}", rank, CASES[name]) for name in BESIDE},
    }


def _four_ranks(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    install_platform()
    return _resume(Path(folder), {"tp": 2, "dtype": "bf16"})


def _killed_in_save(rank: int, world_size: int, folder: str) -> None:
    install_platform()
    actor = _actor()
    store = _store(actor, Path(folder))
    store.save(actor, step=1, state={"step": 1}, files={})
    kill = {"ledger": lambda path: os.kill(os.getpid(), signal.SIGKILL)}
    store.begin(actor, step=2, state={"step": 2}, files=kill, beside=True)
    store.wait()


def _after_the_kill(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    install_platform()
    path = Path(folder)
    actor = _actor()
    store = _store(actor, path)
    result: dict[str, Any] = {"found": sorted(p.name for p in path.iterdir())}
    result["state"] = store.load(store.latest(), actor)
    store.save(actor, step=2, state={"step": 2}, files={})
    result["left"] = sorted(p.name for p in path.iterdir())
    return result


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_distributed(_one_rank, 1, str(tmp_path_factory.mktemp("one")), timeout_s=300)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_distributed(_two_ranks, 2, str(tmp_path_factory.mktemp("two")), timeout_s=600)


def _assert_resumed(result: dict[str, Any], *, dropout: bool = False) -> None:
    assert result["save_changed"] == []
    assert result["after_load"] == []
    assert result["stats"][0] == result["stats"][1]
    assert result["after_training"] == []
    assert result["num_updates"] == 2
    assert result["state"] == STATE
    assert result["ledger"] == b"ledger"
    # the control: with dropout, and only then, the random-number states decide the weights
    assert bool(result["with_other_rng"]) == dropout


@pytest.mark.parametrize("name", CASES)
def test_resumed_run_is_the_run_never_interrupted(name: str, request: pytest.FixtureRequest) -> None:
    ranks = request.getfixturevalue("one_rank" if CASES[name]["world"] == 1 else "two_ranks")
    for rank in ranks:
        _assert_resumed(rank["resume"][name], dropout="megatron" in CASES[name])


def test_four_ranks_resume_bit_for_bit(tmp_path: Path) -> None:
    for result in run_distributed(_four_ranks, 4, str(tmp_path), timeout_s=600):
        _assert_resumed(result)


@pytest.mark.parametrize("name", RESHARDINGS)
def test_other_layout_reads_the_same_weights_and_moments(name: str, two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        result = rank["reshard"][name]
        assert result["weights"] == []
        assert result["there_and_back"] == []
        assert result["rates"][0] == result["rates"][1]
        tolerance = 0.05 if "bf16" in name else 1e-4
        assert result["grad_norms"][1] == pytest.approx(result["grad_norms"][0], rel=tolerance)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("truncated", ["optimizer-tp01-pp00-dp000.safetensors has", "bytes, expected", "remove the folder step_0"]),
        ("changed", ["optimizer-tp01-pp00-dp000.safetensors has changed", "SHA-256"]),
        ("missing", ["optimizer-tp01-pp00-dp000.safetensors is missing"]),
        ("ledger", ["ledger has 3 bytes, expected 6"]),
        ("manifest", ["manifest.json is not a complete checkpoint manifest", "remove the folder step_00000001"]),
    ],
)
def test_damaged_file_is_named_on_every_rank(damage: str, words: list[str], two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        message = rank["damaged"][damage]
        assert message.startswith("ValueError: ")
        assert [word for word in words if word not in message] == []


def test_failed_load_leaves_the_actor_untouched(two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        assert rank["damaged"]["untouched"] == ""
        assert rank["damaged"]["intact"] == ""


def test_foreign_checkpoint_is_refused_on_every_rank(two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        foreign = rank["foreign"]
        assert "ValueError" in foreign["model"] and "tied_embeddings is True there and False" in foreign["model"]
        assert "ValueError" in foreign["dtype"] and "model.dtype is 'bf16'" in foreign["dtype"]
        assert "holds no 'ledger'" in foreign["path_of"]


def test_failed_save_keeps_the_checkpoint_before_it(two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        failing = rank["failing"]
        assert failing["empty"] is None
        assert failing["kept"] == ["step_00000002", "step_00000003"]
        assert failing["file"].startswith("SaveError: cannot write") and "(rank 0)" in failing["file"]
        assert failing["tensors"].startswith("SaveError: cannot write") and "(rank 1)" in failing["tensors"]
        assert "No space left" in failing["file"] and "No space left" in failing["tensors"]
        assert failing["latest"] == {"step": 3}
        assert "holds step 3 of another run" in failing["earlier"]
        assert "cannot be named '../ledger'" in failing["name"]
        assert failing["again"] == {"step": "again"}
        assert failing["left"] == ["step_00000002", "step_00000003"]


@pytest.mark.parametrize("name", BESIDE)
def test_a_save_beside_training_writes_what_one_in_place_writes(name: str, two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        beside = rank["beside"][name]
        assert beside["names"][0] == beside["names"][1] and len(beside["names"][0]) > 3
        assert beside["differ"] == []
        assert beside["while_written"] == "none"
        assert "save of step 1 is under way" in beside["twice"]


@pytest.mark.parametrize("name", BESIDE)
def test_a_failure_beside_training_is_heard_by_every_rank(name: str, two_ranks: list[dict[str, Any]]) -> None:
    for rank in two_ranks:
        beside = rank["beside"][name]
        assert beside["broken"].startswith("SaveError: cannot write") and "(rank 1): [Errno 28]" in beside["broken"]
        assert "needs 0." in beside["broken"] and "GB free" in beside["broken"]
        assert beside["left"] == ["step_00000001"]
        assert beside["again"].endswith("step_00000003")


def test_kill_during_a_save_leaves_the_one_before_and_its_leftovers_go(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="exit code -9"):
        run_distributed(_killed_in_save, 1, str(tmp_path))
    result = run_distributed(_after_the_kill, 1, str(tmp_path))[0]
    assert result["found"] == ["step_00000001", "step_00000002.tmp-new"]
    assert result["state"] == {"step": 1}
    assert result["left"] == ["step_00000001", "step_00000002"]
