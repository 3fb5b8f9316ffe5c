"""Names of the Hugging Face hub: local paths first, and only the files of an SAE are fetched."""

import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from interop.files.cases import assert_same_sae, build
from interop.files.test_round_trip import HELD

import fastsae


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that stands for a repository, and the calls that were made for it."""
    repository, calls = tmp_path / "repository", []

    def snapshot_download(repo_id, *, allow_patterns, **options):
        calls.append({"repo_id": repo_id, **options})
        fetched = tmp_path / f"fetched_{len(calls)}"
        fetched.mkdir()
        for file in repository.rglob("*"):
            name = file.relative_to(repository).as_posix()
            if file.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (fetched / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, fetched / name)
        return str(fetched)

    monkeypatch.setattr("fastsae.interop.files.hub.snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return repository, calls


@pytest.fixture
def repository(hub):
    return hub[0]


@pytest.fixture
def calls(hub):
    return hub[1]


@pytest.mark.parametrize("inside", ["", "layers.10", "layer_20/width_16k/average_l0_71"])
@pytest.mark.parametrize("format", HELD)
def test_a_repository_or_a_folder_in_it(repository, calls, format, inside):
    sae = build(*HELD[format][0])
    sae.save(repository / inside, format)
    (repository / inside / "optimizer.bin").write_bytes(b"large")
    name = "someone/saes" + (f"/{inside}" if inside else "")
    assert_same_sae(fastsae.load(name, revision="v2", token="t"), sae)
    assert [(call["repo_id"], call["revision"], call["token"]) for call in calls] == [("someone/saes", "v2", "t")]
    fetched = {path.name for path in Path("fetched_1").rglob("*") if path.is_file()}
    assert "optimizer.bin" not in fetched


@pytest.mark.parametrize(("format", "file"), [("openai", "8.pt"), ("gemma_scope", "width_16k.npz")])
def test_one_file_of_a_repository(repository, calls, format, file):
    sae = build(*HELD[format][0])
    sae.save(repository / "layer_8" / file, format)
    (repository / "layer_8" / "other.pt").write_bytes(b"other")
    assert_same_sae(fastsae.load(f"someone/saes/layer_8/{file}"), sae)
    assert not Path("fetched_1/layer_8/other.pt").exists()


def test_a_checkpoint_comes_with_the_config_of_its_run(repository, calls):
    sae = build("GatedSAE", {})
    sae.save(repository / "trainer_0", "dictionary_learning")
    (repository / "trainer_0" / "checkpoints").mkdir()
    (repository / "trainer_0" / "ae.pt").rename(repository / "trainer_0" / "checkpoints" / "ae_1000.pt")
    assert_same_sae(fastsae.load("someone/saes/trainer_0/checkpoints/ae_1000.pt"), sae)


def test_local_paths_come_first(tmp_path, repository, calls):
    sae = build("GatedSAE", {})
    sae.save(tmp_path / "someone" / "saes", "saelens")
    assert_same_sae(fastsae.load("someone/saes"), sae)
    assert not calls


@pytest.mark.parametrize(
    "name", ["saes", "./someone/saes", "/someone/saes", "../a/b", "someone//saes", "a b/c", Path("a/b")]
)
def test_what_is_no_hub_name_is_not_looked_up(repository, calls, name):
    with pytest.raises(FileNotFoundError, match=r"does not exist: expected a file or folder, or a hub name"):
        fastsae.load(name)
    assert not calls


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("offline"), OSError("no route"), "repository"])
def test_a_hub_that_cannot_be_reached_is_said(monkeypatch, error):
    if error == "repository":
        # Its constructor wants the answer of a server.
        error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
        error.args = ("404",)

    def snapshot_download(*arguments, **options):
        raise error

    monkeypatch.setattr("fastsae.interop.files.hub.snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match="someone/saes/x does not exist, and the hub's someone/saes could not"):
        fastsae.load("someone/saes/x")


def test_without_a_network_nothing_but_the_message_comes():
    with pytest.raises(FileNotFoundError, match="the hub's nobody/nothing could not be fetched"):
        fastsae.load("nobody/nothing")


def test_a_folder_that_the_repository_lacks_is_named(repository, calls):
    build("GatedSAE", {}).save(repository / "here", "saelens")
    with pytest.raises(FileNotFoundError, match="the hub's someone/saes has no files of an SAE in there"):
        fastsae.load("someone/saes/there")
