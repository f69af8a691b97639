#!/usr/bin/env python3
"""A mail server to read in one sitting, and to telnet into. One file, standard library only.

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

C is the client, you; S is the server, this file. That is SMTP, the Simple Mail Transfer Protocol
(RFC 5321): the client sends a line that starts with a verb, the server answers with a code and a
text. 2xx is yes, 3xx is "go on", 4xx is "not now", 5xx is "no". The file is a course, of which
each part only adds to the ones before it; you may stop reading after any of them. Comments that
start with "Trap:" mark what looks like it could be left out, or done the easy way.

    1  A small server       lines in, replies out, five commands, a thread for each client
    2  The whole protocol   people who mistype, the other commands, addresses, extensions
    3  Trust                encryption and passwords
    4  Keeping mail         publish and subscribe; mail on disk
    5  Collecting mail      another protocol, POP3, on the same foundation
    6  Start and stop       the server that runs, what the class sees of it, the command line

"RFC 5321 4.5.2" is section 4.5.2 of that standard: https://www.rfc-editor.org/rfc/rfc5321"""

from __future__ import annotations

import argparse
import base64
import errno
import io
import itertools
import os
import queue
import re
import selectors
import signal
import socket
import socketserver
import sys
import threading
import time
from contextlib import suppress

TYPE_CHECKING = False  # a type checker takes it for True; Python need not load these
if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable
    from typing import Any

__version__ = "1.0"

# ==================================================================================================
# PART 1: A SMALL SERVER
# From the bottom up: LineHandler knows lines and replies, SMTPHandler knows mail, SmallServer gives
# each client a thread. It runs alone: cut the file at the banner of part 2, and call serve().


class Refused(Exception):
    """Raise it to say no: Refused(503, "Send HELO first"). 4xx is not now, 5xx never, 421 bye."""


def refuse(when: object, code: int, text: str) -> None:
    """Say no, when there is reason to: refuse(not self.helo, 503, "Send HELO first")."""
    if when:
        raise Refused(code, text)


class LineHandler(socketserver.StreamRequestHandler):
    """One session of any protocol in which the client sends a line and the server answers it.

    A command is a method: with a do_TIME(self, arg) there is a command TIME, which its docstring
    explains, first the syntax. It ends in one reply(), or it raises Refused."""

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
            del self.received[self.line_limit :]  # too long already; stay so, and keep no more
            self.receive()
        line = self.received[:end]
        del self.received[:end]  # Trap: first, or its end would pass for the next command
        refuse(end > self.line_limit, 500, f"Line too long: send {self.line_limit} octets at most")
        self.newline = b"\r\n" if line.endswith(b"\r\n") else b"\n"
        return line.decode("utf-8", "surrogateescape").rstrip()  # makes "\udcff" of a lone byte FF

    def dispatch(self, line: str) -> None:
        """Run the method that the first word names: "time UTC" calls do_TIME("UTC")."""
        verb, _, arg = line.partition(" ")
        command = getattr(self, "do_" + verb.upper(), None)
        if not command:  # not refuse(), for which verbs() would be called each time
            raise Refused(500, "Unknown command: send one of " + " ".join(self.verbs()))
        command(arg.strip())

    def verbs(self) -> list[str]:
        """Give the verbs of all commands."""
        return [name[3:] for name in dir(self) if name.startswith("do_")]

    def match(self, verb: str, pattern: str, arg: str) -> re.Match[str]:
        """Take a command's argument apart. Refused(501): it does not fit the pattern."""
        if match := re.fullmatch(pattern, arg, re.IGNORECASE):
            return match
        raise Refused(501, "Syntax: " + self.explain(verb))

    def explain(self, verb: str) -> str:
        """Give the first line of a command's docstring, if python -OO has left it there."""
        return (getattr(self, "do_" + verb).__doc__ or verb).partition("\n")[0]

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

    sender: the reverse-path, where it bounces to; "" is nowhere (RFC 5321 4.5.5)."""

    def __init__(self, sender: str, session: int = 0) -> None:
        self.sender, self.session = sender, session
        self.recipients: list[str] = []
        self.content = bytearray()  # bytes would need a second copy of a large message
        self.trace = ""  # who brought it, and how; part 2 knows


class SMTPHandler(LineHandler):
    """The five commands that bring a message, as in the dialogue at the top of this file.

    Their order is kept by what the session holds: no helo, no MAIL; no envelope, no RCPT."""

    helo, protocol = "", "SMTP"
    envelope: Any = None  # or an Envelope, from MAIL on
    path = "<([!-;=?-~]+)>"  # an address in brackets: all that is visible in ASCII, but for < and >

    # CRLF.CRLF ends a message; and LF.LF, if the DATA command ended in LF: somebody is at nc.
    # Trap: take LF.LF from all, and a message can smuggle another one in through a relay that
    # forwards it unread (CVE-2023-51764). A relay ends its DATA command in CRLF.
    end_of_message = {
        b"\r\n": re.compile(rb"\r\n\.\r\n"),
        b"\n": re.compile(rb"\r\n\.\r\n|\n\.\n"),
    }

    def do_HELO(self, arg: str) -> None:
        """HELO your-domain.example - says who you are, and starts afresh (RFC 5321 4.1.1.1)"""
        self.helo, self.envelope = self.match("HELO", "[!-~]{1,255}", arg)[0], None
        self.protocol = "SMTP"
        self.reply(250, "Hello")

    def do_MAIL(self, arg: str) -> None:
        """MAIL FROM:<sender@example.com> - opens an envelope; bounces go there (RFC 5321 3.3)"""
        refuse(not self.helo, 503, "Send HELO before MAIL FROM")
        refuse(self.envelope, 503, "Send RCPT TO and DATA before another MAIL FROM")
        match = self.match("MAIL", f"FROM: *(?:<>|{self.path})", arg)
        self.envelope = Envelope(match[1] or "", self.number)
        self.reply(250, "OK")

    def do_RCPT(self, arg: str) -> None:
        """RCPT TO:<recipient@example.com> - says who gets it; may be repeated (RFC 5321 4.1.1.3)"""
        refuse(not self.envelope, 503, "Send MAIL FROM before RCPT TO")
        recipients = self.envelope.recipients  # RFC 5321 4.5.3.1.8: take at least 100
        refuse(len(recipients) >= 1000, 452, "Too many recipients: send DATA, then MAIL FROM again")
        recipients.append(self.match("RCPT", "TO: *" + self.path, arg)[1])
        self.reply(250, "OK")

    def do_DATA(self, arg: str) -> None:
        """DATA - sends the message, up to a line that is a dot (RFC 5321 4.1.1.4)"""
        self.match("DATA", "", arg)
        refuse(not self.envelope, 503, "Send MAIL FROM before DATA")
        refuse(not self.envelope.recipients, 503, "Send RCPT TO before DATA")
        self.reply(354, "End data with <CR><LF>.<CR><LF>")
        envelope, self.envelope = self.envelope, None  # accepted or not, it is used up
        envelope.content = self.read_message()
        self.deliver(envelope)
        self.reply(250, "Message accepted")

    def read_message(self) -> bytearray:
        """Give the message. The dot that the client put before a line's own is dropped (RFC 5321
        4.5.2). Refused(552): the message is too big; it was read to its end all the same."""
        newline, start, limit = self.newline, 0, self.server.max_size
        text = self.received  # not a copy: receive() adds to it
        text[:0] = newline  # DATA's own: what comes behind it starts a line
        while not (mark := self.end_of_message[newline].search(text, start)):
            del text[2 * limit : -4]  # too big, even if half of it is dots that will be dropped
            start = max(0, len(text) - 4)  # the mark may come in pieces
            self.receive()
        self.received = text[mark.end() :]
        del text[text.rindex(b".", 0, mark.end()) :]
        self.log("C", ".")
        if newline + b"." in text:  # Trap: a bare LF within a CRLF message starts no line
            text = text.replace(newline + b".", newline)
        del text[: len(newline)]
        refuse(len(text) > limit, 552, f"Message too big: send {limit} octets at most")
        return text

    def deliver(self, envelope: Envelope) -> None:
        """Take an accepted message: here, print it."""
        if self.server.console:
            self.server.console.message(envelope)

    def do_QUIT(self, arg: str) -> None:
        """QUIT - ends the session (RFC 5321 4.1.1.10)"""
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
            print("\n".join(lines), flush=True)

    def message(self, envelope: Envelope) -> None:
        """Print an accepted message: the envelope, then what was in it."""
        to = [f"to <{address}>" for address in envelope.recipients]
        text = envelope.content.decode("utf-8", "backslashreplace").splitlines()
        self.show(*map(printable, ["----", f"from <{envelope.sender}>", *to, "", *text, "----"]))


class SmallServer(socketserver.ThreadingTCPServer):
    """Waits for clients at an address, a host and a port, and runs a handler for each."""

    daemon_threads = True  # clients that are still there don't keep the program from ending
    allow_reuse_address = os.name != "nt"  # no wait at restart; Windows would share the port
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


def serve(port: int = 2525, serial: bool = False) -> None:
    """Run the small server until Ctrl-C."""
    with SmallServer(("127.0.0.1", port), SMTPHandler) as server, suppress(KeyboardInterrupt):
        server.serial, server.console = serial, Console()
        print("Listening on port", server.server_address[1], flush=True)
        server.serve_forever()


# ==================================================================================================
# PART 2: THE WHOLE PROTOCOL
# First what any server needs once people connect to it: they mistype, stay for ever, or are no
# people at all. Then the rest of SMTP: its other commands, addresses as they are, extensions.


def warn(text: str) -> None:
    """Tell the person who runs the server."""
    print("mailserver:", printable(text), file=sys.stderr, flush=True)


class Manners(LineHandler):
    """A mixin: name it before a LineHandler, and the session gets patience, and an end. It needs a
    MailServer, from part 6, as do all handlers from here on."""

    server: MailServer
    encrypted, user = False, ""  # part 3 sets them
    errors = 0
    full = b"421 Too many clients: try again later\r\n"
    stopped = "The server is stopping: try again later"
    farewell = ""  # why the server hangs up on this client, once it does

    # What a telnet client may say to a telnet server: IAC and a byte, or two if the first is WILL,
    # WON'T, DO or DON'T, or all from SB to SE (RFC 854). Byte FF is "\udcff" here.
    telnet = re.compile("\udcff(?:[\udcfb-\udcfe].|\udcfa.{,40}?\udcff\udcf0|.)", re.DOTALL)

    def setup(self) -> None:
        """Prepare a session that the server knows of, and can end."""
        super().setup()
        self.heard = time.monotonic()  # when the client last sent something
        self.server.sessions.add(self)
        if self.server.stopping.is_set():  # and all others have been told
            self.farewell = self.stopped
        self.log("-", f"connected from {self.client_address[0]}")

    def finish(self) -> None:
        """Let the server forget the session."""
        self.server.sessions.discard(self)
        super().finish()
        self.connection.close()  # with TLS, not the socket that socketserver knows and closes

    def hang_up(self, farewell: str) -> None:
        """End the session, from another thread: its next receive() fails, then it says farewell.

        Only a session's own thread writes to its client: two might do so at once. If it is stuck
        in that, because the client does not read, a second call cuts the connection."""
        how = socket.SHUT_RDWR if self.farewell else socket.SHUT_RD
        self.farewell = farewell
        with suppress(OSError):  # the client was quicker
            socket.socket.shutdown(self.connection, how)  # Trap: an SSLSocket's own ends TLS, too

    def receive(self) -> None:
        """Wait for more bytes. EOFError: the client is gone. Refused(421): hang_up() was called."""
        try:
            refuse(self.farewell, 421, self.farewell)
            super().receive()
            self.heard = time.monotonic()
        except (EOFError, OSError) as error:
            refuse(self.farewell, 421, self.farewell)
            raise EOFError(error) from None

    def flush(self) -> None:
        """Send the replies that wait. EOFError: the client is gone. So OSError, from now on, means
        that a command failed at something else, such as a file."""
        try:
            super().flush()
            self.heard = time.monotonic()
        except OSError as error:
            raise EOFError(error) from None

    def read_line(self) -> str:
        """Give the next line as it was meant: backspace and DEL edit it, telnet's codes go."""
        line = super().read_line()
        if line.isprintable():
            return line
        typed = ""
        for character in self.telnet.sub("", line):
            typed = typed[:-1] if character in "\b\x7f" else typed + character
        return typed

    def dispatch(self, line: str) -> None:
        """Run a command, if it is one. What breaks in it does not end the session."""
        verb = line.partition(" ")[0].upper()
        web = verb in ("GET", "POST", "CONNECT")  # a web page could have your browser send mail
        refuse(web, 421, "This is a mail server: take your browser elsewhere")
        if verb in self.server.fail:
            return self.reply(self.server.fail[verb], "Refused on purpose, as --fail says")
        try:
            super().dispatch(line)
        except (Refused, EOFError):
            raise
        except Exception as error:
            warn(f"{verb} failed: {error!r}")
            raise Refused(451, "The server failed at this: try again later") from None

    def reply(self, code: int, *lines: str) -> None:
        """Answer, and hang up after 20 errors: whoever makes so many is guessing."""
        super().reply(code, *lines)
        self.errors += code >= 500
        if self.errors >= 20 and code >= 500:
            self.reply(421, "Too many errors: read up on them, then come back")


class ESMTPHandler(Manners, SMTPHandler):
    """SMTP with all that mail clients ask for. They say EHLO, not HELO, to see what there is."""

    # The grammar of addresses (RFC 5321 4.1.2), where \w is a letter of any alphabet. A route in
    # front, as in <@relay.example:bob@example.com>, is skipped, as the RFC wants it.
    _atom = r"[\w!#$%&'*+/=?^`{|}~-]+"  # bob
    _local = rf'(?:{_atom}(?:\.{_atom})*|"(?:[\w !#-\[\]-~]|\\[ -~])*")'  # ann.lee, "ann lee"
    _label = r"[^\W_]+(?:-+[^\W_]+)*"  # my-host
    _literal = r"\[(?:\d+(?:\.\d+){3}|IPv6:[0-9A-F:.]+)\]"  # [192.0.2.1]
    _domain = rf"(?:{_label}(?:\.{_label})*|{_literal})"
    path = rf"<(?:@{_domain}(?:,@{_domain})*:)?({_local}@{_domain}|{_atom})>"

    host = re.sub("[^A-Za-z0-9.-]", "-", socket.gethostname())
    utf8 = False  # addresses may have letters beyond ASCII
    stray = re.compile(rb"\n(?:HELP|QUIT|RSET|NOOP|DATA|(?:HELO|EHLO|MAIL|RCPT) .*)\s*\Z", re.I)

    def receive(self) -> None:
        """Wait for more bytes; if a message seems to end in a command, tell the class."""
        super().receive()
        if self.code == 354 and self.server.console and self.stray.search(self.received[-400:]):
            self.log("-", "this went into the message, which only a line with a single dot ends")

    def match(self, verb: str, pattern: str, arg: str) -> re.Match[str]:
        """Take an argument apart. That of MAIL and RCPT is an address, and parameters behind it."""
        if verb not in ("MAIL", "RCPT"):
            return super().match(verb, pattern, arg)
        match = super().match(verb, pattern + "((?: +[!-~]+)*)", arg)
        self.utf8 = self.utf8 and verb == "RCPT"
        self.read_parameters(verb, match[2].upper().split())
        self.check_address(verb, match[1] or "")
        return match

    def read_parameters(self, verb: str, parameters: list[str]) -> None:
        """Call the method of each parameter: for SIZE=1000 behind MAIL, mail_SIZE("1000")."""
        pairs = [parameter.partition("=")[::2] for parameter in parameters]
        refuse(pairs and self.protocol == "SMTP", 555, "No parameters after HELO: send EHLO first")
        refuse(len(dict(pairs)) < len(pairs), 501, "The same parameter twice: send it once")
        for keyword, value in pairs:
            method: Any = getattr(self, f"{verb.lower()}_{keyword}", None)
            refuse(not method, 555, f"Unknown parameter: send {verb} without it")
            method(value)

    def check_address(self, verb: str, address: str) -> None:
        """Refuse an address that fits the grammar, and nothing else."""
        local, at, _ = address.rpartition("@")
        lone = not at and address.lower() not in ("", *self.server.lists)
        lone = lone and (verb == "MAIL" or address.lower() != "postmaster")
        refuse(lone, 501, "No domain: send an address as in <bob@example.com>")
        too_long = len(address.encode()) > 254 or len(local.encode()) > 64
        refuse(too_long, 501, "Too long: 64 octets before the @ and 254 in all are the most")
        foreign = not address.isascii() and not self.utf8
        refuse(foreign, 553, "Not ASCII: that takes SMTPUTF8, behind the address in MAIL FROM")
        if self.server.maildir:
            self.server.maildir.folder(address)  # refuses what is no name for a directory

    def mail_SIZE(self, value: str) -> None:
        """Refuse a message that will be too big, before it is sent (RFC 1870)."""
        refuse(not re.fullmatch("[0-9]{1,20}", value), 501, "Send SIZE=1000 for 1000 octets")
        limit = self.server.max_size
        refuse(int(value) > limit, 552, f"Message too big: send {limit} octets at most")

    def mail_BODY(self, value: str) -> None:
        """Hear whether there will be bytes over 127 (RFC 6152). They pass in any case."""
        refuse(value not in ("7BIT", "8BITMIME"), 501, "Send BODY=7BIT or BODY=8BITMIME")

    def mail_SMTPUTF8(self, value: str) -> None:
        """Take addresses in any alphabet (RFC 6531)."""
        refuse(value, 501, "Send SMTPUTF8 without a value")
        self.utf8 = True

    def extensions(self) -> list[str]:
        """Give what EHLO lists. PIPELINING (RFC 2920) is in receive(), which sends replies late."""
        size = f"SIZE {self.server.max_size}"
        return [size, "8BITMIME", "PIPELINING", "SMTPUTF8", "EXPN", "HELP"]

    def deliver(self, envelope: Envelope) -> None:
        """Give a message to the mailroom of part 4, for each recipient once; a list's mail is for
        its members. A real list would also have bounces go to itself."""
        members: dict[str, None] = {}
        for address in envelope.recipients:
            name = address.rpartition("@")[0] or address
            members.update(dict.fromkeys(self.server.lists.get(name.lower(), [address])))
        envelope.recipients = list(members)
        how = self.protocol
        if how == "ESMTP":  # RFC 3848
            how += ("S" if self.encrypted else "") + ("A" if self.user else "")
        peer = ("IPv6:" if ":" in self.client_address[0] else "") + self.client_address[0]
        envelope.trace = f"from {self.helo} ([{peer}])\n\tby {self.host} with {how}"
        self.server.mailroom.publish(envelope)

    def do_EHLO(self, arg: str) -> None:
        """EHLO your-domain.example - says who you are, asks what there is (RFC 5321 4.1.1.1)"""
        self.helo, self.envelope = self.match("EHLO", "[!-~]{1,255}", arg)[0], None
        self.protocol = "ESMTP"
        self.reply(250, "Hello", *self.extensions())

    def do_RSET(self, arg: str) -> None:
        """RSET - drops the message that is under way (RFC 5321 4.1.1.5)"""
        self.match("RSET", "", arg)
        self.envelope = None
        self.reply(250, "OK")

    def do_NOOP(self, arg: str) -> None:
        """NOOP [anything] - does nothing, and says so (RFC 5321 4.1.1.9)"""
        self.reply(250, "OK")

    def do_HELP(self, arg: str) -> None:
        """HELP [command] - lists the commands, or explains one (RFC 5321 4.1.1.8)"""
        if not arg:
            return self.reply(214, " ".join(self.verbs()), "For more: HELP and one of them")
        refuse(arg.upper() not in self.verbs(), 504, "No such command: HELP alone lists them")
        self.reply(214, self.explain(arg.upper()))

    def do_VRFY(self, arg: str) -> None:
        """VRFY user - asks whether there is such a user (RFC 5321 3.5)"""
        name = self.match("VRFY", "<?([^<>]+)>?", arg)[1].lower()
        known = [*self.server.lists, *self.server.users]
        known += self.server.maildir.addresses() if self.server.maildir else []
        for address in known:
            if name in (address.lower(), address.lower().rpartition("@")[0]):
                return self.reply(250, f"<{address}>")
        refuse(self.server.users, 550, "No such user")
        self.reply(252, "Cannot say: send a message and see")

    def do_EXPN(self, arg: str) -> None:
        """EXPN list - asks who is on a mailing list (RFC 5321 3.5)"""
        name = self.match("EXPN", "<?([^<>@]+)(?:@[^<>]*)?>?", arg)[1].lower()
        members = self.server.lists.get(name, [])
        refuse(not members, 550, "No such list")
        self.reply(250, *(f"<{address}>" for address in members))


# ==================================================================================================
# PART 3: TRUST
# So far anybody on the way could read all of it, and anybody could have said it. TLS encrypts, and
# a password tells who is there. Both are for POP3 in part 5, too; so, first, another mixin.


class Trust(Manners):
    """A mixin that can step into TLS and check passwords, and keeps them off the console."""

    failures = 0
    secret = re.compile(r"\s*(AUTH(?: +(?:PLAIN|LOGIN)\b)?|PASS)(.*)", re.IGNORECASE)
    secret_seen = False

    def start_tls(self, verb: str, arg: str) -> None:
        """Go on in TLS. EOFError: the client can't, so the session ends."""
        self.match(verb, "", arg)
        tls: Any = self.server.tls
        refuse(not tls, 502, "No TLS here: the server was started without --tls")
        refuse(self.encrypted, 503, "TLS is on already")
        self.reply(220, "Ready for TLS")
        self.flush()
        self.received.clear()  # Trap: sent in the clear, so who knows by whom (CVE-2011-0411)
        try:  # in two steps, so that hang_up() can end the second one
            self.connection = tls.wrap_socket(
                self.connection, server_side=True, do_handshake_on_connect=False
            )
            self.connection.do_handshake()
        except OSError as error:
            raise EOFError(error) from None
        self.encrypted = True

    def log_in(self, name: str, password: str) -> bool:
        """Tell whether the password is right; if not, tell the client. Refused(421): third time."""
        from hmac import compare_digest  # Trap: == takes longer, the more of it is right

        expected = self.server.users.get(name, "no such user")  # so compare all the same
        same = compare_digest(password.encode("utf-8", "replace"), expected.encode())
        if same and name in self.server.users:
            self.user, self.secret_seen = name, False
            return True
        self.reply(535, "Wrong name or password")
        self.failures += 1
        refuse(self.failures == 3, 421, "Three wrong passwords are enough")
        return False

    def log(self, who: str, text: str) -> None:
        """Show a line without its password; what comes behind may be one, too, if it is no verb."""
        if who == "C" and (match := self.secret.match(text)):
            self.secret_seen = True
            text = match[1] + (" ********" if match[2] else "")
        elif who == "C" and self.secret_seen:
            known = text.partition(" ")[0].upper() in (*self.verbs(), ".", "*")
            text = text if known else "********"
        super().log(who, text)


class SecureHandler(Trust, ESMTPHandler):
    """SMTP with STARTTLS and AUTH: what this program speaks."""

    line_limit = 12288  # for the answers that AUTH gets (RFC 4954 4)

    def extensions(self) -> list[str]:
        """Give what EHLO lists. Trap: clients that see STARTTLS insist on it, so it must work."""
        if self.server.tls and not self.encrypted:
            return [*super().extensions(), "STARTTLS"]
        return [*super().extensions(), *["AUTH PLAIN LOGIN"] * bool(self.server.users)]

    def match(self, verb: str, pattern: str, arg: str) -> re.Match[str]:
        """Take an argument apart. Refused(530): MAIL needs a password here."""
        closed = verb == "MAIL" and self.server.require_auth and not self.user
        refuse(closed, 530, "Send AUTH before MAIL FROM")
        return super().match(verb, pattern, arg)

    def mail_AUTH(self, value: str) -> None:
        """Hear who wrote the message (RFC 4954 5): of use to a relay only."""
        refuse(not self.server.users, 555, "Unknown parameter: send MAIL without it")

    def do_STARTTLS(self, arg: str) -> None:
        """STARTTLS - goes on encrypted, from the start (RFC 3207)"""
        self.start_tls("STARTTLS", arg)
        self.helo, self.envelope, self.user = "", None, ""  # RFC 3207 4.2: forget it all

    def do_AUTH(self, arg: str) -> None:
        """AUTH PLAIN|LOGIN [base64] - logs in, with name and password (RFC 4954)"""
        name, _, initial = arg.partition(" ")
        mechanism: Any = getattr(self, "auth_" + name.upper(), None)
        refuse(not self.server.users, 502, "No passwords: the server was started without --users")
        refuse(self.server.tls and not self.encrypted, 538, "Send STARTTLS before AUTH")
        late = not self.helo or self.envelope or self.user
        refuse(late, 503, "Send AUTH once, after EHLO and before MAIL FROM")
        refuse(not mechanism, 504, "Send AUTH PLAIN or AUTH LOGIN")
        if self.log_in(*mechanism(initial.strip())):
            self.reply(235, "Welcome")

    def auth_PLAIN(self, initial: str) -> tuple[str, str]:
        """Give name and password, from NUL, name, NUL, password (RFC 4616). In front of that may
        stand for whom one acts: here, only for oneself."""
        who, _, rest = self.ask("", initial).partition("\0")
        name, nul, password = rest.partition("\0")
        refuse(not nul or who not in ("", name), 501, "Send base64 of NUL, name, NUL, password")
        return name, password

    def auth_LOGIN(self, initial: str) -> tuple[str, str]:
        """Ask for name and password. It never was a standard, but many clients know it."""
        return self.ask("Username:", initial), self.ask("Password:")

    def ask(self, question: str, answer: str = "") -> str:
        """Give the answer to a challenge, if it is not here yet. Both are in base64, which is a
        way to write bytes and hides nothing. Refused(501): it isn't; or "*", the client gave up."""
        if not answer:
            self.reply(334, base64.b64encode(question.encode()).decode())
            answer = self.read_line()
            self.log("C", "********")
        refuse(answer == "*", 501, "AUTH cancelled")
        try:
            return base64.b64decode("" if answer == "=" else answer, validate=True).decode()
        except ValueError:
            raise Refused(501, "Not base64: send AUTH again") from None


# ==================================================================================================
# PART 4: KEEPING MAIL
# "250 Message accepted" is a promise: from then on, no crash may lose the message. The mailroom
# passes it on to all who subscribed, and to the Maildir first, which keeps the promise.


class Mailroom:
    """Publish and subscribe: a sender need not know who wants the message, nor how many do."""

    def __init__(self) -> None:
        self.subscribers: list[Callable[[Envelope], object]] = []

    def subscribe(self, subscriber: Callable[[Envelope], object]) -> None:
        """Have a function called with each message, before its 250, in the sender's thread. If it
        raises Refused, the sender hears that, and those who subscribed later hear nothing."""
        self.subscribers.append(subscriber)

    def publish(self, envelope: Envelope) -> None:
        """Call all subscribers. If one breaks, the sender and the others don't notice."""
        for subscriber in list(self.subscribers):  # a copy, since others may come and go meanwhile
            try:
                subscriber(envelope)
            except Refused:
                raise
            except Exception as error:
                warn(f"a subscriber failed: {error!r}")


class Maildir:
    """A directory for each address, and in it a file for each message. Mail readers know the form.

    A message is written in tmp/ and, when whole, moved to new/. A move happens at once or not at
    all, so nobody ever finds half a message in new/. A mail reader moves what was read to cur/."""

    numbers = itertools.count(1)

    def __init__(self, root: str) -> None:
        self.root = root
        os.makedirs(root, exist_ok=True)
        self.locks: dict[str, object] = {}  # who has a mailbox open, in part 5

    def folder(self, address: str) -> str:
        """Give the directory of an address. Refused(553): its name would be too long. Trap: an
        address could be "../x", or "con.x", which is a device on Windows: nothing passes as is."""
        from urllib.parse import quote

        name = quote(address.lower(), safe="@+").replace("~", "%7E")
        if re.match(r"\.|(con|prn|aux|nul|com\d|lpt\d)(\.|$)", name):
            name = f"%{ord(name[0]):02X}{name[1:]}"
        refuse(len(name) > 255, 553, "Address too long to keep mail for")
        return os.path.join(self.root, name)

    def addresses(self) -> list[str]:
        """Give all addresses that have a directory."""
        from urllib.parse import unquote

        return [unquote(name) for name in os.listdir(self.root)]

    def files(self, address: str) -> list[str]:
        """Give the files of an address's messages, the oldest first."""
        found = []
        for place in ("new", "cur"):
            with suppress(FileNotFoundError):
                folder = os.path.join(self.folder(address), place)
                found += [os.path.join(folder, name) for name in os.listdir(folder)]
        return sorted(found, key=os.path.basename)

    def store(self, envelope: Envelope) -> None:
        """Keep a message for every recipient. Refused(452, 451): for none, since that failed."""
        from email.utils import formatdate  # takes long, so only when needed

        now, fraction = divmod(time.time_ns(), 10**9)
        name = f"{now}.M{fraction // 1000:06}P{os.getpid()}Q{next(self.numbers)}"
        name += "." + ESMTPHandler.host  # no other message anywhere has this name
        envelope.trace += f" id {name};\n\t{formatdate(localtime=True)}"
        copies = {self.folder(address): address for address in envelope.recipients}
        try:
            for folder, address in copies.items():
                self.write(folder, name, copy_for(envelope, address))
            for folder in copies:
                os.rename(os.path.join(folder, "tmp", name), os.path.join(folder, "new", name))
                sync(os.path.join(folder, "new"))
        except Exception as error:  # Trap: whatever it was, the message is not kept
            for folder, place in itertools.product(copies, ("tmp", "new")):
                with suppress(OSError):
                    os.unlink(os.path.join(folder, place, name))
            warn(f"message not kept: {error}")
            full = getattr(error, "errno", 0) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            raise Refused(452 if full else 451, "Not kept, disk trouble: try again later") from None

    def write(self, folder: str, name: str, data: bytes) -> None:
        """Write a message to a file in tmp/, and on to the disk."""
        if not os.path.isdir(os.path.join(folder, "new")):
            for place in ("tmp", "cur", "new"):
                os.makedirs(os.path.join(folder, place), exist_ok=True)
            sync(folder)
            sync(self.root)
        with open(os.path.join(folder, "tmp", name), "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # Trap: until here it is in memory only, and a crash takes it


def copy_for(envelope: Envelope, address: str) -> bytes:
    """Give a message as it lies in a mailbox (RFC 5321 4.4), its lines ended by LF."""
    head = f"Return-Path: <{envelope.sender}>\nDelivered-To: {address}\n"
    head += f"Received: {envelope.trace}\n"
    return head.encode() + envelope.content.replace(b"\r\n", b"\n")


def sync(folder: str) -> None:
    """Have the disk know a directory's new entries."""
    if os.name != "nt":  # Windows has no call for that
        entry = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(entry)
        finally:
            os.close(entry)


# ==================================================================================================
# PART 5: COLLECTING MAIL
# SMTP brings mail to a server. To fetch it there is another protocol, POP3 (RFC 1939). It has lines
# and verbs as well, so it takes the LineHandler of part 1, and the mixins of parts 2 and 3.


class POP3Handler(Trust, LineHandler):
    """USER and PASS open a mailbox; the other commands are about what is in it at that moment.

    Nothing is deleted before QUIT, so a broken line loses nothing (RFC 1939 6)."""

    full = b"-ERR Too many clients: try again later\r\n"
    backlog = 64  # messages that may wait for a client that said SUBSCRIBE
    name = ""
    is_open = False
    box: dict[int, str] = {}  # number and file of each message, but for those deleted
    all: dict[int, str] = {}

    def finish(self) -> None:
        """Let others have the mailbox."""
        if self.is_open and self.server.maildir:
            del self.server.maildir.locks[self.name.lower()]
        super().finish()

    def reply(self, code: int, *lines: str) -> None:
        """Answer as POP3 does, with +OK or -ERR; more than one line ends in one with a dot."""
        self.send_line(("+OK " if code < 400 else "-ERR ") + lines[0])
        for line in lines[1:]:
            self.send_line(line)
        super().reply(code)

    def dispatch(self, line: str) -> None:
        """Run a command, if it is one for this state of the session (RFC 1939 3)."""
        verb, opening = line.partition(" ")[0].upper(), ("USER", "PASS", "STLS")
        refuse(self.is_open and verb in opening, 503, "The mailbox is open already")
        needed = verb in self.verbs() and verb not in (*opening, "CAPA", "NOOP", "QUIT")
        refuse(needed and not self.is_open, 503, "Send USER and PASS first")
        super().dispatch(line)

    def pick(self, verb: str, arg: str) -> int:
        """Give the number of a message that is there, from an argument."""
        number = int(self.match(verb, "[0-9]{1,9}", arg)[0])
        refuse(number not in self.box, 550, "No such message: LIST shows what there is")
        return number

    def load(self, file: str) -> bytes:
        """Give a message, its lines ended by CRLF in place of the file's LF."""
        with open(file, "rb") as opened:
            return opened.read().replace(b"\n", b"\r\n")

    def send_message(self, data: bytes) -> None:
        """Send a message, the dots doubled that start a line, and a dot behind it."""
        self.reply(250, f"{len(data)} octets")
        data = re.sub(rb"(?m)^\.", b"..", data)
        self.unsent += data + (b".\r\n" if data.endswith(b"\n") else b"\r\n.\r\n")
        self.flush()  # not later: a client may ask for a thousand in one packet

    def table(self, verb: str, arg: str, values: dict[int, Any]) -> None:
        """Answer LIST or UIDL: a line for each message, or just that for the one named."""
        if arg:
            number = self.pick(verb, arg)
            return self.reply(250, f"{number} {values[number]}")
        lines = [f"{number} {values[number]}" for number in self.box]
        self.reply(250, f"{len(lines)} messages", *lines, ".")

    def do_CAPA(self, arg: str) -> None:
        """CAPA - lists what the server can do (RFC 2449)"""
        stls = ["STLS"] if self.server.tls and not self.encrypted else []
        self.reply(
            250, "This server can do", "USER", "UIDL", "PIPELINING", "RESP-CODES", *stls, "."
        )

    def do_STLS(self, arg: str) -> None:
        """STLS - goes on encrypted (RFC 2595 4)"""
        self.start_tls("STLS", arg)
        self.name = ""

    def do_USER(self, arg: str) -> None:
        """USER address - says whose mail it is about"""
        readable = self.server.tls and self.server.users and not self.encrypted
        refuse(readable, 538, "Send STLS before USER")
        self.name, self.secret_seen = self.match("USER", "[^ ]+@[^ ]+|postmaster", arg)[0], True
        self.reply(250, "Send PASS")

    def do_PASS(self, arg: str) -> None:
        """PASS password - opens the mailbox"""
        refuse(not self.name, 503, "Send USER before PASS")
        if self.server.users and not self.log_in(self.name, arg):
            return
        maildir: Any = self.server.maildir
        refuse(not maildir, 550, "No mailboxes here: the server was started without --maildir")
        files = dict(enumerate(maildir.files(self.name), 1))
        self.sizes = {number: len(self.load(file)) for number, file in files.items()}
        mine = maildir.locks.setdefault(self.name.lower(), self) is self
        refuse(not mine, 450, "[IN-USE] Another session has the mailbox open: try again later")
        self.is_open, self.all, self.box = True, files, dict(files)
        self.secret_seen = False
        self.reply(250, f"{len(self.box)} messages")

    def do_STAT(self, arg: str) -> None:
        """STAT - counts messages and octets"""
        self.reply(250, f"{len(self.box)} {sum(self.sizes[number] for number in self.box)}")

    def do_LIST(self, arg: str) -> None:
        """LIST [message] - tells how many octets a message has"""
        self.table("LIST", arg, self.sizes)

    def do_UIDL(self, arg: str) -> None:
        """UIDL [message] - tells a message's name, which no other ever has"""
        names = {n: os.path.basename(file).partition(":")[0] for n, file in self.box.items()}
        self.table("UIDL", arg, {n: name[:70] for n, name in names.items()})

    def do_RETR(self, arg: str) -> None:
        """RETR message - sends a message"""
        self.send_message(self.load(self.box[self.pick("RETR", arg)]))

    def do_DELE(self, arg: str) -> None:
        """DELE message - deletes a message, when QUIT comes"""
        del self.box[self.pick("DELE", arg)]
        self.reply(250, "It goes at QUIT")

    def do_RSET(self, arg: str) -> None:
        """RSET - takes every DELE back"""
        self.box = dict(self.all)
        self.reply(250, "Nothing goes")

    def do_NOOP(self, arg: str) -> None:
        """NOOP - does nothing, and says so"""
        self.reply(250, "OK")

    def do_QUIT(self, arg: str) -> None:
        """QUIT - deletes what DELE has named, and ends the session"""
        self.match("QUIT", "", arg)
        for number in self.all.keys() - self.box.keys():
            with suppress(FileNotFoundError):  # a mail reader was quicker
                os.unlink(self.all[number])
        self.reply(221, "Bye")

    def do_SUBSCRIBE(self, arg: str) -> None:
        """SUBSCRIBE - sends each message the moment it comes, until you send a line (in no RFC)"""
        inbox: queue.Queue[Envelope] = queue.Queue(self.backlog)

        def subscriber(envelope: Envelope) -> None:
            if self.name.lower() in [address.lower() for address in envelope.recipients]:
                try:
                    inbox.put_nowait(envelope)  # the sender, whose thread this is, does not wait
                except queue.Full:
                    self.hang_up("You read too slowly: your mail is in the mailbox")
                    self.hang_up("This is no time to be polite")

        self.server.mailroom.subscribe(subscriber)
        try:
            self.reply(250, "Send a line to stop")
            self.forward(inbox)
        finally:
            self.server.mailroom.subscribers.remove(subscriber)
        self.log("C", self.read_line())
        self.reply(250, "Stopped")

    def forward(self, inbox: queue.Queue[Envelope]) -> None:
        """Send what comes in, until the client sends something, or the session is to end."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.connection, selectors.EVENT_READ)
            while not (self.received or self.farewell or selector.select(0)):
                self.flush()  # which also counts as hearing from it: it may be silent for long
                with suppress(queue.Empty):
                    message = copy_for(inbox.get(timeout=0.2), self.name)
                    self.send_message(message.replace(b"\n", b"\r\n"))


# ==================================================================================================
# PART 6: START AND STOP
# The server that this program runs, what the class sees of it, and the command line.


class MailServer(SmallServer):
    """The whole server. README shows how a program uses it; this file does so in main()."""

    block_on_close = False  # keep no list of threads: socketserver would search it each time
    request_queue_size = 1024  # may wait at the door; after socketserver's 5, one waits for seconds
    serving = False

    # The settings; MailServer(address, timeout=60) sets one.
    max_clients = 1010  # each takes a file descriptor, and often there are 1024
    timeout: float = 300  # seconds without a word from a client (RFC 5321 4.5.3.2.7)
    grace: float = 2  # seconds for the sessions to end, when the server stops
    fail: dict[str, int] = {}  # commands to refuse on purpose, and with which code
    lists: dict[str, list[str]] = {}  # mailing lists, and the addresses on them
    users: dict[str, str] = {}  # names and passwords, as they are; a real server has just hashes
    require_auth = False  # take mail from users only
    tls: ssl.SSLContext | None = None
    maildir: Maildir | None = None
    mailroom: Any = None  # None: a new one

    def __init__(self, address: Any, handler: Any = SecureHandler, **settings: Any) -> None:
        """Listen. TypeError: no such setting. OSError: the address can't be had."""
        for name, value in settings.items():
            if not hasattr(self, name):
                raise TypeError(f"MailServer has no setting {name!r}")
            setattr(self, name, value)
        self.fail = {verb.upper(): code for verb, code in self.fail.items()}
        self.lists = {name.lower(): members for name, members in self.lists.items()}
        self.sessions: set[Manners] = set()
        self.clients: set[socket.socket] = set()
        self.stopping = threading.Event()
        if not self.mailroom:
            self.mailroom = Mailroom()
            if self.maildir:
                self.mailroom.subscribe(self.maildir.store)  # before all others: it may refuse
            if self.console:
                self.mailroom.subscribe(self.console.message)
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def start(self) -> None:
        """Serve in a thread of its own; returns at once."""
        self.serving = True
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def serve_forever(self, poll_interval: float = 0.1) -> None:
        """Serve until stop() is called, from another thread."""
        self.serving = True
        threading.Thread(target=self.watch, daemon=True).start()
        super().serve_forever(poll_interval)

    def watch(self) -> None:
        """Hang up on idle clients. A time limit on each socket would do it, too, but cost one more
        system call for each read; this is one look at all of them, once a second."""
        while not self.stopping.wait(min(1, self.timeout / 4)):
            self.hang_up("Nothing heard for too long", time.monotonic() - self.timeout)

    def hang_up(self, farewell: str, heard_before: float = float("inf")) -> None:
        """End the sessions of clients that were last heard before a time."""
        for session in list(self.sessions):
            if session.heard <= heard_before:
                session.hang_up(farewell)

    def stop(self) -> None:
        """Say 421 to every client, give the sessions a little time to end, free the port."""
        self.stopping.set()
        self.hang_up(Manners.stopped)
        deadline = time.monotonic() + self.grace
        while self.sessions and time.monotonic() < deadline:
            time.sleep(0.01)
        self.hang_up(Manners.stopped)  # whoever is left does not read what it is sent
        if self.serving:
            self.shutdown()
        self.server_close()

    def __exit__(self, *exception: object) -> None:
        """The with block ends, and so does the server."""
        self.stop()

    def get_request(self) -> Any:
        """Accept a client. OSError: there is no file descriptor left for it. It goes on knocking,
        and without this little wait, socketserver would try again and again."""
        try:
            return super().get_request()
        except OSError:
            time.sleep(0.1)
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Turn away one client too many."""
        self.clients.add(request)  # their sessions come into being later, in their threads
        if len(self.clients) <= self.max_clients:
            return True
        with suppress(OSError):
            request.sendall(self.RequestHandlerClass.full)  # type: ignore[attr-defined]
        return False

    def shutdown_request(self, request: Any) -> None:
        """Close a connection: there is room for another one."""
        self.clients.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say in one line what ended a session; socketserver has a traceback for that."""
        warn(f"session ended: {sys.exc_info()[1]!r}")


class Projector(Console):
    """A console for the class: colours; the Bcc, odd line ends and encoded text made visible."""

    def __init__(self) -> None:
        if isinstance(sys.stdout, io.TextIOWrapper):  # the terminal may lack a client's letters
            sys.stdout.reconfigure(errors="backslashreplace")
        self.coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def show(self, *lines: str) -> None:
        """Print the lines, C green and S blue; or nothing, once the terminal is gone."""
        if self.coloured:
            lines = tuple(re.sub(r"^(\[\d+\] )C:", "\\1\x1b[32mC\x1b[0m:", line) for line in lines)
            lines = tuple(re.sub(r"^(\[\d+\] )S:", "\\1\x1b[34mS\x1b[0m:", line) for line in lines)
        with suppress(OSError):
            super().show(*lines)

    def message(self, envelope: Envelope) -> None:
        """Print an accepted message: its envelope, all its bytes, and what is encoded in them."""
        from email import message_from_bytes, utils  # takes long, so only when needed

        mail = message_from_bytes(envelope.content)
        headers = [str(value) for name in ("To", "Cc") for value in mail.get_all(name, [])]
        named = {address.lower() for _, address in utils.getaddresses(headers)}
        lines = [f"---- envelope, session {envelope.session}", f"from <{envelope.sender}>"]
        for address in envelope.recipients:
            hidden = headers and address.lower() not in named
            lines.append(f"to   <{address}>" + ("  (in no header: a Bcc)" if hidden else ""))
        text = envelope.content.decode("utf-8", "backslashreplace")
        for line in text.removesuffix("\n").split("\n"):  # the bar: it is no line of the console's
            lines.append("| " + (line[:-1] if line.endswith("\r") else line + "<LF>"))
        for part in mail.walk():
            encoding = str(part["Content-Transfer-Encoding"]).lower()
            if encoding in ("base64", "quoted-printable") and not part.is_multipart():
                with suppress(LookupError, ValueError):  # no such character set
                    data: Any = part.get_payload(decode=True)
                    text = data.decode(part.get_content_charset("utf-8"), "backslashreplace")
                    lines += [f"---- decoded from {encoding}"]
                    lines += ["| " + line for line in text.rstrip().splitlines()]
        self.show(*map(printable, [*lines, "----"]))


EXAMPLES = """\
examples:
  mailserver.py                       listen on 127.0.0.1 port 2525, print each mail
  mailserver.py --serial              one client at a time: the next one has to wait
  mailserver.py --fail RCPT=450       refuse every recipient: what does your program do?
  mailserver.py --maildir Maildir --pop3-port 2526      keep mail, and let it be collected
"""


def read_flags(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line; None is the program's own. A bad flag ends the program."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("mailserver.py", epilog=EXAMPLES, formatter_class=form)
    parser.error = lambda message: sys.exit(f"mailserver: {message}; see --help")  # type: ignore
    add, known = parser.add_argument, "(%(default)s)"
    add("--host", default="127.0.0.1", help=f"address to listen on {known}")
    add("--port", type=int, default=2525, help=f"port to listen on {known}; 0 takes a free one")
    add("--serial", action="store_true", help="serve one client at a time")
    add("--max-size", type=int, default=10 * 2**20, help=f"octets in a message {known}")
    add("--max-clients", type=int, default=1010, help=f"at the same time {known}")
    add("--timeout", type=int, default=300, help=f"seconds of silence to bear {known}")
    add("--fail", type=failure, action="append", default=[], help="refuse commands: RCPT=450")
    add("--list", type=mailing_list, action="append", default=[], help="team=a@x.org,b@x.org")
    add("--tls", nargs=2, metavar=("CERT", "KEY"), help="offer TLS; make cert makes these files")
    add("--users", metavar="FILE", help="offer AUTH; the file has name:password on each line")
    add("--require-auth", action="store_true", help="take mail from these users only")
    add("--maildir", metavar="DIR", help="keep mail there")
    add("--pop3-port", type=int, help="let mail be collected there")
    add("--quiet", action="store_true", help="print neither dialogues nor mail")
    add("--version", action="version", version=f"mailserver {__version__}")
    return parser.parse_args(argv)


def failure(text: str) -> tuple[str, int]:
    """Read what --fail takes."""
    if match := re.fullmatch("([A-Za-z0-9]+)=([45][0-9][0-9])", text):
        return match[1].upper(), int(match[2])
    raise argparse.ArgumentTypeError("write it as in RCPT=450")


def mailing_list(text: str) -> tuple[str, list[str]]:
    """Read what --list takes."""
    if match := re.fullmatch(r"([^@=,\s]+)=([^@=,\s]+@[^@=,\s]+(,[^@=,\s]+@[^@=,\s]+)*)", text):
        return match[1], match[2].split(",")
    raise argparse.ArgumentTypeError("write it as in team=ann@example.com,bob@example.com")


def read_users(path: str) -> dict[str, str]:
    """Read name:password from each line of a file, but for empty ones and # comments."""
    users = {}
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            name, _, password = line.strip().partition(":")
            if line.strip() and not name.startswith("#"):
                users[name] = password
                if not name or not password:
                    raise OSError(f"line {number} is not name:password")
    return users


def tls_context(cert: str, key: str) -> ssl.SSLContext:
    """Make what TLS needs, of a certificate and its key."""
    import ssl  # takes long, so only when needed

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)  # Trap: else no 421 at the end
    context.load_cert_chain(cert, key, password="")  # else it would ask
    return context


def make(flags: str, function: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
    """Call the function; end the program if it fails, for which some flags are to blame."""
    try:
        return function(*args, **keywords)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        sys.exit(f"mailserver: cannot use {flags}: {reason}; choose another")


def announce(servers: list[MailServer]) -> None:
    """Say where the servers are and what to do with them; warn of what others might do."""
    host, port = str(servers[0].server_address[0]), servers[0].server_address[1]
    pop3 = "".join(f", POP3 on port {server.server_address[1]}" for server in servers[1:])
    print(f"mailserver {__version__} listens on {host} port {port}{pop3}", flush=True)
    if servers[0].console:
        near = host.replace("0.0.0.0", "127.0.0.1")
        servers[0].console.show(f"Try it in another terminal: telnet {near} {port}", "Stop: Ctrl-C")
    if not host.startswith("127.") and host != "::1":
        warn("other machines can reach this server: anyone there can send it mail")
    if servers[0].users and not servers[0].tls:
        warn("passwords come in the clear: whoever is on the way can read them; see --tls")
    if servers[1:] and not servers[0].users:
        warn("any password opens any mailbox; see --users")


def settings_of(flags: argparse.Namespace) -> dict[str, Any]:
    """Make MailServer's settings of the flags; end the program if they do not go together."""
    if min(flags.max_size, flags.max_clients, flags.timeout) < 1:
        sys.exit("mailserver: --max-size, --max-clients and --timeout are whole numbers from 1 up")
    if flags.require_auth and flags.users is None:
        sys.exit("mailserver: --require-auth needs --users FILE")
    if flags.pop3_port is not None and flags.maildir is None:
        sys.exit("mailserver: --pop3-port needs --maildir DIR")
    names = ("serial", "max_size", "max_clients", "timeout", "require_auth")
    settings: dict[str, Any] = {name: getattr(flags, name) for name in names}
    settings |= {"fail": dict(flags.fail), "lists": dict(flags.list)}
    settings["console"] = None if flags.quiet else Projector()
    if flags.users is not None:
        settings["users"] = make(f"--users {flags.users}", read_users, flags.users)
    if flags.maildir is not None:
        settings["maildir"] = make(f"--maildir {flags.maildir}", Maildir, flags.maildir)
    if flags.tls:
        blame = "--tls {} {} (make cert makes a pair)".format(*flags.tls)
        settings["tls"] = make(blame, tls_context, *flags.tls)
    return settings


def main(argv: list[str] | None = None, handler: Any = SecureHandler) -> None:
    """Run the program: read the flags, listen, serve, wait for Ctrl-C or TERM, stop."""
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: stopped.append(number))
    flags = read_flags(argv)
    settings = settings_of(flags)
    place, blame = (flags.host, flags.port), f"--host {flags.host} --port {flags.port}"
    servers = [make(blame, MailServer, place, handler, **settings)]
    if flags.pop3_port is not None:  # twice the patience: RFC 1939 3
        settings |= {"mailroom": servers[0].mailroom, "timeout": 2 * flags.timeout}
        place, blame = (flags.host, flags.pop3_port), f"--pop3-port {flags.pop3_port}"
        servers.append(make(blame, MailServer, place, POP3Handler, **settings))
    announce(servers)
    for server in servers:
        server.start()
    while not stopped:
        time.sleep(0.1)
    for server in servers:
        server.stop()


if __name__ == "__main__":
    main()
