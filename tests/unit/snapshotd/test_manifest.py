"""A manifest says what it said, and nothing that could not be true."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from dumont.errors import DataLoss
from snapshotd import manifest as manifests
from snapshotd.model import Canary, ImageFile, Manifest, Phase, Weights

DIGEST = "ab" * 32


def a_manifest(**changes: Any) -> Manifest:
    return replace(
        Manifest(
            id="s1",
            deployment="deployments/qa",
            model="org/model",
            engine="causal_lm",
            device="cpu",
            create_time=datetime(2026, 11, 1, tzinfo=UTC),
            source_pause_seconds=0.25,
            phases=(Phase("drain", 0.1),),
            canary=Canary((1, 2, 3), -0.5),
            compatibility={"kernel": "6.18"},
            mounts=("/dev", "/run/dumont"),
            pipes={"control_in": 7},
            files=(ImageFile("pages-1.img", 4096, DIGEST),),
        ),
        **changes,
    )


def test_it_reads_back_as_it_was_written() -> None:
    assert manifests.decode(manifests.encode(a_manifest())) == a_manifest()


def test_it_says_where_the_weights_are() -> None:
    manifest = a_manifest(weights=Weights.INCLUDED, weight_files={"model.safetensors": DIGEST})
    assert manifests.decode(manifests.encode(manifest)) == manifest


@pytest.mark.parametrize("digest", ["", "../x", DIGEST.upper(), DIGEST + "0"])
def test_a_weight_file_without_a_possible_digest_is_refused(digest: str) -> None:
    data = manifests.encode(a_manifest(weight_files={"model.safetensors": digest}))
    with pytest.raises(DataLoss) as refusal:
        manifests.decode(data)
    assert refusal.value.reason == "MANIFEST_DAMAGED"


def test_its_digest_is_that_of_its_bytes() -> None:
    one, other = manifests.encode(a_manifest()), manifests.encode(a_manifest(id="s2"))
    assert manifests.digest(one) == manifests.digest(manifests.encode(a_manifest()))
    assert manifests.digest(one) != manifests.digest(other)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/x", "a//b", "a\0b", "", ".", "..", ".hidden", "x" * 200, "manifest.json", "a/b"]
)
def test_a_hostile_file_name_is_refused(name: str) -> None:
    data = manifests.encode(a_manifest(files=(ImageFile(name, 1, DIGEST),)))
    with pytest.raises(DataLoss) as refusal:
        manifests.decode(data)
    assert refusal.value.reason == "MANIFEST_DAMAGED"


@pytest.mark.parametrize("twin", ["pages-1.img", "pages-1.IMG"])
def test_two_files_of_one_name_are_refused(twin: str) -> None:
    files = (ImageFile("pages-1.img", 1, DIGEST), ImageFile(twin, 1, DIGEST))
    with pytest.raises(DataLoss, match="twice"):
        manifests.decode(manifests.encode(a_manifest(files=files)))


@pytest.mark.parametrize("size", [-1, 1 << 63])
def test_an_impossible_size_is_refused(size: int) -> None:
    with pytest.raises(DataLoss):
        manifests.decode(manifests.encode(a_manifest(files=(ImageFile("a.img", size, DIGEST),))))


def test_no_files_or_too_many_are_refused() -> None:
    many = tuple(ImageFile(f"f{n}.img", 1, DIGEST) for n in range(manifests.MOST_FILES + 1))
    for files in ((), many):
        with pytest.raises(DataLoss):
            manifests.decode(manifests.encode(a_manifest(files=files)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        b"[1]",
        b"\xff\xfe",
        b'{"version": 2, "manifest": {}}',
        b'{"version": 1, "manifest": {}}',
        b'{"version": 1, "manifest": NaN}',
        b"[" * 100_000,
        b" " * (manifests.LARGEST + 1),
    ],
    ids=["empty", "object", "list", "bytes", "version", "fields", "nan", "deep", "large"],
)
def test_what_is_no_manifest_is_refused(data: bytes) -> None:
    with pytest.raises(DataLoss) as refusal:
        manifests.decode(data)
    assert refusal.value.reason == "MANIFEST_DAMAGED"


def test_a_number_that_is_none_is_refused() -> None:
    document = json.loads(manifests.encode(a_manifest()))
    text = json.dumps(document).replace("0.25", "NaN")
    with pytest.raises(DataLoss):
        manifests.decode(text.encode())
