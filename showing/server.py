"""The demo's local server: one page and two questions, for browsers on this machine alone.

It listens on 127.0.0.1. It answers only requests that name this host, so that no site gets in that leads its own name
to 127.0.0.1, and none that another site's page sends. What is asked is checked word by word.
"""

import json
import re
import secrets
import traceback
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl

from core.config import PROJECT_ROOT, UserError
from core.observe import log
from reporting.page import template
from showing.answers import Answers

HERE = "127.0.0.1"
NAMES = (HERE, "localhost")
MOST_PORT = 65_535
LONGEST = 200  # characters of a request's path
TEMPLATES = PROJECT_ROOT / "showing" / "templates"
WHOLE = re.compile(r"[0-9]{1,9}")
HTML, JSON = "text/html; charset=utf-8", "application/json"


class Refused(Exception):
    """A request that is not answered: a status, and why in one sentence."""

    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status = status


def asked(query: str) -> tuple[int, int]:
    """Return (class, kappa) of a query such as "class=3&kappa=100".

    Raises:
        Refused: it is anything else.
    """
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=True, max_num_fields=2)
    except ValueError:
        pairs = []
    found = dict(pairs)
    if len(pairs) != 2 or set(found) != {"class", "kappa"} or not all(map(WHOLE.fullmatch, found.values())):
        raise Refused(400, "ask for a class and a number of weights, as class=3&kappa=100")
    return int(found["class"]), int(found["kappa"])


def as_demo(about: dict, nonce: str) -> str:
    """Return the page, as text; `nonce`: what the browser knows its own style and script by."""
    text = json.dumps(about, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":  # so that no text in it ends the script element
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return template("demo.html", TEMPLATES).render(about=about, data=text, nonce=nonce)


class Server(ThreadingHTTPServer):
    """Listens on a port of this machine alone.

    Args:
        port: 0 takes any that is free.

    Raises:
        UserError: there is no such port, or it cannot be had.
    """

    daemon_threads = True

    def __init__(self, port: int, answers: Answers):
        if not 0 <= port <= MOST_PORT:
            raise UserError(f"port is {port}: give one from 1 to {MOST_PORT}, or 0 for any that is free")
        try:
            super().__init__((HERE, port), _Handler)
        except OSError as error:
            raise UserError(
                f"port {port} cannot be had ({error.strerror}): give another with --port, or 0 for any that is free"
            ) from None
        self.port = self.server_address[1]
        self.answers, self.nonce, self.page = answers, secrets.token_urlsafe(16), ""
        self.routes: dict[str, Callable[[int, int], dict]] = {"/forget": answers.forget, "/lift": answers.lift}

    @property
    def address(self) -> str:
        """What to type into a browser."""
        return f"http://{HERE}:{self.port}/"

    def prepare(self) -> None:
        """Make what the page shows first."""
        self.page = as_demo(self.answers.prepare(), self.nonce)

    def answer(self, path: str, headers: dict[str, str | None]) -> tuple[str, str]:
        """Return (type, text) of what a request asks for.

        Raises:
            Refused, UserError: it is not answered.
        """
        if headers["Host"] not in [f"{name}:{self.port}" for name in NAMES]:
            raise Refused(403, f"this page is for {self.address} alone: open that address")
        if len(path) > LONGEST:
            raise Refused(414, f"the address has {len(path)} characters: at most {LONGEST} are read")
        place, _, query = path.partition("?")
        if path == "/":
            return HTML, self.page
        if place not in self.routes:
            raise Refused(404, "there is nothing at this address: open /")
        origin, site = headers["Origin"], headers["Sec-Fetch-Site"]
        if (origin and origin != f"http://{headers['Host']}") or site in ("cross-site", "same-site"):
            raise Refused(403, "another page may not ask this: open the demo by its own address")
        return JSON, json.dumps(self.routes[place](*asked(query)))


class _Handler(BaseHTTPRequestHandler):
    """Answers GET; the library refuses every other method."""

    server: Server  # ty: ignore[incompatible-mutable-override]
    timeout = 10  # seconds that a request may take to arrive
    server_version, sys_version = "MIMU", ""

    def do_GET(self) -> None:
        """Answer, or say in one sentence why not."""
        headers = {name: self.headers.get(name) for name in ("Host", "Origin", "Sec-Fetch-Site")}
        try:
            status, (kind, text) = 200, self.server.answer(self.path, headers)
        except Refused as error:
            status, kind, text = error.status, JSON, json.dumps({"error": str(error)})
        except UserError as error:
            status, kind, text = 400, JSON, json.dumps({"error": str(error)})
        except Exception as error:
            log(traceback.format_exc())
            status, kind, text = 500, JSON, json.dumps({"error": f"this failed ({type(error).__name__}): see the log"})
        self._send(status, kind, text.encode())

    def _send(self, status: int, kind: str, data: bytes) -> None:
        nonce = self.server.nonce
        policy = "default-src 'none'; img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        policy += f"frame-ancestors 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'"
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(data))),
            ("Content-Security-Policy", policy),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cache-Control", "no-store"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: masks are said where they are made."""
