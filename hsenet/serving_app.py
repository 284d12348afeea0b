# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""The addresses of `hsenet serve`: who may ask, how much may be sent, and what errors look like."""

import asyncio
import hmac
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from hsenet.chat_requests import RequestError, refusal
from hsenet.serving import ScanService


BODY_SECONDS = 300  # a client that sends nothing more holds no place longer than this


def build_app(service: ScanService, api_key: str | None = None) -> FastAPI:
    """
    Args:
        service ([`ScanService`]): what answers; closed with the app.
        api_key (`str`, *optional*): what clients must send, as `Authorization: Bearer KEY`.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI):
        yield
        service.close()

    # Without the pages that describe it: they load scripts from elsewhere.
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    for kind in (HTTPException, ValueError, ImportError, Exception):
        app.add_exception_handler(kind, _refuse)
    limits = service.limits
    places = _Places(limits.max_requests)

    @app.get("/health")
    async def health() -> dict:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models(request: Request) -> dict:
        _check_key(request, api_key)
        model = {"id": service.name, "object": "model", "created": service.created, "owned_by": "hsenet"}
        return {"object": "list", "data": [model]}

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        _check_key(request, api_key)
        places.take()
        try:
            chat, scan = await service.prepare(await _body(request, limits.max_body_bytes))
            writing = service.write(chat, scan, places.leave)
        except BaseException:
            places.leave()
            raise
        writing.watch(request.receive)
        first = await writing.piece()  # what is refused before it still gets a status
        if chat.stream:
            return StreamingResponse(writing.events(first), media_type="text/event-stream")
        return JSONResponse(await writing.whole(first))

    return app


class _Places:
    """Of requests at once."""

    def __init__(self, count: int):
        self.free = count

    def take(self) -> None:
        if not self.free:
            raise HTTPException(503, "Too many requests at once: try again later.", {"Retry-After": "5"})
        self.free -= 1

    def leave(self) -> None:
        self.free += 1


def _check_key(request: Request, api_key: str | None) -> None:
    given = request.headers.get("authorization", "").encode()
    if api_key is not None and not hmac.compare_digest(given, f"Bearer {api_key}".encode()):
        raise HTTPException(401, "Expected the server's key, as Authorization: Bearer KEY.")


async def _body(request: Request, limit: int) -> bytes:
    """Refused as soon as it is too long, said or sent."""
    # A page of another origin cannot send this type without being asked first, and is then turned away.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "Expected Content-Type: application/json.")
    too_long = HTTPException(413, f"Expected a request of at most {limit} bytes.", {"Connection": "close"})
    said = request.headers.get("content-length", "0")
    if said.isdecimal() and int(said) > limit:
        raise too_long

    async def read() -> bytes:
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise too_long
        return bytes(body)

    try:
        return await asyncio.wait_for(read(), BODY_SECONDS)
    except ClientDisconnect:  # nobody reads this, but it is no failure of the server
        raise HTTPException(400, "The request ended too early.") from None
    except asyncio.TimeoutError:
        raise HTTPException(408, f"Expected the whole request within {BODY_SECONDS} s.") from None


async def _refuse(_: Request, error: Exception) -> JSONResponse:
    headers = None
    if isinstance(error, HTTPException):
        headers, error = error.headers, RequestError(error.detail, error.status_code)
    status, content = refusal(error)
    return JSONResponse(content, status, headers=headers)


__all__ = ["build_app"]
