"""The health check that compose.yaml has for SeaweedFS, against the real server."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import urllib3
import yaml

from tests.helpers.s3_server import S3Server

COMPOSE = Path(__file__).parents[2] / "compose.yaml"


def test_the_server_says_that_it_is_healthy_where_compose_asks(s3_server: S3Server) -> None:
    service = yaml.safe_load(COMPOSE.read_text())["services"]["seaweedfs"]
    asked = urlsplit(service["healthcheck"]["test"][-1])
    answer = urllib3.request("GET", f"{s3_server.endpoint}{asked.path}", timeout=10, retries=False)
    assert answer.status == 200, answer.data
    # Not what it says of any path.
    other = urllib3.request("GET", f"{s3_server.endpoint}/no-such-bucket/key", timeout=10, retries=False)
    assert other.status != 200
