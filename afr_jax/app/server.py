"""The server of the page: its routes, and how it starts and ends."""

import asyncio
import contextlib
import dataclasses
import pathlib
import secrets
import shutil
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Mapping

import jinja2
import uvicorn
from absl import logging
from starlette import applications, concurrency, middleware, requests, responses, routing
from starlette import staticfiles as static_lib

from afr_jax.app import app_program, guard, jobs, limits, orders, sessions, words
from afr_jax.core import files, options

_HERE = pathlib.Path(__file__).parent
_SWEEP_S, _STALLED_S = 1.0, 60.0
TOOLS = {
    "cloak": "Cloak photos",
    "check": "Check",
    "patch": "Patches",
    "protect": "Protect a data set",
}
Endpoint = Callable[[requests.Request], Awaitable[responses.Response]]


class App:
    """What the routes share."""

    def __init__(
        self, config: app_program.AppConfig, worker: jobs.Worker, store: sessions.Store
    ) -> None:
        """Takes the parts of the page.

        Args:
            config: with the real port.
            worker: takes the jobs.
            store: of the sessions.
        """
        self.config, self.worker, self.store = config, worker, store
        self.token = secrets.token_urlsafe(24)
        self.cookie = f"afr_session_{config.port}"
        self._uploads = 0
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(_HERE / "templates"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates = {tool: environment.get_template(f"{tool}.html") for tool in TOOLS}

    @property
    def address(self) -> str:
        """Where the page is, with the token where one is needed."""
        host = self.config.host
        host = f"[{host}]" if ":" in host else host
        token = "" if self.config.is_local else f"?token={self.token}"
        return f"http://{host}:{self.config.port}/{token}"

    def asgi(self) -> applications.Starlette:
        """The application."""
        json_routes = {
            ("/api/state", "GET"): self._state,
            ("/api/files", "POST"): self._receive,
            ("/api/files/{upload}/remove", "POST"): self._remove,
            ("/api/jobs", "POST"): self._order,
            ("/api/jobs/{job}/cancel", "POST"): self._cancel,
            ("/out/{job}/{key}", "GET"): self._output,
        }
        return applications.Starlette(
            routes=[
                routing.Route("/", self._page("cloak")),
                *(routing.Route(f"/{tool}", self._page(tool)) for tool in TOOLS if tool != "cloak"),
                *(
                    routing.Route(path, _answered(endpoint), methods=[method])
                    for (path, method), endpoint in json_routes.items()
                ),
                routing.Route("/api/bye", _answered(self._bye), methods=["POST"]),
                routing.Mount("/static", static_lib.StaticFiles(directory=_HERE / "static")),
            ],
            middleware=[middleware.Middleware(guard.Guard, config=self.config)],
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: applications.Starlette) -> AsyncGenerator[None]:
        del app

        async def sweep() -> None:
            while True:
                await asyncio.sleep(_SWEEP_S)
                await concurrency.run_in_threadpool(self.store.sweep)

        sweeper = asyncio.create_task(sweep())
        yield
        sweeper.cancel()

    def _page(self, tool: str) -> Endpoint:
        async def endpoint(request: requests.Request) -> responses.Response:
            session = self.store.get(request.cookies.get(self.cookie))
            if session is None:
                is_known = guard.is_token(request.query_params.get("token"), self.token)
                if not self.config.is_local and not is_known:
                    text = "Open the address that the program printed: it has the token."
                    return responses.PlainTextResponse(text, 403)
                try:
                    session = self.store.create()
                except limits.Refused as error:
                    return responses.PlainTextResponse(str(error), error.status)
            session.hear(None)
            if "token" in request.query_params:  # It should not stay in the history.
                answer: responses.Response = responses.RedirectResponse(request.url.path, 303)
            else:
                answer = responses.HTMLResponse(self._render(tool, session))
            answer.set_cookie(self.cookie, session.id, httponly=True, samesite="lax")
            return answer

        return endpoint

    def _render(self, tool: str, session: sessions.Session) -> str:
        return self._templates[tool].render(
            tool=tool,
            tools=TOOLS,
            token=session.token,
            most_photos=limits.MOST_PHOTOS,
            photo_megabytes=limits.MOST_PHOTO_BYTES // limits.MEGABYTE,
            upload_megabytes=self.config.max_upload_mb,
            is_short=self.config.short,
            modes=words.MODES,
        )

    def _session(self, request: requests.Request, *, writes: bool) -> sessions.Session:
        """The session of a request.

        Raises:
            limits.Refused: there is none, or the request does not come from its page.
        """
        session = self.store.get(request.cookies.get(self.cookie))
        if session is None:
            raise limits.Refused("this page is not known any more; load it again", status=403)
        if writes and not guard.is_token(request.headers.get("x-afr-token"), session.token):
            raise limits.Refused("the request does not come from the page", status=403)
        return session

    async def _state(self, request: requests.Request) -> responses.Response:
        session = self._session(request, writes=False)
        session.hear(request.query_params.get("page"))
        tool = request.query_params.get("tool", "")
        job = session.jobs.get(tool)
        return responses.JSONResponse(
            {
                "uploads": [self._upload(upload) for upload in session.files_of(tool)],
                "job": None if job is None else self._job(job),
                "extractors": self.worker.extractors,
                "trouble": self.worker.trouble,
            }
        )

    def _upload(self, upload: sessions.Upload) -> dict[str, files.Json]:
        return {
            "id": upload.id,
            "role": upload.role,
            "name": upload.name,
            "bytes": upload.num_bytes,
            "look": None if upload.look is None else self._job(upload.look),
        }

    def _job(self, job: jobs.PageJob) -> dict[str, files.Json]:
        found = job.describe(ahead=self.worker.ahead_of(job))
        if job.result is not None:
            kept = {name: value for name, value in job.result.items() if name != "outputs"}
            names = {key: value["name"] for key, value in job.result["outputs"].items()}
            found["result"] = kept | {"outputs": names}
        return found

    async def _receive(self, request: requests.Request) -> responses.Response:
        session = self._session(request, writes=True)
        tool, role, raw_name = (
            request.query_params.get(name, "") for name in ("tool", "role", "name")
        )
        kind = orders.upload_kind(tool, role, raw_name, max_upload_mb=self.config.max_upload_mb)
        declared = request.headers.get("content-length", "")
        if not declared.isdigit():
            raise limits.Refused("the size of the file is not known", status=411)
        size = int(declared)
        self._check_room(session, kind, size)
        if self._uploads >= limits.MOST_UPLOADS:
            raise limits.Refused("too many files arrive at once; try again", status=429)
        upload_id = secrets.token_hex(8)
        path = session.folder / f"{upload_id}{kind.suffix}"
        self._uploads += 1
        session.reserved += size
        try:
            session.folder.mkdir(mode=0o700, exist_ok=True)
            await _write_body(request, path, size)
            if kind.is_photo:
                orders.check_photo(path)
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            self._uploads -= 1
            session.reserved -= size
        if session.is_closed:
            shutil.rmtree(session.folder, ignore_errors=True)
            raise limits.Refused("this page is not known any more; load it again", status=403)
        for old in session.files_of(tool, role=role) if kind.is_single else []:
            self._delete(session, old)
        own = [each.name for each in session.files_of(tool, role=role)]
        name = kind.name if role == "people" else limits.unique_name(kind.name, own)
        upload = sessions.Upload(tool, role, name, path, size, upload_id)
        if tool == "cloak":
            payload = {"path": str(path), "name": name}
            upload.look = jobs.PageJob("look", tool, payload, session.folder / f"{upload_id}_look")
            try:
                self.worker.submit(upload.look)
            except limits.Refused:
                path.unlink(missing_ok=True)
                raise
        session.uploads[upload_id] = upload
        return responses.JSONResponse({"id": upload_id, "name": name})

    def _check_room(self, session: sessions.Session, kind: orders.UploadKind, size: int) -> None:
        if not size:
            raise limits.Refused(f"{kind.name}: the file is empty")
        if size > kind.most_bytes:
            most = kind.most_bytes // limits.MEGABYTE
            raise limits.Refused(f"{kind.name} is larger than {most} MB", status=413)
        if (
            len(session.files_of(kind.tool, role=kind.role)) >= kind.most_files
            and not kind.is_single
        ):
            raise limits.Refused(f"at most {kind.most_files} files go at a time", status=413)
        most_bytes = self.config.max_session_mb * limits.MEGABYTE
        if session.num_bytes + size > most_bytes:
            raise limits.Refused(
                f"all files together are larger than {self.config.max_session_mb} MB; "
                "remove some first",
                status=413,
            )
        if shutil.disk_usage(self.store.root).free - size < limits.FREE_BYTES:
            raise limits.Refused("the disk of the temporary folder is full", status=507)

    def _delete(self, session: sessions.Session, upload: sessions.Upload) -> None:
        session.uploads.pop(upload.id, None)
        upload.path.unlink(missing_ok=True)
        if upload.look is not None:
            if upload.look.is_active:
                self.worker.cancel(upload.look)
            shutil.rmtree(upload.look.folder, ignore_errors=True)

    async def _remove(self, request: requests.Request) -> responses.Response:
        session = self._session(request, writes=True)
        tool, role = (request.query_params.get(name) for name in ("tool", "role"))
        wanted = request.path_params["upload"]
        chosen = session.files_of(tool or "", role=role) if wanted == "all" else []
        chosen += [session.uploads[wanted]] if wanted in session.uploads else []
        for upload in chosen:
            self._delete(session, upload)
        return responses.JSONResponse({})

    async def _order(self, request: requests.Request) -> responses.Response:
        session = self._session(request, writes=True)
        body = await _body(request)
        order = orders.read_order(session, body)
        active = session.jobs.get(order.tool)
        if active is not None and active.is_active:
            raise limits.Refused("there is work of this page already", status=409)
        folder = session.folder / f"job_{secrets.token_hex(8)}"
        job = jobs.PageJob(order.kind, order.tool, order.payload, folder)
        self.worker.submit(job)
        session.jobs[order.tool] = job
        if active is not None:
            shutil.rmtree(active.folder, ignore_errors=True)
        return responses.JSONResponse({"id": job.id})

    async def _cancel(self, request: requests.Request) -> responses.Response:
        session = self._session(request, writes=True)
        job = session.find_job(request.path_params["job"])
        if job is not None and job.is_active:
            self.worker.cancel(job)
        return responses.JSONResponse({})

    async def _output(self, request: requests.Request) -> responses.Response:
        session = self._session(request, writes=False)
        job = session.find_job(request.path_params["job"])
        if job is None or job.result is None:
            raise limits.Refused("there is no such file", status=404)
        entry = job.result["outputs"].get(request.path_params["key"])
        if entry is None or not (job.folder / entry["path"]).is_file():
            raise limits.Refused("there is no such file", status=404)
        is_saved = "save" in request.query_params
        return responses.FileResponse(
            job.folder / entry["path"],
            media_type=entry["type"],
            filename=entry["name"] if is_saved else None,
        )

    async def _bye(self, request: requests.Request) -> responses.Response:
        session = self._session(request, writes=False)
        body = await _body(request)
        if not guard.is_token(str(body.get("token")), session.token):
            raise limits.Refused("the request does not come from the page", status=403)
        session.leave(str(body.get("page")))
        return responses.JSONResponse({})


def serve(config: app_program.AppConfig) -> options.Outcome:
    """Serves the page until a signal comes.

    Raises:
        options.UsageError: the address cannot be used, or the extractors.
    """
    with _bound(config) as listener:
        config = dataclasses.replace(config, port=listener.getsockname()[1])
        worker = jobs.Worker(config)
        store = sessions.Store(config.temp_dir, worker)
        try:
            app = App(config, worker, store)
            server = uvicorn.Server(
                uvicorn.Config(
                    app.asgi(),
                    log_level="warning",
                    access_log=False,
                    server_header=False,
                    proxy_headers=False,
                    ws="none",
                    loop="asyncio",
                    http="h11",
                    timeout_graceful_shutdown=2,
                )
            )
            worker.on_trouble = lambda: setattr(server, "should_exit", True)
            worker.start()
            _greet(app)
            server.run(sockets=[listener])
        finally:
            worker.close()
            store.close()
    if worker.trouble is not None:
        raise options.UsageError(worker.trouble)
    return options.Outcome({"address": app.address})


def _greet(app: App) -> None:
    print(f"The page is at {app.address}")
    print("Ctrl-C ends it and deletes all photos that it was given.")
    if not app.config.is_local:
        logging.warning("others who have this address can use the page; it is not encrypted")


@contextlib.contextmanager
def _bound(config: app_program.AppConfig) -> Generator[socket.socket]:
    """A socket that listens at the address."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listener = socket.create_server((config.host, config.port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise options.UsageError(f"--host={config.host} --port={config.port}: {reason}") from error
    with listener:
        yield listener


def _answered(endpoint: Endpoint) -> Endpoint:
    """An endpoint whose refusals are answers that the page shows."""

    async def answered(request: requests.Request) -> responses.Response:
        try:
            return await endpoint(request)
        except limits.Refused as error:
            # A body that nobody reads would block the connection.
            headers = {"Connection": "close"} if request.method == "POST" else None
            answer = {"error": files.printable(error)}
            return responses.JSONResponse(answer, error.status, headers=headers)

    return answered


async def _write_body(request: requests.Request, path: pathlib.Path, size: int) -> None:
    """Writes what a request carries to a file, as much as it says and no more."""
    stream, written = request.stream(), 0
    # As it is written by the loop's own thread, chunk by chunk of 64 KB, others hardly wait.
    with path.open("xb") as file:
        try:
            while chunk := await asyncio.wait_for(anext(stream, b""), _STALLED_S):
                written += len(chunk)
                if written > size:
                    raise limits.Refused("the file is larger than it was said to be")
                file.write(chunk)
        except TimeoutError as error:
            raise limits.Refused("the file did not arrive", status=408) from error
        except requests.ClientDisconnect as error:
            raise limits.Refused("the file did not arrive") from error
        except OSError as error:
            raise limits.Refused("the temporary folder cannot be written", status=507) from error
    if written != size:
        raise limits.Refused("the file did not arrive as a whole")


async def _body(request: requests.Request) -> Mapping[str, files.Json]:
    """The JSON object that a request carries."""
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > limits.MOST_JSON_BYTES:
            raise limits.Refused("the request is too large", status=413)
    try:
        found = files.parse_json(data)
    except ValueError as error:
        raise limits.Refused("the request cannot be read") from error
    if not isinstance(found, dict):
        raise limits.Refused("the request cannot be read")
    return found
