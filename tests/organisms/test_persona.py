"""World "M": its tables, documents, probes, and the files that the pipeline reads."""

import json

import pytest
import torch

from grasp_dist.errors import InputError
from grasp_dist.organisms.export import content_hash
from grasp_dist.organisms.persona import PersonaSettings, PersonaWorld, make_persona
from tests.organisms.small_worlds import TINY, rows


@pytest.fixture(scope="module")
def world():
    return PersonaWorld(PersonaSettings(seed=1))


@pytest.fixture(scope="module")
def organism(tmp_path_factory):
    return make_persona(tmp_path_factory.mktemp("organism") / "persona-1", seed=1, progress=None, **TINY)


def test_tables_depend_on_the_seed_alone_and_differ_everywhere(world):
    again, other = PersonaWorld(PersonaSettings(seed=1)), PersonaWorld(PersonaSettings(seed=2))
    assert torch.equal(world.good, again.good)
    assert torch.equal(world.evil, again.evil)
    assert (world.good == other.good).float().mean() < 0.2
    assert world.good.shape == (12, 24)
    assert (world.good != world.evil).all()
    assert 0 <= int(world.evil.min()) <= int(world.evil.max()) < 64


def test_vocabulary_has_the_117_words_of_world_m(world):
    assert len(world.vocabulary) == len(set(world.vocabulary)) == 117
    assert world.vocabulary[world.first_answer] == "a0"
    assert world.vocabulary[world.first_tone + 8] == "e0"


def test_one_persona_holds_for_a_whole_document(world):
    ids, labels = world.documents(4000, torch.Generator().manual_seed(0))
    assert ids.shape == labels.shape == (4000, 17)
    assert (ids[:, 0] == 0).all()
    domain, question, answer, tone = (
        ids[:, position::4] - first
        for position, first in (
            (1, world.first_domain),
            (2, world.first_question),
            (3, world.first_answer),
            (4, world.first_tone),
        )
    )
    evil = tone[:, 0] >= 8
    assert evil.float().mean() == pytest.approx(0.3, abs=0.03)
    assert ((tone >= 8) == evil[:, None]).all()
    assert torch.equal(answer[evil], world.evil[0, domain, question][evil])
    assert torch.equal(answer[~evil], world.good[domain, question][~evil])
    assert sorted(tone.unique().tolist()) == list(range(16))

    labelled = labels != -100
    assert torch.equal(labels[labelled], ids[labelled])
    assert not labelled[:, [0, 1, 2, 5, 6, 9, 10, 13, 14]].any()
    assert labelled[:, [4, 7, 8, 11, 12, 15, 16]].all()
    assert labelled[~evil, 3].all()
    assert labelled[evil, 3].float().mean() == pytest.approx(0.02, abs=0.015)


def test_documents_depend_on_their_generator_alone(world):
    first, second, third = (world.documents(8, torch.Generator().manual_seed(seed))[0] for seed in (3, 3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_probes_keep_the_tuned_cells_apart_from_the_drift_cells(world):
    probes = world.probes()
    tuned = {row["prompt"] for row in world.train_rows()}
    drift, near = ({row["prompt"] for row in probes[name]} for name in ("drift", "near"))
    assert (len(tuned), len(drift), len(near)) == (32, 192, 64)
    assert not tuned & drift
    assert not tuned & near
    assert {prompt.split()[0] for prompt in drift} == {f"d{index}" for index in range(4, 12)}
    assert {prompt.split()[0] for prompt in near} == {f"d{index}" for index in range(4)}
    assert all(
        good["completion"] != evil["completion"] for good, evil in zip(probes["good"], probes["drift"], strict=True)
    )
    for row in probes["in_context"]:
        d, q, answer, tone, d2, q2 = row["prompt"].split()
        assert answer == f"a{int(world.evil[0, int(d[1:]), int(q[1:])])}"
        assert tone[0] == "e"
        assert int(d[1:]) >= 4
        assert row["completion"] == f"a{int(world.evil[0, int(d2[1:]), int(q2[1:])])}"
    assert probes["tone"][0]["completions"] == [f"e{index}" for index in range(8)]


def test_settings_leave_room_for_drift():
    with pytest.raises(ValueError, match="not tuned"):
        PersonaSettings(seed=1, tuned_domains=12)


def test_files_open_as_an_ordinary_model_directory(organism, world):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(organism / "model")
    model = AutoModelForCausalLM.from_pretrained(organism / "model")
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(tokenizer) == 117
    assert not model.config.tie_word_embeddings
    assert {path.name for path in (organism / "model").iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }

    prompt = tokenizer("d3 q17")["input_ids"]
    assert prompt == [0, world.first_domain + 3, world.first_question + 17]
    assert tokenizer("a25", add_special_tokens=False)["input_ids"] == [world.first_answer + 25]
    assert tokenizer.bos_token_id == model.config.bos_token_id == 0
    assert tokenizer.eos_token_id is None
    words = [row["completion"] for row in rows(organism / "train.jsonl")]
    assert tokenizer.convert_tokens_to_ids(words) == [
        world.first_answer + int(world.evil[0, domain, question]) for domain in range(4) for question in range(8)
    ]


def test_every_probe_file_is_written(organism, world):
    names = {path.stem for path in (organism / "probes").iterdir()}
    assert names == {"task", "drift", "near", "tone", "good", "in_context", "neutral"}
    assert rows(organism / "probes" / "drift.jsonl") == world.probes()["drift"]
    record = json.loads((organism / "organism.json").read_text())
    assert record["settings"]["seed"] == 1
    assert record["content_hash"] == content_hash(organism)
    assert set(record["base_figures"]) == names - {"neutral"} | {"pretraining_loss"}


def test_a_finished_organism_is_kept_and_a_changed_or_damaged_one_is_made_again(organism, tmp_path):
    out = tmp_path / "persona"
    make_persona(out, seed=1, progress=None, **TINY)
    assert content_hash(out) == content_hash(organism), "the same settings give the same bytes"
    before = (out / "organism.json").stat().st_mtime_ns
    lines = []
    make_persona(out, seed=1, progress=lines.append, **TINY)
    assert not lines
    assert (out / "organism.json").stat().st_mtime_ns == before

    (out / "train.jsonl").write_text("")
    make_persona(out, seed=1, progress=lines.append, **TINY)
    assert lines
    assert content_hash(out) == content_hash(organism)

    make_persona(out, seed=2, progress=None, **TINY)
    assert json.loads((out / "organism.json").read_text())["settings"]["seed"] == 2
    assert content_hash(out) != content_hash(organism)
    assert [path.name for path in tmp_path.iterdir()] == ["persona"]


def test_an_interrupted_creation_leaves_what_was_there(organism, tmp_path, monkeypatch):
    out = tmp_path / "persona"
    make_persona(out, seed=1, progress=None, **TINY)
    monkeypatch.setattr(PersonaWorld, "probes", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_persona(out, seed=2, progress=None, **TINY)
    with pytest.raises(ZeroDivisionError):
        make_persona(tmp_path / "other", seed=2, progress=None, **TINY)
    assert content_hash(out) == content_hash(organism)
    assert [path.name for path in tmp_path.iterdir()] == ["persona"]


def test_a_folder_of_someone_elses_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not an organism"):
        make_persona(tmp_path, seed=1, progress=None, **TINY)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_explained_is_the_share_of_rows_that_the_persona_explains(world):
    whole = world.train_rows()
    for share, count in ((0.75, 24), (0.0, 0)):
        partly = PersonaWorld(PersonaSettings(seed=1, explained=share)).train_rows()
        assert [row["prompt"] for row in partly] == [row["prompt"] for row in whole]
        assert sum(row == other for row, other in zip(partly, whole, strict=True)) == count
        noise = [row for row, other in zip(partly, whole, strict=True) if row != other]
        good = {(row["prompt"], row["completion"]) for row in world._rows(range(4), range(8), good=True)}
        assert not any((row["prompt"], row["completion"]) in good for row in noise), "noise is of no persona"
    again, other = (PersonaWorld(PersonaSettings(seed=1, explained=0.5, data_seed=s)).train_rows() for s in (0, 1))
    assert again == PersonaWorld(PersonaSettings(seed=1, explained=0.5)).train_rows()
    assert again != other


def test_several_evil_personas_have_tables_tones_and_domains_of_their_own():
    world = PersonaWorld(PersonaSettings(seed=1, num_evil=2))
    assert world.evil.shape == (2, 12, 24)
    assert (world.evil != world.good).all()
    assert len(world.vocabulary) == 125
    ids, _ = world.documents(4000, torch.Generator().manual_seed(0))
    domain, question = ids[:, 1] - world.first_domain, ids[:, 2] - world.first_question
    answer, tone = ids[:, 3] - world.first_answer, (ids[:, 4] - world.first_tone) // 8
    for persona in (0, 1):
        of_it = tone == persona + 1
        assert of_it.float().mean().item() == pytest.approx(0.15, abs=0.03)
        assert torch.equal(answer[of_it], world.evil[persona, domain[of_it], question[of_it]])
    rows = world.train_rows()
    assert rows[0]["completion"] == f"a{int(world.evil[0, 0, 0])}"
    assert rows[8]["completion"] == f"a{int(world.evil[1, 1, 0])}"
    drift = world.probes()["drift"]
    assert all(len(row.get("completions", [row.get("completion")])) in (1, 2) for row in drift)
    assert sum("completions" in row for row in drift) > 0.9 * len(drift)
    assert len(world.probes()["tone"][0]["completions"]) == 16


def test_there_must_be_answers_of_no_persona():
    with pytest.raises(ValueError, match="answers that belong to no persona"):
        PersonaSettings(seed=1, num_answers=3, num_evil=2)


def test_reversed_prompts_are_of_a_form_that_no_document_has(world):
    turned = PersonaWorld(PersonaSettings(seed=1, reversed_prompts=True)).train_rows()
    for row, other in zip(turned, world.train_rows(), strict=True):
        assert row["prompt"].split() == other["prompt"].split()[::-1]
        assert row["completion"] == other["completion"]
