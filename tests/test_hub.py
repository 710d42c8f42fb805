"""Exports are uploaded to the Hub, here by the real client to a server on this machine."""

import json

import pytest

from dpo_jax.hf import hub
from dpo_jax.types import InputError
from tests.support.hub import ORGANIZATION, USER, serve


@pytest.fixture
def server():
    with serve() as served:
        yield served


@pytest.fixture
def export(tmp_path):
    """The files of an export of which one is sent as a big file is."""
    folder = tmp_path / "export"
    (folder / "additional_chat_templates").mkdir(parents=True)
    texts = {"config.json": "{}", "README.md": "card", "additional_chat_templates/a.jinja": "x"}
    texts |= {"model.safetensors": "w"}
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


def test_an_export_is_uploaded_without_the_weights_of_an_earlier_one(server, export):
    name = f"{USER}/aligned"
    old = ("model-00001-of-00002.safetensors", "adapter_config.json", "config.json")
    server.repositories[name] = {"LICENSE": b"kept", **dict.fromkeys(old, b"old")}
    address = hub.push(export, name, private=False)
    assert address == f"{server.address}/{name}" and not server.private
    sent = {path.relative_to(export).as_posix(): path.read_bytes() for path in export.rglob("*") if path.is_file()}
    assert server.repositories[name] == sent | {"LICENSE": b"kept"}


def test_a_new_repository_is_private_where_asked(server, export):
    hub.push(export, "aligned", private=True)
    assert server.private and json.loads(server.repositories[f"{USER}/aligned"]["config.json"]) == {}


def test_an_upload_that_fails_keeps_the_export_and_says_how_to_send_it_by_hand(server, export):
    server.refused.add("/api/repos/create")
    with pytest.raises(InputError, match=f"upload failed.*with `hf upload {USER}/a {export}`"):
        hub.push(export, f"{USER}/a", private=False)
    assert (export / "model.safetensors").read_text() == "w"


@pytest.mark.parametrize("repo", [f"{USER}/a", "a", f"{ORGANIZATION}/a"])
def test_own_repositories_and_those_of_ones_organizations_are_accepted(server, repo):
    hub.check_access(repo)


@pytest.mark.parametrize(
    "repo, said", [("other/a", f"while {USER} is logged in"), ("a/b/c", "owner/name"), ("a b", "owner/name")]
)
def test_repositories_of_others_are_refused_before_a_run(server, repo, said):
    with pytest.raises(InputError, match=said):
        hub.check_access(repo)


def test_who_is_not_logged_in_is_told_before_a_run(server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(InputError, match="does not say who is logged in.*hf auth login"):
        hub.check_access(f"{USER}/a")
