"""The robot's state as words of the prompt: each number as the index of its bin, in the manner of pi0.5.

A language model reads and compares small whole numbers well, and a tokenizer splits `-0.4137` into whatever it likes.

Shape legend: B batch, D state width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hlrp_core.prompting.prompt import PromptConfig


def write_states(state: Tensor | None, config: PromptConfig) -> list[str]:
    """The text of each state `[B, D]`, normalised: `state_template` with D bin indices in [0, `state_bins`).

    The bins divide [-`state_range`, `state_range`] evenly; what lies beyond counts as its end.

    Raises:
        ValueError: there is no state, or a number in it is not finite.
    """
    if state is None or state.shape[-1] == 0:
        raise ValueError(
            "state: expected [B, D] for prompt.state_text, which writes it into the prompt, got "
            f"{None if state is None else list(state.shape)}. Next step: use data with a state (observation.state), or "
            "set prompt.state_text=false."
        )
    is_broken = ~state.isfinite().all(-1)  # (B,)
    if bool(is_broken.any()):
        raise ValueError(
            f"state: expected finite numbers for prompt.state_text, got NaN or infinity in samples "
            f"{is_broken.nonzero().flatten().tolist()}. Next step: repair the data, or set prompt.state_text=false."
        )
    return [
        config.state_template.replace("{state}", " ".join(map(str, numbers)))
        for numbers in find_bins(state, config).tolist()
    ]


def find_bins(state: Tensor, config: PromptConfig) -> Tensor:
    """Bin index of each number of `[B, D]`, long."""
    fraction = (state.double() + config.state_range) / (2 * config.state_range)  # of the whole range
    return (fraction * config.state_bins).floor().clamp(0, config.state_bins - 1).to(torch.long)
