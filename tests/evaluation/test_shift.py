"""The activations' shift against whole activations, one prompt at a time."""

import pytest
import torch

from grasp_dist.basis import SpuriousBasis
from grasp_dist.config import ParallelConfig
from grasp_dist.errors import InputError
from grasp_dist.evaluation.shift import ShiftMeter
from grasp_dist.training.parallel import init_parallel
from tests.evaluation.evaluation_cases import make_basis, make_probes, tuned_model

WEIGHT = "model.layers.1.mlp.down_proj.weight"


@torch.no_grad()
def _activations(model, prompts):
    """All tokens' (inputs, outputs) of the second layer's down_proj."""
    seen = []
    module = model.base_model.model.model.layers[1].mlp.down_proj
    handle = module.register_forward_hook(lambda _, args, output: seen.append((args[0][0], output[0])))
    for prompt in prompts:
        model(input_ids=torch.tensor([prompt]))
    handle.remove()
    return tuple(torch.cat(side).double() for side in zip(*seen, strict=True))


def test_shift_is_the_mean_length_of_the_projected_change():
    base, model = tuned_model(tuned=False).eval(), tuned_model().eval()
    probes, basis = make_probes(), make_basis()
    found = ShiftMeter(base, basis, probes, init_parallel(ParallelConfig()), batch_size=3, seed=7).measure(model)

    drift = [
        row.prompt or row.continuations[0] for probe in probes if probe.config.role == "drift" for row in probe.rows
    ]
    prompts = [list(prompt) for prompt in set(map(tuple, drift))]
    assert found["prompts"] == len(prompts)
    assert found["tokens"] == sum(map(len, prompts))
    before, after = _activations(base, prompts), _activations(model, prompts)
    random = basis.random_like(7)
    for side, place in (("read", 0), ("write", 1)):
        moved = after[place] - before[place]
        entry = found["weights"][f"{WEIGHT}.{side}"]
        for name, source in (("basis", basis), ("random", random)):
            expected = (moved @ source.tensor(WEIGHT, side).double()).norm(dim=1).mean()
            assert entry[name] == pytest.approx(float(expected), rel=1e-4)
        assert entry["ratio"] == pytest.approx(entry["basis"] / entry["random"])
    pooled = [entry["basis"] for entry in found["weights"].values()]
    assert found["pooled"]["basis"] == pytest.approx(sum(pooled) / len(pooled))


def test_the_base_does_not_move_and_says_so():
    base = tuned_model(tuned=False)
    meter = ShiftMeter(base, make_basis(), make_probes(), init_parallel(ParallelConfig()))
    found = meter.measure(base)
    assert found["pooled"] == {"basis": 0.0, "random": 0.0, "ratio": None}


def test_prompts_are_limited_and_hooks_removed():
    base = tuned_model(tuned=False)
    meter = ShiftMeter(base, make_basis(), make_probes(), init_parallel(ParallelConfig()), limit=4)
    assert meter.measure(base)["prompts"] <= 4
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def test_a_basis_of_another_model_is_refused():
    other = SpuriousBasis.from_tensors({"model.layers.1.mlp.up_proj.weight.write": torch.eye(24)[:, :2]})
    with pytest.raises(InputError, match=r"up_proj\.weight"):
        ShiftMeter(tuned_model(), other, make_probes(), init_parallel(ParallelConfig()))
