"""Which token of a response is not finite, where a tool said some of its tokens."""

from __future__ import annotations

import numpy as np

from aer_megatron.actor.nonfinite_findings import nonfinite_inputs
from aer_megatron.types import TrainBatch
from tests.support.experiences import experience_of, with_mask


def test_a_place_is_one_of_the_response_not_of_its_sampled_tokens() -> None:
    # responses of 3 and 4 tokens behind prompts of 1 and 2; sampled: token 2 of the first, tokens 1 and 3 of the second
    lengths = (np.array([1, 2]), np.array([3, 4]))
    mask_L = np.array([0, 0, 0, 1, 0, 0, 0, 1, 0, 1], dtype=np.bool_)
    experience = with_mask(experience_of(*lengths, np.zeros(10, dtype=np.int64)), mask_L)
    old_logprob_T = np.array([-1.0, -1.0, np.nan], dtype=np.float32)
    batch = TrainBatch(experience, np.zeros(2), np.zeros(2), old_logprob_T)
    (finding,) = nonfinite_inputs(batch, np.array([0, 1]))
    (place,) = finding.places
    assert (finding.tensor, place.sequence, place.token) == ("old_logprob_T", 1, 3)
    assert nonfinite_inputs(batch, np.array([0])) == []
