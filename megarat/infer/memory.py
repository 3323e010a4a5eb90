"""What a cache will take, said and checked before it is taken."""

from __future__ import annotations

from pathlib import Path

import torch

from megarat.errors import UserError

_HEADROOM = 0.9  # of the free memory; the rest is for activations


def free_bytes(device: torch.device | str) -> int:
    """Memory that can still be taken on a device: of the GPU, what torch holds unused among it, or what the system calls available."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("Linux tells MemAvailable")


def largest_batch(bytes_per_sequence: int, device: torch.device | str) -> int:
    """How many caches of that size fit into the memory that is free now."""
    return int(_HEADROOM * free_bytes(device) // max(1, bytes_per_sequence))


def check_fits(batch: int, bytes_per_sequence: int, length: int, device: torch.device | str) -> None:
    """Raise ``UserError`` with the largest batch that would fit, where ``batch`` caches of ``length`` tokens do not."""
    free = free_bytes(device)
    if batch * bytes_per_sequence <= _HEADROOM * free:
        return
    most = largest_batch(bytes_per_sequence, device)
    rather = (
        f"the largest batch that fits is {most}"
        if most
        else "not even one sequence fits; take a sparser pattern or a shorter one"
    )
    raise UserError(
        f"{batch} sequences of {length} tokens need {batch * bytes_per_sequence / 2**30:.2f} GiB of cache, but {device} has "
        f"{free / 2**30:.2f} GiB free ({_HEADROOM:.0%} usable): {rather}"
    )
