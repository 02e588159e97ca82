"""What may stand in a cluster file: the types of its values, each with the reason why others are refused.

The values end up in `#SBATCH` lines, which `sbatch` reads by rules of its own, in bash, and in the options of srun and
container runtimes, some of which split at commas and colons. Everything is quoted where it is written; what quoting
cannot keep apart is refused here. Needs pydantic only.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

__all__ = [
    "Address",
    "Constraint",
    "Folder",
    "Image",
    "Interface",
    "Memory",
    "Module",
    "Mount",
    "Name",
    "Option",
    "Partition",
    "Program",
    "Scratch",
    "Seconds",
    "Text",
    "Time",
    "Variable",
    "seconds_of",
]

_LONGEST = 366 * 24 * 3600
_TIME = r"(?:(?:(?P<d>\d{1,3})-)?(?P<h>\d{1,3}):(?P<m>\d{2})(?::(?P<s>\d{2}))?|\d{1,7})"


def seconds_of(time: str) -> int:
    """Seconds of a Slurm time limit: `30` (minutes), `30:00`, `HH:MM:SS`, `D-HH:MM:SS`."""
    days, _, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    hours, minutes, seconds = {1: (0, *parts, 0), 2: (0, *parts), 3: tuple(parts)}[len(parts)]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _text(value: Any) -> Any:
    if isinstance(value, bool | float):
        raise ValueError("must be text; put it in quotes, as YAML reads words like on, no and 1.10 as something else")
    return str(value) if isinstance(value, int) else value


def _printable(text: str) -> str:
    for character in text:
        if not character.isprintable():
            raise ValueError(
                f"holds the character U+{ord(character):04X}, which is a line break, a control character or not to be "
                "seen; type the value anew, on one line"
            )
    return text


def _like(pattern: str, remedy: str) -> AfterValidator:
    compiled = re.compile(pattern, re.ASCII)

    def check(text: str) -> str:
        if not compiled.fullmatch(text):
            raise ValueError(remedy)
        return text

    return AfterValidator(check)


def _time(text: str) -> str:
    fields = re.fullmatch(_TIME, text, re.ASCII)
    usual = "give minutes (90), HH:MM:SS or D-HH:MM:SS"
    # 'D-HH:MM' is Slurm's too, but is so easily taken for minutes and seconds that it is left out.
    if not fields or (fields["d"] and not fields["s"]):
        raise ValueError(f"is no time limit; {usual}")
    minutes_and_seconds = [part for part in (fields["m"], fields["s"]) if part]
    if any(int(part) > 59 for part in minutes_and_seconds) or (fields["d"] and int(fields["h"]) > 23):
        raise ValueError(f"has more than 59 minutes or seconds, or more than 23 hours after days; {usual}")
    if not 0 < seconds_of(text) <= _LONGEST:
        raise ValueError(f"must be more than 0 and at most 366 days; {usual}")
    return text


def _mount(text: str) -> str:
    if set(text) & set(", \"'\\$"):
        raise ValueError(
            "a mount cannot hold commas, spaces, quotes, backslashes or $: the container runtimes split or replace "
            "them; mount a folder above it, or a link with another name"
        )
    parts = text.split(":")
    if len(parts) > 3 or not all(part.startswith("/") for part in parts[:2]):
        raise ValueError("give a mount as /outside:/inside, /outside:/inside:ro or /both, with absolute paths")
    if len(parts) == 3 and not re.fullmatch(r"[a-z]+(\+[a-z]+)*", parts[2]):
        raise ValueError("what follows the second colon of a mount are its flags, such as ro")
    return text


def _absolute(text: str) -> str:
    if not text.startswith("/"):
        raise ValueError("must be an absolute path, since jobs start elsewhere")
    return text


def _scratch(text: str) -> str:
    rest = re.sub(r"\$(?:[A-Za-z_]\w*|\{[A-Za-z_]\w*\})", "", text, flags=re.ASCII)
    if not text.startswith(("/", "$")) or set(rest) & set("$`\"'\\:,{}"):
        raise ValueError(
            "must be an absolute path; $NAME and ${NAME} in it are filled in on the node, but it cannot hold any other "
            "$, nor quotes, backslashes, braces, colons or commas"
        )
    return text


def _not_an_option(text: str) -> str:
    if not text or text.startswith("-"):
        raise ValueError("must be a name or path that is not empty and does not begin with a hyphen")
    return text


Text = Annotated[str, BeforeValidator(_text), AfterValidator(_printable)]
"""One line of text, quoted wherever it goes: `$`, quotes and backslashes in it mean themselves."""
_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.@+-]{0,199}"
_AS_SHOWN = "letters, digits and . _ - + @ only, beginning with a letter or digit"
Name = Annotated[Text, _like(_NAME, f"is no name of Slurm's: {_AS_SHOWN}; copy it from sinfo or sacctmgr")]
Partition = Annotated[
    Text,
    _like(rf"{_NAME}(,{_NAME})*", f"is no partition: {_AS_SHOWN}; several with commas; `sinfo -s` lists them"),
]
Constraint = Annotated[
    Text,
    _like(
        r"[A-Za-z0-9_(\[][A-Za-z0-9_.:,@=/&|*()\[\]-]{0,199}",
        "is no constraint: node features (`sinfo -o %f`) joined by & or |, without spaces and quotes",
    ),
]
"""`h100&ib`, `[rack1|rack2]`."""
Interface = Annotated[
    Text,
    _like(
        r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}(,[A-Za-z0-9_][A-Za-z0-9_.-]{0,14})*",
        "is no network interface: give names as `ip -br link` prints them; NCCL's patterns (^docker0, =eth0) go into "
        "environment.NCCL_SOCKET_IFNAME",
    ),
]
Variable = Annotated[
    Text, _like(r"[A-Za-z_][A-Za-z0-9_]{0,199}", "is no variable's name: letters, digits and _, no digit first")
]
Module = Annotated[
    Text, _like(r"[A-Za-z0-9_][A-Za-z0-9_.+/=-]{0,199}", "is no module's name; `module avail` lists them, one per item")
]
Memory = Annotated[
    Text, _like(r"[0-9]{1,9}[KMGT]?", "is no amount of memory: a number with K, M, G or T, such as 200G; 0: all")
]
Time = Annotated[Text, AfterValidator(_time)]
Mount = Annotated[Text, AfterValidator(_mount)]
Option = Annotated[
    Text,
    _like(
        r"--?[A-Za-z][^\x00]*",
        "must be one option that begins with a hyphen, its value after an equals sign: --mpi=none",
    ),
]
Folder = Annotated[Text, AfterValidator(os.path.expanduser), AfterValidator(_absolute)]
Image = Annotated[Text, AfterValidator(os.path.expanduser), AfterValidator(_not_an_option)]
Program = Annotated[Text, AfterValidator(os.path.expanduser), AfterValidator(_not_an_option)]
Scratch = Annotated[Text, AfterValidator(os.path.expanduser), AfterValidator(_scratch)]
"""Written between double quotes, so that the node fills in its variables."""
Address = Annotated[
    Text,
    _like(
        r"auto|local|(ray://)?[A-Za-z0-9_.\[\]:-]+:[0-9]{1,5}",
        "must be auto, local, HOST:PORT or ray://HOST:PORT of the running cluster",
    ),
]
Seconds = Annotated[int, Field(ge=1, le=65535)]
"""As `sbatch --signal` takes it."""
