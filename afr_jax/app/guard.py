"""What every request must pass: the right host, no other site behind it, the token; safe headers.

A page of another site can send requests to this machine from the browser of whoever looks at it.
It cannot set our headers, nor read the token, nor change what the browser says of its origin; and a
name that it lets point here (DNS rebinding) stands in the header Host.
"""

import hmac
import ipaddress
import socket
from collections.abc import MutableMapping
from typing import Any

from starlette import datastructures, responses, types

from afr_jax.app import app_program

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}


class Guard:
    """ASGI middleware."""

    def __init__(self, app: types.ASGIApp, *, config: app_program.AppConfig) -> None:
        """Takes the application behind it, and the options of the page."""
        self._app, self._config = app, config

    async def __call__(self, scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
        """Lets a request through, or answers that it is refused."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return

        async def send_guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = datastructures.MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        problem = self._problem(datastructures.Headers(scope=scope), scope["method"])
        if problem is not None:
            status, text = problem
            await responses.PlainTextResponse(text, status)(scope, receive, send_guarded)
            return
        await self._app(scope, receive, send_guarded)

    def _problem(self, headers: datastructures.Headers, method: str) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if not is_own_host(host, self._config):
            return 421, "This page is served under another name."
        if method not in ("GET", "HEAD", "POST"):
            return 405, "There is nothing of this kind here."
        origin = headers.get("origin")
        if origin is not None and origin != f"http://{host}":
            return 403, "Requests of other sites are refused."
        site = headers.get("sec-fetch-site", "same-origin")
        is_visit = method == "GET" and headers.get("sec-fetch-mode") == "navigate"
        if site not in ("same-origin", "none") and not is_visit:
            return 403, "Requests of other sites are refused."
        return None


def is_own_host(host: str, config: app_program.AppConfig) -> bool:
    """Whether a header Host is an address of this server, and no name that points here.

    Args:
        host: name or address with a port.
        config: an address other than a local one admits every address, as there may be several,
            and the name of this machine.
    """
    name, colon, port = host.rpartition(":")
    if not colon or "]" in port:
        name, port = host, "80"
    if config.port and port != str(config.port):
        return False
    name = name.lower()
    if name == "localhost":
        return True
    try:
        address = ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return not config.is_local and name in (config.host.lower(), socket.gethostname().lower())
    return address.is_loopback if config.is_local else True


def is_token(given: str | None, expected: str) -> bool:
    """Whether a secret is the expected one, in a time that does not tell how much of it is."""
    return given is not None and hmac.compare_digest(given.encode(), expected.encode())
