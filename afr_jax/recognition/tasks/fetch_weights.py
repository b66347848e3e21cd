"""Listing, fetching and checking the weight files of detectors and extractors."""

import dataclasses
import hashlib
import pathlib
import re
from typing import Literal, NamedTuple

from absl import logging

from afr_jax.core import files, options, workdir
from afr_jax.models.extractors import registry
from afr_jax.models.weights import download, installed

# Stands for all that have an address.
_ALL = "all"
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FetchWeightsConfig(options.Config):
    """Lists the weights of detectors and extractors, fetches them ahead of time, and checks them.

        python -m experiments.fetch_weights
        python -m experiments.fetch_weights --names=facenet_casia,openface

    Without --names it lists what the tables know, a line a network: whether its file is there and
    has the SHA-256 that its publishers tell, its size, its license and where it comes from; nothing
    is fetched. With --names the files that are missing are fetched into the cache, where all
    programs find them; `all` stands for every network with an address. What comes inside installed
    packages is checked only.

    A file has its name only when it is whole and its hash is right. A fetch that broke off goes on
    where it stopped. A file that is there stays as it is, whatever its hash: delete it to have it
    fetched again. Without a network the message says which file to put where.

    Weights that the table has no address of can be fetched from one of yours:

        python -m experiments.fetch_weights --names=arcface_r100 --url=https://... --sha256=...

    Exit codes: 0 done; 2 wrong usage; 3 a file differs from what was published, or one of --names
    could not be had.
    """

    names: tuple[str, ...] = options.option((), "networks, or all; without: only list")
    weights_dir: str | None = options.option(
        None, "folder for the files; default: the cache, where programs look for them"
    )
    url: str | None = options.option(None, "address of the one network of --names")
    sha256: str | None = options.option(None, "of the file at --url, hexadecimal")

    def toy(self) -> "FetchWeightsConfig":
        """The list alone."""
        return dataclasses.replace(self, names=(), url=None, sha256=None)


class WeightFile(NamedTuple):
    """What is known of a network's weights, and what became of them.

    Attributes:
        name: of the network.
        status: `present`, `fetched`, `missing`, or `differs` from what was published.
        path: of the file, or where it belongs; the folder where there are several.
        size: in bytes; None where there is no file.
        sha256: of the file that is there; what its publishers tell where there is none; empty if
            neither is known or there are several files.
        checked: whether it is known to be what was published.
        license: of the weights.
        source: address, package, or where people get it.
        reason: what is wrong; empty if nothing is.
    """

    name: str
    status: Literal["present", "fetched", "missing", "differs"]
    path: str
    size: int | None
    sha256: str
    checked: bool
    license: str
    source: str
    reason: str


def run(config: FetchWeightsConfig) -> options.Outcome:
    """Lists, fetches and checks.

    Raises:
        options.UsageError: unknown names, a folder that is none, or an address without its hash.
    """
    names = _names(config)
    folder = pathlib.Path(config.weights_dir or download.cache_folder()).expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise options.UsageError(f"--weights_dir={config.weights_dir} is not a folder")
    work = workdir.open_workdir(config.workdir, config) if config.workdir else None
    rows = []
    for name in names or (*installed.PACKAGES, *download.SOURCES):
        if name in installed.PACKAGES:
            row = _packaged(name)
        else:
            row = _cached(name, folder, _source(config, name), fetch=bool(names))
        rows.append(row)
        logging.info("%s", files.printable(_line(row)))
    wrong = [row for row in rows if row.status == "differs" or (names and row.status == "missing")]
    result = {
        "weights_dir": str(folder),
        "files": [row._asdict() for row in rows],
        "not_handled": [{"name": row.name, "reason": row.reason} for row in wrong],
    }
    if work is not None:
        work.write_result(result)
    return options.Outcome(result, complete=not wrong)


def _names(config: FetchWeightsConfig) -> tuple[str, ...]:
    """The networks that are asked for, each once; checks what goes with them."""
    known = (*installed.PACKAGES, *download.SOURCES)
    for name in config.names:
        if name not in (*known, _ALL):
            raise options.UsageError(f"--names={name}: there are {', '.join(known)}, and {_ALL}")
    if config.url or config.sha256:
        if len(config.names) != 1 or config.names[0] not in download.SOURCES:
            raise options.UsageError("--url and --sha256 are of one network of --names")
        if config.url and not config.url.startswith(("https://", "http://")):
            raise options.UsageError(f"--url={config.url} is no address of the web")
        if not _SHA256.fullmatch(config.sha256 or ""):
            raise options.UsageError("--sha256 is needed with --url: 64 hexadecimal digits")
    names = config.names
    if _ALL in names:
        names += tuple(name for name in known if _is_of_all(name))
    return tuple(dict.fromkeys(name for name in names if name != _ALL))


def _is_of_all(name: str) -> bool:
    """Whether a network is fetched or checked where all are asked for."""
    package = installed.PACKAGES.get(name)
    if package is None:
        return bool(download.SOURCES[name].url)
    return not package.is_optional or _packaged(name).status != "missing"


def _source(config: FetchWeightsConfig, name: str) -> download.Source:
    source = download.SOURCES[name]
    sha256 = config.sha256.lower() if config.sha256 else source.sha256
    if config.url:
        return download.Source(config.url, source.file_name, sha256)
    return source._replace(sha256=sha256)


def _packaged(name: str) -> WeightFile:
    """What is there of an installed package."""
    package = installed.PACKAGES[name]
    source = f"PyPI {package.package} {package.version}"
    row = WeightFile(name, "missing", "", None, "", False, package.license, source, "")
    try:
        paths = installed.find_files(name)
    except FileNotFoundError as error:
        return row._replace(reason=str(error))
    size = sum(path.stat().st_size for path in paths)
    digests = [_sha256(path) for path in paths]
    row = row._replace(size=size, path=str(paths[0] if len(paths) == 1 else paths[0].parent))
    row = row._replace(sha256=digests[0] if len(paths) == 1 else "")
    for path, digest in zip(paths, digests, strict=True):
        if digest != package.sha256[path.name]:
            reason = f"{path} is not that of {package.package} {package.version}"
            return row._replace(status="differs", reason=reason)
    return row._replace(status="present", checked=True)


def _cached(name: str, folder: pathlib.Path, source: download.Source, *, fetch: bool) -> WeightFile:
    """What is there of a file of the cache, after fetching it if that is asked for."""
    path = folder / source.file_name
    # The hash of an archive says nothing of the file that was in it.
    published = None if source.member else source.sha256
    license = registry.get(name).license
    place = source.url or source.hint
    row = WeightFile(name, "missing", str(path), None, published or "", False, license, place, "")
    was_there = path.is_file()
    try:
        if fetch:
            if not was_there and source.url:
                logging.info("%s: fetching %s", name, files.printable(source.url))
            download.fetch(name, folder=folder, source=source)
        else:
            download.find(name, folder=folder)
    except (FileNotFoundError, ValueError) as error:
        return row._replace(reason=str(error))
    digest = _sha256(path)
    row = row._replace(size=path.stat().st_size, sha256=digest)
    if published is not None and digest != published:
        reason = f"{path} does not have the published SHA-256 {published}: delete it to fetch it"
        return row._replace(status="differs", reason=reason)
    is_fetched = fetch and not was_there
    # A fetched archive was checked as a whole.
    checked = published is not None or (is_fetched and source.sha256 is not None)
    return row._replace(status="fetched" if is_fetched else "present", checked=checked)


def _sha256(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _line(row: WeightFile) -> str:
    """A line for people."""
    size = "" if row.size is None else f"{row.size / 1e6:.1f} MB, "
    is_there = row.status in ("present", "fetched")
    state = row.status
    if is_there:
        state += ", its hash is right" if row.checked else ", no hash is published to check it by"
    where = f"at {row.path}" if is_there else row.reason
    return f"{row.name}: {state}; {size}{row.license}; source: {row.source}; {where}"
