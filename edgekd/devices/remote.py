"""A bundle measured on a device over ssh: copied, run detached, followed, fetched, cleaned up.

The runner does not depend on the connection. A run is found again by its bundle's key, so the same command picks up
what an earlier one left: files that have arrived, a run that goes on, results that nobody has fetched.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..artifact import file_sha256
from ..errors import ArtifactError, MissingExtra, StageError
from ..profile import Profile
from .ssh import Link, Lost, ask, follow
from .trouble import plain

__all__ = ["ENOUGH", "INSTALL", "ROOM_BYTES", "bundle_key", "greet", "measured_on", "said"]

Emit = Callable[[dict[str, Any]], None]
MANIFEST = "bundle.json"
RUNNER = ("run.py", "--progress")
RESULTS = "results.json"
#: What a run writes beside the files of its bundle: engines, results, the log.
ROOM_BYTES = 50_000_000
INSTALL = {
    "onnxruntime": "`pip install onnxruntime`",
    "tensorrt": "TensorRT's Python package (Jetson: `sudo apt install python3-libnvinfer`)",
    "trtexec": "trtexec (Jetson: `sudo apt install libnvinfer-bin`)",
}
#: What can stand in for a profile's runtime.
ENOUGH = {"onnxruntime": ("onnxruntime",), "tensorrt": ("tensorrt", "trtexec")}


def greet(link: Link, profile: Profile) -> dict[str, Any]:
    """What the device says of itself, before anything is made or copied.

    Raises StageError (it cannot be reached) or MissingExtra (no Python 3.8, NumPy or runtime there).
    """
    found = ask(link, "hello")
    python, where = link.device.python, link.device.name
    if not found["numpy"]:
        hint = f"`sudo apt install python3-numpy` there, or `{python} -m pip install numpy`, or --python of another"
        raise MissingExtra(f"{python} there has no NumPy", where=where, hint=hint)
    wanted = ENOUGH.get(profile.runtime, (profile.runtime,))
    if not set(wanted) & set(found["runtimes"]):
        there = f"it has {', '.join(found['runtimes'])}" if found["runtimes"] else f"{python} there has none"
        would = " or ".join(INSTALL.get(name, name) for name in wanted)
        raise MissingExtra(
            f"{profile.name} runs on {profile.runtime}, and {there} of onnxruntime, tensorrt, trtexec"
            if not found["runtimes"]
            else f"{profile.name} runs on {profile.runtime}, and {there}",
            where=where,
            hint=f"{would} there; or name the interpreter that has it: --python",
        )
    return found


@contextlib.contextmanager
def measured_on(link: Link, bundle: Path, emit: Emit, *, keep: bool = False) -> Iterator[Path]:
    """The results.json that the bundle's runner wrote on the device, as a local file while the block lasts.

    Once the block has ended well, the device's files are removed unless `keep`; until then nothing there is lost.
    Raises StageError: the device measures something else, its disk is full, the runner failed, Lost.
    """
    files = _files(bundle)
    key = bundle_key(bundle)[:16]
    _running(link, bundle, files, key, emit)
    ended = _followed(link, key, emit)
    text = ask(link, "fetch", key=key, name=RESULTS)["text"]
    if not _usable(ended["status"], text):
        if ended["state"] == "ended":
            ask(link, "taken", key=key, keep=True)
        raise _failed(link, ended)
    with tempfile.TemporaryDirectory(prefix="edgekd-") as directory:
        fetched = Path(directory) / RESULTS
        fetched.write_text(text, encoding="utf-8")
        try:
            yield fetched
        except ArtifactError:  # measured again by the next call, and not read again
            with contextlib.suppress(StageError):
                ask(link, "taken", key=key, keep=True)
            raise
    try:
        ask(link, "taken", key=key, keep=keep)
    except StageError as error:
        emit(said(f"the results are here, but {link.device.name} was not tidied: {error.problem.what}"))
    if keep:
        emit(said(f"kept on {link.device.name}: {link.device.directory}/{key}"))


def _usable(status: int | None, text: str | None) -> bool:
    """Whether these are whole results: the runner fails, too, where one network of several was wrong."""
    if status is None or text is None:
        return False
    with contextlib.suppress(ValueError, AttributeError):
        return status == 0 or bool(json.loads(text).get("complete"))
    return False


def bundle_key(bundle: Path) -> str:
    """What a bundle is known by: its manifest's sha256, which stands in its results too."""
    return hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()


def _files(bundle: Path) -> dict[str, tuple[int, str]]:
    """name -> bytes, sha256 of everything that goes to the device. Raises ArtifactError where the bundle is damaged."""
    try:
        listed = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))["files"]
        found = {MANIFEST: ((bundle / MANIFEST).stat().st_size, bundle_key(bundle))}
        for name, (sha256, size) in listed.items():
            path = bundle / Path(name).name
            if path.name != name or path.stat().st_size != size or file_sha256(path) != sha256:
                what = f"{name} is corrupted (sha256 does not match)"
                raise ArtifactError(what, where=str(bundle), hint="make the bundle again")
            found[name] = (size, sha256)
    except OSError as error:
        what = f"{Path(error.filename or MANIFEST).name}: {error.strerror}"
        raise ArtifactError(what, where=str(bundle), hint="make the bundle again") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError("the manifest is damaged", where=str(bundle), hint="make the bundle again") from error
    return found


def _running(link: Link, bundle: Path, files: dict[str, tuple[int, str]], key: str, emit: Emit) -> None:
    """See to it that the bundle's runner has been started, by now or by an earlier call."""
    name = link.device.name
    seen = ask(link, "look", key=key, contents={n: sha256 for n, (_, sha256) in files.items()})
    if seen["state"] == "running":
        emit(said(f"this runs on {name} already, begun {_ago(seen['holder'])}: following it"))
        return
    if seen["state"] == "ended":
        emit(said(f"this has run on {name} meanwhile: taking its results"))
        return
    if seen["holder"] is not None:
        raise _busy(link, seen["holder"])
    if seen["state"] == "died":
        emit(said(f"an earlier run on {name} ended without a word (was it switched off?): it goes on"))
    _copy(link, bundle, files, key, seen, emit)
    reply = ask(link, "start", key=key, command=RUNNER, who=f"{getpass.getuser()}@{socket.gethostname()}")
    if not reply["started"] and (reply["holder"] is None or reply["holder"].get("key") != key):
        raise _busy(link, reply["holder"] or {})


def _copy(
    link: Link, bundle: Path, files: dict[str, tuple[int, str]], key: str, seen: dict[str, Any], emit: Emit
) -> None:
    missing = [(name, *files[name]) for name in seen["missing"]]
    total, device = sum(size for _, size, _ in missing), link.device
    if seen["free"] is not None and seen["free"] < total + ROOM_BYTES:
        raise StageError(
            f"its disk is too full: {seen['free'] / 1e6:,.0f} MB free in {device.directory}, "
            f"{(total + ROOM_BYTES) / 1e6:,.0f} MB needed; nothing was copied",
            where=device.name,
            hint="free some space there, or take another disk: edgekd devices add NAME HOST --directory DIR",
        )
    if not missing:
        return
    emit(said(f"copying {total / 1e6:,.1f} MB to {device.name}"))
    paths = [bundle / name for name, _, _ in missing]

    def sent(done: int) -> None:
        emit({"event": "step", "stage": f"kB to {device.name}", "done": done // 1000, "total": total // 1000})

    reply = ask(link, "receive", paths, sent, key=key, contents=missing)
    if reply["damaged"]:
        raise ArtifactError(
            f"arrived damaged: {', '.join(reply['damaged'])} (sha256 does not match)",
            where=device.name,
            hint="run the same command again: only these are copied; if it happens again, look at its disk or memory",
        )


def _followed(link: Link, key: str, emit: Emit) -> dict[str, Any]:
    """Show what the runner says until it has ended: its last state, exit status and log."""
    name, last = link.device.name, {}
    try:
        for last in follow(link, "follow", key=key):
            if "line" in last:
                _show(last["line"], name, emit)
    except KeyboardInterrupt:
        emit(said(f"the run goes on on {name}; the same command picks it up"))
        raise
    except Lost as error:
        hint = "the run goes on there; the same command picks it up"
        raise Lost(error.problem.what, where=name, hint=hint) from error
    return last


def _show(line: str, name: str, emit: Emit) -> None:
    """The runner's progress is a JSON object a line; what is none goes to its log only."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        told = json.loads(line)
        if told["event"] == "round":
            emit({"event": "bench", "profile": name, "done": told["done"], "total": told["total"]})
        else:
            emit(said(plain(f"{name}: {told['words']}")))


def _failed(link: Link, ended: dict[str, Any]) -> StageError:
    words = []
    for line in ended["log"]:
        try:
            words.append(str(json.loads(line)["words"]))
        except (ValueError, KeyError, TypeError):
            words.append(line)
    said = "".join(f"\n  {plain(line)}" for text in words[-8:] for line in text.splitlines()) or " nothing"
    kept = f"what it wrote is kept there in {link.device.directory}"
    if ended["state"] == "died":
        what = f"the runner ended without a word (killed, out of memory, or switched off?); it said last:{said}"
        return StageError(what, where=link.device.name, hint=f"the same command goes on from its last round; {kept}")
    what = f"the runner failed with status {ended['status']}; it said last:{said}"
    return StageError(what, where=link.device.name, hint=f"mend that and run the same command again; {kept}")


def _busy(link: Link, holder: dict[str, Any]) -> StageError:
    who = plain(str(holder.get("who", "somebody")))
    return StageError(
        f"{who} measures there, begun {_ago(holder)}: two at once would disturb each other",
        where=link.device.name,
        hint="wait until that has ended, and run the same command again",
    )


def _ago(holder: dict[str, Any]) -> str:
    seconds = float(holder.get("age", 0.0))
    return f"{seconds:.0f} s ago" if seconds < 90 else f"{seconds / 60:.0f} min ago"


def said(text: str) -> dict[str, Any]:
    """An event that is only words."""
    return {"event": "device", "text": text}
