from __future__ import annotations

import pytest
import torch
from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

from hlrp_core.backbones.random_checkpoint import FAMILIES
from lerobot_hlrp.cli.backbone import BackboneCommand, make_backbone
from lerobot_hlrp.cli.command import run_command


def run(*flags: str) -> None:
    run_command(BackboneCommand, make_backbone, flags)


@pytest.mark.parametrize("family", FAMILIES)
def test_it_writes_a_checkpoint_that_the_real_classes_load(family, tmp_path, capsys):
    run(f"--family={family}", f"--output={tmp_path / 'b'}")
    assert "M parameters" in capsys.readouterr().out
    assert not list((tmp_path / "b").glob("*.jinja"))  # every part survives an upload that takes JSON alone
    assert {path.suffix for path in (tmp_path / "b").iterdir()} == {".json", ".safetensors"}
    processor = AutoProcessor.from_pretrained(tmp_path / "b")
    for text in ("push the red block", "ünïcödé 🤖", "<tag>"):
        assert processor.tokenizer.decode(processor.tokenizer.encode(text, add_special_tokens=False)) == text


def test_equal_seeds_give_equal_files(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.rand(1)  # the global generator's state does not matter
        run(f"--output={tmp_path / name}", f"--seed={seed}")
    a, b, c = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "abc")
    assert a == b
    assert a["model.safetensors"] != c["model.safetensors"]
    assert a["tokenizer.json"] == c["tokenizer.json"]


def test_the_global_generator_is_left_alone(tmp_path):
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    run(f"--output={tmp_path / 'b'}")
    assert torch.equal(torch.rand(1), expected)


def test_a_published_processor(real_processor, tmp_path):
    run(f"--output={tmp_path / 'b'}", f"--processor={real_processor('qwen3_vl')}")
    model = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "b")
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "b").tokenizer
    assert model.config.text_config.vocab_size >= len(tokenizer) > 150_000
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>")


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--family=qwen9"], "Next step: Choose one of these."),
        (["--family=qwen3_lv"], "family: expected one of qwen3_vl, smolvlm, got 'qwen3_lv'. Next step: "),
        (["--family=qwen3_lv"], "Did you mean 'qwen3_vl'?"),
        (["--size=huge"], "size: expected one of tiny, small"),
        (["--processor=/nowhere/at/all"], "processor: expected a folder"),
    ],
)
def test_user_errors_are_one_message(flags, text, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        run(f"--output={tmp_path / 'b'}", *flags)
    assert exit_.value.code == 1
    assert text in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("part", ["everything", "tokenizer.json", "processor_config.json", "its family"])
def test_a_processor_that_cannot_be_used(part, tmp_path, capsys):
    broken = tmp_path / "broken"
    run(f"--output={broken}", f"--family={'smolvlm' if part == 'its family' else 'qwen3_vl'}")
    for path in broken.glob("*" if part == "everything" else part):
        path.unlink()
    with pytest.raises(SystemExit):
        run(f"--output={tmp_path / 'b'}", f"--processor={broken}")
    printed = capsys.readouterr().err
    assert "processor: expected " in printed
    assert "Next step: copy or download" in printed
    assert not (tmp_path / "b").exists()


def test_a_file_in_the_way_is_named(tmp_path, capsys):
    (tmp_path / "mine").write_text("precious")
    for output in ("mine", "mine/b"):
        with pytest.raises(SystemExit):
            run(f"--output={tmp_path / output}")
        printed = capsys.readouterr().err
        assert "output: expected a folder, new or old" in printed
        assert "Next step" in printed
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_folder_with_files_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(SystemExit):
        run(f"--output={tmp_path}")
    assert "new or empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
