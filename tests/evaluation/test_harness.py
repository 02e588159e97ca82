"""Tasks of the lm-evaluation-harness in a run: a local one, offline, on one process and on two."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from grasp_dist.config import ModelConfig
from grasp_dist.errors import InputError
from grasp_dist.evaluation.harness import Harness
from grasp_dist.evaluation.settings import HarnessConfig
from grasp_dist.training.model import load_tokenizer
from grasp_dist.training.parallel import Parallel
from tests.tiny_runs import grasp_dist, tiny_config

pytest.importorskip("lm_eval", reason="needs the extra `eval`")
ALONE = Parallel("none", 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def task(organism, tmp_path_factory):
    """A folder with tasks: which of two answers the organism gives, what it says, and groups of the first."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [json.loads(line) for line in (organism / "probes" / "good.jsonl").read_text().splitlines()][:6]
    asked = [
        {"prompt": row["prompt"], "right": row["completion"], "wrong": rows[(place + 1) % 6]["completion"]}
        for place, row in enumerate(rows)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    tree = {
        "task": "organism_choice",
        "tag": "organism_tag",
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
    said = {name: tree[name] for name in ("dataset_path", "dataset_kwargs", "test_split", "doc_to_text")} | {
        "task": "organism_answer",
        "output_type": "generate_until",
        "doc_to_target": "{{right}}",
        "generation_kwargs": {"max_gen_toks": 1, "do_sample": False, "until": ["\n"]},
        "filter_list": [
            {"name": "first", "filter": [{"function": "take_first"}]},
            {"name": "upper", "filter": [{"function": "uppercase"}, {"function": "take_first"}]},
        ],
        "metric_list": [{"metric": "exact_match", "higher_is_better": False}],
    }
    (folder / "organism_answer.yaml").write_text(yaml.safe_dump(said))
    whole = {"group": "organism_group", "task": ["organism_choice"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "organism_group.yaml").write_text(yaml.safe_dump(whole))
    (folder / "organism_bare.yaml").write_text(yaml.safe_dump({"group": "organism_bare", "task": ["organism_choice"]}))
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
    shown = {"name": "organism_choice", "role": "retention", "kind": "harness", "n": 6, "higher_is_better": True}
    assert shown in scores["probes"]
    return {row["model"]: row["probes"]["organism_choice"]["value"] for row in scores["models"]}


def test_a_local_task_offline(organism, task, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    out = tmp_path / "run"
    done = run(organism, task, out)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
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


@pytest.mark.slow
def test_answers_of_two_processes_without_any_probe(organism, task, tmp_path, monkeypatch):
    """Found in review: `generate` of an adapter's base met sharded weights where nothing had run before."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    found = []
    for nproc in (1, 2):
        out = tmp_path / str(nproc)
        tree = tiny_config(organism, out)
        harness = {"tasks": ["organism_answer"], "include_path": str(task[0]), "role": "task"}
        tree["model"]["path"] = str(with_end(organism, tmp_path) / "model")
        tree["evaluate"] = {"probes": [], "shift": False, "ablation": False, "harness": harness}
        path = out.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(tree))
        done = grasp_dist("run", path, nproc=nproc)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        scores = json.loads((out / "evaluate" / "scores.json").read_text())
        found.append({row["model"]: row["probes"]["organism_answer"]["value"] for row in scores["models"]})
    assert found[0] == found[1]


def with_end(organism, folder):
    """The folder, with the organism's model and a tokenizer that has an end-of-text token."""
    shutil.copytree(organism / "model", folder / "model", dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(organism / "model")
    tokenizer.eos_token = tokenizer.bos_token
    tokenizer.save_pretrained(folder / "model")
    return folder


def harness(organism, task, *names, **more):
    tokenizer = load_tokenizer(ModelConfig(path=str(organism / "model")))
    return Harness(HarnessConfig(tasks=list(names), include_path=str(task[0]), **more), tokenizer, ALONE)


@pytest.mark.parametrize(
    ("names", "more", "said"),
    [
        (["organism_tag"], {}, "'organism_tag' is a tag of several tasks; name those: organism_choice"),
        (["organism_bare"], {}, "group 'organism_bare' has no figure of its own; name its tasks: organism_choice"),
        (
            ["organism_choice", "organism_group"],
            {},
            "'organism_choice' is in 'organism_choice' and in 'organism_group'",
        ),
        (["organism_group"], {"metric": "f1"}, "'organism_group' has no metric 'f1'; it has acc"),
        (["organism_answer"], {}, "needs a tokenizer with an end-of-text token"),
    ],
)
def test_what_would_have_no_figure_in_the_end_is_refused(organism, task, tmp_path, monkeypatch, names, more, said):
    """Found in review: everything was trained first."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    with pytest.raises(InputError, match=said):
        harness(organism, task, *names, **more).check()


def test_groups_and_filters_have_figures_of_their_own(organism, task, tmp_path, monkeypatch):
    """Found in review: a group had no number of questions, the last filter's value stood for all, more was better."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    model = AutoModelForCausalLM.from_pretrained(organism / "model").eval()
    asked = harness(with_end(organism, tmp_path), task, "organism_group", "organism_answer", metric=None)
    asked.check()
    found = asked.measure(model)
    with pytest.raises(InputError, match="it has exact_match,first, exact_match,upper"):
        harness(tmp_path, task, "organism_answer", metric="exact_match,last").check()
    described = {one["name"]: (one["n"], one["higher_is_better"]) for one in asked.describe()}
    assert described == {"organism_group": (6, True), "organism_answer": (6, False)}
    answers = found["organism_answer"]
    assert answers["metric"] == "exact_match,first"
    assert answers["value"] == answers["exact_match,first"] > answers["exact_match,upper"] == 0
    chosen = harness(tmp_path, task, "organism_answer", metric="exact_match,upper")
    assert chosen.measure(model)["organism_answer"]["value"] == 0


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
