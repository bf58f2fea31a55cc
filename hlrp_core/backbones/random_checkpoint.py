"""Randomly initialised checkpoints of the real transformers classes, in the ordinary Hugging Face layout.

They stand in for `Qwen/Qwen3-VL-2B-Instruct` and its kin wherever no hub can be reached: the same code runs on
them. `tiny` is for tests and for learning small worlds on a CPU, `small` is for measuring.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.image_utils import PILImageResampling

from hlrp_core.backbones.instruction_tokenizer import train_tokenizer_files
from hlrp_core.backbones.model_core import save_processor
from hlrp_core.expectation import expect_choice

SIZES = ("tiny", "small")


def _qwen3_vl_processor(image_size: int, patch_size: int) -> ProcessorMixin:
    from transformers import Qwen2Tokenizer, Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    with tempfile.TemporaryDirectory() as name:
        train_tokenizer_files(Path(name), vocab_size=640)
        tokenizer = Qwen2Tokenizer.from_pretrained(name)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    special += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:], "pad_token": special[0]})
    tokenizer.eos_token = "<|im_end|>"
    settings = {
        "patch_size": patch_size,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": image_size**2, "longest_edge": image_size**2},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(**settings),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(**settings),
        chat_template=_QWEN_CHAT_TEMPLATE,
    )


_QWEN_CHAT_TEMPLATE = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- else -%}{{- part.text -}}{%- endif -%}{%- endfor -%}{%- endif -%}{{- '<|im_end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def _qwen3_vl_model(processor: ProcessorMixin, size: str, num_embeddings: int) -> PreTrainedModel:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    shape = {
        # width, layers, heads, key/value heads, MLP width, vision width, vision layers, vision heads, deepstack
        "tiny": (128, 3, 4, 2, 384, 64, 2, 2, [0]),
        "small": (768, 8, 12, 4, 2304, 384, 6, 6, [1, 3]),
    }[size]
    width, layers, heads, kv_heads, mlp, v_width, v_layers, v_heads, deepstack = shape
    head_dim = width // heads
    image_processor = processor.image_processor  # type: ignore[attr-defined]
    ids = processor.tokenizer.convert_tokens_to_ids  # type: ignore[attr-defined]
    third = head_dim // 2 // 3
    # Pretrained models were initialised at 0.02 for widths of thousands. At these widths that makes every layer shrink
    # its input, and learning from scratch takes three times the steps; 1 / sqrt(width) keeps the scale.
    init, vision_init = width**-0.5, v_width**-0.5
    config = Qwen3VLConfig(
        text_config={  # type: ignore[call-arg]
            "vocab_size": num_embeddings,
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "initializer_range": init,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_interleaved": True,
                "mrope_section": [head_dim // 2 - 2 * third, third, third],
            },
            "pad_token_id": processor.tokenizer.pad_token_id,  # type: ignore[attr-defined]
            "eos_token_id": processor.tokenizer.eos_token_id,  # type: ignore[attr-defined]
        },
        vision_config={  # type: ignore[call-arg]
            "depth": v_layers,
            "hidden_size": v_width,
            "intermediate_size": 4 * v_width,
            "num_heads": v_heads,
            "out_hidden_size": width,
            "patch_size": image_processor.patch_size,
            "spatial_merge_size": image_processor.merge_size,
            "temporal_patch_size": image_processor.temporal_patch_size,
            "num_position_embeddings": 256,
            "initializer_range": vision_init,
            "deepstack_visual_indexes": deepstack,
        },
        image_token_id=ids("<|image_pad|>"),  # type: ignore[call-arg]
        video_token_id=ids("<|video_pad|>"),  # type: ignore[call-arg]
        vision_start_token_id=ids("<|vision_start|>"),  # type: ignore[call-arg]
        vision_end_token_id=ids("<|vision_end|>"),  # type: ignore[call-arg]
        tie_word_embeddings=True,  # type: ignore[call-arg]
    )
    return Qwen3VLForConditionalGeneration(config)


def _smolvlm_processor(image_size: int, patch_size: int) -> ProcessorMixin:
    from transformers import PreTrainedTokenizerFast, SmolVLMImageProcessor, SmolVLMProcessor
    from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

    with tempfile.TemporaryDirectory() as name:
        train_tokenizer_files(Path(name), vocab_size=640)
        bpe = Tokenizer(BPE.from_file(f"{name}/vocab.json", f"{name}/merges.txt"))
    bpe.pre_tokenizer = ByteLevel(add_prefix_space=False)
    bpe.decoder = ByteLevelDecoder()
    names = {"fake_image_token": "<fake_token_around_image>", "image_token": "<image>"}
    names |= {"global_image_token": "<global-img>", "end_of_utterance_token": "<end_of_utterance>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        pad_token="<|im_end|>",
        eos_token="<end_of_utterance>",
        extra_special_tokens=names,
        clean_up_tokenization_spaces=False,
    )
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    marks = [AddedToken(tile, special=True, normalized=False) for tile in tiles]
    tokenizer.add_tokens(marks, special_tokens=True)  # type: ignore[arg-type]
    settings = {
        "size": {"longest_edge": 4 * image_size},
        "max_image_size": {"longest_edge": image_size},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "resample": PILImageResampling.BICUBIC,
    }
    return SmolVLMProcessor(
        image_processor=SmolVLMImageProcessor(**settings, do_image_splitting=False, do_resize=False, do_pad=False),
        tokenizer=tokenizer,
        video_processor=SmolVLMVideoProcessor(**settings),
        image_seq_len=(image_size // patch_size // _SMOLVLM_SCALE) ** 2,
        chat_template=_SMOLVLM_CHAT_TEMPLATE,
    )


_SMOLVLM_SCALE = 2  # patches along a side that become one image token
_SMOLVLM_CHAT_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def _smolvlm_model(processor: ProcessorMixin, size: str, num_embeddings: int) -> PreTrainedModel:
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    shape = {
        # width, layers, heads, key/value heads, MLP width, vision width, vision layers, vision heads
        "tiny": (128, 3, 4, 2, 384, 64, 2, 2),
        "small": (768, 8, 12, 4, 2304, 384, 6, 6),
    }[size]
    width, layers, heads, kv_heads, mlp, v_width, v_layers, v_heads = shape
    tokenizer = processor.tokenizer  # type: ignore[attr-defined]
    image_size = processor.image_processor.max_image_size["longest_edge"]  # type: ignore[attr-defined]
    pixels_per_token = image_size // math.isqrt(processor.image_seq_len)  # type: ignore[attr-defined]
    # the published models have larger patches and merge more of them than a small image could bear
    scale = 2 * _SMOLVLM_SCALE if pixels_per_token % 64 == 0 else _SMOLVLM_SCALE
    # as for Qwen3-VL above: 1 / sqrt(width) keeps the scale of what passes through a layer
    init, vision_init = width**-0.5, v_width**-0.5
    config = SmolVLMConfig(
        text_config={  # type: ignore[call-arg]
            "model_type": "llama",
            "vocab_size": num_embeddings,
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": width // heads,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "initializer_range": init,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={  # type: ignore[call-arg]
            "hidden_size": v_width,
            "intermediate_size": 4 * v_width,
            "num_hidden_layers": v_layers,
            "num_attention_heads": v_heads,
            "image_size": image_size,
            "patch_size": pixels_per_token // scale,
            "initializer_range": vision_init,
        },
        scale_factor=scale,  # type: ignore[call-arg]
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),  # type: ignore[call-arg]
        pad_token_id=tokenizer.pad_token_id,  # type: ignore[call-arg]
        tie_word_embeddings=False,  # type: ignore[call-arg] - as in the published models
    )
    return SmolVLMForConditionalGeneration(config)


_DEFAULT_IMAGE = {  # image side and patch side, in pixels
    "qwen3_vl": {"tiny": (96, 12), "small": (224, 16)},
    "smolvlm": {"tiny": (64, 8), "small": (256, 16)},
}
_PROCESSORS: dict[str, Callable[[int, int], ProcessorMixin]] = {
    "qwen3_vl": _qwen3_vl_processor,
    "smolvlm": _smolvlm_processor,
}
_MODELS: dict[str, Callable[[ProcessorMixin, str, int], PreTrainedModel]] = {
    "qwen3_vl": _qwen3_vl_model,
    "smolvlm": _smolvlm_model,
}
_IMAGE_TOKENS = {"qwen3_vl": "<|image_pad|>", "smolvlm": "<image>"}
FAMILIES = tuple(_MODELS)


def write_random_checkpoint(
    folder: str | Path,
    *,
    family: str = "qwen3_vl",
    size: str = "tiny",
    processor: str | Path | None = None,
    seed: int = 0,
) -> Path:
    """Write a randomly initialised checkpoint that `from_pretrained` of the real classes loads.

    Args:
        folder: where; must not exist yet or be empty.
        family: one of `FAMILIES`.
        size: one of `SIZES`.
        processor: a folder with a real processor of the family, whose vocabulary the model then has; by default a
            small byte-level tokenizer for robot instructions is made.
        seed: of the weights; equal seeds give equal files.

    Raises:
        ValueError: unknown family or size, or a folder that holds files.
    """
    folder = Path(folder)
    for what, value, choices in (("family", family, FAMILIES), ("size", size, SIZES)):
        expect_choice(what, value, choices)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"folder: expected a new or empty one, got {folder} with files in it. Next step: name another or delete it."
        )
    if processor is None:
        made = _PROCESSORS[family](*_DEFAULT_IMAGE[family][size])
    else:
        made = _load_processor(processor, family)
    # a multiple of 64 with room for small codebooks, as real checkpoints have it
    num_embeddings = -(-(len(made.tokenizer) + 32) // 64) * 64  # type: ignore[attr-defined]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _MODELS[family](made, size, num_embeddings)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        model.save_pretrained(scratch)
        save_processor(made, scratch)
        scratch.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _load_processor(folder: str | Path, family: str) -> ProcessorMixin:
    if not Path(folder).is_dir():
        raise ValueError(
            f"processor: expected a folder with a published processor's files, got {folder}, which is none. "
            "Next step: check the path, or leave it out to get a small processor."
        )
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"processor: expected a folder with a published processor's files, got {folder}, where they are incomplete "
            f"or damaged. Next step: copy or download it anew. ({str(error).partition(chr(10))[0]})"
        ) from error
    token = _IMAGE_TOKENS[family]
    tokenizer = getattr(processor, "tokenizer", None)
    # where the files of a tokenizer are missing, transformers makes one that knows its special tokens alone
    knows_token = tokenizer is not None and token in tokenizer.get_vocab()
    knows_words = tokenizer is not None and bool(tokenizer.encode("reach", add_special_tokens=False))
    if not (knows_token and knows_words):
        raise ValueError(
            f"processor: expected one of the {family} family, with image settings and a tokenizer that knows words and "
            f"{token}, got a {type(processor).__name__} without them in {folder}. Next step: copy or download its "
            "files anew, or choose the other family."
        )
    return processor


def describe_checkpoint(folder: str | Path) -> str:
    """One line: class, parameters and vocabulary of a checkpoint folder."""
    from safetensors import safe_open

    config = json.loads((Path(folder) / "config.json").read_text())
    parameters = 0
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            parameters += sum(torch.Size(tensors.get_slice(k).get_shape()).numel() for k in tensors.keys())  # noqa: SIM118
    rows = config.get("text_config", config).get("vocab_size")
    return f"{config['architectures'][0]}, {parameters / 1e6:.2f}M parameters, {rows} vocabulary rows, in {folder}"
