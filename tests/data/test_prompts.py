from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, PreTrainedTokenizerBase

from aer_megatron.data.prompts import PromptCursor, PromptSet, epoch_order
from aer_megatron.data.records import Message, Record
from aer_megatron.data.tokenizer import load_tokenizer, make_decoder, stop_token_ids
from aer_megatron.options.data import DataSection, SourceSection

MODEL = Path(__file__).parents[2] / "examples" / "quickstart" / "model"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '(' + m['content'] + ')' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '>' }}{% endif %}"
)


@pytest.fixture()
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(MODEL)


def data(**fields: Any) -> DataSection:
    return DataSection(train=SourceSection(task="countdown"), **({"template": "plain"} | fields))


def records(problems: Sequence[str]) -> list[Record]:
    return [Record(index, problem, "1", "math", None) for index, problem in enumerate(problems)]


def test_quickstart_tokenizer_has_one_id_per_character(tokenizer: PreTrainedTokenizerBase) -> None:
    characters = "0123456789+-*,=>() "
    ids = tokenizer.encode(characters, add_special_tokens=False)
    assert ids == list(range(3, 22))  # after <pad>, <eos>, <unk>
    assert len(tokenizer) == AutoConfig.from_pretrained(MODEL).vocab_size == 22
    assert tokenizer.encode("a\n\n", add_special_tokens=False) == [2, 2, 2]


def test_decoder_drops_the_final_stop_only(tokenizer: PreTrainedTokenizerBase) -> None:
    decode = make_decoder(tokenizer, stop_token_ids(MODEL, tokenizer))
    assert decode((6, 13, 8, 1)) == "3+5"
    assert decode((6, 13, 8)) == "3+5"
    assert decode((6, 0, 13, 8, 1)) == "3<pad>+5"
    assert decode((1,)) == "" == decode(())


def test_stop_ids_are_the_union_of_all_three_places(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    assert stop_token_ids(MODEL, tokenizer) == (1,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 1]}', encoding="utf-8")
    (tmp_path / "config.json").write_text('{"eos_token_id": 4}', encoding="utf-8")
    assert stop_token_ids(tmp_path, tokenizer) == (1, 4, 5)
    tokenizer.eos_token = None
    assert stop_token_ids(tmp_path, tokenizer) == (1, 4, 5)
    with pytest.raises(ValueError, match="names no eos token"):
        stop_token_ids(tmp_path / "elsewhere", tokenizer)


def test_tokenizer_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder"):
        load_tokenizer(tmp_path / "absent")
    shutil.copy(MODEL / "config.json", tmp_path)
    with pytest.raises(ValueError, match="holds no usable tokenizer"):
        load_tokenizer(tmp_path)


def test_plain_prompts_use_replace_not_format(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = PromptSet(records(["1+2", "{3}"]), tokenizer, data(instruction="({problem})={x}"))
    assert prompts[0].token_ids == tuple(tokenizer.encode("(1+2)={x}"))
    assert prompts[1].token_ids == tuple(tokenizer.encode("({3})={x}"))
    assert prompts[0].problem == "1+2"  # the problem itself, without the instruction: verifiers read it


def test_chat_prompts(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    plain = PromptSet(records(["1+2"]), tokenizer, data(template="chat", instruction="={problem}"))
    assert plain[0].token_ids == tuple(tokenizer.encode("(=1+2)>"))
    system = PromptSet(records(["1+2"]), tokenizer, data(template="chat", system="9"))
    assert system[0].token_ids == tuple(tokenizer.encode("(9)(1+2)>"))


CONVERSATION = (Message("system", "9"), Message("user", "1+2"), Message("assistant", "4"), Message("user", "3"))


def test_a_conversation_goes_through_the_chat_template_as_it_is(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    record = Record(7, "3", "1", "math", None, {}, CONVERSATION)
    (prompt,) = PromptSet([record], tokenizer, data(template="chat"))
    assert prompt.token_ids == tuple(tokenizer.encode("(9)(1+2)(4)(3)>"))
    assert prompt.problem == "3"
    long = Record(8, "3", "1", "math", None, {}, (Message("system", "9" * 90), Message("user", "3")))
    for unusable, fields, words in [
        (record, {"template": "plain"}, r"record id 7 .*conversation of 4 messages; that needs data\.template='chat'"),
        (record, {"template": "chat", "system": "9"}, r"record id 7 .*leave out data\.instruction and data\.system"),
        (record, {"template": "chat", "instruction": "{problem}="}, r"record id 7 .*leave out data\.instruction"),
        (long, {"template": "chat", "max_prompt_tokens": 95}, r"record id 8 .*has 96 tokens"),
    ]:
        with pytest.raises(ValueError, match=words):
            PromptSet([*records(["1"]), unusable], tokenizer, data(**fields))
        kept = PromptSet([*records(["1"]), unusable], tokenizer, data(on_bad_record="skip", **fields))
        assert ([each.id for each in kept], kept.num_skipped) == ([0], 1)


def test_a_chat_template_that_refuses_a_conversation_makes_a_bad_record(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}9"
    record = Record(7, "3", "1", "math", None, {}, CONVERSATION)
    with pytest.raises(ValueError, match=r"record id 7 .*chat template refuses the conversation: no system"):
        PromptSet([record], tokenizer, data(template="chat"))


def test_an_instruction_that_has_the_problem_twice_counts_it_twice(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    for template in ("plain", "chat"):
        given = data(template=template, instruction="{problem}={problem}", max_prompt_tokens=60)
        with pytest.raises(ValueError, match=r"has 8[14] tokens"):
            PromptSet(records(["1" * 40]), tokenizer, given)


def test_prompt_options_that_cannot_work(tokenizer: PreTrainedTokenizerBase) -> None:
    for fields, words in [
        ({"template": "chat"}, "this one has none"),
        ({"instruction": "solve"}, r"must contain \{problem\}"),
        ({"system": "s"}, r"belongs to data\.template='chat'"),
    ]:
        with pytest.raises(ValueError, match=words):
            PromptSet(records(["1"]), tokenizer, data(**fields))


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_long_prompts_are_bad_records_at_the_start(tokenizer: PreTrainedTokenizerBase, template: str) -> None:
    tokenizer.chat_template = CHAT_TEMPLATE
    given = records(["1" * 40, "2", "3" * 41, "4"])
    limit = 40 if template == "plain" else 43
    with pytest.raises(ValueError, match=rf"record id 2 .*has {limit + 1} tokens.*max_prompt_tokens={limit}"):
        PromptSet(given, tokenizer, data(template=template, max_prompt_tokens=limit))
    prompts = PromptSet(given, tokenizer, data(template=template, max_prompt_tokens=limit, on_bad_record="skip"))
    assert [prompt.id for prompt in prompts] == [0, 1, 3]
    assert prompts.num_skipped == 1
    assert [record.id for record in prompts.records] == [0, 1, 3]
    assert len(prompts[0].token_ids) == limit


def test_no_prompts_left(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="no prompts are left of 1 records"):
        PromptSet(records(["1" * 9]), tokenizer, data(max_prompt_tokens=3, on_bad_record="skip"))


def test_slices_and_verifiers(tokenizer: PreTrainedTokenizerBase) -> None:
    prompts = PromptSet(records("123"), tokenizer, data())
    assert [prompt.problem for prompt in prompts[:2]] == ["1", "2"]
    assert prompts[-1].problem == "3"
    assert prompts.verifiers == {"math"}
    with pytest.raises(IndexError):
        prompts[3]


def test_cursor_refuses_another_data_set_or_seed(tokenizer: PreTrainedTokenizerBase) -> None:
    state = PromptCursor(PromptSet(records("123"), tokenizer, data()), seed=0).state_dict()
    assert json.loads(json.dumps(state)) == state
    other = PromptSet(records("1234"), tokenizer, data())
    with pytest.raises(ValueError, match=r"is of another data set than data\.train"):
        PromptCursor(other, seed=0).load_state_dict(state)
    same = PromptSet(records("123"), tokenizer, data())
    with pytest.raises(ValueError, match=r"seed 0 and this run run\.seed=1"):
        PromptCursor(same, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="out of range"):
        PromptCursor(same, seed=0).load_state_dict(state | {"position": 3})


# Laws of the order

TOKENIZER = load_tokenizer(MODEL)


def make_cursor(size: int, seed: int) -> PromptCursor:
    return PromptCursor(PromptSet(records([str(index) for index in range(size)]), TOKENIZER, data()), seed)


@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 10**6), size=st.integers(1, 200))
def test_an_epoch_is_a_permutation(seed: int, epoch: int, size: int) -> None:
    order = epoch_order(seed, epoch, size)
    assert sorted(order.tolist()) == list(range(size))
    assert np.array_equal(order, epoch_order(seed, epoch, size))


@given(
    size=st.integers(1, 30),
    seed=st.integers(0, 1000),
    before=st.lists(st.integers(0, 40), max_size=5),
    after=st.lists(st.integers(0, 40), min_size=1, max_size=5),
)
@settings(deadline=None)
def test_a_resumed_cursor_continues_as_if_never_stopped(
    size: int, seed: int, before: list[int], after: list[int]
) -> None:
    straight, stopped, resumed = (make_cursor(size, seed) for _ in range(3))
    for count in before:
        straight.next_prompts(count)
        stopped.next_prompts(count)
    resumed.load_state_dict(stopped.state_dict())
    for count in after:
        assert resumed.next_prompts(count) == straight.next_prompts(count)
    assert resumed.state_dict() == straight.state_dict()


@given(
    size=st.integers(1, 30),
    seed=st.integers(0, 1000),
    counts=st.lists(st.integers(1, 40), min_size=1, max_size=6),
)
@settings(deadline=None)
def test_every_epoch_hands_out_every_prompt_once(size: int, seed: int, counts: list[int]) -> None:
    cursor = make_cursor(size, seed)
    ids = [prompt.id for count in counts for prompt in cursor.next_prompts(count)]
    assert len(ids) == sum(counts)
    for start in range(0, len(ids) - size + 1, size):
        assert sorted(ids[start : start + size]) == list(range(size))
