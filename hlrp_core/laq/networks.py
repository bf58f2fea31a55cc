"""Encoder and decoder of a LAQ.

Notable: the encoder reads the change through spatial softmax keypoints (Finn et al., arXiv 1509.06113), which give
positions to sub-patch precision, and a transition run backwards has exactly the opposite latents; the decoder adds a
change to frame t and starts at exactly no change, so that training starts at the copy baseline.

Shape legend: B batch, R image side, P patch side, G = R / P grid side, H = G / 2, E channels, Z width of the encoder's
latents, C width of what the decoder sees of the codes, F channels of the target, Y its side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hlrp_core.laq.config import LAQConfig


class PairEncoder(nn.Module):
    """Two frames `[B, 3, R, R]` each -> latents `[B, Z]`; swapped frames give the negated latents.

    What actions are like is built in: undoing one takes its opposite. Without that, and with a deeper readout, latents
    become fast-changing functions of the motion: as good for drawing frame t+Δ, but hard to predict from frame t.

    Nearly all of the work, `embed`, sees one frame alone: a frame that is the end of one pair and the start of another
    needs it once. What is left for a pair, `compare`, is small. A deeper or wider `embed` drew frame t+Δ no better, and
    labelling is to cost little more than decoding the frames.
    """

    coordinates: Tensor

    def __init__(self, config: LAQConfig, *, latent_dim: int, num_keypoints: int = 32, sharpness: float = 4.0):
        super().__init__()
        width, grid = config.hidden_dim, config.image_size // config.patch_size
        self.sharpness = sharpness
        # patches overlap by half: a small thing never hides on their border
        self.patches = nn.Conv2d(3, width // 4, 2 * config.patch_size, config.patch_size, config.patch_size // 2)
        self.down = nn.Conv2d(width // 4, width, 3, 2, 1)
        self.block = nn.Sequential(nn.GroupNorm(8, width), nn.ReLU(inplace=True), nn.Conv2d(width, width, 3, padding=1))
        self.roles = nn.Conv2d(width, 2 * width, 1)  # the frame as the earlier, and as the later, of a pair
        self.keypoints = nn.Conv2d(width, 2 * num_keypoints, 1)  # where each is sought, and its value there
        self.head = nn.Linear(3 * num_keypoints, latent_dim, bias=False)  # a bias would cancel out
        places = grid_coordinates((grid + 1) // 2).flatten(1)  # (2, H * H)
        self.register_buffer("coordinates", places, persistent=False)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.compare(self.embed(source), self.embed(target))

    def embed(self, frames: Tensor) -> Tensor:
        """Frames `[B, 3, R, R]` -> what `compare` needs of each, `[B, 2 * E, H, H]`."""
        x = self.down(F.relu_(self.patches(frames)))
        return self.roles(x + self.block(x))

    def compare(self, source: Tensor, target: Tensor) -> Tensor:
        """Embedded frames `[B, 2 * E, H, H]` each -> latents `[B, Z]`."""
        source_first, source_last = source.chunk(2, dim=1)
        target_first, target_last = target.chunk(2, dim=1)
        both_ways = torch.cat([source_first + target_last, target_first + source_last])  # (2 * B, E, H, H)
        forwards, backwards = self._keypoints(both_ways).chunk(2)
        return self.head(forwards - backwards)

    def _keypoints(self, pairs: Tensor) -> Tensor:
        """Places and values of the keypoints, `[B, 3 * keypoints]`; `pairs` is used up."""
        scores, values = self.keypoints(F.relu_(pairs)).flatten(2).chunk(2, dim=1)  # (B, keypoints, H * H)
        where = torch.softmax(self.sharpness * scores.float(), dim=-1)
        positions = where @ self.coordinates.T  # (B, keypoints, 2)
        mean_values = (where * values).sum(-1, keepdim=True)  # (B, keypoints, 1)
        return torch.cat([positions, mean_values], dim=-1).flatten(1)


class ChangeDecoder(nn.Module):
    """Frame t as the target has it `[B, F, Y, Y]` and what the codes say `[B, C]` -> frame t+Δ, the same way.

    Args:
        config: depth and width.
        condition_dim: C.
        channels, size: F and Y of the target.
        patch_size: pixels, or features, along a patch of it.
    """

    coordinates: Tensor

    def __init__(self, config: LAQConfig, *, condition_dim: int, channels: int, size: int, patch_size: int):
        super().__init__()
        width, self.patch = config.hidden_dim, patch_size
        kernel, padding = (3, 1) if patch_size == 1 else (2 * patch_size, patch_size // 2)
        self.patches = nn.Conv2d(channels + 2, width, kernel, patch_size, padding)
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(config.num_layers))
        self.convolutions = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(config.num_layers))
        self.modulations = nn.ModuleList(nn.Linear(condition_dim, 2 * width) for _ in range(config.num_layers))
        self.to_target = nn.Conv2d(width, channels * patch_size**2, 3, padding=1)
        nn.init.zeros_(self.to_target.weight)  # no change: training starts at the copy of frame t
        nn.init.zeros_(self.to_target.bias)  # type: ignore[arg-type]
        self.register_buffer("coordinates", grid_coordinates(size)[None], persistent=False)

    def forward(self, source: Tensor, condition: Tensor) -> Tensor:
        x = self.patches(torch.cat([source, self.coordinates.expand(len(source), -1, -1, -1)], dim=1))  # (B, E, G, G)
        for norm, convolution, modulation in zip(self.norms, self.convolutions, self.modulations, strict=True):
            scale, shift = modulation(condition)[:, :, None, None].chunk(2, dim=1)
            x = x + convolution(F.gelu(norm(x) * (1 + scale) + shift))
        return source + F.pixel_shuffle(self.to_target(x), self.patch)


def grid_coordinates(size: int) -> Tensor:
    """x and y in [-1, 1] on a square grid, `[2, size, size]`."""
    axis = torch.linspace(-1, 1, size)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x, y])
