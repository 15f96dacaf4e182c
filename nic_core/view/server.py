"""The web application of ``nic view``: pages, and what they ask for.

Coordinates are px at level 0 of :mod:`nic_core.slides`, x to the right, y down. A zoom is log2 of
screen px per level-0 px. Only slides of the slide index are read, by id; no answer contains a
path, and label and macro images are never read.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nic_core.parallel import cores
from nic_core.steps.slide_index import digest
from nic_core.steps.slides import THUMBNAIL
from nic_core.view.cache import AnswerCache, file_version
from nic_core.view.errors import ViewError
from nic_core.view.layers import draw_layer, find_layer, layer_json, layers_of
from nic_core.view.regions import MAX_BODY, read_regions, save_regions
from nic_core.view.similarity import MAX_CELLS, PICTURE_SIDES, patch_jpeg, similar_answer
from nic_core.view.slides import OpenSlides
from nic_core.view.study import ViewedStudy, as_json, slide_list, study_summary
from nic_core.view.tiles import TILE, min_zoom, read_thumbnail, read_tile
from nic_core.view.values import values_at

STATIC = Path(__file__).parent / "static"
PAGES = {
    "/": "cohort.html",
    "/slide/{slide}": "slide.html",
    "/target/{target}": "target.html",
    "/compare/{slide}": "compare.html",
}
COOKIE = "nic_view"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
CACHE_BYTES = 128 << 20  # of encoded tiles and layers
MAX_WAITING = 512  # requests that wait for a thread; more are refused
CONTENT_SECURITY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
MAX_COORDINATE = 1e8  # level-0 px, as in annotations
_HEADERS = {
    "content-security-policy": CONTENT_SECURITY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}
_CACHED = {"cache-control": "private, max-age=300"}  # of pictures

Result = TypeVar("Result")


class Work:
    """Runs blocking functions in a few threads; refuses them when too many wait."""

    def __init__(self) -> None:
        self._threads = CapacityLimiter(max(2, 2 * cores()))

    async def __call__(self, function: Callable[[], Result], request: Request) -> Result:
        """Return ``function()``, unless the browser left while the request waited.

        Raises
        ------
        ViewError
            503: too many requests wait, or the browser left.
        """
        if self._threads.statistics().tasks_waiting >= MAX_WAITING:
            raise ViewError(503, "too many requests at once", "try again in a moment")
        async with self._threads:
            if await request.is_disconnected():
                raise ViewError(503, "the browser left", "ask again")
            return await to_thread.run_sync(function)


def application(
    study: ViewedStudy, *, token: str | None = None, annotate: Path | None = None
) -> Starlette:
    """Return the web application of a study.

    Parameters
    ----------
    study : ViewedStudy
    token : str, optional
        Secret that a browser must give once as ``?token=``; a cookie keeps it. Without one, only
        requests to a loopback address are answered.
    annotate : Path, optional
        Folder for regions that are drawn in the browser; None: nothing can be written.
    """
    work, pictures = Work(), Work()
    json = partial(_json, work)
    slides, answers = OpenSlides(study), AnswerCache(CACHE_BYTES)

    async def summary(request: Request) -> Response:
        return await json(request, study_summary, study, annotate=annotate is not None)

    async def cohort(request: Request) -> Response:
        return await json(request, slide_list, study)

    async def slide(request: Request) -> Response:
        return await json(request, _slide, study, slides, request.path_params["slide"])

    async def at(request: Request) -> Response:
        x, y = (number(request.query_params.get(name, ""), name) for name in ("x", "y"))
        return await json(request, _at, study, slides, request.path_params["slide"], x, y)

    async def tile(request: Request) -> Response:
        place = request.path_params
        zoom, column, row = (whole(place[name], name) for name in ("zoom", "column", "row"))

        def read() -> bytes:
            with slides.get(place["slide"]) as opened:
                return read_tile(answers, study.store, opened, zoom, column, row)

        jpeg = await pictures(read, request)
        return Response(jpeg, media_type="image/jpeg", headers=_CACHED)

    async def thumbnail(request: Request) -> Response:
        side = whole(request.query_params.get("side", "256"), "side", 16, 1024)

        def read() -> bytes:
            name = study.row(request.path_params["slide"])["slide"]
            return read_thumbnail(answers, study.store, name, side)

        jpeg = await pictures(read, request)
        return Response(jpeg, media_type="image/jpeg", headers=_CACHED)

    async def layer(request: Request) -> Response:
        return await work(partial(_layer, study, slides, answers, request), request)

    async def similar(request: Request) -> Response:
        asked, slide = request.query_params, request.path_params["slide"]
        row, column = (whole(asked.get(name, ""), name, 0) for name in ("row", "column"))
        count = whole(asked.get("count", "12"), "count", 1, MAX_CELLS)
        encoder = asked.get("encoder", "")
        return await json(request, similar_answer, study, slide, encoder, row, column, count)

    async def patch(request: Request) -> Response:
        asked, slide = request.query_params, request.path_params["slide"]
        x, y, size = (number(asked.get(name, ""), name) for name in ("x", "y", "size"))
        side = whole(asked.get("px", "128"), "px", *PICTURE_SIDES)

        def read() -> bytes:
            with slides.get(slide) as opened:
                return patch_jpeg(answers, opened, x, y, size, side)

        jpeg = await pictures(read, request)
        return Response(jpeg, media_type="image/jpeg", headers=_CACHED)

    async def target(request: Request) -> Response:
        # imports Bokeh, which is slow
        from nic_core.view.targets import target_answer

        return await json(request, target_answer, study, request.path_params["target"])

    async def hottest(request: Request) -> Response:
        from nic_core.view.targets import hottest_cell

        encoder, unit = (request.query_params.get(name, "") for name in ("encoder", "unit"))
        name = request.path_params["target"]
        return await json(request, hottest_cell, study, name, encoder, unit)

    async def regions(request: Request) -> Response:
        slide = request.path_params["slide"]
        if annotate is None:
            raise ViewError(404, "regions cannot be drawn", "start 'nic view --annotate FOLDER'")
        if request.method != "POST":
            return await json(request, read_regions, study, annotate, slide)
        check_same_origin(request.headers)
        body = await _body(request, MAX_BODY)
        return await json(request, save_regions, study, slides, annotate, slide, body)

    one = "/api/slides/{slide}"
    routes: list[BaseRoute] = [
        Route("/api/study", summary),
        Route("/api/slides", cohort),
        Route(one, slide),
        Route(one + "/tiles/{zoom}/{column}/{row}.jpg", tile),
        Route(one + "/thumbnail.jpg", thumbnail),
        Route(one + "/layers/{layer}", layer),
        Route(one + "/at", at),
        Route(one + "/similar", similar),
        Route(one + "/patch", patch),
        Route(one + "/regions", regions, methods=["GET", "POST"]),
        Route("/api/targets/{target}", target),
        Route("/api/targets/{target}/hottest", hottest),
        *(Route(path, _page(STATIC / file)) for path, file in PAGES.items()),
        *_library("leaflet", "xstatic.pkg.leaflet", "data"),
        *_library("bokeh", "bokeh", "server/static"),
        Mount("/static", StaticFiles(directory=STATIC, check_dir=False)),
    ]
    middleware = [Middleware(SecureHeaders)]
    if token is None:
        middleware.append(Middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK)))
    else:
        middleware.append(Middleware(TokenRequired, token=token))
    return Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={ViewError: _refused, HTTPException: _http_error},
    )


async def _json(
    work: Work, request: Request, function: Callable[..., Any], *arguments: Any, **options: Any
) -> Response:
    """Compute and encode an answer in a thread."""
    headers = {"cache-control": "no-store"}
    return await work(
        lambda: JSONResponse(function(*arguments, **options), headers=headers), request
    )


def whole(text: str, name: str, low: int = -(2**31), high: int = 2**31) -> int:
    """Return a parameter of a request as a whole number; raise ViewError 400 if it is none."""
    if len(text) > 12 or not text.removeprefix("-").isascii() or not text.lstrip("-").isdigit():
        raise ViewError(400, f"'{name}' is not a whole number", "give a whole number")
    value = int(text)
    if not low <= value <= high:
        raise ViewError(400, f"'{name}' is out of range", f"give {low} to {high}")
    return value


def number(text: str, name: str) -> float:
    """Return a parameter of a request as a number of px; raise ViewError 400 if it is none."""
    try:
        value = float(text) if len(text) <= 32 else math.nan
    except ValueError:
        value = math.nan
    if not abs(value) <= MAX_COORDINATE:
        raise ViewError(400, f"'{name}' is not a number of px", "give level-0 px")
    return value


def check_same_origin(headers: Mapping[str, str]) -> None:
    """Refuse a request that a page of another site may have sent; raise ViewError.

    Browsers state the origin of every POST, and send JSON to another site only after asking it.
    """
    host = headers.get("host", "")
    if urlsplit(headers.get("origin", "")).netloc != host or not host:
        raise ViewError(403, "the request is not from a page of this server", "use its own pages")
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ViewError(415, "the body is not JSON", "send it as application/json")


async def _body(request: Request, most: int) -> bytes:
    """Return the body of a request; raise ViewError 413 as soon as it is too long."""
    parts, length = [], 0
    async for part in request.stream():
        length += len(part)
        if length > most:
            raise ViewError(413, "the request is too long", f"send at most {most >> 20} MiB")
        parts.append(part)
    return b"".join(parts)


def _at(study: ViewedStudy, slides: OpenSlides, slide: str, x: float, y: float) -> dict[str, Any]:
    with slides.get(slide) as opened:
        return values_at(study, slide, opened.slide, x, y)


def _slide(study: ViewedStudy, slides: OpenSlides, slide: str) -> dict[str, Any]:
    failed = study.failed(slide)
    thumbnail = (study.store.slide(slide) / THUMBNAIL).exists()
    with slides.get(slide) as entry:
        opened = entry.slide
        return {
            "slide": slide,
            "width": opened.width,
            "height": opened.height,
            "mpp": opened.mpp,
            "tile_size": TILE,
            "min_zoom": min_zoom(opened.width, opened.height),
            "max_zoom": 0,
            "thumbnail": f"/api/slides/{slide}/thumbnail.jpg?side=1024" if thumbnail else None,
            "layers": [layer_json(slide, layer) for layer in layers_of(study, slide, opened)],
            "failed": as_json(failed),
        }


def _layer(
    study: ViewedStudy, slides: OpenSlides, answers: AnswerCache, request: Request
) -> Response:
    """Answer with the content of a layer; 304 if the browser has it already."""
    slide, name = request.path_params["slide"], request.path_params["layer"]
    with slides.get(slide) as opened:
        found = find_layer(study, slide, opened.slide, name)
        try:
            state = file_version(found.file)
        except OSError as error:
            raise ViewError(404, f"{found.title} vanished", "load the page again") from error
        key = (opened.version, name, state)
        tag = f'"{digest(key)}"'
        cached = {"cache-control": "private, no-cache", "etag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=cached)
        content = answers.get(key)
        if content is None:
            content = draw_layer(found)
            answers.put(key, content)
    kind = "image/png" if found.kind == "image" else "application/geo+json"
    return Response(content, media_type=kind, headers=cached)


def _page(file: Path) -> Callable[[Request], Awaitable[Response]]:
    async def page(request: Request) -> Response:
        return FileResponse(file, headers={"cache-control": "no-cache"})

    return page


def _library(name: str, package: str, folder: str) -> list[BaseRoute]:
    """Serve the browser files of an installed package; none if it is not installed."""
    try:
        found = find_spec(package)
    except ModuleNotFoundError:
        return []
    if found is None or found.submodule_search_locations is None:
        return []
    files = Path(found.submodule_search_locations[0]) / folder
    return [Mount(f"/static/{name}", StaticFiles(directory=files))]


def _error(
    status: int, reason: str, remedy: str, headers: Mapping[str, str] | None = None
) -> Response:
    return JSONResponse({"error": reason, "remedy": remedy}, status, headers)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ViewError)
    return _error(error.status, error.reason, error.remedy)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    reasons = {404: "no such page", 405: "the page cannot be changed"}
    return _error(
        error.status_code,
        reasons.get(error.status_code, error.detail.lower()),
        "follow the links of the cohort's page",
        error.headers,
    )


class SecureHeaders:
    """Adds the headers that limit what a page may load, to every answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        await self._app(scope, receive, send_with_headers)


class TokenRequired:
    """Answers only requests with the token: once as ``?token=``, then in a cookie."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        given = request.query_params.get("token")
        if given is not None and self._is_token(given):
            address = request.url.remove_query_params("token")
            response: Response = RedirectResponse(address, 303)
            response.set_cookie(COOKIE, self._token, httponly=True, samesite="strict")
            await response(scope, receive, send)
        elif self._is_token(request.cookies.get(COOKIE, "")):
            await self._app(scope, receive, send)
        else:
            refused = _error(
                401, "the token is missing or wrong", "open the address that 'nic view' printed"
            )
            await refused(scope, receive, send)

    def _is_token(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self._token.encode())
