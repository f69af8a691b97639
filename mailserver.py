#!/usr/bin/env python3
"""A mail server to read in one sitting, then telnet into. One file, standard library only.

Run it with "python mailserver.py", type "telnet 127.0.0.1 2525" in a second terminal, and talk:

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

C is the client, you; S is the server, this file. That is the whole idea of SMTP, the Simple Mail
Transfer Protocol (RFC 5321): the client sends a line that starts with a verb, and the server
answers with a three-digit code and a text for people. 2xx is yes, 3xx is "go on", 4xx is "not
now, try later", 5xx is "no".

The file is a course. Each part only adds to the one before; you may stop after any of them:

    1  A small server       lines in, replies out, five commands, a thread for each client
    2  Good manners         people who mistype, browsers that stray in, clients that never leave
    3  Start and stop       the whole server, what the console shows, the command line

The rest of what you need to know stands where it is used. "RFC 5321 4.5.2" is section 4.5.2 of
that document; each is found at https://www.rfc-editor.org/rfc/rfc5321.
"""

from __future__ import annotations

import argparse
import errno
import io
import itertools
import os
import re
import signal
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

__version__ = "1.0"

# ==================================================================================================
# PART 1: A SMALL SERVER
# From the bottom up: LineHandler knows lines and replies, SMTPHandler knows mail, SmallServer gives
# each client a thread. It runs alone: cut the file at the banner of part 2, and call serve().
# ==================================================================================================


class Refused(Exception):
    """Raise it to say no: Refused(503, "Send HELO first"). 4xx is not now, 5xx never, 421 bye."""


class LineHandler(socketserver.StreamRequestHandler):
    """One session of any protocol in which the client sends a line and the server answers it.

    A command is a method: with a do_TIME(self, arg) there is a command TIME. The first line of its
    docstring is its syntax. It ends in one reply(), or it raises Refused.
    """

    server: SmallServer
    line_limit = 512  # octets, line end included (RFC 5321 4.5.3.1.4)
    disable_nagle_algorithm = True  # send a reply at once: no more will come to fill the packet
    rbufsize = 0  # no buffer in socketserver, since there is one here
    newline = b"\r\n"  # how the client's last line ended
    code = 0  # of the last reply

    def setup(self) -> None:
        """Prepare a session; socketserver calls setup(), handle() and finish(), in this order."""
        super().setup()
        self.number = next(self.server.numbers)
        self.received = bytearray()  # from the client, and not used yet
        self.unsent = bytearray()  # replies that wait to be sent

    def handle(self) -> None:
        """Greet the client, then answer line after line until one side hangs up."""
        try:
            self.reply(220, "Simple Mail Server")
            while self.code not in (221, 421):  # the replies that promise to hang up
                try:
                    line = self.read_line()
                    self.log("C", line)
                    self.dispatch(line)
                except Refused as refusal:
                    self.reply(*refusal.args)
            self.flush()
        except (EOFError, OSError) as error:
            self.log("-", f"gone without QUIT {error}")

    def receive(self) -> None:
        """Wait for more bytes from the client. EOFError: it has hung up."""
        self.flush()  # and not sooner: ten commands in one packet get ten replies in one packet
        data = self.connection.recv(64 * 1024)
        if not data:
            raise EOFError
        self.received += data

    def flush(self) -> None:
        """Send the replies that wait. OSError, here and in receive(): the connection broke."""
        if self.unsent:
            self.connection.sendall(self.unsent)
            self.unsent.clear()

    def read_line(self) -> str:
        """Give the next line. CRLF ends it (RFC 5321 2.3.8), or a bare LF: nc sends nothing else.
        Refused(500): it is longer than line_limit."""
        while (end := self.received.find(b"\n") + 1) == 0:
            del self.received[self.line_limit :]  # forget the end, but not that it is too long
            self.receive()
        line = self.received[:end]
        del self.received[:end]
        if end > self.line_limit:  # Trap: its tail must not count as a command
            raise Refused(500, f"Line too long: send {self.line_limit} octets at most")
        self.newline = b"\r\n" if line.endswith(b"\r\n") else b"\n"
        return line.decode("utf-8", "surrogateescape").rstrip()

    def dispatch(self, line: str) -> None:
        """Run the method that the first word names: "time UTC" calls do_TIME("UTC")."""
        verb, _, arg = line.partition(" ")
        command = getattr(self, "do_" + verb.upper(), None)
        if not command:
            raise Refused(500, "Unknown command: send one of " + " ".join(self.verbs()))
        command(arg.strip())

    def verbs(self) -> list[str]:
        """Give the verbs of all commands."""
        return [name[3:] for name in dir(self) if name.startswith("do_")]

    def match(self, verb: str, pattern: str, arg: str) -> re.Match[str]:
        """Take a command's argument apart. Refused(501): it does not fit the pattern."""
        if match := re.fullmatch(pattern, arg, re.IGNORECASE):
            return match
        doc = getattr(self, "do_" + verb).__doc__ or verb  # python -OO leaves no docstrings
        raise Refused(501, "Syntax: " + doc.partition("\n")[0])

    def reply(self, code: int, *lines: str) -> None:
        """Answer with a line or more; "-" behind the code says: more to come (RFC 5321 4.2.1)."""
        for n, line in enumerate(lines, 1):
            self.send_line(f"{code}{' ' if n == len(lines) else '-'}{line}")
        self.code = code

    def send_line(self, line: str) -> None:
        """Send a line. Trap: a CR or LF inside would make it two, so none is let through."""
        line = line.replace("\r", " ").replace("\n", " ")
        self.log("S", line)
        self.unsent += line.encode() + b"\r\n"

    def log(self, who: str, text: str) -> None:
        """Show a line on the console: who is "C" or "S", or "-" for a remark."""
        if self.server.console:
            text += "<LF>" if who == "C" and self.newline == b"\n" else ""
            self.server.console.show(f"[{self.number}] {who}: {printable(text)}")


class Envelope:
    """A message and where it goes. As on paper, what the letter says of that does not count.

    sender: the reverse-path, to which it bounces; "" is nowhere (RFC 5321 4.5.5). content: bytes.
    """

    def __init__(self, sender: str) -> None:
        self.sender = sender
        self.recipients: list[str] = []
        self.content = bytearray()  # use it as bytes, which would need a copy of a large message


class SMTPHandler(LineHandler):
    """The five commands that bring a message, as in the dialogue at the top of this file.

    Their order is kept by what the session holds: no helo, no MAIL; no envelope, no RCPT.
    """

    helo = ""
    envelope: Envelope | None = None
    path = "<([!-;=?-~]+)>"  # any address: ASCII in brackets, no blanks and no control characters

    # CRLF.CRLF ends a message; and LF.LF, if the DATA command ended in LF: somebody is at nc.
    # Trap: take LF.LF from all, and a message can smuggle another one in through a relay that
    # forwards it unread (CVE-2023-51764). A relay ends its DATA command in CRLF.
    end_of_message = {
        b"\r\n": re.compile(rb"\r\n\.\r\n"),
        b"\n": re.compile(rb"\r\n\.\r\n|\n\.\n"),
    }

    def do_HELO(self, arg: str) -> None:
        """HELO your-domain.example
        Says who you are, and starts afresh (RFC 5321 4.1.1.1)."""
        self.helo, self.envelope = self.match("HELO", "[!-~]+", arg)[0], None
        self.reply(250, "Hello")

    def do_MAIL(self, arg: str) -> None:
        """MAIL FROM:<sender@example.com>
        Opens an envelope: says who sends, and gets the bounce (RFC 5321 4.1.1.2)."""
        if not self.helo:
            raise Refused(503, "Send HELO before MAIL FROM")
        if self.envelope:
            raise Refused(503, "Send RCPT TO and DATA before another MAIL FROM")
        match = self.match("MAIL", f"FROM: *(?:<>|{self.path})", arg)
        self.envelope = Envelope(match[1] or "")
        self.reply(250, "OK")

    def do_RCPT(self, arg: str) -> None:
        """RCPT TO:<recipient@example.com>
        Says who gets it; once for each recipient (RFC 5321 4.1.1.3)."""
        if not self.envelope:
            raise Refused(503, "Send MAIL FROM before RCPT TO")
        if len(self.envelope.recipients) >= 1000:  # 100 is the least: RFC 5321 4.5.3.1.8
            raise Refused(452, "Too many recipients: send DATA, and the rest in a message more")
        self.envelope.recipients.append(self.match("RCPT", "TO: *" + self.path, arg)[1])
        self.reply(250, "OK")

    def do_DATA(self, arg: str) -> None:
        """DATA
        Sends the message, up to a line that is a dot (RFC 5321 4.1.1.4)."""
        self.match("DATA", "", arg)
        if not self.envelope:
            raise Refused(503, "Send MAIL FROM before DATA")
        if not self.envelope.recipients:
            raise Refused(503, "Send RCPT TO before DATA")
        self.reply(354, "End data with <CR><LF>.<CR><LF>")
        envelope, self.envelope = self.envelope, None  # accepted or not, it is used up
        envelope.content = self.read_message()
        self.server.deliver(envelope)
        self.reply(250, "Message accepted")

    def read_message(self) -> bytearray:
        """Give the message. The dot that the client put before a line's own is dropped (RFC 5321
        4.5.2). Refused(552): the message is too big; it was read to its end all the same."""
        newline, text, start = self.newline, self.received, 0
        limit = self.server.max_size + len(newline)
        text[:0] = newline  # DATA's own: behind it starts the first line
        while not (end := self.end_of_message[newline].search(text, start)):
            del text[limit:-4]  # too big: forget the middle, but not that it is too big
            start = max(0, len(text) - 4)  # the mark may come in pieces
            self.receive()
        self.received = text[end.end() :]
        del text[text.rindex(b".", 0, end.end()) :]
        self.log("C", ".")
        if len(text) > limit:
            raise Refused(552, f"Message too big: send {self.server.max_size} octets at most")
        if newline + b"." in text:  # Trap: a bare LF within a CRLF message starts no line
            text = text.replace(newline + b".", newline)
        del text[: len(newline)]
        return text

    def do_QUIT(self, arg: str) -> None:
        """QUIT
        Ends the session (RFC 5321 4.1.1.10)."""
        self.match("QUIT", "", arg)
        self.reply(221, "Bye")


def printable(text: str) -> str:
    """Escape what could drive the terminal: a client may send what clears it, or types into it."""
    escaped = (c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if text.isprintable() else "".join(escaped)


class Console:
    """Prints what happens. Its lock keeps the lines of two threads apart."""

    lock = threading.Lock()

    def show(self, *lines: str) -> None:
        """Print the lines in one go."""
        with self.lock:
            print(*lines, sep="\n", flush=True)

    def message(self, envelope: Envelope) -> None:
        """Print an accepted message: the envelope, then what was in it."""
        to = [f"to <{address}>" for address in envelope.recipients]
        text = envelope.content.decode("utf-8", "backslashreplace").splitlines()
        self.show(*map(printable, ["----", f"from <{envelope.sender}>", *to, "", *text, "----"]))


class SmallServer(socketserver.ThreadingTCPServer):
    """Waits for clients at an address, a host and a port, and runs a handler for each."""

    daemon_threads = True  # clients that are still there don't keep the program from ending
    allow_reuse_address = os.name != "nt"  # restart at once; on Windows: two servers, one port
    numbers = itertools.count(1)  # for the sessions
    serial = False  # serve one client at a time
    max_size = 10 * 2**20  # octets in a message
    console: Console | None = None  # None prints nothing

    def process_request(self, request: Any, client_address: Any) -> None:
        """Serve a client that has connected: right here, or in a thread of its own."""
        if self.serial:
            self.process_request_thread(request, client_address)  # the next client has to wait
        else:
            super().process_request(request, client_address)

    def deliver(self, envelope: Envelope) -> None:
        """Take an accepted message: here, print it."""
        if self.console:
            self.console.message(envelope)


def serve(port: int = 2525, serial: bool = False) -> None:
    """Run the small server until Ctrl-C."""
    with SmallServer(("127.0.0.1", port), SMTPHandler) as server, suppress(KeyboardInterrupt):
        server.serial, server.console = serial, Console()
        print("Listening on port", server.server_address[1], flush=True)
        server.serve_forever()


# ==================================================================================================
# PART 2: GOOD MANNERS
# What a server needs besides commands once people connect to it: they mistype, or stay for ever.
# Some are no people at all. None of this knows SMTP, so it goes with any LineHandler.
# ==================================================================================================


def warn(text: str) -> None:
    """Tell the person who runs the server."""
    print("mailserver:", printable(text), file=sys.stderr, flush=True)


class Manners(LineHandler):
    """A mixin: name it before a LineHandler, as in class ESMTPHandler(Manners, SMTPHandler)."""

    server: MailServer
    errors = 0
    farewell = ""  # why the server hangs up on this client, once it does

    # Telnet's own codes, which a real Telnet server would answer: IAC and one byte, or two after
    # WILL, WON'T, DO and DON'T, or all up to IAC SE after SB (RFC 854). Here as read_line() has
    # them: bytes that are no UTF-8 become U+DC80 and up.
    telnet = re.compile("\udcff(?:[\udcfb-\udcfe].|\udcfa.*?\udcff\udcf0|.)", re.DOTALL)

    def setup(self) -> None:
        """Prepare a session that the server can end."""
        super().setup()
        self.heard = time.monotonic()  # when the client last sent something
        self.server.sessions.add(self)
        if self.server.stopping.is_set():  # it has hung up on all the others already
            self.farewell = self.server.goodbye
        self.log("-", f"connected from {self.client_address[0]}")

    def finish(self) -> None:
        """Forget the session."""
        self.server.sessions.discard(self)
        super().finish()

    def hang_up(self, farewell: str) -> None:
        """End the session, from another thread: it says 421 and the farewell, then hangs up.

        No other thread writes to the client: the two might write at once. Instead, this one stops
        the flow of bytes to receive(). A second call also stops a send that the client ignores.
        """
        how = socket.SHUT_RDWR if self.farewell else socket.SHUT_RD
        self.farewell = farewell
        with suppress(OSError):  # the client was quicker
            self.connection.shutdown(how)

    def receive(self) -> None:
        """Wait for more bytes. Refused(421): hang_up() was called."""
        try:
            if self.farewell:
                raise EOFError
            super().receive()
        except (EOFError, OSError):
            if self.farewell:
                raise Refused(421, self.farewell) from None
            raise
        self.heard = time.monotonic()

    def read_line(self) -> str:
        """Give the next line as it was meant: backspace and DEL edit it, telnet's codes go."""
        line = super().read_line()
        if line.isprintable():
            return line
        typed: list[str] = []
        for character in self.telnet.sub("", line):
            if character in "\b\x7f":
                del typed[-1:]
            else:
                typed.append(character)
        return "".join(typed)

    def dispatch(self, line: str) -> None:
        """Run a command, if this is one. What breaks inside it does not end the session."""
        verb = line.partition(" ")[0].upper()
        if verb in ("GET", "POST", "CONNECT"):  # a web page can make your browser send mail here
            raise Refused(421, "This is a mail server: point your browser to another port")
        if code := self.server.fail.get(verb):
            return super().reply(code, "Refused on purpose: the server was started with --fail")
        try:
            super().dispatch(line)
        except (Refused, EOFError, OSError):
            raise
        except Exception as error:
            warn(f"{verb} failed: {error!r}")
            raise Refused(451, "The server failed at this command: try again later") from None

    def reply(self, code: int, *lines: str) -> None:
        """Answer, and hang up after 20 errors: somebody who makes that many is guessing."""
        super().reply(code, *lines)
        self.errors += code >= 500
        if self.errors == 20 and code >= 500:
            super().reply(421, "Too many errors: read up, then connect again")


class ESMTPHandler(Manners, SMTPHandler):
    """What every mail server has besides the five commands."""

    # A line of a message that somebody may have meant for the server
    stray = re.compile(
        rb"\n(?:HELO|EHLO|HELP|QUIT|RSET|NOOP|DATA|MAIL FROM:.*|RCPT TO:.*)\s*\Z", re.I
    )

    def do_RSET(self, arg: str) -> None:
        """RSET
        Drops the message that is under way (RFC 5321 4.1.1.5)."""
        self.match("RSET", "", arg)
        self.envelope = None
        self.reply(250, "OK")

    def do_NOOP(self, arg: str) -> None:
        """NOOP
        Does nothing, successfully (RFC 5321 4.1.1.9)."""
        self.reply(250, "OK")

    def receive(self) -> None:
        """Wait for more bytes; within a message, note when they look like a command."""
        super().receive()
        if self.code == 354 and self.server.console and self.stray.search(self.received[-400:]):
            self.log("-", "that went into the message, which a line with a single dot ends")


# ==================================================================================================
# PART 3: START AND STOP
# The server that this program runs, what the class sees of it, and the command line.
# ==================================================================================================


class MailServer(SmallServer):
    """The whole server: it holds the settings, and knows who is connected. For a test suite:

        with MailServer(("127.0.0.1", 0)) as server:  # port 0 takes any that is free
            server.subscribe(inbox.append)  # or any function that takes an Envelope
            server.start()
            host, port = server.server_address

    address, handler: as for socketserver. settings: values for the attributes below, by name.
    """

    block_on_close = False  # keep no list of threads, which socketserver would search each time
    request_queue_size = 1024  # may wait at the door; after socketserver's 5, one waits for seconds
    max_clients = 1010  # each takes a file descriptor, and 1024 is a common limit
    timeout: float = 300  # seconds without a word from the client (RFC 5321 4.5.3.2.7)
    fail: dict[str, int] = {}  # commands to refuse on purpose, and the codes to do it with
    goodbye = "The server is stopping: try again later"
    grace: float = 2  # seconds for the sessions to end when the server stops
    serving = False

    def __init__(
        self, address: Any = ("127.0.0.1", 2525), handler: Any = ESMTPHandler, **settings: Any
    ) -> None:
        """Listen. TypeError: no such setting. OSError: the address is not to be had."""
        for name, value in settings.items():
            if not hasattr(self, name):
                raise TypeError(f"MailServer has no setting {name!r}")
            setattr(self, name, value)
        self.sessions: set[Manners] = set()
        self.stopping = threading.Event()
        self.subscribers: list[Callable[[Envelope], object]] = []
        if ":" in address[0]:
            self.address_family = socket.AF_INET6
        super().__init__(address, handler)

    def start(self) -> None:
        """Serve in a thread of its own. Returns at once."""
        self.serving = True
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def serve_forever(self, poll_interval: float = 0.1) -> None:
        """Serve until another thread calls stop()."""
        self.serving = True
        threading.Thread(target=self.watch, daemon=True).start()
        super().serve_forever(poll_interval)

    def stop(self) -> None:
        """Say 421 to every client, give their sessions a little time to end, free the port."""
        self.stopping.set()
        self.hang_up(self.goodbye)
        if self.serving:
            self.shutdown()
        self.server_close()
        deadline = time.monotonic() + self.grace
        while self.sessions and time.monotonic() < deadline:
            time.sleep(0.01)
        self.hang_up(self.goodbye)  # whoever is left does not read what it is sent

    def __exit__(self, *exception: object) -> None:
        """The with block ends: stop."""
        self.stop()

    def hang_up(self, farewell: str, heard_before: float = float("inf")) -> None:
        """End the sessions that were last heard of before a time, on time.monotonic()'s clock."""
        for session in list(self.sessions):
            if session.heard < heard_before:
                session.hang_up(farewell)

    def watch(self) -> None:
        """Hang up on idle clients. A time limit on each socket would do it too, at the price of
        one more system call at each read; a look at all of them each second is cheaper."""
        while not self.stopping.wait(min(1, self.timeout / 4)):
            self.hang_up("Nothing heard for too long", time.monotonic() - self.timeout)

    def get_request(self) -> Any:
        """Accept a client. OSError: there is no file descriptor left for it. It will be there in
        a moment, too; without a pause, socketserver would try again and again until then."""
        try:
            return super().get_request()
        except OSError:
            time.sleep(0.1)
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Turn away one client too many."""
        if len(self.sessions) < self.max_clients:
            return True
        with suppress(OSError):
            request.sendall(b"421 Too many clients: try again later\r\n")
        return False

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say in a line what ended a session; socketserver would print a traceback."""
        warn(f"session ended: {sys.exc_info()[1]!r}")

    def subscribe(self, subscriber: Callable[[Envelope], object]) -> None:
        """Have a function called with each accepted message, in the thread of its session."""
        self.subscribers.append(subscriber)

    def deliver(self, envelope: Envelope) -> None:
        """Hand an accepted message to all who subscribed."""
        super().deliver(envelope)
        for subscriber in self.subscribers:
            subscriber(envelope)


class Projector(Console):
    """A console for the class: colours; the Bcc, odd line ends and encoded text made visible."""

    colours = {"C": "\x1b[32m", "S": "\x1b[34m"}

    def __init__(self) -> None:
        self.coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def show(self, *lines: str) -> None:
        """Print the lines; not at all once the terminal is gone."""
        if self.coloured:
            paint = lambda m: f"{m[1]}{self.colours[m[2]]}{m[2]}\x1b[0m:"  # noqa: E731
            lines = tuple(re.sub(r"^(\[\d+\] )([CS]):", paint, line) for line in lines)
        with suppress(OSError):
            super().show(*lines)

    def message(self, envelope: Envelope) -> None:
        """Print an accepted message: its envelope, the bytes as they came, then encoded text."""
        import email.utils  # here, since a server that is --quiet starts sooner without it

        mail = email.message_from_bytes(envelope.content)
        headers = [str(value) for value in mail.values()]
        named = {address.lower() for _, address in email.utils.getaddresses(headers)}
        lines = ["---- envelope", f"from <{envelope.sender}>"]
        for address in envelope.recipients:
            hidden = headers and address.lower() not in named
            lines.append(f"to   <{address}>" + "   (in no header: this is a Bcc)" * bool(hidden))
        lines.append("---- message")
        for line in envelope.content.decode("utf-8", "backslashreplace").split("\n"):
            lines.append(line.removesuffix("\r") if line.endswith("\r") else line + "<LF>")
        lines[-1] = lines[-1].removesuffix("<LF>")
        for part in mail.walk():
            encoding = str(part.get("Content-Transfer-Encoding")).lower()
            if encoding in ("base64", "quoted-printable") and not part.is_multipart():
                lines += [f"---- the same, decoded from {encoding}", *decoded(part).split("\n")]
        self.show(*map(printable, lines), "----")


def decoded(part: Any) -> str:
    """Give a part of a message as text, whatever it claims to be encoded in."""
    payload: bytes = part.get_payload(decode=True)
    try:
        return payload.decode(part.get_content_charset("utf-8"), "backslashreplace")
    except (LookupError, ValueError):  # no such character set, or none at all
        return payload.decode("latin-1")


EXAMPLES = """\
examples:
  mailserver.py                      listen on 127.0.0.1 port 2525, and print each mail
  mailserver.py --serial             one client at a time: the next one waits for its turn
  mailserver.py --fail RCPT=450      refuse each recipient, to see what a client makes of it
  mailserver.py --host 0.0.0.0       let other machines in: no password, no encryption
"""


def number(least: int, most: int) -> Callable[[str], int]:
    """Give the function that reads a flag's value: a whole number within bounds."""

    def read(text: str) -> int:
        if text.isdecimal() and least <= int(text) <= most:
            return int(text)
        raise argparse.ArgumentTypeError(f"give a whole number from {least} to {most}")

    return read


def failure(text: str) -> tuple[str, int]:
    """Read the value of --fail: a verb and a code."""
    if match := re.fullmatch("([A-Za-z]+)=([45][0-9][0-9])", text):
        return match[1].upper(), int(match[2])
    raise argparse.ArgumentTypeError("give a command and a code from 400 to 599, as in RCPT=450")


class ArgumentParser(argparse.ArgumentParser):
    """Says in one line what is wrong with the flags."""

    def error(self, message: str) -> NoReturn:
        """End the program, with status 2."""
        self.exit(2, f"mailserver: {message} (--help shows examples)\n")


def read_flags(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; None: the program's own. A bad flag ends the program."""
    parser = ArgumentParser(
        prog="mailserver.py",
        description="A mail server for class and desk.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flag = parser.add_argument
    flag("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    flag(
        "--port", type=number(0, 65535), default=2525, help="2525 if not given; 0 picks a free one"
    )
    flag("--serial", action="store_true", help="serve one client at a time")
    flag("--max-size", type=number(1, 2**40), metavar="OCTETS", help="of a message (10 MiB)")
    flag("--max-clients", type=number(1, 10**6), metavar="N", help="at the same time (1010)")
    flag("--timeout", type=number(1, 10**6), metavar="SECONDS", help="hang up on the idle (300)")
    flag("--fail", type=failure, action="append", metavar="VERB=CODE", help="refuse a command")
    flag("--quiet", action="store_true", help="print neither dialogue nor mail")
    flag("--version", action="version", version=f"mailserver {__version__}")
    return parser.parse_args(argv)


def listen(host: str, port: int, handler: Any, **settings: Any) -> MailServer:
    """Make a server; end the program if it can't have the address."""
    try:
        return MailServer((host, port), handler, **settings)
    except OSError as error:
        reason = error.strerror or error
        if error.errno == errno.EADDRINUSE:
            reason = "it is in use; stop the other server, or choose another --port"
        elif error.errno == errno.EACCES:
            reason = "not allowed; choose a --port above 1023"
        sys.exit(f"mailserver: cannot listen on {host} port {port}: {reason}")


def main(argv: list[str] | None = None, handler: Any = ESMTPHandler) -> None:
    """Run the program: read the flags, listen, serve, wait for Ctrl-C or TERM, stop."""
    flags = read_flags(argv)
    settings = {"fail": dict(flags.fail or ()), "serial": flags.serial}
    for name in ("max_size", "max_clients", "timeout"):
        if getattr(flags, name):
            settings[name] = getattr(flags, name)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal may lack a client's letters
        sys.stdout.reconfigure(errors="backslashreplace")
    stopped: list[int] = []
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, lambda sign, _: stopped.append(sign))
    console = None if flags.quiet else Projector()
    server = listen(flags.host, flags.port, handler, console=console, **settings)
    host, port = str(server.server_address[0]), server.server_address[1]
    print(f"mailserver {__version__} listens on {host} port {port}", flush=True)
    if console:
        console.show(
            f"To try it, type in another terminal: telnet {host} {port}", "To stop it: Ctrl-C"
        )
    if not host.startswith("127.") and host != "::1":
        warn("other machines can reach this server: anyone there may send to it")
    server.start()
    while not stopped:
        time.sleep(0.1)
    server.stop()


if __name__ == "__main__":
    main()
