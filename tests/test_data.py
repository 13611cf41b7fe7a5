"The data room under faults: broken files, killed processes, and properties that must hold for any input"
import csv, gzip, io, json, os, random, signal, sqlite3, subprocess, sys, time, tracemalloc
from pathlib import Path

import polars as pl, pyarrow as pa, pyarrow.parquet as pq, pytest
from hypothesis import HealthCheck, given, settings as hyp, strategies as st_

from somaagent.core.errors import DataError, NoUsableRowsError
from somaagent.core.records import Interaction, utcnow
from somaagent.data import curate, dataset, dedup, files, interactions, parse, quality
from somaagent.data.interactions import import_log
from somaagent.store.state import ImportRow, State
from somaagent.store.warehouse import Warehouse

os.environ.setdefault("SOMA_PROGRESS", "none")
quick = hyp(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
good = lambda i, **kw: dict(prompt=f"Where is order {i}?", answer=f"Order {i} is on its way.", user_id=f"u{i%7}") | kw


def write(path, lines):
    data = b"\n".join(l if isinstance(l, bytes) else json.dumps(l).encode() for l in lines) + b"\n"
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path

def adds_up(r): assert r.read == r.imported + r.quarantined + r.duplicate_rows_skipped + r.blank; return r
def put_aside(wh, r): return {int(x["line"]): (x["field"], x["reason"]) for x in wh.rows("SELECT * FROM quarantine WHERE source = {s:String}", dict(s=r.source))}
def n_rows(wh, r, table="interactions"): return wh.query(f"SELECT count() n FROM {table} WHERE source = {{s:String}}", dict(s=r.source))["n"][0]


# ---- broken rows

FAULTS = [
    (b'{"prompt": "cut off', "", "broken_json"), (b'["a list"]', "", "not_an_object"), (b'"text"', "", "not_an_object"), (b"[" * 100_000, "", "broken_json"), (b'{"prompt": ' + b"9" * 6000 + b"}", "", "broken_json"),
    ('{"prompt": "café", "answer": "x"}'.encode("latin-1"), "", "bad_encoding"), (b'{"prompt": "a\x00b", "answer": "x"}', "", "nul_byte"), (good(0, prompt="a\0b"), "prompt", "nul_byte"),
    (dict(answer="x"), "prompt", "missing"), (dict(prompt="x"), "answer", "missing"), (good(0, prompt=None), "prompt", "missing"), (good(0, prompt=42), "prompt", "wrong_type"), (good(0, prompt=["a"]), "prompt", "wrong_type"),
    (good(0, answer={"a": 1}), "answer", "wrong_type"), (b'{"prompt": "lone \\ud800 surrogate", "answer": "x"}', "prompt", "bad_encoding"), (good(0, prompt="x" * 1_000_001), "prompt", "too_large"),
    (good(0, ts="2126-01-01T00:00:00Z"), "ts", "future_timestamp"), (good(0, ts="yesterday"), "ts", "bad_timestamp"), (good(0, ts=-5e15), "ts", "bad_timestamp"), (good(0, ts=None), "ts", "missing"), (good(0, ts=True), "ts", "wrong_type"),
    (good(0, prompt_tokens=-1), "prompt_tokens", "negative"), (good(0, prompt_tokens="many"), "prompt_tokens", "not_a_number"), (good(0, prompt_tokens=1.5), "prompt_tokens", "not_a_whole_number"), (good(0, prompt_tokens=2**40), "prompt_tokens", "out_of_range"),
    (good(0, cost_usd="a lot"), "cost_usd", "not_a_number"), (good(0, cost_usd=-1), "cost_usd", "negative"), (good(0, cost_usd="inf"), "cost_usd", "not_a_number"), (good(0, cost_usd=1e12), "cost_usd", "out_of_range"), (good(0, cost_usd=[1]), "cost_usd", "wrong_type"),
    (good(0, latency_ms=-3), "latency_ms", "negative"), (good(0, rating=11), "rating", "out_of_range"), (good(0, rating=0), "rating", "out_of_range"), (good(0, status="maybe"), "status", "bad_value"),
    (good(0, feedback="{"), "feedback", "broken_json"), (good(0, feedback=[1]), "feedback", "wrong_type"), (good(0, meta="text"), "meta", "broken_json"), (good(0, note="n" * 200_000), "note", "too_large"),
]

def test_every_fault_is_put_aside_with_line_field_and_reason(stores, tmp_path):
    wh, st = stores
    first = good(1, ts="2026-10-01T00:00:00Z", prompt_tokens=3, cost_usd=0.01, latency_ms=5.5, rating=5, status="ok", feedback={}, meta={}, note="n")
    lines = [first]
    for raw, *_ in FAULTS: lines += [raw | dict(ts=raw.get("ts", "2026-10-01")) if isinstance(raw, dict) and raw.get("ts", 1) is not None else raw, good(len(lines), ts="2026-10-02")]
    lines += [b"", b"   "]
    r = adds_up(import_log(write(tmp_path/"faults.jsonl", lines), wh, st=st))
    assert put_aside(wh, r) == {2+2*i: (f, why) for i, (_, f, why) in enumerate(FAULTS)}
    assert (r.imported, r.quarantined, r.blank) == (1 + len(FAULTS), len(FAULTS), 2)
    assert sum(r.reasons.values()) == r.quarantined and r.reasons["prompt wrong_type"] == 2
    assert all(len(x) < 400 for x in wh.query("SELECT raw FROM quarantine")["raw"])
    assert n_rows(wh, r) == r.imported == n_rows(wh, r, "model_usage")

def test_csv_faults(stores, tmp_path):
    wh, st = stores
    text = 'prompt,answer,rating\n"Hello, ""you""\nthere",fine,5\nshort\ntoo,many,3,columns\nq,a,eleven\n\nq2,a2,\n"stray quote,a,1\nlast,a,2\n'
    r = adds_up(import_log(write(tmp_path/"f.csv", [text.encode()[:-1]]), wh, st=st))
    assert put_aside(wh, r) == {4: ("", "column_count"), 5: ("", "column_count"), 6: ("rating", "not_a_number"), 9: ("", "unclosed_quote")}
    assert [x["prompt"] for x in wh.rows("SELECT prompt FROM interactions WHERE source = {s:String} ORDER BY source_line", dict(s=r.source))] == ['Hello, "you"\nthere', "q2", "last"]

def test_csv_with_bad_bytes_and_other_delimiter(stores, tmp_path):
    wh, st = stores
    r = adds_up(import_log(write(tmp_path/"f.tsv", [b"\xef\xbb\xbfquestion\tanswer", b"caf\xe9\tx", b"a\0b\tx", "smörgås\tja".encode()]), wh, st=st))
    assert put_aside(wh, r) == {2: ("", "bad_encoding"), 3: ("prompt", "nul_byte")} and r.imported == 1

@pytest.mark.parametrize("name", ["big.jsonl", "big.csv", "big_lines.csv"])
def test_a_50_mb_field_is_put_aside_in_bounded_memory(tmp_path, name):
    p, mb = tmp_path/name, 50
    with open(p, "wb") as f:
        f.write(b'{"prompt": "a", "answer": "b"}\n{"prompt": "' if p.suffix == ".jsonl" else b'prompt,answer\na,b\n"')
        for _ in range(mb): f.write(b"x" * 999_999 + (b"\n" if "lines" in name else b"x"))
        f.write(b'", "answer": "b"}\n{"prompt": "c", "answer": "d"}\n' if p.suffix == ".jsonl" else b'",b\nc,d\n')
    tracemalloc.start()
    rows = list(files.read_rows(p))
    peak = tracemalloc.get_traced_memory()[1]; tracemalloc.stop()
    assert [r.reason for r in rows] == ["", "too_large", ""] and [list(r.fields.values()) for r in rows if r.fields] == [["a", "b"], ["c", "d"]]
    assert peak < 40e6, f"{peak/1e6:.0f} MB held for a field of {mb} MB"

def test_parquet_types_and_bad_text(stores, tmp_path):
    wh, st = stores
    bad = pa.array([b"fine", b"caf\xe9", b"good", None], pa.binary()).cast(pa.binary())
    text = pa.Array.from_buffers(pa.string(), 4, bad.buffers())
    pq.write_table(pa.table(dict(prompt=text, answer=["a", "b", "c", "d"], rating=[5., 4., 9., 1.], when=pa.array([utcnow()] * 4))), tmp_path/"p.parquet")
    r = adds_up(import_log(tmp_path/"p.parquet", wh, dict(ts="when"), st=st))
    assert put_aside(wh, r) == {2: ("", "bad_encoding"), 3: ("rating", "out_of_range"), 4: ("prompt", "missing")} and r.imported == 1
    (tmp_path/"q.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="not a readable Parquet"): import_log(tmp_path/"q.parquet", wh, st=st)

def test_parquet_times_of_every_kind(stores, tmp_path):
    wh, st = stores
    for unit, ns in (("ns", 1), ("us", 1000), ("ms", 10**6), ("s", 10**9)):
        t = pa.array([1_790_000_000_123_456_789 // ns, None if unit == "s" else 2**62], pa.timestamp(unit, "UTC" if unit != "s" else None))
        pq.write_table(pa.table(dict(prompt=["a", "b"], answer=["x", f"{unit}"], ts=t)), tmp_path/f"{unit}.parquet", coerce_timestamps=None, version="2.6")
        r = adds_up(import_log(tmp_path/f"{unit}.parquet", wh, st=st))
        assert (r.imported, r.quarantined) == (1, 1), (unit, r.reasons)
    pq.write_table(pa.table(dict(prompt=["a"], answer=["x"], ts=pa.array([20_000], pa.date32()))), tmp_path/"d.parquet")
    assert import_log(tmp_path/"d.parquet", wh, st=st).imported == 1

def test_compressed_and_cut_files(stores, tmp_path):
    import zstandard
    wh, st = stores
    plain = write(tmp_path/"a.jsonl", [good(i) for i in range(3000)])
    whole = gzip.compress(plain.read_bytes(), mtime=0)
    (tmp_path/"a.jsonl.zst").write_bytes(zstandard.compress(plain.read_bytes()))
    (tmp_path/"cut.jsonl.gz").write_bytes(whole[:len(whole)*2//3])
    assert adds_up(import_log(tmp_path/"a.jsonl.zst", wh, st=st)).imported == 3000
    r = adds_up(import_log(tmp_path/"cut.jsonl.gz", wh, st=st))
    assert 1000 < r.imported < 3000 and r.reasons == {"truncated_file": 1}
    (tmp_path/"no.jsonl.gz").write_bytes(b"not gzip at all")
    with pytest.raises(DataError, match="cannot be read"): import_log(tmp_path/"no.jsonl.gz", wh, st=st)

def test_times_from_many_years_fit_into_one_batch(stores, tmp_path):
    wh, st = stores
    r = import_log(write(tmp_path/"old.jsonl", [good(i, ts=f"{2001+i//12}-{1+i%12:02}-03") for i in range(150)]), wh, st=st)
    assert n_rows(wh, r) == 150 == n_rows(wh, r, "model_usage")


# ---- files that are refused as a whole

def test_one_clear_error(stores, tmp_path):
    wh, st = stores
    csv_ = write(tmp_path/"c.csv", [b"text,label", b"a,b"])
    with pytest.raises(DataError, match="(?i)columns are: text, label"): import_log(csv_, wh, dict(prompt="txt"), st=st)
    with pytest.raises(DataError, match="no such field"): import_log(csv_, wh, dict(promt="text"), st=st)
    with pytest.raises(DataError, match="no column for the answer"): import_log(write(tmp_path/"d.csv", [b"text,foo", b"a,b"]), wh, st=st)
    with pytest.raises(DataError, match="same name"): import_log(write(tmp_path/"e.csv", [b"text,text", b"a,b"]), wh, st=st)
    for name, lines in {"empty.csv": [], "empty.jsonl": [], "head.csv": [b"prompt,answer"], "blank.jsonl": [b"", b" "], "none.jsonl": [b"{", good(0, prompt=1)]}.items():
        with pytest.raises(NoUsableRowsError): import_log(write(tmp_path/name, lines), wh, st=st)
    with pytest.raises(NoUsableRowsError, match="broken_json"): import_log(write(tmp_path/"text.jsonl", [b"just", b"words"]), wh, st=st)
    for e in ("nowhere.csv", "."):
        with pytest.raises(DataError): import_log(tmp_path/e, wh, st=st)


# ---- once and only once

def test_the_same_content_is_imported_once(stores, tmp_path):
    wh, st = stores
    p = write(tmp_path/"once.jsonl.gz", [good(i, label=f"l{i}") for i in range(50)] + [b"{", b""])
    a = adds_up(import_log(p, wh, st=st))
    b = adds_up(import_log(p.rename(tmp_path/"twice.jsonl.gz"), wh, st=st))
    assert (a.imported, b.imported, b.duplicate_rows_skipped, n_rows(wh, a)) == (50, 0, 50, 50) and a.source == b.source
    with st.session() as s: s.delete(s.get(ImportRow, a.source))   # the state store is lost, the warehouse is not
    adds_up(import_log(tmp_path/"twice.jsonl.gz", wh, st=st))
    assert n_rows(wh, a) == n_rows(wh, a, "model_usage") == 50 and n_rows(wh, a, "quarantine") == 1
    other = import_log(tmp_path/"twice.jsonl.gz", wh, dict(answer="label"), st=st)
    assert other.source != a.source and n_rows(wh, other) == 50

def test_logging_twice_stores_once(stores):
    wh, _ = stores
    many = [Interaction(app="live", prompt=f"p{i}", answer="a", model="m", cost_usd="0.5") for i in range(4)]
    for _ in range(3): assert interactions.log(many, wh) == 4
    assert wh.query("SELECT count() n FROM interactions WHERE app = 'live'")["n"][0] == 4
    assert wh.query("SELECT sum(calls) n FROM model_cost WHERE app = 'live'")["n"][0] == 4

WORKER = """
import sys
from somaagent.data.interactions import import_log
from somaagent.store.state import State
from somaagent.store.warehouse import Warehouse
home, file = sys.argv[1:]
with Warehouse(f"chdb://{home}/wh", mode="direct") as wh:
    r = import_log(file, wh, st=State(f"sqlite:///{home}/state.db"), batch=500)
    print(r.read, r.imported + r.duplicate_rows_skipped, r.quarantined, r.blank)
    for t in ("interactions", "model_usage"): print(wh.query(f"SELECT count() n, uniqExact(id) u, sum(cityHash64(id, ts)) h FROM {t}").row(0))
    print(wh.query("SELECT sum(calls) n FROM model_cost").row(0), wh.query("SELECT count() n, uniqExact(line) u, sum(line) h FROM quarantine").row(0))
"""

def test_kill_9_in_mid_import_and_again(tmp_path):
    lines = [good(i, ts=1_790_000_000+i, cost_usd="0.001", model="m") if i % 97 else (b"{broken", b"")[i % 2] for i in range(16_000)]
    p = write(tmp_path/"long.jsonl", lines)
    def start(home):
        (tmp_path/home).mkdir(exist_ok=True)
        return subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path/home), str(p)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | dict(SOMA_PROGRESS="none"))
    def progress(home):
        try: return sqlite3.connect(f"file:{tmp_path/home/'state.db'}?mode=ro", uri=True).execute("SELECT read, status FROM imports").fetchone() or (0, "")
        except sqlite3.Error: return 0, ""
    calm = start("calm")
    out = calm.communicate(timeout=60)
    assert calm.returncode == 0, out[1]
    killed = []
    for n in (1500, 6000):
        proc, end = start("killed"), time.time()+30
        while progress("killed")[0] < n and proc.poll() is None and time.time() < end: time.sleep(.003)
        assert proc.poll() is None, proc.communicate()[1]
        proc.send_signal(signal.SIGKILL); proc.wait()
        killed.append(progress("killed"))
    assert all(0 < read < 16_000 and status == "running" for read, status in killed) and killed[0] < killed[1], killed
    again = start("killed")
    assert again.communicate(timeout=60)[0] == out[0] and again.returncode == 0


# ---- properties

@given(st_.lists(st_.binary(max_size=60).map(lambda b: b.replace(b"\n", b" ")) | st_.dictionaries(st_.sampled_from(["prompt", "answer", "ts", "rating", "x"]), st_.none() | st_.text(max_size=8) | st_.integers() | st_.floats() | st_.booleans() | st_.lists(st_.integers(), max_size=2)).map(lambda d: json.dumps(d).encode()), max_size=30))
@quick
def test_no_jsonl_line_is_ever_lost(tmp_path_factory, lines):
    p = tmp_path_factory.getbasetemp()/"prop.jsonl"
    p.write_bytes(b"\n".join(lines))
    n = p.read_bytes().count(b"\n") + (not p.read_bytes().endswith(b"\n") and p.stat().st_size > 0)
    try: rows = list(files.read_rows(p))
    except DataError: return   # refused as a whole: a JSON array, UTF-16
    assert [r.line for r in rows] == list(range(1, n+1))
    plan = dict(source="imp_x", path=p, file="prop.jsonl", app="a", mapping={f: f for f in ("prompt", "answer", "ts", "rating")})
    seen = list(interactions.batches(plan, utcnow(), rows=7))
    assert sum(len(g)+len(b)+k for g, b, k in seen) == n
    for g, b, _ in seen: interactions.interactions_table(g) if g else None

@given(st_.lists(st_.tuples(*[st_.text(st_.characters(exclude_characters="\0\r", exclude_categories=["Cs"]), max_size=12)]*2), max_size=20))
@quick
def test_csv_that_a_writer_wrote_comes_back(tmp_path_factory, rows):
    p = tmp_path_factory.getbasetemp()/"prop.csv"
    with open(p, "w", newline="", encoding="utf-8") as f: csv.writer(f, quoting=csv.QUOTE_ALL).writerows([("prompt", "answer"), *rows])
    got = [tuple(r.fields.values()) for r in files.read_rows(p)]
    assert got == rows

@given(st_.binary(max_size=300))
@quick
def test_any_bytes_as_csv_never_break_the_reader(tmp_path_factory, data):
    p = tmp_path_factory.getbasetemp()/"any.csv"
    p.write_bytes(b"prompt,answer\n" + data)
    rows = list(files.read_rows(p))
    assert all((r.fields is None) or len(r.fields) == 2 for r in rows) and [r.line for r in rows] == sorted({r.line for r in rows})
    assert not data.strip() or rows

def test_mutilated_files_are_read_or_refused_but_never_break_it(tmp_path):
    rnd, now = random.Random(5), utcnow()
    j = b"".join(json.dumps(dict(ts="2026-10-01", prompt='h\u00e9 "x"', answer="b", rating=4, feedback=dict(a=1), cost_usd="0.1", user_id=i)).encode() + b"\n" for i in range(6))
    buf = io.BytesIO(); pq.write_table(pa.table(dict(prompt=["a"]*50, answer=["x"]*50, rating=[3.]*50, ts=[now]*50)), buf)
    seeds = {"f.jsonl": j, "f.csv": b'ts,prompt,answer,rating\n' + b'2026-10-01,"q, ""x""\ny",a,5\n'*5, "f.parquet": buf.getvalue(), "f.jsonl.gz": gzip.compress(j, mtime=0)}
    tokens = [b'"', b"\0", b"\n", b"{}", b"-1e999", b"null", b"\xff\xfe", b"[", b"NaN", b"9"*21]
    read = refused = 0
    for k in range(800):
        name, seed = rnd.choice(sorted(seeds.items()))
        b = bytearray(seed)
        for _ in range(rnd.choice([1, 1, 2, 5, 20])):
            i, op = rnd.randrange(len(b)), rnd.random()
            if op < .4: b[i] = rnd.randrange(256)
            elif op < .6: del b[i:i+rnd.randrange(1, 9)]
            elif op < .8: b[i:i] = rnd.choice(tokens)
            else: del b[i+1:]
            if len(b) < 2: break
        (tmp_path/name).write_bytes(b)
        try:
            for good_, *_ in interactions.batches(interactions.plan_import(tmp_path/name), now, rows=3): interactions.interactions_table(good_) if good_ else None
            read += 1
        except DataError: refused += 1
    assert read > 200 and refused > 100

texts = st_.text(st_.sampled_from("aAbB .?!'\u00a0\u200bé1"), max_size=6)
@given(st_.lists(st_.tuples(texts, st_.sampled_from([.1, .5, .9])), min_size=1, max_size=30), st_.randoms())
@quick
def test_dedup_keeps_one_of_each_whatever_the_order(rows, rnd):
    df = pl.DataFrame([dict(id=f"i{i:03}", prompt=p, answer="a", quality=q) for i, (p, q) in enumerate(rows)])
    kept, dropped = dedup.exact(df)
    assert sorted([*kept["id"], *dropped["id"]]) == sorted(df["id"]) and kept["copies"].sum() == len(df)
    assert kept.select(dedup.text_key()).n_unique() == len(kept)
    order = list(range(len(df))); rnd.shuffle(order)
    assert sorted(dedup.exact(df[order])[0]["id"]) == sorted(kept["id"])

@given(st_.lists(st_.tuples(st_.integers(0, 12), st_.sampled_from("abc")), min_size=1, max_size=60), st_.integers(0, 5), st_.randoms())
@quick
def test_split_never_shares_a_user(rows, seed, rnd):
    df = pl.DataFrame([dict(id=f"i{i}", user_id=f"u{u}", category=c) for i, (u, c) in enumerate(rows)])
    parts = curate.split(df, seed=seed)
    users = [set(p["user_id"]) for p in parts.values()]
    assert not (users[0] & users[1] or users[0] & users[2] or users[1] & users[2]) and sorted(i for p in parts.values() for i in p["id"]) == sorted(df["id"])
    order = list(range(len(df))); rnd.shuffle(order)
    assert {s: sorted(p["id"]) for s, p in curate.split(df[order], seed=seed).items()} == {s: sorted(p["id"]) for s, p in parts.items()}

@given(st_.lists(st_.sampled_from("aabbbc"), min_size=1, max_size=60), st_.none() | st_.integers(1, 9), st_.floats(0, 1))
@quick
def test_balance_loses_no_row_and_no_category(cats, cap, tau):
    df = pl.DataFrame([dict(id=f"i{i}", category=c, quality=i % 3/2) for i, c in enumerate(cats)])
    kept, dropped = curate.balance(df, cap=cap, temperature=tau)
    assert sorted([*kept["id"], *dropped["id"]]) == sorted(df["id"]) and set(kept["category"]) == set(cats)
    assert cap is None or kept["category"].value_counts()["count"].max() <= cap


# ---- quality

@given(st_.lists(st_.tuples(st_.text(max_size=40), st_.text(max_size=60), st_.none() | st_.integers(1, 5)), min_size=1, max_size=20))
@quick
def test_any_text_gets_a_score(rows):
    s = quality.score(pl.DataFrame([dict(prompt=p, answer=a, rating=r) for p, a, r in rows], schema=dict(prompt=pl.String, answer=pl.String, rating=pl.Float64)))
    assert s["quality"].is_between(0, 1).all() and (s["usable"] == (s["reason"] == "")).all() and all(quality.why(r) for r in s.iter_rows(named=True))

def test_rules_are_data(tmp_path):
    df = pl.DataFrame(dict(prompt=["Where is it?"]*2, answer=["I'm sorry, but I can't assist.", "It is on its way."]))
    (tmp_path/"rules.yaml").write_text("version: '2'\nweights: {refusal: 0}\n")
    assert quality.score(df)["quality"][0] < .2 and quality.score(df, tmp_path/"rules.yaml")["quality"].to_list() == [.5, .5]
    with pytest.raises(DataError, match="unknown rule"): quality.load_rules(dict(wieghts={}))


# ---- datasets

@pytest.fixture(scope="module")
def log(stores, tmp_path_factory):
    wh, st = stores
    rng, d = random.Random(1), tmp_path_factory.mktemp("log")
    rows = [good(i, user_id=f"u{rng.randrange(60)}", category=rng.choice(["a", "a", "a", "b"]), rating=rng.choice([None, 1, 5, 5])) for i in range(600)]
    rows += rows[:40] + [good(i, answer="") for i in range(9)] + [good(i, status="error", answer=None) for i in range(5)] + [b"{"]
    return import_log(write(d/"log.jsonl", rows), wh, app="built", st=st)

def test_the_same_inputs_give_the_same_bytes_and_the_funnel_adds_up(stores, log, tmp_path):
    wh, st = stores
    a, b = (curate.build_dataset(wh, log.source, tmp_path/x, "t", st=st) for x in "ab")
    assert a.hash == b.hash and all((Path(a.path)/f).read_bytes() == (Path(b.path)/f).read_bytes() for f in ("train.parquet", "validation.parquet", "test.parquet", "manifest.json"))
    f = a.counts["funnel"]
    assert f[0]["left"] == log.imported and f[-1]["left"] == sum(a.splits.values()) and sum(s["dropped"] for s in f) == log.imported - f[-1]["left"]
    assert {s["step"]: s["dropped"] for s in f}["unusable"] == 14 and a.counts["quarantined"] == {"broken_json": 1}
    assert curate.build_dataset(wh, "built", tmp_path/"c", "t", st=st).splits == a.splits   # by the app's name
    assert curate.build_dataset(wh, log.source, tmp_path/"a", "t", st=st) == a               # again: nothing new
    assert curate.build_dataset(wh, log.source, tmp_path/"a", "t", seed=1, st=st).hash != a.hash
    folder = dataset.load_dataset_dir(a.path)
    parts = [set(folder.split(s)["user_id"]) for s in dataset.SPLITS]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert not os.access(Path(a.path)/"train.parquet", os.W_OK) or os.geteuid() == 0

def test_a_given_test_set_is_whole_and_leaves_training(stores, log, tmp_path):
    wh, st = stores
    held = import_log(write(tmp_path/"held.jsonl", [dict(prompt=f"WHERE  is order {i}", answer="x" if i else "y", user_id="u3" if i == 1 else f"h{i}") for i in range(30)]), wh, st=st)
    ds = curate.build_dataset(wh, log.source, tmp_path, "t", test_sources=held.source, st=st)
    folder = dataset.load_dataset_dir(ds.path)
    assert ds.splits["test"] == 30 and not dedup.overlap(folder.split("train"), folder.split("test")).any()
    assert "u3" not in [*folder.split("train")["user_id"], *folder.split("validation")["user_id"]]
    leak = next(s for s in ds.counts["funnel"] if s["step"] == "also in the test set")["why"]
    assert leak["same_text"] > 10 and leak["same_user"] > 0

def test_what_cannot_teach_is_refused(stores, log, tmp_path):
    wh, st = stores
    def build(rows, **kw): return curate.build_dataset(wh, import_log(write(tmp_path/f"{len(rows)}.jsonl", rows), wh, st=st).source, tmp_path/"ds", st=st, **kw)
    with pytest.raises(DataError, match="every answer is the same"): build([good(i, answer="Please wait.", user_id=f"u{i}") for i in range(41)])
    with pytest.raises(NoUsableRowsError, match="no usable interaction"): build([good(i, answer="") for i in range(42)])
    with pytest.raises(DataError, match="split by user"): build([good(i, user_id="me") for i in range(43)])
    assert sum(build([good(i, user_id="me") for i in range(43)], split_by="id").splits.values()) == 43
    assert build([good(i, user_id=f"u{i}", category="only") for i in range(44)]).splits["train"] > 20   # one category is no fault
    with pytest.raises(NoUsableRowsError, match="no row is left"): build([good(i, user_id=f"u{i}") for i in range(45)], min_quality=.99)
    for n in (6, 9, 12, 20): assert all(build([good(i, user_id=f"u{i}") for i in range(n)]).splits.values()), n
    assert build([good(i, user_id=f"u{i}") for i in range(80)], max_rows=10).splits["train"] == 10
    assert not [p for p in (tmp_path/"ds").iterdir() if p.name.startswith(".")]

FULL = """
import resource, sys, polars as pl, random
from somaagent.core.errors import SomaError
from somaagent.data.dataset import COLUMNS, write_dataset
rnd = random.Random(0)
n = 20_000
df = pl.DataFrame({c: [rnd.random() for _ in range(n)] if t == pl.Float64 else [f"{rnd.random()}" for _ in range(n)] if t == pl.String else [0]*n for c, t in COLUMNS.items()}).cast(COLUMNS)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try: write_dataset(sys.argv[1], "t", dict(train=df, validation=df, test=df), {}, {})
except SomaError as e: print(e); sys.exit(e.exit_code)
"""
def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    p = subprocess.run([sys.executable, "-c", FULL, str(tmp_path/"out")], capture_output=True, text=True, timeout=60)
    assert p.returncode == 1 and "nothing half-written" in p.stdout.lower() and "Traceback" not in p.stderr, p.stderr
    assert list((tmp_path/"out").iterdir()) == []


# ---- the command line, as a process

def test_soma_log_tells_a_mistake_in_one_sentence(tmp_path):
    write(tmp_path/"bad.csv", [b"foo,bar", b"1,2"]); write(tmp_path/"ok.csv", [b"prompt,answer", b"a,b", b"c"])
    def soma(*args): return subprocess.run([sys.executable, "-c", "from somaagent.cli.log import log; log()", *args], cwd=tmp_path, capture_output=True, text=True, timeout=60,
        env=os.environ | dict(SOMA_STORES_HOME=str(tmp_path/"home"), SOMA_STORES_WAREHOUSE_MODE="direct", SOMA_PROGRESS="none"))
    bad = soma("import", "bad.csv")
    assert bad.returncode == 1 and "foo, bar" in bad.stderr and "Traceback" not in bad.stderr
    ok = soma("import", "ok.csv", "--json")
    assert ok.returncode == 0 and json.loads(ok.stdout)["reasons"] == {"column_count": 1}, ok.stderr

def test_two_imports_of_one_file_at_once_store_it_once(tmp_path):
    p = write(tmp_path/"both.jsonl", [good(i) for i in range(2000)] + [b"{"])
    env = os.environ | dict(SOMA_STORES_HOME=str(tmp_path/"home"), SOMA_STORES_WAREHOUSE_MODE="shared", SOMA_STORES_IDLE_S="2", SOMA_PROGRESS="none")
    code = "import sys; from somaagent.cli.log import log; log(sys.argv[1:])"
    both = [subprocess.Popen([sys.executable, "-c", code, "import", str(p), "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) for _ in range(2)]
    for b in both: out, err = b.communicate(timeout=90); assert b.returncode == 0, err
    s = json.loads(subprocess.run([sys.executable, "-c", code, "stats", "--json"], capture_output=True, text=True, env=env, timeout=60).stdout)
    assert [m["calls"] for m in s["models"]] == [2000] and [q["rows"] for q in s["quarantine"]] == [1]
