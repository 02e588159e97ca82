"""Detection from checkpoints that DeepSpeed and torch.distributed.checkpoint wrote on several ranks: the directions are
those of what the engine itself says that it had trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from grasp_dist.basis import SpuriousBasis, model_fingerprint
from grasp_dist.detection import detect_basis, detect_difference, read_update
from grasp_dist.detection.sources import base_names, open_source
from grasp_dist.detection.sources.source import TensorSource
from grasp_dist.errors import InputError
from tests.detection.adapters import make_adapter
from tests.detection.checkpoint_cases import ALPHA, RANK, SLOW, dense_updates, made, oracle, universal
from tests.detection.largest_tensor import LargestTensor
from tests.detection.peak_memory import peak_memory
from tests.tiny_models import tiny_model

O_PROJ = "model.layers.0.self_attn.o_proj.weight"
LORA = ["dcp-app", "dcp-lora", "dcp-safetensors", "dcp-consolidated", "own", "zero2-bf16-excluded", "zero3"]
FULL = ["dcp-full", "own-full", "zero1-full-bf16"]
SLOW_FULL = [name for name in SLOW if "full" in name]
SLOW_LORA = [name for name in SLOW if "full" not in name]


def folder_of(name: str, which: str = "quick") -> Path:
    folder = made(which) / name
    return folder / "step-00000003" if name.startswith("own") else folder


def alpha_of(name: str) -> float | None:
    return None if name.startswith("own") else ALPHA  # its own record tells


def check_against(basis: SpuriousBasis, updates: dict[str, torch.Tensor], rank: int, tolerance: float = 1e-5) -> None:
    """The basis holds the leading singular vectors of these updates, and of no others."""
    assert set(basis.weights) == set(updates)
    for name, update in updates.items():
        u, s, vh = torch.linalg.svd(update, full_matrices=False)
        assert torch.allclose(basis.singular_values(name).double()[:rank], s[:rank], rtol=1e-4)
        for side, expected in (("write", u), ("read", vh.mT)):
            found = basis.tensor(name, side).double()
            assert found.shape == (expected.shape[0], rank)
            cosines = (found * expected[:, :rank]).sum(0).abs()
            assert torch.allclose(cosines, torch.ones(rank).double(), atol=tolerance), (name, side)


def check_lora(name: str, which: str = "quick") -> None:
    folder = folder_of(name, which)
    basis = detect_basis(folder, rank=2, side="both", lora_alpha=alpha_of(name))
    check_against(basis, dense_updates(made(which) / name, made(which) / "base"), 2)


def check_full(name: str, which: str = "quick") -> None:
    rounded = torch.bfloat16 if "bf16" in name else None
    updates = dense_updates(made(which) / name, made(which) / "base", rounded)
    linear = {n: update for n, update in updates.items() if "proj" in n}
    basis = detect_difference(folder_of(name, which), made(which) / "base", rank=2, side="both", modules="all")
    check_against(basis, linear, 2)


@pytest.mark.parametrize("name", LORA)
def test_lora_of_every_kind_of_checkpoint(name: str) -> None:
    check_lora(name)


@pytest.mark.parametrize("name", FULL)
def test_full_fine_tunes_of_every_kind_of_checkpoint(name: str) -> None:
    check_full(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SLOW_LORA, *(name for name in LORA if "zero" not in name)])
def test_lora_of_every_stage(name: str) -> None:
    check_lora(name, "slow")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SLOW_FULL, *(name for name in FULL if "zero" not in name)])
def test_full_fine_tunes_of_every_stage(name: str) -> None:
    check_full(name, "slow")


def test_universal_checkpoints_are_those_that_they_were_made_of() -> None:
    source = made() / "zero2-bf16-excluded"
    plain = detect_basis(source, rank=2, lora_alpha=ALPHA)
    for folder in (universal(source), next(universal(source).glob("*_step3"), universal(source) / "global_step3")):
        assert detect_basis(folder, rank=2, lora_alpha=ALPHA).fingerprint() == plain.fingerprint()


@pytest.mark.slow
def test_universal_checkpoints_of_stage_3_and_of_full_fine_tunes() -> None:
    plain = detect_basis(made() / "zero3", rank=2, lora_alpha=ALPHA)
    assert detect_basis(universal(made() / "zero3"), rank=2, lora_alpha=ALPHA).fingerprint() == plain.fingerprint()
    source, base = made() / "zero1-full-bf16", made() / "base"
    again = detect_difference(universal(source), base, rank=2, modules="all")
    assert again.fingerprint() == detect_difference(source, base, rank=2, modules="all").fingerprint()


def test_a_step_folder_is_as_good_as_the_root_of_a_zero_checkpoint() -> None:
    root = made() / "zero3"
    bases = [detect_basis(path, rank=2, lora_alpha=ALPHA) for path in (root, root / "global_step3")]
    assert bases[0].fingerprint() == bases[1].fingerprint()


def test_no_matrix_of_a_weights_size_is_made() -> None:
    """Factors only, although the checkpoint has the whole model: (40, 4) in fp64 against (24, 40) in fp32."""
    for name in ("dcp-app", "dcp-safetensors", "own"):
        with LargestTensor() as seen:
            detect_basis(folder_of(name), rank=4, side="both", lora_alpha=alpha_of(name))
        assert 0 < seen.nbytes <= 8 * 40 * 4


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the process' memory from /proc")
def test_a_zero_checkpoint_is_not_read_whole(tmp_path: Path) -> None:
    """The frozen model in its files, 256 MB, stays on the disk."""
    shutil.copytree(made() / "zero3", tmp_path / "checkpoint")
    for path in (tmp_path / "checkpoint" / "global_step3").glob("*_model_states.pt"):
        content = torch.load(path, weights_only=True)
        content["frozen_param_fragments"]["base_model.model.large"] = torch.ones(2**25)
        torch.save(content, path)
    call = f"detect_basis({str(tmp_path / 'checkpoint')!r}, rank=2, lora_alpha=6)"
    assert peak_memory("from grasp_dist.detection import detect_basis", call) < 32


def test_settings_come_from_the_adapter_config_beside_the_checkpoint(tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter", r=RANK, lora_alpha=12, use_rslora=True, base_model_name_or_path="org/base")
    plain = detect_basis(made() / "zero3", rank=2, lora_alpha=ALPHA)
    for place, name in (("inside", "zero3"), ("beside the step", "zero3"), ("beside", "dcp-lora")):
        root = tmp_path / place
        shutil.copytree(made() / name, root / "checkpoint")
        config = root / ("checkpoint" if place != "beside" else "") / "adapter_config.json"
        shutil.copy(tmp_path / "adapter" / "adapter_config.json", config)
        source = root / "checkpoint" / ("global_step3" if place == "beside the step" else "")
        basis = detect_basis(source, rank=2)
        assert basis.provenance["source"].endswith(str(config))
        if name == "zero3":  # rank-stabilised: 12 / sqrt(4) against 6 / 4
            assert torch.allclose(basis.singular_values(O_PROJ), 4 * plain.singular_values(O_PROJ), rtol=1e-5)
        with pytest.raises(InputError, match="has lora_alpha 12, not 6"):
            detect_basis(source, rank=2, lora_alpha=ALPHA)
        settings = json.loads(config.read_text())
        config.write_text(json.dumps(settings | {"use_dora": True}))
        with pytest.raises(InputError, match="use_dora"):
            detect_basis(source, rank=2)
        config.write_text(json.dumps(settings | {"r": 5}))
        with pytest.raises(InputError, match="rank 5"):
            detect_basis(source, rank=2)


def test_an_adapter_directory_stays_one(tmp_path: Path) -> None:
    """The Hugging Face Trainer leaves an adapter and a DeepSpeed checkpoint in one folder: the adapter is read."""
    make_adapter(tmp_path)
    plain = detect_basis(tmp_path, rank=2)
    shutil.copytree(made() / "zero3", tmp_path, dirs_exist_ok=True)
    assert detect_basis(tmp_path, rank=2).fingerprint() == plain.fingerprint()
    assert "source" not in plain.provenance
    with pytest.raises(InputError, match="not 7"):
        detect_basis(tmp_path, rank=2, lora_alpha=7)


def test_provenance() -> None:
    basis = detect_basis(made() / "dcp-lora", rank=2, lora_alpha=ALPHA, base_model=made() / "base")
    assert basis.provenance["base_model"]["hash"] == model_fingerprint(made() / "base")
    assert basis.provenance["source"] == "torch.distributed.checkpoint directory, settings from lora_alpha"
    assert basis.provenance["method"] == "one_shot"
    update = read_update(made() / "dcp-app", lora_alpha=ALPHA)
    assert basis.provenance["adapter_hash"] == update.hash  # the same factors, among other things
    assert read_update(made() / "dcp-app", lora_alpha=7).hash != update.hash
    own = detect_basis(folder_of("own"), rank=2).provenance
    assert own["base_model"] == {"id": "org/base", "revision": "v1", "hash": "0" * 64}
    assert own["source"] == "checkpoint of step 3, settings from the checkpoint"


def test_the_base_model_must_fit(tmp_path: Path) -> None:
    tiny_model("llama", intermediate_size=48).save_pretrained(tmp_path / "wider")
    tiny_model("gpt_neox").save_pretrained(tmp_path / "neox")
    with pytest.raises(InputError, match=r"down_proj.*\(24, 40\).*\(24, 48\).*another base model"):
        detect_basis(made() / "zero3", rank=2, lora_alpha=ALPHA, base_model=tmp_path / "wider")
    with pytest.raises(InputError, match="another base model"):
        detect_basis(made() / "zero3", rank=2, lora_alpha=ALPHA, base_model=tmp_path / "neox")


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("dcp-lora", {}, r"does not say how its adapter is scaled.*adapter_config\.json.*--lora-alpha"),
        ("dcp-lora", {"lora_alpha": -1.0}, "no scale"),
        ("dcp-lora", {"lora_alpha": 6, "rank": 5}, "rank 5"),
        ("dcp-full", {"lora_alpha": 6}, r"holds no LoRA factors; give a full fine-tune as --tuned"),
        ("zero1-full-bf16", {"lora_alpha": 6}, "holds no LoRA factors"),
        ("own-full", {}, "holds no LoRA factors"),
        ("own", {"lora_alpha": 5}, "not 5"),
    ],
)
def test_what_cannot_be_read_as_lora(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        detect_basis(folder_of(name), **{"rank": 2, **arguments})
    assert str(made() / name) in str(caught.value)


def test_directories_that_are_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; give the directory of"):
        detect_basis(tmp_path / "nowhere", rank=1)
    with pytest.raises(InputError, match=r"no checkpoint that is known here.*adapter_model\.safetensors"):
        detect_basis(tmp_path, rank=1)
    (tmp_path / "weights.pt").write_bytes(b"x")
    with pytest.raises(InputError, match=r"weights\.pt is a pickle.*not opened"):
        detect_basis(tmp_path, rank=1)
    with pytest.raises(InputError, match="is a file"):
        detect_basis(tmp_path / "weights.pt", rank=1)


@pytest.mark.parametrize(
    ("name", "gone", "message"),
    [
        ("zero3", "*pp_rank_1_*optim_states.pt", r"saved by \[2\] ranks, and 1"),
        ("zero3", "*pp_rank_0_*optim_states.pt", "lacks the file of rank 0"),
        ("zero3", "*optim_states.pt", r"no \*_optim_states\.pt"),
        ("zero3", "*model_states.pt", "which is no checkpoint"),
        ("zero2-bf16-excluded", "*pp_rank_1_*optim_states.pt", r"saved by \[2, 2\] ranks|saved by \[2\] ranks"),
        ("dcp-lora", "__1_0.distcp", "cannot be read"),
        ("dcp-safetensors", "shard-00001*", "is not whole"),
        ("own", "shard-00002*", "is missing"),
        ("own", "checkpoint.json", "unfinished"),
    ],
)
def test_a_missing_file_is_named(tmp_path: Path, name: str, gone: str, message: str) -> None:
    folder = tmp_path / folder_of(name).name
    shutil.copytree(folder_of(name), folder)
    files = [path for path in folder.rglob(gone) if path.is_file()]
    assert files
    for path in files:
        path.unlink()
    with pytest.raises(InputError, match=message) as caught:
        detect_basis(folder, rank=1, lora_alpha=alpha_of(name))
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("zero_pp_rank_0_mp_rank_01_optim_states.pt", "model cut over ranks.*ds_to_universal"),
        ("layer_00-model_00-model_states.pt", "pipeline"),
    ],
)
def test_other_parallelism_is_refused(tmp_path: Path, added: str, message: str) -> None:
    shutil.copytree(made() / "zero3", tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "global_step3" / added).write_bytes(b"")
    with pytest.raises(InputError, match=message):
        detect_basis(tmp_path / "checkpoint", rank=1, lora_alpha=ALPHA)


def test_files_of_two_trainings_do_not_fit_together(tmp_path: Path) -> None:
    shutil.copytree(made() / "zero3", tmp_path / "checkpoint")
    states = tmp_path / "checkpoint" / "global_step3" / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    content = torch.load(states, weights_only=True)
    first = content["param_shapes"][0]
    first[next(iter(first))] = torch.Size([4, 25])
    torch.save(content, states)
    with pytest.raises(InputError, match="does not fit together"):
        detect_basis(tmp_path / "checkpoint", rank=1, lora_alpha=ALPHA)


def test_several_steps_without_latest(tmp_path: Path) -> None:
    for step in ("global_step3", "global_step6"):
        shutil.copytree(made() / "zero3" / "global_step3", tmp_path / step)
    with pytest.raises(InputError, match="several steps"):
        detect_basis(tmp_path, rank=1, lora_alpha=ALPHA)
    shutil.rmtree(tmp_path / "global_step6")
    assert len(detect_basis(tmp_path, rank=1, lora_alpha=ALPHA)) == 4


def test_what_was_trained_besides_lora_is_refused(tmp_path: Path) -> None:
    trained = oracle(made() / "dcp-lora")
    for name in ("model.norm.modules_to_save.default.weight", "model.layers.0.mlp.down_proj.lora_magnitude_vector"):
        save_file(trained | {name: torch.ones(3)}, tmp_path / "model.safetensors")
        with pytest.raises(InputError, match=name):
            detect_basis(tmp_path, rank=1, lora_alpha=ALPHA)
    renamed = {name.replace("default", "other"): tensor + 1 for name, tensor in trained.items()}
    save_file(trained | renamed, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"several adapters \(default, other\)"):
        detect_basis(tmp_path, rank=1, lora_alpha=ALPHA)
    save_file({name: torch.zeros_like(tensor) for name, tensor in trained.items()}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="learnt nothing"):
        detect_basis(tmp_path, rank=1, lora_alpha=ALPHA)
    save_file({name: tensor * float("nan") for name, tensor in trained.items()}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="NaN"):
        detect_basis(tmp_path, rank=1, lora_alpha=ALPHA)


def _source(*keys: str) -> TensorSource:
    return TensorSource(Path("checkpoint"), "test", dict.fromkeys(keys, (1, 1)), lambda name: torch.ones(1, 1))


LAYER = "model.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (LAYER, LAYER),
        (f"model.{LAYER}", LAYER),
        (f"app.model.{LAYER}", LAYER),
        (f"module.{LAYER}", LAYER),
        (f"base_model.model.{LAYER}", LAYER),
        (f"app.model.base_model.model.{LAYER}", LAYER),
        (f"app.model._orig_mod.base_model.model._fsdp_wrapped_module.{LAYER}", LAYER),
        ("base_model.model.model.layers.0.mlp.down_proj.base_layer.weight", LAYER),
        ("model.transformer.h.0.mlp.c_proj.weight", "transformer.h.0.mlp.c_proj.weight"),
        ("state.model.gpt_neox.layers.0.attention.dense.weight", "gpt_neox.layers.0.attention.dense.weight"),
        ("model.model.decoder.layers.0.fc2.weight", "model.decoder.layers.0.fc2.weight"),
        ("model.model.language_model.layers.0.fc2.weight", "model.language_model.layers.0.fc2.weight"),
    ],
)
def test_prefixes_of_names(key: str, name: str) -> None:
    assert base_names(_source(key), [key], None) == {name: key}
    assert base_names(_source(key), [key], {name, "lm_head.weight"}) == {name: key}


def test_names_that_cannot_be_told() -> None:
    with pytest.raises(InputError, match="--base-model"):
        base_names(_source(), ["trunk.0.out.weight"], None)
    assert base_names(_source(), ["net.trunk.0.out.weight"], {"trunk.0.out.weight"}) == {
        "trunk.0.out.weight": "net.trunk.0.out.weight"
    }
    with pytest.raises(InputError, match="none of them is a weight of the base model"):
        base_names(_source(), [f"model.{LAYER}"], {"trunk.0.out.weight"})
    with pytest.raises(InputError, match="holds the weights twice"):
        base_names(_source(), [f"student.{LAYER}", f"teacher.{LAYER}"], None)
    keys = [f"app.model.{LAYER}", f"app.ema.{LAYER}", f"optimizer.exp_avg.{LAYER}", "app.model.lm_head.weight"]
    assert base_names(_source(), keys, None) == {LAYER: keys[0], "lm_head.weight": keys[3]}


def test_bit_for_bit_what_torch_would_load() -> None:
    """The shards are put together as torch.distributed.checkpoint itself does, whatever is in them."""
    import torch.distributed.checkpoint as dcp

    folder = made() / "dcp-app"
    source = open_source(folder)
    tensors = {name: torch.empty(shape, dtype=source.read(name).dtype) for name, shape in source.shapes.items()}
    expected = {name: tensor.clone() for name, tensor in tensors.items()}
    dcp.load(expected, checkpoint_id=folder, no_dist=True)
    assert len(expected) > 40
    for name, tensor in expected.items():
        assert torch.equal(source.read(name), tensor), name


@pytest.mark.parametrize("name", ["odd-zero2-aligned", "odd-zero3"])
def test_parameters_that_ranks_cannot_share_evenly(name: str) -> None:
    """Padding at the end of every parameter (stage 3), and behind every one (alignment)."""
    source, expected = open_source(made() / name), oracle(made() / name)
    assert source.shapes.keys() == expected.keys()
    assert any(tensor.numel() % 2 for tensor in expected.values())
    for key, tensor in expected.items():
        assert torch.equal(source.read(key), tensor), key


def test_frozen_weights_are_not_in_the_update() -> None:
    """Of a ZeRO checkpoint it is known what was trained; here one down_proj was frozen."""
    basis = detect_difference(made() / "zero1-full-bf16", made() / "base", rank=1)
    assert "model.layers.1.mlp.down_proj.weight" not in basis
    assert "model.layers.0.mlp.down_proj.weight" in basis
    assert "model.layers.1.mlp.down_proj.weight" not in oracle(made() / "zero1-full-bf16")
