"""Scores against one row at a time, and their independence of batches, world size, and sharding."""

import math

import pytest
import torch
from torch.distributed.fsdp import fully_shard

from grasp_dist.baselines.ablation import ablate
from grasp_dist.config import ParallelConfig
from grasp_dist.evaluation.batching import cut_batches
from grasp_dist.evaluation.scoring import Reference, score
from grasp_dist.evaluation.shift import ShiftMeter
from grasp_dist.training.parallel import init_parallel
from tests.distributed import run_distributed
from tests.evaluation.evaluation_cases import make_basis, make_probes, tuned_model


@torch.no_grad()
def _log_probabilities(model, tokens):
    return model(input_ids=torch.tensor([tokens])).logits[0].double().log_softmax(-1)


def _text(model, prompt, text):
    """(log P of the text after the prompt, whether each of its tokens is the greedy one), token by token."""
    total, greedy = 0.0, True
    for i, token in enumerate(text):
        if not prompt and i == 0:
            continue
        row = _log_probabilities(model, [*prompt, *text[:i]])[-1]
        total += float(row[token])
        greedy &= int(row.argmax()) == token
    return total, greedy


def _obvious(model, base, probe):
    """The headline values of a probe's rows by the plainest means."""
    rows = []
    for row in probe.rows:
        prompt = list(row.prompt)
        if probe.kind == "completion":
            for _ in range(probe.config.own_tokens):
                prompt.append(int(_log_probabilities(model, prompt)[-1].argmax()))
            rows.append(sum(math.exp(_text(model, prompt, text)[0]) for text in row.continuations))
        elif probe.kind == "pair":
            skipped = not prompt
            a, b = (_text(model, prompt, text)[0] / (len(text) - skipped) for text in row.continuations)
            rows.append(a - b)
        elif probe.kind == "choice":
            chances = [math.exp(_text(model, prompt, text)[0]) for text in row.continuations]
            rows.append(sum(p * value for p, value in zip(chances, row.values, strict=True)) / sum(chances))
        elif probe.kind == "loss":
            table = _log_probabilities(model, prompt)
            losses = [-float(table[i - 1, label]) for i, label in enumerate(row.labels) if label != -100]
            rows.append(sum(losses) / len(losses))
        else:
            q, p = _log_probabilities(model, prompt), _log_probabilities(base, prompt)
            rows.append(float((p.exp() * (p - q)).sum(-1)[-probe.config.positions :].mean()))
    return rows


@pytest.fixture(scope="module")
def models():
    return tuned_model(tuned=False).eval(), tuned_model().eval()


def _scores(model, base, parallel, batch_size=4):
    reference = Reference()
    first = score(base, make_probes(), parallel, batch_size=batch_size, reference=reference)
    return first, score(model, make_probes(), parallel, batch_size=batch_size, reference=reference)


@pytest.fixture(scope="module")
def alone(models):
    base, model = models
    return _scores(model, base, init_parallel(ParallelConfig()))


@pytest.mark.parametrize("probe", make_probes(), ids=lambda probe: probe.name)
def test_rows_are_those_of_one_plain_forward_pass_each(models, alone, probe):
    base, model = models
    found = alone[1][probe.name]
    assert found["rows"] == pytest.approx(_obvious(model, base, probe), rel=2e-4, abs=1e-7)


def test_the_metrics_are_what_the_rows_say(models, alone):
    _, model = models
    scores = alone[1]
    by_name = {probe.name: probe for probe in make_probes()}

    several = scores["several"]
    assert several["value"] == several["probability"] == pytest.approx(sum(several["rows"]) / 4)
    assert several["loss"] == pytest.approx(-sum(math.log(p) for p in several["rows"]) / 4)

    pairs = scores["pairs"]
    assert pairs["win_rate"] == sum(row > 0 for row in pairs["rows"]) / len(pairs["rows"])

    counts = [sum(label != -100 for label in row.labels) for row in by_name["losses"].rows]
    mean = sum(n * loss for n, loss in zip(counts, scores["losses"]["rows"], strict=True)) / sum(counts)
    assert scores["losses"]["value"] == pytest.approx(mean)
    assert scores["losses"]["perplexity"] == pytest.approx(math.exp(mean))

    exact = [any(_text(model, row.prompt, text)[1] for text in row.continuations) for row in by_name["task"].rows]
    assert scores["task"]["exact_match"] == sum(exact) / len(exact)


def test_exact_match_of_the_greedy_continuation_is_one(models):
    _, model = models
    probe = make_probes()[1]
    for row in probe.rows:
        text = []
        for _ in range(3):
            text.append(int(_log_probabilities(model, [*row.prompt, *text])[-1].argmax()))
        row.continuations.append(text)
    found = score(model, [probe], init_parallel(ParallelConfig()))
    assert found[probe.name]["exact_match"] == 1.0


def test_the_base_is_at_no_divergence_from_itself_and_kl_needs_a_reference(models, alone):
    assert alone[0]["neutral"]["value"] == 0.0
    assert alone[1]["neutral"]["value"] > 0.01
    with pytest.raises(ValueError, match="Reference"):
        score(models[0], make_probes(), init_parallel(ParallelConfig()))


def test_batch_size_does_not_matter(models, alone):
    base, model = models
    for batch_size in (1, 64):
        other = _scores(model, base, init_parallel(ParallelConfig()), batch_size)[1]
        for name, found in alone[1].items():
            assert other[name]["rows"] == pytest.approx(found["rows"], rel=1e-4, abs=1e-7)


def test_modes_of_modules_are_restored(models):
    model = tuned_model().train()
    model.base_model.model.model.layers[0].eval()
    score(model, make_probes()[:1], init_parallel(ParallelConfig()))
    assert model.training
    assert not model.base_model.model.model.layers[0].training


def test_a_batch_is_bounded_by_sequences_and_by_logits():
    spans = [(9, 8), (9, 8), (9, 0), (3, 2), (3, 2)]
    assert cut_batches(spans, batch_size=2) == [[2, 0], [1, 3], [4]]
    for batch in cut_batches(spans, batch_size=4, max_logits=10):
        longest = max(spans[i][0] for i in batch)
        assert len(batch) == 1 or len(batch) * (longest - min(spans[i][1] for i in batch)) <= 10


def _sharded():
    parallel = init_parallel(ParallelConfig())
    base, model = tuned_model(tuned=False), tuned_model()
    for whole in (base, model):
        for layer in whole.base_model.model.model.layers:
            fully_shard(layer, mesh=parallel.mesh)
        fully_shard(whole, mesh=parallel.mesh)
    meter = ShiftMeter(base, make_basis(), make_probes(), parallel, batch_size=5)
    scores = _scores(model, base, parallel, batch_size=12)
    shift = meter.measure(model)
    with ablate(model, make_basis()):
        ablated = score(model, make_probes()[:2], parallel)
    return *scores, shift, ablated


@pytest.fixture(scope="module", params=[2, 3])
def world(request):
    return run_distributed(_sharded, request.param)


def test_world_size_and_sharding_do_not_matter(models, alone, world):
    base, model = models
    parallel = init_parallel(ParallelConfig())
    shift = ShiftMeter(base, make_basis(), make_probes(), parallel, batch_size=64).measure(model)
    with ablate(model, make_basis()):
        ablated = score(model, make_probes()[:2], parallel)
    for base_scores, scores, rank_shift, rank_ablated in world:
        for expected, found in ((alone[0], base_scores), (alone[1], scores), (ablated, rank_ablated)):
            assert expected.keys() == found.keys()
            for name in expected:
                assert found[name]["rows"] == pytest.approx(expected[name]["rows"], rel=1e-5, abs=1e-9)
                assert found[name]["value"] == pytest.approx(expected[name]["value"], rel=1e-5, abs=1e-9)
        assert rank_shift["tokens"] == shift["tokens"]
        for key, entry in shift["weights"].items():
            assert rank_shift["weights"][key]["basis"] == pytest.approx(entry["basis"], rel=1e-4)
            assert rank_shift["weights"][key]["random"] == pytest.approx(entry["random"], rel=1e-4)
    assert all(rank == world[0] for rank in world)
