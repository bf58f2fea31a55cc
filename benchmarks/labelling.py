"""Labelling a dataset with a LAQ, beside merely decoding its frames with the same reader; and its memory.

    python benchmarks/labelling.py --output benchmarks/results/labelling.json
    python benchmarks/labelling.py --memory_episodes 4 400 --output benchmarks/results/labelling_memory.json

The data are episodes of 250 frames of the tabletop under random actions, as PNG images and as video. The LAQ has random
weights and the default settings, which see 64x64 pixels, or as many as a row names. `label_ms` is `label_dataset` from
the first frame to the written table, `decode_ms` the reading of all frames alone: both for one frame, of which all but
the last three of an episode are labelled. `encode_ms` is the encoder alone, for one frame in memory that has the LAQ's
size, and `resize_ms` what brings one frame there. `lerobot_ms` is LeRobot's decoder on whole episodes of video, which
uses every core, and `items_ms` what one of LeRobot's own items of two frames costs, a pair. All are medians of rounds
that take turns, with one thread for the encoder; `label_dataset` decodes in another.

Memory is the highest anonymous resident size of a fresh process that does nothing else than `hlrp-label`; pages of
mapped files, which the system takes back when it needs them, are not in it.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lerobot.configs.default import DatasetConfig
from lerobot.datasets import LeRobotDataset
from lerobot.datasets.video_utils import decode_video_frames
from lerobot.utils.import_utils import get_safe_default_video_backend
from measuring import describe_machine, interleaved_ms, peak_anonymous_bytes, print_table, write_result
from tqdm import tqdm

from hlrp_core.laq.config import LAQConfig
from hlrp_core.laq.quantizer import LatentActionQuantizer, resize_images
from hlrp_tabletop.env import TabletopEnv
from lerobot_hlrp.cli.label import LabelCommand, label
from lerobot_hlrp.frame_reader import EpisodeFrames
from lerobot_hlrp.labelling import encode_frames, label_dataset

CAMERA = "observation.image"
EPISODE_LENGTH = 250
NUM_ENCODED = 256  # frames, for the encoder alone
DATASETS = {  # name: image side, as video, side that the LAQ sees
    "128x128 images": (128, False, LAQConfig.image_size),
    "128x128 images seen at 128x128": (128, False, 128),
    "128x128 video": (128, True, LAQConfig.image_size),
    "480x480 video": (480, True, LAQConfig.image_size),
}


def record(root: Path, *, episodes: int, image_size: int, video: bool) -> LeRobotDataset:
    shape = (image_size, image_size, 3)
    feature = {"dtype": "video" if video else "image", "shape": shape, "names": ["height", "width", "channels"]}
    dataset = LeRobotDataset.create(
        "local/tabletop", fps=10, features={CAMERA: feature}, root=root, use_videos=video, image_writer_threads=4
    )
    env = TabletopEnv("push", image_size=image_size)
    rng = np.random.default_rng(0)
    for episode in tqdm(range(episodes), desc="Recording", unit="episode"):
        observation, _ = env.reset(seed=episode)
        for _ in range(EPISODE_LENGTH):
            dataset.add_frame({CAMERA: observation["pixels"], "task": env.task_description})
            observation, *_ = env.step(rng.uniform(-1, 1, 2).astype(np.float32))
        dataset.save_episode()
    dataset.finalize()
    return LeRobotDataset("local/tabletop", root=root)


def measure_time(name: str, folder: Path, args: argparse.Namespace, decoder: str) -> dict[str, Any]:
    """Args:
    decoder: of LeRobot, for video.
    """
    image_size, video, seen = DATASETS[name]
    dataset = record(folder / name, episodes=args.episodes, image_size=image_size, video=video)
    reader = EpisodeFrames(dataset, CAMERA)
    gap_s = LAQConfig.frame_gap / dataset.meta.fps
    pairs = LeRobotDataset("local/tabletop", root=folder / name, delta_timestamps={CAMERA: [0, gap_s]})
    laq = LatentActionQuantizer(LAQConfig(image_size=seen)).eval()

    def decode() -> None:
        for piece in reader.pieces():
            reader.read(piece)

    def label_all() -> None:
        label_dataset(laq, dataset, camera=CAMERA, laq_id="random", output=folder / "codes.safetensors")

    def decode_by_lerobot() -> None:
        for episode in dataset.meta.episodes:
            start = episode[f"videos/{CAMERA}/from_timestamp"]
            path = dataset.root / dataset.meta.get_video_file_path(episode["episode_index"], CAMERA)
            times = [start + i / dataset.meta.fps for i in range(episode["length"])]
            decode_video_frames(path, times, dataset.tolerance_s, backend=decoder, return_uint8=True)

    num_items = min(100, len(dataset))
    frames = torch.randint(0, 256, (NUM_ENCODED, image_size, image_size, 3), dtype=torch.uint8)
    small = torch.randint(0, 256, (NUM_ENCODED, laq.config.image_size, laq.config.image_size, 3), dtype=torch.uint8)
    times = interleaved_ms(
        {
            "decode": decode,
            "label": label_all,
            "resize": lambda: resize_images(frames.permute(0, 3, 1, 2), laq.config.image_size),
            "encode": lambda: encode_frames(laq, small.numpy(), frame_gap=laq.frame_gap),
            "items": lambda: [pairs[index] for index in range(num_items)],
            **({"lerobot": decode_by_lerobot} if video else {}),
        },
        args.rounds,
    )
    num_frames = len(dataset)
    amounts = {"decode": num_frames, "label": num_frames, "resize": NUM_ENCODED, "encode": NUM_ENCODED}
    amounts |= {"items": num_items, "lerobot": num_frames}
    return {
        "frames": num_frames,
        **{f"{part}_ms": round(times[part] / amount, 3) if part in times else None for part, amount in amounts.items()},
        "label_over_decode": round(times["label"] / times["decode"], 2),
    }


def peak_of_labelling(root: Path, laq: Path) -> dict[str, float]:
    """In a process of its own: nothing measured before it is left in memory."""
    torch.set_num_threads(1)
    data = DatasetConfig(repo_id="local/tabletop", root=str(root))
    command = LabelCommand(laq=str(laq), dataset=data, output=root.with_suffix(".safetensors"), device="cpu")
    return {"peak_mb": round(peak_anonymous_bytes(lambda: label(command)) / 2**20, 1)}


def measure_memory(folder: Path, episodes: int) -> dict[str, Any]:
    dataset = record(folder / f"{episodes}", episodes=episodes, image_size=64, video=False)
    laq = folder / f"laq_{episodes}"
    LatentActionQuantizer(LAQConfig()).save_pretrained(laq)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        peak = process.submit(peak_of_labelling, folder / f"{episodes}", laq).result()
    return {"frames": len(dataset), **peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=20, help="of each dataset")
    parser.add_argument("--memory_episodes", type=int, nargs="+", default=[], help="measure memory on so many episodes")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=None, help="JSON file")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    machine, decoder = describe_machine(), get_safe_default_video_backend()
    with tempfile.TemporaryDirectory() as name:
        if args.memory_episodes:
            results = {str(number): measure_memory(Path(name), number) for number in args.memory_episodes}
        else:
            results = {kind: measure_time(kind, Path(name), args, decoder) for kind in DATASETS}
    print(f"{machine['cpu']}, {machine['cores']} cores, one thread, torch {machine['torch']}, float32")
    first = next(iter(results.values()))
    print_table(["", *results], [[key, *(row[key] for row in results.values())] for key in first])
    write_result({"machine": machine, "video_decoder": decoder, "results": results}, args.output)


if __name__ == "__main__":
    main()
