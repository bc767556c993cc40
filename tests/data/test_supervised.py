from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from aer_megatron.data.supervised import SupervisedSource
from aer_megatron.data.tokenizer import load_tokenizer, make_decoder
from aer_megatron.options.data import DataSection, SourceSection
from aer_megatron.rewards.countdown import verify_countdown
from aer_megatron.types import Prompt, SupervisedBatch, Verdict

MODEL = Path(__file__).parents[2] / "examples" / "quickstart" / "model"
EOS = 1
CHAT_TEMPLATE = "{% for m in messages %}{{ '(' + m['content'] + ')' }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(MODEL)


def countdown_source(
    tokenizer: PreTrainedTokenizerBase, *, size: int, batch_size: int, seed: int = 0, **fields: Any
) -> SupervisedSource:
    source = SourceSection(task="countdown", size=size, options={"split": "train"})
    data = DataSection(train=source, **({"template": "plain"} | fields))
    return SupervisedSource(source, data, tokenizer, eos_id=EOS, batch_size=batch_size, seed=seed)


def texts(batch: SupervisedBatch, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """(prompt, response) texts; a response that does not end with eos raises."""
    decode = make_decoder(tokenizer, ())
    pairs, start = [], 0
    lengths = zip(batch.prompt_length_B.tolist(), batch.response_length_B.tolist(), strict=True)
    for prompt_length, response_length in lengths:
        middle, end = start + prompt_length, start + prompt_length + response_length
        assert batch.token_ids_L[end - 1] == EOS
        ids = batch.token_ids_L.tolist()
        pairs.append((decode(ids[start:middle]), decode(ids[middle : end - 1])))
        start = end
    assert start == len(batch.token_ids_L)
    return pairs


@pytest.mark.parametrize("path", ["characters", "texts"])
def test_every_sampled_solution_is_correct(tokenizer: PreTrainedTokenizerBase, path: str) -> None:
    fields = {} if path == "characters" else {"instruction": "={problem}"}
    source = countdown_source(tokenizer, size=300, batch_size=128, **fields)
    for step in range(5):
        for prompt, response in texts(source.batch(step), tokenizer):
            problem = prompt.removeprefix("=")
            assert prompt == problem or path == "texts"
            judged = verify_countdown(response, Prompt(1, problem, (1,), "", "countdown"))
            assert judged == Verdict(1.0, "correct")


def test_both_paths_give_the_same_pairs(tokenizer: PreTrainedTokenizerBase) -> None:
    chat = load_tokenizer(MODEL)
    chat.chat_template = CHAT_TEMPLATE
    fast = texts(countdown_source(tokenizer, size=100, batch_size=32).batch(3), tokenizer)
    slow = texts(countdown_source(chat, size=100, batch_size=32, template="chat").batch(3), chat)
    assert [(f"({prompt})", response) for prompt, response in fast] == slow


def test_batches_depend_on_seed_and_step_only(tokenizer: PreTrainedTokenizerBase) -> None:
    first = countdown_source(tokenizer, size=100, batch_size=64)
    in_order = [texts(first.batch(step), tokenizer) for step in range(6)]
    second = countdown_source(tokenizer, size=100, batch_size=64)
    assert [texts(second.batch(step), tokenizer) for step in (5, 0, 3)] == [
        in_order[5],
        in_order[0],
        in_order[3],
    ]
    assert texts(countdown_source(tokenizer, size=100, batch_size=64, seed=1).batch(0), tokenizer) != in_order[0]


def test_epochs_show_every_problem_once_with_fresh_solutions(tokenizer: PreTrainedTokenizerBase) -> None:
    source = countdown_source(tokenizer, size=100, batch_size=40)
    pairs = [pair for step in range(5) for pair in texts(source.batch(step), tokenizer)]
    epochs = pairs[:100], pairs[100:]
    assert all(len({problem for problem, _ in epoch}) == 100 for epoch in epochs)
    fresh = [dict(epochs[0])[problem] != solution for problem, solution in epochs[1]]
    assert sum(fresh) > 30


def test_a_batch_larger_than_the_set_crosses_epochs(tokenizer: PreTrainedTokenizerBase) -> None:
    source = countdown_source(tokenizer, size=10, batch_size=25)
    problems = [problem for problem, _ in texts(source.batch(0), tokenizer)]
    assert len(problems) == 25 and len(set(problems)) == 10
    assert source.num_records == 10


def test_256_solutions_take_milliseconds(tokenizer: PreTrainedTokenizerBase) -> None:
    source = countdown_source(tokenizer, size=20_000, batch_size=256)
    source.batch(0)
    seconds = []
    for step in range(1, 21):
        start = time.process_time()
        source.batch(step)
        seconds.append(time.process_time() - start)
    assert float(np.median(seconds)) < 0.015  # 3 ms alone on one core; the margin is for a shared machine


def test_file_records(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"problem": f"{i}=>", "response": f"{i}+0"} for i in range(5)] + [{"problem": "9" * 30, "response": "9"}]
    path = tmp_path / "sft.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    source = SourceSection(path=str(path))
    data = DataSection(train=source, template="plain", max_prompt_tokens=20, on_bad_record="skip")
    supervised = SupervisedSource(source, data, tokenizer, eos_id=EOS, batch_size=5, seed=0)
    assert (supervised.num_records, supervised.num_skipped) == (5, 1)
    expected = {(f"{i}=>", f"{i}+0") for i in range(5)}
    assert set(texts(supervised.batch(0), tokenizer)) == expected
    assert set(texts(supervised.batch(7), tokenizer)) == expected
