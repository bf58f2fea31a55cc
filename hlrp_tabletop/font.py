"""A 5x7 bitmap font for the instruction under a video frame: lower-case letters and the space."""

import textwrap

import numpy as np

# Five column bytes per letter, the lowest bit on top.
_COLUMNS = {
    "a": "2054545478", "b": "7f48444438", "c": "3844444420", "d": "384444487f", "e": "3854545418", "f": "087e090102",
    "g": "0c5252523e", "h": "7f08040478", "i": "00447d4000", "j": "2040443d00", "k": "7f10284400", "l": "00417f4000",
    "m": "7c04180478", "n": "7c08040478", "o": "3844444438", "p": "7c14141408", "q": "081414187c", "r": "7c08040408",
    "s": "4854545420", "t": "043f444020", "u": "3c4040207c", "v": "1c2040201c", "w": "3c4030403c", "x": "4428102844",
    "y": "0c5050503c", "z": "4464544c44",
}  # fmt: skip
_HEIGHT, _LINE, _PITCH = 7, 9, 6


def text_mask(text: str, width: int, height: int) -> np.ndarray:
    """Boolean picture (height, width) of `text`, wrapped and centred, in letters of double size if it then fits."""
    scale = 2
    lines = _wrap(text, width, scale)
    if len(lines) * _LINE * scale > height:
        scale = 1
        lines = _wrap(text, width, scale)
    mask = np.zeros((height, width), dtype=bool)
    top = max(0, (height - _LINE * scale * len(lines)) // 2)
    for number, line in enumerate(lines):
        pixels = np.kron(_line_mask(line), np.ones((scale, scale), dtype=bool))
        left = max(0, (width - pixels.shape[1]) // 2)
        row = top + number * _LINE * scale
        target = mask[row : row + pixels.shape[0], left : left + pixels.shape[1]]
        target |= pixels[: target.shape[0], : target.shape[1]]
    return mask


def _wrap(text: str, width: int, scale: int) -> list[str]:
    return textwrap.wrap(text, width=max(1, width // (_PITCH * scale)))


def _line_mask(line: str) -> np.ndarray:
    """(7, 6 * letters) bool; a character that the font lacks is left blank."""
    columns = np.zeros((len(line), _PITCH), dtype=np.uint8)
    for index, letter in enumerate(line):
        columns[index, : _PITCH - 1] = list(bytes.fromhex(_COLUMNS.get(letter.lower(), "00" * 5)))
    return (columns.reshape(-1) >> np.arange(_HEIGHT)[:, None] & 1).astype(bool)
