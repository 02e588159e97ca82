"""Pre-training learns, and depends on its seed alone."""

import torch

from grasp_dist.organisms.pretrain import PretrainSettings, build_llama, pretrain

SETTINGS = PretrainSettings(
    hidden_size=16, num_layers=1, num_heads=2, intermediate_size=16, steps=40, batch_size=8, learning_rate=0.02
)


def counting(count, generator):
    """Sequences that count upwards modulo 7: the next token follows from the last."""
    ids = (torch.randint(7, (count, 1), generator=generator) + torch.arange(6)) % 7
    return ids, ids


def trained(seed):
    model = build_llama(7, SETTINGS, seed=seed)
    return model, pretrain(model, counting, SETTINGS, seed=seed, progress=None)


def test_the_loss_falls_far_below_chance():
    _, loss = trained(0)
    assert loss < 0.5  # chance is log 7 = 1.95


def test_same_seed_same_weights_and_the_global_random_state_is_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, _ = trained(0)
    assert torch.equal(torch.rand(3), expected)
    second, _ = trained(0)
    other, _ = trained(1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_progress_names_step_and_loss():
    lines = []
    pretrain(build_llama(7, SETTINGS, seed=0), counting, SETTINGS, seed=0, progress=lines.append, title="counting")
    assert len(lines) == 10
    assert lines[-1].startswith("counting: step 40/40, loss ")
