"""Object stores: connect to an address ``s3://``, ``http://`` or ``https://``, by obstore.

obstore reads endpoint, region and credentials from the environment (``AWS_*``), and repeats
requests that a server refuses for a moment (status 5xx, a lost connection).
"""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from obstore.store import HTTPStore, RetryConfig, S3Store

SCHEMES = ("s3", "http", "https")
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_TIMEOUT = timedelta(seconds=30)  # of one request
_RETRIES: RetryConfig = {
    "max_retries": 4,
    "retry_timeout": timedelta(seconds=60),
    "backoff": {
        "init_backoff": timedelta(milliseconds=200),
        "max_backoff": timedelta(seconds=5),
        "base": 2,
    },
}


class RemoteError(OSError):
    """An object cannot be read or written. The message names its address, the reason, a remedy.

    Attributes
    ----------
    address, reason, remedy : str
    """

    def __init__(self, address: object, reason: str, remedy: str) -> None:
        self.address, self.reason, self.remedy = str(address), " ".join(reason.split()), remedy
        super().__init__(f"{self.address}: {self.reason}; {remedy}")

    # an OSError keeps only its message, and pickle rebuilds an exception from what it keeps
    def __reduce__(self) -> tuple[type[RemoteError], tuple[str, str, str]]:
        return type(self), (self.address, self.reason, self.remedy)


class RemoteUnavailableError(RemoteError, ConnectionError):
    """The server does not answer, or the object changed while it was read: a later attempt may
    succeed."""


class ChangedError(RemoteUnavailableError):
    """The object is no longer the one that was opened."""


def split_address(address: str) -> tuple[str, str]:
    """Return the bucket or server of an address, and the key of the object in it.

    ``s3://bucket/a/b.svs`` gives ``s3://bucket`` and ``a/b.svs``.
    """
    scheme, _, rest = address.partition("://")
    root, _, key = rest.partition("/")
    return f"{scheme}://{root}", key


@functools.lru_cache(maxsize=64)
def connect(root: str, prefix: str = "") -> S3Store | HTTPStore:
    """Connect to a bucket ``s3://bucket`` or to a server ``https://host``.

    Parameters
    ----------
    prefix : str
        Folder in it that all keys are relative to.

    Raises
    ------
    RemoteError
        The package obstore is not installed, or a variable ``AWS_*`` has an invalid value.
    """
    try:
        from obstore.exceptions import BaseError
        from obstore.store import HTTPStore, S3Store
    except ModuleNotFoundError as error:
        remedy = "install it: pip install 'nic-pathology[s3]'"
        raise RemoteError(root, "the package obstore is not installed", remedy) from error
    scheme, _, name = root.partition("://")
    try:
        if scheme != "s3":
            return HTTPStore.from_url(
                f"{root}/{prefix}",
                client_options={"timeout": _TIMEOUT, "allow_http": scheme == "http"},
                retry_config=_RETRIES,
            )
        endpoint = next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), "")
        return S3Store(
            name,
            prefix=prefix or None,
            client_options={"timeout": _TIMEOUT, "allow_http": endpoint.startswith("http://")},
            retry_config=_RETRIES,
            config={"endpoint": endpoint} if endpoint else None,
        )
    except (BaseError, ValueError) as error:
        raise RemoteError(root, first_line(error), "check the variables AWS_*") from error


@contextmanager
def as_remote_error(address: object) -> Iterator[None]:
    """Turn the errors of obstore into those of Python and of this module.

    Raises
    ------
    FileNotFoundError
        There is no such object.
    ChangedError
        A condition of the request (``If-Match``) is not met.
    RemoteUnavailableError
        The server does not answer, also after several attempts.
    RemoteError
        The access is denied, or the address is invalid.
    """
    from obstore import exceptions

    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(address)) from error
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError) as error:
        remedy = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL"
        raise RemoteError(address, "the server denies the access", remedy) from error
    except (exceptions.PreconditionError, exceptions.AlreadyExistsError) as error:
        raise ChangedError(address, "the object changed meanwhile", "run it again") from error
    except exceptions.NotSupportedError as error:
        remedy = "use a server that does, or copy the slides"
        raise RemoteError(address, "the server does not send ranges of a file", remedy) from error
    except exceptions.InvalidPathError as error:
        raise RemoteError(address, first_line(error), "check the address") from error
    except exceptions.BaseError as error:
        remedy = "check that the server can be reached, and run it again"
        raise RemoteUnavailableError(address, first_line(error), remedy) from error


def first_line(error: Exception) -> str:
    """Return what an error of obstore says, without the details that follow it."""
    return str(error).strip().split("\n")[0]
