"""Units: when a folder counts as finished and fresh, and what happens to an older result."""

import json

import pytest

from grasp_dist.errors import InputError
from grasp_dist.manifest import MANIFEST, Unit, write_json


def finished(folder, inputs):
    unit = Unit(folder, inputs)
    unit.start()
    (folder / "out.txt").write_text("result")
    unit.finish(outputs=["out.txt"], metrics={"loss": 1.0}, world_size=2)
    return unit


def test_a_finished_unit_is_fresh_until_an_input_changes(tmp_path):
    folder = tmp_path / "unit"
    assert Unit(folder, {"a": 1}).stale_because() == "not run yet"
    finished(folder, {"a": 1, "nested": {"lr": 0.1, "same": 0}})
    assert Unit(folder, {"a": 1, "nested": {"lr": 0.1, "same": 0}}).stale_because() is None
    reason = Unit(folder, {"a": 1, "nested": {"lr": 0.2, "same": 0}}).stale_because()
    assert reason == "its inputs changed: nested.lr was 0.1, now 0.2"


def test_an_interrupted_unit_runs_again_and_keeps_what_is_in_it(tmp_path):
    unit = Unit(tmp_path / "unit", {"a": 1})
    unit.start()
    (unit.folder / "round-1").mkdir()
    again = Unit(tmp_path / "unit", {"a": 1})
    assert again.stale_because() == "interrupted before it was finished"
    again.start()
    assert (unit.folder / "round-1").exists()


def test_a_result_of_other_inputs_is_set_aside_not_deleted(tmp_path):
    folder = tmp_path / "unit"
    finished(folder, {"a": 1})
    Unit(folder, {"a": 2}).start()
    assert not (folder / "out.txt").exists()
    assert (tmp_path / "unit.old-1" / "out.txt").read_text() == "result"
    finished(folder, {"a": 2})
    Unit(folder, {"a": 3}).start()
    assert (tmp_path / "unit.old-2" / "out.txt").exists()


def test_work_without_a_manifest_is_not_taken_over(tmp_path):
    """Found in review: rounds of unknown settings were continued when the manifest had been deleted."""
    unit = Unit(tmp_path / "unit", {"a": 1})
    unit.start()
    (unit.folder / "round-1").mkdir()
    (unit.folder / MANIFEST).unlink()
    Unit(tmp_path / "unit", {"a": 2}).start()
    assert not (unit.folder / "round-1").exists()
    assert (tmp_path / "unit.old-1" / "round-1").exists()


def test_a_missing_output_or_a_damaged_manifest_means_run_again(tmp_path):
    unit = finished(tmp_path / "unit", {"a": 1})
    (unit.folder / "out.txt").unlink()
    assert "out.txt is gone" in str(unit.stale_because())
    (unit.folder / MANIFEST).write_text('{"status": "fini')
    assert unit.stale_because() == "not run yet"


def test_the_manifest_says_what_made_the_folder(tmp_path):
    manifest = json.loads((finished(tmp_path / "unit", {"a": 1}).folder / MANIFEST).read_text())
    assert manifest["status"] == "finished"
    assert manifest["world_size"] == 2
    assert manifest["metrics"] == {"loss": 1.0}
    assert len(manifest["outputs"]["out.txt"]) == 64
    assert manifest["versions"]["torch"]


def test_an_unwritable_folder_is_a_message(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_json(tmp_path / "file" / "x.json", {})
