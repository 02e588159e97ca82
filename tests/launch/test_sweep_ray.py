"""What a sweep in Ray left of Tune's state: read again where it can be and where this user owns it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from grasp_dist.errors import InputError
from grasp_dist.launch.sweep.ray_trials import restored

pytest.importorskip("ray.tune", reason="needs ray[train,tune]")


@pytest.fixture
def state(tmp_path) -> Path:
    """What a Tuner leaves, cut off in the middle."""
    folder = tmp_path / "trials"
    folder.mkdir()
    (folder / "tuner.pkl").write_bytes(b"\x80\x05\x95")
    (folder / "experiment_state-2026-01-01_00-00-00.json").write_text("{}")
    return folder


def test_state_that_cannot_be_read_is_set_aside(state, capsys):
    assert restored(state, print) is None
    assert "finished trials are known all the same" in capsys.readouterr().err
    assert not state.exists()
    assert (state.with_name("trials.old-1") / "tuner.pkl").exists()
    assert restored(state, print) is None, "there is none"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a file away")
def test_state_of_another_user_is_not_unpickled(state):
    os.chown(state / "tuner.pkl", 65534, -1)
    with pytest.raises(InputError, match="another user"):
        restored(state, print)
