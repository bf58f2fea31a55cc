"""Fixtures that several test folders share: a tiny backbone, tiny datasets, and `lerobot-train` in this process."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell's background jobs do; what is tested obeys it
    signal.signal(signal.SIGINT, signal.default_int_handler)

EPISODE_LENGTHS = (12, 9, 14, 10)
TASKS = ("reach the red disc", "push the blue cube")


@pytest.fixture(scope="session")
def tiny_qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a randomly initialised Qwen3-VL checkpoint."""
    from hlrp_core.backbones.random_checkpoint import write_random_checkpoint

    return write_random_checkpoint(tmp_path_factory.mktemp("backbone") / "tiny-qwen")


def write_dataset(
    root: Path,
    *,
    cameras: tuple[str, ...] = ("observation.images.top",),
    image_size: int = 32,
    state_dim: int = 3,
    action_dim: int = 2,
    seed: int = 0,
    fps: int = 10,
    video: bool = False,
) -> Path:
    """A LeRobotDataset of four short episodes and two tasks. Actions and states grow with the episode's number.

    With `state_dim` and `action_dim` 0 it is action-free. With `video` what the cameras saw is in MP4 files.
    """
    import numpy as np
    from lerobot.datasets import LeRobotDataset

    shape = (image_size, image_size, 3)
    image = {"dtype": "video" if video else "image", "shape": shape, "names": ["height", "width", "channels"]}
    features: dict = dict.fromkeys(cameras, image)
    vectors = {name: dim for name, dim in (("observation.state", state_dim), ("action", action_dim)) if dim}
    features |= {name: {"dtype": "float32", "shape": (dim,), "names": None} for name, dim in vectors.items()}
    dataset = LeRobotDataset.create("test/tiny", fps=fps, features=features, root=root, use_videos=video)
    rng = np.random.default_rng(seed)
    for episode, length in enumerate(EPISODE_LENGTHS):
        for _ in range(length):
            frame: dict = {key: rng.integers(0, 256, shape, dtype=np.uint8) for key in cameras}
            for name, dim in vectors.items():
                frame[name] = (rng.normal(size=dim) * (1 + episode) + 10 * episode).astype(np.float32)
            dataset.add_frame({**frame, "task": TASKS[episode % 2]})
        dataset.save_episode()
    dataset.finalize()
    return root


@pytest.fixture(scope="session")
def make_dataset() -> Callable[..., Path]:
    return write_dataset


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a dataset with one camera, state and actions."""
    return write_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def tiny_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a dataset with one camera and nothing else: action-free video."""
    root = tmp_path_factory.mktemp("data") / "videos"
    return write_dataset(root, image_size=64, state_dim=0, action_dim=0, video=True)


@pytest.fixture(scope="session")
def tabletop_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a dataset with the features of the tabletop environment."""
    root = tmp_path_factory.mktemp("data") / "tabletop"
    return write_dataset(root, cameras=("observation.image",), image_size=96, state_dim=2)


@pytest.fixture(scope="session")
def lerobot_train() -> Callable[..., Path]:
    """`lerobot-train` with these flags, in this process; returns the last checkpoint's `pretrained_model` folder."""

    def run(*flags: str, output: Path, root: Path | None = None, steps: int = 2) -> Path:
        from accelerate.state import AcceleratorState
        from lerobot.scripts.lerobot_train import train

        import lerobot_policy_hlrp  # noqa: F401

        usual: list[str] = []
        if root is not None:  # a new run; a resumed one has its settings
            usual += ["--batch_size=4", "--num_workers=0", "--log_freq=1", "--save_freq=100", "--wandb.enable=false"]
            usual += ["--policy.device=cpu", "--seed=7", "--policy.scheduler_warmup_steps=0", f"--output_dir={output}"]
            usual += ["--dataset.repo_id=test/tiny", f"--dataset.root={root}"]
        AcceleratorState._reset_state(reset_partial_state=True)  # of a run before, with another precision
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", ["lerobot-train", *usual, f"--steps={steps}", *flags])
                train()
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)  # for others in this process
        return output / "checkpoints" / "last" / "pretrained_model"

    return run


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory: pytest.TempPathFactory, tiny_qwen: Path) -> Callable[[str], Path]:
    """Folder of a randomly initialised checkpoint of a backbone family."""
    from hlrp_core.backbones.random_checkpoint import write_random_checkpoint

    made = {"qwen3_vl": tiny_qwen}

    def get(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp("backbone") / f"tiny-{family}"
            made[family] = write_random_checkpoint(folder, family=family)
        return made[family]

    return get


def write_laq(folder: Path, *, seed: int) -> Path:
    """Folder of an untrained LAQ with K=8, S=4 and a frame gap of 3."""
    import torch

    from hlrp_core.laq.config import LAQConfig
    from hlrp_core.laq.quantizer import LatentActionQuantizer

    torch.manual_seed(seed)
    config = LAQConfig(codebook_size=8, code_seq_len=4, frame_gap=3, image_size=32, hidden_dim=16, num_layers=1)
    LatentActionQuantizer(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_laq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_laq(tmp_path_factory.mktemp("laq") / "tiny-laq", seed=0)


@pytest.fixture(scope="session")
def other_laq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same sizes as `tiny_laq`, with other weights."""
    return write_laq(tmp_path_factory.mktemp("laq") / "other-laq", seed=1)


@pytest.fixture(scope="session")
def code_table(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A code table of a dataset, with codes that follow from the frame index. K=8, S=4, a frame gap of 3.

    It has code vectors only where they are given.
    """

    def write(root: Path, *, vectors: Tensor | None = None, **header) -> Path:
        import torch
        from lerobot.datasets import LeRobotDatasetMetadata

        from hlrp_core.laq.code_table import CodeTable, CodeTableHeader
        from lerobot_hlrp.fingerprint import dataset_fingerprint

        meta = LeRobotDatasetMetadata("test/tiny", root=root)
        camera = meta.camera_keys[0]
        facts = {"camera": camera, "frame_gap": 3, "num_frames": 2, "code_seq_len": 4, "codebook_size": 8}
        facts |= {"dataset_id": "test/tiny", "dataset_fingerprint": dataset_fingerprint(meta)}
        facts |= {"laq_id": "user/laq", "laq_hash": "hash-of-a-laq", **header}
        frames = torch.arange(meta.total_frames)
        codes = (frames[:, None] + torch.arange(facts["code_seq_len"])) % facts["codebook_size"]
        ends = torch.tensor(meta.episodes["dataset_to_index"])
        last = ends[torch.searchsorted(ends, frames, right=True)]  # of each frame's episode, exclusive
        path = tmp_path_factory.mktemp("codes") / "table.safetensors"
        CodeTable(codes, frames + facts["frame_gap"] < last, CodeTableHeader(**facts), vectors).save(path)
        return path

    return write


class ListedLabels:
    """Labels that a test chooses, for every batch the same."""

    title = "listed labels"
    laq_id = "listed"

    def __init__(self, codes, valid=None, codebook_size: int = 8):
        import torch

        self.codes = torch.as_tensor(codes)
        self.valid = torch.ones(len(self.codes), dtype=torch.bool) if valid is None else torch.as_tensor(valid)
        self.facts = {"codebook_size": codebook_size, "code_seq_len": self.codes.shape[1]}

    def check_dataset(self, config, meta) -> None: ...

    def label(self, batch, frames):
        return self.codes.to(frames.device), self.valid.to(frames.device)


@pytest.fixture(scope="session")
def listed_labels() -> type[ListedLabels]:
    return ListedLabels


@pytest.fixture(scope="session")
def make_tiny_policy(tiny_backbone: Callable[[str], Path], tiny_laq: Path) -> Callable:
    """A policy of a type and mode on a tiny backbone: camera 32x32, state of 3, actions of 2, K=8, S=4."""

    def make(policy_type: str = "hlrp_qwen", mode: str = "multitask", labels=None, **settings):
        import torch
        from lerobot.configs import FeatureType, PolicyFeature
        from lerobot.policies.factory import get_policy_class, make_policy_config

        import lerobot_policy_hlrp  # noqa: F401
        from hlrp_core.registry import get_recipe

        settings = {"codebook_size": 8, "code_seq_len": 4, "chunk_size": 4, "n_action_steps": 3, **settings}
        if mode != "codes":
            settings.setdefault("action_head", "prefix_flow")
        if settings.get("action_head") == "laq" or settings.get("code_head") == "vector":
            settings.setdefault("laq_weights", str(tiny_laq))
        config = make_policy_config(policy_type, mode=mode, device="cpu", **settings)
        family = get_recipe(config.backends[config.prompting, config.code_head]).family
        config.backbone = config.backbone or str(tiny_backbone(family))
        for name, value in (("hidden_dim", 32), ("num_layers", 1), ("num_flow_steps", 3)):
            setattr(config.action_expert, name, value)
        config.input_features = {
            "observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
            "observation.state": PolicyFeature(FeatureType.STATE, (3,)),
        }
        config.output_features = {"action": PolicyFeature(FeatureType.ACTION, (2,))}
        torch.manual_seed(0)
        policy = get_policy_class(policy_type)(config)
        policy.reader.labels = labels
        return policy

    return make


@pytest.fixture(scope="session")
def make_lerobot_batch() -> Callable:
    """A preprocessed LeRobot batch that fits `make_tiny_policy`."""

    def make(size: int = 3, *, num_frames: int | None = None, chunk_size: int = 4, seed: int = 0) -> dict:
        import torch

        rng = torch.Generator().manual_seed(seed)
        shape = (size, 3, 32, 32) if num_frames is None else (size, num_frames, 3, 32, 32)
        state = (size, 3) if num_frames is None else (size, num_frames, 3)
        is_pad = torch.zeros(size, chunk_size, dtype=torch.bool)
        is_pad[0, -1] = True
        return {
            "observation.images.top": torch.randint(0, 256, shape, generator=rng).float() / 255,
            "observation.state": torch.randn(state, generator=rng),
            "action": torch.randn(size, chunk_size, 2, generator=rng),
            "action_is_pad": is_pad,
            "task": [TASKS[i % 2] for i in range(size)],
            "index": torch.arange(size),
            "episode_index": torch.arange(size),
        }

    return make


@pytest.fixture(scope="session")
def make_tiny_backend(tiny_backbone: Callable[[str], Path]) -> Callable:
    """A backend of the registry on a tiny backbone: K=8, S=4; with a head, chunks of 4, actions of 2, state of 3."""

    def make(name: str = "qwen_chat", head: str | None = None, *, seed: int = 0, **settings):
        import torch

        from hlrp_core.heads import ActionHeadConfig
        from hlrp_core.registry import get_recipe, make_backend

        settings = {"codebook_size": 8, "code_seq_len": 4, **settings}
        predicts_vectors = get_recipe(name).predicts_vectors
        if predicts_vectors or head == "laq":
            shape = settings["code_seq_len"], settings["codebook_size"], 2
            settings["code_vectors"] = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        if head is not None:
            sizes = {"chunk_size": 4, "action_dim": 2, "state_dim": 3, "hidden_dim": 32, "num_layers": 1}
            usual = "vector" if predicts_vectors else "tokens"
            conditioning = settings.pop("code_conditioning", "none" if head == "prefix_flow" else usual)
            if head == "laq" or conditioning == "vector":
                sizes["code_vector_dim"] = 2
            settings["action_head"] = ActionHeadConfig(
                kind=head, code_conditioning=conditioning, num_flow_steps=3, **sizes
            )
        torch.manual_seed(seed)
        settings = {"backbone": tiny_backbone(get_recipe(name).family), **settings}
        backend = make_backend(name, **settings)
        backend.setup(device=torch.device("cpu"))
        return backend

    return make


@pytest.fixture(scope="session")
def real_processor() -> Callable[[str], Path]:
    """Folder of a published processor, from `shared/assets` beside the repository; the test skips without it."""

    def get(name: str) -> Path:
        folder = Path(__file__).parents[2] / "shared" / "assets" / name
        if not folder.is_dir():
            pytest.skip(f"needs the processor files of {name} in ../shared/assets/{name}")
        return folder

    return get
