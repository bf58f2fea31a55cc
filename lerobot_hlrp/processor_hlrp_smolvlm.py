"""Processors of `hlrp_smolvlm`."""

from __future__ import annotations

from lerobot_hlrp.processors import make_pre_post_processors as make_hlrp_smolvlm_pre_post_processors

__all__ = ["make_hlrp_smolvlm_pre_post_processors"]
