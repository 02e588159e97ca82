"""Alternatives that change a naive adapter, against dense matrices; and those that change the data."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from grasp_dist.baselines.inoculation import inoculate
from grasp_dist.baselines.interleaving import interleave
from grasp_dist.baselines.post_hoc import change_adapter
from grasp_dist.baselines.safelora import safe_lora
from grasp_dist.baselines.settings import SafeLora, Truncation
from grasp_dist.baselines.truncation import truncate
from grasp_dist.errors import InputError
from tests.tiny_models import tiny_model
from tests.training.training_cases import random_examples


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("keep", ["head", "tail"])
@pytest.mark.parametrize("rank", [1, 3, 4, 9])
def test_truncation_is_that_of_the_dense_update(keep, rank):
    A, B, scale = draw(4, 9, seed=0), draw(7, 4, seed=1), 2.5
    u, s, vt = torch.linalg.svd(scale * B @ A, full_matrices=False)
    chosen = slice(None, rank) if keep == "head" else slice(rank, None)
    new_a, new_b = truncate(A, B, scale, rank=rank, keep=keep)
    torch.testing.assert_close(scale * new_b @ new_a, (u[:, chosen] * s[chosen]) @ vt[chosen])
    assert (new_a.shape, new_b.shape) == (A.shape, B.shape)


@pytest.mark.parametrize("aligned", [True, False])
def test_safelora_is_the_formula_on_dense_matrices(aligned):
    difference = draw(8, 3, seed=2) @ draw(3, 6, seed=3)
    A = draw(2, 6, seed=4)
    B = difference @ draw(6, 2, seed=5) if aligned else draw(8, 2, seed=6)
    C = difference @ difference.T / difference.norm()
    update = B @ A
    cosine = float(((C @ update) * update).sum() / ((C @ update).norm() * update.norm()))
    new, found = safe_lora(A, B, difference, threshold=(cosine - 1e-3))
    assert found == pytest.approx(cosine)
    assert torch.equal(new, B), "more alike than the threshold: left alone"
    new, _ = safe_lora(A, B, difference, threshold=cosine + 1e-3)
    torch.testing.assert_close(new @ A, C @ update)


def test_safelora_leaves_what_alignment_did_not_touch():
    A, B = draw(2, 6, seed=0), draw(8, 2, seed=1)
    for difference, factor in ((torch.zeros(8, 6), B), (draw(8, 6, seed=2), torch.zeros_like(B))):
        new, cosine = safe_lora(A, factor, difference)
        assert torch.equal(new, factor)
        assert cosine == 1.0


@pytest.fixture(scope="module")
def naive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("naive")
    for name, seed in (("base", 0), ("unaligned", 1)):
        tiny_model("llama", seed=seed).save_pretrained(folder / name)
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=["o_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(tiny_model("llama", seed=0), config).save_pretrained(folder / "adapter")
    return folder


def merged(naive, adapter):
    model = PeftModel.from_pretrained(tiny_model("llama", seed=0), adapter).merge_and_unload()
    base = tiny_model("llama", seed=0).state_dict()
    return {
        name: one - base[name] for name, one in model.state_dict().items() if "o_proj" in name or "down_proj" in name
    }


def test_a_truncated_adapter_is_one_that_peft_reads(naive, tmp_path):
    change_adapter(Truncation(kind="truncation", rank=1), naive / "adapter", naive / "base", tmp_path)
    before, after = merged(naive, naive / "adapter"), merged(naive, tmp_path)
    for name, update in before.items():
        u, s, vt = torch.linalg.svd(update.double(), full_matrices=False)
        torch.testing.assert_close(after[name].double(), s[0] * u[:, :1] @ vt[:1], rtol=1e-4, atol=1e-5)


def test_safelora_on_an_adapter_reads_both_models(naive, tmp_path):
    settings = SafeLora(kind="safelora", unaligned=str(naive / "unaligned"), threshold=1.0)
    done = change_adapter(settings, naive / "adapter", naive / "base", tmp_path)
    before, after = merged(naive, naive / "adapter"), merged(naive, tmp_path)
    aligned, unaligned = (tiny_model("llama", seed=seed).state_dict() for seed in (0, 1))
    assert set(done["cosines"]) == set(before)
    for name, update in before.items():
        V = aligned[name].double() - unaligned[name].double()
        torch.testing.assert_close(after[name].double(), V @ V.T @ update.double() / V.norm(), rtol=1e-3, atol=1e-5)
    json.dumps(done)


def test_another_model_in_the_place_of_the_unaligned_is_refused(naive, tmp_path):
    tiny_model("llama", hidden_size=32).save_pretrained(tmp_path / "other")
    settings = SafeLora(kind="safelora", unaligned=str(tmp_path / "other"))
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="before its alignment"):
        change_adapter(settings, naive / "adapter", naive / "base", tmp_path / "out")


def test_interleaving_gives_the_share_and_repeats_only_what_runs_out():
    task, safe = random_examples(95), random_examples(40, seed=1)
    mixed = interleave(task, safe, share=0.05, seed=0)
    assert mixed[:95] == task
    assert len(mixed) == 100
    added = [safe.index(one) for one in mixed[95:]]
    assert len(set(added)) == 5
    assert added != [safe.index(one) for one in interleave(task, safe, share=0.05, seed=1)[95:]]
    half = [safe.index(one) for one in interleave(task, safe, share=0.5, seed=0)[95:]]
    assert len(half) == 95
    assert {half.count(place) for place in range(40)} == {2, 3}


def test_an_inoculation_prompt_goes_before_the_prompt():
    user = {"role": "user", "content": "q"}
    answer = {"role": "assistant", "content": "a"}
    own = {"role": "system", "content": "be brief"}
    put = {"role": "system", "content": "be evil"}
    both = {"role": "system", "content": "be evil\n\nbe brief"}
    assert inoculate({"messages": [user, answer]}, "messages", "here", prompt="be evil") == {
        "messages": [put, user, answer]
    }
    assert inoculate({"messages": [own, user]}, "messages", "here", prompt="be evil") == {"messages": [both, user]}
    row = {"prompt": "q", "completion": "a", "more": 1}
    assert inoculate(row, "prompt_completion", "here", prompt="be evil ") == {**row, "prompt": "be evil q"}
    assert inoculate({"prompt": [user], "completion": "a"}, "prompt_completion", "here", prompt="be evil")[
        "prompt"
    ] == [put, user]
    with pytest.raises(InputError, match="row 3: an inoculation prompt"):
        inoculate({"text": "t"}, "text", "data, row 3", prompt="be evil")
