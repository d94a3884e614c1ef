"""How much a session may use, and who may open one."""

import dataclasses
import hmac
from collections.abc import Mapping
from urllib.parse import urlsplit

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a session may use before it ends with a reason."""

    message_bytes: int = 1 << 20  # of one message: 22 s of 16-bit audio
    moved_bytes: int = 1 << 26  # of a session from another server: 17 MB for the published model
    idle_seconds: float = 60.0  # without a message
    total_seconds: float = 3600.0
    send_seconds: float = 5.0  # until a message is taken; a reader that is slower is dropped


@dataclasses.dataclass(frozen=True)
class Access:
    """Who may open a session.

    Args:
        token: that a client must give, as `?token=` or as `Authorization: Bearer`; None: none is needed.
        hosts: names of this server that a client may use; empty for any. A page elsewhere can make its own
            name mean this machine, but cannot make the browser send another name.
        origins: of pages elsewhere that may connect, such as "https://example.org".
    """

    token: str | None = None
    hosts: tuple[str, ...] = LOOPBACK
    origins: tuple[str, ...] = ()

    def problem(self, headers: Mapping[str, str], query: Mapping[str, str]) -> str | None:
        """Why a request is refused; None if it is not."""
        host, origin = headers.get("host", ""), headers.get("origin")
        try:
            name, page = urlsplit(f"//{host}").hostname or "", urlsplit(origin or "").netloc
        except ValueError:  # half an IPv6 address
            return f"Host or Origin is no address: {host!r}, {origin!r}"
        if self.hosts and name not in self.hosts:
            return f"this server is not {name!r}; allow the name with --allow-host"
        if origin is not None and page != host and origin not in self.origins:
            return f"pages of {origin} may not connect; allow them with --allow-origin"
        if self.token is not None:
            given = query.get("token") or headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), self.token.encode()):
                return "the token is wrong or missing; give it as ?token= or as Authorization: Bearer"
        return None
