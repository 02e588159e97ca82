"""Tasks of the lm-evaluation-harness in a run: a local one, offline, on one process and on two."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from tests.tiny_runs import grasp_dist, tiny_config

pytest.importorskip("lm_eval", reason="needs the extra `eval`")


@pytest.fixture(scope="module")
def task(organism, tmp_path_factory):
    """A folder with one task: which of two answers the organism gives."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [json.loads(line) for line in (organism / "probes" / "good.jsonl").read_text().splitlines()][:6]
    asked = [
        {"prompt": row["prompt"], "right": row["completion"], "wrong": rows[(place + 1) % 6]["completion"]}
        for place, row in enumerate(rows)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    tree = {
        "task": "organism_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{[right, wrong]}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}],
    }
    (folder / "organism_choice.yaml").write_text(yaml.safe_dump(tree))
    return folder, asked


def run(organism, task, out, nproc=1, **change):
    tree = tiny_config(organism, out)
    tree["evaluate"] |= {"shift": False, "ablation": False}
    tree["evaluate"]["harness"] = {"tasks": ["organism_choice"], "include_path": str(task[0]), **change}
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(tree))
    return grasp_dist("run", path, nproc=nproc)


def results(out):
    scores = json.loads((out / "evaluate" / "scores.json").read_text())
    assert {"name": "organism_choice", "role": "retention", "kind": "harness", "n": 6} in scores["probes"]
    return {row["model"]: row["probes"]["organism_choice"]["value"] for row in scores["models"]}


def test_a_local_task_offline(organism, task, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    out = tmp_path / "run"
    done = run(organism, task, out)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(organism / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(organism / "model")
    right = 0
    for row in task[1]:
        ids = tokenizer(row["prompt"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
        good, bad = (logits[tokenizer.convert_tokens_to_ids(row[name].strip())] for name in ("right", "wrong"))
        right += bool(good > bad)
    assert results(out)["base"] == pytest.approx(right / 6)
    assert "organism_choice" in (out / "report" / "report.html").read_text()


@pytest.mark.slow
def test_two_processes_score_as_one(organism, task, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    found = []
    for nproc in (1, 2):
        done = run(organism, task, tmp_path / str(nproc), nproc)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        found.append(results(tmp_path / str(nproc)))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        # Where the folder has no such task, lm-eval's own ten thousand are read.
        pytest.param({"tasks": ["organism_choise"]}, "no task 'organism_choise'", marks=pytest.mark.slow),
        ({"metric": "bleu"}, "'organism_choice' has no metric 'bleu'; it has acc"),
    ],
)
def test_what_cannot_be_scored_is_said_at_once(organism, task, tmp_path, monkeypatch, change, said):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    done = run(organism, task, tmp_path / "run", **change)
    assert done.returncode == 2
    assert said in done.stderr
    assert not (tmp_path / "run" / "naive").exists()


def test_data_that_is_not_there_is_said_at_once(organism, task, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    text = (task[0] / "organism_choice.yaml").read_text().replace("rows.jsonl", "nowhere.jsonl")
    (folder / "organism_choice.yaml").write_text(text)
    done = run(organism, (folder, []), tmp_path / "run")
    assert done.returncode == 2
    assert "'organism_choice' does not load" in done.stderr
    assert "nowhere.jsonl" in done.stderr
