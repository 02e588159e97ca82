"""Python and packages: the versions that are supported, releases with known security holes, and the extras that a
cluster or a configuration needs. Reads metadata only: nothing that is judged here is imported."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from grasp_dist.config import RunConfig
from grasp_dist.launch.cluster import Cluster
from grasp_dist.launch.doctor.check import Check, Group

__all__ = ["ADVISORIES", "Advisory", "check_software"]

SOFTWARE = Group("software")
OURS = "grasp-dist"
OLDEST_PYTHON = (3, 10)
_STOLEN = "these releases steal credentials when they are imported"


@dataclass(frozen=True)
class Advisory:
    """A published security hole. `reached`: by what this package does with the other one, not only in it."""

    package: str
    affected: str
    """Versions, as pip writes them."""
    number: str
    what: str
    remedy: str
    reached: bool = True


AS_OF = "November 2026"
ADVISORIES = (
    # https://github.com/pytorch/pytorch/security/advisories/GHSA-53q9-r3pm-6pq6
    Advisory("torch", "<2.6", "CVE-2025-32434", "a checkpoint can run code, in spite of weights_only", ">=2.10"),
    # https://nvd.nist.gov/vuln/detail/CVE-2026-24747
    Advisory("torch", "<2.10", "CVE-2026-24747", "a checkpoint can corrupt memory, in spite of weights_only", ">=2.10"),
    # https://nvd.nist.gov/vuln/detail/CVE-2026-1839
    Advisory("transformers", "<5.0.0rc3", "CVE-2026-1839", "a checkpoint's random state is unpickled", ">=5.3"),
    # https://nvd.nist.gov/vuln/detail/CVE-2026-4372
    Advisory("transformers", ">=4.56,<5.3", "CVE-2026-4372", "a model's config.json can run code", ">=5.3"),
    # https://msrc.microsoft.com/update-guide/vulnerability/CVE-2024-43497
    Advisory("deepspeed", "<0.15.1", "CVE-2024-43497", "command injection", ">=0.19.4"),
    # https://github.com/advisories/GHSA-q279-jhrf-cc6v
    Advisory("ray", "<2.52", "CVE-2025-62593", "a web page can run code through the dashboard", ">=2.56"),
    # https://nvd.nist.gov/vuln/detail/CVE-2026-27482
    Advisory("ray", "<2.54", "CVE-2026-27482", "a web page can delete jobs through the dashboard", ">=2.56"),
    # https://github.com/pypa/advisory-database/blob/main/vulns/ray/PYSEC-2026-2272.yaml
    Advisory("ray", ">=2.49,<2.55", "CVE-2026-41486", "with Ray loaded, a Parquet file can run code", ">=2.56"),
    # https://www.cve.org/CVERecord?id=CVE-2026-57516
    Advisory("ray", "<2.56", "CVE-2026-57516", "read_webdataset unpickles what it reads", ">=2.56", reached=False),
    # https://www.cve.org/CVERecord?id=CVE-2026-57845
    Advisory("datasets", "<=5.1.0", "CVE-2026-57845", "the `pandas` builder unpickles data", ">5.1.0", reached=False),
    # https://github.com/advisories/GHSA-w37p-236h-pfx3
    Advisory("lightning", "==2.6.2,==2.6.3", "GHSA-w37p-236h-pfx3", _STOLEN, ">=2.6.6"),
    Advisory("pytorch-lightning", "==2.6.2,==2.6.3", "GHSA-w37p-236h-pfx3", _STOLEN, ">=2.6.6"),
)


def check_software(cluster: Cluster | None, config: RunConfig | None) -> Iterator[Check]:
    """Versions of this process' Python. That of the jobs may be another: `--deep` sees it."""
    version = platform.python_version()
    if sys.version_info < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        yield SOFTWARE.failure("python", f"{version} is older than {wanted}", f"make an environment of Python {wanted}")
    else:
        yield SOFTWARE.ok("python", f"{version} ({sys.executable})")
    yield from _requirements("packages", None, "what every command needs")
    for extra, why in _extras(cluster, config).items():
        yield from _requirements(f"extra {extra}", extra, why)
    yield from _advisories()


def _requirements(name: str, extra: str | None, why: str) -> Iterator[Check]:
    """One finding for each package that is missing or too old, or one for all."""
    try:
        lines = importlib.metadata.requires(OURS) or []
    except importlib.metadata.PackageNotFoundError:
        yield SOFTWARE.skipped(
            name, f"{OURS} runs from its sources without being installed, so nobody knows what it needs"
        )
        return
    found, wrong = [], False
    for line in lines:
        wanted = Requirement(line)
        if wanted.marker and not wanted.marker.evaluate({"extra": extra or ""}):
            continue
        if extra and not (wanted.marker and "extra" in str(wanted.marker)):
            continue
        version = installed(wanted.name)
        target = OURS if extra is None else f"{OURS}[{extra}]"
        if version is None:
            wrong = True
            yield SOFTWARE.failure(name, f"{wanted.name} is not installed ({why})", f"pip install '{target}'")
        elif not wanted.specifier.contains(version, prereleases=True):
            wrong = True
            yield SOFTWARE.failure(
                name,
                f"{wanted.name} {version} is installed, and {wanted.specifier} is supported ({why})",
                f"pip install '{wanted.name}{wanted.specifier}'",
            )
        else:
            found.append(f"{wanted.name} {version}")
    if not wrong:
        yield SOFTWARE.ok(name, ", ".join(found) or "none needed")


def _extras(cluster: Cluster | None, config: RunConfig | None) -> dict[str, str]:
    """{extra: why it is needed}"""
    needed = {}
    if cluster and cluster.kind == "slurm" and cluster.launcher == "submitit":
        needed["slurm"] = "launcher: submitit"
    if cluster and cluster.kind == "ray":
        needed["ray"] = "kind: ray"
    if config and config.parallel.strategy.startswith("zero"):
        needed["deepspeed"] = f"parallel.strategy: {config.parallel.strategy}"
    return needed


def _advisories() -> Iterator[Check]:
    packages = sorted({advisory.package for advisory in ADVISORIES})
    versions = {name: version for name in packages if (version := installed(name)) is not None}
    hit = [
        advisory
        for advisory in ADVISORIES
        if advisory.package in versions and affects(advisory, versions[advisory.package])
    ]
    for advisory in hit:
        state = SOFTWARE.failure if advisory.reached else SOFTWARE.warning
        found = f"{advisory.package} {versions[advisory.package]}: {advisory.what} ({advisory.number})"
        remedy = f"pip install '{advisory.package}{advisory.remedy}'"
        if advisory.what == _STOLEN:
            remedy += ", and change every password and token that this machine has seen"
        yield state("known holes", found, remedy)
    if not hit:
        shown = ", ".join(f"{name} {version}" for name, version in versions.items())
        yield SOFTWARE.ok("known holes", f"none of those known in {AS_OF}, in {shown}")


def affects(advisory: Advisory, version: str) -> bool:
    """Whether an installed version is among those affected. `==a,==b` means either."""
    try:
        number = Version(version)
    except InvalidVersion:
        return False
    specifiers = SpecifierSet(advisory.affected)
    check = any if all(one.operator == "==" for one in specifiers) else all
    return check(one.contains(number, prereleases=True) for one in specifiers)


def installed(package: str) -> str | None:
    """Version of a package of this Python; None if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
