"""What ``tiue serve`` can be asked, with the defaults of its options."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tiue_cli.errors import UsageError
from tiue_cli.generate.config import GenerateConfig

KEPT_IMAGES = 256
"""Images that ``response_format: url`` keeps at most; the oldest goes first."""
KEPT_BYTES = 256 * 2**20
KEPT_S = 600.0
"""How long such an image can be fetched."""
MAX_BODY_BYTES = 64 * 2**10
MAX_PROMPT_CHARACTERS = 4000
"""OpenAI's limit; a text encoder of 77 tokens reads some 300 of them."""
BODY_TIMEOUT_S = 10.0
"""How long a client may take to send its request."""
_LONGEST: Final = 1e6
"""Of the times that an option may set, in its unit."""


@dataclass(frozen=True)
class ServeConfig:
    """Where to listen, how to batch, what to allow.

    ``draw`` says which model draws and with what. ``max_batch`` images are computed at once at most, a request waits
    ``max_wait_ms`` for others to join it, ``max_queue`` images wait at most (beyond: 429), ``timeout_s`` is the longest
    a request may take (beyond: 504), ``max_images`` the most a request may ask for. ``teacher`` None is the one that
    belongs to the model, where there is one in the package. ``lora_dir`` holds the LoRAs that requests may name.
    """

    draw: GenerateConfig = field(default_factory=GenerateConfig)
    teacher: str | None = None
    lora_dir: Path | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    max_batch: int = 16
    max_wait_ms: float = 5.0
    max_queue: int = 256
    timeout_s: float = 60.0
    max_images: int = 10
    api_key_file: Path | None = None
    no_auth: bool = False
    cors: tuple[str, ...] = ()
    allow_hosts: tuple[str, ...] = ()
    metadata: bool = True

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return is_loopback(self.host)

    def validate(self) -> None:
        """Raise UsageError for what cannot be, or would put an open service on a network by accident."""
        if not self.loopback and self.api_key_file is None and not self.no_auth:
            raise UsageError(
                f"--host {self.host} can be reached from other machines, and nobody would be asked for a key",
                hint="give --api-key-file FILE (one key a line), or say that it is meant: --no-auth",
            )
        if self.api_key_file is not None and self.no_auth:
            raise UsageError("--api-key-file and --no-auth exclude each other", hint="leave one of them out")
        if self.max_images > self.max_queue:
            raise UsageError(
                f"--max-images {self.max_images} is more than --max-queue {self.max_queue}: a full request never fits",
                hint=f"give --max-queue {self.max_images} or more",
            )
        for option, value in (("--timeout-s", self.timeout_s), ("--max-wait-ms", self.max_wait_ms)):
            if not 0 <= value <= _LONGEST:  # NaN passes the range of a command-line option
                raise UsageError(f"{option} {value:g} is outside 0 to {_LONGEST:g}", hint="give a number")
        for origin in self.cors:
            if origin == "*" or not origin.startswith(("http://", "https://")) or origin.count("/") != 2:
                raise UsageError(
                    f"--cors {origin} is not an origin", hint="write scheme, host and port: https://app.example.org"
                )


def is_loopback(host: str) -> bool:
    """Whether ``host`` (a name or an address) is this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
