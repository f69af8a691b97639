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

C is the client, you; S is the server, this file. They speak SMTP; its standard is RFC 5321. The
client sends a line: a verb, and its argument. The server answers with a code and a text. 2xx is
yes, 3xx "go on", 4xx "not now", 5xx "no". A line ends in two octets (bytes): CR and LF. "Trap:"
marks code that looks needless, and is not. Stop after any part: the next ones only add to it.

    1  A small server       LineHandler: lines in, replies out; SMTPHandler: five commands;
                            MailServer: a thread for each client
    2  The whole protocol   ESMTPHandler: the other commands, addresses, extensions
    3  Trust                SecureHandler: encryption and passwords
    4  Keeping mail         Maildir: mail on disk
    5  Collecting mail      POP3Handler: another protocol on the same foundation
    6  The program          its console, its command line

Each handler extends the one above it, but POP3Handler extends LineHandler. LineHandler and
MailServer extend Python's socketserver: serve_forever() waits for clients, get_request() accepts
one, and process_request() starts a thread. The thread makes a handler, and calls its three methods.
setup() makes rfile, to read from the client, and wfile, to write to it. handle() is our dialogue.
finish() closes both files. Then socketserver closes the connection. If a method fails,
handle_error() prints a traceback.

The road of one command, from the octets of "RCPT TO:<bob@example.com>" to those of "250 OK":

    handle       goes from line to line, until one side hangs up
    read_line    takes the next line from rfile, as text
    dispatch     finds the method for the verb, here do_RCPT
    do_RCPT      is the command
    read_path    takes the address out of TO:<bob@example.com>
    reply        puts the code and the text together
    send         writes them to wfile
"""

from __future__ import annotations

import argparse
import base64
import email.policy
import email.utils
import errno
import hashlib
import hmac
import inspect
import io
import itertools
import logging
import mailbox
import os
import queue
import re
import secrets
import signal
import socket
import socketserver
import ssl
import sys
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from email.message import EmailMessage
from functools import cached_property, partial
from typing import Any

if sys.version_info < (3, 10):  # noqa: UP036
    print("mailserver needs Python 3.10 or newer", file=sys.stderr)
    sys.exit(2)

__version__ = "3.0"
console = logging.getLogger("mailserver")  # shows the dialogues, at level INFO

# ==================================================================================================
# PART 1: A SMALL SERVER


class Refused(Exception):
    """Raised to refuse a command: Refused(503, "Send HELO first"). 421 also ends the session."""


class ClientGone(Exception):
    """Raised when the client has hung up, or does not read what it is sent."""


class LineHandler(socketserver.StreamRequestHandler):
    """One session of a protocol in which the client sends a line, and the server answers it.

    A command is a method: the line "NOOP hello" calls do_NOOP("hello"), which calls reply(), or
    raises Refused. The method's docstring is the syntax, " - ", and what the command does. If the
    syntax is the verb alone, an argument is refused. "Hook:" marks a method to override.
    """

    # Settings: MailServer(..., timeout=20) changes one for all sessions of that server.
    timeout = 300.0  # seconds to wait for the client (RFC 5321 4.5.3.2.7)
    line_limit = 512  # octets in a line, with its CRLF (RFC 5321 4.5.3.1.4)
    max_clients = 500  # at the same time
    rbufsize = 64 * 1024  # octets that rfile reads ahead; wfile sends at once what is written
    disable_nagle_algorithm = True  # the system sends at once, too

    # The state of one session.
    server: MailServer
    last_code = 0  # of the last reply
    errors = 0  # how many replies had a code from 500 up
    client_newline = b"\r\n"  # how the client's last line ended: in CRLF, or in LF as nc sends

    def setup(self) -> None:
        """Prepare the session."""
        for name, value in self.server.settings.items():
            setattr(self, name, value)
        super().setup()  # only now: it gives the connection the timeout
        self.verbs = [name[3:] for name in dir(self) if name.startswith("do_")]
        self.peer: str = self.client_address[0]  # the client's IP address
        self.session_number = next(self.server.session_numbers)
        self.label = str(self.session_number)  # names the session on the console
        self.thread = threading.current_thread()

    def handle(self) -> None:
        """Greet the client, then answer line after line until one side hangs up."""
        self.server.sessions.add(self)
        try:
            self.greet()
            while self.last_code not in (221, 421):  # the replies that announce the end
                try:
                    self.dispatch(self.read_line())
                except Refused as refusal:
                    self.reply(*refusal.args)
        except ClientGone as gone:
            self.log("-", f"gone {gone}")
        except BaseException:  # a fault of this program, or of code that you have added
            with suppress(ClientGone):
                self.reply(421, "The server failed at this: try again later")
            self.server.handle_error(self.request, self.client_address)

    def finish(self) -> None:
        """Close the files, then leave the set of sessions."""
        super().finish()
        self.server.sessions.discard(self)

    def greet(self) -> None:
        """Say who we are, or why the client cannot stay."""
        self.log("-", f"connected from {self.peer}")
        if len(self.server.sessions) > self.max_clients:
            self.reply(421, "Too many clients: try again later")
        elif not self.server.stopping:  # else read_line() refuses, with 421
            self.reply(220, "Simple Mail Server")

    def read_line(self) -> str:
        """Return the client's next line, without its end. Raise Refused, or ClientGone."""
        if self.server.stopping:
            raise input_ended(self)
        try:
            line = self.rfile.readline(self.line_limit)
            piece = line
            # Trap: read all of a long line, or the rest of it passes for the next command
            while piece and not piece.endswith(b"\n"):
                piece = self.rfile.readline(self.line_limit)
        except OSError as error:
            raise input_ended(self, error) from None  # "from None": do not show the OSError, too
        text = self.decode(line)
        if line:
            self.log("C:", self.conceal(text), piece)
        if not piece:  # half a line is no command
            raise input_ended(self)
        self.client_newline = b"\r\n" if piece.endswith(b"\r\n") else b"\n"
        if not line.endswith(b"\n"):
            raise Refused(500, f"Line too long: send {self.line_limit} octets at most")
        return text

    def decode(self, line: bytes) -> str:
        """Hook: return a line as text, without its end."""
        return line.decode("utf-8", "backslashreplace").rstrip()

    def conceal(self, line: str) -> str:
        """Hook: return a client's line as the console may show it: without passwords."""
        return line

    def dispatch(self, line: str) -> None:
        """Run the command in a line: for "noop hello", call do_NOOP("hello")."""
        verb, arg = split_line(line)
        if verb in ("C:", "S:"):
            raise Refused(500, f'Leave out the "{verb}", send what is behind it')
        if verb in ("GET", "POST", "CONNECT"):  # a web page can make a browser talk to us
            raise Refused(421, "This is a mail server, not a web server")
        if verb not in self.verbs:
            raise Refused(500, "Unknown command: try " + " ".join(self.verbs))
        if arg and syntax(self, verb) == verb:
            raise Refused(501, f"Send {verb} with nothing behind it")
        self.last_code = 0
        getattr(self, "do_" + verb)(arg)
        if not self.last_code:
            raise NotImplementedError(f"do_{verb} did not call reply()")

    def reply(self, code: int, *lines: str) -> None:
        """Answer with a code and a line of text, or more. Hang up after 20 errors."""
        self.last_code = code
        data = b""
        for line in self.format_reply(code, lines):
            text = line.replace("\r", " ").replace("\n", " ")  # or it would be two replies
            self.log("S:", text)
            data += text.encode("utf-8", "backslashreplace") + b"\r\n"
        self.send(data)
        if code >= 500:
            self.errors += 1
            if self.errors == 20:
                self.reply(421, "Too many errors: read up on the commands, then come back")

    def format_reply(self, code: int, lines: tuple[str, ...]) -> list[str]:
        """Hook: return the lines of a reply. "-" says that another follows (RFC 5321 4.2.1)."""
        return [f"{code}-{line}" for line in lines[:-1]] + [f"{code} {lines[-1]}"]

    def send(self, data: bytes) -> None:
        """Send octets to the client. Raise ClientGone if that fails."""
        try:
            self.wfile.write(data)
        except OSError:
            raise ClientGone("without reading the reply") from None

    def log(self, who: str, text: str, end: bytes = b"\r\n") -> None:
        """Show a line: "C:" of the client, "S:" of the server, "|" of a message, "-" a remark."""
        if console.isEnabledFor(logging.INFO):
            mark = "<LF>" if end.endswith(b"\n") and not end.endswith(b"\r\n") else ""
            console.info("[%s] %s %s%s", self.label, who, printable(text), mark)

    def do_NOOP(self, arg: str) -> None:
        """NOOP [anything] - does nothing, and says so (RFC 5321 4.1.1.9)"""
        self.reply(250, "OK")


class SMTPHandler(LineHandler):
    """The five commands that bring a message, as in the dialogue at the top of this file."""

    max_size = 10 * 2**20  # octets in a message: a setting
    path_pattern = r"<([^<>\s]*)>"  # an address in < and >; part 2 is stricter
    helo = ""  # what the client calls itself
    protocol = "SMTP"  # or ESMTP (part 2)
    user = ""  # who has logged in (part 3)
    envelope: Envelope | None = None  # from MAIL to DATA

    def do_HELO(self, arg: str) -> None:
        """HELO your-domain.example - says who you are (RFC 5321 4.1.1.1)"""
        self.introduce("HELO", "SMTP", arg)
        self.reply(250, "Hello")

    def introduce(self, verb: str, protocol: str, name: str) -> None:
        """Note who the client is. Drop a message that is under way."""
        if not re.fullmatch("[!-~]{1,255}", name):
            raise Refused(501, f"Send {syntax(self, verb)}: one word, in ASCII")
        self.helo = name
        self.protocol = protocol
        self.label = f"{self.session_number} {name.strip('[]').partition('.')[0][:12]}"
        self.envelope = None

    def do_MAIL(self, arg: str) -> None:
        """MAIL FROM:<sender@example.com> - opens an envelope (RFC 5321 4.1.1.2)"""
        if not self.helo:
            raise Refused(503, "Send HELO before MAIL FROM")
        if self.envelope:
            raise Refused(503, "A message is under way: send RCPT TO and DATA, or RSET")
        sender = self.read_path("MAIL", "FROM", arg)
        self.envelope = Envelope(sender, [], b"", self.helo, self.peer, self.user, self.protocol)
        self.reply(250, "OK")

    def do_RCPT(self, arg: str) -> None:
        """RCPT TO:<recipient@example.com> - adds a recipient (RFC 5321 4.1.1.3)"""
        if not self.envelope:
            raise Refused(503, "Send MAIL FROM before RCPT TO")
        if len(self.envelope.recipients) >= 1000:  # RFC 5321 4.5.3.1.8: at least 100
            raise Refused(452, "Too many recipients: send DATA, then MAIL FROM again")
        self.envelope.recipients += self.members(self.read_path("RCPT", "TO", arg))
        self.reply(250, "OK")

    def members(self, name: str) -> list[str]:
        """Hook: return who gets what is sent to a name, which may be a mailing list."""
        return [name]

    def read_path(self, verb: str, keyword: str, arg: str) -> str:
        """Return the address in FROM:<address> or TO:<address>. Raise Refused."""
        match = re.fullmatch(rf"(?i:{keyword}): *{self.path_pattern}(|[ \t]+[^<\s].*)", arg)
        if not match:
            hint = "no blank before the colon, one name@domain in < and >"
            raise Refused(501, f"Send {syntax(self, verb)}, {hint}")
        self.read_parameters(verb, match[2].upper().split())
        return match[1]

    def read_parameters(self, verb: str, words: list[str]) -> None:
        """Hook: obey the words behind an address, or raise Refused."""
        if words:
            raise Refused(555, f"Send {syntax(self, verb)} with nothing behind it")

    def do_DATA(self, arg: str) -> None:
        """DATA - sends the message, up to a line that is a dot (RFC 5321 4.1.1.4)"""
        if not self.envelope:
            raise Refused(503, "Send MAIL FROM before DATA")
        if not self.envelope.recipients:
            raise Refused(503, "Send RCPT TO before DATA")
        self.reply(354, "End data with <CR><LF>.<CR><LF>")
        envelope = self.envelope
        self.envelope = None  # accepted or not, this one is used up
        envelope.content = self.read_message()
        envelope.recipients = list(dict.fromkeys(envelope.recipients))  # each once
        for subscriber in list(self.server.subscribers):
            subscriber(envelope)  # a subscriber may raise Refused
        self.reply(250, "Message accepted")

    def read_message(self) -> bytes:
        """Return the lines up to one that is a dot. Raise Refused, or ClientGone. If a line of the
        message starts with a dot, the client sends another in front of it (RFC 5321 4.5.2).

        Trap: a line ends as the DATA line did. Suppose that a relay, which passes on the mail of
        others, gets a message with "Hi" LF "." LF "MAIL FROM:<boss@example.com>" LF in it. The
        relay's lines end in CRLF, so to the relay all this is text. If LF "." LF ended the message
        here, the rest would be commands, and a forged mail smuggled in (CVE-2023-51764).
        """
        newline = self.client_newline
        content = io.BytesIO()
        count = 0  # of lines
        before = last = newline  # Trap: keep two, since 64 KiB may end between CR and LF
        try:
            while (line := self.rfile.readline(64 * 1024)) and not self.server.stopping:
                if line[0] == DOT and (before + last).endswith(newline):
                    if line in (b".\r\n", b"." + newline):
                        break
                    line = line[1:]
                before, last = last, line
                count += 1
                if count <= 100:
                    self.log("|", line.rstrip(b"\r\n").decode("utf-8", "backslashreplace"), line)
                if content.tell() <= self.max_size:
                    content.write(line)
        except OSError as error:
            raise input_ended(self, error) from None
        if count > 100:
            self.log("|", f"... {count - 100:,} more lines")
        if not line or self.server.stopping:
            raise input_ended(self)
        self.log("C:", ".", line)
        if content.tell() > self.max_size:
            raise Refused(552, f"Message too big: send {self.max_size} octets at most")
        return content.getvalue()

    def do_QUIT(self, arg: str) -> None:
        """QUIT - ends the session (RFC 5321 4.1.1.10)"""
        self.reply(221, "Bye")


@dataclass
class Envelope:
    """A message, and who it is from and for. Its From: and To: lines are for people only."""

    sender: str  # where reports of failure go; "" in such a report (RFC 5321 4.5.5)
    recipients: list[str] = field(default_factory=list)
    content: bytes = field(default=b"", repr=False)  # the message, as it came
    helo: str = ""  # what the client calls itself
    peer: str = ""  # its IP address
    user: str = ""  # who has logged in
    protocol: str = "SMTP"

    @cached_property
    def message(self) -> EmailMessage:
        """The content, parsed."""
        return email.message_from_bytes(self.content, policy=email.policy.default)


DOT = ord(".")


def input_ended(session: LineHandler, error: OSError | None = None) -> Exception:
    """Return what to raise when nothing more comes from the client."""
    if session.server.stopping:
        return Refused(421, "The server is stopping: try again later")
    if isinstance(error, TimeoutError):
        return Refused(421, "No whole line came for too long: connect again")
    if session.last_code == 354:  # the reply to DATA
        return ClientGone("in the middle of a message: the message is dropped")
    return ClientGone("without QUIT")


def split_line(line: str) -> tuple[str, str]:
    """Return the verb of a line, in capitals, and its argument."""
    word = re.split("[ \t]", line, maxsplit=1)[0]
    verb = word.upper() if word.isascii() else word  # some letters become ASCII in capitals
    return verb, line[len(word) :].strip()


def syntax(session: LineHandler, verb: str) -> str:
    """Return how to write a command, as its docstring says."""
    text = inspect.getdoc(getattr(session, "do_" + verb)) or f"{verb} ..."  # there may be none
    return text.partition(" - ")[0]


def printable(text: str) -> str:
    """Return 500 characters of a text, with those escaped that could clear the terminal."""
    if not text.isprintable():
        text = repr(text)[1:-1]
    return text if len(text) <= 500 else f"{text[:500]}... ({len(text):,} characters)"


class MailServer(socketserver.ThreadingTCPServer):
    """Listens, and has a handler talk to each client, in a thread of its own.

    Append a function to subscribers, and it is called with the Envelope of each message before the
    message is accepted, in the thread of the client that has sent the message.
    """

    daemon_threads = True  # the program may end while clients are connected
    allow_reuse_address = os.name != "nt"  # no wait at restart; Windows would share the port
    request_queue_size = 1024  # clients that wait to be accepted
    session_numbers = itertools.count(1)  # for all servers of a program

    def __init__(self, place: tuple[str, int], handler: type[LineHandler], **settings: Any) -> None:
        """Listen at a place: host, and port or 0 for a free one. Besides the handler's settings,
        take serial (serve one client at a time) and subscribers. Raise OSError, or TypeError."""
        self.serial: bool = settings.pop("serial", False)
        self.subscribers: list[Callable[[Envelope], object]] = settings.pop("subscribers", [])
        for name in settings:
            if not hasattr(handler, name) or callable(getattr(handler, name)):
                raise TypeError(f"{handler.__name__} has no setting {name}")
        self.settings = settings
        self.sessions: set[LineHandler] = set()
        self.stopping = False
        if ":" in place[0]:
            self.address_family = socket.AF_INET6
        super().__init__(place, handler)
        self.host: str = str(self.server_address[0])
        self.port: int = self.server_address[1]

    def get_request(self) -> Any:
        """Accept a client."""
        try:
            return super().get_request()
        except OSError:  # Trap: no more files can be opened. Without a rest, the loop would spin
            time.sleep(0.1)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a client in a new thread, or right here if serial: the next client has to wait."""
        if self.serial:
            self.process_request_thread(request, client_address)
        else:
            super().process_request(request, client_address)

    def start(self) -> None:
        """Call serve_forever() in a new thread; look for a shutdown() every 0.05 seconds."""
        threading.Thread(target=self.serve_forever, args=[0.05], daemon=True).start()

    def stop(self) -> None:
        """Send 421 to all clients, and free the port, in three seconds at most.

        Each session sends its 421 itself. To wake a session that waits for its client, shut down
        its receiving side: readline() then finds the end of the input.
        """
        self.wait_for_sessions(20)  # a client may be about to say QUIT
        self.stopping = True
        self.wait_for_sessions(200, socket.SHUT_RD)
        self.wait_for_sessions(50, socket.SHUT_RDWR)  # these clients do not read
        # shutdown() waits for serve_forever() to end: for ever if that was never called
        closing = threading.Thread(target=self.shutdown, daemon=True)
        closing.start()
        closing.join(0.1)
        self.server_close()

    def wait_for_sessions(self, times: int, how: int | None = None) -> None:
        """Wait until no session is left, for times * 0.01 seconds at most. Unless how is None, shut
        their connections down, again and again: STARTTLS may put a new one in place."""
        for _ in range(times):
            here = threading.current_thread()  # do not wait for a subscriber that calls stop()
            sessions = [session for session in list(self.sessions) if session.thread is not here]
            for session in sessions:
                if how is not None:
                    with suppress(OSError):  # the session has ended
                        # Trap: not connection.shutdown(), which would end TLS
                        socket.socket.shutdown(session.connection, how)
            time.sleep(0.01)
            if not sessions:
                return

    def __exit__(self, *exception: object) -> None:
        """Stop at the end of a with statement."""
        self.stop()


def serve(*servers: MailServer) -> None:
    """Serve until Ctrl-C."""
    with suppress(KeyboardInterrupt):
        for server in servers:
            server.start()
        while True:
            time.sleep(1)
    for server in servers:
        server.stop()


# ==================================================================================================
# PART 2: THE WHOLE PROTOCOL


def typed_text(session: Any, line: bytes) -> str:
    """Return a line as text, without its end. Obey backspace and DEL; drop the codes of telnet."""
    # Trap: at Ctrl-C, telnet asks DO TIMING-MARK, and shows nothing until it is told WONT (RFC 860)
    if b"\xff\xfd\x06" in line:
        session.send(b"\xff\xfc\x06")
    line = re.sub(rb"(?s)\xff(?:[\xfb-\xfe].|\xfa[^\xff]*\xff\xf0|.)", b"", line)  # RFC 854
    text = line.decode("utf-8", "backslashreplace").rstrip()
    if text.isprintable():  # as most lines are
        return text
    typed: list[str] = []
    for char in text:
        if char not in "\b\x7f":
            typed.append(char)
        elif typed:
            typed.pop()
    return "".join(typed)


class ESMTPHandler(SMTPHandler):
    """SMTP with all that mail clients ask for. They say EHLO, not HELO, to see what there is."""

    # Settings.
    users: dict[str, str] = {}  # names and passwords; if there are none, any will do
    lists: dict[str, list[str]] = {}  # mailing lists: {"team": ["ann@example.com"]}
    fail: dict[str, int] = {}  # commands to refuse, to test a client: {"RCPT": 450}

    decode = typed_text  # a function as a method: self is its session. So in part 5
    encrypted = False  # whether TLS is on (part 3)
    utf8 = False  # MAIL came with SMTPUTF8: addresses may have letters beyond ASCII

    # An address is local@domain (RFC 5321 4.1.2; beyond ASCII: RFC 6531 3.3). A path has "<" and
    # ">" around the address; skip a route in it, as in <@relay.example:bob@example.com>.
    atom = r'[^\0- "(),.:;<>@\[\\\]\x7f-\xa0]+'  # bob
    quoted = r'"(?:[^\0-\x1f"\\\x7f-\xa0]|\\[ -~])*"'  # "bob lee"
    local = rf"(?:{atom}(?:\.{atom})*|{quoted})"  # bob.lee
    letters = r"[0-9A-Za-z\xa1-\U0010ffff]+"  # and digits
    part = rf"{letters}(?:-+{letters})*"  # my-host
    literal = r"\[(?:[0-9]+(?:\.[0-9]+){3}|(?i:IPv6):[0-9A-Fa-f:.]+)\]"  # [192.0.2.1]
    domain = rf"(?:{part}(?:\.{part})*|{literal})"
    address_pattern = f"{local}@{domain}"
    path_pattern = f"<(?:@{domain}(?:,@{domain})*:)?({address_pattern}|{atom}|)>"

    # What may stand behind the address of MAIL, and a pattern for what follows the "=".
    parameters = {
        "SIZE": "[0-9]{1,20}",  # RFC 1870
        "BODY": "7BIT|8BITMIME",  # RFC 6152
        "SMTPUTF8": "",  # RFC 6531
        "AUTH": ".+",  # who has written the message (RFC 4954 5)
    }

    def dispatch(self, line: str) -> None:
        """Refuse the commands that --fail names. Run all others."""
        verb = split_line(line)[0]
        if verb in self.fail:
            raise Refused(self.fail[verb], "Refused on purpose: the server was told to fail here")
        super().dispatch(line)

    def read_path(self, verb: str, keyword: str, arg: str) -> str:
        """Return the address of MAIL or RCPT. Raise Refused."""
        address = super().read_path(verb, keyword, arg)
        local = address.rpartition("@")[0]
        if "@" not in address and not self.needs_no_domain(verb, address):
            raise Refused(501, "Put a whole address in < and >: a name, @ and a domain")
        if len(local.encode()) > 64 or len(address.encode()) > 254:  # RFC 5321 4.5.3.1
            raise Refused(501, "Address too long: send 64 octets before the @, 254 in all, at most")
        if not address.isascii() and not self.utf8:
            raise Refused(553, "Not ASCII: send SMTPUTF8 behind the address in MAIL FROM")
        return address

    def needs_no_domain(self, verb: str, name: str) -> bool:
        """Tell whether a name is complete without @ and a domain."""
        if verb == "MAIL":
            return name == ""  # a report of failure has no sender
        return name.lower() == "postmaster" or self.members(name) != [name]

    def read_parameters(self, verb: str, words: list[str]) -> None:
        """Obey what stands behind an address. Raise Refused if that can't be."""
        if verb == "MAIL":
            self.utf8 = "SMTPUTF8" in words
        for word in words:
            name, _, value = word.partition("=")
            if verb != "MAIL" or self.protocol == "SMTP" or name not in self.parameters:
                raise Refused(555, "Unknown parameter: send EHLO to see what MAIL FROM may have")
            if not re.fullmatch(self.parameters[name], value):
                raise Refused(501, f"Wrong value behind {name}")
            if name == "SIZE" and int(value) > self.max_size:
                raise Refused(552, f"Message too big: send {self.max_size} octets at most")

    def members(self, name: str) -> list[str]:
        """Return who is on a list: "team", or "team@example.com". Return [name] for no list."""
        lists = {key.lower(): members for key, members in self.lists.items()}
        return lists.get(name.partition("@")[0].lower(), [name])

    def do_EHLO(self, arg: str) -> None:
        """EHLO your-domain.example - says who you are, and asks what there is"""
        protocol = "ESMTPS" if self.encrypted else "ESMTP"  # RFC 3848; EHLO may follow AUTH, too
        self.introduce("EHLO", protocol + ("A" if self.user else ""), arg)
        self.reply(250, "Hello", *self.extensions())

    def extensions(self) -> list[str]:
        """Return what EHLO lists."""
        return [f"SIZE {self.max_size}", "8BITMIME", "PIPELINING", "SMTPUTF8", "EXPN", "HELP"]

    def do_RSET(self, arg: str) -> None:
        """RSET - drops the message that is under way (RFC 5321 4.1.1.5)"""
        self.envelope = None
        self.reply(250, "OK")

    def do_HELP(self, arg: str) -> None:
        """HELP [command] - lists the commands, or explains one"""
        verb = arg.upper()
        if not verb:
            self.reply(214, " ".join(self.verbs), "Send HELP and a command to read more")
        elif verb in self.verbs:
            self.reply(214, inspect.getdoc(getattr(self, "do_" + verb)) or verb)
        else:
            raise Refused(504, "No such command: HELP lists them")

    def do_VRFY(self, arg: str) -> None:
        """VRFY user - asks whether there is such a user (RFC 5321 3.5)"""
        name = arg.partition(" ")[0].strip("<>").lower()
        if not name:
            raise Refused(501, f"Send {syntax(self, 'VRFY')}")
        for known in (*self.lists, *self.users):
            if name in (known.lower(), known.lower().partition("@")[0]):
                return self.reply(250, f"<{known}>")
        if self.users:
            raise Refused(550, "No such user")
        self.reply(252, "Cannot say: send a message and see")

    def do_EXPN(self, arg: str) -> None:
        """EXPN list - asks who is on a mailing list (RFC 5321 3.5)"""
        name = arg.partition(" ")[0].strip("<>")
        if self.members(name) == [name]:
            raise Refused(550 if name else 501, "No such list")
        self.reply(250, *(f"<{address}>" for address in self.members(name)))


# ==================================================================================================
# PART 3: TRUST
# TLS encrypts a session, and a password says who the client is. POP3 (part 5) needs both, too: what
# SMTP and POP3 share are functions that take a session.


def start_tls(session: Any) -> None:
    """Go on in TLS. Raise ClientGone if the client can't."""
    # Trap: without this option, stop()'s SHUT_RD ends TLS, and the 421 can't be sent
    session.tls.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)  # OpenSSL 1 has none
    try:
        session.request = session.tls.wrap_socket(
            session.request, server_side=True, do_handshake_on_connect=False
        )
        # Trap: take a new rfile. What the old one has read ahead came in the clear, and anybody
        # may have sent it (CVE-2011-0411)
        socketserver.StreamRequestHandler.setup(session)
        session.connection.do_handshake()  # stop() can shut this connection down
    except OSError:
        raise ClientGone("without TLS: not wanted, not trusted, or not in time") from None
    session.encrypted = True


def end_tls(session: LineHandler) -> None:
    """Say that nothing was cut off (close_notify, RFC 8446 6.1), and close the connection."""
    if isinstance(session.request, ssl.SSLSocket):
        with suppress(OSError, ValueError):  # the client may be gone
            session.request.settimeout(0)  # do not wait for the client's close_notify
            session.request.unwrap()
        session.request.close()  # the server would close only the socket without TLS


def log_in(session: Any, name: str, password: str) -> None:
    """Log a user in, or raise Refused."""
    # compare_digest(), since == takes longer if more of the password is right
    right = hmac.compare_digest(session.users.get(name, "").encode(), password.encode())
    if not name or not password or (session.users and not right):
        raise Refused(535, "Wrong name or password")
    session.user = name
    session.login_begun = False


def hide_password(session: Any, line: str) -> str:
    """Return a line with ******** for what may be a password: what follows AUTH or PASS; an answer
    to a 334; and any line that is no command, if AUTH, USER or PASS came, and no login since."""
    verb, _ = split_line(line)
    if session.last_code == 334:
        return "********"
    if verb in session.verbs and verb not in ("AUTH", "PASS", "USER") and "\r" not in line:
        return line
    # Show the name behind USER, and PLAIN or LOGIN behind AUTH, whatever stands in front of them.
    shown = r"AUTH(?:\s+(?:PLAIN|LOGIN))?|PASS|USER\b[:\s]*\S*"
    secret = re.search(f"(?is)(?:{shown})(.*)", line)
    if secret:
        session.login_begun = True
        return line[: secret.start(1)] + (" ********" if secret[1] else "")
    return "********" if session.login_begun else line


class SecureHandler(ESMTPHandler):
    """SMTP with TLS and AUTH: what this program speaks."""

    # Settings.
    tls: ssl.SSLContext | None = None
    tls_first = False  # start with TLS, as on port 465 (RFC 8314 3.3), not at STARTTLS
    require_auth = False  # take mail only after AUTH
    line_limit = 12288  # octets; for the answers that AUTH gets (RFC 4954 4)

    login_begun = False  # a line that is no command may be a password
    conceal = hide_password

    def greet(self) -> None:
        """Start TLS now if that comes first, then greet."""
        # One client too many gets its 421 in the clear: a handshake could take long.
        if self.tls_first and len(self.server.sessions) <= self.max_clients:
            start_tls(self)
        super().greet()

    def finish(self) -> None:
        """End TLS, then the session."""
        end_tls(self)
        super().finish()

    def extensions(self) -> list[str]:
        """Return what EHLO lists. Clients try to use all that is listed: list what works now."""
        starttls = self.tls and not self.encrypted
        return [*super().extensions(), "STARTTLS" if starttls else "AUTH PLAIN LOGIN"]

    def do_STARTTLS(self, arg: str) -> None:
        """STARTTLS - goes on encrypted; send EHLO again (RFC 3207)"""
        if not self.tls:
            raise Refused(502, "No TLS here: the server was started without --tls")
        if self.encrypted:
            raise Refused(503, "TLS is on already")
        self.reply(220, "Ready for TLS")
        start_tls(self)
        self.helo = self.user = ""  # forget what was said in the clear (RFC 3207 4.2)
        self.envelope = None

    def do_MAIL(self, arg: str) -> None:
        """MAIL FROM:<sender@example.com> - opens an envelope (RFC 5321 4.1.1.2)"""
        if self.require_auth and not self.user:
            raise Refused(530, "Send AUTH before MAIL FROM")
        super().do_MAIL(arg)

    def do_AUTH(self, arg: str) -> None:
        """AUTH PLAIN|LOGIN [base64] - logs in, with name and password (RFC 4954)"""
        if self.tls and not self.encrypted:
            raise Refused(538, "Send STARTTLS before AUTH")
        if not self.helo or self.protocol == "SMTP" or self.user or self.envelope:
            raise Refused(503, "Send AUTH once, after EHLO and before MAIL FROM")
        mechanism, _, initial = arg.partition(" ")
        if mechanism.upper() == "PLAIN":  # RFC 4616: for whom, NUL, name, NUL, password
            parts = self.ask("", initial).split("\0")
            if len(parts) != 3 or parts[0] not in ("", parts[1]):
                raise Refused(501, "Send base64 of NUL, name, NUL, password")
            log_in(self, parts[1], parts[2])
        elif mechanism.upper() == "LOGIN":  # never was a standard, but many clients know it
            name = self.ask("Username:", initial)
            log_in(self, name, self.ask("Password:"))
        else:
            raise Refused(504 if arg else 501, "Send AUTH PLAIN or AUTH LOGIN")
        self.protocol += "A"
        self.reply(235, "Welcome")

    def ask(self, question: str, answer: str = "") -> str:
        """Ask, if the answer is not here yet; decode it from base64. Raise Refused(501)."""
        if not answer:
            self.reply(334, base64.b64encode(question.encode()).decode())
            answer = self.read_line()
        if answer == "*":
            raise Refused(501, "AUTH cancelled")
        try:  # "=" stands for an empty answer (RFC 4954 4)
            return base64.b64decode("" if answer == "=" else answer, validate=True).decode()
        except ValueError:
            raise Refused(501, "Not base64: send AUTH again") from None


# ==================================================================================================
# PART 4: KEEPING MAIL
# With a Maildir, no crash may lose a message after its "250 Message accepted". So the message is on
# the disk before the 250.


class Maildir:
    """A mailbox for each address, in a directory: Maildir("path").keep is a subscriber.

    A mailbox is a directory, too. Messages are files, written in its tmp/ and then moved to its
    new/, so that nobody reads half of one. Mail readers move what they have shown to cur/.
    """

    def __init__(self, root: str) -> None:
        """Use a directory, or make the directory. Raise OSError if nothing can be written there."""
        self.root = os.path.abspath(root)
        self.holders: dict[str, object] = {}  # by mailbox, the POP3 session that has it open
        with suppress(FileExistsError):
            os.mkdir(self.root, 0o700)  # for its owner only
        tempfile.TemporaryFile(dir=self.root).close()
        sync(os.path.dirname(self.root))

    def mailbox(self, address: str) -> str:
        """Return the path of an address's mailbox. Make what is missing of the mailbox."""
        # Trap: "../x" would be a path elsewhere, "con.x" a device of Windows, and a long name fails
        name = urllib.parse.quote(address.lower(), safe="@+")
        if re.match(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])?(\.|$)", name):
            name = "%" + name
        if len(name) > 200:
            name = name[:100] + hashlib.sha256(name.encode()).hexdigest()
        path = os.path.join(self.root, name)
        # Do not let mailbox.Maildir() make these: that fails if two threads do so at once.
        for directory in (path, f"{path}/tmp", f"{path}/new", f"{path}/cur"):
            with suppress(FileExistsError):
                os.mkdir(directory, 0o700)
        return path

    def keep(self, envelope: Envelope) -> None:
        """Have the disk keep a copy for each recipient. If one fails, keep none: raise Refused."""
        name = f"{time.time():.6f}.{secrets.token_hex(8)}"  # no two messages share it
        paths: list[str] = []  # of the mailboxes that get a copy
        try:
            for recipient in envelope.recipients:
                path = self.mailbox(recipient)
                if path not in paths:
                    paths.append(path)
                    self.write(f"{path}/tmp/{name}", name, envelope, recipient)
            for path in paths:  # all are written: nobody sees a copy of what is then refused
                os.rename(f"{path}/tmp/{name}", f"{path}/new/{name}")
            for path in paths:
                sync(f"{path}/new")
                sync(path)
            sync(self.root)
        except Exception as error:  # whatever it is, the message is not kept
            for path in paths:
                for copy in (f"{path}/tmp/{name}", f"{path}/new/{name}"):
                    with suppress(OSError):
                        os.remove(copy)
            console.error("A message was not kept: %r", error)
            full = getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            raise Refused(452 if full else 451, "Not kept, disk trouble: try again later") from None

    def write(self, path: str, name: str, envelope: Envelope, recipient: str) -> None:
        """Write a copy to a file, headed by what RFC 5321 4.4 asks for, and on to the disk."""
        peer = f"IPv6:{envelope.peer}" if ":" in envelope.peer else envelope.peer
        head = (
            f"Return-Path: <{envelope.sender}>\n"
            f"Delivered-To: {recipient}\n"
            f"Received: from {envelope.helo} ([{peer}])\n"
            f"\tby {socket.gethostname()} with {envelope.protocol} id {name};\n"
            f"\t{email.utils.formatdate(localtime=True)}\n"
        )
        if envelope.content.startswith((b" ", b"\t")):
            head += "\n"  # or the message would continue our last line
        with open(path, "xb", opener=partial(os.open, mode=0o600)) as file:
            file.write(head.encode())
            start = 0
            view = memoryview(envelope.content)  # its slices are no copies: a line may be large
            for end in re.finditer(b"\r\n", envelope.content):
                file.write(view[start : end.start()])
                file.write(b"\n")
                start = end.end()
            file.write(view[start:])
            file.flush()
            os.fsync(file.fileno())  # Trap: before this, a crash would lose the file


def sync(directory: str) -> None:
    """Write the names in a directory to the disk, or a crash could lose them."""
    if os.name != "nt":  # Windows has no call for that
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ==================================================================================================
# PART 5: COLLECTING MAIL
# POP3 (RFC 1939) fetches mail. It has lines and verbs, too, so LineHandler is its base as well.


class POP3Handler(LineHandler):
    """USER and PASS open a mailbox, and its messages get numbers. DELE only marks a message, and
    QUIT deletes it: a connection that breaks loses nothing (RFC 1939 6)."""

    # Settings.
    timeout = 600.0  # seconds to wait for the client (RFC 1939 3)
    maildir: Maildir | None = None
    users: dict[str, str] = {}
    tls: ssl.SSLContext | None = None

    # The state of one session.
    encrypted = False
    login_begun = False
    login_name = ""  # the address that USER has named
    mailbox_path = ""
    box: Any = None  # the mailbox.Maildir that reads the mailbox, once PASS has opened it
    decode = typed_text
    conceal = hide_password

    def finish(self) -> None:
        """Release the mailbox, end TLS, then the session."""
        self.release()
        end_tls(self)
        super().finish()

    def release(self) -> None:
        """Let others have the mailbox."""
        if self.maildir and self.maildir.holders.get(self.mailbox_path) is self:
            del self.maildir.holders[self.mailbox_path]

    def format_reply(self, code: int, lines: tuple[str, ...]) -> list[str]:
        """Return the lines of a reply: +OK for a code below 400, else -ERR; then the rest as is."""
        return [("+OK " if code < 400 else "-ERR ") + lines[0], *lines[1:]]

    def do_CAPA(self, arg: str) -> None:
        """CAPA - lists what the server can do (RFC 2449)"""
        stls = ["STLS"] if self.tls and not self.encrypted else []
        self.reply(250, "I can:", "USER", "TOP", "UIDL", "PIPELINING", "RESP-CODES", *stls, ".")

    def do_STLS(self, arg: str) -> None:
        """STLS - goes on encrypted (RFC 2595 4)"""
        if not self.tls or self.encrypted or self.box is not None:
            raise Refused(503, "Too late for TLS, or the server was started without --tls")
        self.reply(250, "Ready for TLS")
        start_tls(self)
        self.login_name = ""

    def do_USER(self, arg: str) -> None:
        """USER address - says whose mailbox to open"""
        if self.tls and self.users and not self.encrypted:
            raise Refused(538, "Send STLS before USER")
        if not re.fullmatch(f"{ESMTPHandler.address_pattern}|(?i:postmaster)", arg):
            raise Refused(501, "Send USER and an address, such as USER bob@example.com")
        self.login_name = arg
        self.reply(250, "Send PASS")

    def do_PASS(self, arg: str) -> None:
        """PASS password - opens the mailbox"""
        if not self.maildir:
            raise Refused(550, "No mailboxes here: the server was started without --maildir")
        if self.box is not None or not self.login_name:
            raise Refused(503, "Send USER with an address, then PASS, and both once")
        log_in(self, self.login_name, arg)
        path = self.maildir.mailbox(self.login_name)
        if self.maildir.holders.setdefault(path, self) is not self:
            raise Refused(450, "[IN-USE] Another session has the mailbox open: try again later")
        self.mailbox_path = path
        self.box = mailbox.Maildir(path, create=False)
        self.messages: dict[int, tuple[int, str]] = {}  # by number: octets, and name
        self.deleted: set[int] = set()  # numbers that DELE has marked
        self.look()  # only now that no other session deletes messages
        self.reply(250, f"{len(self.messages)} messages")

    def look(self) -> list[int]:
        """Give numbers to the messages that came since the last look. Return these numbers."""
        first = len(self.messages) + 1
        known = {name for _, name in self.messages.values()}
        for name in sorted(set(self.box.keys()) - known):
            if not name.startswith("."):  # such as .DS_Store, which macOS leaves in directories
                with suppress(Refused):  # a mail reader has deleted the message
                    octets = sum(len(piece) for piece in wire_lines(self.open(name)))
                    self.messages[len(self.messages) + 1] = (octets, name)
        return list(range(first, len(self.messages) + 1))

    def numbers(self) -> list[int]:
        """Return the numbers of the messages that are not marked. Raise Refused before PASS."""
        if self.box is None:
            raise Refused(503, "Send USER and PASS first")
        return [number for number in self.messages if number not in self.deleted]

    def pick(self, arg: str) -> int:
        """Return the number of a message, from an argument. Raise Refused."""
        numbers = self.numbers()
        if not re.fullmatch("[0-9]+", arg) or int(arg) not in numbers:
            raise Refused(550, "No such message: send one of the numbers that LIST shows")
        return int(arg)

    def do_STAT(self, arg: str) -> None:
        """STAT - counts messages and octets"""
        octets = [self.messages[number][0] for number in self.numbers()]
        self.reply(250, f"{len(octets)} {sum(octets)}")

    def do_LIST(self, arg: str) -> None:
        """LIST [message] - tells how many octets a message has"""
        self.tell(arg, 0)

    def do_UIDL(self, arg: str) -> None:
        """UIDL [message] - tells a message's name, which no other ever has"""
        self.tell(arg, 1)

    def tell(self, arg: str, column: int) -> None:
        """Answer LIST or UIDL: a line for each message, or just that for the one named."""
        numbers = [self.pick(arg)] if arg else self.numbers()
        lines = [f"{number} {self.messages[number][column]}" for number in numbers]
        self.reply(250, *(lines if arg else [f"{len(lines)} messages", *lines, "."]))

    def do_RETR(self, arg: str) -> None:
        """RETR message - sends a message"""
        self.send_message(self.pick(arg))

    def do_TOP(self, arg: str) -> None:
        """TOP message lines - sends the headers of a message and its first lines"""
        number, _, count = arg.partition(" ")
        if not re.fullmatch(" *[0-9]+", count):
            raise Refused(501, f"Send {syntax(self, 'TOP')}")
        self.send_message(self.pick(number), int(count))

    def open(self, name: str) -> Any:
        """Open the file of a message, to read. Raise Refused."""
        try:
            return self.box.get_file(name)
        except (KeyError, OSError):  # a mail reader has deleted the message
            raise Refused(550, "Cannot be read now: send QUIT and connect again") from None

    def send_message(self, number: int, limit: int = 10**9) -> None:
        """Send a message: its headers, and so many lines at most of what follows."""
        octets, name = self.messages[number]
        pieces = wire_lines(self.open(name))
        self.reply(250, f"{octets} octets")
        in_body = False
        data, previous = b"", b"\n"
        for piece in pieces:
            if previous.endswith(b"\n"):  # a line starts here
                if in_body:
                    limit -= 1
                if limit < 0:
                    break
                in_body = in_body or piece == b"\r\n"
                if piece.startswith(b"."):
                    data += b"."  # the client takes this dot away (RFC 1939 3)
            data += piece
            previous = piece
            if len(data) > 64 * 1024:  # each sending has a timeout of its own
                self.send(data)
                data = b""
        self.send(data + b".\r\n")

    def do_DELE(self, arg: str) -> None:
        """DELE message - marks a message, which QUIT will delete"""
        number = self.pick(arg)
        self.deleted.add(number)
        self.reply(250, "Deleted at QUIT")

    def do_RSET(self, arg: str) -> None:
        """RSET - takes every DELE back"""
        self.numbers()
        self.deleted.clear()
        self.reply(250, "No message will be deleted")

    def do_QUIT(self, arg: str) -> None:
        """QUIT - deletes the messages that DELE has marked, and ends the session"""
        if self.box is not None:
            try:
                for number in self.deleted:
                    self.box.discard(self.messages[number][1])
            except OSError:
                raise Refused(421, "Bye, but not all messages could be deleted") from None
        self.release()  # before the reply: the client may connect again at once
        self.reply(221, "Bye")

    def do_SUBSCRIBE(self, arg: str) -> None:
        """SUBSCRIBE - sends each message as it comes, until you send a line"""
        self.numbers()
        self.reply(250, "Send a line to stop")
        while self.client_is_silent():
            for number in self.look():
                with suppress(Refused):  # a mail reader has deleted the message
                    self.send_message(number)
        self.read_line()
        self.reply(250, "Stopped")

    def client_is_silent(self) -> bool:
        """Wait 0.2 seconds for input. Return False if some has come, or its end, else True."""
        self.connection.settimeout(0.2)
        try:
            # peek() looks into the buffer of rfile, then into that of TLS, then waits.
            self.rfile.peek(1)  # type: ignore[attr-defined]
            return False
        except TimeoutError:
            # Trap: an rfile that has timed out never reads again. Its buffer is empty: take another
            self.rfile = self.connection.makefile("rb", self.rbufsize)
            return True
        except OSError:  # the connection is broken, which read_line() will find, too
            return False
        finally:
            self.connection.settimeout(self.timeout)


def wire_lines(file: Any) -> Iterator[bytes]:
    """Yield a file's lines, ended in CRLF; pieces of lines if they are longer than 64 KiB."""
    with file:
        piece = b""
        for piece in iter(partial(file.readline, 64 * 1024), b""):
            yield piece.replace(b"\n", b"\r\n")
        if not piece.endswith(b"\n"):
            yield b"\r\n"


# ==================================================================================================
# PART 6: THE PROGRAM


class Console(logging.Handler):
    """Prints what is logged, in a thread of its own, so that a terminal that is stuck, as after
    Ctrl-S, stops nobody. Replies are green for yes, yellow for not now, red for no."""

    def __init__(self) -> None:
        """Start the thread."""
        super().__init__()
        old_windows = os.name == "nt" and "WT_SESSION" not in os.environ  # knows no colours
        self.coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and not old_windows
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()  # "" is the end
        self.printer = threading.Thread(target=self.print_lines, daemon=True)
        self.printer.start()

    def emit(self, record: logging.LogRecord) -> None:
        """Have a record printed; drop the record if ten thousand wait."""
        line = self.format(record)
        reply = re.match(r"\[[^]]*\] S: ([2345+-])", line)
        if reply and self.coloured:
            colour = {"4": 33, "5": 31, "-": 31}.get(reply[1], 32)
            line = f"\x1b[{colour}m{line}\x1b[0m"
        if self.lines.qsize() < 10_000:
            self.lines.put(line + "\n")

    def print_lines(self) -> None:
        """Print what comes: all that waits in one go; one line at a time would be too slow."""
        while True:
            waiting = [self.lines.get()]
            waiting += [self.lines.get() for _ in range(self.lines.qsize())]
            data = "".join(waiting).encode(sys.stdout.encoding or "utf-8", "backslashreplace")
            with suppress(OSError):  # nobody reads it
                while data:  # Trap: not print(), which holds a lock that Python waits for at exit
                    data = data[os.write(sys.stdout.fileno(), data) :]
            if "" in waiting:  # from close()
                return

    def close(self) -> None:
        """Wait until the last lines are printed, a second at most. logging calls this at exit."""
        self.lines.put("")
        self.printer.join(1)
        super().close()


def positive(text: str) -> int:
    """Return a number above 0 from a flag. Raise ValueError."""
    if not 0 < int(text) <= 10**9:
        raise ValueError
    return int(text)


def failure(text: str) -> tuple[str, int]:
    """Return the verb and the code in "RCPT=450". Raise ValueError."""
    verb, _, code = text.upper().partition("=")
    if not 400 <= int(code) <= 599:
        raise ValueError
    return verb, int(code)


def mailing_list(text: str) -> tuple[str, list[str]]:
    """Return the name and the members in "team=ann@x.org,bob@x.org". Raise ValueError."""
    name, _, members = text.partition("=")
    for member in members.split(","):
        if not name or "@" in name or not re.fullmatch(ESMTPHandler.address_pattern, member):
            raise ValueError
    return name, members.split(",")


def users_file(path: str) -> dict[str, str]:
    """Return names and passwords, from lines of name:password. Raise OSError or ValueError."""
    with open(path, encoding="utf-8-sig") as file:
        lines = [line.strip() for line in file]
    users = dict(line.split(":", 1) for line in lines if line and not line.startswith("#"))
    if not users or "" in users or "" in users.values():
        raise ValueError
    return users


def make_parser() -> argparse.ArgumentParser:
    """Return what reads the command line."""
    about = "A mail server to learn from, and to send mail to from programs under test."
    example = "Try: mailserver.py --fail RCPT=450; mailserver.py --maildir Maildir --pop3-port 2526"
    parser = argparse.ArgumentParser(
        prog="mailserver.py", usage=argparse.SUPPRESS, description=about, epilog=example
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1); 0.0.0.0 is all")
    add("--port", type=int, default=2525, help="port to listen on (2525); 0 takes a free one")
    add("--smtps-port", type=int, help="a port with TLS from the first byte; needs --tls")
    add("--pop3-port", type=int, help="a port where mail can be collected; needs --maildir")
    add("--maildir", type=Maildir, metavar="DIR", help="keep the mail in this directory")
    add("--tls", nargs=2, metavar=("CERT", "KEY"), help="offer TLS; make cert makes both files")
    add("--users", type=users_file, default={}, metavar="FILE", help="lines of name:password")
    add("--require-auth", action="store_true", help="take mail only after AUTH")
    hint = "list of people: team=a@x,b@x"
    add("--list", action="append", default=[], dest="lists", type=mailing_list, help=hint)
    add("--fail", action="append", default=[], type=failure, help="refuse a command: RCPT=450")
    add("--serial", action="store_true", help="serve one client at a time")
    add("--max-size", type=positive, help="octets in a message (10485760)")
    add("--max-clients", type=positive, help="clients at the same time (500)")
    add("--timeout", type=positive, help="seconds to wait for a client (300; with POP3 600)")
    add("--quiet", action="store_true", help="do not show the dialogues")
    add("--version", action="version", version=f"mailserver {__version__}")
    return parser


def tls_context(cert: str, key: str) -> ssl.SSLContext:
    """Return what TLS needs, from the files of a certificate and its key. Raise ValueError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(cert, key, password="")  # no password, or OpenSSL would ask for one
    except OSError as error:
        raise ValueError(f"cannot use --tls {cert} {key}: {error}") from None
    return context


def make_servers(flags: argparse.Namespace, handler: type[SecureHandler]) -> dict[str, MailServer]:
    """Return the servers that the flags ask for, by protocol. Raise ValueError."""
    if flags.smtps_port is not None and not flags.tls:
        raise ValueError("--smtps-port needs --tls CERT KEY")
    if flags.pop3_port is not None and not flags.maildir:
        raise ValueError("--pop3-port needs --maildir DIR")
    flags.lists = dict(flags.lists)
    flags.fail = dict(flags.fail)
    for verb in flags.fail:
        if not hasattr(handler, "do_" + verb):
            raise ValueError(f"--fail {verb}: there is no such command")
    if flags.tls:
        flags.tls = tls_context(*flags.tls)
    servers = {"SMTP": listen(flags, flags.port, handler)}
    if flags.smtps_port is not None:
        servers["SMTPS"] = listen(flags, flags.smtps_port, handler, tls_first=True)
    if flags.pop3_port is not None:
        servers["POP3"] = listen(flags, flags.pop3_port, POP3Handler)
    return servers


def listen(flags: Any, port: int, handler: type[LineHandler], **settings: Any) -> MailServer:
    """Return a server at a port, with the flags that its handler knows. Raise ValueError."""
    for name, value in vars(flags).items():
        known = hasattr(handler, name) or name in ("serial", "subscribers")
        if known and value:  # a flag that was not given is None, False or empty
            settings[name] = value
    try:
        return MailServer((flags.host, port), handler, **settings)
    except (OSError, OverflowError, TypeError, UnicodeError) as error:  # as bind() says it
        text = f"cannot listen on --host {flags.host}, port {port}: {error}; choose another"
        raise ValueError(text) from None


def interrupt(*_: object) -> None:
    """Raise KeyboardInterrupt at the first Ctrl-C or TERM. Do nothing at the next ones."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def main(
    argv: list[str] | None = None,
    handler: type[SecureHandler] = SecureHandler,
    subscribers: Iterable[Callable[[Envelope], object]] = (),
) -> None:
    """Run the program: read the flags, listen, serve until Ctrl-C or TERM, stop."""
    if hasattr(os, "sched_setaffinity"):
        # Trap: on two cores, threads take the interpreter's lock from each other all the time
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    parser = make_parser()
    try:
        flags = parser.parse_args(argv)
        flags.subscribers = [flags.maildir.keep] if flags.maildir else []
        flags.subscribers += subscribers
        servers = make_servers(flags, handler)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if sys.stdout:
        console.addHandler(Console())
    console.setLevel(logging.WARNING if flags.quiet else logging.INFO)
    with suppress(KeyboardInterrupt):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, interrupt)
        for name, server in servers.items():
            place = f"{server.host} port {server.port} ({name})"
            console.warning("mailserver %s listens on %s", __version__, place)
        if not flags.host.startswith(("127.", "::1", "localhost")):
            console.warning("mailserver: other machines can reach this server, and send mail to it")
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(flags.host, flags.host)
        telnet = f"telnet {host} {servers['SMTP'].port}"
        console.info("Try it in another terminal of this machine: %s; stop it with Ctrl-C", telnet)
        serve(*servers.values())


if __name__ == "__main__":
    main()
