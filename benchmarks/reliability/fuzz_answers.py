"""Fuzz targets of what servers answer and what the policy writes."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import random
import re
import socket
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from aer_megatron.rewards.countdown import verify_countdown
from aer_megatron.rewards.extract import final_answer, last_boxed
from aer_megatron.rewards.math import decide_quickly, verify_math
from aer_megatron.rewards.messages import Channel, Garbage, frame, read_verdict
from aer_megatron.rollout.engine import GenerateRequest
from aer_megatron.sglang.labels import WeightLabels
from aer_megatron.sglang.protocol import Expected, parse_completion
from aer_megatron.sglang.replies import Reply, parse_json
from aer_megatron.sglang.served_weights import by_rank, first_difference, holds_fp8
from aer_megatron.types import Prompt
from benchmarks.reliability.fuzz_mutators import mutate_answer, mutate_bytes, mutate_json
from benchmarks.reliability.fuzz_target import Target, WrongAccept, target

LABELS = WeightLabels("aer-0123456789abcdef")
EXPECTED = Expected(GenerateRequest((5, 6, 7), 1, 6), 3, LABELS, 25)
JOB = 7
_FLOAT32_MAX = float(np.finfo(np.float32).max)
_CHECKSUMS = [{"model.norm.weight": "0123456789abcdef", "lm_head.weight": "fedcba9876543210"}]
_GOLDS = ("24", "\\frac{1}{2}", "x^2+1", "(1, 2]", "\\{1,2,3\\}", "\\text{yes}", "2\\sqrt{3}", "x=5", "1/0", "\\boxed{")
_PROMPT = Prompt(id=7, token_ids=(5, 6, 7), problem="3,5,2,8=24>", answer="24", verifier="countdown", metadata={})


def completions() -> list[bytes]:
    """Returns whole replies to /generate, of new and of old servers."""
    ids, label = [4, 9, 1], LABELS.verified(EXPECTED.version)
    meta: dict[str, Any] = {
        "id": "r", "finish_reason": {"type": "stop", "matched": 1}, "prompt_tokens": 3, "completion_tokens": 3,
        "weight_version": label, "weight_versions": [{"version": label, "start": 0, "end": 3}],
        "output_token_logprobs": [[-0.5, 4, None], [-1.25, 9, None], [-0.01, 1, None]],
    }  # fmt: skip
    old = {name: value for name, value in meta.items() if name != "weight_versions"}
    return [json.dumps({"text": "", "output_ids": ids, "meta_info": table}).encode() for table in (meta, old)]


def read_completion(valid: bytes, data: bytes, folder: Path) -> None:
    """Raises WrongAccept for a completion that no policy can have sampled."""
    completion = parse_completion(parse_json(data), EXPECTED)
    ids, logprobs = completion.token_ids, completion.logprobs
    if any(type(token) is not int or not 0 <= token < EXPECTED.vocab_size for token in ids):
        raise WrongAccept(f"token ids: {ids!r:.60}")
    if not 0 < len(ids) <= EXPECTED.request.max_new_tokens or len(logprobs) != len(ids):
        raise WrongAccept(f"counts: {len(ids)} tokens, {len(logprobs)} log-probabilities")
    if any(type(value) is not float or not math.isfinite(value) or abs(value) > _FLOAT32_MAX for value in logprobs):
        raise WrongAccept(f"log-probabilities: {logprobs!r:.60}")
    table = json.loads(data)["meta_info"]["output_token_logprobs"]
    if any(isinstance(row[0], bool) or isinstance(row[1], bool) for row in table):
        raise WrongAccept("a boolean as a number")
    spans = completion.policy_versions
    if spans[0].start != 0 or spans[-1].end != len(ids) or any(span.version != EXPECTED.version for span in spans):
        raise WrongAccept(f"policy versions: {spans!r:.80}")


def checksum_replies() -> list[bytes]:
    """Returns whole replies to /weights_checker."""
    row = {"checksums": _CHECKSUMS[0], "parallelism_info": [{"role": "target", "tp_rank": 0, "tp_size": 1}]}
    return [json.dumps({"success": True, "message": "", "ranks": [row]}).encode()]


def read_checksums(valid: bytes, data: bytes, folder: Path) -> None:
    """Raises WrongAccept where other checksums than those expected pass."""
    reply = Reply(200, data, None)
    table = reply.json()
    if len(reply.text) > 1000 or not reply.text.isprintable():
        raise WrongAccept(f"text for a message: {reply.text!r:.80}")
    ranks = table.get("ranks") if isinstance(table, dict) else None
    by_rank(ranks)
    holds_fp8(ranks)
    if first_difference(_CHECKSUMS, ranks):
        return
    told = [row.get("checksums") for row in ranks or [] if isinstance(row, dict)]
    held = {name: value for checksums in told if isinstance(checksums, dict) for name, value in checksums.items()}
    if held != _CHECKSUMS[0]:
        raise WrongAccept(f"checksums: {held!r:.80}")


def frames() -> list[bytes]:
    """Returns what a verifier process sends: a verdict on job 7, with and without a cause."""
    verdict = {"number": JOB, "reward": 1.0, "reason": "correct"}
    return [frame(verdict), frame(verdict | {"reward": 0, "reason": "verifier_error", "cause": "IndexError: x"})]


def read_frame(valid: bytes, data: bytes, folder: Path) -> None:
    """Raises WrongAccept for a verdict that is none; a worker that sent half a frame is not waited for."""
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    with theirs:
        theirs.sendall(data[:100_000])
        theirs.shutdown(socket.SHUT_WR)
        try:
            message = channel.receive()
            if message is None:
                channel.has_stray_bytes()
                return
            verdict = read_verdict(message, JOB)
        except EOFError:
            return
        finally:
            channel.close()
    if type(verdict.reward) is not float or not math.isfinite(verdict.reward) or isinstance(message["reward"], bool):
        raise WrongAccept(f"reward: {message['reward']!r:.60}")
    if re.fullmatch(r"[a-z0-9_:]{1,64}", verdict.reason) is None:
        raise WrongAccept(f"reason: {verdict.reason!r:.80}")


def mutate_frame(data: bytes, chance: random.Random) -> bytes:
    """Returns a damaged frame: its body, mostly with the right length, or any bytes."""
    if chance.random() < 0.3:
        return mutate_bytes(data, chance)
    body = mutate_json(data[4:], chance)
    return struct.pack("!I", chance.choice((len(body), len(body), len(body), 0, 2**31, len(body) + 1))) + body


def answers() -> list[bytes]:
    """Returns completions, right and wrong ones."""
    texts = (
        "3*8+5-5",
        "so \\boxed{24}.",
        "<answer>24</answer>",
        "Answer: 24",
        "<think>1</think>\\boxed{2{,}4}",
        "2*8+5+3",
    )
    return [text.encode() for text in texts]


def read_answer(valid: bytes, data: bytes, folder: Path) -> None:
    """Raises WrongAccept where a wrong answer is judged correct; no verifier of ours may raise."""
    text = data.decode("utf-8", "replace")
    final_answer(text)
    verdict = verify_countdown(text, _PROMPT)
    if verdict.reward and not _solves(text):
        raise WrongAccept(f"countdown: {text[:60]!r}")
    gold = _GOLDS[zlib.crc32(data) % len(_GOLDS)]
    judged = verify_math(text, dataclasses.replace(_PROMPT, answer=gold))
    quick = decide_quickly(text, dataclasses.replace(_PROMPT, answer=gold))
    if quick is not None and quick != judged:
        raise WrongAccept(f"math: {quick} at once, {judged} in a worker: {text[:60]!r}")
    plain = re.fullmatch(r"\s*(-?[0-9]+)\s*", last_boxed(text) or "")
    if judged.reward and plain and gold == "24" and int(plain[1][:1000]) != 24:
        raise WrongAccept(f"math: {last_boxed(text)!r:.60}")


def _solves(text: str) -> bool:
    """Whether ``text`` uses 3, 5, 2, 8 once each and makes 24: by Python's own parser."""
    numbers: list[int] = []

    def value(node: ast.AST) -> int:
        if isinstance(node, ast.BinOp):
            left, right = value(node.left), value(node.right)
            operations = {ast.Add: left + right, ast.Sub: left - right, ast.Mult: left * right}
            return operations[type(node.op)]  # type: ignore[index]
        assert isinstance(node, ast.Constant) and isinstance(node.value, int)
        numbers.append(node.value)
        return node.value

    try:
        return value(ast.parse(text.strip(), mode="eval").body) == 24 and sorted(numbers) == [2, 3, 5, 8]
    except (SyntaxError, AssertionError, KeyError, ValueError, RecursionError):
        return False


ANSWER_TARGETS: tuple[Target, ...] = (
    target("completion", completions, mutate_json, read_completion, share=20),
    target("checksums", checksum_replies, mutate_json, read_checksums, share=8),
    target("frame", frames, mutate_frame, read_frame, refusals=(Garbage,), share=12),
    target("answer", answers, mutate_answer, read_answer, refusals=(), share=20),
)
