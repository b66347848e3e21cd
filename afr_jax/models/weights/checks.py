"""What readers of foreign weight files share: their error, limits to what files unpack to, pickles.

A weight file is somebody else's. Before any of it is expanded, its arrays must be no larger than
the bytes that the file has for them, or than a compressed file can honestly hold.
"""

import os
import pickle
import zipfile
from typing import ClassVar

from afr_jax.core import files

_MOST_TEXT = 500


def _refuse_bytearray(_: object) -> None:
    raise ValueError("the file holds a bytearray, which a weight file does not need")


class Unpickler(pickle._Unpickler):
    """Unpickles nothing that must be looked up, to be extended by what a kind of file needs.

    It is the one in Python: the one in C makes room for as many objects as a file says that it
    will refer to, which in a few bytes can be more than there is memory. Either one makes room for
    all of a bytearray before it reads it, so there may be none.
    """

    dispatch: ClassVar = {
        **pickle._Unpickler.dispatch,
        pickle.BYTEARRAY8[0]: _refuse_bytearray,
    }

    def find_class(self, module: str, name: str) -> object:
        """Called for every class and function that the file names.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"the file refers to {module}.{name}, which a weight file does not need")


def unreadable(path: str | os.PathLike[str], kind: str, error: Exception) -> ValueError:
    """The error of a file that cannot be read, in one line.

    Args:
        path: of the file.
        kind: what it should have been.
        error: what was noticed; one that is no `ValueError` came from damage that nobody looked
            for, and its class is told as well.
    """
    reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
    reason = files.printable(reason)
    reason = reason if len(reason) <= _MOST_TEXT else f"{reason[:_MOST_TEXT]} ..."
    return ValueError(f"{files.printable(path)} is not a readable {kind}: {reason}")


def check_archive(archive: zipfile.ZipFile, file_bytes: int) -> None:
    """Checks the sizes in the directory of an archive; no member unpacks to more than it says.

    Raises:
        ValueError: the archive is a bomb.
    """
    files.check_expansion(sum(max(0, info.file_size) for info in archive.infolist()), file_bytes)
