"""Refuse a port that is in use, before a server starts its other processes.

``dagster dev`` starts a daemon beside the webserver, which continues if only the webserver fails.
"""

from __future__ import annotations

import socket
import sys

HOST = "127.0.0.1"


def port_problem(text: str) -> str | None:
    """Return why a server cannot listen on a port of this machine; None if it can."""
    if not text.isdecimal() or not 0 < int(text) < 2**16:
        return f"PORT is '{text}'; give a number from 1 to {2**16 - 1}"
    with socket.socket() as server:
        # a port whose last connections are still closing is free
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            server.bind((HOST, int(text)))
        except OSError as error:
            return (
                f"port {text} on {HOST} cannot be used ({error.strerror}); stop the server that "
                f"uses it, or give another port, for example PORT={int(text) % 65535 + 1}"
            )
    return None


if __name__ == "__main__":
    sys.exit(port_problem(sys.argv[1]))
