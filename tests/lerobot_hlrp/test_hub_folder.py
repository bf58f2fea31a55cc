"""Folders by path or Hub id: what is fetched, and what is said where there is none."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
from httpx import ConnectError
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from lerobot_hlrp import hub_folder
from lerobot_hlrp.hub_folder import fetch, fetch_laq, shorten_error
from lerobot_hlrp.label_sources import read_frame_offsets

SETTINGS = {"expected": "a thing", "next_step": "Look again.", "parts": ["config.json"]}


def test_a_folder_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_folder, "snapshot_download", None)
    assert fetch(tmp_path, "thing", **SETTINGS) == tmp_path


def test_parts_and_revision_reach_the_hub(tmp_path, monkeypatch):
    download = Mock(return_value=str(tmp_path))
    monkeypatch.setattr(hub_folder, "snapshot_download", download)
    assert fetch("user/thing", "thing", **SETTINGS, revision="v1") == tmp_path
    download.assert_called_once_with("user/thing", allow_patterns=["config.json"], revision="v1")


@pytest.mark.parametrize("name", ["/nowhere", "./nowhere", "a/b/c", "outputs/stage2", "thing"])
def test_what_is_neither_says_both(name):
    with pytest.raises(ValueError, match=r"^thing: expected a thing, got .*, which is no folder.*Next step: Look ag"):
        fetch(name, "thing", **SETTINGS)


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"got .*file, a file\. Next step"):
        fetch(tmp_path / "file", "thing", **SETTINGS)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RepositoryNotFoundError("404\nlong", response=Mock()), "it is not there either"),
        (GatedRepoError("403", response=Mock()), "no access"),
        (RevisionNotFoundError("404", response=Mock()), "no such revision"),
        (ConnectError("no\nroute"), r"cannot be fetched \(ConnectError: no route\)"),
        (OSError("disk full"), r"cannot be fetched \(OSError: disk full\)"),
    ],
)
def test_the_reason_is_told(error, words, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_folder, "snapshot_download", Mock(side_effect=error))
    with pytest.raises(ValueError, match=rf"user/thing, which is no folder; taken as a Hub id, .*{words}"):
        fetch("user/thing", "thing", **SETTINGS)


def test_a_laq_on_the_hub(tiny_laq, monkeypatch):
    download = Mock(return_value=str(tiny_laq))
    monkeypatch.setattr(hub_folder, "snapshot_download", download)
    assert fetch_laq("user/laq") == tiny_laq
    for _ in range(3):
        assert read_frame_offsets("user/laq-of-this-test") == [0, 3]
    assert download.call_count == 2  # settings are fetched once, however often LeRobot asks


@pytest.mark.parametrize("settings", ["{", "[1, 2]", '{"hidden_size": 3}'])
def test_settings_of_something_else_are_no_laq(settings, tmp_path):
    (tmp_path / "config.json").write_text(settings)
    with pytest.raises(ValueError, match=r"laq: expected the settings of a LAQ in .*config\.json.*Next step"):
        read_frame_offsets(str(tmp_path))


def test_long_errors_are_shortened():
    assert len(shorten_error(RuntimeError("word " * 1000))) < 350
