"""Loads a Hugging Face tokenizer and says which tokens stop a completion and what its text is.

Nothing here or elsewhere may find padding by ``id != pad``: SmolLM2's pad id is its eos id. Mask by position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from aer_megatron.files.json_input import read_json_object

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of a Hugging Face folder.

    Raises:
        ValueError: the folder does not exist or holds no usable tokenizer.
    """
    if not Path(path).is_dir():
        raise ValueError(f"model.path={str(path)!r} is not a folder; give a Hugging Face model folder")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"):
        if (Path(path) / name).is_file():
            read_json_object(Path(path) / name)  # transformers says less of a file that is cut
    if not any((Path(path) / name).is_file() for name in _TOKENIZER_FILES):
        # transformers would build an empty tokenizer from config.json alone, without a word
        raise ValueError(
            f"model.path={str(path)!r} holds no usable tokenizer: none of {', '.join(_TOKENIZER_FILES)} is "
            f"there; copy the model's tokenizer files into it"
        )
    try:
        # never code of the folder, whatever its files ask for
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # what the tokenizers library raises for a damaged file is Exception itself
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"model.path={str(path)!r} holds no usable tokenizer: {reason}; it needs tokenizer.json and "
            f"tokenizer_config.json"
        ) from None
    return tokenizer


def stop_token_ids(path: str | Path, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Returns every id that ends a completion, the tokenizer's own eos first, then the others ascending.

    The union of generation_config.json, config.json and the tokenizer, because chat models often name their
    end-of-turn token in one of them only. Supervised responses end with the first.

    Raises:
        ValueError: none of the three names an eos id.
    """
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        ids.update(_eos_ids(Path(path) / name))
    own = tokenizer.eos_token_id
    first = (int(own),) if isinstance(own, int) else ()
    stops = (*first, *sorted(ids.difference(first)))
    if not stops:
        raise ValueError(
            f"model.path={str(path)!r} names no eos token; set eos_token in tokenizer_config.json or "
            f"eos_token_id in "
            f"config.json"
        )
    return stops


def make_decoder(tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> Callable[[Sequence[int]], str]:
    """Returns a function from a completion's token ids to the text a verifier reads.

    The stop token at the end is dropped; any other special token stays visible, so that an answer with a pad
    or unknown token in its middle is not mistaken for the answer without it.
    """
    stops = frozenset(stop_ids)

    def decode(token_ids: Sequence[int]) -> str:
        ids = list(token_ids[:-1] if token_ids and token_ids[-1] in stops else token_ids)
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return decode


def _eos_ids(file: Path) -> list[int]:
    if not file.is_file():
        return []
    value = read_json_object(file).get("eos_token_id")
    ids = [number for number in (value if isinstance(value, list) else [value]) if number is not None]
    for number in ids:
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < 2**31:
            raise ValueError(f"{file}: eos_token_id={value!r} must be one token id or a list of them; correct it")
    return ids
