"""What all readers of foreign weight files share: their error, and limits to what files unpack to.

A weight file is somebody else's. Before any of it is expanded, its arrays must be no larger than
the bytes that the file has for them, or than a compressed file can honestly hold.
"""

import os
import zipfile

from afr_jax.core import files

# Trained weights hardly shrink: compressed files are a tenth smaller, those of halves and zeros a
# few times. Small ones may be anything.
_MOST_EXPANSION = 20
_SMALL = 1 << 26
_MOST_TEXT = 500


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


def check_expansion(num_bytes: int, file_bytes: int) -> None:
    """Checks that arrays are not absurdly larger than the file that they are said to be in.

    Raises:
        ValueError: they are.
    """
    if num_bytes > max(_SMALL, _MOST_EXPANSION * file_bytes):
        raise ValueError(f"{file_bytes} bytes say that they unpack to {num_bytes}")


def check_archive(archive: zipfile.ZipFile, file_bytes: int) -> None:
    """Checks the sizes in the directory of an archive; no member unpacks to more than it says.

    Raises:
        ValueError: the archive is a bomb.
    """
    check_expansion(sum(max(0, info.file_size) for info in archive.infolist()), file_bytes)
