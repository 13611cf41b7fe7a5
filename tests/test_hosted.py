"""Hosted jobs over the providers' real SDKs, against servers on loopback: every answer held against the published types, and every fault that a provider, a network or a killed process can bring."""
import io, json, logging, os, random, re, subprocess, sys, textwrap, threading, time, typing
from decimal import Decimal
from pathlib import Path

import pytest, yaml

fakes = Path(__file__).parent/"fakes"
sys.path.append(str(fakes))
from providers import FakeOpenAI, FakeTogether
from somaagent.core.errors import DataError, MissingExtraError, SettingsError, TrainError
from somaagent.core.logs import logger
from somaagent.core.progress import Progress
from somaagent.train import openai_jobs, together_jobs
from somaagent.train.hosted import HostedModel
from somaagent.train.job import Backend, JobSpec, TrainingJob
from somaagent.train.openai_jobs import OpenAIJobs
from somaagent.train.provider import Journal, ProviderError
from somaagent.train.together_jobs import TogetherJobs

published = yaml.safe_load((fakes/"published.yaml").read_text())
KEY = "sk-proj-" + "k3y"*12

@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("SOMA_PROGRESS", "none"); monkeypatch.setenv("OPENAI_API_KEY", KEY); monkeypatch.setenv("TOGETHER_API_KEY", KEY)

def sft(n=12): return "".join(json.dumps(dict(messages=[dict(role="user", content=f"Where is order {i}?"), dict(role="assistant", content=f"Order {i} arrives tomorrow.")]))+"\n" for i in range(n))
def dpo(n=12):
    say = lambda t: [dict(role="assistant", content=t)]
    return "".join(json.dumps(dict(input=dict(messages=[dict(role="user", content=f"Where is order {i}?")]), preferred_output=say("It arrives tomorrow."), non_preferred_output=say("No idea.")))+"\n" for i in range(n))

class Play:
    "A fake, a backend over it, and what the backend slept"
    def __init__(self, fake, cls, tmp):
        self.fake,self.cls,self.tmp,self.naps = fake, cls, tmp, []
        self.jobs = self.again()
        self.train,self.validation = tmp/"train.jsonl", tmp/"validation.jsonl"
        self.train.write_text(sft()); self.validation.write_text(sft(10).replace("Order", "Parcel"))
    def again(self, home="home", **kw):
        "The backend as a new process has it"
        return self.cls(self.tmp/home, base_url=self.fake.base_url, sleep=self.naps.append, **kw)
    def spec(self, name="desk", inputs=None, **config): return JobSpec(kind=self.cls.name, name=name, base="gpt-4.1-mini-2025-04-14" if self.cls is OpenAIJobs else "meta-llama/Llama-3-8b", inputs=inputs or dict(train=str(self.train)), config=config)
    def watch(self, id, jobs=None, **kw): return (jobs or self.jobs).watch(id, Progress("w", mode="none"), **kw)
    created = property(lambda self: sum(m == "POST" and re.search(r"/(jobs|fine-tunes)$", p) is not None for m,p,*_ in self.fake.requests))
    create = property(lambda self: r"/(jobs|fine-tunes)$")

@pytest.fixture
def oa(tmp_path):
    with FakeOpenAI(key=KEY) as f: yield Play(f, OpenAIJobs, tmp_path)
@pytest.fixture
def to(tmp_path):
    with FakeTogether(key=KEY) as f: yield Play(f, TogetherJobs, tmp_path)
@pytest.fixture(params=["openai", "together"])
def both(request): return request.getfixturevalue(dict(openai="oa", together="to")[request.param])

# ---- the fakes say what the published documents say ------------------------------------------------------------------------------------------

def types():
    import openai.types as o, openai.types.fine_tuning as of, openai.types.chat as oc, together.types as t
    from openai.pagination import SyncCursorPage
    from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint
    from openai.types.uploads import UploadPart
    from together.types.fine_tuning_list_response import FineTuningListResponse
    page = lambda x: SyncCursorPage[x]
    return dict(openai=[("POST|GET", "/v1/files/?[^/]*$", (o.FileObject, page(o.FileObject))), ("POST", "/v1/uploads/[^/]+/parts", (UploadPart,)), ("POST", "/v1/uploads", (o.Upload,)), ("GET", "/v1/fine_tuning/jobs/[^/]+/events", (page(of.FineTuningJobEvent),)),
            ("GET", "/v1/fine_tuning/jobs/[^/]+/checkpoints", (page(FineTuningJobCheckpoint),)), ("GET", "/v1/fine_tuning/jobs$", (page(of.FineTuningJob),)), ("POST|GET", "/v1/fine_tuning/jobs", (of.FineTuningJob,)), ("POST", "/v1/chat/completions", (oc.ChatCompletion,))],
        together=[("POST", "/v1/files$", ()), ("PUT", "/put/", ()), ("POST|GET", "/v1/files/", (t.FileResponse,)), ("GET", "/limits", (t.FineTuningModelLimitsResponse, t.FinetuneModelLimits)), ("POST", "/estimate-price", t.FineTuningEstimatePriceResponse.__args__), ("GET", "/fine-tunes$", (FineTuningListResponse,)),
            ("GET", "/events", (t.FineTuningListEventsResponse,)), ("GET", "/metrics", (t.FineTuningListMetricsResponse,)), ("GET", "/checkpoints", (t.FineTuningListCheckpointsResponse,)), ("POST|GET", "/fine-tunes", (t.FinetuneResponse,)), ("POST", "/v1/chat/completions", ())])

def fits(model, body):
    from pydantic import ValidationError
    try: model.model_validate_json(json.dumps(body), strict=True); return ""
    except ValidationError as e: return f"{model.__name__}: {e.errors()[0]['loc']} {e.errors()[0]['msg']}"

def unknown_keys(model, body, extra=()):
    "Keys of a body that the type does not have"
    known = {f.alias or n for n,f in model.model_fields.items()} | set(model.model_fields)
    return sorted(set(body) - known - set(extra))

def contract(fake, provider, extra=()):
    "Every answer of a fake, held against the SDK's types; how many were looked at"
    n,spec = 0, types()[provider]
    for a in fake.log:
        if a.status >= 300: continue
        found = next((ms for verb,path,ms in spec if re.fullmatch(verb, a.method) and re.search(path, a.path)), None)
        assert found is not None, f"no type for {a.method} {a.path}"
        if not found: continue
        wrong = [fits(m, a.body) for m in found]
        assert "" in wrong, (a.method, a.path, wrong)
        m = found[wrong.index("")]
        assert not unknown_keys(m, a.body, (*extra, "first_id", "last_id", "object", "has_more", "data")), (a.path, unknown_keys(m, a.body, extra))
        n += 1
    return n

def test_every_answer_of_the_openai_fake_fits_the_sdk_and_the_document(oa):
    class Parts(OpenAIJobs): part_bytes = 512
    job = oa.jobs.create(oa.spec(inputs=dict(train=str(oa.train), validation=str(oa.validation)), n_epochs=2)); end = oa.watch(job.id)
    Parts(oa.tmp/"p", base_url=oa.fake.base_url).upload(oa.validation.rename(oa.tmp/"v2.jsonl"))
    (oa.tmp/"v2.jsonl").write_text(sft(20)); Parts(oa.tmp/"p", base_url=oa.fake.base_url).upload(oa.tmp/"v2.jsonl")
    oa.jobs.model(end).generate(["Hello"]); oa.jobs.list(); oa.jobs.metrics(job.id); oa.jobs.checkpoints(job.id)
    other = oa.jobs.create(oa.spec("other")); oa.jobs.cancel(other.id)
    assert contract(oa.fake, "openai") > 25
    doc = published["openai"]
    jobs = [a.body for a in oa.fake.log if a.body.get("object") == "fine_tuning.job"]; events = [e for a in oa.fake.log if a.path.endswith("/events") for e in a.body["data"]]
    assert jobs and events and all(set(doc["FineTuningJob"]["required"]) <= j.keys() and j["status"] in doc["FineTuningJob"]["status"] for j in jobs)
    assert all(set(doc["FineTuningJobCheckpoint"]["required"]) <= c.keys() for a in oa.fake.log if a.path.endswith("/checkpoints") for c in a.body["data"])
    assert all(set(doc["FineTuningJobEvent"]["required"]) <= e.keys() and e["level"] in doc["FineTuningJobEvent"]["level"] and e["type"] in doc["FineTuningJobEvent"]["type"] for e in events)

def test_every_answer_of_the_together_fake_fits_the_sdk_and_the_document(to):
    job = to.jobs.create(to.spec(inputs=dict(train=str(to.train), validation=str(to.validation)), n_evals=2, lora=True)); end = to.watch(job.id)
    to.jobs.model(end).generate(["Hello"]); to.jobs.list(); to.jobs.metrics(job.id); to.jobs.checkpoints(job.id); to.jobs.estimate(to.spec())
    other = to.jobs.create(to.spec("other")); to.jobs.cancel(other.id)
    assert contract(to.fake, "together", extra=("LineCount", "LineCount", "suffix", "random_seed")) > 20
    doc = published["together"]
    fine = [a.body for a in to.fake.log if a.status == 200 and re.search(r"/fine-tunes(/ft-\d+(/cancel)?)?$", a.path) and "id" in a.body]; files = [a.body for a in to.fake.log if a.status == 200 and a.body.get("object") == "file"]
    events = [e for j in fine for e in j.get("events", [])]
    assert fine and files and events
    assert all(set(doc["FinetuneResponseTruncated"]["required"]) <= j.keys() and j["status"] in doc["FinetuneJobStatus"]["status"] for j in fine)
    assert all(set(doc["FineTuneEvent"]["required"]) <= e.keys() and e["type"] in doc["FineTuneEvent"]["type"] for e in events) and all(set(doc["FileResponse"]["required"]) <= f.keys() for f in files)

def test_the_contract_can_fail(oa):
    oa.jobs.create(oa.spec())
    a = next(a for a in oa.fake.log if a.path.endswith("/jobs") and a.body.get("status"))
    a.body["status"] = "baking"
    with pytest.raises(AssertionError): contract(oa.fake, "openai")
    a.body.update(status="queued", flavour="sweet")
    with pytest.raises(AssertionError): contract(oa.fake, "openai")

def test_our_tables_of_statuses_are_those_of_the_documents_and_the_sdks():
    from openai.types.fine_tuning import FineTuningJob
    from together.types import FinetuneResponse
    lit = lambda m: set(typing.get_args(m.model_fields["status"].annotation))
    assert set(openai_jobs._STATUS) == set(published["openai"]["FineTuningJob"]["status"]) == lit(FineTuningJob)
    assert set(together_jobs._STATUS) == set(published["together"]["FinetuneJobStatus"]["status"]) == lit(FinetuneResponse)
    for k,(lo,hi) in published["openai"]["limits"].items():
        with pytest.raises(Exception): openai_jobs.OpenAIConfig(method="dpo", **{k: hi+1})
        with pytest.raises(Exception): openai_jobs.OpenAIConfig(method="dpo", **{k: lo-1})
        openai_jobs.OpenAIConfig(method="dpo", **{k: hi})

def test_what_is_sent_fits_the_sdks_parameters(oa):
    from openai.types.fine_tuning.job_create_params import JobCreateParams
    from pydantic import TypeAdapter
    (oa.tmp/"d.jsonl").write_text(dpo())
    oa.jobs.create(oa.spec(n_epochs=2, batch_size=4, learning_rate_multiplier=.5)); oa.jobs.create(oa.spec("pref", inputs=dict(train=str(oa.tmp/"d.jsonl")), method="dpo", beta=.1))
    bodies = [json.loads(b) for m,p,_,b in oa.fake.requests if m == "POST" and p.endswith("/jobs")]
    keys = set(typing.get_type_hints(JobCreateParams))
    for b in bodies: TypeAdapter(JobCreateParams).validate_python(b); assert set(b) <= keys
    assert bodies[0]["method"] == {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": 4, "learning_rate_multiplier": .5}}}
    assert bodies[1]["method"] == {"type": "dpo", "dpo": {"hyperparameters": {"beta": .1}}}

# ---- a mock that is generated: whatever the published types allow, in any combination ------------------------------------------------------------

def invent(schema, rng, defs, depth=0):
    "A value that a JSON schema allows"
    if "$ref" in schema: return invent(defs[schema["$ref"].split("/")[-1]], rng, defs, depth)
    for k in ("anyOf", "oneOf"):
        if k in schema: return invent(rng.choice(schema[k]), rng, defs, depth)
    if "const" in schema: return schema["const"]
    if "enum" in schema: return rng.choice(schema["enum"])
    kind = schema.get("type")
    if kind == "object" or "properties" in schema:
        need = set(schema.get("required", ()))
        out = {k: invent(v, rng, defs, depth+1) for k,v in schema.get("properties", {}).items() if k in need or rng.random() < .6}
        extra = schema.get("additionalProperties")
        return out | ({f"k{i}": invent(extra, rng, defs, depth+1) for i in range(rng.randrange(3))} if isinstance(extra, dict) else {})
    if kind == "array": return [invent(schema["items"], rng, defs, depth+1) for _ in range(rng.randrange(3))]
    if kind == "string": return "2026-11-21T10:00:00Z" if schema.get("format") == "date-time" else rng.choice(["", "a", "ünïcode ☂", "x"*50])
    return {"integer": rng.randrange(0, 2_000_000_000), "number": rng.choice([0., .5, 1e-9, 3e8]), "boolean": rng.random() < .5, "null": None}.get(kind, {})

def generated(model, rng, **fixed):
    s = model.model_json_schema(by_alias=True)
    return invent(s, rng, s.get("$defs", {})) | fixed

@pytest.mark.parametrize("seed", range(2))
def test_whatever_the_types_allow_is_read(both, seed):
    rng = random.Random(seed)
    job = both.jobs.create(both.spec()); rid = job.remote["id"]
    if both.cls is OpenAIJobs:
        from openai.types import FileObject; from openai.types.fine_tuning import FineTuningJob, FineTuningJobEvent
        one = lambda: generated(FineTuningJob, rng, id=rid, result_files=[])
        many = lambda: dict(object="list", has_more=False, data=[generated(FineTuningJobEvent, rng, id=f"e{i}", created_at=1_795_000_000+i) for i in range(5)][::-1])
        routes = [("/events$", many), ("/jobs$", lambda: dict(object="list", has_more=False, data=[one()])), ("/jobs/", one)]
    else:
        from together.types import FinetuneEvent, FinetuneResponse; from together.types.fine_tuning_list_response import Data
        when = "2026-11-21T10:00:00Z"
        events = lambda: [generated(FinetuneEvent, rng, created_at=f"2026-11-21T10:00:0{i}Z") for i in range(5)]
        routes = [("/events$", lambda: dict(data=events())), ("/metrics$", lambda: dict(metrics=[{"train/global_step": 1., "train/loss": .5}])), ("/fine-tunes$", lambda: dict(data=[generated(Data, rng, id=rid, created_at=when, updated_at=when)])),
            ("/fine-tunes/", lambda: generated(FinetuneResponse, rng, id=rid, events=events(), created_at=when, updated_at=when, started_at=rng.choice([None, when])))]
    both.fake.routes = [("GET", f".*{p}.*" if p.endswith("/") else f".*{p}", lambda self, *a, fn=fn, **k: fn()) for p,fn in routes]
    for _ in range(8):
        j = both.jobs.get(job.id)
        assert j.id == job.id and j.status in ("queued", "running", "succeeded", "failed", "cancelled") and (j.status != "succeeded" or not j.error) and (j.status == "failed") == bool(j.error) and (j.status == "succeeded" or not j.result)
        assert TrainingJob.model_validate_json(j.model_dump_json()) == j and j.row()["tokens"] >= 0 and repr(j)
        assert [x.id for x in both.jobs.list()] == [job.id] and len([*both.jobs.events(job.id)]) == 5 and isinstance(both.jobs.metrics(job.id), list)

# ---- the interface -----------------------------------------------------------------------------------------------------------------------------

def test_a_job_from_beginning_to_end(both):
    assert isinstance(both.jobs, Backend)
    job = both.jobs.create(both.spec(n_epochs=2))
    assert job.status == "queued" and job.id.startswith("job_") and job.remote["id"] in both.fake.jobs
    said = []
    end = both.watch(job.id, on_event=said.append)
    assert end.status == "succeeded" and end.over and end.step == end.total == 6 and end.metrics["train_loss"] == .4
    assert len(said) == len({e.id for e in said}) and [e.ts for e in said] == sorted(e.ts for e in said)
    assert both.jobs.get(job.remote["id"]).id == job.id and both.jobs.list()[0].id == job.id
    row = end.row()
    assert row["provider"] == both.cls.name and row["method"] == "sft" and row["tokens"] > 0 and len(row["dataset_hash"]) == 64
    assert [p["step"] for p in both.jobs.metrics(job.id)] == [2, 4, 6]
    cks = both.jobs.checkpoints(job.id)
    assert [c["step"] for c in cks] == [2, 4, 6] and len({c["model"] for c in cks}) == 3
    m = both.jobs.model(end)
    assert isinstance(m, HostedModel) and m.generate(["one", [dict(role="user", content="two")]])[1].text.endswith("two")
    assert json.loads(both.jobs.save_ref(end, both.tmp/"ref").read_text())["ref"] == end.result["ref"] == m.ref

def test_dpo_and_validation_files_reach_the_provider(both):
    both.train.write_text(dpo()); both.validation.write_text(dpo(10).replace("order", "parcel"))
    more = dict(n_evals=2, dpo_beta=.2) if both.cls is TogetherJobs else dict(beta=.2)
    job = both.jobs.create(both.spec(inputs=dict(train=str(both.train), validation=str(both.validation)), method="dpo", **more))
    got = both.fake.jobs[job.remote["id"]]["job"]
    assert got["validation_file"] in both.fake.files and got["validation_file"] != got["training_file"] and "dpo" in json.dumps(got)
    assert both.watch(job.id).row()["method"] == "dpo"

def test_cost_before_and_after(oa, to):
    oa.jobs = oa.again(usd_per_million="3")
    e = oa.jobs.estimate(oa.spec(n_epochs=3))
    assert e.usd == Decimal(3)*e.tokens/10**6 and "closed to new users since May 2026" in e.warnings[0]
    end = oa.watch(oa.jobs.create(oa.spec(n_epochs=3)).id)
    assert end.cost_usd == Decimal(3)*end.result["tokens"]/10**6 and end.cost_estimate_usd == e.usd
    assert oa.again("o2").estimate(oa.spec()).usd is None and "chooses the number of epochs" in oa.again("o2").estimate(oa.spec()).warnings[1]
    end = to.watch(to.jobs.create(to.spec(n_epochs=2)).id)
    assert end.cost_usd == Decimal(to.fake.jobs[end.remote["id"]]["job"]["total_price"])/10**9

def test_pages_of_jobs_and_events(oa):
    first = oa.jobs.create(oa.spec())
    for i in range(130):
        f = next(iter(oa.fake.files))
        oa.fake.post_job(json.dumps(dict(model="m", training_file=f)).encode())
    for i in range(250): oa.fake.say(first.remote["id"], f"note {i}")
    assert len(oa.jobs.list(limit=1000)) == 131 and len(oa.jobs.list(limit=7)) == 7
    ours = [j for j in oa.jobs.list(limit=1000) if j.id == first.id]
    assert len(ours) == 1 and sum(j.spec.name.startswith("ftjob") for j in oa.jobs.list(limit=1000)) == 130
    es = [*oa.jobs.events(first.id)]
    assert len(es) == 251 and [e.text for e in es[-2:]] == ["note 248", "note 249"]
    assert [e.text for e in oa.jobs.events(first.id, after=es[200].id)] == [e.text for e in es[201:]]

def test_a_page_that_fails_is_told_like_any_other(oa):
    job = oa.jobs.create(oa.spec())
    for i in range(150): oa.fake.say(job.remote["id"], f"note {i}")
    orig = FakeOpenAI.list_events
    oa.fake.routes = [(m, p, (lambda self, id, q, **k: orig(self, id, q) if "after" not in q else (500, self.error("tired"), {})) if p.endswith("/events") else fn) for m,p,fn in oa.fake.routes]
    with pytest.raises(ProviderError, match="list the events"): oa.again(max_retries=0).events(job.id)

def test_a_bad_file_never_leaves(both):
    both.train.write_text(sft(11) + '{"messages": []}\n')
    with pytest.raises(DataError, match="line 12"): both.jobs.create(both.spec())
    with pytest.raises(DataError, match="needs a training file"): both.jobs.create(both.spec(inputs=dict(data="x")))
    with pytest.raises(DataError, match="no such file"): both.jobs.create(both.spec(inputs=dict(train="nowhere.jsonl")))
    with pytest.raises(TrainError, match="[Ss]ettings"): both.jobs.create(both.spec(lr=1))
    with pytest.raises(TrainError, match="kind"): both.jobs.create(JobSpec(kind="sft", name="x"))
    assert both.fake.requests == [] and both.jobs.journal.all() == []

# ---- once, not twice ---------------------------------------------------------------------------------------------------------------------------

def test_the_same_content_is_sent_once(both):
    a = both.jobs.upload(both.train)
    copy = both.tmp/"copy.jsonl"; copy.write_bytes(both.train.read_bytes())
    assert both.jobs.upload(copy) == a and both.again().upload(copy) == a and len(both.fake.files) == 1
    del both.fake.files[a]
    assert both.jobs.upload(copy) != a

def test_a_file_that_arrived_unheard_is_found(oa):
    oa.fake.fail("POST", "/files$", "lose", times=5)
    with pytest.raises(ProviderError): oa.again(max_retries=0).upload(oa.train)
    oa.fake.faults.clear()
    assert oa.jobs.upload(oa.train) in oa.fake.files and len(oa.fake.files) == 1

def test_the_same_spec_is_one_job(both):
    a = both.jobs.create(both.spec()); assert both.again().create(both.spec()).id == a.id
    both.train.write_text(sft(13)); b = both.jobs.create(both.spec()); assert b.id != a.id     # other rows, another job
    both.watch(b.id); assert both.jobs.create(both.spec()).id == b.id and len(both.fake.jobs) == 2   # it is there, and paid
    c = both.jobs.create(both.spec(), again=True); assert c.id != b.id
    both.watch(both.jobs.cancel(c.id).id)
    assert both.jobs.create(both.spec()).id not in (a.id, b.id, c.id) and len(both.fake.jobs) == 4

def test_the_warehouse_gets_a_row_when_the_status_changed(both):
    sql = (Path(openai_jobs.__file__).parents[1]/"store"/"sql"/"0003_results.up.sql").read_text()
    columns = set(re.findall(r"^ {4}(\w+) +[A-Z]\w*[( ,]", sql.split("finetuning_jobs")[1].split("ENGINE")[0], re.M)) - {"INDEX"}
    class Warehouse(list):
        def insert(self, table, rows, token): assert table == "finetuning_jobs"; self += [(token, r) for r in rows]; return len(rows)
    wh,job = Warehouse(), both.jobs.create(both.spec())
    assert both.jobs.fill(wh) == 1
    both.watch(job.id)
    assert both.jobs.fill(wh) == 1 and both.again().fill(wh) == 0
    assert set(wh[0][1]) <= columns and {"status", "cost_usd", "provider"} <= columns and wh[-1][1]["status"] == "succeeded" and len({t for t,_ in wh}) == 2

def test_two_at_once_make_one_job(both):
    got = []
    ts = [threading.Thread(target=lambda: got.append(both.again().create(both.spec()).id)) for _ in range(4)]
    [t.start() for t in ts]; [t.join() for t in ts]
    assert len(set(got)) == 1 and len(got) == 4 and len(both.fake.jobs) == 1

@pytest.mark.parametrize("fault", ["lose", 500, 503, "drop"])
def test_a_lost_answer_does_not_make_a_second_job(both, fault):
    both.fake.fail("POST", both.create, fault)
    job = both.jobs.create(both.spec())
    assert len(both.fake.jobs) == 1 and both.watch(job.id).status == "succeeded"

def test_429_is_obeyed(both):
    both.fake.fail("POST", both.create, 429, times=2, headers={"retry-after": "7"})
    both.jobs.create(both.spec())
    assert both.naps == [7., 7.] and len(both.fake.jobs) == 1
    both.fake.fail("GET", r"/(jobs|fine-tunes)/[^/]+$", 429, times=1, headers={"retry-after": "1"})
    t = time.monotonic(); both.jobs.list(); both.jobs.get(both.jobs.list()[0].id)
    assert time.monotonic()-t >= 1    # by the SDK itself

def test_no_credit_is_not_asked_again(oa):
    oa.fake.fail("POST", oa.create, 429, times=9, message="You exceeded your current quota", code="insufficient_quota")
    with pytest.raises(ProviderError, match="no credit left"): oa.jobs.create(oa.spec())
    assert oa.created == 1

CHILD = """
import os, sys
sys.path.append({fakes!r})
from somaagent.train.{module} import {cls}
from somaagent.train.job import JobSpec
class Dies({cls}):
    def {hook}(self, *a, **k):
        out = super().{hook}(*a, **k)
        os._exit(9)
Dies({home!r}, base_url={url!r}).create(JobSpec.model_validate_json({spec!r}))
"""

@pytest.mark.parametrize("hook,provider", [("_submit", "openai"), ("_submit", "together"), ("upload", "openai")])
def test_killed_between_asking_and_writing_down(hook, provider, request):
    both = request.getfixturevalue(dict(openai="oa", together="to")[provider])
    code = CHILD.format(fakes=str(fakes), module=f"{both.cls.name}_jobs", cls=both.cls.__name__, hook=hook, home=str(both.tmp/"home"), url=both.fake.base_url, spec=both.spec().model_dump_json())
    r = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert r.returncode == 9, r.stderr
    n = len(both.fake.jobs)
    assert n == (hook == "_submit")
    listed = both.jobs.list()
    job = both.jobs.create(both.spec())
    assert len(both.fake.jobs) == 1 and len(both.fake.files) == 1 and any(j.id == job.id for j in listed)
    assert both.watch(job.id).status == "succeeded"

# ---- uploads -----------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("fault", ["drop", 500, "slow"])
def test_an_upload_that_breaks_goes_on(both, fault):
    both.train.write_text(sft(2000))
    verb,path = ("POST", "/v1/files$") if both.cls is OpenAIJobs else ("PUT", "/put/")
    both.fake.fail(verb, path, fault, seconds=1.1, after=5000)
    show = Progress("up", both.train.stat().st_size, mode="none")
    id = both.again(timeout_s=.8).upload(both.train, show)
    assert both.fake.files[id][1] == both.train.read_bytes() and show.n == both.train.stat().st_size

def test_parts_that_arrived_are_not_sent_again(oa):
    class Parts(OpenAIJobs): part_bytes = 1000
    oa.train.write_text(sft(60)); size = oa.train.stat().st_size
    oa.cls = Parts
    sent = lambda: sum(m == "POST" and p.endswith("/parts") for m,p,*_ in oa.fake.requests)
    class Third(Parts):
        def _call(self, doing, fn, *a, **k):
            if doing == "take part 4": raise ProviderError("the line is dead", transient=True)
            return super()._call(doing, fn, *a, **k)
    with pytest.raises(ProviderError): Third(oa.tmp/"home", base_url=oa.fake.base_url).upload(oa.train)
    assert sent() == 3
    id = oa.again().upload(oa.train)
    assert oa.fake.files[id][1] == oa.train.read_bytes() and sent() == -(-size//1000) and len(oa.fake.uploads) == 1

def test_an_upload_that_expired_begins_anew(oa):
    class Parts(OpenAIJobs): part_bytes = 1000
    oa.train.write_text(sft(60)); oa.cls = Parts
    j = oa.again(); from somaagent.train.hosted import file_sha
    j.journal.put("files", file_sha(oa.train), upload="upload-gone", parts=["part-1"], part_bytes=1000)
    assert oa.fake.files[j.upload(oa.train)][1] == oa.train.read_bytes()

def test_a_file_that_the_provider_refuses(to):
    def odd(self, id, **_):
        FakeTogether.preprocess(self, id)
        self.files[id][0].update(processing_status="INVALID_FORMAT", validation_report=dict(valid=False, error="line 3 is odd", error_type="INVALID_FORMAT"))
        return self.seen(self.files[id][0])
    to.fake.routes = [(m, p, odd if p.endswith("preprocess") else fn) for m,p,fn in to.fake.routes]
    with pytest.raises(DataError, match="line 3 is odd"): to.jobs.create(to.spec())
    assert to.fake.jobs == {}

# ---- watching ----------------------------------------------------------------------------------------------------------------------------------

def test_a_new_watcher_goes_on_where_the_last_one_stopped(both):
    both.fake.script = lambda job: ["queued"] + [("running", k) for k in (1, 2, 3, 4, 5, 6)] + ["succeeded" if both.cls is OpenAIJobs else "completed"]
    job,first,rest = both.jobs.create(both.spec()), [], []
    class Stop(Exception): pass
    def hear(e):
        first.append(e.text)
        if len(first) == 4: raise Stop
    with pytest.raises(Stop): both.watch(job.id, on_event=hear)
    end = both.watch(job.id, both.again(), on_event=lambda e: rest.append(e.text))
    every = [e.text for e in both.jobs.events(job.id)]
    assert end.status == "succeeded" and first + rest[1:] == every and rest[0] == first[-1]   # what was being told is told again, nothing is lost

def test_an_outage_is_waited_out_and_a_long_one_is_told(both):
    job = both.jobs.create(both.spec())
    both.fake.fail("GET", r"/(jobs|fine-tunes)/[^/]+$", 503, times=3)
    assert both.watch(job.id, both.again(max_retries=0)).status == "succeeded" and len(both.naps) >= 3
    other = both.jobs.create(both.spec("other"))
    both.fake.fail("GET", r"/(jobs|fine-tunes)/", 503, times=99)
    with pytest.raises(ProviderError, match="passes by itself"): both.watch(other.id, both.again(max_retries=0), patience=3)
    both.fake.faults.clear()
    assert both.watch(other.id).status == "succeeded"

def test_slow_events(both):
    job = both.jobs.create(both.spec())
    both.fake.fail("GET", "/events$", "slow", times=1, seconds=1.1)
    assert both.watch(job.id, both.again(timeout_s=.8)).status == "succeeded"

def test_a_status_nobody_knows_is_not_an_end(both):
    done = "succeeded" if both.cls is OpenAIJobs else "completed"
    both.fake.script = lambda job: ["queued", "paused_for_review", ("running", 2), "paused_for_review", done]
    job = both.jobs.create(both.spec())
    both.jobs.get(job.id)
    odd = both.jobs.get(job.id)
    assert odd.status == "running" and odd.remote["status"] == "paused_for_review" and not odd.over
    assert both.watch(job.id).status == "succeeded"

def test_an_end_nobody_knows_is_an_end(oa):
    job = oa.jobs.create(oa.spec())
    oa.fake.jobs[job.remote["id"]].update(frames=[]); oa.fake.jobs[job.remote["id"]]["job"].update(status="retired", finished_at=oa.fake.tick())
    end = oa.watch(job.id)
    assert end.status == "failed" and "retired" in end.error

def test_a_job_that_fails_says_why(both):
    both.fake.script = lambda job: ["queued", ("running", 2), "failed" if both.cls is OpenAIJobs else "error"]
    end = both.watch(both.jobs.create(both.spec()).id)
    assert end.status == "failed" and ("invalid training file" in end.error or "Out of memory" in end.error) and end.result == {}
    with pytest.raises(TrainError, match="made no model"): both.jobs.model(end)

def test_cancel(both):
    job = both.jobs.create(both.spec())
    assert both.watch(both.jobs.cancel(job.id).id).status == "cancelled"
    done = both.watch(both.jobs.create(both.spec("other")).id)
    assert both.jobs.cancel(done.id).status == "succeeded"
    with pytest.raises(TrainError, match="no such job"): both.jobs.get("job_nobody")

# ---- keys, refusals, secrets -------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("status,text", [(403, "You do not have permission to create fine-tuning jobs."), (403, "Forbidden"), (400, "Fine-tuning is no longer available for your organization."), (404, "The fine-tuning API is not available to this account")])
def test_openai_is_closed_to_new_users_and_says_the_ways_out(oa, status, text):
    oa.fake.fail("POST", oa.create, status, times=5, message=text)
    with pytest.raises(ProviderError) as e: oa.jobs.create(oa.spec())
    assert "closed to new users since May 2026" in str(e.value) and "kind='together'" in str(e.value) and "kind='sft'" in str(e.value) and oa.created == 1
    assert oa.jobs.list()[0].status == "failed"
    oa.fake.faults.clear()
    assert oa.jobs.create(oa.spec()).status == "queued"    # a refusal is not for ever

def test_another_400_is_not_called_closed(oa):
    oa.fake.fail("POST", oa.create, 400, message="Invalid value for n_epochs")
    with pytest.raises(ProviderError) as e: oa.jobs.create(oa.spec())
    assert "closed" not in str(e.value) and "n_epochs" in str(e.value)

def test_expired_and_missing_keys(both, monkeypatch):
    job = both.jobs.create(both.spec())
    both.fake.key = "another"
    with pytest.raises(ProviderError, match=f"{both.cls.key_env} is wrong, expired or revoked"): both.again().get(job.id)
    with pytest.raises(ProviderError, match="rejects the key"): both.watch(job.id, both.again(), patience=9)
    assert both.naps == []    # a dead key is not waited for
    monkeypatch.delenv(both.cls.key_env)
    with pytest.raises(SettingsError, match=f"[Ss]et {both.cls.key_env}"): both.again().get(job.id)
    both.fake.key = "second"; monkeypatch.setenv("OTHER_KEY", "second")
    assert both.again(key_env="OTHER_KEY").get(job.id).id == job.id

def test_no_secret_is_written_down(both):
    out = io.StringIO(); h = logging.StreamHandler(out)     # without the redacting formatter: the messages must be clean by themselves
    log = logger(); log.addHandler(h)
    try:
        both.fake.fail("POST", both.create, 500, times=2, message=f"internal: Bearer {KEY}")
        job = both.jobs.create(both.spec()); both.watch(job.id)
        both.fake.key = "another"
        with pytest.raises(ProviderError) as e: both.again().get(job.id)
    finally: log.removeHandler(h)
    text = str(e.value) + repr(e.value) + repr(both.jobs) + out.getvalue() + "".join(f.read_text() for f in both.tmp.rglob("*.json"))
    assert KEY not in text and "internal" in text

def test_without_the_sdk_the_extra_is_named(both, monkeypatch):
    monkeypatch.setitem(sys.modules, both.cls.sdk, None)
    with pytest.raises(MissingExtraError, match=r"somaagent\[hosted\]"): both.again().list()

def test_the_command_line_tells_how_it_ended(both, monkeypatch):
    from click.testing import CliRunner
    from somaagent.cli.hosted import hosted
    monkeypatch.setenv("SOMA_STORES_HOME", str(both.tmp/"cli"))
    def run(*args): r = CliRunner().invoke(hosted, [*map(str, args), "--base-url", both.fake.base_url]); return r.exit_code, r.stdout
    both.fake.script = lambda job: ["queued", "failed" if both.cls is OpenAIJobs else "error"]
    p,job = both.cls.name, (both.train, "--base", both.spec().base)
    assert run("create", p, *job, "--set", "epochs=1")[0] == 1 and both.fake.jobs == {}
    code,out = run("create", p, *job, "--detach", "--json"); assert code == 0
    id = json.loads(out)["id"]
    for _ in range(3): both.fake.advance(next(iter(both.fake.jobs)))
    code,out = run("watch", p, id); assert code == 1 and "failed" in out
    assert json.loads(run("show", p, id, "--json")[1])["status"] == "failed" and id in run("list", p)[1]
    assert run("save", p, id, both.tmp/"x")[0] == 1 and not (both.tmp/"x").exists()

def test_the_journal_is_whole_or_not_there(tmp_path, monkeypatch):
    j = Journal(tmp_path); j.put("jobs", "a", n=1)
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError): j.put("jobs", "a", n=2)
    monkeypatch.undo()
    assert j.get("jobs", "a") == dict(n=1) and [f.name for f in (tmp_path/"jobs").iterdir()] == ["a.json"]
    ts = [threading.Thread(target=lambda k=k: j.put("jobs", "b", **{f"k{k}": k})) for k in range(20)]
    [t.start() for t in ts]; [t.join() for t in ts]
    assert len(j.get("jobs", "b")) == 20
