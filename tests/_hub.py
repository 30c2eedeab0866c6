"""A hub on the loopback, and a process that uses it as a user's does."""

import base64
import hashlib
import json
import os
import re
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

from tests._process import run

CLIENT = """
import json, sys
import timm, torch, drifa_attn
from tests import older
older.register()
fresh = lambda: timm.create_model("test_resnet", num_classes=3)
total = lambda model: sum(p.detach().double().abs().sum().item() for p in drifa_attn.attention_parameters(model))
for step in sys.argv[1:]:
    try:
        said = eval(step)
    except Exception as error:
        said = [type(error).__name__, str(error)]
    print(json.dumps(said))
"""


class Hub(ThreadingHTTPServer):
    """Repositories by name, each {revision: {file: content}}, and what was asked of them."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.asked = {}, []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """As much of the hub's protocol as its client asks for."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, content=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self):  # noqa: N802 - the name is that of http.server
        self.server.asked.append(f"{self.command} {self.path}")
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path.partition("?")[0])
        if found is None:
            return self.answer(404)
        repo, revision, file = found[1], unquote(found[2]), found[3]
        if repo not in self.server.repos:
            return self.answer(404, X_Error_Code="RepoNotFound")
        if revision not in self.server.repos[repo]:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        files = self.server.repos[repo][revision]
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        if file not in files:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        return self.answer(200, files[file], X_Repo_Commit=commit, ETag=f'"{hashlib.sha1(files[file]).hexdigest()}"')

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self):  # noqa: N802
        sent = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(f"POST {self.path}")
        if self.headers.get("Authorization") != "Bearer hf_write":
            return self.answer(401)
        if self.path == "/api/validate-yaml":  # of a model card
            return self.json({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(sent)
            repo = f"{asked['organization']}/{asked['name']}"
            self.server.repos.setdefault(repo, {"main": {}})
            return self.json({"url": f"{self.server.url}/{repo}"})
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", self.path.partition("?")[0])
        if found is None:
            return self.answer(404)
        if found[2] == "preupload":
            names = [file["path"] for file in json.loads(sent)["files"]]
            return self.json({"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]})
        for line in map(json.loads, sent.splitlines()):
            if line["key"] == "file":
                content = base64.b64decode(line["value"]["content"])
                self.server.repos[found[1]]["main"][line["value"]["path"]] = content
        return self.json({"commitUrl": f"{self.server.url}/{found[1]}/commit/{'0' * 40}", "commitOid": "0" * 40})

    def json(self, said):
        self.answer(200, json.dumps(said).encode(), Content_Type="application/json")


@contextmanager
def hub():
    """A hub that runs."""
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def told(url, home, *steps, **environment):
    """What a new process makes of these expressions, with the hub at this address and a cache of its own."""
    known = {name: value for name, value in os.environ.items() if not name.upper().startswith(("HF_", "HUGGING"))}
    ours = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    ours |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", **environment}
    return [json.loads(line) for line in run(sys.executable, "-c", CLIENT, *steps, env=known | ours).splitlines()]
