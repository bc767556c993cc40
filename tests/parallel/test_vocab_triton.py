"""The Triton kernels of the vocabulary shard: in the interpreter against the oracle, and compiled for a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from aer_megatron.parallel import vocab_triton

ROOT = Path(__file__).resolve().parents[2]
needs_triton = pytest.mark.skipif(vocab_triton.triton is None, reason="Triton is not installed")
# values are float32 whatever the logits are; a gradient is rounded to the dtype of the logits
VALUE_ERROR = 1e-6
GRADIENT_ERROR = {"fp32": 1e-6, "bf16": 8e-3, "fp16": 1e-3, "only": 1e-6, "nan": 0.0}


def _run(arguments: list[str], **environment: str) -> str:
    finished = subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    outcome: dict[str, dict[str, float]] = json.loads(
        _run(["-m", "tests.support.vocab_triton_checks"], TRITON_INTERPRET="1")
    )
    return outcome


@pytest.mark.processes
@needs_triton
@pytest.mark.parametrize("kind", ["fp32-normal", "fp32-masked", "fp32-large", "bf16", "fp16", "only", "nan"])
def test_interpreted_kernels_equal_the_reference(interpreted: dict[str, dict[str, float]], kind: str) -> None:
    """Odd shapes, several blocks, masks, -inf, +-1e4, labels on other shards, empty shards, strided rows."""
    chosen = {name: errors for name, errors in interpreted.items() if name.startswith(kind)}
    assert chosen
    for name, errors in chosen.items():
        assert errors["values"] <= VALUE_ERROR, name
        assert errors["gradient"] <= GRADIENT_ERROR[kind.split("-")[0]], name
        assert errors["intact"] == 1.0, f"{name} wrote outside its own columns, or forward changed the logits"


SIGNATURES: dict[str, dict[str, str]] = {
    "_reduce_kernel": {
        "logits": "*{dtype}",
        "row_stride": "i32",
        "column": "*i64",
        "stats": "*fp32",
        "stats_stride": "i32",
        "width": "i32",
        "bits_per_logit": "fp32",
        "WITH_SQ": "constexpr",
        "BLOCK": "constexpr",
    },
    "_gradient_kernel": {
        "logits": "*{dtype}",
        "row_stride": "i32",
        "out": "*{dtype}",
        "out_stride": "i32",
        "column": "*i64",
        "max_logit": "*fp32",
        "constant": "*fp32",
        "slope": "*fp32",
        "label_gradient": "*fp32",
        "width": "i32",
        "bits_per_logit": "fp32",
        "HAS_SLOPE": "constexpr",
        "HAS_LABEL": "constexpr",
        "BLOCK": "constexpr",
    },
}


@pytest.mark.processes
@needs_triton
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("kernel", list(SIGNATURES))
def test_kernels_compile_for_a_gpu(kernel: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter accepts what the compiler refuses; no GPU is needed to compile for compute capability 9.0."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    signature = {name: kind.format(dtype=dtype) for name, kind in SIGNATURES[kernel].items()}
    constants: dict[str, Any] = {
        name: 1024 if name == "BLOCK" else True for name, kind in signature.items() if kind == "constexpr"
    }
    source = ASTSource(getattr(vocab_triton, kernel), signature, constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert "ex2.approx" in compiled.asm["ptx"]


@pytest.mark.processes
def test_importing_needs_neither_triton_nor_cuda() -> None:
    program = """
import sys
sys.modules["triton"] = None  # makes the import fail
import torch
from aer_megatron.parallel import vocab_triton
from aer_megatron.parallel.vocab import vocab_parallel_logprob_entropy
assert vocab_triton.triton is None and not vocab_triton.supports(torch.zeros(2, 4))
result = vocab_parallel_logprob_entropy(torch.zeros(2, 4), torch.tensor([0, 3]))
assert abs(float(result.entropy_T[0]) - 1.3862944) < 1e-6
"""
    _run(["-c", program])


def test_cpu_tensors_take_the_pytorch_form() -> None:
    assert not vocab_triton.supports(torch.zeros(2, 4))


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu_the_kernels_equal_the_reference(dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from aer_megatron.algo.entropy import logprob_entropy, logprob_entropy_gradient
    from aer_megatron.parallel.vocab import vocab_parallel_logprob_entropy

    logits = (3 * torch.randn(65, 32003, device="cuda")).to(dtype)
    labels = torch.randint(0, 32000, (65,), device="cuda")
    grads = torch.randn(2, 65, device="cuda")
    options = {"vocab_size": 32000, "temperature": 0.7}
    leaf = logits.clone().requires_grad_()
    assert vocab_triton.supports(leaf)
    result = vocab_parallel_logprob_entropy(leaf.view_as(leaf), labels, **options)
    (gradient,) = torch.autograd.grad((result.logprob_T * grads[0] + result.entropy_T * grads[1]).sum(), leaf)
    wanted = logprob_entropy(logits, labels, **options)
    assert float((result.entropy_T - wanted.entropy_T).abs().max()) <= 2e-5
    wanted_gradient = logprob_entropy_gradient(logits, labels, *grads, **options)
    bar = 2e-6 if dtype == torch.float32 else 8e-3
    assert float((gradient - wanted_gradient).norm() / wanted_gradient.norm()) <= bar


@pytest.mark.gpu
@pytest.mark.parametrize("main_grad", [False, True])
def test_on_a_gpu_the_bfloat16_fused_head_equals_float64(main_grad: bool) -> None:
    """Covers the mixed-precision product of the weight gradient, which only CUDA has."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    from aer_megatron.parallel.fused_head import fused_linear_logprob_entropy
    from aer_megatron.parallel.vocab import vocab_parallel_logprob_entropy

    hidden = torch.randn(100, 64, device="cuda").bfloat16().requires_grad_()
    weight = torch.randn(9000, 64, device="cuda").bfloat16().requires_grad_()
    labels = torch.randint(0, 9000, (100,), device="cuda")
    if main_grad:
        weight.main_grad = torch.zeros(9000, 64, device="cuda")  # type: ignore[attr-defined]
    result = fused_linear_logprob_entropy(hidden, weight, labels)
    (result.logprob_T + result.entropy_T).sum().backward()
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    wanted = vocab_parallel_logprob_entropy(exact[0] @ exact[1].t(), labels)
    (wanted.logprob_T + wanted.entropy_T).sum().backward()
    got = weight.main_grad if main_grad else weight.grad  # type: ignore[attr-defined]
    for one, two in ((hidden.grad, exact[0].grad), (got, exact[1].grad)):
        assert one is not None and two is not None
        assert float((one - two).norm() / two.norm()) <= 2e-2
