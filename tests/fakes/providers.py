"""OpenAI's and Together's fine-tuning endpoints on loopback: real HTTP servers with a state, a clock of their own and faults on order.

Each fake keeps every answer in `log`, so that a test can hold it against the provider's published types (tests/test_hosted.py does). Jobs advance by one frame of their
script each time they are read; nothing depends on the time of day, so what a lesson prints is the same on every run."""
import base64, hashlib, json, re, threading, time
from collections import namedtuple
from email.parser import BytesParser
from email.policy import HTTP
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

T0 = 1_795_000_000  # 2026-11-18
Answer = namedtuple("Answer", "method path status body")

class _Server(ThreadingHTTPServer):
    daemon_threads = True
    def handle_error(self, request, client_address): pass  # a client that hangs up is part of the play

class Fake:
    "A provider in this process; use it as a context manager"
    prefix = "/v1"
    def __init__(self, key="fake-key-for-loopback", script=None):
        self.key,self.script = key, script or self.usual
        self.files,self.jobs,self.log,self.requests,self.faults,self.n,self.now = {}, {}, [], [], [], 0, T0
        self.lock = threading.RLock()
        fake = self
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            def log_message(self, *a): pass
            def handle_one_request(self):
                try: super().handle_one_request()
                except (ConnectionError, BrokenPipeError): self.close_connection = True
            def do(self): fake.serve(self)
            do_GET = do_POST = do_PUT = do_DELETE = do
        self.http = _Server(("127.0.0.1", 0), Handler)
        self.origin = f"http://127.0.0.1:{self.http.server_port}"
        self.base_url = self.origin + self.prefix
    def __enter__(self): threading.Thread(target=self.http.serve_forever, kwargs=dict(poll_interval=.02), daemon=True).start(); return self
    def __exit__(self, *_): self.http.shutdown(); self.http.server_close()
    def tick(self): self.now += 1; return self.now
    def id(self, prefix): self.n += 1; return f"{prefix}-{self.n:06}"

    def fail(self, method, path, kind, times=1, **options):
        "Order a fault: kind is a status, 'drop' (hang up in mid-request), 'slow' (answer after `seconds`) or 'lose' (do it, then hang up without an answer)"
        self.faults.append(dict(method=method, path=re.compile(path), kind=kind, left=times, **options))
    def _fault(self, method, path):
        for f in self.faults:
            if f["left"] and f["method"] == method and f["path"].search(path): f["left"] -= 1; return f

    def serve(self, h):
        url = urlsplit(h.path)
        n = int(h.headers.get("content-length") or 0)
        f = self._fault(h.command, url.path)
        if f and f["kind"] == "drop": h.rfile.read(min(n, f.get("after", 1024))); return self._hang_up(h)
        body = h.rfile.read(n) if n else self._chunks(h) if "chunked" in h.headers.get("transfer-encoding", "") else b""
        if f and f["kind"] == "slow": time.sleep(f["seconds"])
        self.requests.append((h.command, url.path, dict(h.headers), body))
        with self.lock:
            if f and isinstance(f["kind"], int): return self._send(h, url, f["kind"], f.get("body") or self.error(f.get("message", "something is wrong here"), f.get("code")), f.get("headers"))
            if not url.path.startswith("/put/") and h.headers.get("authorization") != f"Bearer {self.key}": return self._send(h, url, 401, self.error(f"Incorrect API key provided: {h.headers.get('authorization', '')[7:]}.", "invalid_api_key"))
            for method,pattern,fn in self.routes:
                if method == h.command and (m := re.fullmatch(pattern, url.path)):
                    got = fn(self, *m.groups(), q={k: v[0] for k,v in parse_qs(url.query).items()}, body=body, headers=h.headers)
                    status,out,headers = got if isinstance(got, tuple) else (200, got, {})
                    if f and f["kind"] == "lose": return self._hang_up(h)
                    return self._send(h, url, status, out, headers)
            self._send(h, url, 404, self.error(f"no route {h.command} {url.path}"))
    def _chunks(self, h):
        out = b""
        while k := int(h.rfile.readline().strip() or b"0", 16): out += h.rfile.read(k); h.rfile.readline()
        h.rfile.readline()
        return out
    def _hang_up(self, h):
        h.close_connection = True
        try: h.connection.shutdown(2)
        except OSError: pass
    def _send(self, h, url, status, out, headers=None):
        raw = out if isinstance(out, bytes) else json.dumps(out).encode()
        if not isinstance(out, bytes): self.log.append(Answer(h.command, url.path, status, out))
        h.send_response(status)
        for k,v in {"content-type": "application/json", "x-request-id": f"req-{len(self.requests)}", **(headers or {})}.items(): h.send_header(k, v)
        h.send_header("content-length", str(len(raw))); h.end_headers(); h.wfile.write(raw)

def form(body, headers):
    "Fields of a multipart form: name → (file name, bytes)"
    msg = BytesParser(policy=HTTP).parsebytes(b"content-type: " + headers["content-type"].encode() + b"\r\n\r\n" + body)
    return {p.get_param("name", header="content-disposition"): (p.get_filename(), p.get_payload(decode=True)) for p in msg.iter_parts()}

def rows(content): return [json.loads(l) for l in content.decode().splitlines() if l.strip()]

class FakeOpenAI(Fake):
    "POST/GET files, uploads in parts, fine_tuning/jobs with events, checkpoints, results, cancel; chat/completions"
    def __init__(self, **kw): super().__init__(**kw); self.uploads = {}
    @staticmethod
    def usual(job): return ["validating_files", "queued"] + [("running", k) for k in (2, 4, 6)] + ["succeeded"]
    def error(self, message, code=None): return dict(error=dict(message=message, type="invalid_request_error", param=None, code=code))
    def _file(self, name, content, purpose):
        f = dict(id=self.id("file"), object="file", bytes=len(content), created_at=self.tick(), filename=name, purpose=purpose, status="processed", status_details=None, expires_at=None)
        self.files[f["id"]] = (f, content)
        return f
    def post_file(self, q, body, headers):
        p = form(body, headers)
        return self._file(*p["file"], p["purpose"][1].decode())
    def list_files(self, q, **_):
        fs = [f for f,_ in sorted(self.files.values(), key=lambda x: -x[0]["created_at"]) if q.get("purpose") in (None, f["purpose"])]
        return self.page(fs, q, 10_000)
    def page(self, items, q, most=20):
        at = next((i+1 for i,x in enumerate(items) if x["id"] == q.get("after")), 0)
        some = items[at:at+int(q.get("limit", most))]
        return dict(object="list", data=some, has_more=at+len(some) < len(items), first_id=some[0]["id"] if some else None, last_id=some[-1]["id"] if some else None)
    def get_file(self, id, **_): return self.files[id][0] if id in self.files else (404, self.error(f"No such File object: {id}"), {})
    def file_content(self, id, **_): return 200, self.files[id][1], {"content-type": "application/octet-stream"}
    def post_upload(self, body, **_):
        b = json.loads(body)
        u = dict(id=self.id("upload"), object="upload", bytes=b["bytes"], created_at=self.tick(), expires_at=self.now+3600, filename=b["filename"], purpose=b["purpose"], status="pending", file=None)
        self.uploads[u["id"]] = (u, {})
        return u
    def post_part(self, up, body, headers, **_):
        if up not in self.uploads: return 404, self.error(f"No such Upload object: {up}"), {}
        p = dict(id=self.id("part"), object="upload.part", created_at=self.tick(), upload_id=up)
        self.uploads[up][1][p["id"]] = form(body, headers)["data"][1]
        return p
    def complete(self, up, body, **_):
        (u,parts),b = self.uploads[up], json.loads(body)
        content = b"".join(parts[i] for i in b["part_ids"])
        if len(content) != u["bytes"] or b.get("md5") not in (None, hashlib.md5(content).hexdigest()): return 400, self.error("The uploaded parts do not add up to the file"), {}
        u.update(status="completed", file=self._file(u["filename"], content, u["purpose"]))
        return u
    def post_job(self, body, **_):
        b = json.loads(body)
        if b["training_file"] not in self.files: return 400, self.error(f"invalid training_file: {b['training_file']}", "invalid_file"), {}
        content = self.files[b["training_file"]][1]
        m = b.get("method") or dict(type="supervised", supervised={})
        h = dict(n_epochs="auto", batch_size="auto", learning_rate_multiplier="auto") | (m.get(m["type"]) or {}).get("hyperparameters", {})
        j = dict(id=self.id("ftjob"), object="fine_tuning.job", created_at=self.tick(), error=None, fine_tuned_model=None, finished_at=None, hyperparameters={k: v for k,v in h.items() if k != "beta"}, model=b["model"], organization_id="org-1",
            result_files=[], seed=b.get("seed") or 0, status="validating_files", trained_tokens=None, training_file=b["training_file"], validation_file=b.get("validation_file"), estimated_finish=None, integrations=[], metadata=b.get("metadata"),
            method={"type": m["type"], m["type"]: dict(hyperparameters=h)})
        self.jobs[j["id"]] = dict(job=j, events=[], frames=[*self.script(j)], suffix=b.get("suffix") or "", words=sum(len(str(r).split()) for r in rows(content)), metrics=[])
        self.say(j["id"], "Created fine-tuning job: " + j["id"])
        return j
    def say(self, id, message, level="info", type="message", data=None):
        self.jobs[id]["events"].append(dict(id=self.id("ftevent"), object="fine_tuning.job.event", created_at=self.tick(), level=level, message=message, type=type, data=data or {}))
    def advance(self, id):
        s = self.jobs[id]; j = s["job"]
        if not s["frames"]: return
        fr = s["frames"].pop(0)
        status,step = fr if isinstance(fr, tuple) else (fr, None)
        if status != j["status"]: self.say(id, f"The job is now {status}", "error" if status == "failed" else "info")
        j["status"] = status
        if step:
            m = dict(step=step, total_steps=6, train_loss=round(2.4/step, 4), train_mean_token_accuracy=round(1-.5/step, 4))
            s["metrics"].append(m); self.say(id, f"Step {step}/6: training loss={m['train_loss']:.2f}", type="metrics", data=m)
        if status == "succeeded":
            csv = "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy\n" + "".join(f"{m['step']},{m['train_loss']},{m['train_mean_token_accuracy']},,\n" for m in s["metrics"])
            f = self._file("step_metrics.csv", base64.b64encode(csv.encode()), "fine-tune-results")
            j.update(fine_tuned_model=f"ft:{j['model']}:org:{s['suffix']}:{j['id'][-6:]}", trained_tokens=3*s["words"], result_files=[f["id"]])
        if status == "failed": j["error"] = dict(code="invalid_training_file", message="The job failed due to an invalid training file.", param="training_file")
        if status in ("succeeded", "failed", "cancelled"): j["finished_at"] = self.tick()
    def get_job(self, id, **_):
        if id not in self.jobs: return 404, self.error(f"Could not find fine tune: {id}", "fine_tune_not_found"), {}
        self.advance(id)
        return self.jobs[id]["job"]
    def list_jobs(self, q, **_):
        want = {k[9:-1]: v for k,v in q.items() if k.startswith("metadata[")}
        js = [s["job"] for s in reversed(self.jobs.values()) if all((s["job"]["metadata"] or {}).get(k) == v for k,v in want.items())]
        return {k: v for k,v in self.page(js, q).items() if k in ("object", "data", "has_more")}
    def list_events(self, id, q, **_): return {k: v for k,v in self.page(self.jobs[id]["events"][::-1], q).items() if k in ("object", "data", "has_more")}
    def list_checkpoints(self, id, q, **_):
        cks = [dict(id=f"ftckpt-{id[-6:]}-{m['step']}", object="fine_tuning.job.checkpoint", created_at=T0+m["step"], fine_tuned_model_checkpoint=f"{self.jobs[id]['job']['fine_tuned_model'] or 'ft:unfinished'}:ckpt-step-{m['step']}", fine_tuning_job_id=id,
            metrics=dict(step=m["step"], train_loss=m["train_loss"]), step_number=m["step"]) for m in self.jobs[id]["metrics"][::-1]]
        return self.page(cks, q)
    def cancel(self, id, **_):
        j = self.jobs[id]["job"]
        if j["status"] in ("succeeded", "failed", "cancelled"): return 400, self.error(f"Job has already {j['status']}."), {}
        self.jobs[id]["frames"] = []; j.update(status="cancelled", finished_at=self.tick()); self.say(id, "The job was cancelled")
        return j
    def chat(self, body, **_):
        b = json.loads(body)
        text = f"{b['model'].split(':')[-1]} says: {b['messages'][-1]['content'][:40]}"
        return dict(id=self.id("chatcmpl"), object="chat.completion", created=self.tick(), model=b["model"], choices=[dict(index=0, finish_reason="stop", logprobs=None, message=dict(role="assistant", content=text, refusal=None))],
            usage=dict(prompt_tokens=7, completion_tokens=5, total_tokens=12))
    routes = [("POST", "/v1/files", post_file), ("GET", "/v1/files", list_files), ("GET", "/v1/files/([^/]+)", get_file), ("GET", "/v1/files/([^/]+)/content", file_content),
        ("POST", "/v1/uploads", post_upload), ("POST", "/v1/uploads/([^/]+)/parts", post_part), ("POST", "/v1/uploads/([^/]+)/complete", complete),
        ("POST", "/v1/fine_tuning/jobs", post_job), ("GET", "/v1/fine_tuning/jobs", list_jobs), ("GET", "/v1/fine_tuning/jobs/([^/]+)", get_job), ("POST", "/v1/fine_tuning/jobs/([^/]+)/cancel", cancel),
        ("GET", "/v1/fine_tuning/jobs/([^/]+)/events", list_events), ("GET", "/v1/fine_tuning/jobs/([^/]+)/checkpoints", list_checkpoints), ("POST", "/v1/chat/completions", chat)]

def iso(t):
    import datetime as dt
    return dt.datetime.fromtimestamp(t, dt.timezone.utc).isoformat().replace("+00:00", "Z")

class FakeTogether(Fake):
    "Files by redirect and PUT, model limits, price estimates, fine-tunes with events, metrics, checkpoints, cancel; chat/completions"
    @staticmethod
    def usual(job): return ["queued"] + [("running", k) for k in (2, 4, 6)] + ["compressing", "uploading", "completed"]
    def error(self, message, code=None): return dict(error=dict(message=message, type="invalid_request_error", param=None, code=code))
    def post_file(self, body, headers, **_):
        p = {k: v[1].decode() for k,v in form(body, headers).items()} if "multipart" in headers["content-type"] and b"Content-Disposition" in body else {k: v[0] for k,v in parse_qs(body.decode()).items()} or json.loads(body)
        old = next((f["id"] for f,_ in self.files.values() if f["_sum"] == p["checksum"] and f["Processed"]), None)
        if old: return 409, dict(file_id=old), {}
        f = dict(id=self.id("file"), object="file", bytes=0, created_at=self.tick(), filename=p["file_name"], FileType=p["file_type"], Processed=False, purpose=p["purpose"], LineCount=0, _sum=p["checksum"])
        self.files[f["id"]] = (f, b"")
        return 302, {}, {"Location": f"{self.origin}/put/{f['id']}", "X-Together-File-Id": f["id"]}
    def put(self, id, body, **_): self.files[id] = (self.files[id][0], body); return {}
    def seen(self, f): return {k: v for k,v in f.items() if not k.startswith("_")}
    def preprocess(self, id, **_):
        f,content = self.files[id]
        ok = hashlib.sha256(content).hexdigest() == f["_sum"]
        f.update(bytes=len(content), Processed=True, LineCount=content.count(b"\n"), processing_status="COMPLETED" if ok else "INVALID_FORMAT",
            validation_report=dict(valid=ok, dataset_format="CONVERSATION", nlines=content.count(b"\n"), **({} if ok else dict(error="the file is not what was announced", error_type="INVALID_FORMAT"))))
        return self.seen(f)
    def get_file(self, id, **_): return self.seen(self.files[id][0]) if id in self.files else (404, self.error(f"File {id} not found"), {})
    def list_files(self, **_): return dict(data=[self.seen(f) for f,_ in self.files.values()])
    def limits(self, q, **_):
        if q["model_name"].startswith("unknown"): return 404, self.error(f"Model {q['model_name']} is not available for fine-tuning"), {}
        batch = dict(max_batch_size=64, max_batch_size_dpo=32, min_batch_size=1)
        return dict(model_name=q["model_name"], default_gradient_accumulation_steps=1, lora_training=dict(**batch, default_rank=8, max_rank=64, target_modules=["q_proj", "k_proj"]), full_training=batch, max_learning_rate=1., min_learning_rate=1e-8, max_num_checkpoints=10,
            max_num_epochs=20, max_num_evals=100, max_seq_length_dpo=4096, max_seq_length_sft=8192, min_max_seq_length=512, merge_output_lora=True, supports_full_training=True, supports_reasoning=False, supports_tools=True, supports_vision=False)
    def _words(self, id): return sum(len(str(r).split()) for r in rows(self.files[id][1]))
    def estimate(self, body, **_):
        b = json.loads(body)
        if b["training_file"] not in self.files: return dict(estimation_available=False, unavailable_reason="train_file_not_validated")
        n = self._words(b["training_file"])*b.get("n_epochs", 1)
        return dict(estimation_available=True, allowed_to_proceed=True, estimated_total_price=round(n*4e-6, 6), estimated_train_token_count=n, estimated_eval_token_count=0, user_limit=100.)
    def post_job(self, body, **_):
        b = json.loads(body)
        if b["training_file"] not in self.files: return 400, self.error(f"training file {b['training_file']} not found"), {}
        j = dict(id=self.id("ft"), status="pending", user_id="user-1", created_at=iso(self.tick()), updated_at=iso(self.now), model=b["model"], model_output_name=f"org/{b['model'].split('/')[-1]}-{b.get('suffix') or ''}", training_file=b["training_file"],
            validation_file=b.get("validation_file") or "", n_epochs=b["n_epochs"], n_evals=b.get("n_evals") or 0, n_checkpoints=b.get("n_checkpoints") or 1, batch_size=b["batch_size"] if isinstance(b.get("batch_size"), int) else 8,
            learning_rate=b["learning_rate"], training_method=b["training_method"], suffix=b.get("suffix") or "", random_seed=b.get("random_seed"), token_count=None, total_price=None)
        if b.get("training_type"): j["training_type"] = b["training_type"]
        self.jobs[j["id"]] = dict(job=j, events=[], frames=[*self.script(j)], metrics=[])
        self.say(j["id"], "job_pending", "Job is pending")
        return j
    def say(self, id, type, message, level="info", **more): self.jobs[id]["events"].append(dict(object="fine-tune-event", created_at=iso(self.tick()), type=type, message=message, level=level, param_count=0, token_count=0, total_steps=0, wandb_url="", step=0, checkpoint_path="", model_path="", training_offset=0, hash="") | more)
    def advance(self, id):
        s = self.jobs[id]; j = s["job"]
        if not s["frames"]: return
        fr = s["frames"].pop(0)
        status,step = fr if isinstance(fr, tuple) else (fr, None)
        if status == "running" and j["status"] != "running": j["started_at"] = iso(self.tick()); self.say(id, "training_start", "Training started")
        j["status"],j["updated_at"] = status, iso(self.tick())
        if step: self.say(id, "epoch_complete", f"Epoch done at step {step}", step=step, total_steps=6); s["metrics"].append({"train/global_step": step, "train/loss": round(2.4/step, 4), "train/learning_rate": 1e-5})
        if status == "completed": n = self._words(j["training_file"])*j["n_epochs"]; j.update(token_count=n, total_price=n*4_000); self.say(id, "job_complete", "Job finished")
        if status == "error": self.say(id, "job_error", "Out of memory while training", level="error")
        if status == "cancelled": self.say(id, "job_stopped", "The job was cancelled")
    def get_job(self, id, **_):
        if id not in self.jobs: return 404, self.error(f"Fine-tune {id} not found"), {}
        self.advance(id)
        return self.jobs[id]["job"] | dict(events=self.jobs[id]["events"])
    def list_jobs(self, **_): return dict(data=[s["job"] for s in self.jobs.values()])
    def list_events(self, id, **_): return dict(data=self.jobs[id]["events"])
    def list_metrics(self, id, **_): return dict(metrics=self.jobs[id]["metrics"])
    def list_checkpoints(self, id, **_): return dict(data=[dict(checkpoint_type=f"Intermediate, step {m['train/global_step']}", created_at=iso(T0+m["train/global_step"]), path=f"ft/{id}/step-{m['train/global_step']}", step=m["train/global_step"]) for m in self.jobs[id]["metrics"]])
    def cancel(self, id, **_):
        s = self.jobs[id]
        if s["job"]["status"] in ("completed", "error", "cancelled"): return 400, self.error("Job is not running"), {}
        s["job"]["status"],s["frames"] = "cancel_requested", ["cancelled"]
        self.say(id, "cancel_requested", "Cancellation requested")
        return s["job"]
    chat = FakeOpenAI.chat
    routes = [("POST", "/v1/files", post_file), ("PUT", "/put/([^/]+)", put), ("POST", "/v1/files/([^/]+)/preprocess", preprocess), ("GET", "/v1/files/([^/]+)", get_file), ("GET", "/v1/files", list_files),
        ("GET", "/v1/fine-tunes/models/limits", limits), ("POST", "/v1/fine-tunes/estimate-price", estimate), ("POST", "/v1/fine-tunes", post_job), ("GET", "/v1/fine-tunes", list_jobs), ("GET", "/v1/fine-tunes/([^/]+)/events", list_events),
        ("GET", "/v1/fine-tunes/([^/]+)/metrics", list_metrics), ("GET", "/v1/fine-tunes/([^/]+)/checkpoints", list_checkpoints), ("GET", "/v1/fine-tunes/([^/]+)", get_job), ("POST", "/v1/fine-tunes/([^/]+)/cancel", cancel), ("POST", "/v1/chat/completions", chat)]
