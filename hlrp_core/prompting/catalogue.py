"""Prompting strategies by name."""

from hlrp_core.prompting.chat import ChatPrompting
from hlrp_core.prompting.plain import PlainPrompting
from hlrp_core.prompting.strategy import PromptingStrategy

PROMPTINGS: dict[str, type[PromptingStrategy]] = {"chat": ChatPrompting, "plain": PlainPrompting}
