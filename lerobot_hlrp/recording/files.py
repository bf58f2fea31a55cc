"""Files that are complete or not there: written under a temporary name beside the final one, then renamed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with the temporary path, then renames it to `path`. Makes the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    write(partial)
    os.replace(partial, path)


def write_json_whole(path: Path, data: Any) -> None:
    write_whole(path, lambda partial: partial.write_text(json.dumps(data, indent=4, ensure_ascii=False) + "\n"))
