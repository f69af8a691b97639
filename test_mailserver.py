"""Tests of mailserver.py, as dialogues between a client (C:) and a server (S:).

    python test_mailserver.py                            run all tests
    python test_mailserver.py JudgeTest                  run one group of them
    python test_mailserver.py play 127.0.0.1:2600        judge any server: play the course with it
    python test_mailserver.py play 127.0.0.1:2600 FILE   play the dialogues of a file with it
    python test_mailserver.py play -h                    judge sixty servers, look into their mail
    python test_mailserver.py traps                      break each Trap: of mailserver.py in a copy

The notation of a dialogue, here, in README and in files:

    settings: max_size=1000, tls=True
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

"settings:" says with which arguments MailServer(...) has to run for this dialogue. More of them are
tls=True: a certificate for localhost; pop3=True: POP3 in place of SMTP; mail=2: bob@example.com has
two mails, each of which is STORED, below. "play HOST:PORT" leaves such a dialogue out; the tests
start a server for it.

"play HOST:PORT" compares codes. A reply may have more lines than expected, or fewer, but all have
the same code, with a "-" behind it in all but the last. "--letter" compares texts, line by line. A
server that answers with a 421 from "(or ...)" has hung up, so the dialogue ends there."""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import contextlib
import csv
import dataclasses
import errno
import functools
import io
import itertools
import logging
import mailbox
import os
import poplib
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
import tracemalloc
import types
import unittest
import unittest.mock
import warnings
from collections.abc import Callable, Iterator
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import mailserver
from mailserver import Envelope, Maildir, MailServer, POP3Handler, Refused, SecureHandler

HERE = Path(__file__).resolve().parent
SOURCE = (HERE / "mailserver.py").read_text(encoding="utf-8")
PATIENCE = float(os.environ.get("PATIENCE", "20"))  # seconds after which a test gives up waiting
PORTS = itertools.count(10_000 + os.getpid() % 200 * 100)  # for free_port()

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
        if re.match(r"Level \d: ", line):
            level = line
        elif line.startswith("Hint: "):
            hint = line
        elif line.startswith("settings: "):
            settings = line.removeprefix("settings: ")
        elif line and not line.startswith("```"):
            title = line.removeprefix("- ")
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
        codes = [code[0], *re.findall(r"[\d.]+", others)]
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


@dataclasses.dataclass
class Client(contextlib.AbstractContextManager["Client"]):
    """A connection that plays dialogues."""

    address: Any
    patience: float = PATIENCE  # seconds to wait for a reply
    letter: bool = True  # compare texts, not just codes
    typing: bool = False  # send as a person does: pause between lines, or between single bytes
    record: list[str] = dataclasses.field(default_factory=list)  # what was sent, and what came
    name: str = ""  # "2" for the second client

    def __post_init__(self) -> None:
        self.received = bytearray()
        self.closed = False  # the server has hung up
        self.due = True  # a reply: the greeting, or one to what was sent since the last was read
        self.flaw = ""  # what is wrong with the end of the last line that came
        if self.name:
            self.record.append(f"C{self.name}: (one more client connects)")
        self.socket = socket.create_connection(self.address[:2], timeout=self.patience)
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
        if len(self.record) > 9:
            said = f"...\n{said}"
        came = short(printable(came.strip())) or "(an empty line)"
        who = f"S{self.name}: " if self.name else ""
        raise Mismatch(f"{said}\n  expected  {who}{expected}\n  came      {came}")

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

    def __exit__(self, *_: object) -> None:
        self.socket.close()


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
            if came.startswith("421") and "(or " in line.text:
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
OFFER = "\n".join(f"S: 250-{extension}" for extension in EXTENSIONS)
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


def each(reply: str, *lines: str) -> str:
    """Return a piece of a dialogue in which each line gets the same reply."""
    return "\n".join(f"C: {line}\nS: {reply}" for line in lines)


LONGEST = f"{'x' * 64}@{'.'.join(['e' * 62] * 3)}"  # 253 octets; two brackets more make a path

# A dialogue that has no "S: 221" in it ends in BYE.
COURSE = rf"""
Level 1: the classic dialogue
Hint: greet with 220 (end your own client first); end replies in CRLF; answer a mail at its dot
- the classic dialogue, line by line: a client that gets another reply here sends no mail
  {CLASSIC}

Level 2: a line may come in pieces, and two lines in one packet
Hint: keep what comes in a buffer, and split that at CRLF; who splits at LF misses level 4
- the classic dialogue, byte by byte: a network may part a line anywhere; some telnets send each key
  {CLASSIC}
- two lines in one packet: drop the second, and its client waits for a reply for ever
  {HELLO}
  C: MAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.com>
  S: 250 OK
  S: 250 OK
- the classic dialogue, in one piece: what comes behind DATA is mail; dropped, a part of it is lost
  {CLASSIC}

Level 3: order and syntax
Hint: keep the client's name, the sender and the recipients, and look at them before you obey
- verbs in small letters, and no blank after the colon: many programs write them so
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
- an unknown command: clients try what is new and go on without; if you hang up, their mail is lost
  {HELLO}
  C: FROB
  S: 500 Unknown command... (or 502)
  {MAIL}
- RCPT before MAIL: a mail without a sender: nobody could be told that it got lost
  {HELLO}
  C: RCPT TO:<b@example.com>
  S: 503 Send MAIL FROM before RCPT TO
- DATA before MAIL: a 354 makes the client send a mail that is for nobody, and is lost
  {HELLO}
  C: DATA
  S: 503 Send MAIL FROM before DATA (or 554)
- DATA before RCPT: a mail for nobody would be accepted, and its sender would believe it is there
  {SENDER}
  C: DATA
  S: 503 Send RCPT TO before DATA (or 554)
  {RCPT_TO}
  {MESSAGE}
- MAIL in a transaction: the first one's recipients would get the second sender's mail
  {ENVELOPE}
  C: MAIL FROM:<a@example.com>
  S: 503 ...RCPT TO...
  {MESSAGE}
- a second HELO drops the envelope: a client that starts again would mail the old recipients too
  {ENVELOPE}
  C: HELO example.com
  S: 250 Hello
  C: DATA
  S: 503 ...MAIL FROM... (or 554)
  {MAIL}
- the envelope is used up: the recipients of the first mail would get the next one as well
  {ENVELOPE}
  {MESSAGE}
  C: DATA
  S: 503 Send MAIL FROM before DATA (or 554)
- three messages in a session: a newsletter is sent so; all but its first mail would be refused
  {ENVELOPE}
  {MESSAGE}
  {MAIL}
  {MESSAGE}
  {MAIL}
  {MESSAGE}
- a bounce has no sender: notices of lost mail come from <>; refused, nobody learns of the loss
  {HELLO}
  C: MAIL FROM:<>
  S: 250 OK
  {RCPT_TO}
  {MESSAGE}
- HELO without a name: who looks for the source of a mail finds this name, or nothing
  S: 220 Simple Mail Server
  C: HELO
  S: 501 ...HELO... (or 50.)
  C: HELO example.com
  S: 250 Hello
- MAIL without an address: accepted, it leaves nobody to tell when the mail gets lost
  {HELLO}
  {each("501 ...MAIL FROM:<...>... (or 50. 55.)", "MAIL", "MAIL FROM:", "MAIL TO:<a@example.com>")}
  {MAIL}
- RCPT without an address: 250 says that the mail will be there; but who would get it?
  {SENDER}
  {each("501 ...RCPT TO:<...>... (or 50. 55.)", "RCPT TO:", "RCPT FROM:<b@example.com>")}
  {RCPT_TO}

Level 4: dots, sizes, long lines, two clients (what is stored is looked at with --maildir DIR only)
Hint: give each client a thread; a mail ends at CRLF, dot, CRLF only; a line loses its first dot
- a message of nothing: its dot comes right behind DATA; who wants a CRLF before it waits for ever
  {INSIDE}
  {DOT}
- a dot line inside a mail: cut there, its rest would be obeyed as commands; or dots come doubled
  {INSIDE}
  C: ..
  C: ...
  C: ..QUIT
  C: \x20.
  C: A dot at the end.
  {DOT}
- commands inside a mail: a mail about SMTP, such as this course, would be cut off
  {INSIDE}
  C: QUIT
  C: RSET
  C: DATA
  {DOT}
- no mail is smuggled in by LF, dot, LF: a relay's mail could carry a second, forged one in
  {INSIDE}
  C: first\n.\n\c
  C: MAIL FROM:<evil@example.com>
  C: .
  S: 250 Message accepted (or 5.. 421)
- no mail is smuggled in by LF, dot, CRLF: a relay's mail could carry a second, forged one in
  {INSIDE}
  C: first\n.\c
  C:
  C: MAIL FROM:<evil@example.com>
  C: .
  S: 250 Message accepted (or 5.. 421)
- a line of a mail has 998 letters: RFC 5321 4.5.3.1.6 allows it; a short buffer breaks the mail
  {INSIDE}
  C: {"x" * 998}
  {DOT}
- a mail has 64,000 octets, in one piece: every server takes so much (RFC 5321 4.5.3.1.7)
  {INSIDE}
  {times(1000, "C: " + "x" * 62)}
  {DOT}
- the longest address: who has one would get no mail (RFC 5321 4.5.3.1.3 allows 256 octets)
  {HELLO}
  {each("250 OK", f"MAIL FROM:<{LONGEST}>", f"RCPT TO:<{LONGEST}>")}
- a hundred recipients: a mail to a whole class is sent once (RFC 5321 4.5.3.1.8 asks for 100)
  {ENVELOPE}
  {times(100, each("250 OK", "RCPT TO:<u#@example.com>"))}
  {MESSAGE}
- a megabyte without a line end: pieces of it would pass for commands, or fill the memory
  {HELLO}
  C: NOOP {"x" * 1_000_000} QUIT
  S: 500 Line too long... (or 250 5.. 421)
  {MAIL}
- a second client: one client that thinks for a minute would stop the mail of all others
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
- each client has an envelope of its own: one's mail would go to the other's recipients
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
- EHLO: today's programs say EHLO, and some give up without it
  {EHLO}
  {MAIL}
- EHLO without a name: nobody could say where a mail came from
  S: 220 Simple Mail Server
  C: EHLO
  S: 501 ...EHLO... (or 50.)
- a second EHLO drops the envelope: a client that starts again would mail the old recipients too
  {EHLO}
  {MAIL}
  {EHLO_AGAIN}
  C: DATA
  S: 503 ...MAIL FROM... (or 554)
  {MAIL}
- RSET drops the envelope and keeps the HELO: the next mail would go to the old recipients too
  {ENVELOPE}
  C: RSET
  S: 250 OK
  C: DATA
  S: 503 Send MAIL FROM before DATA (or 554)
  {MAIL}
- RSET has nothing to drop: programs send RSET first, to be sure; some give up if it is refused
  {HELLO}
  C: RSET
  S: 250 OK
- NOOP, alone and with a word: programs ask so whether the server is still there
  {HELLO}
  C: NOOP
  S: 250 OK
  C: NOOP whatever
  S: 250 OK (or 501)
- HELP: a person at telnet types this first
  {HELLO}
  C: HELP
  S: 214-...
  S: 214 ... (or 211 250 50.)
- VRFY: every server answers it, if only with "cannot say" (RFC 5321 4.5.1)
  {HELLO}
  C: VRFY somebody
  S: 252 ... (or 250 251 50. 55.)
- EXPN: a client that asks waits for an answer, be it no
  {HELLO}
  C: EXPN nobody
  S: 550 No such list (or 250 252 50. 55.)
- an unknown parameter: 250 would promise what the server does not know how to do
  {EHLO}
  C: MAIL FROM:<a@example.com> FROB=1
  S: 555 Unknown parameter... (or 501 504)

Level 6: addresses and letters
Hint: RFC 5321 4.1.2 is the grammar of addresses: write a function for each of its rules
- the postmaster: who has trouble with a site writes to this address (RFC 5321 4.5.1)
  {SENDER}
  C: RCPT TO:<Postmaster>
  S: 250 OK
- addresses with signs in them: people with a + or a ' in theirs would get no mail
  {HELLO}
  C: MAIL FROM:<Bob.B+tag@Example.COM>
  S: 250 OK
  C: RCPT TO:<!#$%&'*+-/=?^_`{{|}}~@example.com>
  S: 250 OK
- names in quotation marks: cut at the first > or blank, the mail would go to somebody else
  {SENDER}
  {each("250 OK", 'RCPT TO:<"a b"@example.com>', 'RCPT TO:<"a>b"@example.com>')}
- addresses that name a machine by its number: a printer without a name could not send
  {HELLO}
  {each("250 OK", "MAIL FROM:<bob@[192.0.2.1]>", "RCPT TO:<bob@[IPv6:2001:db8::1]>")}
- the route in front of an address is left out: old programs write one; the mail is for bob
  {SENDER}
  C: RCPT TO:<@a.example,@b.example:bob@example.com>
  S: 250 OK (or 55.)
- no addresses: who mistypes an address would not hear of it, and the mail would be lost
  {SENDER}
  {each("501 ... (or 55.)", "RCPT TO:<>", "RCPT TO:<bob@>", "RCPT TO:<@example.com>")}
  {each("501 ... (or 55.)", "RCPT TO:<bob@@example.com>")}
  {RCPT_TO}
- eight bits: letters with an accent would come out broken
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


@dataclasses.dataclass
class Judge:
    """Plays dialogues with a server, and reports which of them passed."""

    name: str  # what the report calls the server
    address: tuple[str, int]
    dialogues: list[Dialogue]
    patience: float  # seconds
    letter: bool
    maildir: Path | None  # where to look for the mail that the server has accepted
    aloud: bool  # print the report as it grows
    report: list[str] = dataclasses.field(default_factory=list)
    played: int = 0
    passed: int = 0
    level: int = 0  # of this one and of those before, all dialogues passed
    first_fault: str = ""  # the title of a dialogue and what came, or why there is no connection
    end: str = ""  # why the last dialogues were not played
    deadline: float = 0.0  # of time.monotonic(): then no dialogue begins

    def run(self) -> int:
        """Play all dialogues and report. Return the exit status."""
        self.deadline = time.monotonic() + 60 * self.patience
        try:
            self.play_levels()
        except (OSError, UnicodeError) as error:  # UnicodeError: there can be no such host
            if self.played:
                self.end = f"; not played to the end (look at its terminal): {error}"
            else:
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
        level = f"level {self.level} of {LEVELS}; " if self.dialogues[0].level else ""
        passed = f"{self.passed} of {len(self.dialogues)} dialogues passed"
        return f"{self.name}: {level}{passed}{self.end}"

    def play_levels(self) -> None:
        """Play the levels in order. Of those after the first one that is missed, say little.
        OSError: the server cannot be reached, or takes too long in all."""
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
            self.first_fault = f"{title}: {' '.join(fault.splitlines()[-1].split())}"
        if not quietly:
            self.say(f"  {'FAILED' if fault else 'passed'}  {short(title)}")
        if fault and not quietly:
            why = f"Why: {dialogue.why}\n" if dialogue.why else ""
            self.say(textwrap.indent(why + fault, " " * 10))
        return not fault

    def fault(self, dialogue: Dialogue) -> str:
        """Play a dialogue; return what went wrong, or "". OSError: it cannot be played."""
        if not re.search(r"(?m)^S\d?: .*[\w(]", dialogue.text):
            return 'no S: line says more than "...": write what the server has to say'
        if read_lines(dialogue.text)[-1].in_mail:
            return 'the mail has no end: write an empty line of a mail as "C:"'
        mail = accepted_mail(dialogue.text) if self.maildir else b""
        before = self.count(mail)
        if time.monotonic() > self.deadline:
            raise TimeoutError(f"it takes too long in all; at: {dialogue.title}")
        try:
            manner = {"patience": self.patience, "letter": self.letter, "typing": True}
            play(self.address, dialogue.text, dialogue.way, **manner)
        except Mismatch as mismatch:
            return str(mismatch)
        except OSError as error:
            raise ConnectionError(f"{error}; at: {dialogue.title}") from None
        deadline = time.monotonic() + self.patience
        while mail and self.count(mail) == before:
            if time.monotonic() > deadline:
                lines = textwrap.indent(mail.decode("utf-8", "backslashreplace"), "| ")
                return f"{lines}\naccepted, but {self.maildir} has no new file with these lines"
            time.sleep(PAUSE)
        return ""

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


def read_servers(words: list[str]) -> tuple[dict[str, tuple[str, int]], str]:
    """Read [NAME=]HOST:PORT ... [FILE]: give the servers by name, and the file. ValueError: these
    are other words."""
    servers: dict[str, tuple[str, int]] = {}
    file = ""
    for word in words:
        match = re.fullmatch(r"(?:([\w@+-][\w.@+-]*)=)?([^\s=/\\]+):(\d{1,5})", word)
        name = match and match[1] or word
        if name in servers:
            raise ValueError(f"two servers are called {name}")
        if match and 0 < int(match[3]) < 65536:
            servers[name] = (match[2].strip("[]"), int(match[3]))
        elif servers and not file:
            file = word
        else:
            raise ValueError(f"{word!r} is not HOST:PORT, such as 127.0.0.1:2600")
    return servers, file


def choose_dialogues(file: str, level: int) -> list[Dialogue]:
    """Give what is to be played. ValueError, OSError: the file is no good."""
    if not file:
        return [dialogue for dialogue in read_course() if int(dialogue.level[6]) <= level]
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except UnicodeError:
        raise ValueError(f"{file} is not UTF-8: save it as UTF-8") from None
    if wrong := re.search(r"(?m)^\s*[CS]\d?:[^ \n].*", text):
        raise ValueError(f"{file}: a blank is missing behind the colon of {wrong[0].strip()}")
    found = [dialogue for dialogue in read_dialogues(text) if not dialogue.settings]
    if not found:
        raise ValueError(f"{file} has no dialogue to play: lines that start with C: or S:")
    return found


def play_command(argv: list[str]) -> int:
    """Judge servers; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="test_mailserver.py play",
        usage="%(prog)s [options] [NAME=]HOST:PORT ... [FILE]",
        description="Play the course, or FILE. @class.txt stands for the words in its lines.",
        epilog="Exit status: 0 if all dialogues passed, 1 if some failed, 2 for wrong usage, 3 if "
        "a server is not running.",
        fromfile_prefix_chars="@",
    )
    add = parser.add_argument
    add("words", metavar="HOST:PORT", nargs="+", help="where a server listens")
    add("--level", type=int, choices=range(1, LEVELS + 1), default=LEVELS, help="stop behind it")
    add("--letter", action="store_true", help="compare texts as well, not only codes")
    add("--patience", metavar="SECONDS", type=float, default=2, help="wait so long for a reply")
    add("--maildir", metavar="DIR", help="where the server keeps mail; of many, each in DIR/NAME")
    add("--feedback", metavar="DIR", help="write grades.csv and a report for each server to DIR")
    # A line of @class.txt may be empty, and may have blanks and a comment.
    words = lambda line: re.sub(r"\s|\ufeff|#.*", "", line).split()  # noqa: E731
    parser.convert_arg_line_to_args = words  # type: ignore[method-assign]
    try:
        flags = parser.parse_intermixed_args(argv)
        servers, file = read_servers(flags.words)
        dialogues = choose_dialogues(file, flags.level)
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
    rows: list[list[object]] = []
    pool = concurrent.futures.ThreadPoolExecutor(len(judges))
    running = {pool.submit(judge.run): judge for judge in judges}
    for done in concurrent.futures.as_completed(running):  # who is slow delays nobody's report
        judge = running[done]
        worst = max(worst, done.result())
        level = judge.level if judge.played and judge.dialogues[0].level else ""
        rows.append([judge.name, level, judge.passed, len(judge.dialogues), judge.first_fault])
        report = "\n".join(judge.report) + "\n"
        if folder:
            path = Path(folder, judge.name.replace(":", "_") + ".txt")
            head = ["name", "level", "passed", "dialogues", "first fault"]
            try:
                path.write_text(report, encoding="utf-8")
                with open(Path(folder, "grades.csv"), "w", encoding="utf-8", newline="") as file:
                    csv.writer(file).writerows([head, *sorted(rows, key=str)])
            except OSError as error:
                print(f"cannot be written: {error}", flush=True)
            print(judge.verdict(), flush=True)
        elif not judge.aloud:
            print(report, flush=True)
    return worst


# ==================================================================================================
# THE TRAPS: python test_mailserver.py traps


# The test that guards a trap, and how the comment goes on; then the right line, and a broken one.
TRAPS = r"""
DialoguesTest.test_course: read all of a long line
  - while piece and not piece.endswith(b"\n"):
  + while False:
WireTest.test_nothing_is_smuggled_in: a line ends as the DATA line did
  - if line in (b".\r\n", b"." + newline):
  + if line in (b".\r\n", b".\n"):
WireTest.test_what_arrives: keep two, since 64 KiB may end
  - (before + last).endswith(newline)
  + last.endswith(newline)
LifeTest.test_no_file_descriptor_left: no more files can be opened
  - time.sleep(0.1)
  + pass
TLSTest.test_stop: not connection.shutdown()
  - socket.socket.shutdown(session.connection, how)
  + session.connection.shutdown(how)
WireTest.test_ctrl_c_in_telnet: at Ctrl-C, telnet asks DO TIMING-MARK
  - session.send(b"\xff\xfc\x06")
  + pass
TLSTest.test_stop: without this option
  - session.tls.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
  + pass
TLSTest.test_what_came_behind_starttls_is_dropped: take a new rfile
  - socketserver.StreamRequestHandler.setup(session)
  + session.connection, session.wfile = session.request, session.request.makefile("wb", 0)
KeepingTest.test_names_of_mailboxes: "../x" would be a path elsewhere
  - urllib.parse.quote(address.lower(), safe="@+")
  + address.lower()
KeepingTest.test_order_of_what_happens: before this, a crash would lose the file
  - os.fsync(file.fileno())
  + pass
POP3Test.test_subscription: an rfile that has timed out
  - self.rfile = self.connection.makefile("rb", self.rbufsize)
  + pass
ProcessTest.test_a_terminal_that_is_stuck: not print(), which holds a lock
  - data = data[os.write(sys.stdout.fileno(), data) :]
  + data = print(data.decode(), end="", flush=True)
ProcessTest.test_what_it_prints: on two cores
  - os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
  + pass
"""


@dataclasses.dataclass
class Trap:
    """A "Trap:" comment of mailserver.py, what it warns of, and the test that sees it."""

    guard: str
    says: str
    right: str
    broken: str

    def harmless(self) -> str:
        """Return why it makes no difference on this machine to fall into this trap, or ""."""
        option = getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
        preset = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).options & option
        if "OP_IGNORE" in self.right and preset == option:
            return "this Python sets OP_IGNORE_UNEXPECTED_EOF by itself, or does not know it"
        cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        if "affinity" in self.right and len(cores) < 2:
            return "this machine has one core, or no call to choose one"
        return ""


def read_traps() -> list[Trap]:
    """Read the table."""
    entries = re.findall(r"(\S+): (.*)\n  - (.*)\n  \+ (.*)\n", TRAPS)
    return [Trap(*entry) for entry in entries]


def try_guard(trap: Trap, sprung: bool) -> str:
    """Run the test that guards a trap, in a copy: "passes", "fails", or "is skipped: " and why."""
    if trap.harmless():
        return f"is skipped: {trap.harmless()}"
    text = SOURCE.replace(trap.right, trap.broken) if sprung else SOURCE
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(HERE / "test_mailserver.py", folder)
        Path(folder, "mailserver.py").write_text(text, encoding="utf-8")
        command = [sys.executable, "test_mailserver.py", "-v", "--failfast", trap.guard]
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
    """Run the guards of all traps, four at a time: some only wait."""
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda trap: try_guard(trap, sprung), read_traps()))


def traps_command(argv: list[str]) -> int:
    """Fall into each trap, and say whether its guard fails; return the exit status."""
    argparse.ArgumentParser("test_mailserver.py traps").parse_args(argv)
    traps = read_traps()
    missed = 0
    for trap, before, after in zip(traps, try_guards(False), try_guards(True), strict=True):
        print(f"Trap: {trap.says}\n    - {trap.right}\n    + {trap.broken}")
        print(f"    {trap.guard} {before}; with the broken line, it {after}")
        missed += after == "passes" or before == "fails"
    print(f"{len(traps) - missed} of {len(traps)} traps are guarded")
    return 1 if missed else 0


# ==================================================================================================
# THE TESTS: what they share

STORED = b"Subject: hello\r\n\r\nAt one?\r\n.\r\n"  # what "mail=" puts into a mailbox

# A certificate for localhost that nobody vouches for, and its key, which is no secret.
CERTIFICATE_AND_KEY = """\
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
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgrdrXgWY+jZezQWLT
g7tj3ACf55IuqWFSuMF+RepL8VmhRANCAASo+R+1M/4cyalkaUWbjG5REd/0Q1Va
ZY56MNoQGGZKfwfQY0lGkD4t36NiipZvyf1paqLNx+QyDOUYyIFhWlx7
-----END PRIVATE KEY-----
"""


def certificate(folder: str | Path) -> str:
    """Write a file that has the certificate and its key; give its path."""
    path = Path(folder, "cert.pem")
    path.write_text(CERTIFICATE_AND_KEY, encoding="ascii")
    return str(path)


def server_tls() -> ssl.SSLContext:
    """Give what a server needs for TLS."""
    with tempfile.TemporaryDirectory() as folder:
        return mailserver.tls_context(certificate(folder), certificate(folder))


def read_settings(text: str) -> dict[str, Any]:
    """Read what stands behind "settings:"; see the top of this file."""
    call: Any = ast.parse(f"MailServer({text})", mode="eval").body
    return {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}


@contextlib.contextmanager
def our_server(text: str) -> Iterator[MailServer]:
    """Run the server of mailserver.py with settings as in a dialogue."""
    settings = read_settings(text)
    handler: Any = POP3Handler if settings.pop("pop3", False) else SecureHandler
    mails = settings.pop("mail", 0)
    if "tls" in settings:
        settings["tls"] = server_tls()
    with tempfile.TemporaryDirectory() as folder:
        if handler is POP3Handler:
            settings["maildir"] = Maildir(folder)
        for _ in range(mails):
            envelope = Envelope("ann@example.com", ["bob@example.com"], STORED)
            settings["maildir"].keep(envelope)
        with MailServer(("127.0.0.1", 0), handler, **settings) as server:
            server.start()
            yield server


def wait_until(condition: Callable[[], object]) -> None:
    """Wait for what another thread is about to do."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("waited in vain")
        time.sleep(0.005)


def free_port() -> int:
    """Return a port at which nobody listens, and that no client or other run is given meanwhile."""
    while True:
        port = next(PORTS)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


def listens(address: Any) -> bool:
    """Tell whether somebody listens there. If so, a session begins, and is over."""
    with contextlib.suppress(OSError), Client(address) as client:
        client.settle()  # a reset would be the end of naive.py
        return True
    return False


class DialogueTest(unittest.TestCase):
    """A test that plays dialogues. It fails if something appears on stderr that it did not expect:
    there go the tracebacks of mailserver.py, and those of threads."""

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

    def play(self, what: str | Dialogue, server: Any = None, way: str = LINE_BY_LINE) -> None:
        """Play a dialogue. If it has a line "settings:", it gets a server of its own."""
        (dialogue,) = [what] if isinstance(what, Dialogue) else read_dialogues(what)
        if dialogue.settings:
            with our_server(dialogue.settings) as own:
                play((own.host, own.port), dialogue.text, way)
        else:
            server = server or self.server
            play((server.host, server.port), dialogue.text, way)

    def play_three_ways(self, what: str | Dialogue, server: Any = None) -> None:
        """Play a dialogue line by line, in one piece, and byte by byte."""
        for way in WAYS:
            try:
                self.play(what, server, way)
            except Mismatch as mismatch:
                self.fail(f"{way}:\n{mismatch}")


# ==================================================================================================
# THE TESTS: the dialogues of mailserver.py, besides the course


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
- a wrong argument; but a tab counts as a blank, and white space at the end is forgiven
  S: 220 ...
  {each("501 ...HELO your-domain.example...", *["HELO" + one for one in NO_NAMES])}
  {each("501 ...EHLO your-domain.example...", *["EHLO" + one for one in NO_NAMES])}
  {each("503 Send HELO before MAIL FROM", "MAIL FROM:<a@example.com>")}
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
- a slip in MAIL or RCPT: the reply shows how to write it
  {HELLO}
  {each("501 ...MAIL FROM:<sender@example.com>...", *["MAIL" + slip for slip in SLIPS])}
  {each("501 ...domain...", "MAIL FROM:<greta>", "MAIL FROM:<Postmaster>")}
  {MAIL_FROM}
  {each("501 ...RCPT TO:<recipient@example.com>...", *["RCPT" + slip for slip in NO_RCPT])}
  {each("501 ...", "RCPT TO:<bob>", "RCPT TO:<>")}
  {RCPT_TO}
- no addresses
  {HELLO}
  {each("501 ...", *[f"MAIL FROM:<{one}>" for one in NO_ADDRESSES[::2]])}
  {MAIL_FROM}
  {each("501 ...", *[f"RCPT TO:<{one}>" for one in NO_ADDRESSES[1::2]])}
  {RCPT_TO}
- no commands
  S: 220 ...
  {each("500 ...", *UNKNOWN)}
  {each("500 Leave out ...C:...", "C: NOOP", "c: HELO x", "C:")}
  C: HELP
  S: 214-AUTH DATA EHLO EXPN HELO HELP MAIL NOOP QUIT RCPT RSET STARTTLS VRFY
  S: 214 ...HELP...
  {each("214 MAIL FROM:<sender@example.com> - ...", "help mail")}
  {each("504 ...", "HELP FROB", "HELP __init__")}
- twenty errors
  S: 220 ...
  {times(20, each("500 ...", "FROB"))}
  S: 421 ...
  S: (closed)
{BROWSERS}
- a line too long is thrown away whole
  {HELLO}
  {each("250 OK", "NOOP " + "x" * 12281)}
  {each("500 ...12288...", *[f"NOOP {'x' * n} QUIT" for n in (12277, 24571, 100_000)])}
  {each("250 OK", "NOOP")}
- typing errors, and the codes of telnet
  S: 220 Simple Mail Server
  C: \xff\xfd\x03\xff\xfb\x18\xff\xfa\x18\x00xterm\xff\xf0\b\bHEM\bX\x7fL\xff\xf1O x
  S: 250 Hello
  C: MAIL FROM:<bob\b\b\bann@example.com>\xff\xfc\x06
  S: 250 OK
  C: RCPT TO:<caf\xc3\xa9\bf@example.com>
  S: 250 OK
- one client too many
  settings: max_clients=1
  S: 220 Simple Mail Server
  S2: 421 Too many clients...
  S2: (closed)
  {BYE}
  S3: 220 Simple Mail Server
- the limit of a message; a doubled dot counts once
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
- parameters
  {EHLO}
  {each("250 OK", "MAIL FROM:<a@b.org> SIZE=1000 BODY=8BITMIME SMTPUTF8", "RSET")}
  {each("250 OK", "mail from:<a@b.org> size=10485760 body=7bit auth=<>")}
  {each("555 ...", "RCPT TO:<b@b.org> NOTIFY=NEVER", "RCPT TO:<b@b.org> SIZE=1")}
  {each("250 OK", "RSET")}
  {each("501 ...SIZE...", *["MAIL FROM:<> SIZE" + one for one in ("", "=", "=big", "=-1")])}
  {each("501 ...BODY...", "MAIL FROM:<a@b.org> BODY=9BIT")}
  {each("501 ...SMTPUTF8...", "MAIL FROM:<a@b.org> SMTPUTF8=yes")}
  {each("555 ...", *["MAIL FROM:<a@b.org> " + one for one in ("FROB=1", "__CLASS__", "=")])}
  {each("503 ...", "DATA")}
  {each("250 Hello", "HELO example.com")}
  {each("555 ...EHLO...", "MAIL FROM:<a@b.org> SIZE=1000")}
  {each("553 ...SMTPUTF8...", f"MAIL FROM:<{JOSE}>")}
  {MAIL}
  {each("553 ...SMTPUTF8...", f"RCPT TO:<{JOSE}>")}
- lists and users
  settings: lists={{"Team": ["ann@x.org", "bob@x.org"]}}, users={{"ann@x.org": "secret"}}
  {HELLO}
  {each("250 <Team>", "VRFY team", "VRFY <TEAM> SMTPUTF8")}
  {each("250 <ann@x.org>", "VRFY ANN", "VRFY <ann@x.org>")}
  C: EXPN team
  {TEAM}
  C: EXPN <TEAM@any.example> SMTPUTF8
  {TEAM}
  {each("550 ...", "VRFY bob", "EXPN none", "EXPN ann@x.org", "EXPN __class__")}
  {each("501 ...", "VRFY", "EXPN", "MAIL FROM:<team>")}
- commands fail on purpose
  settings: fail={{"RCPT": 450, "VRFY": 421}}
  {SENDER}
  {times(30, each("450 ...", "rcpt TO:<b@b.org>"))}
  C: RCPT\tTO:<b@b.org>
  S: 450 ...
  {each("421 ...", "VRFY x")}
  S: (closed)
- before and in TLS
  settings: tls=True, users={{"ann": "secret"}}, require_auth=True
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
- TLS forgets what was said before
  settings: tls=True
  {ENVELOPE}
  {STARTTLS}
  {each("503 Send HELO before MAIL FROM", "MAIL FROM:<a@b.org>")}
  {each("503 Send MAIL FROM before RCPT TO", "RCPT TO:<b@b.org>")}
- TLS from the first byte; where no users are listed, any name and password will do, but none empty
  settings: tls=True, tls_first=True
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
- refusals of AUTH
  settings: users={{"ann": "secret", "bob": ""}}
  S: 220 ...
  {each("502 ...", "STARTTLS")}
  {each("503 ...EHLO...", LOGIN)}
  {each("250 Hello", "HELO example.com")}
  {each("503 ...EHLO...", LOGIN)}
  {EHLO_AGAIN}
  {each("501 ...AUTH PLAIN...", "AUTH")}
  {each("504 ...AUTH PLAIN...", "AUTH CRAM-MD5", "AUTH PLAINAGFubgBzZWNyZXQ=")}
  {each("501 ...", *["AUTH PLAIN " + one for one in NO_PLAIN[1:]])}
  {each("334 VXNlcm5hbWU6", "AUTH LOGIN")}
  {each("501 ...", "*")}
  {each("334 ...", "auth plain")}
  {each("501 ...", NO_PLAIN[0])}
  {each("535 ...", "AUTH PLAIN AGJvYgA=", "AUTH PLAIN AGFubgB3cm9uZw==")}
  {each("334 UGFzc3dvcmQ6", "AUTH LOGIN Ym9i")}
  {each("535 ...", "=")}
  {each("334 ...", "AUTH PLAIN")}
  {each("235 ...", "YW5uAGFubgBzZWNyZXQ=")}
- a session of POP3
  settings: pop3=True, mail=2
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
- a mail that is deleted leaves the others their numbers, and RSET takes that back
  settings: pop3=True, mail=2
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
- before the login
  settings: pop3=True
  {POP3}
  {each("-ERR ...USER...", *TOO_EARLY, "USER", "USER bob", "USER bob@example.com x")}
  {each("-ERR Unknown command...", "FROB", "HELO x", "ſtat", "")}
  {each("-ERR Line too long...", "x" * 13_000)}
  {END}
- no mail
  settings: pop3=True
  {OPEN}
  {each("-ERR ...", *NO_NUMBERS)}
  C: SUBSCRIBE\r\n\r\nSTAT\r\nSUBSCRIBE
  S: +OK ...
  S: +OK Stopped
  S: +OK 0 0
  S: +OK ...
  {each("-ERR Line too long...", "x" * 13_000)}
  {END}
- a mailbox is for one session
  settings: pop3=True, mail=1
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
- a password goes over TLS only, if there is TLS
  settings: pop3=True, tls=True, users={{"bob@example.com": "secret"}}
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
  {each("+OK ...", "USER nobody@example.com")}
  {each("-ERR Wrong...", "PASS secret")}
  {each("+OK ...", "USER bob@example.com")}
  {each("-ERR Wrong...", "PASS x", "PASS", "PASS ÿ")}
  {each("+OK 0 messages", "PASS secret")}
  C: SUBSCRIBE\r\nenough\r\nSTAT
  S: +OK ...
  S: +OK Stopped
  S: +OK 0 0
  {END}
- STLS forgets what came in the clear
  settings: pop3=True, tls=True
  {POP3}
  {each("+OK ...", "USER bob@example.com", "STLS")}
  C: (TLS)
  {each("-ERR ...USER...", "PASS x")}
  {END}
"""


class DialoguesTest(DialogueTest):
    """All dialogues that stand as text, to the letter, in three ways."""

    def play_all(self, dialogues: list[Dialogue]) -> None:
        """Play dialogues side by side: some wait most of the time."""
        self.serve()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            played = [pool.submit(self.play_three_ways, dialogue) for dialogue in dialogues]
        for dialogue, result in zip(dialogues, played, strict=True):
            with self.subTest(dialogue.title):
                result.result()

    def test_course(self) -> None:
        self.play_all(read_course())

    def test_ours(self) -> None:
        """Play the dialogues; and see that no reply is long, or says what the client has sent."""
        with self.assertLogs("mailserver", logging.INFO) as logs:
            self.play_all(read_dialogues(OURS))
        for record in logs.records:
            said = record.getMessage().partition("] S: ")[2]
            self.assertLessEqual(len(said), 100, said)
            self.assertNotRegex(said, r"b\.org|FROB|Error")


# ==================================================================================================
# THE TESTS: parts 1 to 3

ERRORS = {kind.__name__: kind("inside") for kind in (TimeoutError, SystemExit, GeneratorExit)}
FAILED = "S: 421 The server failed...\nS: (closed)"


class StudentsHandler(SecureHandler):
    """A handler with more commands, of which two are wrong."""

    def do_ECHO(self, arg: str) -> None:
        """ECHO text - sends the text back"""
        self.reply(250, arg, "and\r\n250 forged\n")

    def do_FAIL(self, arg: str) -> None:
        """FAIL name - raises an exception"""
        raise ERRORS[arg]

    def do_TIME(self, arg: str) -> None:
        """TIME - forgets to reply"""


class WireTest(DialogueTest):
    """Lines, line ends and dots; what arrives, and for whom."""

    def test_nothing_is_smuggled_in(self) -> None:
        self.serve()
        ends = [r".\n", r"\n.\n", r"\r.\r", r"\n.\r\n", r"\r\n.\n", r"\r\n.\r", r"\r\r\n.\r\r\n"]
        for size in range(65532, 65537):
            ends += ["x" * size + end for end in (r"\n.\n", r"\n.\r\n", r".\r\n")]
        for end in ends:
            self.inbox.clear()
            forged = f"C: x{end}\\c\nC: MAIL FROM:<evil@b.org>\n{DOT}\n{BYE}"
            self.play_three_ways(f"{INSIDE}\n{forged}")
            self.assertEqual([one.content.count(b"evil") for one in self.inbox], [1, 1, 1], end)

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
        mails += [("", f"{'x' * n}|..|x\\r|.", b"x" * n + b"|.|x\r|") for n in range(65532, 65538)]
        for end, lines, content in mails:
            self.inbox.clear()
            text = "\n".join("C: " + line for line in lines.split("|"))
            text = f"C: DATA{end}\nS: 354 ...\n{text}\nS: 250 ..."
            self.play_three_ways(f"{ENVELOPE}\n{text}\n{BYE}")
            right = [one.content == content.replace(b"|", b"\r\n") for one in self.inbox]
            self.assertEqual(right, [True] * 3, content[-30:])

    def test_the_end_of_input_completes_nothing(self) -> None:
        self.serve()
        for text in (r"text\r\n.\c", r"text\r\n.\r\c", r"cut o\c"):
            self.play_three_ways(f"{INSIDE}\nC: {text}")
        self.play_three_ways("S: 220 ...\nC: QUIT\\c")
        self.assertEqual(self.inbox, [])

    def test_ctrl_c_in_telnet(self) -> None:
        client = self.client(self.serve())
        client.converse("S: 220 ...\nC: half a li\\xff\\xf4\\xff\\xfd\\x06")  # IP, DO TIMING-MARK
        client.expect("\\xff\\xfc\x06500 ...")  # WONT TIMING-MARK

    def test_a_line_of_a_reply_is_one_line(self) -> None:
        self.serve(StudentsHandler)
        self.play("S: 220 ...\nC: ECHO one\\rtwo\nS: 250-one two\nS: 250 and  250 forged...")

    def test_recipients(self) -> None:
        good = [r'"a\x20b"@b.org', r'"a\"b>@"@b.org', r'"a>\x20b"@b.org', '""@b.org', "b@[1.2.3.4]"]
        good += ["!#$%&'*+-/=?^_`{|}~@b.org", "Bob.B+tag@Example.COM", "bob@[IPv6:2001:db8::1]"]
        good += ["bob@localhost", "bob@a-b.example", "x" * 64 + "@b.org", f"x@{'e' * 250}.x", JOSE]
        good += ["jose\u0301@jose\u0301.example", "\u0928\u0938\u094d@\u0e2a\u0e27\u0e31.example"]
        senders = [line for one in good for line in (f"MAIL FROM:<{one}> SMTPUTF8", "RSET")]
        more = ["@a.example,@b.example:eve@b.org", "Postmaster", "team", "TEAM@b.org", good[0]]
        self.serve(lists={"Team": ["ann@x.org", "eve@b.org"]})
        lines = [*senders, "MAIL FROM:<> SMTPUTF8", *[f"RCPT TO:<{one}>" for one in good + more]]
        self.play(f"{EHLO}\n{each('250 OK', *lines)}\n{MESSAGE}")
        expected = [one.replace(r"\x20", " ") for one in good]
        expected += ["eve@b.org", "Postmaster", "ann@x.org"]
        self.assertEqual(self.inbox[0].recipients, expected)

    def test_smtplib(self) -> None:
        mail = "a@b.org", ["b@b.org", "c@b.org"], "Subject: =?utf-8?q?caf=C3=A9?=\n\n.\n..\n"
        self.serve(users={"ann": "secret"}, tls=server_tls())
        with smtplib.SMTP("localhost", self.server.port, "ann.example.com") as client:
            client.starttls(context=ssl.create_default_context(cadata=CERTIFICATE_AND_KEY))
            client.login("ann", "secret")
            client.ehlo()  # again, which changes nothing
            client.sendmail(*mail)
        (one,) = self.inbox
        came = one.sender, one.recipients, one.content.decode().replace("\r\n", "\n")
        self.assertEqual(came, mail)
        self.assertEqual((one.helo, one.peer, one.user), ("ann.example.com", "127.0.0.1", "ann"))
        self.assertEqual((one.protocol, one.message["Subject"]), ("ESMTPSA", "caf\u00e9"))


class LimitsTest(DialogueTest):
    """Whatever a client sends costs little."""

    def test_silence(self) -> None:
        for text in (INSIDE, "S: 220 ...", f"S: 220 ...\n{STARTTLS}"):
            end = "C: half\\c\nS: 421 ...\nS: (closed)"
            self.play(f"settings: timeout=0.2, tls=True\n{text}\n{end}")

    def test_memory(self) -> None:
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
        inputs = [(b"NOOP " + b"x" * 493 + b"\r\n") * 1000, (b"x" * 100 + b"\r\0") * 500]
        for start in (b"MAIL FROM:<", b"VRFY a", b"AUTH PLAIN ", b"NOOP "):
            inputs += [(start + part * (12_000 // len(part)) + b"x\r\n") * 5 for part in parts]
        self.serve()
        before = time.process_time()
        for data in inputs:
            client = self.client()
            client.send(b"EHLO x\r\n" + data)
            client.end_input()
        self.play(f"{HELLO}\n{BYE}")
        wait_until(lambda: not self.server.sessions)
        self.assertLess(time.process_time() - before, 10)  # seconds of work: one is enough


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
        with unittest.mock.patch.multiple("time", time=float, monotonic=float):  # float() is 0.0
            stopping = self.in_thread(self.server.stop)
            client.converse("S: 421 ...\nS: (closed)")
        stopping.join(PATIENCE)
        self.in_thread(self.server.stop)

    def test_stop_while_clients_do_not_read(self) -> None:
        servers = [self.serve(), self.serve(serial=True)]
        for server in servers:
            client = self.client(server)
            client.socket.settimeout(0.1)
            with contextlib.suppress(TimeoutError):
                while True:
                    client.socket.sendall(b"HELP\r\n" * 10_000)
        for server in servers:
            self.in_thread(server.stop)
        wait_until(lambda: not any(server.sessions for server in servers))

    def test_stop_reads_no_further(self) -> None:
        self.serve(subscribers=[lambda _: setattr(self.server, "stopping", True)])
        self.play(f"{INSIDE}\n{DOT}\nC: NOOP\nS: 421 ...\nS: (closed)", way=IN_ONE_PIECE)
        client = self.client(self.serve())
        client.converse(INSIDE)
        self.server.stopping = True
        client.converse("C: x\nS: 421 ...\nS: (closed)")

    def test_stop_from_a_subscriber(self) -> None:
        for serial in (False, True):
            self.serve(serial=serial, subscribers=[lambda _: self.server.stop()])
            self.play(f"{INSIDE}\n{DOT}\nS: 421 ...\nS: (closed)")
            with self.assertRaises(OSError):
                self.client()

    def test_faults_of_ours(self) -> None:
        def subscriber(envelope: Envelope) -> None:
            raise ERRORS[envelope.helo]

        for serial in (False, True):
            self.serve(StudentsHandler, serial=serial, subscribers=[subscriber])
            for name in ERRORS:
                with self.subTest(name, serial=serial):
                    self.play(f"S: 220 ...\nC: FAIL {name}\n{FAILED}")
                    self.expect_stderr("Traceback", "in do_FAIL", f"{name}: inside")
                    hello = HELLO.replace("example.com", name)
                    dot = f"C: .\nC: MAIL FROM:<evil@b.org>\n{FAILED}"
                    self.play(f"{hello}\n{MAIL}\n{DATA}\n{dot}", way=IN_ONE_PIECE)
                    self.expect_stderr("Traceback", "in subscriber", f"{name}: inside")
                    self.play(f"{HELLO}\n{BYE}")
        self.play(f"S: 220 ...\nC: TIME\n{FAILED}")
        self.expect_stderr("TIME")

    def test_setup_fails(self) -> None:
        base = socketserver.StreamRequestHandler
        with unittest.mock.patch.object(base, "setup", side_effect=ZeroDivisionError):
            self.client(self.serve()).expect("(closed)")
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
            client.socket.close()  # with a reset
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
        hosts, six = ["localhost"], socket.AF_INET6
        with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=six):
            hosts.append("::1")  # this machine has it
        for host in hosts:
            with MailServer((host, 0), SecureHandler) as server:
                server.start()
                self.play(CLASSIC, server)
        self.assertFalse(listens((server.host, server.port)))  # "with" has stopped it

    def test_no_file_descriptor_left(self) -> None:
        accept = socket.socket.accept
        errors = iter([OSError(errno.EMFILE, "Too many open files")] * 3)

        def failing(listener: socket.socket) -> Any:
            for error in errors:
                raise error
            return accept(listener)

        self.serve()
        accepting = unittest.mock.patch("socket.socket.accept", failing)
        with accepting, unittest.mock.patch("time.sleep") as sleep:
            self.play(f"{HELLO}\n{BYE}")
        self.assertGreaterEqual(len([call for call in sleep.mock_calls if call.args[0] >= 0.05]), 3)


class TLSTest(DialogueTest):
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
        client = self.client()
        client.converse(f"S: 220 ...\n{STARTTLS}\nC: QUIT\nS: 221 Bye")
        self.assertEqual(client.socket.recv(1), b"")  # or this is an SSLEOFError
        wait_until(lambda: not self.server.sessions)  # though the client does not answer

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

    def setUp(self) -> None:
        super().setUp()
        self.serve()

    def shown(self, lines: str) -> str:
        """Type lines, and leave; return what the console shows, with # for the session's number."""
        with self.assertLogs("mailserver", logging.INFO) as logs:
            client = self.client()
            client.expect("220 ...")
            client.send(b"".join(octets(line) for line in lines.split("|")))
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
        shown = self.shown(f"NOOP {'x' * 495}|NOOP {'x' * 496}")
        self.assertRegex(shown, r"C: NOOP x{495}\n(.*\n)*.*C: NOOP x{495}\.\.\. .*501")
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
        for users in ({"ann": "secret"}, {}):
            self.serve(users=users)
            for line in map(str.strip, re.split("[;\n]", table.strip())):
                lines = line.replace("~", "secret").replace("LONG", "A" * 13_000)
                with self.subTest(line, users=users):
                    self.assertNotIn("secret", self.shown("EHLO x|" + lines))

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
    def setUp(self) -> None:
        super().setUp()
        self.root = os.path.join(self.folder(), "root")
        self.maildir = Maildir(self.root)

    def keep(self, content: bytes = b"x\r\n", to: str = "bob@example.com") -> Path:
        """Keep a message; return the file that it is in."""
        self.maildir.keep(Envelope("ann@example.com", [to], content))
        return max(files(self.root), key=lambda path: path.name)  # a name starts with the time


class KeepingTest(MaildirTest):
    def test_a_copy_for_each_recipient(self) -> None:
        self.stack.callback(os.umask, os.umask(0))
        people = ["Bob@example.com", "ann@example.com", "bob@EXAMPLE.com"]
        envelope = Envelope("a@example.com", people, b"hello\r\n", "example.com", "127.0.0.1")
        german = unittest.mock.Mock(side_effect=lambda form, *_: "M\xe4r" if "%" in form else form)
        with unittest.mock.patch("time.strftime", german):  # names the months in a locale
            self.maildir.keep(envelope)
        places = [path.relative_to(self.root).parts[:2] for path in files(self.root)]
        self.assertEqual(places, [("ann@example.com", "new"), ("bob@example.com", "new")])
        self.assertRegex(
            files(self.root)[0].read_text(encoding="ascii"),
            r"^Return-Path: <a@example\.com>\nDelivered-To: ann@example\.com\n"
            r"Received: from example\.com \(\[127\.0\.0\.1\]\)\n"
            r"\tby \S+ with SMTP id [\d.]{17}\.[0-9a-f]{16};\n"
            r"\t[A-Z][a-z]{2}, \d\d? [A-Z][a-z]{2} \d{4} \d\d:\d\d:\d\d [+-]\d{4}\nhello\n$",
        )
        for path in Path(self.root).parent.rglob("*"):
            self.assertTrue(os.name == "nt" or path.stat().st_mode & 0o077 == 0, path)

    def test_content(self) -> None:
        content = b"Subject: x\r\n\r\ncaf\xe9 \xff\0\r\n.\r\n..\r\n \r\n" + b"x" * 70_000
        content += b"\r\nbare\rCR\r\nbare\nLF\r\n\r\n"
        kept = self.keep(content).read_bytes().split(b"\n", 5)[5]
        self.assertEqual(kept, content.replace(b"\r\n", b"\n"))
        for content in (b" x\n", b"\tx\n"):  # or it would continue our last line
            self.assertTrue(self.keep(content).read_bytes().endswith(b"\n\n" + content))

    def test_names_of_mailboxes(self) -> None:
        names = ["..", ".", "", "../x", "..\\x", "con", "nul.x@y", "com1.x@y", "x" * 260, "x" * 261]
        names += ["~root@y", "a:b@y", "%2e%2e", "b*?|@y", "x.", "Bob+x_y-z@Example.COM"]
        self.maildir.keep(Envelope("", names))
        self.assertEqual(os.listdir(os.path.dirname(self.root)), ["root"])
        made = os.listdir(self.root)
        self.assertEqual(len(made), len(names))
        self.assertIn("bob+x_y-z@example.com", made)
        self.assertEqual([name[:-64] for name in made].count("x" * 100), 2)  # and a hash
        for name in made:
            self.assertRegex(name, r"^[A-Za-z0-9%+@~_-][A-Za-z0-9%+@._-]{0,249}$")
            self.assertNotRegex(name, r"(?i)^(con|nul|com1)(\.|$)")

    def test_all_copies_or_none(self) -> None:
        """Have calls of the system fail, the first or a later one."""
        full, broken = OSError(errno.ENOSPC, "full"), OSError(errno.EIO, "broken")
        faults: list[tuple[str, list[Any], int]] = [("mkdir", [broken], 451)]
        faults += [("open", [OSError(errno.EFBIG, "full")], 452)]
        faults += [("rename", [None, OSError(errno.EDQUOT, "full")], 452)]
        faults += [("fsync", [None, MemoryError()], 451)]
        faults += [
            ("fsync", [None] * good + [full], 452) for good in range(2 if os.name == "nt" else 7)
        ]
        if os.path.exists("/dev/full"):  # a disk that is full
            faults += [("open", [os.open("/dev/full", os.O_WRONLY)], 452)]
        for name, effects, code in faults:
            fault = unittest.mock.patch.object(os, name, side_effect=effects)
            with fault, self.assertRaises(Refused) as refused:
                self.maildir.keep(Envelope("", ["ann@x.org", "bob@x.org"]))
            self.assertEqual((refused.exception.args[0], files(self.root)), (code, []), effects)
        self.expect_stderr("not kept")

    @unittest.skipIf(os.name == "nt", "Windows has no call for what a directory needs")
    def test_order_of_what_happens(self) -> None:
        calls: list[tuple[str, int, int]] = []

        def note(name: str, target: Any, *_: str) -> Any:
            status = os.stat(target)
            calls.append((name, status.st_ino, status.st_size))
            return unittest.mock.DEFAULT  # now call it

        for name in ("fsync", "rename"):
            call = {"wraps": getattr(os, name), "side_effect": functools.partial(note, name)}
            self.stack.enter_context(unittest.mock.patch.object(os, name, **call))
        root = Path(self.root, "other")
        Maildir(str(root)).keep(Envelope("", ["ann@x.org", "bob@x.org"]))
        self.assertEqual(calls[0][:2], ("fsync", root.parent.stat().st_ino))
        kept = [path.stat() for path in files(self.root)]
        expected = [(name, one.st_ino, one.st_size) for name in ("fsync", "rename") for one in kept]
        self.assertEqual(calls[1:5], expected)
        folders = [root, *root.glob("*"), *root.glob("*/new")]
        synced = {inode for _, inode, _ in calls[5:]}
        self.assertLessEqual({path.stat().st_ino for path in folders}, synced)

    def test_a_mailbox_that_is_not_complete(self) -> None:
        self.keep()
        for place in ("", "new", "tmp", "cur"):
            path = os.path.join(self.root, "bob@example.com", place)
            shutil.rmtree(path)
            self.keep()
            self.assertTrue(os.path.isdir(path))

    def test_twenty_first_deliveries_at_once(self) -> None:
        """Keep all messages, though the clock stands still and all threads make one mailbox."""
        barrier = threading.Barrier(20)
        mkdir = os.mkdir

        def meet(path: str, mode: int) -> None:
            barrier.wait(PATIENCE)
            mkdir(path, mode)

        clock = unittest.mock.patch("time.time", return_value=1e9)
        meeting = unittest.mock.patch("os.mkdir", meet)
        with clock, meeting, concurrent.futures.ThreadPoolExecutor(20) as pool:
            list(pool.map(self.maildir.keep, [Envelope("", ["bob@example.com"])] * 20))
        self.assertEqual(len(files(self.root)), 20)

    def test_subscribers(self) -> None:
        """Call them in order; the first that raises an exception ends that."""
        picky = unittest.mock.Mock(side_effect=[Refused(554, "No"), ValueError("no"), None])
        self.serve(subscribers=[self.inbox.append, picky, self.maildir.keep])
        self.play(f"{INSIDE}\n{each('554 No', '.')}")
        self.play(f"{INSIDE}\n{each('421 The server failed...', '.')}\nS: (closed)")
        self.expect_stderr("Traceback", "ValueError: no")
        self.assertEqual((len(self.inbox), len(files(self.root))), (2, 0))
        self.play(f"{INSIDE}\n{DOT}")
        self.assertEqual((len(self.inbox), len(files(self.root))), (3, 1))


class POP3Test(MaildirTest):
    head = HEAD.partition("\nS: Subject")[0]  # the reply to RETR, and what we have put in front

    def log_in(self, messages: int, more: str = "") -> Client:
        """Open bob's mailbox."""
        client = self.client()
        client.converse(f"{BOB}\nS: +OK {messages} messages\n{more}")
        return client

    def test_poplib(self) -> None:
        for content in (b"one\r\n", b"two\r\n\r\n" + b".\r\n..x\r\n" * 20_000):
            self.keep(content, "ann@example.com")
        self.serve(POP3Handler, maildir=self.maildir)
        self.log_in(0)  # bob's mailbox, open meanwhile, is another one
        client = poplib.POP3(self.server.host, self.server.port, timeout=PATIENCE)
        client.user("ann@example.com")
        client.pass_("x")
        kept = files(self.root)
        mails = [path.read_bytes().replace(b"\n", b"\r\n") for path in kept]
        self.assertEqual(client.stat(), (2, len(b"".join(mails))))
        for n in (0, 1):
            self.assertEqual(b"\r\n".join([*client.retr(n + 1)[1], b""]), mails[n])
            self.assertEqual(client.list(n + 1), b"+OK %d %d" % (n + 1, len(mails[n])))
            self.assertEqual(client.uidl(n + 1), f"+OK {n + 1} {kept[n].name}".encode())
        client.quit()

    def test_only_quit_deletes(self) -> None:
        """A mailbox is ours before it is read, and free before QUIT is answered."""
        outer, keys = self, mailbox.Maildir.keys

        class Handler(POP3Handler):
            def reply(self, code: int, *lines: str) -> None:
                if code == 221:
                    outer.log_in(1).socket.close()
                super().reply(code, *lines)

        def look(box: Any) -> Any:
            self.play(f"{BOB}\nS: -ERR [IN-USE] ...")
            return keys(box)

        _, two = self.keep(), self.keep()
        self.serve(Handler, maildir=self.maildir)
        with unittest.mock.patch.object(mailbox.Maildir, "keys", look):
            self.log_in(2, each("+OK ...", "DELE 1")).socket.close()
        wait_until(lambda: not self.server.sessions)
        self.log_in(2, f"{each('+OK ...', 'DELE 1')}\n{END}")
        self.assertEqual(files(self.root), [two])

    @unittest.skipIf(os.name == "nt", "Windows has no such names")
    def test_what_mail_readers_do_meanwhile(self) -> None:
        moved, deleted = self.keep(), self.keep()
        Path(moved.parent, ".DS_Store").write_bytes(b"\0")
        self.serve(POP3Handler, maildir=self.maildir)
        client = self.log_in(2)
        moved.rename(moved.parent.parent / "cur" / f"{moved.name}:2,S")
        deleted.unlink()
        client.converse(f"C: RETR 1\n{self.head}\nS: x\nS: .")
        client.converse(each("-ERR ...", "RETR 2", "TOP 2 0"))
        client.converse(f"{each('+OK ...', 'STAT', 'DELE 2')}\n{END}")
        with unittest.mock.patch.object(mailbox.Maildir, "keys", return_value=["deleted"]):
            self.log_in(0, END)
        client = self.log_in(1, each("+OK ...", "DELE 1"))
        with unittest.mock.patch("os.remove", side_effect=PermissionError):
            client.converse("C: QUIT\nS: -ERR Bye, but ...\nS: (closed)")

    def test_no_password_on_the_console(self) -> None:
        self.serve(POP3Handler, maildir=self.maildir)
        with self.assertLogs("mailserver", "INFO") as logs:
            for line in ("PASS secret", r"pass\tsecret", "PAS secret", " secret", r"NOOP\rsecret"):
                self.play(f"{POP3}\n{each('...', 'USER bob@example.com', line)}")
            self.play(f"{POP3}\n{each('...', 'USER bob', 'secret')}")
            self.play(f"{OPEN}\nC: oops\nS: -ERR ...")
        shown = "\n".join(logs.output)
        self.assertNotIn("secret", shown)
        self.assertRegex(shown, r"C: PASS \*{8}\n(.*\n)+.*C: oops")

    def test_subscription(self) -> None:
        self.serve(POP3Handler, maildir=self.maildir)
        client = self.log_in(0)
        self.keep(b"one\r\n.\r\n")
        client.converse(f"C: SUBSCRIBE\nS: +OK ...\n{self.head}\nS: one\nS: ..\nS: .")
        with unittest.mock.patch.object(mailbox.Maildir, "get_file") as get_file:
            get_file.side_effect = [io.BytesIO(), KeyError]  # a mail reader deletes it meanwhile
            self.keep()
            wait_until(lambda: get_file.call_count == 2)
        self.keep(b"not for bob\r\n", "ann@example.com")
        self.keep(b"two\r\n")
        client.converse(f"{self.head}\nS: two\nS: .\nC: enough\nS: +OK Stopped")
        (session,) = self.server.sessions
        self.assertEqual(session.connection.gettimeout(), POP3Handler.timeout)
        client.converse(END)
        self.serve(POP3Handler, maildir=self.maildir, timeout=0.3)
        client = self.log_in(3, "C: SUBSCRIBE\nS: +OK ...")
        self.play("S: +OK ...\nS: -ERR ...\nS: (closed)")  # whoever waits for mail is not idle
        self.server.stop()
        client.converse("S: -ERR The server is stopping...\nS: (closed)")

    def test_a_subscriber_that_does_not_read(self) -> None:
        self.serve(POP3Handler, maildir=self.maildir, timeout=0.3)
        self.log_in(0, "C: SUBSCRIBE\nS: +OK ...")
        content = (b"x" * 1022 + b"\r\n") * 2**14 + b"x" * 2**24 + b"\r\n"
        envelope = Envelope("", ["bob@example.com"], content)
        self.stack.callback(tracemalloc.stop)
        tracemalloc.start()
        self.maildir.keep(envelope)
        wait_until(lambda: not self.server.sessions)
        self.assertLess(tracemalloc.get_traced_memory()[1], 4 * 2**20)


class FlagTest(DialogueTest):
    def main(self, *flags: str) -> tuple[Any, str]:
        """Call main(); return its exit status and what it printed on stdout."""
        with (
            unittest.mock.patch("os.sched_setaffinity", create=True),
            unittest.mock.patch.object(mailserver, "serve", side_effect=AssertionError("served")),
            contextlib.redirect_stdout(io.StringIO()) as out,
            self.assertRaises(SystemExit) as end,
        ):
            mailserver.main([*flags])
        return end.exception.code, out.getvalue()

    def test_bad_flags(self) -> None:
        folder = self.folder()
        texts = [b"ann:x\nbob\n", b":x\n", b"bob:\n", b"\n# ann:x\n", b"b:caf\xe9\n"]
        for number, text in enumerate(texts):
            Path(folder, str(number)).write_bytes(text)
        good, none = certificate(folder), f"{folder}/none"
        busy = self.stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        table = f"""
            --frob; --port x; --port 65536; --port {busy.getsockname()[1]}; --host nowhere.invalid
            --host 192.0.2.1; --host \udcff; --timeout x; --timeout 0; --max-size -1
            --fail RCPT; --fail RCPT=250; --fail RCPT=600; --fail RCTP=450; --fail RCPT={"4" * 5000}
            --list team; --list team=; --list =a@x.org; --list team=ann; --list a@b=ann@x.org
            --pop3-port 0; --smtps-port 0; --tls {none} {good}; --tls {folder}/0 {good}
            --users {none}; --maildir {good}; --maildir {none}/none; --maildir /proc/self"""
        lines = re.split("[;\n]", table.strip()) + [f"--users {folder}/{n}" for n in range(5)]
        for line in lines:
            self.assertEqual(self.main("--port", "0", *line.split()), (2, ""), line)
            error = self.stderr.getvalue()
            self.assertRegex(error, r"\Amailserver[^\n]+\n\Z")
            self.assertTrue(any(word.strip("-") in error for word in line.split()), error)
            self.expect_stderr("")

    def test_each_part_runs_with_those_above_it(self) -> None:
        names = ["SMTPHandler", "ESMTPHandler", "SecureHandler", "SecureHandler", "SecureHandler"]
        for number, name in enumerate(names, 2):
            module: Any = types.ModuleType("cut")
            text = SOURCE.partition(f"\n# PART {number}")[0]
            with self.subTest(number), unittest.mock.patch.dict(sys.modules, cut=module):
                exec(compile(text, f"above part {number}", "exec"), vars(module))
                with module.MailServer(("127.0.0.1", 0), getattr(module, name)) as server:
                    server.start()
                    self.play(CLASSIC, server)

    def test_colours(self) -> None:
        """Colour replies on a terminal, unless somebody does not want that."""
        for no_color, colours in (("", ["32", "33", "31", "31"]), ("1", [])):
            with (
                unittest.mock.patch("sys.stdout", encoding="ascii"),  # which says it is a terminal
                unittest.mock.patch("os.write", side_effect=lambda _, data: len(data)) as write,
                unittest.mock.patch.dict(os.environ, NO_COLOR=no_color, WT_SESSION="1"),
            ):
                console = mailserver.Console()
                for text in ("S: 250 OK", "S: 450 No", "S: 500 No", "S: -ERR", "C: 500"):
                    console.emit(logging.makeLogRecord({"msg": f"[1 x] {text}"}))
                console.close()
            shown = b"".join(call.args[1] for call in write.mock_calls).decode()
            self.assertEqual(re.findall(r"\x1b\[(\d+)m\[1 x\] S: .*\x1b\[0m\n", shown), colours)


@unittest.skipIf(os.name == "nt", "programs are redirected, stopped and killed the Unix way here")
class ProcessTest(DialogueTest):
    """The program, in a process of its own, with commands that do not work, and a subscriber."""

    def start(self, words: str = "") -> Any:
        """Start the program, with words for a shell behind it; return it when it answers at
        self.address. Its session 1 is over then."""
        self.address = ("127.0.0.1", free_port())
        script = "import mailserver\nclass Mine(mailserver.SecureHandler):\n"
        script += " do_FAIL = do_MINE = None\n lists = {'all': ['a@x.org']}\n"
        script += "mailserver.main(None, Mine, [lambda mail: mailserver.console.info('%s', mail)])"
        line = f'exec "$0" -c "$1" --port {self.address[1]} {" ".join(words.split())}'
        env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": ""}
        manner: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "ascii"}
        command = ["sh", "-c", line, sys.executable, script]
        program = subprocess.Popen(command, cwd=HERE, env=env, **manner)
        self.stack.enter_context(program)
        self.stack.callback(program.kill)
        wait_until(lambda: listens(self.address))
        return program

    def end(self, program: Any, number: int = signal.SIGTERM) -> str:
        """Send a signal; check the exit status and stderr; return what is on stdout."""
        program.send_signal(number)
        self.assertEqual(program.wait(PATIENCE), 0)
        out, err = program.communicate()
        self.assertEqual(err, "")
        return str(out)

    def test_what_it_prints(self) -> None:
        program = self.start()
        if hasattr(os, "sched_getaffinity"):
            self.assertEqual(len(os.sched_getaffinity(program.pid)), 1)
        play(self.address, f"{INSIDE}\nC: h\xe9 \u20ac\n{DOT}\n{BYE}")
        out = self.end(program)
        self.assertRegex(out, rf"\Amailserver [\d.]+ listens .* port {self.address[1]} \(SMTP\)\n")
        self.assertIn("\n[2 example] | h\\xe9 \\u20ac\n[2 example] C: .\n", out)
        self.assertIn("\n[2 example] C: QUIT\n[2 example] S: 221 Bye\n", out)
        self.assertIn("\nEnvelope(sender='a@example.com'", out)  # from the subscriber
        self.assertNotIn("other machines", out)
        program = self.start("--quiet --host 0.0.0.0")
        play(self.address, f"{EHLO}\n{each('250 <a@x.org>', 'EXPN all')}\n{BYE}")
        self.assertRegex(self.end(program), r"\Amailserver .* listens .*\n.* other machines .*\n\Z")

    def test_flags_and_kill(self) -> None:
        """Show what the flags change; then kill the program, which loses nothing."""
        smtps, pop3, folder = free_port(), free_port(), self.folder()
        users, cert = Path(folder, "users"), certificate(folder)
        users.write_text("\ufeff# who\n\nann:secret\nbob@x.org:pass:word\n", encoding="utf-8")
        program = self.start(f"""
            --host localhost --users {users} --tls {cert} {cert} --require-auth --max-size 1234
            --list team=bob@x.org,ann@x.org --maildir {folder}/mail --fail vrfy=450 --fail mine=451
            --timeout 1000000000 --smtps-port {smtps} --pop3-port {pop3}""")
        hello = EHLO.replace("10485760", "1234")
        refused = f"{each('530 ...', 'MAIL FROM:<>')}\n{each('450 ...', 'VRFY x')}"
        refused += f"\n{each('451 ...', 'MINE')}"
        mail = f"{each('250 OK', 'MAIL FROM:<>', 'RCPT TO:<team>')}\n{MESSAGE}"
        login = each("+OK ...", "USER bob@x.org", "PASS pass:word")
        with Client(("127.0.0.1", smtps)) as client:
            client.converse(f"C: (TLS)\n{hello}\n{refused}\n{each('235 ...', LOGIN)}\n{mail}")
            stat = f"{each('+OK ...', 'STLS')}\nC: (TLS)\n{login}\n{each('+OK 1 ...', 'STAT')}"
            play(("127.0.0.1", pop3), f"{POP3}\n{stat}")
            client.converse(times(19, mail))
            program.kill()
            program.wait(PATIENCE)
        kept = [path.parts[-3] for path in Path(folder).glob("mail/*/new/*")]
        self.assertEqual(sorted(kept), ["ann@x.org"] * 20 + ["bob@x.org"] * 20)

    def test_signals(self) -> None:
        for number, flags in ((signal.SIGINT, ""), (signal.SIGTERM, "--serial")):
            program = self.start(flags)
            clients = [self.stack.enter_context(Client(self.address)) for _ in range(20)]
            for client in clients[: 1 if flags else 20]:
                client.converse("S: 220 ...\nC: HELO x\\r\\nNOO\\c\nS: 250 Hello")
            self.assertFalse(clients[-1].hear(0.1))  # it waits: for its turn, or for its NOOP
            while not clients[0].hear(0.01) and not clients[0].closed:
                program.send_signal(number)  # again and again, until the 421 comes
            self.assertEqual(self.end(program, 0).count("] S: 421"), 20)
            for client in clients:
                client.converse("S: 421 ...\nS: (closed)")
            socket.create_server(self.address).close()  # the port is free

    def test_a_terminal_that_is_stuck(self) -> None:
        """It stops no session, nor the program's end; if it goes on by then, no line is missing."""
        many = times(4000, "C: NOOP\nS: 250 OK")  # more than a pipe holds
        for goes_on in (False, True):
            program = self.start()
            play(self.address, f"S: 220 ...\n{many}", IN_ONE_PIECE)
            play(self.address, CLASSIC)
            program.terminate()
            if goes_on:
                wait_until(lambda: not listens(self.address))
                self.assertEqual(program.stdout.read().count("] S: 250 OK\n"), 4002)
            self.assertEqual(program.wait(PATIENCE), 0)

    def test_nowhere_to_print(self) -> None:
        for words in ("", ">&-", ">&- 2>&-"):
            program = self.start(words)
            program.stdout.close()
            for text in (CLASSIC, "S: 220 ...\nC: FAIL\nS: 421 ...\nS: (closed)", CLASSIC):
                play(self.address, text)
            program.terminate()
            self.assertEqual(program.wait(PATIENCE), 0)
            faults = re.findall("Traceback|TypeError", program.stderr.read())
            self.assertEqual(faults, [] if "2>" in words else ["Traceback", "TypeError"])


# ==================================================================================================
# THE TESTS: README, the judge, the traps


class ReadmeTest(DialogueTest):
    """What README says is so."""

    NOT_RUN = "make test|py traps|tail -f|import pytest"  # the last is test_fixture's
    SERVER = r"(?m)\Apython mailserver.py.*\n\Z|^ *(serve|main)\(|\.accept\(|^import small"

    def setUp(self) -> None:
        super().setUp()
        self.readme = (HERE / "README.md").read_text(encoding="utf-8")
        self.dialogues = read_dialogues(self.readme)
        self.blocks = re.findall(r"(?m)^```(python|sh)\n((?:.*\n)*?)^```", self.readme)

    def test_dialogues(self) -> None:
        self.assertEqual(f"{self.dialogues[0].text}S: (closed)", CLASSIC)
        self.assertEqual(len(self.dialogues), self.readme.count("\n```text\nS: "))
        self.serve()
        for dialogue in self.dialogues:  # <!-- settings: ... --> may stand in front
            if dialogue.title == "<!-- settings":
                dialogue.settings = dialogue.why.removesuffix(" -->")
            if "<!-- lesson" not in dialogue.title:
                with self.subTest(dialogue.text):
                    self.play(dialogue)

    def test_dialogues_with_others(self) -> None:
        subscribe, read, stop = (one for one in self.dialogues if "<!-- lesson" in one.title)
        maildir = Maildir(self.folder())
        smtp = self.serve(subscribers=[maildir.keep])
        student, carol = self.client(), self.client(self.serve(POP3Handler, maildir=maildir))
        carol.converse(subscribe.text)
        with smtplib.SMTP(smtp.host, smtp.port, "laptop.example") as friend:
            friend.sendmail("ann@example.com", "carol@example.com", "Look, it has arrived!\r\n")
        carol.converse(read.text)
        hello, end = stop.text.split("S: 421")
        student.converse(hello)
        smtp.stop()
        student.converse(f"S: 421{end}S: (closed)")

    def test_fixture(self) -> None:
        code = next(code for _, code in self.blocks if "import pytest" in code)
        pytest = types.SimpleNamespace(fixture=contextlib.contextmanager)
        names: dict[str, Any] = {}
        with unittest.mock.patch.dict(sys.modules, pytest=pytest):
            exec(compile(code, "README.md", "exec"), names)
        with self.assertLogs("mailserver") as logs, names["mail"](unittest.mock.Mock()) as mail:
            names["test_welcome"](mail)
        self.assertRegex(logs.output[-1], r"\] S: 221 Bye$")  # not 421: the fixture has waited

    def test_flags(self) -> None:
        for flag in re.findall("--[a-z0-9-]+", mailserver.make_parser().format_help()):
            self.assertRegex(self.readme, rf"(?m)^\|[^|]*`{flag}[ `]")

    @unittest.skipIf(os.name == "nt", "the command lines are those of Unix")
    @unittest.skipUnless(shutil.which("curl") and shutil.which("openssl"), "no curl or openssl")
    def test_programs_and_command_lines(self) -> None:
        """Do what README says, in one folder. A server runs until another wants its port."""
        self.here = Path(self.folder())
        self.programs: dict[str, Any] = {}  # servers by port, and "": the last one that is none
        self.ports = {port: str(free_port()) for port in ("2525", "2526", "2527", "2600", "2465")}
        self.texts = self.ports | {  # what README says, and what is right here
            '"mail.example.com", 587': f'"localhost", {self.ports["2600"]}',
            "ssl.create_default_context()": "ssl.create_default_context(cafile='cert.pem')",
            "test_mailserver.py play": "test_mailserver.py play --level 1",
        }
        for name in ("mailserver.py", "test_mailserver.py", "README.md"):
            self.write(name, (HERE / name).read_text(encoding="utf-8"))
        self.write("class.txt", "ann=127.0.0.1:2525")
        for port in ("", *self.ports):
            self.stack.callback(self.stop, port)
        for language, code in self.blocks:
            if not re.search(self.NOT_RUN, code):
                with self.subTest(code):
                    self.do(language, code)

    def local(self, text: str) -> str:
        """Put in what is right here."""
        return re.sub("|".join(map(re.escape, self.texts)), lambda one: self.texts[one[0]], text)

    def write(self, name: str, text: str) -> None:
        (self.here / name).write_text(self.local(text), encoding="utf-8")

    def do(self, language: str, code: str) -> None:
        """Run a block: to its end, or, if it is a server, until the server listens."""
        if re.search("mail.example|openssl s_client", code):  # README has no block for its server
            self.do("sh", "python mailserver.py --port 2600 --tls cert.pem key.pem\n")
        command = code
        if language == "python":
            name = code.split()[1] if code.startswith("# ") else "try.py"
            self.write(name, code)
            command = f"python {name}"
        ports = re.findall(r'(?:--port |"127.0.0.1", )(\d+)', f"{code} --port 2525")
        port = ports[0] if re.search(self.SERVER, code) else ""
        self.stop(port)
        shell = ["sh", "-ec", self.local(command).replace("python ", f'"{sys.executable}" ')]
        pipes: Any = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
        pipes["stderr"] = subprocess.STDOUT
        program = subprocess.Popen(shell, cwd=self.here, start_new_session=True, **pipes)
        self.programs[port] = program
        if port:
            wait_until(
                lambda: program.poll() is not None or listens(("127.0.0.1", int(self.ports[port])))
            )
        else:
            program.communicate(b"QUIT\n", PATIENCE)
        if program.poll() != (None if port else 0):
            raise AssertionError(program.communicate()[0].decode())
        if port and re.search("subscribers|--maildir", code):
            mail = EmailMessage()
            mail.set_content("Hello")
            mail.add_alternative('<a href="http://x.org/">x</a>', subtype="html")
            mail.add_attachment(b"data", "image", "png", filename="p.png")
            with smtplib.SMTP("127.0.0.1", int(self.ports[port]), timeout=PATIENCE) as client:
                client.send_message(mail, "me@x.org", ["you@x.org"])

    def stop(self, port: str) -> None:
        """End a program, if there is one, and what it has started."""
        if program := self.programs.pop(port, None):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(program.pid, signal.SIGKILL)
            program.communicate()
            wait_until(lambda: not port or not listens(("127.0.0.1", int(self.ports[port]))))


class TinyServer(socketserver.StreamRequestHandler):
    """A server that reaches level 2. The tests change one of its attributes, to get it wrong."""

    greeting = b"220 Tiny\r\n"
    hello = b"250 Hello\r\n"
    go_on = b"354 Go on\r\n"
    in_mail = b""  # what a line of a mail is answered with
    other = b"250 Fine\r\n"

    def handle(self) -> None:
        verb = b""
        replies = {b"HELO": self.hello, b"DATA": self.go_on, b"mail": self.in_mail}
        replies[b"QUIT"] = b"221 Bye\r\n"
        with contextlib.suppress(OSError):  # the judge has hung up
            self.wfile.write(self.greeting)
            while verb != b"QUIT" and (line := self.rfile.readline()):
                is_mail = verb in (b"DATA", b"mail") and line != b".\r\n"
                verb = b"mail" if is_mail else line[:4].upper()
                self.wfile.write(replies.get(verb, self.other))


class JudgeTest(DialogueTest):
    """The judge, of our own server and of others."""

    def place(self, handler: Any = SecureHandler, **settings: Any) -> str:
        """Start a server; return HOST:PORT."""
        server = self.serve(handler, **settings)
        return f"{server.host}:{server.port}"

    def judge(self, status: int, shown: str, *words: str, text: str = "") -> str:
        """Run the command, with a text in a file; check how it ends and what it prints."""
        if text:
            file = Path(self.folder(), "mine.txt")
            file.write_text(text, encoding="utf-8")
            words += (str(file),)
        out = io.StringIO()
        ends = self.assertRaises(SystemExit)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out), ends:
            sys.exit(play_command(["--patience", f"{PATIENCE}", *words]))
        self.assertEqual(ends.exception.code, status, out.getvalue())
        self.assertRegex(out.getvalue(), shown)
        return out.getvalue()

    @unittest.mock.patch(f"{__name__}.PAUSE", 0.001)
    def test_our_own_server(self) -> None:
        shown = r": level 6 of 6; (\d+) of \1 dialogues passed\n$"
        for letter in ([], ["--letter"]):
            self.assertNotIn("FAILED", self.judge(ALL_PASSED, shown, self.place(), *letter))

    @unittest.mock.patch(f"{__name__}.PAUSE", 0.001)
    def test_a_server_that_reaches_level_2(self) -> None:
        tiny = self.place(TinyServer)
        out = self.judge(SOME_FAILED, r": level 2 of 6; \d+ of 46 dialogues passed\n$", tiny)
        self.assertRegex(out, "(?s)FAILED  RCPT before MAIL\n +Why: .*expected  503 .any text")
        self.assertIn("\n  Hint: keep the client's name", out)
        self.assertRegex(out, r"\nLevel 4: .* \d+ of \d+ dialogues passed\nLevel 5: ")
        self.judge(ALL_PASSED, r": level 2 of 6; (\d+) of \1 dialogues", tiny, "--level", "2")

    def test_imperfect_servers(self) -> None:
        tiny = self.place(TinyServer)
        shown = r"\nThe other levels .*\n.*: level 0 of 6; 0 of 46 dialogues passed\n$"
        for name, value, came in [
            ("greeting", b"", "(nothing in 0.4 seconds)"),
            ("greeting", b"220Hi\r\n", "220Hi"),
            ("greeting", b"220-Hi\r\n250 Ho\r\n", "220-Hi | 250 Ho"),
            ("greeting", b"220-Hi\r\n", "220-Hi | (nothing in 0.4 seconds)"),
            ("greeting", b"\x1b\xff\r\n", r"\x1b\xff"),
            ("hello", b"250 Hello\n", "250 Hello (ends in LF alone: a reply ends in CRLF)"),
            ("hello", b"250 Hello", "250 Hello (no line end)"),
            ("hello", b"250 Hello\r\n" * 2, "250 Hello, which nobody asked for"),
            ("hello", b"250-endless\r\n" * 500_000, "250-endless"),
            ("in_mail", b"250 queued\r\n", "250 queued, which nobody asked for"),
            ("go_on", b"250\r\n354 Go on\r\n", "250, and then 354 Go on: one reply too many"),
            ("handle", lambda _: None, "(closed)"),
        ]:
            with self.subTest(came), unittest.mock.patch.object(TinyServer, name, value):
                out = self.judge(SOME_FAILED, shown, tiny, "--patience", "0.4")
                self.assertRegex(out, rf"\n +expected  .*\n +came      {re.escape(came)}\n")

    def test_a_file(self) -> None:
        ours, tiny = self.place(), self.place(TinyServer)
        text = "one\nS: 220 ...\nC: NOOP\nS: 250 Yes\n\nsettings: max_size=1\nS: 250 No"
        self.judge(ALL_PASSED, "passed  one\n.*: 1 of 1 dialogues passed\n$", ours, text=text)
        shown = "FAILED  one\n.*\n.*\n +expected  250 Yes\n +came      250 OK\n"
        self.judge(SOME_FAILED, shown, ours, "--letter", text=text)
        text = (
            f"S: ...\nC: NOOP\nS: ...\n\nS: 220 Hi\nC: QUIT\nS: 221 Bye\nS: ...\n\n{INSIDE}\nC: x"
        )
        shown = (
            r"(?s)write what .* has to say.*came      \(closed\).*the mail has no end.*: 0 of 3 "
        )
        self.judge(SOME_FAILED, shown, ours, text=text)
        # A megabyte may be taken or refused.
        self.judge(ALL_PASSED, ": 1 of 1", tiny, text=course("a megabyte without a line end"))
        text = course("no mail is smuggled in by LF, dot, CRLF")
        shown = r"\n +C: first\\n\.    \(no line end\)\n +C: \n +expected  nothing"
        self.judge(SOME_FAILED, shown, tiny, text=text)
        # What is shown has happened.
        shown = "S: 220 Tiny\n +C: EHLO example.com\n +S: 250 Fine\n +C: FROB\n +expected"
        self.judge(SOME_FAILED, shown, tiny, text=f"{EHLO}\nC: FROB\nS: 5.. No")
        # A 421 is as right as the codes in brackets, and ends the dialogue.
        text = "S: 220 Hi\nC: FROB\nS: 500 No (or 502 4.1)\nC: NOOP\nS: 250 OK"
        with unittest.mock.patch.object(TinyServer, "other", b"421 Busy\r\n"):
            self.judge(ALL_PASSED, ": 1 of 1", tiny, text=text)
        ends = property(lambda session: session.server.stop() or b"220 Hi\r\n")
        with unittest.mock.patch.object(TinyServer, "greeting", ends):
            shown = r": 1 of 3 dialogues passed; not played to the end .*; at: two\n$"
            text = "one\nS: 220 Hi\n\ntwo\nS: 220 Hi\n\nthree\nS: 220 Hi"
            self.judge(SOME_FAILED, shown, self.place(TinyServer), text=text)

    def test_where_the_mail_can_be_looked_at(self) -> None:
        text, folder = course("a dot line inside a mail"), self.folder()
        place = self.place(subscribers=[lambda one: Path(folder, "1").write_bytes(one.content)])
        self.judge(ALL_PASSED, ": 1 of 1", place, "--maildir", folder, text=text)
        file, dots = Path(folder, "2"), (b"\n.", b"\n..")
        place = self.place(subscribers=[lambda one: file.write_bytes(one.content.replace(*dots))])
        words = [place, "--maildir", folder, "--patience", "0.2"]
        self.judge(SOME_FAILED, r"\n          \| \.\.\n", *words, text=text)

    def test_many_servers_side_by_side(self) -> None:
        both = threading.Barrier(2)
        ours = self.place(subscribers=[lambda _: both.wait(PATIENCE)])
        folder = Path(self.folder())
        lines = f"\ufeff# who\nann=127.0.0.1:{free_port()}\n\nbob={ours}\ncarl={ours}\n"
        (folder / "class.txt").write_text(lines, encoding="utf-8")
        words = [f"@{folder}/class.txt", "--level", "1", "--feedback", str(folder)]
        self.judge(NOT_RUNNING, "(?m)^carl: level 1 of 6; 1 of 1 dialogues passed$", *words)
        self.assertIn("  passed  the classic", (folder / "bob.txt").read_text(encoding="utf-8"))
        grades = (folder / "grades.csv").read_text(encoding="utf-8")
        self.assertRegex(grades, "^name,.*\nann,,0,1,.*\nbob,1,1,1,\ncarl,1,1,1,\n$")
        shown = "(?s)(passed  the classic.*: level 1 .*){2}"
        self.judge(ALL_PASSED, shown, f"bob={ours}", f"carl={ours}", "--level", "1")

    def test_wrong_usage(self) -> None:
        usage = ["", "x", "127.0.0.1:0", "x:y", "a/b:1", "a/b=x:1", "x:1 nofile", "x:1 x:1"]
        for words in [*usage, "x:1 --patience x"]:
            with self.subTest(words):
                self.judge(WRONG_USAGE, "error: .*\n$", *words.split())
        self.judge(WRONG_USAGE, "no dialogue", "x:1", text="no dialogue")
        self.judge(WRONG_USAGE, "missing .* of C:NOOP", "x:1", text="S: 220\nC:NOOP")
        file = Path(self.folder(), "class.txt")
        file.write_text("ann=127.0.0.1:2600\n", encoding="utf-16")
        self.judge(WRONG_USAGE, "error: .*\n$", f"@{file}")
        self.judge(WRONG_USAGE, "class.txt is not .*: save it as UTF-8\n$", "x:1", str(file))


class TrapsTest(unittest.TestCase):
    """Each Trap: of mailserver.py has a test that fails if somebody falls into it."""

    def test_each_trap_has_an_entry(self) -> None:
        comments = [" ".join(text.split()) for text in re.findall(r"Trap: (.*\n?.*)", SOURCE)]
        for comment, trap in zip(comments, read_traps(), strict=True):
            self.assertTrue(comment.startswith(trap.says), f"{comment!r} is not {trap.says!r}")
            self.assertEqual(SOURCE.count(trap.right), 1, trap.says)

    def test_each_guard_sees_it(self) -> None:
        for trap, result in zip(read_traps(), try_guards(sprung=True), strict=True):
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
    unittest.main()
