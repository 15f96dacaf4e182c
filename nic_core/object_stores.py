"""Object stores: connect to an address ``s3://``, ``http://`` or ``https://``, by obstore.

obstore reads endpoint, region and credentials from the environment (``AWS_*``), and repeats
requests that a server refuses for a moment (status 5xx, a lost connection). Its threads do not
survive a fork: a process that reads from a server must not be forked from one that did.
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
    from obstore.store import ClientConfig, HTTPStore, RetryConfig, S3Store

SCHEMES = ("s3", "http", "https")
NO_BUCKET_REMEDY = "correct the address, or create the bucket"
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
# A server may be silent for this long. A large object takes longer, so the time of a whole request
# has no limit (obstore's is 30 s); a part of a file is sent within it.
_SILENCE, _WHOLE = timedelta(seconds=60), timedelta(days=7)
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
                client_options=_client_options(allow_http=scheme == "http"),
                retry_config=_RETRIES,
            )
        endpoint = next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), "")
        return S3Store(
            name,
            prefix=prefix or None,
            client_options=_client_options(allow_http=endpoint.startswith("http://")),
            retry_config=_RETRIES,
            config={"endpoint": endpoint} if endpoint else None,
        )
    except (BaseError, ValueError) as error:
        raise RemoteError(root, first_line(error), "check the variables AWS_*") from error


def _client_options(*, allow_http: bool) -> ClientConfig:
    return {"timeout": _WHOLE, "read_timeout": _SILENCE, "allow_http": allow_http}


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
        There is no such bucket, the access is denied, or the address is invalid.
    """
    from obstore.exceptions import BaseError

    try:
        yield
    except (FileNotFoundError, BaseError) as error:
        raise _translated(address, error) from error


def _translated(address: object, error: Exception) -> OSError:
    from obstore import exceptions

    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(address))
    if "<Code>NoSuchBucket</Code>" in str(error):
        return RemoteError(address, "there is no such bucket", NO_BUCKET_REMEDY)
    if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
        remedy = "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL"
        return RemoteError(address, "the server denies the access", remedy)
    if isinstance(error, exceptions.PreconditionError | exceptions.AlreadyExistsError):
        return ChangedError(address, "the object changed meanwhile", "run it again")
    if isinstance(error, exceptions.NotSupportedError):
        remedy = "use a server that does, or copy the slides"
        return RemoteError(address, "the server does not send ranges of a file", remedy)
    if isinstance(error, exceptions.InvalidPathError):
        return RemoteError(address, first_line(error), "check the address")
    remedy = "check that the server can be reached, and run it again"
    return RemoteUnavailableError(address, first_line(error), remedy)


def first_line(error: Exception) -> str:
    """Return what an error of obstore says, without the details that follow it."""
    return str(error).strip().split("\n")[0]
