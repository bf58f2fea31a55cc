"""A small byte-level tokenizer for robot instructions, for checkpoints that are made without a published one."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

# Text on which the small tokenizer is trained: the words of robot instructions become single tokens.
_VERBS = [
    "push",
    "reach",
    "pick up",
    "place",
    "open",
    "close",
    "move",
    "turn",
    "press",
    "slide",
    "lift",
    "touch",
]
_COLOURS = ["red", "green", "blue", "yellow", "purple", "orange", "pink", "brown", "black", "white", "grey", "cyan"]
_THINGS = [
    "block",
    "disc",
    "triangle",
    "ring",
    "star",
    "cross",
    "square",
    "circle",
    "cube",
    "bowl",
    "plate",
    "cup",
    "drawer",
    "door",
    "button",
    "lever",
    "handle",
    "box",
    "corner",
    "pad",
    "table",
    "left",
    "right",
    "top",
    "bottom",
    "front",
    "back",
    "robot",
    "arm",
    "gripper",
    "object",
    "task",
    "image",
    "action",
    "state",
    "instruction",
]


def _instruction_corpus() -> list[str]:
    corpus = [
        "You are a robot.",
        "What should the robot do?",
        "user system assistant",
        "0 1 2 3 4 5 6 7 8 9 . , : -",
    ]
    corpus += [f"{verb} the {colour} {thing}" for verb in _VERBS for colour in _COLOURS for thing in _THINGS]
    corpus += [
        f"push the {a} {t} to the {b} {u}" for a in _COLOURS for b in _COLOURS for t in _THINGS[:8] for u in _THINGS
    ]
    return corpus


def train_tokenizer_files(folder: Path, *, vocab_size: int) -> None:
    """Write `vocab.json` and `merges.txt` of a byte-level BPE for short instructions; any text still encodes."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=ByteLevel.alphabet(), show_progress=False, min_frequency=2
    )
    tokenizer.train_from_iterator(_instruction_corpus(), trainer)
    tokenizer.model.save(str(folder))
