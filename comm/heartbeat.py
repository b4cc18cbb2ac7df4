"""Authenticated messages between the watchdogs of one job: framing and nothing else.

A connection starts with the listener's random nonce. Each message is its length (4 bytes), an
HMAC-SHA256 over nonce, direction, message number and payload, and a JSON payload. What does not
verify is refused, so neither forged nor replayed messages count.
"""

import hashlib
import hmac
import json
import secrets
import socket
import struct
from typing import Any

NONCE_BYTES = 16
MAC_BYTES = 32
LARGEST_PAYLOAD_BYTES = 1 << 20


class Malformed(Exception):
    """A peer sent something that is no message of this job."""


class Channel:
    """One end of a connection. Reading never blocks; partial messages wait for the rest.

    Args:
        sock: A connected socket.
        secret: The job's secret.
        listener: This end accepted the connection.
    """

    def __init__(self, sock: socket.socket, secret: str, listener: bool):
        self.sock = sock
        self.open = True
        self._key = secret.encode()
        self._nonce = secrets.token_bytes(NONCE_BYTES) if listener else b""
        self._sends, self._receives = (b"L", b"C") if listener else (b"C", b"L")
        self._num_sent = self._num_received = 0
        self._buffer = b""
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if listener:
            self._write(self._nonce)

    def send(self, message: Any) -> None:
        """Sends one message; drops it when the connection is gone or full, or not yet greeted."""
        if not self._nonce:
            return
        payload = json.dumps(message).encode()
        mac = self._mac(self._sends, self._num_sent, payload)
        if self._write(struct.pack(">I", len(payload)) + mac + payload):
            self._num_sent += 1

    def receive(self) -> list[Any]:
        """The messages that have arrived; `open` is False once the peer has closed.

        Raises:
            Malformed: Something else arrived.
        """
        while self.open:
            try:
                data = self.sock.recv(65536)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            self.open = bool(data)
            self._buffer += data
        if not self._nonce:
            if len(self._buffer) < NONCE_BYTES:
                return []
            self._nonce = self._buffer[:NONCE_BYTES]
            self._buffer = self._buffer[NONCE_BYTES:]
        return self._messages()

    def close(self) -> None:
        """Closes the connection."""
        self.open = False
        self.sock.close()

    def _messages(self) -> list[Any]:
        messages = []
        header = 4 + MAC_BYTES
        while len(self._buffer) >= 4:
            length = struct.unpack(">I", self._buffer[:4])[0]
            if length > LARGEST_PAYLOAD_BYTES:
                raise Malformed(f"a message of {length} bytes")
            if len(self._buffer) < header + length:
                break
            mac, payload = self._buffer[4:header], self._buffer[header : header + length]
            if not hmac.compare_digest(
                mac, self._mac(self._receives, self._num_received, payload)
            ):
                raise Malformed("a message without this job's signature")
            self._num_received += 1
            self._buffer = self._buffer[header + length :]
            messages.append(json.loads(payload))
        return messages

    def _mac(self, direction: bytes, number: int, payload: bytes) -> bytes:
        text = self._nonce + direction + struct.pack(">Q", number) + payload
        return hmac.new(self._key, text, hashlib.sha256).digest()

    def _write(self, data: bytes) -> bool:
        """True if all of `data` is on its way. A stopped peer's full socket breaks the channel."""
        try:
            sent = self.sock.send(data)
        except BlockingIOError:
            return False
        except OSError:
            self.open = False
            return False
        if sent < len(data):
            self.open = False
        return sent == len(data)
