"""Downloads: Minari's real client against a stand-in of the hub on this machine."""

import json
import os
import re
import shutil
import sys

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


def test_a_download_arrives_where_minari_finds_it_and_its_size_is_told_first(hub, datasets, capsys):
    raw = publish(hub, datasets)
    assert resolve_task("", ID).environment == TASKS["hopper-medium"].environment
    assert [path.name for path in datasets.iterdir()] == ["some"], "the temporary folder is gone"
    assert (read_minari(ID)[0].obs == raw["obs"].astype("float32")).all()
    size = json.loads((datasets / ID / "data/metadata.json").read_text())["dataset_size"]
    assert size > 0
    assert f"{size} MB" in capsys.readouterr().out
    requests = len(hub.requests)
    assert load_dataset(resolve_task("", ID), "none")[1].statistics["episodes"] == 12
    assert len(hub.requests) == requests, "a local dataset asks nobody"


def test_another_remote_can_be_named_and_without_a_folder_of_datasets_the_default_is_used(
    hub, datasets, tmp_path, monkeypatch
):
    publish(hub, datasets, "my-group")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("MINARI_DATASETS_PATH")
    assert resolve_task("", f"hf://my-group/{ID}").dataset_ids == (ID,)
    assert not [path for path in hub.requests if "farama-minari" in path], "nobody else was asked"
    assert (tmp_path / ".minari/datasets" / ID / "data/metadata.json").exists()
    assert not {"MINARI_DATASETS_PATH", "MINARI_REMOTE"} & set(os.environ)


def test_what_the_remote_does_not_have_exits_with_its_answer(hub, datasets, exit_sentence):
    publish(hub, datasets)
    for dataset_id in ("some/hopper/other-v0", "hf://nobody/some/x-v0"):
        assert re.search("could not be downloaded from .*404", exit_sentence(resolve_task, "", dataset_id))
    assert list(datasets.iterdir()) == []
    (hub.folder / "farama-minari" / ID / "data" / "main_data.hdf5").unlink()
    assert "cannot be read" in exit_sentence(resolve_task, "", ID), "the client takes what there is"
    assert not list(datasets.glob(".making-*"))


def test_a_disk_without_room_is_told_before_the_download(hub, datasets, monkeypatch, exit_sentence):
    publish(hub, datasets)
    usage = shutil.disk_usage(datasets)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    sentence = exit_sentence(resolve_task, "", ID)
    assert re.search(r"has 0 MB left, and \d+ are needed; set MINARI_DATASETS_PATH", sentence)
    assert not [path for path in hub.requests if path.endswith(".hdf5")]
    assert list(datasets.iterdir()) == []
