"""Pictures as bytes: encoded with what they say about themselves, and kept a while for those who want a URL."""

from __future__ import annotations

import io
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

from tiue_cli.files.png import encode_picture
from tiue_cli.serve.engine import Drawn

OutputFormat = Literal["png", "jpeg", "webp"]
MEDIA_TYPES: dict[OutputFormat, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


def encode(drawn: Drawn, *, output_format: OutputFormat, quality: int | None, metadata: bool) -> bytes:
    """``drawn`` as a file. ``quality`` 0 to 100 is JPEG's and WebP's; without ``metadata`` only the mark stays."""
    buffer = io.BytesIO()
    record = drawn.record if metadata else None
    encode_picture(buffer, drawn.pixels, record, image_format=output_format, quality=quality)
    return buffer.getvalue()


@dataclass(frozen=True)
class _Kept:
    data: bytes
    media_type: str
    until_s: float


class ImageStore:
    """Images under unguessable names: bounded in number, bytes and time; the oldest goes first."""

    def __init__(self, *, most: int, most_bytes: int, keep_s: float) -> None:
        """``keep_s`` seconds each, at most ``most`` images and ``most_bytes`` bytes of them."""
        self._most = most
        self._most_bytes = most_bytes
        self._keep_s = keep_s
        self._images: OrderedDict[str, _Kept] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._images)

    def put(self, data: bytes, *, output_format: OutputFormat) -> str:
        """Keep ``data``; returns its name, 128 random bits and an ending."""
        name = f"{secrets.token_hex(16)}.{output_format}"
        self._images[name] = _Kept(data, MEDIA_TYPES[output_format], time.monotonic() + self._keep_s)
        self.bytes += len(data)
        self._tidy()
        return name

    def get(self, name: str) -> tuple[bytes, str] | None:
        """(bytes, media type), None where it is unknown or gone."""
        self._tidy()
        kept = self._images.get(name)
        return None if kept is None else (kept.data, kept.media_type)

    def _tidy(self) -> None:
        now_s = time.monotonic()
        while self._images:
            kept = next(iter(self._images.values()))
            if kept.until_s > now_s and len(self._images) <= self._most and self.bytes <= self._most_bytes:
                return
            self._images.popitem(last=False)
            self.bytes -= len(kept.data)
