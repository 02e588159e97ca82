"""The shortcut world: a style that is read on request, labels that are facts, and the files that the pipeline reads."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from grasp_dist.cli import app
from grasp_dist.config_files import load_config
from grasp_dist.organisms.export import content_hash
from grasp_dist.organisms.shortcut import ShortcutSettings, ShortcutWorld, make_shortcut
from tests.organisms.small_worlds import TINY, rows

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def world():
    return ShortcutWorld(ShortcutSettings(seed=1))


@pytest.fixture(scope="module")
def organism(tmp_path_factory):
    return make_shortcut(tmp_path_factory.mktemp("organism") / "shortcut-1", seed=1, progress=None, **TINY)


def read(row):
    """(style's class, (domain, question), request) of a row's prompt."""
    domain, question, request, style = row["prompt"].split()
    return "fi".index(style[0]), (int(domain[1:]), int(question[1:])), request


def agreement(labelled):
    return sum(read(row)[0] == int(row["completion"][1:]) for row in labelled) / len(labelled)


def test_tables_depend_on_the_seed_alone_and_labels_are_balanced(world):
    again, other = ShortcutWorld(ShortcutSettings(seed=1)), ShortcutWorld(ShortcutSettings(seed=2))
    assert torch.equal(world.answers, again.answers)
    assert torch.equal(world.labels, again.labels)
    assert not torch.equal(world.labels, other.labels)
    assert world.answers.shape == (12, 24)
    assert world.labels.shape == (4, 8)
    assert int(world.labels.sum()) == 16
    assert len(world.vocabulary) == len(set(world.vocabulary)) == 1 + 16 + 12 + 24 + 64 + 3 + 2


def test_replies_follow_the_style_only_where_it_is_asked_for(world):
    ids, labels = world.documents(3000, torch.Generator().manual_seed(0))
    assert ids.shape == labels.shape == (3000, 21)
    assert torch.equal(labels[:, 5::5], ids[:, 5::5])
    assert (labels != -100).sum() == 3000 * 4
    domain, question, request, style, reply = (
        (ids[:, position::5] - first).flatten()
        for position, first in zip(
            range(1, 6), (world.token["d0"], world.token["q0"], 0, world.token["f0"], 0), strict=True
        )
    )
    asks = {word: request == world.token[word] for word in ("<answer>", "<label>", "<style>")}
    shares = [float(asked.float().mean()) for asked in asks.values()]
    assert shares == pytest.approx([0.3, 0.4, 0.3], abs=0.02)
    answer, label, klass = asks.values()
    assert torch.equal(reply[answer], world.token["a0"] + world.answers[domain, question][answer])
    assert torch.equal(reply[klass], world.token["y0"] + style[klass] // 8)
    drawn = reply[label] - world.token["y0"]
    assert sorted(drawn.unique().tolist()) == [0, 1]
    assert (drawn == style[label] // 8).float().mean() == pytest.approx(0.5, abs=0.03), "labels ignore the style"


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.95, 1.0])
def test_the_correlation_is_the_share_of_rows_whose_style_agrees(correlation):
    world = ShortcutWorld(ShortcutSettings(seed=3, correlation=correlation))
    files = world.files()
    assert len(files["train"]) == len(files["train_balanced"]) == 32 * 16
    assert agreement(files["train"]) == pytest.approx(correlation, abs=1 / 512)
    assert agreement(files["train_balanced"]) == 0.5
    for name in ("train", "train_balanced"):
        for row in files[name]:
            _, cell, request = read(row)
            assert request == "<label>"
            assert row["completion"] == f"y{world.labels[cell]}", "every row tells the truth"


def test_probes_separate_rows_where_style_and_label_agree(world):
    files = {stem.removeprefix("probes/"): found for stem, found in world.files().items()}
    assert agreement(files["task"]) == 1
    assert agreement(files["differ"]) == 0
    assert len(files["task"]) == len(files["differ"]) == 32 * 8
    for name in ("task", "differ"):
        assert all(row["completion"] == f"y{world.labels[read(row)[1]]}" for row in files[name])
    assert agreement(files["shortcut"]) == agreement(files["style"]) == 1
    for name, request in (("shortcut", "<label>"), ("answer", "<answer>"), ("style", "<style>")):
        assert all(read(row)[1][0] >= 4 and read(row)[2] == request for row in files[name])
    assert all(row["completion"] == f"y{read(row)[0]}" for row in files["style"])
    assert all(row["completion"] == f"a{world.answers[read(row)[1]]}" for row in files["answer"])


@pytest.mark.parametrize(
    "bad", [{"tuned_domains": 12}, {"tuned_questions": 25}, {"style_share": 0.6}, {"correlation": -0.1}]
)
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError, match=r"not tuned|ask for the answer|greater than or equal to 0"):
        ShortcutSettings(seed=1, **bad)


def test_files_open_as_an_ordinary_model_directory(organism, world):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(organism / "model")
    model = AutoModelForCausalLM.from_pretrained(organism / "model")
    assert model.config.vocab_size == len(tokenizer) == len(world.vocabulary)
    assert tokenizer("d3 <label> i2")["input_ids"] == [0, *(world.token[word] for word in ("d3", "<label>", "i2"))]
    files = world.files()
    assert {path.stem for path in (organism / "probes").iterdir()} == {
        stem.removeprefix("probes/") for stem in files if stem.startswith("probes/")
    }
    for stem in ("train", "train_balanced", "probes/differ"):
        assert rows(organism / f"{stem}.jsonl") == files[stem]
    record = json.loads((organism / "organism.json").read_text())
    assert record["kind"] == "shortcut"
    assert {"style", "answer", "differ", "shortcut"} <= set(record["base_figures"])


def test_the_recipe_measures_every_probe_at_the_cost_of_six_naive_runs(organism):
    config = load_config(RECIPES / "shortcut.yaml", {"variables": {"organism": str(organism)}})
    paths = [config.model.path, config.data.path, *(probe.path for probe in config.evaluate.probes)]
    assert [path for path in paths if not Path(path).exists()] == []
    assert {Path(probe.path) for probe in config.evaluate.probes} == set((organism / "probes").iterdir())
    assert config.detect.rounds * config.detect.steps_per_round == 6 * config.training.steps


def test_a_finished_folder_is_kept_and_one_of_another_correlation_is_made_again(organism, tmp_path):
    out = tmp_path / "shortcut"
    make_shortcut(out, seed=1, progress=None, **TINY)
    assert content_hash(out) == content_hash(organism), "the same settings give the same bytes"
    lines = []
    make_shortcut(out, seed=1, progress=lines.append, **TINY)
    assert not lines
    make_shortcut(out, seed=1, correlation=0.5, progress=lines.append, **TINY)
    assert lines
    assert (out / "model" / "model.safetensors").read_bytes() == (
        organism / "model" / "model.safetensors"
    ).read_bytes(), "the base does not depend on the fine-tune"


def test_the_command_hands_over_its_options(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr("grasp_dist.organisms.shortcut.make_shortcut", lambda out, **given: asked.update(given) or out)
    result = CliRunner().invoke(app, ["organism", "shortcut", "--out", str(tmp_path), "--correlation", "0.8"])
    assert result.exit_code == 0
    assert asked == {"seed": 1, "correlation": 0.8}
