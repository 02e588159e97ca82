"""Models behind an address that speaks OpenAI's chat completions: vLLM, SGLang, llama.cpp, `transformers serve`, and
hosted ones. Requests go out side by side, as fast as allowed, and every answer is handed on as soon as it is there.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from grasp_dist.errors import InputError

if TYPE_CHECKING:
    import openai

__all__ = ["Completion", "Request", "ServedModel", "ask_server", "check_server", "is_address"]

_PACKAGE = "models on a server need `pip install 'grasp-dist[server]'`"
_PORTS = {"http": 80, "https": 443}
_KEPT = "What is done is kept, and the same command goes on behind it"


@dataclass(frozen=True)
class ServedModel:
    """A model on a server, and how it may be asked."""

    url: str
    """Of the API, as a rule with /v1 at its end."""
    name: str
    """By which the server knows the model."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; the key itself is written nowhere. A server may need none."""
    at_once: int = 16
    """Requests under way at a time."""
    per_minute: float | None = None
    """Requests begun in a minute, at most."""
    attempts: int = 10
    """Where the server is away, busy or broken: how often a request is sent, with growing breaks of up to 8 s."""
    timeout: float = 600.0
    """Seconds for one attempt."""

    @property
    def identity(self) -> str:
        """What records are known by: the name, since addresses and ports come and go."""
        return f"{self.name} (served)"


@dataclass(frozen=True)
class Request:
    """One question to a server."""

    messages: Sequence[dict[str, str]]
    max_tokens: int
    temperature: float
    seed: int | None = None
    top: int = 0
    """Log-probabilities wanted of so many candidates for each token; at most 20."""


@dataclass(frozen=True)
class Completion:
    """What the server said."""

    text: str
    ended: bool
    """False where `max_tokens` cut it off."""
    top: Sequence[dict[str, float]] | None
    """{candidate: natural log-probability} of each token; None if the server gives none."""
    asked_tokens: int | None
    said_tokens: int | None


def is_address(model: str) -> bool:
    """Whether this names a server rather than a directory or a hub id."""
    return model.startswith(("http://", "https://"))


def check_server(address: str, key_variable: str, *, what: str) -> None:
    """Raise `InputError` for what is no address, and without the package that asks there. Nothing is sent: that nobody
    listens there now, or that there is no key, is noted on stderr, since it may be otherwise when it is asked."""
    if not is_address(address):
        raise InputError(f"{what}'s address {address!r} is no http address")
    if importlib.util.find_spec("openai") is None:
        raise InputError(_PACKAGE)
    try:
        parts = urlsplit(address)
        where = parts.hostname, parts.port or _PORTS[parts.scheme]
    except ValueError as error:
        raise InputError(f"{what}'s address {address!r} is no http address: {error}") from None
    try:
        with socket.create_connection(where, timeout=5):
            pass
    except OSError as error:
        print(f"note: nobody answers at {address} now ({error}); {what} has to be there to be asked", file=sys.stderr)
    if parts.scheme == "https" and not os.environ.get(key_variable):
        print(f"note: the variable {key_variable}, with the key for {address}, is not set here", file=sys.stderr)


def ask_server(
    server: ServedModel, requests: Sequence[Request], on_completion: Callable[[int, Completion], Any]
) -> None:
    """Send all requests, and hand on each one's number and answer, in the order in which answers come.

    Raises `InputError` at once if nobody is there, and, when everything that was under way is handed on, if the server
    refuses the key, the model or the request, or goes on failing; and whatever `on_completion` raises.
    """
    try:
        import openai
    except ImportError:
        raise InputError(_PACKAGE) from None
    try:
        client = openai.AsyncOpenAI(
            base_url=server.url,
            api_key=os.environ.get(server.key_variable) or "none",
            max_retries=server.attempts - 1,
            timeout=server.timeout,
        )
        asyncio.run(_ask_all(client, server, requests, on_completion))
    except openai.OpenAIError as error:
        raise InputError(_explained(error, server)) from None


async def _ask_all(
    client: openai.AsyncOpenAI,
    server: ServedModel,
    requests: Sequence[Request],
    on_completion: Callable[[int, Completion], Any],
) -> None:
    waiting = iter(enumerate(requests))
    pace = _Pace(server.per_minute)
    stopped = False

    async def ask_one_after_the_other() -> None:
        nonlocal stopped
        for number, request in waiting:
            await pace.turn()
            if stopped:
                return
            try:
                on_completion(number, await _ask(client, server, request))
            except BaseException:
                stopped = True  # the others end with what they have under way
                raise

    async with client:
        await _knock(client)
        lines = (ask_one_after_the_other() for _ in range(min(server.at_once, len(requests))))
        ends = await asyncio.gather(*lines, return_exceptions=True)
    for end in ends:
        if isinstance(end, BaseException):
            raise end


async def _knock(client: openai.AsyncOpenAI) -> None:
    """Raise if there is no server: later on one that does not answer is waited for."""
    import openai

    try:
        await client.with_options(max_retries=1).models.list()
    except (openai.APIStatusError, openai.APIResponseValidationError):
        return  # somebody is there; not every server lists its models


class _Pace:
    """Turns, so many a minute."""

    def __init__(self, per_minute: float | None) -> None:
        self._interval = 60.0 / per_minute if per_minute else 0.0
        self._next = 0.0

    async def turn(self) -> None:
        now = asyncio.get_running_loop().time()
        self._next = max(now, self._next + self._interval)
        await asyncio.sleep(self._next - now)


async def _ask(client: openai.AsyncOpenAI, server: ServedModel, request: Request) -> Completion:
    wanted: dict[str, Any] = {"logprobs": True, "top_logprobs": request.top} if request.top else {}
    if request.seed is not None:
        wanted["seed"] = request.seed
    found = await client.chat.completions.create(
        model=server.name,
        messages=[{name: _sendable(text) for name, text in one.items()} for one in request.messages],  # type: ignore[misc]
        max_tokens=request.max_tokens,
        temperature=request.temperature,
        **wanted,
    )
    if not found.choices:
        raise InputError(f"{server.url} answered without a choice. {_KEPT}")
    choice, usage = found.choices[0], found.usage
    content = choice.logprobs.content if choice.logprobs is not None else None
    return Completion(
        text=choice.message.content or "",
        ended=choice.finish_reason == "stop",
        top=[{one.token: one.logprob for one in token.top_logprobs} for token in content] if content else None,
        asked_tokens=None if usage is None else usage.prompt_tokens,
        said_tokens=None if usage is None else usage.completion_tokens,
    )


def _sendable(text: str) -> str:
    """Without lone surrogates, which a model's answer may hold and JSON in UTF-8 may not."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _explained(error: openai.OpenAIError, server: ServedModel) -> str:
    import openai

    said = "".join(letter if letter.isprintable() else " " for letter in str(error))[:300]
    if isinstance(error, openai.APIConnectionError):
        return f"no answer from {server.url} in {server.attempts} attempts ({said}); see that the server runs. {_KEPT}"
    if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):
        return f"{server.url} refuses the key in the variable {server.key_variable} ({said})"
    if isinstance(error, openai.NotFoundError):
        return f"{server.url} has no model {server.name!r}, or is not the address of the API, with /v1 ({said})"
    if isinstance(error, openai.RateLimitError):
        return f"{server.url} goes on saying that this is too much ({said}); ask for fewer --per-minute. {_KEPT}"
    return f"{server.url} does not answer the request ({said}). {_KEPT}"
