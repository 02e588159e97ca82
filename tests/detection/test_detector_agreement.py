"""Agreement of runs against chance."""

import pytest
import torch
from planted import O_PROJ, SHAPES, generator, make_run, unit

from grasp_dist.detection.detectors import Agreement
from grasp_dist.detection.shared_directions import shared_directions
from grasp_dist.errors import InputError
from grasp_dist.subspaces import angles_between

DOWN = "model.layers.1.mlp.down_proj.weight"


def _subspace(dim: int, k: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(dim, k, generator=generator(seed), dtype=torch.float64))[0]


def test_agreement_is_that_of_the_principal_angles() -> None:
    first, second = _subspace(30, 3, 1), _subspace(30, 3, 2)
    found = shared_directions([first, second])
    cosines = angles_between(first, second).cos()
    assert found.agreement[:3].allclose((1 + cosines) / 2)


@pytest.mark.parametrize("sizes", [(3, 3), (1, 4), (2, 3, 4)])
def test_the_null_is_that_of_random_subspaces(sizes: tuple[int, ...]) -> None:
    """The threshold, drawn without vectors of the space's dimension, against plain draws of whole subspaces."""
    plain = []
    for draw in range(1500):
        spaces = [_subspace(25, k, 10 * draw + place) for place, k in enumerate(sizes)]
        plain.append(torch.linalg.matrix_norm(torch.cat(spaces, dim=1), ord=2).square() / len(sizes))
    for level in (0.5, 0.1):
        threshold = shared_directions([_subspace(25, k, place) for place, k in enumerate(sizes)], level=level).threshold
        beyond = (torch.stack(plain) > threshold).double().mean().item()
        assert beyond == pytest.approx(level, rel=0.2)


def test_independent_runs_are_found_to_agree_no_more_often_than_the_level() -> None:
    """50 pairs, at the nominal 5 % over all weights together: more than 6 detections have a chance of 1 %."""
    found = [Agreement(rank=4)([make_run(2 * draw + 1), make_run(2 * draw + 2)]) for draw in range(50)]
    assert sum(one.basis is not None for one in found) <= 6
    # And no less than that at a level at which half of the pairs should be found.
    loose = [Agreement(rank=4, level=0.5)([make_run(2 * d + 1), make_run(2 * d + 2)]) for d in range(50)]
    assert 10 <= sum(one.basis is not None for one in loose) <= 38


def test_a_shared_direction_is_found_where_it_is() -> None:
    u = unit(96, 5)
    runs = [make_run(seed, writes={O_PROJ: u}) for seed in (1, 2)]
    found = Agreement(rank=4)(runs)
    assert found.basis.weights == (O_PROJ,)
    assert abs(found.basis.tensor(O_PROJ, "write")[:, 0].double() @ u) > 0.95
    assert found.basis.basis_rank(O_PROJ, "write") == 1
    assert 0.3 < found.confidence < 1
    everywhere = Agreement(rank=4)([make_run(s, writes=dict.fromkeys(SHAPES, u)) for s in (1, 2)])
    assert everywhere.confidence == 1.0


def test_more_runs_and_other_ranks() -> None:
    """Three runs of three LoRA ranks: a direction that no two runs show strongly enough alone may still be common."""
    u = unit(96, 5)
    runs = [make_run(seed, rank=rank, writes={DOWN: u}) for seed, rank in ((1, 4), (2, 6), (3, 8))]
    found = Agreement(rank=4)(runs)
    assert found.basis.weights == (DOWN,)
    assert abs(found.basis.tensor(DOWN, "write")[:, 0].double() @ u) > 0.95
    assert len(found.basis.provenance["adapter_hashes"]) == 3


def test_read_directions_of_one_seeds_runs_are_refused() -> None:
    same_start = [make_run(seed, start=9) for seed in (1, 2)]
    with pytest.raises(InputError, match="runs of one seed"):
        Agreement(side="both")(same_start)
    assert Agreement(side="write", rank=4)(same_start).evidence["tests"] == 3
    v = unit(96, 6)
    found = Agreement(side="read", rank=4)([make_run(seed, reads={O_PROJ: v}) for seed in (1, 2)])
    assert found.basis.sides(O_PROJ) == ("read",)
    assert abs(found.basis.tensor(O_PROJ, "read")[:, 0].double() @ v) > 0.95


def test_subspaces_that_cannot_be_compared() -> None:
    with pytest.raises(InputError, match="two or more subspaces"):
        shared_directions([_subspace(10, 2, 1)])
    with pytest.raises(InputError, match="two or more subspaces of one space"):
        shared_directions([_subspace(10, 2, 1), _subspace(11, 2, 1)])
    with pytest.raises(InputError, match="meet by necessity"):
        shared_directions([_subspace(10, 6, 1), _subspace(10, 6, 2)])
