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
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from hlrp_core.backbones.cpu_linear import speed_up_linears
from hlrp_core.backbones.model_core import ModelCore
from hlrp_core.backends.config import BackendConfig
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
from hlrp_core.heads.action_head import ActionContext, ActionHead, PrefixEncoding
from hlrp_core.heads.code_head import BackboneEncoding, CodeHead
from hlrp_core.heads.code_vectors import CodeVectors
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
        frozen = (
            core.parameters() if config.freeze_backbone else core.vision_parameters() if config.freeze_vision else []
        )
        for parameter in frozen:
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
        return self._vector_table.vectors if self.config.code_vector_dim is not None else None

    def setup(self, *, device: torch.device) -> None:
        """Move to `device` and check that the prompt's length is the same by tokenizer and by processor."""
        self.to(device)
        self.prompting.check_length_sources()

    # -- training -------------------------------------------------------------------------------------------------

    def loss_from_batch(self, batch: FoundationBatch, *, mode: BackendMode) -> LossOutput:
        """The weighted sum of the mode's losses; a sample counts only in the losses it has a label for.

        Raises:
            UnsupportedModeError: the backend lacks the head for this mode.
            ValueError: the batch lacks the mode's labels, or they do not fit the backend.
        """
        objectives = self._objectives(mode)
        self._check_labels(batch, objectives)
        codes = self._target_codes(batch) if "codes" in objectives else None
        losses: dict[str, tuple[Tensor, Tensor, dict[str, float]]] = {}  # name -> per sample, mask, metrics
        with self.core.learning_tokens():
            encoding, inputs = self._encode_for_training(batch, objectives, codes)
            if codes is not None:
                losses["codes"] = self._codes_loss(batch, codes, encoding)
        if "actions" in objectives:
            assert isinstance(batch, ActionBatch)
            losses["actions"] = self._actions_loss(batch, encoding, inputs)
        return self._combine(losses)

    def _combine(self, losses: dict[str, tuple[Tensor, Tensor, dict[str, float]]]) -> LossOutput:
        metrics: dict[str, float] = {}
        weights = {"codes": self.config.codes_loss_weight, "actions": self.config.actions_loss_weight}
        total: Tensor | float = 0.0
        per_sample_total: Tensor | float = 0.0
        for name, (per_sample, mask, extra) in losses.items():
            weight = weights[name] if len(losses) > 1 else 1.0
            # where(), not a product: an unlabelled sample's loss may be anything, and 0 * inf is NaN
            per_sample = torch.where(mask, per_sample, torch.zeros_like(per_sample))
            loss = per_sample.sum() / mask.sum().clamp(min=1)
            total = total + weight * loss
            per_sample_total = per_sample_total + weight * per_sample
            metrics[f"{name}_loss"] = loss.item()
            metrics |= extra
        assert isinstance(total, Tensor) and isinstance(per_sample_total, Tensor)
        return LossOutput(loss=total, metrics=metrics, per_sample=per_sample_total)

    def _codes_loss(
        self, batch: FoundationBatch, codes: Tensor, encoding: BackboneEncoding
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        result = self.code_head.loss(self.core, encoding, codes)
        mask = batch.codes_mask().to(codes.device)
        metrics = {}
        if bool(mask.any()):
            labelled = codes[mask]
            if self.training:  # held-out labels must not tell the constant prediction what is frequent
                self._code_counts.add(labelled)
            metrics = self.code_head.measure(result.select(mask), labelled, self._code_counts)
        return result.per_sample, mask, metrics

    def _actions_loss(
        self, batch: ActionBatch, encoding: BackboneEncoding, inputs: PromptInputs
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        assert self.action_head is not None and batch.actions is not None
        mask = batch.actions_mask().to(self.core.device)
        if self.action_head.needs_codes and self.config.code_source == "teacher":
            mask = mask & batch.codes_mask().to(mask.device)
            seen = self._seen_labels(self._target_codes(batch))
        elif self.action_head.needs_codes:
            with self._predicting():
                seen = self._seen_prediction(self._predict_codes(inputs, SamplingOptions(), encoding))
        else:
            seen = None
        context = self._action_context(batch, encoding.prefix, seen)
        actions = batch.actions.to(self.core.device)
        is_pad = batch.action_is_pad.to(mask.device) if batch.action_is_pad is not None else None
        # labels of samples without one may be NaN fillers: they must not reach the head
        actions = torch.where(mask[:, None, None], actions, torch.zeros_like(actions))
        return self.action_head.per_sample_loss(context, actions, is_pad), mask, {}

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
        with self._predicting():
            return self._predict_codes(self._prompt(batch, for_prediction=True), sampling or SamplingOptions(), None)

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
        codes = self._expect_codes(codes.to(self.core.device), "codes", batch.batch_size)
        with self.core.learning_tokens():
            encoding, _ = self._encode_for_training(batch, ("codes",), codes)
            return self.code_head.log_prob(self.core, encoding, codes)

    def predict_action_chunk(self, batch: ActionBatch, *, sampling: SamplingOptions | None = None) -> ActionOutput:
        """A chunk of actions, from frame t, the instruction and the state. Runs without gradient, in eval mode.

        Raises:
            UnsupportedModeError: the backend has no action head.
        """
        self._objectives(BackendMode.ACTIONS)
        assert self.action_head is not None
        sampling = sampling or SamplingOptions()
        with self._predicting():
            inputs = self._prompt(batch, for_prediction=True)
            encoding, latent, seen = None, None, None
            if self.action_head.needs_prefix:
                encoding = self._encode(inputs, use_cache=self.action_head.needs_codes)
            if self.action_head.needs_codes:
                latent = self._predict_codes(inputs, sampling, encoding)
                seen = self._seen_prediction(latent)
            context = self._action_context(batch, encoding.prefix if encoding else None, seen)
            actions = self.action_head.predict(context, sampling, guidance=sampling.guidance)
        return ActionOutput(actions=actions.float(), metrics={}, latent=latent)

    @contextmanager
    def _predicting(self) -> Iterator[None]:
        """No gradient and eval mode; the modules' own modes come back afterwards."""
        was_training = [module for module in self.modules() if module.training]
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module in was_training:
                module.training = True

    # -- the backbone ---------------------------------------------------------------------------------------------

    def _prompt(self, batch: FoundationBatch, *, for_prediction: bool) -> PromptInputs:
        views = [batch.frames[:, 0]]  # frame t alone: later frames belong to the teacher
        state = None
        if isinstance(batch, ActionBatch):
            state = batch.state
            views += [batch.views[name] for name in sorted(batch.views)]
        side = "left" if for_prediction else self.prompting.config.padding_side
        return self.prompting.encode(views, batch.instructions, padding_side=side, state=state)

    def _encode(self, inputs: PromptInputs, *, use_cache: bool) -> BackboneEncoding:
        hidden, cache = self.core(inputs.tokens, inputs.images, use_cache=use_cache)
        return BackboneEncoding(PrefixEncoding(hidden, inputs.tokens.valid_mask), inputs.tokens, cache=cache)

    def _encode_for_training(
        self, batch: FoundationBatch, objectives: tuple[str, ...], codes: Tensor | None
    ) -> tuple[BackboneEncoding, PromptInputs]:
        """One run of the backbone that serves every loss of the step."""
        decodes = (
            "actions" in objectives
            and self.action_head is not None
            and self.action_head.needs_codes
            and self.config.code_source == "predicted"
        )
        inputs = self._prompt(batch, for_prediction=decodes)
        completion = self.code_head.completion(codes) if codes is not None else None
        if completion is None:
            prefix_learns = codes is not None or (self.action_head is not None and self.action_head.needs_prefix)
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
            detach_cache(cache)
        if tokens.is_padded and tokens.padding_side == "right":
            lengths = inputs.tokens.valid_mask.sum(1)  # (B,)
            steps = lengths[:, None] - 1 + torch.arange(size, device=lengths.device)  # (B, N)
            completion_hidden = hidden.gather(1, steps[:, :, None].expand(-1, -1, hidden.shape[2]))
        else:
            completion_hidden = hidden[:, prompt_len - 1 : -1]
        prefix = PrefixEncoding(hidden[:, :prompt_len], inputs.tokens.valid_mask)
        return BackboneEncoding(prefix, inputs.tokens, completion_hidden, cache)

    def _predict_codes(
        self, inputs: PromptInputs, sampling: SamplingOptions, encoding: BackboneEncoding | None
    ) -> LatentOutput:
        return self.code_head.predict(self.core, inputs, sampling, encoding=encoding)

    def _seen_prediction(self, latent: LatentOutput) -> Tensor:
        """`[B, S, K]` codes or `[B, S, D]` vectors: what a code-conditioned action head sees of a prediction."""
        assert self.action_head is not None
        if self.action_head.config.code_conditioning == "vector":
            assert latent.vector is not None
            return self._vector_table.standardize(latent.vector)
        if self.action_head.config.code_conditioning == "soft":
            assert latent.logits is not None
            return torch.softmax(latent.logits, dim=-1)
        assert latent.tokens is not None
        return self._one_hot(latent.tokens)

    def _seen_labels(self, codes: Tensor) -> Tensor:
        """What it sees of true codes `[B, S]`."""
        assert self.action_head is not None
        if self.action_head.config.code_conditioning == "vector":
            return self._vector_table.lookup(codes)
        return self._one_hot(codes)

    @property
    def _vector_table(self) -> CodeVectors:
        table = self.code_head.table  # of a vector head, which may be wrapped by adapters
        assert isinstance(table, CodeVectors)
        return table

    def _one_hot(self, codes: Tensor) -> Tensor:
        return F.one_hot(codes, self.codebook_size).float()

    def _action_context(self, batch: ActionBatch, prefix: PrefixEncoding | None, seen: Tensor | None) -> ActionContext:
        assert self.action_head is not None
        is_vector = self.action_head.config.code_conditioning == "vector"
        return ActionContext(
            state=batch.state.to(self.core.device) if batch.state is not None else None,
            code_probs=None if is_vector else seen,
            code_vectors=seen if is_vector else None,
            prefix=prefix if self.action_head.needs_prefix else None,
        )

    # -- labels ---------------------------------------------------------------------------------------------------

    def _objectives(self, mode: BackendMode) -> tuple[str, ...]:
        if mode not in self.modes:
            raise UnsupportedModeError(self.name, mode, self.modes)
        return OBJECTIVES[BackendMode(mode)]

    def _check_labels(self, batch: FoundationBatch, objectives: tuple[str, ...]) -> None:
        if "codes" in objectives and batch.target_codes is None:
            raise ValueError(
                "loss_from_batch: expected target_codes [B, S] to learn codes from, got None. "
                "Next step: label the data with a LAQ or a code table."
            )
        if "actions" in objectives and (not isinstance(batch, ActionBatch) or batch.actions is None):
            raise ValueError(
                f"loss_from_batch: expected an ActionBatch with actions [B, C, A], got {type(batch).__name__} "
                "without actions. Next step: use mode=codes, or data with actions."
            )

    def _target_codes(self, batch: FoundationBatch) -> Tensor:
        """Codes `[B, S]` on the core's device; those that may not supervise become 0."""
        if batch.target_codes is None:
            raise ValueError("expected target_codes [B, S], got None. Next step: label the data.")
        codes, mask = batch.target_codes.to(self.core.device), batch.codes_mask().to(self.core.device)
        return self._expect_codes(torch.where(mask[:, None], codes, 0), "target_codes", batch.batch_size)

    def _expect_codes(self, codes: Tensor, what: str, batch_size: int) -> Tensor:
        """`codes`, if they are long, `[B, S]` and in [0, K)."""
        if codes.dtype != torch.long or codes.shape != (batch_size, self.code_seq_len):
            raise ValueError(
                f"{what}: expected long [B, {self.code_seq_len}] (the backend's code_seq_len) with B={batch_size}, got "
                f"{str(codes.dtype).removeprefix('torch.')} {tuple(codes.shape)}. Next step: label with a LAQ of this "
                "code length, or build the backend with the table's."
            )
        low, high = codes.aminmax()
        if int(low) < 0 or int(high) >= self.codebook_size:
            raise ValueError(
                f"{what}: expected codes in [0, {self.codebook_size}), got {int(low)} to {int(high)}. "
                "Next step: build the backend with the codebook size of the LAQ that made them."
            )
        return codes


def detach_cache(cache: DynamicCache) -> None:
    """Cut a cache off the graph: codes decoded from it are inputs, not something to learn through."""
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.detach(), layer.values.detach()  # type: ignore[union-attr]
