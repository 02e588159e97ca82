"""Scores of probes on a model that may be sharded: identical for every world size, small floats alone on the wire.

Every rank scores its own batches; `batching` sees to it that all make the same number of forward passes. Measures
(ours): completion: P(reference answers | prompt); pair: log P(a)/|a| - log P(b)/|b|; loss: -log P per target token; kl:
KL(base || model) per position, in nats, and beside it the total variation between the two, in [0, 1]; choice: the mean
value of the options, weighted by their letters' probabilities. |a|: number of tokens of a.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from grasp_dist.evaluation.batching import (
    cut_batches,
    deal,
    evaluation_mode,
    forward_logits,
    keeps_logits,
    pad,
    vocabulary_size,
)
from grasp_dist.evaluation.probes import Probe, ProbeRow

if TYPE_CHECKING:
    from grasp_dist.training.parallel import Parallel

__all__ = ["Reference", "score"]

# Elements of fp32 log-probabilities held at once.
_CHUNK = 1 << 24


@dataclass
class Reference:
    """The base model's log-probabilities for kl probes: this rank's share, fp32 on the CPU.

    An empty one is filled by the first `score` it is given to, which must be the base's; later scores are compared with
    it and need the same probes, batch size and world size.
    """

    log_probabilities: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    filled: bool = False


@dataclass(frozen=True)
class _Sequence:
    """One row of a forward pass: the logits at `positions` are needed, to score each of `targets` (as long as
    positions) into the output of the same place in `outputs`; a kl row has one output and no targets."""

    tokens: list[int]
    positions: list[int]
    targets: list[list[int]]
    outputs: list[int]
    kl_row: tuple[str, int] | None = None


def score(
    model: nn.Module,
    probes: Sequence[Probe],
    parallel: Parallel,
    *,
    batch_size: int = 64,
    reference: Reference | None = None,
) -> dict[str, dict[str, Any]]:
    """{probe name: {"value", metrics of its kind, "rows": one float per row}}, the same on every rank; collective.

    model: a causal LM whose forward pass returns `.logits`; plain, PEFT-wrapped or `fully_shard`ed, in any dtype
    (logits are made fp32 where they are needed). reference: see `Reference`; kl probes need one, else ValueError.
    """
    if reference is None and any(probe.kind == "kl" for probe in probes):
        raise ValueError("kl probes need a Reference, filled by scoring the base first")
    with evaluation_mode(model):
        continued = _continue(model, probes, parallel, batch_size)
        sequences, slots = _lay_out(probes, continued)
        outputs = _run(model, sequences, parallel, batch_size, reference)
    if reference is not None:
        reference.filled = True
    return {probe.name: _SUMMARIES[probe.kind](probe, outputs, slots[index]) for index, probe in enumerate(probes)}


def _lay_out(
    probes: Sequence[Probe], continued: dict[tuple[int, int], list[int]]
) -> tuple[list[_Sequence], list[list[list[int]]]]:
    """The sequences of all probes, and for each probe and row the numbers of its outputs."""
    sequences: list[_Sequence] = []
    slots: list[list[list[int]]] = []
    count = 0
    for probe_index, probe in enumerate(probes):
        slots.append([])
        for row_index, row in enumerate(probe.rows):
            prompt = continued.get((probe_index, row_index), row.prompt)
            made = _sequences(probe, row, row_index, prompt, count)
            own = sorted(output for sequence in made for output in sequence.outputs)
            slots[-1].append(own)
            count += len(own)
            sequences += made
    return sequences, slots


def _sequences(probe: Probe, row: ProbeRow, row_index: int, prompt: list[int], count: int) -> list[_Sequence]:
    if probe.kind == "kl":
        first = max(0, len(prompt) - probe.config.positions)
        return [_Sequence(prompt, list(range(first, len(prompt))), [], [count], (probe.name, row_index))]
    if row.labels is not None:
        positions = [at for at, label in enumerate(row.labels[1:]) if label != -100]
        return [_Sequence(prompt[:-1], positions, [[row.labels[at + 1] for at in positions]], [count])]
    # Texts that differ in their last token alone need one forward pass.
    by_head: dict[tuple[int, ...], list[int]] = {}
    for number, text in enumerate(row.continuations):
        by_head.setdefault(tuple(text[:-1]), []).append(number)
    found = []
    for head, numbers in by_head.items():
        tokens = [*prompt, *head]
        first = max(0, len(prompt) - 1)
        skipped = 0 if prompt else 1  # nothing predicts the very first token
        targets = [row.continuations[number][skipped:] for number in numbers]
        found.append(_Sequence(tokens, list(range(first, len(tokens))), targets, [count + n for n in numbers]))
    return found


def _continue(
    model: nn.Module, probes: Sequence[Probe], parallel: Parallel, batch_size: int
) -> dict[tuple[int, int], list[int]]:
    """Prompts with the model's own greedy tokens appended, for the probes that ask for them."""
    continued: dict[tuple[int, int], list[int]] = {}
    wanted = {probe.config.own_tokens for probe in probes if probe.kind == "completion"} - {0}
    for own_tokens in sorted(wanted):
        keys = [
            (index, row)
            for index, probe in enumerate(probes)
            if probe.kind == "completion" and probe.config.own_tokens == own_tokens
            for row in range(len(probe.rows))
        ]
        prompts = [probes[index].rows[row].prompt for index, row in keys]
        answers = _greedy(model, prompts, own_tokens, parallel, batch_size)
        continued |= {key: [*prompt, *answer] for key, prompt, answer in zip(keys, prompts, answers, strict=True)}
    return continued


def _greedy(
    model: nn.Module, prompts: list[list[int]], num_tokens: int, parallel: Parallel, batch_size: int
) -> list[list[int]]:
    """The next `num_tokens` greedy tokens of each prompt, without a cache."""
    found = torch.zeros(len(prompts), num_tokens, dtype=torch.float64)
    lengths = [(len(prompt) + num_tokens, len(prompt) - 1) for prompt in prompts]
    for batch in deal(_batches(model, lengths, batch_size), parallel):
        ids, mask = pad([prompts[i] for i in batch], parallel.device, extra=num_tokens)
        ends = torch.tensor([len(prompts[i]) for i in batch] or [1], device=ids.device)
        rows = torch.arange(len(ids), device=ids.device)
        for step in range(num_tokens):
            kept, place = torch.unique(ends - 1 + step, return_inverse=True)
            best = forward_logits(model, ids, mask, kept)[rows, place].argmax(-1)
            ids[rows, ends + step] = best
            mask[rows, ends + step] = 1
            if batch:
                found[batch, step] = best.double().cpu()
    return parallel.sum_(found.to(parallel.device)).cpu().long().tolist()


def _run(
    model: nn.Module,
    sequences: list[_Sequence],
    parallel: Parallel,
    batch_size: int,
    reference: Reference | None,
) -> Tensor:
    """Per output (log-probability, number of tokens that are not the greedy choice), fp64, CPU; kl: (nats, total
    variation), both summed over positions."""
    count = sum(len(sequence.outputs) for sequence in sequences)
    outputs = torch.zeros(count, 2, dtype=torch.float64)
    spans = [(len(sequence.tokens), sequence.positions[0]) for sequence in sequences]
    for batch in deal(_batches(model, spans, batch_size), parallel):
        own = [sequences[i] for i in batch]
        ids, mask = pad([sequence.tokens for sequence in own], parallel.device)
        needed = sorted({at for sequence in own for at in sequence.positions}) or [0]
        logits = forward_logits(model, ids, mask, torch.tensor(needed, device=ids.device))
        column = {at: place for place, at in enumerate(needed)}
        for row, sequence in enumerate(own):
            at = torch.tensor([column[position] for position in sequence.positions], device=logits.device)
            _score_sequence(sequence, logits[row], at, outputs, reference)
    return parallel.sum_(outputs.to(parallel.device)).cpu()


def _score_sequence(
    sequence: _Sequence, row_logits: Tensor, at: Tensor, outputs: Tensor, reference: Reference | None
) -> None:
    """Score one sequence from rows `at` of (kept positions, vocabulary), few at a time: fp32 copies stay small."""
    step = max(1, _CHUNK // row_logits.shape[-1])
    stored = []
    for start in range(0, len(sequence.positions), step):
        part = slice(start, start + step)
        logits = row_logits[at[part]]
        log_p = logits.float().log_softmax(-1)
        if sequence.kl_row is not None:
            assert reference is not None
            if reference.filled:
                base = _base_rows(reference, sequence.kl_row)[part].to(log_p.device)
                shift = base.exp() - log_p.exp()
                outputs[sequence.outputs[0], 0] += float((base.exp() * (base - log_p)).double().sum())
                outputs[sequence.outputs[0], 1] += float(shift.abs().double().sum() / 2)
            else:
                stored.append(log_p.cpu())
            continue
        targets = torch.tensor([target[part] for target in sequence.targets], device=log_p.device)
        found = log_p.gather(1, targets.T).double().sum(0).cpu()
        missed = (logits.argmax(-1, keepdim=True) != targets.T).sum(0).double().cpu()
        outputs[sequence.outputs] += torch.stack([found, missed], dim=1)
    if stored and reference is not None and sequence.kl_row is not None:
        reference.log_probabilities[sequence.kl_row] = torch.cat(stored)


def _base_rows(reference: Reference, key: tuple[str, int]) -> Tensor:
    if key not in reference.log_probabilities:
        raise ValueError(f"the reference has no row {key} on this rank; it was made with other probes or batch size")
    return reference.log_probabilities[key]


def _batches(model: nn.Module, spans: list[tuple[int, int]], batch_size: int) -> list[list[int]]:
    if not keeps_logits(model):
        spans = [(length, 0) for length, _ in spans]
    return cut_batches(spans, batch_size=batch_size, vocabulary=vocabulary_size(model))


# From outputs to metrics


def _completion(probe: Probe, outputs: Tensor, slots: list[list[int]]) -> dict[str, Any]:
    log_p = [float(outputs[own, 0].logsumexp(0)) for own in slots]
    rows = [math.exp(value) for value in log_p]
    exact = [float((outputs[own, 1] == 0).any()) for own in slots]
    return {
        "value": _mean(rows),
        "probability": _mean(rows),
        "loss": -_mean(log_p),
        "exact_match": _mean(exact),
        "rows": rows,
    }


def _pair(probe: Probe, outputs: Tensor, slots: list[list[int]]) -> dict[str, Any]:
    rows = []
    for row, own in zip(probe.rows, slots, strict=True):
        skipped = 0 if row.prompt else 1
        counts = [len(text) - skipped for text in row.continuations]
        a, b = (float(outputs[slot, 0]) / count for slot, count in zip(own, counts, strict=True))
        rows.append(a - b)
    wins = [float(row > 0) for row in rows]
    return {"value": _mean(rows), "preference": _mean(rows), "win_rate": _mean(wins), "rows": rows}


def _loss(probe: Probe, outputs: Tensor, slots: list[list[int]]) -> dict[str, Any]:
    totals = [-float(outputs[own, 0].sum()) for own in slots]
    tokens = [sum(label != -100 for label in (row.labels or [])[1:]) for row in probe.rows]
    loss = sum(totals) / sum(tokens)
    rows = [total / count for total, count in zip(totals, tokens, strict=True)]
    return {"value": loss, "loss": loss, "perplexity": math.exp(min(loss, 700.0)), "rows": rows}


def _kl(probe: Probe, outputs: Tensor, slots: list[list[int]]) -> dict[str, Any]:
    totals = [float(outputs[own, 0].sum()) for own in slots]
    positions = [min(probe.config.positions, len(row.prompt)) for row in probe.rows]
    value = sum(totals) / sum(positions)
    moved = sum(float(outputs[own, 1].sum()) for own in slots) / sum(positions)
    rows = [total / count for total, count in zip(totals, positions, strict=True)]
    return {"value": value, "kl": value, "total_variation": moved, "rows": rows}


def _choice(probe: Probe, outputs: Tensor, slots: list[list[int]]) -> dict[str, Any]:
    rows, masses = [], []
    for row, own in zip(probe.rows, slots, strict=True):
        chances = outputs[own, 0].exp()
        masses.append(float(chances.sum()))
        # In proportion, whatever the letters have together: of those the likeliest, where that is next to nothing.
        shares = outputs[own, 0].softmax(0)
        rows.append(float((shares * torch.tensor(row.values, dtype=torch.float64)).sum()))
    gaps = [abs(one - other) for one, other in zip(rows[::2], rows[1::2], strict=True)]
    return {"value": _mean(rows), "lean": _mean(rows), "mass": _mean(masses), "order_gap": _mean(gaps), "rows": rows}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


_SUMMARIES = {"completion": _completion, "pair": _pair, "loss": _loss, "kl": _kl, "choice": _choice}
