"""What vLLM does to the process around it, and how a process that is to be frozen keeps free of it.

vLLM is made for servers of many processes: it opens a store and process groups on TCP, with a dozen threads,
even for a single rank; takes a lock from shared memory; and asks libraries that start helpers. CRIU can
follow few of these, and none is of use to one process on one device.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

from model_host.engine import Settings

VARIABLES: Final = {
    # One process, which the computing thread steps.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Nothing is told to anybody, and nothing asked of the hub.
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    # CRIU cannot follow io_uring.
    "UV_USE_IO_URING": "0",
    # No pool of processes that compile, no thread that watches progress bars, no pool that tokenises.
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "NCCL_IB_DISABLE": "1",
    # It logs as the model host does.
    "VLLM_CONFIGURE_LOGGING": "0",
    # The cores that a process may use are the node's business.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
# Each of them is private to the process: what another one writes there must not be run here.
CACHES: Final = ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "CUDA_CACHE_PATH")
# The instance's own directory, as its model host sees it.
OWN: Final = Path("/run/dumont")

_caches: Path | None = None


def prepare(settings: Settings) -> None:
    """Set what vLLM and its libraries read from the environment, and give them caches of their own."""
    global _caches
    os.environ.update(VARIABLES)
    if find_spec("flashinfer") is None:
        os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    # vLLM computes on one thread unless this is set.
    os.environ.setdefault("OMP_NUM_THREADS", str(settings.threads or len(os.sched_getaffinity(0))))
    import torch

    if torch.version.cuda is None and settings.engine_options.get("enforce_eager", True):
        # Some functions are compiled even then, which takes a C++ compiler and ten seconds.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if _caches is None:
        # The same path in every instance, and in each another directory.
        within = OWN if OWN.is_mount() else None
        _caches = Path(tempfile.mkdtemp(prefix="vllm-", dir=within))
    for name in CACHES:
        os.environ[name] = str(_caches / name.lower())


def forget_caches() -> None:
    """Remove the files of the caches. What is mapped of them stays, and a snapshot carries it."""
    if _caches is not None:
        shutil.rmtree(_caches, ignore_errors=True)


@contextmanager
def alone() -> Iterator[None]:
    """While an engine is made: no real process groups, no lock in shared memory, no helper process."""
    import torch
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from tqdm.std import TqdmDefaultWriteLock  # type: ignore[import-untyped]
    from vllm.model_executor.models import registry
    from vllm.v1.executor import uniproc_executor

    distributed = torch.distributed
    init, new = distributed.init_process_group, distributed.new_group

    def init_process_group(*_: Any, **__: Any) -> None:
        init(backend="fake", store=FakeStore(), rank=0, world_size=1)

    def new_group(ranks: Any = None, *_: Any, **__: Any) -> Any:
        return new(ranks, backend="fake")

    with ExitStack() as stack:
        stack.enter_context(patch.object(distributed, "init_process_group", init_process_group))
        stack.enter_context(patch.object(distributed, "new_group", new_group))
        # multiprocessing's locks are semaphores in /dev/shm. tqdm makes its own once, unless it has one.
        stack.enter_context(patch.object(uniproc_executor, "Lock", threading.Lock))
        TqdmDefaultWriteLock.mp_lock = None
        # In a process of its own it would import all of vLLM a second time.
        stack.enter_context(patch.object(registry, "_run_in_subprocess", lambda look: look()))
        yield
