"""hlrp-laq-train and hlrp-label on a real dataset: labels equal the LAQ's codes."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from lerobot.configs.default import DatasetConfig
from lerobot.datasets import LeRobotDataset

from hlrp_core.laq.code_table import CodeTable
from hlrp_core.laq.config import LAQConfig
from hlrp_core.laq.networks import PairEncoder
from hlrp_core.laq.quantizer import LatentActionQuantizer
from lerobot_hlrp.cli.label import LabelCommand, label
from lerobot_hlrp.cli.laq_train import TrainLAQCommand, train
from lerobot_hlrp.fingerprint import dataset_fingerprint
from lerobot_hlrp.frame_reader import EpisodeFrames, choose_camera, read_actions, read_frame
from lerobot_hlrp.labelling import PartialTable, encode_frames, label_dataset

TINY = LAQConfig(image_size=16, hidden_dim=16, num_layers=1, frame_gap=2, code_seq_len=2)


def open_dataset(root: Path) -> LeRobotDataset:
    return LeRobotDataset("test/tiny", root=root)


@pytest.fixture(scope="module", autouse=True)
def _fresh_accelerator():
    """Accelerate keeps its precision for a process's whole life."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def trained(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a LAQ that the command trained on a dataset with actions."""
    output = tmp_path_factory.mktemp("laq") / "laq"
    command = TrainLAQCommand(
        dataset=DatasetConfig(repo_id="test/tiny", root=str(tiny_dataset)),
        output_dir=output,
        laq=TINY,
        steps=4,
        batch_size=4,
        log_freq=2,
        eval_share=0.25,
    )
    assert train(command) == 0
    return output


@pytest.fixture(scope="module")
def labelled(trained: Path, tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("codes") / "codes.safetensors"
    dataset = DatasetConfig(repo_id="test/tiny", root=str(tiny_dataset))
    assert label(LabelCommand(laq=str(trained), dataset=dataset, output=output, batch_size=5, device="cpu")) == 0
    return output


def test_training_leaves_the_laq_its_figures_and_pictures(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"config.json", "model.safetensors", "metrics.json", "reconstructions.png", "code_usage.png"} <= names
    assert "frames.npy" not in names
    assert LatentActionQuantizer.from_pretrained(trained).frame_gap == 2


def train_as_process(rank: int, port: int, command: TrainLAQCommand) -> None:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in places.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    AcceleratorState._reset_state(reset_partial_state=True)
    os._exit(train(command))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a process that uses CUDA cannot be forked")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # it is killed if it hangs
def test_of_two_processes_one_writes(tiny_dataset, tmp_path):
    command = TrainLAQCommand(
        dataset=DatasetConfig(repo_id="test/tiny", root=str(tiny_dataset)),
        output_dir=tmp_path / "laq",
        laq=replace(TINY, quantizer="vq"),
        steps=4,
        batch_size=16,
        log_freq=2,
        eval_share=0.25,
    )
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("fork")  # starting Python anew would take most of the time
    processes = [context.Process(target=train_as_process, args=(rank, port, command)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        process.kill()
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    names = {path.name for path in (tmp_path / "laq").iterdir()}
    assert {"config.json", "model.safetensors", "metrics.json", "code_usage.png", "run"} <= names
    assert not {"frames.npy", "frames.json"} & names
    records = (tmp_path / "laq" / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(record)["step"] for record in records] == [2, 4]
    assert LatentActionQuantizer.from_pretrained(tmp_path / "laq").frame_gap == 2


def test_a_single_held_out_pair_will_do(tiny_dataset, tmp_path):
    command = TrainLAQCommand(
        dataset=DatasetConfig(repo_id="test/tiny", root=str(tiny_dataset)),
        output_dir=tmp_path / "laq",
        laq=replace(TINY, frame_gap=9),  # the last of four episodes has 10 frames
        steps=4,
        batch_size=4,
        eval_share=0.25,
    )
    assert train(command) == 0
    figures = json.loads((tmp_path / "laq" / "metrics.json").read_text())
    assert figures["codebook_use_from"] == "training"
    assert "action_probe_r2" not in figures
    assert LatentActionQuantizer.from_pretrained(tmp_path / "laq").frame_gap == 9


def test_labels_are_the_codes_of_lerobots_pairs(labelled, trained, tiny_dataset):
    laq = LatentActionQuantizer.from_pretrained(trained)
    dataset, table = open_dataset(tiny_dataset), CodeTable.load(labelled)
    assert torch.equal(table.vectors, laq.code_vector_table())
    camera = choose_camera(dataset.meta, None)
    episodes = dataset.hf_dataset["episode_index"]
    for index in range(len(dataset)):
        stays = index + 2 < len(dataset) and episodes[index + 2] == episodes[index]
        codes, valid = table.lookup(torch.tensor([index]))
        assert bool(valid) == stays
        if stays:
            pair = np.stack([read_frame(dataset, camera, index), read_frame(dataset, camera, index + 2)])
            assert torch.equal(codes, laq.encode(torch.from_numpy(pair)[None]))


def test_the_table_knows_its_dataset_also_after_a_move(labelled, tiny_dataset, tiny_videos, tmp_path):
    import shutil

    table = CodeTable.load(labelled)
    moved = open_dataset(Path(shutil.copytree(tiny_dataset, tmp_path / "moved"))).meta
    assert dataset_fingerprint(moved) == table.header.dataset_fingerprint
    assert dataset_fingerprint(open_dataset(tiny_videos).meta) != table.header.dataset_fingerprint


def test_a_killed_labelling_continues_to_the_same_table(labelled, trained, tiny_dataset, tmp_path, monkeypatch):
    laq, dataset = LatentActionQuantizer.from_pretrained(trained), open_dataset(tiny_dataset)
    camera, output = choose_camera(dataset.meta, None), tmp_path / "codes.safetensors"

    class KilledError(Exception):
        pass

    read, read_piece, cut = [], EpisodeFrames.read, EpisodeFrames.pieces
    monkeypatch.setattr(EpisodeFrames, "pieces", lambda self, overlap: cut(self, overlap=overlap, num_frames=5))

    def kill_in_third(self, piece):
        if (piece.episode, piece.start) == (2, 5):
            raise KilledError
        return read_piece(self, piece)

    def note(self, piece):
        read.append((piece.episode, piece.start))
        return read_piece(self, piece)

    def run():
        return label_dataset(laq, dataset, camera=camera, laq_id="laq", output=output, save_interval_s=0)

    with monkeypatch.context() as patch:
        patch.setattr(EpisodeFrames, "read", kill_in_third)
        with pytest.raises(KilledError):
            run()
    assert not output.exists()
    monkeypatch.setattr(EpisodeFrames, "read", note)
    table = run()
    assert read == [(2, 5), (2, 10), (3, 0), (3, 5)]
    whole = CodeTable.load(labelled)
    assert torch.equal(table.valid, whole.valid)
    assert torch.equal(table.codes[table.valid], whole.codes[whole.valid].to(table.codes.dtype))
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


def test_an_interrupted_labelling_says_how_to_continue(labelled, trained, tiny_dataset, tmp_path, monkeypatch, capsys):
    output = tmp_path / "codes.safetensors"
    dataset = DatasetConfig(repo_id="test/tiny", root=str(tiny_dataset))
    command = LabelCommand(laq=str(trained), dataset=dataset, output=output, device="cpu")
    add = PartialTable.add

    def interrupted(self, codes, *, first_row):
        add(self, codes, first_row=first_row)
        if first_row == 12:  # the second episode
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(PartialTable, "add", interrupted)
        assert label(command) == 130
    assert "Stopped after 19 frames. Run the same command again" in capsys.readouterr().out  # 12 + 9 - the gap of 2
    assert not output.exists()
    assert label(command) == 0
    assert torch.equal(CodeTable.load(output).codes, CodeTable.load(labelled).codes)


def test_a_partial_table_of_another_laq_is_not_continued(tmp_path):
    partial = PartialTable(tmp_path / "t", "one", (4, 2))
    partial.num_frames = 1
    partial.save()
    assert PartialTable(tmp_path / "t", "one", (4, 2)).num_frames == 1
    assert PartialTable(tmp_path / "t", "other", (4, 2)).num_frames == 0


def test_pairs_of_unknown_actions_are_left_out_of_the_probe(tiny_dataset, tmp_path, monkeypatch, caplog):
    dataset = open_dataset(tiny_dataset)
    actions = read_actions(dataset)
    actions[3] = np.nan
    monkeypatch.setattr("lerobot_hlrp.laq_data.read_actions", lambda _: actions)
    monkeypatch.setattr("hlrp_core.laq.evaluation.MIN_PAIRS_TO_JUDGE", 1)
    command = TrainLAQCommand(
        dataset=DatasetConfig(repo_id="test/tiny", root=str(tiny_dataset)),
        output_dir=tmp_path / "laq",
        laq=TINY,
        steps=2,
        batch_size=4,
        eval_share=0.25,
    )
    assert train(command) == 0
    assert "leaves out 2 of" in caplog.text
    assert np.isfinite(json.loads((tmp_path / "laq" / "metrics.json").read_text())["action_probe_r2"])


@pytest.mark.parametrize(
    "mistake",
    [
        {"laq": replace(TINY, frame_gap=50)},
        {"eval_share": 0.999},
        {"batch_size": 1},
        {"probe": "differences"},
    ],
)
def test_mistakes_are_found_before_frames_are_decoded(mistake, tiny_dataset, tmp_path):
    dataset = DatasetConfig(repo_id="test/tiny", root=str(tiny_dataset))
    command = TrainLAQCommand(**{"dataset": dataset, "output_dir": tmp_path / "laq", "laq": TINY, **mistake})
    with pytest.raises(ValueError, match=r"^(frame_gap|eval_share|batch_size|probe: .*'difference'\?)"):
        train(command)
    assert not (tmp_path / "laq").exists()


def test_what_the_probe_predicts_is_a_setting_of_the_run(tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("hlrp_core.laq.evaluation.MIN_PAIRS_TO_JUDGE", 1)
    scores = {}
    for probe in ("sum", "difference"):
        command = TrainLAQCommand(
            dataset=DatasetConfig(repo_id="test/tiny", root=str(tiny_dataset)),
            output_dir=tmp_path / probe,
            laq=TINY,
            steps=2,
            batch_size=4,
            eval_share=0.25,
            probe=probe,
        )
        assert train(command) == 0
        assert json.loads((tmp_path / probe / "run" / "settings.json").read_text())["probe"] == probe
        scores[probe] = json.loads((tmp_path / probe / "metrics.json").read_text())["action_probe_r2"]
    assert scores["sum"] != scores["difference"]
    with pytest.raises(ValueError, match=r"\(probe='difference'\), got probe='sum'"):
        train(replace(command, probe="sum"))


def test_a_gap_longer_than_every_episode_is_refused(tiny_dataset, tmp_path):
    laq = LatentActionQuantizer(LAQConfig(image_size=16, hidden_dim=16, num_layers=1, frame_gap=50))
    with pytest.raises(ValueError, match="frame_gap"):
        label_dataset(
            laq, open_dataset(tiny_dataset), camera="observation.images.top", laq_id="x", output=tmp_path / "t"
        )


def test_long_and_short_episodes_are_encoded_in_bounded_batches(trained, tiny_dataset, tmp_path, monkeypatch):
    """Batches smaller than an episode and larger than one give the same table; each frame is embedded once."""
    laq, dataset = LatentActionQuantizer.from_pretrained(trained), open_dataset(tiny_dataset)
    embedded, compared = [], []
    embed, compare = LatentActionQuantizer.embed, PairEncoder.compare

    def note_embed(self, frames):
        embedded.append(frames.shape[:2].numel())
        return embed(self, frames)

    def note_compare(self, source, target):
        compared.append(len(source))
        return compare(self, source, target)

    monkeypatch.setattr(LatentActionQuantizer, "embed", note_embed)
    monkeypatch.setattr(PairEncoder, "compare", note_compare)
    tables = {}
    for batch_size in (3, 16):
        embedded.clear()
        compared.clear()
        tables[batch_size] = label_dataset(
            laq,
            dataset,
            camera="observation.images.top",
            laq_id="x",
            output=tmp_path / "t",
            batch_size=batch_size,
        )
        assert sum(embedded) == len(dataset)
        assert sum(compared) == int(tables[batch_size].valid.sum())
        assert max(embedded + compared) <= batch_size
    assert torch.equal(tables[3].codes, tables[16].codes)


@pytest.mark.parametrize("num_frames", [2, 4])
def test_codes_of_consecutive_frames_are_those_of_each_tuple_alone(num_frames):
    torch.manual_seed(0)
    sizes = LAQConfig(image_size=16, hidden_dim=16, num_layers=1, code_seq_len=2, num_frames=num_frames)
    laq = LatentActionQuantizer(sizes).eval()
    frames = torch.randint(0, 256, (20, 20, 20, 3), dtype=torch.uint8)
    gap, span = 3, 3 * (num_frames - 1)
    codes = encode_frames(laq, frames.numpy(), frame_gap=gap, batch_size=7)
    one_by_one = [laq.encode(frames[None, start : start + span + 1 : gap])[0] for start in range(20 - span)]
    assert torch.equal(codes, torch.stack(one_by_one).int())
    assert len(codes.unique(dim=0)) > 1
