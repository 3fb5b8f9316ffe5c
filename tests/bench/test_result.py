"""Result files: what is written is read, and nothing else is."""

import json
from dataclasses import asdict

import pytest

from fastsae.bench import load_result, save_result
from fastsae.bench.result import Row, Target


def test_round_trip(result, tmp_path):
    path = tmp_path / "folder" / "result.json"
    save_result(result, path)
    again = load_result(path)
    assert asdict(again) == asdict(result)
    assert isinstance(again.measurements[0].rows[0], Row)
    assert again.measurements[0].targets[0].met
    assert [file.name for file in path.parent.iterdir()] == ["result.json"]


def test_a_target_without_a_number_is_not_met():
    assert not Target("step", 1.6, None).met
    assert Target("step", 1.6, 1.6).met


def test_green_and_rows(measurement):
    assert measurement.green
    assert measurement.row("step", "dense").over_gemm == 6.5
    assert measurement.row("step", "nobody") is None
    assert measurement.dense_bytes == 96 * 640 * 4
    measurement.checks.append({"name": "encode", "passed": False, "detail": ""})
    assert not measurement.green


def test_other_files_are_refused(result, tmp_path):
    path = tmp_path / "result.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"result\.json is no result of `fastsae bench`: not JSON"):
        load_result(path)
    for content in ([], {"schema": "other/1"}):
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"result\.json has schema .*: expected 'fastsae-bench/1'"):
            load_result(path)


@pytest.mark.parametrize("damage", ["missing", "unknown", "row"])
def test_damaged_results_are_refused(result, tmp_path, damage):
    raw = asdict(result)
    if damage == "missing":
        del raw["machine"]
    elif damage == "unknown":
        raw["colour"] = "red"
    else:
        del raw["measurements"][0]["rows"][0]["p50"]
    path = tmp_path / "result.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(ValueError, match=r"result\.json is no whole result of `fastsae bench`"):
        load_result(path)
