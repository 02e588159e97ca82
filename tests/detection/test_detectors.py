"""The detectors on planted updates, what they refuse, and that they give the same bits twice."""

from pathlib import Path

import pytest
import torch
from adapters import make_adapter
from planted import O_PROJ, SHAPES, generator, make_run, unit
from tiny_models import tiny_model

from grasp_dist.detection import detect_basis, read_update
from grasp_dist.detection.adapter import AdapterUpdate, LowRankUpdate
from grasp_dist.detection.base_weights import open_base
from grasp_dist.detection.detectors import DETECTORS, Leading, Tail, Trajectory, make_detector
from grasp_dist.errors import InputError
from grasp_dist.subspaces import angles_between


def _diagonal(values: list[float], *, dtype: torch.dtype = torch.float32, seed: int = 0) -> AdapterUpdate:
    """One weight with these singular values."""
    left = torch.linalg.qr(torch.randn(40, len(values), generator=generator(seed)))[0]
    right = torch.linalg.qr(torch.randn(30, len(values), generator=generator(seed + 1)))[0]
    update = LowRankUpdate(right.mT.to(dtype), (left * torch.tensor(values)).to(dtype), 1.0, False)
    return AdapterUpdate({"layer.o_proj.weight": update}, None, None, {}, "hash")


def test_leading_is_one_shot_detection(tmp_path: Path) -> None:
    make_adapter(tmp_path)
    found = Leading(rank=3, side="both")([read_update(tmp_path)])
    assert found.basis.fingerprint() == detect_basis(tmp_path, rank=3, side="both").fingerprint()
    assert found.basis.provenance["method"] == "leading"
    assert found.basis.provenance["settings"] == {"rank": 3, "side": "both", "seed": 0}


def test_leading_confidence_is_the_share_of_energy() -> None:
    found = Leading(rank=2)([_diagonal([4.0, 2.0, 2.0, 1.0])])
    assert found.confidence == pytest.approx(20 / 25)
    assert found.basis.basis_rank("layer.o_proj.weight", "write") == 2


def test_leading_with_a_rank_rule() -> None:
    found = Leading(rank="gap")([_diagonal([9.0, 8.0, 7.0, 1.0, 0.9])])
    assert found.basis.basis_rank("layer.o_proj.weight", "write") == 3
    nothing = Leading(rank="parallel")([make_run(3)])
    assert nothing.basis is None
    assert nothing.confidence == 0.0


def test_tail_gives_the_weakest_first_and_never_the_head() -> None:
    run = _diagonal([8.0, 4.0, 2.0, 1.0, 1e-7])
    found = Tail(rank=2)([run])
    update = run.weights["layer.o_proj.weight"]
    columns = update.B / update.B.norm(dim=0)
    tail = found.basis.tensor("layer.o_proj.weight", "write")
    assert (tail * columns[:, [3, 2]]).sum(0).abs().allclose(torch.ones(2), atol=1e-5)
    assert found.evidence["weights"]["layer.o_proj.weight"]["of"] == 4
    assert found.confidence == pytest.approx((1 + 4) / 85 * 2)
    assert Tail(rank=9)([run]).basis.basis_rank("layer.o_proj.weight", "write") == 2
    assert Tail(rank=2)([_diagonal([1.0, 1.0, 1.0, 1.0])]).confidence == pytest.approx(1.0)


def test_tail_leaves_out_what_sixteen_bits_round_away() -> None:
    values = [8.0, 4.0, 2.0, 1e-3]
    wide, narrow = Tail(rank=1)([_diagonal(values)]), Tail(rank=1)([_diagonal(values, dtype=torch.bfloat16)])
    assert wide.evidence["weights"]["layer.o_proj.weight"]["of"] == 4
    assert narrow.evidence["weights"]["layer.o_proj.weight"]["of"] == 3


def test_trajectory_keeps_what_was_early_and_stays() -> None:
    stays, comes, goes = (unit(96, seed) for seed in (1, 2, 3))

    def adapter(seed: int, *directions: tuple[torch.Tensor, float]) -> AdapterUpdate:
        run = make_run(seed, shapes={O_PROJ: (96, 96)}, rank=4)
        b = torch.randn(96, 4, generator=generator(seed)) * 0.01
        for column, (direction, strength) in enumerate(directions):
            b[:, column] += strength * direction.float()
        run.weights[O_PROJ] = LowRankUpdate(run.weights[O_PROJ].A, b, 1.0, False)
        return run

    runs = [
        adapter(1, (stays, 1.0), (goes, 2.0)),
        adapter(2, (stays, 2.0), (comes, 1.0)),
        adapter(3, (stays, 3.0), (comes, 3.0)),
    ]
    found = Trajectory(rank=2)(runs)
    columns = found.basis.tensor(O_PROJ, "write").double()
    assert columns.shape[1] == 2
    assert abs(columns[:, 0] @ stays) > 0.98
    assert abs(columns[:, 1] @ comes) > 0.9
    assert (columns.T @ goes).norm() < 0.3
    assert found.evidence["weights"][f"{O_PROJ}.write"]["first_seen"] == [0, 1]
    assert found.confidence > 0.95
    # Without the middle adapter, what came later was never early.
    assert Trajectory(rank=2)([runs[0], runs[2]]).basis.basis_rank(O_PROJ, "write") == 1


def test_trajectory_of_unrelated_runs_finds_nothing() -> None:
    found = Trajectory(rank=3)([make_run(1), make_run(2)])
    assert found.basis is None
    assert found.confidence == 0.0


def test_trajectory_orders_a_steady_run_as_its_spectrum() -> None:
    """Where everything persists, all cosines are equal, and the first adapter's own order must be kept."""
    run = _diagonal([4.0, 2.0, 1.0])
    found = Trajectory(rank=3)([run, _diagonal([1.0, 2.0, 4.0])])
    expected = Leading(rank=3)([run]).basis
    for k in (1, 2, 3):
        angles = angles_between(
            *(b.truncate(k).tensor("layer.o_proj.weight", "write") for b in (found.basis, expected))
        )
        assert angles.max() < 1e-4


def _cases() -> dict[str, tuple[list[AdapterUpdate], object]]:
    llama = {
        f"model.layers.{i}.{leaf}.weight": shape
        for i in range(2)
        for leaf, shape in {
            "self_attn.o_proj": (24, 24),
            "self_attn.v_proj": (12, 24),
            "mlp.down_proj": (24, 40),
        }.items()
    }
    u = unit(24, 1)
    writes = {name: u for name, shape in llama.items() if shape[0] == 24}
    runs = [make_run(seed, shapes=llama, rank=2, writes=writes, strength=30.0) for seed in (1, 2)]
    return dict.fromkeys(("agreement", "trajectory"), (runs, {})) | dict.fromkeys(
        ("leading", "tail", "consensus", "intruder"), (runs[:1], {})
    )


@pytest.mark.parametrize("name", DETECTORS)
def test_the_same_runs_give_the_same_bits(name: str) -> None:
    runs, _ = _cases()[name]
    base = open_base(tiny_model("llama"))
    first, second = (make_detector(name, rank=1)(runs, base) for _ in range(2))
    assert first.basis.fingerprint() == second.basis.fingerprint()
    assert (first.confidence, first.evidence) == (second.confidence, second.evidence)
    assert 0 < first.confidence <= 1
    assert first.basis.provenance["method"] == name


@pytest.mark.parametrize("name", DETECTORS)
def test_what_is_found_can_be_saved(name: str, tmp_path: Path) -> None:
    import json

    runs, _ = _cases()[name]
    found = make_detector(name, rank=1)(runs, open_base(tiny_model("llama")))
    found.basis.save(tmp_path / "basis.safetensors")
    json.dumps(found.evidence, allow_nan=False)


def test_an_unknown_detector_or_setting() -> None:
    with pytest.raises(InputError, match="no detector 'leadin'; choose one of leading, tail"):
        make_detector("leadin")
    with pytest.raises(InputError, match="'tail' has no setting 'steps'; it has rank, side"):
        make_detector("tail", steps=3)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("leading", {"rank": 0}, "rank 0 is not a count"),
        ("leading", {"rank": "elbow"}, "rank 'elbow' is not a count"),
        ("leading", {"side": "left"}, "side 'left'"),
        ("tail", {"rank": 0}, "rank 0"),
        ("agreement", {"level": 1.0}, r"level 1\.0"),
        ("trajectory", {"min_cosine": 0.0}, r"min_cosine 0\.0"),
        ("consensus", {"vote": "loud"}, "vote 'loud'"),
        ("consensus", {"draws": 0}, "draws 0"),
        ("intruder", {"epsilon": 0.0}, "epsilon above 0"),
    ],
)
def test_settings_out_of_range(name: str, settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_detector(name, **settings)


@pytest.mark.parametrize("name", ["leading", "tail", "consensus", "intruder"])
def test_one_run_is_wanted(name: str) -> None:
    with pytest.raises(InputError, match=f"'{name}' reads one naive fine-tune, not 2"):
        make_detector(name)([make_run(1), make_run(2)])


@pytest.mark.parametrize("name", ["consensus", "intruder"])
def test_a_base_is_wanted(name: str) -> None:
    with pytest.raises(InputError, match=f"'{name}' reads base weights"):
        make_detector(name)([make_run(1)])


@pytest.mark.parametrize("name", ["agreement", "trajectory"])
def test_several_runs_of_the_same_weights_are_wanted(name: str) -> None:
    detector = make_detector(name)
    with pytest.raises(InputError, match=f"'{name}' compares two or more runs, not 1"):
        detector([make_run(1)])
    fewer = {key: shape for key, shape in SHAPES.items() if key != O_PROJ}
    with pytest.raises(InputError, match=r"adapt other weights \('model.layers.0.self_attn.o_proj.weight'"):
        detector([make_run(1), make_run(2, shapes=fewer)])
    with pytest.raises(InputError, match=r"\(96, 96\) in run 1 and \(96, 90\) in run 2"):
        detector([make_run(1), make_run(2, shapes=SHAPES | {O_PROJ: (96, 90)})])
