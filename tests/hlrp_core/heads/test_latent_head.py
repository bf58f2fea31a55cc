"""The latent head: pooling = an obvious loop, whatever is padded; its loss and its draws."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hlrp_core.backends.config import BackendConfig, LatentPooling
from hlrp_core.backends.fake_batch import fake_batch
from hlrp_core.bundle import build_saved_backend, load_backend, save_pretrained
from hlrp_core.contract import BackendMode, SamplingOptions
from hlrp_core.heads.action_head import PrefixEncoding
from hlrp_core.heads.code_head import BackboneEncoding
from hlrp_core.heads.latent_head import LatentHead
from hlrp_core.heads.pooled_readout import POOLINGS, QueryPooling

W, K, S = 12, 6, 3
LENGTHS = [7, 1, 4, 3]
NAMES = get_args(LatentPooling)


def build_head(pooling: str, width: int = W) -> LatentHead:
    torch.manual_seed(0)
    return LatentHead(width, codebook_size=K, code_seq_len=S, pooling=pooling).eval()


def make_rows(width: int = W) -> list[Tensor]:
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(length, width, generator=rng) for length in LENGTHS]


def pad(rows: list[Tensor], side: str, filler: float = 0.0) -> PrefixEncoding:
    longest = max(len(row) for row in rows)
    hidden = torch.full((len(rows), longest, rows[0].shape[1]), filler)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), longest) if side == "left" else slice(0, len(row))
        hidden[i, where], mask[i, where] = row, True
    return PrefixEncoding(hidden, mask)


def rms(vector: Tensor) -> Tensor:
    return vector / (vector.square().mean() + 1e-6).sqrt()


def slow_logits(head: LatentHead, row: Tensor) -> Tensor:
    """One sample without padding, one code position after the other: `[S, K]`."""
    tokens = [rms(token) for token in row]
    logits = []
    for position in range(S):
        if isinstance(head.pool, QueryPooling):
            size = row.shape[1] // head.pool.num_heads
            parts = []
            for part in range(head.pool.num_heads):
                columns = slice(part * size, (part + 1) * size)
                query = head.pool.queries[position, columns]
                key, value = (head.pool.key_value.weight.view(2, -1, row.shape[1])[i, columns] for i in (0, 1))
                weights = torch.softmax(torch.stack([query @ (key @ t) / size**0.5 for t in tokens]), dim=0)
                parts.append(sum(weight * (value @ t) for weight, t in zip(weights, tokens, strict=True)))
            pooled = torch.cat(parts)
        elif isinstance(head.pool, POOLINGS["mean"]):
            pooled = sum(tokens[1:], tokens[0]) / len(tokens)
        else:
            pooled = tokens[-1]
        features = F.silu(head.hidden(rms(pooled)))
        logits.append(features @ head.weight[position] + head.bias[position])
    return torch.stack(logits)


@pytest.mark.parametrize("width", [W, 128])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", NAMES)
def test_pooling_equals_a_loop(pooling, side, width):
    head, rows = build_head(pooling, width), make_rows(width)
    expected = torch.stack([slow_logits(head, row) for row in rows])
    for filler in (0.0, 100.0, float("nan")):  # padding may hold anything
        logits = head(pad(rows, side, filler))
        assert logits.shape == (len(rows), S, K)
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", NAMES)
def test_every_parameter_learns_and_padding_does_not(pooling):
    head = build_head(pooling)
    prefix = pad(make_rows(), "left", float("nan"))
    prefix.hidden.requires_grad_()
    codes = torch.randint(0, K, (len(LENGTHS), S))
    head.loss(None, BackboneEncoding(prefix, None), codes).per_sample.mean().backward()  # type: ignore[arg-type]
    assert all(p.grad.isfinite().all() and p.grad.any() for p in head.parameters())
    assert not prefix.hidden.grad[~prefix.valid_mask].any()
    assert prefix.hidden.grad.isfinite().all()


@pytest.mark.parametrize("pooling", NAMES)
def test_float32_under_autocast(pooling):
    head, prefix = build_head(pooling), pad(make_rows(), "left")
    expected = head(prefix)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(head(prefix), expected)
        low = head(PrefixEncoding(prefix.hidden.bfloat16(), prefix.valid_mask))
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, expected, rtol=0.1, atol=0.1)


def test_loss_is_the_mean_cross_entropy_of_a_samples_codes():
    head, prefix = build_head("mean"), pad(make_rows(), "right")
    codes = torch.randint(0, K, (len(LENGTHS), S), generator=torch.Generator().manual_seed(2))
    result = head.loss(None, BackboneEncoding(prefix, None), codes)  # type: ignore[arg-type]
    log_probs = head(prefix).log_softmax(-1)
    for row in range(len(LENGTHS)):
        expected = -sum(log_probs[row, i, codes[row, i]] for i in range(S)) / S
        assert result.per_sample[row].item() == pytest.approx(expected.item(), abs=1e-5)
    assert torch.equal(result.predicted, log_probs.argmax(-1))
    assert head.completion(codes) is None


def test_an_unknown_pooling_is_refused():
    assert set(POOLINGS) == set(NAMES)
    with pytest.raises(ValueError, match="latent_pooling: expected one of mean, last, query, got 'max'"):
        BackendConfig(latent_pooling="max")  # type: ignore[arg-type]


# -- in a backend -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smol_latent_head", "qwen_latent_head"])
def test_sampling(name, make_tiny_backend):
    backend = make_tiny_backend(name).eval()
    batch = fake_batch(backend, batch_size=4)

    def draw(seed: int | None, temperature: float) -> Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        sampling = SamplingOptions(temperature=temperature, generator=generator)
        output = backend.latent_from_batch(batch, mode=BackendMode.CODES, sampling=sampling)
        assert output.logits.shape == (4, 4, 8)
        return output.tokens

    assert torch.equal(draw(0, 2.0), draw(0, 2.0))
    assert not torch.equal(draw(0, 2.0), draw(1, 2.0))
    greedy = draw(None, 0.0)
    assert torch.equal(draw(3, 1e-4), greedy)


def test_the_vocabulary_stays_as_it_is(make_tiny_backend, tiny_backbone):
    backend = make_tiny_backend("smol_latent_head")
    assert "<ACT_0>" not in backend.core.tokenizer.get_vocab()
    assert not backend.core.lm_head.weight.requires_grad  # of its own and never read
    tied = make_tiny_backend("qwen_latent_head")
    assert tied.core.lm_head.weight.requires_grad  # the embeddings


@pytest.mark.parametrize("pooling", NAMES)
def test_it_travels(pooling, tmp_path, make_tiny_backend):
    backend = make_tiny_backend("smol_latent_head", latent_pooling=pooling).eval()
    batch = fake_batch(backend)
    expected = backend.latent_from_batch(batch, mode=BackendMode.CODES).logits
    save_pretrained(backend, tmp_path / "bundle")
    loaded = load_backend(tmp_path / "bundle")
    assert torch.equal(loaded.latent_from_batch(batch, mode=BackendMode.CODES).logits, expected)
    other = BackendConfig(name="smol_latent_head", latent_pooling="last" if pooling == "mean" else "mean")
    with pytest.raises(ValueError, match=f"latent_pooling: expected {pooling} as in the checkpoint"):
        build_saved_backend(tmp_path / "bundle", config=other)
