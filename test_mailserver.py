"""Tests of mailserver.py, as dialogues between a client (C:) and the server (S:).

    python test_mailserver.py                            run all tests
    python test_mailserver.py WireTest                   run one group of them
    python test_mailserver.py play 127.0.0.1:2600        judge any server: play the course with it
    python test_mailserver.py play 127.0.0.1:2600 FILE   play the dialogues of a file with it
    python test_mailserver.py traps                      break each Trap: of mailserver.py in a copy
    python test_mailserver.py traps 3                    break the third, and say what to try

The notation, here, in README and in files:

    C: NOOP             the client sends a line; the line ends in CRLF
    C: NOOP\\n           at the end, \\n sends a bare LF in place of CRLF, \\c sends no line end
    C: N\\x1b\\tOOP       anywhere, \\x1b is that byte; \\b \\n \\r and \\t are as in Python
    S: 250 OK           the server sends this line, which ends in CRLF
    S: 250 ...          "..." stands for any text
    S: 5.. ...          in a code, "." stands for any digit
    S: 500 No (or 50.)  where only codes are compared, these are right as well
    S: (closed)         the server hangs up
    C2: NOOP            a second client, which connects where its first line stands; so with S2:

"play" compares codes. A reply may have more lines than expected, or fewer, but all of them have
the same code, with a "-" behind it in all but the last. "--letter" compares texts, line by line. A
server that answers with a 421 from "(or ...)" has hung up, so the dialogue ends there.

In a file, an empty line, or any line that is neither C: nor S:, ends a dialogue. The last such line
in front of a dialogue is its title. If the title ends in ", in one piece", all C: lines are sent at
once when the greeting has come; if it ends in ", byte by byte", each byte is sent by itself. If it
has "played with:" in it, the dialogue needs a server with other settings, and "play" leaves it out.

The tests play each dialogue in all three ways."""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import contextlib
import dataclasses
import difflib
import email.policy
import errno
import functools
import inspect
import io
import itertools
import mailbox
import os
import poplib
import queue
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
import types
import unittest
import unittest.mock
import warnings
from collections.abc import Callable, Iterator
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import mailserver
from mailserver import Envelope, MailServer

HERE = Path(__file__).resolve().parent
MISSING: set[str] = set()  # programs for want of which a test was skipped
PATIENCE = float(os.environ.get("PATIENCE", "20"))  # seconds after which a test gives up waiting


def need(program: str) -> None:
    """Skip the test that calls this if there is no such program; the end of the run names it."""
    if not shutil.which(program):
        MISSING.add(program)
        raise unittest.SkipTest(f"{program} is not installed")


def peak_memory(function: Callable[[], object]) -> int:
    """Return how many octets of memory a call takes at most."""
    try:
        import tracemalloc
    except ImportError:
        raise unittest.SkipTest("this Python, maybe PyPy, has no tracemalloc") from None
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# ==================================================================================================
# THE NOTATION

LINE_BY_LINE, IN_ONE_PIECE, BYTE_BY_BYTE = "line by line", "in one piece", "byte by byte"
WAYS = (LINE_BY_LINE, IN_ONE_PIECE, BYTE_BY_BYTE)
ESCAPES = {rb"\b": b"\b", rb"\n": b"\n", rb"\r": b"\r", rb"\t": b"\t"}
CODE = re.compile(r"\d[\d.]{2}(?=[ -]|$)")  # at the start of an S: line


@dataclasses.dataclass
class Line:
    """A line of a dialogue."""

    number: int  # in the dialogue, from 1 up; or in its file
    who: str  # "C" or "S"
    client: str  # "" for the first one, "2" for the second
    text: str
    data: bytes  # what a C: line sends
    after: str  # the C: line before it


@dataclasses.dataclass
class Dialogue:
    """A dialogue of a text that may have many."""

    level: str  # the last line such as "Level 1: ..."
    title: str
    start: int  # the number of its first line in the text
    lines: list[str]

    @property
    def way(self) -> str:
        """Return the way in which the title says to play it."""
        return next((way for way in WAYS if self.title.endswith(", " + way)), LINE_BY_LINE)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def octets(text: str) -> bytes:
    """Return the bytes that a C: line stands for."""
    data = re.sub(rb"\\[bnrt]", lambda match: ESCAPES[match[0]], text.encode())
    data = re.sub(rb"\\x([0-9a-f]{2})", lambda match: bytes.fromhex(match[1].decode()), data)
    if data.endswith(rb"\c"):
        return data[:-2]
    return data if data.endswith(b"\n") else data + b"\r\n"


def read_lines(text: str, first: int = 1) -> list[Line]:
    """Take one dialogue apart; first is the number of its first line. ValueError: a line is neither
    C: nor S:."""
    lines: list[Line] = []
    after = "connecting"
    for number, line in enumerate(filter(None, map(str.strip, text.splitlines())), first):
        match = re.fullmatch(r"([CS])(\d?):(?: (.*))?", line)
        if not match:
            raise ValueError(f"neither C: nor S: in line {number}: {line}")
        who, client, said = match[1], match[2], match[3] or ""
        lines.append(Line(number, who, client, said, octets(said), after))
        after = line if who == "C" else after
    return lines


def read_dialogues(text: str) -> list[Dialogue]:
    """Find the dialogues of a text, such as README, and their titles."""
    found: list[Dialogue] = []
    level = title = ""
    inside = False
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if not re.match(r"[CS]\d?:(?: |$)", line):
            inside = False
            level = line if re.match(r"Level \d: ", line) else level
            title = title if not line or line.startswith("```") else line
        elif inside:
            found[-1].lines.append(line)
        else:
            found.append(Dialogue(level, title, number, [line]))
            inside, title = True, ""
    return found


def arrange(lines: list[Line], way: str) -> list[Line]:
    """Put the lines of a dialogue into the order in which they are played in this way."""
    first = next((n for n, line in enumerate(lines) if line.who == "C"), None)
    if way != IN_ONE_PIECE or first is None or any(line.client for line in lines):
        return lines
    data = b"".join(line.data for line in lines if line.who == "C")
    replies = [line for line in lines[first:] if line.who == "S"]
    return [*lines[:first], dataclasses.replace(lines[first], data=data), *replies]


def fits(pattern: str, came: str, letter: bool = True) -> bool:
    """Tell whether a line of the server is what an S: line expects."""
    pattern, _, others = pattern.partition(" (or ")
    code = CODE.match(pattern)
    if code and not letter:
        codes = [code[0], *others.rstrip(")").split()]
        return any(re.fullmatch(one + "( .*)?", came) for one in codes)
    text = ".*".join(map(re.escape, pattern[code.end() if code else 0 :].split("...")))
    return bool(re.fullmatch((code[0] if code else "") + text, came))


# ==================================================================================================
# THE PLAYER


PAUSE = 0.05  # seconds between two lines, if they are sent as a person types them


class Mismatch(AssertionError):
    """What a dialogue expected, and what came."""


class Client:
    """A connection that plays dialogues. It knows lines and codes, and nothing of mail.

    patience: seconds to wait for a reply. letter: compare texts, not just codes. typing: send as a
    person does, with a moment between two lines, and between two bytes that go one by one."""

    def __init__(
        self, address: Any, patience: float = PATIENCE, letter: bool = True, typing: bool = False
    ) -> None:
        self.patience, self.letter, self.typing = patience, letter, typing
        self.received, self.listened = bytearray(), True
        self.socket = socket.create_connection(address[:2], timeout=patience)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, data: bytes, way: str = LINE_BY_LINE) -> None:
        """Send bytes. If the server has hung up or does not read, the next reply will tell."""
        pieces = [data]
        if way == BYTE_BY_BYTE:  # of what is long, the first and the last thousand
            middle = data[1000:-1000]
            pieces = [bytes([b]) for b in data[:1000]] + [middle] * bool(middle)
            pieces += [bytes([b]) for b in data[max(1000, len(data) - 1000) :]]
        if self.typing and not self.listened:
            time.sleep(PAUSE)  # or a server that takes a packet for a line gets two lines in one
        self.listened = False
        with contextlib.suppress(OSError):
            for piece in pieces:
                self.socket.sendall(piece)
                if self.typing and len(pieces) > 1:
                    time.sleep(PAUSE / 50)

    def line(self, deadline: float | None = None) -> str:
        """Return the next line, or "(closed)", or "(nothing in 20 seconds)"."""
        deadline = deadline or time.monotonic() + self.patience
        self.listened = True
        while b"\n" not in self.received:
            left = deadline - time.monotonic()
            if left <= 0 or len(self.received) > 2**20:
                return f"(nothing in {self.patience:g} seconds)"
            self.socket.settimeout(left)
            try:
                data = self.socket.recv(2**16)
            except TimeoutError:
                continue
            except ConnectionError:
                data = b""
            if not data:
                return "(closed)"
            self.received += data
        line, _, self.received = self.received.partition(b"\n")
        text = line.decode("utf-8", "backslashreplace")
        return text[:-1] if text.endswith("\r") else text + "\n"

    def reply(self) -> str:
        """Return the last line of a reply; or two of its lines, if they cannot be of one reply."""
        deadline = time.monotonic() + self.patience
        line = self.line(deadline)
        while re.match(r"\d{3}-", line):
            before, line = line, self.line(deadline)
            if line[:3] != before[:3]:
                return f"{before} | {line}"
        return line

    def expect(self, pattern: str, place: str = "") -> str:
        """Read what an S: line expects and return it. Mismatch: something else came."""
        if not self.letter and re.match(r"\d[\d.]{2}-", pattern):
            return ""  # the last line of a reply stands for them all
        came = self.line() if self.letter or not CODE.match(pattern) else self.reply()
        if not fits(pattern, came, self.letter):
            bare = (
                "\n            (ends in a bare LF: a reply ends in CRLF)"
                if came[-1:] == "\n"
                else ""
            )
            wanted = pattern if self.letter else self.codes_only(pattern)
            raise Mismatch(f"{place}\n  expected  S: {wanted}\n  came      S: {short(came)}{bare}")
        return came

    def codes_only(self, pattern: str) -> str:
        """Return what an S: line expects where only codes are compared."""
        if not CODE.match(pattern):
            return pattern
        other = re.search(r" \(or .*\)$", pattern)
        return f"{pattern[:3]} (any text){other[0] if other else ''}"

    def converse(self, text: str, way: str = LINE_BY_LINE) -> None:
        """Play a piece of a dialogue."""
        converse(lambda _: self, read_lines(text), way)

    def skip_to(self, last: str) -> None:
        """Read lines up to one that is this."""
        while (line := self.line()) != last:
            if line.startswith("("):
                raise Mismatch(f"expected  S: {last}\n  came      S: {line}")

    def encrypt(self, context: ssl.SSLContext) -> None:
        """Do the client's part of a TLS handshake."""
        self.socket = context.wrap_socket(
            self.socket, server_hostname="localhost", suppress_ragged_eofs=False
        )

    def end_input(self) -> None:
        """Say that nothing more will be sent."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def settle(self) -> None:
        """Give the server a moment to hang up: some do not survive a connection that breaks."""
        self.end_input()
        deadline = time.monotonic() + min(self.patience, 0.5)
        with contextlib.suppress(OSError):
            while (left := deadline - time.monotonic()) > 0:
                self.socket.settimeout(left)
                if not self.socket.recv(2**16):
                    break

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def short(text: str) -> str:
    """Make a line fit to be printed."""
    text = mailserver.printable(text)
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


def converse(client_of: Callable[[str], Client], lines: list[Line], way: str) -> None:
    """Play lines with the clients that they name. Mismatch: the server says something else."""
    for line in arrange(lines, way):
        client = client_of(line.client)
        if line.who == "C":
            client.send(line.data, way)
            continue
        came = client.expect(line.text, f"line {line.number}, after {short(line.after)}")
        if came.startswith("421") and not line.text.startswith("421"):
            return  # one of the other codes that are right; it says that the server hangs up


def play(address: Any, text: str, way: str = LINE_BY_LINE, first: int = 1, **manner: Any) -> None:
    """Play a whole dialogue. Mismatch: the server says something else. OSError: no connection.

    first: the number of the first line. manner: patience, letter and typing of a Client. To the
    letter, the server has to be silent when the dialogue is over."""
    clients: dict[str, Client] = {}
    with contextlib.ExitStack() as stack:

        def client_of(name: str) -> Client:
            if name not in clients:
                clients[name] = stack.enter_context(Client(address, **manner))
                stack.callback(clients[name].settle)
            return clients[name]

        converse(client_of, read_lines(text, first), way)
        for client in clients.values():
            if client.letter:
                client.end_input()
                client.expect("(closed)", "the dialogue is over")


# ==================================================================================================
# THE COURSE: the dialogues that "play" plays with any server, and the tests with ours

HELLO = """\
S: 220 Simple Mail Server
C: HELO example.com
S: 250 Hello"""
EHLO = """\
S: 220 Simple Mail Server
C: EHLO example.com
S: 250-Hello
S: 250-SIZE 10485760
S: 250-8BITMIME
S: 250-PIPELINING
S: 250-SMTPUTF8
S: 250-EXPN
S: 250-HELP
S: 250 AUTH PLAIN LOGIN"""
MAIL = """\
C: MAIL FROM:<a@example.com>
S: 250 OK
C: RCPT TO:<b@example.com>
S: 250 OK"""
ENVELOPE = f"{HELLO}\n{MAIL}"
DATA = """\
C: DATA
S: 354 End data with <CR><LF>.<CR><LF>"""
DOT = """\
C: .
S: 250 Message accepted"""
MESSAGE = f"""\
C: Subject: x
C:
C: hello
{DOT}"""
BYE = """\
C: QUIT
S: 221 Bye
S: (closed)"""
CLASSIC = """\
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
S: (closed)"""


def times(count: int, text: str) -> str:
    """Return a piece of a dialogue many times over; "#" in it counts."""
    return "\n".join(text.replace("#", str(n)) for n in range(count))


HUNDRED = times(100, "C: RCPT TO:<u#@example.com>\nS: 250 OK")
LONGEST = f"{'x' * 64}@{'.'.join(['e' * 62] * 3)}"  # 253 octets; two brackets more make a path

COURSE = rf"""
Level 1: the classic dialogue

the classic dialogue, line by line
{CLASSIC}

Level 2: a line may come in pieces, and two lines in one packet

the classic dialogue, byte by byte
{CLASSIC}

two lines in one packet
{HELLO}
C: MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>
S: 250 OK
S: 250 OK
{BYE}

the classic dialogue, in one piece
{CLASSIC}

Level 3: order and syntax

verbs in small letters, and no blank after the colon
S: 220 Simple Mail Server
C: helo example.com
S: 250 Hello
C: mail from:<a@example.com>
S: 250 OK
C: Rcpt To:<b@example.com>
S: 250 OK
C: daTa
S: 354 ...
C: hello
C: .
S: 250 Message accepted
C: quit
S: 221 Bye
S: (closed)

an unknown command
{HELLO}
C: FROB
S: 500 Unknown verb... (or 502)
{MAIL}
{BYE}

RCPT before MAIL
{HELLO}
C: RCPT TO:<b@example.com>
S: 503 Send MAIL FROM before RCPT TO
{BYE}

DATA before MAIL
{HELLO}
C: DATA
S: 503 Send MAIL FROM before DATA (or 554)
{BYE}

DATA before RCPT
{HELLO}
C: MAIL FROM:<a@example.com>
S: 250 OK
C: DATA
S: 503 Send RCPT TO before DATA (or 554)
C: RCPT TO:<b@example.com>
S: 250 OK
{DATA}
{MESSAGE}
{BYE}

MAIL in a transaction
{ENVELOPE}
C: MAIL FROM:<a@example.com>
S: 503 ...RCPT TO...
{DATA}
{MESSAGE}
{BYE}

a second HELO drops the envelope
{ENVELOPE}
C: HELO example.com
S: 250 Hello
C: DATA
S: 503 ...MAIL FROM... (or 554)
{MAIL}
{BYE}

the envelope is used up
{ENVELOPE}
{DATA}
{MESSAGE}
C: DATA
S: 503 Send MAIL FROM before DATA (or 554)
{BYE}

three messages in a session
{HELLO}
{MAIL}
{DATA}
{MESSAGE}
{MAIL}
{DATA}
{MESSAGE}
{MAIL}
{DATA}
{MESSAGE}
{BYE}

a bounce has no sender
{HELLO}
C: MAIL FROM:<>
S: 250 OK
C: RCPT TO:<b@example.com>
S: 250 OK
{DATA}
{MESSAGE}
{BYE}

HELO without a name
S: 220 Simple Mail Server
C: HELO
S: 501 Syntax: HELO... (or 50.)
C: HELO example.com
S: 250 Hello
{BYE}

MAIL without an address
{HELLO}
C: MAIL
S: 501 ...send MAIL FROM:<sender@example.com> (or 50. 55.)
C: MAIL FROM:
S: 501 ...send MAIL FROM:<sender@example.com> (or 50. 55.)
C: MAIL TO:<a@example.com>
S: 501 ...send MAIL FROM:<sender@example.com> (or 50. 55.)
{MAIL}
{BYE}

RCPT without an address
{HELLO}
C: MAIL FROM:<a@example.com>
S: 250 OK
C: RCPT TO:
S: 501 ...send RCPT TO:<recipient@example.com> (or 50. 55.)
C: RCPT FROM:<b@example.com>
S: 501 ...send RCPT TO:<recipient@example.com> (or 50. 55.)
C: RCPT TO:<b@example.com>
S: 250 OK
{BYE}

Level 4: dots, sizes, long lines, two clients at once

a message of nothing
{ENVELOPE}
{DATA}
{DOT}
{BYE}

a dot line inside a mail
{ENVELOPE}
{DATA}
C: ..
C: ...
C: ..QUIT
C: \x20.
C: A dot at the end.
C: .
S: 250 Message accepted
{BYE}

commands inside a mail
{ENVELOPE}
{DATA}
C: QUIT
C: RSET
C: DATA
{DOT}
{BYE}

no mail is smuggled in by LF, dot, LF
{ENVELOPE}
{DATA}
C: first\n.\n\c
C: MAIL FROM:<evil@example.com>
C: .
S: 250 Message accepted (or 5.. 421)
{BYE}

no mail is smuggled in by LF, dot, CRLF
{ENVELOPE}
{DATA}
C: first\n.\c
C:
C: MAIL FROM:<evil@example.com>
C: .
S: 250 Message accepted (or 5.. 421)
{BYE}

a line of a mail has 998 letters
{ENVELOPE}
{DATA}
C: {"x" * 998}
{DOT}
{BYE}

a mail has 64,000 octets, in one piece
{ENVELOPE}
{DATA}
{times(1000, "C: " + "x" * 62)}
{DOT}
{BYE}

the longest address
{HELLO}
C: MAIL FROM:<{LONGEST}>
S: 250 OK
C: RCPT TO:<{LONGEST}>
S: 250 OK
{BYE}

a hundred recipients
{ENVELOPE}
{HUNDRED}
{DATA}
{MESSAGE}
{BYE}

a megabyte without a line end
{HELLO}
C: NOOP {"x" * 1_000_000} QUIT
S: 500 Line too long... (or 5.. 421)
{MAIL}
{BYE}

a second client
S: 220 Simple Mail Server
S2: 220 Simple Mail Server
C: HELO one.example
S: 250 Hello
C: MAIL FROM:<a@example.com>
S: 250 OK
C2: HELO two.example
S2: 250 Hello
C2: MAIL FROM:<c@example.com>
S2: 250 OK
C: RCPT TO:<b@example.com>
S: 250 OK
C2: QUIT
S2: 221 Bye
S2: (closed)
{DATA}
{MESSAGE}
{BYE}

each client has an envelope of its own
{HELLO}
S2: 220 Simple Mail Server
C2: HELO two.example
S2: 250 Hello
{MAIL}
C2: RCPT TO:<c@example.com>
S2: 503 Send MAIL FROM before RCPT TO
C2: QUIT
S2: 221 Bye
{DATA}
{MESSAGE}
{BYE}

Level 5: the other commands

EHLO
{EHLO}
{MAIL}
{BYE}

EHLO without a name
S: 220 Simple Mail Server
C: EHLO
S: 501 Syntax: EHLO... (or 50.)
{BYE}

a second EHLO drops the envelope
{EHLO}
{MAIL}
{EHLO.partition("Server")[2].strip()}
C: DATA
S: 503 ...MAIL FROM... (or 554)
{BYE}

RSET drops the envelope and keeps the HELO
{ENVELOPE}
C: RSET
S: 250 OK
C: DATA
S: 503 Send MAIL FROM before DATA (or 554)
{MAIL}
{BYE}

RSET has nothing to drop
{HELLO}
C: RSET
S: 250 OK
{BYE}

NOOP, alone and with a word
{HELLO}
C: NOOP
S: 250 OK
C: NOOP whatever
S: 250 OK (or 501)
{BYE}

HELP
{HELLO}
C: HELP
S: 214-...
S: 214 ... (or 211 250 50.)
{BYE}

VRFY
{HELLO}
C: VRFY somebody
S: 252 ... (or 250 251 50. 55.)
{BYE}

EXPN
{HELLO}
C: EXPN nobody
S: 550 No such list (or 250 252 50. 55.)
{BYE}

an unknown parameter
{EHLO}
C: MAIL FROM:<a@example.com> FROB=1
S: 555 Unknown parameter... (or 501 504)
{BYE}

Level 6: addresses and letters

the postmaster
{HELLO}
C: MAIL FROM:<a@example.com>
S: 250 OK
C: RCPT TO:<Postmaster>
S: 250 OK
{BYE}

addresses with signs in them
{HELLO}
C: MAIL FROM:<Bob.B+tag@Example.COM>
S: 250 OK
C: RCPT TO:<!#$%&'*+-/=?^_`{{|}}~@example.com>
S: 250 OK
{BYE}

names in quotation marks
{HELLO}
C: MAIL FROM:<a@example.com>
S: 250 OK
C: RCPT TO:<"a b"@example.com>
S: 250 OK
C: RCPT TO:<"a>b"@example.com>
S: 250 OK
{BYE}

addresses that name a machine by its number
{HELLO}
C: MAIL FROM:<bob@[192.0.2.1]>
S: 250 OK
C: RCPT TO:<bob@[IPv6:2001:db8::1]>
S: 250 OK
{BYE}

the route in front of an address is left out
{HELLO}
C: MAIL FROM:<a@example.com>
S: 250 OK
C: RCPT TO:<@a.example,@b.example:bob@example.com>
S: 250 OK (or 55.)
{BYE}

no addresses
{HELLO}
C: MAIL FROM:<a@example.com>
S: 250 OK
C: RCPT TO:<>
S: 501 ... (or 55.)
C: RCPT TO:<bob@>
S: 501 ... (or 55.)
C: RCPT TO:<@example.com>
S: 501 ... (or 55.)
C: RCPT TO:<bob@@example.com>
S: 501 ... (or 55.)
C: RCPT TO:<b@example.com>
S: 250 OK
{BYE}

eight bits
{EHLO}
{MAIL}
{DATA}
C: caf\xc3\xa9 \xff
{DOT}
{BYE}
"""


def course(title: str) -> str:
    """Return the dialogue of the course that has this title."""
    (dialogue,) = (one for one in read_dialogues(COURSE) if one.title == title)
    return dialogue.text


# ==================================================================================================
# THE JUDGE: python test_mailserver.py play


@dataclasses.dataclass
class Judge:
    """Plays dialogues with any server, and says of each whether it passed."""

    name: str  # HOST:PORT
    file: str | None
    patience: float
    letter: bool

    def address(self) -> tuple[str, int]:
        """Read the name of the server. ValueError: it is none."""
        host, colon, port = self.name.rpartition(":")
        if not host or not colon or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError(f"{self.name!r} is not HOST:PORT, such as 127.0.0.1:2600")
        return host.strip("[]"), int(port)

    def dialogues(self) -> list[Dialogue]:
        """Give what is to be played. ValueError, OSError: the file is no good."""
        if self.file is None:
            return read_dialogues(COURSE)
        try:
            found = read_dialogues(Path(self.file).read_text(encoding="utf-8-sig"))
        except UnicodeError:
            raise ValueError(f"{self.file} is not UTF-8: save it as UTF-8") from None
        found = [one for one in found if "played with:" not in one.title]
        if not found:
            raise ValueError(f"{self.file} has no line that starts with C: or S:")
        return found

    def greet(self) -> None:
        """Connect and leave. OSError: there is no server."""
        with Client(self.address(), self.patience) as client:
            client.line()
            client.settle()

    def fault(self, dialogue: Dialogue) -> str:
        """Play a dialogue; return what went wrong, or ""."""
        manner = {"patience": self.patience, "letter": self.letter, "typing": True}
        first = dialogue.start if self.file else 1
        try:
            play(self.address(), dialogue.text, dialogue.way, first, **manner)
        except Mismatch as mismatch:
            return str(mismatch)
        except OSError as error:
            return f"cannot connect any more: {error}"
        return ""

    def report(self, dialogue: Dialogue) -> bool:
        """Play a dialogue, print what became of it, tell whether it passed."""
        fault = self.fault(dialogue)
        title = dialogue.title or "the dialogue"
        title = f"line {dialogue.start}: {title}" if self.file else title
        print(f"  {'FAILED' if fault else 'passed'}  {short(title)}", flush=True)
        number = re.match(r"line (\d+)", fault)
        if number and not self.file:  # the course is in this file: show what was played
            played = dialogue.text.split("\n")[: int(number[1]) - 1]
            print("".join(f"          {short(line)}\n" for line in played[-8:]), end="")
        if fault:
            print(textwrap.indent(fault, " " * 10), flush=True)
        return not fault

    def run(self) -> bool:
        """Play all dialogues, print where the server stands, tell whether all passed."""
        dialogues = self.dialogues()
        passed: list[bool] = []
        reached: list[bool] = []
        for level, group in itertools.groupby(dialogues, lambda dialogue: dialogue.level):
            print(level or self.file)
            results = [self.report(dialogue) for dialogue in group]
            passed += results
            reached.append(all(results))
            if not self.file and not reached[0]:
                print("The other levels are played once level 1 has passed.")
                break
        count = len({dialogue.level for dialogue in dialogues})
        stands = f"level {len(list(itertools.takewhile(bool, reached)))} of {count}; "
        stands = "" if self.file else stands
        print(f"{self.name}: {stands}{sum(passed)} of {len(dialogues)} dialogues passed")
        return sum(passed) == len(dialogues)


def seconds(text: str) -> float:
    """Read what --patience takes."""
    if re.fullmatch(r"\d{0,4}(\.\d+)?", text) and float(text or "0") > 0:
        return float(text)
    raise argparse.ArgumentTypeError("write a number of seconds, such as 2 or 0.5")


def play_command(argv: list[str]) -> int:
    """Judge a server; return the exit status: 0 if all dialogues passed, 2 for wrong usage."""
    parser = argparse.ArgumentParser("test_mailserver.py play", description="Judge a server.")
    add = parser.add_argument
    add("name", metavar="HOST:PORT", help="where the server listens")
    add("file", metavar="FILE", nargs="?", help="dialogues to play in place of the course")
    add("--letter", action="store_true", help="compare texts as well, not only codes")
    add("--patience", type=seconds, default=2.0, help="seconds to wait for a reply; 2 if not given")
    judge = Judge(**vars(parser.parse_args(argv)))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        judge.dialogues()
        judge.address()
    except (OSError, ValueError) as error:
        parser.error(str(error))
    try:
        judge.greet()
    except OSError as error:
        print(f"{judge.name}: cannot connect: {error}")
        return 1
    try:
        return 0 if judge.run() else 1
    except BrokenPipeError:  # of a pipe into head, say
        os._exit(1)


# ==================================================================================================
# THE TRAPS: python test_mailserver.py traps


@dataclasses.dataclass
class Trap:
    """A "Trap:" comment of mailserver.py, what it warns of, and the test that sees it."""

    says: str  # how the comment goes on
    right: str  # source text that is in the file once
    wrong: str  # what somebody might write in its place
    guard: str  # the test that fails then
    hint: str  # what to try with the broken server
    harmless: str = ""  # why it breaks nothing on this Python, if so


def harmless_eof() -> str:
    """Return why it makes no difference here to set OP_IGNORE_UNEXPECTED_EOF, if so."""
    option = getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    if not option:
        return "this Python's OpenSSL does not know OP_IGNORE_UNEXPECTED_EOF"
    if ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).options & option:
        return "this Python sets OP_IGNORE_UNEXPECTED_EOF by itself"
    return ""


TRAPS = [
    Trap(
        "a line end inside the line would start a second reply",
        r"""line.replace("\r", " ").replace("\n", " ").encode""",
        "line.encode",
        "WireTest.test_no_line_end_inside_a_reply",
        "Not to be seen in telnet: no reply of this server repeats what a client has sent.",
    ),
    Trap(
        "before refusing, or this line comes again",
        "        del self.received[: end.end()]  # Trap",
        """\
        if len(line) <= self.line_limit:
            del self.received[: end.end()]  # Trap""",
        "WireTest.test_a_line_too_long_is_thrown_away_whole",
        """python -c "print('x' * 20000)" | nc 127.0.0.1 2525    (it is refused for ever)""",
    ),
    Trap(
        "an SSLSocket's own shutdown() ends TLS",
        "socket.socket.shutdown(self.connection, how)",
        "self.connection.shutdown(how)",
        "SecureTest.test_stop_in_tls",
        "Start it with --tls, connect with openssl s_client -quiet -crlf -starttls smtp, press "
        "Ctrl-C in the server's terminal: the 421 does not come.",
    ),
    Trap(
        "if LF.LF ended all",
        r'b"\r\n": re.compile(rb"\r\n\.\r\n"),',
        r'b"\r\n": re.compile(rb"\r\n\.\r\n|\n\.\n"),',
        "WireTest.test_after_data_in_crlf_no_other_ending_counts",
        "Not to be typed in telnet, which sends CRLF: run the smuggler of README's lesson 1.",
    ),
    Trap(
        r'not b"\n.": in a CRLF message, LF starts no line',
        'content = content.replace(newline + b".", newline)',
        r'content = content.replace(b"\n.", b"\n")',
        "WireTest.test_a_bare_lf_is_content_and_starts_no_line",
        "Not to be typed in telnet, which sends CRLF: a dot behind a bare LF is lost.",
    ),
    Trap(
        "it came in the clear, so who knows by whom",
        "        self.received.clear()",
        "        pass",
        "SecureTest.test_what_was_sent_with_starttls_is_forgotten",
        "Not to be typed in telnet: STARTTLS and the next command have to be in one packet.",
    ),
    Trap(
        "== takes the longer, the more",
        'hmac.compare_digest(password.encode("utf-8", "surrogateescape"), expected)',
        "(password == expected.decode())",
        "AuthTest.test_the_same_work_for_a_name_that_is_not_there",
        "Not to be seen in telnet: the difference is some nanoseconds.",
    ),
    Trap(
        "clients that see STARTTLS insist on it",
        "[name for name in self.extensions if name.split()[0] in verbs]",
        "self.extensions",
        "AuthTest.test_not_offered_where_it_would_be_refused",
        "Say EHLO, and do what it offers: STARTTLS. Then try curl --ssl.",
    ),
    Trap(
        '"../x" would be elsewhere',
        'name = urllib.parse.quote(address.lower(), safe="@+").replace("~", "%7E")',
        "name = address.lower()",
        "KeepingTest.test_names_of_directories",
        """Start it with --maildir Maildir, send a mail to <"../../x"@example.com>, look for it.""",
    ),
    Trap(
        "whatever the error, the message is not kept",
        "except Exception as error:  # Trap: whatever",
        "except OSError as error:  # Trap: whatever",
        "KeepingTest.test_any_failure_to_keep_it_is_a_failure",
        "Not to be seen in telnet, until a failure comes that nobody has thought of.",
    ),
    Trap(
        "not sooner, or another session skips what is not done",
        """\
            for place in ("tmp", "cur", "new"):
                os.makedirs""",
        """\
            self.durable.add(folder)
            for place in ("tmp", "cur", "new"):
                os.makedirs""",
        "KeepingTest.test_two_first_deliveries_at_once",
        "Not to be seen in telnet: two clients have to send the first mail at the same moment, and "
        "then the power has to fail.",
    ),
    Trap(
        "until here it is in memory only",
        "            os.fsync(file.fileno())",
        "            pass",
        "KeepingTest.test_order_of_what_happens",
        "Start it with --maildir Maildir, send a mail, and cut the machine's power after the 250.",
    ),
    Trap(
        "only now that no other session deletes messages",
        """\
        busy = maildir.holders.setdefault(folder, self) is not self
        refuse_if(busy, 450, "[IN-USE] Another session has the mailbox open: try again later")
        self.folder, self.stored, self.messages = folder, {}, {}
        self.look()  # Trap: only now that no other session deletes messages
""",
        """\
        self.folder, self.stored, self.messages = folder, {}, {}
        self.look()
        self.folder = ""
        busy = maildir.holders.setdefault(folder, self) is not self
        refuse_if(busy, 450, "[IN-USE] Another session has the mailbox open: try again later")
        self.folder = folder
""",
        "POP3Test.test_the_list_is_made_when_the_mailbox_is_ours",
        "Start it with --maildir Maildir --pop3-port 2526 and log in twice at the same moment as "
        "another client sends QUIT after DELE: LIST shows what is deleted.",
    ),
    Trap(
        "if the count is 0 already, a client has been promised",
        "                if self.idle.acquire(blocking=False):\n                    return",
        "                return",
        "LifeTest.test_a_thread_that_has_waited_too_long_when_a_client_comes",
        "Not to be seen in telnet, but once in many hours: a client connects, and is not greeted.",
    ),
    Trap(
        "else stop() sends no 421",
        'context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)',
        "pass",
        "SecureTest.test_stop_in_tls",
        "Start it with --tls, connect with openssl s_client -quiet -crlf -starttls smtp, press "
        "Ctrl-C in the server's terminal: the 421 does not come.",
        harmless_eof(),
    ),
    Trap(
        "on two cores, threads take the interpreter's",
        "{cores[os.getpid() % len(cores)]}",
        "{*cores}",
        "FlagTest.test_one_core",
        "Not to be seen in telnet: measure how many messages twenty clients can send a second.",
    ),
    Trap(
        "Python would wait for a thread",
        "os._exit(0)",
        "pass",
        "StuckTest.test_a_terminal_that_is_stuck",
        "Start it with | sleep 1000 behind it, say HELP often, and press Ctrl-C: it does not end.",
    ),
]


def source() -> str:
    """Return the text of mailserver.py."""
    return (HERE / "mailserver.py").read_text(encoding="utf-8")


def scratch_copy(folder: str, trap: Trap | None) -> Path:
    """Copy the files into a folder, with the trap sprung; return the path of mailserver.py."""
    for name in ("mailserver.py", "test_mailserver.py", "README.md"):
        shutil.copy(HERE / name, folder)
    path = Path(folder, "mailserver.py")
    if trap:
        path.write_text(source().replace(trap.right, trap.wrong), encoding="utf-8")
    return path


def try_guard(trap: Trap, sprung: bool) -> str:
    """Run the test that guards a trap, in a copy: "passes", "fails", or "is skipped: " and why."""
    if trap.harmless:
        return f"is skipped: {trap.harmless}"
    with tempfile.TemporaryDirectory() as folder:
        scratch_copy(folder, trap if sprung else None)
        command = [sys.executable, "test_mailserver.py", "-v", trap.guard]
        environment = {**os.environ, "PATIENCE": "1" if sprung else "5"}
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
    if skipped := re.search(r" \.\.\. skipped ['\"](.*)['\"]", done.stderr):
        return f"is skipped: {skipped[1]}"
    if "Ran 1 test" not in done.stderr or "_FailedTest" in done.stderr:
        raise RuntimeError(f"{trap.guard}: {done.stderr}")
    return "fails" if done.returncode else "passes"


def spring_all() -> Iterator[tuple[Trap, str, str]]:
    """Give each trap with what its guard does, and with what it does when the trap is sprung."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        whole = [pool.submit(try_guard, trap, False) for trap in TRAPS]
        broken = [pool.submit(try_guard, trap, True) for trap in TRAPS]
        for trap, before, after in zip(TRAPS, whole, broken, strict=True):
            yield trap, before.result(), after.result()


def explain(trap: Trap) -> None:
    """Break a copy, and say what to try with it."""
    path = scratch_copy(tempfile.mkdtemp(prefix="trap"), trap)
    before, after = source().splitlines(), path.read_text(encoding="utf-8").splitlines()
    print(f"Trap: {trap.says}\n")
    print(*list(difflib.unified_diff(before, after, n=0, lineterm=""))[2:], sep="\n")
    print(f"\nstart it    python {path}\ntry         {trap.hint}\nguarded by  {trap.guard}")


def traps_command(argv: list[str]) -> int:
    """Spring all traps, or one; return the exit status."""
    parser = argparse.ArgumentParser("test_mailserver.py traps", description="Spring the traps.")
    numbers = range(1, len(TRAPS) + 1)
    parser.add_argument("number", metavar="N", nargs="?", type=int, choices=numbers, help="just it")
    number = parser.parse_args(argv).number
    if number:
        explain(TRAPS[number - 1])
        return 0
    good = skipped = 0
    for n, (trap, before, after) in enumerate(spring_all(), 1):
        print(f"{n:2}  {' '.join(trap.says.split())}")
        print(f"    {trap.guard} {before}; with the trap sprung, it {after}")
        good += (before, after) == ("passes", "fails")
        skipped += after.startswith("is skipped")
    print(f"{good} of {len(TRAPS)} traps are guarded; {skipped} cannot be tried here")
    return 0 if good + skipped == len(TRAPS) else 1


# ==================================================================================================
# THE TESTS: what they share


def setUpModule() -> None:
    """Take Ctrl-C, even in a background job: the programs that the tests start inherit it. Use a
    disk in memory, if there is one: the tests ask more than a thousand times for an fsync."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.suppress(OSError):
        if shutil.disk_usage("/dev/shm").free > 2**28:
            tempfile.tempdir = "/dev/shm"


def wait_until(condition: Any) -> None:
    """Wait for what another thread is about to do."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("waited in vain")
        time.sleep(0.005)


def files(folder: str) -> list[Path]:
    """Give all files of all mailboxes."""
    return sorted(path for path in Path(folder).glob("*/*/*") if path.is_file())


class Recorder(mailserver.Console):
    """A console that keeps what it is to show."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def show(self, *lines: str) -> None:
        self.lines += lines

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def said(self) -> list[str]:
        """What was shown, without the numbers of the sessions."""
        return [re.sub(r"^\[\d+", "[#", line) for line in self.lines]


class SlowFunction:
    """A function that does nothing, or what another does, once go_on is set."""

    def __init__(self, function: Callable[..., object] = bool) -> None:
        self.function = function
        self.called, self.go_on = threading.Event(), threading.Event()

    def __call__(self, *args: Any) -> None:
        self.called.set()
        self.go_on.wait(PATIENCE)
        self.function(*args)


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

    @property
    def address(self) -> tuple[str, int]:
        """Where self.server is."""
        host, port = self.server.server_address[:2]
        return str(host), int(port)

    def connect(self) -> Client:
        client = Client(self.address)
        self.addCleanup(client.close)
        return client

    def play(self, text: str, way: str = LINE_BY_LINE) -> None:
        """Play a dialogue."""
        play(self.address, text, way)

    def dialogue(self, text: str) -> None:
        """Play a dialogue in each of the three ways."""
        for way in WAYS:
            with self.subTest(way):
                self.play(text, way)

    def send_to_a_slow_server(self, slow: SlowFunction) -> None:
        """Send a mail that takes the server longer than its timeout, by its own fault."""
        lines = read_lines(f"{ENVELOPE}\n{DATA}\nC: hello\n{DOT}\nC: NOOP\nS: 250 OK")
        with self.connect() as sender:
            sender.send(b"".join(line.data for line in lines if line.who == "C"))
            sender.end_input()
            self.assertTrue(slow.called.wait(PATIENCE))
            self.play("S: 220 ...\nS: 421 Nothing heard for too long\nS: (closed)")
            slow.go_on.set()
            for line in lines:
                if line.who == "S":
                    sender.expect(line.text)
            sender.expect("(closed)")

    def expect_warning(self, *texts: str) -> None:
        """Take note of the warnings so far: one for each text, which is part of it."""
        self.assertEqual(len(self.warnings), len(texts), self.warnings)
        for text, warning in zip(texts, self.warnings, strict=True):
            self.assertIn(text, warning)
        self.warnings.clear()


# ==================================================================================================
# THE TESTS: parts 1 and 2


class CourseTest(DialogueTest):
    """The dialogues that anybody can play with any server: here, to the letter."""

    def test_course(self) -> None:
        for dialogue in read_dialogues(COURSE):
            with self.subTest(dialogue.title):
                self.dialogue(dialogue.text)

    def test_the_classic_dialogue(self) -> None:
        self.dialogue(CLASSIC)
        self.assertEqual(len(self.inbox), 3)
        for envelope in self.inbox:
            self.assertEqual(envelope.sender, "sender@example.com")
            self.assertEqual(envelope.recipients, ["recipient@example.com"])
            self.assertEqual(envelope.content, b"This is a test email.\r\n")

    def test_what_has_arrived(self) -> None:
        for title, content in [
            ("a message of nothing", b""),
            ("a dot line inside a mail", b".\r\n..\r\n.QUIT\r\n .\r\nA dot at the end.\r\n"),
            ("commands inside a mail", b"QUIT\r\nRSET\r\nDATA\r\n"),
            ("a line of a mail has 998 letters", b"x" * 998 + b"\r\n"),
            ("a mail has 64,000 octets, in one piece", (b"x" * 62 + b"\r\n") * 1000),
            ("eight bits", b"caf\xc3\xa9 \xff\r\n"),
        ]:
            with self.subTest(title):
                self.inbox.clear()
                self.dialogue(course(title))
                self.assertEqual([envelope.content for envelope in self.inbox], [content] * 3)

    def test_for_whom(self) -> None:
        self.play(course("a hundred recipients"))
        self.play(course("a bounce has no sender"))
        self.play(course("three messages in a session"))
        self.play(course("each client has an envelope of its own"))
        self.assertEqual(len(self.inbox), 6)
        self.assertEqual(self.inbox[0].recipients[1:], [f"u{n}@example.com" for n in range(100)])
        self.assertEqual(self.inbox[1].sender, "")
        self.assertEqual(self.inbox[5].recipients, ["b@example.com"])

    def test_a_client_that_talks_before_the_greeting(self) -> None:
        with self.connect() as client:
            client.send(b"HELO example.com\r\nQUIT\r\n")
            client.converse(f"{HELLO}\nS: 221 Bye\nS: (closed)")


class OrderTest(DialogueTest):
    """Out of order: 503, which names the missing step."""

    def test_503_names_the_missing_step(self) -> None:
        self.dialogue(f"""
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
            {DATA}
            {DOT}
            C: DATA
            S: 503 Send MAIL FROM before DATA
        """)

    def test_a_thousand_recipients_then_452(self) -> None:
        many = times(1000, "C: RCPT TO:<u#@example.com>\nS: 250 OK")
        self.play(
            f"""
            {HELLO}
            C: MAIL FROM:<a@example.com>
            S: 250 OK
            {many}
            C: RCPT TO:<late@example.com>
            S: 452 Too many recipients...
            {DATA}
            {DOT}
        """,
            IN_ONE_PIECE,
        )
        self.assertEqual(len(self.inbox[0].recipients), 1000)


class SyntaxTest(DialogueTest):
    """What is wrong gets a reply that shows what is right, and the session goes on."""

    def test_501_shows_the_syntax(self) -> None:
        self.dialogue(r"""
            S: 220 Simple Mail Server
            C: HELO
            S: 501 Syntax: HELO your-domain.example
            C: HELO two words
            S: 501 Syntax: HELO your-domain.example
            C: HELO \x07
            S: 501 Syntax: HELO your-domain.example
            C: HELO \xe2\x84\xaa
            S: 501 Syntax: HELO your-domain.example
            C: EHLO \xe2\x84\xaa.example
            S: 501 Syntax: EHLO your-domain.example
            C: HELO example.com
            S: 250 Hello
        """)

    def test_501_names_the_first_fault(self) -> None:
        show = "send MAIL FROM:<sender@example.com>"
        for argument, fault in [
            ("", "No FROM"),
            (" FORM:<a@example.com>", "No FROM"),
            (" <a@example.com>", "No FROM"),
            (" TO:<a@example.com>", "No FROM"),
            (" FROM <a@example.com>", "No colon"),
            (" FROM:", "No address"),
            (" FROM: a@example.com", "No < and > around the address"),
            (" FROM:<a@example.com", "No < and > around the address"),
            (" FROM:<a@my_host.example>", "A domain has no _"),
            (" FROM:<a..b@example.com>", "A dot at an end, or two in a row"),
            (" FROM:<a@example.com.>", "A dot at an end, or two in a row"),
            (" FROM:<.a@example.com>", "A dot at an end, or two in a row"),
            (" FROM:<a.@example.com>", "A dot at an end, or two in a row"),
            (" FROM:<a@.example.com>", "A dot at an end, or two in a row"),
            (" FROM:<a b@example.com>", "Not an address"),
            (r" FROM:<a\x01@example.com>", "Not an address"),
            (r" FROM:<a\x1b[2J@example.com>", "Not an address"),
            (r" FROM:<a\r@example.com>", "Not an address"),
            (r" FROM:<a\x00@example.com>", "Not an address"),
            (r" FROM:<\xc3\x28@example.com>", "Not an address"),
        ]:
            with self.subTest(argument):
                said = f"C: MAIL{argument}\nS: 501 {fault}: {show}"
                self.dialogue(f"{HELLO}\n{said}\nC: NOOP\nS: 250 OK")

    def test_rcpt(self) -> None:
        self.dialogue(f"""
            {HELLO}
            C: MAIL FROM:<a@example.com>
            S: 250 OK
            C: RCPT TO: b@example.com
            S: 501 No < and > around the address: send RCPT TO:<recipient@example.com>
            C: RCPT TO:<>
            S: 501 No address: send RCPT TO:<bob@example.com>
            C: RCPT TO:<bob>
            S: 501 No domain: send <bob@example.com>
            C: RCPT TO:<b@example.com>
            S: 250 OK
        """)

    def test_arguments_where_there_are_none(self) -> None:
        self.dialogue(rf"""
            {ENVELOPE}
            C: DATA now
            S: 501 Syntax: DATA
            C: RSET all
            S: 501 Syntax: RSET
            C: QUIT please
            S: 501 Syntax: QUIT
            C: DATA \x20\t
            S: 354 ...
            {DOT}
            C: QUIT \t
            S: 221 Bye
            S: (closed)
        """)

    def test_unknown_commands(self) -> None:
        self.dialogue("""
            S: 220 Simple Mail Server
            C: FROB
            S: 500 Unknown verb: try EHLO EXPN HELO HELP NOOP QUIT RSET VRFY
            C:
            S: 500 Unknown verb...
            C:  HELO example.com
            S: 500 Unknown verb...
            C: HELOexample.com
            S: 500 Unknown verb...
            C: HELO example.com
            S: 250 Hello
        """)

    def test_only_commands_can_be_reached(self) -> None:
        names = ("handle", "reply", "__init__", "_HELO", "do_HELO", "setup")
        for verb in (*names, r"HELO\x00HELO", r"\xc5\xbf", r"HEL\xc3\xb6", r"R\xc5\xbfET"):
            with self.subTest(verb):
                self.dialogue(f"""
                    S: 220 ...
                    C: {verb} x
                    S: 500 Unknown verb...
                    C: NOOP
                    S: 250 OK
                """)

    def test_twenty_errors(self) -> None:
        self.dialogue(f"""
            S: 220 ...
            {times(20, "C: FROB" + chr(10) + "S: 500 ...")}
            S: 421 Too many...
            S: (closed)
        """)

    def test_a_browser(self) -> None:
        for verb in ("GET / HTTP/1.1", "POST /mail HTTP/1.0", "CONNECT here:25 HTTP/1.1"):
            self.dialogue(f"""
                S: 220 ...
                C: {verb}
                C: Host: here
                S: 421 ...
                S: (closed)
            """)


class WireTest(DialogueTest):
    """Lines, line ends and dots."""

    def content(self, *lines: str, data: str = "DATA", end: str = ".") -> list[bytes]:
        """Send a message's lines, once in each way; give what was accepted."""
        self.inbox.clear()
        text = "\n".join(f"C: {line}" for line in (*lines, end))
        self.dialogue(f"""
            {ENVELOPE}
            C: {data}
            S: 354 End data with <CR><LF>.<CR><LF>
            {text}
            S: 250 Message accepted
            {BYE}
        """)
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
        endings = [r".\n", r"\n.\n", r"\r.\r", r"\n.\r\n", r"\r\n.\n", r"\r\n.\r"]
        for end in (*endings, r"x\r\r\n.\r\r\n"):
            with self.subTest(end):
                self.dialogue(rf"""
                    {ENVELOPE}
                    {DATA}
                    C: first{end}\c
                    C: MAIL FROM:<evil@example.com>
                    {DOT}
                    {BYE}
                """)
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
        lines = (r"a\n.b\n..c\n.\nd", "..e")
        self.assertEqual(self.content(*lines), [b"a\n.b\n..c\n.\nd\r\n.e\r\n"])

    def test_eight_bits_pass(self) -> None:
        self.assertEqual(self.content(r"caf\xc3\xa9 \xff\x00\x08"), [b"caf\xc3\xa9 \xff\0\x08\r\n"])

    def test_a_line_too_long_is_thrown_away_whole(self) -> None:
        limit = mailserver.SecureHandler.line_limit
        for size in (limit, limit + 1, 100_000):
            with self.subTest(size):
                self.dialogue(f"""
                    S: 220 ...
                    C: NOOP {"x" * size} QUIT
                    S: 500 Line too long...
                    C: HELO x
                    S: 250 Hello
                """)
        self.dialogue(f"""
            S: 220 ...
            C: NOOP {"x" * (limit - 7)}
            S: 250 OK
        """)

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
            C: \xff\xf4NO\xff\xfc\x06OP
            S: 250 OK
        """)

    def test_ctrl_c_in_telnet(self) -> None:
        with self.connect() as client:
            client.expect("220 ...")
            client.send(rb"half a li" + b"\xff\xf4\xff\xfd\x06")  # IP, DO TIMING-MARK
            self.assertEqual(client.socket.recv(100), b"\xff\xfc\x06")  # WONT TIMING-MARK
            client.converse("C: \nS: 500 Unknown verb...\nC: NOOP\nS: 250 OK")

    def test_a_timing_mark_in_a_message_is_content(self) -> None:
        self.assertEqual(self.content(r"a\xff\xfd\x06b"), [b"a\xff\xfd\x06b\r\n"])

    def test_cr_nul_ends_a_command_and_no_line_of_a_message(self) -> None:
        self.dialogue(rf"""
            S: 220 Simple Mail Server
            C: HELO example.com\r\x00\c
            S: 250 Hello
            {MAIL}
            C: DATA\r\x00\c
            S: 354 ...
            C: a\r\x00.\r\x00b
            {DOT}
        """)
        self.assertEqual({bytes(one.content) for one in self.inbox}, {b"a\r\0.\r\0b\r\n"})

    def test_tls_from_the_first_byte(self) -> None:
        console = Recorder()
        self.server = self.serve(console=console)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        with self.assertRaises(OSError), socket.create_connection(self.address) as plain:
            context.wrap_socket(plain, server_hostname="localhost").close()
        wait_until(lambda: not self.server.sessions)
        self.assertRegex(console.text, "S: 421 .*start TLS")

    def test_the_end_of_input_completes_nothing(self) -> None:
        for text in (r"text\r\n.\c", r"text\r\n.\r\c", r"cut o\c"):
            self.dialogue(f"{ENVELOPE}\n{DATA}\nC: {text}")
        self.dialogue("S: 220 ...\nC: QUIT\\c")
        self.assertEqual(self.inbox, [])

    def test_no_line_end_inside_a_reply(self) -> None:
        class Handler(mailserver.SecureHandler):
            def do_ECHO(self, arg: str) -> None:
                """ECHO text - sends it back"""
                self.reply(250, arg, "and\r\n250 forged\n")

        self.server = self.serve(handler=Handler)
        self.dialogue(r"""
            S: 220 ...
            C: ECHO one\rtwo
            S: 250-one two
            S: 250 and  250 forged...
            C: NOOP
            S: 250 OK
        """)


class SizeTest(DialogueTest):
    """A message over the limit is read to its end and refused."""

    settings = {"max_size": 1000}

    def test_the_limit(self) -> None:
        for end, length in (("", 998), (r"\n", 999)):
            head = f"{ENVELOPE}\nC: DATA{end}\nS: 354 ..."
            over = (
                f"C: .{end}\nS: 552 Message too big: send 1000 octets at most\nC: NOOP\nS: 250 OK"
            )
            long = "\n".join([rf"C: x\n\r\n..QUIT{end}"] * 5000)
            with self.subTest(end):
                self.dialogue(f"{head}\nC: {'x' * length}{end}\nC: .{end}\nS: 250 Message accepted")
                self.dialogue(f"{head}\nC: {'x' * (length + 1)}{end}\n{over}")
                self.dialogue(f"{head}\n{long}\n{over}")
        self.assertEqual({len(envelope.content) for envelope in self.inbox}, {1000})

    def test_doubled_dots_do_not_count(self) -> None:
        dots = times(333, "C: ..")
        self.dialogue(f"{ENVELOPE}\n{DATA}\n{dots}\n{DOT}")
        self.dialogue(f"{ENVELOPE}\n{DATA}\n{dots}\nC: ..\nC: .\nS: 552 ...")

    def test_the_next_message_is_a_new_one(self) -> None:
        self.dialogue(f"""
            {ENVELOPE}
            {DATA}
            C: {"x" * 2000}
            C: .
            S: 552 ...
            C: DATA
            S: 503 ...
            {MAIL}
            {DATA}
            C: small
            {DOT}
        """)


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
        line = f"S: 220 ...\nC: {endless}\nS: 500 Line too long..."
        message = f"{ENVELOPE}\n{DATA}\nC: {endless}\nC: .\nS: 552 ..."
        for text in (line, message):
            self.play(text)
            self.assertLess(max(peaks), Handler.line_limit + 70_000)


class FailTest(DialogueTest):
    settings = {"fail": {"RCPT": 450, "VRFY": 421}}

    def test_commands_fail_on_purpose(self) -> None:
        refused = "C: rcpt TO:<b@example.com>\nS: 450 Refused on purpose..."
        self.dialogue(f"""
            {HELLO}
            C: MAIL FROM:<a@example.com>
            S: 250 OK
            {times(30, refused)}
            C: VRFY x
            S: 421 ...
            S: (closed)
        """)


class LifeTest(DialogueTest):
    """Sessions come, go, and are ended."""

    def test_idle_clients_are_hung_up_on(self) -> None:
        self.server = self.serve(timeout=0.5)
        texts = ["S: 220 ...", HELLO, f"{ENVELOPE}\n{DATA}\nC: half a mess\\c"]
        clients = [self.connect() for _ in texts]
        for client, text in zip(clients, texts, strict=True):
            client.converse(text)
        for client in clients:
            client.converse("S: 421 Nothing heard for too long\nS: (closed)")

    def test_one_client_too_many(self) -> None:
        self.server = self.serve(max_clients=2)
        first, second = self.connect(), self.connect()
        first.expect("220 ...")
        second.expect("220 ...")
        self.play("S: 421 Too many clients...\nS: (closed)")
        first.converse(BYE)
        wait_until(lambda: len(self.server.sessions) == 1)
        self.connect().expect("220 ...")

    def test_serial_mode(self) -> None:
        self.server = self.serve(serial=True)
        first = self.connect()
        first.expect("220 ...")
        second = self.connect()
        second.patience = 0.1
        second.converse("C: HELO x\nS: (nothing in 0.1 seconds)")
        second.patience = PATIENCE
        first.converse(BYE)
        second.converse("S: 220 ...\nS: 250 Hello")

    def thread_of(self, client: Client) -> threading.Thread:
        """Return the thread that serves a client, who is the only one."""
        client.converse("S: 220 ...\nC: NOOP\nS: 250 OK")
        (session,) = self.server.sessions
        return session.thread

    def leave(self, client: Client) -> None:
        """Leave, and wait until the thread is there for others."""
        client.converse(BYE)
        wait_until(lambda: self.server.idle._value == 1)  # type: ignore[attr-defined]

    def test_a_thread_serves_one_client_after_another(self) -> None:
        first = self.connect()
        thread = self.thread_of(first)
        self.leave(first)
        second = self.connect()
        self.assertIs(self.thread_of(second), thread)
        self.connect().converse("S: 220 ...\nC: NOOP\nS: 250 OK")  # while the second is there

    def test_a_thread_without_clients_ends(self) -> None:
        class Impatient(queue.SimpleQueue[Any]):
            def get(self, *_: Any, **__: Any) -> Any:
                return super().get(timeout=0.01)

        self.server.clients = Impatient()
        client = self.connect()
        thread = self.thread_of(client)
        client.converse(BYE)
        thread.join(PATIENCE)
        self.assertFalse(thread.is_alive())
        self.play(f"S: 220 ...\n{BYE}")

    def test_a_thread_that_has_waited_too_long_when_a_client_comes(self) -> None:
        leaving, promised = threading.Event(), threading.Event()

        class TooLate(queue.SimpleQueue[Any]):
            calls = 0

            def get(self, *_: Any, **__: Any) -> Any:
                self.calls += 1
                if self.calls == 2:  # for the second client, who has not come yet
                    leaving.set()
                    promised.wait(PATIENCE)
                    raise queue.Empty
                return super().get(timeout=PATIENCE)

        class Promises(threading.Semaphore):
            def acquire(self, *args: Any, **settings: Any) -> bool:
                got = super().acquire(*args, **settings)
                if leaving.is_set():
                    promised.set()
                return got

        self.server.idle = Promises(0)
        self.server.clients = TooLate()
        self.play(f"S: 220 ...\n{BYE}")
        self.assertTrue(leaving.wait(PATIENCE))
        self.play(f"S: 220 ...\n{BYE}")

    def test_many_at_once(self) -> None:
        clients = [self.connect() for _ in range(50)]
        for client in clients:
            client.expect("220 ...")
        for piece in [
            r"C: HELO x",
            r"S: 250 Hello",
            r"C: MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>",
            "S: 250 OK\nS: 250 OK",
            "C: DATA",
            "S: 354 ...",
            r"C: x\r\n.",
            "S: 250 Message accepted",
        ]:
            for client in clients:
                client.converse(piece)
        self.assertEqual(len(self.inbox), 50)

    def test_stop_says_goodbye_to_everyone(self) -> None:
        clients = [self.connect(), self.connect(), self.connect()]
        idle, middle, data = clients
        idle.expect("220 ...")
        middle.converse("S: 220 ...\nC: HELO\\c")
        data.converse(f"{ENVELOPE}\n{DATA}\nC: half\\c")
        address = self.address
        self.server.stop()
        for client in clients:
            client.converse("S: 421 The server is stopping...\nS: (closed)")
        self.assertEqual(self.inbox, [])
        MailServer(address).server_close()  # the port is free

    def flood(self) -> None:
        """Send commands until the server waits for the client to read its replies."""
        client = self.connect()
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.socket.settimeout(0.1)
        with contextlib.suppress(TimeoutError):
            while True:
                client.socket.sendall(b"HELP\r\n" * 10_000)

    def test_a_client_that_does_not_read_does_not_keep_it_from_stopping(self) -> None:
        self.server = self.serve(grace=0.1)
        self.flood()
        self.server.stop()
        wait_until(lambda: not self.server.sessions)

    def test_nor_in_serial_mode(self) -> None:
        self.server = self.serve(serial=True, grace=0.1)
        self.flood()
        stopping = threading.Thread(target=self.server.stop, daemon=True)
        stopping.start()
        stopping.join(PATIENCE)
        self.assertFalse(stopping.is_alive())

    def test_serve_forever_in_a_thread_of_ones_own(self) -> None:
        with MailServer(("127.0.0.1", 0)) as self.server:
            thread = threading.Thread(target=self.server.serve_forever, daemon=True)
            thread.start()
            self.connect().expect("220 ...")
        thread.join(PATIENCE)
        self.assertFalse(thread.is_alive())

    def test_threads_and_files_are_given_back(self) -> None:
        before = threading.active_count()
        for _ in range(50):
            self.connect().close()
        wait_until(lambda: threading.active_count() <= before and not self.server.sessions)

    def test_a_failing_command_ends_the_session(self) -> None:
        class Handler(mailserver.ESMTPHandler):
            def do_DIVIDE(self, arg: str) -> None:
                """DIVIDE"""
                self.reply(250, str(1 // 0))

            def do_EXIT(self, arg: str) -> None:
                """EXIT"""
                sys.exit()

        self.server = self.serve(handler=Handler, serial=True)
        for verb, error in [("DIVIDE", "ZeroDivisionError("), ("EXIT", "SystemExit(")]:
            self.dialogue(f"S: 220 ...\nC: {verb}\nS: 421 The server failed...\nS: (closed)")
            self.expect_warning(*[f"failed: {error}"] * 3)

    def test_a_failure_inside_data_runs_no_line_of_it(self) -> None:
        class Handler(mailserver.ESMTPHandler):
            def deliver(self, envelope: Envelope) -> None:
                raise MemoryError

        self.server = self.serve(handler=Handler)
        dot = "C: .\nC: MAIL FROM:<evil@example.com>\nS: 421 The server failed...\nS: (closed)"
        self.dialogue(f"{ENVELOPE}\n{DATA}\n{dot}")
        self.expect_warning(*["failed: MemoryError("] * 3)

    def test_a_command_that_sends_no_reply_is_named(self) -> None:
        class Handler(mailserver.ESMTPHandler):
            def do_TIME(self, arg: str) -> None:
                """TIME"""

        self.server = self.serve(handler=Handler)
        self.dialogue("S: 220 ...\nC: TIME\nS: 421 The server failed...\nS: (closed)")
        self.expect_warning(*["do_TIME sent no reply"] * 3)

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
        with unittest.mock.patch.object(mailserver.time, "sleep", paused.append):
            self.dialogue(f"S: 220 ...\n{BYE}")
        self.assertGreaterEqual(paused.count(0.1), 3)

    def test_settings_that_make_no_sense(self) -> None:
        wrong: list[tuple[type[Exception], dict[str, Any]]] = [
            (TypeError, {"max_sise": 1}),
            (TypeError, {"max_size": "1000"}),
            (TypeError, {"timeout": None}),
            (TypeError, {"users": ["ann"]}),
            (TypeError, {"lists": "team"}),
            (TypeError, {"maildir": "Maildir"}),
            (TypeError, {"mailroom": None}),
            (TypeError, {"tls": ("cert.pem", "key.pem")}),
            (TypeError, {"console": object()}),
            (TypeError, {"fail": "RCPT=450"}),
            (ValueError, {"max_size": -1}),
            (ValueError, {"max_clients": 0}),
            (ValueError, {"timeout": 0}),
            (ValueError, {"fail": {"RCTP": 450}}),
            (ValueError, {"fail": {"RCPT": 250}}),
            (ValueError, {"fail": {"RCPT": 600}}),
            (ValueError, {"lists": {"team": "ann@example.com"}}),
            (ValueError, {"lists": {"team": ["ann"]}}),
            (ValueError, {"lists": {"team": []}}),  # its mail would be accepted, and not kept
            (ValueError, {"lists": {"team": ["ann\udcff@example.com"]}}),
            (ValueError, {"lists": {"team": ["../ann@example.com\n"]}}),
        ]
        for kind, settings in wrong:
            (name,) = settings
            name = "list" if name == "lists" else name
            with self.subTest(settings), self.assertRaisesRegex(kind, name):
                MailServer(("127.0.0.1", 0), **settings).server_close()

    def test_no_setting_is_shared(self) -> None:
        one, other = self.serve(), self.serve()
        one.users["ann"] = "secret"
        one.lists["team"] = ["ann@example.com"]
        one.fail["RCPT"] = 450
        one.mailroom.subscribe(print)
        self.assertEqual((other.users, other.lists, other.fail), ({}, {}, {}))
        self.assertNotIn(print, other.mailroom.subscribers)

    def test_a_long_timeout(self) -> None:
        for timeout in (3_000_000, 10**400):
            self.server = self.serve(timeout=timeout)
            self.play(f"S: 220 ...\n{BYE}")

    def test_an_idle_server_waits_and_is_woken(self) -> None:
        calls: list[str] = []

        class Server(MailServer):
            def get_request(self) -> Any:
                calls.append("get_request")
                return super().get_request()

        with Server(("127.0.0.1", 0), timeout=0.2) as self.server:
            self.server.start()
            self.play("S: 220 ...\nS: 421 Nothing heard...\nS: (closed)")
            self.assertEqual(len(calls), 2)  # one for each client, and nothing in between
            self.assertIsNone(self.server.socket.gettimeout())
            loop = self.server.loop
        assert loop
        self.assertFalse(loop.is_alive())  # or stop() would have waited in vain

    def test_stop_from_a_subscriber_of_a_serial_server(self) -> None:
        for serial in (True, False):
            with self.subTest(serial=serial):
                self.server = self.serve(serial=serial)
                self.server.mailroom.subscribe(lambda _: self.server.stop())
                with self.connect() as client:
                    client.converse(f"{ENVELOPE}\n{DATA}\nC: hello")
                    client.converse(f"{DOT}\nS: 421 The server is stopping...\nS: (closed)")
                loop = self.server.loop
                wait_until(lambda loop=loop: not loop.is_alive())
                with self.assertRaises(OSError):
                    self.connect()

    def test_the_servers_own_slowness_is_no_silence(self) -> None:
        slow = SlowFunction()

        class Handler(mailserver.SecureHandler):
            def deliver(self, envelope: Envelope) -> None:
                slow()

        self.server = self.serve(handler=Handler, timeout=0.2)
        self.send_to_a_slow_server(slow)

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


class OneByteSocket(socket.socket):
    """A connection on which each byte comes by itself, as from a client that sends each key."""

    def recv(self, *_: Any) -> bytes:
        return super().recv(1)


class Drip(mailserver.SecureHandler):
    """A handler whose client sends each key by itself."""

    def setup(self) -> None:
        self.request = OneByteSocket(fileno=self.request.detach())
        super().setup()

    def finish(self) -> None:
        super().finish()
        self.request.close()


class ConsoleTest(DialogueTest):
    """What the teacher sees."""

    def setUp(self) -> None:
        super().setUp()
        self.console = Recorder()
        self.server = self.serve(console=self.console)

    def test_the_dialogue(self) -> None:
        noop = "C: NOOP\\n\nS: 250 OK\nC: QUIT\nS: 221 Bye"
        self.play(f"S: 220 ...\nC: HELO ann.example.com\nS: 250 Hello\n{noop}")
        self.assertEqual(
            self.console.said,
            ["[#] -: connected from 127.0.0.1", "[#] S: 220 Simple Mail Server"]
            + ["[#] C: HELO ann.example.com", "[# ann] S: 250 Hello"]
            + ["[# ann] C: NOOP<LF>", "[# ann] S: 250 OK", "[# ann] C: QUIT", "[# ann] S: 221 Bye"],
        )

    def test_nothing_reaches_the_terminal_raw(self) -> None:
        self.dialogue("S: 220 ...\nC: \\x1b[2J\\xc2\\x9b\\xe2\\x80\\xaehi \\xfe\nS: 500 ...")
        self.assertIn(r"\x1b[2J\x9b\u202ehi \xfe", self.console.text)

    def test_each_line_of_a_message_names_its_session(self) -> None:
        self.play(f"{ENVELOPE}\n{DATA}\nC: At one?\n{DOT}")
        start = self.console.said.index("[# example] C: .")
        shown = ["C: .", "---- envelope", "from <a@example.com>", "to   <b@example.com>"]
        shown += ["---- message", "| At one?", "----", "S: 250 Message accepted"]
        self.assertEqual(
            self.console.said[start:][: len(shown)], [f"[# example] {line}" for line in shown]
        )

    def test_names_of_sessions(self) -> None:
        for name, mark in [
            ("ann.example.com", "[# ann]"),
            ("ann", "[# ann]"),
            ("a-very-long-name.example", "[# a-very-long-]"),
        ]:
            self.console.lines.clear()
            self.dialogue(f"S: 220 ...\nC: HELO {name}\nS: 250 Hello\nC: NOOP\nS: 250 OK")
            self.assertIn(f"{mark} C: NOOP", self.console.said)
        self.dialogue("S: 220 ...\nC: HELO ]$(reboot)[31m\nS: 250 Hello\nC: NOOP\nS: 250 OK")
        for line in self.console.lines:
            self.assertRegex(line, r"^\[\d+( [\w?-]{1,12})?\] (-:|C:|S:)")

    def remarks(self, text: str, way: str = LINE_BY_LINE) -> list[str]:
        """Play a dialogue; return the remarks on it."""
        self.console.lines.clear()
        self.play(text, way)
        wait_until(lambda: not self.server.sessions)
        found = [line.partition(" -: ")[2] for line in self.console.lines if " -: " in line]
        return [remark for remark in found if not remark.startswith("connected")]

    def test_the_forgotten_dot(self) -> None:
        for line, shown in [
            ("QUIT", "QUIT"),
            ("quit", "quit"),
            (r"QUIT\n", "QUIT"),
            ("RCPT TO:<b@example.com>", "RCPT TO:<b@example.com>"),
            (r".\x20", ". "),
        ]:
            remark = f'"{shown}" went into the message, which a line with only a dot ends'
            text = f"{ENVELOPE}\n{DATA}\nC: Hello\nC: {line}"
            self.server = self.serve(console=self.console)
            with self.subTest(line):
                self.assertEqual(self.remarks(text)[:-1], [remark])
            self.server = self.serve(console=self.console, handler=Drip)
            with self.subTest(line, how="key by key"):
                self.assertEqual(self.remarks(text)[:-1], [remark])

    def test_no_remark_where_there_is_no_mistake(self) -> None:
        for text in (CLASSIC, f"{ENVELOPE}\n{DATA}\nC: I say\nC: QUIT!\n{DOT}\n{BYE}"):
            for handler, way in itertools.product((mailserver.SecureHandler, Drip), WAYS):
                self.server = self.serve(console=self.console, handler=handler)
                self.assertEqual(self.remarks(text, way), [])

    def test_a_cr_without_lf(self) -> None:
        for handler in (mailserver.SecureHandler, Drip):
            with self.subTest(handler):
                self.server = self.serve(console=self.console, handler=handler)
                remark, _ = self.remarks(f"{ENVELOPE}\n{DATA}\nC: abc\\rdef")
                self.assertIn("CR without LF", remark)

    def test_a_message_that_breaks_off(self) -> None:
        (remark,) = self.remarks(f"{ENVELOPE}\n{DATA}\nC: half")
        self.assertEqual(remark.strip(), "gone in the middle of a message: dropped")
        self.assertEqual(self.remarks(HELLO)[0].strip(), "gone without QUIT")

    def test_a_pasted_dialogue_gets_one_answer(self) -> None:
        pasted = re.sub("(?m)^", "C: ", re.sub(r"\nS: \(closed\)", "", CLASSIC))
        self.play(
            f"S: 220 ...\n{pasted}\nS: 500 Leave out the ...\nC: NOOP\nS: 250 OK", IN_ONE_PIECE
        )
        self.play("S: 220 ...\nC: C: NOOP\nS: 500 Leave out ...\nC: NOOP\nS: 250 OK")
        self.play("S: 220 ...\nC:     C: NOOP\nS: 500 Leave out ...\nC: NOOP\nS: 250 OK")

    def test_the_servers_words_do_not_wrap(self) -> None:
        lines = [
            "MAIL FROM:<a..b@example.com>",
            "RCPT TO:<x@a_b>",
            "FROB",
            "MAIL",
            "C: NOOP",
            "DATA",
        ]
        text = "\n".join(f"C: {line}\nS: 50. ..." for line in lines[:3])
        self.play(f"S: 220 ...\nC: HELO a-very-long-name.example\nS: 250 Hello\n{text}")
        self.play(f"{HELLO}\nC: {'x' * 13000}\nS: 500 ...\nC: GET /\nS: 421 ...")
        for line in self.console.lines:
            if " S: " in line:
                self.assertLessEqual(len(line), 100, line)


class DescribeTest(unittest.TestCase):
    """How the console shows a message."""

    def show(self, content: bytes, *recipients: str) -> str:
        envelope = Envelope("a@example.com", list(recipients), bytearray(content))
        lines = mailserver.describe(envelope)
        return "\n".join(map(mailserver.printable, lines)) + "\n"

    def test_envelope(self) -> None:
        text = self.show(b"To: Bob <B@example.com>\r\n\r\nhi\r\n", "b@example.com", "c@example.com")
        envelope = (
            "---- envelope\nfrom <a@example.com>\nto   <b@example.com>\nto   <c@example.com>\n"
        )
        self.assertEqual(
            text, envelope + "---- message\n| To: Bob <B@example.com>\n| \n| hi\n----\n"
        )

    def test_no_message_looks_like_a_dialogue(self) -> None:
        self.assertNotRegex(self.show(b"[1] S: 250 OK\n----\n", "b@example.com"), r"(?m)^\[1\]")

    def test_line_ends(self) -> None:
        text = self.show(b"one\r\ntwo\nthree\x1b\r\n\rx\r\n", "b@example.com")
        self.assertIn("| one\n| two<LF>\n| three\\x1b\n| \\rx\n----\n", text)

    def test_decoded(self) -> None:
        head = b"Content-Type: text/plain; charset=%s\r\nContent-Transfer-Encoding: %s\r\n\r\n"
        for charset, encoding, body in [
            (b"utf-8", b"base64", b"Y2Fmw6kbWzJK"),
            (b"utf-8", b"quoted-printable", b"caf=C3=A9=1B[2J"),
            (b"latin-1", b"Quoted-Printable", b"caf=E9=1B[2J"),
        ]:
            with self.subTest(charset):
                text = self.show(head % (charset, encoding) + body + b"\r\n", "b@example.com")
                self.assertIn("| café\\x1b[2J\n", text)
                self.assertIn(f"| {body.decode()}", text.partition("as it came")[2])

    def test_unknown_character_sets(self) -> None:
        head = b"Content-Type: text/plain; charset=%s\r\nContent-Transfer-Encoding: base64\r\n\r\n"
        for charset in (b"nonsense", b"hex", b"\xff", b"unicode_escape!", b"raw-unicode-escape"):
            text = self.show(head % charset + b"YQ==\n", "b@example.com")
            self.assertIn("\n| YQ==<LF>\n----", text)
            self.assertEqual("---- decoded" in text, charset == b"\xff")  # no name at all: UTF-8

    def test_last_line_without_an_end(self) -> None:
        mixed = b"Content-Type: multipart/mixed; boundary=b\r\n\r\n--b\r\n"
        mixed += b"Content-Type: text/plain\r\n\r\none\r\ntwo\r\n--b\r\n"
        mixed += b"Content-Type: image/png\r\n\r\n\r\n--b--\r\n"
        for content in (b"Content-Transfer-Encoding: base64\r\n\r\nb25lCnR3bw==\r\n", mixed):
            decoded = self.show(content, "b@example.com").partition("---- as it came")[0]
            self.assertIn("---- decoded\n| one\n| two\n", decoded)

    def test_what_was_encoded_and_a_picture(self) -> None:
        message = EmailMessage()
        message["From"], message["To"] = "Ann <a@example.com>", "b@example.com"
        message["Subject"] = "Gr\u00fc\u00dfe"
        message.set_content("One.\nTwo.\n")
        message.add_attachment(b"x" * 200_000, "image", "png", filename="p.png")
        text = self.show(message.as_bytes(policy=email.policy.SMTP), "b@example.com")
        head = "---- envelope\nfrom <a@example.com>\nto   <b@example.com>\n---- decoded\n"
        head += "| Subject: Gr\u00fc\u00dfe\n| One.\n| Two.\n"
        self.assertTrue(text.startswith(head), text)
        self.assertIn("| (image/png, 200,000 octets, p.png)\n---- as it came\n| From: Ann", text)
        self.assertRegex(text, r"\n\.\.\. 3,[0-9]{3} more lines\n----\n$")
        self.assertLess(text.count("\n"), 40)

    def test_a_long_message_is_shortened(self) -> None:
        for end in ("\r\n", "\n"):
            lines = [f"line {n}{end}" for n in range(250)]
            text = self.show("".join(lines).encode(), "b@example.com")
            self.assertEqual(text.count("\n| line"), 100)
            self.assertIn("\n... 150 more lines\n----\n", text)

    def test_many_recipients(self) -> None:
        text = self.show(b"hi\r\n", *(f"b{n}@example.com" for n in range(1000)))
        self.assertEqual(text.count("\nto   <"), 20)
        self.assertIn("\n... 1000 in all\n", text)

    def test_a_latin_1_byte_is_shown_the_same_everywhere(self) -> None:
        raw = b"caf\xe9\r\n"
        part = b"Content-Type: text/plain\r\nContent-Transfer-Encoding: 8bit\r\n\r\n" + raw
        for content in (raw, part, b"Subject: =?utf-8?q?x?=\r\n\r\n" + raw):
            for line in self.show(content, "b@example.com").splitlines():
                self.assertTrue("caf" not in line or line == r"| caf\xe9", line)

    def hostile(self) -> dict[str, bytes]:
        """Return mail that would take long, or much memory, to show whole."""
        nested = b'Content-Type: multipart/mixed; boundary="b%d"\r\n\r\n--b%d\r\n'
        encoded = (
            b"Content-Transfer-Encoding: base64\r\nContent-Type: text/plain; x=%s\r\n\r\nYQ==\r\n"
        )
        boundaries = [b"boundary=" + bytes([n]) * 90_000 + b"\r\n" for n in b"abcdefghij"]
        return {
            "a long To": b"To: g: " + b"a," * 100_000 + b"\r\n\r\nhi\r\n",
            "brackets": b"To: " + b"(" * 10_000 + b"\r\n\r\nhi\r\n",
            "bare LF": b"\n" * 9 * 2**20,
            "deep": b"".join(nested % (n, n) for n in range(400)) + b"hi\r\n",
            "odd": b"Content-Type: multipart/mixed; boundary*0*=x; boundary*=''%E9\r\n\r\nhi\r\n",
            "boundaries": b"Content-Type: text/plain\r\n\r\n" + b"".join(boundaries),
            "semicolons": encoded % (b";a=" * 250_000),
            "a long line": b"x" * 9 * 2**20 + b"\r\n",
            "a Subject": b"Subject: " + b"=?utf-8?q?x?= " * 1000 + b"\r\n\r\nhi\r\n",
            "header names": b"Subject: =?x\r\n" + b"content-\n" * 110_000,
            "control characters": b"\x01" * 900_000 + b"\r\n",
            "short lines": b".\r\n" * 3_000_000,
            "no colon": b"Subject: =?utf-8?q?x?=\r\n\r\n" + b"content-x\n" * 90_000,
            "bare CR": b"Subject: =?utf-8?q?x?=\r\nX: y\rContent-Type: a; " + b"a=b;" * 200_000,
            "only CR": b"Subject: =?utf-8?q?x?=\r\n\r\n" + b"\r" * 1_000_000,
            "CR in headers": b"Subject: =?utf-8?q?x?=\r\n" + b"a:b\r" * 200_000,
            "blanks": b"Content-Type:" + b" " * 16_300 + b"t\r\n\r\n",
            "parts": b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + b"--b\n\n" * 9_900,
        }

    def test_hostile_mail_is_shown_raw(self) -> None:
        for name, content in self.hostile().items():
            with self.subTest(name):
                start = time.thread_time()
                text = self.show(content, "b@example.com")
                self.assertLess(time.thread_time() - start, 0.25)
                first = content[:60].split(b"\n")[0].decode().replace("\r", "")
                self.assertIn(f"\n| {mailserver.printable(first)[:40]}", text)
                self.assertLess(len(text), 200_000)

    def test_hostile_mail_takes_little_memory(self) -> None:
        for name, content in self.hostile().items():
            with self.subTest(name):
                peak = peak_memory(functools.partial(self.show, content, "b@example.com"))
                self.assertLess(peak, 20 * 2**20 + len(content))  # one copy is the envelope's

    def test_hostile_parts_are_few(self) -> None:
        lines = b"\x01" * 490 + b"\r\n"
        part = b"--b\r\nContent-Type: text/plain\r\n\r\n" + lines * 100
        content = b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + part * 20 + b"--b--\r\n"
        self.assertLess(self.show(content, "b@example.com").count("\n"), 300)

    def test_hostile_lines_are_short(self) -> None:
        for text in ("x" * 10_000, "\x01" * 10_000, "\udcff" * 10_000, "\ud800" * 10_000):
            self.assertLessEqual(len(mailserver.printable(text)), 500)


class EnvelopeTest(DialogueTest):
    """What a program gets of a message."""

    settings = {"users": {"ann": "secret"}}

    def test_where_it_came_from(self) -> None:
        self.play(f"""
            {EHLO}
            C: AUTH PLAIN AGFubgBzZWNyZXQ=
            S: 235 Welcome
            {MAIL}
            {DATA}
            {MESSAGE}
        """)
        (envelope,) = self.inbox
        self.assertEqual((envelope.helo, envelope.peer), ("example.com", "127.0.0.1"))
        self.assertEqual(envelope.user, "ann")
        self.assertGreater(envelope.session, 0)

    def test_repr(self) -> None:
        envelope = Envelope("a@example.com", ["b@example.com"], bytearray(b"Subject: x\r\n" * 1000))
        self.assertRegex(repr(envelope), r"a@example\.com.*b@example\.com")
        self.assertLess(len(repr(envelope)), 200)

    def test_message(self) -> None:
        content = b"From: Ann <a@example.com>\r\nSubject: =?utf-8?q?caf=C3=A9?=\r\n\r\nhello\r\n"
        message = Envelope("a@example.com", [], bytearray(content)).message
        self.assertIsInstance(message, EmailMessage)
        self.assertEqual(message["Subject"], "caf\u00e9")
        self.assertEqual(message["From"].addresses[0].domain, "example.com")
        self.assertEqual(message.get_content().strip(), "hello")


class TerminalTest(unittest.TestCase):
    """The console that prints from a thread of its own."""

    def test_colours(self) -> None:
        class Screen(io.StringIO):
            def isatty(self) -> bool:
                return True

        for system, environment, coloured in [
            ("posix", {}, True),
            ("posix", {"NO_COLOR": "1"}, False),
            ("nt", {"WT_SESSION": "", "NO_COLOR": ""}, False),
            ("nt", {"WT_SESSION": "x"}, True),
            ("nt", {"WT_SESSION": "x", "NO_COLOR": "1"}, False),
        ]:
            with (
                unittest.mock.patch.object(os, "name", system),
                unittest.mock.patch.dict(os.environ, environment),
                contextlib.redirect_stdout(Screen()) as out,
            ):
                terminal = mailserver.Terminal()
                terminal.show("[1] C: HELO x", "[1] S: 250 Hello", "[1] S: 450 No", "[1] S: 550 No")
                terminal.show("[1] | [1] S: 250 OK")
                terminal.close()
            colours = re.findall(r"\[1\] (\x1b\[3[0-9]m)S: ... \w+\x1b\[0m\n", out.getvalue())
            self.assertEqual(len(set(colours)), 3 if coloured else 0)
            self.assertIn("[1] C: HELO x\n", out.getvalue())
            self.assertIn("[1] | [1] S: 250 OK\n", out.getvalue())

    def test_a_flood_is_printed_in_pieces(self) -> None:
        class Endless(queue.Queue[Any]):  # as if clients added lines as fast as they are printed
            taken = 0

            def get(self, *_: Any, **__: Any) -> Any:
                self.taken += 1
                return "a line" if self.taken <= 5000 else None

            def empty(self) -> bool:
                return self.taken > 5000

        with (
            unittest.mock.patch("mailserver.queue.Queue", Endless),
            unittest.mock.patch("builtins.print") as printed,
        ):
            terminal = mailserver.Terminal()
            terminal.thread.join(PATIENCE)
        pieces = [call.args[0].count("a line") for call in printed.call_args_list]
        self.assertEqual(sum(pieces), 5000)
        self.assertLessEqual(max(pieces), 1000)


class ShapeTest(DialogueTest):
    """What the docstring of the module says of the file, and what holds all over the file."""

    one_body = ["handle", "receive", "flush", "read_line", "read_message", "dispatch", "match"]
    one_body += ["refusal", "reply", "log"]
    # By the road: small helpers, the rules of refusal(), and the loop of a thread.
    left_out = ["log", "conceal", "printable", "refuse_if", "edit", "match", "explain"]
    left_out += ["format_reply", "read_parameters", "verbs", "<lambda>", "serve_clients"]
    text = mailserver.__doc__ or ""
    classes = [one for one in vars(mailserver).values() if isinstance(one, type)]

    def ladder(self) -> Iterator[tuple[str, int, str | None]]:
        """Give the classes that the docstring draws: name, step, and what is in brackets."""
        drawn = re.findall(r"(?m)^    ([ |`-]*)(\w+(?:Handler|Server))(?: \((\w+)\))?  ", self.text)
        for steps, name, base in drawn:
            yield name, len(steps) // 4, base or None

    def test_the_ladder(self) -> None:
        above: list[str] = []
        drawn = {name for name, _, _ in self.ladder()}
        for name, step, base in self.ladder():
            with self.subTest(name):
                del above[step:]
                names = [one.__name__ for one in getattr(mailserver, name).__mro__[1:]]
                parent = next((other for other in names if other in drawn), None)
                self.assertEqual(parent, above[-1] if above else None)
                self.assertTrue(base is None or base == names[0])
                above.append(name)
        roots = (mailserver.LineHandler, mailserver.SmallServer)
        ours = {one.__name__ for one in self.classes if issubclass(one, roots)}
        self.assertEqual(drawn, ours - {"Security"})  # which is a mixin

    def test_the_road(self) -> None:
        roads: list[list[str]] = []
        road: list[str] = []

        def watch(frame: Any, event: str, arg: Any) -> None:
            name = getattr(arg, "__name__", "") if event.startswith("c_") else frame.f_code.co_name
            if event == "c_return" and name == "recv":
                road[:] = self.names_on_stack(frame)
            elif event == "call" and frame.f_globals is vars(mailserver):
                road.extend({name} - {*road, "<listcomp>", "<genexpr>"})
            elif event == "c_call" and name == "send" and "do_RCPT" in road:
                roads.append([each for each in road if each not in self.left_out])
                road.clear()

        threading.setprofile(watch)
        self.addCleanup(threading.setprofile, None)
        with self.connect() as client:
            client.converse(ENVELOPE)
        table = self.text.partition("The road of one command")[2]
        told = re.findall(r"(?m)^    (\w+)  ", table)
        self.assertEqual(roads, [told])
        self.assertLessEqual(len(told), 10)

    def names_on_stack(self, frame: Any) -> list[str]:
        """Return the names of our functions that have called this one, the outermost first."""
        names = []
        while frame:
            if frame.f_globals is vars(mailserver):
                names.append(frame.f_code.co_name)
            frame = frame.f_back
        return names[::-1]

    def test_one_body_each(self) -> None:
        for name in self.one_body:
            homes = [one.__name__ for one in self.classes if name in vars(one)]
            home = "SMTPHandler" if name == "read_message" else "LineHandler"
            self.assertEqual((name, homes), (name, [home]))

    def test_short_functions(self) -> None:
        for node in ast.walk(ast.parse(source())):
            if isinstance(node, ast.FunctionDef):
                self.assertLessEqual((node.end_lineno or 0) - node.lineno + 1, 25, node.name)

    def test_few_ancestors(self) -> None:
        for one in self.classes:
            ours = [other for other in one.__mro__[1:] if other.__module__ == "mailserver"]
            self.assertLessEqual(len(ours), 4, one)


class PlainClientsTest(DialogueTest):
    def test_smtplib(self) -> None:
        with smtplib.SMTP(*self.address) as client:
            client.sendmail(
                "a@example.com", ["b@example.com", "c@example.com"], "Subject: x\n\n.\n..\n"
            )
        self.assertEqual(self.inbox[0].recipients, ["b@example.com", "c@example.com"])
        self.assertEqual(self.inbox[0].content, b"Subject: x\r\n\r\n.\r\n..\r\n")

    def test_curl(self) -> None:
        need("curl")
        with tempfile.TemporaryDirectory() as folder:
            message = Path(folder, "mail.txt")
            message.write_bytes(b"Subject: x\n\n.\nunix\n")
            command = ["curl", "-sS", "smtp://{}:{}".format(*self.address)]
            command += ["--mail-from", "a@example.com", "--mail-rcpt", "b@example.com"]
            subprocess.run([*command, "-T", str(message)], check=True, timeout=PATIENCE)
        self.assertEqual(
            self.inbox[0].content.replace(b"\r\n", b"\n").strip(), b"Subject: x\n\n.\nunix"
        )


class ExtensionTest(DialogueTest):
    """Part 2: the other commands, and what EHLO offers."""

    settings = {"lists": {"team": ["ann@example.com", "bob@example.com"]}}

    def test_parameters(self) -> None:
        self.dialogue(f"""
            {EHLO}
            C: MAIL FROM:<a@example.com> SIZE=1000 BODY=8BITMIME SMTPUTF8
            S: 250 OK
            C: RSET
            S: 250 OK
            C: MAIL FROM:<a@example.com> size=10485760 body=7bit
            S: 250 OK
            C: RCPT TO:<b@example.com> NOTIFY=NEVER
            S: 555 Unknown parameter: send RCPT without it
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
            S: 555 Unknown parameter: send MAIL without it
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
        """)

    def test_utf8_only_when_asked_for(self) -> None:
        self.dialogue(f"""
            {EHLO}
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
        """)

    def test_letters_of_all_alphabets(self) -> None:
        for local in [
            "\u0928\u092e\u0938\u094d\u0924\u0947",
            "\u0bb5\u0ba3\u0b95\u0bcd\u0b95\u0bae\u0bcd",
        ]:
            for name in (local, "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "jose\u0301"):
                address = f"{name}@{name}.example"
                with self.subTest(address):
                    self.inbox.clear()
                    self.play(f"""
                        {EHLO}
                        C: MAIL FROM:<{address}> SMTPUTF8
                        S: 250 OK
                        C: RCPT TO:<{address}>
                        S: 250 OK
                        {DATA}
                        {DOT}
                    """)
                    self.assertEqual(self.inbox[0].sender, address)
                    self.assertEqual(self.inbox[0].recipients, [address])

    def test_hostile_lines_take_no_time(self) -> None:
        self.server = self.serve(console=Recorder())
        long = mailserver.SecureHandler.line_limit - 50
        for line in [
            "NOOP " + "a" * long,
            "VRFY a" + " " * long + "b",
            "EXPN a" + " " * long + "b",
            "MAIL FROM:<" + "@" * long,
            "MAIL FROM:<" + "a." * (long // 2) + ">",
            "AUTH " + "AUTH" * (long // 4),
            "PASS" * (long // 4),
        ]:
            with self.subTest(line[:20]):
                self.assertLess(self.seconds_for(line), 0.1)

    def test_pipelining_answers_in_one_go(self) -> None:
        commands = b"EHLO x\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>\r\nDATA\r\n"
        with self.connect() as client:
            client.expect("220 ...")
            client.send(commands)
            replies = client.socket.recv(10_000)
            self.assertTrue(replies.endswith(b"354 End data with <CR><LF>.<CR><LF>\r\n"))

    def test_help(self) -> None:
        self.dialogue(f"""
            S: 220 ...
            C: HELP
            S: 214-EHLO EXPN HELO HELP NOOP QUIT RSET VRFY
            S: 214 ...HELP...
            C: HELO example.com
            S: 250 Hello
            C: HELP
            S: 214-EHLO EXPN HELO HELP MAIL NOOP QUIT RSET VRFY
            S: 214 ...
            {EHLO.partition("Server")[2]}
            C: HELP
            S: 214-AUTH EHLO EXPN HELO HELP MAIL NOOP QUIT RSET VRFY
            S: 214 ...
            C: MAIL FROM:<a@example.com>
            S: 250 OK
            C: FROB
            S: 500 Unknown verb: try EHLO EXPN HELO HELP NOOP QUIT RCPT RSET VRFY
            C: RCPT TO:<b@example.com>
            S: 250 OK
            C: HELP
            S: 214-DATA EHLO EXPN HELO HELP NOOP QUIT RCPT RSET VRFY
            S: 214 ...
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
            C: VRFY team SMTPUTF8
            S: 250 <team>
            C: VRFY
            S: 501 Syntax: VRFY user
            C: EXPN team
            S: 250-<ann@example.com>
            S: 250 <bob@example.com>
            C: EXPN team SMTPUTF8
            S: 250-<ann@example.com>
            S: 250 <bob@example.com>
            C: EXPN TEAM@any.example
            S: 250-<ann@example.com>
            S: 250 <bob@example.com>
            C: EXPN nobody
            S: 550 No such list
        """)

    def test_names_of_lists_in_any_case(self) -> None:
        self.server = self.serve(lists={"Team": ["ann@example.com"]})
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
            self.dialogue(f"""
                {HELLO}
                C: MAIL FROM:<a@example.com>
                S: 250 OK
                C: RCPT TO:<{to}>
                S: 250 OK
                C: RCPT TO:<bob@example.com>
                S: 250 OK
                {DATA}
                {MESSAGE}
            """)
            self.assertEqual(self.inbox[0].recipients, ["ann@example.com", "bob@example.com"])

    def seconds_for(self, line: str) -> float:
        """Return how long the processor has worked for the answer to a line."""
        with self.connect() as client:
            client.converse(EHLO)
            start = time.process_time()
            client.send(line.encode() + b"\r\n")
            client.line()
            return time.process_time() - start


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
                text = f"{HELLO}\nC: MAIL FROM:<>\nS: 250 OK\nC: RCPT TO:{path}"
                if address is None:
                    self.dialogue(f"{text}\nS: 501 ...")
                else:
                    self.play(f"{text}\nS: 250 OK\n{DATA}\n{MESSAGE}")
                    self.assertEqual(self.inbox[0].recipients, [address])

    def test_senders(self) -> None:
        for path, address in self.table:
            if path in ("<>", "<Postmaster>"):
                continue
            with self.subTest(path):
                reply = "250 OK" if address else "501 ..."
                self.play(f"{HELLO}\nC: MAIL FROM:{path}\nS: {reply}")

    def test_hostile_addresses_take_no_time(self) -> None:
        for local in ("a." * 200, '"' + "\\a" * 200, "a-" * 200 + "@", "x@" + "a-" * 200):
            self.dialogue(f"{HELLO}\nC: MAIL FROM:<{local}\nS: 501 ...")


# ==================================================================================================
# THE TESTS: part 3


# A key for these tests only: everybody can read it. The certificate is its own authority, for
# localhost and 127.0.0.1, and valid from 2020 until 2120.
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgcglMQtK3UtZqrdrx
8NmOzDc5BkKh2ikkIzVTfWkGBnGhRANCAATJ57y3nu6/Kqs1BEduhNF1Yr/Dnqp4
2VvCcvIzIuEXPdMrYR7b2tzQGXv1hUKh64hEW1QzFo9ioOii8xSh9qyz
-----END PRIVATE KEY-----
"""
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBijCCATCgAwIBAgIUF3gOYv0BEkvGespBhssMvSBYD9cwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTIwMDEwMTAwMDAwMFoYDzIxMjAwMTAx
MDAwMDAwWjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAATJ57y3nu6/Kqs1BEduhNF1Yr/Dnqp42VvCcvIzIuEXPdMrYR7b2tzQ
GXv1hUKh64hEW1QzFo9ioOii8xSh9qyzo14wXDAaBgNVHREEEzARgglsb2NhbGhv
c3SHBH8AAAEwDwYDVR0TAQH/BAUwAwEB/zAOBgNVHQ8BAf8EBAMCAoQwHQYDVR0O
BBYEFDSyB2UMgt1ObC/qpuMqoqf+LAj/MAoGCCqGSM49BAMCA0gAMEUCIBKrBJ8t
jTY4o3qai6Qe85lAjFDV9MQQNakBi3VVKxyEAiEAnqf5pv1qqdTWsRJlVaA8vAj+
rGLkot4pubjx9lYIsEw=
-----END CERTIFICATE-----
"""


def certificate(folder: str) -> tuple[str, str]:
    """Write the certificate and its key to files; return their paths."""
    cert, key = Path(folder, "cert.pem"), Path(folder, "key.pem")
    cert.write_text(CERTIFICATE, encoding="ascii")
    key.write_text(KEY, encoding="ascii")
    return str(cert), str(key)


class TLSTest(DialogueTest):
    """What runs on top of a certificate."""

    cert: str
    key: str
    context: ssl.SSLContext

    @classmethod
    def setUpClass(cls) -> None:
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.cert, cls.key = certificate(folder.name)
        cls.settings = {**cls.settings, "tls": mailserver.tls_context(cls.cert, cls.key)}
        cls.context = ssl.create_default_context(cafile=cls.cert)


class SecureTest(TLSTest):
    settings = {"users": {"ann@example.com": "secret", "bob": "pass word"}, "require_auth": True}

    def test_before_and_after_the_handshake(self) -> None:
        offers = EHLO.replace("\nS: 250 AUTH PLAIN LOGIN", "")
        with self.connect() as client:
            client.converse(f"""
                {offers}
                S: 250 STARTTLS
                C: AUTH PLAIN AGJvYgBwYXNzIHdvcmQ=
                S: 538 Send STARTTLS before AUTH
                C: STARTTLS now
                S: 501 Syntax: STARTTLS
                C: STARTTLS
                S: 220 Ready for TLS
            """)
            client.encrypt(self.context)
            client.converse(f"""
                C: AUTH PLAIN AGJvYgBwYXNzIHdvcmQ=
                S: 503 ...EHLO...
                C: MAIL FROM:<a@example.com>
                S: 503 Send HELO before MAIL FROM
                {offers.partition("Server")[2]}
                S: 250 AUTH PLAIN LOGIN
                C: MAIL FROM:<a@example.com>
                S: 530 Send AUTH before MAIL
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
                {DATA}
                {MESSAGE}
                {BYE}
            """)
        self.assertIn("with ESMTPSA", self.inbox[0].trace)

    def test_what_was_sent_with_starttls_is_forgotten(self) -> None:
        for injected in (b"FROB\r\n", b"RSET\r\nMAIL FROM:<evil@example.com>\r\n", b"X"):
            with self.subTest(injected), self.connect() as client:
                client.expect("220 ...")
                client.send(b"EHLO x\r\nSTARTTLS\r\n" + injected)
                client.skip_to("220 Ready for TLS")
                client.encrypt(self.context)
                client.converse(f"""
                    C: NOOP
                    S: 250 OK
                    C: RCPT TO:<b@example.com>
                    S: 503 ...
                    {BYE}
                """)

    def test_a_failed_handshake_ends_the_session_quietly(self) -> None:
        for junk in (b"this is no handshake\r\n", b""):
            with self.connect() as client:
                client.converse("S: 220 ...\nC: STARTTLS\nS: 220 ...")
                client.send(junk)
                client.end_input()
                with contextlib.suppress(ConnectionError):
                    while client.socket.recv(1000):
                        pass
        wait_until(lambda: not self.server.sessions)

    def test_stop_and_silence_during_a_handshake_and_in_tls(self) -> None:
        self.server = self.serve(**self.settings, timeout=0.3)
        silent, client = self.connect(), self.connect()
        for one in (silent, client):
            one.converse("S: 220 ...\nC: STARTTLS\nS: 220 ...")
        client.encrypt(self.context)
        client.converse("S: 421 Nothing heard...\nS: (closed)")
        wait_until(lambda: not self.server.sessions)

    def test_stop_in_tls(self) -> None:
        for last_words in (b"", b"NOO"):
            with self.subTest(last_words), self.connect() as client:
                client.converse("S: 220 ...\nC: STARTTLS\nS: 220 ...")
                client.encrypt(self.context)
                client.converse("C: NOOP\nS: 250 OK")
                client.send(last_words)
                self.server.stop()
                client.converse("S: 421 The server is stopping...\nS: (closed)")
            self.server = self.serve(**self.settings)

    def test_smtplib(self) -> None:
        port = self.address[1]
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

    def test_openssl(self) -> None:
        need("openssl")
        command = f"openssl s_client -quiet -crlf -starttls smtp -CAfile {self.cert} -connect"
        done = subprocess.run(
            [*command.split(), f"127.0.0.1:{self.address[1]}"],
            input=b"NOOP\nQUIT\n",
            capture_output=True,
            check=False,
            timeout=PATIENCE,
        )
        self.assertIn(b"250 OK\r\n221 Bye\r\n", done.stdout)

    def test_make_cert(self) -> None:
        need("make")
        need("openssl")
        with tempfile.TemporaryDirectory() as folder:
            command = ["make", "-f", str(HERE / "Makefile"), "cert"]
            subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=PATIENCE)
            mailserver.tls_context(Path(folder, "cert.pem"), Path(folder, "key.pem"))

    def test_curl(self) -> None:
        need("curl")
        command = f"curl -sS --ssl-reqd --cacert {self.cert} --user bob:pass%20word -T -"
        command += f" smtp://localhost:{self.address[1]}"
        command += " --mail-from a@example.com --mail-rcpt b@example.com"
        words = [word.replace("%20", " ") for word in command.split()]
        subprocess.run(words, input=b"Subject: x\n\nhi\n", check=True, timeout=PATIENCE)
        self.assertEqual(len(self.inbox), 1)


class AuthTest(DialogueTest):
    """AUTH in the clear. The user is "ann", the password "secret"."""

    settings = {"users": {"ann": "secret"}}

    def test_mechanisms(self) -> None:
        for dialogue in (
            "C: AUTH PLAIN AGFubgBzZWNyZXQ=",
            "C: auth plain AGFubgBzZWNyZXQ=",
            "C: AUTH PLAIN YW5uAGFubgBzZWNyZXQ=",
            "C: AUTH PLAIN\nS: 334 ...\nC: AGFubgBzZWNyZXQ=",
            "C: AUTH LOGIN\nS: 334 VXNlcm5hbWU6\nC: YW5u\nS: 334 UGFzc3dvcmQ6\nC: c2VjcmV0",
            "C: AUTH LOGIN YW5u\nS: 334 UGFzc3dvcmQ6\nC: c2VjcmV0",
        ):
            with self.subTest(dialogue):
                self.dialogue(f"""
                    {EHLO}
                    {dialogue}
                    S: 235 Welcome
                    C: AUTH PLAIN
                    S: 503 ...once...
                """)

    def test_refusals(self) -> None:
        for dialogue in (
            "C: AUTH\nS: 501 Syntax: AUTH PLAIN|LOGIN [base64]",
            "C: AUTH CRAM-MD5\nS: 504 ...AUTH PLAIN...",
            "C: AUTH PLAIN\nS: 334 ...\nC: *\nS: 501 AUTH cancelled",
            "C: AUTH LOGIN\nS: 334 ...\nC: *\nS: 501 AUTH cancelled",
            "C: AUTH PLAIN !!!\nS: 501 Not base64...",
            "C: AUTH PLAIN /w==\nS: 501 Not base64...",
            "C: AUTH PLAIN AAA\nS: 501 Not base64...",
            "C: AUTH PLAIN YW5u\nS: 501 ...NUL...",
            "C: AUTH PLAIN =\nS: 501 ...NUL...",
            "C: AUTH PLAIN Ym9iAGFubgBzZWNyZXQ=\nS: 501 ...NUL...",
            "C: AUTH PLAIN AGFubgB3cm9uZw==\nS: 535 Wrong name or password",
            "C: AUTH PLAIN AGJvYgBzZWNyZXQ=\nS: 535 Wrong name or password",
            "C: AUTH LOGIN =\nS: 334 ...\nC: =\nS: 535 Wrong name or password",
            "C: MAIL FROM:<a@example.com>\nS: 250 OK\nC: AUTH PLAIN AGFubgBzZWNyZXQ=\nS: 503 ...",
        ):
            with self.subTest(dialogue):
                self.dialogue(f"{EHLO}\n{dialogue}\nC: NOOP\nS: 250 OK")

    def test_three_failures(self) -> None:
        wrong = "C: AUTH PLAIN AGFubgB3cm9uZw==\nS: 535 Wrong name or password"
        last = "C: AUTH PLAIN AGFubgB3cm9uZw==\nS: 421 Three wrong passwords..."
        self.dialogue(f"{EHLO}\n{times(2, wrong)}\n{last}\nS: (closed)")

    def test_before_ehlo(self) -> None:
        self.dialogue("S: 220 ...\nC: AUTH PLAIN AGFubgBzZWNyZXQ=\nS: 503 Send EHLO before AUTH")
        self.dialogue(f"{HELLO}\nC: AUTH PLAIN AGFubgBzZWNyZXQ=\nS: 503 Send EHLO before AUTH")

    def test_vrfy_where_users_are_listed(self) -> None:
        self.dialogue("S: 220 ...\nC: VRFY ANN\nS: 250 <ann>\nC: VRFY bob\nS: 550 No such user")

    def test_the_same_work_for_a_name_that_is_not_there(self) -> None:
        compared = []

        def compare(one: bytes, other: bytes) -> bool:
            compared.append((one, other))
            return one == other

        with unittest.mock.patch("hmac.compare_digest", compare):
            for text in ("AGFubgB3cm9uZw==", "AGJvYgB3cm9uZw=="):
                self.play(f"{EHLO}\nC: AUTH PLAIN {text}\nS: 535 ...")
        self.assertEqual(compared, [(b"wrong", b"secret"), (b"wrong", b"no such user")])

    def shown(self, *lines: str, **settings: Any) -> str:
        """Say lines, each to a server of its own kind; return what the console shows of it all."""
        console = Recorder()
        self.server = self.serve(**settings, console=console)
        text = "\n".join(f"C: {line}" for line in lines)
        with self.connect() as client:
            client.converse(f"{EHLO}\n{text}")
            client.end_input()
            client.skip_to("(closed)")
        return console.text

    def test_no_password_on_the_console(self) -> None:
        for lines in [
            ["AUTH PLAIN secret"],
            ["auth  plain  secret"],
            ["AUTH secret"],
            ["AUTH LOGIN secret"],
            ["AUTH XOAUTH2 secret"],
            ["AUTH PLAIN", "secret"],
            ["AUTH PLAIN", "* secret"],
            ["AUTH PLAIN", "help secret"],
            ["AUTH LOGIN", "YW5u", "secret"],
            ["AUTH LOGIN", "YW5u", " secret"],
            ["AUTH LOGIN", "YW5u", "quit secret"],
            ["AUTH FROB", "secret"],
            ["AUTH FROB", " secret"],
            ["AUTH FROB", "YW5u", "secret"],
            [" AUTH PLAIN secret"],
            ["C: AUTH PLAIN secret"],
            [r"\x1b[A\x1b[AAUTH PLAIN secret"],
            [r"\xef\xbb\xbfAUTH PLAIN secret"],
            ["AUTH LOGIN", "C: secret"],
            ["C: AUTH LOGIN", "S: 334 VXNlcm5hbWU6", "C: YW5u", "C: secret"],
            ["AUHT PLAIN secret"],
            ["PLAIN secret"],
            ["ATUH LOGIN", "YW5u", "secret"],
            ["AUTHPLAIN secret"],
            ["AUTH:PLAIN secret"],
            ["AUTHENTICATE PLAIN secret"],
            ["PASS:secret"],
            ["PASS=secret"],
            ["PASSWORD secret"],
            ["LOGIN ann secret"],
            ["A1 LOGIN ann secret"],
            [f"AUTH PLAIN {'A' * 13_000}secret", "secret"],
            ["AUTH LOGIN", "A" * 13_000, "secret"],
        ]:
            for settings in (self.settings, {}):
                with self.subTest(lines[0][:40], answers=lines[1:], users=bool(settings)):
                    self.assertNotIn("secret", self.shown(*lines, **settings))
        self.assertIn("C: AUTH PLAIN ********", self.shown("AUTH PLAIN secret"))
        self.assertIn("C: AUTH LOGIN\n", self.shown("AUTH LOGIN", "*"))
        self.assertIn("C: hello", self.shown("hello"))

    def test_without_users_any_login_will_do(self) -> None:
        self.server = self.serve()
        self.dialogue(f"""
            {EHLO}
            C: AUTH LOGIN =
            S: 334 UGFzc3dvcmQ6
            C: =
            S: 535 Wrong name or password
            C: AUTH PLAIN AHdob2V2ZXIAd2hhdGV2ZXI=
            S: 235 Welcome
            {MAIL}
            {DATA}
            {DOT}
        """)
        self.assertEqual({envelope.user for envelope in self.inbox}, {"whoever"})
        self.server = self.serve(require_auth=True)
        self.dialogue(f"""
            {EHLO}
            C: MAIL FROM:<a@example.com>
            S: 530 Send AUTH before MAIL
            C: AUTH PLAIN AHdob2V2ZXIAd2hhdGV2ZXI=
            S: 235 Welcome
            {MAIL}
        """)

    def test_not_offered_where_it_would_be_refused(self) -> None:
        self.dialogue(f"{EHLO}\nC: STARTTLS\nS: 502 ...--tls")


# ==================================================================================================
# THE TESTS: parts 4 and 5


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
        rcpt = "\n".join(f"C: RCPT TO:<{address}>\nS: 250 OK" for address in recipients)
        self.play(f"{HELLO}\nC: MAIL FROM:<a@example.com>\nS: 250 OK\n{rcpt}\n{DATA}\n{text}")

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
        self.dialogue(f"""
            {EHLO}
            C: MAIL FROM:<a@example.com> SMTPUTF8
            S: 250 OK
            C: RCPT TO:<{long}>
            S: 553 ...
        """)

    def test_vrfy_knows_mailboxes(self) -> None:
        self.send("bob@example.com")
        self.dialogue("""
            S: 220 ...
            C: VRFY bob
            S: 250 <bob@example.com>
            C: VRFY ann
            S: 252 ...
        """)

    @unittest.skipIf(os.name == "nt", "Windows has no call for what a directory needs")
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

    def failing(self, name: str, number: int, after: int) -> Any:
        """Patch a function of os so that it fails, once it has been called a number of times."""
        real, left = getattr(os, name), [after]

        def fail(*args: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(number, os.strerror(number))
            return real(*args)

        return unittest.mock.patch.object(os, name, fail)

    def test_failures(self) -> None:
        codes = {errno.ENOSPC: 452, errno.EDQUOT: 452, errno.EACCES: 451, errno.EIO: 451}
        for (number, code), name in itertools.product(codes.items(), ("fsync", "rename")):
            self.send("ann@example.com", "bob@example.com")
            before = files(self.folder)
            with self.subTest((number, name)), self.failing(name, number, after=1):
                self.send("ann@example.com", "bob@example.com", text=f"C: .\nS: {code} ...")
            self.assertEqual(files(self.folder), before)
        self.expect_warning(*["not kept"] * 8)

    def test_subscribers(self) -> None:
        def broken(envelope: Envelope) -> None:
            raise ValueError("no")

        last: list[Envelope] = []
        self.server.mailroom.subscribe(broken)
        self.server.mailroom.subscribe(last.append)
        self.send("bob@example.com")
        self.assertEqual(len(last), 1)
        self.expect_warning("a subscriber failed")

    @unittest.skipIf(os.name == "nt", "Windows has no call for what a directory needs")
    def test_two_first_deliveries_at_once(self) -> None:
        real, opened = os.open, []
        first, go_on = threading.Event(), threading.Event()

        def spy(path: Any, *args: Any, **keywords: Any) -> int:
            if not first.is_set():
                first.set()
                go_on.wait(PATIENCE)  # the first delivery is held up at its first directory
            opened.append((threading.current_thread(), os.path.relpath(path, self.folder)))
            return real(path, *args, **keywords)

        threads = [threading.Thread(target=self.store, args=("bob@example.com",)) for _ in "12"]
        with unittest.mock.patch.object(os, "open", spy):
            threads[0].start()
            self.assertTrue(first.wait(PATIENCE))
            threads[1].start()
            threads[1].join(PATIENCE)
            go_on.set()
            threads[0].join(PATIENCE)
        for thread in threads:
            synced = {folder for who, folder in opened if who is thread}
            self.assertEqual(
                synced, {"bob@example.com", ".", "..", os.path.join("bob@example.com", "new")}
            )
        self.assertEqual(len(files(self.folder)), 2)

    def store(self, *recipients: str) -> None:
        """Keep a message without a client."""
        self.maildir.store(Envelope("a@example.com", list(recipients)))

    def test_a_mailroom_beside_a_maildir(self) -> None:
        mailroom = mailserver.Mailroom()
        published: list[int] = []
        mailroom.subscribe(lambda _: published.append(len(files(self.folder))))
        self.server = self.serve(**self.settings, mailroom=mailroom)
        self.send("bob@example.com")
        self.assertEqual(published, [1])  # kept first
        self.assertIs(self.server.mailroom, mailroom)

    def test_a_slow_disk_is_no_silence(self) -> None:
        self.server = self.serve(**self.settings, timeout=0.2)
        with unittest.mock.patch.object(os, "fsync", SlowFunction(os.fsync)) as slow:
            self.send_to_a_slow_server(slow)
        self.assertEqual(len(files(self.folder)), 1)

    def test_a_message_that_starts_with_a_blank(self) -> None:
        for blank in (" ", "\t"):
            self.send("bob@example.com", text=f"C: {blank.replace(chr(9), chr(92) + 't')}x\n{DOT}")
            text = files(self.folder)[-1].read_bytes()
            self.assertTrue(text.endswith(f"\n\n{blank}x\n".encode()), text)

    def test_a_long_sender_needs_no_mailbox(self) -> None:
        long = "\u7528" * 20 + "@" + "\u7528" * 60 + ".example"
        self.dialogue(f"""
            {EHLO}
            C: MAIL FROM:<{long}> SMTPUTF8
            S: 250 OK
            C: RCPT TO:<bob@example.com>
            S: 250 OK
            {DATA}
            {DOT}
        """)

    def test_a_mailbox_that_was_removed(self) -> None:
        for place in ("", "new", "tmp", "cur"):
            with self.subTest(place):
                self.send("bob@example.com")
                shutil.rmtree(os.path.join(self.folder, "bob@example.com", place))
                with contextlib.suppress(mailserver.Refused):
                    self.store("bob@example.com")  # may fail, but not for ever
                self.warnings.clear()
                self.send("bob@example.com")

    def test_the_directory_is_gone(self) -> None:
        self.send("bob@example.com")
        shutil.rmtree(self.folder)
        self.dialogue("S: 220 ...\nC: VRFY bob\nS: 252 ...\nC: NOOP\nS: 250 OK")
        os.mkdir(self.folder)

    def test_any_failure_to_keep_it_is_a_failure(self) -> None:
        with unittest.mock.patch.object(mailserver.Maildir, "write", side_effect=MemoryError):
            self.send("bob@example.com", text="C: .\nS: 451 ...")
        self.expect_warning("not kept")

    def test_a_subscriber_cannot_refuse(self) -> None:
        def picky(envelope: Envelope) -> None:
            raise mailserver.Refused(554, "Not today")

        self.server.mailroom.subscribe(picky)
        self.send("bob@example.com")
        self.assertEqual(len(files(self.folder)), 1)
        self.expect_warning("a subscriber failed: Refused(554")

    def test_a_handler_may_refuse(self) -> None:
        class Handler(mailserver.SecureHandler):
            def deliver(self, envelope: Envelope) -> None:
                raise mailserver.Refused(554, "Not today")

        self.server = self.serve(handler=Handler, **self.settings)
        self.send("bob@example.com", text="C: .\nS: 554 Not today")
        self.assertEqual((files(self.folder), self.inbox), ([], []))


class POP3Test(TLSTest):
    """Part 5: mail is collected, and looked at while it comes."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder, maildir = folder.name, mailserver.Maildir(folder.name)
        plain: dict[str, Any] = {"maildir": maildir, "mailroom": mailserver.Mailroom()}
        self.settings = plain
        super().setUp()
        self.smtp = self.server
        self.server = self.serve_pop3()

    def serve_pop3(self, **settings: Any) -> MailServer:
        """Start a server by which the mail can be collected."""
        return self.serve(handler=mailserver.POP3Handler, **self.settings, **settings)

    def send(self, text: str = "Subject: x\n\nhello\n", to: str = "bob@example.com") -> None:
        with smtplib.SMTP("127.0.0.1", self.smtp.server_address[1]) as client:
            client.sendmail("a@example.com", to, text)

    def open_mailbox(self) -> Client:
        client = self.connect()
        client.converse("""
            S: +OK ...
            C: USER bob@example.com
            S: +OK ...
            C: PASS x
            S: +OK ...
        """)
        return client

    def subscribe(self) -> Client:
        client = self.open_mailbox()
        client.converse("C: SUBSCRIBE\nS: +OK ...")
        return client

    def size(self, number: int = -1) -> int:
        """Count the octets of a message that is kept."""
        return len(files(self.folder)[number].read_bytes().replace(b"\n", b"\r\n"))

    def test_a_session(self) -> None:
        self.send("Subject: one\n\n.dots\n..\n")
        self.send("Subject: two\n\ntwo\n")
        one, two = self.size(0), self.size(1)
        names = [file.name for file in files(self.folder)]
        self.dialogue(f"""
            S: +OK Simple Mail Server
            C: CAPA
            S: +OK ...
            S: USER
            S: TOP
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
            S: -ERR Syntax: USER address
            C: FROB
            S: -ERR Unknown verb...
            C: STLS
            S: -ERR No TLS...
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
            S: -ERR Syntax: RETR message
            C: GET / HTTP/1.0
            S: -ERR ...browser...
            S: (closed)
        """)

    def test_dele_takes_effect_at_quit_only(self) -> None:
        self.send()
        client = self.open_mailbox()
        client.converse("C: DELE 1\nS: +OK ...")
        client.close()
        wait_until(lambda: not self.server.sessions)
        self.assertEqual(len(files(self.folder)), 1)
        client = self.open_mailbox()
        client.converse("C: DELE 1\nS: +OK ...\nC: QUIT\nS: +OK Bye\nS: (closed)")
        self.assertEqual(files(self.folder), [])

    def test_one_session_a_mailbox(self) -> None:
        first = self.open_mailbox()
        login = "S: +OK ...\nC: USER BOB@example.com\nS: +OK ...\nC: PASS x"
        self.dialogue(f"{login}\nS: -ERR [IN-USE] ...")
        bye = "C: QUIT\nS: +OK Bye\nS: (closed)"
        first.converse(bye)
        wait_until(lambda: not self.server.sessions)
        self.dialogue(f"{login}\nS: +OK 0 messages\n{bye}")

    def test_passwords(self) -> None:
        self.server = self.serve_pop3(users={"bob@example.com": "secret"})
        user = "C: USER bob@example.com\nS: +OK ..."
        right = "C: PASS secret\nS: +OK 0 messages\nC: QUIT\nS: +OK Bye"
        self.dialogue(f"S: +OK ...\n{user}\n{right}")
        wrong = f"{user}\nC: PASS wrong\nS: -ERR Wrong..."
        last = f"{user}\nC: PASS wrong\nS: -ERR Three wrong passwords...\nS: (closed)"
        self.dialogue(f"S: +OK ...\n{times(2, wrong)}\n{last}")

    def test_a_password_that_is_no_text(self) -> None:
        self.server = self.serve_pop3(users={"bob@example.com": "secret"})
        self.dialogue(r"""
            S: +OK ...
            C: USER bob@example.com
            S: +OK ...
            C: PASS \xff\xfe\xfc
            S: -ERR Wrong...
        """)
        self.server = self.serve_pop3(users={"bob@example.com": "se?ret"})
        self.dialogue(r"""
            S: +OK ...
            C: USER bob@example.com
            S: +OK ...
            C: PASS se\xe9ret
            S: -ERR Wrong...
        """)

    def test_no_password_on_the_console(self) -> None:
        console = Recorder()
        servers = [self.serve_pop3(console=console)]
        servers.append(self.serve_pop3(console=console, users={"bob@example.com": "secret"}))
        for lines, self.server in itertools.product(
            [
                ["USER bob@example.com", "PASS secret"],
                ["USER bob@example.com", "PAS secret", "secret"],
                ["USER bob@example.com", " secret"],
                ["USER nobody", "secret"],
                ["USER bob@example.com", "C: PASS secret"],
                ["C: USER bob@example.com", "PSS secret"],
                ["USER bob@example.com", r"\x1b[APASS secret"],
                ["USER bob@example.com", "PASS:secret"],
                ["AUTH PLAIN", "secret"],
            ],
            servers,
        ):
            said = "\n".join(f"C: {line}\nS: ..." for line in lines)
            with self.subTest(lines):
                console.lines.clear()
                self.play(f"S: +OK ...\n{said}")
                wait_until(lambda: not self.server.sessions)
                self.assertNotIn("secret", console.text)

    def test_what_the_console_shows_of_a_login(self) -> None:
        console = Recorder()
        self.server = self.serve_pop3(console=console)
        self.play(f"{self.login(0)}\nC: oops\nS: -ERR ...")
        self.assertIn("] C: PASS ********", console.text)
        self.assertIn("] C: oops", console.text)

    def test_a_file_that_has_moved(self) -> None:
        self.send()
        client = self.open_mailbox()
        file = files(self.folder)[0]
        file.rename(file.parent.parent / "cur" / (file.name + ":2,S"))
        client.converse(f"C: RETR 1\nS: +OK {self.size()} octets")
        client.skip_to(".")
        Path(self.folder, "bob@example.com", "cur", file.name + ":2,S").unlink()
        client.converse("C: RETR 1\nS: -ERR Not there any more...\nC: NOOP\nS: +OK ...")

    def test_a_mailbox_that_cannot_be_read_is_not_locked(self) -> None:
        self.send()
        login = "S: +OK ...\nC: USER bob@example.com\nS: +OK ...\nC: PASS x"
        with unittest.mock.patch.object(os, "listdir", side_effect=PermissionError):
            self.play(f"{login}\nS: -ERR The server failed...\nS: (closed)")
        wait_until(lambda: not self.server.sessions)
        self.play(f"{login}\nS: +OK 1 messages")
        self.expect_warning("PermissionError")

    def test_the_list_is_made_when_the_mailbox_is_ours(self) -> None:
        outer = self

        class Holders(dict):  # type: ignore[type-arg]
            def setdefault(self, *args: Any) -> Any:
                files(outer.folder)[0].unlink()  # another session has QUIT just now
                return super().setdefault(*args)

        self.send("Subject: one\n\n")
        self.send("Subject: two\n\n")
        with unittest.mock.patch.object(self.settings["maildir"], "holders", Holders()):
            self.play("""
                S: +OK ...
                C: USER bob@example.com
                S: +OK ...
                C: PASS x
                S: +OK 1 messages
            """)
            wait_until(lambda: not self.server.sessions)

    def login(self, messages: int) -> str:
        return f"""
            S: +OK ...
            C: USER bob@example.com
            S: +OK ...
            C: PASS x
            S: +OK {messages} messages
        """

    def test_top(self) -> None:
        self.send("Subject: x\n\none\n.two\nthree\n")
        head = "S: Return-Path: ...\nS: Delivered-To: ...\nS: Received: ...\nS: ...\nS: ..."
        for lines, text in [
            (0, "S:"),
            (2, "S:\nS: one\nS: ..two"),
            (99, "S:\nS: one\nS: ..two\nS: three"),
        ]:
            self.dialogue(f"""
                {self.login(1)}
                C: TOP 1 {lines}
                S: +OK ... octets
                {head}
                S: Subject: x
                {text}
                S: .
                C: TOP 1
                S: -ERR Syntax: TOP message lines
                C: TOP 2 0
                S: -ERR No such message...
                C: QUIT
                S: +OK Bye
            """)
            wait_until(lambda: not self.server.sessions)

    def test_what_mail_readers_try_is_no_error(self) -> None:
        self.play(f"{self.login(0)}\n{times(30, 'C: FROB' + chr(10) + 'S: -ERR Unknown verb...')}")

    def test_verbs_are_ascii(self) -> None:
        self.dialogue(r"""
            S: +OK ...
            C: USER bob@example.com
            S: +OK ...
            C: PA\xc3\x9f x
            S: -ERR Unknown verb...
        """)

    def test_odd_things_in_a_mailbox(self) -> None:
        self.send()
        new = Path(self.folder, "bob@example.com", "new")
        Path(new, "0.directory").mkdir()
        Path(new, "0.link").symlink_to("nowhere")
        self.play(f"{self.login(1)}\nC: STAT\nS: +OK 1 {self.size()}")

    def test_many_questions_in_one_packet(self) -> None:
        sizes: list[int] = []

        class Handler(mailserver.POP3Handler):
            def reply(self, code: int, *lines: str) -> None:
                super().reply(code, *lines)
                sizes.append(len(self.unsent))

        self.send()
        (file,) = files(self.folder)
        for n in range(499):
            os.link(file, f"{file}{n}")
        self.server = self.serve(handler=Handler, **self.settings)
        with self.connect() as client:
            client.converse(self.login(500))
            client.send(b"UIDL\r\n" * 100 + b"QUIT\r\n")
            client.skip_to("+OK Bye")
        self.assertGreater(len(sizes), 100)
        self.assertLess(max(sizes), 100_000)

    def test_short_lines_take_little_memory(self) -> None:
        self.send("x")
        (file,) = files(self.folder)
        for line, command in ((b".\n", "RETR 1"), (b"\n", "TOP 1 0"), (b".\n", "TOP 1 999999999")):
            file.write_bytes(b"Subject: x\n\n" + line * 2**20)
            with self.subTest(command), self.connect() as client:
                client.converse(self.login(1))
                dialogue = f"C: {command}\nS: +OK ..."
                peak = peak_memory(functools.partial(client.converse, dialogue))
                self.assertLess(peak, 40 * 2**20)
            wait_until(lambda: not self.server.sessions)

    def test_quit_deletes_what_it_can(self) -> None:
        for n in range(3):
            self.send(f"Subject: {n}\n\n")
        one, two, three = files(self.folder)
        real = os.unlink

        def unlink(path: Any) -> None:
            if Path(path) == one:
                raise PermissionError
            real(path)

        dele = "\n".join(f"C: DELE {n}\nS: +OK ..." for n in (1, 2, 3))
        two.unlink()  # a mail reader was quicker
        self.send("Subject: 3\n\n")
        with unittest.mock.patch.object(os, "remove", unlink):
            self.play(f"{self.login(3)}\n{dele}\nC: QUIT\nS: -ERR Bye, but 1 ...\nS: (closed)")
        self.assertEqual(files(self.folder), [one])

    def test_quit_that_is_refused_deletes_nothing(self) -> None:
        self.send()
        dele = "C: DELE 1\nS: +OK ...\nC: QUIT now\nS: -ERR Syntax: QUIT\nC: RSET\nS: +OK ..."
        self.play(f"{self.login(1)}\n{dele}\nC: STAT\nS: +OK 1 {self.size()}\nC: QUIT\nS: +OK Bye")
        self.assertEqual(len(files(self.folder)), 1)

    def test_a_file_that_a_mail_reader_deleted(self) -> None:
        self.send()
        client = self.open_mailbox()
        files(self.folder)[0].unlink()
        client.converse("C: DELE 1\nS: +OK ...\nC: QUIT\nS: +OK Bye\nS: (closed)")

    def test_holders_go_with_their_sessions(self) -> None:
        names = ["bob@example.com", f"{'x' * 250}@example.com", "ann@example.com"]
        for name in names:
            self.dialogue(
                f"S: +OK ...\nC: USER {name}\nS: ...\nC: PASS x\nS: ...\nC: USER a@b\nS: ..."
            )
        wait_until(lambda: not self.server.sessions)
        self.assertEqual(self.settings["maildir"].holders, {})

    def test_octets_on_the_console(self) -> None:
        self.send()
        console = Recorder()
        self.server = self.serve_pop3(console=console)
        client = self.open_mailbox()
        client.converse("C: RETR 1\nS: +OK ...")
        client.skip_to(".")
        wait_until(lambda: f"] -: {self.size()} octets sent" in console.text)
        console.lines.clear()
        client.converse("C: SUBSCRIBE\nS: +OK ...")
        self.send()
        client.skip_to(".")
        wait_until(lambda: f"] -: {self.size()} octets sent" in console.text)

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
        self.server = self.serve_pop3(tls=tls, users={"bob@example.com": "secret"})
        with self.connect() as client:
            client.converse("""
                S: +OK ...
                C: USER bob@example.com
                S: -ERR Send STLS before USER
                C: STLS
                S: +OK ...
            """)
            client.encrypt(self.context)
            client.converse("""
                C: USER bob@example.com
                S: +OK ...
                C: PASS secret
                S: +OK 0 messages
                C: SUBSCRIBE
                S: +OK ...
            """)
            self.send()
            client.expect("+OK ... octets")
            client.skip_to(".")
            client.converse("C: enough\nS: +OK ...\nC: QUIT\nS: +OK Bye")

    def test_poplib_and_smtplib_together(self) -> None:
        def talk(n: int) -> None:
            address = f"user{n}@example.com"
            for k in range(5):
                self.send(f"Subject: {n}-{k}\n\n{'x' * n}\n", address)
            client = poplib.POP3(*self.address)
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

    def test_curl(self) -> None:
        need("curl")
        self.send()
        url = "pop3://{}:{}/1".format(*self.address)
        command = ["curl", "-sS", "--user", "bob@example.com:x", url]
        done = subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
        self.assertIn(b"Subject: x\r\n\r\nhello\r\n", done.stdout)

    def test_subscribe(self) -> None:
        client = self.subscribe()
        self.send("Subject: one\n\n.\n")
        self.send("Subject: not for bob\n\n", "ann@example.com")
        client.converse(f"""
            S: +OK {self.size()} octets
            S: Return-Path: ...
            S: Delivered-To: ...
            S: ...
            S: ...
            S: ...
            S: Subject: one
            S:
            S: ..
            S: .
        """)
        self.send("Subject: two\n\n", "BOB@example.com")
        client.skip_to(".")
        client.converse("C: enough\nS: +OK ...\nC: STAT\nS: +OK 2 ...\nC: QUIT\nS: +OK Bye")
        wait_until(lambda: not self.server.sessions)
        self.assertEqual(len(self.settings["mailroom"].subscribers), 2)

    def test_mail_between_pass_and_subscribe(self) -> None:
        client = self.open_mailbox()
        self.send()
        client.converse("C: STAT\nS: +OK 0 0\nC: SUBSCRIBE\nS: +OK ...")
        client.expect(f"+OK {self.size()} octets")

    def test_a_subscriber_that_leaves(self) -> None:
        class Handler(mailserver.POP3Handler):
            def reply(self, code: int, *lines: str) -> None:
                super().reply(code, *lines)
                if lines == ("Send a line to stop",):
                    raise mailserver.Gone

        self.subscribe().close()
        wait_until(lambda: not self.server.sessions)
        self.server = self.serve(handler=Handler, **self.settings)
        subscribers = list(self.server.mailroom.subscribers)
        self.open_mailbox().send(b"SUBSCRIBE\r\n")
        wait_until(lambda: not self.server.sessions)
        self.assertEqual(self.server.mailroom.subscribers, subscribers)

    def test_half_a_line_does_not_end_a_subscription(self) -> None:
        client = self.subscribe()
        client.send(b"\xff\xfd\x06enou")  # telnet's Ctrl-C, and a line that is being typed
        (session,) = self.server.sessions
        wait_until(lambda: session.received)
        self.send()
        client.skip_to(".")
        client.send(b"gh\r\0")
        client.expect("+OK Stopped")

    def test_a_long_line_ends_a_subscription(self) -> None:
        client = self.subscribe()
        client.send(b"x" * 100_000)
        (session,) = self.server.sessions
        wait_until(lambda: not self.server.mailroom.subscribers[2:])
        client.send(b"\r\n")
        client.expect("-ERR Line too long...")

    def test_the_mailbox_is_free_before_the_reply_to_quit(self) -> None:
        holders = self.settings["maildir"].holders

        class Handler(mailserver.POP3Handler):
            def reply(self, code: int, *lines: str) -> None:
                held.append(len(holders))
                super().reply(code, *lines)

        held: list[int] = []
        self.server = self.serve(handler=Handler, **self.settings)
        self.play(f"{self.login(0)}\nC: QUIT\nS: +OK Bye")
        self.assertEqual(held, [0, 0, 1, 0])

    def test_mail_that_is_deleted_before_it_is_sent(self) -> None:
        class Handler(mailserver.POP3Handler):
            def look(self) -> list[str]:
                names = super().look()
                for name in names[:1]:
                    self.box.remove(name)  # type: ignore[union-attr]
                return names

        self.server = self.serve(handler=Handler, **self.settings)
        client = self.open_mailbox()
        self.send()
        self.send()
        client.converse(f"C: SUBSCRIBE\nS: +OK ...\nS: +OK {self.size()} octets")
        client.skip_to(".")
        client.converse("C: enough\nS: +OK Stopped")

    def test_mail_that_is_moved_while_the_mailbox_is_read(self) -> None:
        self.send()
        (file,) = files(self.folder)
        # When new/ is read, the message is in cur/; when cur/ is read, it is still in new/.
        keys = unittest.mock.Mock(side_effect=[[], [file.name]])
        with unittest.mock.patch.object(mailbox.Maildir, "keys", keys):
            self.play(f"{self.login(1)}\nC: LIST 1\nS: +OK 1 {self.size()}")

    def test_stopping_ends_subscriptions(self) -> None:
        self.server = self.serve_pop3(timeout=0.5)
        client, idle = self.subscribe(), self.connect()
        idle.converse("S: +OK ...\nS: -ERR Nothing heard...\nS: (closed)")
        self.send()  # whoever waits for mail is not idle
        client.skip_to(".")
        self.server.stop()
        client.converse("S: -ERR The server is stopping...\nS: (closed)")

    def test_a_hundred_subscribers(self) -> None:
        # One session a mailbox is the rule, so they say so here: each has the same recipient.
        with unittest.mock.patch.object(self.settings["maildir"], "holders", AlwaysFree()):
            clients = [self.subscribe() for _ in range(100)]
            self.send()
            for client in clients:
                client.skip_to(".")
            self.server.stop()

    def slow_subscriber(self, timeout: float) -> tuple[Client, Recorder]:
        """Return a client that does not read its mail, of which there is too much."""
        console = Recorder()
        self.server = self.serve_pop3(console=console, timeout=timeout)
        client = self.subscribe()
        (session,) = self.server.sessions
        for _ in range(30):  # the kernel takes some of it; the senders wait for nobody
            self.send(f"{'x' * 1023}\n" * 1024)
            self.assertLess(len(session.unsent), 2 * 2**20)
        return client, console

    def test_a_subscriber_that_does_not_read(self) -> None:
        _, console = self.slow_subscriber(0.5)
        wait_until(lambda: not self.server.sessions)
        self.assertIn("(cut off: it read nothing for too long)", console.text)
        self.assertEqual(len(files(self.folder)), 30)

    def test_a_subscriber_that_reads_slowly(self) -> None:
        client, _ = self.slow_subscriber(60)
        for _ in range(30):
            client.skip_to(".")
        client.converse("C: enough\nS: +OK ...\nC: STAT\nS: +OK 30 ...")


class AlwaysFree(dict):  # type: ignore[type-arg]
    """The holders of mailboxes that anybody may open."""

    def setdefault(self, key: Any, value: Any = None) -> Any:
        return value

    def __delitem__(self, key: Any) -> None:
        pass


class FuzzTest(DialogueTest):
    """Random and mutated input; the seeds are fixed, so a failure comes again."""

    pieces = [line.data for line in read_lines(CLASSIC) if line.who == "C"]
    pieces += [b"\n.\n", b"\r\n.\r\n", b".", b"\r", b"\n", b"\xff\xfa", b"\b\b", b"EHLO x\r\n"]
    pieces += [
        b"AUTH PLAIN\r\n",
        b"*\r\n",
        b"A" * 600,
        b"\0",
        b"RSET\r\n",
        b"\x80\xfe",
        b"HELP\r\n",
    ]

    def test_random_input(self) -> None:
        before = threading.active_count()
        for seed in range(150):
            chance = random.Random(seed)
            data = bytearray().join(chance.choices(self.pieces, k=chance.randint(1, 25)))
            for _ in range(chance.randint(0, 6)):
                at = chance.randrange(len(data))
                data[at : at + chance.randint(0, 3)] = chance.randbytes(chance.randint(0, 3))
            with self.connect() as client:
                client.send(bytes(data))
                if chance.random() < 0.7:
                    client.end_input()
                    client.skip_to("(closed)")
        self.dialogue(CLASSIC)
        wait_until(lambda: threading.active_count() <= before and not self.server.sessions)


# ==================================================================================================
# THE TESTS: part 6, the program


class Process:
    """A program in a process of its own; it prints its port."""

    def __init__(self, *flags: str, script: str = str(HERE / "mailserver.py")) -> None:
        # Files, not pipes: a pipe that nobody reads would stop the program.
        self.folder = tempfile.TemporaryDirectory()
        self.files = [open(os.path.join(self.folder.name, name), "wb") for name in ("out", "err")]
        command = [sys.executable, "-u", script, *flags]
        self.process = subprocess.Popen(command, stdout=self.files[0], stderr=self.files[1])
        wait_until(lambda: "\n" in self.printed or self.process.poll() is not None)
        match = re.search(r"port (\d+)", self.printed)
        assert match, self.printed + self.warned
        self.address = ("127.0.0.1", int(match[1]))

    @property
    def printed(self) -> str:
        """What the program has written to stdout so far."""
        return Path(self.folder.name, "out").read_text(encoding="utf-8")

    @property
    def warned(self) -> str:
        """What the program has written to stderr so far."""
        return Path(self.folder.name, "err").read_text(encoding="utf-8")

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
        for file in self.files:
            file.close()
        self.folder.cleanup()


@contextlib.contextmanager
def unchanged_process() -> Iterator[dict[str, Any]]:
    """Keep main() from changing the process that runs the tests: its cores, limits and signals.
    Give the functions in whose place it calls nothing."""
    names = ["os.sched_setaffinity", "resource.setrlimit", "signal.set_wakeup_fd", "signal.signal"]
    instead = {}
    with contextlib.ExitStack() as stack:
        for name in names:
            with contextlib.suppress(AttributeError, ImportError):  # this system lacks it
                instead[name] = stack.enter_context(unittest.mock.patch(name))
        yield instead


class PlainTerminal(mailserver.Console):
    """A console in place of the Terminal: it needs no thread."""

    def close(self) -> None:
        pass


class Started(Exception):
    """Raised in place of serving."""


def run_main(*flags: str, calls: dict[str, Any] | None = None) -> tuple[Any, str, str]:
    """Call main(), up to where it would serve. Return its status, "started" if it got there, and
    what went to stdout and stderr. calls: takes what stood in for the functions that change a
    process."""
    status: Any = 0
    with (
        unchanged_process() as instead,
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
        unittest.mock.patch.object(mailserver, "Terminal", PlainTerminal),
        unittest.mock.patch.object(MailServer, "start", side_effect=Started),
    ):
        warnings.simplefilter("ignore", ResourceWarning)  # the end of a program closes all sockets
        try:
            mailserver.main([*flags])
        except SystemExit as end:
            status = end.code
        except Started:
            status = "started"
    if calls is not None:
        calls.update(instead)
    return status, out.getvalue(), err.getvalue()


class FlagTest(unittest.TestCase):
    """The command line, without a process of its own."""

    def refused(self, *flags: str, parts: list[str]) -> None:
        """Check that main() ends with status 2, and one line on stderr that has these parts."""
        with self.subTest(flags):
            status, out, err = run_main("--port", "0", *flags)
            self.assertEqual((status, out), (2, ""))
            self.assertRegex(err, "^mailserver: .*; see --help\n$")
            for part in parts:
                self.assertIn(part, err)
            if "--host" not in flags and "--port" not in flags:
                self.assertNotIn("--host", err)

    def test_bad_flags(self) -> None:
        for flags, parts in [
            ("--port x", ["--port", "'x'"]),
            ("--timeout x", ["--timeout", "'x'"]),
            ("--timeout 0", ["--timeout", "0 is not above 0"]),
            ("--max-size -1", ["--max-size", "-1 is not above 0"]),
            ("--max-clients 0", ["--max-clients", "0 is not above 0"]),
            ("--fail RCPT", ["--fail", "RCPT", "400 to 599"]),
            ("--fail RCPT=250", ["--fail", "RCPT=250", "400 to 599"]),
            ("--fail RCPT=600", ["--fail", "RCPT=600", "400 to 599"]),
            ("--fail RCPT=no", ["--fail", "RCPT", "400 to 599"]),
            (f"--fail RCPT={'4' * 5000}", ["--fail", "RCPT", "400 to 599"]),
            ("--host \udcff", ["host"]),
            ("--fail RCTP=450", ["--fail", "RCTP=450", "not a command"]),
            ("--list team", ["--list team", "team=ann@example.com"]),
            ("--list team=", ["--list team", "team=ann@example.com"]),
            ("--list team=ann", ["--list team=ann ", "team=ann@example.com"]),
            ("--frob", ["--frob"]),
        ]:
            self.refused(*flags.split(), parts=parts)

    def test_bad_addresses(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as busy:
            port = str(busy.getsockname()[1])
            self.refused("--port", port, parts=[f"--port {port}"])
        self.refused("--port", "65536", parts=["--port 65536", "65535"])
        self.refused("--host", "nowhere.invalid", parts=["--host nowhere.invalid"])
        self.refused("--host", "192.0.2.1", parts=["--host 192.0.2.1"])
        with tempfile.TemporaryDirectory() as folder:
            flags = ("--maildir", folder, "--pop3-port", "65536")
            self.refused(*flags, parts=["--pop3-port 65536", "65535"])

    def test_bad_files(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            bad, nameless, nobody, none, latin = (Path(folder, name) for name in "12345")
            latin.write_bytes(b"bob:secret\nann:caf\xe9\n")
            bad.write_text("ann:secret\nbob\n", encoding="utf-8")
            nameless.write_text(":secret\n", encoding="utf-8")
            nobody.write_text("\n# ann:secret\n", encoding="utf-8")
            for flags, part in [
                (("--users", bad), "line 2"),
                (("--users", latin), "line 2 is not name:password in UTF-8"),
                (("--users", none), f"{none}: "),
                (("--users", nameless), "line 1"),
                (("--users", nobody), "nobody is named"),
                (("--tls", bad, bad), "--tls"),
                (("--tls", bad, none), f"{none}: "),
                (("--tls", none, bad), f"{none}: "),
                (("--maildir", bad), f"{bad}: "),
            ]:
                self.refused(*map(str, flags), parts=[str(flags[0]), part])

    def test_flags_that_need_each_other(self) -> None:
        self.refused("--pop3-port", "0", parts=["--pop3-port", "--maildir"])

    def test_users(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            good = Path(folder, "good")
            good.write_text("# who\n\nann:secret\n bob : pass:word \n", encoding="utf-8")
            users = mailserver.read_users(str(good))
        self.assertEqual(users, {"ann": "secret", "bob ": " pass:word"})

    @unittest.skipUnless(hasattr(os, "sched_setaffinity"), "this system has no such call")
    def test_one_core(self) -> None:
        calls: dict[str, Any] = {}
        run_main("--port", "0", calls=calls)
        ((who, cores),) = [call.args for call in calls["os.sched_setaffinity"].call_args_list]
        self.assertEqual((who, len(cores)), (0, 1))
        self.assertLessEqual(set(cores), os.sched_getaffinity(0))

    def test_an_older_python(self) -> None:
        code = "import sys; sys.version_info = (3, 9); import mailserver"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=False
        )
        said = (done.returncode, done.stdout, done.stderr)
        self.assertEqual(said, (2, "", "mailserver needs Python 3.10 or newer\n"))

    def test_help_and_version(self) -> None:
        for flag, text in [("--help", "Try: mailserver.py"), ("--version", mailserver.__version__)]:
            status, out, err = run_main(flag)
            self.assertEqual((status, err), (0, ""))
            self.assertIn(text, out)

    def test_help_explains_each_flag(self) -> None:
        out = run_main("--help")[1]
        _, about, options = out.partition("A mail server")
        self.assertRegex(about + options.split("\n\n")[0], "learn|test")
        entries = re.split(
            r"\n  (?=-)", options.partition("options:")[2].partition("Try: mailserver.py")[0]
        )
        self.assertGreater(len(entries), 12)
        for entry in entries[1:]:
            self.assertRegex(entry, r"--[a-z0-9-]+.*\s{2,}\w+.*\w", entry)
        self.assertRegex(out, r"\nTry: mailserver\.py --fail RCPT=450")

    @unittest.skipIf(os.name == "nt", "Windows has no such limit")
    def test_a_limit_for_two_servers(self) -> None:
        for soft, hard, new in [(256, 8192, 4096), (1024, 1024, 1024), (9000, 9000, 9000)]:
            calls: dict[str, Any] = {}
            with unittest.mock.patch("resource.getrlimit", return_value=(soft, hard)):
                run_main("--port", "0", calls=calls)
            self.assertEqual(calls["resource.setrlimit"].call_args.args[1], (new, hard))


class OptimisedTest(unittest.TestCase):
    """python -OO, which leaves docstrings and assertions out."""

    def test_help_and_version(self) -> None:
        for flag, text in [("--help", "Try: mailserver.py"), ("--version", mailserver.__version__)]:
            command = [sys.executable, "-OO", str(HERE / "mailserver.py"), flag]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            self.assertIn(text, out)

    def test_replies(self) -> None:
        script = """
            import threading, smtplib, mailserver
            with mailserver.MailServer(("127.0.0.1", 0)) as server:
                server.start()
                with smtplib.SMTP(*server.server_address) as client:
                    print(client.docmd("MAIL", "x")[1].decode())
                    print(client.docmd("HELO")[1].decode())
        """
        command = [sys.executable, "-OO", "-c", textwrap.dedent(script)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE)
        self.assertIn("Send HELO", done.stdout)
        self.assertIn("Syntax: HELO", done.stdout)


@unittest.skipIf(os.name == "nt", "signals are sent the Unix way here")
class ProcessTest(unittest.TestCase):
    def test_signals(self) -> None:
        modes: list[list[str]] = [[], ["--serial"]]
        for number, mode in itertools.product((signal.SIGINT, signal.SIGTERM), modes):
            with self.subTest(number=number, mode=mode), Process("--port", "0", *mode) as server:
                with Client(server.address) as client:
                    client.converse("S: 220 ...\nC: HELO x\\r\\nNOO\\c\nS: 250 Hello")
                    status = server.end(number, number, signal.SIGINT)
                    client.converse("S: 421 ...\nS: (closed)")
                self.assertEqual((status, server.warned), (0, ""))
                with socket.socket() as again:
                    again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    again.bind(server.address)

    def test_what_it_prints(self) -> None:
        with Process("--port", "0") as server:
            with smtplib.SMTP(*server.address, local_hostname="ann.example.com") as client:
                client.sendmail("a@example.com", "b@example.com", "Subject: x\n\nhello\n")
            status = server.end(signal.SIGINT)
            out, err = server.printed, server.warned
        self.assertIn("listens on 127.0.0.1 port", out)
        self.assertIn("telnet 127.0.0.1", out)
        self.assertIn("Ctrl-C", out)
        self.assertIn("\n[1 ann] S: 250 OK\n", out)
        shown = ["---- envelope", "from <a@example.com>", "to   <b@example.com>", "---- message"]
        shown += ["| Subject: x", "| ", "| hello", "----"]
        self.assertIn("".join(f"\n[1 ann] {line}" for line in shown), out)
        self.assertNotIn("\x1b", out)
        self.assertEqual((status, err), (0, ""))

    def test_quiet(self) -> None:
        with Process("--port", "0", "--quiet") as server:
            with smtplib.SMTP(*server.address) as client:
                client.sendmail("a@example.com", "b@example.com", "hello")
            self.assertEqual(server.end(signal.SIGINT), 0)
            self.assertRegex(server.printed, "^mailserver .* listens on .*\n$")
            self.assertEqual(server.warned, "")

    def test_reachable_from_other_machines(self) -> None:
        with Process("--port", "0", "--host", "0.0.0.0") as server:
            wait_until(lambda: "Stop:" in server.printed)
            server.end(signal.SIGINT)
            self.assertIn("other machines can reach", server.warned)
            (host,) = re.findall(r"telnet (\S+) [0-9]+\n", server.printed)
            self.assertRegex(host, r"^[0-9]+(\.[0-9]+){3}$|^::1$")
            if self.has_a_route():
                self.assertNotEqual(host, "0.0.0.0")

    def has_a_route(self) -> bool:
        """Tell whether this machine could send to another one."""
        with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as udp:
            udp.connect(("192.0.2.1", 9))
            return True
        return False

    def test_a_long_timeout(self) -> None:
        for timeout in ("3000000", "9" * 400):
            with Process("--port", "0", "--timeout", timeout) as server:
                play(server.address, CLASSIC)
                self.assertEqual((server.end(signal.SIGINT), server.warned), (0, ""))

    def test_a_terminal_without_the_letters(self) -> None:
        ascii_only = unittest.mock.patch.dict(os.environ, {"PYTHONIOENCODING": "ascii"})
        with ascii_only, Process("--port", "0") as server:
            play(server.address, "S: 220 ...\nC: h\u00e9 \u20ac\nS: 500 ...")
            server.end(signal.SIGINT)
            self.assertIn(r"h\xe9 \u20ac", server.printed)

    def test_a_thousand_idle_clients(self) -> None:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, hard))  # the server has to raise it
        with Process("--port", "0", "--quiet") as server, contextlib.ExitStack() as stack:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
            for _ in range(1000):
                client = stack.enter_context(Client(server.address))
                client.expect("220 Simple Mail Server")
            with smtplib.SMTP(*server.address, timeout=PATIENCE) as sender:
                sender.sendmail("a@example.com", "b@example.com", "hello")

    def test_a_full_disk(self) -> None:
        import resource

        if not hasattr(resource, "prlimit"):
            self.skipTest("this system cannot limit another process")
        limit = (2000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        with tempfile.TemporaryDirectory() as folder:
            with Process("--port", "0", "--quiet", "--maildir", folder) as server:
                resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, limit)
                with smtplib.SMTP(*server.address, timeout=PATIENCE) as client:
                    with self.assertRaises(smtplib.SMTPDataError) as caught:
                        client.sendmail("a@example.com", "b@example.com", "x" * 5000)
                    self.assertEqual(caught.exception.smtp_code, 452)
                    client.sendmail("a@example.com", "b@example.com", "small")
            self.assertEqual(len(files(folder)), 1)

    @unittest.skipUnless(os.path.isdir("/proc/self/fd"), "this system does not list descriptors")
    def test_no_file_descriptor_left_to_keep_mail(self) -> None:
        import resource

        with tempfile.TemporaryDirectory() as folder:
            with Process("--port", "0", "--quiet", "--maildir", folder) as server:
                pid = server.process.pid
                with Client(server.address) as client:
                    client.converse(f"{ENVELOPE}\n{DATA}\nC: hello")
                    used = max(map(int, os.listdir(f"/proc/{pid}/fd"))) + 1
                    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
                    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used, hard))
                    client.converse("C: .\nS: 451 Not kept...")
                    self.assertEqual(files(folder), [])
                    resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
                    client.converse(f"{MAIL}\n{DATA}\n{MESSAGE}")
            self.assertEqual(len(files(folder)), 1)

    def test_part_1_runs_alone(self) -> None:
        part_1 = re.split(r"\n# =+\n# PART 2", source())[0]
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder, "small.py")
            script.write_text(part_1 + "\n\nserve(0)\n", encoding="utf-8")
            with Process(script=str(script)) as server:
                for dialogue in read_dialogues(COURSE):
                    if dialogue.level < "Level 3":
                        play(server.address, dialogue.text, dialogue.way)
                self.assertEqual(server.end(signal.SIGINT), 0)
                self.assertIn("to ['recipient@example.com']", server.printed)


@unittest.skipIf(os.name == "nt", "programs are redirected the Unix way here")
class StuckTest(unittest.TestCase):
    """What becomes of a server whose stdout or stderr takes nothing."""

    many = times(9000, "C: NOOP\nS: 250 OK")  # more than a pipe and the Terminal's queue hold

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.script = Path(folder.name, "fails.py")
        self.script.write_text(
            "import mailserver\n\n\n"
            "class Handler(mailserver.SecureHandler):\n"
            "    def do_FAIL(self, arg):\n"
            "        raise ValueError\n\n\n"
            "mailserver.main(handler=Handler)\n",
            encoding="utf-8",
        )

    def start(self, redirection: str, *flags: str) -> tuple[subprocess.Popen[bytes], Any]:
        """Start the program with a redirection of the shell; return it and its address."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = free.getsockname()
        environment = {**os.environ, "PYTHONPATH": str(HERE)}
        environment.pop("PYTHONUNBUFFERED", None)  # would hide what a full buffer does
        command = f'exec "$0" "$@" {redirection}'
        argv = [sys.executable, str(self.script), "--port", str(address[1]), *flags]
        # ours is the end of a pipe that nobody reads
        program = subprocess.Popen(
            ["sh", "-c", command, *argv], env=environment, stdout=subprocess.PIPE
        )
        assert program.stdout
        self.addCleanup(program.stdout.close)
        self.addCleanup(program.wait, PATIENCE)
        self.addCleanup(program.kill)
        wait_until(lambda: self.answers(address))
        return program, address

    def answers(self, address: Any) -> bool:
        with contextlib.suppress(OSError), Client(address) as client:
            return client.line().startswith("220")
        return False

    def end(self, program: subprocess.Popen[bytes]) -> None:
        program.send_signal(signal.SIGTERM)
        self.assertEqual(program.wait(PATIENCE), 0)

    def test_a_terminal_that_is_stuck(self) -> None:
        program, address = self.start("")
        play(address, f"S: 220 ...\n{self.many}", IN_ONE_PIECE)
        play(address, CLASSIC)
        self.end(program)

    def test_a_terminal_that_goes_on(self) -> None:
        program, address = self.start("")
        play(address, f"S: 220 ...\n{self.many}", IN_ONE_PIECE)
        assert program.stdout
        lines: list[bytes] = []
        reader = threading.Thread(target=lines.extend, args=(program.stdout,), daemon=True)
        reader.start()
        wait_until(lambda: any(b"not shown" in line for line in lines))
        play(address, CLASSIC)
        wait_until(lambda: lines[-1].endswith(b"S: 221 Bye\n"))
        for missing in [line for line in lines if b"not shown" in line]:  # one, or two in turn
            self.assertRegex(missing, rb"^\.\.\. [0-9]+ lines not shown\n$")
        self.end(program)
        reader.join(PATIENCE)

    def test_nowhere_to_print(self) -> None:
        errors = self.script.with_name("errors")
        for redirection in (
            f">&- 2>{errors}",
            f">/dev/full 2>{errors}",
            "2>&-",
            "2>/dev/full",
            ">/dev/full 2>/dev/full",
        ):
            with self.subTest(redirection):
                errors.write_text("", encoding="utf-8")
                program, address = self.start(redirection, "--host", "0.0.0.0")
                play(address, CLASSIC)
                play(address, "S: 220 ...\nC: FAIL\nS: 421 The server failed...\nS: (closed)")
                play(address, CLASSIC)
                self.end(program)
                for line in errors.read_text(encoding="utf-8").splitlines():
                    self.assertRegex(line, "^mailserver: (other machines|session .* failed)")


@unittest.skipIf(os.name == "nt", "processes are killed the Unix way here")
class KillTest(unittest.TestCase):
    """kill -9 in the middle of twenty senders; then the same directory serves POP3."""

    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name
        self.flags = ["--port", "0", "--quiet", "--maildir", self.folder, "--pop3-port", "0"]
        self.accepted: list[str] = []

    def send(self, address: tuple[str, int], n: int) -> None:
        """Send mail, and note what was accepted, until the server is gone."""
        with (
            contextlib.suppress(OSError, smtplib.SMTPException),
            smtplib.SMTP(*address, timeout=PATIENCE) as client,
        ):
            for k in range(1000):
                text = f"Subject: {n}-{k}\n\n{'x' * 2000}\nend\n"
                client.sendmail("a@example.com", "b@example.com", text)
                self.accepted.append(f"{n}-{k}")

    def send_until_killed(self) -> None:
        with Process(*self.flags) as server:
            threads = [
                threading.Thread(target=self.send, args=(server.address, n)) for n in range(20)
            ]
            for thread in threads:
                thread.start()
            wait_until(lambda: len(self.accepted) > 100)
            server.process.kill()
            for thread in threads:
                thread.join(PATIENCE)

    def test_no_message_is_lost(self) -> None:
        self.send_until_killed()
        stored = [path.read_text() for path in Path(self.folder, "b@example.com", "new").iterdir()]
        subjects = [re.findall("^Subject: (.*)", text, re.MULTILINE)[0] for text in stored]
        self.assertTrue(all(text.endswith("x\nend\n") for text in stored), "half a message")
        self.assertEqual(len(subjects), len(set(subjects)), "a message came twice")
        self.assertEqual(set(self.accepted) - set(subjects), set(), "a message is lost")
        with Process(*self.flags) as server:
            port = int(re.findall(r"POP3 on port (\d+)", server.printed)[0])
            client = poplib.POP3("127.0.0.1", port, timeout=PATIENCE)
            client.user("b@example.com")
            client.pass_("x")
            self.assertEqual(client.stat()[0], len(stored))
            client.quit()


# ==================================================================================================
# THE TESTS: README, the judge and the traps


LAB = {"lists": {"team": ["ann@x.org", "bob@x.org"]}}  # what README's lab has its server know


@contextlib.contextmanager
def working_directory(folder: str) -> Iterator[None]:
    """Work in a folder for a while."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def readme() -> str:
    """Return the text of README.md."""
    return (HERE / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> dict[str, str]:
    """Return the blocks of README that are in a language, with the mark in the line before each:
    {code: "needs a server"}."""
    pattern = rf"(?:^<!-- (.*) -->\n)?^```{language}\n((?:.*\n)*?)^```"
    return {code: mark for mark, code in re.findall(pattern, readme(), re.MULTILINE)}


def block_with(words: str) -> str:
    """Return the first block of README's Python code that has these words in it."""
    return next(code for code in blocks("python") if words in code)


class PlugTimer:
    """What README's program to pull the plug has as its Timer: it waits for mail, not for time."""

    def __init__(self, _: float, function: Callable[[], None]) -> None:
        self.function = function

    def start(self) -> None:
        threading.Thread(target=self.run, args=(Path.cwd(),), daemon=True).start()

    def run(self, folder: Path) -> None:
        wait_until(lambda: len([*folder.glob("*/*/new/*")]) > 5)
        self.function()


class ReadmeTest(DialogueTest):
    """What README says is so. The server is the one of its lab."""

    settings = LAB

    def dialogues(self, kind: str) -> list[str]:
        """Give the dialogues that are to be played with a kind of server; "": the usual one."""
        found = []
        for dialogue in read_dialogues(readme()):
            mark = re.search("played with: (\\w+)", dialogue.title)
            if (mark[1] if mark else "") == kind:
                found.append(dialogue.text)
        return found

    def test_all_dialogues_are_found(self) -> None:
        shown = [text for text in blocks("text") if re.search("^[CS]: ", text, re.MULTILINE)]
        self.assertEqual(len(read_dialogues(readme())), len(shown))

    def test_dialogues(self) -> None:
        self.assertGreaterEqual(len(self.dialogues("")), 4)
        for text in self.dialogues(""):
            with self.subTest(text):
                self.dialogue(text)

    def test_dialogues_with_users(self) -> None:
        self.server = self.serve(users={"ann": "secret"}, require_auth=True)
        (text,) = self.dialogues("users")
        self.dialogue(text)

    def test_dialogue_with_an_end(self) -> None:
        (text,) = self.dialogues("stop")
        before, _, last = text.rpartition("\n")
        with self.connect() as client:
            client.converse(before)
            self.server.stop()
            client.converse(f"{last}\nS: (closed)")

    def test_dialogues_with_pop3(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        maildir = mailserver.Maildir(folder.name)
        smtp = self.serve(maildir=maildir)
        pop3 = self.serve(handler=mailserver.POP3Handler, maildir=maildir, mailroom=smtp.mailroom)
        before, after = self.dialogues("subscriber")
        (message,) = self.dialogues("sender")
        self.server = pop3
        with self.connect() as client:
            client.converse(before)
            self.server = smtp
            self.play(message)
            client.converse(after)
        wait_until(lambda: not pop3.sessions)
        self.server = pop3
        for text in self.dialogues("pop3"):
            self.play(text)

    def run_code(self, code: str) -> str:
        """Run a block in an empty folder with mailserver.py in it; return what it prints."""
        names: dict[str, Any] = {}
        with (
            contextlib.redirect_stdout(io.StringIO()) as out,
            tempfile.TemporaryDirectory() as folder,
            working_directory(folder),
            unittest.mock.patch.object(tempfile, "tempdir", folder),
        ):
            shutil.copy(HERE / "mailserver.py", folder)
            try:
                exec(compile(code, "README.md", "exec"), names)
            finally:
                if "server" in names:
                    names["server"].stop()
                if "program" in names:
                    names["program"].communicate()
        return out.getvalue()

    def test_code(self) -> None:
        apart = ("main(handler", "plug@example.com")
        codes = [code for code, mark in blocks("python").items() if not mark]
        codes = [code for code in codes if not any(words in code for words in apart)]
        self.assertGreater(len(codes), 7)
        for code in codes:
            with self.subTest(code):
                self.run_code(code)

    def test_code_that_needs_a_server(self) -> None:
        codes = [code for code, mark in blocks("python").items() if mark == "needs a server"]
        self.assertEqual(len(codes), 2)
        shown = []
        for code in codes:
            command = [sys.executable, "-c", code.replace("2525", str(self.server.port))]
            done = subprocess.run(
                command,
                input="QUIT\n",
                stdout=-1,
                stderr=-1,
                text=True,
                timeout=PATIENCE,
                check=False,
            )
            shown.append(done.stdout)
        self.assertEqual(shown[0], "220 Simple Mail Server\n221 Bye\n")
        self.assertRegex(shown[1], "^[0-9]+")

    def test_fixture(self) -> None:
        pytest = types.ModuleType("pytest")
        vars(pytest)["fixture"] = contextlib.contextmanager
        names: dict[str, Any] = {}
        with unittest.mock.patch.dict(sys.modules, pytest=pytest):
            exec(compile(block_with("@pytest.fixture"), "README.md", "exec"), names)
        tests = [names[name] for name in names if name.startswith("test_")]
        self.assertGreater(len(tests), 0)
        for test in tests:
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.ExitStack() as stack:
                wanted = inspect.signature(test).parameters
                test(*(stack.enter_context(names[name]()) for name in wanted))
            self.assertIn("C: ", out.getvalue())  # the dialogue, for when it fails

    def test_the_first_dialogue(self) -> None:
        first = next(iter(blocks("text")))
        self.assertIn(textwrap.indent(first, "    "), mailserver.__doc__ or "")
        self.assertEqual(f"{first}S: (closed)", CLASSIC)

    @unittest.skipIf(os.name == "nt", "programs are ended in another way there")
    def test_pull_the_plug(self) -> None:
        code = block_with("plug@example.com")
        with unittest.mock.patch.object(threading, "Timer", PlugTimer):
            out = self.run_code(code)
        accepted, _, new = map(int, re.findall("(?m)^[0-9]+", out))
        self.assertIn(new - accepted, (0, 1))
        self.assertGreater(new, 0)

    @unittest.skipIf(os.name == "nt", "signals are sent the Unix way here")
    def test_add_a_command(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder, "mine.py")
            script.write_text(block_with("def do_TIME"), encoding="utf-8")
            path = unittest.mock.patch.dict(os.environ, {"PYTHONPATH": str(HERE)})
            with path, Process("--port", "0", script=str(script)) as server:
                play(server.address, "S: 220 ...\nC: TIME\nS: 250 ...:...:...")

    def test_flags(self) -> None:
        out = run_main("--help")[1]
        flags = set(re.findall(r"^  (?:-h, )?(--[a-z0-9-]+)", out, re.MULTILINE)) - {"--help"}
        self.assertGreater(len(flags), 8)
        for flag in flags:
            self.assertRegex(readme(), rf"\| `{flag}\b", "README's table of flags lacks it")


class OtherServer:
    """A server that is none of ours: it runs a function with each client, one after the other."""

    def __init__(self, function: Callable[[socket.socket], object]) -> None:
        self.function = function
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.name = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        while True:
            try:
                client = self.listener.accept()[0]
            except OSError:
                return  # stop() has closed it
            with client, contextlib.suppress(OSError):
                self.function(client)

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


class JudgeTest(DialogueTest):
    """The judge, of our own server and of others."""

    def judge(self, *argv: str) -> tuple[Any, str]:
        """Run the command; give its exit status, and all that it prints."""
        with (
            contextlib.redirect_stdout(io.StringIO()) as out,
            contextlib.redirect_stderr(out),
        ):
            try:
                return play_command([*argv]), out.getvalue()
            except SystemExit as end:
                return end.code, out.getvalue()

    def judge_text(self, dialogues: str, *argv: str) -> tuple[Any, str]:
        """Play dialogues with our own server, from a file."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "mine.txt")
            file.write_text(dialogues, encoding="utf-8")
            return self.judge("{}:{}".format(*self.address), str(file), *argv)

    def judge_other(self, function: Callable[[socket.socket], object]) -> tuple[Any, str]:
        """Play the classic dialogue with a server that runs a function with each client."""
        server = OtherServer(function)
        self.addCleanup(server.stop)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "mine.txt")
            file.write_text(CLASSIC, encoding="utf-8")
            return self.judge(server.name, str(file), "--patience", "0.1")

    def test_our_own_server(self) -> None:
        with unittest.mock.patch(f"{__name__}.PAUSE", 0):
            for letter in ([], ["--letter"]):
                status, out = self.judge("{}:{}".format(*self.address), *letter)
                self.assertEqual(status, 0, out)
                self.assertNotIn("FAILED", out)
                self.assertRegex(out, r": level 6 of 6; (\d+) of \1 dialogues passed\n$")

    def test_a_file(self) -> None:
        status, out = self.judge_text("first\nS: 220 Hi\nC: NOOP\nS: 250 Yes\n\nsecond\nS: 2.. Hi")
        self.assertEqual(status, 0, out)
        self.assertIn("passed  line 2: first\n", out)
        self.assertIn("passed  line 7: second\n", out)
        self.assertIn("2 of 2 dialogues passed", out)

    def test_to_the_letter(self) -> None:
        status, out = self.judge_text("first\nS: 220 ...\nC: NOOP\nS: 250 Yes", "--letter")
        self.assertEqual(status, 1)
        self.assertIn("FAILED  line 2: first\n", out)
        self.assertIn("line 4, after C: NOOP\n", out)
        self.assertRegex(out, "expected  S: 250 Yes\n +came      S: 250 OK\n")
        self.assertIn("0 of 1 dialogues passed", out)

    def test_readme(self) -> None:
        self.server = self.serve(**LAB)
        status, out = self.judge("{}:{}".format(*self.address), str(HERE / "README.md"))
        self.assertEqual(status, 0, out)

    def test_a_server_that_says_nothing(self) -> None:
        status, out = self.judge_other(lambda client: client.recv(1000))
        self.assertEqual(status, 1)
        self.assertRegex(out, r"expected  S: 220 .*\n +came      S: \(nothing in 0.1 seconds\)")

    def test_a_server_that_hangs_up(self) -> None:
        status, out = self.judge_other(lambda client: client.sendall(b"220 Hi\r\n"))
        self.assertEqual(status, 1)
        self.assertRegex(out, r"expected  S: 250 .*\n +came      S: \(closed\)")

    def test_a_server_that_talks_nonsense(self) -> None:
        for nonsense, shown in [
            (b"220 Hi\n", r"220 Hi\\n"),
            (b"220Hi\r\n", "220Hi"),
            (b"220-Hi\r\n250 Ho\r\n", r"220-Hi \| 250 Ho"),
            (b"\x1b\xff\r\n", r"\\x1b\\xff"),
            (b"220-Hi\r\n", r"220-Hi \| \(nothing in 0.1 seconds\)"),
        ]:
            with self.subTest(nonsense):

                def talk(client: socket.socket, nonsense: bytes = nonsense) -> None:
                    client.sendall(nonsense)
                    client.recv(1000)

                status, out = self.judge_other(talk)
                self.assertEqual(status, 1)
                self.assertRegex(out, f"came      S: {shown}\n")

    def test_a_server_that_words_it_its_own_way(self) -> None:
        def talk(client: socket.socket) -> None:
            client.sendall(b"220-Welcome,\r\n220\r\n")
            for reply in (b"250-Nice\r\n250-to\r\n250 meet you\r\n", b"421 Too busy\r\n"):
                client.recv(1000)
                client.sendall(reply)

        server = OtherServer(talk)
        self.addCleanup(server.stop)
        manner: dict[str, Any] = {"letter": False, "patience": 1}
        address = ("127.0.0.1", int(server.name.rpartition(":")[2]))
        text = f"{HELLO}\nC: FROB\nS: 500 Unknown (or 502 4.1)\nC: QUIT\nS: 221 Bye"
        play(address, text, **manner)
        with self.assertRaisesRegex(Mismatch, "(?s)line 5, .* 500 .any text.*421 Too busy"):
            play(address, f"{HELLO}\nC: FROB\nS: 500 Unknown (or 502 4.2)", **manner)

    def test_no_later_level_before_the_first(self) -> None:
        server = OtherServer(lambda client: client.recv(1000))
        self.addCleanup(server.stop)
        status, out = self.judge(server.name, "--patience", "0.1")
        self.assertEqual(status, 1)
        self.assertNotIn("Level 2", out)
        self.assertRegex(out, r"\n127\.0\.0\.1:\d+: level 0 of 6; 0 of \d\d dialogues passed\n$")

    def test_nobody_there(self) -> None:
        server = OtherServer(lambda client: None)
        server.stop()
        status, out = self.judge(server.name)
        self.assertEqual(status, 1)
        self.assertRegex(out, "^127.0.0.1:[0-9]+: cannot connect: .*\n$")

    def test_wrong_usage(self) -> None:
        for argv in (
            [],
            ["x"],
            ["127.0.0.1:0"],
            ["x:y"],
            ["x:1", "no such file"],
            ["x:1", "--patience", "0"],
        ):
            with self.subTest(argv):
                self.assertEqual(self.judge(*argv)[0], 2)
        self.assertEqual(self.judge_text("no dialogue")[0], 2)


class NaiveTest(DialogueTest):
    """README's first server passes level 1 of the judge, and these dialogues break it."""

    breaks = [
        "the classic dialogue, byte by byte",
        "two lines in one packet",
        "a dot line inside a mail",
        "a second client",
        "a megabyte without a line end",
    ]

    def test_naive_server(self) -> None:
        slowly = unittest.mock.patch(f"{__name__}.PAUSE", 0.2)
        with slowly, tempfile.TemporaryDirectory() as folder:
            script = Path(folder, "naive.py")
            script.write_text(block_with(".accept()").replace("2600", "0"), encoding="utf-8")
            with Process(script=str(script)) as server:
                name, port = server.address
                judge = Judge(f"{name}:{port}", None, PATIENCE, letter=False)
                classic, *others = judge.dialogues()
                self.assertEqual(judge.fault(classic), "")
                judge.patience = 0.3
                for dialogue in others:
                    with self.subTest(dialogue.title):
                        if dialogue.title in self.breaks:
                            self.assertIn("came  ", judge.fault(dialogue))

    def test_names_of_the_breaks(self) -> None:
        for title in self.breaks:
            self.assertTrue(course(title))


class TrapsTest(unittest.TestCase):
    """Each Trap: of mailserver.py has a test that fails if somebody falls into it."""

    def test_each_trap_has_an_entry(self) -> None:
        comments = re.findall(r"Trap: (.*\n?.*)", source())
        self.assertEqual(len(comments), len(TRAPS))
        for comment, trap in zip(comments, TRAPS, strict=True):
            self.assertTrue(comment.startswith(trap.says), f"{comment!r} is not {trap.says!r}")

    def test_each_entry_is_an_experiment(self) -> None:
        for trap in TRAPS:
            with self.subTest(trap.says):
                self.assertEqual(source().count(trap.right), 1)
                compile(source().replace(trap.right, trap.wrong), "broken", "exec")
                group, _, name = trap.guard.partition(".")
                self.assertTrue(hasattr(globals()[group], name))

    def test_each_guard_sees_it(self) -> None:
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            slow_ones_first = TRAPS[::-1]
            results = list(pool.map(lambda trap: try_guard(trap, sprung=True), slow_ones_first))
        for trap, result in zip(slow_ones_first, results, strict=True):
            with self.subTest(trap.says):
                if result.startswith("is skipped"):
                    self.skipTest(f"{trap.guard} {result}")
                self.assertEqual(result, "fails", f"{trap.guard} does not see: {trap.says}")

    def test_readme_counts_them(self) -> None:
        counts = re.findall(r"(\d+) [Tt]raps", readme())
        self.assertEqual(set(counts), {str(len(TRAPS))})

    def test_one_trap(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            status = traps_command(["1"])
        path = re.findall("start it +python (.*)", out.getvalue())[0]
        self.addCleanup(shutil.rmtree, os.path.dirname(path))
        self.assertEqual(status, 0)
        self.assertEqual(Path(path).read_text(encoding="utf-8").count(TRAPS[0].right), 0)
        self.assertIn(TRAPS[0].hint, out.getvalue())

    def test_no_such_trap(self) -> None:
        with contextlib.redirect_stderr(io.StringIO()), self.assertRaises(SystemExit) as end:
            traps_command([str(len(TRAPS) + 1)])
        self.assertEqual(end.exception.code, 2)


if __name__ == "__main__":
    commands = {"play": play_command, "traps": traps_command}
    if sys.argv[1:] and sys.argv[1] in commands:
        sys.exit(commands[sys.argv[1]](sys.argv[2:]))
    try:
        unittest.main()
    finally:
        if MISSING:
            print("Some tests were skipped for want of:", *sorted(MISSING), file=sys.stderr)
