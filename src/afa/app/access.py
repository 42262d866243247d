"""Who can reach the page, and at which address: directly, or through a proxy."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from afa.errors import AfaError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_EVERYWHERE = ("0.0.0.0", "::")  # addresses to listen on, which are no names of hosts
_MIN_LENGTH = 8
_PATH = re.compile(r"(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)*")
_NAME = re.compile(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*")
#: where the page has files of its own, below which no path can be: gradio removes the path from
#: requests, also where a proxy has removed it already
OWN_FILES = frozenset(
    [
        *("assets", "config", "favicon.ico", "gradio_api", "login", "logout"),
        *("manifest.json", "monitoring", "openapi.json", "pwa_icon", "robots.txt"),
        *("static", "svelte", "theme.css"),
    ]
)
#: a host in a header: a name or a bracketed IPv6 address, and a port; nothing else is parsed
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]+))(?::\d+)?")


@dataclass(frozen=True)
class Access:
    """The address of the page and the hosts that it answers to.

    Attributes:
        path: its path without a slash at the end; "" for the root.
        scheme: http or https of its public address; None if the proxy's headers give it.
        authority: host and port of its public address; None if the proxy's headers give it.
        hosts: names of this page, such as `example.org` or `*.example.org`; None for any.
        named: the names among them that the user gave.
    """

    path: str = ""
    scheme: str | None = None
    authority: str | None = None
    hosts: tuple[str, ...] | None = None
    named: tuple[str, ...] = ()

    def answers_to(self, host: str) -> bool:
        """Whether a host is one of this page."""
        return self.hosts is None or _matches(host, self.hosts)

    def accepts_origin(self, origin: str, own: Sequence[str]) -> bool:
        """Whether pages of an origin may send requests; `own` are the hosts of the request."""
        host = _host_in(origin.partition("://")[2])
        return host is not None and (host in own or _matches(host, self.named))


def read_access(
    host: str, root_path: str | None = None, allowed_hosts: Iterable[str] = ()
) -> Access:
    """Read where the page is.

    Args:
        host: address to listen on.
        root_path: a path such as `/afa`, or the complete public address.
        allowed_hosts: names of the page besides those of this machine.

    Raises:
        AfaError: if the path or a name is invalid, or the page has files of its own there.
    """
    parts = urlsplit(root_path or "") if _is_complete(root_path) else None
    path = (parts.path if parts else root_path or "").rstrip("/")
    if not _PATH.fullmatch(path) or (
        parts and (parts.query or parts.fragment or _host_in(parts.netloc.lower()) is None)
    ):
        raise AfaError(
            "AFA-APP-008",
            "--root-path must be a path such as /afa, or the complete address of the page such as "
            f"https://example.org/afa; got '{root_path}'.",
        )
    if path[1:].partition("/")[0] in OWN_FILES:
        raise AfaError(
            "AFA-APP-011",
            f"--root-path must not be '{path}', where the page has files of its own. Pass another "
            "path, such as /afa.",
        )
    named = [name.lower() for name in allowed_hosts]
    for name in named:
        if not (_NAME.fullmatch(name) or _is_ip_address(name)):
            raise AfaError(
                "AFA-APP-009",
                "--allowed-host must be the name of one host without scheme, port and path, such "
                f"as example.org, or *.example.org for all below it; got '{name}'.",
            )
    if parts:
        named.append(str(_host_in(parts.netloc.lower())))
    listening = [] if host in _EVERYWHERE else [host.lower()]
    limited = host in LOOPBACK or bool(named)
    return Access(
        path,
        parts.scheme if parts else None,
        parts.netloc.lower() if parts else None,
        (*LOOPBACK, *listening, *named) if limited else None,
        tuple(named),
    )


def _is_complete(text: str | None) -> bool:
    return (text or "").lower().startswith(("http://", "https://"))


def _is_ip_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def check_reach(
    host: str, password: str | None, named: Sequence[str] = (), *, open_to_all: bool = False
) -> None:
    """Require a password of sufficient length if others can reach the page.

    Args:
        host: address to listen on.
        password: the password; None for none.
        named: names of hosts at which a proxy shows the page.
        open_to_all: whether the page needs no password behind a proxy.

    Raises:
        AfaError: if others can reach the page and there is no password, or the password is short.
    """
    if host not in LOOPBACK and password is None:
        raise AfaError(
            "AFA-APP-004",
            f"--host {host} lets other machines reach the page, which requires a password. Pass "
            "--password-file FILE.",
        )
    elsewhere = [name for name in named if name not in LOOPBACK]
    if elsewhere and password is None and not open_to_all:
        raise AfaError(
            "AFA-APP-010",
            f"A proxy lets others reach the page at '{elsewhere[0]}', which requires a password. "
            "Pass --password-file FILE, or --no-password if the proxy itself asks for one.",
        )
    if password is not None and len(password) < _MIN_LENGTH:
        raise AfaError(
            "AFA-APP-005",
            f"The password must have at least {_MIN_LENGTH} characters; got {len(password)}. Put a "
            "longer one in the first line of the password file.",
        )


class Guard:
    """Middleware that refuses requests for other hosts, from other pages, and uploads.

    The host is checked against DNS rebinding; the origin, since a browser would send the cookie
    of a login with requests of any other page. A proxy's `X-Forwarded-Host` is checked as well:
    the addresses of pictures are made from it.
    """

    def __init__(self, app: Any, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer refused requests with 400 or 403, and pass on all others."""
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        refused = self._refused(scope)
        if refused is None:
            scope = {**scope, "headers": list(self._headers(scope))}
            await self._app(scope, receive, self._with_own_cookies(send))
            return
        status, text = refused
        kind = f"{'websocket.' if scope['type'] == 'websocket' else ''}http.response"
        content = [(b"content-type", b"text/plain; charset=utf-8")]
        await send({"type": f"{kind}.start", "status": status, "headers": content})
        await send({"type": f"{kind}.body", "body": text.encode()})

    def _refused(self, scope: Any) -> tuple[int, str] | None:
        """The status and text of a refusal; None to pass the request on."""
        given = {
            name: [
                value.decode("latin-1").strip().lower()
                for key, value in scope["headers"]
                if key == name
            ]
            for name in (b"host", b"x-forwarded-host", b"origin")
        }
        asked = [*given[b"host"], *(x.split(",")[0].strip() for x in given[b"x-forwarded-host"])]
        hosts = [_host_in(host) for host in asked]
        for host in hosts:
            if host is None or not self._access.answers_to(host):
                named = host or "NAME"
                return 400, (
                    f"The page does not answer to the host '{named}'. If it is the page's own, "
                    f"start it with: afa app --allowed-host {named}\n"
                )
        if not hosts:
            return 400, "The request names no host.\n"
        own = [host for host in hosts if host is not None]
        if not all(self._access.accepts_origin(origin, own) for origin in given[b"origin"]):
            return 403, (
                "Pages of other hosts may not send requests. If the page is shown under another "
                "name by a proxy, pass it as --allowed-host NAME.\n"
            )
        if scope["path"].rstrip("/").endswith(("/upload", "/upload_progress")):
            return 403, "Uploads are disabled."
        return None

    def _headers(self, scope: Any) -> Iterable[tuple[bytes, bytes]]:
        """The headers of a request, from which gradio makes the addresses of pictures."""
        access, fixed = self._access, {b"x-gradio-server"}
        if access.authority is not None and access.scheme is not None:
            fixed |= {b"x-forwarded-host", b"x-forwarded-proto"}
            yield b"x-forwarded-host", access.authority.encode()
            yield b"x-forwarded-proto", access.scheme.encode()
        for key, value in scope["headers"]:
            if key not in fixed:
                yield key, value

    def _with_own_cookies(self, send: Any) -> Any:
        """Restrict cookies to the path of the page and to requests of its own site."""
        path = f"Path={self._access.path or '/'}"

        async def restricted(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {
                    **message,
                    "headers": [
                        (key, _restricted(value, path) if key.lower() == b"set-cookie" else value)
                        for key, value in message.get("headers", [])
                    ],
                }
            await send(message)

        return restricted


def _restricted(cookie: bytes, path: str) -> bytes:
    text = re.sub(r"(?i)\bPath=/(?=;|$)", path, cookie.decode("latin-1"))
    return re.sub(r"(?i)\bSameSite=none\b", "SameSite=lax", text).encode("latin-1")


def _host_in(header: str) -> str | None:
    """The host of `name:port`; None if it is not one."""
    found = _HOST.fullmatch(header)
    return None if found is None else found[1] or found[2]


def _matches(host: str, names: Iterable[str]) -> bool:
    return any(
        host == name or (name.startswith("*.") and host.endswith(name[1:])) for name in names
    )
