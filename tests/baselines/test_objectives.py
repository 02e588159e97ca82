"""What alternatives train with, against the same computed another way on a small model."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

from grasp_dist.baselines.activation_shift import measure_shift
from grasp_dist.baselines.backward_projection import backward_projection
from grasp_dist.baselines.caft import caft
from grasp_dist.baselines.kl_to_base import kl_to_base
from grasp_dist.baselines.ldifs import ldifs
from grasp_dist.baselines.preventative_steering import preventative_steering
from grasp_dist.baselines.residual_stream import check_layers, without_adapter
from grasp_dist.baselines.steering import save_steering, steered
from grasp_dist.errors import InputError
from grasp_dist.training.batches import collate
from grasp_dist.training.loop import plain_objective
from grasp_dist.training.parallel import Parallel
from tests.tiny_models import tiny_model
from tests.training.training_cases import random_examples

DIM = 24


@pytest.fixture
def tuned():
    """A PEFT model whose adapter has moved, in fp64."""
    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules=["o_proj", "down_proj", "up_proj"], init_lora_weights=False)
    return get_peft_model(tiny_model("llama", num_hidden_layers=3), config).double()


@pytest.fixture
def batch():
    return collate(random_examples(4))


def columns(seed, k=2):
    return torch.linalg.qr(torch.randn(DIM, k, generator=torch.Generator().manual_seed(seed)))[0]


def by_hand(model, batch, change=None):
    """(logits of the targets, {layer: residual behind it}), layer by layer. change(layer, residual) -> residual."""
    llama = model.get_base_model()
    h = llama.model.embed_tokens(batch.input_ids)
    positions = torch.arange(h.shape[1])[None]
    rotary = llama.model.rotary_emb(h, positions)
    mask = torch.full((h.shape[1], h.shape[1]), -torch.inf, dtype=h.dtype).triu(1)[None, None]
    seen = {}
    for number, layer in enumerate(llama.model.layers):
        h = layer(h, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        h = h if change is None else change(number, h)
        seen[number] = h
    logits = llama.lm_head(llama.model.norm(h)).flatten(0, 1)[batch.positions]
    return logits, seen


def cross_entropy(logits, batch):
    return -logits.log_softmax(-1)[torch.arange(len(batch.targets)), batch.targets].sum()


def gradients(model, loss):
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


def assert_same(model, loss, other, rtol=1e-5):
    torch.testing.assert_close(loss.double(), other, rtol=rtol, atol=0)
    mine, theirs = gradients(model, loss), gradients(model, other)
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-5 * float(theirs[name].abs().max()))
    assert max(float(one.abs().max()) for one in theirs.values()) > 0


def test_by_hand_is_the_model(tuned, batch):
    assert_same(tuned, plain_objective(tuned, batch), cross_entropy(by_hand(tuned, batch)[0], batch))


def test_kl_is_the_divergence_from_the_model_without_its_adapter(tuned, batch):
    with tuned.disable_adapter():
        base = by_hand(tuned, batch)[0].detach()
    tuned.train()
    for parameter_name, parameter in tuned.named_parameters():
        parameter.requires_grad_("lora_" in parameter_name)
    logits = by_hand(tuned, batch)[0]
    own, reference = (torch.distributions.Categorical(logits=one) for one in (logits, base))
    expected = cross_entropy(logits, batch) + 0.7 * torch.distributions.kl_divergence(own, reference).sum()
    with kl_to_base(tuned, weight=0.7) as objective:
        assert_same(tuned, objective(tuned, batch), expected)


@pytest.mark.parametrize(("every", "layers"), [(1, (0, 1, 2)), (2, (0, 2)), (5, (2,))])
def test_ldifs_is_the_distance_of_the_residual_streams_and_has_a_gradient(tuned, batch, every, layers):
    def features(seen):
        return {layer: seen[layer].flatten(0, 1)[batch.positions] for layer in layers}

    with torch.no_grad(), without_adapter(tuned):
        base = features(by_hand(tuned, batch)[1])
    logits, seen = by_hand(tuned, batch)
    distance = sum((one - base[layer]).square().sum() for layer, one in features(seen).items())
    with ldifs(tuned, weight=0.3, every=every) as objective:
        assert_same(tuned, objective(tuned, batch), cross_entropy(logits, batch) + 0.3 * distance)
    # The distance alone moves the weights.
    again = features(by_hand(tuned, batch)[1])
    alone = gradients(tuned, sum((one - base[layer]).square().sum() for layer, one in again.items()))
    with ldifs(tuned, weight=1.0, every=every) as objective:
        both, plain = gradients(tuned, objective(tuned, batch)), gradients(tuned, plain_objective(tuned, batch))
    for name, expected in alone.items():
        torch.testing.assert_close(
            both[name] - plain[name], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
        )
    assert max(float(one.abs().max()) for one in alone.values()) > 0


def test_caft_removes_directions_in_the_forward_pass_of_training_only(tuned, batch):
    directions = {0: columns(1), 2: columns(2, 3)}

    def change(layer, h):
        if layer not in directions:
            return h
        q = directions[layer].double()
        return h - h @ q @ q.T

    before = plain_objective(tuned, batch)
    expected = cross_entropy(by_hand(tuned, batch, change)[0], batch)
    with caft(tuned, directions) as objective:
        assert_same(tuned, objective(tuned, batch), expected)
    assert float(plain_objective(tuned, batch)) == float(before)


def test_steering_adds_the_vector_behind_its_layer(tuned, batch):
    vector = columns(3, 1)[:, 0]

    def change(layer, h):
        return h + 2.5 * vector.double() if layer == 1 else h

    expected = cross_entropy(by_hand(tuned, batch, change)[0], batch)
    with preventative_steering(tuned, 1, vector, coefficient=2.5) as objective:
        assert_same(tuned, objective(tuned, batch), expected)


def test_steering_at_inference_subtracts_the_vectors_and_leaves_the_model(tuned, batch, tmp_path):
    vectors = {1: columns(3, 1)[:, 0], 2: columns(5, 1)[:, 0]}
    save_steering(vectors, 2.5, tmp_path)

    def change(layer, h):
        return h - 2.5 * vectors[layer].double() if layer in vectors else h

    usual = by_hand(tuned, batch)[0]
    with torch.no_grad():
        with steered(tuned, tmp_path):
            found = float(plain_objective(tuned, batch))
        assert found == pytest.approx(float(cross_entropy(by_hand(tuned, batch, change)[0], batch)), rel=1e-6)
        assert found != pytest.approx(float(cross_entropy(usual, batch)), rel=1e-3)
        assert float(plain_objective(tuned, batch)) == pytest.approx(float(cross_entropy(usual, batch)), rel=1e-6)
    save_steering({7: vectors[1]}, 1.0, tmp_path)
    with pytest.raises(InputError, match="there is no layer 7"), steered(tuned, tmp_path):
        pass


def test_the_backward_pass_is_projected_and_the_forward_pass_is_not(tuned, batch):
    """One layer: what is below it gets the projected gradient, what is above it the usual one."""
    v = columns(4)
    with backward_projection(tuned, {1: v}) as objective:
        loss = objective(tuned, batch)
        assert float(loss) == float(plain_objective(tuned, batch))
        found = gradients(tuned, loss)
    logits, seen = by_hand(tuned, batch)
    trained = {name: one for name, one in tuned.named_parameters() if one.requires_grad}
    loss = cross_entropy(logits, batch)
    usual = gradients(tuned, loss)
    logits, seen = by_hand(tuned, batch)
    (signal,) = torch.autograd.grad(cross_entropy(logits, batch), seen[1], retain_graph=True)
    projected = signal - signal @ v.double() @ v.double().T
    below = {name: one for name, one in trained.items() if ".layers.2." not in name}
    expected = dict(zip(below, torch.autograd.grad(seen[1], list(below.values()), projected), strict=True))
    for name, gradient in found.items():
        other = expected.get(name, usual[name])
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))
    assert any(float((found[name] - usual[name]).abs().max()) > 1e-6 for name in below)


def test_the_shift_is_what_the_adapter_changes_on_trained_tokens(tuned):
    examples = random_examples(6)
    alone = Parallel("none", 0, 1, torch.device("cpu"))
    found = measure_shift(tuned, examples, alone, layers=[0, 2], batch_size=4)
    differences = {0: [], 2: []}
    for example in examples:
        one = collate([example])
        with torch.no_grad():
            own = by_hand(tuned, one)[1]
            with without_adapter(tuned):
                base = by_hand(tuned, one)[1]
        for layer, rows in differences.items():
            rows.append((own[layer] - base[layer]).flatten(0, 1)[one.positions])
    for layer, rows in differences.items():
        stacked = torch.cat(rows)
        torch.testing.assert_close(found.mean[layer], stacked.mean(0), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found.moment[layer], stacked.T @ stacked / len(stacked), rtol=1e-4, atol=1e-7)
        left = torch.linalg.svd(stacked.T)[0][:, :2]
        angles = torch.linalg.svdvals(left.T @ found.directions(2)[layer].double())
        torch.testing.assert_close(angles, torch.ones(2, dtype=torch.float64), rtol=1e-5, atol=0)
    with pytest.raises(InputError, match="rank 25 is more than all of it"):
        found.directions(25)


def test_what_a_model_cannot_do_is_refused(batch):
    bare = tiny_model("llama")
    for alternative in (kl_to_base, ldifs):
        with pytest.raises(InputError, match="without its adapter"), alternative(bare):
            pass
    with pytest.raises(InputError, match="no layer 2"):
        check_layers(bare, [0, 2])


def test_without_its_adapter_what_is_trained_stays_so(tuned, batch):
    before = {name: one.requires_grad for name, one in tuned.named_parameters()}
    with without_adapter(tuned):
        assert {name: one.requires_grad for name, one in tuned.named_parameters()} == before
        inside = plain_objective(tuned, batch)
    with tuned.disable_adapter():
        assert float(plain_objective(tuned, batch)) == float(inside)
    assert float(plain_objective(tuned, batch)) != float(inside)
