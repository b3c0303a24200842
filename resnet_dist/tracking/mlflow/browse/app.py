"""MLflow's server as `ui` starts it, named to `mlflow server --app-name` as an entry point of the group mlflow.app.

The page and its data are MLflow's; two things make them come sooner. Its static files, 10 MB, are read by Starlette, not
by Flask in a thread, which takes five times as long. And the objects that the imports have left are in no garbage
collection: they double the time of a table of 100 runs.

A browser that has not chosen otherwise shows what belongs to training, also behind the page's own links, which forget it,
and does not open MLflow's assistant by itself.
"""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import TYPE_CHECKING

from resnet_dist.system.memory import collect_rarely

if TYPE_CHECKING:
    from fastapi import FastAPI
    from starlette.requests import Request

APP_NAME = "resnet-dist"  # of the entry point
STATIC = "/static-files"
# Their names have a checksum of their content.
MAX_AGE_SECONDS = 28 * 24 * 3600
# What MLflow's page keeps in a browser, by its names. Those of another version would be ignored.
CHOICES = {
    "mlflow.workflowType_v1": "machine_learning",
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": True,  # as after a first visit
}
HEAD = "<head>"
SCRIPT = (
    f"<script>for (const [key, choice] of Object.entries({json.dumps(CHOICES)})) "
    "localStorage.getItem(key) ?? localStorage.setItem(key, JSON.stringify(choice))</script>"
)


def create_app() -> FastAPI:
    """Return MLflow's application. Each process of the server calls this once, when it has nothing else to import."""
    collect_rarely()
    # Not above: `mlflow server` imports this module too, only to see that it is there.
    from mlflow.server import app as flask_app
    from mlflow.server.fastapi_app import app
    from starlette.responses import HTMLResponse, Response
    from starlette.staticfiles import StaticFiles
    from starlette.types import Scope

    class Files(StaticFiles):
        async def get_response(self, path: str, scope: Scope) -> Response:
            response = await super().get_response(path, scope)
            response.headers["Cache-Control"] = f"public, max-age={MAX_AGE_SECONDS}"
            return response

    async def page(request: Request) -> Response:
        return HTMLResponse(text, headers={"Cache-Control": "no-cache"})

    folder = Path(str(flask_app.static_folder))
    text = (folder / "index.html").read_text().replace(HEAD, HEAD + SCRIPT, 1)
    app.mount(STATIC, Files(directory=folder), name="static")
    app.add_route("/", page)
    # Both before Flask's, which take every path.
    app.router.routes[:0] = [app.router.routes.pop() for _ in range(2)]
    gc.freeze()
    return app  # type: ignore[no-any-return]
