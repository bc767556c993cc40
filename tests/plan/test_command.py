"""The plan: what it prints for Qwen3-8B, what it refuses, and arithmetic that can be done by hand."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from aer_megatron.config_loading import load_config
from aer_megatron.convert.architecture import ModelArchitecture
from aer_megatron.convert.hf_config import architecture_from_hf_config
from aer_megatron.costs.hardware import gpu_named
from aer_megatron.costs.memory import BatchShape, TrainingForm, kv_bytes_per_token, layer_activations, stage_memory
from aer_megatron.costs.model_size import Layout, parameter_count
from aer_megatron.costs.step import Workload, step_flops, step_traffic
from aer_megatron.plan import command as plan
from aer_megatron.plan import search

ROOT = Path(__file__).resolve().parents[2]
RUN = ROOT / "examples" / "plan" / "qwen3-8b.toml"
MODEL = f"--model.path={ROOT / 'examples' / 'plan' / 'qwen3-8b'}"
FLASH = TrainingForm(2, "flash", "fused", 151_936)
SHAPE = BatchShape(1, 4096, 3072)


def tiny(**changes: object) -> ModelArchitecture:
    table = {
        "architectures": ["Qwen3ForCausalLM"], "hidden_size": 8, "intermediate_size": 20, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 50,
        "max_position_embeddings": 64, "tie_word_embeddings": False,
    }  # fmt: skip
    return architecture_from_hf_config({**table, **changes})


def setting(gpus: int, *overrides: str) -> search.Setting:
    return plan._setting(plan.COMMAND.parse([str(RUN), "--gpus", str(gpus), MODEL, *overrides]))


@pytest.mark.parametrize("gpus", [8, 64])
def test_qwen3_8b_gets_a_layout(gpus: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan.main([str(RUN), MODEL, "--gpus", str(gpus), "--gpu", "h100"]) == 0
    text = capsys.readouterr().out
    assert "8,190,735,360 parameters" in text
    assert "ESTIMATES" in text and "never measured" in text
    assert re.search(r"^  tp \d+ pp \d+ dp \d+", text, re.MULTILINE)
    suggested = text[text.index("[parallel]") :]
    overrides = [f"--parallel.{line.strip().replace(' ', '')}" for line in suggested.splitlines()[1:5]]
    config = load_config(RUN, [MODEL, *overrides])  # what it suggests is a configuration
    assert config.check_world_size(gpus) * config.parallel.tp * config.parallel.pp == gpus


@pytest.mark.parametrize("gpus", [8, 64])
def test_every_layout_listed_fits_and_its_budget_is_tight(gpus: int) -> None:
    asked = setting(gpus)
    candidates = list(search.fitting_candidates(asked))
    assert candidates
    times = [candidate.time.total for candidate in candidates]
    assert times == sorted(times)
    for candidate in candidates:
        assert candidate.peak_bytes <= asked.usable_bytes
        most = search.token_budget(asked, candidate.layout) // asked.plan.longest
        assert most >= candidate.micro_batch_size
        assert search.evaluate(asked, candidate.layout, most).peak_bytes <= asked.usable_bytes
        share = asked.plan.work.sequences // asked.plan.work.minibatches // candidate.layout.dp
        if most < share:
            assert search.evaluate(asked, candidate.layout, most + 1).peak_bytes > asked.usable_bytes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "8", "--parallel.tp=3"], ["parallel.tp=3", "must divide", "8"]),
        (["--gpus", "10", "--parallel.tp=5"], ["parallel.tp=5", "12288", "use tp="]),
        (["--gpus", "8", "--parallel.pp=8", "--parallel.tp=1", "--parallel.sequence_parallel=false"], ["pp=8", "36"]),
        (["--gpus", "2"], ["parallel.tp=4", "2"]),
        (["--gpus", "0"], ["--gpus=0"]),
        (["--gpus", "8", "--gpu", "h900"], ["h900", "h100, h200"]),
        (["--gpus", "8", "--reserve", "1.5"], ["--reserve=1.5"]),
        (["--gpus", "8", "--rollout-share", "0.4"], ["--rollout-share=0.4", "sglang"]),
        (["--gpus", "8", "--rollout.max_new_tokens=50000"], ["50000", "40960 positions"]),
        (["--gpus", "1", "--parallel.tp=1", "--parallel.sequence_parallel=false"], ["nothing fits 1 x", "more GPUs"]),
        (["--gpus", "8", "--parallel.tpp=1"], ["parallel.tpp", "parallel.tp"]),
        (["--gpus", "8", "--model.path=/nonexistent"], ["/nonexistent", "config.json"]),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_with_the_remedy(
    arguments: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan.main([str(RUN), MODEL, *arguments]) == 2
    message = capsys.readouterr().err
    for word in words:
        assert word in message


def test_servers_free_the_engine_and_take_their_share() -> None:
    embedded = search.own_candidate(setting(8))
    servers = ("--rollout.engine=sglang", "--sglang.num_servers=8")
    elsewhere = search.own_candidate(setting(8, *servers))
    shared = search.own_candidate(replace(setting(8, *servers), rollout_share=0.3))
    assert embedded.engine.weights == 2 * 8_190_735_360
    assert elsewhere.engine.weights == elsewhere.time.rollout == 0
    assert shared.peak_bytes - elsewhere.peak_bytes == pytest.approx(0.3 * 80e9)


def test_constant_terms_of_8b_by_hand() -> None:
    arch, count = setting(8).plan.arch, 8_190_735_360
    half = stage_memory(arch, Layout(1, 1, 8), SHAPE, FLASH, stage=0, num_micro_batches=1)
    assert (half.weights, half.gradients, half.optimizer) == (2 * count, 4 * count, 12 * count // 8)
    single = stage_memory(arch, Layout(1, 1, 8), SHAPE, replace(FLASH, dtype_bytes=4), stage=0, num_micro_batches=1)
    assert (single.weights, single.gradients, single.optimizer) == (4 * count, 4 * count, 8 * count // 8)
    assert kv_bytes_per_token(arch, 2) == 2 * 36 * 8 * 128 * 2


def test_activations_of_8b_by_hand() -> None:
    """Flash attention, bf16: rows of H = Q = 4096, K = 1024, F = 12288 per token and layer, and the softmax sums."""
    layer = layer_activations(setting(8).plan.arch, Layout(1, 1, 8), SHAPE, FLASH)
    rows = 4 * 4096 + (4 * 4096 + 5 * 1024) + 5 * 12288
    assert layer.total == 4096 * (2 * rows + 4 * 32)
    halved = layer_activations(setting(8).plan.arch, Layout(2, 1, 4, sequence_parallel=True), SHAPE, FLASH)
    assert halved.total == layer.total // 2
    fused = layer_activations(setting(8).plan.arch, Layout(1, 1, 8), SHAPE, replace(FLASH, fused_swiglu=True))
    assert layer.total - fused.total == 4096 * 2 * 2 * 12288


def test_the_first_stage_keeps_as_many_micro_batches_as_there_are_stages() -> None:
    arch = setting(8).plan.arch
    layout = Layout(1, 4, 1)
    one = layer_activations(arch, layout, SHAPE, FLASH).total * 9
    ids = 2 * 4096 * 8
    for stage, waiting in ((0, 4), (3, 1)):
        memory = stage_memory(arch, layout, SHAPE, FLASH, stage=stage, num_micro_batches=16)
        assert memory.activations == one * waiting + ids
    assert stage_memory(arch, layout, SHAPE, FLASH, stage=0, num_micro_batches=2).activations == one * 2 + ids
    # interleaved, two chunks of half the layers: 2 * 3 + 4 + 1 = 11 chunks wait on the first stage, 5 on the last
    chunks = Layout(1, 4, 1, vpp=2)
    for stage, waiting in ((0, 11), (3, 5)):
        memory = stage_memory(arch, chunks, SHAPE, FLASH, stage=stage, num_micro_batches=16)
        assert memory.activations == one * waiting // 2 + ids


def test_context_parallel_ranks_share_tokens_and_optimizer() -> None:
    arch = setting(8).plan.arch
    one = stage_memory(arch, Layout(1, 1, 1), SHAPE, FLASH, stage=0, num_micro_batches=1)
    two = stage_memory(arch, Layout(1, 1, 1, cp=2), SHAPE, FLASH, stage=0, num_micro_batches=1)
    assert (two.weights, two.gradients) == (one.weights, one.gradients)
    assert (2 * two.optimizer, 2 * two.activations) == (one.optimizer, one.activations)
    own = search.own_candidate(setting(32, "--parallel.cp=2", "--parallel.pp=2", "--parallel.vpp=2"))
    assert own.layout == Layout(4, 2, 2, sequence_parallel=True, cp=2, vpp=2)
    assert "pp 2 vpp 2 cp 2 dp 2" in own.layout.text
    assert own.micro_batch_size == 1
    packed = search.own_candidate(setting(32, "--parallel.tokens_per_micro_batch=9000"))
    assert packed.micro_batch_size == 2  # of 4096 tokens, the longest sequence


def test_operations_by_hand() -> None:
    """Two layers of 8 x (8 + 4 + 4) + 8 x 8 + 3 x 8 x 20 = 672 elements, Q = 8; 3 sequences of 2 + 5 tokens."""
    work = Workload(sequences=3, prompt_tokens=2, response_tokens=5, minibatches=1, passes=1)
    form = replace(FLASH, attention="local", head="logits", vocab_rows=50)
    flops = step_flops(tiny(), work, Layout(1, 1, 1), form)
    forward = 2 * 1344 * 21 + 2 * 4 * 8 * 3 * 7 * 7 + 2 * 8 * 50 * 15
    assert flops.score == forward
    assert flops.model == flops.train == 3 * forward
    again = step_flops(tiny(), work, Layout(1, 1, 1, recompute="full"), replace(form, head="fused"))
    assert again.train == 4 * forward


def test_traffic_by_hand() -> None:
    work = Workload(sequences=4, prompt_tokens=2, response_tokens=2, minibatches=2, passes=1)
    form = replace(FLASH, vocab_rows=50)
    traffic = step_traffic(tiny(), work, Layout(2, 1, 2), form)
    rows = 16 / 2 * 8 * 2  # this replica's tokens x hidden x 2 bytes
    # 2 layers, 2 all-reduces in each of scoring, forward and backward, each 2 (2 - 1) / 2 = 1 time the rows
    assert traffic.tensor == 2 * 2 * 3 * rows
    held = parameter_count(tiny()) / 2 + (2 * (2 * 8 + 2 * 4) + 8) / 2  # norms are whole on both ranks
    assert traffic.data == 2 * 0.5 * held * (4 + 2)
    assert traffic.weight_sync == parameter_count(tiny()) * 2 / 2
    alone = step_traffic(tiny(), work, Layout(1, 1, 1), form)
    assert (alone.tensor, alone.context, alone.pipeline, alone.data, alone.weight_sync) == (0, 0, 0, 0, 0)


def test_context_traffic_by_hand() -> None:
    """Keys and values of 16 / 2 tokens, 4 columns each in bf16, to one other rank, in 2 layers and 3 passes."""
    work = Workload(sequences=4, prompt_tokens=2, response_tokens=2, minibatches=2, passes=1)
    traffic = step_traffic(tiny(), work, Layout(1, 1, 1, cp=2), replace(FLASH, vocab_rows=50))
    assert traffic.context == 8 * (4 + 4) * 2 * 2 * 3
    assert traffic.tensor == 0
    assert traffic.data > 0  # the two ranks hold the same weights


def test_long_sequences_are_cut_over_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    """No micro-batch of one 40,960-token sequence fits without recomputation unless its tokens are shared."""
    long = ("--rollout.max_new_tokens=39936", "--rollout.max_batch_size=4")
    asked = setting(64, *long, "--parallel.cp=4")
    without = [c.layout for c in search.fitting_candidates(asked) if c.layout.cp == 1]
    assert all(layout.recompute == "full" or layout.tp * layout.pp >= 4 for layout in without)
    assert any(c.layout.cp >= 4 and c.layout.recompute == "none" for c in search.fitting_candidates(asked))
    assert plan.main([str(RUN), MODEL, "--gpus", "64", *long]) == 0
    assert re.search(r"^  tp \d+ pp \d+( vpp \d+)? cp \d+ dp \d+", capsys.readouterr().out, re.MULTILINE)


def test_searched_layouts_are_configurations() -> None:
    asked = setting(16)
    layouts = list(search.possible_layouts(asked))
    assert {layout.num_ranks for layout in layouts} == {16}
    assert {layout.cp for layout in layouts} >= {1, 2, 4, 8, 16}
    assert {layout.vpp for layout in layouts if layout.pp > 1} == {1, 2, 3}  # of 18 or 9 layers
    assert {layout.vpp for layout in layouts if layout.pp == 1} == {1}
    for layout in layouts:
        assert asked.plan.arch.num_layers % (layout.pp * layout.vpp) == 0


def test_kinds_of_gpu() -> None:
    assert gpu_named("H100").memory_bytes == 80e9
    assert gpu_named("h200").memory_bytes > gpu_named("h100").memory_bytes
