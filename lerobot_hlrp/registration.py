"""Registers this package's types with LeRobot, at no cost for commands that need none of them.

Every LeRobot command imports every plugin. Registering a policy type takes LeRobot's own config classes, which take
torch and seconds: a command such as `lerobot-calibrate` would wait for something it never uses. So a module of
ours is imported when the module of LeRobot that it builds on is there, and not before.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

logger = logging.getLogger(__name__)


def import_after(trigger: str, follower: str) -> None:
    """Import the module `follower` right after the module `trigger`; at once, if that has been imported already."""
    if trigger in sys.modules:
        importlib.import_module(follower)
    else:
        sys.meta_path.insert(0, _ImportAfter(trigger, follower))


class _ImportAfter(MetaPathFinder):
    """Finds nothing itself: it waits for one module, lets the other finders load it, and then imports another."""

    def __init__(self, trigger: str, follower: str):
        self.trigger = trigger
        self.follower = follower

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.trigger:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def load_both(module: ModuleType) -> None:
            load(module)
            try:
                importlib.import_module(self.follower)
            except Exception as error:
                # As LeRobot does with a plugin that fails: its commands need its own module, and most not ours.
                cause = f"{type(error).__name__}: {error}"
                logger.error("Could not import %s; LeRobot will not know what it registers. %s", self.follower, cause)
                logger.debug("Where it failed:", exc_info=True)

        spec.loader.exec_module = load_both  # type: ignore[method-assign]
        return spec
