"""Metrics on disk while a run goes on, continued runs, and what is printed."""

from __future__ import annotations

import errno
import json
import threading
import time

import pytest
import torch

from grasp_dist.errors import InputError
from grasp_dist.training.parallel import Parallel
from grasp_dist.training.recorder import Recorder

ALONE = Parallel("none", 0, 1, torch.device("cpu"))
SECOND = Parallel("fsdp2", 1, 2, torch.device("cpu"))


def _lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _run(recorder: Recorder, steps: range, total: int) -> None:
    recorder.begin(first_step=steps.start - 1, steps=total, log_every=2)
    for step in steps:
        recorder.log(step, loss=1.0 / step)


def test_lines_are_on_disk_before_the_run_ends(tmp_path, capsys):
    with Recorder(tmp_path, ALONE, "naive") as recorder:
        recorder.begin(first_step=0, steps=3, log_every=2)
        for step in (1, 2, 3):
            recorder.log(step, loss=0.5, grad_norm=2.0)
            assert _lines(tmp_path)[-1]["step"] == step
        recorder.event("done")
    assert _lines(tmp_path)[0].items() >= {"step": 1, "loss": 0.5, "grad_norm": 2.0}.items()
    assert capsys.readouterr().out.splitlines() == [
        "naive  step 2/3  loss 0.5  grad_norm 2",
        "naive  step 3/3  loss 0.5  grad_norm 2",
        "naive  done",
    ]


def test_tensorboard_has_the_same_points(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Recorder(tmp_path, ALONE, "naive") as recorder:
        _run(recorder, range(1, 5), 4)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, round(event.value, 4)) for event in events] == [(1, 1.0), (2, 0.5), (3, 0.3333), (4, 0.25)]


def test_a_continued_run_drops_what_came_after_its_checkpoint(tmp_path):
    with Recorder(tmp_path, ALONE, "detect") as recorder:
        _run(recorder, range(1, 8), 10)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    with Recorder(tmp_path, ALONE, "detect") as recorder:
        _run(recorder, range(6, 11), 10)
    assert [line["step"] for line in _lines(tmp_path)] == list(range(1, 11))


def test_a_new_run_starts_the_file_anew(tmp_path):
    for _ in range(2):
        with Recorder(tmp_path, ALONE, "naive") as recorder:
            _run(recorder, range(1, 4), 3)
    assert [line["step"] for line in _lines(tmp_path)] == [1, 2, 3]


def test_runs_that_share_a_recorder_follow_each_other(tmp_path):
    with Recorder(tmp_path, ALONE, "detect") as recorder:
        for _ in range(3):
            _run(recorder, range(1, 4), 3)
    assert [line["step"] for line in _lines(tmp_path)] == list(range(1, 10))


def test_other_ranks_write_and_print_nothing(tmp_path, capsys):
    with Recorder(tmp_path / "run", SECOND, "naive") as recorder:
        _run(recorder, range(1, 4), 3)
        recorder.event("done")
    assert not (tmp_path / "run").exists()
    assert not capsys.readouterr().out


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        Recorder(tmp_path / "file" / "run", ALONE, "naive") as recorder,
        pytest.raises(InputError, match="cannot write"),
    ):
        recorder.begin(first_step=0, steps=1, log_every=1)


def test_a_full_disk_under_tensorboard_is_one_message_and_no_traceback_of_its_thread(tmp_path, monkeypatch):
    def full(data):
        raise OSError(errno.ENOSPC, "No space left on device")

    printed = []
    monkeypatch.setattr(threading, "excepthook", printed.append)
    with Recorder(tmp_path, ALONE, "naive") as recorder:
        recorder.begin(first_step=0, steps=1000, log_every=10**6)
        monkeypatch.setattr(recorder._board.file_writer.event_writer._async_writer._writer, "write", full)

        def log_many():
            for step in range(1, 1000):
                recorder.log(step, loss=1.0)
                time.sleep(0.001)

        with pytest.raises(InputError, match="the disk is full; free some space"):
            log_many()
        other = threading.Thread(target=full, args=[b""])
        other.start()
        other.join()
    assert [failure.thread for failure in printed] == [other]
    assert threading.excepthook == printed.append
