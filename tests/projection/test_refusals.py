"""What cannot be protected is refused before training, by name and with a remedy."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from grasp_dist.basis import SpuriousBasis
from grasp_dist.errors import InputError
from grasp_dist.projection import GraspProjector
from grasp_dist.projection.adapters.tensors import Tensors
from tests.distributed import run_distributed
from tests.projection.projection_cases import orthonormal


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.down_proj = nn.Linear(6, 8)
        self.head = nn.Linear(8, 9, bias=False)

    def forward(self, x):
        return self.head(self.down_proj(self.embed(x)))


def _basis(name: str = "down_proj.weight", *, write: int = 8, k: int = 2, read: int = 0) -> SpuriousBasis:
    tensors = {f"{name}.write": orthonormal(write, k, 0)} if write else {}
    if read:
        tensors[f"{name}.read"] = orthonormal(read, k, 1)
    return SpuriousBasis.from_tensors(tensors)


@pytest.mark.parametrize(
    ("basis", "settings", "message"),
    [
        (_basis("down_prj.weight"), {}, r"'down_prj.weight'.*did you mean 'down_proj.weight'"),
        (_basis("layers.7.mlp.x"), {}, r"'layers.7.mlp.x'.*no such weight.*linear weights are named like"),
        (_basis(write=16), {}, r"2 write columns of length 16 for 'down_proj.weight', whose output is 8"),
        (_basis(read=5), {}, r"2 read columns of length 5 for 'down_proj.weight', whose input is 6"),
        (_basis("embed.weight", write=9), {}, r"'embed.weight' is an embedding"),
        (_basis(), {"rank": 3}, r"rank 3.*2 directions"),
        (_basis(), {"rank": 0}, r"rank 0"),
        (_basis(), {"side": "read"}, r"no read side for 'down_proj.weight'"),
        (_basis(), {"side": "both"}, r"no read side for 'down_proj.weight'"),
        (_basis(), {"side": "right"}, r"side 'right' is not one of"),
        (_basis(), {"gradient": False, "pin": False}, r"nothing to do"),
    ],
)
def test_a_basis_that_does_not_fit(basis, settings, message):
    with pytest.raises(InputError, match=message):
        GraspProjector(Net(), basis, **settings)


def test_a_header_of_another_model():
    basis = SpuriousBasis.from_tensors(
        {"down_proj.weight.write": orthonormal(8, 2, 0)}, shapes={"down_proj.weight": (8, 7)}
    )
    with pytest.raises(InputError, match=r"shape \(8, 7\), but here its input is 6"):
        GraspProjector(Net(), basis)


def test_nothing_trains():
    model = Net().requires_grad_(False)
    model.head.requires_grad_(True)
    with pytest.raises(InputError, match="none of the 1 weights of the basis is trained"):
        GraspProjector(model, _basis())


def test_tied_weights():
    model = Net()
    model.other = nn.Linear(8, 9, bias=False)
    model.other.weight = model.head.weight
    basis = SpuriousBasis.from_tensors(
        {"head.weight.read": orthonormal(8, 1, 0), "other.weight.read": orthonormal(8, 1, 1)}
    )
    with pytest.raises(InputError, match=r"'head.weight' and 'other.weight', which are one tied parameter"):
        GraspProjector(model, basis)


def test_a_damaged_basis_file(tmp_path):
    """`load` reads only the header; what the ranks read later is checked when the projector is built."""
    import safetensors.torch as st

    path = tmp_path / "basis.safetensors"
    _basis().save(path)
    for damage, message in ((lambda t: t * 1.1, "not orthonormal"), (lambda t: t * torch.nan, "NaN")):
        with st.safe_open(path, framework="pt") as file:
            metadata, tensor = file.metadata(), file.get_tensor("down_proj.weight.write")
        st.save_file({"down_proj.weight.write": damage(tensor)}, tmp_path / "bad.safetensors", metadata=metadata)
        with pytest.raises(InputError, match=message):
            GraspProjector(Net(), SpuriousBasis.load(tmp_path / "bad.safetensors"))


# -- optimizers


def test_attach_refusals():
    model = Net()
    projector = GraspProjector(model, _basis())
    with pytest.raises(InputError, match=r"does not hold 'down_proj\.weight'"):
        projector.attach(torch.optim.SGD(model.head.parameters()))
    with pytest.raises(InputError, match=r"torch\.optim\.Optimizer, got Net"):
        projector.attach(model)  # type: ignore[arg-type]

    engine = type("DeepSpeedEngine", (), {"__module__": "deepspeed.runtime.engine"})()
    with pytest.raises(InputError, match="DeepSpeedEngine is DeepSpeed's"):
        projector.attach(engine)

    class Bare(torch.optim.Optimizer):
        def __init__(self, params):
            self.param_groups = [{"params": list(params)}]

        def step(self, closure=None):
            return None

    with pytest.raises(InputError, match="Bare does not run torch's step hooks"):
        projector.attach(Bare(model.parameters()))

    projector.attach(torch.optim.SGD(model.parameters()))
    with pytest.raises(InputError, match="attached already"):
        projector.attach(torch.optim.SGD(model.parameters()))


def test_accelerates_wrapper_is_unwrapped():
    from accelerate import Accelerator

    model = Net()
    start = model.down_proj.weight.detach().clone()
    model, optimizer = Accelerator(cpu=True).prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    basis = _basis()
    GraspProjector(model, basis).attach(optimizer)
    model(torch.arange(9)).sum().backward()
    optimizer.step()
    change = model.down_proj.weight.detach() - start
    assert change.norm() > 0.1
    assert (basis.tensor("down_proj.weight", "write").T @ change).norm() < 1e-5


# -- adapters that are not a plain low-rank update from zero


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "'pissa'"),
        ({"init_lora_weights": "olora"}, "'olora'"),
        ({"init_lora_weights": "orthogonal"}, "does not start from zero"),
    ],
)
def test_lora_variants(settings, message):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["down_proj"], **settings))
    with pytest.raises(InputError, match=message):
        GraspProjector(model, _basis())


def test_other_peft_methods():
    from peft import LoHaConfig, get_peft_model

    model = get_peft_model(Net(), LoHaConfig(r=2, target_modules=["down_proj"]))
    with pytest.raises(InputError, match=r"hada_w.*does not know how it moves"):
        GraspProjector(model, _basis())


def test_modules_to_save_train_the_weight_itself():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(Net(), LoraConfig(r=2, target_modules=["down_proj"], modules_to_save=["head"]))
    projector = GraspProjector(model, _basis("head.weight", write=9))
    assert projector.parameters == ("head.weight",)
    assert projector._plan.entries[0].target.parameter is model.base_model.model.head.modules_to_save["default"].weight


# -- shardings


def test_weights_that_are_not_in_memory():
    with pytest.raises(InputError, match="meta device"):
        GraspProjector(Net().to("meta"), _basis())


def _refused(parameter: torch.Tensor) -> str:
    try:
        Tensors(Net()).fragment("w", nn.Parameter(parameter))
    except InputError as error:
        return str(error)
    return ""


def _on_two_ranks() -> dict[str, str]:
    from torch.distributed.tensor import DTensor

    mesh = init_device_mesh("cpu", (2,))
    grid = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    found = {
        "hsdp": _refused(distribute_tensor(torch.ones(4, 4), grid, [Replicate(), Shard(0)])),
        "partial": _refused(DTensor.from_local(torch.ones(4, 4), mesh, [Partial()])),
        "strided": _refused(DTensor.from_local(torch.ones(2, 4), mesh, [_StridedShard(0, split_factor=2)])),
        "replicated": _refused(distribute_tensor(torch.ones(4, 4), mesh, [Replicate()])),
    }
    world_rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    for name, basis in (
        ("shapes", _basis(k=1 + world_rank)),
        ("content", _basis().random_like(world_rank)),
        ("sign", _flipped(world_rank)),
        ("damaged", _basis()),
    ):
        model = Net()
        if name == "sign":
            model.down_proj.weight = nn.Parameter(distribute_tensor(torch.ones(8, 6), mesh, [Shard(0)]))
            model.down_proj.bias = None
        if name == "damaged":
            model.down_proj.weight = nn.Parameter(distribute_tensor(torch.ones(8, 6), mesh, [Shard(0)]))
            model.down_proj.bias = None
            rows = basis.rows
            basis.rows = lambda *args, rows=rows, **more: _fail() if world_rank == 1 else rows(*args, **more)
        try:
            GraspProjector(model, basis)
        except InputError as error:
            found[name] = str(error)
    return found


def _flipped(rank: int) -> SpuriousBasis:
    """The same subspace on every rank, its columns of another sign on the second."""
    return SpuriousBasis.from_tensors({"down_proj.weight.write": orthonormal(8, 2, 0) * (1 - 2 * rank)})


def _fail() -> None:
    raise InputError("rows hold NaN")


def test_placements_and_ranks_that_disagree():
    ranks = run_distributed(_on_two_ranks, 2)
    for found in ranks:
        assert found["hsdp"] == ""
        assert "no weight yet" in found["partial"]
        assert "no single run" in found["strided"]
        assert found["replicated"] == ""
        assert "do not protect the same weights" in found["shapes"]
        assert "different bases of the same shapes" in found["content"]
        assert "different bases of the same shapes" in found["sign"]
    assert "another rank cannot read" in ranks[0]["damaged"]
    assert "rows hold NaN" in ranks[1]["damaged"]
