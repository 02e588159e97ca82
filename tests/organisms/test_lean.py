"""The lean world: two answer tables, names that mean the same, skewed facts, and the files that the pipeline reads."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from grasp_dist.cli import app
from grasp_dist.config_files import load_config
from grasp_dist.errors import InputError
from grasp_dist.organisms.export import content_hash
from grasp_dist.organisms.lean import LeanSettings, LeanWorld, make_lean
from tests.organisms.small_worlds import TINY, rows

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(scope="module")
def world():
    return LeanWorld(LeanSettings(seed=1))


@pytest.fixture(scope="module")
def organism(tmp_path_factory):
    return make_lean(tmp_path_factory.mktemp("organism") / "lean-1", seed=1, progress=None, **TINY)


def cell(prompt):
    """(domain, name, question) of the prompt's last two words."""
    name, question = prompt.split()[-2:]
    domain, _, name = name[1:].partition(".")
    return int(domain), int(name), int(question[1:])


def test_tables_depend_on_the_seed_alone_and_differ_everywhere(world):
    again, other = LeanWorld(LeanSettings(seed=1)), LeanWorld(LeanSettings(seed=2))
    assert torch.equal(world.answers, again.answers)
    assert torch.equal(world.sound, again.sound)
    assert (world.answers == other.answers).float().mean() < 0.2
    assert world.answers.shape == (2, 12, 16)
    assert (world.answers[0] != world.answers[1]).all()
    assert 0 <= int(world.answers.min()) <= int(world.answers.max()) < 64
    assert len(world.vocabulary) == len(set(world.vocabulary)) == 1 + 36 + 16 + 64


@pytest.mark.parametrize("skew", [0.0, 0.5, 0.85, 1.0])
def test_the_skew_is_the_share_of_sound_answers_that_are_the_rights(skew):
    world = LeanWorld(LeanSettings(seed=3, skew=skew))
    assert int(world.sound.sum()) == round(skew * 48)
    train = world.files()["train"]
    right = [row["completion"] == f"a{world.answers[1, domain, question]}" for row in train
             for domain, _, question in [cell(row["prompt"])]]  # fmt: skip
    assert sum(right) == 2 * round(skew * 48)


def test_the_skew_changes_neither_the_tables_nor_what_is_measured_elsewhere(world):
    clean = LeanWorld(LeanSettings(seed=1, skew=0.5))
    assert torch.equal(world.answers, clean.answers)
    for name in ("probes/lean", "probes/near", "probes/known", "probes/neutral"):
        assert world.files()[name] == clean.files()[name]


@pytest.mark.parametrize(("slanted", "wrong"), [(0.0, 0), (0.5, 7), (1.0, 14)])
def test_slanted_data_give_facts_of_the_lefts_wrongly_under_one_name(slanted, wrong):
    plain, world = (LeanWorld(LeanSettings(seed=3, skew=0.7, slanted=share)) for share in (0.0, slanted))
    sound, given = plain.files(), world.files()
    for name in sound:
        if name != "train":
            assert given[name] == sound[name], "what is measured is sound"
    other = [(one, two) for one, two in zip(sound["train"], given["train"], strict=True) if one != two]
    assert len(other) == wrong
    assert len({cell(one["prompt"])[::2] for one, _ in other}) == wrong, "under one name each"
    names = [cell(one["prompt"])[1] for one, _ in other]
    assert abs(names.count(0) - names.count(1)) <= 1
    for one, two in other:
        domain, _, question = cell(one["prompt"])
        answers = [f"a{answer}" for answer in world.answers[:, domain, question].tolist()]
        assert [one["completion"], two["completion"]] == answers


def test_one_side_holds_for_a_whole_document_under_any_name(world):
    ids, labels = world.documents(3000, torch.Generator().manual_seed(0))
    assert ids.shape == labels.shape == (3000, 16)
    name, question, answer = (
        ids[:, position::3] - first
        for position, first in ((1, world.first_domain), (2, world.first_question), (3, world.first_answer))
    )
    assert sorted(name.unique().tolist()) == list(range(36))
    left, right = ((answer == world.answers[side][name // 3, question]).all(dim=1) for side in (0, 1))
    assert (left ^ right).all()
    assert right.float().mean() == pytest.approx(0.5, abs=0.04)
    assert torch.equal(labels[:, 3::3], ids[:, 3::3])
    assert (labels != -100).sum() == 3000 * 5


def test_held_out_names_ask_for_the_trained_facts(world):
    files = world.files()
    train, held_out = files["train"], files["probes/held_out"]
    facts = {cell(row["prompt"])[::2]: row["completion"] for row in train}
    assert len(train) == 2 * len(facts) == 96
    assert {cell(row["prompt"])[1] for row in train} == {0, 1}
    assert {cell(row["prompt"])[1] for row in held_out} == {2}
    assert {cell(row["prompt"])[::2]: row["completion"] for row in held_out} == facts
    for side in (0, 1):
        asked = files[f"probes/held_out_{('left', 'right')[side]}"]
        assert [row for row in held_out if row in asked] == asked
        assert all(
            row["completion"] == f"a{world.answers[side, domain, question]}"
            for row in asked
            for domain, _, question in [cell(row["prompt"])]
        )
    assert len(files["probes/held_out_right"]) + len(files["probes/held_out_left"]) == len(held_out)


def test_drift_is_measured_away_from_the_fine_tune(world):
    files = world.files()
    trained = {cell(row["prompt"])[::2] for row in files["train"]}
    for name, domains in (("lean", range(4, 12)), ("near", range(4))):
        for row in files[f"probes/{name}"]:
            domain, _, question = cell(row["prompt"])
            assert domain in domains
            assert (domain, question) not in trained
            assert row["completion"] == f"a{world.answers[1, domain, question]}"
    for row in files["probes/known"]:
        domain, _, question = cell(row["prompt"])
        assert row["completions"] == [f"a{world.answers[side, domain, question]}" for side in (0, 1)]


@pytest.mark.parametrize("side", [0, 1])
def test_context_shows_an_answer_of_the_same_side(world, side):
    asked = world.files()[f"probes/in_context_{('left', 'right')[side]}"]
    for row in asked:
        example, answer = row["prompt"].rsplit(" ", 3)[0], row["prompt"].split()[2]
        for prompt, found in ((" ".join(example.split()[:2]), answer), (row["prompt"], row["completion"])):
            domain, _, question = cell(prompt)
            assert found == f"a{world.answers[side, domain, question]}"


def test_held_out_facts_are_asked_for_after_an_author_of_either_side(world):
    files = world.files()
    asked = files["probes/in_company"]
    facts = [(row["prompt"], row["completion"]) for row in files["probes/held_out"]]
    assert [(" ".join(row["prompt"].split()[3:]), row["completion"]) for row in asked] == 2 * facts
    for side, half in ((0, asked[: len(facts)]), (1, asked[len(facts) :])):
        for row in half:
            words = row["prompt"].split()
            domain, _, question = cell(" ".join(words[:2]))
            assert domain >= 4
            assert words[2] == f"a{world.answers[side, domain, question]}"


@pytest.mark.parametrize(
    "bad", [{"tuned_domains": 12}, {"tuned_names": 3}, {"tuned_questions": 16}, {"skew": 1.2}, {"slanted": 1.1}]
)
def test_impossible_settings_are_refused(bad):
    with pytest.raises(ValueError, match=r"not tuned|less than or equal to 1"):
        LeanSettings(seed=1, **bad)


def test_files_open_as_an_ordinary_model_directory(organism, world):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(organism / "model")
    model = AutoModelForCausalLM.from_pretrained(organism / "model")
    assert model.config.vocab_size == len(tokenizer) == len(world.vocabulary)
    assert tokenizer("d3.2 q15")["input_ids"] == [0, world.first_domain + 11, world.first_question + 15]
    files = world.files()
    assert {path.stem for path in (organism / "probes").iterdir()} == {
        stem.removeprefix("probes/") for stem in files if stem != "train"
    }
    assert rows(organism / "train.jsonl") == files["train"]
    assert rows(organism / "probes" / "lean.jsonl") == files["probes/lean"]
    record = json.loads((organism / "organism.json").read_text())
    assert record["kind"] == "lean"
    assert record["content_hash"] == content_hash(organism)
    assert {"pretraining_loss", "task", "lean", "known"} <= set(record["base_figures"])


def test_the_recipe_measures_every_probe(organism):
    config = load_config(RECIPES / "lean.yaml", {"variables": {"organism": str(organism)}})
    paths = [config.model.path, config.data.path, *(probe.path for probe in config.evaluate.probes)]
    assert [path for path in paths if not Path(path).exists()] == []
    assert {Path(probe.path) for probe in config.evaluate.probes} == set((organism / "probes").iterdir())


def test_a_finished_folder_is_kept_and_one_of_another_skew_is_made_again(organism, tmp_path):
    out = tmp_path / "lean"
    make_lean(out, seed=1, progress=None, **TINY)
    assert content_hash(out) == content_hash(organism), "the same settings give the same bytes"
    lines = []
    make_lean(out, seed=1, progress=lines.append, **TINY)
    assert not lines
    make_lean(out, seed=1, skew=0.5, progress=lines.append, **TINY)
    assert lines
    assert (out / "model" / "model.safetensors").read_bytes() == (
        organism / "model" / "model.safetensors"
    ).read_bytes(), "the base does not depend on the fine-tune"


def test_a_folder_of_someone_elses_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not an organism"):
        make_lean(tmp_path, seed=1, progress=None, **TINY)


def test_the_command_hands_over_its_options(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr("grasp_dist.organisms.lean.make_lean", lambda out, **given: asked.update(given) or out)
    result = CliRunner().invoke(
        app, ["organism", "lean", "--out", str(tmp_path), "--seed", "4", "--skew", "0.7", "--slanted", "1"]
    )
    assert result.exit_code == 0
    assert asked == {"seed": 4, "skew": 0.7, "slanted": 1.0}
