"""A W&B server on loopback: as much of its wire form as W&B's own uploader asks for. It keeps what it was sent."""
import gzip, json, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Server(ThreadingHTTPServer):
    daemon_threads = True
    def __init__(self, refuse=False):
        super().__init__(("127.0.0.1", 0), Handler)
        self.refuse, self.files, self.history, self.summary, self.runs, self.artifacts, self.done = refuse, {}, [], {}, [], [], False
        threading.Thread(target=self.serve_forever, daemon=True).start()
    @property
    def url(self): return f"http://127.0.0.1:{self.server_address[1]}"
    def handle_error(self, request, client_address): pass   # the uploader closes connections as it likes

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *a): pass
    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            out = b""
            while n := int(self.rfile.readline(), 16): out += self.rfile.read(n); self.rfile.readline()
            self.rfile.readline()
        else: out = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(out) if self.headers.get("Content-Encoding") == "gzip" else out
    def say(self, obj, code=200):
        out = json.dumps(obj).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json"); self.send_header("Content-Length", str(len(out)))
        self.end_headers(); self.wfile.write(out)
    def do_GET(self): self.say({})
    def do_PUT(self): self.server.files[self.path.removeprefix("/up/")] = self.body(); self.say({})
    def do_POST(self):
        body = self.body()
        if self.path != "/graphql":
            if "file_stream" in self.path: self.stream(json.loads(body))
            return self.say({})
        if self.server.refuse: return self.say(dict(errors=[dict(message="permission denied")]), 403)
        q = json.loads(body)
        self.say(dict(data=self.answer(q["query"], q.get("variables") or {})))
    def stream(self, j):
        for name, f in (j.get("files") or {}).items():
            if name == "wandb-history.jsonl": self.server.history += [json.loads(l) for l in f["content"]]
            if name == "wandb-summary.json": self.server.summary |= json.loads(f["content"][-1])
        self.server.done |= bool(j.get("complete"))
    def answer(self, q, v):
        s = self.server
        if "upsertBucket" in q:
            s.runs.append(v)
            project = dict(id="p", name=v.get("project"), entity=dict(id="e", name="me"))
            return dict(upsertBucket=dict(bucket=dict(id="b", name=v.get("name"), displayName=v.get("displayName") or "", description="", config="{}", sweepName=None, historyLineCount=0, project=project), inserted=True))
        if "createRunFiles" in q: return dict(createRunFiles=dict(runID="b", uploadHeaders=[], files=[dict(name=f, uploadUrl=f"{s.url}/up/{f}") for f in v.get("files", [])]))
        if "createArtifact(" in q:
            s.artifacts.append(v["input"])
            return dict(createArtifact=dict(artifact=dict(id="a", state="COMMITTED", artifactSequence=dict(latestArtifact=dict(id="a")))))
        if "serverInfo" in q: return dict(serverInfo=dict(features=[]))
        return dict(viewer=dict(id="u", entity="me", username="me", flags="{}", teams=dict(edges=[])))
