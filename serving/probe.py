"""Health probe of containers: `python -m serving.probe HOST:PORT [SERVICE]`; 0 if SERVING.

With `--ca-file` (and `--certificate-file`, `--key-file`, `--server-name`) over TLS. Health needs no
token.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from foretell._channel import ClientSettings, sync_channel
from foretell._security import Security
from foretell.errors import ForetellError

TIMEOUT_S = 3.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Asks grpc.health.v1 of the service, or of the whole server; prints what is wrong."""
    options = _parser().parse_args(arguments)
    try:
        security = Security(
            ca_file=options.ca_file,
            certificate_file=options.certificate_file,
            key_file=options.key_file,
            server_name=options.server_name,
        )
        settings = ClientSettings(security=security)
        with sync_channel(options.address, settings, security.credentials()) as channel:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=options.service), timeout=TIMEOUT_S
            )
    except ForetellError as error:
        return _unhealthy(options.address, error.message)
    except grpc.RpcError as error:
        return _unhealthy(options.address, f"{error.code().name}: {error.details()}")
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return 0
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    return _unhealthy(options.address, name)


def _unhealthy(address: str, what: str) -> int:
    sys.stderr.write(f"{address}: {what}\n")
    return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m serving.probe", description=__doc__)
    parser.add_argument("address", metavar="HOST:PORT")
    parser.add_argument("service", nargs="?", default="", help="full name of one; default: all")
    for name in ("ca-file", "certificate-file", "key-file", "server-name"):
        parser.add_argument(f"--{name}", default="", metavar="NAME" if "name" in name else "FILE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
