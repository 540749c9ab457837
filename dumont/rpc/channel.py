"""How channels are opened: their limits, their retries, and whether they use a proxy."""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Sequence
from typing import Any

import grpc

from dumont.limits import MESSAGE_BYTES


def open_channel(
    endpoint: str, services: Sequence[Any] = (), *, reconnect_seconds: float | None = None
) -> grpc.aio.Channel:
    """A plain-text channel.

    Args:
        endpoint: ``host:port`` or ``unix:path``.
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
    return grpc.aio.insecure_channel(endpoint, options=options)


def is_local(endpoint: str) -> bool:
    """Whether the endpoint is on this machine."""
    if endpoint.startswith("unix:"):
        return True
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
