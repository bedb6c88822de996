"""The page at `/`: files of this package alone, under a policy that lets the browser fetch nothing from elsewhere."""

from pathlib import Path

from aiohttp import web

FOLDER = Path(__file__).with_name("page")
CONTENT_TYPES = {
    ".html": "text/html",
    ".js": "text/javascript",
    ".css": "text/css",
    ".svg": "image/svg+xml",
}
"""Told by the server: a machine's own table may have another one, and browsers run no module of another type."""

POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Permissions-Policy": "microphone=(self), camera=(), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def add_page(app: web.Application) -> None:
    """Serves the page at `/` and its parts below `/page/`. `app` is not yet running."""
    files = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.suffix in CONTENT_TYPES}

    async def get(request: web.Request) -> web.Response:
        name = request.match_info.get("name", "index.html")
        if name not in files:
            raise web.HTTPNotFound
        kind = CONTENT_TYPES[Path(name).suffix]
        return web.Response(body=files[name], content_type=kind, charset="utf-8", headers=HEADERS)

    app.router.add_get("/", get)
    app.router.add_get("/page/{name}", get)
