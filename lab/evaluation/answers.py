"""Reads the answers of a server within bounds, whatever the server sends."""

from __future__ import annotations

import zlib

import httpx

MAX_ANSWER_BYTES = 16 * 2**20
"""Of a decompressed answer. The largest ones are the tokens of a prompt: 8 bytes each, so two million tokens."""
ACCEPTED = "gzip"
CODINGS = ("gzip", "x-gzip", "deflate")
ZLIB_OR_GZIP = 32 + zlib.MAX_WBITS  # zlib sees by the first bytes which of the two it is
OF_THE_BODY = ("content-encoding", "content-length", "transfer-encoding", "content-type")


class AnswerError(Exception):
    """An answer that is not read. The message goes behind the URL of the request."""


class Decompressor:
    """The decompressed bytes of an answer, piece by piece."""

    def __init__(self, coding: str) -> None:
        """
        Args:
            coding: the answer's `content-encoding`; empty: its bytes are as they are.

        Raises:
            AnswerError: none of CODINGS.
        """
        if coding not in ("", "identity", *CODINGS):
            raise AnswerError(f"answers with content-encoding {coding!r}, which was not asked for. Allowed: {ACCEPTED}")
        self._zlib = zlib.decompressobj(ZLIB_OR_GZIP) if coding in CODINGS else None

    def decompress(self, data: bytes, limit: int) -> bytes:
        """The next bytes, at most ``limit`` of them if they were compressed (raises AnswerError for damaged ones)."""
        if self._zlib is None:
            return data
        try:
            return self._zlib.decompress(data, limit)
        except zlib.error as error:
            raise AnswerError(f"answers with compressed data that are damaged: {error}") from None

    def check_whole(self) -> None:
        """Refuse (AnswerError) an answer that ended before its compressed data did."""
        if self._zlib is not None and not self._zlib.eof:
            raise AnswerError("answers with compressed data that end too early")


async def read_answer(response: httpx.Response) -> httpx.Response:
    """The whole answer of a response that was not read yet.

    Its text is UTF-8: what the server says about the characters may name any codec of Python, decompressors too.

    Raises:
        AnswerError: more than MAX_ANSWER_BYTES, compressed or decompressed, or compressed otherwise than asked for.
        httpx.HTTPError: the connection failed.
    """
    decompressor = Decompressor(response.headers.get("content-encoding", "").strip().lower())
    body, received = bytearray(), 0
    async for data in response.aiter_raw():
        received += len(data)
        body += decompressor.decompress(data, MAX_ANSWER_BYTES + 1 - len(body))
        if max(received, len(body)) > MAX_ANSWER_BYTES:
            raise AnswerError(f"answers with more than {MAX_ANSWER_BYTES} bytes, the bound MAX_ANSWER_BYTES")
    decompressor.check_whole()
    headers = [(name, value) for name, value in response.headers.multi_items() if name not in OF_THE_BODY]
    return httpx.Response(response.status_code, headers=headers, content=bytes(body), request=response.request)
