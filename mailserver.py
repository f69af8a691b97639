#!/usr/bin/env python3
"""A mail server to read, and to telnet into. One file, standard library only.

Run "python mailserver.py", type "telnet 127.0.0.1 2525" in a second terminal, and talk:

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

C is the client, you; S is the server, this file. They speak SMTP (RFC 5321): to a line that starts
with a verb, the server answers with a code and a text. 2xx is yes, 3xx "go on", 4xx "not now", 5xx
"no". The file is a course: each part only adds to those before it, so stop after any. "Trap:" marks
a line that looks as if it could be left out, or written in an easier way.

    1  A small server       lines in, replies out, five commands, a thread for each client
    2  The whole protocol   the other commands, addresses, extensions
    3  Trust                encryption and passwords
    4  Keeping mail         mail on disk; publish and subscribe
    5  Collecting mail      another protocol, POP3, on the same foundation
    6  Start and stop       the server that runs, what its console shows, the command line

Python's socketserver supplies the classes in brackets. It listens, and starts a thread for each
client, in process_request(). In that thread it makes a handler and calls the handler's setup(),
handle() and finish(). All else is in this file. Each class stands below the one that it extends:

    LineHandler (StreamRequestHandler)   one session: lines in, replies out
     |- SMTPHandler                      the five commands
     |   `- ESMTPHandler                 all else that mail clients ask for
     |       `- SecureHandler            STARTTLS and AUTH; from the mixin Security
     `- POP3Handler                      collecting mail; from the mixin Security
    SmallServer (ThreadingTCPServer)     accepts clients, gives each a thread, ends them
     `- MailServer                       the settings of the later parts

The road of one command, from the bytes of "RCPT TO:<bob@example.com>" to those of "250 OK":

    handle       goes from line to line, until one side hangs up
    read_line    cuts the next line off the bytes that have come
    receive      waits for bytes
    dispatch     finds the method of the verb
    refusal      looks whether the command comes too early or too late
    do_RCPT      is the command
    read_path    takes the address out of <bob@example.com>
    reply        adds the answer to the bytes that wait to be sent
    flush        sends them, when receive() is about to wait again"""

from __future__ import annotations

import argparse
import base64
import email.policy
import errno
import hmac
import io
import itertools
import mailbox
import os
import queue
import re
import selectors
import signal
import socket
import socketserver
import ssl
import sys
import threading
import time
import types
import urllib.parse
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from email.message import EmailMessage
from functools import cached_property
from typing import Any, NoReturn, get_type_hints

if sys.version_info < (3, 10):  # noqa: UP036
    print("mailserver needs Python 3.10 or newer", file=sys.stderr)
    sys.exit(2)

__version__ = "2.0"
ANY_CASE = re.IGNORECASE | re.ASCII  # for commands, which are in ASCII: "a" matches "A"

# ==================================================================================================
# PART 1: A SMALL SERVER
# This part runs alone: cut the file at the banner of part 2, and call serve().


class Refused(Exception):
    """Raised to refuse a command: Refused(503, "Send HELO first"). 421 also ends the session."""


class Gone(Exception):
    """Raised when the client has hung up, or does not read what it is sent."""


def refuse_if(reason: object, code: int, text: str) -> None:
    """Raise Refused(code, text) if there is a reason to: refuse_if(too_long, 500, "Too long")."""
    if reason:
        raise Refused(code, text)


class Console:
    """What shows the dialogues and the mail. This one prints; a subclass may do something else."""

    def show(self, *lines: str) -> None:
        """Show the lines. Neither fail nor take long: a session waits meanwhile."""
        print("\n".join(lines) + "\n", end="", flush=True)


@dataclass(eq=False, repr=False)
class SmallServer(socketserver.ThreadingTCPServer):
    """Listens at an address, and runs a handler for each client, in a thread of its own. The fields
    are its settings; TypeError, ValueError or OSError says that one makes no sense. At first
    reading, look at these and go on with LineHandler."""

    address: tuple[str, int]  # host and port; port 0 takes one that is free
    handler: type[LineHandler]
    serial: bool = False  # serve one client at a time
    max_size: int = 10 * 2**20  # octets in a message
    max_clients: int = 1010  # at the same time
    timeout: float | int = 300  # seconds to wait for a client (RFC 5321 4.5.3.2.7)
    grace: float | int = 2  # seconds that stop() waits for the sessions
    fail: dict[str, int] = field(default_factory=dict)  # commands to refuse: {"RCPT": 450}
    console: Console | None = None  # None: nobody watches

    daemon_threads = True  # the program may end while clients are connected
    allow_reuse_address = os.name != "nt"  # no wait at restart; Windows would share the port
    request_queue_size = 1024  # clients that wait to be accepted; one more tries for seconds
    numbers = itertools.count(1)  # for the sessions

    def check_settings(self) -> None:
        """Raise TypeError, ValueError or OSError for a value that makes no sense."""
        for name, declared in get_type_hints(type(self)).items():
            # isinstance() takes float | int as it is, and dict[str, int] only as dict
            plain: Any = (
                declared.__origin__ if isinstance(declared, types.GenericAlias) else declared
            )
            if not isinstance(getattr(self, name), plain):
                raise TypeError(f"{name}={getattr(self, name)!r} is not of type {declared}")
        if not 0 <= self.address[1] <= 65535:
            raise OSError(errno.EADDRNOTAVAIL, "A port is a number in 0-65535")
        for name in ("max_size", "max_clients", "timeout"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} {getattr(self, name)} is not above 0")
        for verb, code in self.fail.items():
            if not hasattr(self.handler, "do_" + verb) or code not in range(400, 600):
                raise ValueError(f"fail {verb}={code} is not a command and a code from 400 to 599")

    def __post_init__(self) -> None:
        """Check the settings, then listen."""
        self.check_settings()
        self.sessions: set[LineHandler] = set()
        self.stopping = ""  # why all sessions are to end, once stop() was called
        self.loop: threading.Thread | None = None  # runs serve_forever(), after start()
        self.address_family = socket.AF_INET6 if ":" in self.address[0] else socket.AF_INET
        super().__init__(self.address, self.handler)
        self.host, self.port = str(self.server_address[0]), int(self.server_address[1])

    def start(self) -> None:
        """Call serve_forever() in a thread of its own; return at once."""
        self.loop = threading.Thread(target=self.serve_forever, daemon=True)
        self.loop.start()

    def serve_forever(self, poll_interval: float = 0) -> None:
        """Serve clients until stop() is called. We need no poll_interval."""
        while not self.stopping:
            try:
                self.process_request(*self.get_request())
            except (OSError, RuntimeError):  # no file descriptor or thread is left: wait for one
                time.sleep(0.1)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a client that has connected: in a thread, or right here if serial."""
        if self.stopping:
            self.shutdown_request(request)
        elif self.serial:
            self.process_request_thread(request, client_address)  # the next client has to wait
        else:
            super().process_request(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say in one line what failed outside of handle(), without socketserver's traceback."""
        warn(f"session failed: {sys.exc_info()[1]!r}")

    # A session ends when a command replies 221 or 421, after 20 errors (reply), when the client is
    # gone or silent (receive) or reads nothing (flush), after a failure of ours (handle), and by a
    # farewell, which setup() sets for one client too many, and stop() for all. The session sends
    # its farewell itself, with 421: only a session's own thread writes to its client.

    def stop(self, *exception: object) -> None:
        """Send 421 to all clients and free the port. A session's own thread may call this, too."""
        self.stopping = "The server is stopping: try again later"
        self.wait_for_sessions(0.02)  # a client may be about to say QUIT
        for session in list(self.sessions):
            session.hang_up(self.stopping)
        for session in self.wait_for_sessions(self.grace):
            session.cut()
        with suppress(OSError):  # be a client, to wake serve_forever()
            socket.create_connection((self.host, self.port), timeout=1).close()
        if self.loop and self.loop != threading.current_thread():
            self.loop.join(self.grace)
        self.server_close()

    __exit__ = stop  # at the end of a with block

    def wait_for_sessions(self, seconds: float) -> set[LineHandler]:
        """Wait so long at most for all sessions but the caller's to end. Return those left."""
        own = {each for each in list(self.sessions) if each.thread == threading.current_thread()}
        deadline = time.monotonic() + seconds
        while (others := self.sessions - own) and time.monotonic() < deadline:
            time.sleep(0.002)
        return others


# A rule: verbs, a function that tells whether a session must refuse them now, and its reply if so.
Rules = tuple[tuple[set[str], Callable[[Any], object], int, str], ...]


class LineHandler(socketserver.StreamRequestHandler):
    """One session of any protocol in which the client sends a line and the server answers it. A
    command is a method: do_TIME(self, arg) is the command TIME. Its docstring is the syntax, " - "
    and what it does; it calls reply() or raises Refused. A later class may replace a "Hook:". At
    first reading, skip what is behind do_QUIT(): how bytes become lines."""

    server: SmallServer
    line_limit = 512  # octets, line end included (RFC 5321 4.5.3.1.4)
    disable_nagle_algorithm = True  # send a reply at once: no more will come to fill the packet
    rbufsize = 0  # no buffer in socketserver, since self.received is one
    unknown_verb = 500  # the code for it
    newline = b"\r\n"  # how the client's last line ended
    user = ""  # who has logged in, in part 3
    encrypted = False  # whether TLS is on, in part 3
    code = 0  # of the last reply
    errors = 0  # how many replies had a code from 500 up
    pasted = 0.0  # when a line with "C:" in front came last, in seconds
    rules: Rules = ()  # for refusal()

    def setup(self) -> None:
        """Prepare the session, and find out whether the client can stay."""
        super().setup()
        self.connection.settimeout(min(self.server.timeout, 10**6))
        self.received = bytearray()  # from the client, and not used yet
        self.unsent = bytearray()  # for the client: flush() sends it
        self.thread = threading.current_thread()
        self.number = next(self.server.numbers)
        self.mark = f"[{self.number}]"  # in front of all that the console shows of the session
        self.server.sessions.add(self)  # before looking at stopping: stop() must not miss us
        too_many = len(self.server.sessions) > self.server.max_clients
        self.farewell = "Too many clients: try again later" if too_many else self.server.stopping
        self.log("-: ", f"connected from {self.client_address[0]}")

    def handle(self) -> None:
        """Greet the client, then answer line after line until one side hangs up."""
        try:
            self.reply(421 if self.farewell else 220, self.farewell or "Simple Mail Server")
            while self.code not in (221, 421):  # the replies that announce the end
                try:
                    self.dispatch(self.read_line())
                except Refused as refusal:
                    self.reply(*refusal.args)
            self.flush()
        except Gone as gone:
            where = "in the middle of a message: dropped" if self.code == 354 else "without QUIT"
            self.log("-: ", f"gone {where} {gone}".rstrip())
        except (Exception, SystemExit) as error:  # nobody knows where we are, so hang up
            warn(f"session {self.number} failed: {error!r}")
            with suppress(Gone):
                self.reply(421, "The server failed at this: try again later")
                self.flush()

    def finish(self) -> None:
        """Forget the session."""
        super().finish()
        self.server.sessions.discard(self)

    def dispatch(self, line: str) -> None:
        """Run a command: "time UTC" calls do_TIME("UTC"). Raise Refused, or RuntimeError."""
        verb, _, arg = line.partition(" ")
        verb = verb.upper() if verb.isascii() else ""
        web = verb in ("GET", "POST", "CONNECT")  # a web page can have your browser connect to us
        refuse_if(web, 421, "This is a mail server: take your browser elsewhere")
        if line.strip()[:2] in ("C:", "S:"):  # a pasted dialogue gets one answer in all
            recent = time.monotonic() - self.pasted < 1
            self.pasted = time.monotonic()
            refuse_if(not recent, 500, 'Leave out the "C: ", send what follows')
            return
        command = getattr(self, "do_" + verb, None)
        if not command:
            raise Refused(self.unknown_verb, "Unknown verb: try " + " ".join(self.verbs()))
        if refusal := self.refusal(verb):
            raise refusal
        self.code = 0
        command(arg.strip())
        if self.code // 100 in (0, 3):  # 354 is only the first half of an answer
            raise RuntimeError(f"do_{verb} sent no reply")

    def refusal(self, verb: str) -> Refused | None:
        """Return why a command does not fit the state of the session, or None if it does."""
        if verb in self.server.fail:
            return Refused(self.server.fail[verb], "Refused on purpose, as --fail says")
        for verbs, must_refuse, code, text in self.rules:
            if verb in verbs and must_refuse(self):
                return Refused(code, text)
        return None

    def verbs(self) -> list[str]:
        """Return the verbs of the commands that fit the state of the session."""
        verbs = [name[3:] for name in dir(self) if name.startswith("do_")]
        return [verb for verb in verbs if not self.refusal(verb)]

    def match(self, verb: str, pattern: str, arg: str) -> re.Match[str]:
        """Match a whole argument with a pattern, ignoring case. Raise Refused(501): the syntax."""
        if match := re.fullmatch(pattern, arg, ANY_CASE):
            return match
        raise Refused(501, "Syntax: " + self.explain(verb).partition(" - ")[0])

    def explain(self, verb: str) -> str:
        """Return the docstring of a command, or its verb: python -OO leaves docstrings out."""
        return getattr(self, "do_" + verb).__doc__ or verb

    def reply(self, code: int, *lines: str) -> None:
        """Answer with a code and one line or more. Hang up after 20 errors."""
        for line in self.format_reply(code, *lines):
            # Trap: a line end inside the line would start a second reply
            data = line.replace("\r", " ").replace("\n", " ").encode("utf-8", "backslashreplace")
            self.unsent += data + b"\r\n"
            self.log("S: ", line)
        if len(self.unsent) > 64 * 1024:
            self.flush()
        self.code = code
        if code >= 500:
            self.errors += 1
            if self.errors >= 20:
                self.reply(421, "Too many errors: read up on them, then come back")

    def format_reply(self, code: int, *lines: str) -> list[str]:
        """Hook: return the lines of a reply. "-" says that another follows (RFC 5321 4.2.1)."""
        return [f"{code}-{line}" for line in lines[:-1]] + [f"{code} {lines[-1]}"]

    def log(self, who: str, *lines: str) -> None:
        """Show lines on the console, with who in front: "C: ", "S: ", or "-: " for a remark."""
        if self.server.console:
            if who == "C: ":
                bare = "<LF>" if self.newline == b"\n" else ""
                lines = (self.conceal(lines[0][:500]) + bare,)
            self.server.console.show(*(f"{self.mark} {who}{printable(line)}" for line in lines))

    def conceal(self, line: str) -> str:
        """Hook: return a client's line as the console may show it, without a password."""
        return line

    def do_NOOP(self, arg: str) -> None:
        """NOOP [anything] - does nothing, and says so (RFC 5321 4.1.1.9)"""
        self.reply(250, "OK")

    def do_QUIT(self, arg: str) -> None:
        """QUIT - ends the session (RFC 5321 4.1.1.10)"""
        self.match("QUIT", "", arg)
        self.reply(221, "Bye")

    def read_line(self) -> str:
        """Return the next line, without its end: CRLF (RFC 5321 2.3.8), a bare LF, as nc sends, or
        CR NUL, as telnet may (RFC 854). Raise Refused(500) if the line is too long."""
        refuse_if(self.farewell, 421, self.farewell)
        while not (end := re.search(rb"\n|\r\0", self.received)):
            del self.received[self.line_limit + 1 :]  # just enough to know that it is too long
            self.receive()
        line = self.received[: end.end()]
        del self.received[: end.end()]  # Trap: before refusing, or this line comes again
        self.newline = b"\r\n" if line.endswith((b"\r\n", b"\r\0")) else b"\n"
        text = line.decode("utf-8", "surrogateescape").rstrip(" \t\r\n\0")
        if not text.isprintable():  # typed by hand: obey backspace and DEL, drop telnet's codes
            typed = re.sub("\udcff(?:[\udcfb-\udcfe].|\udcfa.{,40}?\udcff\udcf0|.)", "", text)
            text = ""
            for char in typed:
                text = text[:-1] if char in "\b\x7f" else text + char
        self.log("C: ", text)
        too_long = len(line) > self.line_limit
        refuse_if(too_long, 500, f"Line too long: {self.line_limit} octets at most")
        return text

    def receive(self) -> None:
        """Send the replies, then wait for bytes. Raise Gone, or Refused(421) to end the session."""
        self.flush()  # not sooner: ten commands in one packet get ten replies in one packet
        try:
            data = self.connection.recv(64 * 1024)
        except TimeoutError:
            raise Refused(421, "Nothing heard for too long") from None
        except OSError:
            data = b""  # a connection that breaks is as good as one that ends
        refuse_if(self.farewell, 421, self.farewell)
        if not data:
            raise Gone
        self.received += data
        # At Ctrl-C, telnet asks DO TIMING-MARK, and shows no reply until the answer has come, here
        # WONT TIMING-MARK (RFC 860). Inside a message, these bytes are content.
        asked = -1 if self.code == 354 else self.received.find(b"\xff\xfd\x06")
        if asked >= 0 and b"\n" not in self.received[:asked]:
            del self.received[asked : asked + 3]
            self.unsent += b"\xff\xfc\x06"
        tls = self.received.startswith(b"\x16\x03")  # how a TLS handshake starts (RFC 8446 5.1)
        refuse_if(tls, 421, "Not TLS from the first byte: connect plainly, then start TLS")

    def flush(self) -> None:
        """Send the replies. Raise Gone if the connection breaks, or the client reads nothing."""
        try:
            while self.unsent:
                del self.unsent[: self.connection.send(self.unsent[: 64 * 1024])]
        except TimeoutError:
            raise Gone("(cut off: it read nothing for too long)") from None
        except OSError:
            raise Gone(self.farewell) from None

    def hang_up(self, farewell: str) -> None:
        """End the session, from another thread: wake receive(), which will raise Refused(421)."""
        self.farewell = farewell
        self.cut(socket.SHUT_RD)

    def cut(self, how: int = socket.SHUT_RDWR) -> None:
        """Break the connection, from another thread; with SHUT_RD, only what the client sends."""
        with suppress(OSError):  # the client has left already
            # Trap: an SSLSocket's own shutdown() ends TLS, and the 421 could not be sent
            socket.socket.shutdown(self.connection, how)


def printable(text: str) -> str:
    """Return 500 characters of text, escaping what could clear a terminal, or type into it."""
    text = text[:500]
    if not text.isprintable():  # "\udcff" stands for the byte \xff, which is no UTF-8
        shown = (char if char.isprintable() else ascii(char)[1:-1] for char in text)
        text = "".join(char.replace(r"\udc", r"\x") for char in shown)
    return text[:500]


def warn(text: str) -> None:
    """Tell the person who runs the server, on stderr."""
    with suppress(AttributeError, OSError, ValueError):  # it is closed, or full
        sys.stderr.write(f"mailserver: {printable(text)}\n")


@dataclass
class Envelope:
    """A message, and who it is from and for. The From: and To: in the message are only shown."""

    sender: str  # the reverse-path, which a bounce would go to; "" if nowhere (RFC 5321 4.5.5)
    recipients: list[str] = field(default_factory=list)
    content: bytearray = field(default_factory=bytearray, repr=False)  # the message, as it came
    session: int = 0  # its number
    helo: str = ""  # what the client calls itself
    peer: str = ""  # its IP address
    user: str = ""  # who has logged in
    trace: str = ""  # what the Received: header says (RFC 5321 4.4)

    @cached_property
    def message(self) -> EmailMessage:
        """Return the content, parsed."""
        return email.message_from_bytes(self.content, policy=email.policy.default)


class SMTPHandler(LineHandler):
    """The five commands that bring a message, as in the dialogue at the top of this file."""

    helo, protocol = "", "SMTP"
    envelope: Envelope | None = None  # from MAIL to DATA
    paths = {"MAIL": "FROM: *<([!-;=?-~]*)>", "RCPT": "TO: *<([!-;=?-~]+)>"}

    # CRLF.CRLF ends a message. LF.LF ends one whose DATA ended in LF, which a person at nc sends.
    # Trap: if LF.LF ended all, mail could be smuggled in through a relay (CVE-2023-51764).
    end_of_message = {b"\r\n": re.compile(rb"\r\n\.\r\n"), b"\n": re.compile(rb"\r\n\.\r\n|\n\.\n")}
    # A line that does not end the message, but was typed as if: a command, or a dot and a blank.
    stray = rb"(?i)\n(HELP|QUIT|RSET|NOOP|DATA|(?:HELO|EHLO|MAIL|RCPT) [^\r]*|\. +)\r?\n\Z"

    rules: Rules = (  # RFC 5321 4.1.4
        ({"MAIL"}, lambda s: not s.helo, 503, "Send HELO before MAIL FROM"),
        ({"MAIL"}, lambda s: s.envelope, 503, "Send RCPT TO and DATA, or RSET, first"),
        ({"RCPT"}, lambda s: not s.envelope, 503, "Send MAIL FROM before RCPT TO"),
        ({"DATA"}, lambda s: not s.envelope, 503, "Send MAIL FROM before DATA"),
        ({"DATA"}, lambda s: not s.envelope.recipients, 503, "Send RCPT TO before DATA"),
    )

    def do_HELO(self, arg: str) -> None:
        """HELO your-domain.example - says who you are (RFC 5321 4.1.1.1)"""
        self.introduce("HELO", arg)
        self.reply(250, "Hello")

    def introduce(self, verb: str, arg: str) -> None:
        """Note who the client is. Drop a message that is under way."""
        self.helo = self.match(verb, "[!-~]{1,255}", arg)[0]
        self.mark = f"[{self.number} {re.sub('[^A-Za-z0-9_-].*', '', self.helo)[:12] or '?'}]"
        self.protocol = "SMTP" if verb == "HELO" else "ESMTP"
        self.envelope = None

    def do_MAIL(self, arg: str) -> None:
        """MAIL FROM:<sender@example.com> - opens an envelope (RFC 5321 4.1.1.2)"""
        sender, peer = self.read_path("MAIL", arg), self.client_address[0]
        self.envelope = Envelope(sender, [], bytearray(), self.number, self.helo, peer, self.user)
        self.reply(250, "OK")

    def do_RCPT(self, arg: str) -> None:
        """RCPT TO:<recipient@example.com> - adds a recipient (RFC 5321 4.1.1.3)"""
        assert self.envelope  # refusal() has looked
        too_many = len(self.envelope.recipients) >= 1000  # RFC 5321 4.5.3.1.8: at least 100
        refuse_if(too_many, 452, "Too many recipients: send DATA, then MAIL FROM again")
        self.envelope.recipients.append(self.read_path("RCPT", arg))
        self.reply(250, "OK")

    def read_path(self, verb: str, arg: str) -> str:
        """Hook: return the address in FROM:<address> or TO:<address>."""
        return self.match(verb, self.paths[verb], arg)[1]

    def do_DATA(self, arg: str) -> None:
        """DATA - sends the message, up to a line that is a dot (RFC 5321 4.1.1.4)"""
        self.match("DATA", "", arg)
        assert self.envelope  # refusal() has looked
        self.reply(354, "End data with <CR><LF>.<CR><LF>")
        envelope = self.envelope
        self.envelope = None  # accepted or not, it is used up
        envelope.content = self.read_message()
        self.deliver(envelope)
        self.reply(250, "Message accepted")

    def deliver(self, envelope: Envelope) -> None:
        """Hook: take a message, before the 250. Raise Refused if that can't be."""
        text = envelope.content.decode("utf-8", "backslashreplace")
        self.log("", f"from {envelope.sender} to {envelope.recipients}", *text.splitlines())

    def read_message(self) -> bytearray:
        """Return the message up to the dot, with dot-stuffing undone: "..x" is ".x" (RFC 5321
        4.5.2). Raise Refused(552) if it is too big, after reading all of it."""
        newline, limit, searched = self.newline, self.server.max_size, 0
        self.received[:0] = newline  # DATA's line end: a dot right behind it ends the message
        while not (end := self.end_of_message[newline].search(self.received, searched)):
            if self.server.console and self.received.endswith((b"\n", b"\r\0")):
                self.remark_on(self.received[self.received.rfind(b"\n", 0, -1) :][:400])
            del self.received[2 * limit : -4]  # too big; but keep where the end may start
            searched = max(0, len(self.received) - 4)  # the end may come in pieces
            self.receive()
        content = self.received
        self.received = content[end.end() :]
        del content[content.rindex(b".", 0, end.end()) :]
        if newline + b"." in content:  # Trap: not b"\n.": in a CRLF message, LF starts no line
            content = content.replace(newline + b".", newline)
        del content[: len(newline)]
        self.log("C: ", ".")
        refuse_if(len(content) > limit, 552, f"Message too big: send {limit} octets at most")
        return content

    def remark_on(self, last_line: bytearray) -> None:
        """Say on the console that a line was meant to end the message, or a CR to end a line."""
        if stray := re.match(self.stray, last_line):
            line = stray[1].decode("utf-8", "surrogateescape")
            self.log("-: ", f'"{line}" went into the message, which a line with only a dot ends')
        if re.search(rb"\r[^\n]", last_line):
            self.log("-: ", "a CR without LF went into the message, and ends no line")


def serve(port: int = 2525, serial: bool = False) -> None:
    """Run the small server until Ctrl-C."""
    with SmallServer(("127.0.0.1", port), SMTPHandler, serial, console=Console()) as server:
        print("Listening on port", server.port, flush=True)
        server.start()
        with suppress(KeyboardInterrupt):
            while True:
                time.sleep(1)


# ==================================================================================================
# PART 2: THE WHOLE PROTOCOL
# The other commands, addresses, extensions. From here on, handlers need a MailServer (part 6).


class ESMTPHandler(SMTPHandler):
    """SMTP with all that mail clients ask for. They say EHLO, not HELO, to see what there is."""

    server: MailServer
    hostname = re.sub("[^A-Za-z0-9.-]", "-", socket.gethostname())
    extensions = ["EXPN", "HELP"]  # commands that EHLO names, if they fit
    utf8 = False  # MAIL came with SMTPUTF8: addresses may have letters beyond ASCII

    # Addresses: RFC 5321 4.1.2; beyond ASCII, RFC 6531 3.3. The route in <@relay:bob@x> is skipped.
    _letter = r"[^\0-/:-@\[-`{-\xa0]"  # also beyond ASCII, or a digit
    _atom = r'[^\0- "(),.:;<>@\[\\\]\x7f-\xa0]+'  # bob
    _local = rf'(?:{_atom}(?:\.{_atom})*|"(?:[^\0-\x1f"\\\x7f-\xa0]|\\[ -~])*")'  # ann.lee
    _label = rf"{_letter}+(?:-+{_letter}+)*"  # my-host
    _literal = r"\[(?:\d+(?:\.\d+){3}|(?i:IPv6):[0-9A-Fa-f:.]+)\]"  # [192.0.2.1]
    _domain = rf"(?:{_label}(?:\.{_label})*|{_literal})"
    address = rf"(?!.*[\udc80-\udcff]){_local}@{_domain}"  # no bytes that are not UTF-8
    _path = rf"<(?:(?:@{_domain}(?:,@{_domain})*:)?({address}|{_atom}))?>((?: +[!-~]+)*)"
    paths = {"MAIL": f"(?i:FROM): *{_path}", "RCPT": f"(?i:TO): *{_path}"}
    faults = {  # in FROM:<address> or TO:<address>, and how an argument without the fault starts
        "No colon": "[A-Z]+:",
        "No address": r"[A-Z]+: *\S",
        "No < and > around the address": "[A-Z]+: *<.*>",
        "A domain has no _": r"(?!.*@[^ @]*_)",
        "A dot at an end, or two in a row": r"(?!.*(\.\.|<\.|\.@|@\.|\.>))",
    }
    parameters = {  # what may stand behind the address: the pattern of its value, and what to send
        "MAIL SIZE": ("[0-9]{1,20}", "SIZE=1000 for 1000 octets"),  # RFC 1870
        "MAIL BODY": ("7BIT|8BITMIME", "BODY=7BIT or BODY=8BITMIME"),  # RFC 6152
        "MAIL SMTPUTF8": ("", "SMTPUTF8 without a value"),  # RFC 6531
        "MAIL AUTH": (".+", "AUTH=<>"),  # the author, for relays (RFC 4954 5)
    }

    def read_path(self, verb: str, arg: str) -> str:
        """Return the address of MAIL or RCPT. Raise Refused; 501 names the first fault."""
        fits = re.fullmatch(self.paths[verb], arg, re.ASCII)
        if not fits:
            keyword = "FROM" if verb == "MAIL" else "TO"
            starts = {f"No {keyword}": keyword, **self.faults}
            faults = (fault for fault in starts if not re.match(starts[fault], arg, ANY_CASE))
            syntax = self.explain(verb).partition(" - ")[0]
            raise Refused(501, f"{next(faults, 'Not an address')}: send {syntax}")
        self.read_parameters(verb, fits[2].upper().split())
        address = fits[1] or ""
        local, at, _ = address.rpartition("@")
        refuse_if(verb == "RCPT" and not address, 501, "No address: send RCPT TO:<bob@example.com>")
        bare = ("postmaster", *self.server.lists) if verb == "RCPT" else ("",)  # need no domain
        refuse_if(not at and address.lower() not in bare, 501, "No domain: send <bob@example.com>")
        long = len(address.encode()) > 254 or len(local.encode()) > 64
        refuse_if(long, 501, "Too long: send 64 octets before the @ at most, 254 in all")
        foreign = not address.isascii() and not self.utf8
        refuse_if(foreign, 553, "Not ASCII: send SMTPUTF8 behind the address in MAIL FROM")
        if verb == "RCPT" and self.server.maildir:
            self.server.maildir.folder(address)  # refuses what is too long for a directory
        return address

    def read_parameters(self, verb: str, words: list[str]) -> None:
        """Read what stands behind an address. Raise Refused(501, 552 or 555) if that can't be."""
        values: dict[str, str] = {}
        for keyword, _, value in (word.partition("=") for word in words):
            refuse_if(self.protocol == "SMTP", 555, "No parameters after HELO: send EHLO first")
            pattern, example = self.parameters.get(f"{verb} {keyword}", ("", ""))
            refuse_if(not example, 555, f"Unknown parameter: send {verb} without it")
            refuse_if(not re.fullmatch(pattern, value), 501, f"Send {example}")
            refuse_if(keyword in values, 501, "The same parameter twice: send it once")
            values[keyword] = value
        too_big = int(values.get("SIZE", 0)) > self.server.max_size
        refuse_if(too_big, 552, f"Message too big: send {self.server.max_size} octets at most")
        self.utf8 = "SMTPUTF8" in values or (self.utf8 and verb == "RCPT")

    def deliver(self, envelope: Envelope) -> None:
        """Store a message, publish it (part 4), show it. Raise Refused(4xx) if it can't be kept."""
        members: list[str] = []  # of lists; a real list also sets its own reverse-path
        for address in envelope.recipients:
            name = address.rpartition("@")[0] or address
            members += self.server.lists.get(name.lower(), [address])
        envelope.recipients = list(dict.fromkeys(members))  # each address once, in this order
        secured = ("S" if self.encrypted else "") + ("A" if self.user else "")  # RFC 3848
        how = "SMTP" if self.protocol == "SMTP" else "ESMTP" + secured
        peer = f"IPv6:{envelope.peer}" if ":" in envelope.peer else envelope.peer
        envelope.trace = f"from {self.helo} ([{peer}])\n\tby {self.hostname} with {how}"
        if self.server.maildir:
            self.server.maildir.store(envelope)
        self.server.mailroom.publish(envelope)
        if self.server.console:
            self.log("", *describe(envelope))  # part 6

    def do_EHLO(self, arg: str) -> None:
        """EHLO your-domain.example - says who you are, and asks what there is"""
        self.introduce("EHLO", arg)
        verbs, size = self.verbs(), f"SIZE {self.server.max_size}"
        more = [name for name in self.extensions if name.split()[0] in verbs]
        self.reply(250, "Hello", size, "8BITMIME", "PIPELINING", "SMTPUTF8", *more)

    def do_RSET(self, arg: str) -> None:
        """RSET - drops the message that is under way (RFC 5321 4.1.1.5)"""
        self.match("RSET", "", arg)
        self.envelope = None
        self.reply(250, "OK")

    def do_HELP(self, arg: str) -> None:
        """HELP [command] - lists what can be sent now, or explains a command"""
        if not arg:
            return self.reply(214, " ".join(self.verbs()), "For more: HELP and one of them")
        refuse_if(not hasattr(self, "do_" + arg.upper()), 504, "No such command: HELP lists them")
        self.reply(214, self.explain(arg.upper()))

    def do_VRFY(self, arg: str) -> None:
        """VRFY user - asks whether there is such a user (RFC 5321 3.5)"""
        name = self.match("VRFY", "<?([^<> ]+)>?(?: +SMTPUTF8)?", arg)[1].lower()
        known = [*self.server.lists, *self.server.users]
        if self.server.maildir and os.path.isdir(self.server.maildir.root):
            known += map(urllib.parse.unquote, os.listdir(self.server.maildir.root))
        for address in known:
            if name in (address.lower(), address.lower().rpartition("@")[0]):
                return self.reply(250, f"<{address}>")
        refuse_if(self.server.users, 550, "No such user")
        self.reply(252, "Cannot say: send a message and see")

    def do_EXPN(self, arg: str) -> None:
        """EXPN list - asks who is on a mailing list (RFC 5321 3.5)"""
        name = self.match("EXPN", "<?([^<>@ ]+)(?:@[^<> ]*)?>?(?: +SMTPUTF8)?", arg)[1].lower()
        members = self.server.lists.get(name, [])
        refuse_if(not members, 550, "No such list")
        self.reply(250, *(f"<{address}>" for address in members))


# ==================================================================================================
# PART 3: TRUST
# TLS keeps others from reading along; a password tells who is there. POP3 (part 5) needs both, too.


class Security(LineHandler):
    """A mixin, which is a class for others to inherit methods from: TLS and passwords."""

    server: MailServer
    wrong_passwords = 0
    expects_secret = False  # the next line that is no command may be a password
    rules: Rules = (
        ({"STARTTLS", "STLS"}, lambda s: not s.server.tls, 502, "No TLS: the server needs --tls"),
        ({"STARTTLS", "STLS"}, lambda s: s.encrypted, 503, "TLS is on already"),
    )

    def start_tls(self, verb: str, arg: str) -> None:
        """Go on in TLS. Raise Gone if the client can't."""
        self.match(verb, "", arg)
        self.reply(220, "Ready for TLS")
        self.flush()
        self.received.clear()  # Trap: it came in the clear, so who knows by whom (CVE-2011-0411)
        tcp, tls = self.connection, self.server.tls
        assert tls  # refusal() has looked
        try:  # in two steps, so that cut() can end the second one
            self.connection = tls.wrap_socket(tcp, server_side=True, do_handshake_on_connect=False)
            self.connection.do_handshake()
        except OSError as error:
            raise Gone(f"TLS failed: {error}") from None
        self.encrypted = True

    def finish(self) -> None:
        """Send close_notify: nothing was cut off (RFC 8446 6.1). Then end the session."""
        if isinstance(self.connection, ssl.SSLSocket):
            with suppress(OSError, ValueError), self.connection as tls:  # the client may be gone
                tls.settimeout(0)  # do not wait for the client's close_notify
                tls.unwrap()
        super().finish()

    def log_in(self, name: str, password: str) -> None:
        """Log a user in. Raise Refused(535), or Refused(421) the third time."""
        # Always compare, to take the same time. Trap: == takes the longer, the more is right
        expected = self.server.users.get(name, "no such user").encode()
        same = hmac.compare_digest(password.encode("utf-8", "surrogateescape"), expected)
        known = same and name in self.server.users
        if not known and (self.server.users or not name):  # without --users, any name will do
            self.wrong_passwords += 1
            refuse_if(self.wrong_passwords == 3, 421, "Three wrong passwords are enough")
            raise Refused(535, "Wrong name or password")
        self.user = name
        self.expects_secret = False

    def conceal(self, line: str) -> str:
        """Hide a password, even if junk (an arrow key, "C: ") stands before AUTH or PASS. After
        these or USER, hide each line that is no command, until there is a login."""
        word = r"\S*?(?:AUTH(?:\s+(?:PLAIN|LOGIN)\b|(?!\s+(?:PLAIN|LOGIN)\b))|PASS|LOGIN|PLAIN)"
        hidden = rf"(?i)\s*({word}|\S+\s+{word}(?=\s)|USER\s+\S+(?=\s)).+"
        verb = re.sub(r"^\s*([CS]:\s*)?", "", line).partition(" ")[0].upper()
        asks = verb.endswith(("AUTH", "PASS", "USER")) or re.search("(?i)(LOGIN|PLAIN)$", line)
        if asks or re.match(hidden, line):
            self.expects_secret = True
            return re.sub(hidden, r"\1 ********", line)
        answer = self.code == 334 or (self.expects_secret and not hasattr(self, "do_" + verb))
        return "********" if answer and line not in ("", "*", ".") else line


class SecureHandler(Security, ESMTPHandler):
    """SMTP with STARTTLS and AUTH: what this program speaks."""

    line_limit = 12288  # octets; for the answers that AUTH gets (RFC 4954 4)
    # Trap: clients that see STARTTLS insist on it, so do_EHLO() names only what it can do now
    extensions = [*ESMTPHandler.extensions, "STARTTLS", "AUTH PLAIN LOGIN"]
    rules: Rules = (
        *ESMTPHandler.rules,
        *Security.rules,
        ({"MAIL"}, lambda s: s.server.require_auth and not s.user, 530, "Send AUTH before MAIL"),
        ({"AUTH"}, lambda s: s.server.tls and not s.encrypted, 538, "Send STARTTLS before AUTH"),
        ({"AUTH"}, lambda s: s.protocol == "SMTP", 503, "Send EHLO before AUTH"),
        ({"AUTH"}, lambda s: s.envelope or s.user, 503, "Send AUTH once, and before MAIL FROM"),
    )

    def do_STARTTLS(self, arg: str) -> None:
        """STARTTLS - goes on encrypted; send EHLO again (RFC 3207)"""
        self.start_tls("STARTTLS", arg)
        self.helo = self.user = ""  # forget what was said in the clear (RFC 3207 4.2)
        self.protocol = "SMTP"
        self.envelope = None

    def do_AUTH(self, arg: str) -> None:
        """AUTH PLAIN|LOGIN [base64] - logs in, with name and password (RFC 4954)"""
        mechanism, initial = self.match("AUTH", "([!-~]+) *(.*)", arg).groups()
        if mechanism.upper() == "PLAIN":  # RFC 4616; the first part may name only oneself
            answer = re.fullmatch("(.*)\0(.+)\0(.+)", self.ask("", initial), re.DOTALL)
            if not answer or answer[1] not in ("", answer[2]):
                raise Refused(501, "Send base64 of NUL, name, NUL, password")
            name, password = answer[2], answer[3]
        elif mechanism.upper() == "LOGIN":  # never was a standard, but many clients know it
            name, password = self.ask("Username:", initial), self.ask("Password:")
        else:
            raise Refused(504, "Send AUTH PLAIN or AUTH LOGIN")
        self.log_in(name, password)
        self.reply(235, "Welcome")

    def ask(self, question: str, answer: str = "") -> str:
        """Ask, if the answer is not here yet; decode it. Raise Refused(501) if it is no base64."""
        if not answer:
            self.reply(334, base64.b64encode(question.encode()).decode())
            answer = self.read_line()
        refuse_if(answer == "*", 501, "AUTH cancelled")
        try:
            return base64.b64decode("" if answer == "=" else answer, validate=True).decode()
        except ValueError:
            raise Refused(501, "Not base64: send AUTH again") from None


# ==================================================================================================
# PART 4: KEEPING MAIL
# With a Maildir, "250 Message accepted" is a promise: no crash may lose the message. So it is
# stored on disk first. Then it is published: subscribers hear of it, but can't refuse it.


class Maildir:
    """A directory for each address, and in it a file for each message, as mail readers expect it:
    written in tmp/ and moved to new/, so no half of one is ever there. Readers move it to cur/."""

    numbers = itertools.count(1)

    def __init__(self, root: str | os.PathLike[str]) -> None:
        """Use a directory; make it if need be. Raise OSError if that can't be done."""
        self.root = os.path.abspath(root)
        self.durable: set[str] = set()  # folders that are known to survive a crash
        self.holders: dict[str, object] = {}  # by folder, the session that reads it, in part 5
        os.makedirs(self.root, exist_ok=True)

    def folder(self, address: str) -> str:
        """Return the directory of an address. Raise Refused(553) if its name would be too long.
        Trap: "../x" would be elsewhere, and "con.x" a device on Windows, so they are encoded."""
        name = urllib.parse.quote(address.lower(), safe="@+").replace("~", "%7E")
        if re.match(r"\.|(con|prn|aux|nul|com\d|lpt\d)(\.|$)", name):
            name = f"%{ord(name[0]):02X}{name[1:]}"
        refuse_if(len(name) > 255, 553, "Address too long to keep mail for")
        return os.path.join(self.root, name)

    def store(self, envelope: Envelope) -> None:
        """Keep a copy for each recipient. If one fails, keep none and raise Refused(451 or 452)."""
        now = f"{time.time():.6f}".replace(".", ".M")  # seconds, microseconds
        name = f"{now}P{os.getpid()}Q{next(self.numbers)}.{ESMTPHandler.hostname}"  # unique
        envelope.trace += f" id {name};\n\t{time.strftime('%a, %d %b %Y %H:%M:%S %z')}"
        copies = {self.folder(address): address for address in envelope.recipients}
        try:
            for folder, address in copies.items():
                self.write(folder, name, envelope, address)
            for folder in copies:
                os.rename(f"{folder}/tmp/{name}", f"{folder}/new/{name}")
                self.sync(f"{folder}/new")
        except Exception as error:  # Trap: whatever the error, the message is not kept
            for folder, place in itertools.product(copies, ("tmp", "new")):
                with suppress(OSError):
                    os.unlink(f"{folder}/{place}/{name}")
            self.durable.clear()  # somebody may have removed directories
            warn(f"message not kept: {error!r}")
            full = getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            raise Refused(452 if full else 451, "Not kept, disk trouble: try again later") from None

    def write(self, folder: str, name: str, envelope: Envelope, address: str) -> None:
        """Write the copy for an address (RFC 5321 4.4) to a file in tmp/, and on to the disk."""
        if folder not in self.durable or not os.path.isdir(f"{folder}/new"):
            self.durable.discard(folder)  # somebody may have removed it
            for place in ("tmp", "cur", "new"):
                os.makedirs(f"{folder}/{place}", exist_ok=True)
            for changed in (folder, self.root, os.path.dirname(self.root)):
                self.sync(changed)
            self.durable.add(folder)  # Trap: not sooner, or another session skips what is not done
        top = f"Return-Path: <{envelope.sender}>\nDelivered-To: {address}\n"
        top += f"Received: {envelope.trace}\n"
        if envelope.content.startswith((b" ", b"\t")):
            top += "\n"  # or the message would continue our last header
        with open(f"{folder}/tmp/{name}", "xb") as file:
            file.write(top.encode() + envelope.content.replace(b"\r\n", b"\n"))
            file.flush()
            os.fsync(file.fileno())  # Trap: until here it is in memory only, and a crash takes it

    def sync(self, folder: str) -> None:
        """Write a directory's entries to the disk."""
        if os.name != "nt" and os.access(folder, os.R_OK):  # Windows has no call for that
            entry = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(entry)
            finally:
                os.close(entry)


class Mailroom:
    """Publish and subscribe: a sender need not know who wants the message, nor how many do."""

    def __init__(self) -> None:
        self.subscribers: list[Callable[[Envelope], object]] = []

    def subscribe(self, subscriber: Callable[[Envelope], object]) -> None:
        """Have a function called with each accepted message, before its 250, by its session."""
        self.subscribers.append(subscriber)

    def publish(self, envelope: Envelope) -> None:
        """Call all subscribers. If one fails, neither the sender nor the others notice."""
        for subscriber in list(self.subscribers):  # a copy, since others may come and go meanwhile
            try:
                subscriber(envelope)
            except Exception as error:
                warn(f"a subscriber failed: {error!r}")


# ==================================================================================================
# PART 5: COLLECTING MAIL
# POP3 (RFC 1939) fetches mail. It has lines and verbs, too, so LineHandler is its base as well.


class POP3Handler(Security):
    """USER and PASS open a mailbox, and its messages get numbers. DELE only marks a message, and
    QUIT deletes it: a connection that breaks loses nothing (RFC 1939 6)."""

    unknown_verb = 450  # no error to count: mail readers try which verbs there are
    address = ""  # whose mailbox it is about
    folder = ""  # where that is, once it is open
    box: mailbox.Maildir | None = None  # reads it, once the directory exists
    stored: dict[int, tuple[str, int]] = {}  # by number, the name and the octets of a message
    messages: dict[int, tuple[str, int]] = {}  # the stored ones that DELE has not marked
    inside = {"STAT", "LIST", "UIDL", "RETR", "TOP", "DELE", "RSET", "SUBSCRIBE"}
    rules: Rules = (  # RFC 1939 3
        *Security.rules,
        ({"USER", "PASS", "STLS"}, lambda s: s.folder, 503, "The mailbox is open already"),
        ({"PASS"}, lambda s: not s.address, 503, "Send USER before PASS"),
        (inside, lambda s: not s.folder, 503, "Send USER and PASS first"),
    )

    def finish(self) -> None:
        """Release the mailbox, then end the session."""
        self.release()
        super().finish()

    def release(self) -> None:
        """Let others have the mailbox."""
        if self.server.maildir and self.server.maildir.holders.get(self.folder) is self:
            del self.server.maildir.holders[self.folder]

    def format_reply(self, code: int, *lines: str) -> list[str]:
        """Return the lines of a reply: +OK or -ERR for the code, then the rest as it is."""
        return [("+OK " if code < 400 else "-ERR ") + lines[0], *lines[1:]]

    def look(self) -> list[str]:
        """Give numbers to the messages that came since the last look. Return their names."""
        if self.box is None and os.path.isdir(f"{self.folder}/new"):
            self.box = mailbox.Maildir(self.folder)
        names: set[str] = set()
        if self.box is not None:
            names.update(self.box.keys())
            names.update(self.box.keys())  # a message that moved from new/ to cur/ was missed above
        new = []
        for name in sorted(names - {known for known, _ in self.stored.values()}):
            with suppress(Refused):
                number, octets = len(self.stored) + 1, len(self.load(name))
                self.stored[number] = self.messages[number] = (name, octets)
                new.append(name)
        return new

    def load(self, name: str) -> bytes:
        """Return a message, with CRLF in place of the file's LF. Raise Refused(450)."""
        assert self.box is not None  # look() has found the message in it
        try:
            return self.box.get_bytes(name).replace(b"\n", b"\r\n")
        except (KeyError, OSError):
            raise Refused(450, "Not there any more: send QUIT and connect again") from None

    def pick(self, verb: str, number: str) -> int:
        """Return the number of a message, from an argument. Raise Refused(501 or 550)."""
        n = int(self.match(verb, "[0-9]{1,9}", number)[0])
        refuse_if(n not in self.messages, 550, "No such message: LIST shows what there is")
        return n

    def send_message(self, data: bytes) -> None:
        """Send a message, the dots doubled that start a line, and behind it a line with a dot."""
        self.reply(250, f"{len(data)} octets")
        data = (b"\n" + data).replace(b"\n.", b"\n..")[1:]
        self.unsent += data + (b".\r\n" if data.endswith(b"\n") else b"\r\n.\r\n")
        self.flush()  # not later: a client may ask for a thousand in one packet
        self.log("-: ", f"{len(data)} octets sent")

    def list_values(self, verb: str, arg: str, values: dict[int, object]) -> None:
        """Answer LIST or UIDL: a line for each message, or just that for the one named."""
        if arg:
            number = self.pick(verb, arg)
            return self.reply(250, f"{number} {values[number]}")
        lines = [f"{number} {value}" for number, value in values.items()]
        self.reply(250, f"{len(lines)} messages", *lines, ".")

    def do_CAPA(self, arg: str) -> None:
        """CAPA - lists what the server can do (RFC 2449)"""
        stls = ["STLS"] if "STLS" in self.verbs() else []
        self.reply(250, "I can:", "USER", "TOP", "UIDL", "PIPELINING", "RESP-CODES", *stls, ".")

    def do_STLS(self, arg: str) -> None:
        """STLS - goes on encrypted (RFC 2595 4)"""
        self.start_tls("STLS", arg)
        self.address = ""

    def do_USER(self, arg: str) -> None:
        """USER address - says whose mailbox to open"""
        readable = self.server.tls and self.server.users and not self.encrypted
        refuse_if(readable, 538, "Send STLS before USER")
        self.address = self.match("USER", f"{ESMTPHandler.address}|postmaster", arg)[0]
        self.reply(250, "Send PASS")

    def do_PASS(self, arg: str) -> None:
        """PASS password - opens the mailbox"""
        self.log_in(self.address, arg)
        maildir = self.server.maildir
        if not maildir:
            raise Refused(550, "No mailboxes here: the server was started without --maildir")
        folder = maildir.folder(self.address)
        busy = maildir.holders.setdefault(folder, self) is not self
        refuse_if(busy, 450, "[IN-USE] Another session has the mailbox open: try again later")
        self.folder, self.stored, self.messages = folder, {}, {}
        self.look()  # Trap: only now that no other session deletes messages
        self.reply(250, f"{len(self.messages)} messages")

    def do_STAT(self, arg: str) -> None:
        """STAT - counts messages and octets"""
        sizes = [size for _, size in self.messages.values()]
        self.reply(250, f"{len(sizes)} {sum(sizes)}")

    def do_LIST(self, arg: str) -> None:
        """LIST [message] - tells how many octets a message has"""
        self.list_values("LIST", arg, {n: size for n, (_, size) in self.messages.items()})

    def do_UIDL(self, arg: str) -> None:
        """UIDL [message] - tells a message's name, which no other ever has"""
        self.list_values("UIDL", arg, {n: name[:70] for n, (name, _) in self.messages.items()})

    def do_RETR(self, arg: str) -> None:
        """RETR message - sends a message"""
        self.send_message(self.load(self.messages[self.pick("RETR", arg)][0]))

    def do_TOP(self, arg: str) -> None:
        """TOP message lines - sends a message's headers and its first lines"""
        number, count = self.match("TOP", "([0-9]+) +([0-9]{1,9})", arg).groups()
        data = self.load(self.messages[self.pick("TOP", number)][0])
        head, blank, body = data.partition(b"\r\n\r\n")
        lines = io.BytesIO(body)  # not a list of them, which takes many times the memory
        for _ in itertools.islice(lines, int(count)):
            pass
        self.send_message(head + blank + body[: lines.tell()])

    def do_DELE(self, arg: str) -> None:
        """DELE message - marks a message, which QUIT will delete"""
        del self.messages[self.pick("DELE", arg)]
        self.reply(250, "Deleted at QUIT")

    def do_RSET(self, arg: str) -> None:
        """RSET - takes every DELE back"""
        self.messages = dict(self.stored)
        self.reply(250, "No message will be deleted")

    def do_QUIT(self, arg: str) -> None:
        """QUIT - deletes the messages that DELE has marked, and ends the session"""
        self.match("QUIT", "", arg)
        kept = 0
        for number in self.stored.keys() - self.messages.keys():
            try:
                assert self.box is not None  # look() has found the message in it
                self.box.discard(self.stored[number][0])
            except OSError:
                kept += 1
        self.release()  # before the reply: the client may connect again at once
        refuse_if(kept, 421, f"Bye, but {kept} messages could not be deleted")
        super().do_QUIT(arg)

    def notice(self, envelope: Envelope) -> None:
        """Note that mail has come, in the thread of the sender, who must not wait for us."""
        if self.address.lower() in (address.lower() for address in envelope.recipients):
            self.news.set()

    def do_SUBSCRIBE(self, arg: str) -> None:
        """SUBSCRIBE - sends each message as it comes, until you send a line"""
        self.reply(250, "Send a line to stop")
        self.news = threading.Event()
        self.news.set()  # mail may have come since the last look
        self.server.mailroom.subscribe(self.notice)
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self.connection, selectors.EVENT_READ)
                # Until the client has sent a line, or too much to wait for the end of a line.
                while not re.search(rb"\n|\r\0|.{500}", self.received):
                    self.flush()
                    if selector.select(0):
                        self.receive()
                    if self.news.wait(0.2):
                        self.news.clear()
                        for name in self.look():
                            with suppress(Refused):  # a mail reader has deleted the message
                                self.send_message(self.load(name))
        finally:
            self.server.mailroom.subscribers.remove(self.notice)
        self.read_line()
        self.reply(250, "Stopped")


# ==================================================================================================
# PART 6: START AND STOP
# The server that runs, what its console shows of a message, the command line, and main().


@dataclass(eq=False, repr=False)
class MailServer(SmallServer):
    """The whole server. README shows how a program uses it; this file does so in main()."""

    handler: type[LineHandler] = SecureHandler
    lists: dict[str, list[str]] = field(default_factory=dict)  # mailing lists, and who is on them
    users: dict[str, str] = field(default_factory=dict)  # names and passwords; {}: any will do
    require_auth: bool = False  # take mail only after AUTH
    tls: ssl.SSLContext | None = None
    maildir: Maildir | None = None
    mailroom: Mailroom = field(default_factory=Mailroom)

    # Not settings: clients that have no thread yet, and a count of the threads without a client.
    clients: queue.SimpleQueue[Any] = field(init=False, default_factory=queue.SimpleQueue)
    idle: threading.Semaphore = field(init=False, default_factory=lambda: threading.Semaphore(0))

    def check_settings(self) -> None:
        """Raise TypeError or ValueError for a value that makes no sense."""
        super().check_settings()
        self.lists = {name.lower(): members for name, members in self.lists.items()}
        for name, members in self.lists.items():
            for member in members or [""]:
                if not re.fullmatch(ESMTPHandler.address, member, re.ASCII):
                    raise ValueError(f"list {name}={member} is not like team=ann@example.com")

    def process_request(self, request: Any, client_address: Any) -> None:
        """Give a new client to a thread whose client has left, or to a new thread."""
        if self.serial or self.stopping:
            return super().process_request(request, client_address)
        if not self.idle.acquire(blocking=False):
            threading.Thread(target=self.serve_clients, daemon=True).start()
        self.clients.put((request, client_address))

    def serve_clients(self) -> None:
        """Serve one client after another; end when none has come for a second."""
        while True:
            try:
                self.process_request_thread(*self.clients.get(timeout=1))
                self.idle.release()
            except queue.Empty:
                # Trap: if the count is 0 already, a client has been promised this thread
                if self.idle.acquire(blocking=False):
                    return


def describe(envelope: Envelope) -> list[str]:
    """Return what the console shows of a message: few lines, and soon, whatever it holds."""
    lines = ["---- envelope", f"from <{envelope.sender}>"]
    lines += [f"to   <{address}>" for address in envelope.recipients[:20]]
    lines += [f"... {len(envelope.recipients)} in all"] if envelope.recipients[20:] else []
    text = envelope.content[:50_000].decode("utf-8", "backslashreplace")
    text = re.sub("(?<!\r)\n", "<LF>\n", text).replace("\r\n", "\n")
    raw = text.removesuffix("\n").split("\n")
    count = max(1, envelope.content.count(b"\n"))
    title, most = "---- message", 100
    with suppress(Exception):  # the email package fails at odd messages: show what came
        if worth_decoding(envelope.content):
            decoded = decode(envelope.content)
            lines += ["---- decoded", *first_lines(decoded, 100, len(decoded))]
            title, most = "---- as it came", 20
    return [*lines, title, *first_lines(raw, most, count), "----"]


def first_lines(lines: list[str], most: int, count: int) -> list[str]:
    """Return the first lines, and how many more there are, if there are count in all."""
    shown = [f"| {line}" for line in lines[:most]]
    if count > len(shown):
        shown.append(f"... {count - len(shown):,} more lines")
    return shown


def worth_decoding(content: bytearray) -> bool:
    """Return whether something in a message is encoded, and decoding it will not take long."""
    encoded = rb'(?m)=\?|^content-(transfer-encoding: *[bq]|type:( *[^ t]|.*charset="?[^u"]))'
    if len(content) > 2**20 or not re.search(encoded, content[: 16 * 1024].lower()):
        return False
    lower = b"\n" + content.lower()
    parts = lower.count(b"boundary") + lower.count(b"message/")
    parts += len(re.findall(rb"[\r\n]--", lower)) // 10
    long_header = re.search(rb"[\r\n]content-[^:\r\n]*:(?:.|\n[ \t]){1000}", lower)
    return not long_header and parts <= 10 and lower.count(b"\n") + lower.count(b"\r") <= 20_000


def decode(content: bytearray) -> list[str]:
    """Return the lines of a message, decoded, with one for each part that is no text."""
    message, lines = email.message_from_bytes(content), []
    for name in ("From", "To", "Subject"):
        if "=?" in (value := " ".join(str(message[name])[:1000].split())):
            lines.append(f"{name}: {email.policy.default.header_factory('Subject', value)}")
    for part in message.walk():
        kind, data = part.get_content_type(), bytes(part.get_payload(decode=True) or b"")
        if kind.startswith("text/"):
            charset = part.get_content_charset("utf-8")
            if "escape" in charset:  # such a codec may print warnings
                raise LookupError
            # Some character sets take long to decode: a hundred lines are shown at most.
            lines += data[:50_000].decode(charset, "backslashreplace").splitlines()
        elif not part.is_multipart():
            lines.append(f"({kind}, {len(data):,} octets, {part.get_filename('no name')})")
    return lines


class Terminal(Console):
    """A console that prints from a thread of its own, so that a stuck terminal stops nobody."""

    def __init__(self) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):  # the terminal may lack a client's letters
            sys.stdout.reconfigure(errors="backslashreplace")
        self.coloured = sys.stdout and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
        if os.name == "nt" and not os.environ.get("WT_SESSION"):
            self.coloured = False  # the older console windows show colours as characters
        self.waiting: queue.Queue[str | None] = queue.Queue(5000)  # lines; None is the end
        self.missing = 0  # lines for which there was no room
        self.thread = threading.Thread(target=self.print_lines, daemon=True)
        self.thread.start()

    def show(self, *lines: str) -> None:
        """Have the lines printed; if there is no room for one, only count it."""
        for line in lines:
            try:
                self.waiting.put_nowait(line)
            except queue.Full:
                self.missing += 1

    def print_lines(self) -> None:
        """Print what show() is given, replies in colour, until close() is called."""
        while (line := self.waiting.get()) is not None:
            if self.coloured and (reply := re.match(r"\[[^]]*\] S: (.)", line)):
                # red, or green and yellow by the code's first character
                colour = {"2": 32, "3": 32, "+": 32, "4": 33}.get(reply[1], 31)
                line = line.replace("S: ", f"\x1b[{colour}mS: ", 1) + "\x1b[0m"
            with suppress(OSError, ValueError):  # stdout is full or closed
                print(line, flush=self.waiting.empty())
            if self.waiting.empty():
                if self.missing:
                    self.show(f"... {self.missing} lines not shown")
                    self.missing = 0
                time.sleep(0.01)  # more lines may come, and to print many at once takes less time

    def close(self) -> None:
        """Let the rest be printed, for a second at most."""
        with suppress(queue.Full):
            self.waiting.put(None, timeout=0.5)
        self.thread.join(0.5)


def give_up(text: str) -> NoReturn:
    """Say what is wrong with the command line, and end the program."""
    warn(f"{text}; see --help")
    sys.exit(2)


def read_flags(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; None is the program's own. A wrong flag ends the program."""
    about = "A mail server to learn from and to test with: telnet to it, or let programs send mail."
    example = "Try: mailserver.py --fail RCPT=450; mailserver.py --maildir Maildir --pop3-port 2526"
    parser = argparse.ArgumentParser("mailserver.py", None, about, example)
    parser.error = give_up  # type: ignore
    add, given = parser.add_argument, "(%(default)s)"
    add("--host", default="127.0.0.1", help=f"address to listen on {given}; 0.0.0.0 is all")
    add("--port", type=int, default=2525, help=f"port to listen on {given}; 0 takes a free one")
    add("--serial", action="store_true", help="serve one client at a time")
    add("--max-size", type=int, default=10 * 2**20, help=f"octets in a message {given}")
    add("--max-clients", type=int, default=1010, help=f"clients at the same time {given}")
    add("--timeout", type=int, default=300, help=f"seconds to wait for a client {given}")
    add("--fail", action="append", default=[], help="refuse a command: RCPT=450")
    add("--list", action="append", default=[], help="mailing list: team=a@x.org,b@x.org")
    add("--tls", nargs=2, metavar=("CERT", "KEY"), help="offer TLS; make cert makes both files")
    add("--users", nargs=1, metavar="FILE", help="lines of name:password; without it, any will do")
    add("--require-auth", action="store_true", help="take mail only after AUTH")
    add("--maildir", nargs=1, metavar="DIR", help="keep the mail in this directory")
    add("--pop3-port", type=int, help="let mail be collected at this port; needs --maildir")
    add("--quiet", action="store_true", help="print neither dialogues nor mail")
    add("--version", action="version", version=f"mailserver {__version__}")
    return parser.parse_args(argv)


def read_users(path: str) -> dict[str, str]:
    """Return names and passwords from lines of name:password. Raise OSError or ValueError."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        lines = [line.strip() for line in file]
    for number, line in enumerate(lines, 1):
        if not re.fullmatch("(#.*|[^:\udc80-\udcff]+:[^\udc80-\udcff]+)?", line):
            raise ValueError(f"users {path}: line {number} is not name:password in UTF-8")
    users = dict(line.split(":", 1) for line in lines if line and not line.startswith("#"))
    if not users:
        raise ValueError(f"users {path}: nobody is named; write a line with name:password")
    return users


def tls_context(cert: str | os.PathLike[str], key: str | os.PathLike[str]) -> ssl.SSLContext:
    """Return what TLS needs, from the files of a certificate and its key. Raise OSError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2  # else the system chooses
    context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)  # Trap: else stop() sends no 421
    for path in (cert, key):
        open(path, "rb").close()  # if this fails, the error names the file; OpenSSL's does not
    context.load_cert_chain(cert, key, password="")  # else OpenSSL would ask for one
    return context


def settings_of(flags: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of MailServer that the flags name, but for those that name files."""
    names = ("serial", "max_size", "max_clients", "timeout", "require_auth")
    settings: dict[str, Any] = {name: getattr(flags, name) for name in names}
    lists = (text.partition("=") for text in flags.list)
    settings["lists"] = {name: members.split(",") for name, _, members in lists}
    fail = (text.upper().partition("=") for text in flags.fail)
    settings["fail"] = {verb: int(code[:9]) if code.isdecimal() else 0 for verb, _, code in fail}
    return settings


def make_servers(flags: argparse.Namespace, **settings: Any) -> list[MailServer]:
    """Make the server for SMTP, and the one for POP3 if there is a port for it."""
    try:
        settings |= settings_of(flags) | {"mailroom": Mailroom()}
        for name, read in (("users", read_users), ("maildir", Maildir), ("tls", tls_context)):
            if values := getattr(flags, name):
                given = f"--{name} {' '.join(values)}"
                settings[name] = read(*values)
        given, place = f"--host {flags.host} --port {flags.port}", (flags.host, flags.port)
        servers = [MailServer(place, **settings)]
        if flags.pop3_port is not None:
            if not flags.maildir:
                raise ValueError("pop3-port needs --maildir DIR")
            settings |= {"handler": POP3Handler, "fail": {}}
            settings["timeout"] *= 2  # RFC 1939 3 wants 10 minutes
            given, place = f"--pop3-port {flags.pop3_port}", (flags.host, flags.pop3_port)
            servers.append(MailServer(place, **settings))
    except OSError as error:
        file = f"{error.filename}: " if error.filename else ""
        give_up(f"cannot use {given}: {file}{error.strerror}; choose another")
    except (TypeError, ValueError) as error:  # the text starts with the name of a setting
        give_up(f"--{error}".replace("--max_", "--max-"))
    return servers


def announce(servers: list[MailServer], console: Console) -> None:
    """Say where the servers are and what to do with them; warn of what others could do."""
    host, port = servers[0].host, servers[0].port
    pop3 = "".join(f", POP3 on port {server.port}" for server in servers[1:])
    console.show(f"mailserver {__version__} listens on {host} port {port}{pop3}")
    if not host.startswith("127.") and host != "::1":
        warn("other machines can reach this server: anyone there can send it mail")
    if host in ("0.0.0.0", "::"):  # which of our addresses do others see? This sends nothing
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.connect(("192.0.2.1", 9))
            host = udp.getsockname()[0]
    if servers[0].console:
        console.show(f"Try it in another terminal: telnet {host} {port}", "Stop: Ctrl-C")
    if servers[0].users and not servers[0].tls:
        warn("passwords come in the clear: whoever is on the way can read them; see --tls")


def tune_process() -> None:
    """Use one core only, and allow 4,096 open files, on a system that lets us choose."""
    with suppress(ImportError, AttributeError, ValueError, OSError):  # some systems lack these
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
        if getattr(sys, "_is_gil_enabled", lambda: True)():
            # Trap: on two cores, threads take the interpreter's lock from each other all the time
            cores = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})


def main(argv: list[str] | None = None, handler: type[LineHandler] = SecureHandler) -> None:
    """Run the program: read the flags, listen, serve, wait for Ctrl-C or TERM, stop."""
    flags = read_flags(argv)
    tune_process()
    terminal = Terminal()  # after tune_process(): a thread keeps the cores that it starts with
    servers = make_servers(flags, handler=handler, console=None if flags.quiet else terminal)
    ours, pythons = socket.socketpair()
    pythons.setblocking(False)
    signal.set_wakeup_fd(pythons.fileno())  # Python writes to it when a signal comes
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: signal.signal(number, signal.SIG_IGN))
    announce(servers, terminal)
    for server in servers:
        server.start()
    ours.recv(1)
    for server in servers:
        server.stop()
    terminal.close()
    os._exit(0)  # Trap: Python would wait for a thread that waits for a stuck terminal


if __name__ == "__main__":
    main()
