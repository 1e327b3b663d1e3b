"""Texts that only the key file opens: AES-256-GCM, each bound to the place where it is stored.

A sealed text is a nonce of 12 bytes, then the ciphertext with its tag. `place` says whose it is and under which name;
it is authenticated with the text, so that a ciphertext that was moved to another row does not open there. The key lies
beside the database and not in it: a copy of the database gives nothing away, and a backup needs both.
"""

from __future__ import annotations

import base64
import binascii
import logging
import os
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from rewardsmith.errors import ConfigError

log = logging.getLogger("rewardsmith.store")

KEY_BYTES, NONCE_BYTES = 32, 12


class Seal:
    """`key_file` is read when it is first needed, and made then if it is not there. Safe to use from many threads."""

    def __init__(self, key_file: Path | None) -> None:
        self._key_file = key_file
        self._turns = threading.Lock()
        self._cipher: AESGCM | None = None

    def seal(self, text: str, place: str) -> bytes:
        """Raises ConfigError when there is no key to be had."""
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._with_key().encrypt(nonce, text.encode(), place.encode())

    def open(self, sealed: bytes, place: str) -> str:
        """Raises ConfigError for what was sealed with another key, or in another place."""
        try:
            return self._with_key().decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], place.encode()).decode()
        except InvalidTag:
            raise ConfigError(
                f"a stored secret cannot be read: {self._key_file} is not the key that it was stored with. Put the "
                "right file back, or store the secret again"
            ) from None

    def _with_key(self) -> AESGCM:
        with self._turns:
            if self._cipher is None:
                if self._key_file is None:
                    raise ConfigError("secrets cannot be stored: this store was opened without a key file")
                self._cipher = AESGCM(_key(self._key_file))
            return self._cipher


def _key(file: Path) -> bytes:
    """The key in `file`; a new one when there is no such file yet. Raises ConfigError."""
    try:
        if not file.exists():
            _make(file)
        if file.stat().st_mode & 0o077:
            log.warning("other users could read %s; it is closed now", file)
            file.chmod(0o600)
        key = base64.b64decode(file.read_bytes(), validate=False)
    except OSError as error:
        raise ConfigError(f"the key of the secrets, {file}, cannot be used: {error.strerror}") from None
    except binascii.Error:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(f"{file} holds no key for the secrets; put the right file back")
    return key


def _make(file: Path) -> None:
    """Whole or not at all, and never over another one: a second process may be doing the same."""
    fd, draft = tempfile.mkstemp(dir=file.parent)  # with mode 0600
    try:
        with os.fdopen(fd, "wb") as new:
            new.write(base64.b64encode(os.urandom(KEY_BYTES)) + b"\n")
            new.flush()
            os.fsync(fd)
        with suppress(FileExistsError):
            os.link(draft, file)
    finally:
        os.unlink(draft)
