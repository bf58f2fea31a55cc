"""The loss on labelled positions alone = the loss over full `[B, L, V]` logits with -100 on the prompt."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from hlrp_core.backends.composed import ComposedBackend
from hlrp_core.backends.config import BackendConfig
from hlrp_core.backends.fake_batch import fake_batch
from hlrp_core.codes.token_scheme import TokenSchemeConfig
from hlrp_core.contract import BackendMode, FoundationBatch
from hlrp_core.prompting.prompt import PromptConfig

TOLERANCE = 1e-5
TOKEN_BACKENDS = ["qwen_chat", "qwen_plain", "smol_chat", "smol_plain"]
CHATS = ["qwen_chat", "smol_chat"]  # one of each family


def plain_model(backend: ComposedBackend) -> PreTrainedModel:
    """The same weights in transformers' own classes, nothing of ours in them."""
    model = type(backend.core.model)(backend.core.model.config)
    model.load_state_dict(backend.core.model.state_dict())
    return model.train(backend.training)


def sequences(backend: ComposedBackend, batch: FoundationBatch) -> tuple[list[Tensor], int]:
    """Prompt and completion ids of each sample without padding, and the length of a completion."""
    tokens = backend._prompt(batch, for_prediction=False).tokens
    completion = backend.code_head.vocabulary.encode(batch.target_codes)
    prompts = [ids[mask] for ids, mask in zip(tokens.ids, tokens.valid_mask, strict=True)]
    return [torch.cat(pair) for pair in zip(prompts, completion, strict=True)], completion.shape[1]


def reference_loss(model, backend: ComposedBackend, batch: FoundationBatch, side: str) -> Tensor:
    """Everything by transformers: padding mask, positions, full logits, shifted cross entropy."""
    rows, completion_len = sequences(backend, batch)
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), backend.core.tokenizer.pad_token_id)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, row in enumerate(rows):
        start = longest - len(row) if side == "left" else 0
        end = start + len(row)
        ids[i, start:end], mask[i, start:end] = row, 1
        labels[i, end - completion_len : end] = row[-completion_len:]
    logits = full_logits(model, backend, batch.frames[:, 0], ids, attention_mask=mask)
    assert logits.shape[:2] == ids.shape  # the full computation
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)


def full_logits(model, backend: ComposedBackend, frames: Tensor, ids: Tensor, **inputs: Tensor) -> Tensor:
    """Logits `[B, L, V]` of transformers' own model on images `[B, H, W, 3]` and ids `[B, L]`."""
    core = backend.core
    images = core.processor.image_processor(images=core.images_for_processor(frames, 1), return_tensors="pt")
    if core.family == "qwen3_vl":
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    return model(input_ids=ids, **inputs, **images).logits


@pytest.mark.parametrize("separator", [" ", ""])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", TOKEN_BACKENDS)
def test_value_and_gradients_equal_the_full_computation(name, side, separator, make_tiny_backend: Callable):
    backend = make_tiny_backend(
        name, prompt=PromptConfig(padding_side=side), token_scheme=TokenSchemeConfig(separator=separator)
    ).train()
    batch = fake_batch(backend, batch_size=5)
    assert len({len(text) for text in batch.instructions}) > 2  # several lengths: padding
    loss = backend.loss_from_batch(batch, mode=BackendMode.CODES).loss
    loss.backward()

    model = plain_model(backend)
    reference = reference_loss(model, backend, batch, side)
    reference.backward()

    assert loss.item() == pytest.approx(reference.item(), abs=TOLERANCE)
    ours = dict(backend.core.model.named_parameters())
    theirs = dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    largest = max(p.grad.abs().max() for p in theirs.values() if p.grad is not None)
    for key, parameter in theirs.items():
        if parameter.grad is None:
            assert ours[key].grad is None or not ours[key].grad.any(), key
            continue
        torch.testing.assert_close(ours[key].grad, parameter.grad, rtol=0, atol=TOLERANCE * float(largest), msg=key)


@pytest.mark.parametrize("name", CHATS)
def test_it_is_the_mean_over_samples_of_per_sample(name, make_tiny_backend: Callable):
    backend = make_tiny_backend(name).eval()
    batch = fake_batch(backend, batch_size=4)
    output = backend.loss_from_batch(batch, mode=BackendMode.CODES)
    for row in range(4):
        one = FoundationBatch(batch.frames[[row]], [batch.instructions[row]], batch.target_codes[[row]])
        alone = reference_loss(plain_model(backend), backend, one, "left")
        assert output.per_sample[row].item() == pytest.approx(alone.item(), abs=2 * TOLERANCE)


@pytest.mark.parametrize("name", CHATS)
def test_padding_side_and_batch_mates_do_not_change_it(name, make_tiny_backend: Callable):
    left = make_tiny_backend(name, prompt=PromptConfig(padding_side="left")).eval()
    right = make_tiny_backend(name, prompt=PromptConfig(padding_side="right")).eval()
    right.load_state_dict(left.state_dict())
    batch = fake_batch(left, batch_size=4)
    one, other = (b.loss_from_batch(batch, mode=BackendMode.CODES) for b in (left, right))
    torch.testing.assert_close(one.per_sample, other.per_sample, rtol=0, atol=TOLERANCE)
    order = [2, 0, 3, 1]
    turned = FoundationBatch(batch.frames[order], [batch.instructions[i] for i in order], batch.target_codes[order])
    again = left.loss_from_batch(turned, mode=BackendMode.CODES)
    torch.testing.assert_close(again.per_sample, one.per_sample[order], rtol=0, atol=1e-4)


@pytest.mark.parametrize("objective", ["codes_only", "restricted"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CHATS)
def test_other_objectives_equal_their_definition_over_full_logits(name, side, objective, make_tiny_backend: Callable):
    backend = make_tiny_backend(name, prompt=PromptConfig(padding_side=side), code_objective=objective).train()
    batch = fake_batch(backend, batch_size=5)
    loss = backend.loss_from_batch(batch, mode=BackendMode.CODES).loss
    loss.backward()

    model = plain_model(backend)
    vocabulary = backend.code_head.vocabulary
    losses = []
    for sample, row in enumerate(sequences(backend, batch)[0]):  # one by one: no padding at all
        logits = full_logits(model, backend, batch.frames[sample : sample + 1, 0], row[None])[0].float()
        first = len(row) - vocabulary.completion_len
        for slot, code in zip(vocabulary.code_slots.tolist(), batch.target_codes[sample].tolist(), strict=True):
            scores = logits[first + slot - 1]
            if objective == "restricted":
                scores, label = scores[vocabulary.code_ids], torch.tensor(code)
            else:
                label = vocabulary.code_ids[code]
            losses.append(F.cross_entropy(scores, label))
    reference = torch.stack(losses).mean()
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), abs=TOLERANCE)
    theirs = dict(model.named_parameters())
    for parameter_name, ours in backend.core.model.named_parameters():
        expected = theirs[parameter_name].grad
        if expected is not None:
            torch.testing.assert_close(ours.grad, expected, atol=TOLERANCE, rtol=1e-3)


def test_free_decoding_needs_the_whole_completion():
    with pytest.raises(ValueError, match=r"decoding: expected 'constrained' or 'generate'.*got 'free'"):
        BackendConfig(decoding="free", code_objective="codes_only")
    with pytest.raises(ValueError, match="code_objective: expected one of completion, codes_only, restricted"):
        BackendConfig(code_objective="other")  # type: ignore[arg-type]
