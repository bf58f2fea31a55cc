"""The composed backend: core x prompting x code head x action head, behind the contract.

Mode is routed in one place, the table `OBJECTIVES`; nothing below it knows of modes. A training step encodes the prefix
once, whatever the number of losses. Only frame t is ever handed to the prompt.

Shape legend: B batch, T frames, H W image size, L prompt tokens, N completion tokens, W hidden width,
S code positions, K codebook size, C chunk length, A action width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from hlrp_core.backbones.cpu_linear import speed_up_linears
from hlrp_core.backbones.model_core import ModelCore
from hlrp_core.backends.action_inputs import build_context, see_labels, see_prediction, vector_table
from hlrp_core.backends.config import BackendConfig
from hlrp_core.backends.labels import check_codes, check_labels, read_actions, read_codes, read_state
from hlrp_core.backends.losses import MaskedLoss, combine_losses
from hlrp_core.codes.accuracy import CodeCounts
from hlrp_core.contract import (
    OBJECTIVES,
    ActionBatch,
    ActionOutput,
    BackendMode,
    FoundationBatch,
    LatentOutput,
    LossOutput,
    SamplingOptions,
    UnsupportedModeError,
)
from hlrp_core.heads.action_head import ActionHead, PrefixEncoding
from hlrp_core.heads.code_head import BackboneEncoding, CodeHead
from hlrp_core.prompting.strategy import PromptingStrategy, PromptInputs


class ComposedBackend(nn.Module):
    """Satisfies `VLABackend`, and `ActionPolicyBackend` where it has an action head.

    Args:
        config: settings of all parts.
        core: the backbone, its vocabulary complete.
        prompting: builds prompts for this core.
        code_head: learns and predicts codes.
        action_head: turns codes or the prefix into actions; None for codes alone.
    """

    def __init__(
        self,
        config: BackendConfig,
        *,
        core: ModelCore,
        prompting: PromptingStrategy,
        code_head: CodeHead,
        action_head: ActionHead | None = None,
    ):
        super().__init__()
        self.config = config
        self.core = core
        self.prompting = prompting
        self.code_head = code_head
        self.action_head = action_head
        self._code_counts = CodeCounts(config.codebook_size, config.code_seq_len)
        if config.freeze_backbone:
            core.model.requires_grad_(False)  # and not `core`: new rows of code tokens are no part of the backbone
        elif config.freeze_vision:
            for parameter in core.vision_parameters():
                parameter.requires_grad_(False)
        speed_up_linears(self)

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    @property
    def code_seq_len(self) -> int:
        return self.config.code_seq_len

    @property
    def modes(self) -> frozenset[BackendMode]:
        return frozenset(BackendMode if self.action_head is not None else {BackendMode.CODES})

    @property
    def code_vectors(self) -> Tensor | None:
        """`[S, K, D]`: the LAQ's vectors, where the backend predicts vectors; None where it predicts codes."""
        return vector_table(self.code_head).vectors if self.config.code_vector_dim is not None else None

    def setup(self, *, device: torch.device) -> None:
        """Move to `device` and check that the prompt's length is the same by tokenizer and by processor."""
        self.to(device)
        self.prompting.check_length_sources()

    def _objectives(self, mode: BackendMode) -> tuple[str, ...]:
        if mode not in self.modes:
            raise UnsupportedModeError(self.name, mode, self.modes)
        return OBJECTIVES[BackendMode(mode)]

    # -- training -------------------------------------------------------------------------------------------------

    def loss_from_batch(self, batch: FoundationBatch, *, mode: BackendMode) -> LossOutput:
        """The weighted sum of the mode's losses; a sample counts only in the losses it has a label for.

        Raises:
            UnsupportedModeError: the backend lacks the head for this mode.
            ValueError: the batch lacks the mode's labels, or they do not fit the backend.
        """
        return self.combine(self.losses_of_samples(batch, mode=mode))

    def combine(self, losses: dict[str, MaskedLoss]) -> LossOutput:
        """The weighted sum of what `losses_of_samples` gave, for one batch or several."""
        weights = {"codes": self.config.codes_loss_weight, "actions": self.config.actions_loss_weight}
        return combine_losses(losses, weights)

    def losses_of_samples(self, batch: FoundationBatch, *, mode: BackendMode) -> dict[str, MaskedLoss]:
        """The mode's losses before they are summed, by objective. Raises as `loss_from_batch`."""
        objectives = self._objectives(mode)
        check_labels(batch, objectives)
        codes = read_codes(batch, self.config, self.core.device) if "codes" in objectives else None
        losses: dict[str, MaskedLoss] = {}
        encoding, inputs = None, None
        if codes is not None or self._actions_need_backbone:
            with self.core.learning_tokens():
                encoding, inputs = self._encode_for_training(batch, objectives, codes)
                if codes is not None:
                    losses["codes"] = self._codes_loss(batch, codes, encoding)
        if "actions" in objectives:
            assert isinstance(batch, ActionBatch)
            losses["actions"] = self._actions_loss(batch, encoding, inputs)
        return losses

    def _codes_loss(self, batch: FoundationBatch, codes: Tensor, encoding: BackboneEncoding) -> MaskedLoss:
        result = self.code_head.loss(self.core, encoding, codes)
        mask = batch.codes_mask().to(codes.device)
        metrics = {}
        if bool(mask.any()):
            labelled = codes[mask]
            if self.training:  # held-out labels must not tell the constant prediction what is frequent
                self._code_counts.add(labelled)
            metrics = self.code_head.measure(result.select(mask), labelled, self._code_counts)
        return MaskedLoss(result.per_sample, mask, metrics)

    @property
    def _learns_from_predictions(self) -> bool:
        """Whether the action head trains on predicted codes, those that it will see."""
        head = self.action_head
        return head is not None and head.needs_codes and self.config.code_source == "predicted"

    @property
    def _actions_need_backbone(self) -> bool:
        head = self.action_head
        return head is not None and (head.needs_prefix or self._learns_from_predictions)

    def _actions_loss(
        self, batch: ActionBatch, encoding: BackboneEncoding | None, inputs: PromptInputs | None
    ) -> MaskedLoss:
        """Args:
        encoding, inputs: None where the head needs neither prefix nor predicted codes.
        """
        head = self.action_head
        assert head is not None
        mask = batch.actions_mask().to(self.core.device)
        seen = None
        if self._learns_from_predictions:
            assert inputs is not None
            with predicting(self):
                latent = self.code_head.predict(self.core, inputs, SamplingOptions(), encoding=encoding)
                seen = see_prediction(latent, head, self.code_head)
        elif head.needs_codes:
            mask = mask & batch.codes_mask().to(mask.device)
            seen = see_labels(read_codes(batch, self.config, mask.device), head, self.code_head)
        state = read_state(batch, mask) if head.needs_state else None
        context = build_context(head, state=state, prefix=encoding.prefix if encoding else None, seen=seen)
        is_pad = batch.action_is_pad.to(mask.device) if batch.action_is_pad is not None else None
        return MaskedLoss(head.per_sample_loss(context, read_actions(batch, mask), is_pad), mask)

    # -- prediction -----------------------------------------------------------------------------------------------

    def latent_from_batch(
        self, batch: FoundationBatch, *, mode: BackendMode, sampling: SamplingOptions | None = None
    ) -> LatentOutput:
        """Codes or vectors predicted from frame t and the instruction. Runs without gradient, in eval mode.

        Raises:
            UnsupportedModeError: the backend cannot do `mode`.
            ValueError: `mode` is `actions`, which predicts no codes.
        """
        if "codes" not in self._objectives(mode):
            raise ValueError(
                f"latent_from_batch: expected mode 'codes' or 'multitask', got '{mode}'. "
                "Next step: call predict_action_chunk for actions."
            )
        with predicting(self):
            inputs = self._prompt(batch, for_prediction=True)
            return self.code_head.predict(self.core, inputs, sampling or SamplingOptions())

    def latent_log_prob(self, batch: FoundationBatch, codes: Tensor) -> Tensor:
        """Joint log-probability of given codes: log p(codes | frame t, instruction), one forward for all of them.

        The distribution is the one that `latent_from_batch` draws from at temperature 1 with decoding=constrained: with
        a token head a softmax over the K code rows at each code position, given the codes before it (wrapper and
        separator tokens are certain); with a latent head S independent softmaxes. So it sums to 1 over all K^S codes.

        Carries a gradient, in the modules' own mode: for policy gradients or a reward-weighted loss. To score alone,
        call it under `torch.no_grad()`.

        Args:
            batch: B samples; their `target_codes`, if any, are not read.
            codes: `[B, S]` long, in [0, K).

        Returns:
            `[B]` float32, natural logarithm.

        Raises:
            ValueError: `codes` has another shape or range, or the backend predicts vectors, which gives codes none.
        """
        codes = codes.to(self.core.device)
        check_codes(codes, "codes", batch_size=batch.batch_size, config=self.config)
        with self.core.learning_tokens():
            encoding, _ = self._encode_for_training(batch, ("codes",), codes)
            return self.code_head.log_prob(self.core, encoding, codes)

    def predict_action_chunk(self, batch: ActionBatch, *, sampling: SamplingOptions | None = None) -> ActionOutput:
        """A chunk of actions, from frame t, the instruction and the state. Runs without gradient, in eval mode.

        Raises:
            UnsupportedModeError: the backend has no action head.
            ValueError: a state is not finite.
        """
        self._objectives(BackendMode.ACTIONS)
        head = self.action_head
        assert head is not None
        sampling = sampling or SamplingOptions()
        with predicting(self):
            inputs = self._prompt(batch, for_prediction=True)
            encoding, latent, seen = None, None, None
            if head.needs_prefix:
                encoding = self._encode(inputs, use_cache=head.needs_codes)
            if head.needs_codes:
                latent = self.code_head.predict(self.core, inputs, sampling, encoding=encoding)
                seen = see_prediction(latent, head, self.code_head)
            everyone = torch.ones(batch.batch_size, dtype=torch.bool, device=self.core.device)
            state = read_state(batch, everyone) if head.needs_state else None
            context = build_context(head, state=state, prefix=encoding.prefix if encoding else None, seen=seen)
            actions = head.predict(context, sampling)
        return ActionOutput(actions=actions.float(), metrics={}, latent=latent)

    # -- the backbone ---------------------------------------------------------------------------------------------

    def _prompt(self, batch: FoundationBatch, *, for_prediction: bool) -> PromptInputs:
        views = [batch.frames[:, 0]]  # frame t alone: later frames belong to the teacher
        state = None
        if isinstance(batch, ActionBatch):
            state = batch.state
            views += batch.views.values()
        side = "left" if for_prediction else self.prompting.config.padding_side
        return self.prompting.encode(views, batch.instructions, padding_side=side, state=state)

    def _encode(self, inputs: PromptInputs, *, use_cache: bool) -> BackboneEncoding:
        hidden, cache = self.core(inputs.tokens, inputs.images, use_cache=use_cache)
        return BackboneEncoding(PrefixEncoding(hidden, inputs.tokens.valid_mask), inputs.tokens, cache=cache)

    def _encode_for_training(
        self, batch: FoundationBatch, objectives: tuple[str, ...], codes: Tensor | None
    ) -> tuple[BackboneEncoding, PromptInputs]:
        """One run of the backbone that serves every loss of the step."""
        decodes = "actions" in objectives and self._learns_from_predictions
        inputs = self._prompt(batch, for_prediction=decodes)
        completion = self.code_head.completion(codes) if codes is not None else None
        if completion is None:
            needs_prefix = self.action_head is not None and self.action_head.needs_prefix
            # Code rows alone learn next to nothing from actions, as a prompt holds their tokens only where its settings
            # write them; a backward through the whole backbone would be the price.
            backbone_learns = any(parameter.requires_grad for parameter in self.core.model.parameters())
            prefix_learns = codes is not None or (needs_prefix and backbone_learns)
            with torch.set_grad_enabled(torch.is_grad_enabled() and prefix_learns):
                return self._encode(inputs, use_cache=decodes), inputs
        return self._encode_with_completion(inputs, completion, use_cache=decodes), inputs

    def _encode_with_completion(self, inputs: PromptInputs, completion: Tensor, *, use_cache: bool) -> BackboneEncoding:
        """Prompt and completion in one forward; by causality the prompt's part equals a run of the prompt alone."""
        tokens = inputs.tokens.append(completion)
        self.core.check_length(tokens.ids.shape[1])
        hidden, cache = self.core(tokens, inputs.images, use_cache=use_cache)  # (B, L + N, W)
        prompt_len, size = inputs.tokens.ids.shape[1], completion.shape[1]
        if cache is not None:
            cache.crop(prompt_len)
        if tokens.is_padded and tokens.padding_side == "right":
            lengths = inputs.tokens.valid_mask.sum(1)  # (B,)
            steps = lengths[:, None] - 1 + torch.arange(size, device=lengths.device)  # (B, N)
            completion_hidden = hidden.gather(1, steps[:, :, None].expand(-1, -1, hidden.shape[2]))
        else:
            completion_hidden = hidden[:, prompt_len - 1 : -1]
        prefix = PrefixEncoding(hidden[:, :prompt_len], inputs.tokens.valid_mask)
        return BackboneEncoding(prefix, inputs.tokens, completion_hidden, cache)


@contextmanager
def predicting(module: nn.Module) -> Iterator[None]:
    """No gradient and eval mode; the modules' own modes come back afterwards."""
    was_training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part in was_training:
            part.training = True
