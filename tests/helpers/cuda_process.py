"""A process that computes on GPUs and answers over pipes, for tests that drive its CUDA state from outside.

Run as a program it takes commands, one a line: ``sum`` answers what its tensors on every GPU add up to;
``spin SECONDS`` keeps the first GPU busy for about so long and answers when it has begun; ``fill MIB`` takes
the first GPU's memory but for so much and answers when it has; ``fork`` starts a child with CUDA state of its
own and answers its pid; ``child COMMAND`` answers what that child does.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[2]
MIB = 1 << 20


class CudaProcess:
    """Started and computing when the constructor returns; ``with`` ends it.

    Args:
        devices: how many GPUs it holds tensors on.
        mib: what it holds on each.
        cuda: False: it uses none.
    """

    def __init__(self, devices: int = 1, mib: int = 64, cuda: bool = True) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.cuda_process", str(devices if cuda else 0), str(mib)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        assert self._answer() == "ready"

    def __enter__(self) -> CudaProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, command: str) -> str:
        """Its answer; waits while its CUDA calls do."""
        self.tell(command)
        return self._answer()

    def tell(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"process {self.pid} ended with {self._process.wait()}"
        return line.strip()


def main(devices: int, mib: int) -> None:
    import torch

    tensors = []
    if devices:
        torch.manual_seed(1)
        tensors = [
            torch.rand(mib * MIB // 4, device=f"cuda:{index}").mul_(index + 1) for index in range(devices)
        ]
        for index in range(devices):
            torch.cuda.synchronize(index)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    children: list[CudaProcess] = []
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "sum":
            sys.stdout.write(" ".join(repr(float(tensor.sum())) for tensor in tensors) + "\n")
        elif command == "spin":
            # About 1.5 GHz: seconds need not be exact, only longer than a lock waits.
            torch.cuda._sleep(int(float(arguments[0]) * 1.5e9))
            sys.stdout.write("spinning\n")
        elif command == "fill":
            room = torch.cuda.mem_get_info(0)[0] - int(arguments[0]) * MIB
            tensors.append(torch.empty(max(room, 0), dtype=torch.uint8, device="cuda:0"))
            sys.stdout.write("full\n")
        elif command == "fork":
            children.append(CudaProcess(devices, mib))
            sys.stdout.write(f"{children[-1].pid}\n")
        elif command == "child":
            sys.stdout.write(children[-1].ask(*arguments) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
