"""Downloads: Minari's real client against a stand-in of the hub on this machine."""

import json
import os
import re
import shutil
import sys

import huggingface_hub
import minari
import pytest
from helpers import by_hand, record_hopper

from common.harness.datasets import load_dataset, read_minari, resolve_task
from common.harness.tasks import TASKS

ID = "some/hopper/random-v0"


def publish(hub, datasets, group="farama-minari", dataset_id=ID, num_episodes=12) -> dict:
    """Moves a new dataset onto the hub; returns its transitions."""
    record_hopper(dataset_id, num_episodes)
    raw = by_hand(dataset_id)
    repository = dataset_id.split("/")[0]
    (hub.folder / group).mkdir(parents=True, exist_ok=True)
    shutil.move(datasets / repository, hub.folder / group / repository)
    contents = {"datasets": [dataset_id], "namespaces": [dataset_id.rpartition("/")[0]]}
    (hub.folder / group / repository / "namespace_metadata.json").write_text(json.dumps(contents))
    return raw


def test_a_download_arrives_where_minari_finds_it_and_its_size_is_told_first(hub, datasets, capsys):
    raw = publish(hub, datasets)
    task = resolve_task("", ID)
    assert task.environment == TASKS["hopper-medium"].environment
    assert list(minari.list_local_datasets()) == [ID]
    assert [path.name for path in datasets.iterdir()] == ["some"], "the temporary folder is gone"
    assert os.environ["MINARI_DATASETS_PATH"] == str(datasets)
    assert "MINARI_REMOTE" not in os.environ
    assert (read_minari(ID)[0].obs == raw["obs"].astype("float32")).all()
    size = json.loads((datasets / ID / "data/metadata.json").read_text())["dataset_size"]
    assert size > 0
    assert f"{size} MB" in capsys.readouterr().out
    requests = len(hub.requests)
    assert load_dataset(resolve_task("", ID), "none")[1].statistics["episodes"] == 12
    assert len(hub.requests) == requests, "a local dataset asks nobody"


@pytest.mark.parametrize("by", ["full id", "MINARI_REMOTE"])
def test_another_remote_can_be_named(by, hub, datasets, monkeypatch):
    publish(hub, datasets, "my-group")
    if by == "MINARI_REMOTE":
        monkeypatch.setenv("MINARI_REMOTE", "hf://my-group")
    task = resolve_task("", ID if by == "MINARI_REMOTE" else f"hf://my-group/{ID}")
    assert task.dataset_ids == (ID,)
    assert load_dataset(task, "none")[1].statistics["episodes"] == 12
    assert not [path for _, path, _ in hub.requests if "farama-minari" in path], "nobody else was asked"


def test_a_cut_connection_is_taken_up_where_it_broke(hub, datasets, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    raw, hub.cut = publish(hub, datasets), "main_data.hdf5"
    resolve_task("", ID)
    assert (read_minari(ID)[0].reward == raw["reward"].astype("float32")).all()
    ranges = [wanted for command, path, wanted in hub.requests if command == "GET" and path.endswith("main_data.hdf5")]
    assert len(ranges) == 2
    assert ranges[0] in (None, "bytes=0-")
    assert int(ranges[1].removeprefix("bytes=").split("-")[0]) > 0


@pytest.mark.parametrize("dataset_id", [ID, "some/hopper/other-v0", "hf://nobody/some/x-v0"])
def test_what_the_remote_does_not_have_exits_with_its_answer_and_leaves_nothing(
    dataset_id, hub, datasets, exit_sentence
):
    if dataset_id == "some/hopper/other-v0":
        publish(hub, datasets)
    sentence = exit_sentence(resolve_task, "", dataset_id)
    assert re.search("could not be downloaded from .*404", sentence)
    assert list(datasets.iterdir()) == []


def test_googles_storage_names_the_package_that_it_needs(datasets, monkeypatch, exit_sentence):
    monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
    assert "google-cloud-storage" in exit_sentence(resolve_task, "", "gcp://bucket/some/x-v0")


def test_a_file_that_vanishes_during_a_download_leaves_nothing(hub, datasets, monkeypatch, exit_sentence):
    publish(hub, datasets)
    data = hub.folder / "farama-minari" / ID / "data"
    (data / "main_data.hdf5").unlink()
    sentence = exit_sentence(resolve_task, "", ID)
    assert "cannot be read" in sentence, "the client takes what there is"
    assert not list(datasets.glob(".making-*"))


def test_a_disk_without_room_is_told_before_the_download(hub, datasets, monkeypatch, exit_sentence):
    publish(hub, datasets)
    usage = shutil.disk_usage(datasets)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "0 MB left" in exit_sentence(resolve_task, "", ID)
    assert not [path for _, path, _ in hub.requests if path.endswith(".hdf5")]
    assert list(datasets.iterdir()) == []


def test_an_interrupted_download_leaves_nothing(hub, datasets, monkeypatch):
    """And a signal, which ends a run by SystemExit, is not taken for a failure of the download."""
    publish(hub, datasets)
    download = minari.download_dataset

    def interrupted(dataset_id):
        download(dataset_id)
        sys.exit(143)

    monkeypatch.setattr(minari, "download_dataset", interrupted)
    with pytest.raises(SystemExit, match="143"):
        resolve_task("", ID)
    assert list(datasets.iterdir()) == []


def test_without_minari_datasets_path_the_default_folder_is_used_and_the_variable_stays_unset(
    hub, datasets, tmp_path, monkeypatch
):
    publish(hub, datasets)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MINARI_DATASETS_PATH")
    resolve_task("", ID)
    assert "MINARI_DATASETS_PATH" not in os.environ
    assert (tmp_path / ".minari/datasets" / ID / "data/metadata.json").exists()
