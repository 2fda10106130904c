"""What runs on a device for each request: sent over ssh, standard library only, Python 3.8 or newer.

A request is a JSON object with `do` and its arguments; answers are JSON objects, one a line, each behind a mark that no
login script prints. What lies on the device:

    DIRECTORY/lock             held by the runner while it measures (flock); its bundle's key is in it meanwhile
    DIRECTORY/KEY/             a bundle: its files, and beside them what the runner writes
    DIRECTORY/KEY/.log         what the runner said
    DIRECTORY/KEY/.ended       the runner's exit status, once it has one
    DIRECTORY/KEY/.taken       somebody has been told how that run ended: the next one begins anew
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

__all__ = ["MARK", "answer"]

MARK = "\x1e"
PAUSE_S = 0.2
#: A line at least so often: whoever listens knows that the connection lives.
BEAT_S = 5.0
TAIL_BYTES = 4000
#: Loading CUDA libraries from a cold disk takes this long at worst.
IMPORT_S = 60.0
#: Runs the command, then writes its exit status; killed or alive, the lock is held as long as one of the two is.
SHELL = '"$@" >.log 2>&1 </dev/null; echo $? >.ended.part && mv .ended.part .ended; : >../lock'
RUNTIMES = ("onnxruntime", "tensorrt")
TRTEXEC = ("/usr/src/tensorrt/bin", "/usr/local/tensorrt/bin")


def answer(request: dict[str, Any], stream: BinaryIO) -> None:
    """Do what `request` asks; `stream` gives the bytes that come with it."""
    say(begun=True)
    try:
        OPERATIONS[request["do"]](request, stream)
    except OSError as error:
        say(error=errno.errorcode.get(error.errno or 0, "?"), strerror=error.strerror, path=error.filename,
            free=_free(_root(request)))  # fmt: skip


def say(**reply: Any) -> None:
    sys.stdout.write(MARK + json.dumps(reply) + "\n")
    sys.stdout.flush()


def hello(request: dict[str, Any], stream: BinaryIO) -> None:
    """What a bench needs to know before anything is copied."""
    root = _root(request)
    say(
        python=platform.python_version(),
        machine=platform.machine(),
        flags=_flags(),
        numpy=importlib.util.find_spec("numpy") is not None,
        runtimes=[*(name for name in RUNTIMES if importlib.util.find_spec(name) is not None),
                  *(["trtexec"] if _trtexec() else [])],
        directory=root,
        free=_free(root),
        **_board(),
    )  # fmt: skip


def check(request: dict[str, Any], stream: BinaryIO) -> None:
    """All that says whether this machine is ready; takes as long as its runtimes need to be imported."""
    root = _root(request)
    trtexec = _trtexec()
    say(
        python=platform.python_version(),
        machine=platform.machine(),
        flags=_flags(),
        modules={name: _imported(name) for name in ("numpy", *RUNTIMES)},
        trtexec=[trtexec, _said([trtexec, "--help"])[:2000]] if trtexec else None,
        directory=root,
        free=_free(root),
        writable=_writable(root),
        kept=_kept(root),
        holder=_holder(root),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        load=os.getloadavg()[0],
        governor=_read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        cpu=_read("/proc/cpuinfo"),
        time=time.time(),
        **_board(),
    )


def look(request: dict[str, Any], stream: BinaryIO) -> None:
    """Which files of a bundle are not here, how its run stands, and who measures now."""
    root, home = _root(request), _home(request)
    missing = [name for name, sha256 in request["contents"].items() if _sha256(os.path.join(home, name)) != sha256]
    say(missing=missing, state=_state(root, home, request["key"]), holder=_holder(root), free=_free(root))


def receive(request: dict[str, Any], stream: BinaryIO) -> None:
    """Files one after the other from the stream: [name, bytes, sha256] each."""
    home, left, damaged = _home(request), 0, []
    os.makedirs(home, exist_ok=True)
    for name, size, sha256 in request["contents"]:
        part = os.path.join(home, f".{name}.{os.getpid()}.part")
        digest, left = hashlib.sha256(), size
        try:
            with open(part, "wb") as file:
                while left:
                    block = stream.read(min(left, 1 << 20))
                    if not block:
                        raise OSError(errno.EPIPE, "the connection ended", part)
                    file.write(block)
                    digest.update(block)
                    left -= len(block)
            if digest.hexdigest() == sha256:
                os.replace(part, os.path.join(home, name))
            else:
                damaged.append(name)
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.path.join(home, name)) from error
        finally:
            with contextlib.suppress(OSError):
                os.unlink(part)
    say(damaged=damaged)


def start(request: dict[str, Any], stream: BinaryIO) -> None:
    """Start the runner, in a session of its own that outlives the connection; or say who measures."""
    root, home = _root(request), _home(request)
    lock = _hold(root)
    if lock is None:
        say(started=False, holder=_holder(root))
        return
    again = ["--again"] if os.path.exists(os.path.join(home, ".taken")) else []
    for name in (".ended", ".taken", ".log"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(home, name))
    os.write(lock, json.dumps({"key": request["key"], "who": request["who"], "since": time.time()}).encode())
    subprocess.Popen(
        ["/bin/sh", "-c", SHELL, "edgekd", sys.executable, *request["command"], *again],
        cwd=home,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        pass_fds=(lock,),
    )
    say(started=True)


def follow(request: dict[str, Any], stream: BinaryIO) -> None:
    """The runner's lines from byte `at` of its log on, as they come, until it has ended."""
    root, home, at = _root(request), _home(request), request.get("at", 0)
    beat = time.monotonic()
    while True:
        state = _state(root, home, request["key"])
        with contextlib.suppress(FileNotFoundError), open(os.path.join(home, ".log"), "rb") as file:
            file.seek(at)
            text = file.read()
            whole = text if state != "running" else text[: text.rfind(b"\n") + 1]
            at += len(whole)
            for line in whole.decode("utf-8", "replace").splitlines():
                say(line=line)
                beat = time.monotonic()
        if state != "running":
            say(state=state, status=_ended(home), log=_tail(os.path.join(home, ".log")))
            return
        if time.monotonic() - beat > BEAT_S:
            say(alive=True)
            beat = time.monotonic()
        time.sleep(PAUSE_S)


def fetch(request: dict[str, Any], stream: BinaryIO) -> None:
    """A file of the bundle's directory as text; null where there is none."""
    try:
        with open(os.path.join(_home(request), request["name"]), encoding="utf-8", errors="replace") as file:
            say(text=file.read())
    except FileNotFoundError:
        say(text=None)


def taken(request: dict[str, Any], stream: BinaryIO) -> None:
    """Whoever asked knows how this run ended; its files go, unless they are kept."""
    root, home = _root(request), _home(request)
    if request["keep"]:
        open(os.path.join(home, ".taken"), "w").close()
    else:
        shutil.rmtree(home, ignore_errors=True)
        lock = _hold(root)
        if lock is not None and os.listdir(root) == ["lock"]:
            os.unlink(os.path.join(root, "lock"))
            with contextlib.suppress(OSError):
                os.rmdir(root)
    say(done=True)


OPERATIONS = {f.__name__: f for f in (hello, check, look, receive, start, follow, fetch, taken)}


def _root(request: dict[str, Any]) -> str:
    return os.path.abspath(os.path.expanduser(request["directory"]))


def _home(request: dict[str, Any]) -> str:
    return os.path.join(_root(request), request["key"])


def _state(root: str, home: str, key: str) -> str:
    """`running`, `ended` (and nobody was told), `died` (no exit status was left) or `idle`."""
    holder = _holder(root)  # first: the runner ends, and then lets the lock go
    if holder is not None and holder.get("key") == key:
        return "running"
    if not os.path.exists(os.path.join(home, ".log")) or os.path.exists(os.path.join(home, ".taken")):
        return "idle"
    return "ended" if _ended(home) is not None else "died"


def _ended(home: str) -> int | None:
    try:
        with open(os.path.join(home, ".ended")) as file:
            return int(file.read())
    except (FileNotFoundError, ValueError):
        return None


def _holder(root: str) -> dict[str, Any] | None:
    """What the holder of the lock wrote into it; None where nobody holds it."""
    try:
        descriptor = os.open(os.path.join(root, "lock"), os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        text = b""
        for _ in range(10):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return None
            except BlockingIOError:
                text = os.pread(descriptor, 10_000, 0)
            if text:
                break
            time.sleep(0.05)  # whoever has just taken it writes its key, or lets it go
        told: dict[str, Any] = {"key": "", "who": "somebody", "since": time.time()}
        if text:
            told = json.loads(text.decode("utf-8", "replace"))
        return {**told, "age": max(0.0, time.time() - told["since"])}
    finally:
        os.close(descriptor)


def _hold(root: str) -> int | None:
    """The lock's file descriptor, held; None where another holds it. Whoever only looks has it for an instant."""
    for _ in range(10):
        descriptor = os.open(os.path.join(root, "lock"), os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.stat(os.path.join(root, "lock")).st_ino == os.fstat(descriptor).st_ino:
                    os.ftruncate(descriptor, 0)  # what an earlier holder, who was killed, left in it
                    return descriptor  # and not one that was deleted in between
        except BlockingIOError:
            time.sleep(0.05)
        os.close(descriptor)
    return None


def _sha256(path: str) -> str | None:
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
    except FileNotFoundError:
        return None
    return digest.hexdigest()


def _tail(path: str) -> list[str]:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        file.seek(max(0, os.path.getsize(path) - TAIL_BYTES))
        return file.read().decode("utf-8", "replace").splitlines()[-15:]
    return []


def _free(path: str) -> int | None:
    """Bytes that this user may still write where `path` lies, or will lie."""
    for place in _upwards(path):
        with contextlib.suppress(OSError):
            found = os.statvfs(place)
            return found.f_bavail * found.f_frsize
    return None


def _upwards(path: str) -> Iterator[str]:
    while True:
        yield path
        if os.path.dirname(path) == path:
            return
        path = os.path.dirname(path)


def _imported(name: str) -> dict[str, Any]:
    """`version` of a module that imports, else `why` not: in a process of its own, for such imports may crash."""
    if importlib.util.find_spec(name) is None:
        return {"version": None, "why": "not installed"}
    code = f"import {name} as m; print('{MARK}' + str(m.__version__))"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True, timeout=IMPORT_S
        )
    except subprocess.TimeoutExpired:
        return {"version": None, "why": f"importing it did not end within {IMPORT_S:.0f} s"}
    _, found, version = done.stdout.decode("utf-8", "replace").rpartition(MARK)
    if done.returncode == 0 and found:
        return {"version": version.strip(), "why": None}
    last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
    return {"version": None, "why": last[0][:300] if last else f"it ended with status {done.returncode}"}


def _said(command: list[str]) -> str:
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=IMPORT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.decode("utf-8", "replace")


def _read(path: str) -> str:
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        return file.read().strip()
    return ""


def _writable(root: str) -> str | None:
    """Why nothing can be written into `root`, or None."""
    there = os.path.isdir(root)
    try:
        os.makedirs(root, exist_ok=True)
        descriptor, path = tempfile.mkstemp(dir=root)
        os.close(descriptor)
        os.unlink(path)
    except OSError as error:
        return error.strerror
    finally:
        if not there:
            with contextlib.suppress(OSError):
                os.rmdir(root)
    return None


def _kept(root: str) -> list[str]:
    """The bundles that lie there."""
    try:
        return sorted(name for name in os.listdir(root) if os.path.isfile(os.path.join(root, name, "bundle.json")))
    except OSError:
        return []


def _board() -> dict[str, str]:
    """What says which Jetson or GPU this is; empty texts where it is none."""
    return {
        "model": _read("/proc/device-tree/model").strip("\0"),
        "l4t": _read("/etc/nv_tegra_release"),
        "power": _said(["nvpmodel", "-q"]),
        "gpus": _said(["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]),
    }


def _flags() -> list[str]:
    """The first core's instruction sets, in the words of Linux."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                return value.split()
    return []


def _trtexec() -> str | None:
    return shutil.which("trtexec") or next((f for d in TRTEXEC if (f := shutil.which("trtexec", path=d))), None)
