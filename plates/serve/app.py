"""The HTTP side: what a request sends, what it gets, and what is refused in one line of JSON."""

import asyncio
import base64
import hmac
import json
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import jinja2
from starlette.applications import Starlette
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import Message

from plates.images import UnreadableImageError

MAX_IMAGES = 64  # of a request
JSON_FORM = 'JSON must be {"images": ["BASE64", ...]}'
CSP = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

Upload: TypeAlias = tuple[bytes, str]  # an encoded image, and the name of its file, empty where it has none
# What is known of one, and, where that is asked for, what decided; raises UnreadableImageError.
Classify = Callable[[bytes, str, bool], Awaitable[dict[str, Any]]]


def build_app(classify: Classify, version: dict[str, str], token: str | None, max_body_bytes: int) -> Starlette:
    """POST /predict, or /predict?explain=1, which demands the token, if any; GET /healthz; and the page."""

    async def predict(request: Request) -> Response:
        if token is not None:
            check_token(request, token)
        uploads = await read_uploads(limit_body(request, max_body_bytes))
        is_explained = request.query_params.get("explain", "0") != "0"
        found = await asyncio.gather(*(describe(classify, *upload, is_explained) for upload in uploads))
        errors = [one["error"] for one in found if "error" in one]
        if len(errors) == len(found):
            raise HTTPException(415, errors[0])
        return JSONResponse({"predictions": found, "version": version})

    async def show_page(_: Request) -> Response:
        nonce = secrets.token_urlsafe(16)
        headers = {
            "Content-Security-Policy": CSP.format(nonce=nonce),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }
        return HTMLResponse(page.render(nonce=nonce, has_token=token is not None), headers=headers)

    async def tell_health(_: Request) -> Response:
        return JSONResponse({"status": "ok", "version": version})

    folders = [Path(__file__).parent, Path(__file__).parents[1] / "report"]  # the report has the style
    page = jinja2.Environment(loader=jinja2.FileSystemLoader(folders), autoescape=True).get_template("page.html.j2")
    routes = [Route("/", show_page), Route("/predict", predict, methods=["POST"]), Route("/healthz", tell_health)]
    return Starlette(routes=routes, exception_handlers={HTTPException: tell_error})


async def describe(classify: Classify, data: bytes, name: str, is_explained: bool) -> dict[str, Any]:
    """What is known of an image, or why it cannot be read: one that cannot takes nothing from the others."""
    try:
        found = await classify(data, name, is_explained)
    except UnreadableImageError as error:
        found = {"error": str(error)}
    return {"name": name, **found} if name else found


async def tell_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, headers=error.headers)


def check_token(request: Request, token: str) -> None:
    """Raises: HTTPException 401."""
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    is_right = hmac.compare_digest(given.strip().encode("latin-1"), token.encode())  # as long for any of that length
    if not (is_right and scheme.lower() == "bearer"):
        reason = "the token is missing or wrong (Authorization: Bearer TOKEN)"
        raise HTTPException(401, reason, {"WWW-Authenticate": "Bearer"})


def limit_body(request: Request, num_bytes: int) -> Request:
    """The same request, which raises HTTPException 413 when more than that is read of it, or announced."""
    error = HTTPException(413, f"the request has more than {num_bytes // 10**6} MB", {"Connection": "close"})
    if int(request.headers.get("content-length", 0)) > num_bytes:
        raise error
    num_read = 0

    async def receive() -> Message:
        nonlocal num_read
        message = await request.receive()
        num_read += len(message.get("body", b""))
        if num_read > num_bytes:
            raise error
        return message

    return Request(request.scope, receive)


async def read_uploads(request: Request) -> list[Upload]:
    """The images of a request: files of a form, base64 in JSON, or else its body. Raises: HTTPException 400."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        async with request.form(max_files=MAX_IMAGES, max_fields=MAX_IMAGES) as form:
            files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
            uploads = [(await file.read(), file.filename or "") for file in files]
    elif kind == "application/json":
        uploads = parse_json(await request.body())
    else:
        uploads = [(body, "")] if (body := await request.body()) else []
    if not uploads:
        raise HTTPException(400, "no image was sent")
    return uploads


def parse_json(body: bytes) -> list[Upload]:
    """Raises: HTTPException 400."""
    try:
        images = json.loads(body)["images"]
        if not isinstance(images, list) or len(images) > MAX_IMAGES:
            raise HTTPException(400, f"{JSON_FORM}, at most {MAX_IMAGES}")
        return [(base64.b64decode(image, validate=True), "") for image in images]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise HTTPException(400, JSON_FORM) from error
