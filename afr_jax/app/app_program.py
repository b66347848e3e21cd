"""Config and run of the local page."""

import dataclasses
import ipaddress

from afr_jax.core import options
from afr_jax.evaluation.cloaking import cloak_files

_MISSING = "python -m pip install -r requirements-app.txt"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AppConfig(options.Config):
    """Serves a page on this machine: cloak photos by hand, check them, make patches, protect sets.

        python -m experiments.app

    prints the address of the page and serves it until Ctrl-C. Nothing leaves the machine: the page
    loads nothing from elsewhere, and photos lie in a temporary folder that is deleted when the page
    is closed and when the server ends. What a killed server left is deleted at the next start.

    The work is done by the calls of the other programs, one job at a time in a process of its own;
    the same photos and seed give the bytes of `experiments.cloak`.

    By default only this machine can reach the page. With another --host, whoever opens it needs the
    token in the address that is printed; the connection is not encrypted.

    It needs two more packages: python -m pip install -r requirements-app.txt
    """

    host: str = options.option("127.0.0.1", "address to serve at; another one needs a token")
    port: int = options.option(8765, "port; 0: any that is free", at_least=0, at_most=65535)
    surrogates: tuple[str, ...] = options.option(
        cloak_files.DEFAULT_SURROGATES, "extractors to cloak against"
    )
    check: tuple[str, ...] = options.option((), "further extractors that judge the cloak")
    weights: tuple[str, ...] = options.option(
        (), "weight files: NAME=FILE, or FILE for one extractor"
    )
    num_steps: int = options.option(100, "gradient steps of a face", at_least=0)
    temp_dir: str | None = options.option(None, "where temporary folders go; default: the system's")
    max_upload_mb: int = options.option(300, "largest film or zip, megabytes", at_least=1)
    max_session_mb: int = options.option(1000, "all files of one browser, megabytes", at_least=1)
    short: bool = options.option(False, "patches and noise in a few steps, to look at the page")

    def toy(self) -> "AppConfig":
        """Four steps, patches and noise that are worth nothing."""
        return dataclasses.replace(self, num_steps=min(self.num_steps, 4), short=True)

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches the page."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def run(config: AppConfig) -> options.Outcome:
    """Serves the page until a signal comes.

    Raises:
        options.UsageError: packages are missing, the address cannot be used, or the extractors.
    """
    if config.workdir is not None:
        raise options.UsageError("--workdir: the page keeps nothing")
    try:
        from afr_jax.app import server  # Optional: nothing else needs its packages.
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn", "anyio"):
            raise
        raise options.UsageError(f"the page needs the package {error.name}: {_MISSING}") from error
    return server.serve(config)
