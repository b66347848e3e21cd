"""Weight files that come inside installed packages, which are never imported."""

import importlib.util
import pathlib
from collections.abc import Sequence


def find_folder(
    what: str, package: str, folder: str, file_names: Sequence[str], *, version: str
) -> pathlib.Path:
    """The folder of an installed package that holds some files.

    Args:
        what: what the files are, for the message.
        package: its name, to import and to install.
        folder: within the package.
        file_names: what must lie there.
        version: of the package to install.

    Raises:
        FileNotFoundError: the package or a file is missing; the message says how to get them.
    """
    spec = importlib.util.find_spec(package)
    for root in (spec.submodule_search_locations or []) if spec else []:
        found = pathlib.Path(root) / folder
        if all((found / name).is_file() for name in file_names):
            return found
    raise FileNotFoundError(
        f"{what} were not found: install them with 'pip install {package}=={version}'"
    )
