"""The types at the boundary refuse what they did not promise to take, and say expected and got."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hlrp_core.contract import (
    OBJECTIVES,
    ActionBatch,
    BackendMode,
    FoundationBatch,
    SamplingOptions,
    UnsupportedModeError,
)

B, T, H, W, S, C, A, D = 2, 2, 4, 6, 3, 5, 2, 7
FRAMES = torch.zeros(B, T, H, W, 3, dtype=torch.uint8)
WORDS = ["one", ""]
CODES = torch.zeros(B, S, dtype=torch.long)
YES = torch.ones(B, dtype=torch.bool)
ACTIONS = torch.zeros(B, C, A)


def test_required_and_optional_fields():
    with pytest.raises(TypeError):
        FoundationBatch(FRAMES)  # type: ignore[call-arg]
    batch = FoundationBatch(FRAMES, WORDS)
    assert batch.batch_size == B
    assert batch.target_codes is None
    FoundationBatch(FRAMES[:, :1], tuple(WORDS), CODES, YES, meta={"anything": object()})
    ActionBatch(FRAMES, WORDS)
    ActionBatch(
        FRAMES,
        WORDS,
        state=torch.zeros(B, D),
        actions=ACTIONS,
        action_is_pad=torch.zeros(B, C, dtype=torch.bool),
        action_valid=YES,
        views={"wrist": FRAMES[:, 0]},
    )


@pytest.mark.parametrize(
    ("field", "value", "got"),
    [
        ("frames", FRAMES.float(), "float32"),
        ("frames", FRAMES[:, 0], r"\(2, 4, 6, 3\)"),
        ("frames", FRAMES.movedim(-1, 2), r"\(2, 2, 3, 4, 6\)"),
        ("frames", FRAMES.numpy(), "ndarray"),
        ("frames", FRAMES[:, :0], r"\(2, 0, 4, 6, 3\)"),
        ("frames", FRAMES[:0], r"\(0, 2, 4, 6, 3\)"),
        ("instructions", ["one"], "1 of them"),
        ("instructions", "on", "'on'"),
        ("instructions", ["one", None], "NoneType"),
        ("instructions", ["one", b"two"], "bytes"),
        ("target_codes", CODES.int(), "int32"),
        ("target_codes", CODES.float(), "float32"),
        ("target_codes", CODES[:1], r"\(1, 3\)"),
        ("target_codes", CODES[0], r"\(3,\)"),
        ("target_codes", CODES.tolist(), "list"),
        ("codes_valid", YES.long(), "int64"),
        ("codes_valid", YES[:1], r"\(1,\)"),
        ("codes_valid", YES[:, None], r"\(2, 1\)"),
    ],
)
def test_wrong_foundation_fields(field, value, got):
    fields = {"frames": FRAMES, "instructions": WORDS, "target_codes": CODES, "codes_valid": YES}
    for kind in (FoundationBatch, ActionBatch):
        with pytest.raises(ValueError, match=rf"{field}: expected .*, got .*{got}.*\. Next step: [a-z]"):
            kind(**{**fields, field: value})


@pytest.mark.parametrize(
    ("value", "next_step"),
    [
        (FRAMES.movedim(-1, 2), r"movedim\(-3, -1\)"),
        (FRAMES.float(), r"round\(\).to\(torch.uint8\)"),
        (FRAMES[:, 0], r"x\[:, None\]"),
        (FRAMES.numpy(), r"torch.as_tensor"),
    ],
)
def test_the_next_step_for_frames(value, next_step):
    with pytest.raises(ValueError, match=rf"frames: expected .*Next step: .*{next_step}"):
        FoundationBatch(value, WORDS)


@pytest.mark.parametrize(
    ("field", "value", "got"),
    [
        ("state", torch.zeros(B, D, dtype=torch.long), "int64"),
        ("state", torch.zeros(D), r"\(7,\)"),
        ("state", torch.zeros(B + 1, D), r"\(3, 7\)"),
        ("actions", ACTIONS[:, 0], r"\(2, 2\)"),
        ("actions", ACTIONS.int(), "int32"),
        ("actions", ACTIONS[:1], r"\(1, 5, 2\)"),
        ("action_is_pad", torch.zeros(B, C), "float32"),
        ("action_is_pad", torch.zeros(B, C + 1, dtype=torch.bool), r"\(2, 6\)"),
        ("action_valid", YES.float(), "float32"),
        ("action_valid", torch.ones(B, C, dtype=torch.bool), r"\(2, 5\)"),
    ],
)
def test_wrong_action_fields(field, value, got):
    with pytest.raises(ValueError, match=rf"{field}: expected .*, got .*{got}.*\. Next step: [a-z]"):
        ActionBatch(FRAMES, WORDS, **{"actions": ACTIONS, field: value})


def test_wrong_views():
    for view in (FRAMES, FRAMES[:, 0].float(), FRAMES[:1, 0], FRAMES[:, 0, ..., :1]):
        with pytest.raises(ValueError, match=r"view 'wrist': expected uint8 tensor.*Next step"):
            ActionBatch(FRAMES, WORDS, views={"wrist": view})
    ActionBatch(FRAMES, WORDS, views={"wrist": torch.zeros(B, 9, 9, 3, dtype=torch.uint8)})  # its own size


def test_masks_need_what_they_mask():
    with pytest.raises(ValueError, match=r"codes_valid: expected target_codes.*Next step"):
        FoundationBatch(FRAMES, WORDS, codes_valid=YES)
    with pytest.raises(ValueError, match=r"action_is_pad: expected actions.*Next step"):
        ActionBatch(FRAMES, WORDS, action_is_pad=torch.zeros(B, C, dtype=torch.bool))


def test_what_the_masks_say():
    assert FoundationBatch(FRAMES, WORDS).codes_mask().tolist() == [False, False]
    assert FoundationBatch(FRAMES, WORDS, CODES).codes_mask().tolist() == [True, True]
    one = torch.tensor([True, False])
    assert FoundationBatch(FRAMES, WORDS, CODES, one).codes_mask().tolist() == [True, False]
    assert ActionBatch(FRAMES, WORDS).actions_mask().tolist() == [False, False]
    assert ActionBatch(FRAMES, WORDS, actions=ACTIONS).actions_mask().tolist() == [True, True]
    assert ActionBatch(FRAMES, WORDS, actions=ACTIONS, action_valid=one).actions_mask().tolist() == [True, False]


def test_batches_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        FoundationBatch(FRAMES, WORDS).frames = FRAMES  # type: ignore[misc]


def test_every_mode_has_its_objectives():
    assert set(OBJECTIVES) == set(BackendMode)
    assert BackendMode("codes") is BackendMode.CODES
    with pytest.raises(ValueError, match=r"mode: expected one of codes, actions, multitask, got 'kodes'.*mean 'codes'"):
        BackendMode("kodes")
    with pytest.raises(ValueError, match=r"got 7\. Next step: Choose one of these\.$"):
        BackendMode(7)


def test_unsupported_mode_names_backend_mode_and_what_there_is():
    error = UnsupportedModeError("thing", BackendMode.ACTIONS, frozenset({BackendMode.CODES}))
    assert isinstance(error, ValueError)
    for word in ("'thing'", "'actions'", "it has: codes", "Next step"):
        assert word in str(error)
    assert "it has: none" in str(UnsupportedModeError("thing", "codes", frozenset()))


def test_sampling_options():
    assert SamplingOptions().temperature == 0
    with pytest.raises(ValueError, match=r"temperature: expected 0 \(greedy\) or more, got -0.5. Next step"):
        SamplingOptions(temperature=-0.5)
    with pytest.raises(ValueError, match=r"num_flow_steps: expected 1 or more, or None, got 0. Next step"):
        SamplingOptions(num_flow_steps=0)
