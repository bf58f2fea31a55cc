"""Processors of `hlrp_smol_latent`."""

from __future__ import annotations

from lerobot_hlrp.processors import make_pre_post_processors as make_hlrp_smol_latent_pre_post_processors

__all__ = ["make_hlrp_smol_latent_pre_post_processors"]
