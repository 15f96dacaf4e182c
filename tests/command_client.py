"""A command of tests/command_server.py: pass everything to the server, and exit as it says."""

import json
import os
import socket
import sys

address, *arguments = sys.argv[1:]
if arguments[0] == "python" and (len(arguments) == 1 or arguments[1] not in ("-c", "-m", "-")):
    os.execv(sys.executable, [sys.executable, *arguments[1:]])
request = {"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(address)
    socket.send_fds(connection, [b"!"], [0, 1, 2])
    connection.sendall(json.dumps(request).encode())
    connection.shutdown(socket.SHUT_WR)
    status = int(connection.recv(16) or 1)
sys.exit(status if status >= 0 else 128 - status)
