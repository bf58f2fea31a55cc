"""Stage 1: a latent-action quantiser (LAQ) turns a pair of frames into a few discrete codes.

The encoder sees frames t and t+Δ; the decoder sees frame t and the codes, and must draw frame t+Δ. What passes the
bottleneck is what changed: the latent action (LAPA, arXiv 2410.11758; Genie, arXiv 2402.15391).

What is drawn are pixels, or features of a frozen encoder (`targets.py`); the encoder sees pixels in both cases, so that
labelling never needs the frozen encoder.

Shape legend: B batch, T frames in time, R image side, S code positions, D width of a code vector, K codebook size,
F channels of the target, Y its side.
"""

import copy
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from hlrp_core.expectation import expect
from hlrp_core.laq.config import LAQConfig
from hlrp_core.laq.networks import ChangeDecoder, PairEncoder
from hlrp_core.laq.precision import in_float32
from hlrp_core.laq.quantizers import make_quantizer
from hlrp_core.laq.targets import FeatureTarget, with_feature_sizes


@dataclass(frozen=True)
class LAQOutput:
    """Args:
    loss: scalar with a gradient.
    reconstruction: `[B * (T-1), F, Y, Y]` frames t+Δ: pixels in [0, 1] (F = 3, Y = R), or features.
    target: what was to be reconstructed, same shape.
    source: frames t, or their features, same shape: the copy baseline.
    codes: `[B, (T-1)*S]` long.
    """

    loss: Tensor
    reconstruction: Tensor
    target: Tensor
    source: Tensor
    codes: Tensor


class LatentActionQuantizer(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="hlrp",
    tags=["robotics", "latent-action"],
    repo_url="",
):
    """Encodes frame transitions into codes, and decodes frame t plus codes into frame t+Δ.

    Saves and loads by `save_pretrained`, `from_pretrained` and `push_to_hub`: `config.json` and `model.safetensors`.
    """

    settings_digest: Tensor

    # No `from __future__ import annotations` in this file: the mixin reads the type of `config` to load it.
    def __init__(self, config: LAQConfig):
        super().__init__()
        self.config = config
        self.quantizer = make_quantizer(config)
        self.encoder = PairEncoder(config, latent_dim=self.quantizer.latent_dim)
        is_pixels = config.target == "pixels"
        channels, size = (3, config.image_size) if is_pixels else config.feature_shape
        self.decoder = ChangeDecoder(
            config,
            condition_dim=self.quantizer.condition_dim,
            channels=channels,
            size=size,
            patch_size=config.patch_size if is_pixels else 1,
        )
        # Saved with the weights: settings that were altered later, but leave every shape as it is, are found so.
        self.register_buffer("settings_digest", _digest(config))
        # In a tuple, so that the frozen encoder is no part of this module: it is neither trained, nor moved, nor saved.
        self._feature_target: tuple[FeatureTarget, ...] = ()

    @classmethod
    def for_training(cls, config: LAQConfig) -> Self:
        """A fresh LAQ; with `target="features"` the frozen encoder is loaded and its sizes enter the settings."""
        if config.target == "pixels":
            return cls(config)
        laq = cls(with_feature_sizes(config))
        laq.load_feature_encoder()
        return laq

    def load_feature_encoder(self) -> None:
        """Load the frozen encoder that training and `forward` need with `target="features"`."""
        self._feature_target = (FeatureTarget(self.config),)

    # -- sizes ----------------------------------------------------------------------------------------------------

    @property
    def codebook_size(self) -> int:
        return self.config.codebook_size

    @property
    def code_seq_len(self) -> int:
        """Codes of a label: (T-1)*S."""
        return self.config.codes_per_label

    @property
    def frame_gap(self) -> int:
        return self.config.frame_gap

    # -- codes ----------------------------------------------------------------------------------------------------

    def forward(self, frames: Tensor, *, hardness: float = 1.0) -> LAQOutput:
        """Training: reconstruct every later frame of `[B, T, H, W, 3]` uint8 from the one before it and its codes."""
        images = self.prepare(frames)
        source, target = self._transitions(images)
        quantized = self.quantizer(self._latents(self._embed(images)), hardness=hardness)
        weight = self._change_weight(source, target)
        source, target = self._to_target(source), self._to_target(target)
        reconstruction = self.decoder(source, quantized.condition)
        loss = weighted_mse(reconstruction, target, weight) + quantized.loss
        is_pixels = self.config.target == "pixels"
        return LAQOutput(
            loss=loss,
            reconstruction=from_signed(reconstruction) if is_pixels else reconstruction,
            target=from_signed(target) if is_pixels else target,
            source=from_signed(source) if is_pixels else source,
            codes=quantized.codes.view(len(frames), -1),
        )

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Measure the latents' mean and spread anew on batches of frames: running averages lag behind the weights. A
        codebook that was learnt stays as it is.

        Latents are few numbers, and are measured all at once: an average over batches would depend on how pairs are
        spread over these, and a small last one would count like a whole one.

        Raises:
            ValueError: no frames, or with `fsq` fewer than two transitions.
        """
        self.quantizer.calibrate(self._all_latents(batches))
        self.eval()

    def encode(self, frames: Tensor) -> Tensor:
        """Frames `[B, T, H, W, 3]` uint8 -> codes `[B, (T-1)*S]` long. Always in eval mode and float32, whatever the
        module and a surrounding autocast are in."""
        return self.encode_embedded(self.embed(frames))

    @torch.no_grad()
    def embed(self, frames: Tensor) -> Tensor:
        """Frames `[B, T, H, W, 3]` uint8 -> `[B, T, 2E, h, h]`, for `encode_embedded`: nearly all of the work, once for
        a frame of two tuples. Training and eval mode embed alike."""
        with in_float32(frames):
            return self._embed(self.prepare(frames))

    @torch.no_grad()
    def encode_embedded(self, embedded: Tensor, *, batch_size: int = 64) -> Tensor:
        """What `embed` made of the frames of B tuples -> their codes `[B, (T-1)*S]`: `encode` is the two.

        Args:
            batch_size: tuples that are compared at a time; as many as fit a processor's cache are fastest.
        """
        was_training = self.quantizer.training
        self.quantizer.eval()  # the one part that goes by the mode
        try:
            with in_float32(embedded):
                latents = torch.cat([self._latents(batch) for batch in embedded.split(batch_size)])
                codes = self.quantizer(latents).codes
        finally:
            self.quantizer.train(was_training)
        return codes.view(len(embedded), -1)

    @torch.no_grad()
    def encode_uncalibrated(self, batches: Iterable[Tensor]) -> Tensor:
        """Batches of frames -> codes of all of them, `[N, (T-1)*S]`, by the mean and spread of their own latents: those
        that `encode` goes by lag behind the weights while they learn. Changes nothing in this module."""
        latents = self._all_latents(batches)
        quantizer = copy.deepcopy(self.quantizer)
        quantizer.calibrate(latents)
        return quantizer.eval()(latents).codes.view(-1, self.code_seq_len)

    def provide_codes(self, *, index: Tensor | None = None, frames: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See `CodeProvider`; a LAQ goes by `frames`, and says something of all of them."""
        if frames is None:
            raise ValueError(
                "LAQ: expected frames [B, T, H, W, 3] to encode, got None. "
                "Next step: pass frames=; a code table is what goes by the index."
            )
        return self.encode(frames), torch.ones(len(frames), dtype=torch.bool, device=frames.device)

    def code_vectors(self, codes: Tensor) -> Tensor:
        """Codes `[B, (T-1)*S]` -> the LAQ's own code vectors `[B, (T-1)*S, D]`."""
        self._check_codes(codes)
        per_transition = codes.reshape(-1, self.config.code_seq_len)
        return self.quantizer.vectors(per_transition).view(*codes.shape, -1)

    @torch.no_grad()
    def code_vector_table(self) -> Tensor:
        """The vector of each code at each position, `[(T-1)*S, K, D]`: it depends on no other position's code."""
        device = next(self.parameters()).device
        codes = torch.arange(self.codebook_size, device=device)[:, None].repeat(1, self.code_seq_len)  # (K, S)
        return self.code_vectors(codes).float().transpose(0, 1).contiguous()

    @torch.no_grad()
    def decode(self, frame: Tensor, codes: Tensor) -> Tensor:
        """Frame t `[B, H, W, 3]` uint8 and one transition's codes `[B, S]` -> frame t+Δ `[B, 3, R, R]` in [0, 1], or
        its features `[B, F, Y, Y]` where those are the target."""
        with in_float32(frame):
            source = self._to_target(self.prepare(frame[:, None])[:, 0])
            decoded = self.decoder(source, self.quantizer.condition(codes))
        return from_signed(decoded) if self.config.target == "pixels" else decoded

    def prepare(self, frames: Tensor) -> Tensor:
        """Frames `[B, T, H, W, 3]` uint8 -> `[B, T, 3, R, R]` float in [-1, 1].

        Raises:
            ValueError: another shape or dtype.
        """
        if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[-1] != 3:
            raise ValueError(
                f"frames: expected uint8 tensor [B, T, H, W, 3], got {frames.dtype} tensor {tuple(frames.shape)}. "
                "Next step: give them as bytes from 0 to 255, channels last."
            )
        size = self.config.image_size
        images = resize_images(frames.flatten(0, 1).permute(0, 3, 1, 2), size)  # (B * T, 3, R, R)
        signed = images.float().div_(127.5).sub_(1)  # in place: fresh memory costs more than the arithmetic
        return signed.view(*frames.shape[:2], 3, size, size)

    def _embed(self, images: Tensor) -> Tensor:
        """`[B, T, 3, R, R]` -> `[B, T, 2E, h, h]`."""
        return self.encoder.embed(images.flatten(0, 1)).unflatten(0, images.shape[:2])

    def _latents(self, embedded: Tensor) -> Tensor:
        """`[B, T, 2E, h, h]` -> `[B * (T-1), Z]`."""
        return self.encoder.compare(*self._transitions(embedded))

    def _all_latents(self, batches: Iterable[Tensor]) -> Tensor:
        """Batches of frames `[B, T, H, W, 3]` -> the latents of all of them, `[N * (T-1), Z]`."""
        latents = []
        for frames in batches:
            with in_float32(frames):
                latents.append(self._latents(self._embed(self.prepare(frames))))
        expect(len(latents) > 0, "calibration", "batches of frames", "none", "Give at least one.")
        return torch.cat(latents)

    def _transitions(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, T, ...]` -> what is of earlier and of later frames, each `[B * (T-1), ...]`."""
        if images.shape[1] != self.config.num_frames:
            raise ValueError(
                f"frames: expected T={self.config.num_frames} frames (the LAQ's num_frames), got {images.shape[1]}. "
                f"Next step: read frames t, t+{self.frame_gap}, ..."
            )
        return images[:, :-1].flatten(0, 1), images[:, 1:].flatten(0, 1)

    def _to_target(self, images: Tensor) -> Tensor:
        """`[B, 3, R, R]` in [-1, 1] -> `[B, F, Y, Y]`."""
        if self.config.target == "pixels":
            return images
        if not self._feature_target:
            raise ValueError(
                f"LAQ: expected the frozen encoder {self.config.feature_encoder!r} to be loaded, which its targets are "
                "features of, got none. Next step: call load_feature_encoder(); labelling and codes need none."
            )
        return self._feature_target[0](images)

    def _change_weight(self, source: Tensor, target: Tensor) -> Tensor:
        """`[B, 1, R, R]`: most of a frame stands still and is right for free, so what is near a change counts more."""
        changed = (target - source).abs().amax(1, keepdim=True)
        near_change = F.max_pool2d(changed, 5, stride=1, padding=2).clamp(max=0.5) * 2
        return 1 + self.config.motion_weight * near_change

    def _check_codes(self, codes: Tensor) -> None:
        if codes.shape[-1] % self.config.code_seq_len:
            raise ValueError(
                f"codes: expected [B, {self.code_seq_len}], got {tuple(codes.shape)}. "
                "Next step: take codes of this LAQ, or of its own code table."
            )

    # -- identity -------------------------------------------------------------------------------------------------

    def weights_hash(self) -> str:
        """SHA-256 over settings and weights: equal for equal LAQs, wherever they are stored."""
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            # as plain bytes, as numpy knows no bfloat16
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        """Load from a folder or the Hub, strictly.

        Raises:
            ValueError: no LAQ there, or one whose parts do not fit each other.
        """
        folder = Path(pretrained_model_name_or_path)
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise ValueError(
                f"LAQ: expected config.json and model.safetensors in {folder}, got no config.json. "
                "Next step: give the folder that hlrp-laq-train wrote."
            )
        try:
            laq = super().from_pretrained(pretrained_model_name_or_path, strict=True, **kwargs)  # type: ignore[misc]
        except HFValidationError:
            reason = "which is a file" if folder.is_file() else "which is no folder, and no id of the Hub either"
            raise ValueError(
                f"LAQ: expected the folder or Hub id of one, got {pretrained_model_name_or_path}, {reason}. "
                "Next step: give the folder that hlrp-laq-train wrote, or user/repository on the Hub."
            ) from None
        except _NOT_A_LAQ as error:
            raise ValueError(
                f"LAQ: expected the settings and weights of one in {pretrained_model_name_or_path}, got something else "
                f"({str(error).splitlines()[0]}). Next step: copy or download it anew, or check the name."
            ) from error
        if not torch.equal(laq.settings_digest.cpu(), _digest(laq.config)):
            raise ValueError(
                f"LAQ: expected the settings that its weights were saved with, got others in the config.json of "
                f"{pretrained_model_name_or_path}. Next step: copy or download it anew; train again to change settings."
            )
        return laq


# What loading raises where there is no LAQ, only part of one, or a damaged one.
_NOT_A_LAQ = (
    RuntimeError,
    TypeError,
    AttributeError,  # a config.json that is no mapping
    FileNotFoundError,
    SafetensorError,
    json.JSONDecodeError,
    UnicodeDecodeError,
)


def _digest(config: LAQConfig) -> Tensor:
    text = json.dumps(asdict(config), sort_keys=True)
    return torch.tensor(list(hashlib.sha256(text.encode()).digest()[:8]), dtype=torch.uint8)


def resize_images(images: Tensor, size: int) -> Tensor:
    """Images `[N, 3, H, W]` uint8 -> `[N, 3, size, size]` uint8: what a LAQ sees of them, in training and after it."""
    if images.shape[-2:] == (size, size):
        return images
    if images.device.type == "cpu":  # on bytes, a tenth of the time, and off by one grey level at most
        return F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True).round().to(torch.uint8)


def from_signed(images: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1]."""
    return (images + 1) / 2


def weighted_mse(reconstruction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean squared error of `[B, F, Y, Y]`; `weight` `[B, 1, R, R]` counts for the place it lies in."""
    weight = F.adaptive_max_pool2d(weight, target.shape[-2:])
    return (weight * (reconstruction - target) ** 2).sum() / (weight.sum() * target.shape[1])
