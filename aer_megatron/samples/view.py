"""A sample as text for a terminal, its tokens coloured by their entropy.

What the policy and the data wrote is shown as it is, never as markup or terminal sequences (console/escaping.py), and
stands behind a bar at the left edge, so that no line of it passes for one of ours.
"""

from __future__ import annotations

import math

from rich.text import Text

from aer_megatron.console.escaping import visible
from aer_megatron.report.samples import Sample

# token entropy in nats below -> style; NaN has the last one
_LEVELS = ((0.1, ""), (0.5, "cyan"), (1.0, "green"), (2.0, "magenta"), (math.inf, "bold red"))
_CONTEXT = "dim italic"
_LABEL = "bold"
_BAR = "│ "


def legend() -> Text:
    """Returns one line: the colour of every range of token entropy, and of context."""
    line, lower = Text("token entropy in nats: "), 0.0
    for upper, style in _LEVELS:
        line.append(f"{lower:g} to {upper:g}" if math.isfinite(upper) else f"{lower:g} and more", style)
        line.append("  ")
        lower = upper
    return line.append("context, not sampled", _CONTEXT)


def sample_text(sample: Sample) -> Text:
    """Returns the header, the prompt, the expected answer and the completion of a sample, each on lines of its own."""
    text = Text()
    text.append(visible(_header(sample), keep=""), "bold reverse").append("\n")
    _append_block(text, "prompt", Text(visible(sample.prompt)))
    _append_block(text, "expected answer", Text(visible(sample.answer)))
    mean = mean_entropy(sample)
    entropy = f", mean entropy {mean:.3f} nats" if mean >= 0.0 else ""
    _append_block(text, f"completion (tokens {len(sample.token_ids)}{entropy})", _coloured(sample))
    return text


def mean_entropy(sample: Sample) -> float:
    """Returns the mean token_entropy of the sampled tokens in nats; -1 where it was not recorded or is not a number."""
    if not sample.token_entropy:
        return -1.0
    mean = math.fsum(sample.token_entropy) / len(sample.token_entropy)
    return -1.0 if math.isnan(mean) else mean


def _header(sample: Sample) -> str:
    first, last = sample.policy_version_min, sample.policy_version_max
    parts = [f"step {sample.step}", sample.set, f"prompt {sample.prompt_id:016x}", f"reward {sample.reward:g}"]
    parts.append(sample.reason)
    numbers = (
        ("advantage", sample.advantage), ("difficulty", sample.difficulty), ("entropy weight", sample.entropy_weight),
    )  # fmt: skip
    parts += [f"{name} {value:.4g}" for name, value in numbers if value is not None]
    parts.append(f"policy {first}" if first == last else f"policy {first} to {last}")
    return " · ".join([*parts, *(["truncated"] if sample.truncated else [])])


def _append_block(text: Text, label: str, content: Text) -> None:
    text.append(label, _LABEL).append("\n")
    for line in content.split("\n", allow_blank=True) or [Text()]:
        text.append(_BAR, "dim").append_text(line).append("\n")


def _coloured(sample: Sample) -> Text:
    """Returns the completion, sampled tokens in the colour of their entropy, and context dimmed."""
    text, start = Text(), 0
    sampled = sample.sampled or (True,) * len(sample.token_ends)
    entropies = iter(sample.token_entropy or ())
    for end, is_sampled in zip(sample.token_ends, sampled):
        entropy = next(entropies, None) if is_sampled else None
        text.append(visible(sample.completion[start:end]), _style(entropy) if is_sampled else _CONTEXT)
        start = max(start, end)
    return text.append(visible(sample.completion[start:]))


def _style(entropy: float | None) -> str:
    if entropy is None:
        return ""
    return next((style for upper, style in _LEVELS if entropy < upper), _LEVELS[-1][1])
