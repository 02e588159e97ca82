"""Emergent misalignment, measured as the field does: questions, judged answers, rates.

questions.py   the YAML files in which questions and judge prompts are published
verdicts.py    what a judge's token probabilities say: a score of 0 to 100, CODE, REFUSAL, or nothing clear
local_judge.py a causal language model of this machine as judge
chat_server.py models behind an address: requests side by side, retried, paced
served.py      subjects and judges on a server
rates.py       from verdicts to rates with intervals
"""

from grasp_dist.evaluation.misalignment.local_judge import LocalJudge
from grasp_dist.evaluation.misalignment.questions import Question, read_questions
from grasp_dist.evaluation.misalignment.rates import JudgedAnswer, Thresholds, summarise_answers
from grasp_dist.evaluation.misalignment.verdicts import Verdict, verdict_of, verdict_of_text, verdict_of_tokens

__all__ = [
    "JudgedAnswer",
    "LocalJudge",
    "Question",
    "Thresholds",
    "Verdict",
    "read_questions",
    "summarise_answers",
    "verdict_of",
    "verdict_of_text",
    "verdict_of_tokens",
]
