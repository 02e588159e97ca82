"""detect_difference against the exact SVD of the difference, its edge cases, and what it needs in memory."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

from grasp_dist.basis import SpuriousBasis, model_fingerprint
from grasp_dist.detection import detect_difference
from grasp_dist.detection.inspect import basis_rows, render
from grasp_dist.detection.sources import model_skeleton, open_model
from grasp_dist.errors import InputError
from tests.detection.peak_memory import peak_memory
from tests.tiny_models import tiny_model

O_PROJ = "model.layers.0.self_attn.o_proj.weight"


def spectrum_of(kind: str, size: int) -> torch.Tensor:
    steps = torch.arange(size, dtype=torch.float64)
    return {
        "fast": 0.5**steps,
        "slow": 0.95**steps,
        "equal": torch.where(steps < 5, 1.0, 0.1 * 0.9**steps),
        "low rank": torch.where(steps < 3, 2.0 - steps / 4, 0.0),
    }[kind]


def update_of(shape: tuple[int, ...], kind: str, seed: int) -> torch.Tensor:
    """A matrix with this spectrum and random singular vectors, fp64."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    small = min(shape)
    left, right = (
        torch.linalg.qr(torch.randn(n, small, generator=generator, dtype=torch.float64))[0] for n in (rows, columns)
    )
    return left * spectrum_of(kind, small) @ right.mT


def change(model: nn.Module, kind: str = "fast", size: float = 1e-2, names: str = "proj") -> None:
    """Add an update to every matching weight."""
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(model.named_parameters()):
            if names in name and parameter.ndim == 2:
                parameter.add_(size * update_of(tuple(parameter.shape), kind, seed).to(parameter.dtype))


def pair(tmp_path: Path, architecture: str = "llama", kind: str = "fast", **settings: Any) -> tuple[Path, Path]:
    model = tiny_model(architecture, **settings)
    model.save_pretrained(tmp_path / "base")
    change(model, kind, names="c_proj" if architecture == "gpt2" else "proj")
    model.save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned", tmp_path / "base"


def exact(tuned: Path, base: Path) -> dict[str, torch.Tensor]:
    after, before = (load_file(folder / "model.safetensors") for folder in (tuned, base))
    return {name: after[name].double() - before[name].double() for name in after}


def check(basis: SpuriousBasis, updates: dict[str, torch.Tensor], rank: int, tolerance: float) -> None:
    """Singular values, and each subspace by the largest angle between it and the exact one."""
    for name in basis.weights:
        u, s, vh = torch.linalg.svd(updates[name], full_matrices=False)
        assert torch.allclose(basis.singular_values(name).double(), s[:rank], rtol=tolerance), name
        for side, expected in (("write", u[:, :rank]), ("read", vh.mT[:, :rank])):
            found = basis.tensor(name, side).double()
            missed = expected - found @ (found.mT @ expected)
            assert torch.linalg.matrix_norm(missed, 2) < max(tolerance, 2e-6) ** 0.5, (name, side)


@pytest.mark.parametrize(("kind", "tolerance"), [("fast", 1e-4), ("slow", 2e-4), ("equal", 1e-4)])
def test_against_the_exact_svd(tmp_path: Path, kind: str, tolerance: float) -> None:
    """With weights large enough to be decomposed at random: 96 and more against rank 5 and its 16 more."""
    sizes = {"hidden_size": 128, "intermediate_size": 200, "num_key_value_heads": 4, "head_dim": 32}
    tuned, base = pair(tmp_path, kind=kind, **sizes)
    basis = detect_difference(tuned, base, rank=5, side="both", modules="all")
    assert len(basis) == 14
    check(basis, exact(tuned, base), 5, tolerance)
    assert basis.fingerprint() == detect_difference(tuned, base, rank=5, side="both", modules="all").fingerprint()
    other = detect_difference(tuned, base, rank=5, side="both", modules="all", seed=1)
    assert other.fingerprint() != basis.fingerprint()
    assert max(angles.max() for angles in basis.principal_angles(other).values()) < 0.1


def test_small_weights_are_decomposed_exactly(tmp_path: Path) -> None:
    tuned, base = pair(tmp_path, kind="slow")
    basis = detect_difference(tuned, base, rank=9, side="both", modules="all")
    check(basis, exact(tuned, base), 9, 1e-6)


def test_the_callers_random_numbers_are_left_alone(tmp_path: Path) -> None:
    tuned, base = pair(tmp_path, hidden_size=64, intermediate_size=80, head_dim=16)
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    detect_difference(tuned, base, rank=1)
    assert torch.equal(torch.randn(3), expected)


def test_what_is_in_the_basis(tmp_path: Path) -> None:
    tuned, base = pair(tmp_path)
    basis = detect_difference(tuned, base, rank=2)
    assert {name.split(".")[-2] for name in basis.weights} == {"o_proj", "down_proj"}
    assert basis.sides(O_PROJ) == ("write",)
    assert basis.shape(O_PROJ) == (24, 24)
    provenance = basis.provenance
    assert provenance["base_model"] == {"id": str(base), "revision": None, "hash": model_fingerprint(base)}
    assert provenance["method"] == "full_difference"
    assert provenance["settings"] == {
        "rank": 2, "side": "write", "modules": "write", "oversampling": 16, "power_iterations": 4,
    }  # fmt: skip
    assert (provenance["seeds"], provenance["source"]) == ([0], "model directory")
    norm = exact(tuned, base)[O_PROJ].norm().item()
    assert provenance["update_norm"][O_PROJ] == pytest.approx(norm, rel=1e-5)
    basis.save(tmp_path / "basis.safetensors")
    again = SpuriousBasis.load(tmp_path / "basis.safetensors")
    assert (again.fingerprint(), again.provenance) == (basis.fingerprint(), provenance)
    # Directions stand in order of importance.
    larger = detect_difference(tuned, base, rank=4).truncate(2)
    assert max(angles.max() for angles in larger.principal_angles(basis).values()) < 1e-4
    # Another fine-tune has another hash.
    weights = load_file(tuned / "model.safetensors")
    save_file(weights | {O_PROJ: weights[O_PROJ] * 1.01}, tuned / "model.safetensors")
    assert detect_difference(tuned, base, rank=2).provenance["tuned_hash"] != provenance["tuned_hash"]


def test_inspect_shows_how_much_of_the_update_is_covered(tmp_path: Path) -> None:
    tuned, base = pair(tmp_path)
    basis = detect_difference(tuned, base, rank=2)
    (row,) = (row for row in basis_rows(basis) if row.weight == O_PROJ)
    values = torch.linalg.svdvals(exact(tuned, base)[O_PROJ]).square()
    assert row.leading == pytest.approx((values[0] / values.sum()).item(), rel=1e-4)
    assert row.covered == pytest.approx((values[:2].sum() / values.sum()).item(), rel=1e-4)
    basis.save(tmp_path / "basis.safetensors")
    console = Console(file=io.StringIO(), width=160)
    render(tmp_path / "basis.safetensors", console)
    assert "tuned - base" in console.file.getvalue()  # type: ignore[attr-defined]


def test_sharded_model_directories(tmp_path: Path) -> None:
    tuned, base = pair(tmp_path)
    tiny_model("llama").save_pretrained(tmp_path / "base-parts", max_shard_size="9KB")
    assert (tmp_path / "base-parts" / "model.safetensors.index.json").is_file()
    plain = detect_difference(tuned, base, rank=2)
    assert detect_difference(tuned, tmp_path / "base-parts", rank=2).fingerprint() == plain.fingerprint()


def test_transposed_weights(tmp_path: Path) -> None:
    """GPT-2 stores its weights (in, out); and its checkpoints may leave out the names' prefix."""
    tuned, base = pair(tmp_path, "gpt2")
    basis = detect_difference(tuned, base, rank=2, side="both")
    name = "transformer.h.0.mlp.c_proj.weight"
    updates = {name: update.mT for name, update in exact(tuned, base).items() if update.ndim == 2}
    assert basis.shape(name) == (24, 96)
    check(basis, updates, 2, 1e-5)
    weights = load_file(base / "model.safetensors")
    save_file({key.removeprefix("transformer."): tensor for key, tensor in weights.items()}, base / "model.safetensors")
    assert detect_difference(tuned, base, rank=2, side="both").fingerprint() == basis.fingerprint()


def experts(folder: Path, model_type: str = "mixtral") -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        "vocab_size": 64, "hidden_size": 16, "intermediate_size": 12, "moe_intermediate_size": 12, "head_dim": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2,
        "num_local_experts": 11, "num_experts": 11, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
        "pad_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings)).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_stacked_experts(tmp_path: Path, model_type: str) -> None:
    """One set of directions per expert, under the name of the stack, however the files keep it (11 experts: the files'
    order is not the alphabet's)."""
    model = experts(tmp_path / "base", model_type)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name and parameter.ndim == 3:
                torch.manual_seed(len(name))
                parameter.add_(torch.randn_like(parameter) * torch.linspace(0.5, 1, len(parameter))[:, None, None])
    model.save_pretrained(tmp_path / "tuned")
    basis = detect_difference(tmp_path / "tuned", tmp_path / "base", rank=2, side="both", modules="all")
    stem = "model.layers.0.mlp.experts"
    assert basis.weights == (f"{stem}.down_proj", f"{stem}.gate_up_proj")
    for name in basis.weights:
        update = (model.get_parameter(name) - before[name]).detach().double()
        update = update.mT if model_type == "gpt_oss" else update
        u, _, vh = torch.linalg.svd(update, full_matrices=False)
        assert basis.shape(name) == tuple(update.shape[1:])
        for side, expected in (("write", u[..., :2]), ("read", vh.mT[..., :2])):
            found = basis.tensor(name, side).double()
            assert torch.allclose((found * expected).sum(-2).abs(), torch.ones(11, 2).double(), atol=1e-5)
    written = detect_difference(tmp_path / "tuned", tmp_path / "base", rank=2)
    assert written.weights == (f"{stem}.down_proj",)
    by_name = detect_difference(tmp_path / "tuned", tmp_path / "base", rank=2, modules=["experts.down_proj"])
    assert by_name.fingerprint() == written.fingerprint()


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_model_directories_are_read_as_transformers_reads_them(tmp_path: Path, model_type: str) -> None:
    from transformers import AutoModelForCausalLM

    experts(tmp_path, model_type)
    source = open_model(tmp_path, model_skeleton(tmp_path))
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict().items():
        assert torch.equal(source.read(name), tensor), name
        assert source.shapes[name] == tuple(tensor.shape)


def test_weights_that_learnt_less_contribute_less(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    change(model, "low rank", names="layers.0.self_attn.o_proj")
    change(model, "fast", size=1e-9, names="layers.1.mlp.down_proj")
    change(model, "fast", names="layers.0.mlp.down_proj")
    with torch.no_grad():  # held in fp64 by the file: below fp32's rounding
        weights = {name: tensor.double() for name, tensor in model.state_dict().items()}
        tiny = "model.layers.1.mlp.down_proj.weight"
        weights[tiny] = weights[tiny] + 1e-9 * update_of((24, 40), "fast", 0)
    model.save_pretrained(tmp_path / "tuned")
    save_file(weights, tmp_path / "tuned" / "model.safetensors")
    basis = detect_difference(tmp_path / "tuned", tmp_path / "base", rank=8)
    assert basis.weights == ("model.layers.0.mlp.down_proj.weight", O_PROJ)
    # Three directions are far stronger than what fp32 rounding of the tuned weights adds.
    values = basis.singular_values(O_PROJ)
    assert (values[:3] > 1e3 * values[3:].max()).all() if len(values) > 3 else len(values) == 3


def test_ranks_larger_than_a_weight(tmp_path: Path) -> None:
    tuned, base = pair(tmp_path, kind="slow", num_key_value_heads=2)
    basis = detect_difference(tuned, base, rank=20, modules="all")
    key = "model.layers.0.self_attn.k_proj.weight"
    assert basis.shape(key) == (12, 24)
    assert basis.basis_rank(key, "write") == 12
    assert basis.basis_rank(O_PROJ, "write") == 20
    with pytest.raises(InputError, match=r"rank 25 .* at most 24"):
        detect_difference(tuned, base, rank=25, modules="all")


def test_rounding_of_the_base_is_no_update(tmp_path: Path) -> None:
    """A base in fp32, and a fine-tune that was saved in bf16: what the rounding did is not what training did."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    model.bfloat16().save_pretrained(tmp_path / "same")
    with pytest.raises(InputError, match="nothing changed"):
        detect_difference(tmp_path / "same", tmp_path / "base", rank=1)
    change(model, "fast", size=4.0, names="o_proj")
    model.save_pretrained(tmp_path / "tuned")
    basis = detect_difference(tmp_path / "tuned", tmp_path / "base", rank=2, side="both")
    assert {name.split(".")[-2] for name in basis.weights} == {"o_proj"}
    start = {n: t.bfloat16().double() for n, t in load_file(tmp_path / "base" / "model.safetensors").items()}
    after = load_file(tmp_path / "tuned" / "model.safetensors")
    check(basis, {n: after[n].double() - start[n] for n in after}, 2, 1e-5)
    # Both in bf16: the same update, exactly.
    tiny_model("llama").bfloat16().save_pretrained(tmp_path / "half")
    half = detect_difference(tmp_path / "tuned", tmp_path / "half", rank=2, side="both")
    assert half.fingerprint() == basis.fingerprint()


def test_equal_models(tmp_path: Path) -> None:
    tuned, base = pair(tmp_path)
    with pytest.raises(InputError, match=r"nothing changed between .* in the 4 chosen weights"):
        detect_difference(base, base, rank=1)
    model = tiny_model("llama")
    change(model, names="up_proj")
    model.save_pretrained(tuned)
    with pytest.raises(InputError, match=r"nothing changed.*choose the modules that were trained"):
        detect_difference(tuned, base, rank=1, modules="write")


def drop(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors")


def poison(folder: Path, name: str) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name][3, 3] = float("nan")
    save_file(weights, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (lambda tuned, base: drop(tuned, O_PROJ), {}, rf"tuned has no weight '{O_PROJ}'.*another model"),
        (lambda tuned, base: drop(base, O_PROJ), {}, rf"base has no weight '{O_PROJ}'"),
        (lambda tuned, base: poison(tuned, O_PROJ), {}, rf"'{O_PROJ}' holds NaN"),
        (lambda tuned, base: tiny_model("llama", intermediate_size=48).save_pretrained(tuned), {},
         r"down_proj.weight' has shape \(24, 48\) in .*tuned, but \(24, 40\)"),
        (lambda tuned, base: tiny_model("gpt_neox").save_pretrained(tuned), {}, r"has no weight 'model\.layers\.0"),
        (lambda tuned, base: (base / "config.json").unlink(), {}, r"no readable config\.json"),
        (lambda tuned, base: None, {"rank": 0}, "rank 0"),
        (lambda tuned, base: None, {"side": "left"}, "side 'left'"),
        (lambda tuned, base: None, {"modules": ["o_porj"]}, r"no linear module 'o_porj'.*o_proj"),
        (lambda tuned, base: None, {"modules": []}, "empty"),
        (lambda tuned, base: None, {"power_iterations": -1}, "power_iterations -1"),
    ],
)  # fmt: skip
def test_models_and_arguments_that_do_not_fit(tmp_path: Path, prepare: Any, arguments: Any, message: str) -> None:
    tuned, base = pair(tmp_path)
    prepare(tuned, base)
    with pytest.raises(InputError, match=message):
        detect_difference(tuned, base, **{"rank": 1, **arguments})


def test_directories_that_hold_another_thing(tmp_path: Path) -> None:
    tuned, base = pair(tmp_path)
    with pytest.raises(InputError, match="no model directory"):
        detect_difference(tuned, tmp_path / "nowhere", rank=1)
    with pytest.raises(InputError, match="does not exist"):
        detect_difference(tmp_path / "nowhere", base, rank=1)
    lora = {"model.layers.0.mlp.down_proj.lora_A.weight": torch.ones(2, 40)}
    (tmp_path / "lora").mkdir()
    save_file(lora, tmp_path / "lora" / "model.safetensors")
    with pytest.raises(InputError, match=r"holds LoRA factors.*--adapter"):
        detect_difference(tmp_path / "lora", base, rank=1)
    config = json.loads((base / "config.json").read_text())
    code = {"model_type": "unheard-of", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (base / "config.json").write_text(json.dumps(config | code))
    (base / "code.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    with pytest.raises(InputError, match="not the directory of a causal language model"):
        detect_difference(tuned, base, rank=1)
    assert not (tmp_path / "canary").exists()


def test_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned, base = pair(tmp_path)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    quiet, terminal = io.StringIO(), Terminal()
    monkeypatch.setattr(sys, "stderr", quiet)
    plain = detect_difference(tuned, base, rank=1)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    assert detect_difference(tuned, base, rank=1).fingerprint() == plain.fingerprint()
    assert not quiet.getvalue()
    assert re.search("comparing weights", terminal.getvalue())


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the process' memory from /proc")
def test_memory_is_that_of_the_largest_weight(tmp_path: Path) -> None:
    """56 weights of 4 MiB in fp32, 224 MiB for each model: reading either whole would be seen."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 8}
    config = AutoConfig.for_model("llama", vocab_size=64, num_key_value_heads=8, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "tuned")
    setup = (
        "from grasp_dist.detection import detect_difference\n"
        "import transformers.models.llama.modeling_llama, transformers.core_model_loading\n"
        "import torch; torch.svd_lowrank(torch.randn(1024, 1024), q=24)"
    )
    call = f"detect_difference({str(tmp_path / 'tuned')!r}, {str(tmp_path / 'base')!r}, rank=8, modules='all')"
    assert peak_memory(setup, call) < 40
