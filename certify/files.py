"""Writing files so that a reader never sees half of one."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

fcntl: Any
try:
    import fcntl
except ImportError:  # not a Unix
    fcntl = None


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file beside ``path``, flush it to disk and rename it into place.

    If ``write`` or the disk fails, an older file at ``path`` stays as it was and nothing is left
    behind.

    Args:
        path: the destination; its folder must exist.
        write: gets the open binary file.

    Raises:
        OSError: the folder is missing or cannot be written, or the disk is full.
    """
    path = Path(path)
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            try:
                write(file)
            except RuntimeError as error:  # as torch.save tells of a full disk
                raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}") from error
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp's own mode is private
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def one_writer(folder: str | Path) -> Iterator[None]:
    """Keep other processes that ask for the same out of a folder.

    The lock is the system's, so that it ends with the process, however that ends. File systems and
    systems without such locks keep nobody out.

    Raises:
        ValueError: another process is there.
    """
    if fcntl is None:
        yield
        return
    with open(Path(folder, ".lock"), "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another run is writing to {folder}") from error
        except OSError:
            pass  # no locks here
        yield


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda file: file.write(text.encode()))
