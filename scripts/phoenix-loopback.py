"""Starts Phoenix on loopback alone, with its data in the directory given: `phoenix-loopback.py DIRECTORY HTTP_PORT GRPC_PORT`.

Phoenix listens for HTTP where `PHOENIX_HOST` says, but for gRPC on all interfaces. Here its server gets the same address for both.
"""

import os
import sys

from grpc.aio import _server

directory, http_port, grpc_port = sys.argv[1:]
os.environ |= {
    "PHOENIX_HOST": "127.0.0.1",
    "PHOENIX_PORT": http_port,
    "PHOENIX_GRPC_PORT": grpc_port,
    "PHOENIX_WORKING_DIR": directory,
    "PHOENIX_TELEMETRY_ENABLED": "false",
    "PHOENIX_ALLOW_EXTERNAL_RESOURCES": "false",
    "PHOENIX_AGENTS_DISABLE_BASH": "true",
}

add_port = _server.Server.add_insecure_port


def add_loopback_port(server, address):
    return add_port(server, address.replace("[::]", "127.0.0.1"))


_server.Server.add_insecure_port = add_loopback_port

from phoenix.server.main import main  # noqa: E402: reads the environment when it is imported

sys.argv = ["phoenix", "serve"]
main()
