"""Several processes of one run, as `torchrun` and `accelerate launch` start them.

All of them plan and train; the first one does everything else (writes, judges, measures, speaks) while the others wait
in `from_first`. Whatever ends one of them ends all, with one exit code, and one of them says why.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

from .errors import EdgekdError, Problem, StageError, UsageError

__all__ = [
    "Ended",
    "count",
    "first",
    "from_first",
    "gathered",
    "join",
    "launched",
    "leave",
    "mean",
    "rank",
    "same",
    "together",
]

T = TypeVar("T")
#: The others wait while the first one measures, and that may take hours.
PATIENCE = timedelta(days=30)
INTERRUPTED = 130


class Ended(EdgekdError):
    """Another process of this run has ended, and has said why: this one ends in the same way and in silence."""

    def __init__(self, code: int) -> None:
        super().__init__(f"another process of this run ended with exit code {code}")
        self.exit_code = code

    @property
    def problems(self) -> Sequence[Problem]:
        return []


@dataclass
class _Joined:
    """The processes that found each other. `group` is Gloo's wherever the training is: waiting costs no core."""

    rank: int
    count: int
    group: Any
    peers: list[tuple[str, int]]
    alone: bool = False
    said: BaseException | None = None


_joined: _Joined | None = None


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else otherwise


def launched() -> int:
    """How many processes the launcher has started; 1 without one."""
    return _number("WORLD_SIZE", 1)


def rank() -> int:
    """This process's number, as the launcher gave it."""
    return _number("RANK", 0) if launched() > 1 else 0


def first() -> bool:
    """Whether this process is the one that writes and speaks."""
    return rank() == 0


def count() -> int:
    """How many processes work together at this moment: 1 before `join`, and within `from_first`."""
    return 1 if _joined is None or _joined.alone else _joined.count


def join() -> None:
    """Meet the other processes, if the launcher started some. Raises UsageError for fewer GPUs than processes."""
    global _joined
    if _joined is not None or launched() < 2:
        return
    import torch
    from accelerate import PartialState
    from torch import distributed

    here, gpus = _number("LOCAL_WORLD_SIZE", 1), torch.cuda.device_count()
    if 0 < gpus < here:
        hint = f"--nproc-per-node {gpus}, or CUDA_VISIBLE_DEVICES='' to train on the CPU"
        raise UsageError(f"{here} processes on this machine, and {gpus} GPU{'s' if gpus > 1 else ''}", hint=hint)
    try:
        PartialState(cpu=not torch.cuda.is_available())
        group = distributed.new_group(backend="gloo", timeout=PATIENCE)
        peers: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(peers, (socket.gethostname(), os.getpid()), group=group)
    except (RuntimeError, ValueError) as error:
        what = f"cannot meet the other processes: {str(error).partition(chr(10))[0]}"
        raise StageError(what, hint="start it by `torchrun` or `accelerate launch`, on ports that are free") from error
    _joined = _Joined(distributed.get_rank(), len(peers), group, peers)
    atexit.register(_part)


def _part() -> None:
    # Gloo's threads that outlive the interpreter abort the process; NCCL would wait for whoever has died.
    from torch import distributed

    if distributed.is_initialized() and (distributed.get_backend() == "gloo" or _joined is None or not _joined.said):
        with contextlib.suppress(RuntimeError):
            distributed.destroy_process_group()
    if _joined is not None:
        _joined.group = None  # the last reference: only now its threads are joined


def leave(code: int) -> NoReturn:
    """End this process as `sys.exit` does, but for the interpreter's own end where that would change the code.

    A thread of Gloo's that frees a tensor while the interpreter goes down aborts the process (pytorch issue 190489).
    A KeyboardInterrupt that passed through an `exec` of text, as importing torch does by the hundred, counts as
    unhandled for Python although it was caught: the process would end by SIGINT instead of with the code.
    """
    if _joined is None and code != INTERRUPTED:
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Join the other processes; what is raised within ends all of them, and is raised as it is in one of them only.

    Raises StageError where a process has vanished, and Ended where another one says what happened.
    """
    if launched() < 2:
        yield
        return
    try:
        join()
        yield
    except BaseException as error:
        _ending()
        agreed = _agreed(error)
        if agreed is error:
            raise
        raise agreed from (error if isinstance(agreed, StageError) else None)
    _ending()


def from_first(work: Callable[[], T]) -> T:
    """Let the first process do it while the others wait; all get what came out (pickled between them).

    Within, the first process is by itself: nothing in it waits for the others. What it raises is raised there, and
    Ended in the others.
    """
    if count() < 2:
        return work()
    joined = _joined
    assert joined is not None
    box: list[Any] = [None]
    if joined.rank == 0:
        joined.alone = True
        try:
            box[0] = (work(), None)
        except BaseException as error:
            _ending()
            with contextlib.suppress(RuntimeError):  # they are gone themselves
                _broadcast([(None, _code(error))], joined)
            raise
        finally:
            joined.alone = False
    _broadcast(box, joined)
    value, code = box[0]
    if code is not None:
        raise Ended(code)
    return value  # type: ignore[no-any-return]


def _broadcast(box: list[Any], joined: _Joined) -> None:
    from torch import distributed

    distributed.broadcast_object_list(box, src=0, group=joined.group)


def gathered(value: T) -> list[T]:
    """Every process's value, in their order (pickled between them)."""
    if count() < 2:
        return [value]
    from torch import distributed

    assert _joined is not None
    found: list[Any] = [None] * _joined.count
    distributed.all_gather_object(found, value, group=_joined.group)
    return found


def same(tensors: Sequence[Any]) -> None:
    """Overwrite tensors of any dtypes with the first process's, all in one message."""
    if count() < 2 or not tensors:
        return
    import torch
    from torch import distributed

    with torch.no_grad():
        flat = torch.cat([t.detach().reshape(-1).view(torch.uint8) for t in tensors])
        distributed.broadcast(flat, 0)
        for tensor, part in zip(tensors, flat.split([t.numel() * t.element_size() for t in tensors]), strict=True):
            tensor.copy_(part.clone().view(tensor.dtype).view(tensor.shape))


def mean(tensors: Sequence[Any]) -> None:
    """Overwrite floating-point tensors with their mean over all processes, summed in float64, in one message."""
    if count() < 2 or not tensors:
        return
    import torch
    from torch import distributed

    with torch.no_grad():
        flat = torch.cat([t.detach().reshape(-1).double() for t in tensors])
        distributed.all_reduce(flat)
        for tensor, part in zip(tensors, (flat / count()).split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def _ending() -> None:
    """From here on this process ends by itself. The launcher, which sees another one end, must not cut it short."""
    if threading.current_thread() is threading.main_thread():
        module = getattr(signal.getsignal(signal.SIGTERM), "__module__", "")
        if module.startswith("edgekd."):  # within another program the signals are not ours
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _code(error: BaseException) -> int:
    if isinstance(error, EdgekdError):
        return error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED
    return 3 if isinstance(error, OSError) else 70


def _agreed(error: BaseException) -> BaseException:
    """The error itself where this process is the one to tell it."""
    if isinstance(error, Ended) or _joined is None or error is _joined.said:
        return error
    if _is_loss(error):
        hint = "run the same command again: it resumes from the last checkpoint"
        error = StageError("a process of this run was killed, or its machine is gone", hint=hint)
    mine = f"{_joined.rank} {_code(error)}"
    told = _tell(mine)
    if told != mine:
        return Ended(int(told.split()[1]))
    _joined.said = error
    return error


def _tell(mine: str) -> str:
    """Be the one that speaks, or learn who was before."""
    from torch.distributed import distributed_c10d

    try:
        store = distributed_c10d._get_default_store()
        key = f"edgekd-end-{_number('TORCHELASTIC_RESTART_COUNT', 0)}"
        told: bytes = store.compare_set(key, "", mine)
        return told.decode()
    except Exception:  # whoever kept the store is gone
        return mine


def _is_loss(error: BaseException) -> bool:
    """Whether it is another process's end that stopped this one."""
    if isinstance(error, KeyboardInterrupt):  # the launcher ends all when one has died, as it does when asked to
        assert _joined is not None
        return any(host == socket.gethostname() and not _lives(pid) for host, pid in _joined.peers)
    from torch import distributed

    marks = ("gloo", "nccl", "Connection closed by peer", "Connection reset by peer")
    lost = isinstance(error, distributed.DistError) or any(mark in str(error) for mark in marks)
    return isinstance(error, RuntimeError) and lost


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True
