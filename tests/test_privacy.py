"Redaction and forgetting: properties that hold for any text, and a search of the real files after a user is forgotten"
import gzip, json, os, random, re, signal, sqlite3, struct, subprocess, sys, time
from pathlib import Path

import lz4.block, polars as pl, pytest, zstandard
from hypothesis import HealthCheck, given, settings as hyp, strategies as st_

from somaagent.core.errors import DataError, MissingExtraError
from somaagent.core.records import Interaction, ModelVersion
from somaagent.data import forget, piiset, privacy
from somaagent.data.curate import build_dataset
from somaagent.data.dataset import load_dataset_dir
from somaagent.data.forget import forget_user, search, who
from somaagent.data.interactions import import_log, log
from somaagent.data.privacy import KINDS, Placeholders, find, measure, redact, redact_conversation, redact_frame
from somaagent.store.cache import Cache
from somaagent.store.migrations import drift, verify
from somaagent.store.state import DatasetRow, ModelVersionRow, ReleaseEventRow, State
from somaagent.store.warehouse import Warehouse

os.environ.setdefault("SOMA_PROGRESS", "none")
quick = hyp(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))

# ---- redaction: any text, made of pieces that matter

values = st_.builds(lambda k, s, h: piiset.value(k, random.Random(s), h), st_.sampled_from(["EMAIL", "PHONE", "CARD", "IBAN", "ID", "IP", "KEY", "ADDRESS", "NAME"]), st_.integers(0, 500), st_.sampled_from(["dev", "held"]))
pieces = st_.one_of(values, st_.text(max_size=8), st_.sampled_from(["my name is ", "call ", "Regards,\n", " at ", " dot ", "[EMAIL_1]", "[NAME_2]", "\u200b", "＠", "１２", "password: ", "://a:", "@", ".", "-", "SSN ", "Mr. ", "I'm ", "\ufffc", "é", "Ａnna", "\n", " <", ">", "{{x}}", "\u202e"]))
texts = st_.lists(pieces, max_size=7).map("".join) | st_.lists(pieces, max_size=7).map(" ".join)

@given(texts)
@quick
def test_offsets_are_of_the_text_as_it_came_and_nothing_overlaps(t):
    last = 0
    for f in find(t):
        assert f.kind in KINDS and last <= f.start < f.end <= len(t)
        last = f.end

@given(texts)
@quick
def test_redacting_twice_changes_nothing_and_clean_text_stays(t):
    once = redact(t)
    assert find(once) == [] and redact(once) == once
    if not find(t): assert once == t
    state = Placeholders()
    out = redact(t, state)
    assert out == once and out == redact(t, Placeholders())

@given(st_.lists(st_.tuples(texts, st_.sampled_from(["", "a", "b"])), max_size=6))
@quick
def test_the_fast_way_finds_what_the_slow_way_finds(rows):
    df = pl.DataFrame(dict(t=[t for t, _ in rows], session_id=[s for _, s in rows]), schema=dict(t=pl.String, session_id=pl.String))
    out, rep = redact_frame(df, "t")
    slow = {}
    for s in {"a", "b"}:
        mine = [i for i, (_, g) in enumerate(rows) if g == s]
        slow |= dict(zip(mine, [m["content"] for m in redact_conversation([dict(role="user", content=rows[i][0]) for i in mine])]))
    slow |= {i: redact(t) for i, (t, g) in enumerate(rows) if not g}
    assert out["t"].to_list() == [slow[i] for i in range(len(rows))]
    assert rep.rows_with == sum(a != b for a, b in zip(df["t"], out["t"])) and redact_frame(out, "t")[0].equals(out)

@given(texts)
@quick
def test_what_stands_between_findings_is_untouched(t):
    kinds = [k for k in KINDS if k != "NAME"]   # a name is also replaced where it was not introduced
    fs = find(t, kinds)
    kept = [t[a:b] for a, b in zip([0] + [f.end for f in fs], [f.start for f in fs] + [len(t)])]
    assert re.fullmatch(r"\[[A-Z]+_\d+\]".join(map(re.escape, kept)), redact(t, kinds=kinds))

def test_one_value_one_placeholder_in_every_spelling():
    p = Placeholders()
    assert [redact(t, p) for t in ("anna@example.org", "ANNA＠example.org", "an\u200bna (at) example dot org", "bob@example.org")] == ["[EMAIL_1]"]*3 + ["[EMAIL_2]"]
    assert redact("call 020 7946 0958 or +44 20 7946 0958", p) == "call [PHONE_1] or [PHONE_1]"
    assert redact("see [EMAIL_7]; eve@example.org") == "see [EMAIL_7]; [EMAIL_8]"
    assert redact("bob@example.org") == "[EMAIL_1]"   # another conversation knows nothing of the first

def test_a_conversation_keeps_its_structure_and_its_names():
    chat = [dict(role="user", content="Hello, I'm Grace Novak, from Leeds."), dict(role="assistant", content=[dict(type="text", text="Dear Grace, one moment.")], tool_calls=[dict(id="c1", type="function", function=dict(name="find", arguments='{"email": "grace@example.org"}'))])]
    out = redact_conversation(chat)
    assert out[1]["tool_calls"][0]["function"] == dict(name="find", arguments='{"email": "[EMAIL_1]"}') and out[1]["tool_calls"][0]["id"] == "c1"
    assert "Grace" not in json.dumps(out) and out[1]["content"][0]["text"] == "Dear [NAME_1], one moment." and chat[0]["content"].startswith("Hello, I'm Grace")

def test_json_columns_and_reports_quote_nothing():
    df = pl.DataFrame(dict(session_id=["s"], prompt=["mail grace@example.org"], messages=[json.dumps([dict(role="user", content="mail gr\u00e4ce@example.org, grace@example.org\n\"q\"")])]))
    out, rep = redact_frame(df, "prompt", json_columns=("messages",))
    assert json.loads(out["messages"][0])[0]["content"] == "mail [EMAIL_2], [EMAIL_1]\n\"q\"" and out["prompt"][0] == "mail [EMAIL_1]"
    assert "grace" not in repr(rep) + rep._repr_markdown_() + json.dumps(rep.to_dict()) and rep.kinds["EMAIL"]["columns"] == ["prompt", "messages"]
    with pytest.raises(DataError, match="no such column"): redact_frame(df, "answer")
    with pytest.raises(DataError, match="no such kind"): find("x", ["FACE"])

def test_a_recogniser_of_names_can_be_added():
    spot = lambda t: [(m, m+5) for m in range(len(t)) if t.startswith("Zanna", m)]
    assert redact("then Zanna left") == "then Zanna left" and redact("then Zanna left, zanna@example.org", names=spot) == "then [NAME_1] left, [EMAIL_1]"

def test_undoing_needs_the_key():
    p = Placeholders()
    out = redact("write to anna@example.org", p)
    with pytest.raises(Exception, match="not written down"): __import__("pickle").dumps(p)
    try: from cryptography.fernet import Fernet
    except ImportError:
        with pytest.raises(MissingExtraError): privacy.seal(p, b"x")
        return
    key = Fernet.generate_key()
    box = privacy.seal(p, key)
    assert b"anna" not in box and privacy.restore(out, box, key) == "write to anna@example.org"
    with pytest.raises(DataError, match="does not open"): privacy.restore(out, box, Fernet.generate_key())

def test_recall_and_precision_on_the_half_that_the_rules_never_saw():
    held = piiset.labelled("held")
    m = {r["kind"]: r for r in measure(held).to_dicts()}
    assert len(held) > 250 and m["all"]["recall_lo"] > .94 and m["all"]["precision_lo"] > .96
    for k in ("EMAIL", "PHONE", "CARD", "IBAN", "ID", "IP", "KEY"): assert m[k]["recall"] >= .97 and m[k]["precision"] >= .97, m[k]
    assert measure([dict(text="a@example.org", spans=[])])["precision"][0] == 0   # and the measure can fail
    assert piiset.labelled() == piiset.make_set(0)

def test_adversarial_text_is_finished_in_time():
    t0 = time.process_time()
    for t in ("1 "*100_000, "a@"*100_000, "my name is "*20_000, "Aa "*100_000 + "Street", "[" * 200_000, "(at) dot "*20_000, "::"*100_000, "key="*50_000, "DE89 "*30_000, "\u200b"*200_000 + "x@y.zz", "Am A "*40_000): redact(t)
    assert time.process_time()-t0 < 20

# ---- forgetting: a workbench with a user in every corner

PHRASE = "the quokka ate my left-handed umbrella"
USER = "user-qx81-vane"

def build(home, n=11):
    "A home with traffic, a file import with a quarantined row, two datasets, a model, a cache, and run folders"
    home.mkdir(exist_ok=True)
    wh, st = Warehouse(f"chdb://{home/'warehouse'}", mode="direct"), State(f"sqlite:///{home/'state.db'}")
    says = lambda u, k: f"{PHRASE}, case {k}" if u == USER else f"Customer {u} asks for item {k} of the list"
    then = "2026-10-01T12:00:00Z"
    log([Interaction(id=f"int-{u}-{k}", ts=then, app="shop", user_id=u, session_id=f"s-{u}", prompt=says(u, k), answer=f"Reply {k}", category="ask", model="m", rating=5, cost_usd="0.5", messages=[dict(role="user", content=says(u, k))], meta=dict(u=u)) for u in (USER, *(f"cust{i:02}" for i in range(n))) for k in range(6)], wh)
    log([Interaction(id="orphan", ts=then, app="shop", session_id=f"s-{USER}", prompt=f"and again {PHRASE}", answer="Reply 9", model="m")], wh)
    src = home.parent/"log.jsonl"
    src.write_text("\n".join(json.dumps(dict(prompt=f"file question {i} {PHRASE if i == 3 else ''}", answer=f"reply {i}", user_id=USER if i in (3, 4) else f"cust{i%5:02}") | (dict(rating=99) if i in (4, 5) else {})) for i in range(30)))
    imp = import_log(src, wh, app="files", st=st)
    wh.insert("model_quality_ratings", [dict(model="m", version="1", rater="judge", metric="rubric", category="ask", interaction_id=f"int-{u}-0", score=7., detail=json.dumps(dict(said=says(u, 0)))) for u in (USER, "cust00")])
    a, b = build_dataset(wh, "shop", home/"datasets", "shop", st=st), build_dataset(wh, "shop", home/"runs"/"r1"/"datasets", "inner", st=st, min_quality=.1)
    with st.session() as s:
        for v, d in (("1.0.0", ""), ("1.1.0", a.hash), ("1.2.0", "sha256:"+"9"*64)): s.add(ModelVersionRow.of(ModelVersion(name="helper", version=v, base="tiny", hash="sha256:"+v[2]*64, dataset_hash=d)))
    Cache(home/"cache").set("judge", f"9 points for {PHRASE}".encode())
    run = home/"runs"/"r1"
    pl.DataFrame(dict(id=[f"int-{USER}-0", "int-cust00-0"], user_id=[USER, "cust00"], prompt=["cut", "kept"])).write_parquet(run/"evaluation.parquet")
    pl.DataFrame(dict(prompt=[f"{PHRASE}, case 1", "kept"])).write_parquet(run/"samples.parquet")
    (run/"report.html").write_text(f"<p>{PHRASE}, case 2</p><td>{USER}</td><p>kept</p>")
    (run/"out.ipynb").write_text(json.dumps(dict(cells=[dict(source=f"say '{PHRASE}, case 3' \"now\"")])))
    (run/"log.txt.gz").write_bytes(gzip.compress(f"{USER} said hello\nkept".encode()))
    return wh, st, Cache(home/"cache"), imp, (a, b)

def blocks(raw):
    "Unpack ClickHouse's compressed blocks: checksum 16, method 1, size 4, unpacked size 4, data"
    at, out = 0, b""
    while at + 25 <= len(raw):
        method, size, full = struct.unpack_from("<BII", raw, at+16)
        body = raw[at+25:at+16+size]
        if method not in (0x82, 0x90, 0x91, 0x02) or size < 9 or at+16+size > len(raw): return out
        while method == 0x91:   # several codecs, one after the other: the last one is undone first
            n = body[0]; codecs = body[1:1+n]; method, size, full = struct.unpack_from("<BII", body, 1+n); body = body[1+n+9:]
            if method not in (0x82, 0x90): break
        out += zstandard.ZstdDecompressor().decompress(body, max_output_size=full) if method == 0x90 else lz4.block.decompress(body, uncompressed_size=full) if method == 0x82 else body
        at += 16 + struct.unpack_from("<I", raw, at+17)[0]
    return out

def found_in_files(home):
    "Files that hold the user's id or the phrase: raw, unpacked, or read as Parquet; written without the code under test"
    needles, out = (USER.encode(), PHRASE.encode()), set()
    for p in (q for q in home.rglob("*") if q.is_file()):
        raw = p.read_bytes()
        views = [raw]
        if p.suffix in (".bin", ".cmrk2", ".cmrk3", ".mrk2", ".idx", ".cidx"):
            try: views.append(blocks(raw))
            except Exception: pass
        if raw[:2] == b"\x1f\x8b": views.append(gzip.decompress(raw))
        if raw[:4] == b"PAR1": views.append(json.dumps(pl.read_parquet(p).select(pl.all().cast(pl.String, strict=False)).to_dict(as_series=False), ensure_ascii=False).encode())
        if any(n in v for n in needles for v in views): out.add(p.relative_to(home).as_posix())
    return out

def corners(found): return {k for k in ("warehouse", "datasets/", "runs/r1/datasets", "evaluation.parquet", "samples.parquet", "report.html", "out.ipynb", "log.txt.gz", "cache") if any(k in f for f in found)}

def state_of(home, wh, st):
    "What is there afterwards, without ids and times"
    wh_rows = {t: wh.query(f"SELECT count() AS n FROM {t}")["n"][0] for t in ("interactions", "model_usage", "quarantine", "model_quality_ratings")} | dict(blank=wh.query("SELECT countIf(id = '') AS n, sum(cost_usd) AS c FROM model_usage").row(0))
    with st.session(write=False) as s: events = sorted((e.name, e.version, e.action, json.dumps({k: v for k, v in e.evidence.items() if k in ("user", "rows", "models", "left")}, sort_keys=True)) for e in s.query(ReleaseEventRow)); sets = sorted((d.name, d.hash, (d.counts.get("removed") or {}).get("replaced_by", "")) for d in s.query(DatasetRow))
    return wh_rows, events, sets, sorted(p.relative_to(home).as_posix() for p in home.rglob("*.parquet"))

def test_nothing_of_a_user_is_left(tmp_path):
    home = tmp_path/"home"
    wh, st, cache, imp, (a, b) = build(home)
    try:
        assert corners(found_in_files(home)) == {"warehouse", "datasets/", "runs/r1/datasets", "evaluation.parquet", "samples.parquet", "report.html", "out.ipynb", "log.txt.gz", "cache"}, "the search sees every corner"
        plan = forget_user(USER, wh, st, cache, home, dry_run=True)
        assert corners(found_in_files(home)) and plan.rows == dict(interactions=8, model_usage=8, quarantine=1, model_quality_ratings=1) and len(plan.datasets) == 2
        rep = forget_user(USER, wh, st, cache, home)
        assert rep.left == [] and rep.rows == plan.rows and rep.cache == 1 and [m["version"] for m in rep.models] == ["1.1.0"] and {i["id"] for i in rep.imports} == {imp.source}
        assert {d["hash"] for d in rep.datasets} == {a.hash, b.hash} and not Path(a.path).exists() and not Path(b.path).exists()
        for d in rep.datasets:
            with st.session(write=False) as s: new = s.query(DatasetRow).filter_by(hash=d["replaced_by"]).one()
            folder = load_dataset_dir(new.path)
            assert folder.manifest["parents"] == [d["hash"]] == new.parents and sum(folder.manifest["counts"]["forgotten"].values()) == sum(d["rows"].values()) >= 6
            assert sum(new.splits.values()) == sum((a if d["hash"] == a.hash else b).splits.values()) - sum(d["rows"].values())
        assert wh.query("SELECT count() AS n FROM interactions WHERE user_id = 'cust00' AND app = 'shop'")["n"][0] == 6 and wh.query("SELECT count() AS n FROM quarantine")["n"][0] == 1
        assert wh.query("SELECT count() AS n, countIf(id = '') AS b FROM model_usage").row(0) == (72 + 1 + 28, 8)
        assert wh.query("SELECT sum(calls) AS n FROM model_cost")["n"][0] == 101
        assert pl.read_parquet(home/"runs/r1/evaluation.parquet")["user_id"].to_list() == ["cust00"] and pl.read_parquet(home/"runs/r1/samples.parquet")["prompt"].to_list() == ["kept"]
        assert (home/"runs/r1/report.html").read_text() == "<p>[forgotten]</p><td>[forgotten]</td><p>kept</p>" and gzip.decompress((home/"runs/r1/log.txt.gz").read_bytes()) == b"[forgotten] said hello\nkept"
        with st.session(write=False) as s: audit = s.get(ReleaseEventRow, rep.audit).to_dict()
        assert USER not in str(audit) and audit["action"] == "forgotten" and audit["evidence"]["rows"] == rep.rows
        assert drift(wh) == [] and "all as the migrations say" in repr(verify(wh))
        again = forget_user(USER, wh, st, cache, home)
        assert (again.rows, again.datasets, again.files, again.left) == ({}, [], [], [])
        assert import_log(tmp_path/"log.jsonl", wh, app="files", st=st).imported == 0, "the same file does not bring them back"
        assert found_in_files(home) == set(), "while the warehouse is open"
    finally: wh.close(); st.close()
    assert found_in_files(home) == set(), "and after it is closed"

def test_datasets_are_only_listed_when_asked_and_nobody_is_nobody(tmp_path):
    home = tmp_path/"home"
    wh, st, cache, _, (a, b) = build(home)
    try:
        for bad in ("", "  "):
            with pytest.raises(DataError, match="nobody"): forget_user(bad, wh, st, cache, home)
        with pytest.raises(DataError, match="rebuilt or listed"): forget_user(USER, wh, st, cache, home, datasets="burn")
        before = found_in_files(home)
        none = forget_user("user-nobody-knows", wh, st, cache, home)
        assert (none.rows, none.datasets, none.models) == ({}, [], []) and found_in_files(home) == before - {f for f in before if f.startswith("cache")}
        rep = forget_user(USER, wh, st, cache, home, datasets="list")
        assert Path(a.path).exists() and len(rep.datasets) == 2 and {Path(l["where"]).name for l in rep.left} == {f"{s}.parquet" for s in ("train", "validation", "test") if any(l["where"].endswith(f"{s}.parquet") for l in rep.left)} and len(rep.left) >= 2
        assert corners(found_in_files(home)) == {"datasets/", "runs/r1/datasets"}
    finally: wh.close(); st.close()

WORKER = """
import sys
from pathlib import Path
from somaagent.data import forget as f
from somaagent.store.cache import Cache
from somaagent.store.state import State
from somaagent.store.warehouse import Warehouse
home, user, stop = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
def die_in(name, after):
    old = getattr(f, name)
    def new(*a, **k):
        if not after: print("now", flush=True); import time; time.sleep(60)
        r = old(*a, **k)
        print("now", flush=True); import time; time.sleep(60)
        return r
    setattr(f, name, new)
if stop != "-": die_in(*((stop[:-1], True) if stop.endswith("+") else (stop, False)))
with Warehouse(f"chdb://{home}/warehouse", mode="direct") as wh:
    st = State(f"sqlite:///{home}/state.db")
    print(f.forget_user(user, wh, st, Cache(home/"cache"), home))
"""

def test_kill_9_in_the_middle_and_again(tmp_path):
    def start(home, stop): return subprocess.Popen([sys.executable, "-c", WORKER, str(home), USER, stop], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | dict(SOMA_PROGRESS="none"))
    home, calm = tmp_path/"a"/"home", tmp_path/"b"/"home"
    for h in (home, calm):
        h.parent.mkdir()
        wh, st, *_ = build(h); wh.close(); st.close()
    p = start(calm, "-"); out, err = p.communicate(timeout=60)
    assert p.returncode == 0, err
    for stop in ("_remove", "_clean", "_delete+"):
        p = start(home, stop)
        line = p.stdout.readline()
        assert line == "now\n", (stop, line, p.stderr.read())
        p.send_signal(signal.SIGKILL); p.wait()
    p = start(home, "-"); out2, err = p.communicate(timeout=60)
    assert p.returncode == 0, err
    ends = []
    for h in (home, calm):
        with Warehouse(f"chdb://{h/'warehouse'}", mode="direct") as w:
            s = State(f"sqlite:///{h/'state.db'}"); ends.append(state_of(h, w, s)); s.close()
    assert ends[0] == ends[1]
    assert found_in_files(home) == set() == found_in_files(calm)
