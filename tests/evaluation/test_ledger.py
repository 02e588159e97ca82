"""Records on disk: what was added is there, whatever ends the process."""

from __future__ import annotations

import os
import signal
import time

import pytest

from grasp_dist.errors import InputError
from grasp_dist.evaluation.misalignment.ledger import Ledger
from tests.forks import CONTEXT

MADE = {"model": "a", "seed": 1}
HOSTILE = [
    "<script>",
    "\x1b[31m",
    "line\nline\u2028line",
    "\ud800",
    "{0} %s",
    "x" * 1_000_000,
    "\u0000",
    '"}\n{"id": 1}',
]


def ledger(path, **made):
    return Ledger(path, made_from=MADE | made, key=("id",))


def test_what_was_added_is_read_back_as_it_was(tmp_path):
    path = tmp_path / "folder" / "answers.jsonl"
    first = ledger(path)
    for number, text in enumerate(HOSTILE):
        first.add([{"id": number, "answer": text}])
    again = ledger(path)
    assert [record["answer"] for record in again] == HOSTILE
    assert len(again) == len(HOSTILE)
    assert (3,) in again
    assert (99,) not in again
    assert again[(3,)]["answer"] == "\ud800"


def test_at_every_byte_at_which_a_process_may_end_whole_records_stay(tmp_path):
    path = tmp_path / "answers.jsonl"
    whole = ledger(path)
    whole.add([{"id": 0, "answer": "a"}])
    kept = path.read_bytes()
    whole.add([{"id": 1, "answer": "b"}, {"id": 2, "answer": "c"}])
    content = path.read_bytes()
    assert content.startswith(kept), "nothing is written over"
    for size in range(len(content) + 1):
        path.write_bytes(content[:size])
        cut = ledger(path)
        there = {record["id"] for record in cut}
        whole_lines = content[:size].count(b"\n") - 1  # but the first, which says what they were made from
        assert there == set(range(max(0, whole_lines)))
        cut.add([{"id": number, "answer": "abc"[number]} for number in range(3) if (number,) not in cut])
        assert path.read_bytes() == content


def _add_for_ever(path):
    written = ledger(path)
    number = len(written)
    while True:
        written.add([{"id": number, "answer": "x" * 1000}])
        number += 1


def test_killed_while_it_writes(tmp_path):
    path = tmp_path / "answers.jsonl"
    for _ in range(2):
        before = len(ledger(path)) if path.exists() else 0
        process = CONTEXT.Process(target=_add_for_ever, args=(path,))
        process.start()
        while not path.exists() or len(ledger(path)) < before + 20:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert sorted(record["id"] for record in ledger(path)) == list(range(len(ledger(path))))


def test_records_made_from_something_else_are_never_mixed_in(tmp_path):
    path = tmp_path / "answers.jsonl"
    ledger(path).add([{"id": 0}])
    with pytest.raises(InputError, match=r"another seed \(1, now 2\)"):
        ledger(path, seed=2)
    with pytest.raises(InputError, match=r"another temperature \(null, now 0.5\)"):
        ledger(path, temperature=0.5)


def test_damage_is_named_and_nothing_is_lost_by_looking(tmp_path):
    path = tmp_path / "answers.jsonl"
    ledger(path).add([{"id": number} for number in range(3)])
    lines = path.read_text().splitlines(keepends=True)
    for number, line, said in (
        (1, "{}\n", "line 1"),
        (3, '{"id": \n', "line 3"),
        (3, '{"other": 1}\n', "line 3"),
        (4, lines[1], "repeats"),
    ):
        damaged = [*lines]
        damaged[number - 1] = line
        path.write_text("".join(damaged))
        with pytest.raises(InputError, match=said):
            ledger(path)
        assert path.read_text() == "".join(damaged)


def test_two_records_of_one_key_are_refused(tmp_path):
    opened = ledger(tmp_path / "answers.jsonl")
    opened.add([{"id": 0}])
    for records in ([{"id": 0}], [{"id": 1}, {"id": 1}]):
        with pytest.raises(ValueError, match="already"):
            opened.add(records)
    assert len(ledger(tmp_path / "answers.jsonl")) == 1


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        ledger(tmp_path / "file" / "answers.jsonl").add([{"id": 0}])
