"""Tests of mailserver.py, as dialogues between a client (C:) and the server (S:).

    python test_mailserver.py                  all of them
    python test_mailserver.py WireTest         one group

Each dialogue is played three times: line by line, all in one piece, and byte by byte. On an S: line
"..." stands for any text; "S: (closed)" means that the server has hung up. On a C: line "\\n" at
the end sends a bare LF in place of CRLF, "\\c" sends no line end, and "\\x1b" is that byte.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import poplib
import random
import re
import shutil
import signal
import smtplib
import socket
import ssl
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unittest
import unittest.mock
from pathlib import Path
from typing import Any

import mailserver
from mailserver import Console, Envelope, MailServer

HERE = Path(__file__).resolve().parent
PATIENCE = 20  # seconds after which a test gives up waiting
HELLO = "S: 220 Simple Mail Server\nC: HELO example.com\nS: 250 Hello\n"
ENVELOPE = (
    HELLO + "C: MAIL FROM:<a@example.com>\nS: 250 OK\nC: RCPT TO:<b@example.com>\nS: 250 OK\n"
)
DATA = "C: DATA\nS: 354 End data with <CR><LF>.<CR><LF>\n"
BYE = "C: QUIT\nS: 221 Bye\nS: (closed)\n"


def wait_until(condition: Any) -> None:
    """Wait for what another thread is about to do."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("waited in vain")
        time.sleep(0.005)


def octets(text: str) -> bytes:
    """Give the bytes that a C: line stands for."""
    text = re.sub(r"\\x([0-9a-f]{2})", lambda m: chr(0xDC00 + int(m[1], 16)), text)
    data = b"".join(
        bytes([ord(c) - 0xDC00]) if 0xDC00 <= ord(c) <= 0xDCFF else c.encode() for c in text
    )
    data = data.replace(rb"\r", b"\r").replace(rb"\n", b"\n").replace(rb"\b", b"\b")
    if data.endswith(rb"\c"):
        return data[:-2]
    return data if data.endswith(b"\n") else data + b"\r\n"


class Client:
    """A connection that knows bytes and lines, and nothing of mail."""

    def __init__(self, address: Any) -> None:
        self.socket = socket.create_connection(address[:2], timeout=PATIENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.socket.makefile("rb")

    def send(self, data: bytes) -> None:
        # A server that has hung up is what some dialogues expect.
        with contextlib.suppress(ConnectionError):
            self.socket.sendall(data)

    def line(self) -> str:
        """Give the next line, or "(closed)"."""
        try:
            line = self.file.readline()
        except ConnectionError:
            line = b""
        return line.decode().removesuffix("\r\n") if line else "(closed)"

    def close(self) -> None:
        self.file.close()
        self.socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Recorder(Console):
    """A console that keeps what it would print."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def show(self, *lines: str) -> None:
        self.lines += lines


class DialogueTest(unittest.TestCase):
    """A test with a server of its own."""

    settings: dict[str, Any] = {}

    def setUp(self) -> None:
        self.warnings: list[str] = []
        patch = unittest.mock.patch.object(mailserver, "warn", self.warnings.append)
        patch.start()
        self.addCleanup(patch.stop)
        self.server = self.serve(**self.settings)

    def tearDown(self) -> None:
        self.assertEqual(self.warnings, [])

    def serve(self, **settings: Any) -> MailServer:
        """Start a server; its mail goes to self.inbox."""
        self.inbox: list[Envelope] = []
        server = MailServer(("127.0.0.1", 0), **settings)
        self.addCleanup(server.stop)
        server.mailroom.subscribe(self.inbox.append)
        server.start()
        return server

    def connect(self) -> Client:
        client = Client(self.server.server_address)
        self.addCleanup(client.close)
        return client

    def dialogue(self, text: str) -> None:
        """Play a dialogue in each of the three ways."""
        lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
        for way in ("line by line", "in one piece", "byte by byte"):
            with self.subTest(way):
                self.play(lines, way)

    def play(self, lines: list[str], way: str = "line by line") -> None:
        with self.connect() as client:
            if way != "line by line":
                data = b"".join(octets(line[3:]) for line in lines if line.startswith("C:"))
                pieces = [data] if way == "in one piece" else [bytes([b]) for b in data]
                for piece in pieces:
                    client.send(piece)
            for line in lines:
                if line.startswith("S:"):
                    self.expect(client, line[3:])
                elif way == "line by line":
                    client.send(octets(line[3:]))
            with contextlib.suppress(OSError):
                client.socket.shutdown(socket.SHUT_WR)
            self.assertEqual(client.line(), "(closed)", "the server said more than the dialogue")

    def expect(self, client: Client, pattern: str) -> str:
        line = client.line()
        regex = ".*".join(map(re.escape, pattern.split("...")))
        self.assertRegex(line, f"^{regex}$")
        return line


class ClassicTest(DialogueTest):
    """The dialogue that both ancestors speak."""

    def test_the_dialogue_to_the_letter(self) -> None:
        self.dialogue("""
            S: 220 Simple Mail Server
            C: HELO example.com
            S: 250 Hello
            C: MAIL FROM: <sender@example.com>
            S: 250 OK
            C: RCPT TO: <recipient@example.com>
            S: 250 OK
            C: DATA
            S: 354 End data with <CR><LF>.<CR><LF>
            C: This is a test email.
            C: .
            S: 250 Message accepted
            C: QUIT
            S: 221 Bye
            S: (closed)
        """)
        self.assertEqual(len(self.inbox), 3)
        for envelope in self.inbox:
            self.assertEqual(envelope.sender, "sender@example.com")
            self.assertEqual(envelope.recipients, ["recipient@example.com"])
            self.assertEqual(envelope.content, b"This is a test email.\r\n")

    def test_any_case_and_no_space_after_the_colon(self) -> None:
        self.dialogue("""
            S: 220 Simple Mail Server
            C: helo example.com
            S: 250 Hello
            C: mail from:<a@example.com>
            S: 250 OK
            C: Rcpt To:<b@example.com>
            S: 250 OK
            C: daTa
            S: 354 ...
            C: .
            S: 250 Message accepted
            C: quit
            S: 221 Bye
            S: (closed)
        """)
        self.assertEqual(self.inbox[0].content, b"")

    def test_several_messages_in_a_session(self) -> None:
        message = (ENVELOPE + DATA + "C: one\nC: .\nS: 250 Message accepted\n").removeprefix(HELLO)
        self.dialogue(HELLO + message * 3 + BYE)
        self.assertEqual(len(self.inbox), 9)

    def test_null_sender(self) -> None:
        self.dialogue(
            HELLO
            + "C: MAIL FROM:<>\nS: 250 OK\nC: RCPT TO:<b@example.com>\nS: 250 OK\n"
            + DATA
            + "C: bounce\nC: .\nS: 250 Message accepted\n"
            + BYE
        )
        self.assertEqual(self.inbox[0].sender, "")


class OrderTest(DialogueTest):
    """Out of order: 503, which names the missing step."""

    def test_503_names_the_missing_step(self) -> None:
        self.dialogue("""
            S: 220 Simple Mail Server
            C: MAIL FROM:<a@example.com>
            S: 503 Send HELO before MAIL FROM
            C: RCPT TO:<b@example.com>
            S: 503 Send MAIL FROM before RCPT TO
            C: DATA
            S: 503 Send MAIL FROM before DATA
            C: HELO example.com
            S: 250 Hello
            C: RCPT TO:<b@example.com>
            S: 503 Send MAIL FROM before RCPT TO
            C: DATA
            S: 503 Send MAIL FROM before DATA
            C: MAIL FROM:<a@example.com>
            S: 250 OK
            C: MAIL FROM:<a@example.com>
            S: 503 ...RCPT TO...
            C: DATA
            S: 503 Send RCPT TO before DATA
            C: RCPT TO:<b@example.com>
            S: 250 OK
            C: DATA
            S: 354 ...
            C: .
            S: 250 Message accepted
            C: DATA
            S: 503 Send MAIL FROM before DATA
        """)

    def test_a_second_helo_starts_afresh(self) -> None:
        self.dialogue(ENVELOPE + "C: HELO again\nS: 250 Hello\nC: DATA\nS: 503 ...MAIL FROM...\n")

    def test_rset_drops_the_envelope_and_keeps_the_helo(self) -> None:
        self.dialogue(
            ENVELOPE + "C: RSET\nS: 250 OK\nC: DATA\nS: 503 ...\n"
            "C: MAIL FROM:<a@example.com>\nS: 250 OK\nC: NOOP whatever\nS: 250 OK\n"
        )

    def test_a_thousand_recipients_then_452(self) -> None:
        rcpt = "".join(f"C: RCPT TO:<u{n}@example.com>\nS: 250 OK\n" for n in range(999))
        text = (
            ENVELOPE
            + rcpt
            + "C: RCPT TO:<late@example.com>\nS: 452 Too many recipients...\n"
            + DATA
            + "C: .\nS: 250 Message accepted\n"
        )
        self.play([line for line in text.splitlines() if line], "in one piece")
        self.assertEqual(len(self.inbox[0].recipients), 1000)


class SyntaxTest(DialogueTest):
    """What is wrong gets a reply that shows what is right, and the session goes on."""

    def test_501_shows_the_syntax(self) -> None:
        for line, syntax in [
            ("HELO", "HELO your-domain.example"),
            ("HELO two words", "HELO your-domain.example"),
            ("HELO \\x07", "HELO your-domain.example"),
            ("MAIL", "MAIL FROM:<sender@example.com>"),
            ("MAIL FROM:", "MAIL FROM:<sender@example.com>"),
            ("MAIL FROM: a@example.com", "MAIL FROM:<sender@example.com>"),
            ("MAIL FROM:<a@example.com", "MAIL FROM:<sender@example.com>"),
            ("MAIL TO:<a@example.com>", "MAIL FROM:<sender@example.com>"),
            ("MAIL FROM:<a b@example.com>", "MAIL FROM:<sender@example.com>"),
            ("MAIL FROM:<a\\x01@example.com>", "MAIL FROM:<sender@example.com>"),
            ("MAIL FROM:<a\\x1b[2J@example.com>", "MAIL FROM:<sender@example.com>"),
            ("MAIL FROM:<a\\r@example.com>", "MAIL FROM:<sender@example.com>"),
            ("MAIL FROM:<a\\x00@example.com>", "MAIL FROM:<sender@example.com>"),
            ("MAIL FROM:<\\xc3\\x28@example.com>", "MAIL FROM:<sender@example.com>"),
        ]:
            with self.subTest(line):
                self.dialogue(
                    HELLO + f"C: {line}\nS: 501 Syntax: {syntax} - ...\nC: NOOP\nS: 250 OK"
                )

    def test_rcpt(self) -> None:
        self.dialogue(
            HELLO
            + """
            C: MAIL FROM:<a@example.com>
            S: 250 OK
            C: RCPT TO: b@example.com
            S: 501 Syntax: RCPT TO:<recipient@example.com>...
            C: RCPT TO:<>
            S: 501 Syntax: RCPT TO:<recipient@example.com>...
            C: RCPT TO:<b@example.com>
            S: 250 OK
        """
        )

    def test_arguments_where_there_are_none(self) -> None:
        self.dialogue(
            ENVELOPE
            + """
            C: DATA now
            S: 501 Syntax: DATA - ...
            C: RSET all
            S: 501 Syntax: RSET - ...
            C: QUIT please
            S: 501 Syntax: QUIT - ...
            C: DATA  \t
            S: 354 ...
            C: .
            S: 250 Message accepted
            C: QUIT \t
            S: 221 Bye
            S: (closed)
        """
        )

    def test_unknown_commands(self) -> None:
        self.dialogue("""
            S: 220 Simple Mail Server
            C: FROB
            S: 500 Unknown command...HELO...
            C:
            S: 500 Unknown command...
            C:  HELO example.com
            S: 500 Unknown command...
            C: HELOexample.com
            S: 500 Unknown command...
            C: HELO example.com
            S: 250 Hello
        """)

    def test_only_commands_can_be_reached(self) -> None:
        for verb in (
            "handle",
            "reply",
            "__init__",
            "_HELO",
            "do_HELO",
            "setup",
            "HELO\\x00",
            "\\xc5\\xbf",
        ):
            with self.subTest(verb):
                self.dialogue(
                    f"S: 220 ...\nC: {verb} x\nS: 500 Unknown command...\nC: NOOP\nS: 250 OK"
                )

    def test_twenty_errors(self) -> None:
        self.dialogue(
            "S: 220 ...\n" + "C: FROB\nS: 500 ...\n" * 20 + "S: 421 Too many...\nS: (closed)"
        )

    def test_a_browser(self) -> None:
        for verb in ("GET / HTTP/1.1", "POST /mail HTTP/1.0", "CONNECT here:25 HTTP/1.1"):
            self.dialogue(f"S: 220 ...\nC: {verb}\nC: Host: here\nS: 421 ...\nS: (closed)")


class WireTest(DialogueTest):
    """Lines, line ends and dots."""

    def content(self, *lines: str, data: str = "DATA", end: str = ".") -> list[bytes]:
        """Send a message's lines, once in each way; give what was accepted."""
        self.inbox.clear()
        text = "".join(f"C: {line}\n" for line in (*lines, end))
        self.dialogue(
            ENVELOPE + DATA.replace("DATA", data, 1) + text + "S: 250 Message accepted\n" + BYE
        )
        self.assertEqual(len(self.inbox), 3)
        return sorted({bytes(envelope.content) for envelope in self.inbox})

    def test_bare_lf_commands(self) -> None:
        self.dialogue(r"""
            S: 220 Simple Mail Server
            C: HELO example.com\n
            S: 250 Hello
            C: MAIL FROM:<a@example.com>\n
            S: 250 OK
            C: RCPT TO:<b@example.com>\n
            S: 250 OK
            C: DATA\n
            S: 354 ...
            C: typed at nc\n
            C: ..\n
            C: .\n
            S: 250 Message accepted
            C: QUIT\n
            S: 221 Bye
            S: (closed)
        """)
        self.assertEqual(self.inbox[0].content, b"typed at nc\n.\n")

    def test_after_data_in_crlf_no_other_ending_counts(self) -> None:
        for end in (
            r".\n",
            r"\n.\n",
            r"\r.\r",
            r"\n.\r\n",
            r"\r\n.\n",
            r"\r\n.\r",
            r"x\r\r\n.\r\r\n",
        ):
            with self.subTest(end):
                smuggled = f"C: first{end}\\c\nC: MAIL FROM:<evil@example.com>\n"
                self.dialogue(ENVELOPE + DATA + smuggled + "C: .\nS: 250 Message accepted\n" + BYE)
                self.assertIn(b"evil", self.inbox[-1].content)
                self.assertEqual(self.inbox[-1].sender, "a@example.com")

    def test_after_data_in_lf_two_endings_count(self) -> None:
        self.assertEqual(self.content(r"x\n", data=r"DATA\n", end=r".\n"), [b"x\n"])
        self.assertEqual(self.content("x", data=r"DATA\n"), [b"x\r\n"])
        self.assertEqual(self.content(r"x\n.\r\ny\n", data=r"DATA\n", end=r".\n"), [b"x\n\r\ny\n"])

    def test_a_message_of_nothing(self) -> None:
        self.assertEqual(self.content(), [b""])
        self.assertEqual(self.content(data=r"DATA\n", end=r".\n"), [b""])

    def test_dots(self) -> None:
        self.assertEqual(
            self.content("..", "...", "..a", ".b", "a..", ""),
            [b".\r\n..\r\n.a\r\nb\r\na..\r\n\r\n"],
        )

    def test_a_bare_lf_is_content_and_starts_no_line(self) -> None:
        self.assertEqual(self.content(r"a\n.b\n..c\n.\nd"), [b"a\n.b\n..c\n.\nd\r\n"])

    def test_eight_bits_pass(self) -> None:
        self.assertEqual(
            self.content("caf\\xc3\\xa9 \\xff\\x00\\x08"), [b"caf\xc3\xa9 \xff\0\x08\r\n"]
        )

    def test_a_line_too_long_is_thrown_away_whole(self) -> None:
        limit = mailserver.SecureHandler.line_limit
        for size in (limit, limit + 1, 100_000):
            with self.subTest(size):
                self.dialogue(
                    f"S: 220 ...\nC: NOOP {'x' * size} QUIT\nS: 500 Line too long...\n"
                    "C: HELO x\nS: 250 Hello\n"
                )
        self.dialogue(f"S: 220 ...\nC: NOOP {'x' * (limit - 7)}\nS: 250 OK\n")

    def test_typing_is_edited(self) -> None:
        self.dialogue(r"""
            S: 220 Simple Mail Server
            C: \b\bHEMO\b\bLX\x7fO x
            S: 250 Hello
            C: MAIL FROM:<bob\b\b\bann@example.com>
            S: 250 OK
            C: RCPT TO:<b@example.com>
            S: 250 OK
        """)

    def test_telnet_codes_are_dropped(self) -> None:
        self.dialogue(r"""
            S: 220 Simple Mail Server
            C: \xff\xfd\x03\xff\xfb\x18\xff\xfa\x18\x00xterm\xff\xf0HE\xff\xf1LO x
            S: 250 Hello
            C: \xff\xf4\xff\xfd\x06NOOP
            S: 250 OK
        """)

    def test_the_end_of_input_completes_nothing(self) -> None:
        self.dialogue(ENVELOPE + DATA + "C: text\nC: .\\c")
        self.dialogue(ENVELOPE + DATA + "C: text\nC: .\\r\\c")
        self.dialogue(ENVELOPE + DATA + "C: cut o\\c")
        self.dialogue("S: 220 ...\nC: QUIT\\c")
        self.assertEqual(self.inbox, [])


class SizeTest(DialogueTest):
    """A message over the limit is read to its end and refused."""

    settings = {"max_size": 1000}

    def test_the_limit(self) -> None:
        for newline in ("", "\\n"):
            with self.subTest(newline):
                head = ENVELOPE + DATA.replace("DATA", "DATA" + newline, 1)
                length = 998 if not newline else 999
                fits, more = "x" * length + newline, "x" * (length + 1) + newline
                over = "S: 552 Message too big: send 1000 octets at most\nC: NOOP\nS: 250 OK\n"
                self.dialogue(head + f"C: {fits}\nC: .{newline}\nS: 250 Message accepted\n")
                self.dialogue(head + f"C: {more}\nC: .{newline}\n" + over)
                long = f"C: x\\n\\r\\n..QUIT{newline}\n" * 5000
                self.dialogue(head + long + f"C: .{newline}\n" + over)
        self.assertEqual({len(envelope.content) for envelope in self.inbox}, {1000})

    def test_doubled_dots_do_not_count(self) -> None:
        dots = "C: ..\n" * 333
        self.dialogue(ENVELOPE + DATA + dots + "C: .\nS: 250 Message accepted\n")
        self.dialogue(ENVELOPE + DATA + dots + "C: ..\nC: .\nS: 552 ...\n")

    def test_the_next_message_is_a_new_one(self) -> None:
        self.dialogue(
            ENVELOPE
            + DATA
            + f"C: {'x' * 2000}\nC: .\nS: 552 ...\nC: DATA\nS: 503 ...\n"
            + ENVELOPE.removeprefix(HELLO)
            + DATA
            + "C: small\nC: .\nS: 250 Message accepted\n"
        )


class MemoryTest(DialogueTest):
    """What a client sends is bounded where it is kept."""

    def test_endless_lines_and_messages(self) -> None:
        peaks = [0]

        class Handler(mailserver.SecureHandler):
            def receive(self) -> None:
                super().receive()
                peaks.append(len(self.received))

        self.server = self.serve(handler=Handler, max_size=1000)
        endless = "x" * 2_000_000
        line = f"S: 220 ...\nC: {endless}\nS: 500 Line too long...\n"
        message = ENVELOPE + DATA + f"C: {endless}\nC: .\nS: 552 ...\n"
        for text in (line, message):
            self.play(text.splitlines())
            self.assertLess(max(peaks), Handler.line_limit + 70_000)


class FailTest(DialogueTest):
    settings = {"fail": {"RCPT": 450, "VRFY": 421}}

    def test_commands_fail_on_purpose(self) -> None:
        self.dialogue(
            HELLO
            + "C: MAIL FROM:<a@example.com>\nS: 250 OK\n"
            + "C: rcpt TO:<b@example.com>\nS: 450 Refused on purpose...\n" * 30
            + "C: VRFY x\nS: 421 ...\nS: (closed)\n"
        )


class LifeTest(DialogueTest):
    """Sessions come, go, and are ended."""

    def test_idle_clients_are_hung_up_on(self) -> None:
        self.server = self.serve(timeout=0.2)
        for text in ("S: 220 ...", HELLO, ENVELOPE + DATA + "C: half a mess\\c"):
            with self.connect() as client:
                for line in text.splitlines():
                    if line.startswith("C:"):
                        client.send(octets(line[3:]))
                    else:
                        self.expect(client, line[3:])
                self.expect(client, "421 Nothing heard for too long")
                self.assertEqual(client.line(), "(closed)")

    def test_one_client_too_many(self) -> None:
        self.server = self.serve(max_clients=2)
        first, second, third = self.connect(), self.connect(), None
        self.expect(first, "220 ...")
        self.expect(second, "220 ...")
        third = self.connect()
        self.expect(third, "421 Too many clients...")
        self.assertEqual(third.line(), "(closed)")
        first.send(b"QUIT\r\n")
        self.expect(first, "221 Bye")
        wait_until(lambda: len(self.server.clients) == 1)
        self.expect(self.connect(), "220 ...")

    def test_serial_mode(self) -> None:
        self.server = self.serve(serial=True)
        first = self.connect()
        self.expect(first, "220 ...")
        second = self.connect()
        second.send(b"HELO x\r\n")
        second.socket.settimeout(0.2)
        with self.assertRaises(TimeoutError):
            second.socket.recv(1)
        first.send(b"QUIT\r\n")
        self.expect(first, "221 Bye")
        second.socket.settimeout(PATIENCE)
        self.expect(second, "220 ...")
        self.expect(second, "250 Hello")

    def test_many_at_once(self) -> None:
        clients = [self.connect() for _ in range(50)]
        for client in clients:
            self.expect(client, "220 ...")
        for command, reply in [
            (b"HELO x\r\n", "250 Hello"),
            (b"MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\n", "250 OK"),
            (b"DATA\r\n", "250 OK"),
            (b"x\r\n.\r\n", "354 ..."),
            (b"", "250 Message accepted"),
        ]:
            for client in clients:
                client.send(command)
            for client in clients:
                self.expect(client, reply)
        self.assertEqual(len(self.inbox), 50)

    def test_stop_says_goodbye_to_everyone(self) -> None:
        idle, middle, data = self.connect(), self.connect(), self.connect()
        for client in (idle, middle, data):
            self.expect(client, "220 ...")
        middle.send(b"HELO")
        data.send(b"HELO x\r\nMAIL FROM:<a@b.example>\r\nRCPT TO:<b@c.example>\r\nDATA\r\nhalf")
        for reply in ("250 Hello", "250 OK", "250 OK", "354 ..."):
            self.expect(data, reply)
        self.server.stop()
        for client in (idle, middle, data):
            self.expect(client, "421 The server is stopping...")
            self.assertEqual(client.line(), "(closed)")
        self.assertEqual(self.inbox, [])
        MailServer(self.server.server_address).server_close()  # the port is free

    def test_a_client_that_does_not_read_does_not_keep_it_from_stopping(self) -> None:
        self.server = self.serve(grace=0.1)
        client = self.connect()
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.socket.settimeout(0.3)
        with contextlib.suppress(TimeoutError):
            while True:
                client.socket.sendall(b"NOOP\r\n" * 10_000)
        self.server.stop()
        wait_until(lambda: not self.server.sessions)

    def test_nor_in_serial_mode(self) -> None:
        self.server = self.serve(serial=True, grace=0.1)
        client = self.connect()
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.socket.settimeout(0.3)
        with contextlib.suppress(TimeoutError):
            while True:
                client.socket.sendall(b"HELP\r\n" * 10_000)
        stopping = threading.Thread(target=self.server.stop, daemon=True)
        stopping.start()
        stopping.join(PATIENCE)
        self.assertFalse(stopping.is_alive())

    def test_serve_forever_in_a_thread_of_ones_own(self) -> None:
        with MailServer(("127.0.0.1", 0)) as server:
            thread = threading.Thread(target=server.serve_forever, daemon=True)
            thread.start()
            with Client(server.server_address) as client:
                self.expect(client, "220 ...")
        thread.join(PATIENCE)
        self.assertFalse(thread.is_alive())

    def test_threads_and_files_are_given_back(self) -> None:
        before = threading.active_count()
        for _ in range(50):
            self.connect().close()
        wait_until(lambda: threading.active_count() <= before and not self.server.sessions)

    def test_a_failing_command_gets_451(self) -> None:
        class Handler(mailserver.ESMTPHandler):
            def do_DIVIDE(self, arg: str) -> None:
                """DIVIDE"""
                self.reply(250, str(1 // 0))

        self.server = self.serve(handler=Handler)
        self.dialogue("S: 220 ...\nC: DIVIDE\nS: 451 ...\nC: NOOP\nS: 250 OK")
        self.assertEqual(len(self.warnings), 3)
        self.assertIn("DIVIDE failed: ZeroDivisionError", self.warnings[0])
        self.warnings.clear()

    def test_no_file_descriptor_left(self) -> None:
        failures = [OSError(24, "Too many open files")] * 3
        accept = self.server.socket.accept
        paused: list[float] = []

        class Socket:
            def __getattr__(self, name: str) -> Any:
                return getattr(real, name)

            def accept(self) -> Any:
                if failures:
                    raise failures.pop()
                return accept()

        real = self.server.socket
        self.server.socket = Socket()  # type: ignore[assignment]
        pause = unittest.mock.patch.object(mailserver.time, "sleep", paused.append)
        with pause:
            self.dialogue("S: 220 ...\n" + BYE)
        self.assertGreaterEqual(paused.count(0.1), 3)

    def test_an_unknown_setting(self) -> None:
        with self.assertRaisesRegex(TypeError, "max_sise"):
            MailServer(("127.0.0.1", 0), max_sise=1)

    def test_ipv6(self) -> None:
        try:
            server = MailServer(("::1", 0))
        except OSError:
            self.skipTest("no IPv6 on this machine")
        with server:
            server.start()
            server.mailroom.subscribe(self.inbox.append)
            with smtplib.SMTP("::1", server.server_address[1]) as client:
                client.sendmail("a@example.com", "b@example.com", "hello")
        self.assertIn("([IPv6:::1])", self.inbox[0].trace)


class ConsoleTest(DialogueTest):
    """What the teacher sees."""

    def setUp(self) -> None:
        super().setUp()
        self.console = Recorder()
        self.server = self.serve(console=self.console)

    def test_the_dialogue(self) -> None:
        self.play((HELLO + "C: NOOP\\n\nS: 250 OK\n" + BYE).splitlines()[:-1])
        shown = [re.sub(r"^\[\d+\] ", "", line) for line in self.console.lines]
        self.assertEqual(
            shown,
            ["-: connected from 127.0.0.1", "S: 220 Simple Mail Server", "C: HELO example.com"]
            + ["S: 250 Hello", "C: NOOP<LF>", "S: 250 OK", "C: QUIT", "S: 221 Bye"],
        )

    def test_nothing_reaches_the_terminal_raw(self) -> None:
        self.dialogue("S: 220 ...\nC: \\x1b[2J\\xc2\\x9b\\xe2\\x80\\xaehi \\xfe\nS: 500 ...")
        self.assertIn(r"\x1b[2J\x9b\u202ehi \udcfe", "".join(self.console.lines))

    def test_the_hint_about_an_open_message(self) -> None:
        with self.connect() as client:
            for line in (ENVELOPE + DATA).splitlines():
                if line.startswith("C:"):
                    client.send(octets(line[3:]))
                else:
                    self.expect(client, line[3:])
            client.send(b"Hello\r\n")
            client.send(b"quit\r\n")
            wait_until(lambda: any("single dot" in line for line in self.console.lines))


class ProjectorTest(unittest.TestCase):
    def show(self, content: bytes, *recipients: str) -> str:
        envelope = Envelope("a@example.com")
        envelope.recipients = list(recipients)
        envelope.content = bytearray(content)
        with contextlib.redirect_stdout(io.StringIO()) as out:
            mailserver.Projector().message(envelope)
        return out.getvalue()

    def test_envelope_and_bcc(self) -> None:
        text = self.show(b"To: Bob <B@example.com>\r\n\r\nhi\r\n", "b@example.com", "c@example.com")
        self.assertIn("from <a@example.com>\nto   <b@example.com>\nto   <c@example.com>  (", text)
        for plain in (b"no headers\r\n", b"Subject: x\r\n\r\n", b"PS: tomorrow\r\n"):
            self.assertNotIn("(", self.show(plain, "b@example.com"))

    def test_no_message_looks_like_a_dialogue(self) -> None:
        self.assertNotRegex(self.show(b"[1] S: 250 OK\n----\n", "b@example.com"), r"(?m)^\[1\]")

    def test_line_ends(self) -> None:
        text = self.show(b"one\r\ntwo\nthree\x1b\r\n\rx\r\n", "b@example.com")
        self.assertIn("| one\n| two<LF>\n| three\\x1b\n", text)

    def test_decoded(self) -> None:
        head = b"Content-Type: text/plain; charset=%s\r\nContent-Transfer-Encoding: %s\r\n\r\n"
        for charset, encoding, body in [
            (b"utf-8", b"base64", b"Y2Fmw6kbWzJK"),
            (b"utf-8", b"quoted-printable", b"caf=C3=A9=1B[2J"),
            (b"latin-1", b"Quoted-Printable", b"caf=E9=1B[2J"),
        ]:
            with self.subTest(charset):
                self.assertIn(
                    "café\\x1b[2J\n", self.show(head % (charset, encoding) + body, "b@example.com")
                )

    def test_unknown_character_sets(self) -> None:
        for charset in (b"nonsense", b"hex", b"\xff"):
            text = (
                b"Content-Type: text/plain; charset=%s\r\nContent-Transfer-Encoding: base64\r\n\r\n"
            )
            self.assertIn(
                "\n| YQ==<LF>\n----", self.show(text % charset + b"YQ==", "b@example.com")
            )

    def test_colours(self) -> None:
        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        for environment, coloured in [({}, True), ({"NO_COLOR": "1"}, False)]:
            with unittest.mock.patch.dict(os.environ, environment):
                with contextlib.redirect_stdout(Terminal()) as out:
                    mailserver.Projector().show("[1] C: HELO x", "[1] S: 250 Hello")
                colours = re.findall("\x1b\\[3[0-9]m", out.getvalue())
                self.assertEqual(len(set(colours)), 2 if coloured else 0)


class PlainClientsTest(DialogueTest):
    def test_smtplib(self) -> None:
        host, port = self.server.server_address[:2]
        with smtplib.SMTP(str(host), port) as client:
            client.sendmail(
                "a@example.com", ["b@example.com", "c@example.com"], "Subject: x\n\n.\n..\n"
            )
        self.assertEqual(self.inbox[0].recipients, ["b@example.com", "c@example.com"])
        self.assertEqual(self.inbox[0].content, b"Subject: x\r\n\r\n.\r\n..\r\n")

    @unittest.skipUnless(shutil.which("curl"), "curl is not installed")
    def test_curl(self) -> None:
        port = self.server.server_address[1]
        with tempfile.TemporaryDirectory() as folder:
            message = Path(folder, "mail.txt")
            message.write_bytes(b"Subject: x\n\n.\nunix\n")
            command = ["curl", "-sS", f"smtp://127.0.0.1:{port}", "--mail-from", "a@example.com"]
            command += ["--mail-rcpt", "b@example.com", "-T", str(message)]
            subprocess.run(command, check=True, timeout=PATIENCE)
        self.assertEqual(
            self.inbox[0].content.replace(b"\r\n", b"\n").strip(), b"Subject: x\n\n.\nunix"
        )


EHLO = """S: 220 Simple Mail Server
C: EHLO example.com
S: 250-Hello
S: 250-SIZE 10485760
S: 250-8BITMIME
S: 250-PIPELINING
S: 250-SMTPUTF8
S: 250-EXPN
S: 250 HELP
"""
MESSAGE = "C: Subject: x\nC:\nC: hello\nC: .\nS: 250 Message accepted\n"


class ExtensionTest(DialogueTest):
    """Part 2: the other commands, and what EHLO offers."""

    settings = {"lists": {"team": ["ann@example.com", "bob@example.com"]}}

    def test_parameters(self) -> None:
        self.dialogue(
            EHLO
            + """
            C: MAIL FROM:<a@example.com> SIZE=1000 BODY=8BITMIME SMTPUTF8
            S: 250 OK
            C: RSET
            S: 250 OK
            C: MAIL FROM:<a@example.com> size=10485760 body=7bit
            S: 250 OK
            C: RCPT TO:<b@example.com> NOTIFY=NEVER
            S: 555 Unknown parameter...RCPT...
            C: RCPT TO:<b@example.com>
            S: 250 OK
            C: RSET
            S: 250 OK
            C: MAIL FROM:<a@example.com> SIZE=10485761
            S: 552 Message too big...
            C: MAIL FROM:<a@example.com> SIZE
            S: 501 ...SIZE=1000...
            C: MAIL FROM:<a@example.com> SIZE=big
            S: 501 ...SIZE=1000...
            C: MAIL FROM:<a@example.com> BODY=9BIT
            S: 501 ...BODY=8BITMIME...
            C: MAIL FROM:<a@example.com> SMTPUTF8=yes
            S: 501 ...SMTPUTF8...
            C: MAIL FROM:<a@example.com> SIZE=1 SIZE=1
            S: 501 ...once
            C: MAIL FROM:<a@example.com> FROB=1
            S: 555 Unknown parameter...MAIL...
            C: MAIL FROM:<a@example.com> __CLASS__
            S: 555 Unknown parameter...
            C: DATA
            S: 503 Send MAIL FROM before DATA
            C: HELO example.com
            S: 250 Hello
            C: MAIL FROM:<a@example.com> SIZE=1000
            S: 555 No parameters after HELO...EHLO...
            C: MAIL FROM:<a@example.com>
            S: 250 OK
        """
        )

    def test_utf8_only_when_asked_for(self) -> None:
        self.dialogue(
            EHLO
            + """
            C: MAIL FROM:<jos\xe9@example.com>
            S: 553 ...SMTPUTF8...
            C: MAIL FROM:<jos\xe9@example.com> SMTPUTF8
            S: 250 OK
            C: RCPT TO:<\u7528\u6237@\u4f8b\u5b50.example>
            S: 250 OK
            C: RSET
            S: 250 OK
            C: MAIL FROM:<a@example.com>
            S: 250 OK
            C: RCPT TO:<jos\xe9@example.com>
            S: 553 ...SMTPUTF8...
        """
        )

    def test_pipelining_answers_in_one_go(self) -> None:
        with self.connect() as client:
            client.line()
            client.send(
                b"EHLO x\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\n"
            )
            self.assertTrue(
                client.socket.recv(10_000).endswith(b"354 End data with <CR><LF>.<CR><LF>\r\n")
            )

    def test_help(self) -> None:
        self.dialogue("""
            S: 220 ...
            C: HELP
            S: 214-AUTH DATA EHLO EXPN HELO HELP MAIL NOOP QUIT RCPT RSET STARTTLS VRFY
            S: 214 ...HELP...
            C: help mail
            S: 214 MAIL FROM:<sender@example.com> - opens an envelope...
            C: HELP FROB
            S: 504 No such command...
        """)

    def test_every_command_has_a_syntax_and_a_sentence(self) -> None:
        for handler in (mailserver.SecureHandler, mailserver.POP3Handler):
            for verb in (name[3:] for name in dir(handler) if name.startswith("do_")):
                syntax, sentence = getattr(handler, "do_" + verb).__doc__.split(" - ")
                self.assertEqual(syntax.split(" ")[0], verb)
                self.assertGreater(len(sentence.split()), 2)

    def test_vrfy_and_expn(self) -> None:
        self.dialogue("""
            S: 220 ...
            C: VRFY somebody
            S: 252 ...
            C: VRFY Team
            S: 250 <team>
            C: VRFY
            S: 501 Syntax: VRFY user - ...
            C: EXPN team
            S: 250-<ann@example.com>
            S: 250 <bob@example.com>
            C: EXPN TEAM@any.example
            S: 250-<ann@example.com>
            S: 250 <bob@example.com>
            C: EXPN nobody
            S: 550 No such list
        """)

    def test_names_of_lists_in_any_case(self) -> None:
        self.server = self.serve(lists={"Team": ["ann@example.com"], "none": []})
        self.dialogue("""
            S: 220 ...
            C: EXPN team
            S: 250 <ann@example.com>
            C: EXPN none
            S: 550 No such list
        """)

    def test_mail_to_a_list_goes_to_its_members(self) -> None:
        for to in ("team", "TEAM@any.example"):
            self.inbox.clear()
            rcpt = f"C: RCPT TO:<{to}>\nS: 250 OK\nC: RCPT TO:<bob@example.com>\nS: 250 OK\n"
            self.dialogue(
                HELLO + "C: MAIL FROM:<a@example.com>\nS: 250 OK\n" + rcpt + DATA + MESSAGE
            )
            self.assertEqual(self.inbox[0].recipients, ["ann@example.com", "bob@example.com"])


class AddressTest(DialogueTest):
    """Paths, by RFC 5321 4.1.2: what is sent, and what is in the envelope then; None: refused."""

    table: list[tuple[str, str | None]] = [
        ("<bob@example.com>", "bob@example.com"),
        ("<Bob.B+tag@Example.COM>", "Bob.B+tag@Example.COM"),
        ("<!#$%&'*+-/=?^_`{|}~@example.com>", "!#$%&'*+-/=?^_`{|}~@example.com"),
        ('<"a b"@example.com>', '"a b"@example.com'),
        (r'<"a\"b>@"@example.com>', r'"a\"b>@"@example.com'),
        ('<""@example.com>', '""@example.com'),
        ("<bob@[192.0.2.1]>", "bob@[192.0.2.1]"),
        ("<bob@[IPv6:2001:db8::1]>", "bob@[IPv6:2001:db8::1]"),
        ("<@a.example,@b.example:bob@example.com>", "bob@example.com"),
        ("<bob@localhost>", "bob@localhost"),
        ("<bob@a-b.example>", "bob@a-b.example"),
        ("<Postmaster>", "Postmaster"),
        (f"<{'x' * 64}@example.com>", f"{'x' * 64}@example.com"),
        (f"<{'x' * 65}@example.com>", None),
        (f"<x@{'e' * 251}.x>", None),
        (f"<x@{'e' * 250}.x>", f"x@{'e' * 250}.x"),
        ("<>", None),
        ("<bob>", None),
        ("<bob@>", None),
        ("<@example.com>", None),
        ("<bob@@example.com>", None),
        ("<.bob@example.com>", None),
        ("<bob.@example.com>", None),
        ("<b..b@example.com>", None),
        ("<bob@-a.example>", None),
        ("<bob@a-.example>", None),
        ("<bob@a..example>", None),
        ("<bob@example.com.>", None),
        ("<bob@[nonsense]>", None),
        ('<"a"b"@example.com>', None),
        ('<"a@example.com>', None),
        ("<<bob@example.com>>", None),
        ("bob@example.com", None),
        ("<bob@example.com>x", None),
    ]

    def test_recipients(self) -> None:
        for path, address in self.table:
            with self.subTest(path):
                self.inbox.clear()
                text = HELLO + "C: MAIL FROM:<>\nS: 250 OK\n"
                if address is None:
                    self.dialogue(text + f"C: RCPT TO:{path}\nS: 501 ...\n")
                else:
                    text += f"C: RCPT TO:{path}\nS: 250 OK\n" + DATA + MESSAGE
                    self.play(text.splitlines())
                    self.assertEqual(self.inbox[0].recipients, [address])

    def test_senders(self) -> None:
        for path, address in self.table:
            if path in ("<>", "<Postmaster>"):
                continue
            with self.subTest(path):
                text = HELLO + f"C: MAIL FROM:{path}\nS: {'250 OK' if address else '501 ...'}\n"
                self.play(text.splitlines())

    def test_hostile_addresses_take_no_time(self) -> None:
        for local in ("a." * 200, '"' + "\\a" * 200, "a-" * 200 + "@", "x@" + "a-" * 200):
            self.dialogue(HELLO + f"C: MAIL FROM:<{local}\nS: 501 ...\n")


def certificate(folder: str) -> tuple[str, str]:
    """Make a certificate for localhost, and its key."""
    cert, key = os.path.join(folder, "cert.pem"), os.path.join(folder, "key.pem")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -keyout"
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*command.split(), key, "-out", cert, *names], check=True, capture_output=True)
    return cert, key


class TLSTest(DialogueTest):
    """What runs on top of a certificate."""

    cert: str
    key: str
    context: ssl.SSLContext

    @classmethod
    def setUpClass(cls) -> None:
        if not shutil.which("openssl"):
            raise unittest.SkipTest("openssl is not installed")
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.cert, cls.key = certificate(folder.name)
        cls.settings = {**cls.settings, "tls": mailserver.tls_context(cls.cert, cls.key)}
        cls.context = ssl.create_default_context(cafile=cls.cert)

    def encrypt(self, client: Client) -> None:
        """Do the client's part of the handshake."""
        client.file.close()
        client.socket = self.context.wrap_socket(client.socket, server_hostname="localhost")
        client.file = client.socket.makefile("rb")

    def converse(self, client: Client, text: str) -> None:
        """Play a piece of a dialogue, line by line."""
        for line in filter(None, map(str.strip, text.splitlines())):
            if line.startswith("C:"):
                client.send(octets(line[3:]))
            else:
                self.expect(client, line[3:])


class SecureTest(TLSTest):
    settings = {"users": {"ann@example.com": "secret", "bob": "pass word"}, "require_auth": True}

    def test_before_and_after_the_handshake(self) -> None:
        before = EHLO.replace("250 HELP", "250-HELP\nS: 250 STARTTLS")
        after = EHLO.replace("250 HELP", "250-HELP\nS: 250 AUTH PLAIN LOGIN").split("\n", 1)[1]
        with self.connect() as client:
            self.converse(
                client,
                before
                + """
                C: AUTH PLAIN AGJvYgBwYXNzIHdvcmQ=
                S: 538 Send STARTTLS before AUTH
                C: STARTTLS now
                S: 501 Syntax: STARTTLS - ...
                C: STARTTLS
                S: 220 Ready for TLS
            """,
            )
            self.encrypt(client)
            self.converse(
                client,
                """
                C: AUTH PLAIN AGJvYgBwYXNzIHdvcmQ=
                S: 503 ...EHLO...
                C: MAIL FROM:<a@example.com>
                S: 503 Send HELO before MAIL FROM
            """
                + after
                + """
                C: MAIL FROM:<a@example.com>
                S: 530 Send AUTH before MAIL FROM
                C: STARTTLS
                S: 503 TLS is on already...
                C: AUTH PLAIN AGJvYgBwYXNzIHdvcmQ=
                S: 235 Welcome
                C: AUTH PLAIN AGJvYgBwYXNzIHdvcmQ=
                S: 503 ...once...
                C: MAIL FROM:<a@example.com> AUTH=<>
                S: 250 OK
                C: RCPT TO:<b@example.com>
                S: 250 OK
            """
                + DATA
                + MESSAGE
                + BYE,
            )
        self.assertIn("with ESMTPSA", self.inbox[0].trace)

    def test_what_was_sent_with_starttls_is_forgotten(self) -> None:
        with self.connect() as client:
            self.converse(client, "S: 220 ...\n")
            client.send(b"EHLO x\r\nSTARTTLS\r\nRSET\r\nMAIL FROM:<evil@example.com>\r\nX")
            while not client.line().startswith("220"):
                pass
            self.encrypt(client)
            self.converse(client, "C: NOOP\nS: 250 OK\nC: RCPT TO:<b@example.com>\nS: 503 ...\n")

    def test_a_failed_handshake_ends_the_session_quietly(self) -> None:
        for junk in (b"this is no handshake\r\n", b""):
            with self.connect() as client:
                self.converse(client, "S: 220 ...\nC: STARTTLS\nS: 220 ...\n")
                client.send(junk)
                client.socket.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionError):
                    while client.socket.recv(1000):
                        pass
        wait_until(lambda: not self.server.sessions)

    def test_stop_and_silence_during_a_handshake_and_in_tls(self) -> None:
        self.server = self.serve(**self.settings, timeout=0.3)
        silent, client = self.connect(), self.connect()
        for one in (silent, client):
            self.converse(one, "S: 220 ...\nC: STARTTLS\nS: 220 ...\n")
        self.encrypt(client)
        self.expect(client, "421 Nothing heard...")
        self.assertEqual(client.line(), "(closed)")
        wait_until(lambda: not self.server.sessions)

    def test_smtplib(self) -> None:
        host, port = self.server.server_address[:2]
        for method in ("auth_plain", "auth_login"):
            with smtplib.SMTP("localhost", port) as client:
                client.starttls(context=self.context)
                client.user, client.password = "ann@example.com", "secret"
                client.ehlo()
                client.auth(method[5:], getattr(client, method))
                client.sendmail("a@example.com", "b@example.com", "Subject: x\n\nhello\n")
        with smtplib.SMTP("localhost", port) as client:
            client.starttls(context=self.context)
            with self.assertRaises(smtplib.SMTPAuthenticationError):
                client.login("ann@example.com", "wrong")
        self.assertEqual(len(self.inbox), 2)

    def test_old_tls_is_refused(self) -> None:
        self.assertEqual(self.settings["tls"].minimum_version, ssl.TLSVersion.TLSv1_2)

    @unittest.skipUnless(shutil.which("curl"), "curl is not installed")
    def test_curl(self) -> None:
        port = self.server.server_address[1]
        command = f"curl -sS --ssl-reqd --cacert {self.cert} --user bob:pass%20word"
        command += (
            f" smtp://localhost:{port} --mail-from a@example.com --mail-rcpt b@example.com -T -"
        )
        words = [word.replace("%20", " ") for word in command.split()]
        subprocess.run(words, input=b"Subject: x\n\nhi\n", check=True, timeout=PATIENCE)
        self.assertEqual(len(self.inbox), 1)


class AuthTest(DialogueTest):
    """AUTH in the clear. The user is "ann", the password "secret"."""

    settings = {"users": {"ann": "secret"}}
    ehlo = "S: 220 ...\nC: EHLO x\n" + "S: 250-...\n" * 7 + "S: 250 AUTH PLAIN LOGIN\n"

    def test_mechanisms(self) -> None:
        for dialogue in (
            "C: AUTH PLAIN AGFubgBzZWNyZXQ=\n",
            "C: auth plain AGFubgBzZWNyZXQ=\n",
            "C: AUTH PLAIN YW5uAGFubgBzZWNyZXQ=\n",
            "C: AUTH PLAIN\nS: 334 ...\nC: AGFubgBzZWNyZXQ=\n",
            "C: AUTH LOGIN\nS: 334 VXNlcm5hbWU6\nC: YW5u\nS: 334 UGFzc3dvcmQ6\nC: c2VjcmV0\n",
            "C: AUTH LOGIN YW5u\nS: 334 UGFzc3dvcmQ6\nC: c2VjcmV0\n",
        ):
            with self.subTest(dialogue):
                self.dialogue(
                    self.ehlo + dialogue + "S: 235 Welcome\nC: AUTH PLAIN\nS: 503 ...once..."
                )

    def test_refusals(self) -> None:
        for dialogue in (
            "C: AUTH\nS: 504 ...AUTH PLAIN...\n",
            "C: AUTH CRAM-MD5\nS: 504 ...AUTH PLAIN...\n",
            "C: AUTH PLAIN\nS: 334 ...\nC: *\nS: 501 AUTH cancelled\n",
            "C: AUTH LOGIN\nS: 334 ...\nC: *\nS: 501 AUTH cancelled\n",
            "C: AUTH PLAIN !!!\nS: 501 Not base64...\n",
            "C: AUTH PLAIN /w==\nS: 501 Not base64...\n",
            "C: AUTH PLAIN AAA\nS: 501 Not base64...\n",
            "C: AUTH PLAIN YW5u\nS: 501 ...NUL...\n",
            "C: AUTH PLAIN =\nS: 501 ...NUL...\n",
            "C: AUTH PLAIN Ym9iAGFubgBzZWNyZXQ=\nS: 501 ...NUL...\n",
            "C: AUTH PLAIN AGFubgB3cm9uZw==\nS: 535 Wrong name or password\n",
            "C: AUTH PLAIN AGJvYgBzZWNyZXQ=\nS: 535 Wrong name or password\n",
            "C: MAIL FROM:<a@example.com>\nS: 250 OK\nC: AUTH PLAIN AGFubgBzZWNyZXQ=\nS: 503 ...\n",
        ):
            with self.subTest(dialogue):
                self.dialogue(self.ehlo + dialogue + "C: NOOP\nS: 250 OK\n")

    def test_three_failures(self) -> None:
        wrong = "C: AUTH PLAIN AGFubgB3cm9uZw==\nS: 535 Wrong name or password\n"
        self.dialogue(self.ehlo + wrong * 3 + "S: 421 ...\nS: (closed)\n")

    def test_before_ehlo(self) -> None:
        self.dialogue("S: 220 ...\nC: AUTH PLAIN AGFubgBzZWNyZXQ=\nS: 503 ...EHLO...\n")

    def test_vrfy_where_users_are_listed(self) -> None:
        self.dialogue("S: 220 ...\nC: VRFY ANN\nS: 250 <ann>\nC: VRFY bob\nS: 550 No such user\n")

    def test_the_same_work_for_a_name_that_is_not_there(self) -> None:
        compared = []

        def compare(one: bytes, other: bytes) -> bool:
            compared.append((one, other))
            return one == other

        with unittest.mock.patch("hmac.compare_digest", compare):
            for text in ("AGFubgB3cm9uZw==", "AGJvYgB3cm9uZw=="):
                self.play((self.ehlo + f"C: AUTH PLAIN {text}\nS: 535 ...").splitlines())
        self.assertEqual(compared, [(b"wrong", b"secret"), (b"wrong", b"no such user")])

    def test_no_password_on_the_console(self) -> None:
        console = Recorder()
        self.server = self.serve(**self.settings, console=console)
        for dialogue in (
            "C: AUTH PLAIN AGFubgBzZWNyZXQ=\nS: 235 Welcome\n",
            "C: auth  plain  AGFubgBzZWNyZXQ=\nS: 235 Welcome\n",
            "C: AUTH AGFubgBzZWNyZXQ=\nS: 504 ...\n",
            "C: AUTH PLAIN\nS: 334 ...\nC: AGFubgBzZWNyZXQ=\nS: 235 Welcome\n",
            "C: AUTH LOGIN\nS: 334 ...\nC: YW5u\nS: 334 ...\nC: c2VjcmV0\nS: 235 Welcome\n",
            "C: AUTH FROB\nS: 504 ...\nC: YW5u\nS: 500 ...\nC: c2VjcmV0\nS: 500 ...\n",
            "C:  AUTH PLAIN AGFubgBzZWNyZXQ=\nS: 500 ...\n",
        ):
            self.dialogue(self.ehlo + dialogue)
        shown = "\n".join(console.lines)
        self.assertNotRegex(shown, "AGFubgBzZWNyZXQ=|c2VjcmV0|secret")
        self.assertIn("C: AUTH PLAIN ********", shown)

    def test_not_offered_without_users(self) -> None:
        self.server = self.serve()
        self.dialogue(EHLO + "C: AUTH PLAIN\nS: 502 ...--users\nC: STARTTLS\nS: 502 ...--tls\n")


def files(folder: str) -> list[Path]:
    """Give all files of all mailboxes."""
    return sorted(path for path in Path(folder).glob("*/*/*") if path.is_file())


class KeepingTest(DialogueTest):
    """Part 4: the mailroom and the Maildir."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.maildir = mailserver.Maildir(self.folder)
        self.settings = {"maildir": self.maildir}
        super().setUp()

    def send(self, *recipients: str, text: str = MESSAGE) -> None:
        rcpt = "".join(f"C: RCPT TO:<{address}>\nS: 250 OK\n" for address in recipients)
        self.play(
            (HELLO + "C: MAIL FROM:<a@example.com>\nS: 250 OK\n" + rcpt + DATA + text).splitlines()
        )

    def test_a_copy_for_each_recipient(self) -> None:
        self.send("Bob@example.com", "ann@example.com", "bob@EXAMPLE.com", "ann@example.com")
        self.assertEqual(
            [path.relative_to(self.folder).parts[:2] for path in files(self.folder)],
            [("ann@example.com", "new"), ("bob@example.com", "new")],
        )
        text = files(self.folder)[0].read_bytes()
        self.assertRegex(
            text.decode(),
            r"^Return-Path: <a@example\.com>\nDelivered-To: ann@example\.com\n"
            r"Received: from example\.com \(\[127\.0\.0\.1\]\)\n"
            r"\tby \S+ with SMTP id \S+;\n\t\w{3}, \d\d? \w{3} \d{4} \d\d:\d\d:\d\d [+-]\d{4}\n"
            r"Subject: x\n\nhello\n$",
        )

    def test_mailbox_reads_it(self) -> None:
        import mailbox

        self.send("bob@example.com")
        box = mailbox.Maildir(os.path.join(self.folder, "bob@example.com"), create=False)
        self.assertEqual([message["Subject"] for message in box], ["x"])

    def test_names_of_directories(self) -> None:
        for address, name in [
            ("bob@example.com", "bob@example.com"),
            ("Bob+x_y-z@Example.COM", "bob+x_y-z@example.com"),
            ("~a!@example.com", "%7Ea%21@example.com"),
            ('"../../etc"@example.com', "%22..%2F..%2Fetc%22@example.com"),
            ("..", "%2E."),
            (".", "%2E"),
            ("con", "%63on"),
            ("NUL.x@example.com", "%6Eul.x@example.com"),
            ("com1.x@example.com", "%63om1.x@example.com"),
            ("console@example.com", "console@example.com"),
            ("b@[IPv6:::1]", "b@%5Bipv6%3A%3A%3A1%5D"),
            ("jos\xe9@example.com", "jos%C3%A9@example.com"),
        ]:
            self.assertEqual(os.path.relpath(self.maildir.folder(address), self.folder), name)

    def test_too_long_a_name(self) -> None:
        long = "\xe9" * 30 + "@" + "\u7528" * 60 + ".example"
        self.dialogue(
            EHLO
            + f"C: MAIL FROM:<a@example.com> SMTPUTF8\nS: 250 OK\nC: RCPT TO:<{long}>\nS: 553 ...\n"
        )

    def test_vrfy_knows_mailboxes(self) -> None:
        self.send("bob@example.com")
        self.dialogue(
            "S: 220 ...\nC: VRFY bob\nS: 250 <bob@example.com>\nC: VRFY ann\nS: 252 ...\n"
        )

    def test_order_of_what_happens(self) -> None:
        calls: list[str] = []

        def spy(name: str) -> Any:
            real = getattr(os, name)

            def call(*args: Any, **keywords: Any) -> Any:
                calls.append(name)
                return real(*args, **keywords)

            return unittest.mock.patch.object(os, name, call)

        self.send("bob@example.com")
        with spy("open"), spy("rename"), spy("fsync"):
            self.send("bob@example.com")
        self.assertEqual(calls, ["fsync", "rename", "open", "fsync"])

    def test_failures(self) -> None:
        for number, code in [
            (errno.ENOSPC, 452),
            (errno.EDQUOT, 452),
            (errno.EACCES, 451),
            (errno.EIO, 451),
        ]:
            for name in ("fsync", "rename"):
                real, left = getattr(os, name), [2]

                def fail(
                    *args: Any, real: Any = real, number: int = number, left: list[int] = left
                ) -> Any:
                    left[0] -= 1
                    if left[0] < 0:
                        raise OSError(number, os.strerror(number))
                    return real(*args)

                self.send("ann@example.com", "bob@example.com")
                before = files(self.folder)
                with self.subTest((number, name)), unittest.mock.patch.object(os, name, fail):
                    left[0] = 1
                    self.send("ann@example.com", "bob@example.com", text=f"C: .\nS: {code} ...\n")
                self.assertEqual(files(self.folder), before)
        self.assertEqual(len(self.warnings), 8)
        self.warnings.clear()

    def test_subscribers(self) -> None:
        def broken(envelope: Envelope) -> None:
            raise ValueError("no")

        last: list[Envelope] = []
        self.server.mailroom.subscribe(broken)
        self.server.mailroom.subscribe(last.append)
        self.send("bob@example.com")
        self.assertEqual(len(last), 1)
        self.assertEqual(len(self.warnings), 1)
        self.warnings.clear()

    def test_any_failure_to_keep_it_is_a_failure(self) -> None:
        with unittest.mock.patch.object(mailserver, "copy_for", side_effect=MemoryError):
            self.send("bob@example.com", text="C: .\nS: 451 ...\n")
        self.assertEqual(len(self.warnings), 1)
        self.warnings.clear()

    def test_a_subscriber_may_refuse(self) -> None:
        def picky(envelope: Envelope) -> None:
            raise mailserver.Refused(554, "Not today")

        self.server = self.serve()
        self.server.mailroom.subscribe(picky)
        self.send("bob@example.com", text="C: .\nS: 554 Not today\n")


class POP3Test(TLSTest):
    """Part 5: mail is collected, and looked at while it comes."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder, maildir = folder.name, mailserver.Maildir(folder.name)
        plain: dict[str, Any] = {"maildir": maildir, "mailroom": mailserver.Mailroom()}
        plain["mailroom"].subscribe(maildir.store)
        self.settings = plain
        super().setUp()
        self.smtp = self.server
        self.server = self.serve(handler=mailserver.POP3Handler, **plain)

    def send(self, text: str = "Subject: x\n\nhello\n", to: str = "bob@example.com") -> None:
        with smtplib.SMTP("127.0.0.1", self.smtp.server_address[1]) as client:
            client.sendmail("a@example.com", to, text)

    def open_mailbox(self) -> Client:
        client = self.connect()
        self.converse(
            client, "S: +OK ...\nC: USER bob@example.com\nS: +OK ...\nC: PASS x\nS: +OK ...\n"
        )
        return client

    def size(self) -> int:
        return len(files(self.folder)[-1].read_bytes().replace(b"\n", b"\r\n"))

    def test_a_session(self) -> None:
        self.send("Subject: one\n\n.dots\n..\n")
        self.send("Subject: two\n\ntwo\n")
        one, two = (len(f.read_bytes().replace(b"\n", b"\r\n")) for f in files(self.folder))
        names = [file.name for file in files(self.folder)]
        self.dialogue(f"""
            S: +OK Simple Mail Server
            C: CAPA
            S: +OK ...
            S: USER
            S: UIDL
            S: PIPELINING
            S: RESP-CODES
            S: .
            C: USER Bob@example.com
            S: +OK ...
            C: PASS whatever
            S: +OK 2 messages
            C: STAT
            S: +OK 2 {one + two}
            C: LIST
            S: +OK 2 messages
            S: 1 {one}
            S: 2 {two}
            S: .
            C: LIST 2
            S: +OK 2 {two}
            C: UIDL
            S: +OK ...
            S: 1 {names[0]}
            S: 2 {names[1]}
            S: .
            C: UIDL 1
            S: +OK 1 {names[0]}
            C: RETR 1
            S: +OK {one} octets
            S: Return-Path: <a@example.com>
            S: Delivered-To: bob@example.com
            S: Received: ...
            S: ...
            S: ...
            S: Subject: one
            S:
            S: ..dots
            S: ...
            S: .
            C: DELE 1
            S: +OK ...
            C: RETR 1
            S: -ERR No such message...
            C: LIST
            S: +OK 1 messages
            S: 2 {two}
            S: .
            C: RSET
            S: +OK ...
            C: STAT
            S: +OK 2 {one + two}
            C: NOOP
            S: +OK ...
            C: QUIT
            S: +OK Bye
            S: (closed)
        """)
        self.assertEqual(len(files(self.folder)), 2)

    def test_refusals(self) -> None:
        self.dialogue("""
            S: +OK ...
            C: STAT
            S: -ERR Send USER and PASS first
            C: RETR 1
            S: -ERR Send USER and PASS first
            C: LIST
            S: -ERR Send USER and PASS first
            C: DELE 1
            S: -ERR Send USER and PASS first
            C: RSET
            S: -ERR Send USER and PASS first
            C: SUBSCRIBE
            S: -ERR Send USER and PASS first
            C: PASS x
            S: -ERR Send USER before PASS
            C: USER
            S: -ERR Syntax: USER address - ...
            C: FROB
            S: -ERR Unknown command...
            C: STLS
            S: -ERR No TLS here...
            C: USER bob@example.com
            S: +OK ...
            C: PASS x
            S: +OK 0 messages
            C: USER ann@example.com
            S: -ERR ...
            C: PASS x
            S: -ERR ...
            C: RETR 1
            S: -ERR No such message...
            C: RETR x
            S: -ERR Syntax: RETR message - ...
            C: GET / HTTP/1.0
            S: -ERR ...browser...
            S: (closed)
        """)

    def test_dele_takes_effect_at_quit_only(self) -> None:
        self.send()
        client = self.open_mailbox()
        self.converse(client, "C: DELE 1\nS: +OK ...\n")
        client.close()
        wait_until(lambda: not self.server.sessions)
        self.assertEqual(len(files(self.folder)), 1)
        self.converse(
            self.open_mailbox(), "C: DELE 1\nS: +OK ...\nC: QUIT\nS: +OK Bye\nS: (closed)\n"
        )
        self.assertEqual(files(self.folder), [])

    def test_one_session_a_mailbox(self) -> None:
        first = self.open_mailbox()
        login = "C: USER BOB@example.com\nS: +OK ...\nC: PASS x\n"
        self.dialogue("S: +OK ...\n" + login + "S: -ERR [IN-USE] ...\n")
        self.converse(first, "C: QUIT\nS: +OK Bye\nS: (closed)\n")
        wait_until(lambda: not self.server.sessions)
        self.dialogue(
            "S: +OK ...\n" + login + "S: +OK 0 messages\nC: QUIT\nS: +OK Bye\nS: (closed)\n"
        )

    def test_passwords(self) -> None:
        self.server = self.serve(
            handler=mailserver.POP3Handler, **self.settings, users={"bob@example.com": "secret"}
        )
        user = "C: USER bob@example.com\nS: +OK ...\n"
        self.dialogue(
            "S: +OK ...\n" + user + "C: PASS secret\nS: +OK 0 messages\nC: QUIT\nS: +OK Bye\n"
        )
        wrong = user + "C: PASS wrong\nS: -ERR Wrong...\n"
        self.dialogue("S: +OK ...\n" + wrong * 3 + "S: -ERR ...\nS: (closed)\n")

    def test_a_password_that_is_no_text(self) -> None:
        users = {"bob@example.com": "secret"}
        self.server = self.serve(handler=mailserver.POP3Handler, **self.settings, users=users)
        user = "C: USER bob@example.com\nS: +OK ...\n"
        self.dialogue("S: +OK ...\n" + user + "C: PASS \\xff\\xfe\\xfc\nS: -ERR Wrong...\n")

    def test_no_password_on_the_console(self) -> None:
        console = Recorder()
        self.server = self.serve(handler=mailserver.POP3Handler, **self.settings, console=console)
        user = "S: +OK ...\nC: USER bob@example.com\nS: +OK ...\n"
        self.play(
            (
                user + "C: PAS secret\nS: -ERR ...\nC: secret\nS: -ERR ...\nC: PASS secret"
            ).splitlines()
            + ["S: +OK 0 messages"]
        )
        self.assertNotIn("secret", "".join(console.lines))
        self.assertIn("C: PASS ********", "".join(console.lines))
        self.play((user + "C: PASS x\nS: +OK ...\nC: oops\nS: -ERR ...").splitlines())
        self.assertIn("C: oops", "".join(console.lines))

    def test_a_file_that_has_moved(self) -> None:
        self.send()
        client = self.open_mailbox()
        file = files(self.folder)[0]
        file.rename(file.parent.parent / "cur" / (file.name + ":2,S"))
        self.converse(client, "C: RETR 1\nS: -ERR ...\nC: NOOP\nS: +OK ...\n")
        client.close()
        self.assertEqual(len(self.warnings), 1)
        self.warnings.clear()

    def test_a_mailbox_that_cannot_be_read_is_not_locked(self) -> None:
        self.send()
        new = Path(self.folder, "bob@example.com", "new")
        new.rename(new.with_name("gone"))
        new.write_text("in the way", encoding="utf-8")
        login = "C: USER bob@example.com\nS: +OK ...\nC: PASS x\n"
        with self.connect() as client:
            self.converse(client, "S: +OK ...\n" + login + "S: -ERR The server failed...\n")
            new.unlink()
            new.with_name("gone").rename(new)
            self.converse(client, login + "S: +OK 1 messages\n")
        self.warnings.clear()

    def test_mail_asked_for_and_not_read(self) -> None:
        self.send("x" * 500_000)
        client = self.open_mailbox()
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.send(b"RETR 1\r\n" * 100)
        (session,) = self.server.sessions
        wait_until(lambda: session.unsent)
        self.assertLess(len(session.unsent), 600_000)

    def test_stls(self) -> None:
        tls = mailserver.tls_context(self.cert, self.key)
        users = {"bob@example.com": "secret"}
        self.server = self.serve(
            handler=mailserver.POP3Handler, **self.settings, tls=tls, users=users
        )
        with self.connect() as client:
            self.converse(
                client,
                """
                S: +OK ...
                C: USER bob@example.com
                S: -ERR Send STLS before USER
                C: STLS
                S: +OK ...
            """,
            )
            self.encrypt(client)
            self.converse(
                client,
                """
                C: USER bob@example.com
                S: +OK ...
                C: PASS secret
                S: +OK 0 messages
                C: SUBSCRIBE
                S: +OK ...
            """,
            )
            self.send()
            self.expect(client, "+OK ... octets")
            while client.line() != ".":
                pass
            self.converse(client, "C: enough\nS: +OK ...\nC: QUIT\nS: +OK Bye\n")

    def test_poplib_and_smtplib_together(self) -> None:
        def talk(n: int) -> None:
            address = f"user{n}@example.com"
            for k in range(5):
                self.send(f"Subject: {n}-{k}\n\n{'x' * n}\n", address)
            client = poplib.POP3("127.0.0.1", self.server.server_address[1])
            client.user(address)
            client.pass_("x")
            subjects = [client.retr(k)[1][-3] for k in range(1, 6)]
            client.quit()
            done.append(subjects == [b"Subject: %d-%d" % (n, k) for k in range(5)])

        done: list[bool] = []
        threads = [threading.Thread(target=talk, args=(n,)) for n in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        self.assertEqual(done, [True] * 8)

    @unittest.skipUnless(shutil.which("curl"), "curl is not installed")
    def test_curl(self) -> None:
        self.send()
        url = f"pop3://127.0.0.1:{self.server.server_address[1]}/1"
        command = ["curl", "-sS", "--user", "bob@example.com:x", url]
        done = subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
        self.assertIn(b"Subject: x\r\n\r\nhello\r\n", done.stdout)

    def test_subscribe(self) -> None:
        client = self.open_mailbox()
        self.converse(client, "C: SUBSCRIBE\nS: +OK ...\n")
        self.send("Subject: one\n\n.\n")
        self.send("Subject: not for bob\n\n", "ann@example.com")
        size = self.size()
        self.converse(client, f"S: +OK {size} octets\nS: Return-Path: ...\nS: Delivered-To: ...\n")
        self.converse(client, "S: ...\nS: ...\nS: ...\nS: Subject: one\nS:\nS: ..\nS: .\n")
        self.send("Subject: two\n\n", "BOB@example.com")
        while client.line() != ".":
            pass
        self.converse(client, "C: enough\nS: +OK ...\nC: STAT\nS: +OK 0 0\nC: QUIT\nS: +OK Bye\n")
        wait_until(lambda: not self.server.sessions)
        self.assertEqual(len(self.settings["mailroom"].subscribers), 3)

    def test_a_subscriber_that_leaves(self) -> None:
        client = self.open_mailbox()
        self.converse(client, "C: SUBSCRIBE\nS: +OK ...\n")
        client.close()
        wait_until(lambda: not self.server.sessions)

    def test_stopping_ends_subscriptions(self) -> None:
        self.server = self.serve(handler=mailserver.POP3Handler, **self.settings, timeout=1)
        client, idle = self.open_mailbox(), self.connect()
        self.converse(client, "C: SUBSCRIBE\nS: +OK ...\n")
        self.converse(idle, "S: +OK ...\nS: -ERR Nothing heard...\nS: (closed)\n")
        self.send()  # whoever waits for mail is not idle
        while client.line() != ".":
            pass
        self.server.stop()
        self.converse(client, "S: -ERR The server is stopping...\nS: (closed)\n")

    def test_a_hundred_subscribers(self) -> None:
        # One session a mailbox is the rule, so they say so here: each has the same recipient.
        with unittest.mock.patch.object(self.settings["maildir"], "locks", AlwaysFree()):
            clients = [self.open_mailbox() for _ in range(100)]
            for client in clients:
                self.converse(client, "C: SUBSCRIBE\nS: +OK ...\n")
            self.send()
            for client in clients:
                while client.line() != ".":
                    pass
            self.server.stop()

    def test_a_subscriber_that_does_not_read(self) -> None:
        client = self.open_mailbox()
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.converse(client, "C: SUBSCRIBE\nS: +OK ...\n")
        count = mailserver.POP3Handler.backlog + 20
        for _ in range(count):
            self.send("x" * 500_000)
        wait_until(lambda: not self.server.sessions)
        self.assertEqual(len(files(self.folder)), count)


class AlwaysFree(dict):  # type: ignore[type-arg]
    """Locks that anybody gets."""

    def setdefault(self, key: Any, value: Any = None) -> Any:
        return value

    def __delitem__(self, key: Any) -> None:
        pass


class FuzzTest(DialogueTest):
    """Random and mutated input; the seeds are fixed, so a failure comes again."""

    def test_random_input(self) -> None:
        pieces = (ENVELOPE + DATA + "C: text\nC: .\nC: QUIT").splitlines()
        commands = [octets(line[3:]) for line in pieces if line.startswith("C:")]
        commands += [
            b"\n.\n",
            b"\r\n.\r\n",
            b".",
            b"\r",
            b"\n",
            b"\xff\xfa",
            b"\b\b",
            b"EHLO x\r\n",
        ]
        commands += [
            b"AUTH PLAIN\r\n",
            b"*\r\n",
            b"A" * 600,
            b"\0",
            b"RSET\r\n",
            b"\x80\xfe",
            b"HELP\r\n",
        ]
        before = threading.active_count()
        for seed in range(150):
            chance = random.Random(seed)
            data = bytearray().join(chance.choices(commands, k=chance.randint(1, 25)))
            for _ in range(chance.randint(0, 6)):
                at = chance.randrange(len(data))
                data[at : at + chance.randint(0, 3)] = chance.randbytes(chance.randint(0, 3))
            with self.connect() as client:
                client.send(bytes(data))
                if chance.random() < 0.7:
                    with contextlib.suppress(OSError):
                        client.socket.shutdown(socket.SHUT_WR)
                    while client.line() != "(closed)":
                        pass
        self.dialogue(ENVELOPE + DATA + "C: alive\nC: .\nS: 250 Message accepted\n" + BYE)
        wait_until(lambda: threading.active_count() <= before and not self.server.sessions)


class Process:
    """The program itself, in a process of its own."""

    def __init__(self, *flags: str, script: str = str(HERE / "mailserver.py")) -> None:
        self.out, self.err = tempfile.TemporaryFile("w+b"), tempfile.TemporaryFile("w+b")
        command = [sys.executable, script, "--port", "0", *flags]
        self.process = subprocess.Popen(command, stdout=self.out, stderr=self.err)
        wait_until(lambda: b"\n" in self.read(self.out) or self.process.poll() is not None)
        match = re.search(r"port (\d+)", self.printed)
        assert match, self.printed + self.warned
        self.address = ("127.0.0.1", int(match[1]))

    @staticmethod
    def read(file: Any) -> bytes:
        """Give what the program has written so far; it shares the file, but not the position."""
        return os.pread(file.fileno(), 10**9, 0)

    @property
    def printed(self) -> str:
        return self.read(self.out).decode()

    @property
    def warned(self) -> str:
        return self.read(self.err).decode()

    def end(self, *signals: int) -> int:
        """Send signals, wait for the end, give the exit status."""
        for number in signals:
            self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.out.close()
        self.err.close()


@unittest.skipIf(os.name == "nt", "signals are sent the Unix way here")
class ProcessTest(unittest.TestCase):
    def test_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            for mode in ((), ("--serial",)):
                with self.subTest(number=number, mode=mode), Process(*mode) as server:
                    with Client(server.address) as client:
                        self.assertEqual(client.line(), "220 Simple Mail Server")
                        client.send(b"HELO x\r\nNOO")
                        self.assertEqual(client.line(), "250 Hello")
                        status = server.end(number, number, signal.SIGINT)
                        self.assertRegex(client.line(), "^421 ")
                        self.assertEqual(client.line(), "(closed)")
                    self.assertEqual((status, server.warned), (0, ""))
                    with socket.socket() as again:
                        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                        again.bind(server.address)

    def test_what_it_prints(self) -> None:
        with Process() as server:
            with smtplib.SMTP(*server.address) as client:
                client.sendmail("a@example.com", "b@example.com", "Subject: x\n\nhello\n")
            status = server.end(signal.SIGINT)
            out, err = server.printed, server.warned
        self.assertIn("listens on 127.0.0.1 port", out)
        self.assertIn("telnet 127.0.0.1", out)
        self.assertIn("Ctrl-C", out)
        self.assertIn("\n[1] S: 250 OK\n", out)
        self.assertIn("\n| Subject: x\n| \n| hello\n----\n", out)
        self.assertNotIn("\x1b", out)
        self.assertEqual((status, err), (0, ""))

    def test_quiet(self) -> None:
        with Process("--quiet") as server:
            with smtplib.SMTP(*server.address) as client:
                client.sendmail("a@example.com", "b@example.com", "hello")
            self.assertEqual(server.end(signal.SIGINT), 0)
            self.assertRegex(server.printed, "^mailserver .* listens on .*\n$")
            self.assertEqual(server.warned, "")

    def test_reachable_from_other_machines(self) -> None:
        with Process("--host", "0.0.0.0") as server:
            server.end(signal.SIGINT)
            self.assertIn("other machines can reach", server.warned)

    def test_a_terminal_without_the_letters(self) -> None:
        ascii_only = unittest.mock.patch.dict(os.environ, {"PYTHONIOENCODING": "ascii"})
        with ascii_only, Process() as server, Client(server.address) as client:
            client.send("h\u00e9 \u20ac\r\n".encode())
            client.line()
            self.assertRegex(client.line(), "^500 ")
            server.end(signal.SIGINT)
            self.assertIn(r"h\xe9 \u20ac", server.printed)

    def test_bad_flags_and_addresses(self) -> None:
        with Process() as server:
            for flags, message in [
                (["--port", str(server.address[1])], "in use"),
                (["--port", "x"], "int"),
                (["--port", "65536"], "0-65535"),
                (["--max-size", "-1"], "whole number"),
                (["--max-clients", "0"], "whole number"),
                (["--timeout", "x"], "int"),
                (["--fail", "RCPT"], "RCPT=450"),
                (["--fail", "RCPT=250"], "RCPT=450"),
                (["--frob"], "--frob"),
                (["--host", "nowhere.invalid"], "--host"),
                (["--host", "192.0.2.1"], "--host"),
            ]:
                with self.subTest(flags):
                    command = [sys.executable, str(HERE / "mailserver.py"), *flags]
                    done = subprocess.run(
                        command, capture_output=True, text=True, timeout=PATIENCE, check=False
                    )
                    self.assertNotEqual(done.returncode, 0)
                    self.assertRegex(done.stderr, f"^mailserver: .*{message}.*\n$")

    def test_help_and_version(self) -> None:
        for flag, text in [("--help", "examples:"), ("--version", mailserver.__version__)]:
            command = [sys.executable, "-OO", str(HERE / "mailserver.py"), flag]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            self.assertIn(text, out)

    def test_without_docstrings(self) -> None:
        script = """
            import threading, smtplib, mailserver
            with mailserver.MailServer(("127.0.0.1", 0)) as server:
                server.start()
                with smtplib.SMTP(*server.server_address) as client:
                    print(*client.docmd("MAIL", "x"))
                    print(*client.docmd("HELO"))
        """
        command = [sys.executable, "-OO", "-c", textwrap.dedent(script)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE)
        self.assertIn("503 b'Send HELO", done.stdout)
        self.assertIn("501 b'Syntax: HELO", done.stdout)

    def test_a_thousand_idle_clients(self) -> None:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        with Process("--quiet") as server, contextlib.ExitStack() as stack:
            for _ in range(1000):
                client = stack.enter_context(Client(server.address))
                self.assertEqual(client.line(), "220 Simple Mail Server")
            with smtplib.SMTP(*server.address, timeout=PATIENCE) as sender:
                sender.sendmail("a@example.com", "b@example.com", "hello")

    def test_flags_that_need_each_other(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            good, bad = Path(folder, "good"), Path(folder, "bad")
            good.write_text("# who\n\nann:secret\n bob : pass:word \n", encoding="utf-8")
            bad.write_text("ann:secret\nbob\n", encoding="utf-8")
            nameless = Path(folder, "nameless")
            nameless.write_text(":secret\n", encoding="utf-8")
            self.assertEqual(
                mailserver.read_users(str(good)), {"ann": "secret", "bob ": " pass:word"}
            )
            for flags, message in [
                (["--users", str(bad)], "line 2"),
                (["--users", folder + "/none"], "none: No such file"),
                (["--users", str(nameless)], "line 1"),
                (["--require-auth"], "--users"),
                (["--pop3-port", "0"], "--maildir"),
                (["--tls", str(bad), str(bad)], "--tls"),
                (["--tls", "none", "none"], "--tls"),
                (["--list", "team"], "team=ann@example.com"),
                (["--maildir", str(good)], "--maildir"),
            ]:
                with self.subTest(flags):
                    command = [sys.executable, str(HERE / "mailserver.py"), *flags, "--port", "0"]
                    done = subprocess.run(
                        command, capture_output=True, text=True, timeout=PATIENCE, check=False
                    )
                    self.assertNotEqual(done.returncode, 0)
                    self.assertRegex(done.stderr, f"^mailserver: .*{message}.*\n$")

    def test_no_message_is_lost(self) -> None:
        """kill -9 in the middle of twenty senders; then the same directory serves POP3."""
        with tempfile.TemporaryDirectory() as folder:
            flags = ["--quiet", "--maildir", folder, "--pop3-port", "0"]
            accepted: list[str] = []

            def send(n: int) -> None:
                with (
                    contextlib.suppress(OSError, smtplib.SMTPException),
                    smtplib.SMTP("127.0.0.1", server.address[1], timeout=PATIENCE) as client,
                ):
                    for k in range(1000):
                        text = f"Subject: {n}-{k}\n\n{'x' * 2000}\nend\n"
                        client.sendmail("a@example.com", "b@example.com", text)
                        accepted.append(f"{n}-{k}")

            with Process(*flags) as server:
                threads = [threading.Thread(target=send, args=(n,)) for n in range(20)]
                for thread in threads:
                    thread.start()
                wait_until(lambda: len(accepted) > 100)
                server.process.kill()
                for thread in threads:
                    thread.join(PATIENCE)
            stored = [path.read_text() for path in Path(folder, "b@example.com", "new").iterdir()]
            subjects = [re.findall("^Subject: (.*)", text, re.MULTILINE)[0] for text in stored]
            self.assertTrue(all(text.endswith("x\nend\n") for text in stored), "half a message")
            self.assertEqual(len(subjects), len(set(subjects)), "a message came twice")
            self.assertEqual(set(accepted) - set(subjects), set(), "a message is lost")
            with Process(*flags) as server:
                port = int(re.findall(r"POP3 on port (\d+)", server.printed)[0])
                client = poplib.POP3("127.0.0.1", port, timeout=PATIENCE)
                client.user("b@example.com")
                client.pass_("x")
                self.assertEqual(client.stat()[0], len(stored))
                client.quit()

    def test_a_full_disk(self) -> None:
        import resource

        limit = (2000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        with tempfile.TemporaryDirectory() as folder:
            old = resource.getrlimit(resource.RLIMIT_FSIZE)
            with contextlib.ExitStack() as stack:
                server = stack.enter_context(Process("--quiet", "--maildir", folder))
                resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, limit)
                with smtplib.SMTP(*server.address, timeout=PATIENCE) as client:
                    with self.assertRaises(smtplib.SMTPDataError) as caught:
                        client.sendmail("a@example.com", "b@example.com", "x" * 5000)
                    self.assertEqual(caught.exception.smtp_code, 452)
                    client.sendmail("a@example.com", "b@example.com", "small")
                self.assertEqual(len(files(folder)), 1)
                self.assertEqual(old, resource.getrlimit(resource.RLIMIT_FSIZE))

    def test_part_1_runs_alone(self) -> None:
        source = (HERE / "mailserver.py").read_text(encoding="utf-8")
        part_1 = re.split(r"\n# =+\n# PART 2", source)[0]
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "small.py").write_text(part_1, encoding="utf-8")
            command = [sys.executable, "-c", "import small; small.serve(0)"]
            server = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
            assert server.stdout
            port = int(server.stdout.readline().split()[-1])
            with Client(("127.0.0.1", port)) as client:
                for line in (
                    ENVELOPE + DATA + "C: hi\nC: .\nS: 250 Message accepted\n" + BYE
                ).splitlines():
                    if line.startswith("C:"):
                        client.send(octets(line[3:]))
                    else:
                        self.assertEqual(client.line(), line[3:])
            server.send_signal(signal.SIGINT)
            out = server.communicate(timeout=PATIENCE)[0]
            self.assertEqual(server.returncode, 0)
            self.assertIn("to <b@example.com>", out)


class ReadmeTest(DialogueTest):
    """What README says is so."""

    readme = (HERE / "README.md").read_text(encoding="utf-8")

    def blocks(self, language: str) -> list[str]:
        return re.findall(rf"^```{language}\n(.*?)^```", self.readme, re.DOTALL | re.MULTILINE)

    def dialogues(self, kind: str) -> list[str]:
        """Give the dialogues that are to be played with a kind of server; "": the usual one."""
        found = re.findall(
            r"(?:<!-- played with: (\w+) -->\n)?^```text\n(.*?)^```",
            self.readme,
            re.DOTALL | re.MULTILINE,
        )
        return [text for mark, text in found if mark == kind]

    def test_dialogues(self) -> None:
        self.assertGreaterEqual(len(self.dialogues("")), 4)
        for text in self.dialogues(""):
            with self.subTest(text):
                self.dialogue(text)

    def test_dialogues_with_users(self) -> None:
        self.server = self.serve(users={"ann": "secret"})
        (text,) = self.dialogues("users")
        self.dialogue(text)

    def test_dialogues_with_pop3(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            maildir = mailserver.Maildir(folder)
            smtp = self.serve(maildir=maildir)
            pop3 = self.serve(
                handler=mailserver.POP3Handler, maildir=maildir, mailroom=smtp.mailroom
            )
            before, after = self.dialogues("subscriber")
            (message,) = self.dialogues("sender")
            self.server = pop3
            with self.connect() as client:
                for line in before.splitlines():
                    if line.startswith("C:"):
                        client.send(octets(line[3:]))
                    else:
                        self.expect(client, line[3:])
                self.server = smtp
                self.play(message.splitlines())
                for line in after.splitlines():
                    self.expect(client, line[3:])
            wait_until(lambda: not pop3.sessions)
            self.server = pop3
            for text in self.dialogues("pop3"):
                self.play(text.splitlines())

    def test_code(self) -> None:
        blocks = [code for code in self.blocks("python") if "main(" not in code]
        self.assertGreater(len(blocks), 7)
        for code in blocks:
            with (
                self.subTest(code),
                contextlib.redirect_stdout(io.StringIO()),
                tempfile.TemporaryDirectory() as folder,
            ):
                shutil.copy(HERE / "mailserver.py", folder)
                self.addCleanup(os.chdir, os.getcwd())
                os.chdir(folder)
                names: dict[str, Any] = {}
                exec(compile(code, "README.md", "exec"), names)
                if "server" in names:
                    names["server"].stop()
                os.chdir(HERE)

    def test_the_first_dialogue_is_that_of_the_module(self) -> None:
        self.assertIn(textwrap.indent(self.blocks("text")[0], "    "), mailserver.__doc__ or "")

    @unittest.skipIf(os.name == "nt", "signals are sent the Unix way here")
    def test_pull_the_plug(self) -> None:
        (code,) = self.blocks("py")
        with tempfile.TemporaryDirectory() as folder, Process("--maildir", folder) as server:
            code = code.replace("2525", str(server.address[1]))
            command = [sys.executable, "-c", code]
            client = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            wait_until(lambda: len(files(folder)) > 5)
            server.process.kill()
            accepted = int(client.communicate(timeout=PATIENCE)[0].split()[0])
            self.assertIn(len(files(folder)) - accepted, (0, 1))

    @unittest.skipIf(os.name == "nt", "signals are sent the Unix way here")
    def test_add_a_command(self) -> None:
        code = next(b for b in self.blocks("python") if "def do_TIME" in b)
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder, "mine.py")
            script.write_text(code, encoding="utf-8")
            with (
                unittest.mock.patch.dict(os.environ, {"PYTHONPATH": str(HERE)}),
                Process(script=str(script)) as server,
                Client(server.address) as client,
            ):
                client.send(b"TIME\r\n")
                self.expect(client, "220 Simple Mail Server")
                self.expect(client, "250 ...:...:...")

    def test_flags(self) -> None:
        command = [sys.executable, str(HERE / "mailserver.py"), "--help"]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        flags = set(re.findall(r"^  (?:-h, )?(--[a-z0-9-]+)", out, re.MULTILINE)) - {"--help"}
        self.assertGreater(len(flags), 8)
        for flag in flags:
            self.assertRegex(self.readme, rf"\| `{flag}\b", "README's table of flags lacks it")


if __name__ == "__main__":
    unittest.main()
