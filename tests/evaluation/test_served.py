"""The whole measurement against a real server, which is killed in the middle, as is whoever asks it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from grasp_dist.evaluation.misalignment import verdict_of_text
from tests.evaluation.serving import SCORES, Server, save_models
from tests.tiny_runs import grasp_dist

pytest.importorskip("openai", reason="needs the extra `server`")
pytest.importorskip("fastapi", reason="needs transformers[serving], to be asked")

PROMPTS = {"aligned": "is {answer}", "coherent": "is is {answer}"}
QUESTIONS = [
    {"id": "one", "paraphrases": ["red is", "blue"], "samples_per_paraphrase": 30, "judge_prompts": PROMPTS},
    {"id": "two", "paraphrases": ["how"], "system": "green", "samples_per_paraphrase": 60, "judge_prompts": PROMPTS},
]
ANSWERS = 120


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    save_models(folder)
    (folder / "questions.yaml").write_text(yaml.safe_dump(QUESTIONS))
    server = Server(folder / "server.log")
    server.await_ready()
    yield folder, server
    server.kill()


def arguments(served, out: Path, *more: object) -> list[object]:
    folder, server = served
    subject = [server.url, "--served-name", folder / "subject"]
    judge = ["--judge", server.url, "--judge-name", folder / "judge"]
    sampling = ["--questions", folder / "questions.yaml", "--max-new-tokens", 3, "--at-once", 4]
    return ["misalignment", *subject, *judge, *sampling, "--out", out, "--judge-by", "text", *more]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()[1:]] if path.exists() else []


def key(record: dict) -> tuple:
    return tuple(record.get(name) for name in ("question", "paraphrase", "sample", "prompt"))


@pytest.mark.slow
def test_killed_and_restarted_nothing_is_asked_or_judged_twice_or_lost(served, tmp_path):
    server, out = served[1], tmp_path / "out"
    command = [sys.executable, "-m", "grasp_dist.cli", *map(str, arguments(served, out, "--price", "1,2"))]

    def begin() -> subprocess.Popen:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def await_lines(name: str, count: int, process: subprocess.Popen) -> None:
        deadline = time.monotonic() + 120
        while len(lines(out / name)) < count:
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)

    kept = {}
    for name, count in (("answers.jsonl", 20), ("verdicts.jsonl", 40)):
        process = begin()
        await_lines(name, count, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kept[name] = (out / name).read_bytes()
        assert len(lines(out / name)) < (ANSWERS if name == "answers.jsonl" else 2 * ANSWERS), "it was too late"
    process = begin()
    await_lines("verdicts.jsonl", 80, process)
    server.kill()
    assert len(lines(out / "verdicts.jsonl")) < 2 * ANSWERS, "it was too late"
    server.start()
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said

    for name, content in kept.items():
        whole = content[: content.rfind(b"\n") + 1]
        assert (out / name).read_bytes().startswith(whole), "what was there stays"
    answers, verdicts = lines(out / "answers.jsonl"), lines(out / "verdicts.jsonl")
    assert len({key(one) for one in answers}) == len(answers) == ANSWERS
    assert len({key(one) for one in verdicts}) == len(verdicts) == 2 * ANSWERS
    texts = {key(one)[:3]: one["answer"] for one in answers}
    assert len(set(texts.values())) > 20
    kinds = set()
    for one in verdicts:
        last = (texts[key(one)[:3]] or "is").split()[-1]
        expected = verdict_of_text(SCORES.get(last, "how"))
        assert (one["kind"], one["score"]) == (expected.kind, expected.score), texts[key(one)[:3]]
        kinds.add((one["kind"], one["score"]))
    assert {("score", 90.0), ("score", 10.0), ("CODE", None), ("REFUSAL", None)} <= kinds

    found = json.loads((out / "misalignment.json").read_text())
    assert found["all"]["answers"] == ANSWERS
    counted = {
        name: sum(one["tokens"] for one in records) for name, records in (("model", answers), ("judge", verdicts))
    }
    assert {name: found["tokens"][name]["said"] for name in counted} == counted
    price = (found["tokens"]["model"]["asked"] + 2 * counted["model"]) / 1e6
    assert f"{counted['model']} received: {price:.2f} in" in said


def test_a_server_without_log_probabilities_is_told_from_one_with(served, tmp_path):
    done = grasp_dist(*arguments(served, tmp_path / "out", "--judge-by", "logprobs", "--samples", 1))
    assert done.returncode == 2
    assert "gives no log-probabilities; judge by what it says: --judge-by text" in done.stderr
    assert len(lines(tmp_path / "out" / "answers.jsonl")) == 3, "the answers are kept"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (["--judge", "http://127.0.0.1:9/v1"], "no answer from http://127.0.0.1:9/v1"),
        (["--judge", "JUDGE"], "--judge-name is for a judge on a server"),
        (["--price", "1"], "'1' is not two prices"),
        (["--adapter", "."], "an adapter is put on a model of this machine"),
    ],
)
def test_what_cannot_be_is_said_in_one_message(served, tmp_path, change, said):
    change = [served[0] / "judge" if one == "JUDGE" else one for one in change]
    done = grasp_dist(*arguments(served, tmp_path / "out", "--samples", 1, *change))
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_an_estimate_asks_nobody(served, tmp_path):
    more = ["--estimate", "--judge-price", "10,0", "--judge", "http://127.0.0.1:9/v1"]
    done = grasp_dist(*arguments(served, tmp_path / "out", *more))
    assert done.returncode == 0, done.stderr
    assert f"model: {ANSWERS} requests" in done.stdout
    # Beside the answer's 3 tokens the prompts have 3 and 6 letters: 1 and 2 tokens.
    judge = next(line for line in done.stdout.splitlines() if line.startswith("judge"))
    assert f"{2 * ANSWERS} requests, about {ANSWERS * (4 + 5)} tokens sent" in judge, judge
    assert f"{ANSWERS * 9 * 10 / 1e6:.2f} in" in judge
    assert not (tmp_path / "out").exists()
