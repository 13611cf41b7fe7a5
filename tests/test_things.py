"Datasets as things: names, diffs, datasheets, lineage, the `soma data` commands, and forgetting through a shared server, Redis, PostgreSQL and artifacts elsewhere"
import gzip, json, os, re, shutil, subprocess, sys
from pathlib import Path

import polars as pl, pytest, sqlalchemy as sa
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings as hyp, strategies as st_

from somaagent.cli.data import data
from somaagent.core.errors import DataError
from somaagent.core.records import Interaction, ModelVersion
from somaagent.data.dataset import COLUMNS, write_dataset
from somaagent.data.datasheet import datasheet, facts, load_notes
from somaagent.data.dataset import load_dataset_dir
from somaagent.data.diff import CHANGES, changes, diff, flat, narrow, rule_changes, shift
from somaagent.data.forget import forget_user
from somaagent.data.formats import export
from somaagent.data.interactions import import_log, log
from somaagent.data.lineage import all_datasets, appearances, lineage, resolve
from somaagent.data.page import lorenz, visible
from somaagent.store.artifacts import Artifacts
from somaagent.store.cache import Cache
from somaagent.store.state import DatasetRow, ImportRow, ModelVersionRow, ReleaseEventRow, RunRow, State, state
from somaagent.store.warehouse import Warehouse
from test_privacy import PHRASE, USER, build, found_in_files
from test_store import postgres, redis_url  # noqa: F401 (fixtures)

quick = hyp(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
nasty = "</p><script>alert(1)</script><img src=x onerror=alert(2)> \u202egpj.exe \u200bzero\x00 {{7*7}} {% raw %} &lt; \ud83d' \" -->".replace("\ud83d", "")

def frame(n, prompt=lambda i: f"question {i}", **kw):
    base = dict(id=[f"int_{i:05}" for i in range(n)], ts=[1_790_000_000_000+i*60_000 for i in range(n)], user_id=[f"u{i//3}" for i in range(n)], prompt=[prompt(i) for i in range(n)], answer=[f"answer {i}" for i in range(n)],
        category=[f"c{i%4}" for i in range(n)], quality=[.3+(i%70)/100 for i in range(n)], reference=["r"]*n, meta=["{}"]*n, weight=[1.]*n)
    return pl.DataFrame(base | {k: [v(i) for i in range(n)] for k, v in kw.items()}).cast(COLUMNS)

def folder(tmp, name="d", parts=None, rules=None, **line):
    f = frame(60)
    parts = parts or dict(train=f[:40], validation=f[40:45], test=f[45:])
    return write_dataset(tmp, name, parts, rules or dict(version="1"), dict(sources=["imp_1"], counts={}, parents=[], code_hash="sha256:c") | line)

# ---- names

def test_a_dataset_is_named_by_name_hash_or_folder_and_never_guessed(home, tmp_path):
    st = State(f"sqlite:///{home}/state.db")
    a, b = folder(home/"datasets", "shop"), folder(home/"datasets", "shop", rules=dict(version="2"))
    c = folder(home/"runs"/"r1"/"datasets", "other")
    h = {p: load_dataset_dir(p).hash for p in (a, b, c)}
    for ref, want in ((a, a), (str(b), b), (a.name, a), (h[c], c), (h[c][7:15], c), (h[c][7:15].upper(), c), ("other", c), ("sha256:"+h[b][7:20], b)): assert resolve(ref, st, home).hash == h[want], ref
    with pytest.raises(DataError) as e: resolve("shop", st, home)
    assert all(h[p][7:19] in str(e.value) for p in (a, b)) and "shop@last" in str(e.value)
    assert resolve("shop@last", st, home).hash in (h[a], h[b])
    for bad in ("sho", "zzzz", "0"*12, "", "../../etc", "shop@first", "\x00", "a"*5000):
        with pytest.raises((DataError)): resolve(bad, st, home)
    shutil.copytree(a, tmp_path/"copy")
    assert resolve(tmp_path/"copy", st, home).hash == h[a]   # a copy elsewhere is the same dataset
    assert len(all_datasets(st, home)) == 3
    st.close()

# ---- diff

@given(st_.lists(st_.tuples(st_.integers(0, 30), st_.sampled_from(["train", "validation", "test"]), st_.integers(0, 3), st_.integers(0, 2)), max_size=25, unique_by=lambda t: t[0]), st_.lists(st_.tuples(st_.integers(0, 30), st_.sampled_from(["train", "validation", "test"]), st_.integers(0, 3), st_.integers(0, 2)), max_size=25, unique_by=lambda t: t[0]))
@quick
def test_changes_agree_with_a_slow_comparison(xs, ys):
    def table(rows): return pl.DataFrame([dict(id=str(i), user_id="u", split=s, text=i % 7, said=a, category=f"c{a}", quality=q/2, tier=["Poor", "Fair", "Good"][q], prompt_chars=1, answer_chars=1) for i, s, a, q in rows],
        schema=dict(id=pl.String, user_id=pl.String, split=pl.String, text=pl.UInt64, said=pl.UInt64, category=pl.String, quality=pl.Float64, tier=pl.String, prompt_chars=pl.UInt32, answer_chars=pl.UInt32))
    x, y = {t[0]: t for t in xs}, {t[0]: t for t in ys}
    both = x.keys() & y.keys()
    want = dict(came=len(y.keys()-x.keys()), went=len(x.keys()-y.keys()), moved=sum(x[i][1] != y[i][1] for i in both), answer=sum(x[i][2] != y[i][2] for i in both), category=sum(x[i][2] != y[i][2] for i in both), tier=sum(x[i][3] != y[i][3] for i in both), quality=sum(x[i][3] != y[i][3] for i in both))
    ch = changes(table(xs), table(ys))
    assert {k: int(v or 0) for k, v in ch.select(CHANGES).sum().row(0, named=True).items()} == want
    back = changes(table(ys), table(xs))
    assert back["came"].sum() == ch["went"].sum() and back["same_text"].sum() == ch["same_text"].sum()

def test_a_diff_reads_any_two_folders_and_finds_a_leak(tmp_path):
    f = frame(60)
    a = folder(tmp_path, parts=dict(train=f[:40], validation=f[40:45], test=f[45:]))
    b = folder(tmp_path, parts=dict(train=f[20:45], validation=f[45:50], test=f[:10]), rules=dict(version="1", cap=3))
    d = diff(a, b)
    assert d.crossed == dict(train_to_test=10, test_to_train=0) and "10 test rows were trained on before" in repr(d) and "CAREFUL" in d.text()
    assert d.counts["went"] == 20 and d.counts["moved"] == 10+5+5 and [r[0] for r in d.rules] == ["cap"]
    assert diff(a, a).counts["same"] == 60 and diff(a, a).text().count("\n") >= 1 and diff(b, a).crossed["test_to_train"] == 10
    empty = folder(tmp_path, parts=dict(train=f[:1], validation=f[:0], test=f[:0]))
    assert diff(a, empty).counts["went"] == 59 and diff(empty, a).counts["came"] == 59 and json.dumps(diff(empty, a).to_dict())
    assert len(d.rows("went", 5)) == 5 and d.rows("went", 1)["prompt"][0] == "question 10"
    with pytest.raises(DataError, match="no such distribution"): d.plot("shoes")

def test_a_shift_is_called_one_when_there_is_one_and_seldom_when_there_is_none():
    import numpy as np
    rng, vals = np.random.default_rng(3), [f"c{i}" for i in range(8)]
    p, q = np.full(8, 1/8), np.array([.25, .25, .1, .1, .1, .1, .05, .05])
    s = lambda n, w: pl.Series(rng.choice(vals, n, p=w))
    false = np.mean([shift(s(500, p), s(400, p)).moved for _ in range(150)])
    assert false <= .05 and all(shift(s(500, p), s(400, q)).moved for _ in range(30))
    x = shift(pl.Series(rng.normal(0, 1, 2000)), pl.Series(rng.normal(.4, 1, 2000)), "quality")
    assert x.moved and x.middle[1] > x.middle[0] and abs(sum(x.shares["a"])-1) < 1e-9
    for a, b in (([], []), ([1.], [1.]), ([1., 1.], [2., 2.]), ([None, 1.], [1.])): assert 0 <= shift(pl.Series(a, dtype=pl.Float64), pl.Series(b, dtype=pl.Float64)).tv <= 1

def test_rules_are_compared_leaf_by_leaf():
    assert rule_changes(dict(a=dict(b=1, c=2)), dict(a=dict(b=1, c=3), d=[1])) == [("a.c", 2, 3), ("d", "(absent)", [1])]
    assert rule_changes({}, {}) == [] and flat({}) == {"": {}}

# ---- datasheet

def test_a_datasheet_shows_adversarial_text_harmless_and_stays_small(tmp_path):
    f = frame(600, prompt=lambda i: nasty + str(i) if i % 3 else "x"*20_000 + str(i), category=lambda i: nasty if i % 2 else f"c{i}", user_id=lambda i: nasty if i % 2 else f"u{i}")
    d = folder(tmp_path, "bad", dict(train=f[:500], validation=f[500:520], test=f[520:]), rules={"version": nasty, nasty: [nasty]}, counts=dict(quarantined={nasty: 3}, funnel=[dict(step=nasty, dropped=1, left=2, why={nasty: 1})]))
    s = datasheet(d, tmp_path/"s.html", notes={k: nasty for k in ("motivation", "uses", "limits", "licence", "privacy", "maintenance")}, sample=50)
    page = s.path.read_text()
    assert page.count("<script>") == 1 and "<img" not in page and "49" not in re.findall(r"\{\{7\*7\}\}|(?<=zero)49", page) and "{{7*7}}" in page
    assert not set(page) & set("\u202e\u200b\x00") and "⟨U+202E⟩" in page and len(page) < 3_000_000
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", ""), "it asks nobody for anything"
    assert "unsafe-inline" not in page.split("script-src")[1][:80] and "default-src 'none'" in page
    d2 = diff(d, folder(tmp_path, "bad", dict(train=f[:10], validation=f[:0], test=f[10:12]), rules={nasty: 1})).to_html(tmp_path/"d.html").read_text()
    assert d2.count("<script>") == 1 and "<img" not in d2 and not set(d2) & set("\u202e\u200b\x00")

@given(st_.text(max_size=200))
@quick
def test_visible_text_has_no_invisible_character_but_joiners(t):
    import unicodedata
    out = visible(t)
    assert all(c in "\n\t\u200c\u200d\ufe0f" or unicodedata.category(c) not in ("Cc", "Cf", "Zl", "Zp", "Cs") for c in out)
    if t.isascii() and t.isprintable(): assert out == t

def test_a_datasheet_counts_what_is_there(tmp_path):
    f = frame(90)
    d = folder(tmp_path, parts=dict(train=pl.concat([f[:60], f[80:81].with_columns(id=pl.lit("copy"), user_id=pl.lit("u0"))]), validation=f[60:70], test=f[70:]))
    x = facts(load_dataset_dir(d))
    assert x["clean"] == dict(ids=0, texts=1, users=0) and x["splits_n"]["train"] == "61"
    page = datasheet(d, tmp_path/"x.html").path.read_text()
    assert "scores on this test are too good" in page and page.count("Not stated") == 6
    (tmp_path/"n.yaml").write_text("motivation: [1, 2\n")
    for bad in ("n.yaml", "none.yaml"):
        with pytest.raises(DataError): load_notes(tmp_path/bad)
    assert lorenz([])["gini"] == 0 and lorenz([1])["gini"] == 0 and .97 < lorenz([0]*99+[50])["gini"] <= 1

def where(path, user):
    "The split that a user is in"
    return next(s for s in ("train", "validation", "test") if user in pl.read_parquet(f"{path}/{s}.parquet")["user_id"].to_list())

# ---- lineage

def shop(wh, st, home, n=12):
    "A log of twelve users, a dataset of it, and a version that learned from it"
    from somaagent.data.curate import build_dataset
    log([Interaction(id=f"int-{u}-{k}", ts="2026-10-01T12:00:00Z", app="shop", user_id=f"cust{u:02}", session_id=f"s{u}", prompt=f"Customer {u} asks for item {k} of the list", answer=f"Item {k} of {u} is on its way.", category=["order", "refund"][k % 2], model="m", rating=5) for u in range(n) for k in range(6)], wh)
    d = build_dataset(wh, "shop", home/"datasets", "shop", st=st)
    with st.session() as s:
        s.add(ModelVersionRow.of(ModelVersion(name="helper", version="1.1.0", base="tiny", hash="sha256:"+"1"*64, dataset_hash=d.hash, status="production")))
        s.add(ReleaseEventRow(name="helper", version="1.1.0", action="promoted", reason="better"))
    return d

def test_lineage_goes_back_to_the_log_and_forward_to_the_release(home):
    with Warehouse(f"chdb://{home}/warehouse", mode="direct") as wh:
        st = State(f"sqlite:///{home}/state.db")
        d = shop(wh, st, home)
        l = lineage("shop", st, home)
        ids = l.ids()
        assert ids.height == sum(d.splits.values()) and set(ids["id"]) <= {f"int-{u}-{k}" for u in range(12) for k in range(6)}
        assert l.check(wh, batch=7) == dict(rows=ids.height, found=ids.height, missing=[])
        assert [e["action"] for e in l.events] == ["promoted"] and "helper 1.1.0: production" in l.tree() and json.dumps(l.to_dict(), default=str)
        one = ids["id"][0]
        assert appearances(one, st=st, home=home).frame["rows"].sum() == 1 and appearances("int-nobody-1", wh=wh, st=st, home=home).frame.height == 0
        log([Interaction(id="again", ts="2026-10-02T12:00:00Z", app="shop", user_id="other", prompt=wh.query("SELECT upper(prompt) AS p FROM interactions WHERE id = {i:String}", dict(i=one))["p"][0], answer="x")], wh)
        a = appearances("again", wh=wh, st=st, home=home)
        assert a.frame["rows"].sum() == 0 and a.frame["same_text"].sum() == 1 and [m["version"] for m in a.models] == ["1.1.0"]
        r = forget_user("cust03", wh, st, Cache(home/"cache"), home)
        assert r.left == []
        after = lineage(d.hash, st, home)
        assert not after.here and [c["why"] for c in after.children] == ["without a forgotten user"] and after.models[0]["version"] == "1.1.0"
        assert any(e["action"] == "learned from a forgotten user" for e in after.events) and "files gone" in after.tree()
        new = lineage("shop@last", st, home)
        assert new.here and new.parents[0]["hash"] == d.hash and new.check(wh)["missing"] == [] and not any(i.startswith("int-3-") for i in new.ids()["id"])
        with pytest.raises(DataError, match="files of this dataset are gone"): after.ids()
        assert {g["hash"] for g in appearances(user="cust03", st=st, home=home).gone} == {d.hash}
        st.close()

def test_a_broken_manifest_hides_nobody_elses_dataset(home):
    st = State(f"sqlite:///{home}/state.db")
    good, bad = folder(home/"datasets", "good"), folder(home/"datasets", "bad")
    os.chmod(bad/"manifest.json", 0o644); (bad/"manifest.json").write_text("{broken")
    assert [d.name for d in all_datasets(st, home)] == ["good"] and resolve("good", st, home).path == str(good)
    with pytest.raises(DataError, match="manifest"): resolve(bad, st, home)
    st.close()

# ---- the commands

@pytest.fixture
def soma(home, monkeypatch):
    "`soma data …` in this process, on a home with one dataset"
    from somaagent.store import warehouse as w
    monkeypatch.setenv("SOMA_STORES_WAREHOUSE_MODE", "direct")
    wh, st = w.warehouse(), state()
    shop(wh, st, home)
    def run(*args, code=0, **kw):
        r = CliRunner().invoke(data, [str(a) for a in args], **kw)
        assert r.exit_code == code, (args, r.output, r.exception)
        return r
    yield run
    wh.close(); st.close()

def test_every_command_explains_itself_and_answers_in_json(soma, home, tmp_path):
    for name, c in data.commands.items():
        h = soma(name, "--help").output
        assert "--json" in h and ("Examples:" in h or name == "formats"), name
    h = json.loads(soma("list", "--json").stdout)[0]["hash"]
    for args in (["show", "shop", "--rows", 2], ["lineage", "shop", "--check"], ["lineage", "--user", "cust01"], ["diff", "shop", h[7:20], "--rows", "came"], ["datasheet", "shop"], ["formats"], ["tiers", "shop"], ["redact", "shop"], ["forget", "--user", "cust01", "--dry-run"], ["build", "shop", "--name", "two", "--seed", 3]):
        if args[0] == "tiers": soma(*args, "--json", code=1); continue   # every rating is 5: good and bad cannot be told apart
        assert json.loads(soma(*args, "--json").stdout) is not None, args
    assert "graph LR" in soma("lineage", "shop", "--mermaid").stdout
    assert "shop" in soma("list").stdout.splitlines()[1] or "two" in soma("list").stdout.splitlines()[1]
    assert soma("list", "nobody").stdout == ""

def test_what_cannot_be_is_refused_in_one_line(soma, tmp_path):
    for args, code, say in ((["show", "nope"], 1, "There are: shop"), (["lineage"], 2, "Give a dataset"), (["build", "nobody"], 1, "no interaction of this source"), (["build", "shop", "--set", "balance.cap=many"], 1, "cap"), (["build", "shop", "--set", "colour=red"], 1, "colour"),
            (["export", "shop", "--format", "msword"], 1, "openai"), (["export", "shop", "--format", "openai", "--out", tmp_path/"no"/"x.jsonl"], 1, "no such folder"), (["validate", tmp_path/"none.jsonl"], 1, "no such file"), (["redact", "nobody"], 1, "no such file"), (["redact", "shop", "--kind", "face"], 1, "kinds are"),
            (["datasheet", "shop", "--notes", tmp_path/"none.yaml"], 1, "no such file of notes"), (["forget", "--user", " ", "--yes"], 1, "nobody"), (["build", "shop", "--recipe", "nope"], 1, "nope")):
        r = soma(*args, code=code)
        assert say.lower() in r.output.lower() and "Traceback" not in r.output, (args, r.output)

def test_an_export_that_a_provider_would_refuse_ends_with_1_and_says_where(soma, home, tmp_path):
    r = soma("export", "shop", "--format", "openai")
    path = Path(r.stdout.splitlines()[0])
    assert path.parent == home.resolve()/"exports" and "accepted" in r.stdout and [e["path"] for e in json.loads(soma("lineage", "shop", "--json").stdout)["exports"]] == [str(path)]
    r = soma("export", "shop", "--format", "openai", "--max-tokens", 5, "--out", tmp_path/"long.jsonl", code=1)
    assert "REFUSED" in r.stdout and "line 1: error" in r.stdout and "at most 5 are allowed" in r.stdout
    ls = path.read_text().splitlines()
    ls[1] = "not json"; ls[3] = json.dumps(dict(messages=[dict(role="king", content="x")])); ls[5] = json.dumps(dict(messages=[]))
    (tmp_path/"b.jsonl").write_text("\n".join(ls)+"\n")
    j = json.loads(soma("validate", tmp_path/"b.jsonl", "--format", "openai", "--json", code=1).stdout)
    assert [p["line"] for p in j["problems"] if p["level"] == "error"][:2] == [2, 4] and {2, 4, 6} <= {p["line"] for p in j["problems"]} and not j["ok"]
    assert json.loads(soma("validate", path, "--format", "openai", "--json").stdout)["ok"]
    assert "several formats" in soma("validate", path, code=1).output

def test_every_kind_of_export_is_refused_with_its_line_when_it_is_broken(soma, tmp_path):
    for fmt in (x["format"] for x in json.loads(soma("formats", "--json").stdout)):
        r = CliRunner().invoke(data, ["export", "shop", "--format", fmt, "--lossy", "--out", str(tmp_path/f"{fmt}.jsonl")])
        if not (tmp_path/f"{fmt}.jsonl").exists(): assert "rejected" in r.output or "preference" in r.output.lower() or r.exit_code == 1, (fmt, r.output); continue
        ls = (tmp_path/f"{fmt}.jsonl").read_text().splitlines()
        ls[2] = ls[2][:-7]; ls[4] = "[]"; ls[6] = "{}"
        (tmp_path/"broken.jsonl").write_text("\n".join(ls)+"\n")
        r = soma("validate", tmp_path/"broken.jsonl", "--format", fmt, code=1)
        assert all(f"line {n}: error: " in r.stdout for n in (3, 5, 7)) and "REFUSED" in r.stdout, (fmt, r.stdout)

def test_redact_writes_what_it_counts(soma, tmp_path):
    f = tmp_path/"t.csv"
    f.write_text('text,n\n"Mail anna@example.org, card 4111 1111 1111 1111",1\nnothing,2\n')
    for out in ("o.jsonl", "o.csv", "o.parquet"):
        j = json.loads(soma("redact", f, "--column", "text", "--out", tmp_path/out, "--json").stdout)
        assert j["rows_with"] == 1 and j["findings"] == 2 and b"anna@" not in (tmp_path/out).read_bytes()
    assert "anna" not in soma("redact", f).stdout
    assert soma("redact", f, "--out", tmp_path/"o.docx", code=1) and not (tmp_path/"o.docx").exists()

# ---- forgetting where the stores are elsewhere

def test_nothing_is_left_through_a_server_redis_postgres_and_artifacts_elsewhere(tmp_path, postgres, redis_url):
    home, away = tmp_path/"home", tmp_path/"away"
    wh, st, cache, imp, (a, b) = build(home)
    wh.close(); st.close()
    pg = State(postgres)
    with State(f"sqlite:///{home}/state.db").session(write=False) as s, pg.session() as t:   # the same state in PostgreSQL
        for cls in (ModelVersionRow, DatasetRow, ImportRow):
            for r in s.query(cls): t.add(cls.of(r.to_dict()))
    with pg.session() as s: s.add(RunRow(id="run_q", name="eval", parameters=dict(user=USER), error=f"could not answer: {PHRASE}, case 4", outputs=dict(sample=[f"{PHRASE}, case 5"])))
    for p in home.glob("state.db*"): p.unlink()
    shutil.rmtree(home/"cache")
    away.mkdir()
    art = Artifacts(away/"artifacts", checkouts=away/"checkouts")
    theirs, other = art.put(json.dumps(dict(sample=f"{PHRASE}, case 2")).encode()), art.put(b"of nobody")
    packed = art.put(gzip.compress(f"{USER} wrote: {PHRASE}, case 0".encode()))
    from somaagent.data.lineage import export_log
    for f in ("openai", "trl"): export(a.path, away/f"{f}.jsonl", f, where(a.path, USER), lossy=True)
    n = len((away/"openai.jsonl").read_text().splitlines())
    export_log(home).write_text("".join(json.dumps(dict(path=str(away/f"{f}.jsonl"), format=f, split="train", dataset=a.hash, hash="")) + "\n" for f in ("openai", "trl")))
    redis = Cache(redis_url[0]); redis.set("judge", f"9 points for {PHRASE}".encode())
    place = found_in_files(tmp_path)
    assert {"away/openai.jsonl", "away/trl.jsonl"} <= place and any("away/artifacts" in p for p in place)
    shared = Warehouse(f"chdb://{home/'warehouse'}", mode="shared", idle_s=5)
    try:
        assert shared.mode == "shared"
        plan = forget_user(USER, shared, pg, redis, home, art=art, dry_run=True)
        assert {f["path"] for f in plan.files if f["path"].startswith("state")} == {"state runs"} and sum(f["path"].startswith("artifact ") for f in plan.files) == 2
        rep = forget_user(USER, shared, pg, redis, home, art=art)
        assert rep.left == [] and rep.rows == plan.rows and rep.cache == 1 and [m["version"] for m in rep.models] == ["1.1.0"] and {d["hash"] for d in rep.datasets} == {a.hash, b.hash}
        assert redis.place.con.dbsize() == 0 and art.has(other) and not art.has(theirs) and not art.has(packed)
        with pg.engine.connect() as c:
            dump = "".join(str(r) for t in ("runs", "datasets", "imports", "model_versions", "release_events") for r in c.execute(sa.text(f"SELECT * FROM {t}")))
        assert PHRASE not in dump and USER not in dump
        assert found_in_files(tmp_path) == {"log.jsonl"}, "only the file that the log was imported from, which the report names"
        assert rep.imports and rep.imports[0]["file"].endswith("log.jsonl")
        left = (away/"openai.jsonl").read_text().splitlines()
        assert 0 < len(left) < n and all(json.loads(l) for l in left)
        from somaagent.data.formats import read, validate
        assert validate(away/"openai.jsonl", "openai").counts["error", "not_an_object"] == 0 and len(list(read(away/"openai.jsonl", "openai"))) == len(left), "the ids beside it still fit"
        again = forget_user(USER, shared, pg, redis, home, art=art, roots=[tmp_path])
        assert again.left == [] and [Path(f["path"]).name for f in again.files] == ["log.jsonl"], "a folder that is given as well is cleaned, too"
    finally:
        shared.close(); pg.close()
    assert found_in_files(tmp_path) == set()

def test_soma_data_forget_as_a_person_would(tmp_path):
    "One real process each: a log, a dataset, a user who leaves"
    env = os.environ | dict(SOMA_STORES_HOME=str(tmp_path/"home"), SOMA_PROGRESS="none", SOMA_STORES_WAREHOUSE_MODE="direct")
    says = lambda u, k: f"{PHRASE}, case {k}" if u == USER else f"Customer {u} asks for item {k} of the list"
    alike = "Thank you for your message, it reached us in good order and this is what we found. "      # the same beginning for everybody
    (tmp_path/"log.jsonl").write_text("\n".join(json.dumps(dict(prompt=says(u, k), answer=f"{alike}Reply {k} to {u}", user_id=u, rating=5)) for u in (USER, *(f"cust{i:02}" for i in range(11))) for k in range(6)))
    def soma(*args, code=0, **kw):
        r = subprocess.run([str(Path(sys.executable).parent/"soma"), *map(str, args)], env=env, capture_output=True, text=True, **kw)
        assert r.returncode == code, (args, r.stdout, r.stderr)
        return r.stdout
    d = json.loads(soma("data", "build", tmp_path/"log.jsonl", "--name", "shop", "--json"))
    theirs = sum(pl.read_parquet(f).filter(pl.col("user_id") == USER).height for f in Path(d["path"]).glob("*.parquet"))
    soma("data", "export", "shop", "--format", "trl", "--split", where(d["path"], USER))
    assert {f.split("/")[1] for f in found_in_files(tmp_path) if f != "log.jsonl"} == {"warehouse", "datasets", "exports"}
    meet = "from somaagent.store.warehouse import warehouse\nwith warehouse() as wh: wh.insert('ab_exposures', [dict(ts='2026-11-01 00:00:00.000', experiment='exp_1', unit=u, arm='a') for u in (%r, 'cust01')])" % USER
    subprocess.run([sys.executable, "-c", meet], env=env, check=True)                                   # they took part in an experiment
    assert USER not in soma("data", "forget", "--user", "-", input=USER+"\n", code=2)                 # a script cannot be asked
    plan = json.loads(soma("data", "forget", "--user", "-", "--dry-run", "--json", input=USER+"\n"))
    assert plan["rows"]["interactions"] == 6 and plan["rows"]["ab_exposures"] == 1 and plan["dry_run"] and [(x["name"], sum(x["rows"].values())) for x in plan["datasets"]] == [("shop", theirs)]      # nobody else's
    assert {f.split("/")[1] for f in found_in_files(tmp_path) if f != "log.jsonl"} == {"warehouse", "datasets", "exports"}       # nothing went yet
    out = soma("data", "forget", "--user", "-", "--yes", input=USER+"\n")
    assert "nothing of them was found afterwards" in out and USER not in out and f"rows of dataset shop {d['hash'][7:19]}, replaced by" in out and "remove it there too" in out
    assert found_in_files(tmp_path) == {"log.jsonl"}
