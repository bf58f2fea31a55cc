"""Prompts from the tokenizer alone = prompts from the processor's own output, token for token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from hlrp_core.contract import FoundationBatch
from hlrp_core.prompting.prompt import PromptConfig

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
    "without words": PromptConfig(use_instruction=False),
}


def make_batch(size: int, num_views: int = 1, side: int = 64) -> FoundationBatch:
    frames = torch.randint(0, 256, (size, 1, side, side + 32, 3), dtype=torch.uint8)
    return FoundationBatch(frames, INSTRUCTIONS[:size])


@pytest.fixture(scope="module")
def strategies(make_tiny_backend: Callable, real_qwen) -> dict:
    return {name: make_tiny_backend(name, backbone=real_qwen).prompting for name in ("qwen_chat", "qwen_plain")}


@pytest.fixture(scope="module")
def tiny_strategies(make_tiny_backend: Callable) -> dict:
    return {name: make_tiny_backend(name).prompting for name in ("qwen_chat", "qwen_plain")}


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
@pytest.mark.parametrize("name", ["qwen_chat", "qwen_plain"])
def test_published_processor(name, setting, num_views, strategies):
    assert_same_prompts(strategies[name], SETTINGS[setting], num_views)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["qwen_chat", "qwen_plain"])
def test_tiny_processor(name, setting, tiny_strategies):
    assert_same_prompts(tiny_strategies[name], SETTINGS[setting], 1)


@pytest.mark.parametrize("position", ["before", "after"])
def test_chat_prompts_are_what_apply_chat_template_gives(position, strategies):
    """The whole path of transformers: template, image expansion and tokenisation in one call."""
    strategy = strategies["qwen_chat"]
    processor = strategy.core.processor
    maker = type(strategy)(strategy.core, PromptConfig(system="You are a robot.", image_position=position))
    image = torch.randint(0, 256, (1, 64, 96, 3), dtype=torch.uint8)
    for text in INSTRUCTIONS[:3]:
        words, picture = {"type": "text", "text": text}, {"type": "image", "image": image[0].permute(2, 0, 1)}
        content = [picture, words] if position == "before" else [words, picture]
        messages = [
            {"role": "system", "content": [{"type": "text", "text": "You are a robot."}]},
            {"role": "user", "content": content},
        ]
        expected = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ours = maker.encode([image], [text], padding_side="left")
        assert ours.tokens.ids[0].tolist() == expected["input_ids"][0].tolist()
        assert torch.equal(ours.images.tensors["image_grid_thw"], expected["image_grid_thw"])
