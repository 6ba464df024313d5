"""What this process may use of the machine."""

import os


def cores() -> int:
    """Processor cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers(gpus: int, jobs: int = 0, threads: int = 0) -> dict[str, int]:
    """Worker processes (`jobs`) and the CPU `threads` of each; what is 0 is chosen by the machine.

    By default there is one worker per GPU; on a CPU a few small ones beat one with all threads. Threads are the cores
    over the default workers whatever `jobs` is: results depend on them in their last bits.
    """
    usual = gpus or min(4, cores())
    return {"jobs": jobs or usual, "threads": threads or max(1, cores() // usual)}


def visible_gpu(worker: int, gpus: int, visible: str = "") -> str:
    """The GPU of a worker, round robin, as `CUDA_VISIBLE_DEVICES` names it; empty without GPUs.

    `visible` is what that variable says of this program: the worker gets one of those GPUs.
    """
    if not gpus:
        return ""
    names = [name.strip() for name in visible.split(",")] if visible else [str(gpu) for gpu in range(gpus)]
    return names[worker % gpus]


def on_one_device(workers: int, gpus: int) -> int:
    """Workers that share a device, at most: all of them where it is the CPU."""
    return -(-workers // max(1, gpus))
