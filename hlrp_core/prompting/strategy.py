"""PromptingStrategy: from frames and instructions to padded token ids and image inputs.

A strategy only says which pieces a prompt is made of. Turning pieces into ids is the same for all of them, and
exists twice: from the tokenizer alone (fast: a prompt is encoded once and kept) and from the processor's own output
(one call for the batch). `check_length_sources` holds the two equal: at setup, and at the first prompt of each further
number of images.

The user's words, and the state's text behind them where that is asked for, are encoded with special tokens off, so that
an instruction that contains `<|im_start|>` or `<ACT_3>` stays plain text; and together with the template's text around
them, up to its next special token, so that the ids are those of the prompt encoded as a whole.

Shape legend: B batch, N images for each sample, L tokens, P position axes.
"""

from __future__ import annotations

import abc
import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hlrp_core.backbones.model_core import ModelCore
from hlrp_core.backbones.token_batch import EncodedPrompt, ImageInputs, TokenBatch
from hlrp_core.codes.token_scheme import encode_literal, encode_plain
from hlrp_core.prompting.prompt import ImageSlot, PaddingSide, Piece, PromptConfig, TemplateText, UserText
from hlrp_core.prompting.state_text import write_states

CACHED_PROMPTS = 4096


@dataclass(frozen=True)
class PromptInputs:
    """A batch of prompts, ready for a core."""

    tokens: TokenBatch
    images: ImageInputs


class PromptingStrategy(abc.ABC):
    """Builds prompts for one core.

    Args:
        core: whose tokenizer and image layouts the prompts use.
        config: the settings of the prompt.

    Raises:
        ValueError: a setting holds a token that cannot stand there.
    """

    def __init__(self, core: ModelCore, config: PromptConfig):
        _check_tokens(core, config)
        self.core = core
        self.config = config
        self._pieces: dict[int, list[Piece]] = {}
        self._prompts: OrderedDict[tuple, EncodedPrompt] = OrderedDict()
        self._compared: set[int] = set()  # numbers of images

    @abc.abstractmethod
    def build_pieces(self, num_images: int) -> list[Piece]:
        """The prompt of a sample with this many images: text, image slots and one place for the instruction."""

    def pieces(self, num_images: int) -> list[Piece]:
        if num_images not in self._pieces:
            self._pieces[num_images] = join_words(self.build_pieces(num_images), special_tokens(self.core))
        return self._pieces[num_images]

    def encode(
        self,
        images: Sequence[Tensor],
        instructions: Sequence[str],
        *,
        padding_side: PaddingSide,
        state: Tensor | None = None,
    ) -> PromptInputs:
        """Prompts of a batch.

        Args:
            images: for each of the N views a batch `[B, H, W, 3]` uint8.
            instructions: B of them.
            state: `[B, D]`, normalised; read with `config.state_text` alone.

        Raises:
            ValueError: a prompt is too long, has no state to write, or is another by tokenizer than by processor.
        """
        if len(images) not in self._compared:
            self.check_length_sources(len(images))
        words = self._words(instructions, state)
        if self.config.length_from == "processor":
            prompts, image_inputs = self._encode_with_processor(images, words)
        else:
            prompts, image_inputs = self._encode_with_tokenizer(images, words)
        pad_id = self.core.tokenizer.pad_token_id
        tokens = TokenBatch.pad(prompts, pad_id=pad_id, side=padding_side, device=self.core.device)  # type: ignore[arg-type]
        return PromptInputs(tokens, image_inputs)

    # -- the fast way: the tokenizer alone ------------------------------------------------------------------------

    def _encode_with_tokenizer(
        self, images: Sequence[Tensor], words: Sequence[str]
    ) -> tuple[list[EncodedPrompt], ImageInputs]:
        num_views = len(images)
        inputs = self.core.process_images(interleave_views(images).to(self.core.device))
        prompts = []
        for row, text in enumerate(words):
            layouts = tuple(inputs.layouts[row * num_views : (row + 1) * num_views])
            prompts.append(self._prompt(text, layouts))
        return prompts, inputs

    def _prompt(self, words: str, layouts: tuple[tuple[int, ...], ...]) -> EncodedPrompt:
        if self.config.state_text:
            return self._encode_prompt(words, layouts)  # hardly two prompts are alike
        key = (words, layouts)
        if key in self._prompts:
            self._prompts.move_to_end(key)
            return self._prompts[key]
        prompt = self._prompts[key] = self._encode_prompt(words, layouts)
        if len(self._prompts) > CACHED_PROMPTS:
            self._prompts.popitem(last=False)
        return prompt

    def _encode_prompt(self, words: str, layouts: tuple[tuple[int, ...], ...]) -> EncodedPrompt:
        remaining = iter(layouts)
        ids: list[int] = []
        for piece in self.pieces(len(layouts)):
            match piece:
                case TemplateText(text):
                    ids += encode_literal(self.core.tokenizer, text)
                case UserText():
                    ids += self._user_ids(piece, words)
                case ImageSlot():
                    ids += self.core.image_ids(next(remaining))
        return self._with_positions(torch.tensor(ids), list(layouts))

    # -- the processor's way --------------------------------------------------------------------------------------

    def _encode_with_processor(
        self, images: Sequence[Tensor], words: Sequence[str]
    ) -> tuple[list[EncodedPrompt], ImageInputs]:
        num_views, size = len(images), len(words)
        pieces = self.pieces(num_views)
        # The processor would read special tokens in the user's words, so it gets a stand-in that is spliced out.
        stand_in, stand_in_id = self._stand_in(pieces)
        place = next(piece for piece in pieces if isinstance(piece, UserText))
        texts = {
            TemplateText: lambda p: p.text,
            UserText: lambda _: stand_in,
            ImageSlot: lambda _: self.core.image_token,
        }
        text = "".join(texts[type(piece)](piece) for piece in pieces)
        flat = interleave_views(images).to(self.core.device)
        output = self.core.processor(  # type: ignore[operator]
            text=[text] * size,
            images=self.core.images_for_processor(flat, num_views),
            padding=True,  # type: ignore[call-arg]
            return_tensors="pt",  # type: ignore[call-arg]
        )
        inputs = self.core.image_inputs_from_processor(output)
        prompts = []
        for row, said_in_row in enumerate(words):
            ids = output["input_ids"][row][output["attention_mask"][row].bool()].cpu()
            at = int((ids == stand_in_id).nonzero()[0])
            said = torch.tensor(self._user_ids(place, said_in_row), dtype=torch.long)
            ids = torch.cat([ids[:at], said, ids[at + 1 :]])
            prompts.append(self._with_positions(ids, inputs.layouts[row * num_views : (row + 1) * num_views]))
        return prompts, inputs

    def _stand_in(self, pieces: list[Piece]) -> tuple[str, int]:
        """A special token that the template does not use."""
        template = "".join(piece.text for piece in pieces if isinstance(piece, TemplateText)) + self.core.image_token
        for token in self.core.tokenizer.all_special_tokens:
            if token not in template:
                return token, self.core.tokenizer.convert_tokens_to_ids(token)  # type: ignore[return-value]
        raise ValueError(
            "prompt.length_from=processor: expected a tokenizer with a special token that the template does not use, "
            "got none. Next step: use prompt.length_from=tokenizer."
        )

    # -- shared by both -------------------------------------------------------------------------------------------

    def _words(self, instructions: Sequence[str], state: Tensor | None) -> list[str]:
        """What stands in the user's place in each prompt: the instruction and, where asked for, the state."""
        template = self.config.instruction_template if self.config.use_instruction else ""
        words = [template.replace("{instruction}", instruction) for instruction in instructions]
        if not self.config.state_text:
            return words
        states = write_states(state, self.config)
        return ["\n".join(filter(None, pair)) for pair in zip(words, states, strict=True)]

    def _user_ids(self, piece: UserText, words: str) -> list[int]:
        text = piece.before + words + piece.after
        return encode_plain(self.core.tokenizer, text) if text else []

    def _with_positions(self, ids: Tensor, layouts: list[tuple[int, ...]]) -> EncodedPrompt:
        self.core.check_length(len(ids))
        return EncodedPrompt(ids, self.core.build_positions(ids, layouts))

    def check_length_sources(self, num_images: int = 1) -> None:
        """Compare the tokenizer's and the processor's prompts on prompts of different length.

        Raises:
            ValueError: they differ, so that one of the two would mask the prompt wrongly.
        """
        instructions = ["", "reach the red disc", "push the green block to the blue corner, slowly"]
        state = torch.tensor([[0.0, 0.0], [-9.0, 9.0], [0.3, -0.7]])
        probes = self._words(instructions, state)
        size = len(probes)
        images = [torch.zeros(size, 64, 64, 3, dtype=torch.uint8, device=self.core.device)] * num_images
        by_tokenizer, _ = self._encode_with_tokenizer(images, probes)
        by_processor, _ = self._encode_with_processor(images, probes)
        for text, fast, slow in zip(probes, by_tokenizer, by_processor, strict=True):
            if not torch.equal(fast.ids, slow.ids):
                raise ValueError(
                    f"prompt: expected the same ids from the tokenizer and from the processor, got {len(fast.ids)} and "
                    f"{len(slow.ids)} tokens for {text!r} with {num_images} image(s) "
                    f"({type(self.core.processor).__name__}). Next step: this processor adds tokens of its own; write "
                    "the prompt without them or use another processor."
                )
        self._compared.add(num_images)


def special_tokens(core: ModelCore) -> list[str]:
    """Of the tokenizer, those of the code tokens included."""
    return [token.content for token in core.tokenizer.added_tokens_decoder.values() if token.special]


def _check_tokens(core: ModelCore, config: PromptConfig) -> None:
    for field in ("system", "few_shot", "instruction_template", "state_template"):
        token = core.find_image_token(getattr(config, field))
        if token is not None:
            raise ValueError(
                f"prompt.{field}: expected text without a token that stands for an image, got {token!r} in it. "
                "Next step: leave it out; the prompt writes the images itself (prompt.image_position)."
            )
    special = special_tokens(core)
    for field in ("instruction_template", "state_template"):
        token = next((token for token in special if token in getattr(config, field)), None)
        if token is not None:
            raise ValueError(
                f"prompt.{field}: expected plain text, as what stands in it is encoded like the user's words, got the "
                f"special token {token!r} in it. Next step: put it into prompt.system or prompt.few_shot, or choose "
                "prompting=chat, whose template writes such tokens itself."
            )


def join_words(pieces: list[Piece], special_tokens: Sequence[str]) -> list[Piece]:
    """The same prompt, with the template's text beside the instruction, up to a special token, in the `UserText`.

    No token of a tokenizer spans a special token, so that encoding such pieces one by one equals encoding the whole.
    """
    at = pieces.index(UserText())
    head, tail = pieces[:at], pieces[at + 1 :]
    before = after = ""
    longest_first = sorted(special_tokens, key=len, reverse=True)
    special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")  # none: nothing matches
    if head and isinstance(last := head[-1], TemplateText):
        cut = max((match.end() for match in special.finditer(last.text)), default=0)
        head[-1:] = [TemplateText(last.text[:cut])] if cut else []
        before = last.text[cut:]
    if tail and isinstance(first := tail[0], TemplateText):
        match = special.search(first.text)
        cut = match.start() if match else len(first.text)
        tail[:1] = [TemplateText(first.text[cut:])] if match else []
        after = first.text[:cut]
    return [*head, UserText(before, after), *tail]


def interleave_views(views: Sequence[Tensor]) -> Tensor:
    """Views `N x [B, H, W, 3]` -> `[B * N, H, W, 3]`, the views of a sample side by side.

    Raises:
        ValueError: views of different size.
    """
    shapes = {tuple(view.shape[1:]) for view in views}
    if len(shapes) > 1:
        raise ValueError(
            f"views: expected one size for all cameras, got {sorted(shapes)}. Next step: resize them to one size."
        )
    if len(views) == 1:
        return views[0]
    return torch.stack(list(views), dim=1).flatten(0, 1)
