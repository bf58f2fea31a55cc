"""`flow`: a flow-matching expert conditioned on codes and state.

Shape legend: B batch, M memory tokens, S code positions, H width, C chunk length, A action width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from hlrp_core.contract import SamplingOptions
from hlrp_core.heads.action_config import ActionHeadConfig
from hlrp_core.heads.action_head import (
    ActionContext,
    ActionHead,
    ContextSizes,
    build_code_embedding,
    check_shape,
    mean_over_steps,
)
from hlrp_core.heads.expert import ExpertMemory, FlowExpert
from hlrp_core.heads.flow_matching import integrate, interpolate, sample_times, solver_times

Guide = Callable[[Tensor, float, Callable[[Tensor], Tensor]], Tensor]


class FlowHead(ActionHead):
    """Draws action chunks by following a learned velocity field from noise.

    The expert's memory holds one token for the state and one for each code position; `prefix_flow` adds the
    prefix. It is built once per chunk, and the flow steps only read it.
    """

    needs_prefix = False
    supports_guidance = True

    def __init__(self, config: ActionHeadConfig, sizes: ContextSizes):
        super().__init__(config, sizes)
        parts: dict[str, nn.Module] = {}
        if self.needs_state:
            parts["state"] = nn.Linear(config.state_dim, config.hidden_dim)
        if self.needs_codes:
            parts["codes"] = build_code_embedding(config, sizes)
        self.memory_tokens = nn.ModuleDict(parts)
        self.expert = FlowExpert(config)

    def encode_memory(self, context: ActionContext) -> ExpertMemory:
        """Everything in `context` that the head was built for, as the expert's memory."""
        tokens, masks = zip(*self._tokens_and_masks(context), strict=True)
        return self.expert.remember(torch.cat(tokens, dim=1), torch.cat(masks, dim=1))

    def _tokens_and_masks(self, context: ActionContext) -> list[tuple[Tensor, Tensor]]:
        """Groups of memory tokens `[B, n, H]`, each with its `valid_mask` `[B, n]`."""
        groups: list[Tensor] = []
        if self.needs_state:
            assert context.state is not None
            groups.append(self.memory_tokens["state"](context.state.to(self.dtype))[:, None])
        if self.needs_codes:
            groups.append(self.memory_tokens["codes"](self.read_codes(context)))
        return [(tokens, tokens.new_ones(tokens.shape[:2], dtype=torch.bool)) for tokens in groups]

    def velocity(self, context: ActionContext, x_t: Tensor, time: Tensor) -> Tensor:
        """The velocity at `x_t` `[B, C, A]` and `time` `[B]`, from scratch: the memory is encoded anew.

        It defines the model, and is the reference for `predict`, which encodes the memory once.
        """
        self.check_context(context)
        return self.expert(x_t, self.expert.modulation(time), self.encode_memory(context))

    def per_sample_loss(
        self,
        context: ActionContext,
        actions: Tensor,
        is_pad: Tensor | None,
        *,
        noise: Tensor | None = None,
        time: Tensor | None = None,
    ) -> Tensor:
        """Mean squared error of the velocity, at one drawn time of the path or the mean over several.

        A padded step neither counts nor informs the others: no step attends to it.

        Args:
            context: what the head looks at.
            actions: `[B, C, A]`.
            is_pad: `[B, C]` bool.
            noise: `[B, C, A]` and
            time: `[B]`: a given draw, instead of `config.num_noise_draws` from torch's global generator.
        """
        actions = self.read_labels(actions, is_pad, self.check_context(context))
        draws = self.config.num_noise_draws if noise is None and time is None else 1
        actions = actions.repeat_interleave(draws, dim=0)  # (B * draws, C, A)
        if noise is None:
            noise = torch.randn_like(actions)
        if time is None:
            time = sample_times(len(actions), distribution=self.config.time_sampling, device=actions.device)
        x_t, target = interpolate(actions, noise, time)
        memory = self.encode_memory(context).repeat(draws)
        if is_pad is not None:
            is_pad = is_pad.repeat_interleave(draws, dim=0)
            memory = memory.hide_steps(is_pad)
        error = (self.expert(x_t, self.expert.modulation(time), memory) - target).square()
        return mean_over_steps(error, is_pad).view(-1, draws).mean(dim=1)

    def predict(self, context: ActionContext, sampling: SamplingOptions) -> Tensor:
        batch_size = self.check_context(context)
        guide = self._bind(sampling, batch_size)
        # Guidance takes a gradient by x_t, which inference mode and tensors made in it forbid.
        with torch.inference_mode(False), torch.no_grad():
            noise = self._starting_noise(batch_size, sampling)
            memory = self.encode_memory(context)
            steps = sampling.num_flow_steps or self.config.num_flow_steps
            time = torch.tensor(solver_times(steps), device=noise.device)
            modulations = self.expert.modulation(time).split(1)

            def velocity(x_t: Tensor, step: int) -> Tensor:
                return self.expert(x_t, modulations[step], memory)

            return integrate(velocity, noise, steps, guide)

    def _starting_noise(self, batch_size: int, sampling: SamplingOptions) -> Tensor:
        device = self.expert.action_positions.device
        shape = (batch_size, self.config.chunk_size, self.config.action_dim)
        if sampling.noise is not None:
            check_shape("sampling noise", sampling.noise, shape)
            return sampling.noise.to(device, torch.float32, copy=True)
        source = sampling.generator.device if sampling.generator is not None else device
        return torch.randn(shape, generator=sampling.generator, device=source, dtype=torch.float32).to(device)

    def _bind(self, sampling: SamplingOptions, batch_size: int) -> Guide | None:
        """`sampling.guidance` with this call's real-time-chunking arguments; None where no chunk is to be followed."""
        left_over = sampling.prev_chunk_left_over
        if left_over is None:
            return None
        if sampling.guidance is None:
            raise ValueError(
                "sampling has prev_chunk_left_over: expected a guidance to follow it, got None. "
                "Next step: set its guidance, for example RTCProcessor.denoise_step of LeRobot."
            )
        if left_over.ndim != 3 or left_over.shape[1] > self.config.chunk_size:
            raise ValueError(
                f"prev_chunk_left_over: expected [{batch_size}, at most {self.config.chunk_size}, "
                f"{self.config.action_dim}], got {list(left_over.shape)}. "
                "Next step: pass the actions of the last chunk that have not run yet."
            )
        check_shape("prev_chunk_left_over", left_over, (batch_size, left_over.shape[1], self.config.action_dim))
        if sampling.inference_delay is None or sampling.inference_delay < 0:
            raise ValueError(
                f"inference_delay: expected 0 or more beside prev_chunk_left_over, got "
                f"{sampling.inference_delay}. Next step: pass how many actions run while a chunk is computed."
            )
        bound = partial(
            sampling.guidance,
            prev_chunk_left_over=left_over.to(self.expert.action_positions.device, torch.float32, copy=True),
            inference_delay=sampling.inference_delay,
            execution_horizon=sampling.execution_horizon,
        )
        return lambda x_t, time, denoise: bound(x_t=x_t, time=time, original_denoise_step_partial=denoise)
