"""Several probes in a round: what they share stays, what each has for itself does not."""

from __future__ import annotations

import json

import pytest
import torch
import yaml

from grasp_dist.basis import SpuriousBasis
from grasp_dist.detection.probe_agreement import agreed_directions
from tests.tiny_runs import grasp_dist, tiny_config

DIM = 48
WEIGHTS = ("layers.0.o_proj.weight", "layers.0.down_proj.weight")


def unit(seed: int, count: int = 1) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(DIM, count, generator=torch.Generator().manual_seed(seed)))[0]


def probe(columns: dict[str, torch.Tensor]) -> SpuriousBasis:
    weights = {name.rpartition(".")[0] for name in columns}
    return SpuriousBasis.from_tensors(columns, provenance={"leading_share": dict.fromkeys(weights, 0.5)})


def test_what_is_shared_stays_and_what_is_not_does_not():
    common = unit(0)
    probes = []
    for seed in range(3):
        noisy = torch.linalg.qr(torch.cat([common + 0.3 * unit(10 + seed), unit(20 + seed)], dim=1))[0]
        probes.append(
            probe(
                {
                    f"{WEIGHTS[0]}.write": noisy,
                    f"{WEIGHTS[0]}.read": unit(30 + seed, 2),
                    f"{WEIGHTS[1]}.write": unit(40 + seed, 2),
                }
            )
        )
    found = agreed_directions(probes, count=2)
    assert list(found.weights) == [WEIGHTS[0]]
    assert list(found.sides(WEIGHTS[0])) == ["write"]
    columns = found.tensor(WEIGHTS[0], "write")
    assert columns.shape == (DIM, 1)
    # Nearer to what is common than each of the three: their noise is averaged.
    cosines = [float((one.tensor(WEIGHTS[0], "write")[:, :1].T @ common).abs()) for one in probes]
    assert float((columns.T @ common).abs()) > max(cosines)
    assert found.provenance["leading_share"] == {WEIGHTS[0]: 0.5}
    assert set(found.provenance["agreement"]) == {f"{WEIGHTS[0]}.write", f"{WEIGHTS[0]}.read", f"{WEIGHTS[1]}.write"}


def test_no_more_than_were_asked_for_closest_first():
    near, far = unit(1, 2).split(1, dim=1)
    probes = [
        probe({f"{WEIGHTS[0]}.write": torch.linalg.qr(torch.cat([far + 0.4 * unit(50 + seed), near], dim=1))[0]})
        for seed in range(2)
    ]
    assert agreed_directions(probes, count=2).tensor(WEIGHTS[0], "write").shape[1] == 2
    only = agreed_directions(probes, count=1).tensor(WEIGHTS[0], "write")
    assert float((only.T @ near).abs()) > 0.99


def test_false_agreement_is_as_rare_as_its_level_says():
    found = 0
    for trial in range(200):
        columns = [
            {f"{weight}.write": unit(1000 * trial + 10 * seed + place) for place, weight in enumerate(WEIGHTS)}
            for seed in range(2)
        ]
        probes = [probe(one) for one in columns]
        found += bool(len(agreed_directions(probes, count=1, level=0.1)))
    assert 5 <= found <= 36  # 20 are expected; beyond these four standard deviations


def test_what_one_probe_has_not_moved_is_left_out():
    both = {f"{weight}.write": unit(3) for weight in WEIGHTS}
    found = agreed_directions([probe(both), probe({f"{WEIGHTS[1]}.write": unit(3)})], count=1)
    assert list(found.weights) == [WEIGHTS[1]]


def test_probes_without_agreement_end_the_search(organism, tmp_path):
    """Two probes of so few steps that their seeds, not the data, decide the read side (A's start): nothing is found."""
    tree = tiny_config(organism, tmp_path / "run")
    tree["training"] |= {"learning_rate": 1e-5}
    tree["detect"] = {
        "method": "restarted", "probe_seeds": 2, "rounds": 3, "steps_per_round": 1, "side": "read", "stop_gain": None
    }  # fmt: skip
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    done = grasp_dist("detect", config)
    assert done.returncode == 0, done.stderr
    assert "round 1 of 3: 0 weights gained directions" in done.stdout
    assert "the last round" in done.stdout
    assert "round 2" not in done.stdout
    basis = SpuriousBasis.load(tmp_path / "run" / "detect" / "basis.safetensors")
    assert not len(basis)
    assert len(json.loads((tmp_path / "run" / "detect" / "manifest.json").read_text())["outputs"]) == 1


def test_several_probes_are_for_restarted_rounds(organism, tmp_path):
    tree = tiny_config(organism, tmp_path / "run")
    tree["detect"] |= {"probe_seeds": 2}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    done = grasp_dist("detect", config)
    assert done.returncode == 2
    assert "use method: restarted" in done.stderr


@pytest.mark.parametrize("count", [1, 2])
def test_weights_whose_space_the_probes_fill_are_left_out(count):
    wide = torch.eye(3)[:, :2]
    assert not len(agreed_directions([probe({f"{WEIGHTS[0]}.write": wide})] * 2, count=count))
