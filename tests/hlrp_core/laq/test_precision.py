"""Codes are computed in float32: without TF32, whatever torch is set to, and with nothing changed afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from hlrp_core.laq.config import LAQConfig
from hlrp_core.laq.networks import PairEncoder
from hlrp_core.laq.precision import in_float32
from hlrp_core.laq.quantizer import LatentActionQuantizer

MATMUL, CUDNN = torch.backends.cuda.matmul, torch.backends.cudnn
HAS_NEWER_NAMES = hasattr(CUDNN, "conv")


def flags() -> list[object]:
    """All that can be read of the older names, and what there is of the newer ones."""
    readers: list[Callable[[], object]] = [
        lambda: MATMUL.allow_tf32,
        lambda: CUDNN.allow_tf32,
        torch.get_float32_matmul_precision,
    ]
    if HAS_NEWER_NAMES:
        readers += [lambda: MATMUL.fp32_precision, lambda: CUDNN.conv.fp32_precision, lambda: CUDNN.rnn.fp32_precision]
    found: list[object] = []
    for read in readers:
        try:
            found.append(read())
        except RuntimeError:  # not while both sets of names are in use
            found.append("unreadable")
    return found


def is_tf32_off() -> bool:
    if HAS_NEWER_NAMES:
        return "tf32" not in (MATMUL.fp32_precision, CUDNN.conv.fp32_precision)
    return not MATMUL.allow_tf32 and not CUDNN.allow_tf32


def as_lerobot_train() -> None:
    MATMUL.allow_tf32 = True


def all_off() -> None:
    MATMUL.allow_tf32 = CUDNN.allow_tf32 = False


def newer_names() -> None:
    MATMUL.fp32_precision = CUDNN.conv.fp32_precision = "tf32"


SETTINGS = {
    "default": lambda: None,
    "as_lerobot_train": as_lerobot_train,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "off": all_off,
    **({"newer_names": newer_names} if HAS_NEWER_NAMES else {}),
}


@pytest.fixture(params=SETTINGS)
def before(request: pytest.FixtureRequest) -> Iterator[list[object]]:
    """The flags, as somebody set them."""
    SETTINGS[request.param]()
    yield flags()
    torch.set_float32_matmul_precision("highest")
    MATMUL.allow_tf32, CUDNN.allow_tf32 = False, True  # as torch has them


def test_tf32_is_off_within_and_as_before_afterwards(before):
    with in_float32(torch.zeros(1)):
        assert is_tf32_off()
    assert flags() == before


def test_tf32_is_as_before_after_an_error(before):
    def fail() -> None:
        with in_float32(torch.zeros(1)), in_float32(torch.zeros(1)):
            assert is_tf32_off()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert flags() == before


def test_codes_and_pictures_are_made_without_tf32(before, monkeypatch):
    seen, embed, compare = [], PairEncoder.embed, PairEncoder.compare

    def note_embed(self, frames):
        seen.append(is_tf32_off())
        return embed(self, frames)

    def note_compare(self, source, target):
        seen.append(is_tf32_off())
        return compare(self, source, target)

    monkeypatch.setattr(PairEncoder, "embed", note_embed)
    monkeypatch.setattr(PairEncoder, "compare", note_compare)
    laq = LatentActionQuantizer(LAQConfig(image_size=16, hidden_dim=16, num_layers=1)).eval()
    frames = torch.randint(0, 256, (4, 2, 16, 16, 3), dtype=torch.uint8)
    laq.calibrate([frames])
    laq.encode_uncalibrated([frames])
    codes = laq.encode(frames)
    assert seen == [True] * 6
    laq.decoder.register_forward_pre_hook(lambda *_: seen.append(is_tf32_off()))
    laq.decode(frames[:, 0], codes)
    assert seen == [True] * 7
    assert flags() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="TF32 is a format of GPUs")
def test_codes_of_a_gpu_are_those_without_tf32(before):
    laq = LatentActionQuantizer(LAQConfig(image_size=64, codebook_size=256)).eval().cuda()
    frames = torch.randint(0, 256, (64, 2, 64, 64, 3), dtype=torch.uint8, device="cuda")
    laq.calibrate([frames])
    embedded, codes = laq.embed(frames), laq.encode(frames)
    all_off()
    assert torch.equal(laq.embed(frames), embedded)
    assert torch.equal(laq.encode(frames), codes)
