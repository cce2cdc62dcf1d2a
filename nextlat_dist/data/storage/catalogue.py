"""Remote storages by the scheme of their URLs, one entry each.

To add one that fsspec reads, write an entry here; a third party's entry is an entry point of the group
`nextlat_dist.storages` whose name is the scheme. Invariant: none tries again by itself unless it says so, and none
waits longer than the timeout it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from nextlat_dist.errors import UserError

PARALLEL_REQUESTS = 32
GROUP = "nextlat_dist.storages"


@dataclass(frozen=True)
class StorageEntry:
    """How files of a scheme are reached.

    Attributes:
        scheme: of the URLs, as in s3://bucket/folder.
        open_files: (timeout in seconds) -> an fsspec file system, which answers in that time or raises.
        library: package that must be installed.
        install: what `pip install` needs for that.
        retries: its library tries again by itself.
        is_web: a web server: names are quoted, a query in the dataset's URL is added to every file's, and there is no
            listing. Otherwise the URL begins with a bucket, and credentials come from the environment.
    """

    scheme: str
    open_files: Callable[[float], Any]
    library: str
    install: str
    retries: bool = False
    is_web: bool = False


def _http(timeout_seconds: float) -> Any:
    from nextlat_dist.data.storage.http_files import HttpFiles

    return HttpFiles(timeout_seconds, skip_instance_cache=True)


def _s3(timeout_seconds: float) -> Any:
    import botocore.session  # type: ignore[import-untyped]
    from s3fs import S3FileSystem  # type: ignore[import-untyped]

    # Without this a public bucket could not be read by somebody who has no account.
    anonymous = botocore.session.get_session().get_credentials() is None
    config = {
        "connect_timeout": timeout_seconds,
        "read_timeout": timeout_seconds,
        "max_pool_connections": PARALLEL_REQUESTS,
        "retries": {"total_max_attempts": 1},
    }
    files = S3FileSystem(anon=anonymous, config_kwargs=config, use_listings_cache=False, skip_instance_cache=True)
    # We try again ourselves; twice nested, a dead server would take minutes.
    files.retries = 1
    return files


def _gs(timeout_seconds: float) -> Any:
    import aiohttp
    from gcsfs.core import GCSFileSystem  # type: ignore[import-untyped]

    timeout = aiohttp.ClientTimeout(10 * timeout_seconds, sock_connect=timeout_seconds, sock_read=timeout_seconds)
    session = {"timeout": timeout}
    return GCSFileSystem(access="read_only", session_kwargs=session, use_listings_cache=False, skip_instance_cache=True)


_OWN = "'nextlat-dist[{}]'"
BUILT_IN = (
    StorageEntry("http", _http, "aiohttp", _OWN.format("http"), is_web=True),
    StorageEntry("https", _http, "aiohttp", _OWN.format("http"), is_web=True),
    StorageEntry("s3", _s3, "s3fs", _OWN.format("s3")),
    StorageEntry("gs", _gs, "gcsfs", _OWN.format("gs"), retries=True),
)


def shown(url: str) -> str:
    """The URL without user, password, query and fragment."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def storage_entry(url: str) -> StorageEntry:
    """The entry of a URL's scheme: ours, or that of an installed entry point.

    Raises:
        UserError: there is none, its library is not installed, or the URL holds credentials that it cannot use.
    """
    parts = urlsplit(url)
    entry = {entry.scheme: entry for entry in BUILT_IN}.get(parts.scheme) or _installed(parts.scheme)
    if entry is None:
        known = ["file", *(entry.scheme for entry in BUILT_IN), *_installed_schemes()]
        *others, last = (f"{scheme}://" for scheme in known)
        raise UserError(
            f"{shown(url)} has the unknown scheme {parts.scheme!r}; a dataset is a path or a {', '.join(others)} or "
            f"{last} URL"
        )
    bucket = parts.netloc
    if not entry.is_web and ("@" in bucket or (":" in bucket and not bucket.startswith("arn:"))):
        raise UserError(
            f"the {parts.scheme}:// URL has more than the name of a bucket before its first '/'; credentials are given "
            "in the environment (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS…)"
        )
    if find_spec(entry.library) is None:
        raise UserError(f"reading {shown(url)} needs the package {entry.library}: pip install {entry.install}")
    return entry


def _installed_schemes() -> list[str]:
    return [point.name for point in entry_points(group=GROUP)]


def _installed(scheme: str) -> StorageEntry | None:
    for point in entry_points(group=GROUP, name=scheme):
        found = point.load()
        if not isinstance(found, StorageEntry):
            raise UserError(f"the entry point {scheme!r} of {GROUP} is a {type(found).__name__}, not a StorageEntry")
        return found
    return None
