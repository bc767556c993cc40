"""Converts models between Hugging Face folders, Megatron-Core's distributed checkpoints and FP8 folders.

    aer convert hf-to-megatron MODEL OUTPUT [--tp N] [--dtype bfloat16] [--verify]
    aer convert megatron-to-hf CHECKPOINT OUTPUT [--hf MODEL] [--dtype bfloat16] [--verify]
    aer convert hf-to-fp8 MODEL OUTPUT [--dtype bfloat16]
    aer convert check MODEL [--layouts 1x1,2x1,1x2,2x2] [--scratch FOLDER]

Exit codes: 0 done, 2 the input is at fault, 1 anything else.
"""

from __future__ import annotations

from pathlib import Path

from aer_megatron.console.command_line import CommandLine, Given, Option, whole
from aer_megatron.console.failures import Edge
from aer_megatron.files.disk_space import lacks_space

# form -> (what it works on, its options)
_FORMS = {
    "hf-to-megatron": ("MODEL OUTPUT", {"tp", "dtype", "max-file-gb", "verify"}),
    "megatron-to-hf": ("CHECKPOINT OUTPUT", {"hf", "dtype", "max-file-gb", "verify"}),
    "hf-to-fp8": ("MODEL OUTPUT", {"dtype", "max-file-gb"}),
    "check": ("MODEL", {"layouts", "scratch"}),
}
_DTYPES = ("float32", "bfloat16", "float16")
_FORMS_TEXT = """
aer convert hf-to-megatron MODEL OUTPUT [--tp N] [--dtype D] [--verify]
  Writes a folder that GPTModel loads through megatron.core.dist_checkpointing under any pipeline and expert layout,
  and any tensor-parallel size that divides the heads; --tp pads the heads for another one.
aer convert megatron-to-hf CHECKPOINT OUTPUT [--hf MODEL] [--dtype D] [--verify]
  CHECKPOINT is what megatron.core.dist_checkpointing or hf-to-megatron wrote, the folder of a run (its newest
  checkpoint) or a step_* folder of one, in any layout. config.json, generation_config.json and tokenizer files come
  from --hf, or from the model.path that the run recorded.
aer convert hf-to-fp8 MODEL OUTPUT [--dtype D]
  What SGLang servers of rollout.quantization = "fp8" are started from: projections in float8_e4m3fn with one scale per
  block of 128 x 128. A run that launches its servers does this itself; those of sglang.urls need it.
aer convert check MODEL [--layouts 1x1,2x1,1x2,2x2] [--scratch FOLDER]
  Proves on your own model that conversion loses nothing: there and back, bit for bit; through GPTModel in every layout
  TPxPP[xEP], on as many processes, bit for bit; and the logits of a fixed prompt against transformers'."""


def _run(given: Given, edge: Edge) -> int:
    form, *names = given.places
    if form not in _FORMS:
        raise ValueError(f"{form} is no form of aer convert; use {', '.join(_FORMS)}")
    wanted, takes = _FORMS[form]
    if len(names) != len(wanted.split()):
        raise ValueError(f"aer convert {form} takes {wanted}, and {len(names)} were given")
    for name, value in given.options.items():
        if value and name not in takes:
            raise ValueError(f"--{name} is no option of aer convert {form}; it has --{', --'.join(sorted(takes))}")
    try:
        _convert(form, given, [Path(name) for name in names])
    except OSError as error:
        if lacks_space(error):
            full = f"{error}; the disk is full: nothing was left under the output's name"
            raise RuntimeError(full) from error
        raise
    return 0


def _convert(form: str, given: Given, paths: list[Path]) -> None:
    if form == "check":
        from aer_megatron.conversion.round_trip import check_round_trip

        check_round_trip(paths[0], given["layouts"] or ["1x1", "2x1", "1x2", "2x2"], given["scratch"])
        return
    from aer_megatron.conversion import forms

    run = {"hf-to-megatron": forms.hf_to_megatron, "megatron-to-hf": forms.megatron_to_hf, "hf-to-fp8": forms.hf_to_fp8}
    run[form](given, *paths)
    print(paths[1])


def _gigabytes(text: str) -> float:
    try:
        size = float(text)
    except ValueError:
        size = 0.0
    if not 0 < size < 1e6:
        raise ValueError("must be a number of gigabytes above 0")
    return size


COMMAND = CommandLine(
    "convert",
    about="Converts a model between Hugging Face, Megatron-Core's distributed checkpoints and FP8, or checks that this "
    "loses nothing. Tensors are read and written one at a time. OUTPUT appears when it is complete and on disk, or not "
    "at all.",
    run=_run,
    place="FORM MODEL [OUTPUT]",
    what=f"{', '.join(_FORMS)}",
    overrides=False,
    several_places=True,
    options=(
        Option("dtype", "D", "of the output [as stored; of what is not FP8 bfloat16]", choices=_DTYPES),
        Option("tp", "N", "tensor-parallel size that the heads must split into [1]", whole(1)),
        Option("hf", "MODEL", "folder of config.json, tokenizer, ... [the checkpoint's, or its run's model.path]"),
        Option("verify", "", "read the output back: names, shapes, bits, logits"),
        Option("max-file-gb", "GB", "size of one output file [4, of Hugging Face folders 5]", _gigabytes),
        Option("layouts", "LIST", "what check runs [1x1,2x1,1x2,2x2]", lambda text: text.split(",")),
        Option("scratch", "FOLDER", "where check has its copies: room for twice the model", Path),
    ),
    more_help=lambda: _FORMS_TEXT,
)
main = COMMAND.main
