"""A server's process: socket, signals, startup and shutdown."""

import ipaddress
import os
import socket
from types import FrameType
from typing import Any

import uvicorn

from dca_jax.errors import InputError
from dca_jax.fields import shown

BACKLOG = 2048  # maximum pending connections


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 chooses a free port.

    Raises:
        InputError: the address does not belong to this machine, or is in use.
    """
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(place[:2], family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:  # UnicodeError: a part of the name is too long
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            f"cannot listen on {shown(host)} port {port}: {reason}; choose another --host or --port"
        ) from None


def is_loopback(opened: socket.socket) -> bool:
    """Whether a socket is reachable only from this machine."""
    return ipaddress.ip_address(opened.getsockname()[0]).is_loopback


class Server(uvicorn.Server):
    """A server that finishes its answers on the first signal, and ends at once on a second."""

    def __init__(self, app: Any) -> None:
        options = {"access_log": False, "log_level": "warning", "lifespan": "off", "ws": "none"}
        super().__init__(uvicorn.Config(app, server_header=False, **options))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal to end."""
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True
