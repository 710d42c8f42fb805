"""A Hub on this machine: as much of its protocol as an upload by huggingface_hub needs, with everything in memory."""

import base64
import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock

from huggingface_hub import constants

USER, ORGANIZATION, TOKEN = "someone", "some-lab", "hf_token"


class Hub:
    """What the server has: repositories by id, each with its files by name, and whether it is private."""

    def __init__(self):
        self.address, self.private = "", False
        self.repositories, self.objects, self.refused = {}, {}, set()


@contextlib.contextmanager
def serve():
    """Serves a Hub on loopback and makes huggingface_hub, which tests keep offline, use it with TOKEN."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        with (
            mock.patch.object(constants, "ENDPOINT", hub.address),
            mock.patch.object(constants, "HF_HUB_OFFLINE", False),
            mock.patch.object(constants, "HF_HUB_DISABLE_XET", True),  # its blocks need a server of their own
            mock.patch.dict("os.environ", {"HF_TOKEN": TOKEN}),
        ):
            yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def log_message(self, *_):
        pass

    def _answer(self, status, content):
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def _body(self):
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _known(self):
        if self.path in self.hub.refused:
            self._answer(403, {"error": "You don't have the rights."})
            return False
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and not self.path.startswith("/objects/"):
            self._answer(401, {"error": "Invalid user token."})
            return False
        return True

    def do_GET(self):  # noqa: N802
        if not self._known():
            return
        if self.path == "/api/whoami-v2":
            return self._answer(200, {"type": "user", "name": USER, "orgs": [{"name": ORGANIZATION}]})
        repository = self.path.removeprefix("/api/models/").partition("/tree/")[0].partition("/revision/")[0]
        files = self.hub.repositories.get(repository)
        if files is None:
            return self._answer(404, {"error": "Repository not found"})
        if "/tree/" in self.path:
            entries = [{"type": "file", "path": name, "size": len(x), "oid": "0"} for name, x in files.items()]
            return self._answer(200, entries)
        self._answer(200, {"id": repository, "siblings": [{"rfilename": name} for name in files]})

    def do_PUT(self):  # noqa: N802
        self.hub.objects[self.path.rpartition("/")[2]] = self._body()
        self._answer(200, {})

    def do_POST(self):  # noqa: N802
        body = self._body()
        if not self._known():
            return
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repository = f"{asked.get('organization') or USER}/{asked['name'].rpartition('/')[2]}"
            exists = repository in self.hub.repositories
            self.hub.repositories.setdefault(repository, {})
            self.hub.private = asked.get("private") or asked.get("visibility") == "private"
            return self._answer(409 if exists else 200, {"url": f"{self.hub.address}/{repository}", "name": repository})
        if self.path == "/api/validate-yaml":  # of a model card
            return self._answer(200, {"errors": [], "warnings": []})
        if "/preupload/" in self.path:
            modes = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for each in json.loads(body)["files"]
            ]
            return self._answer(200, {"files": modes})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                each | {"actions": {"upload": {"href": f"{self.hub.address}/objects/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return self._answer(200, {"transfer": "basic", "objects": objects})
        if "/commit/" in self.path:
            repository = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            self._commit(self.hub.repositories[repository], [json.loads(line) for line in body.splitlines() if line])
            address = f"{self.hub.address}/{repository}/commit/0"
            return self._answer(200, {"commitUrl": address, "commitOid": "0" * 40, "pullRequestUrl": None})
        self._answer(404, {"error": f"no {self.path}"})

    def _commit(self, files, lines):
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
