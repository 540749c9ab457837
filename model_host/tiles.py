"""Permission for AMX tile registers, which a restored process must ask for again.

Libraries ask for it once and then use tiles for bf16 products. The kernel keeps the permission with the
process and CRIU does not bring it back: the first product after a restore would end in SIGILL.
Source: Linux, Documentation/arch/x86/xstate.rst.
"""

from __future__ import annotations

import ctypes
import platform
from typing import Final

ARCH_PRCTL: Final = 158
GET_PERMISSION: Final = 0x1022
REQUEST_PERMISSION: Final = 0x1023
TILE_DATA: Final = 18


def held() -> bool:
    """Whether this process may use tiles."""
    if platform.machine() != "x86_64":
        return False
    features = ctypes.c_uint64()
    failed = ctypes.CDLL(None).syscall(ARCH_PRCTL, GET_PERMISSION, ctypes.byref(features))
    return not failed and bool(features.value >> TILE_DATA & 1)


def request() -> None:
    """Ask for tiles. Where the CPU has none the kernel refuses and nothing needs them."""
    if platform.machine() == "x86_64" and not held():
        ctypes.CDLL(None).syscall(ARCH_PRCTL, REQUEST_PERMISSION, TILE_DATA)
