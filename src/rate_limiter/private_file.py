"""An empty file without a name, for its locks: this process and all that are forked from it share it."""

import contextlib
import os
import tempfile
import weakref

__all__ = ["is_open", "open_private_file"]


def open_private_file(owner: object, name: str) -> tuple[int, int]:
    """Open a file that is closed when its owner is gone.

    Args:
        owner: Any object that can be referenced weakly.
        name: What the system shows as the name of the file, where it can.

    Returns:
        The descriptor of the file, and its mark: the position by which `is_open` knows the file.

    """
    if hasattr(os, "memfd_create"):
        file = os.memfd_create(name)
    else:
        with tempfile.TemporaryFile() as unlinked:
            file = os.dup(unlinked.fileno())
    # Every file system knows so large a position.
    mark = os.lseek(file, 1 + int.from_bytes(os.urandom(5), "big"), os.SEEK_SET)
    weakref.finalize(owner, _close, file, mark).atexit = False
    return file, mark


def is_open(file: int, mark: int) -> bool:
    """Tell whether a descriptor still belongs to its file.

    A daemon may close all descriptors of its process. The number may then belong to another file.
    """
    try:
        return os.lseek(file, 0, os.SEEK_CUR) == mark
    except OSError:  # no file has the number, or one without a position, such as a pipe
        return False


def _close(file: int, mark: int) -> None:
    with contextlib.suppress(OSError):
        if is_open(file, mark):
            os.close(file)
