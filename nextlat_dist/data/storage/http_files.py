"""Files of an HTTP server, as strictly as shards need them.

Invariant: a range is the bytes asked for, or an error: fsspec's own HTTP file system hands out the whole file when a
server ignores `Range`, and calls a file missing whenever its size cannot be asked. Statuses become OSErrors: 404
FileNotFoundError, 401 and 403 PermissionError, EINVAL what trying again cannot help.
"""

from __future__ import annotations

import errno
import re
from typing import Any

import aiohttp
from fsspec.implementations.http import HTTPFileSystem

from nextlat_dist.data.storage.base import SMALL_FILE_BYTES, too_large
from nextlat_dist.errors import UserError

_CHUNK_BYTES = 1 << 20
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class HttpFiles(HTTPFileSystem):
    """Reads through `_cat_file` and `_info` alone."""

    def __init__(self, timeout_seconds: float, **options: Any) -> None:
        client = {
            # A server that keeps sending a little is given up too.
            "timeout": aiohttp.ClientTimeout(
                10 * timeout_seconds, sock_connect=timeout_seconds, sock_read=timeout_seconds
            ),
            # A compressed answer has other bytes than the range asked for.
            "headers": {"Accept-Encoding": "identity"},
            # Proxies and netrc, as every other tool.
            "trust_env": True,
        }
        super().__init__(client_kwargs=client, encoded=True, **options)

    async def _cat_file(
        self, path: str, start: int | None = None, end: int | None = None, *, limit: int = SMALL_FILE_BYTES, **_: Any
    ) -> bytes:
        session = await self.set_session()
        if start is None or end is None:
            async with session.get(self.encode_url(path)) as answer:
                _check_status(answer)
                return await _body(answer, limit)
        async with session.get(self.encode_url(path), headers={"Range": f"bytes={start}-{end - 1}"}) as answer:
            if answer.status == 416:
                return b""
            _check_status(answer)
            # Before the body is read: it may be a whole shard.
            if answer.status != 206:
                raise UserError(
                    f"the server of {answer.url.host} answers a range request with the whole file; "
                    "serve the dataset with a server that knows Range, or copy it here"
                )
            sent = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            if sent is None or int(sent[1]) != start:
                raise ConnectionError(f"asked for bytes from {start}, got {answer.headers.get('Content-Range')}")
            if int(sent[2]) + 1 < end and sent[3] != str(int(sent[2]) + 1):
                raise ConnectionError(f"asked for bytes {start}-{end - 1}, got {sent[0]}")
            return await _body(answer, end - start)

    async def _info(self, path: str, **_: Any) -> dict[str, Any]:
        """`size`, and `ETag` and `Last-Modified` where the server tells them."""
        session = await self.set_session()
        async with session.head(self.encode_url(path), allow_redirects=True) as answer:
            size = answer.headers.get("Content-Length")
            if answer.status not in (405, 501):
                _check_status(answer)
                if size is not None:
                    return _described(int(size), answer)
        # No HEAD, or no size in it: a range says how long the whole is.
        async with session.get(self.encode_url(path), headers={"Range": "bytes=0-0"}) as answer:
            _check_status(answer)
            sent = _CONTENT_RANGE.fullmatch(answer.headers.get("Content-Range", ""))
            size = sent[3] if sent else answer.headers.get("Content-Length", "")
            if not size.isdigit():
                raise OSError(errno.EINVAL, "the server does not tell the size of the file")
            return _described(int(size), answer)


async def _body(answer: aiohttp.ClientResponse, limit: int) -> bytes:
    """All that a server sends, which must not be more than `limit`: one may send without end."""
    if (answer.content_length or 0) > limit:
        raise too_large(limit)
    body = bytearray()
    async for chunk in answer.content.iter_chunked(_CHUNK_BYTES):
        body += chunk
        if len(body) > limit:
            raise too_large(limit)
    return bytes(body)


def _described(size: int, answer: aiohttp.ClientResponse) -> dict[str, Any]:
    changed = {key: answer.headers.get(key) for key in ("ETag", "Last-Modified")}
    return {"size": size, "type": "file", **changed}


def _check_status(answer: aiohttp.ClientResponse) -> None:
    reason = f"HTTP status {answer.status}"
    if answer.status in (404, 410):
        raise FileNotFoundError(errno.ENOENT, reason)
    if answer.status in (401, 403, 407):
        raise PermissionError(errno.EACCES, reason)
    if answer.status in (408, 429) or answer.status >= 500:
        raise ConnectionError(reason)
    if answer.status >= 400:
        raise OSError(errno.EINVAL, reason)
