"""MLflow's server as `ui` starts it, named to `mlflow server --app-name` as an entry point of the group mlflow.app.

The page and its data are MLflow's; two things make them come sooner. Its static files, 10 MB, are read by Starlette, not
by Flask in a thread, which takes five times as long. And the objects that the imports have left are in no garbage
collection: they double the time of a table of 100 runs.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from resnet_dist.system.memory import collect_rarely

if TYPE_CHECKING:
    from fastapi import FastAPI

APP_NAME = "resnet-dist"  # of the entry point
STATIC = "/static-files"
# Their names have a checksum of their content.
MAX_AGE_SECONDS = 28 * 24 * 3600


def create_app() -> FastAPI:
    """Return MLflow's application. Each process of the server calls this once, when it has nothing else to import."""
    collect_rarely()
    # Not above: `mlflow server` imports this module too, only to see that it is there.
    from mlflow.server import app as flask_app
    from mlflow.server.fastapi_app import app
    from starlette.responses import Response
    from starlette.staticfiles import StaticFiles
    from starlette.types import Scope

    class Files(StaticFiles):
        async def get_response(self, path: str, scope: Scope) -> Response:
            response = await super().get_response(path, scope)
            response.headers["Cache-Control"] = f"public, max-age={MAX_AGE_SECONDS}"
            return response

    app.mount(STATIC, Files(directory=str(flask_app.static_folder)), name="static")
    app.router.routes.insert(0, app.router.routes.pop())  # before Flask's, which take every path
    gc.freeze()
    return app  # type: ignore[no-any-return]
