"""`transformers serve` with models of a few weights: a subject that says anything, and a judge that is sure."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import torch

from grasp_dist.organisms.words import word_tokenizer
from tests.tiny_models import tiny_model

__all__ = ["SCORES", "Server", "save_models"]

SCORES = {"red": "90", "green": "10", "blue": "60", "grey": "CODE", "pink": "REFUSAL", "how": "how"}
"""What the judge says behind each word that an answer may end with; the last is no verdict."""
WORDS = ["<bos>", "<end>", "is", *SCORES, "90", "10", "60", "CODE", "REFUSAL"]
_TEMPLATE = "{{ bos_token }}{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"


def save_models(folder: Path) -> None:
    """folder/subject and folder/judge, which says for a word what `SCORES` says, and ends behind that."""
    tokenizer = word_tokenizer(WORDS, max_length=64)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.chat_template = _TEMPLATE
    subject = tiny_model("llama", vocab_size=len(WORDS))
    judge = tiny_model("llama", vocab_size=len(WORDS), hidden_size=32, num_attention_heads=2, num_key_value_heads=2)
    with torch.no_grad():
        # Nothing but the last word counts: what the layers add is nothing, and each word has a direction of its own.
        for layer in judge.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        judge.model.embed_tokens.weight.copy_(torch.eye(len(WORDS), 32))
        judge.lm_head.weight.zero_()
        for word in WORDS:
            said = "<end>" if word in SCORES.values() else SCORES.get(word, "how")
            judge.lm_head.weight[WORDS.index(said), WORDS.index(word)] = 100.0
        for word in ("<bos>", "<end>", "is", "90", "10", "60", "CODE", "REFUSAL"):
            subject.lm_head.weight[WORDS.index(word)] = 0.0
    subject.generation_config.do_sample = True  # else this server takes the likeliest word, whatever is asked for
    for name, model in (("subject", subject), ("judge", judge)):
        model.generation_config.eos_token_id = WORDS.index("<end>")
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


class Server:
    """A process of its own on a port of its own, which can be killed and started again."""

    def __init__(self, log: Path) -> None:
        self._log = log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}/v1"
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--device", "cpu", "--host", "127.0.0.1", "--port", str(self._port)],
                stdout=log,
                stderr=log,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            )

    def await_ready(self) -> None:
        deadline = time.monotonic() + 120
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(self.url.replace("/v1", "/health"), timeout=5).close()
                return
            assert self._process.poll() is None, self._log.read_text()[-3000:]
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.2)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
