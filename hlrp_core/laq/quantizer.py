"""Stage 1: a latent-action quantiser (LAQ) turns a pair of frames into a few discrete codes.

The encoder sees frames t and t+Δ; the decoder sees frame t and the codes, and must draw frame t+Δ. What passes the
bottleneck is what changed: the latent action (LAPA, arXiv 2410.11758; Genie, arXiv 2402.15391).

Notable: the encoder reads the change through spatial softmax keypoints (Finn et al., arXiv 1509.06113), which give
positions to sub-patch precision; the decoder adds a change to frame t and starts at exactly no change, so that training
starts at the copy baseline.

Shape legend: B batch, T frames in time, R image side, P patch side, G = R / P grid side, E channels, S code positions,
D width of a code vector, K codebook size.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from hlrp_core.laq.config import LAQConfig
from hlrp_core.laq.quantizers import CodeQuantizer


@dataclass(frozen=True)
class LAQOutput:
    """Args:
    loss: scalar with a gradient.
    reconstruction: `[B * (T-1), 3, R, R]` frames t+Δ in [0, 1], or features `[B * (T-1), N, F]`.
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

    # No `from __future__ import annotations` in this file: the mixin reads the type of `config` to load it.
    def __init__(self, config: LAQConfig):
        super().__init__()
        self.config = config
        self.quantizer = CodeQuantizer(config)
        self.encoder = PairEncoder(config, code_dim=self.quantizer.dim)
        self.decoder = ChangeDecoder(config, code_dim=self.quantizer.dim)

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
        vectors, codes, quantizer_loss = self.quantizer(self.encoder(source, target), hardness=hardness)
        reconstruction = self.decoder(source, vectors)
        loss = self._reconstruction_loss(source, target, reconstruction) + quantizer_loss
        return LAQOutput(
            loss=loss,
            reconstruction=from_signed(reconstruction),
            target=from_signed(target),
            source=from_signed(source),
            codes=codes.view(len(frames), -1),
        )

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Measure the latents' mean and spread anew on batches of frames: running averages lag behind the weights."""
        if not self.quantizer.is_fsq:
            return
        centre = self.quantizer.centre
        momentum, centre.momentum = centre.momentum, None  # a plain average over all batches
        centre.reset_running_stats()
        self.train()
        for frames in batches:
            self.quantizer(self.encoder(*self._transitions(self.prepare(frames))))
        centre.momentum = momentum
        self.eval()

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """Frames `[B, T, H, W, 3]` uint8 -> codes `[B, (T-1)*S]` long. Runs in eval mode, whatever the module's is."""
        was_training = self.training
        self.eval()
        try:
            source, target = self._transitions(self.prepare(frames))
            _, codes, _ = self.quantizer(self.encoder(source, target))
        finally:
            self.train(was_training)
        return codes.view(len(frames), -1)

    def code_vectors(self, codes: Tensor) -> Tensor:
        """Codes `[B, (T-1)*S]` -> the LAQ's own code vectors `[B, (T-1)*S, D]`."""
        self._check_codes(codes)
        per_transition = codes.view(-1, self.config.code_seq_len)
        return self.quantizer.vectors(per_transition).view(*codes.shape, -1)

    @torch.no_grad()
    def decode(self, frame: Tensor, codes: Tensor) -> Tensor:
        """Frame t `[B, H, W, 3]` uint8 and one transition's codes `[B, S]` -> frame t+Δ `[B, 3, R, R]` in [0, 1]."""
        source = self.prepare(frame[:, None])[:, 0]
        return from_signed(self.decoder(source, self.quantizer.vectors(codes)))

    def prepare(self, frames: Tensor) -> Tensor:
        """Frames `[B, T, H, W, 3]` uint8 -> `[B, T, 3, R, R]` float in [-1, 1].

        Raises:
            ValueError: another shape or dtype.
        """
        if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[-1] != 3:
            raise ValueError(
                f"frames: expected uint8 tensor [B, T, H, W, 3], got {frames.dtype} tensor {tuple(frames.shape)}"
            )
        size = self.config.image_size
        images = frames.flatten(0, 1).permute(0, 3, 1, 2).float()  # (B * T, 3, H, W)
        if images.shape[-2:] != (size, size):
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        return (images / 127.5 - 1).view(*frames.shape[:2], 3, size, size)

    def _transitions(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, T, 3, R, R]` -> earlier and later frames, each `[B * (T-1), 3, R, R]`."""
        if images.shape[1] != self.config.num_frames:
            raise ValueError(
                f"frames: expected T={self.config.num_frames} frames (the LAQ's num_frames), got {images.shape[1]}. "
                f"Next step: read frames t, t+{self.frame_gap}, ..."
            )
        return images[:, :-1].flatten(0, 1), images[:, 1:].flatten(0, 1)

    def _reconstruction_loss(self, source: Tensor, target: Tensor, reconstruction: Tensor) -> Tensor:
        changed = (target - source).abs().amax(1, keepdim=True)  # (B, 1, R, R)
        # a few pixels around every change count more: most of a frame stands still and is right for free
        near_change = F.max_pool2d(changed, 5, stride=1, padding=2).clamp(max=0.5) * 2
        weight = 1 + self.config.motion_weight * near_change
        return (weight * (reconstruction - target) ** 2).sum() / (weight.sum() * target.shape[1])

    def _check_codes(self, codes: Tensor) -> None:
        if codes.shape[-1] % self.config.code_seq_len:
            raise ValueError(f"codes: expected [B, {self.code_seq_len}], got {tuple(codes.shape)}")

    # -- identity -------------------------------------------------------------------------------------------------

    def weights_hash(self) -> str:
        """SHA-256 over settings and weights: equal for equal LAQs, wherever they are stored."""
        digest = hashlib.sha256(json.dumps(asdict(self.config), sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
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
            return super().from_pretrained(pretrained_model_name_or_path, strict=True, **kwargs)  # type: ignore[misc]
        except (RuntimeError, TypeError, FileNotFoundError) as error:
            raise ValueError(
                f"LAQ: expected the settings and weights of one in {pretrained_model_name_or_path}, got something else "
                f"({str(error).splitlines()[0]}). Next step: copy or download it anew, or check the name."
            ) from error


def from_signed(images: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1]."""
    return (images + 1) / 2


class PairEncoder(nn.Module):
    """Two frames `[B, 3, R, R]` each -> latents `[B, S, D]`."""

    coordinates: Tensor

    def __init__(self, config: LAQConfig, *, code_dim: int, num_keypoints: int = 32, sharpness: float = 4.0):
        super().__init__()
        width, grid = config.hidden_dim, config.image_size // config.patch_size
        self.shape = (config.code_seq_len, code_dim)
        self.sharpness = sharpness
        # patches overlap by half: a small thing never hides on their border
        self.patches = nn.Conv2d(9, width, 2 * config.patch_size, config.patch_size, config.patch_size // 2)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.GroupNorm(8, width), nn.GELU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(config.num_layers)
        )
        self.attention = nn.Conv2d(width, num_keypoints, 1)
        self.values = nn.Conv2d(width, num_keypoints, 1)
        self.head = nn.Sequential(
            nn.Linear(3 * num_keypoints, 4 * width), nn.GELU(), nn.Linear(4 * width, config.code_seq_len * code_dim)
        )
        self.register_buffer("coordinates", grid_coordinates(grid).flatten(1), persistent=False)  # (2, G * G)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        x = self.patches(torch.cat([source, target, 2 * (target - source)], dim=1))  # (B, E, G, G)
        for block in self.blocks:
            x = x + block(x)
        where = torch.softmax(self.sharpness * self.attention(x).flatten(2).float(), dim=-1)  # (B, keypoints, G * G)
        positions = where @ self.coordinates.T  # (B, keypoints, 2)
        values = (where * self.values(x).flatten(2)).sum(-1, keepdim=True)  # (B, keypoints, 1)
        return self.head(torch.cat([positions, values], dim=-1).flatten(1)).view(-1, *self.shape)


class ChangeDecoder(nn.Module):
    """Frame t `[B, 3, R, R]` and code vectors `[B, S, D]` -> frame t+Δ `[B, 3, R, R]`."""

    coordinates: Tensor

    def __init__(self, config: LAQConfig, *, code_dim: int):
        super().__init__()
        width, patch = config.hidden_dim, config.patch_size
        self.patches = nn.Conv2d(5, width, 2 * patch, patch, patch // 2)
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(config.num_layers))
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(config.num_layers))
        self.modulations = nn.ModuleList(
            nn.Linear(config.code_seq_len * code_dim, 2 * width) for _ in range(config.num_layers)
        )
        self.to_pixels = nn.Conv2d(width, 3 * patch**2, 3, padding=1)
        nn.init.zeros_(self.to_pixels.weight)  # no change: training starts at the copy of frame t
        nn.init.zeros_(self.to_pixels.bias)  # type: ignore[arg-type]
        self.patch = patch
        self.register_buffer("coordinates", grid_coordinates(config.image_size)[None], persistent=False)

    def forward(self, source: Tensor, vectors: Tensor) -> Tensor:
        codes = vectors.flatten(1)  # (B, S * D)
        x = self.patches(torch.cat([source, self.coordinates.expand(len(source), -1, -1, -1)], dim=1))  # (B, E, G, G)
        for norm, convolution, modulation in zip(self.norms, self.convolutions, self.modulations, strict=True):
            scale, shift = modulation(codes)[:, :, None, None].chunk(2, dim=1)
            x = x + convolution(F.gelu(norm(x) * (1 + scale) + shift))
        return source + F.pixel_shuffle(self.to_pixels(x), self.patch)


def grid_coordinates(size: int) -> Tensor:
    """x and y in [-1, 1] on a square grid, `[2, size, size]`."""
    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y])
