"""Ask a Flower process whether it is well: exit code 0 where it is.

    python health.py 127.0.0.1:9090

The address is that of its `--health-server-address`, which is to be on the loopback device alone.
"""

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

with grpc.insecure_channel(sys.argv[1]) as channel:
    try:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=5)
    except grpc.RpcError as error:
        sys.exit(f"{sys.argv[1]}: {error.code().name}")
sys.exit(answer.status != health_pb2.HealthCheckResponse.SERVING)
