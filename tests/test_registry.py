"""The registry: every rule of the gate, version numbers, random use beside a model of what should hold, processes at once, tampering of every kind, in both databases."""
import bz2, datetime as dt, gzip, json, lzma, os, pickle, struct, subprocess, sys, time, zlib
from pathlib import Path

import pytest
import sqlalchemy as sa
from conftest import root
from hypothesis import HealthCheck, Phase, given, settings as hyp, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from test_store import postgres, state_url  # noqa: F401 (fixtures)

from somaagent.core.errors import RegistryError, SomaError, StoreError
from somaagent.release.manifest import file_problems, is_pickle, is_safetensors, safe_weights, signing_key
from somaagent.release.registry import GateDecision, Registry, bump, gate, judge, next_version
from somaagent.release.semver import interface, interface_changes, worse_slices
from somaagent.store.artifacts import Artifacts
from somaagent.store.state import ModelVersionRow, State

# ---- gate --------------------------------------------------------------------------------------------------------------------
GOOD = dict(against="1.0.0", primary=dict(metric="passed", label="exact match", a=.1, b=.5, diff=.4, lo=.3, hi=.5, n=200), constant=dict(answer="x", a=.1, b=.5, diff=.4, lo=.3, hi=.5, n=200), loss=dict(a=2., b=1., diff=-1., lo=-1.1, hi=-.9, n=200), ab=dict(verdict="better", valid=True, harm=[]), worse=[])
def but(**kw): return {k: (dict(GOOD[k], **v) if isinstance(v, dict) else v) for k, v in {**GOOD, **kw}.items()}

@pytest.mark.parametrize("rule,evidence", [("gain", but(primary=dict(lo=.02))), ("gain", but(primary=dict(lo=None))), ("gain", {k: v for k, v in GOOD.items() if k != "primary"}), ("skill", but(constant=dict(lo=0.))), ("skill", {k: v for k, v in GOOD.items() if k != "constant"}),
    ("loss", but(loss=dict(diff=.2, lo=.1, hi=.3))), ("traffic", but(ab=dict(verdict="worse"))), ("traffic", but(ab=dict(verdict="no difference"))), ("traffic", but(ab=dict(valid=False))), ("traffic", but(ab=dict(harm=["tokens"]))), ("traffic", {k: v for k, v in GOOD.items() if k != "ab"})])
def test_every_rule_of_the_gate_can_refuse(rule, evidence):
    assert gate(GOOD, dict(min_gain=.02)).promote
    d = gate(evidence, dict(min_gain=.02))
    assert not d.promote and [r["rule"] for r in d.reasons if not r["ok"]] == [rule] and d.sentence.startswith("Refused")

def test_gate_is_neutral_where_the_test_is_too_small_and_refuses_stale_evidence():
    assert gate(but(ab=dict(verdict="not enough data")), dict(min_gain=.02)).promote
    assert [r["rule"] for r in gate(GOOD, dict(min_gain=.02), production="1.1.0").reasons if not r["ok"]] == ["fresh"]

# ---- version numbers ---------------------------------------------------------------------------------------------------------
@given(st.floats(-1, 1), st.floats(0, .5), st.floats(0, .5), st.floats(.001, .2), st.booleans())
@hyp(max_examples=150, deadline=None, derandomize=True)
def test_the_number_says_where_the_interval_lies(diff, below, above, margin, flip):
    lo, hi = diff-below, diff+above
    p = dict(diff=-diff, lo=-hi, hi=-lo, lower_is_better=True) if flip else dict(diff=diff, lo=lo, hi=hi)
    want = "major" if hi < 0 else "minor" if lo > 0 else "patch" if lo > -margin else "unproven"
    got = judge(dict(primary=p), margin=margin)
    assert got.part == want == bump(dict(primary=p), margin=margin) and got.why
    assert judge(dict(primary=p), ["tools"], margin).part == "major"

@given(st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.floats(-1, 1), st.floats(0, 1)), min_size=1), st.data())
@hyp(max_examples=150, deadline=None, derandomize=True)
def test_slices_are_corrected_for_all_that_were_looked_at(slices, data):
    guarded = data.draw(st.none() | st.sets(st.sampled_from(sorted(slices))))
    names = sorted(slices if guarded is None else guarded)
    got = worse_slices(dict(slices={k: dict(diff=d, p=p) for k, (d, p) in slices.items()}), guarded)
    order, want, stopped = sorted(names, key=lambda k: slices[k][1]), set(), False
    for i, k in enumerate(order):   # Holm: stop at the first that does not pass
        stopped |= not (len(order)-i)*slices[k][1] < .05
        if not stopped and slices[k][0] < 0: want.add(k)
    assert set(got) == want

def test_numbers_at_the_edges():
    assert next_version(None, "patch", {"1.0.0"}) == "2.0.0" and bump({}) == "unproven" and bump(dict(primary=dict(lo=None, hi=None, diff=.1))) == "unproven"
    assert next_version("1.2.3", "unproven", {"1.2.4"}) == "1.2.5" and next_version("1.9.9", "minor") == "1.10.0"
    with pytest.raises(RegistryError, match="not measured"): worse_slices(dict(slices=dict(a=dict(diff=-1., p=0.))), ["b"])

def test_a_tokenizer_saved_again_is_the_same_interface(tmp_path):
    from somaagent.core.settings import data_dir
    t = json.loads((data_dir()/"tiny"/"tokenizer.json").read_text())
    t["padding"], t["truncation"] = dict(strategy="BatchLongest"), dict(max_length=512)
    (tmp_path/"tokenizer.json").write_text(json.dumps(t, indent=1))
    for f in ("tokenizer_config.json", "chat_template.jinja"): (tmp_path/f).write_bytes((data_dir()/"tiny"/f).read_bytes())
    old = interface(data_dir()/"tiny")
    assert interface_changes(old, interface(tmp_path)) == []
    t["model"]["vocab"]["zzz"] = 10**6
    (tmp_path/"tokenizer.json").write_text(json.dumps(t))
    assert interface_changes(old, interface(tmp_path)) == ["tokenizer"]
    (tmp_path/"tokenizer.json").write_text("{")
    with pytest.raises(RegistryError, match="tokenizer.json"): interface(tmp_path)

# ---- random use beside a model -----------------------------------------------------------------------------------------------
def weights(d: Path, text: str):
    d = d/f"w-{text}"; d.mkdir(parents=True, exist_ok=True)
    head = json.dumps(dict(w=dict(dtype="U8", shape=[len(text)], data_offsets=[0, len(text)]))).encode()
    (d/"adapter_model.safetensors").write_bytes(struct.pack("<Q", len(head))+head+text.encode()); return d

@pytest.fixture
def reg(tmp_path):
    r = Registry(State(f"sqlite:///{tmp_path}/s.db"), Artifacts(tmp_path/"a"))
    yield r
    r.state.close()

KINDS = dict(minor=dict(lo=.1, hi=.2, diff=.15), patch=dict(lo=-.01, hi=.2, diff=.1), major=dict(lo=-.2, hi=-.1, diff=-.15), unproven=dict(lo=-.1, hi=.2, diff=.05), unmeasured={})

class Model(RuleBasedStateMachine):
    "Random use of the registry beside a model of what should hold: what was registered, its status, who was in production, names, what is tampered with"
    where, url, n = None, None, 0
    def __init__(self):
        super().__init__()
        Model.n += 1
        self.d, self.m = self.where/f"e{Model.n}", f"m{Model.n}"
        self.state = self.opened.setdefault(self.url, None) or State(self.url); self.opened[self.url] = self.state
        self.reg = Registry(self.state, Artifacts(self.d/"a"), keys=self.where/"keys")
        self.reg.ensure_base(self.m, weights(self.d, "base"), "tiny")
        self.content, self.status, self.stack, self.been = {"base": "1.0.0"}, {"1.0.0": "production"}, ["1.0.0"], {"1.0.0"}
        self.order, self.names, self.said, self.broken, self.past = ["1.0.0"], {}, [("1.0.0", "registered", ""), ("1.0.0", "promoted", "")], {}, []
    opened = {}
    def say(self, version, action, alias=""): self.said.append((version, action, alias))
    def some(self, data): return data.draw(st.sampled_from(sorted(self.status)))
    def go(self, v): self.status[self.stack[-1]] = "retired"; self.status[v] = "production"; self.been.add(v)

    @rule(text=st.sampled_from("abcdef"), kind=st.sampled_from(sorted(KINDS)), slice_worse=st.booleans(), force=st.sampled_from(["", "", "patch", "minor"]))
    def register(self, text, kind, slice_worse, force):
        e = dict(primary=dict(KINDS[kind]), worse=["x"] if slice_worse else [])
        if any(says.startswith("the ") for _, says in self.broken.values()):   # a record or manifest: the next number would rest on it
            with pytest.raises(RegistryError, match="not what was registered"): self.reg.register(self.m, weights(self.d, text), "tiny", "ds", e)
            return
        v = self.reg.register(self.m, weights(self.d, text), "tiny", "ds", e, bump=force, reason="because")
        if text in self.content: assert v.version == self.content[text]; return
        part = force or ("major" if slice_worse else "unproven" if kind == "unmeasured" else kind)
        i, at = dict(major=0, minor=1).get(part, 2), [*map(int, self.stack[-1].split("."))]
        while (want := ".".join(map(str, at := at[:i]+[at[i]+1]+[0]*(2-i)))) in self.status: pass
        assert v.version == want and v.parent == self.stack[-1]
        self.content[text], self.status[want] = want, "refused" if part == "unproven" and kind == "unproven" else "candidate"
        self.order.append(want); self.say(want, "registered")
        if self.status[want] == "refused": self.say(want, "refused")

    @precondition(lambda self: len(self.status) > 1)
    @rule(data=st.data(), yes=st.booleans(), force=st.sampled_from([None, None, "", "I know"]), stale=st.sampled_from([False, False, True]))
    def decide(self, data, yes, force, stale):
        v = self.some(data)
        d = GateDecision(yes, [], f"because {len(self.said)}", "9.9.9" if stale else self.stack[-1])
        do = lambda: self.reg.promote(self.m, v, d, force=force)
        goes = yes or force
        if not yes and force == "" or goes and v in self.broken or yes and stale and v != self.stack[-1]:
            with pytest.raises(RegistryError): do()
            return
        got = do().status
        if v != self.stack[-1]:
            if goes: self.go(v); self.stack.append(v); self.say(v, "promoted")
            else:
                if self.status[v] == "candidate": self.status[v] = "refused"
                self.say(v, "refused")
        assert got == self.status[v]

    @rule(data=st.data(), default=st.booleans(), any_=st.sampled_from([False, False, True]))
    def rollback(self, data, default, any_):
        v = (self.stack[-2] if len(self.stack) > 1 else None) if default else self.some(data) if any_ else data.draw(st.sampled_from(sorted(self.been)))
        do = lambda: self.reg.rollback(self.m, None if default else v, "why")
        if v is None or v == self.stack[-1] or v not in self.been or v in self.broken:
            with pytest.raises(RegistryError): do()
            return
        assert do().version == v
        self.go(v); self.say(v, "rolled back")
        if v in self.stack:
            while self.stack[-1] != v: self.stack.pop()
        else: self.stack.append(v)

    @rule(data=st.data(), alias=st.sampled_from(["stable", "shadow", "production", "1x"]), take=st.booleans())
    def name(self, data, alias, take):
        v = None if take else data.draw(st.sampled_from(sorted({*self.status, *self.names, "production"})))
        if alias in ("production", "1x") or take and alias not in self.names:
            with pytest.raises(RegistryError): self.reg.alias(self.m, alias, v)
            return
        self.reg.alias(self.m, alias, v)
        to = None if take else self.stack[-1] if v == "production" else self.names.get(v, v)
        if to == self.names.get(alias): return
        self.say(to or self.names[alias], "named" if to else "unnamed", alias)
        if to: self.names[alias] = to
        else: del self.names[alias]

    @precondition(lambda self: len(self.broken) < 2)
    @rule(data=st.data(), how=st.sampled_from(["object", "laid", "base", "hash", "manifest", "signature", "gone"]))
    def tamper(self, data, how):
        v = self.some(data)
        if v in self.broken: return
        row = self.reg.get(self.m, v)
        [f] = self.reg.artifacts.files(row.hash).values()
        obj, laid = Path(self.reg.artifacts._object(f)), self.reg.artifacts.checkouts/row.hash[7:]/"extra"
        col = lambda c: self.sql(f"SELECT {c} FROM model_versions WHERE id = :id", id=row.id).scalar()
        put = lambda c, x: lambda: self.sql(f"UPDATE model_versions SET {c} = {'CAST(:x AS JSONB)' if c == 'manifest' and not self.state.sqlite else ':x'} WHERE id = :id", id=row.id, x=x)
        dump = lambda m: m if isinstance(m, str) else json.dumps(m)
        if how == "object":
            raw = obj.read_bytes(); obj.write_bytes(raw[:-1]+bytes([raw[-1] ^ 1])); mend, says = lambda: obj.write_bytes(raw), "adapter_model.safetensors"
        elif how == "laid":
            self.reg.load(self.m, v); laid.write_text("x"); mend, says = laid.unlink, "extra"
        elif how in ("base", "signature"):
            old = col(how); put(how, "x")(); mend, says = put(how, old), "the record" if how == "base" else "the manifest"
        elif how == "hash":
            other = next((x for t, x in self.content.items() if x != v), None)
            if not other: return
            m = json.loads(dump(col("manifest"))); old = dump(m)
            put("manifest", json.dumps(m | dict(hash=self.reg.get(self.m, other).hash)))(); mend, says = put("manifest", old), "the manifest"
        else:
            old = dump(col("manifest")); m = json.loads(old); m["files"]["adapter_model.safetensors"]["bytes"] += 1
            put("manifest", None if how == "gone" else json.dumps(m))(); mend, says = put("manifest", old), "the manifest"
        self.broken[v] = (mend, says)
    def sql(self, text, **kw):
        with self.state.session() as s: return s.execute(sa.text(text), kw)

    @precondition(lambda self: self.broken)
    @rule(data=st.data())
    def mend(self, data): self.broken.pop(data.draw(st.sampled_from(sorted(self.broken))))[0]()

    @rule(data=st.data())
    def verify(self, data):
        v = self.some(data)
        seen = self.reg.verify(self.m, v)
        assert seen.ok == (v not in self.broken) and (seen.ok or self.broken[v][1] in [p["file"] for p in seen.problems])
        if seen.ok: assert self.reg.load(self.m, v).is_dir()
        else:
            with pytest.raises(RegistryError, match=self.broken[v][1]): self.reg.load(self.m, v)

    @invariant()
    def holds(self):
        assert {v.version: v.status for v in self.reg.list(self.m)} == self.status
        waits = [v for v in self.order if self.status[v] == "candidate"]
        assert self.reg.aliases(self.m) == {"production": self.stack[-1]} | ({"candidate": waits[-1]} if waits else {}) | self.names
        e = self.reg.events(self.m)
        rows = e.rows()
        assert rows[:len(self.past)] == self.past, "an event was changed"
        assert [(r["version"], r["action"], r["alias"]) for r in e.iter_rows(named=True)] == self.said
        assert e["ts"].is_sorted() and e["ts"].n_unique() == len(e) and not (e["actor"] == "").any()
        self.past = rows
        h = self.reg.history(self.m)
        assert h["version"].to_list() == [v for v, a, _ in self.said if a in ("promoted", "rolled back")]
        assert h["until"].to_list() == [*h["since"].to_list()[1:], None] and self.reg.at(self.m, dt.datetime.now(dt.timezone.utc)+dt.timedelta(days=1)) == self.stack[-1]

STEPS = dict(sqlite=(10, 25), postgres=(3, 20))
@pytest.mark.parametrize("db", STEPS)
def test_registry_against_a_model(tmp_path, db, request):
    Model.where, Model.url = tmp_path, f"sqlite:///{tmp_path}/s.db" if db == "sqlite" else request.getfixturevalue("postgres")
    examples, steps = STEPS[db]
    try: run_state_machine_as_test(Model, settings=hyp(max_examples=examples, stateful_step_count=steps, deadline=None, derandomize=True, database=None, phases=[Phase.generate], suppress_health_check=[*HealthCheck]))
    finally:
        if db == "postgres":
            with Model.opened[Model.url].engine.begin() as c: c.execute(sa.text("DROP SCHEMA public CASCADE")); c.execute(sa.text("CREATE SCHEMA public"))
        Model.opened.pop(Model.url).close()

# ---- processes at once -------------------------------------------------------------------------------------------------------
CHILD = """
import sys, time
from pathlib import Path
from somaagent.release.registry import GateDecision, Registry
from somaagent.store.artifacts import Artifacts
from somaagent.store.state import State
url, home, start, texts = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4:]
reg = Registry(State(url), Artifacts(home/"a"), keys=home/"keys")
time.sleep(max(0, start-time.time()))
reg.ensure_base("m", home/"w-base", "tiny")
for t in texts:
    v = reg.register("m", home/f"w-{t}", "tiny", "ds", {}, parent="1.0.0").version
    reg.promote("m", v, GateDecision(True, [], t))
    print(v, flush=True)
"""
def test_two_processes_at_once(tmp_path, state_url):
    "Both make the key, the first version, versions, the same version, and promote: nothing is lost and there is one history"
    for t in ("base", "shared", *(f"{p}{i}" for p in "ab" for i in range(6))): weights(tmp_path, t)
    State(state_url).close()
    start, env = time.time()+3, {**os.environ, "SOMA_PROGRESS": "none", "PYTHONPATH": str(root)}
    procs = [subprocess.Popen([sys.executable, "-c", CHILD, state_url, str(tmp_path), str(start), *[f"{p}{i}" for i in range(6)], "shared"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) for p in "ab"]
    outs = []
    for p in procs:
        out, err = p.communicate(timeout=90); assert p.returncode == 0, err
        outs.append(out.split())
    reg = Registry(State(state_url), Artifacts(tmp_path/"a"), keys=tmp_path/"keys")
    assert outs[0][-1] == outs[1][-1], "the same content got two versions"
    own = outs[0][:-1]+outs[1][:-1]
    assert len(set(own)) == 12 and {v.version for v in reg.list("m")} == {"1.0.0", outs[0][-1], *own}
    assert [v.status for v in reg.list("m")].count("production") == 1 and len(reg.keys()) == 1
    e = [r for r in reg.events("m").iter_rows(named=True) if r["action"] == "promoted"]
    assert all(b["from_version"] == a["version"] for a, b in zip(e, e[1:])) and e[-1]["version"] == reg.production("m").version
    assert all(reg.verify("m", v.version).ok for v in reg.list("m")[::4])
    reg.state.close()

# ---- what comes in, and what is loaded -----------------------------------------------------------------------------------------
def test_registry_edges(reg, tmp_path):
    with pytest.raises(RegistryError, match="not a name"): reg.register("../x", weights(tmp_path, "x"), "tiny")
    with pytest.raises(RegistryError, match="no model folder"): reg.register("m", tmp_path/"missing", "tiny")
    (tmp_path/"empty").mkdir()
    with pytest.raises(RegistryError, match="no safetensors"): reg.register("m", tmp_path/"empty", "tiny")
    with pytest.raises(RegistryError, match="nothing is in production"): reg.rollback("m")
    with pytest.raises(RegistryError, match="has no version"): reg.get("m", "9.9.9")
    with pytest.raises(RegistryError, match="has no version"): reg.get("m", "production")
    assert reg.production("m") is None and reg.list("m") == [] and reg.names() == [] and reg.aliases("m") == {}

class Evil:
    def __reduce__(self): return os.getenv, ("HOME",)

@pytest.mark.parametrize("proto", range(6))
@pytest.mark.parametrize("name", ["model.safetensors", "weights.dat", "notes.md", "config.json", "x.PKL"])
def test_pickles_are_known_by_what_is_in_them(tmp_path, name, proto):
    d = weights(tmp_path, "ok")
    (d/name).write_bytes(pickle.dumps([Evil(), "x"*50], proto))
    with pytest.raises(RegistryError, match=f"pickled.*{name}"): safe_weights(d)
    raw = (d/name).read_bytes()
    for pack in (gzip, bz2, lzma, zlib):
        (d/name).write_bytes(pack.compress(raw))
        with pytest.raises(RegistryError, match=f"pickled.*{name}"): safe_weights(d)

@given(st.text(max_size=300))
@hyp(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_texts_and_json_are_no_pickles(tmp_path, text):
    for t in (text, json.dumps([text]), f"({text})."):
        (tmp_path/"x").write_text(t); got = is_pickle(tmp_path/"x")
        assert not got or text.isascii()   # an ASCII text may be a program by chance; ordinary ones are not
    (tmp_path/"x").write_text(f"# Model card\n\n{text}"); assert not is_pickle(tmp_path/"x")

def test_torch_files_and_links_are_refused(tmp_path):
    torch = pytest.importorskip("torch")
    d = weights(tmp_path, "ok")
    for kw in (dict(), dict(_use_new_zipfile_serialization=False)):
        torch.save(dict(a=torch.zeros(2)), d/"innocent.dat", **kw)
        with pytest.raises(RegistryError, match="innocent.dat"): safe_weights(d)
    (d/"innocent.dat").unlink(); (d/"link.txt").symlink_to(tmp_path.parent/"secret"); (tmp_path.parent/"secret").write_text("x")
    with pytest.raises(RegistryError, match="link leads out"): safe_weights(d)
    from safetensors.torch import save_file
    (d/"link.txt").unlink(); save_file(dict(a=torch.zeros(3, 2)), d/"more.safetensors", metadata=dict(x="y"))
    assert is_safetensors(d/"more.safetensors") and safe_weights(d) == d
    raw = (d/"more.safetensors").read_bytes()
    for cut in range(0, len(raw), 7): (d/"more.safetensors").write_bytes(raw[:cut]); assert not is_safetensors(d/"more.safetensors")

def test_a_failed_promotion_changes_nothing(reg, tmp_path):
    reg.ensure_base("m", weights(tmp_path, "base"), "tiny")
    v = reg.register("m", weights(tmp_path, "new"), "tiny", "ds", GOOD)
    for f in (tmp_path/"a"/"objects").rglob("*"):
        if f.is_file() and f.read_bytes().endswith(b"new"): f.chmod(0o644); f.write_bytes(b"bad")
    with pytest.raises(RegistryError, match="not what was registered: adapter_model.safetensors was changed"): reg.promote("m", v.version, gate(GOOD, dict(min_gain=.02)))
    assert reg.production("m").version == "1.0.0" and reg.get("m", v.version).status == "candidate"

def test_missing_and_swapped_files_are_named(reg, tmp_path):
    d = weights(tmp_path, "base"); (d/"a.json").write_text("{}"); (d/"sub").mkdir(); (d/"sub"/"b.txt").write_text("b")
    v = reg.ensure_base("m", d, "tiny")
    laid = reg.load("m")
    (laid/"a.json").unlink(); (laid/"sub"/"b.txt").write_text("c"); (laid/"sub"/"new.py").write_text("import os")
    assert [(p["file"], p["what"]) for p in reg.verify("m").problems] == [("a.json", "is missing"), ("sub/b.txt", "was changed"), ("sub/new.py", "was added")]
    with pytest.raises(RegistryError, match="a.json is missing.*and 2 more"): reg.load("m")
    obj = Path(reg.artifacts._object(reg.artifacts.files(v.hash)["a.json"])); obj.chmod(0o644); obj.unlink()
    assert "a.json" in [p["file"] for p in reg.verify("m").problems]
    tree = Path(reg.artifacts._object(v.hash[7:])); tree.chmod(0o644); tree.write_text("{}")
    assert "the list of files" in [p["file"] for p in reg.verify("m").problems]
    assert file_problems({}, {}) == []

def test_versions_from_before_signatures_load_and_can_be_signed(reg, tmp_path):
    folder = weights(tmp_path, "old")
    h = reg.artifacts.put(folder)
    with reg.state.session() as s: s.add(ModelVersionRow(name="m", version="1.0.0", base="tiny", hash=h, status="production"))
    assert reg.load("m").is_dir() and not reg.verify("m").signed and "before signatures" in repr(reg.verify("m"))
    with pytest.raises(RegistryError, match="needs a reason"): reg.sign_again("m", "1.0.0", " ")
    assert reg.sign_again("m", "1.0.0", "from before signatures").signed
    with reg.state.session() as s: s.execute(sa.text("UPDATE model_versions SET base = 'x'"))
    with pytest.raises(RegistryError, match="the record says another base"): reg.load("m")

def test_a_forgotten_user_does_not_break_a_signature(reg, tmp_path):
    reg.ensure_base("m", weights(tmp_path, "base"), "tiny")
    v = reg.register("m", weights(tmp_path, "new"), "tiny", "ds", but(constant=dict(answer="Dear Ann")))
    with reg.state.session() as s: row = s.query(ModelVersionRow).filter_by(version=v.version).one(); row.evidence = but(constant=dict(answer="Dear <user>"))
    assert reg.verify("m", v.version).ok
    with reg.state.session() as s: row = s.query(ModelVersionRow).filter_by(version=v.version).one(); row.evidence = but(constant=dict(lo=.9))
    assert not reg.verify("m", v.version).ok

def test_keys(reg, tmp_path):
    reg.ensure_base("m", weights(tmp_path, "base"), "tiny")
    file = tmp_path/"keys"/"release.key"
    assert file.stat().st_mode & 0o777 == 0o600 and len(reg.keys()) == 1
    [public] = reg.keys()
    assert reg.verify("m", key=public).ok and not reg.verify("m", key="ed25519:"+"A"*43+"=").ok
    with reg.state.session() as s: s.execute(sa.text("DELETE FROM signing_keys"))
    with pytest.raises(RegistryError, match="key that is not trusted"): reg.load("m")
    reg.trust("restored")
    assert reg.load("m")
    file.write_bytes(b"nonsense")
    with pytest.raises(RegistryError, match="cannot be read"): signing_key(tmp_path/"keys")
    assert reg.verify("m").ok, "verifying needs no private key"
    for bad in ("", "ed25519:x", "rsa:"+"A"*43+"="):
        with pytest.raises(SomaError): reg.trust("why", bad or "no")

def test_a_version_is_loaded_on_the_base_of_its_day(reg, tmp_path):
    reg.ensure_base("m", weights(tmp_path, "base"), "tiny")
    reg.register("m", weights(tmp_path, "new"), "tiny", "ds", GOOD)
    (weights(tmp_path, "base")/"adapter_model.safetensors").write_bytes(b"another base by now")
    base, adapter = reg.parts("m", "1.1.0")
    assert (Path(base)/"adapter_model.safetensors").read_bytes().endswith(b"base") and (adapter/"adapter_model.safetensors").read_bytes().endswith(b"new")
    assert reg.parts("m")[1] is None

def test_events_can_only_be_added(tmp_path, state_url):
    reg = Registry(State(state_url), Artifacts(tmp_path/"a"), keys=tmp_path/"keys")
    reg.ensure_base("m", weights(tmp_path, "base"), "tiny")
    before = reg.events("m").rows()
    for sql in ("DELETE FROM release_events", "UPDATE release_events SET action = 'refused'", "UPDATE release_events SET ts = '2020-01-01'"):
        with pytest.raises(StoreError, match="only be added"):
            with reg.state.session() as s: s.execute(sa.text(sql))
    assert reg.events("m").rows() == before
    with reg.state.session() as s: s.execute(sa.text("UPDATE release_events SET reason = ''"))   # texts can be taken out
    reg.state.migrate("0001"); reg.state.migrate(); assert [v.version for v in reg.list("m")] == ["1.0.0"]
    reg.state.close()

# ---- side by side, lineage, the command line -----------------------------------------------------------------------------------
def marks(passed, n=30, start=0, loss=None):
    import polars as pl
    from somaagent.evals.tasks import EvalResult
    cols = dict(id=[f"q{start+i:03}" for i in range(n)], user_id=[f"secret person {i}" for i in range(n)], category=["a", "b"]*(n//2), prompt=["private text"]*n, passed=[float(i < passed) for i in range(n)])
    return EvalResult(pl.DataFrame(cols | (dict(loss=loss) if loss else {})), primary="rubric")

def test_side_by_side_is_the_paired_comparison_or_says_why_not(reg, tmp_path):
    from somaagent.evals.compare import compare as paired
    from somaagent.release.compare import compare, keep
    reg.ensure_base("m", weights(tmp_path, "base"), "tiny")
    old, new = marks(5, loss=[.1*(i % 7) for i in range(30)]), marks(20)
    v = reg.register("m", weights(tmp_path, "new"), "tiny", "", GOOD | dict(evaluations=dict(own=keep(new, reg.artifacts))))
    says = lambda: compare(reg, "m", "1.0.0", v.version)
    assert "No evaluation of 1.0.0" in says().note and says().comparisons == [] and len(says().table()) == 0 and "<h1>m" in says().html() and says().figure()
    reg.evaluated("m", "1.0.0", marks(5, start=7))
    assert "not evaluated on the same questions" in says().note
    kept = reg.evaluated("m", "1.0.0", old); n = len(reg.events("m"))
    assert reg.evaluated("m", "1.0.0", old) == kept and len(reg.events("m")) == n, "kept once"
    [c], want = says().comparisons, paired(old, new)
    assert c.overall == want.overall and c.rows == want.rows and "secret" not in says().markdown()
    back = compare(reg, "m", v.version, "1.0.0").comparisons[0].overall
    assert back.diff == -want.overall.diff and json.loads(json.dumps(says().to_dict()))["rows"][0]["lo"] == want.overall.lo
    raw = Path(reg.artifacts._object(kept["artifact"][7:])).read_bytes()
    assert b"secret" not in raw and b"private" not in raw
    Path(reg.artifacts._object(kept["artifact"][7:])).unlink()
    assert "gone" in says().note
    for bad in ("9.9.9", "nobody"):
        with pytest.raises(RegistryError, match="has no version"): compare(reg, "m", bad, v.version)

def test_what_a_log_says_about_a_model(reg, tmp_path):
    from somaagent.core.records import frozen_clock
    from somaagent.release.lineage import Origin, stamp, version_of
    with frozen_clock("2026-10-01", tick_ms=3_600_000):
        one = reg.ensure_base("m", weights(tmp_path, "base"), "tiny")
        two = reg.register("m", weights(tmp_path, "new"), "tiny", "", but(ab=dict(experiment="exp_9")))
        reg.promote("m", two.version, force="a test"); reg.alias("m", "stable", "1.0.0")
    since = reg.history("m")["since"].to_list()
    after, hour = dt.datetime(2026, 12, 1, tzinfo=dt.timezone.utc), dt.timedelta(minutes=1)
    who = lambda model, ts=after, **kw: getattr(version_of(reg, model, ts, **kw)[0], "version", None)
    assert [who(stamp(two)), who("m:1.0.0"), who("m@v1.0.0"), who("m/stable"), who("m"), who(one.hash), who(two.hash[7:19])] == ["1.1.0", "1.0.0", "1.0.0", "1.0.0", "1.1.0", "1.0.0", "1.1.0"]
    assert [who("m", since[0]-hour), who("m", since[0]), who("m", since[1]-hour), who("m", since[1])] == [None, "1.0.0", "1.0.0", "1.1.0"]
    assert [who("m@7.7.7"), who("gpt"), who(""), who("m@nobody"), who("x@1.0.0")] == [None]*5 and who("", meta=dict(model_version="m@1.1.0")) == "1.1.0"
    assert [who("base", experiment="exp_9", arm=a) for a in ("control", "treatment", "third")] == ["1.0.0", "1.1.0", None] and who("m", experiment="exp_8", arm="control") == "1.1.0"
    assert "no version" in Origin(None, "x", dict(id="i", ts=after)).tree()

def test_the_command_line(tmp_path, monkeypatch):
    from click.testing import CliRunner
    from somaagent.cli.model import model
    for k, v in dict(SOMA_STORES_HOME=tmp_path/"h", SOMA_STORES_STATE=f"sqlite:///{tmp_path}/h/s.db", SOMA_ACTOR="ann").items(): monkeypatch.setenv(k, str(v))
    def soma(*a, code=0):
        r = CliRunner().invoke(model, a); assert r.exit_code == code, r.output
        return json.loads(r.output) if "--json" in a and code == 0 else r.output
    assert "no models yet" in soma("list") and soma("verify", "--json") == [] and "no keys yet" in soma("keys")
    reg = Registry(); reg.ensure_base("m", weights(tmp_path, "base"), "tiny"); reg.register("m", weights(tmp_path, "new"), "tiny", "", GOOD); reg.register("m", weights(tmp_path, "bad"), "tiny", "", but(primary=dict(diff=0., lo=-.1, hi=.1)))
    assert [(v["version"], v["status"], v["names"]) for v in soma("list", "--json")] == [("1.0.0", "production", []), ("1.0.1", "refused", []), ("1.1.0", "candidate", ["candidate"])]
    shown = soma("show", "m", "candidate", "--json")
    assert shown["version"] == "1.1.0" and shown["manifest"]["files"] and shown["signature"] and all(r["ok"] for r in shown["gate"]) and "number   minor" in soma("show", "m", "1.1.0")
    assert "refuses m 1.0.1" in soma("promote", "m", "1.0.1", code=1) and "needs a --reason" in soma("promote", "m", "1.0.1", "--force", code=1)
    assert soma("promote", "m", "candidate", "--json")["status"] == "production" and "already" in soma("promote", "m", "1.1.0")
    assert "Forced: typo" in soma("promote", "m", "1.0.1", "--force", "--reason", "typo", "--actor", "eve")
    assert [(h["version"], h["actor"]) for h in soma("history", "m", "--json")] == [("1.0.0", "ann"), ("1.1.0", "ann"), ("1.0.1", "eve")]
    assert soma("rollback", "m", "--json")["version"] == "1.1.0" and soma("rollback", "m", "--to", "1.0.1", "--json")["version"] == "1.0.1"
    assert soma("alias", "m", "stable", "1.1.0", "--json")["stable"] == "1.1.0" and "give a VERSION" in soma("alias", "m", "stable", code=2)
    assert [r["version"] for r in soma("history", "m", "--alias", "stable", "--json")] == ["1.1.0"] and len(soma("history", "m", "--all", "--json")) == len(reg.events("m"))
    assert soma("history", "m", "--at", "2020-01-01", "--json")["version"] is None and "stable" not in soma("alias", "m", "stable", "--remove")
    assert "No evaluation" in soma("compare", "m", "1.0.0", "1.1.0") and soma("compare", "m", "1.0.0", "1.1.0", "--json")["rows"] == []
    reg.evaluated("m", "1.0.0", marks(3)); reg.evaluated("m", "1.1.0", marks(25))
    assert len(soma("compare", "m", "1.0.0", "1.1.0", "--html", str(tmp_path/"c.html"), "--json")["rows"]) == 3 and "plotly" in (tmp_path/"c.html").read_text().lower()
    assert "| **all** |" in soma("compare", "m", "1.0.0", "1.1.0", "--markdown") and "all       0.100  0.833" in soma("compare", "m", "1.0.0", "1.1.0")
    assert "base model" in soma("lineage", "m", "1.0.0") and soma("lineage", "m", "1.1.0", "--json")["after"] == [] and "give a NAME" in soma("lineage", code=2)
    [key] = soma("keys", "--json"); assert all(v["ok"] for v in soma("verify", "--all", "--key", key["public"], "--json")) and "needs a reason" in soma("keys", "--trust", code=1)
    laid = reg.load("m", "1.1.0")/"adapter_model.safetensors"; laid.chmod(0o644); laid.write_bytes(b"x")
    assert "adapter_model.safetensors was changed" in soma("verify", "m", "1.1.0", code=1) and soma("verify", "m").startswith("ok ")
    assert "there is no such model" in soma("show", "nobody", code=1)
    for c in model.commands.values(): assert c.help and "Examples:" in c.epilog and soma(c.name, "--help")
    reg.state.close()
