"""The JSON-lines log, and the progress bar that keeps out of the way."""

import json

import pytest

from fastsae.training import TrainConfig, Trainer
from fastsae.training.log import json_lines

from .conftest import K, batches


def steps_in(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_records(sae, tmp_path):
    path = tmp_path / "runs" / "log.jsonl"
    config = TrainConfig(steps=10, lr=1e-3, warmup_steps=4, log_every=4, log_path=path)
    summary = Trainer(sae, config).fit(batches(10))
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 4, 8, 10]
    assert [record["tokens"] for record in records] == [256, 1024, 2048, 2560]
    assert [record["lr"] for record in records] == [1e-3 / 4, 1e-3, 1e-3, 1e-3]
    losses = {"total", "mse", "fvu", "auxk"}
    assert all(
        set(record) == {"step", "tokens", "lr", "l0", "dead_fraction", "grad_norm", "seconds"} | losses
        for record in records
    )
    assert {name: records[-1][name] for name in losses} == summary.loss
    assert all(0 < record["l0"] <= K and record["grad_norm"] > 0 for record in records)
    assert records[0]["seconds"] < records[-1]["seconds"] == summary.seconds


def test_each_line_is_written_at_once(tmp_path):
    path = tmp_path / "log.jsonl"
    with json_lines(str(path), 0) as write:
        write({"step": 1})
        assert steps_in(path) == [1]


def test_going_on_drops_what_came_later(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 5}\n{"step": 7}\n{"step": 9, "tot')
    with json_lines(str(path), 5) as write:
        write({"step": 6})
    assert steps_in(path) == [1, 5, 6]
    with json_lines(str(path), 0):
        pass
    assert path.read_text() == ""
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]


@pytest.mark.parametrize("content", ["notes\n", "notes", '{"a": 1}\n', "[1]\n"])
def test_another_file_is_left_alone(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"notes.txt': line 1 is not a record"), json_lines(str(path), 0):
        pass
    assert path.read_text() == content


def test_no_bar_without_a_terminal(sae, capfd):
    Trainer(sae, TrainConfig(steps=2, progress=True)).fit(batches(2))
    assert capfd.readouterr() == ("", "")


def test_bar_on_a_terminal(sae, capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "150")
    Trainer(sae, TrainConfig(steps=2, progress=True)).fit(batches(2))
    out, shown = capfd.readouterr()
    assert out == ""
    assert "2/2" in shown
    assert "steps/s" in shown
    assert "fvu" in shown
    Trainer(sae, TrainConfig(steps=2, progress=False)).fit(batches(2))
    assert capfd.readouterr() == ("", "")
