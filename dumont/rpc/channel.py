"""How channels are opened: their limits, their retries, and whether they use a proxy."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import socket
from collections.abc import Sequence
from typing import Any

import grpc

from dumont.errors import Unavailable
from dumont.limits import MESSAGE_BYTES


def open_channel(
    endpoint: str, services: Sequence[Any] = (), *, reconnect_seconds: float | None = None
) -> grpc.aio.Channel:
    """A plain-text channel.

    Args:
        endpoint: ``host:port``, several of them separated by commas, or ``unix:path``. Of several, the first
            that answers is used until it no longer does; their names are looked up once.
        services: service descriptors whose ``Get`` and ``List`` calls are repeated while the endpoint is
            unavailable. Nothing else is ever sent twice.
        reconnect_seconds: the longest pause between attempts to connect; gRPC's own when left out.
    """
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", MESSAGE_BYTES),
        ("grpc.max_send_message_length", MESSAGE_BYTES),
        ("grpc.service_config", _service_config(services)),
    ]
    if reconnect_seconds is not None:
        pause = round(reconnect_seconds * 1000)
        options += [(f"grpc.{bound}_reconnect_backoff_ms", pause) for bound in ("initial", "min", "max")]
    if is_local(endpoint):
        # gRPC uses http_proxy even for this machine, which no proxy can reach.
        options.append(("grpc.enable_http_proxy", 0))
    if not several(endpoint):
        return grpc.aio.insecure_channel(endpoint, options=options)
    # Where another one could answer, one that hangs must be noticed.
    options += [("grpc.keepalive_time_ms", 15_000), ("grpc.keepalive_timeout_ms", 5_000)]
    return grpc.aio.insecure_channel(_addresses(endpoint), options=options)


def several(endpoint: str) -> bool:
    """Whether an endpoint names more than one server."""
    return "," in endpoint and not endpoint.startswith(("ipv4:", "ipv6:", "dns:", "xds:", "unix:"))


def _addresses(endpoint: str) -> str:
    """gRPC takes several servers only as addresses, and only of one kind."""
    found: dict[str, list[str]] = {"ipv4": [], "ipv6": []}
    parts = endpoint.split(",")
    for part in parts:
        host, _, port = part.rpartition(":")
        for kind, family in (("ipv4", socket.AF_INET), ("ipv6", socket.AF_INET6)):
            with contextlib.suppress(OSError):
                address = socket.getaddrinfo(host.strip("[]"), int(port), family, socket.SOCK_STREAM)[0][4][0]
                found[kind].append(f"[{address}]:{port}" if kind == "ipv6" else f"{address}:{port}")
    # The kind by which more of them are known.
    kind, addresses = max(found.items(), key=lambda item: len(item[1]))
    if not addresses:
        raise Unavailable(
            "ENDPOINT_UNREACHABLE",
            f"no address is known of any of {endpoint}; check the names, or give addresses",
            metadata={"endpoint": endpoint},
        )
    return f"{kind}:{','.join(addresses)}"


def is_local(endpoint: str) -> bool:
    """Whether the endpoint is on this machine."""
    if endpoint.startswith("unix:"):
        return True
    if several(endpoint):
        return all(is_local(part) for part in endpoint.split(","))
    host = endpoint.rpartition(":")[0].removeprefix("[").removesuffix("]")
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _service_config(services: Sequence[Any]) -> str:
    names = [
        {"service": service.full_name, "method": method.name}
        for service in services
        for method in service.methods
        if method.name.startswith(("Get", "List"))
    ]
    if not names:
        return "{}"
    policy = {
        "maxAttempts": 4,
        "initialBackoff": "0.1s",
        "maxBackoff": "1s",
        "backoffMultiplier": 2,
        "retryableStatusCodes": ["UNAVAILABLE"],
    }
    return json.dumps({"methodConfig": [{"name": names, "retryPolicy": policy}]})
