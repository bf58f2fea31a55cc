"""What a policy expects to see: the codes that it predicts, drawn by the LAQ beside the frame that they start from.

`lerobot-eval --policy.save_predicted_video=true` makes a video of it beside each rollout's.

Shape legend: B batch, H W image size, R side of the LAQ's pictures, S codes of a transition, T frames of a label.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hlrp_core.contract import LatentOutput
from hlrp_core.expectation import expect
from hlrp_core.heads.code_vectors import nearest_codes
from hlrp_core.laq.quantizer import LatentActionQuantizer, resize_images
from lerobot_hlrp.hub_folder import fetch_laq

if TYPE_CHECKING:
    from lerobot_hlrp.policy_config import HLRPConfig

LAQ_FOLDER = "laq"
"""Of a saved policy: its LAQ travels with it where it draws."""


class Preview:
    """Draws predicted codes. No part of the policy's modules: nothing here is trained or in its state dict.

    Args:
        laq: the one whose codes the policy predicts.
    """

    def __init__(self, laq: LatentActionQuantizer):
        self.laq = laq.eval().requires_grad_(False)

    def draw(self, frames: Tensor, latent: LatentOutput) -> Tensor:
        """Frame t, and the frames that the codes say will follow it, side by side.

        Args:
            frames: `[B, H, W, 3]` uint8, at time t.
            latent: what was predicted from them; continuous vectors are drawn as the codes nearest to them.

        Returns:
            `[B, 3, 1, R, T * R]` float32 in [0, 1].
        """
        laq = self.laq.to(frames.device)
        codes = latent.tokens
        if codes is None:
            assert latent.vector is not None
            codes = nearest_codes(latent.vector, laq.code_vector_table())
        shown = resize_images(frames.permute(0, 3, 1, 2), laq.config.image_size)  # (B, 3, R, R)
        pictures = [shown]
        for transition in codes.split(laq.config.code_seq_len, dim=1):  # (B, S) each
            following = laq.decode(pictures[-1].permute(0, 2, 3, 1), transition).clamp(0, 1)
            pictures.append((following * 255).round().to(torch.uint8))
        return torch.cat(pictures, dim=-1)[:, :, None].float() / 255

    def save(self, folder: Path) -> None:
        self.laq.save_pretrained(folder / LAQ_FOLDER)


def to_video(drawn: Tensor) -> Tensor:
    """Pictures of a rollout `[B, 3, steps, R, T * R]` -> the first environment's, `[steps, R, T * R, 3]` uint8."""
    return (drawn[0].permute(1, 2, 3, 0) * 255).round().to(torch.uint8)


def open_preview(config: HLRPConfig, saved_in: Path | None) -> Preview | None:
    """Args:
        saved_in: the folder that the policy was loaded from, which may have the LAQ.

    Raises:
        ValueError: the LAQ is not at hand, is another one than that of the codes, or cannot draw.
    """
    if not config.save_predicted_video:
        return None
    expect(
        config.decoding != "free",
        "decoding",
        "constrained or generate with save_predicted_video, which draws every prediction",
        config.decoding,
        "Set --policy.decoding=constrained.",
    )
    saved = saved_in / LAQ_FOLDER if saved_in is not None and (saved_in / LAQ_FOLDER).is_dir() else None
    name = config.laq_weights or config.laq or saved
    expect(
        name is not None,
        "LAQ for save_predicted_video",
        "the folder or Hub id of the LAQ whose codes the policy predicts",
        None,
        "Set --policy.laq_weights.",
    )
    assert name is not None
    laq = LatentActionQuantizer.from_pretrained(fetch_laq(name, setting="laq_weights"))
    expect(
        config.laq_hash in (None, laq.weights_hash()),
        "LAQ for save_predicted_video",
        f"that of the policy's codes, with the hash {config.laq_hash}",
        f"{laq.weights_hash()} ({name})",
        "Name the LAQ that made the labels with --policy.laq_weights.",
    )
    expect(
        laq.config.target == "pixels",
        "LAQ for save_predicted_video",
        "one that draws pixels (--laq.target=pixels)",
        f"one whose target is {laq.config.target} ({name})",
        "Leave --policy.save_predicted_video out.",
    )
    return Preview(laq)
