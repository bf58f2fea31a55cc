"""The LAQ's own code vectors, for an action head that decodes them (`--policy.action_head=laq`).

They are read once, when the head is new, and saved with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hlrp_core.heads import ACTION_HEADS
from lerobot_hlrp.expectation import expect
from lerobot_hlrp.label_sources import OnlineLabels, adopt_facts

if TYPE_CHECKING:
    from torch import Tensor

    from lerobot_hlrp.policy_config import HLRPConfig


def read_code_vectors(config: HLRPConfig) -> Tensor | None:
    """Code vectors `[S, K, D]` of the LAQ that the config names; None where its action head decodes none.

    What the LAQ fixes (sizes, frame gap, hash) is written into the config where it left that open.

    Raises:
        ValueError: no LAQ is named, or it is not the one whose codes the policy predicts.
    """
    if config.action_head is None or not ACTION_HEADS[config.action_head].needs_code_vectors:
        return None
    name = config.laq_weights or config.laq
    expect(
        name is not None,
        f"LAQ for action_head={config.action_head}",
        "its folder or Hub id, as the head decodes its code vectors",
        "a code table, which holds codes alone" if config.codes else None,
        "Set --policy.laq_weights" + (" beside --policy.codes." if config.codes else ", or --policy.laq."),
    )
    assert name is not None
    from hlrp_core.laq.quantizer import LatentActionQuantizer

    laq = LatentActionQuantizer.from_pretrained(name)
    source = OnlineLabels(laq, name, config.camera or "", frame_gap=config.frame_gap)
    adopt_facts(config, source)
    return source.laq.code_vector_table()
