"""Subjects and judges on a server (`chat_server.py`). Each answer and verdict is handed on by itself, so that whatever
ends the process or the server loses at most what was under way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from grasp_dist.errors import InputError
from grasp_dist.evaluation.misalignment.chat_server import Completion, Request, ServedModel, ask_server
from grasp_dist.evaluation.misalignment.ledger import Ledger
from grasp_dist.evaluation.misalignment.questions import ALIGNED, COHERENT, Question
from grasp_dist.evaluation.misalignment.sampling import ANSWER_KEY, Sampling
from grasp_dist.evaluation.misalignment.verdicts import Verdict, as_number, verdict_of_text, verdict_of_tokens
from grasp_dist.training.seeds import derived_seed

__all__ = ["ServerJudge", "answers_from_server", "expected_tokens"]

_CANDIDATES = 20
"""As many as the API gives at most."""
_LETTERS = 4
_WORDS = 8
"""Tokens of a verdict that is read as text."""


def answers_from_server(
    server: ServedModel,
    questions: Sequence[Question],
    ledger: Ledger,
    sampling: Sampling,
    *,
    on_answer: Callable[[int, int], Any] | None = None,
) -> None:
    """Ask all that the ledger has no answer to; its records are those of `sample_answers` and the prompt's tokens.

    on_answer: called with the numbers of answers that are there, and in all. Raises as `ask_server` does.
    """
    asked = [
        (question, (question.id, paraphrase, sample))
        for question in questions
        for paraphrase in range(len(question.paraphrases))
        for sample in range(sampling.samples or question.samples_per_paraphrase)
    ]
    left = [(question, key) for question, key in asked if key not in ledger]
    requests = [
        Request(
            question.messages(key[1]),
            sampling.max_new_tokens,
            question.temperature,
            seed=derived_seed("answers", sampling.seed, *key) % 2**31,  # what every server takes
        )
        for question, key in left
    ]

    def note(number: int, found: Completion) -> None:
        record = {
            **dict(zip(ANSWER_KEY, left[number][1], strict=True)),
            "answer": found.text,
            "tokens": found.said_tokens,
            "ended": found.ended,
            "asked_tokens": found.asked_tokens,
        }
        ledger.add([record])
        if on_answer is not None:
            on_answer(len(ledger), len(asked))

    if requests:
        ask_server(server, requests, note)


def expected_tokens(questions: Sequence[Question], sampling: Sampling) -> dict[str, dict[str, int]]:
    """{"model", "judge": {"requests", "asked", "said"}} of a whole measurement: tokens that are sent, at four letters a
    token, and the most that come back. Answers are taken to be as long as they may be."""
    model = {"requests": 0, "asked": 0, "said": 0}
    judge = dict(model)
    longest = sampling.max_new_tokens
    for question in questions:
        samples = sampling.samples or question.samples_per_paraphrase
        for paraphrase in range(len(question.paraphrases)):
            letters = sum(len(message["content"]) for message in question.messages(paraphrase))
            _count(model, samples, -(-letters // _LETTERS), longest)
            for name in (ALIGNED, COHERENT):
                letters = len(question.judge_prompt(name, paraphrase, ""))
                _count(judge, samples, -(-letters // _LETTERS) + longest, _WORDS)
    return {"model": model, "judge": judge}


def _count(totals: dict[str, int], requests: int, asked: int, said: int) -> None:
    totals["requests"] += requests
    totals["asked"] += requests * asked
    totals["said"] += requests * said


class ServerJudge:
    """Scores by the log-probabilities of the first token, or by what the judge says."""

    def __init__(self, server: ServedModel, by: Literal["logprobs", "text"] = "logprobs") -> None:
        """by: "text" is for servers without log-probabilities, and for judges that write 85 as two tokens, of which a
        server shows the first one's candidates only. The likeliest answer is then the score, coarser than a mean."""
        self._server, self._by = server, by

    def judge(self, prompts: Sequence[str], on_verdict: Callable[[int, Verdict, Completion], Any]) -> None:
        """Every prompt asked apart, without sampling; on_verdict: called with its number as soon as there is one.

        Raises as `ask_server` does, and `InputError` for a judge that cannot be read by log-probabilities.
        """
        by_text = self._by == "text"
        requests = [
            Request(
                [{"role": "user", "content": prompt}],
                max_tokens=_WORDS if by_text else 2,
                temperature=0.0,
                top=0 if by_text else _CANDIDATES,
            )
            for prompt in prompts
        ]

        def note(number: int, found: Completion) -> None:
            on_verdict(number, verdict_of_text(found.text) if by_text else self._read(found), found)

        if requests:
            ask_server(self._server, requests, note)

    def _read(self, found: Completion) -> Verdict:
        who = f"{self._server.name!r} at {self._server.url}"
        if not found.top:
            raise InputError(f"{who} gives no log-probabilities; judge by what it says: --judge-by text")
        first, *behind = (max(top, key=top.__getitem__) for top in found.top)
        if as_number(first) is not None and behind and behind[0][:1].isdigit():
            raise InputError(
                f"{who} writes {first}{behind[0]} as two tokens, so that the first one's log-probabilities say nothing "
                "of the score; judge by what it says (--judge-by text), or by a local model, of which every digit is "
                "asked for"
            )
        return verdict_of_tokens(found.top[0])
