"""Codes as text: the tokens of a completion, and the way back.

With S=4 the default completion reads `<ACTION> <ACT_3> <ACT_0> <ACT_7> <ACT_1> </ACTION>`. It ends with the closing
wrapper: no end-of-sequence token is trained, and generation stops there.

Shape legend: B batch, S code positions, K codebook size, N tokens of a completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tokenizers import AddedToken
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class TokenSchemeConfig:
    """How codes are written. The comment above a field is its help text on the command line.

    Raises:
        ValueError: names that are no tokens, or that do not go together.
    """

    # Wrapper before the codes.
    begin: str = "<ACTION>"
    # Wrapper after the codes.
    end: str = "</ACTION>"
    # Between all of them, in plain text; empty for the short scheme.
    separator: str = " "
    # Name of a code token; `{}` stands for the code.
    code: str = "<ACT_{}>"

    def __post_init__(self) -> None:
        if self.code.count("{}") != 1:
            raise ValueError(
                f"token scheme: expected one '{{}}' in the code token's name, got {self.code!r}. "
                "Next step: put it where the code's number belongs, as in '<ACT_{}>'."
            )
        for name in (self.begin, self.end, self.code):
            if not name or name != name.strip():
                raise ValueError(
                    f"token scheme: expected a name without surrounding blanks, got {name!r}. "
                    "Next step: leave the blanks out; the separator is a setting of its own."
                )
        if self.begin == self.end:
            raise ValueError(
                f"token scheme: expected different wrappers, got {self.begin!r} for both. Next step: rename one."
            )

    def code_token(self, code: int) -> str:
        return self.code.replace("{}", str(code))

    def token_names(self, codebook_size: int) -> list[str]:
        """Every token the scheme adds, in the order in which ids are given."""
        return [self.begin, self.end, *(self.code_token(k) for k in range(codebook_size))]

    def check_names(self, codebook_size: int) -> None:
        """Raises:
        ValueError: a wrapper has the name of a code, or of code K: who holds that one has a larger codebook.
        """
        codes = {self.code_token(k): k for k in range(codebook_size + 1)}
        for field in ("begin", "end"):
            name = getattr(self, field)
            if name in codes:
                raise ValueError(
                    f"token scheme: expected a name for {field!r} that differs from those of codes 0 to "
                    f"{codebook_size} (codebook_size={codebook_size}), got {name!r}, the name of code {codes[name]}. "
                    "Next step: choose another, such as '<ACTION>' for begin and '</ACTION>' for end."
                )


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of `text` with special tokens off: what looks like a special token stays plain text."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def encode_literal(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of `text` with special tokens on, and none added around it."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)


def add_code_tokens(tokenizer: PreTrainedTokenizerBase, scheme: TokenSchemeConfig, codebook_size: int) -> int:
    """Give the tokenizer the scheme's tokens: deterministic, and a second call changes nothing.

    Returns:
        How many tokens were added: all of them or 0.

    Raises:
        ValueError: names of the scheme clash with each other; or the tokenizer holds some of them but not all, or
            those of a larger codebook, or one as an ordinary word: it was made for other codes.
    """
    scheme.check_names(codebook_size)
    names = scheme.token_names(codebook_size)
    vocabulary = tokenizer.get_vocab()
    present = [name for name in names if name in vocabulary]
    beyond = scheme.code_token(codebook_size)
    if beyond in vocabulary:
        raise ValueError(
            f"tokenizer: expected code tokens up to {names[-1]} (codebook_size={codebook_size}), got a tokenizer that "
            f"also holds {beyond}. Next step: use the codebook size it was made for, or the original tokenizer."
        )
    if present:
        special = set(tokenizer.all_special_tokens) | {
            t.content for t in tokenizer.added_tokens_decoder.values() if t.special
        }
        ids = [vocabulary[name] for name in present]
        in_order = ids == list(range(ids[0], ids[0] + len(names)))
        if len(present) < len(names) or not in_order or any(name not in special for name in names):
            raise ValueError(
                f"tokenizer: expected none or all of {len(names)} code tokens ({names[0]}, ..., {names[-1]}) as "
                f"special tokens with consecutive ids, got {len(present)} of them ({present[0]}, ...). "
                "Next step: choose other names in the token scheme, or use the original tokenizer."
            )
        return 0
    # special=True is what lets `split_special_tokens` keep a user's "<ACT_3>" plain text
    tokens = [AddedToken(name, special=True, normalized=False) for name in names]
    return tokenizer.add_tokens(tokens, special_tokens=True)  # type: ignore[arg-type]


class CodeVocabulary:
    """Ids of the code tokens of one tokenizer, and the completion they form.

    Args:
        tokenizer: already holds the tokens (`add_code_tokens`).
        code_seq_len: S.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        scheme: TokenSchemeConfig,
        codebook_size: int,
        code_seq_len: int,
    ):
        vocabulary = tokenizer.get_vocab()
        ids = [vocabulary[name] for name in scheme.token_names(codebook_size)]
        self.codebook_size = codebook_size
        self.code_seq_len = code_seq_len
        self.begin_id, self.end_id = ids[0], ids[1]
        self.ids = torch.tensor(ids)  # (2 + K,), consecutive: the wrapper and the codes
        self.code_ids = self.ids[2:]  # (K,)
        self.separator_ids = encode_plain(tokenizer, scheme.separator) if scheme.separator else []

        code_slot = -1
        template = [self.begin_id]
        for _ in range(code_seq_len):
            template += [*self.separator_ids, code_slot]
        template += [*self.separator_ids, self.end_id]
        self.template = torch.tensor(template)  # (N,); -1 where a code stands
        self.code_slots = (self.template == code_slot).nonzero().flatten()  # (S,)

    @property
    def completion_len(self) -> int:
        """N."""
        return len(self.template)

    @property
    def forced_prefix(self) -> Tensor:
        """Ids that stand before the first code, `(1 + separator,)`."""
        return self.template[: int(self.code_slots[0])]

    def encode(self, codes: Tensor) -> Tensor:
        """Codes `[B, S]` -> completion ids `[B, N]`."""
        completion = self.template.to(codes.device).repeat(codes.shape[0], 1)  # (B, N)
        completion[:, self.code_slots.to(codes.device)] = self.code_ids.to(codes.device)[codes]
        return completion

    def decode(self, ids: Sequence[int]) -> list[int] | None:
        """Completion ids -> S codes; None if the ids are not exactly such a completion. Inverse of `encode`."""
        if len(ids) < self.completion_len:
            return None
        first = int(self.code_ids[0])
        codes = [int(ids[slot]) - first for slot in self.code_slots.tolist()]
        if not all(0 <= code < self.codebook_size for code in codes):
            return None
        rebuilt = self.encode(torch.tensor([codes]))[0].tolist()
        return codes if list(ids[: self.completion_len]) == rebuilt else None
