"""Code tokens: the same names, the same ids, everywhere; and codes <-> completions as inverses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from hlrp_core.backbones.model_core import ModelCore, save_processor
from hlrp_core.backends.fake_batch import fake_batch
from hlrp_core.codes.token_scheme import CodeVocabulary, TokenSchemeConfig, add_code_tokens
from hlrp_core.contract import BackendMode

SCHEMES = {
    "default": TokenSchemeConfig(),
    "short": TokenSchemeConfig(separator=""),
    "other names": TokenSchemeConfig(begin="[LAT]", end="[/LAT]", separator=", ", code="[L{}]"),
}


@pytest.fixture
def tokenizer(tiny_qwen):
    return AutoTokenizer.from_pretrained(tiny_qwen)


def test_adding_is_idempotent(tokenizer):
    scheme = TokenSchemeConfig()
    before = len(tokenizer)
    assert add_code_tokens(tokenizer, scheme, 8) == 10
    ids = tokenizer.get_vocab()
    assert add_code_tokens(tokenizer, scheme, 8) == 0
    assert tokenizer.get_vocab() == ids
    assert len(tokenizer) == before + 10
    assert [ids[name] for name in scheme.token_names(8)] == list(range(before, before + 10))


def test_ids_are_the_same_after_reload_and_in_another_process(tokenizer, tiny_qwen, tmp_path):
    scheme = TokenSchemeConfig()
    add_code_tokens(tokenizer, scheme, 8)
    ids = {name: tokenizer.get_vocab()[name] for name in scheme.token_names(8)}
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert add_code_tokens(reloaded, scheme, 8) == 0
    assert {name: reloaded.get_vocab()[name] for name in ids} == ids

    program = (
        "import json, sys; from transformers import AutoTokenizer\n"
        "from hlrp_core.codes.token_scheme import TokenSchemeConfig, add_code_tokens\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1]); s = TokenSchemeConfig(); add_code_tokens(t, s, 8)\n"
        "print(json.dumps({name: t.get_vocab()[name] for name in s.token_names(8)}))"
    )
    output = subprocess.run(
        [sys.executable, "-c", program, str(tiny_qwen)], capture_output=True, text=True, check=True
    ).stdout
    assert json.loads(output.splitlines()[-1]) == ids


def test_a_tokenizer_of_other_codes_is_refused(tokenizer):
    scheme = TokenSchemeConfig()
    add_code_tokens(tokenizer, scheme, 8)
    for size in (7, 4):
        with pytest.raises(ValueError, match=r"codebook_size.*also holds <ACT_"):
            add_code_tokens(tokenizer, scheme, size)
    with pytest.raises(ValueError, match=r"none or all of 18 code tokens.*got 10 of them"):
        add_code_tokens(tokenizer, scheme, 16)


def test_a_name_that_is_an_ordinary_word_is_refused(tokenizer):
    assert "disc" in tokenizer.get_vocab() or "Ġdisc" in tokenizer.get_vocab()
    word = next(w for w in tokenizer.get_vocab() if w.isalpha() and len(w) > 2)
    with pytest.raises(ValueError, match="special tokens"):
        add_code_tokens(tokenizer, TokenSchemeConfig(begin=word), 8)


def test_names_added_as_plain_tokens_are_refused(tokenizer):
    tokenizer.add_tokens(TokenSchemeConfig().token_names(4))  # not special: a user's "<ACT_3>" would become one
    with pytest.raises(ValueError, match="special tokens"):
        add_code_tokens(tokenizer, TokenSchemeConfig(), 4)


def test_scattered_ids_are_refused(tokenizer):
    names = TokenSchemeConfig().token_names(4)
    tokenizer.add_tokens([*names[:3], "<gap>", *names[3:]], special_tokens=True)
    with pytest.raises(ValueError, match="consecutive"):
        add_code_tokens(tokenizer, TokenSchemeConfig(), 4)


@pytest.mark.parametrize(
    "settings",
    [{"code": "<ACT>"}, {"code": "{}{}"}, {"begin": ""}, {"end": " x"}, {"begin": "<A>", "end": "<A>"}],
)
def test_schemes_that_cannot_work(settings):
    with pytest.raises(ValueError, match=r"token scheme: expected.*Next step"):
        TokenSchemeConfig(**settings)


@pytest.mark.parametrize("wrapper", ["begin", "end"])
@pytest.mark.parametrize("code", [0, 9, 10])
def test_a_wrapper_with_the_name_of_a_code_is_refused(code, wrapper, tokenizer, make_tiny_backend):
    """Code 10 of 10 is none, but a tokenizer that holds its name is taken for that of a larger codebook."""
    scheme, before = TokenSchemeConfig(**{wrapper: f"<ACT_{code}>"}), len(tokenizer)
    expected = rf"name for '{wrapper}'.*codebook_size=10.*got '<ACT_{code}>', the name of code {code}\. Next step"
    with pytest.raises(ValueError, match=expected):
        add_code_tokens(tokenizer, scheme, 10)
    assert len(tokenizer) == before
    with pytest.raises(ValueError, match=expected):
        make_tiny_backend(token_scheme=scheme, codebook_size=10)


def test_a_wrapper_with_the_name_of_no_code(tokenizer):
    scheme = TokenSchemeConfig(begin="<ACT_11>")
    for num_added in (12, 0):
        assert add_code_tokens(tokenizer, scheme, 10) == num_added
    codes = torch.randint(0, 10, (4, 3))
    vocabulary = CodeVocabulary(tokenizer, scheme, 10, 3)
    assert [vocabulary.decode(row) for row in vocabulary.encode(codes).tolist()] == codes.tolist()


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(("code_seq_len", "codebook_size"), [(1, 2), (4, 8), (8, 256)])
def test_encode_and_decode_are_inverses(name, code_seq_len, codebook_size, tokenizer):
    scheme = SCHEMES[name]
    add_code_tokens(tokenizer, scheme, codebook_size)
    vocabulary = CodeVocabulary(tokenizer, scheme, codebook_size, code_seq_len)
    codes = torch.randint(0, codebook_size, (16, code_seq_len))
    completion = vocabulary.encode(codes)
    assert completion.shape == (16, vocabulary.completion_len)
    assert [vocabulary.decode(row) for row in completion.tolist()] == codes.tolist()
    text = tokenizer.decode(completion[0], skip_special_tokens=False)
    expected = scheme.separator.join([scheme.begin, *(scheme.code_token(int(c)) for c in codes[0]), scheme.end])
    assert text == expected


def test_the_default_completion_reads_as_documented(tokenizer):
    add_code_tokens(tokenizer, TokenSchemeConfig(), 8)
    vocabulary = CodeVocabulary(tokenizer, TokenSchemeConfig(), 8, 4)
    ids = vocabulary.encode(torch.tensor([[3, 0, 7, 1]]))[0]
    assert tokenizer.decode(ids) == "<ACTION> <ACT_3> <ACT_0> <ACT_7> <ACT_1> </ACTION>"
    assert ids[-1] == vocabulary.end_id  # no end-of-sequence token is trained
    assert vocabulary.forced_prefix.tolist() == ids[:2].tolist()


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_no_completion_does_not_parse(name, tokenizer):
    scheme = SCHEMES[name]
    add_code_tokens(tokenizer, scheme, 8)
    vocabulary = CodeVocabulary(tokenizer, scheme, 8, 4)
    good = vocabulary.encode(torch.tensor([[3, 0, 7, 1]]))[0].tolist()
    assert vocabulary.decode([*good, 5, 6]) == [3, 0, 7, 1]  # what stands behind the end does not matter
    assert vocabulary.decode([]) is None
    assert vocabulary.decode(good[:-1]) is None
    assert vocabulary.decode([*good[:-1], 5]) is None
    for position in range(len(good)):
        broken = list(good)
        broken[position] = int(vocabulary.code_ids[-1]) + 1 if position in vocabulary.code_slots else 5
        assert vocabulary.decode(broken) is None
        broken[position] = vocabulary.begin_id
        assert (vocabulary.decode(broken) is None) == (position != 0)


@pytest.fixture
def tables(make_tiny_backend: Callable):
    return lambda **sizes: make_tiny_backend("qwen_chat", **sizes)


def test_new_rows_start_near_the_mean_distinct_and_seeded(tables):
    one, other = (tables(codebook_size=256, seed=seed).core for seed in (0, 1))
    rows, old = one.lm_head.weight[-256:], one.lm_head.weight[:400]
    assert torch.equal(one.lm_head.weight, other.lm_head.weight)  # its own seed, not the global one
    distance = (rows - old.mean(0)).abs().max()
    assert distance < 5 * old.std(0).max()
    assert (rows - rows.mean(0)).norm(dim=1).min() > 0.1 * old.std(0).norm()
    assert len({tuple(row) for row in rows.tolist()}) == 256
    logits = torch.randn(64, rows.shape[1]) @ rows.T
    gap = logits.topk(2, dim=1).values.diff(dim=1).abs()
    assert gap.min() > 0  # untrained ties would make an argmax a coin toss


def test_old_rows_stay_and_tied_tables_stay_tied(tables, tiny_qwen):
    from transformers import Qwen3VLForConditionalGeneration

    original = Qwen3VLForConditionalGeneration.from_pretrained(tiny_qwen)
    num_tokens = len(AutoTokenizer.from_pretrained(tiny_qwen))
    for size in (8, 256):
        core = tables(codebook_size=size).core
        embedding = core.model.get_input_embeddings()
        assert embedding.weight is core.lm_head.weight
        kept = original.get_input_embeddings().weight[:num_tokens]
        assert torch.equal(embedding.weight[:num_tokens], kept)
        assert core.lm_head.out_features == embedding.weight.shape[0] == embedding.num_embeddings


def test_a_small_codebook_fits_into_the_spare_rows(tables, tiny_qwen):
    rows = json.loads((tiny_qwen / "config.json").read_text())["text_config"]["vocab_size"]
    assert tables(codebook_size=2).core.lm_head.out_features == rows  # never fewer than there were
    grown = tables(codebook_size=256).core
    assert grown.lm_head.out_features == len(grown.tokenizer) > rows
    assert grown.model.config.text_config.vocab_size == len(grown.tokenizer)


def test_untied_tables_are_both_initialised(tmp_path, tiny_qwen, make_tiny_backend):
    from transformers import AutoConfig, AutoProcessor, Qwen3VLForConditionalGeneration

    config = AutoConfig.from_pretrained(tiny_qwen)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    torch.manual_seed(0)
    Qwen3VLForConditionalGeneration(config).save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(tiny_qwen).save_pretrained(tmp_path)
    for size in (8, 256):
        core = make_tiny_backend(backbone=tmp_path, codebook_size=size).core
        embedding, head = core.model.get_input_embeddings().weight, core.lm_head.weight
        assert embedding is not head
        for table in (embedding, head):
            ids = [core.tokenizer.get_vocab()[f"<ACT_{k}>"] for k in range(size)]
            assert len({tuple(row) for row in table[ids].tolist()}) == size
            assert (table[ids] - table[:400].mean(0)).abs().max() < 6 * table[:400].std(0).max()
        assert not torch.equal(embedding[ids], head[ids])


def save_as_backbone(core: ModelCore, folder: Path) -> Path:
    """A folder in the Hugging Face layout whose tokenizer holds the codes."""
    core.model.save_pretrained(folder)
    save_processor(core.processor, folder)
    return folder


@pytest.mark.parametrize("train_vocabulary", ["all", "code_rows"])
@pytest.mark.parametrize("name", ["qwen_chat", "smol_plain"])  # tied tables, and tables apart
def test_a_backbone_that_holds_the_codes_keeps_their_rows(name, train_vocabulary, make_tiny_backend, tmp_path, caplog):
    trained = make_tiny_backend(name, codebook_size=256)  # more than the spare rows
    assert "already holds" not in caplog.text
    with torch.no_grad():
        for table in (trained.core.model.get_input_embeddings().weight, trained.core.lm_head.weight):
            table.add_(torch.randn_like(table))
    folder = save_as_backbone(trained.core, tmp_path / "trained")
    with caplog.at_level("INFO"):
        again = make_tiny_backend(name, codebook_size=256, backbone=folder, train_vocabulary=train_vocabulary)
    assert "already holds the 258 code tokens (<ACTION>, ...)" in caplog.text
    for get in (lambda core: core.model.get_input_embeddings().weight, lambda core: core.lm_head.weight):
        assert torch.equal(get(again.core), get(trained.core))
    batch = fake_batch(trained)
    one, other = (backend.latent_from_batch(batch, mode=BackendMode.CODES) for backend in (trained, again))
    assert torch.equal(one.logits, other.logits)


def test_codes_that_only_the_tokenizer_holds_get_the_rows_that_are_missing(tmp_path, tiny_qwen, make_tiny_backend):
    folder = shutil.copytree(tiny_qwen, tmp_path / "tokenizer-alone")
    add_code_tokens(tokenizer := AutoTokenizer.from_pretrained(folder), TokenSchemeConfig(), 256)
    tokenizer.save_pretrained(folder)
    num_rows = json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"]
    table, original = (
        make_tiny_backend(backbone=backbone, codebook_size=256).core.lm_head.weight for backbone in (folder, tiny_qwen)
    )
    assert len(table) == len(original) > num_rows
    stored = load_file(tiny_qwen / "model.safetensors")["model.language_model.embed_tokens.weight"]
    assert torch.equal(table[:num_rows], stored)
    new = table[num_rows:]
    assert len({tuple(row) for row in new.tolist()}) == len(new)
    assert (new - stored.mean(0)).abs().max() < 5 * stored.std(0).max()
