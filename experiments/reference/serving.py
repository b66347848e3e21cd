"""The drivers' side of the protocol: answers requests, one JSON object a line, until input ends.

A request is `{"command": NAME, ...}` on standard input, an answer `{...}` on standard output, or
`{"error": TEXT}`; arrays travel as `.npy` files, named in the request. The first line, before any
request, is `{"versions": {...}}`. Runs under any Python with the standard library; the other side
is `afr_jax.evaluation.reference`.
"""

import contextlib
import json
import os
import platform
import sys
import traceback
from collections.abc import Callable, Mapping
from importlib import metadata


def serve(versions: Mapping[str, str], handlers: Mapping[str, Callable[..., dict]]) -> None:
    """Answers requests until standard input is closed.

    Args:
        versions: of the interpreter and the libraries that are measured.
        handlers: by command; called with the request's other entries as keywords.
    """
    # What libraries print, also from C, goes to standard error: the answers have the pipe alone.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    _send(answers, {"versions": dict(versions)})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = handlers[request.pop("command")](**request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        _send(answers, answer)


def versions(*packages: str) -> dict[str, str]:
    """Versions of the interpreter and of those packages that are installed under their name."""
    found = {"python": platform.python_version()}
    for name in packages:
        # TensorFlow's CPU wheel has a name of its own.
        for distribution in (name, f"{name}-cpu"):
            with contextlib.suppress(metadata.PackageNotFoundError):
                found.setdefault(name, metadata.version(distribution))
    return found


def _send(answers, value):
    answers.write(json.dumps(value) + "\n")
    answers.flush()
