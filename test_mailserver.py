"""Tests of mailserver.py, as dialogues between a client (C:) and a server (S:).

    python test_mailserver.py                            run all tests
    python test_mailserver.py JudgeTest                  run one group of them
    python test_mailserver.py play 127.0.0.1:2600        judge any server: play the course with it
    python test_mailserver.py play 127.0.0.1:2600 FILE   play the dialogues of a file with it
    python test_mailserver.py play mailserver.py FILE    the same, with a server that "play" starts
    python test_mailserver.py play -h                    judge sixty servers, look into their mail
    python test_mailserver.py traps                      break each Trap: of mailserver.py in a copy

The notation of a dialogue, here, in README and in files:

    settings: max_size=1000 tls
    C: NOOP             the client sends a line, which ends in CRLF
    C: NOOP\\n           at the end: \\n sends a bare LF in place of CRLF, \\c sends no line end
    C: N\\x1b\\tOOP       anywhere: \\x1b is that byte; \\b \\n \\r and \\t are as in Python
    S: 250 OK           the server sends this line, which ends in CRLF
    S: 250 ...          "..." stands for any text
    S: 5.. ...          in a code, "." stands for any digit
    S: 500 No (or 50.)  where only codes are compared, these are right as well
    S: (closed)         the server hangs up
    C: (TLS)            the client starts TLS: the line after the reply to STARTTLS
    C2: NOOP            a second client, which connects where its first line stands; so with S2:

A line of another kind, or an empty one, ends a dialogue. The last such line in front of a dialogue
is its title; behind a colon, it may say why: what goes wrong for whom if a server fails it. If the
title ends in ", in one piece", all C: lines are sent at once when the greeting has come; if it ends
in ", byte by byte", each byte is sent by itself.

"settings:" says with which settings mailserver.py has to run for this dialogue; "play HOST:PORT"
leaves such a dialogue out, "play mailserver.py" and the tests start a server for it:

    users=ann:secret,bob:123    names and passwords
    lists=team:ann@x.org;all:ann@x.org,bob@x.org
    fail=RCPT:450,DATA:451      commands to refuse
    tls                         a certificate for localhost
    pop3                        POP3 in place of SMTP
    mail=2                      bob@example.com has two mails; each is STORED, below
    max_size=1000 timeout=0.5   any other setting that is a number
    require_auth                any other setting that is on or off

"play HOST:PORT" compares codes. A reply may have more lines than expected, or fewer, but all have
the same code, with a "-" behind it in all but the last. "--letter" compares texts, line by line. A
server that answers with a 421 from "(or ...)" has hung up, so the dialogue ends there."""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import csv
import dataclasses
import errno
import functools
import importlib
import io
import itertools
import logging
import mailbox
import os
import poplib
import random
import re
import shutil
import signal
import smtplib
import socket
import socketserver
import ssl
import struct
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
from mailserver import (
    Envelope,
    Maildir,
    MailServer,
    POP3Handler,
    Refused,
    SecureHandler,
    SMTPHandler,
)

HERE = Path(__file__).resolve().parent
PATIENCE = float(os.environ.get("PATIENCE", "20"))  # seconds after which a test gives up waiting

# ==================================================================================================
# THE NOTATION

LINE_BY_LINE, IN_ONE_PIECE, BYTE_BY_BYTE = "line by line", "in one piece", "byte by byte"
WAYS = (LINE_BY_LINE, IN_ONE_PIECE, BYTE_BY_BYTE)
ESCAPES = {rb"\b": b"\b", rb"\n": b"\n", rb"\r": b"\r", rb"\t": b"\t"}
CODE = re.compile(r"\d[\d.]{2}(?=[ -]|$)")  # at the start of an S: line


@dataclasses.dataclass
class Line:
    """A line of a dialogue."""

    who: str  # "C" or "S"
    client: str  # "" for the first one, "2" for the second
    text: str
    data: bytes  # what a C: line sends
    in_mail: bool  # it stands between "S: 354" and "C: .", or is this dot


@dataclasses.dataclass
class Dialogue:
    """A dialogue of a text that may have many."""

    level: str  # the last line such as "Level 1: ..."
    hint: str  # the line "Hint: ..." of this level
    title: str
    why: str  # what goes wrong if a server fails it
    settings: str  # what the server has to run with
    start: int  # the number of its first line in the text
    text: str = ""

    @property
    def way(self) -> str:
        """Return the way in which the title says to play it."""
        return next((way for way in WAYS if self.title.endswith(", " + way)), LINE_BY_LINE)


def octets(text: str) -> bytes:
    """Return the bytes that a C: line stands for."""
    data = re.sub(rb"\\[bnrt]", lambda match: ESCAPES[match[0]], text.encode())
    data = re.sub(rb"\\x([0-9a-f]{2})", lambda match: bytes.fromhex(match[1].decode()), data)
    if data.endswith(rb"\c"):
        return data[:-2]
    return data if data.endswith(b"\n") else data + b"\r\n"


def read_lines(text: str) -> list[Line]:
    """Take one dialogue apart. ValueError: a line is neither C: nor S:."""
    lines: list[Line] = []
    in_mail = False
    for line in text.strip().splitlines():
        match = re.fullmatch(r"([CS])(\d?):(?: (.*))?", line.strip())
        if not match:
            raise ValueError(f"a line is neither C: nor S: {line}")
        who, client, said = match[1], match[2], match[3] or ""
        data = octets(said)
        lines.append(Line(who, client, said, data, in_mail and who == "C"))
        if who == "S":
            in_mail = said.startswith("354")
        elif data.strip(b"\r\n") == b".":
            in_mail = False
    return lines


def read_dialogues(text: str) -> list[Dialogue]:
    """Find the dialogues of a text, such as README, and what the lines in front of them say."""
    found: list[Dialogue] = []
    level = hint = title = settings = ""
    inside = False
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if re.match(r"[CS]\d?:(?: |$)", line):
            if not inside:
                name, _, why = title.partition(": ")
                found.append(Dialogue(level, hint, name, why, settings, number))
            inside, title, settings = True, "", ""
            found[-1].text += line + "\n"
            continue
        inside = False
        if re.match(r"(Level|Part) \d: ", line):
            level = line
        elif line.startswith("Hint: "):
            hint = line
        elif line.startswith("settings: "):
            settings = line.removeprefix("settings: ")
        elif line and not line.startswith("```"):
            title = line
    return found


def arrange(lines: list[Line], way: str) -> list[Line]:
    """Put the lines of a dialogue into the order in which they are played in this way. With two
    clients or with TLS, there is no order but their own."""
    alone = not any(line.client or line.text == "(TLS)" for line in lines)
    first = next((n for n, line in enumerate(lines) if line.who == "C"), None)
    if way != IN_ONE_PIECE or first is None or not alone:
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
    if pattern == "..." and came.startswith(("(closed)", "(nothing in ")):
        return False
    text = ".*".join(map(re.escape, pattern[code.end() if code else 0 :].split("...")))
    return bool(re.fullmatch((code[0] if code else "") + text, came))


def in_words(pattern: str, letter: bool) -> str:
    """Say what an S: line expects: "500 No (or 502 55.)" is "500 (any text) or 502 or any 55x"."""
    pattern, _, others = pattern.partition(" (or ")
    if letter or not CODE.match(pattern):
        return pattern
    words = f"{pattern[:3]} (any text)"
    for code in others.rstrip(")").split():
        words += f" or any {code.replace('.', 'x')}" if "." in code else f" or {code}"
    return words


def spell(data: bytes) -> list[str]:
    """Write down what a client sends, a line for each that ends in CRLF."""
    lines = printable(data.decode("utf-8", "backslashreplace")).split(r"\r\n")
    if lines[-1] == "":
        return [short(line) for line in lines[:-1]]
    end = "(ends in LF alone)" if data.endswith(b"\n") else "(no line end)"
    lines[-1] += f"    {end}"
    return [short(line) for line in lines]


def printable(text: str) -> str:
    """Escape what could clear a terminal."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def short(text: str) -> str:
    """Make a line fit to be printed."""
    return text if len(text) <= 100 else f"{text[:60]}... ({len(text):,} characters)"


# ==================================================================================================
# THE PLAYER

PAUSE = 0.05  # seconds between two lines, if they are sent as a person types them


class Mismatch(AssertionError):
    """What was said so far, what a dialogue expected then, and what came."""


class Client:
    """A connection that plays dialogues.

    patience: seconds to wait for a reply. letter: compare texts, not just codes. typing: send as a
    person does, with a moment between two lines, and between two bytes that go one by one. record:
    where to write down what is sent and what comes. name: "2" for the second client."""

    def __init__(
        self,
        address: Any,
        *,
        patience: float = PATIENCE,
        letter: bool = True,
        typing: bool = False,
        record: list[str] | None = None,
        name: str = "",
    ) -> None:
        self.patience, self.letter, self.typing = patience, letter, typing
        self.record: list[str] = [] if record is None else record
        self.name = name
        self.received = bytearray()
        self.closed = False  # the server has hung up
        self.due = True  # a reply: the greeting, or one to what was sent since the last was read
        self.flaw = ""  # what is wrong with the end of the last line that came
        self.socket = socket.create_connection(address[:2], timeout=patience)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, data: bytes, way: str = LINE_BY_LINE) -> None:
        """Send bytes. If the server has hung up or does not read, the next reply will tell."""
        self.record += [f"C{self.name}: {line}" for line in spell(data)]
        self.due = True
        self.socket.settimeout(self.patience)
        pieces = [data]
        if way == BYTE_BY_BYTE and len(data) < 2000:
            pieces = [bytes([byte]) for byte in data]
        with contextlib.suppress(OSError):
            for piece in pieces:
                self.socket.sendall(piece)
                if self.typing and len(pieces) > 1:
                    time.sleep(PAUSE / 50)

    def hear(self, seconds: float) -> bool:
        """Take in what the server sends within so many seconds. False: nothing came."""
        self.socket.settimeout(seconds)
        try:
            data = self.socket.recv(2**16)
        except (TimeoutError, BlockingIOError, ssl.SSLWantReadError):
            return False
        except OSError:
            data = b""
        self.closed = not data
        self.received += data
        return bool(data)

    def line(self, deadline: float | None = None) -> str:
        """Return the next line; or "(closed)", or "(nothing in 20 seconds)". Set the flaw."""
        deadline = deadline or time.monotonic() + self.patience
        self.due = False
        self.flaw = ""
        while b"\n" not in self.received and not self.closed and len(self.received) < 2**20:
            left = deadline - time.monotonic()
            if not self.hear(max(left, 0)) and left <= 0:
                break
        data, newline, self.received = self.received.partition(b"\n")
        silence = "(closed)" if self.closed else f"(nothing in {self.patience:g} seconds)"
        if not newline:
            self.flaw = "(no line end)" if data else ""
        elif not data.endswith(b"\r"):
            self.flaw = "(ends in LF alone: a reply ends in CRLF)"
        text = data.decode("utf-8", "backslashreplace").removesuffix("\r")
        text = text if text or newline else silence
        self.record.append(f"S{self.name}: {short(printable(text))} {self.flaw}".rstrip())
        return text

    def reply(self) -> str:
        """Return the last line of a reply; or two of its lines, if they cannot be of one reply."""
        deadline = time.monotonic() + self.patience
        line = self.line(deadline)
        while re.match(r"\d{3}-", line) and not self.flaw and time.monotonic() < deadline:
            before, line = line, self.line(deadline)
            if line[:3] != before[:3]:
                return f"{before} | {line}"
        return line

    def expect(self, pattern: str) -> str:
        """Read what an S: line expects and return it. Mismatch: something else came."""
        if not self.letter and re.match(r"\d[\d.]{2}-", pattern):
            return ""  # the last line of a reply stands for them all
        came = self.line() if self.letter or not CODE.match(pattern) else self.reply()
        if self.flaw or not fits(pattern, came, self.letter):
            came = f"{came} {self.flaw}".rstrip()
            if self.typing and not self.received:
                self.hear(PAUSE * 4)
            following = self.received.partition(b"\r\n")[0].decode("utf-8", "backslashreplace")
            if fits(pattern, following, self.letter):
                came += f", and then {following}: one reply too many"
            self.fail(in_words(pattern, self.letter), came)
        return came

    def check_silence(self, in_mail: bool) -> None:
        """Mismatch: a reply has come that nobody asked for. In a mail, a refusal may come early.
        The replies to commands sent in a row may be on their way."""
        if self.typing:  # wait, or a server that takes a packet for a line gets two lines in one
            self.hear(PAUSE if self.due else PAUSE / 10)
        else:
            self.hear(0)
        early = bytes(self.received.partition(b"\n")[0])
        right = self.due and (not in_mail or early[:1] in b"45")
        if early and not right:
            came = f"{self.line()} {self.flaw}".rstrip()
            expected = "nothing: a mail is answered behind its dot" if in_mail else "nothing more"
            self.fail(expected, f"{came}, which nobody asked for")

    def fail(self, expected: str, came: str) -> None:
        """Raise Mismatch."""
        said = "\n".join(self.record[-9:-1]) or "(the client has connected)"
        came = short(printable(came.strip())) or "(an empty line)"
        raise Mismatch(f"{said}\n  expected  {expected}\n  came      {came}")

    def converse(self, text: str, way: str = LINE_BY_LINE) -> None:
        """Play a piece of a dialogue."""
        converse(lambda _: self, read_lines(text), way)

    def start_tls(self) -> None:
        """Encrypt, whoever the server is. Mismatch: it does not do its part."""
        self.record.append(f"C{self.name}: (TLS)")
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        self.socket.settimeout(self.patience)
        try:
            self.socket = context.wrap_socket(self.socket, suppress_ragged_eofs=False)
        except OSError as error:
            self.fail("a TLS handshake", str(error))

    def end_input(self) -> None:
        """Say that nothing more will be sent."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.socket, socket.SHUT_WR)

    def settle(self) -> None:
        """Give the server a moment to hang up: some do not survive a connection that breaks."""
        self.end_input()
        deadline = time.monotonic() + min(self.patience, 0.5)
        while not self.closed and (left := deadline - time.monotonic()) > 0:
            self.hear(left)

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def converse(client_of: Callable[[str], Client], lines: list[Line], way: str) -> None:
    """Play lines with the clients that they name. Mismatch: the server says something else."""
    for line in arrange(lines, way):
        client = client_of(line.client)
        if line.text == "(TLS)":
            client.start_tls()
        elif line.who == "C":
            client.check_silence(line.in_mail)
            client.send(line.data, way)
        else:
            came = client.expect(line.text)
            if came.startswith("421") and not line.text.startswith("421"):
                return  # one of the other codes that are right; it says that the server hangs up


def play(address: Any, text: str, way: str = LINE_BY_LINE, **manner: Any) -> None:
    """Play a whole dialogue. Mismatch: the server says something else. OSError: no connection.

    manner: patience, letter and typing of a Client. To the letter, the server has to be silent when
    the dialogue is over."""
    lines = read_lines(text)
    record: list[str] = []
    clients: dict[str, Client] = {}
    with contextlib.ExitStack() as stack:

        def client_of(name: str) -> Client:
            if name not in clients:
                client = Client(address, record=record, name=name, **manner)
                clients[name] = stack.enter_context(client)
                stack.callback(client.settle)
            return clients[name]

        converse(client_of, lines, way)
        for client in clients.values():
            if client.letter:
                client.end_input()
                client.expect("(closed)")


# ==================================================================================================
# THE COURSE: the dialogues that "play" plays with any server, and the tests with ours

HELLO = "S: 220 Simple Mail Server\nC: HELO example.com\nS: 250 Hello"
MAIL_FROM = "C: MAIL FROM:<a@example.com>\nS: 250 OK"
RCPT_TO = "C: RCPT TO:<b@example.com>\nS: 250 OK"
MAIL = f"{MAIL_FROM}\n{RCPT_TO}"
SENDER = f"{HELLO}\n{MAIL_FROM}"
ENVELOPE = f"{HELLO}\n{MAIL}"
DATA = "C: DATA\nS: 354 End data with <CR><LF>.<CR><LF>"
DOT = "C: .\nS: 250 Message accepted"
MESSAGE = f"{DATA}\nC: Subject: x\nC:\nC: hello\n{DOT}"
BYE = "C: QUIT\nS: 221 Bye\nS: (closed)"
INSIDE = f"{ENVELOPE}\n{DATA}"
EXTENSIONS = "SIZE 10485760", "8BITMIME", "PIPELINING", "SMTPUTF8", "EXPN", "HELP"
OFFER = "\n".join([f"S: 250-{extension}" for extension in EXTENSIONS])
EHLO_AGAIN = f"C: EHLO example.com\nS: 250-Hello\n{OFFER}\nS: 250 AUTH PLAIN LOGIN"
EHLO = f"S: 220 Simple Mail Server\n{EHLO_AGAIN}"
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

# A dialogue that has no "S: 221" in it ends in BYE.
COURSE = rf"""
Level 1: the classic dialogue
Hint: greet each client with a 220; end each reply in CRLF; answer a mail once, behind its dot
the classic dialogue, line by line: without it, no mail arrives
{CLASSIC}

Level 2: a line may come in pieces, and two lines in one packet
Hint: keep what comes in a buffer, and split that at CRLF; who splits at LF misses level 4
the classic dialogue, byte by byte: a network may part a line anywhere; some telnets send each key
{CLASSIC}

two lines in one packet: drop the second, and its client waits for a reply for ever
{HELLO}
C: MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>
S: 250 OK
S: 250 OK

the classic dialogue, in one piece: what comes behind DATA is mail; dropped, a part of it is lost
{CLASSIC}

Level 3: order and syntax
Hint: keep the client's name, the sender and the recipients, and look at them before you obey
verbs in small letters, and no blank after the colon: many programs write them so
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

an unknown command: clients try what is new and go on without; if you hang up, their mail is lost
{HELLO}
C: FROB
S: 500 Unknown command... (or 502)
{MAIL}

RCPT before MAIL: a mail without a sender: nobody could be told that it got lost
{HELLO}
C: RCPT TO:<b@example.com>
S: 503 Send MAIL FROM before RCPT TO

DATA before MAIL: a 354 makes the client send a mail that is for nobody, and is lost
{HELLO}
C: DATA
S: 503 Send MAIL FROM before DATA (or 554)

DATA before RCPT: a mail for nobody would be accepted, and its sender would believe it is there
{SENDER}
C: DATA
S: 503 Send RCPT TO before DATA (or 554)
{RCPT_TO}
{MESSAGE}

MAIL in a transaction: the first one's recipients would get the second sender's mail
{ENVELOPE}
C: MAIL FROM:<a@example.com>
S: 503 ...RCPT TO...
{MESSAGE}

a second HELO drops the envelope: a client that starts again would mail the old recipients too
{ENVELOPE}
C: HELO example.com
S: 250 Hello
C: DATA
S: 503 ...MAIL FROM... (or 554)
{MAIL}

the envelope is used up: the recipients of the first mail would get the next one as well
{ENVELOPE}
{MESSAGE}
C: DATA
S: 503 Send MAIL FROM before DATA (or 554)

three messages in a session: a newsletter is sent so; all but its first mail would be refused
{ENVELOPE}
{MESSAGE}
{MAIL}
{MESSAGE}
{MAIL}
{MESSAGE}

a bounce has no sender: notices of lost mail come from <>; refused, nobody learns of the loss
{HELLO}
C: MAIL FROM:<>
S: 250 OK
{RCPT_TO}
{MESSAGE}

HELO without a name: who looks for the source of a mail finds this name, or nothing
S: 220 Simple Mail Server
C: HELO
S: 501 ...HELO... (or 50.)
C: HELO example.com
S: 250 Hello

MAIL without an address: accepted, it leaves nobody to tell when the mail gets lost
{HELLO}
C: MAIL
S: 501 ...MAIL FROM:<sender@example.com>... (or 50. 55.)
C: MAIL FROM:
S: 501 ...MAIL FROM:<sender@example.com>... (or 50. 55.)
C: MAIL TO:<a@example.com>
S: 501 ...MAIL FROM:<sender@example.com>... (or 50. 55.)
{MAIL}

RCPT without an address: 250 says that the mail will be there; but who would get it?
{SENDER}
C: RCPT TO:
S: 501 ...RCPT TO:<recipient@example.com>... (or 50. 55.)
C: RCPT FROM:<b@example.com>
S: 501 ...RCPT TO:<recipient@example.com>... (or 50. 55.)
{RCPT_TO}

Level 4: dots, sizes, long lines, two clients (what is stored is looked at with --maildir DIR only)
Hint: give each client a thread; a mail ends at CRLF, dot, CRLF only; a line loses its first dot
a message of nothing: its dot comes right behind DATA; who wants a CRLF before it waits for ever
{INSIDE}
{DOT}

a dot line inside a mail: cut there, its rest would be obeyed as commands; or dots come doubled
{INSIDE}
C: ..
C: ...
C: ..QUIT
C: \x20.
C: A dot at the end.
{DOT}

commands inside a mail: a mail about SMTP, such as this course, would be cut off
{INSIDE}
C: QUIT
C: RSET
C: DATA
{DOT}

no mail is smuggled in by LF, dot, LF: a relay's mail could carry a second, forged one in
{INSIDE}
C: first\n.\n\c
C: MAIL FROM:<evil@example.com>
C: .
S: 250 Message accepted (or 5.. 421)

no mail is smuggled in by LF, dot, CRLF: a relay's mail could carry a second, forged one in
{INSIDE}
C: first\n.\c
C:
C: MAIL FROM:<evil@example.com>
C: .
S: 250 Message accepted (or 5.. 421)

a line of a mail has 998 letters: RFC 5321 4.5.3.1.6 allows it; a short buffer breaks the mail
{INSIDE}
C: {"x" * 998}
{DOT}

a mail has 64,000 octets, in one piece: every server takes so much (RFC 5321 4.5.3.1.7)
{INSIDE}
{times(1000, "C: " + "x" * 62)}
{DOT}

the longest address: who has one would get no mail (RFC 5321 4.5.3.1.3 allows 256 octets)
{HELLO}
C: MAIL FROM:<{LONGEST}>
S: 250 OK
C: RCPT TO:<{LONGEST}>
S: 250 OK

a hundred recipients: a mail to a whole class is sent once (RFC 5321 4.5.3.1.8 asks for 100)
{ENVELOPE}
{HUNDRED}
{MESSAGE}

a megabyte without a line end: pieces of it would pass for commands, or fill the memory
{HELLO}
C: NOOP {"x" * 1_000_000} QUIT
S: 500 Line too long... (or 250 5.. 421)
{MAIL}

a second client: one client that thinks for a minute would stop the mail of all others
S: 220 Simple Mail Server
S2: 220 Simple Mail Server
C: HELO one.example
S: 250 Hello
{MAIL_FROM}
C2: HELO two.example
S2: 250 Hello
C2: MAIL FROM:<c@example.com>
S2: 250 OK
{RCPT_TO}
C2: QUIT
S2: 221 Bye
S2: (closed)
{MESSAGE}

each client has an envelope of its own: one's mail would go to the other's recipients
{HELLO}
S2: 220 Simple Mail Server
C2: HELO two.example
S2: 250 Hello
{MAIL}
C2: RCPT TO:<c@example.com>
S2: 503 Send MAIL FROM before RCPT TO
C2: QUIT
S2: 221 Bye
{MESSAGE}

Level 5: the other commands
Hint: write one function for each command, with a docstring; HELP can print these
EHLO: today's programs say EHLO, and some give up without it
{EHLO}
{MAIL}

EHLO without a name: nobody could say where a mail came from
S: 220 Simple Mail Server
C: EHLO
S: 501 ...EHLO... (or 50.)

a second EHLO drops the envelope: a client that starts again would mail the old recipients too
{EHLO}
{MAIL}
{EHLO_AGAIN}
C: DATA
S: 503 ...MAIL FROM... (or 554)
{MAIL}

RSET drops the envelope and keeps the HELO: the next mail would go to the old recipients too
{ENVELOPE}
C: RSET
S: 250 OK
C: DATA
S: 503 Send MAIL FROM before DATA (or 554)
{MAIL}

RSET has nothing to drop: programs send RSET first, to be sure; some give up if it is refused
{HELLO}
C: RSET
S: 250 OK

NOOP, alone and with a word: programs ask so whether the server is still there
{HELLO}
C: NOOP
S: 250 OK
C: NOOP whatever
S: 250 OK (or 501)

HELP: a person at telnet types this first
{HELLO}
C: HELP
S: 214-...
S: 214 ... (or 211 250 50.)

VRFY: every server answers it, if only with "cannot say" (RFC 5321 4.5.1)
{HELLO}
C: VRFY somebody
S: 252 ... (or 250 251 50. 55.)

EXPN: a client that asks waits for an answer, be it no
{HELLO}
C: EXPN nobody
S: 550 No such list (or 250 252 50. 55.)

an unknown parameter: 250 would promise what the server does not know how to do
{EHLO}
C: MAIL FROM:<a@example.com> FROB=1
S: 555 Unknown parameter... (or 501 504)

Level 6: addresses and letters
Hint: RFC 5321 4.1.2 is the grammar of addresses: write a function for each of its rules
the postmaster: who has trouble with a site writes to this address (RFC 5321 4.5.1)
{SENDER}
C: RCPT TO:<Postmaster>
S: 250 OK

addresses with signs in them: people with a + or a ' in theirs would get no mail
{HELLO}
C: MAIL FROM:<Bob.B+tag@Example.COM>
S: 250 OK
C: RCPT TO:<!#$%&'*+-/=?^_`{{|}}~@example.com>
S: 250 OK

names in quotation marks: cut at the first > or blank, the mail would go to somebody else
{SENDER}
C: RCPT TO:<"a b"@example.com>
S: 250 OK
C: RCPT TO:<"a>b"@example.com>
S: 250 OK

addresses that name a machine by its number: a printer without a name could not send
{HELLO}
C: MAIL FROM:<bob@[192.0.2.1]>
S: 250 OK
C: RCPT TO:<bob@[IPv6:2001:db8::1]>
S: 250 OK

the route in front of an address is left out: old programs write one; the mail is for bob
{SENDER}
C: RCPT TO:<@a.example,@b.example:bob@example.com>
S: 250 OK (or 55.)

no addresses: who mistypes an address would not hear of it, and the mail would be lost
{SENDER}
C: RCPT TO:<>
S: 501 ... (or 55.)
C: RCPT TO:<bob@>
S: 501 ... (or 55.)
C: RCPT TO:<@example.com>
S: 501 ... (or 55.)
C: RCPT TO:<bob@@example.com>
S: 501 ... (or 55.)
{RCPT_TO}

eight bits: letters with an accent would come out broken
{EHLO}
{MAIL}
{DATA}
C: caf\xc3\xa9 \xff
{DOT}
"""


def read_course() -> list[Dialogue]:
    """Give the dialogues of the course."""
    dialogues = read_dialogues(COURSE)
    for dialogue in dialogues:
        if "\nS: 221" not in dialogue.text:
            dialogue.text += BYE
    return dialogues


def course(title: str) -> str:
    """Return the dialogue of the course that has this title."""
    return next(dialogue.text for dialogue in read_course() if dialogue.title == title)


# ==================================================================================================
# THE JUDGE: python test_mailserver.py play

ALL_PASSED, SOME_FAILED, WRONG_USAGE, NOT_RUNNING = 0, 1, 2, 3  # exit status
LEVELS = 6
OURSELVES = "mailserver.py"  # in place of HOST:PORT


@dataclasses.dataclass
class Judge:
    """Plays dialogues with a server, and reports which of them passed."""

    name: str  # what the report calls the server
    address: tuple[str, int] | None  # None: mailserver.py, which is started for each dialogue
    dialogues: list[Dialogue]
    patience: float  # seconds
    letter: bool
    maildir: Path | None  # where to look for the mail that the server has accepted
    aloud: bool  # print the report as it grows
    report: list[str] = dataclasses.field(default_factory=list)
    played: int = 0
    passed: int = 0
    level: int = 0  # of this one and of those before, all dialogues passed
    first_fault: str = ""  # the title of a dialogue, or why there is no connection

    def run(self) -> int:
        """Play all dialogues and report. Return the exit status."""
        try:
            self.play_levels()
        except OSError as error:
            self.first_fault = f"not running: {error}"
        self.say(self.verdict())
        if not self.played:
            return NOT_RUNNING
        return ALL_PASSED if self.passed == len(self.dialogues) else SOME_FAILED

    def say(self, text: str) -> None:
        """Add to the report."""
        self.report.append(text)
        if self.aloud:
            print(text, flush=True)

    def verdict(self) -> str:
        """Give the last line of the report."""
        if not self.played:
            return f"{self.name}: {self.first_fault}"
        in_levels = self.dialogues[0].level.startswith("Level")
        level = f"level {self.level} of {LEVELS}; " if in_levels else ""
        return f"{self.name}: {level}{self.passed} of {len(self.dialogues)} dialogues passed"

    def play_levels(self) -> None:
        """Play the levels in order. Of those after the first one that is missed, say little."""
        missed = False
        for level, group in itertools.groupby(self.dialogues, lambda dialogue: dialogue.level):
            dialogues = list(group)
            if level and not missed:
                self.say(level)
            passed = sum(self.passes(dialogue, quietly=missed) for dialogue in dialogues)
            if missed:
                heading = level.partition(" (")[0]
                self.say(f"{heading}: {passed} of {len(dialogues)} dialogues passed")
            elif passed == len(dialogues):
                self.level += 1
            else:
                missed = True
                if dialogues[0].hint:
                    self.say(f"  {dialogues[0].hint}")
                if level.startswith("Level 1"):
                    self.say("The other levels are played once level 1 has passed.")
                    return

    def passes(self, dialogue: Dialogue, quietly: bool) -> bool:
        """Play a dialogue, tell whether it passes, and report, or don't."""
        fault = self.fault(dialogue)
        self.played += 1
        self.passed += not fault
        title = dialogue.title or f"the dialogue in line {dialogue.start}"
        if fault and not self.first_fault:
            self.first_fault = title
        if not quietly:
            self.say(f"  {'FAILED' if fault else 'passed'}  {short(title)}")
        if fault and not quietly:
            why = f"Why: {dialogue.why}\n" if dialogue.why else ""
            self.say(textwrap.indent(why + fault, " " * 10))
        return not fault

    def fault(self, dialogue: Dialogue) -> str:
        """Play a dialogue; return what went wrong, or "". OSError: not even the first connects."""
        if not re.search(r"(?m)^S\d?: .*[\w(]", dialogue.text):
            return 'each S: line is "...": write what the server has to say'
        mail = accepted_mail(dialogue.text) if self.maildir else b""
        before = self.count(mail)
        try:
            with self.server(dialogue.settings) as address:
                manner = {"patience": self.patience, "letter": self.letter, "typing": True}
                play(address, dialogue.text, dialogue.way, **manner)
        except Mismatch as mismatch:
            return str(mismatch)
        except OSError as error:
            if not self.played:
                raise
            return f"cannot connect any more: {error}"
        deadline = time.monotonic() + self.patience
        while mail and self.count(mail) == before:
            if time.monotonic() > deadline:
                lines = textwrap.indent(mail.decode("utf-8", "backslashreplace"), "| ")
                return f"accepted, but no new file of {self.maildir} has these lines:\n{lines}"
            time.sleep(PAUSE)
        return ""

    @contextlib.contextmanager
    def server(self, settings: str) -> Iterator[tuple[str, int]]:
        """Give the address of the server. If it is mailserver.py, run it meanwhile."""
        if self.address:
            yield self.address
        else:
            with our_server(settings) as server:
                yield server.host, server.port

    def count(self, mail: bytes) -> int:
        """Count how often a mail is in the files of the Maildir."""
        count = 0
        for path in self.maildir.rglob("*") if self.maildir else ():
            with contextlib.suppress(OSError):  # a directory, or it has moved meanwhile
                count += path.read_bytes().replace(b"\r\n", b"\n").count(mail)
        return count


def accepted_mail(text: str) -> bytes:
    """Return the last mail of a dialogue that has to be accepted, as it is to be stored: without
    the dots that are doubled on the way, and with lines that end in LF. b"": there is none."""
    mail = data = b""
    for line in read_lines(text):
        if line.in_mail:
            data += line.data
        elif data and line.who == "S":
            lines = [part.removeprefix(b".") for part in data.split(b"\r\n")]
            if line.text.startswith("250") and "(or " not in line.text:
                mail = b"\n".join(lines[:-2])  # without the last dot, and what is behind its CRLF
            data = b""
    return mail


def read_servers(words: list[str]) -> tuple[dict[str, tuple[str, int] | None], str]:
    """Read [NAME=]HOST:PORT ... [FILE]: give the servers by name, and the file. ValueError: these
    are other words."""
    servers: dict[str, tuple[str, int] | None] = {}
    file = ""
    for word in words:
        match = re.fullmatch(r"(?:([\w@+-][\w.@+-]*)=)?([^\s=]+):(\d{1,5})", word)
        name = match and match[1] or word
        if name in servers:
            raise ValueError(f"two servers are called {name}")
        if match and 0 < int(match[3]) < 65536:
            servers[name] = (match[2].strip("[]"), int(match[3]))
        elif word == OURSELVES:
            servers[name] = None
        elif servers and not file:
            file = word
        else:
            raise ValueError(f"{word!r} is not HOST:PORT, such as 127.0.0.1:2600")
    return servers, file


def choose_dialogues(file: str, ours: bool, level: int) -> list[Dialogue]:
    """Give what is to be played. ValueError, OSError: the file is no good."""
    if not file:
        found = read_dialogues(OURS) if ours else read_course()
        return [dialogue for dialogue in found if ours or int(dialogue.level[6]) <= level]
    try:
        found = read_dialogues(Path(file).read_text(encoding="utf-8-sig"))
    except UnicodeError:
        raise ValueError(f"{file} is not UTF-8: save it as UTF-8") from None
    found = [dialogue for dialogue in found if ours or not dialogue.settings]
    if not found:
        raise ValueError(f"{file} has no dialogue to play: lines that start with C: or S:")
    return found


def read_class_line(line: str) -> list[str]:
    """Return the word in a line of @class.txt; none if the line is empty, or a comment."""
    word = line.strip().removeprefix("\ufeff")
    return [word] if word and not word.startswith("#") else []


def play_command(argv: list[str]) -> int:
    """Judge servers; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="test_mailserver.py play",
        usage="%(prog)s [options] [NAME=]HOST:PORT ... [FILE]",
        description="Play the course, or the dialogues of FILE, with servers; of mailserver.py, "
        "play starts one itself. @class.txt stands for the words in the lines of class.txt.",
        epilog="Exit status: 0 if all dialogues passed, 1 if some failed, 2 for wrong usage, 3 if "
        "a server is not running.",
        fromfile_prefix_chars="@",
    )
    add = parser.add_argument
    add("words", metavar="HOST:PORT", nargs="+", help="where a server listens, or mailserver.py")
    add("--level", type=int, choices=range(1, LEVELS + 1), default=LEVELS, help="stop behind it")
    add("--letter", action="store_true", help="compare texts as well, not only codes")
    add("--patience", metavar="SECONDS", type=float, default=2, help="wait so long for a reply")
    add("--maildir", metavar="DIR", help="where the server keeps mail; of many, each in DIR/NAME")
    add("--feedback", metavar="DIR", help="write grades.csv and a report for each server to DIR")
    parser.convert_arg_line_to_args = read_class_line  # type: ignore[method-assign, assignment]
    flags = parser.parse_intermixed_args(argv)
    try:
        servers, file = read_servers(flags.words)
        if OURSELVES in servers and len(servers) > 1:
            raise ValueError("mailserver.py is played alone: its dialogues have settings of ours")
        dialogues = choose_dialogues(file, OURSELVES in servers, flags.level)
        if flags.feedback:
            os.makedirs(flags.feedback, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    judges = []
    for name, address in servers.items():
        maildir = Path(flags.maildir, "" if len(servers) == 1 else name) if flags.maildir else None
        aloud = len(servers) == 1 and not flags.feedback
        judge = Judge(name, address, dialogues, flags.patience, flags.letter, maildir, aloud)
        judges.append(judge)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return judge_all(judges, flags.feedback)


def judge_all(judges: list[Judge], folder: str | None) -> int:
    """Have all judges play, side by side. Write their reports to a folder, or print them. Return
    the highest exit status."""
    worst = ALL_PASSED
    rows: list[list[object]] = [["name", "level", "passed", "dialogues", "first fault"]]
    with concurrent.futures.ThreadPoolExecutor(len(judges)) as pool:
        running = {pool.submit(judge.run): judge for judge in judges}
        for done in concurrent.futures.as_completed(running):  # who is slow delays nobody's report
            judge = running[done]
            worst = max(worst, done.result())
            level = judge.level if judge.played else ""
            rows.append([judge.name, level, judge.passed, len(judge.dialogues), judge.first_fault])
            report = "\n".join(judge.report) + "\n"
            if folder:
                path = Path(folder, judge.name.replace(":", "_") + ".txt")
                path.write_text(report, encoding="utf-8")
                print(judge.verdict(), flush=True)
            elif not judge.aloud:
                print(report, flush=True)
    if folder:
        with open(Path(folder, "grades.csv"), "w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([rows[0], *sorted(rows[1:], key=str)])
    return worst


# ==================================================================================================
# THE TRAPS: python test_mailserver.py traps


@dataclasses.dataclass
class Trap:
    """A "Trap:" comment of mailserver.py, what it warns of, and the test that sees it."""

    says: str  # how the comment goes on
    right: str  # source text that is in the file once
    broken: str  # what somebody might write in its place
    guard: str  # the test that fails then
    harmless: str = ""  # why it breaks nothing on this Python, if so


def harmless_eof() -> str:
    """Return why it makes no difference here to set OP_IGNORE_UNEXPECTED_EOF, if so."""
    option = getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    if not option:
        return "this Python's OpenSSL does not know OP_IGNORE_UNEXPECTED_EOF"
    if ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).options & option:
        return "this Python sets OP_IGNORE_UNEXPECTED_EOF by itself"
    return ""


def harmless_core() -> str:
    """Return why it makes no difference here to stay on one core, if so."""
    if not hasattr(os, "sched_getaffinity"):
        return "this system does not bind a program to a core"
    return "this machine has one core" if len(os.sched_getaffinity(0)) == 1 else ""


TRAPS = [
    Trap(
        "read all of a long line",
        r'while piece and not piece.endswith(b"\n"):',
        "while False:",
        "DialoguesTest.test_course",
    ),
    Trap(
        "a line ends as the DATA line did",
        r'if line in (b".\r\n", b"." + newline):',
        r'if line in (b".\r\n", b".\n"):',
        "WireTest.test_nothing_is_smuggled_in",
    ),
    Trap(
        "two, since 64 KiB of a line may end",
        "(before + last).endswith(newline)",
        "last.endswith(newline)",
        "WireTest.test_a_long_line_hides_no_dot",
    ),
    Trap(
        "no more files can be opened",
        "time.sleep(0.1)",
        "pass",
        "LifeTest.test_no_file_descriptor_left",
    ),
    Trap(
        "not connection.shutdown()",
        "socket.socket.shutdown(session.connection, how)",
        "session.connection.shutdown(how)",
        "TLSTest.test_stop",
    ),
    Trap(
        "at Ctrl-C, telnet asks DO TIMING-MARK",
        r'session.send(b"\xff\xfc\x06")',
        "pass",
        "WireTest.test_ctrl_c_in_telnet",
    ),
    Trap(
        "without this option",
        'session.tls.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)',
        "pass",
        "TLSTest.test_stop",
        harmless_eof(),
    ),
    Trap(
        "take a new rfile",
        "socketserver.StreamRequestHandler.setup(session)",
        'session.connection, session.wfile = session.request, session.request.makefile("wb", 0)',
        "TLSTest.test_what_came_behind_starttls_is_dropped",
    ),
    Trap(
        '"../x" would be a path elsewhere',
        'urllib.parse.quote(address.lower(), safe="@+")',
        "address.lower()",
        "KeepingTest.test_names_of_mailboxes",
    ),
    Trap(
        "before this, a crash would lose the file",
        "os.fsync(file.fileno())",
        "pass",
        "KeepingTest.test_order_of_what_happens",
    ),
    Trap(
        "an rfile that has timed out",
        'self.rfile = self.connection.makefile("rb", self.rbufsize)',
        "pass",
        "POP3Test.test_subscription",
    ),
    Trap(
        "not print(), which holds a lock",
        "data = data[os.write(sys.stdout.fileno(), data) :]",
        'data = print(data.decode(), end="", flush=True)',
        "ProcessTest.test_a_terminal_that_is_stuck",
    ),
    Trap(
        "on two cores",
        "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})",
        "pass",
        "ProcessTest.test_what_it_prints",
        harmless_core(),
    ),
]


def source() -> str:
    """Return the text of mailserver.py."""
    return (HERE / "mailserver.py").read_text(encoding="utf-8")


def try_guard(trap: Trap, sprung: bool) -> str:
    """Run the test that guards a trap, in a copy: "passes", "fails", or "is skipped: " and why."""
    if trap.harmless:
        return f"is skipped: {trap.harmless}"
    text = source().replace(trap.right, trap.broken) if sprung else source()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("test_mailserver.py", "README.md"):
            shutil.copy(HERE / name, folder)
        Path(folder, "mailserver.py").write_text(text, encoding="utf-8")
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


def try_guards(sprung: bool) -> list[str]:
    """Run the guards of all traps."""
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda trap: try_guard(trap, sprung), TRAPS))


def traps_command(argv: list[str]) -> int:
    """Fall into each trap, and say whether its guard fails; return the exit status."""
    argparse.ArgumentParser("test_mailserver.py traps").parse_args(argv)
    missed = 0
    for trap, before, after in zip(TRAPS, try_guards(False), try_guards(True), strict=True):
        print(f"Trap: {trap.says}")
        print(textwrap.indent(trap.right, "    - "))
        print(textwrap.indent(trap.broken, "    + "))
        print(f"    {trap.guard} {before}; in the trap, it {after}")
        missed += after == "passes" or before == "fails"
    print(f"{missed} of {len(TRAPS)} traps are not guarded")
    return 1 if missed else 0


# ==================================================================================================
# THE TESTS: what they share

STORED = b"Subject: hello\r\n\r\nAt one?\r\n.\r\n"  # what "mail=" puts into a mailbox

# A certificate for localhost that nobody vouches for, and its key, which is no secret.
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBdDCCARugAwIBAgIBATAKBggqhkjOPQQDAjAUMRIwEAYDVQQDDAlsb2NhbGhv
c3QwHhcNMjAwMTAxMDAwMDAwWhcNNDkwMTAxMDAwMDAwWjAUMRIwEAYDVQQDDAls
b2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAASo+R+1M/4cyalkaUWb
jG5REd/0Q1VaZY56MNoQGGZKfwfQY0lGkD4t36NiipZvyf1paqLNx+QyDOUYyIFh
Wlx7o14wXDAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwDwYDVR0TAQH/BAUw
AwEB/zAdBgNVHQ4EFgQUe85lPY5rNgZD1/JncZSSkTgfbs0wDgYDVR0PAQH/BAQD
AgKEMAoGCCqGSM49BAMCA0cAMEQCIE6wJacdIaQWwzMJXdEjrofrWOvb5bWihvCK
I5avlVdaAiBrUM4myKuiPyoaF6vS302iGcd5FXfrSWNGAAIrHJGM4g==
-----END CERTIFICATE-----
"""
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgrdrXgWY+jZezQWLT
g7tj3ACf55IuqWFSuMF+RepL8VmhRANCAASo+R+1M/4cyalkaUWbjG5REd/0Q1Va
ZY56MNoQGGZKfwfQY0lGkD4t36NiipZvyf1paqLNx+QyDOUYyIFhWlx7
-----END PRIVATE KEY-----
"""


def certificate(folder: str | Path) -> str:
    """Write a file that has the certificate and its key; give its path."""
    path = Path(folder, "cert.pem")
    path.write_text(CERTIFICATE + KEY, encoding="ascii")
    return str(path)


def server_tls() -> ssl.SSLContext:
    """Give what a server needs for TLS."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    with tempfile.TemporaryDirectory() as folder:
        context.load_cert_chain(certificate(folder))
    return context


def client_tls() -> ssl.SSLContext:
    """Give what a client needs to believe the certificate."""
    return ssl.create_default_context(cadata=CERTIFICATE)


def pairs(text: str) -> list[tuple[str, str]]:
    """Take "a:b,c:d" apart."""
    return [(pair.partition(":")[0], pair.partition(":")[2]) for pair in text.split(",")]


def read_settings(text: str) -> dict[str, Any]:
    """Read what stands behind "settings:"; see the top of this file."""
    settings: dict[str, Any] = {}
    for word in text.split():
        name, _, value = word.partition("=")
        if name == "users":
            settings[name] = dict(pairs(value))
        elif name == "fail":
            settings[name] = {verb: int(code) for verb, code in pairs(value)}
        elif name == "lists":
            lists = [one.partition(":") for one in value.split(";")]
            settings[name] = {name: members.split(",") for name, _, members in lists}
        elif name == "tls":
            settings[name] = server_tls()
        elif value:
            settings[name] = float(value) if "." in value else int(value)
        else:
            settings[name] = True
    return settings


@contextlib.contextmanager
def our_server(settings: str) -> Iterator[MailServer]:
    """Run the server of mailserver.py with settings as in a dialogue."""
    chosen = read_settings(settings)
    handler: Any = POP3Handler if chosen.pop("pop3", False) else SecureHandler
    mails = chosen.pop("mail", 0)
    with tempfile.TemporaryDirectory() as folder:
        if handler is POP3Handler:
            chosen["maildir"] = Maildir(folder)
        for _ in range(mails):
            envelope = Envelope("ann@example.com", ["bob@example.com"], STORED)
            chosen["maildir"].keep(envelope)
        with MailServer(("127.0.0.1", 0), handler, **chosen) as server:
            server.start()
            yield server


def wait_until(condition: Callable[[], object]) -> None:
    """Wait for what another thread is about to do."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("waited in vain")
        time.sleep(0.005)


MISSING: set[str] = set()  # programs for want of which a test was skipped


def free_port() -> int:
    """Return a port at which nobody listens, and that no client is given meanwhile."""
    while True:
        port = random.randrange(10_000, 30_000)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


def need(program: str) -> None:
    """Skip the test that calls this if there is no such program; the end of the run names it."""
    if not shutil.which(program):
        MISSING.add(program)
        raise unittest.SkipTest(f"{program} is not installed")


def need_tracemalloc() -> Any:
    """Return the module tracemalloc. Skip the test that calls this if there is none, as in PyPy."""
    try:
        return importlib.import_module("tracemalloc")
    except ImportError:
        raise unittest.SkipTest("this Python has no tracemalloc") from None


class DialogueTest(unittest.TestCase):
    """A test that plays dialogues. It fails if something appears on stderr that it did not expect:
    there go the tracebacks of mailserver.py, and those of threads."""

    maxDiff = None

    def setUp(self) -> None:
        self.inbox: list[Envelope] = []  # what self.serve's servers have accepted
        self.stderr = io.StringIO()
        self.stack = contextlib.ExitStack()
        self.addCleanup(lambda: self.assertEqual("", self.stderr.getvalue()))
        self.addCleanup(self.stack.close)  # what was entered last is closed first
        self.stack.enter_context(contextlib.redirect_stderr(self.stderr))

    def expect_stderr(self, *texts: str) -> None:
        """Wait until stderr has each text, and forget what is there."""
        wait_until(lambda: all(text in self.stderr.getvalue() for text in texts))
        self.stderr.seek(0)
        self.stderr.truncate()

    def folder(self) -> str:
        """Make a folder that is removed after the test."""
        return self.stack.enter_context(tempfile.TemporaryDirectory())

    def serve(self, handler: Any = SecureHandler, **settings: Any) -> MailServer:
        """Start a server. It is self.server, with which dialogues are played from now on; the mail
        goes to self.inbox, or to the subscribers given."""
        settings.setdefault("subscribers", [self.inbox.append])
        self.server = MailServer(("127.0.0.1", 0), handler, **settings)
        self.stack.callback(self.server.stop)
        self.server.start()
        return self.server

    def client(self, server: MailServer | None = None) -> Client:
        """Connect to a server."""
        server = server or self.server
        return self.stack.enter_context(Client((server.host, server.port)))

    def play(
        self, what: str | Dialogue, server: MailServer | None = None, way: str = LINE_BY_LINE
    ) -> None:
        """Play a dialogue. If it has a line "settings:", it gets a server of its own."""
        (dialogue,) = [what] if isinstance(what, Dialogue) else read_dialogues(what)
        if dialogue.settings:
            with our_server(dialogue.settings) as own:
                play((own.host, own.port), dialogue.text, way)
        else:
            server = server or self.server
            play((server.host, server.port), dialogue.text, way)

    def play_three_ways(self, what: str | Dialogue, server: MailServer | None = None) -> None:
        """Play a dialogue line by line, in one piece, and byte by byte."""
        for way in WAYS:
            with self.subTest(way):
                self.play(what, server, way)


# ==================================================================================================
# THE TESTS: the dialogues of mailserver.py, besides the course


def each(reply: str, *lines: str) -> str:
    """Return a piece of a dialogue in which each line gets the same reply."""
    return "\n".join(f"C: {line}\nS: {reply}" for line in lines)


def paths(verb: str, addresses: list[str]) -> list[str]:
    """Return commands with these addresses in them."""
    return [f"{verb}:<{address}>" for address in addresses]


JOSE = "jos\u00e9@b.org"
NO_NAMES = ["", " a b", " caf\u00e9", r" \x07"]
SLIPS = ["", " FORM:<a@b.org>", " <a@b.org>", " FROM <a@b.org>", " FROM : <a@b.org>", " FROM:"]
SLIPS += [" FROM: a@b.org", " FROM:<a@b.org", " FROM:<a@b.org>x", " FROM:<a@b.org>,<b@b.org>"]
NO_RCPT = [" FROM:<b@b.org>", " TO:b@b.org", " TO:<a@b.org>,<b@b.org>", " TO:<a@b.org> <b@b.org>"]
NO_ADDRESSES = ["a@my_host.example", "a..b@b.org", "a@b.org.", ".a@b.org", "a.@b.org", "a@"]
NO_ADDRESSES += ["a@@b.org", "@b.org", "a@-b.org", "a@b-.org", "a@[no]", '"a"b"@b.org']
NO_ADDRESSES += [r"a\rb@b.org", r"a\x20b@b.org", r"a\x00@b.org", r"\xc3\x28@b.org"]
NO_ADDRESSES += ["x" * 65 + "@b.org", f"x@{'e' * 251}.x"]
UNKNOWN = ["FROB", "", " HELO x", "HELOexample.com", "handle", "__init__", "_HELO", "do_HELO"]
UNKNOWN += [r"HELO\x00HELO", r"\xc5\xbf", r"HEL\xc3\xb6 x", r"R\xc5\xbfET", r"\xe2\x80\x8bHELO x"]
BROWSERS = "\n\n".join(
    f"a browser says {verb}\nS: 220 ...\nC: {verb} / HTTP/1.1\nC: NOOP\nS: 421 ...\nS: (closed)"
    for verb in ("GET", "POST", "CONNECT")
)
TYPED_AT_NC = re.sub(r"(?m)^(C: .*)", r"\1\\n", CLASSIC)
BAD_SIZES = ["SIZE", "SIZE=", "SIZE=big", "SIZE=-1"]
TEAM = "S: 250-<ann@x.org>\nS: 250 <bob@x.org>"
STARTTLS = "C: STARTTLS\nS: 220 Ready for TLS\nC: (TLS)"
LOGIN = "AUTH PLAIN AGFubgBzZWNyZXQ="  # ann, secret
NO_PLAIN = ["!!!", "/w==", "AAA", "YW5u", "=", "*", "Ym9iAGFubgBzZWNyZXQ=", "AGFubgBzZWNyZXQ= x"]
POP3 = "S: +OK Simple Mail Server"
BOB = f"{POP3}\nC: USER bob@example.com\nS: +OK ...\nC: PASS x"
OPEN = f"{BOB}\nS: +OK ... messages"
END = "C: QUIT\nS: +OK Bye\nS: (closed)"
CAPA = "C: CAPA\nS: +OK ...\nS: USER\nS: TOP\nS: UIDL\nS: PIPELINING\nS: RESP-CODES"
HEAD = """S: +OK ...
S: Return-Path: <ann@example.com>
S: Delivered-To: bob@example.com
S: Received: from ...
S: ...by ... with ... id ...;
S: ...
S: Subject: hello
S:"""
TOO_EARLY = ["STAT", "LIST", "UIDL", "RETR 1", "DELE 1", "RSET", "TOP 1 0", "SUBSCRIBE", "PASS x"]
NO_NUMBERS = ["LIST 2", "UIDL 0", "DELE 99999999999999999999", "RETR x", "RETR", "RETR \u0661"]
NO_NUMBERS += ["TOP 1", "TOP 1 -1", "TOP 1 x", "TOP 3 0", "LIST -1", "PASS x", "STLS"]

OURS = rf"""
Part 1: order and syntax

the reply to what is out of order names the missing step
S: 220 Simple Mail Server
C: MAIL FROM:<a@example.com>
S: 503 Send HELO before MAIL FROM
C: RCPT TO:<b@example.com>
S: 503 Send MAIL FROM before RCPT TO
{BYE}

a wrong argument; but a tab counts as a blank, and white space at the end is forgiven
S: 220 ...
{each("501 ...HELO your-domain.example...", *["HELO" + one for one in NO_NAMES])}
{each("501 ...EHLO your-domain.example...", *["EHLO" + one for one in NO_NAMES])}
C: HELO\texample.com\x20
S: 250 Hello
C: MAIL\tFROM:<a@b.org>\t
S: 250 OK
{RCPT_TO}
{each("501 ...", "DATA now", "RSET all", "QUIT please")}
C: DATA \x20\t
S: 354 ...
{DOT}
C: QUIT \t
S: 221 Bye
S: (closed)

a slip in MAIL or RCPT: the reply shows how to write it
{HELLO}
{each("501 ...MAIL FROM:<sender@example.com>...", *["MAIL" + slip for slip in SLIPS])}
{each("501 ...domain...", "MAIL FROM:<greta>", "MAIL FROM:<Postmaster>")}
{MAIL_FROM}
{each("501 ...RCPT TO:<recipient@example.com>...", *["RCPT" + slip for slip in NO_RCPT])}
{each("501 ...", "RCPT TO:<bob>", "RCPT TO:<>")}
{RCPT_TO}

no addresses
{HELLO}
{each("501 ...", *paths("MAIL FROM", NO_ADDRESSES[::2]))}
{MAIL_FROM}
{each("501 ...", *paths("RCPT TO", NO_ADDRESSES[1::2]))}
{RCPT_TO}

no commands
S: 220 ...
{each("500 ...", *UNKNOWN)}
{each("500 Leave out ...C:...", "C: NOOP", "c: HELO x", "C:")}
C: HELP
S: 214-AUTH DATA EHLO EXPN HELO HELP MAIL NOOP QUIT RCPT RSET STARTTLS VRFY
S: 214 ...HELP...
{each("214 MAIL FROM:<sender@example.com> - ...", "help mail")}
{each("504 ...", "HELP FROB", "HELP __init__")}

twenty errors
S: 220 ...
{times(20, each("500 ...", "FROB"))}
S: 421 ...
S: (closed)

{BROWSERS}

typed at nc, which sends LF alone
{TYPED_AT_NC}

a line too long is thrown away whole
{HELLO}
{each("250 OK", "NOOP " + "x" * 12281)}
{each("500 ...12288...", *[f"NOOP {'x' * n} QUIT" for n in (12277, 24571, 100_000)])}
{each("250 OK", "NOOP")}

typing errors, and the codes of telnet
S: 220 Simple Mail Server
C: \xff\xfd\x03\xff\xfb\x18\xff\xfa\x18\x00xterm\xff\xf0\b\bHEM\bX\x7fL\xff\xf1O x
S: 250 Hello
C: MAIL FROM:<bob\b\b\bann@example.com>\xff\xfc\x06
S: 250 OK
C: RCPT TO:<caf\xc3\xa9\bf@example.com>
S: 250 OK

one client too many
settings: max_clients=1
S: 220 Simple Mail Server
S2: 421 Too many clients...
S2: (closed)
{BYE}
S3: 220 Simple Mail Server

Part 2: extensions

the limit of a message; a doubled dot counts once
settings: max_size=1000
{INSIDE}
C: {"x" * 998}
{DOT}
{MAIL}
{DATA}
C: {"x" * 999}
{each("552 ...1000...", ".")}
{each("503 ...", "DATA")}
{MAIL}
{DATA}
{times(333, "C: ..")}
{DOT}
{MAIL}
{DATA}
{times(5000, "C: ..QUIT")}
{each("552 ...1000...", ".")}
{EHLO_AGAIN.replace("10485760", "1000")}
{each("552 ...1000...", "MAIL FROM:<a@b.org> SIZE=1001", "MAIL FROM:<a@b.org> SIZE=" + "9" * 20)}
{each("250 OK", "MAIL FROM:<a@b.org> SIZE=1000")}

parameters
{EHLO}
{each("250 OK", "MAIL FROM:<a@b.org> SIZE=1000 BODY=8BITMIME SMTPUTF8", "RSET")}
{each("250 OK", "mail from:<a@b.org> size=10485760 body=7bit auth=<>")}
{each("555 ...", "RCPT TO:<b@b.org> NOTIFY=NEVER", "RCPT TO:<b@b.org> SIZE=1")}
{each("250 OK", "RSET")}
{each("501 ...SIZE...", *["MAIL FROM:<a@b.org> " + one for one in BAD_SIZES])}
{each("501 ...BODY...", "MAIL FROM:<a@b.org> BODY=9BIT")}
{each("501 ...SMTPUTF8...", "MAIL FROM:<a@b.org> SMTPUTF8=yes")}
{each("555 ...", *["MAIL FROM:<a@b.org> " + one for one in ("FROB=1", "__CLASS__", "=")])}
{each("503 ...", "DATA")}
{each("250 Hello", "HELO example.com")}
{each("555 ...EHLO...", "MAIL FROM:<a@b.org> SIZE=1000")}
{each("553 ...SMTPUTF8...", f"MAIL FROM:<{JOSE}>")}
{MAIL}
{each("553 ...SMTPUTF8...", f"RCPT TO:<{JOSE}>")}

lists and users
settings: lists=Team:ann@x.org,bob@x.org users=ann@x.org:secret
S: 220 ...
{each("250 <Team>", "VRFY team", "VRFY <TEAM> SMTPUTF8")}
{each("501 ...", "VRFY", "EXPN")}
{each("250 <ann@x.org>", "VRFY ANN", "VRFY <ann@x.org>")}
C: EXPN team
{TEAM}
C: EXPN <TEAM@any.example> SMTPUTF8
{TEAM}
{each("550 ...", "VRFY bob", "EXPN none", "EXPN ann@x.org", "EXPN __class__")}

commands fail on purpose
settings: fail=RCPT:450,VRFY:421
{SENDER}
{times(30, each("450 ...", "rcpt TO:<b@b.org>"))}
C: RCPT\tTO:<b@b.org>
S: 450 ...
{each("421 ...", "VRFY x")}
S: (closed)

Part 3: trust

before and in TLS
settings: tls users=ann:secret require_auth
{EHLO.replace("AUTH PLAIN LOGIN", "STARTTLS")}
{each("538 ...STARTTLS...", LOGIN)}
{each("530 ...", "MAIL FROM:<a@b.org>")}
{each("501 ...", "STARTTLS now")}
{STARTTLS}
{each("503 ...EHLO...", LOGIN)}
{EHLO_AGAIN}
{each("530 ...AUTH...", "MAIL FROM:<a@b.org>")}
{each("503 ...", "STARTTLS")}
{each("235 ...", LOGIN)}
{each("503 ...", LOGIN)}
{each("250 OK", "MAIL FROM:<a@b.org> AUTH=<>", "RCPT TO:<b@b.org>")}
{MESSAGE}
{BYE}

TLS forgets what was said before
settings: tls
{ENVELOPE}
{STARTTLS}
{each("503 Send HELO before MAIL FROM", "MAIL FROM:<a@b.org>")}
{each("503 Send MAIL FROM before RCPT TO", "RCPT TO:<b@b.org>")}

TLS from the first byte; where no users are listed, any name and password will do, but none empty
settings: tls tls_first
C: (TLS)
{EHLO}
{each("503 ...", "STARTTLS")}
{each("535 ...", "AUTH PLAIN AGFubgA=")}
{each("334 UGFzc3dvcmQ6", "AUTH LOGIN YW5u")}
{each("535 ...", "=")}
{MAIL_FROM}
{each("503 ...", LOGIN)}
{each("250 OK", "RSET")}
{each("235 ...", LOGIN)}

refusals of AUTH
settings: users=ann:secret
S: 220 ...
{each("502 ...", "STARTTLS")}
{each("503 ...EHLO...", LOGIN)}
{each("250 Hello", "HELO example.com")}
{each("503 ...EHLO...", LOGIN)}
{EHLO_AGAIN}
{each("501 ...AUTH PLAIN...", "AUTH")}
{each("504 ...AUTH PLAIN...", "AUTH CRAM-MD5", "AUTH PLAINAGFubgBzZWNyZXQ=")}
{each("501 ...", *["AUTH PLAIN " + one for one in NO_PLAIN])}
{each("334 VXNlcm5hbWU6", "AUTH LOGIN")}
{each("501 ...", "*")}
{each("334 ...", "auth plain")}
{each("501 ...", "")}
{each("334 ...", "AUTH PLAIN")}
{each("235 ...", "YW5uAGFubgBzZWNyZXQ=")}

an empty password is wrong, as are others
settings: users=ann:secret,bob:
{EHLO}
{each("535 ...", "AUTH PLAIN AGJvYgA=", "AUTH PLAIN AGFubgB3cm9uZw==")}
{each("334 UGFzc3dvcmQ6", "AUTH LOGIN Ym9i")}
{each("535 ...", "=")}
{BYE}

Part 5: collecting mail

a session of POP3
settings: pop3 mail=2
{POP3}
{CAPA}
S: .
{each("+OK ...", "noop", "user Bob@Example.com")}
{each("+OK 2 messages", "Pass whatever you like")}
{each("+OK 2 ...", "STAT", "LIST 2", "UIDL 2")}
C: LIST
S: +OK 2 messages
S: 1 ...
S: 2 ...
S: .
C: RETR 2
{HEAD}
S: At one?
S: ..
S: .
C: TOP 1 0
{HEAD}
S: .
C: TOP 1 1
{HEAD}
S: At one?
S: .
{each("-ERR ...", *NO_NUMBERS[2:])}
{END}

a mail that is deleted leaves the others their numbers, and RSET takes that back
settings: pop3 mail=2
{OPEN}
{each("+OK ...", "DELE 1")}
{each("-ERR No such message...", "DELE 1", "RETR 1", "TOP 1 0", "LIST 1", "UIDL 1")}
{each("+OK 1 ...", "STAT")}
C: UIDL
S: +OK ...
S: 2 ...
S: .
{each("-ERR ...", "QUIT now")}
{each("+OK ...", "RSET")}
{each("+OK 2 ...", "STAT")}
{END}

before the login
settings: pop3
{POP3}
{each("-ERR ...USER...", *TOO_EARLY, "USER", "USER bob", "USER bob@example.com x")}
{each("-ERR Unknown command...", "FROB", "HELO x", "ſtat", "")}
{each("-ERR Line too long...", "x" * 13_000)}
{END}

no mail
settings: pop3
{OPEN}
{each("-ERR ...", *NO_NUMBERS)}
C: SUBSCRIBE\r\n\r\nSTAT\r\nSUBSCRIBE
S: +OK ...
S: +OK Stopped
S: +OK 0 0
S: +OK ...
{each("-ERR Line too long...", "x" * 13_000)}
{END}

a web browser is sent away
settings: pop3
{POP3}
{each("-ERR ...", "GET / HTTP/1.0")}
S: (closed)

who says nothing has to go
settings: pop3 timeout=0.3
{POP3}
S: -ERR ...
S: (closed)

a mailbox is for one session
settings: pop3 mail=1
{OPEN}
S2: +OK Simple Mail Server
C2: USER BOB@example.com
S2: +OK ...
C2: PASS x
S2: -ERR [IN-USE] ...
{each("+OK ...", "DELE 1")}
{END}
C2: PASS x
S2: +OK 0 messages

wrong passwords
settings: pop3 users=bob@example.com:secret
{BOB}
S: -ERR Wrong...
C: PASS \xff
S: -ERR Wrong...
{each("+OK ...", "USER nobody@example.com")}
{each("-ERR ...", "PASS secret")}
{END}

a password goes over TLS only, if there is TLS
settings: pop3 tls users=bob@example.com:secret
{POP3}
{CAPA}
S: STLS
S: .
{each("-ERR ...STLS...", "USER bob@example.com")}
{each("+OK ...", "STLS")}
C: (TLS)
{each("-ERR ...TLS...", "STLS")}
{CAPA}
S: .
{each("+OK ...", "USER bob@example.com")}
{each("-ERR Wrong...", "PASS x", "PASS")}
{each("+OK 0 messages", "PASS secret")}
C: SUBSCRIBE\r\nenough\r\nSTAT
S: +OK ...
S: +OK Stopped
S: +OK 0 0
{END}

STLS forgets what came in the clear
settings: pop3 tls
{POP3}
{each("+OK ...", "USER bob@example.com", "STLS")}
C: (TLS)
{each("-ERR ...USER...", "PASS x")}
{END}
"""


class DialoguesTest(DialogueTest):
    """All dialogues that stand as text, to the letter, in three ways."""

    def test_course(self) -> None:
        self.serve()
        for dialogue in read_course():
            with self.subTest(dialogue.title):
                self.play_three_ways(dialogue)

    def test_ours(self) -> None:
        """Play the dialogues; and see that no reply is long, or says what the client has sent."""
        self.serve()
        with self.assertLogs("mailserver", logging.INFO) as logs:
            for dialogue in read_dialogues(OURS):
                with self.subTest(dialogue.title):
                    self.play_three_ways(dialogue)
        for record in logs.records:
            said = record.getMessage().partition("] S: ")[2]
            self.assertLessEqual(len(said), 100, said)
            self.assertNotRegex(said, r"b\.org|FROB|Error")


# ==================================================================================================
# THE TESTS: parts 1 to 3


class WireTest(DialogueTest):
    """Lines, line ends and dots; what arrives, and for whom."""

    def test_nothing_is_smuggled_in(self) -> None:
        self.serve()
        ends = [r".\n", r"\n.\n", r"\r.\r", r"\n.\r\n", r"\r\n.\n", r"\r\n.\r", r"\r\r\n.\r\r\n"]
        for size in range(65532, 65537):
            ends += ["x" * size + end for end in (r"\n.\n", r"\n.\r\n", r".\r\n")]
        for end in ends:
            with self.subTest(end[-12:], octets=len(end)):
                self.inbox.clear()
                forged = f"C: x{end}\\c\nC: MAIL FROM:<evil@b.org>\n{DOT}\n{BYE}"
                self.play_three_ways(f"{INSIDE}\n{forged}")
                self.assertEqual([one.content.count(b"evil") for one in self.inbox], [1, 1, 1])

    def test_a_long_line_hides_no_dot(self) -> None:
        self.serve()
        for size in range(65532, 65537):
            with self.subTest(size):
                self.play_three_ways(f"{INSIDE}\nC: {'x' * size}\n{DOT}\n{BYE}")

    def test_what_arrives(self) -> None:
        self.serve()
        mails = [  # how DATA ends, the lines behind it, and what arrives, with | for CRLF
            ("", ".", b""),
            (r"\n", r".\n", b""),
            ("", r"..|...|..a|.b|a..||\x20.|.", b".|..|.a|b|a..|| .|"),
            ("", r"a\n.b\n..c\n.\nd|..e|.", b"a\n.b\n..c\n.\nd|.e|"),
            ("", r"\xff\x00\b\xff\xfd\x06|a\r\x00.|.", b"\xff\0\b\xff\xfd\6|a\r\0.|"),
            (r"\n", r"x\n|..\n|.\n", b"x\n.\n"),
            (r"\n", r"x\n|.", b"x\n"),
            (r"\n", r"x|.", b"x|"),
        ]
        mails += [("", f"{'x' * n}|..|x\\r|.", b"x" * n + b"|.|x\r|") for n in range(65533, 65538)]
        for end, lines, content in mails:
            with self.subTest(content[-30:], octets=len(content)):
                self.inbox.clear()
                text = "\n".join("C: " + line for line in lines.split("|"))
                text = f"C: DATA{end}\nS: 354 ...\n{text}\nS: 250 ..."
                self.play_three_ways(f"{ENVELOPE}\n{text}\n{BYE}")
                expected = content.replace(b"|", b"\r\n")
                self.assertEqual([one.content for one in self.inbox], [expected] * 3)

    def test_the_end_of_input_completes_nothing(self) -> None:
        self.serve()
        for text in (r"text\r\n.\c", r"text\r\n.\r\c", r"cut o\c"):
            self.play_three_ways(f"{INSIDE}\nC: {text}")
        self.play_three_ways("S: 220 ...\nC: QUIT\\c")
        self.assertEqual(self.inbox, [])

    def test_ctrl_c_in_telnet(self) -> None:
        self.serve()
        client = self.client()
        client.converse("S: 220 ...\nC: half a li\\xff\\xf4\\xff\\xfd\\x06")  # IP, DO TIMING-MARK
        client.expect("\\xff\\xfc\x06500 ...")  # WONT TIMING-MARK

    def test_a_reply_is_one_line(self) -> None:
        class Handler(SecureHandler):
            def do_ECHO(self, arg: str) -> None:
                """ECHO text - sends it back"""
                self.reply(250, arg, "and\r\n250 forged\n")

        self.serve(Handler)
        self.play("S: 220 ...\nC: ECHO one\\rtwo\nS: 250-one two\nS: 250 and  250 forged...")

    def test_recipients(self) -> None:
        good = [r'"a\x20b"@b.org', r'"a\"b>@"@b.org', r'"a>\x20b"@b.org', '""@b.org', "b@[1.2.3.4]"]
        good += ["!#$%&'*+-/=?^_`{|}~@b.org", "Bob.B+tag@Example.COM", "bob@[IPv6:2001:db8::1]"]
        good += ["bob@localhost", "bob@a-b.example", "x" * 64 + "@b.org", f"x@{'e' * 250}.x", JOSE]
        good += ["jose\u0301@jose\u0301.example", "\u0928\u0938\u094d@\u0e2a\u0e27\u0e31.example"]
        senders = [line for one in good for line in (f"MAIL FROM:<{one}> SMTPUTF8", "RSET")]
        more = ["@a.example,@b.example:eve@b.org", "Postmaster", "team", "TEAM@b.org", good[0]]
        self.serve(lists={"Team": ["ann@x.org", "eve@b.org"]})
        text = each("250 OK", *senders, "MAIL FROM:<> SMTPUTF8", *paths("RCPT TO", good + more))
        self.play(f"{EHLO}\n{text}\n{MESSAGE}")
        expected = [one.replace(r"\x20", " ") for one in good]
        expected += ["eve@b.org", "Postmaster", "ann@x.org"]
        self.assertEqual(self.inbox[0].recipients, expected)

    def test_a_thousand_recipients(self) -> None:
        self.serve()
        many = each("250 OK", *paths("RCPT TO", [f"u{n}@example.com" for n in range(1000)]))
        late = each("452 Too many recipients...", "RCPT TO:<late@example.com>")
        self.play(f"{SENDER}\n{many}\n{late}\n{MESSAGE}", way=IN_ONE_PIECE)
        self.assertEqual(len(self.inbox[0].recipients), 1000)

    def test_smtplib(self) -> None:
        mail = "a@b.org", ["b@b.org", "c@b.org"], "Subject: =?utf-8?q?caf=C3=A9?=\n\n.\n..\n"
        self.serve(users={"ann": "secret"}, tls=server_tls())
        with smtplib.SMTP("localhost", self.server.port, "ann.example.com") as client:
            client.starttls(context=client_tls())
            client.login("ann", "secret")
            client.sendmail(*mail)
        self.serve(tls=server_tls(), tls_first=True)
        with smtplib.SMTP_SSL("localhost", self.server.port, context=client_tls()) as client:
            client.sendmail(*mail)
        expected = mail[1], mail[2].replace("\n", "\r\n").encode()
        self.assertEqual([(one.recipients, one.content) for one in self.inbox], [expected] * 2)
        one = self.inbox[0]
        self.assertEqual((one.helo, one.peer, one.user), ("ann.example.com", "127.0.0.1", "ann"))
        self.assertEqual((one.sender, one.message["Subject"]), ("a@b.org", "caf\u00e9"))

    def test_curl(self) -> None:
        need("curl")
        self.serve(users={"ann": "pass word"}, tls=server_tls())
        command = ["curl", "-sS", "--ssl-reqd", "--cacert", certificate(self.folder()), "-T", "-"]
        command += ["--user", "ann:pass word", f"smtp://localhost:{self.server.port}"]
        command += ["--mail-from", "a@b.org", "--mail-rcpt", "b@b.org"]
        subprocess.run(command, input=b"Subject: x\n\n.\nunix\n", check=True, timeout=PATIENCE)
        content = self.inbox[0].content.replace(b"\r\n", b"\n").strip()
        self.assertEqual(content, b"Subject: x\n\n.\nunix")


class LimitsTest(DialogueTest):
    """Whatever a client sends costs little."""

    def test_silence(self) -> None:
        for text in (INSIDE, "S: 220 ...", f"S: 220 ...\n{STARTTLS}"):
            end = "C: half\\c\nS: 421 ...\nS: (closed)"
            self.play(f"settings: timeout=0.3 tls\n{text}\n{end}")

    def test_memory(self) -> None:
        tracemalloc = need_tracemalloc()
        size = 2**22
        for start, piece, reply, most in [
            (HELLO, b"x" * 2**16, "500 ...", 2**20),
            (INSIDE, b"x" * 2**16, "552 ...", 1.4 * size),
            (INSIDE, (b"x" * 30 + b"\r\n") * 2**11, "552 ...", 1.4 * size),
        ]:
            client = self.client(self.serve(max_size=size))
            client.converse(start)
            tracemalloc.start()
            self.stack.callback(tracemalloc.stop)
            for _ in range(3 * size // 2**16):
                client.socket.sendall(piece)
            client.send(b"\r\n.\r\n" if start == INSIDE else b"\r\n")
            client.expect(reply)
            self.assertLess(tracemalloc.get_traced_memory()[1], most)

    def test_time(self) -> None:
        """Have clients send what may be costly to match, while another one is served."""
        parts = [b"a", b"a.", b"a-", b"@", b",", b"<", b">", rb"\a", b" ", b"\t", b"AUTH", b"AUTH "]
        parts += [b"PASS", b"SIZE=1 ", b"\b", b"\r", b"\r\0", b"\xff", b"\xff\xfa", b"\xff\xfaa"]
        starts = [b"MAIL FROM:<", b"VRFY a", b"AUTH PLAIN ", b"NOOP ", b"NOOP "]
        streams = [[(b"NOOP " + b"x" * 493 + b"\r\n") * 1000], [b"x" * 100 + b"\r\0"] * 500]
        streams.append([b"HELO x\r\nMAIL FROM:<>\r\nRCPT TO:<b@b.org>\r\nDATA\r\n", b"x" * 2**20])
        for part in parts:
            tail = part * (12_000 // len(part)) + b"x\r\n"
            streams.append([start + tail for start in starts * 3])
        self.serve()
        before = time.process_time()
        with self.assertLogs("mailserver"):
            for stream in streams:
                client = self.client()
                with contextlib.suppress(OSError):  # twenty errors
                    for packet in [b"EHLO x\r\n", *stream]:
                        client.socket.sendall(packet)
                client.end_input()
            self.play(f"{HELLO}\n{BYE}")
            wait_until(lambda: not self.server.sessions)
        self.assertLess(time.process_time() - before, 10)  # it takes one


class LifeTest(DialogueTest):
    """Sessions come, go, and are ended."""

    def in_thread(self, function: Callable[[], object]) -> threading.Thread:
        """Call a function in a thread, which has to end before the test does."""
        thread = threading.Thread(target=function, daemon=True)
        self.stack.callback(lambda: self.assertFalse(thread.is_alive()))
        self.stack.callback(thread.join, PATIENCE)
        thread.start()
        return thread

    def test_serial_mode(self) -> None:
        self.serve(serial=True)
        first, second = self.client(), self.client()
        first.expect("220 ...")
        second.send(b"HELO x\r\n")
        self.assertFalse(second.hear(0.1))
        first.converse(BYE)
        second.converse("S: 220 ...\nS: 250 Hello")

    def test_many_at_once(self) -> None:
        before = threading.active_count()
        self.serve()
        clients = [self.client() for _ in range(50)]
        for piece in (ENVELOPE, f"{DATA}\nC: x", f"{DOT}\n{BYE}"):
            for client in clients:
                client.converse(piece)
        self.assertEqual(len(self.inbox), 50)
        wait_until(lambda: threading.active_count() <= before + 1)

    def test_stop_says_goodbye_to_all(self) -> None:
        starts = ["S: 220 ...", "S: 220 ...\nC: HELO\\c", f"{INSIDE}\nC: half\\c"]
        for serial in (False, True):
            self.serve(serial=serial)
            clients = [self.client() for _ in starts]
            for client, start in zip(clients[: 1 if serial else 3], starts, strict=False):
                client.converse(start)
            self.in_thread(self.server.stop).join(PATIENCE)
            for client in clients:
                client.converse("S: 421 ...\nS: (closed)")
            MailServer((self.server.host, self.server.port), SecureHandler).stop()  # it is free
        self.assertEqual(self.inbox, [])

    def test_stop_before_start_twice_and_with_a_frozen_clock(self) -> None:
        self.in_thread(MailServer(("127.0.0.1", 0), SecureHandler).stop)
        client = self.client(self.serve())
        client.expect("220 ...")
        frozen = lambda: 0.0  # noqa: E731
        patch = unittest.mock.patch
        with patch("time.time", frozen), patch("time.monotonic", frozen):
            stopping = self.in_thread(self.server.stop)
            client.converse("S: 421 ...\nS: (closed)")
        stopping.join(PATIENCE)
        self.in_thread(self.server.stop)

    def test_stop_while_a_client_does_not_read(self) -> None:
        for serial in (False, True):
            client = self.client(self.serve(serial=serial))
            client.socket.settimeout(0.1)
            with contextlib.suppress(TimeoutError):
                while True:
                    client.socket.sendall(b"HELP\r\n" * 10_000)
            self.in_thread(self.server.stop).join(PATIENCE)
            wait_until(lambda: not self.server.sessions)

    def test_stop_while_a_client_floods(self) -> None:
        def send(client: Client, data: bytes) -> None:
            with contextlib.suppress(OSError):
                while True:
                    client.socket.sendall(data)

        for start, line in (("S: 220 ...", b"NOOP\r\n"), (INSIDE, b"x\r\n")):
            client = self.client(self.serve())
            client.converse(start)
            self.in_thread(functools.partial(send, client, line * 1000))
            self.in_thread(self.server.stop)
            received = [b" "]
            while received[-1]:
                received.append(client.socket.recv(2**20))
            self.assertRegex(b"".join(received), rb"421 .*\r\n\Z")

    def test_stop_from_a_subscriber(self) -> None:
        for serial in (False, True):
            self.serve(serial=serial, subscribers=[lambda _: self.server.stop()])
            self.play(f"{INSIDE}\n{DOT}\nS: 421 ...\nS: (closed)")
            with self.assertRaises(OSError):
                self.client()

    def test_shutdown(self) -> None:
        with MailServer(("127.0.0.1", 0), SecureHandler) as server:
            loop = self.in_thread(server.serve_forever)
            client = self.client(server)
            client.expect("220 ...")
            self.in_thread(server.shutdown).join(PATIENCE)
            loop.join(PATIENCE)
            self.assertFalse(loop.is_alive())
            client.converse("C: NOOP\nS: 250 OK")
        client.converse("S: 421 ...\nS: (closed)")

    def test_faults_of_ours(self) -> None:
        kinds = [TimeoutError, ConnectionResetError, OSError, SystemExit, asyncio.CancelledError]
        errors = {kind.__name__: kind("inside") for kind in kinds}

        def fail(name: str) -> None:
            raise errors[name]

        class Handler(SecureHandler):
            def do_FAIL(self, arg: str) -> None:
                """FAIL name - raises an exception"""
                fail(arg)

            def do_TIME(self, arg: str) -> None:
                """TIME - forgets to reply"""

        failed = "S: 421 The server failed...\nS: (closed)"
        for name, serial in itertools.product(errors, (False, True)):
            with self.subTest(name, serial=serial):
                self.serve(Handler, serial=serial, subscribers=[lambda mail: fail(mail.helo)])
                self.play(f"S: 220 ...\nC: FAIL {name}\n{failed}")
                self.expect_stderr("Traceback", "in do_FAIL", f"{name}: inside")
                hello = HELLO.replace("example.com", name)
                dot = f"C: .\nC: MAIL FROM:<evil@b.org>\n{failed}"
                self.play(f"{hello}\n{MAIL}\n{DATA}\n{dot}", way=IN_ONE_PIECE)
                self.expect_stderr("Traceback", f"{name}: inside")
                self.play(f"{HELLO}\n{BYE}")
        self.play(f"S: 220 ...\nC: TIME\n{failed}")
        self.expect_stderr("TIME")

    def test_setup_fails(self) -> None:
        class Handler(SecureHandler):
            def setup(self) -> None:
                super().setup()
                raise ZeroDivisionError

        self.client(self.serve(Handler)).expect("(closed)")
        self.expect_stderr("ZeroDivisionError")
        self.assertFalse(self.server.sessions)

    def test_clients_that_leave_are_no_fault_of_ours(self) -> None:
        self.stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # wrap_socket() leaves its socket open after a reset
        self.serve(tls=server_tls())
        starttls = "S: 220 ...\nC: STARTTLS\nS: 220 ..."
        for text in ("S: 220 ...", "S: 220 ...\nC: HELP", f"{INSIDE}\nC: x", starttls):
            client = self.client()
            client.converse(text)
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()  # with a reset
        for junk in (b"this is no handshake\r\n", b"\x16\x03\x01", b""):
            client = self.client()
            client.converse(starttls)
            client.socket.sendall(junk)
            client.end_input()
        wait_until(lambda: not self.server.sessions)

    def test_settings(self) -> None:
        for name in ("max_sise", "reply", "handle", "do_HELO", "__init__"):
            with self.assertRaisesRegex(TypeError, name):
                MailServer(("127.0.0.1", 0), SecureHandler, **{name: 5})

    def test_hosts(self) -> None:
        for host in ("localhost", "::1"):
            try:
                server = MailServer((host, 0), SecureHandler, subscribers=[self.inbox.append])
            except OSError:
                self.skipTest(f"no {host} on this machine")
            with server:
                server.start()
                self.play(f"{ENVELOPE}\n{MESSAGE}", server)
            self.assertEqual(self.inbox[-1].peer, server.host)

    def test_no_file_descriptor_left(self) -> None:
        accept = socket.socket.accept
        errors = [OSError(errno.EMFILE, "Too many open files")] * 3

        def failing(listener: socket.socket) -> Any:
            if errors:
                raise errors.pop()
            return accept(listener)

        self.serve()
        accepting = unittest.mock.patch("socket.socket.accept", failing)
        with accepting, unittest.mock.patch("time.sleep") as sleep:
            self.play(f"{HELLO}\n{BYE}")
        self.assertGreaterEqual(len([call for call in sleep.mock_calls if call.args[0] >= 0.05]), 3)


class TLSTest(DialogueTest):
    """What goes wrong around TLS."""

    def setUp(self) -> None:
        super().setUp()
        self.serve(tls=server_tls())

    def test_what_came_behind_starttls_is_dropped(self) -> None:
        for injected in (b"FROB\r\n", b"RSET\r\nMAIL FROM:<evil@b.org>\r\n", b"X"):
            client = self.client()
            client.converse("S: 220 ...\nC: HELO x\nS: 250 Hello")
            client.send(b"STARTTLS\r\n" + injected)
            client.expect("220 ...")
            client.start_tls()
            client.converse(f"C: NOOP\nS: 250 OK\nC: RCPT TO:<b@b.org>\nS: 503 ...\n{BYE}")

    def test_close_notify(self) -> None:
        for end in ("C: QUIT\nS: 221 Bye", "C: GET /\nS: 421 ..."):
            client = self.client()
            client.converse(f"S: 220 ...\n{STARTTLS}\n{end}")
            self.assertEqual(client.socket.recv(1), b"")  # or this is an SSLEOFError

    def test_stop(self) -> None:
        clients = [self.client(), self.client()]
        for client in clients:
            client.converse(f"S: 220 ...\n{STARTTLS}\nC: NOOP\nS: 250 OK")
        clients[1].send(b"NOO")
        self.client().converse("S: 220 ...\nC: STARTTLS\nS: 220 ...")  # and no handshake
        self.server.stop()
        for client in clients:
            client.converse("S: 421 ...\nS: (closed)")
        self.assertFalse(self.server.sessions)


class ConsoleTest(DialogueTest):
    """What the teacher sees."""

    def shown(self, lines: str, leave: bool = True, **settings: Any) -> str:
        """Type lines; return what the console shows, with # for the session's number."""
        self.serve(**settings)
        with self.assertLogs("mailserver", logging.INFO) as logs:
            client = self.client()
            client.expect("220 ...")
            client.send(b"".join(octets(line) for line in lines.split("|")))
            if leave:
                client.end_input()
            wait_until(lambda: not self.server.sessions)
        return "".join(re.sub(r"^\[\d+", "[#", one.getMessage()) + "\n" for one in logs.records)

    def test_a_dialogue(self) -> None:
        start = r"HELO ann.example.com\n|MAIL FROM:<a@b.org>|RCPT TO:<b@b.org>|DATA|At one?\n"
        shown = self.shown(rf"{start}|\x1b[2J\xc2\x9b\xe2\x80\xae|.|QUIT").splitlines()
        self.assertIn("127.0.0.1", shown[0])
        self.assertEqual(shown[2:4], ["[#] C: HELO ann.example.com<LF>", "[# ann] S: 250 Hello"])
        mail = ["| At one?<LF>", r"| \x1b[2J\x9b\u202e", "C: .", "S: 250 Message accepted"]
        expected = [f"[# ann] {line}" for line in [*mail, "C: QUIT", "S: 221 Bye"]]
        self.assertEqual(shown[-6:], expected)

    def test_what_is_long(self) -> None:
        self.assertRegex(self.shown(f"NOOP {'x' * 600}"), r"\[#\] C: NOOP x{9,595}\.\.\. .*605")
        start = "HELO x|MAIL FROM:<a@b.org>|RCPT TO:<b@b.org>|DATA|"
        for count, more in [(100, []), (9000, ["... 8,900 more lines"])]:
            shown = self.shown(start + "|".join(f"line {n}" for n in range(count)) + "|.")
            expected = [f"line {n}" for n in range(100)] + more
            self.assertEqual(re.findall(r"(?m)^\[# x\] \| (.*)", shown), expected)

    def test_clients_that_leave(self) -> None:
        mail = r"HELO x|MAIL FROM:<a@b.org>|RCPT TO:<b@b.org>|DATA|QUIT|hal\c"
        self.assertRegex(self.shown(mail), r"\] \| QUIT\n.* hal\n.*in the middle of a message")
        self.assertRegex(self.shown("NOOP"), r"\] - .*gone")
        self.assertRegex(self.shown(r"QUI\c"), r"\] .*QUI")

    def test_no_password_is_shown(self) -> None:
        table = r"""
            AUTH PLAIN ~; auth  plain  ~; AUTH ~; AUTH LOGIN ~; AUTH XOAUTH2 ~; AUTH:PLAIN ~; pass ~
            AUTH|~; AUTH PLAIN|~; AUTH PLAIN|* ~; AUTH PLAIN|help ~; AUTH LOGIN|YW5u|~; AUTH FROB| ~
            AUTH LOGIN|YW5u|quit ~; AUTH PLAIN|*|~; AUTH PLAIN|* |~; AUTH PLAIN !|~; AUTH LONG~
            AUTH LOGIN|YW5u|=|~; AUTH LOGIN|LONG|~; AUTH PLAIN|~\c; AUTH ~\c; AUTH\tPLAIN\t~; PASS|~
            AUTHPLAIN ~; AUTX\bH PLAIN ~; NOOP\rAUTH PLAIN ~; \xff\xfb\x01AUTH PLAIN ~
            \x1b[A\x1b[AAUTH PLAIN ~; \xef\xbb\xbfAUTH PLAIN ~; > C: AUTH PLAIN ~; PASS=~
            12:01 > AUTH PLAIN ~; C: AUTH LOGIN|S: 334 x|C: YW5u|C: ~; PASS:~; USER x|~"""
        for line in map(str.strip, re.split("[;\n]", table.strip())):
            lines = line.replace("~", "secret").replace("LONG", "A" * 13_000)
            for users in ({"ann": "secret"}, {}):
                with self.subTest(line, users=users):
                    self.assertNotIn("secret", self.shown("EHLO x|" + lines, users=users))

    def test_what_is_no_password_is_shown(self) -> None:
        for line in ["HELO auth example", "MIAL FROM:<ann@example.com>", "hello", "VRFY author"]:
            self.assertIn(f"] C: {line}\n", self.shown(line))
            self.assertIn(f"] C: {line}\n", self.shown(f"EHLO x|{LOGIN}|{line}"))
        shown = self.shown("EHLO x|AUTH LOGIN|*|AUTH PLAIN secret")
        self.assertIn("] C: AUTH LOGIN\n", shown)
        self.assertIn("] C: AUTH PLAIN ********\n", shown)


# ==================================================================================================
# THE TESTS: parts 4 to 6


def files(folder: str) -> list[Path]:
    """Return all files below a folder, in order."""
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


class MaildirTest(DialogueTest):
    """What the tests of parts 4 and 5 share: a server, and a Maildir that keeps its mail."""

    def setUp(self) -> None:
        super().setUp()
        self.above = self.folder()
        self.root = os.path.join(self.above, "root")
        self.maildir = Maildir(self.root)
        self.smtp = self.serve(subscribers=[self.maildir.keep, self.inbox.append])

    def send(self, *recipients: str, content: str = "hello", reply: str = "250 ...") -> None:
        rcpt = each("250 OK", *(f"RCPT TO:<{address}>" for address in recipients))
        end = f"{DATA}\nC: {content}\nC: .\nS: {reply}"
        self.play(f"{HELLO}\nC: MAIL FROM:<a@example.com>\nS: 250 OK\n{rcpt}\n{end}", self.smtp)

    def keep(self, content: bytes = b"x\r\n", to: str = "bob@example.com") -> Path:
        """Keep a message; return the file that it is in."""
        before = set(files(self.root))
        self.maildir.keep(Envelope("a@example.com", [to], content))
        return (set(files(self.root)) - before).pop()

    def patch(self, name: str, function: Any) -> Any:
        """Put a function, which gets the real one first, in place of one of os."""
        real = getattr(os, name)
        return unittest.mock.patch.object(
            os, name, lambda *args, **more: function(real, *args, **more)
        )


class KeepingTest(MaildirTest):
    """Part 4."""

    def test_a_copy_for_each_recipient(self) -> None:
        german = unittest.mock.Mock(side_effect=lambda form, *_: "M\xe4r" if "%" in form else form)
        with unittest.mock.patch("time.strftime", german):  # names the months in a locale
            self.send("Bob@example.com", "ann@example.com", "bob@EXAMPLE.com", "ann@example.com")
        places = [path.relative_to(self.root).parts[:2] for path in files(self.root)]
        self.assertEqual(places, [("ann@example.com", "new"), ("bob@example.com", "new")])
        self.assertRegex(
            files(self.root)[0].read_text(encoding="ascii"),
            r"^Return-Path: <a@example\.com>\nDelivered-To: ann@example\.com\n"
            r"Received: from example\.com \(\[127\.0\.0\.1\]\)\n\tby \S+ with SMTP id \S+;\n"
            r"\t[A-Z][a-z]{2}, \d\d? [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d [+-]\d{4}\nhello\n$",
        )

    def test_content(self) -> None:
        lines = b"Subject: x\r\n\r\ncaf\xe9 \xff\0\r\n.\r\n..\r\n \r\n" + b"x" * 70_000 + b"\r\n"
        kept = self.keep(lines + b"bare\rCR\r\nbare\nLF\r\n\r\n").read_bytes().split(b"\n", 5)[5]
        self.assertEqual(kept, lines.replace(b"\r\n", b"\n") + b"bare\rCR\nbare\nLF\n\n")
        for content in (b" x\r\n", b"\tx\r\n"):  # or it would continue our last line
            self.assertTrue(self.keep(content).read_bytes().endswith(b"\n\n" + content[:2] + b"\n"))

    def test_names_of_mailboxes(self) -> None:
        hostile = ["..", ".", "", "../x", "../../x", "/x", "..\\x", "con", "nul.x@y", "com1.x@y"]
        hostile += ["x" * 400, "x" * 401, "~root@y", "a:b@y", "%2e%2e", "b*?|@y", "x."]
        self.smtp = self.serve(SMTPHandler, subscribers=[self.maildir.keep])
        self.send("Bob+x_y-z@Example.COM", *hostile)
        names = os.listdir(self.root)
        self.assertEqual((os.listdir(self.above), len(names)), (["root"], len(hostile) + 1))
        self.assertIn("bob+x_y-z@example.com", names)
        for name in names:
            self.assertRegex(name, r"^[A-Za-z0-9%+@~_-][A-Za-z0-9%+@._-]{0,249}$")
            self.assertNotRegex(name, r"(?i)^(con|nul|com1)(\.|$)")

    @unittest.skipIf(os.name == "nt", "Windows has other rights")
    def test_for_its_owner_only(self) -> None:
        self.stack.callback(os.umask, os.umask(0))
        self.root = os.path.join(self.above, "other")
        self.maildir = Maildir(self.root)
        self.keep()
        for path in (Path(self.root), *Path(self.root).rglob("*")):
            self.assertEqual(path.stat().st_mode & 0o077, 0, path)

    def test_all_copies_or_none(self) -> None:
        """Have each call of the system fail in turn, until the message gets through."""
        errors = {"mkdir": OSError(errno.EIO, "no"), "open": OSError(errno.EMFILE, "no")}
        errors |= {"fsync": OSError(errno.ENOSPC, "no"), "rename": OSError(errno.EDQUOT, "no")}
        for name, error in [*errors.items(), ("fsync", MemoryError())]:
            for call in range(100):
                left = [call]

                def fail(
                    real: Any, *args: Any, left: Any = left, error: Any = error, **more: Any
                ) -> Any:
                    left[0] -= 1
                    if left[0] == -1:
                        raise error
                    return real(*args, **more)

                recipients = [f"ann-{name}-{call}@x.org", f"bob-{name}-{call}@x.org"]
                before, envelope = files(self.root), Envelope("", recipients, b"hello\r\n")
                try:
                    with self.patch(name, fail):
                        self.maildir.keep(envelope)
                    break
                except Refused as refusal:
                    full = getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT)
                    self.assertEqual(refusal.args[0], 452 if full else 451)
                self.assertEqual(files(self.root), before)
                self.maildir.keep(envelope)
                self.assertEqual(len(files(self.root)), len(before) + 2)
            self.assertGreater(call, 1, name)
        self.expect_stderr("not kept")

    @unittest.skipIf(os.name == "nt", "Windows has no such limit")
    def test_a_full_disk(self) -> None:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_FSIZE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        self.send("bob@example.com", content=r"xx\r\n" * 9000, reply="452 Not kept...")
        self.assertEqual((files(self.root), self.inbox), ([], []))
        self.expect_stderr("not kept")
        self.send("bob@example.com")

    @unittest.skipIf(os.name == "nt", "Windows has no call for what a directory needs")
    def test_order_of_what_happens(self) -> None:
        root = os.path.join(self.above, "other")
        paths: dict[int, str] = {}
        events, before_the_250 = [], []

        def note_path(real: Any, path: Any, *args: Any, **more: Any) -> Any:
            descriptor = real(path, *args, **more)
            paths[descriptor] = os.path.relpath(path, root)
            return descriptor

        def note(real: Any, *args: Any) -> None:
            path = paths[args[0]] if args[0] in paths else os.path.relpath(args[-1], root)
            events.append(re.sub("(tmp|new)/.*", r"\1/...", path))
            real(*args)

        with self.patch("open", note_path), self.patch("fsync", note), self.patch("rename", note):
            maildir = Maildir(root)
            self.assertIn("..", events)  # the new directory's own name
            events.clear()
            keep = [maildir.keep, lambda _: before_the_250.extend(events)]
            self.smtp = self.serve(subscribers=keep)
            self.send("ann@x.org", "bob@x.org")
        order = ["ann@x.org/tmp/...", "bob@x.org/tmp/...", "ann@x.org/new/...", "bob@x.org/new/..."]
        self.assertEqual(before_the_250[:4], order)
        synced = {"ann@x.org", "ann@x.org/new", "bob@x.org", "bob@x.org/new", "."}
        self.assertLessEqual(synced, set(before_the_250[4:]))

    def test_a_mailbox_that_is_not_complete(self) -> None:
        for place in ("", "new", "tmp", "cur"):
            self.keep()
            shutil.rmtree(os.path.join(self.root, "bob@example.com", place))
            self.keep()
            shutil.rmtree(os.path.join(self.root, "bob@example.com", place))
            self.play(OPEN, self.serve(POP3Handler, maildir=self.maildir))
            self.server.stop()

    def test_a_root_that_is_no_good(self) -> None:
        file = certificate(self.above)
        nobodys = "/proc/self" if os.path.exists("/proc/self/status") else file
        for place in (file, nobodys, os.path.join(self.above, "no", "parent")):
            self.assertRaises(OSError, Maildir, place)

    def test_twenty_first_deliveries_at_once(self) -> None:
        """Keep all messages, though the clock stands still and all threads make one mailbox."""
        barrier, met = threading.Barrier(20), set()

        def meet(real: Any, *args: Any) -> None:
            if threading.get_ident() not in met:
                met.add(threading.get_ident())
                barrier.wait(PATIENCE)
            real(*args)

        with (
            self.patch("mkdir", meet),
            unittest.mock.patch("time.time", return_value=1e9),
            concurrent.futures.ThreadPoolExecutor(20) as pool,
        ):
            list(pool.map(self.maildir.keep, [Envelope("", ["bob@example.com"], b"x")] * 20))
        self.assertEqual(len(files(self.root)), 20)

    def test_subscribers(self) -> None:
        """Call them in order; the first that raises an exception ends that."""
        errors: list[Exception] = [Refused(450, "Later"), Refused(554, "Not today")]
        errors += [ValueError("no"), TimeoutError("slow"), BrokenPipeError("gone")]

        def picky(_: Envelope) -> None:
            if errors:
                raise errors.pop()

        self.smtp = self.serve(subscribers=[self.maildir.keep, picky, self.inbox.append])
        for text in ("BrokenPipeError: gone", "TimeoutError: slow", "ValueError: no"):
            self.send("bob@example.com", reply="421 The server failed...")
            self.expect_stderr("Traceback", "in picky", text)
        self.send("bob@example.com", reply="554 Not today")
        self.assertEqual((self.inbox, len(files(self.root))), ([], 4))
        self.server.subscribers.insert(0, self.server.subscribers.pop(1))  # now it is a filter
        self.send("bob@example.com", reply="450 Later")
        self.send("bob@example.com")
        self.assertEqual((len(self.inbox), len(files(self.root))), (1, 5))


class POP3Test(MaildirTest):
    """Part 5, where a dialogue does not show it."""

    def setUp(self) -> None:
        super().setUp()
        self.serve_pop3()

    def serve_pop3(self, handler: Any = POP3Handler, **settings: Any) -> None:
        self.serve(handler, maildir=self.maildir, **settings)

    def log_in(self, messages: int, more: str = "") -> Client:
        """Open bob's mailbox, when the sessions before have ended."""
        client = self.client()
        client.converse(f"{BOB}\nS: +OK {messages} messages\n{more}")
        return client

    def skip(self, client: Client) -> list[str]:
        """Read a message; return its lines."""
        client.expect("+OK ... octets")
        return list(iter(client.line, "."))

    def test_smtplib_and_poplib(self) -> None:
        def talk(n: int) -> None:
            address = f"user{n}@example.com"
            with smtplib.SMTP(self.smtp.host, self.smtp.port, timeout=PATIENCE) as sender:
                for text in ("one", f"two\n\n.\n..{'x' * n}\n"):
                    sender.sendmail("a@example.com", address, text)
            client = poplib.POP3(self.server.host, self.server.port, timeout=PATIENCE)
            client.user(address)
            client.pass_("x")
            paths = files(os.path.join(self.root, address))
            mails = [path.read_bytes().replace(b"\n", b"\r\n") for path in paths]
            self.assertEqual(client.list()[1], [b"%d %d" % (k, len(mails[k - 1])) for k in (1, 2)])
            self.assertEqual(client.uidl()[1][1].decode(), f"2 {paths[1].name}")
            self.assertEqual(client.stat(), (2, len(b"".join(mails))))
            got = [b"".join(line + b"\r\n" for line in client.retr(k)[1]) for k in (1, 2)]
            self.assertEqual(got, mails)
            client.quit()

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            list(pool.map(talk, range(8)))

    def test_curl(self) -> None:
        need("curl")
        self.keep(b"Subject: x\r\n\r\n.\r\n")
        url = f"pop3://{self.server.host}:{self.server.port}/1"
        command = ["curl", "-sS", "--user", "bob@example.com:x", url]
        done = subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
        self.assertIn(b"Subject: x\r\n\r\n.\r\n", done.stdout)

    def test_only_quit_deletes_and_before_its_reply_the_mailbox_is_free(self) -> None:
        outer = self

        class Handler(POP3Handler):
            def reply(self, code: int, *lines: str) -> None:
                if lines == ("Bye",):
                    outer.log_in(1).close()
                super().reply(code, *lines)

        _, two = self.keep(b"1\r\n"), self.keep(b"2\r\n")
        self.serve_pop3(Handler)
        self.log_in(2, each("+OK ...", "DELE 1")).close()
        wait_until(lambda: not self.server.sessions)
        self.log_in(2, f"{each('+OK ...', 'DELE 1')}\n{END}")
        self.assertEqual(files(self.root), [two])

    def test_the_mailbox_is_ours_before_it_is_read(self) -> None:
        real, first = mailbox.Maildir.keys, iter([True])

        def keys(box: Any) -> Any:
            if next(first, False):
                self.play(f"{BOB}\nS: -ERR [IN-USE] ...")
                raise PermissionError
            return real(box)

        with unittest.mock.patch.object(mailbox.Maildir, "keys", keys):
            self.play(f"{BOB}\nS: -ERR The server failed...\nS: (closed)")
            self.expect_stderr("Traceback", "PermissionError")
            wait_until(lambda: not self.server.sessions)
            self.log_in(0)

    @unittest.skipIf(os.name == "nt", "Windows has no such names")
    def test_what_mail_readers_do_meanwhile(self) -> None:
        moved, deleted, stuck = (self.keep(b"%d\r\n" % n) for n in range(3))
        Path(moved.parent, ".DS_Store").write_bytes(b"\0")
        Path(moved.parent, "0.directory").mkdir()
        client = self.log_in(3)
        moved.rename(moved.parent.parent / "cur" / f"{moved.name}:2,S")
        deleted.unlink()
        client.send(b"RETR 1\r\n")
        self.assertEqual(self.skip(client)[-1], "0")
        client.converse(each("-ERR ...", "RETR 2", "TOP 2 0"))
        client.converse(each("+OK ...", "STAT", "DELE 1", "DELE 2", "DELE 3"))

        def remove(real: Any, path: Any) -> None:
            if Path(path) == stuck:
                raise PermissionError
            real(path)

        with self.patch("remove", remove):
            client.converse("C: QUIT\nS: -ERR Bye, but ...\nS: (closed)")
        self.assertIn(stuck, files(self.root))
        wait_until(lambda: not self.server.sessions)
        self.client().converse(f"{OPEN}\n{each('+OK ...', 'DELE 1', 'QUIT')}")

    def test_no_password_on_the_console(self) -> None:
        user = "USER bob@example.com"
        tries = [
            *([user, "PASS secret"], [user, r"pass\tsecret"], [user, "PASS", "secret"]),
            *([user, "PAS secret", "secret"], [user, " secret"], [user, "> C: PASS secret"]),
            *([user, r"12:01 > \xef\xbb\xbfPASS secret"], [user, r"\x1b[APASS secret"]),
            *([user, r"NOOP\rPASS secret"], [user, "PASS:secret"], ["USER nobody", "secret"]),
            *(["C: USER bob@example.com", "PSS secret"], ["AUTH PLAIN", "secret"]),
            *([r"\x1b[AUSER bob@example.com", "secret"], [user + " secret"], ["USER: b", "secret"]),
            ["AUTH PLAIN secret"],
        ]
        for users in ({}, {"bob@example.com": "right"}):
            self.serve_pop3(users=users)
            for lines in tries:
                with self.subTest(lines), self.assertLogs("mailserver", "INFO") as logs:
                    self.play(f"{POP3}\n{each('...', *lines)}")
                    wait_until(lambda: not self.server.sessions)
                    self.assertNotIn("secret", "\n".join(logs.output))
        self.serve_pop3()
        with self.assertLogs("mailserver", "INFO") as logs:
            self.log_in(0, "C: oops\nS: -ERR ...")
        self.assertRegex("\n".join(logs.output), r"C: PASS \*{8}\n(.*\n)+.*C: oops")

    def test_subscription(self) -> None:
        class Handler(POP3Handler):
            def reply(self, code: int, *lines: str) -> None:
                super().reply(code, *lines)
                if lines == ("Send a line to stop",) and zero.exists():
                    zero.unlink()  # as a mail reader might, before it is sent

        self.serve_pop3(Handler, timeout=0.3)
        client = self.log_in(0)
        zero, _ = self.keep(b"zero\r\n"), self.keep(b"one\r\n.\r\n")
        client.converse("C: STAT\nS: +OK 0 0\nC: SUBSCRIBE\nS: +OK ...")
        self.assertEqual(self.skip(client)[-2:], ["one", ".."])
        self.play("S: +OK ...\nS: -ERR ...\nS: (closed)")  # whoever waits for mail is not idle
        self.keep(b"not for bob\r\n", "ann@example.com")
        for text in ("two", "three"):
            self.send("BOB@example.com", content=text)
            self.assertEqual(self.skip(client)[-1], text)
        client.send(b"enou")
        client.send(b"gh\r\n")
        client.converse("S: +OK Stopped\nC: SUBSCRIBE\nS: +OK ...")
        client.close()
        wait_until(lambda: not self.server.sessions)
        client = self.log_in(3, "C: SUBSCRIBE\nS: +OK ...")
        self.server.stop()
        client.converse("S: -ERR The server is stopping...\nS: (closed)")

    def test_a_subscriber_that_does_not_read(self) -> None:
        tracemalloc = need_tracemalloc()
        content = (b"x" * 1022 + b"\r\n") * 1024
        for timeout in (0.5, 60.0):
            self.serve_pop3(timeout=timeout)
            client = self.log_in(0, "C: SUBSCRIBE\nS: +OK ...")
            tracemalloc.start()
            for _ in range(30):  # the kernel takes some of it; the senders wait for nobody
                self.maildir.keep(Envelope("", ["bob@example.com"], content))
            self.assertLess(tracemalloc.get_traced_memory()[1], 12 * 2**20)
            tracemalloc.stop()
            if timeout > 1:
                for _ in range(30):
                    self.assertEqual(len(self.skip(client)), 1024 + 5)
                client.converse(f"C: enough\nS: +OK Stopped\nC: STAT\nS: +OK 30 ...\n{END}")
            wait_until(lambda: not self.server.sessions)
            shutil.rmtree(os.path.join(self.root, "bob@example.com"))

    def test_random_input(self) -> None:
        """Send random and mutated input; the seeds are fixed, so a failure comes again."""
        pieces = [line.data for line in read_lines(CLASSIC) if line.who == "C"]
        pieces += [b"\n.\n", b"\r\n.\r\n", b".", b"\r", b"\n", b"\xff\xfa", b"\b\b", b"EHLO x\r\n"]
        pieces += [b"AUTH PLAIN\r\n", b"*\r\n", b"A" * 600, b"\0", b"RSET\r\n", b"\x80\xfe"]
        pieces += [b"USER a@b\r\nPASS x\r\n", b"LIST\r\n", b"SUBSCRIBE\r\n", b"TOP 1 1\r\n"]
        for seed in range(150):
            chance = random.Random(seed)
            data = bytearray().join(chance.choices(pieces, k=chance.randint(1, 25)))
            for _ in range(chance.randint(0, 6)):
                at = chance.randrange(len(data))
                data[at : at + chance.randint(0, 3)] = chance.randbytes(chance.randint(0, 3))
            with self.client(self.server if seed % 3 == 0 else self.smtp) as client:
                client.send(bytes(data))
                if chance.random() < 0.7:
                    client.end_input()
                    list(iter(client.line, "(closed)"))
        self.play(CLASSIC, self.smtp)
        wait_until(lambda: not self.smtp.sessions and not self.server.sessions)


# ==================================================================================================
# THE TESTS: part 6, the program


class FlagTest(DialogueTest):
    """The command line, up to where the program would serve."""

    def main(self, *flags: str) -> tuple[Any, str]:
        """Call main(); return its exit status and what it printed on stdout."""
        self.stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", ResourceWarning)  # a program's end closes all sockets
        with (
            unittest.mock.patch("signal.signal"),
            unittest.mock.patch("os.sched_setaffinity", create=True),
            unittest.mock.patch.object(mailserver, "serve", side_effect=AssertionError("served")),
            contextlib.redirect_stdout(io.StringIO()) as out,
            self.assertRaises(SystemExit) as end,
        ):
            mailserver.main([*flags])
        return end.exception.code, out.getvalue()

    def test_bad_flags(self) -> None:
        folder = self.folder()
        texts = [b"ann:secret\nbob\n", b":secret\n", b"bob:\n", b"\n# ann:secret\n", b"b:caf\xe9\n"]
        users = [str(Path(folder, f"users{n}")) for n in range(len(texts))]
        for file, text in zip(users, texts, strict=True):
            Path(file).write_bytes(text)
        bad, good, none = users[0], certificate(folder), os.path.join(folder, "none")
        busy = self.stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        for flags in (
            *("--port x", "--port 65536", f"--port {busy.getsockname()[1]}", "--frob"),
            *("--timeout x", "--timeout 0", "--max-size -1", "--max-clients 0"),
            *("--host nowhere.invalid", "--host 192.0.2.1", "--host \udcff"),
            *("--fail RCPT", "--fail RCPT=250", "--fail RCPT=600", "--fail RCPT=no"),
            *("--fail RCTP=450", f"--fail RCPT={'4' * 5000}", "--list team", "--list team="),
            *("--list =a@x.org", "--list team=ann", "--pop3-port 0", "--smtps-port 0"),
            *(f"--users {file}" for file in [*users, none]),
            *(f"--tls {none} {good}", f"--tls {good} {none}", f"--tls {bad} {good}"),
            *(f"--tls {good} {bad}", f"--maildir {bad}", f"--maildir {none}/none"),
        ):
            with self.subTest(flags):
                self.assertEqual(self.main("--port", "0", *flags.split()), (2, ""))
                error = self.stderr.getvalue()
                self.assertRegex(error, r"\Amailserver[^\n]+\n\Z")
                self.assertTrue(any(word.strip("-") in error for word in flags.split()), error)
            self.expect_stderr("")

    def test_help_and_version(self) -> None:
        self.assertEqual(self.main("--version"), (0, f"mailserver {mailserver.__version__}\n"))
        with unittest.mock.patch.dict(os.environ, {"COLUMNS": "80"}):
            out = self.main("--help")[1]
        flags = "host port smtps-port pop3-port maildir tls users require-auth list fail serial"
        for flag in f"{flags} max-size max-clients timeout quiet version".split():
            self.assertRegex(out, rf"\n  --{flag}( [A-Z0-9_]+)*\s\s+\w+ \w+")
        self.assertIn("\nTry: mailserver.py --fail RCPT=450", out)

    def test_an_older_python(self) -> None:
        code = "import sys; sys.version_info = (3, 9); import mailserver"
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
        said = (done.returncode, done.stdout, done.stderr)
        self.assertEqual(said, (2, "", "mailserver needs Python 3.10 or newer\n"))

    def test_each_part_runs_with_those_above_it(self) -> None:
        for number in range(2, 7):
            module: Any = types.ModuleType("cut")
            text = source().partition(f"\n# PART {number}")[0]
            with self.subTest(number), unittest.mock.patch.dict(sys.modules, cut=module):
                exec(compile(text, f"above part {number}", "exec"), vars(module))
                kinds = [kind for kind in vars(module).values() if isinstance(kind, type)]
                handler = [kind for kind in kinds if issubclass(kind, module.SMTPHandler)][-1]
                with module.MailServer(("127.0.0.1", 0), handler) as server:
                    server.start()
                    self.play_three_ways(CLASSIC, server)


@unittest.skipIf(os.name == "nt", "programs are redirected, stopped and killed the Unix way here")
class ProcessTest(DialogueTest):
    """The program, with a handler of its own, in a process of its own."""

    script = """
import mailserver
class Handler(mailserver.SecureHandler):
    def do_FAIL(self, arg):
        raise ValueError
mailserver.main(handler=Handler)
"""

    def setUp(self) -> None:
        super().setUp()
        folder = self.folder()
        self.out, self.err = Path(folder, "out"), Path(folder, "err")

    def start(self, *flags: str, to: str = '>"$OUT" 2>"$ERR"', out: Any = None, **env: str) -> Any:
        """Start the program, with a redirection of the shell; return it when it answers at
        self.address. Its session 1 is over then."""
        self.address = ("::1" if "::1" in flags else "127.0.0.1", free_port())
        environment = {**os.environ, "PYTHONPATH": str(HERE), "PYTHONUNBUFFERED": "", **env}
        environment |= {"OUT": str(self.out), "ERR": str(self.err)}
        command = ["sh", "-c", f'exec "$0" "$@" {to}', sys.executable, "-c", self.script]
        command += ["--port", str(self.address[1]), *flags]
        program = subprocess.Popen(command, env=environment, stdout=out or subprocess.PIPE)
        self.stack.callback(program.wait, PATIENCE)
        self.stack.callback(program.kill)
        if program.stdout:
            self.stack.enter_context(program.stdout)
        wait_until(self.answers)
        return program

    def answers(self) -> bool:
        with contextlib.suppress(OSError), Client(self.address) as client:
            return client.line().startswith("220")
        return False

    def end(self, program: Any, *signals: int) -> str:
        """Send signals; check the exit status and stderr; return what the file of stdout has."""
        for number in signals or (signal.SIGTERM,):
            program.send_signal(number)
        self.assertEqual(program.wait(PATIENCE), 0)
        self.assertEqual(self.err.read_text() if self.err.exists() else "", "")
        return self.out.read_text(encoding="utf-8") if self.out.exists() else ""

    def test_what_it_prints(self) -> None:
        program = self.start(PYTHONIOENCODING="ascii")
        if hasattr(os, "sched_getaffinity"):
            self.assertEqual(len(os.sched_getaffinity(program.pid)), 1)
        with smtplib.SMTP(*self.address, local_hostname="ann.example.com") as client:
            client.sendmail("a@b.c", "b@b.c", "Subject: x\r\n\r\nh\xe9 \u20ac\r\n".encode())
        out = self.end(program, signal.SIGINT)
        where = f"listens on 127.0.0.1 port {self.address[1]}"
        self.assertTrue(out.startswith(f"mailserver {mailserver.__version__} {where}"), out)
        shown = "".join(re.findall(r"(?m)^\[2.*\n", out))
        self.assertIn("[2] S: 220 Simple Mail Server\n[2] C: ehlo ann.example.com\n", shown)
        lines = ["| Subject: x", "| ", r"| h\xe9 \u20ac", "C: .", "S: 250 Message accepted"]
        self.assertIn("\n[2 ann] ".join(["", *lines, "C: QUIT", "S: 221 Bye\n"]), shown)
        self.assertNotIn("\x1b", out)
        program = self.start("--quiet")
        play(self.address, CLASSIC)
        self.assertRegex(self.end(program), r"\Amailserver .* listens on .*\n\Z")

    def test_colours(self) -> None:
        for env in ("", "1"):
            try:
                ours, terminal = os.openpty()
            except OSError:
                self.skipTest("this system gives us no terminal")
            with open(ours, "rb", buffering=0) as screen, open(terminal, "wb") as slave:
                program = self.start(to='2>"$ERR"', out=slave, NO_COLOR=env)
                play(self.address, "S: 220 ...\nC: FROB\nS: 500 ...")
                shown = b""
                while b"S: 500" not in shown or not shown.endswith(b"\n"):
                    shown += screen.read(4096)
                self.end(program)
            for reply in (rb"\x1b\[32m.*S: 220 .*\x1b\[0?m", rb"\x1b\[31m.*S: 500 .*\x1b\[0?m"):
                self.assertEqual(bool(re.search(reply, shown)), not env)

    def test_flags(self) -> None:
        """Show what the flags change."""
        smtps, pop3, folder = free_port(), free_port(), self.folder()
        users, cert, tls = Path(folder, "users"), certificate(folder), client_tls()
        users.write_text("\ufeff# who\n\nann:pass:word\nbob@x.org:secret\n", encoding="utf-8")
        flags = ["--host", "localhost", "--users", str(users), "--tls", cert, cert]
        flags += ["--require-auth", "--list", "team=bob@x.org,ann@x.org", "--fail", "vrfy=450"]
        flags += ["--maildir", os.path.join(folder, "mail"), "--max-size", "1234"]
        flags += ["--timeout", "1000000000", "--smtps-port", str(smtps), "--pop3-port", str(pop3)]
        program = self.start(*flags)
        play(self.address, f"{HELLO}\nC: MAIL FROM:<a@b.c>\nS: 530 ...\nC: VRFY x\nS: 450 ...")
        with smtplib.SMTP_SSL("localhost", smtps, context=tls, timeout=PATIENCE) as client:
            client.login("ann", "pass:word")
            self.assertEqual(client.esmtp_features["size"], "1234")
            client.sendmail("a@x.org", "team@x.org", "hello")
        reader = poplib.POP3("localhost", pop3, timeout=PATIENCE)
        reader.stls(tls)
        reader.user("bob@x.org")
        reader.pass_("secret")
        self.assertEqual(reader.stat()[0], 1)
        reader.quit()
        self.end(program)
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as six:
            six.bind(("::1", 0))  # or this machine has no such address
            self.assertIn("listens on ::1 port", self.end(self.start("--host", "::1")))

    def test_signals(self) -> None:
        for number, mode in itertools.product((signal.SIGINT, signal.SIGTERM), ([], ["--serial"])):
            with self.subTest(number=number, mode=mode):
                program = self.start(*mode)
                with Client(self.address) as client:
                    client.converse("S: 220 ...\nC: HELO x\\r\\nNOO\\c\nS: 250 Hello")
                    self.end(program, number, signal.SIGINT, number)
                    client.converse("S: 421 ...\nS: (closed)")
                with socket.socket() as again:
                    again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    again.bind(self.address)

    def test_the_last_lines_of_twenty_sessions(self) -> None:
        program = self.start(to='2>"$ERR"')
        for _ in range(20):
            self.stack.enter_context(Client(self.address)).expect("220 ...")
        program.send_signal(signal.SIGTERM)
        out = program.stdout.read().decode()
        self.assertEqual(len(set(re.findall(r"\[(\d+)\] S: 421", out))), 20)

    def test_a_terminal_that_is_stuck(self) -> None:
        for goes_on in (False, True):
            program = self.start(to='2>"$ERR"')
            many = times(9000, "C: NOOP\nS: 250 OK")  # more than a pipe holds
            play(self.address, f"S: 220 ...\n{many}", IN_ONE_PIECE)
            play(self.address, CLASSIC)
            if goes_on:
                self.assertEqual(len([program.stdout.readline() for _ in range(9000)]), 9000)
                play(self.address, CLASSIC)
                bye = b"[4 example] S: 221 Bye\n"
                self.assertTrue(any(line == bye for line in program.stdout))
            self.end(program)

    def test_nowhere_to_print(self) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        nobody = self.stack.enter_context(open(writer, "wb"))
        for to in (*('>&- 2>"$ERR"', '>/dev/full 2>"$ERR"', '2>"$ERR"', "2>&-", ">&- 2>&-"),):
            with self.subTest(to):
                self.err.write_text("")
                program = self.start(to=to, out=nobody if to == '2>"$ERR"' else None)
                for text in (CLASSIC, "S: 220 ...\nC: FAIL\nS: 421 ...\nS: (closed)", CLASSIC):
                    play(self.address, text)
                expected = ["Traceback", "in do_FAIL"] if "ERR" in to else []
                errors = self.err.read_text()
                self.assertEqual(re.findall("Traceback|in do_FAIL", errors), expected, errors)
                self.err.unlink()
                self.end(program)

    def test_optimised(self) -> None:
        """Run with python -OO, which leaves docstrings and assertions out."""
        code = "import mailserver, test_mailserver as test\n"
        code += "with test.our_server('') as server:\n"
        lines = [("MAIL x", 503), ("HELO", 501), ("HELO x", 250), ("HELP", 214), ("HELP NOOP", 214)]
        said = "".join(f"\nC: {line}\nS: {code} ..." for line, code in lines)
        code += (
            f"    test.play((server.host, server.port), {'S: 220 ...' + said!r}, letter=False)\n"
        )
        command = [sys.executable, "-OO", "-c", f"{code}mailserver.main(['--help'])"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE)
        self.assertEqual(done.stderr, "")
        self.assertIn("Try: mailserver.py", done.stdout)

    def test_kill_loses_nothing(self) -> None:
        """Kill the program in the middle of twenty senders; then look at what it has kept."""
        flags = ["--quiet", "--maildir", self.folder(), "--pop3-port", str(free_port())]
        program = self.start(*flags)
        accepted: set[str] = set()

        def send(n: int) -> None:
            with contextlib.suppress(OSError, smtplib.SMTPException):
                client = smtplib.SMTP(*self.address, timeout=PATIENCE)
                for k in itertools.count():
                    text = f"Subject: {n}-{k}\n\n{'x' * 2000}\nend\n"
                    client.sendmail("a@example.com", "b@example.com", text)
                    accepted.add(f"{n}-{k}")

        with concurrent.futures.ThreadPoolExecutor(20) as pool:
            done = pool.map(send, range(20))
            wait_until(lambda: len(accepted) > 100)
            program.kill()
            list(done)
        stored = [path.read_text() for path in Path(flags[2], "b@example.com", "new").iterdir()]
        subjects = [re.findall("(?m)^Subject: (.*)", text)[0] for text in stored]
        self.assertTrue(all(text.endswith("x\nend\n") for text in stored), "half a message")
        self.assertEqual(len(subjects), len(set(subjects)), "a message came twice")
        self.assertEqual(accepted - set(subjects), set(), "a message is lost")
        self.start(*flags)
        login = f"S: +OK ...\n{each('+OK ...', 'USER b@example.com')}\nC: PASS x"
        play(("127.0.0.1", int(flags[4])), f"{login}\nS: +OK {len(stored)} messages")


# ==================================================================================================
# THE TESTS: README


def readme() -> str:
    """Return the text of README.md."""
    return (HERE / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[tuple[str, str]]:
    """Return the blocks of README in a language, or in two, such as "python|sh"."""
    return re.findall(rf"^```({language})\n((?:.*\n)*?)^```", readme(), re.MULTILINE)


class ReadmeTest(DialogueTest):
    """What README says is so."""

    def test_dialogues(self) -> None:
        dialogues = read_dialogues(readme())
        self.assertEqual(f"{dialogues[0].text}S: (closed)", CLASSIC)
        self.assertEqual(len(dialogues), len(re.findall("(?m)^```text\nS: ", readme())))
        self.serve()
        for dialogue in dialogues:  # <!-- settings: ... --> may stand in front
            if dialogue.title == "<!-- settings":
                dialogue.settings = dialogue.why.removesuffix(" -->")
            if "<!-- lesson" not in dialogue.title:
                with self.subTest(dialogue.text):
                    self.play(dialogue)

    def test_dialogues_with_others(self) -> None:
        maildir = Maildir(self.folder())
        smtp = self.serve(subscribers=[maildir.keep])
        marked = [one for one in read_dialogues(readme()) if "<!-- lesson" in one.title]
        before, after, last = (one.text for one in marked)
        carol = self.client(self.serve(POP3Handler, maildir=maildir))
        carol.converse(before)
        with smtplib.SMTP(smtp.host, smtp.port, "laptop.example") as friend:
            friend.sendmail("ann@example.com", "carol@example.com", "Look, it has arrived!\r\n")
        carol.converse(after)
        client = self.client(smtp)
        hello, _, end = last.partition("S: 421")
        client.converse(hello)
        smtp.stop()
        client.converse(f"S: 421{end}S: (closed)")

    def test_fixture(self) -> None:
        pytest: Any = types.ModuleType("pytest")
        pytest.fixture = contextlib.contextmanager
        names: dict[str, Any] = {}
        code = next(code for _, code in blocks("python") if "def mail(caplog)" in code)
        with unittest.mock.patch.dict(sys.modules, pytest=pytest):
            exec(compile(code, "README.md", "exec"), names)
        logs = self.stack.enter_context(self.assertLogs("mailserver", "INFO"))
        with names["mail"](unittest.mock.Mock()) as mail:
            names["test_welcome"](mail)
        self.assertRegex(logs.output[-1], r"\] S: 221 Bye$")  # not 421: the fixture has waited

    def test_flags(self) -> None:
        command = [sys.executable, str(HERE / "mailserver.py"), "--help"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        for flag in re.findall(r"^  (--[a-z0-9-]+)", done.stdout, re.MULTILINE):
            self.assertTrue(f"| `{flag}" in readme(), f"README's table lacks {flag}")

    @unittest.skipIf(os.name == "nt", "the command lines are those of Unix")
    def test_programs_and_command_lines(self) -> None:
        reader = Reader(self.folder())
        for port in reader.ports:
            self.stack.callback(reader.stop, port)
        for language, code in blocks("python|sh"):
            with self.subTest(code):
                reader.run(language, code)


class Reader:
    """Somebody who does what README says, from its first line to the last, in one folder. The
    ports of README are replaced by free ones. A server runs until another wants its port."""

    NOT_RUN = "make test|py traps|tail -f|import pytest"
    OTHERS = {  # the server that a block needs, and README has no block for
        "mail.example.com": "python mailserver.py --port 2600 --tls cert.pem key.pem\n",
        "openssl s_client": "python mailserver.py --port 2600 --tls cert.pem key.pem\n",
        "--mail-rcpt bob@x.org": "python mailserver.py --port 2600 --fail RCPT=450\n",
    }

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.servers: dict[str, subprocess.Popen[bytes]] = {}  # by port
        self.ports = {port: str(free_port()) for port in ("2525", "2526", "2527", "2600", "2465")}
        for name in ("mailserver.py", "test_mailserver.py", "README.md"):
            self.write(name, (HERE / name).read_text(encoding="utf-8"))
        self.write("class.txt", "ann=127.0.0.1:2525")
        (self.folder / "bin").mkdir()
        (self.folder / "bin" / "python").symlink_to(sys.executable)
        self.env = {**os.environ, "PATH": f"{self.folder}/bin:{os.environ['PATH']}"}

    def local(self, text: str) -> str:
        """Replace the ports, and the real server, which there is not."""
        text = text.replace('"mail.example.com", 587', '"localhost", 2600')
        return re.sub("|".join(self.ports), lambda match: self.ports[match[0]], text)

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(self.local(text), encoding="utf-8")

    def run(self, language: str, code: str) -> None:
        """Run a block: to its end, or, if it is a server, until the server listens."""
        if re.search(self.NOT_RUN, code):
            return
        for program in re.findall("(?m)^(?:openssl|curl)", code):
            need(program)
        if re.search("cert.pem|mail.example", code):  # openssl has made this certificate
            need("openssl")
        for words, other in self.OTHERS.items():
            if words in code:
                self.run("sh", other)
        self.env["SSL_CERT_FILE"] = str(self.folder / "cert.pem") if "mail.example" in code else ""
        command = code.replace("test_mailserver.py play", "test_mailserver.py play --level 1")
        if language == "python":
            match = re.match(r"# (\w+\.py)\n", code)
            name = match[1] if match else "try.py"
            self.write(name, code)
            command = f"python {name}" + (" --port 2600" if "\nmain(" in code else "")
        shell = ["sh", "-ec", self.local(command)]
        if re.search(
            r"\Apython mailserver.py[^&\n]*\n\Z|(?m:^ *(serve|main)\(|\.accept|^import small)", code
        ):
            found = re.search(r'(?:--port |"127.0.0.1", )(\d+)', f"{command} {code}")
            port = found[1] if found else "2525"
            self.serve(port, shell)
            if "mailserver" in code and not re.search("--fail|--require|small", code):
                self.send_mail(port)
        else:
            done = self.start(shell)
            done.communicate(b"QUIT\n", PATIENCE)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(done.pid, signal.SIGKILL)  # what it left running
            if done.returncode:
                raise AssertionError((self.folder / "printed").read_text(encoding="utf-8"))

    def start(self, shell: list[str]) -> subprocess.Popen[bytes]:
        """Start a program in the folder; what it prints goes to a file."""
        with open(self.folder / "printed", "wb") as out:
            return subprocess.Popen(
                shell,
                cwd=self.folder,
                env=self.env,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )

    def serve(self, port: str, shell: list[str]) -> None:
        """Start a server, and wait until it listens at a port of README."""
        self.stop(port)
        server = self.start(shell)
        self.servers[port] = server
        wait_until(lambda: self.listens(port) or server.poll() is not None)
        if server.poll() is not None:
            raise AssertionError((self.folder / "printed").read_text(encoding="utf-8"))

    def send_mail(self, port: str) -> None:
        """Send a mail that gives a subscriber something to do."""
        mail = EmailMessage()
        mail.set_content("Hello")
        mail.add_alternative('<a href="http://x.org/">x</a>', subtype="html")
        mail.add_attachment(b"data", "image", "png", filename="p.png")
        with smtplib.SMTP("127.0.0.1", int(self.ports[port]), timeout=PATIENCE) as client:
            client.send_message(mail, "me@x.org", ["you@x.org"])

    def listens(self, port: str) -> bool:
        """Tell whether somebody listens at a port of README."""
        with contextlib.suppress(OSError):
            with socket.create_connection(("127.0.0.1", int(self.ports[port]))) as client:
                client.shutdown(socket.SHUT_WR)  # a reset would be the end of naive.py
                while client.recv(1000):
                    pass
            return True
        return False

    def is_free(self, port: str) -> bool:
        """Tell whether nobody listens at a port of README."""
        return not self.listens(port)

    def stop(self, port: str) -> None:
        """End the server at a port, if there is one, and what it has started."""
        if server := self.servers.pop(port, None):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGTERM)
            server.communicate(timeout=PATIENCE)
            for each in (port, "2526") if port == "2525" else (port,):
                wait_until(functools.partial(self.is_free, each))


# ==================================================================================================
# THE TESTS: the notation, the judge, the traps


class NotationTest(unittest.TestCase):
    """What a text says."""

    def test_dialogues_of_a_text(self) -> None:
        first, second = read_dialogues("""
            Level 2: more
            Hint: read
            hello
            a title, byte by byte: or all wait
            S: 220 Hi
            settings: tls
            ```
            C: NOOP
        """)
        self.assertEqual((first.level, first.hint), ("Level 2: more", "Hint: read"))
        self.assertEqual((first.title, first.why), ("a title, byte by byte", "or all wait"))
        self.assertEqual((first.way, first.start, first.text), (BYTE_BY_BYTE, 6, "S: 220 Hi\n"))
        self.assertEqual((second.title, second.settings, second.start), ("", "tls", 9))

    def test_in_words(self) -> None:
        words = in_words("500 No (or 502 55.)", letter=False)
        self.assertEqual(words, "500 (any text) or 502 or any 55x")
        self.assertEqual(spell(b"one\r\ntwo\x1b\n"), ["one", r"two\x1b\n    (ends in LF alone)"])
        self.assertEqual(spell(b"one"), ["one    (no line end)"])
        self.assertEqual(short("x" * 1_000_000), "x" * 60 + "... (1,000,000 characters)")


class TinyServer(socketserver.StreamRequestHandler):
    """A server that reaches level 2. The tests change one of its attributes, to get it wrong."""

    greeting = b"220 Tiny\r\n"
    hello = b"250 Hello\r\n"
    go_on = b"354 Go on\r\n"
    other = b"250 Fine\r\n"
    answer_in_mail = b""  # what a line of a mail is answered with

    def handle(self) -> None:
        in_mail = False
        self.wfile.write(self.greeting)
        for line in self.rfile:
            verb = line[:4].upper()
            if in_mail and line != b".\r\n":
                self.wfile.write(self.answer_in_mail)
            elif verb == b"HELO":
                self.wfile.write(self.hello)
            elif verb == b"DATA":
                self.wfile.write(self.go_on)
            elif verb == b"QUIT":
                self.wfile.write(b"221 Bye\r\n")
                return
            else:
                self.wfile.write(self.other)
            in_mail = verb == b"DATA" or (in_mail and line != b".\r\n")


class JudgeTest(DialogueTest):
    """The judge, of our own server and of others."""

    def setUp(self) -> None:
        super().setUp()
        self.stack.enter_context(unittest.mock.patch(f"{__name__}.PAUSE", 0.005))

    def tiny(self, **attributes: Any) -> str:
        """Start a TinyServer; return HOST:PORT."""
        handler = type("Handler", (TinyServer,), attributes)
        server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        self.stack.callback(server.server_close)
        self.stack.callback(server.shutdown)
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        return f"127.0.0.1:{server.server_address[1]}"

    def judge(self, *words: str, patience: float = PATIENCE) -> tuple[Any, str]:
        """Run the command; give its exit status, and all that it prints."""
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                status: Any = play_command(["--patience", f"{patience:g}", *words])
            except SystemExit as end:
                status = end.code
        return status, out.getvalue()

    def judge_text(self, text: str, *words: str, patience: float = PATIENCE) -> tuple[Any, str]:
        """Play dialogues from a file, with our own server if no other is named."""
        file = Path(self.folder(), "mine.txt")
        file.write_text(text, encoding="utf-8")
        return self.judge(*(words or [self.place()]), str(file), patience=patience)

    def place(self, **settings: Any) -> str:
        """Start our own server; return HOST:PORT."""
        server = self.serve(**settings)
        return f"{server.host}:{server.port}"

    def test_our_own_server(self) -> None:
        for letter in ([], ["--letter"]):
            status, out = self.judge(self.place(), *letter)
            self.assertEqual(status, ALL_PASSED, out)
            self.assertNotIn("FAILED", out)
            self.assertRegex(out, r": level 6 of 6; (\d+) of \1 dialogues passed\n$")

    def test_a_reply_without_an_end(self) -> None:
        address = self.tiny(hello=b"250-more\r\n" * 2_000_000)
        self.assertEqual(self.judge(address, "--level", "1", patience=1)[0], SOME_FAILED)

    def test_a_server_that_reaches_level_2(self) -> None:
        status, out = self.judge(self.tiny())
        self.assertEqual(status, SOME_FAILED)
        self.assertRegex(out, "(?s)FAILED  RCPT before MAIL\n +Why: .*expected  503 .any text")
        self.assertIn("  Hint: keep the client's name", out)
        self.assertRegex(out, r"\nLevel 4: .* \d+ of 12 dialogues passed\nLevel 5: .* of 10 ")
        self.assertRegex(out, r": level 2 of 6; \d+ of 46 dialogues passed\n$")
        status, out = self.judge(self.tiny(), "--level", "2")
        self.assertEqual(status, ALL_PASSED, out)
        self.assertRegex(out, r": level 2 of 6; 4 of 4 dialogues passed\n$")

    def test_imperfect_servers(self) -> None:
        faults: list[tuple[str, dict[str, Any]]] = [
            (r"\(nothing in 0.5 seconds\)", {"greeting": b""}),
            (r"220Hi", {"greeting": b"220Hi\r\n"}),
            (r"220-Hi \| 250 Ho", {"greeting": b"220-Hi\r\n250 Ho\r\n"}),
            (r"220-Hi \| \(nothing in 0.5 seconds\)", {"greeting": b"220-Hi\r\n"}),
            (r"\\x1b\\xff", {"greeting": b"\x1b\xff\r\n"}),
            (r"250 Hello \(ends in LF alone: a reply ends in CRLF\)", {"hello": b"250 Hello\n"}),
            (r"250 Hello \(no line end\)", {"hello": b"250 Hello"}),
            (r"250 Hello, which nobody asked for", {"hello": b"250 Hello\r\n250 Hello\r\n"}),
            (r"250 queued, which nobody asked for", {"answer_in_mail": b"250 queued\r\n"}),
            (r"250, and then 354 .*: one reply too many", {"go_on": b"250\r\n354 Go on\r\n"}),
            (r"\(closed\)", {"handle": lambda _: None}),
        ]
        for came, attributes in faults:
            with self.subTest(came):
                status, out = self.judge(self.tiny(**attributes), patience=0.5)
                self.assertEqual(status, SOME_FAILED)
                self.assertRegex(out, rf"\n +expected  .*\n +came      {came}\n")
                self.assertNotIn("Level 2", out)
                self.assertRegex(out, r": level 0 of 6; 0 of 46 dialogues passed\n$")

    def test_what_is_shown_has_happened(self) -> None:
        out = self.judge_text(f"{EHLO}\nC: FROB\nS: 5.. No", self.tiny())[1]
        said = ["220 Tiny", "C: EHLO example.com", "250 Fine", "C: FROB"]
        self.assertEqual(re.findall("C: .*|(?<=S: ).*", out), said)

    def test_smuggling(self) -> None:
        text = course("no mail is smuggled in by LF, dot, CRLF")
        out = self.judge_text(text, self.tiny())[1]
        self.assertRegex(out, r"\n +C: first\\n\.    \(no line end\)\n +C: \n +expected  nothing")

    def test_a_megabyte_may_be_taken_or_refused(self) -> None:
        text = course("a megabyte without a line end")
        self.assertEqual(self.judge_text(text, self.tiny())[0], ALL_PASSED)
        self.assertEqual(self.judge_text(text)[0], ALL_PASSED)

    def test_where_the_mail_can_be_looked_at(self) -> None:
        folder = Path(self.folder())
        text = course("a dot line inside a mail")

        def keep(envelope: Envelope) -> None:
            Path(folder, "as it was").write_bytes(envelope.content)

        def keep_dots(envelope: Envelope) -> None:
            Path(folder, "with dots").write_bytes(envelope.content.replace(b"\n.", b"\n.."))

        place = self.place(subscribers=[keep])
        status, out = self.judge_text(text, place, "--maildir", str(folder))
        self.assertEqual(status, ALL_PASSED, out)
        place = self.place(subscribers=[keep_dots])
        status, out = self.judge_text(text, place, "--maildir", str(folder), patience=0.2)
        self.assertEqual(status, SOME_FAILED)
        self.assertIn("\n          | ..\n", out)

    def test_many_servers_side_by_side(self) -> None:
        both = threading.Barrier(2)

        def greeting(_: TinyServer) -> bytes:
            both.wait(PATIENCE)
            return b"220 Hi\r\n"

        words = [f"{name}={self.tiny(greeting=property(greeting))}" for name in ("bob", "carl")]
        with socket.create_server(("127.0.0.1", 0)) as free:
            words.insert(0, f"ann=127.0.0.1:{free.getsockname()[1]}")
        folder = self.folder()
        status, out = self.judge(*words, "--level", "1", "--feedback", folder)
        self.assertEqual(status, NOT_RUNNING)
        verdicts = "".join(sorted(out.splitlines(keepends=True)))  # they come as they are ready
        self.assertRegex(verdicts, "^ann: not running: .*\nbob: level 1 .*\ncarl: level 1 .*\n$")
        self.assertIn("  passed  the classic", Path(folder, "bob.txt").read_text(encoding="utf-8"))
        with open(Path(folder, "grades.csv"), encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
        self.assertEqual(rows[1][:4], ["ann", "", "0", "1"])
        self.assertEqual(rows[2:], [["bob", "1", "1", "1", ""], ["carl", "1", "1", "1", ""]])

    def test_a_file(self) -> None:
        text = "one\nS: 220 ...\nC: NOOP\nS: 250 Yes\n\nsettings: max_size=1\nS: 250 No"
        status, out = self.judge_text(text)
        self.assertEqual(status, ALL_PASSED, out)
        self.assertRegex(out, "passed  one\n.*: 1 of 1 dialogues passed\n$")
        status, out = self.judge_text(text, self.place(), "--letter")
        self.assertRegex(out, "FAILED  one\n.*\n.*\n +expected  250 Yes\n +came      250 OK\n")
        out = self.judge_text("S: ...\nC: NOOP\nS: ...")[1]
        self.assertRegex(out, "(?s)write what the server has to say.*: 0 of 1 dialogues passed")
        out = self.judge_text("S: 220 Hi\nC: QUIT\nS: 221 Bye\nS: ...")[1]
        self.assertRegex(out, r"came      \(closed\)")

    def test_a_server_that_hangs_up_instead(self) -> None:
        text = "S: 220 Hi\nC: FROB\nS: 500 No (or 502 4.1)\nC: NOOP\nS: 250 OK"
        for reply, status in [("421 Busy", ALL_PASSED), ("501 No", SOME_FAILED)]:
            place = self.tiny(other=f"{reply}\r\n".encode())
            self.assertEqual(self.judge_text(text, place)[0], status)

    def test_mailserver_with_the_settings_of_a_dialogue(self) -> None:
        text = f"settings: max_size=1\n{INSIDE}\nC: hello\nC: .\nS: 552 ..."
        self.assertEqual(self.judge_text(text, OURSELVES)[0], ALL_PASSED)
        self.assertEqual(self.judge_text(text.replace("=1", "=9"), OURSELVES)[0], SOME_FAILED)

    def test_wrong_usage(self) -> None:
        for words in ("", "x", "127.0.0.1:0", "x:y", "x:1 nofile", "x:1 --patience x", "x:1 x:1"):
            with self.subTest(words):
                self.assertEqual(self.judge(*words.split())[0], WRONG_USAGE)
        self.assertEqual(self.judge_text("no dialogue")[0], WRONG_USAGE)


class TrapsTest(unittest.TestCase):
    """Each Trap: of mailserver.py has a test that fails if somebody falls into it."""

    def test_each_trap_has_an_entry(self) -> None:
        comments = [" ".join(text.split()) for text in re.findall(r"Trap: (.*\n?.*)", source())]
        self.assertEqual(len(comments), len(TRAPS))
        for comment, trap in zip(comments, TRAPS, strict=True):
            self.assertTrue(comment.startswith(trap.says), f"{comment!r} is not {trap.says!r}")
            self.assertEqual(source().count(trap.right), 1, trap.says)

    def test_each_guard_sees_it(self) -> None:
        for trap, result in zip(TRAPS, try_guards(sprung=True), strict=True):
            with self.subTest(trap.says):
                if result.startswith("is skipped"):
                    self.skipTest(f"{trap.guard} {result}")
                self.assertEqual(result, "fails", f"{trap.guard} does not see: {trap.says}")


if __name__ == "__main__":
    commands = {"play": play_command, "traps": traps_command}
    if sys.argv[1:] and sys.argv[1] in commands:
        try:
            sys.exit(commands[sys.argv[1]](sys.argv[2:]))
        except (KeyboardInterrupt, BrokenPipeError):  # Ctrl-C; or a pipe into head
            os._exit(1)
    try:
        unittest.main()
    finally:
        if MISSING:
            print("Some tests were skipped for want of:", *sorted(MISSING), file=sys.stderr)
