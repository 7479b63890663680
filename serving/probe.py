"""Health probe of containers: `python -m serving.probe HOST:PORT [SERVICE]`; 0 if SERVING."""

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT_S = 3.0


def main(arguments: list[str]) -> int:
    """Asks grpc.health.v1 of the service, or of the whole server; prints what is wrong."""
    address, service = (*arguments, "")[:2]
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            sys.stderr.write(f"{address}: {error.code().name}: {error.details()}\n")
            return 1
    if answer.status == health_pb2.HealthCheckResponse.SERVING:
        return 0
    sys.stderr.write(
        f"{address}: {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}\n"
    )
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
