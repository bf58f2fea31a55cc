"""The LAQ's own code vectors, for a code head that predicts them (`--policy.code_head=vector`) or an action head that
decodes them (`--policy.action_head=laq`).

They are read once, when the head is new, and saved with it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from hlrp_core.expectation import expect
from lerobot_hlrp.hub_folder import fetch_laq
from lerobot_hlrp.label_sources import OnlineLabels, adopt_facts

if TYPE_CHECKING:
    from torch import Tensor

    from lerobot_hlrp.policy_config import HLRPConfig


def read_code_vectors(config: HLRPConfig, *, has_new_code_head: bool) -> Tensor | None:
    """Code vectors `[S, K, D]` from the LAQ or the code table that the config names; None where no new head has any.

    What a LAQ fixes (sizes, frame gap, hash) is written into the config where it left that open.

    Args:
        has_new_code_head: the code head is not from a checkpoint. The action head always is new here.

    Raises:
        ValueError: nothing that has vectors is named, or a LAQ that is not the one whose codes the policy predicts.
    """
    if has_new_code_head and config.predicts_vectors:
        wanted = f"code_head={config.code_head}"
    elif config.decodes_code_vectors:
        wanted = f"action_head={config.action_head}"
    else:
        return None
    vectors = _read(config, wanted)
    config.code_vector_dim = vectors.shape[-1]
    return vectors


def _read(config: HLRPConfig, wanted: str) -> Tensor:
    name = config.laq_weights or config.laq
    if name is None and config.codes is not None:
        return _read_from_table(config.codes, wanted)
    if name is None and config.use_peft and config.code_vector_dim is not None:
        # The head is new to the checkpoint that an adapter was trained on, and the adapter's own weights follow.
        assert config.codebook_size is not None
        assert config.code_seq_len is not None
        return torch.full((config.code_seq_len, config.codebook_size, config.code_vector_dim), math.nan)
    expect(
        name is not None,
        f"LAQ for {wanted}",
        "its folder or Hub id, for its code vectors",
        None,
        "Set --policy.laq_weights, or --policy.laq or --policy.codes.",
    )
    assert name is not None
    from hlrp_core.laq.quantizer import LatentActionQuantizer

    folder = fetch_laq(name, setting="laq_weights" if config.laq_weights else "laq")
    laq = LatentActionQuantizer.from_pretrained(folder)
    source = OnlineLabels(laq, name, config.camera or "", frame_gap=config.frame_gap)
    adopt_facts(config, source, without=["frame_gap"])  # which is the labels' affair, in seconds
    return source.laq.code_vector_table()


def _read_from_table(path: str, wanted: str) -> Tensor:
    from hlrp_core.laq.code_table import CodeTable

    vectors = CodeTable.load(path).vectors
    expect(
        vectors is not None,
        f"LAQ for {wanted}",
        "code vectors, in the code table or of a LAQ beside it",
        f"a code table with codes alone ({path})",
        "Name the LAQ that made it with --policy.laq_weights, or label the dataset anew with hlrp-label.",
    )
    assert vectors is not None
    return vectors
