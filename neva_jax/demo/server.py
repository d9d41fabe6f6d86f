"""The page on a port: who may reach it, what a request may bring, and how it ends. One layer in front of Gradio sees every request first.

Gives up: TLS and accounts. Across a network that is not yours, put the page behind an ssh tunnel or a proxy that has them.
"""

import base64
import hmac
import ipaddress
import logging
import os
import signal
import socket
import sys
import tempfile
from urllib.parse import urlsplit

from neva_jax.data.media import MAX_BYTES
from neva_jax.demo.chat import MAX_PICTURES
from neva_jax.demo.page import build, load_gradio, look
from neva_jax.errors import UserError

MIN_TOKEN = 16  # characters
MAX_BODY = 2**20  # bytes of a request that brings no pictures
MAX_STORED = 2 * 2**30  # bytes of pictures on the disk
PATIENCE = 3  # seconds for open connections to end in
ANSWERS = {401: "the token is missing or wrong", 403: "a request of another site", 411: "a request without its length", 413: "too many bytes in one request"}
ANSWERS |= {507: "too many pictures are stored; try again in an hour"}
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)
HEADERS = {"content-security-policy": POLICY, "referrer-policy": "no-referrer", "x-content-type-options": "nosniff"}
logger = logging.getLogger(__name__)


def check_token(token: str) -> str:
    """-> the token. Raises UserError for one that is short, or that a header cannot hold."""
    if len(token) < MIN_TOKEN or not (token.isascii() and token.isprintable()) or " " in token:
        raise UserError(f"--token: found {len(token)} characters, expected {MIN_TOKEN} or more, in ASCII and without spaces; try `openssl rand -hex 16`")
    return token


def listen(host: str, port: int, token: str | None) -> socket.socket:
    """-> a listening socket. Raises UserError for an address beyond this machine without a token, one that is not this machine's, or a port that is taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host or "?", port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError, OverflowError) as error:
        raise UserError(f"--host {host!r} --port {port}: no address to listen on ({error}); the default host is 127.0.0.1") from None
    if not token and not ipaddress.ip_address(address[0].split("%")[0]).is_loopback:
        raise UserError(f"--host {host} is reachable by others, so it needs --token TOKEN of {MIN_TOKEN} characters or more (or NEVA_DEMO_TOKEN)")
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise UserError(f"--host {host} --port {port}: cannot listen there ({error.strerror}); choose another --port, or 0 for any that is free") from None
    return sock


class Guard:
    """ASGI: `app` behind the checks. With a token every request needs it, as a bearer or as the password of basic authentication; without one the request
    must be addressed to this machine, lest a name that leads here reads along. A page of another site may not send requests, and addresses are not fetched."""

    def __init__(self, app, folder: str, token: str | None = None):
        self.app, self.folder, self.token = app, folder, token

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":  # the lifespan; Gradio has no websockets
            return await self.app(scope, receive, send) if scope["type"] == "lifespan" else None
        if status := self.refusal(scope):
            return await refuse(send, status)

        async def with_headers(message):
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *((name.encode(), value.encode()) for name, value in HEADERS.items())]
            await send(message)

        return await self.app(scope, receive, with_headers)

    def refusal(self, scope) -> int | None:
        """-> an HTTP status, or None for a request that may pass."""
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get("host", ""), headers.get("origin")
        if self.token and not self.knows(headers.get("authorization", "")):
            return 401
        if not self.token and not is_loopback(host):
            return 403
        if (origin and urlsplit(origin).netloc != host) or "://" in scope["path"] or "proxy=" in scope["path"]:
            return 403
        if scope["method"] in ("GET", "HEAD", "OPTIONS"):
            return None
        if not headers.get("content-length", "").isdigit():
            return 411
        size, uploads = int(headers["content-length"]), scope["path"].endswith("/upload")
        if size > (MAX_PICTURES * (MAX_BYTES + 4096) if uploads else MAX_BODY):
            return 413
        return 507 if uploads and size + stored(self.folder) > MAX_STORED else None

    def knows(self, authorization: str) -> bool:
        scheme, _, word = authorization.partition(" ")
        if scheme.lower() == "basic":
            try:
                word = base64.b64decode(word).decode().partition(":")[2]
            except ValueError:
                return False
        return hmac.compare_digest(word.encode(), self.token.encode())


def is_loopback(host: str) -> bool:
    """host: of a request's header, with or without a port."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return name == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def stored(folder: str) -> int:
    """Bytes of the files below a folder."""
    return sum(entry.stat().st_size if entry.is_file() else stored(entry.path) for entry in os.scandir(folder))


async def refuse(send, status: int) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    headers += [(b"www-authenticate", b'Basic realm="neva_jax", charset="UTF-8"')] if status == 401 else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": ANSWERS[status].encode()})


def serve(vlm, name: str, sock: socket.socket, token: str | None = None) -> None:
    """Shows the page until control-C or SIGTERM (then SystemExit 143). sock: listening. Uploads are in a folder of their own, which goes when this ends."""
    load_gradio()
    import uvicorn

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="neva_jax_demo_", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        config = uvicorn.Config(Guard(mount(vlm, name), folder, token), log_config=None, access_log=False, timeout_graceful_shutdown=PATIENCE, lifespan="on")
        host, port, *_ = sock.getsockname()
        logger.info("the page is at http://%s:%d; control-C ends it", f"[{host}]" if ":" in host else host, port)
        uvicorn.Server(config).run(sockets=[sock])


def mount(vlm, name: str):
    """-> the ASGI app."""
    gr = load_gradio()
    from fastapi import FastAPI

    bare = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    return gr.mount_gradio_app(
        bare, build(vlm, name), path="/", max_file_size=MAX_BYTES, show_error=True, run_history=False, enable_monitoring=False, mcp_server=False, **look()
    )
