"""The backend contract: what every backend takes, returns and promises.

Shape legend: B batch, T frames in time, H W height and width, S code positions, K codebook size,
C length of an action chunk, A action width, D state or vector width.

A training loop sees one call (`loss_from_batch`), an inference loop sees one call (`latent_from_batch` or
`predict_action_chunk`); prompts, processors, vocabularies and heads stay behind them. *Mask* names say what
True means.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from hlrp_core.expectation import expect, expect_choice


class BackendMode(StrEnum):
    """Which labels supervise a step, or which prediction is asked for."""

    CODES = "codes"
    ACTIONS = "actions"
    MULTITASK = "multitask"

    @classmethod
    def _missing_(cls, value: object) -> None:
        """Raises:
        ValueError: always; the closest mode is offered.
        """
        expect_choice("mode", value, [mode.value for mode in cls])


# The one place where a mode becomes losses; nothing below it knows of modes.
OBJECTIVES: dict[BackendMode, tuple[str, ...]] = {
    BackendMode.CODES: ("codes",),
    BackendMode.ACTIONS: ("actions",),
    BackendMode.MULTITASK: ("codes", "actions"),
}


class UnsupportedModeError(ValueError):
    """A backend was asked for a mode that it does not have."""

    def __init__(self, backend: str, mode: BackendMode | str, modes: frozenset[BackendMode]):
        have = ", ".join(sorted(m.value for m in modes)) or "none"
        super().__init__(
            f"backend '{backend}' cannot do mode '{BackendMode(mode).value}'; it has: {have}. "
            "Next step: choose one of these modes, or build the backend with the head that the mode needs "
            "(a code head for 'codes', an action head for 'actions', both for 'multitask')."
        )


_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{_name(value.dtype)} tensor of shape {tuple(value.shape)}"
    return f"{type(value).__name__} ({reprlib.repr(value)})"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _expect_tensor(
    value: object, what: str, expected: str, dtypes: tuple[torch.dtype, ...], shape: tuple, hint: str
) -> None:
    """Check dtype and shape; None in `shape` leaves an axis free.

    Args:
        hint: the next step where the kind of tensor is right and its shape is not.
    """
    fits = False
    if not isinstance(value, Tensor):
        hint = "pass a torch tensor, such as torch.as_tensor(...)."
    elif value.dtype not in dtypes:
        hint = f"convert it by .to(torch.{_name(dtypes[0])})."
        if dtypes == (torch.uint8,):
            hint = "convert it to uint8 in [0, 255]; floats in [0, 1] by (255 * x).round().to(torch.uint8)."
    else:
        fits = value.ndim == len(shape)
        fits = fits and all(want is None or want == have for want, have in zip(shape, value.shape, strict=True))
    expect(fits, what, expected, _describe(value), hint)


def _images_hint(value: object, batch_axes: str) -> str:
    """The next step for images `[..., H, W, 3]` of another shape."""
    if isinstance(value, Tensor) and value.ndim >= 3 and value.shape[-3] == 3 and value.shape[-1] != 3:
        return "put the channels last: x.movedim(-3, -1)."
    return f"bring it into the shape [{batch_axes}, H, W, 3]: RGB, channels last" + (
        "; a single frame gets its axis of time by x[:, None]." if batch_axes == "B, T" else "."
    )


@dataclass(frozen=True)
class FoundationBatch:
    """Frames, instructions and, where there are any, the codes that label them.

    Only frame t (`frames[:, 0]`) ever reaches the student; later frames are for a teacher.

    Args:
        frames: `[B, T, H, W, 3]` uint8, T >= 1, on any device.
        instructions: B strings; an empty one is a prompt like any other.
        target_codes: `[B, S]` long, the labels.
        codes_valid: `[B]` bool, False where `target_codes` must not supervise. None: all are valid.
        meta: anything for debugging; never read by a backend.

    Raises:
        ValueError: a field has another shape, dtype or length than stated; expected and got are named.
    """

    frames: Tensor
    instructions: Sequence[str]
    target_codes: Tensor | None = None
    codes_valid: Tensor | None = None
    meta: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        frames_hint = _images_hint(self.frames, "B, T")
        _expect_tensor(
            self.frames, "frames", "uint8 tensor [B, T, H, W, 3]", (torch.uint8,), (None,) * 4 + (3,), frames_hint
        )
        is_empty = min(self.frames.shape) < 1
        expect(not is_empty, "frames", "no empty axis", _describe(self.frames), "pass one sample and frame or more.")
        size = self.frames.shape[0]
        expect(
            not isinstance(self.instructions, str) and len(self.instructions) == size,
            "instructions",
            f"a list of {size} strings, one for each sample",
            repr(self.instructions) if isinstance(self.instructions, str) else f"{len(self.instructions)} of them",
            "pass one for each sample; one without words gets the instruction ''.",
        )
        for text in self.instructions:
            is_text = isinstance(text, str)
            expect(is_text, "instructions", "strings", _describe(text), "convert it; no instruction is ''.")
        if self.target_codes is not None:
            hint = f"pass S codes for each of the {size} samples, one row a sample."
            expected = f"long tensor [{size}, S]"
            _expect_tensor(self.target_codes, "target_codes", expected, (torch.long,), (size, None), hint)
        if self.codes_valid is not None:
            hint = "leave codes_valid out, or pass the codes."
            expect(self.target_codes is not None, "codes_valid", "target_codes beside it", "target_codes=None", hint)
            hint = "pass one bool for each sample."
            _expect_tensor(self.codes_valid, "codes_valid", f"bool tensor [{size}]", (torch.bool,), (size,), hint)

    @property
    def batch_size(self) -> int:
        return self.frames.shape[0]

    def codes_mask(self) -> Tensor:
        """`[B]` bool on the frames' device: True where a sample has codes that may supervise."""
        if self.target_codes is None:
            return torch.zeros(self.batch_size, dtype=torch.bool, device=self.frames.device)
        if self.codes_valid is None:
            return torch.ones(self.batch_size, dtype=torch.bool, device=self.frames.device)
        return self.codes_valid.to(self.frames.device)


@dataclass(frozen=True)
class ActionBatch(FoundationBatch):
    """A `FoundationBatch` with what a robot adds: state, action chunks, further camera views at time t.

    Args:
        state: `[B, D]` float, normalised, at time t.
        actions: `[B, C, A]` float, normalised.
        action_is_pad: `[B, C]` bool, True where the chunk runs past the end of its episode.
        action_valid: `[B]` bool, False where a sample has no action label. None: all have one.
        views: further cameras at time t, by name, each `[B, H, W, 3]` uint8. Their order is that of the prompt's
            images, so that it must be the same in training and in prediction.
    """

    state: Tensor | None = None
    actions: Tensor | None = None
    action_is_pad: Tensor | None = None
    action_valid: Tensor | None = None
    views: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.batch_size
        if self.state is not None:
            hint = "pass the state at time t alone, one row a sample."
            _expect_tensor(self.state, "state", f"float tensor [{size}, D]", _FLOATS, (size, None), hint)
        if self.actions is not None:
            hint = "pass a chunk of C actions for each sample; a single action is a chunk of 1, x[:, None]."
            expected = f"float tensor [{size}, C, A]"
            _expect_tensor(self.actions, "actions", expected, _FLOATS, (size, None, None), hint)
        if self.action_is_pad is not None:
            hint = "leave action_is_pad out, or pass the actions."
            expect(self.actions is not None, "action_is_pad", "actions beside it", "actions=None", hint)
            chunk = self.actions.shape[1]  # type: ignore[union-attr]
            expected, hint = f"bool tensor [{size}, {chunk}]", "pass one bool for each action of each chunk."
            _expect_tensor(self.action_is_pad, "action_is_pad", expected, (torch.bool,), (size, chunk), hint)
        if self.action_valid is not None:
            hint = "pass one bool for each sample."
            _expect_tensor(self.action_valid, "action_valid", f"bool tensor [{size}]", (torch.bool,), (size,), hint)
        for name, view in self.views.items():
            expected, shape = f"uint8 tensor [{size}, H, W, 3]", (size, None, None, 3)
            _expect_tensor(view, f"view '{name}'", expected, (torch.uint8,), shape, _images_hint(view, f"{size}"))

    def actions_mask(self) -> Tensor:
        """`[B]` bool on the frames' device: True where a sample has an action label."""
        if self.actions is None:
            return torch.zeros(self.batch_size, dtype=torch.bool, device=self.frames.device)
        if self.action_valid is None:
            return torch.ones(self.batch_size, dtype=torch.bool, device=self.frames.device)
        return self.action_valid.to(self.frames.device)


@dataclass(frozen=True)
class SamplingOptions:
    """How a prediction is drawn. The defaults are greedy codes and fresh flow noise.

    Args:
        generator: source of every random number of the call; None uses torch's global one.
        temperature: 0 is greedy; above 0 samples the codes.
        noise: `[B, C, A]` starting noise of a flow action head, instead of drawing it.
        num_flow_steps: Euler steps of every flow of the call; None: as each head is set.
        inference_delay: real-time chunking: how many actions of the old chunk run while this one is computed.
        prev_chunk_left_over: real-time chunking: `[B, C', A]`, the old chunk's actions not yet run.
        execution_horizon: real-time chunking: actions run from each chunk.
        guidance: real-time chunking: steers each flow step towards the old chunk (`hlrp_core.heads.Guidance`).
    """

    generator: torch.Generator | None = None
    temperature: float = 0.0
    noise: Tensor | None = None
    num_flow_steps: int | None = None
    inference_delay: int | None = None
    prev_chunk_left_over: Tensor | None = None
    execution_horizon: int | None = None
    guidance: Callable[..., Tensor] | None = None

    def __post_init__(self) -> None:
        is_known = self.temperature >= 0
        expect(is_known, "temperature", "0 (greedy) or more", self.temperature, "use 0 for the most likely codes.")
        steps = self.num_flow_steps
        is_known = steps is None or steps >= 1
        expect(is_known, "num_flow_steps", "1 or more, or None", steps, "leave it out for the head's own number.")


@dataclass(frozen=True)
class LossOutput:
    """Args:
    loss: scalar with a gradient.
    metrics: plain Python floats, for logging.
    per_sample: `[B]`, each sample's own loss; 0 where a sample had no label of the mode.
    """

    loss: Tensor
    metrics: dict[str, float]
    per_sample: Tensor | None = None


@dataclass(frozen=True)
class LatentOutput:
    """Discrete codes (`tokens`, and `logits` where there are any) or continuous latents (`vector`), never both.

    Args:
        logits: `[B, S, K]`.
        tokens: `[B, S]` long: codes; -1 where free decoding did not parse.
        vector: `[B, S, D]` float32, in the units of the LAQ's code vectors. Not quantised.
        meta: small things for debugging, such as the text that did not parse.
    """

    logits: Tensor | None = None
    tokens: Tensor | None = None
    vector: Tensor | None = None
    meta: dict[str, Any] | None = None


@dataclass(frozen=True)
class ActionOutput:
    """Args:
    actions: `[B, C, A]` float32, in the normalised space of the training actions.
    metrics: plain Python floats.
    latent: the codes or vectors that the actions were conditioned on, where the head uses any.
    """

    actions: Tensor
    metrics: dict[str, float]
    latent: LatentOutput | None = None


@runtime_checkable
class VLABackend(Protocol):
    """Predicts latent actions from frame t and an instruction."""

    @property
    def name(self) -> str: ...

    @property
    def codebook_size(self) -> int: ...

    @property
    def code_seq_len(self) -> int: ...

    @property
    def modes(self) -> frozenset[BackendMode]: ...

    def setup(self, *, device: torch.device) -> None:
        """Move everything to `device` and check that the parts fit each other. May be called again."""
        ...

    def loss_from_batch(self, batch: FoundationBatch, *, mode: BackendMode) -> LossOutput: ...

    def latent_from_batch(
        self, batch: FoundationBatch, *, mode: BackendMode, sampling: SamplingOptions | None = None
    ) -> LatentOutput: ...


@runtime_checkable
class ActionPolicyBackend(Protocol):
    """Predicts chunks of continuous actions."""

    @property
    def name(self) -> str: ...

    @property
    def modes(self) -> frozenset[BackendMode]: ...

    def setup(self, *, device: torch.device) -> None: ...

    def loss_from_batch(self, batch: ActionBatch, *, mode: BackendMode) -> LossOutput: ...

    def predict_action_chunk(self, batch: ActionBatch, *, sampling: SamplingOptions | None = None) -> ActionOutput: ...
