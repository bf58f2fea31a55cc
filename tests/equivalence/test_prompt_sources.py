"""Prompts from the tokenizer alone = prompts from the processor's own output, token for token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from hlrp_core.backbones.random_checkpoint import write_random_checkpoint
from hlrp_core.prompting.prompt import ImageSlot, PromptConfig, TemplateText, UserText
from hlrp_core.prompting.strategy import PromptingStrategy, join_words
from hlrp_core.registry import get_recipe

INSTRUCTIONS = [
    "reach the red disc",
    "",
    "Push the green block to the blue corner, slowly; then wait 3.5 s & stop.",
    "  leading and trailing  ",
    "schieb den grünen Würfel: 把红色的圆盘推到左边 🤖",
    "a <ACT_3> <|im_start|> <|image_pad|> <image>",
]
SETTINGS = {
    "default": PromptConfig(),
    "image before": PromptConfig(image_position="before"),
    "system and few-shot": PromptConfig(system="You are a robot.", few_shot="do x -> done\n", image_position="before"),
    "template": PromptConfig(instruction_template="The task is: {instruction}. What next?"),
    "words beside words": PromptConfig(few_shot="as before: <|im_end|> then ", instruction_template="{instruction}."),
    "without words": PromptConfig(use_instruction=False),
}


NAMES = ["qwen_chat", "qwen_plain", "smol_chat", "smol_plain"]
CHATS = ["qwen_chat", "smol_chat"]
PROCESSORS = {"qwen3_vl": "qwen3_vl", "smolvlm": "smolvlm2_500m"}  # family -> published processor


@pytest.fixture(scope="module")
def strategies(
    make_tiny_backend: Callable, real_processor: Callable, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], PromptingStrategy]:
    """A strategy on a tiny random model with the published processor and its whole vocabulary."""

    @cache
    def checkpoint(family: str) -> Path:
        folder = tmp_path_factory.mktemp("backbone") / family
        return write_random_checkpoint(folder, family=family, processor=real_processor(PROCESSORS[family]))

    return cache(lambda name: make_tiny_backend(name, backbone=checkpoint(get_recipe(name).family)).prompting)


@pytest.fixture(scope="module")
def tiny_strategies(make_tiny_backend: Callable) -> Callable[[str], PromptingStrategy]:
    return cache(lambda name: make_tiny_backend(name).prompting)


def assert_same_prompts(strategy, config: PromptConfig, num_views: int) -> None:
    views = [torch.randint(0, 256, (len(INSTRUCTIONS), 64, 96, 3), dtype=torch.uint8) for _ in range(num_views)]
    for side in ("left", "right"):
        results = []
        for source in ("tokenizer", "processor"):
            maker = type(strategy)(strategy.core, replace(config, length_from=source))
            results.append(maker.encode(views, INSTRUCTIONS, padding_side=side))
        fast, slow = results
        for field in ("ids", "valid_mask", "positions", "next_position"):
            assert torch.equal(getattr(fast.tokens, field), getattr(slow.tokens, field)), (side, field)
        assert fast.tokens.is_padded == (config.use_instruction)
        edge = 0 if side == "left" else -1
        if config.use_instruction:
            assert not fast.tokens.valid_mask[1, edge]  # the empty instruction is padded on this side
        assert torch.equal(fast.images.tensors["pixel_values"], slow.images.tensors["pixel_values"])
        assert fast.images.layouts == slow.images.layouts


@pytest.mark.parametrize("num_views", [1, 2])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_published_processor(name, setting, num_views, strategies):
    assert_same_prompts(strategies(name), SETTINGS[setting], num_views)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_tiny_processor(name, setting, tiny_strategies):
    assert_same_prompts(tiny_strategies(name), SETTINGS[setting], 1)


PLAIN_WORDS = [*INSTRUCTIONS[:5], "\n\nreach  \n", "3 discs.", ", and then", "é", "e\u0301 combines"]


@pytest.mark.parametrize("few_shot", ["", "do x -> done", "ends in a blank "])
@pytest.mark.parametrize("system", ["", "You are a robot."])
@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("name", CHATS)
def test_chat_prompts_are_what_apply_chat_template_gives(name, position, system, few_shot, strategies):
    """The whole path of transformers: template, image expansion and tokenisation in one call."""
    strategy = strategies(name)
    processor = strategy.core.processor
    config = PromptConfig(system=system, few_shot=few_shot, image_position=position)
    image = torch.randint(0, 256, (1, 64, 96, 3), dtype=torch.uint8)
    for text in PLAIN_WORDS:
        said = f"{few_shot}\n{text}" if few_shot else text
        words, picture = {"type": "text", "text": said}, {"type": "image", "image": image[0].permute(2, 0, 1)}
        content = [picture, words] if position == "before" else [words, picture]
        messages = [{"role": "user", "content": content}]
        if system:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        expected = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        for source in ("tokenizer", "processor"):
            maker = type(strategy)(strategy.core, replace(config, length_from=source))
            ours = maker.encode([image], [text], padding_side="left")
            assert ours.tokens.ids[0].tolist() == expected["input_ids"][0].tolist(), (text, source)
            pixels = ours.images.tensors["pixel_values"]
            assert torch.equal(pixels, expected["pixel_values"].view_as(pixels))


@pytest.mark.parametrize("source", ["tokenizer", "processor"])
@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize("name", NAMES)
def test_words_that_look_like_special_tokens_stay_words(name, position, source, strategies):
    strategy = strategies(name)
    tokenizer = strategy.core.tokenizer
    maker = type(strategy)(strategy.core, PromptConfig(image_position=position, length_from=source))
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    image = torch.randint(0, 256, (1, 64, 96, 3), dtype=torch.uint8)

    def encode(text: str) -> list[int]:
        return maker.encode([image], [text], padding_side="left").tokens.ids[0].tolist()

    harmless = [i for i in encode("reach") if i in special]
    tricks = ["<|im_start|>", "<image>", "<ACT_3>", "<|image_pad|><end_of_utterance>", "go <global-img> <|im_end|>"]
    for trick in tricks:
        ids = encode(trick)
        assert [i for i in ids if i in special] == harmless, trick
        assert trick in tokenizer.decode(ids, skip_special_tokens=False)


def test_text_beside_the_words_goes_with_them():
    image, special = ImageSlot(), ["<s>", "<s>2", "</s>"]

    def join(*pieces: str | UserText | ImageSlot) -> list:
        made = [TemplateText(piece) if isinstance(piece, str) else piece for piece in pieces]
        return join_words(made, special)

    assert join("<s>User: ", UserText(), "!</s>\nNext: ", image) == [
        TemplateText("<s>"),
        UserText("User: ", "!"),
        TemplateText("</s>\nNext: "),
        image,
    ]
    assert join("a <s>2", UserText(), "</s>") == [TemplateText("a <s>2"), UserText(), TemplateText("</s>")]
    assert join("User: ", image, UserText()) == [TemplateText("User: "), image, UserText()]
    assert join("User: ", UserText(), "\n") == [UserText("User: ", "\n")]
    assert join_words([TemplateText("a "), UserText()], []) == [UserText("a ")]
