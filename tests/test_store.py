"""The stores under fire: several processes, kill -9, full disks, broken migrations, two databases, Redis."""
import datetime as dt, json, os, random, resource, shutil, signal, socket, subprocess, sys, tempfile, textwrap, threading, time
from decimal import Decimal
from pathlib import Path

import polars as pl, pyarrow as pa, pytest
import sqlalchemy as sa
from conftest import missing, root
from store_rows import NOW, usage
from hypothesis import given, settings as hyp, strategies as some

from somaagent.core.errors import MigrationError, StoreError, WarehouseBusyError
from somaagent.store import migrations as mg
from somaagent.store.artifacts import Artifacts
from somaagent.store.cache import Cache
from somaagent.store.engine import owner_note
from somaagent.store.server import ensure_server
from somaagent.store.state import Base, ModelVersionRow, RunRow, State, _revisions
from somaagent.store.warehouse import Warehouse, as_table

labels = [m.label for m in mg.scripts()]
nxt = len(labels)+1

def python(code, *args, **env):
    "A real process running `code`; its output is read by line"
    return subprocess.Popen([sys.executable, "-u", "-c", textwrap.dedent(code), *map(str, args)], cwd=root, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root/'tests'}", **{k: str(v) for k, v in env.items()}})
def done(p, timeout=60):
    out, err = p.communicate(timeout=timeout)
    assert p.returncode == 0, err[-3000:]
    return out
def gone(pid, timeout=15):
    "Wait until a process has ended (a zombie of ours counts as ended)"
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z": return True
        except FileNotFoundError: return True
        time.sleep(.02)
    return False

@pytest.fixture
def path(tmp_path):
    "A place for a warehouse, whose server is ended afterwards"
    p = tmp_path/"warehouse"
    yield p
    n = owner_note(p)
    if n.get("mode") == "server":
        try: os.kill(n["pid"], signal.SIGTERM)
        except ProcessLookupError: return
        assert gone(n["pid"])

@pytest.fixture
def direct(path):
    with Warehouse(f"chdb://{path}", mode="direct") as wh: yield wh
@pytest.fixture
def shared(path):
    with Warehouse(f"chdb://{path}", mode="shared", idle_s=60) as wh: yield wh

def totals(wh):
    "Rows and calls in the table and in both roll-ups"
    return (wh.query("SELECT count() n FROM model_usage")["n"][0], wh.query("SELECT uniqExact(id) n FROM model_usage")["n"][0],
            wh.query("SELECT sum(calls) n FROM model_performance")["n"][0], wh.query("SELECT sum(calls) n FROM model_cost")["n"][0])

# ---- the verbs, in both modes ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["direct", "shared"])
def test_verbs(path, mode):
    with Warehouse(f"chdb://{path}", mode=mode) as wh:
        assert wh.mode == mode
        assert wh.insert("model_usage", usage(100), token="a") == wh.insert("model_usage", usage(100), token="a") == 100
        assert totals(wh) == (100, 100, 100, 100)
        perf = wh.query("SELECT sum(errors) e, max(p99_ms) p FROM model_performance").row(0)
        assert perf[0] == 20 and 100 <= perf[1] <= 109
        assert wh.query("SELECT sum(cost_usd) c FROM model_cost")["c"][0] == Decimal("0.0000001")
        assert wh.query("SELECT ts FROM model_usage ORDER BY ts LIMIT 1")["ts"][0] == NOW
        # text that must not be pasted, long enough to travel as a form
        for text in ("'; DROP TABLE model_usage; --", "a\tb\nc\\n\0d", "é" * 20000): assert wh.query("SELECT {t:String} AS t", dict(t=text))["t"][0] == text
        assert wh.query("SELECT * FROM model_usage WHERE id = 'nobody'").shape == (0, 14)
        # settings live for one query
        get = "SELECT toUInt64(getSetting('max_block_size')) AS v"
        default = wh.query(get)["v"][0]
        assert wh.query(get, settings=dict(max_block_size=777))["v"][0] == 777 and wh.query(get)["v"][0] == default
        # streams are bounded, complete and in types
        chunks = list(wh.stream("SELECT number, toDecimal64(number, 9) AS d FROM numbers({n:UInt32})", dict(n=200_000), chunk=50_000))
        assert sum(map(len, chunks)) == 200_000 and max(map(len, chunks)) <= 50_000 and chunks[0].schema["d"] == pl.Decimal(18, 9)
        with pytest.raises(StoreError): list(wh.stream("SELECT throwIf(number = 150000, 'in mid-stream') FROM numbers(200000) SETTINGS max_block_size = 10000"))
        it = wh.stream("SELECT number FROM numbers(5000000)"); next(it); it.close()
        with pytest.raises(StoreError, match="UNKNOWN_TABLE"): wh.query("SELECT 1 FROM nowhere")
        with pytest.raises(StoreError, match="Missing columns|UNKNOWN_IDENTIFIER|Unknown expression"): wh.query("SELECT nothing FROM model_usage")
        with pytest.raises(StoreError, match="not the name of a table"): wh.insert("model_usage; DROP TABLE x", usage(1))
        assert wh.insert("model_usage", []) == 0
        assert totals(wh)[0] == 100

@pytest.mark.parametrize("mode", ["direct", "shared"])
def test_slices_of_one_batch(path, mode):
    with Warehouse(f"chdb://{path}", mode=mode) as wh:
        df = pl.DataFrame(usage(2500))
        for _ in range(2): wh.insert("model_usage", df, token="big", slice_rows=1000)
        assert totals(wh) == (2500,) * 4

@pytest.mark.parametrize("mode", ["direct", "shared"])
def test_threads(path, mode):
    with Warehouse(f"chdb://{path}", mode=mode) as wh:
        bad = []
        def work(k):
            try:
                for j in range(5):
                    wh.insert("model_usage", usage(20, f"{k}.{j}"))
                    assert wh.query("SELECT count() n FROM model_usage WHERE startsWith(id, {p:String})", dict(p=f"{k}."))["n"][0] == 20 * (j + 1)
            except Exception as e: bad.append(e)
        ts = [threading.Thread(target=work, args=(k,)) for k in range(6)]
        for t in ts: t.start()
        for t in ts: t.join()
        assert not bad and totals(wh) == (600,) * 4

TABLE = pa.schema([("id", pa.string()), ("ts", pa.timestamp("ms", "UTC")), ("cost_usd", pa.decimal128(18, 9)), ("prompt_tokens", pa.uint32()), ("meta", pa.map_(pa.string(), pa.string())), ("rating", pa.float64())])
@hyp(max_examples=60, deadline=None)
@given(some.lists(some.fixed_dictionaries({"id": some.text(), "cost_usd": some.decimals(0, 10**8, places=9), "prompt_tokens": some.integers(-3, 2**33),
    "meta": some.dictionaries(some.text(max_size=5), some.text(max_size=5), max_size=3), "rating": some.none() | some.floats(1, 5)}), min_size=1, max_size=5))
def test_rows_become_columns_or_say_why(rows):
    try: t = as_table(rows, TABLE, "t")
    except StoreError as e:
        assert any(not 0 <= r["prompt_tokens"] < 2**32 for r in rows) and "prompt_tokens cannot hold" in str(e) or any(not _utf8(r) for r in rows)
        return
    assert t.to_pylist(maps_as_pydicts="strict") == rows
def _utf8(r):
    try: json.dumps(r, default=str, ensure_ascii=False).encode(); return True
    except UnicodeEncodeError: return False

def test_a_forked_child_is_told(direct):
    r, w = os.pipe()
    pid = os.fork()
    if not pid:
        try: direct.query("SELECT 1"); os.write(w, b"answered")
        except StoreError as e: os.write(w, str(e).encode())
        finally: os._exit(0)
    os.waitpid(pid, 0)
    assert b"does not survive a fork" in os.read(r, 1000)

# ---- the plain driver against our server: what somebody else's client does --------------------------------------------------------------------

def test_an_ordinary_client(shared):
    import clickhouse_connect
    c = clickhouse_connect.get_client(host="127.0.0.1", port=shared.server["port"], username="soma", password=shared.server["key"], autogenerate_session_id=False, compress="lz4")
    c.command("CREATE TABLE plain (n UInt64, s String, l LowCardinality(String), t DateTime64(3,'UTC')) ENGINE = MergeTree ORDER BY n")
    rows = [[i, f"row {i} " * 20, f"l{i%7}", NOW] for i in range(120_000)]
    c.insert("plain", rows, column_names=["n", "s", "l", "t"])  # many blocks, each its own lz4 frame
    assert c.query("SELECT count(), uniqExact(n), sum(length(s)) FROM plain").result_rows == [(120_000, 120_000, sum(len(r[1]) for r in rows))]
    got = c.query("SELECT n, s, l, t FROM plain WHERE n IN {ns:Array(UInt64)} ORDER BY n", parameters=dict(ns=[5, 119_999])).result_rows
    assert [tuple(r) for r in got] == [(*rows[i][:3], NOW.replace(tzinfo=None)) for i in (5, 119_999)]  # the driver gives UTC without a zone
    assert c.command("SELECT 7") == 7 and c.command("EXISTS TABLE plain") == 1
    with c.query_row_block_stream("SELECT n FROM plain") as s: assert sum(len(b) for b in s) == 120_000
    c.close()

def test_a_server_by_url(shared):
    "The local server speaks ClickHouse's protocol, so it can stand for a remote one"
    with Warehouse(f"http://soma:{shared.server['key']}@127.0.0.1:{shared.server['port']}/default") as wh:
        assert wh.mode == "remote" and mg.status(wh).current
        wh.insert("model_usage", usage(10), token="r"); wh.insert("model_usage", usage(10), token="r")
        assert totals(wh) == totals(shared) == (10,) * 4
        assert mg.rollback(wh, len(labels)) == labels[::-1]
        wh.command("CREATE TABLE schema_lock (at DateTime) ENGINE = MergeTree ORDER BY at COMMENT 'somebody'")
        with pytest.raises(MigrationError, match="somebody"):
            with mg._locked(wh, timeout=.3): pass
        wh.command("DROP TABLE schema_lock SYNC")
        a, b = [python("import sys; from somaagent.store.warehouse import Warehouse; wh = Warehouse(sys.argv[1]); from somaagent.store.migrations import status; assert status(wh).current", wh_url(shared)) for _ in range(2)]
        done(a); done(b)
        assert mg.verify(wh)
def wh_url(shared): return f"http://soma:{shared.server['key']}@127.0.0.1:{shared.server['port']}/default"

def test_unreachable_server():
    with pytest.raises(StoreError, match="refused"): Warehouse("clickhouse://a:secretpw@127.0.0.1:9/db")
    try: Warehouse("clickhouse://a:secretpw@127.0.0.1:9/db")
    except StoreError as e: assert "secretpw" not in str(e)

def test_wrong_key_and_broken_requests(shared):
    import http.client
    port, key = shared.server["port"], shared.server["key"]
    def ask(body, headers={}, target="/"):
        c = http.client.HTTPConnection("127.0.0.1", port, timeout=10); c.request("POST", target, body, headers); r = c.getresponse(); out = r.read(); c.close(); return r.status, r.getheader("X-ClickHouse-Exception-Code"), out
    assert ask(b"SELECT 1")[:2] == ask(b"SELECT 1", {"X-ClickHouse-Key": key[:-1]})[:2] == ask(b"SELECT 1", {"Authorization": "Basic %%%"})[:2] == (401, "516")
    assert ask(b"SELECT 1", {"X-ClickHouse-Key": key})[2] == b"1\n"
    assert ask(b"SELECT 1", {"X-ClickHouse-Key": key}, "/?nonsense_setting=1")[0] == 500
    assert ask(b"SELECT 1", {"X-ClickHouse-Key": key}, "/?a%27%3Bb=1")[0] == 500
    assert ask(b"\xff\xfe", {"X-ClickHouse-Key": key})[0] == 500
    assert ask(b"INSERT INTO model_usage (id) FORMAT Native\nrubbish", {"X-ClickHouse-Key": key})[0] == 500
    assert ask(b"x", {"X-ClickHouse-Key": key, "Content-Encoding": "br"})[0] == 500
    f = Path(shared.path).with_name("warehouse.owner")
    assert f.stat().st_mode & 0o777 == 0o700 and (f/"key").stat().st_mode & 0o777 == 0o600
    assert totals(shared) == (0,) * 4

# ---- several processes ------------------------------------------------------------------------------------------------------------------------

CLIENT = """
import sys; from somaagent.store.warehouse import Warehouse; from store_rows import usage
wh = Warehouse(f"chdb://{sys.argv[1]}", mode="shared", idle_s=30)
for b in range(int(sys.argv[3])): wh.insert("model_usage", usage(50, f"{sys.argv[2]}.{b}"), token=f"{sys.argv[2]}.{b}")
print(wh.server["pid"])
"""
def test_processes_share_and_the_second_finds_the_first(path):
    ps = [python(CLIENT, path, name, 8) for name in "ab"]
    pids = {int(done(p)) for p in ps}
    assert len(pids) == 1
    with Warehouse(f"chdb://{path}", mode="auto") as wh:  # auto joins the running server
        assert wh.mode == "shared" and wh.server["pid"] in pids
        assert totals(wh) == (800,) * 4

def test_a_direct_owner_is_named(path):
    p = python("import sys,time; from somaagent.store.warehouse import Warehouse; Warehouse(f'chdb://{sys.argv[1]}', mode='direct'); print('open'); time.sleep(60)", path)
    assert p.stdout.readline() == "open\n"
    try:
        for mode in ("auto", "direct", "shared"):
            with pytest.raises(WarehouseBusyError, match=f"process {p.pid} owns"): Warehouse(f"chdb://{path}", mode=mode)
    finally: p.kill(); p.communicate()
    with Warehouse(f"chdb://{path}", mode="auto") as wh: assert wh.mode == "direct"  # kill -9 left no lock behind

def test_two_embedded_warehouses_in_one_process(direct, tmp_path):
    with Warehouse(f"chdb://{tmp_path}/second", mode="auto") as two:
        assert (direct.mode, two.mode) == ("direct", "shared")
        two.insert("model_usage", usage(3))
        assert totals(two)[0] == 3 and totals(direct)[0] == 0
    pid = owner_note(tmp_path/"second")["pid"]
    os.kill(pid, signal.SIGTERM)
    assert gone(pid)

def test_the_server_ends_when_idle_and_comes_back(path):
    with Warehouse(f"chdb://{path}", mode="shared", idle_s=.6) as wh:
        wh.insert("model_usage", usage(5))
        first = wh.server["pid"]
        assert gone(first) and owner_note(path) == {}
        assert totals(wh) == (5,) * 4  # the next question starts another
        assert wh.server["pid"] != first
        second = wh.server["pid"]
    assert gone(second)

def test_a_deleted_home_ends_its_server(path):
    with Warehouse(f"chdb://{path}", mode="shared", idle_s=60) as wh: first = wh.server["pid"]
    shutil.rmtree(path); shutil.rmtree(path.with_name("warehouse.owner"))
    with Warehouse(f"chdb://{path}", mode="shared", idle_s=60) as wh:
        assert wh.server["pid"] != first and gone(first) and totals(wh) == (0,) * 4
        assert owner_note(path)["pid"] == wh.server["pid"]  # the old one has not taken the new one's note away

def test_everybody_starts_at_once(path):
    "Processes in auto mode: the first gets in directly or everyone shares; who does not get in is told by whom"
    code = """
        import sys, time; from somaagent.store.warehouse import Warehouse; from somaagent.core.errors import WarehouseBusyError
        try: wh = Warehouse(f"chdb://{sys.argv[1]}", mode="auto"); print(wh.mode, wh.query("SELECT count() n FROM interactions")["n"][0], flush=True); time.sleep(60)
        except WarehouseBusyError as e: print(e)"""
    ps, end = [python(code, path) for _ in range(3)], time.monotonic() + 40
    while sum(p.poll() is None for p in ps) > 1 and time.monotonic() < end: time.sleep(.05)
    out = [p.stdout.readline().strip() for p in ps]
    for p in ps: p.kill(); p.communicate()
    assert out.count("direct 0") == 1 and all(o == "direct 0" or "owns the warehouse (direct)" in o and "unknown" not in o for o in out), out

def test_a_client_that_dies_in_mid_sentence(shared):
    body = b"INSERT INTO model_usage (id) FORMAT TSV\n" + b"half\n" * 1000
    with socket.create_connection(("127.0.0.1", shared.server["port"])) as s:
        s.sendall(f"POST / HTTP/1.1\r\nHost: x\r\nX-ClickHouse-Key: {shared.server['key']}\r\nContent-Length: {len(body)+500}\r\n\r\n".encode() + body)
    with socket.create_connection(("127.0.0.1", shared.server["port"])) as s:
        s.sendall(f"POST / HTTP/1.1\r\nHost: x\r\nX-ClickHouse-Key: {shared.server['key']}\r\nTransfer-Encoding: chunked\r\n\r\n{len(body):x}\r\n".encode() + body[:-50])
    time.sleep(.2)
    assert totals(shared) == (0,) * 4
    # a process killed while it inserts: what it had acknowledged is there, nothing is there twice, and the server goes on
    p = python(CLIENT.replace('print(wh', 'print("never"); print(wh'), shared.path, "k", 100_000)
    while totals(shared)[0] < 500: time.sleep(.02)
    p.kill(); p.communicate()
    n = settled(shared)
    assert len(set(n)) == 1 and n[0] % 50 == 0
    shared.insert("model_usage", usage(50, "k.0"), token="k.0")
    assert settled(shared) == n
def settled(wh):
    "Totals after what the server had already received is done"
    a, b = None, totals(wh)
    while a != b: time.sleep(.3); a, b = b, totals(wh)
    return b

# ---- kill -9 in the middle of inserts -------------------------------------------------------------------------------------------------------------

WRITER = """
import sys; from somaagent.store.warehouse import Warehouse; from store_rows import usage
wh = Warehouse(f"chdb://{sys.argv[1]}", mode="direct")
print("open")
for b in range(int(sys.argv[2]), 100000): wh.insert("model_usage", usage(200, b), token=f"b{b}"); print(b)
"""
def test_kill_the_owner_in_mid_insert(path):
    rng, acked, sent = random.Random(0), -1, 0
    for _ in range(3):
        p = python(WRITER, path, acked + 1)
        assert p.stdout.readline() == "open\n"
        for _ in range(rng.randint(3, 9)): acked = int(p.stdout.readline())
        time.sleep(rng.uniform(0, .03))
        p.kill()
        for line in p.communicate()[0].splitlines(): acked = int(line)
        sent = max(sent, acked + 1)
    with Warehouse(f"chdb://{path}", mode="direct") as wh:
        rows, distinct, hourly, daily = totals(wh)
        assert rows == distinct == hourly == daily and rows in ((acked + 1) * 200, (acked + 2) * 200)  # at most the one batch that was not answered for
        for b in range(acked + 2): wh.insert("model_usage", usage(200, b), token=f"b{b}")  # everything once more, under the same tokens
        assert totals(wh) == ((acked + 2) * 200,) * 4
        assert mg.verify(wh)

def test_kill_the_server_in_mid_insert(path):
    with Warehouse(f"chdb://{path}", mode="shared", idle_s=60) as wh:
        stop, pids, rng = threading.Event(), set(), random.Random(1)
        def killer():
            while not stop.wait(rng.uniform(.3, .6)):
                n = owner_note(path)
                if n.get("mode") == "server" and n["pid"] not in pids and len(pids) < 3: pids.add(n["pid"]); os.kill(n["pid"], signal.SIGKILL)
        t = threading.Thread(target=killer, daemon=True); t.start()
        b, end = 0, time.monotonic() + 40
        while (len(pids) < 3 or b < 60) and time.monotonic() < end: wh.insert("model_usage", usage(100, b), token=f"s{b}"); b += 1
        stop.set(); t.join()
        wh.insert("model_usage", usage(100, b), token=f"s{b}")
        assert len(pids) == 3 and wh.server["pid"] not in pids
        assert totals(wh) == ((b + 1) * 100,) * 4  # every acknowledged batch, once
        assert mg.drift(wh) == []

# ---- migrations ---------------------------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def sql(tmp_path):
    shutil.copytree(root/"somaagent/store/sql", tmp_path/"sql")
    return tmp_path/"sql"

def test_back_and_forth_is_the_same_schema(direct):
    before = mg.facts(direct)
    assert len(before) > 150 and mg.migrate(direct) == []
    mg.rollback(direct, len(labels))
    assert mg.facts(direct) == {}
    mg.migrate(direct, to=1)
    assert [r["state"] for r in mg.status(direct).rows] == ["applied"] + ["pending"]*(len(labels)-1)
    mg.migrate(direct)
    assert mg.facts(direct) == before and mg.verify(direct)

def test_every_statement_may_be_repeated():
    for m in mg.scripts():
        for s in mg.statements(m.up): assert "IF NOT EXISTS" in s, s[:80]
        for s in mg.statements(m.down): assert "IF EXISTS" in s, s[:80]

def test_migration_faults(path, sql):
    with Warehouse(f"chdb://{path}", mode="direct", migrate=False) as wh:
        f = sql/f"{nxt:04d}_broken.up.sql"
        f.write_text("CREATE TABLE IF NOT EXISTS extra (a UInt8) ENGINE = MergeTree ORDER BY a;\nCREATE TABLE IF NOT EXISTS other (a Nonsense) ENGINE = MergeTree ORDER BY a;\n")
        with pytest.raises(MigrationError, match=f"no way back.*{nxt:04d}_broken"): mg.migrate(wh, folder=sql)
        (sql/f"{nxt:04d}_broken.down.sql").write_text("DROP TABLE IF EXISTS other SYNC;\nDROP TABLE IF EXISTS extra SYNC;\n")
        with pytest.raises(MigrationError, match=f"{nxt:04d}_broken.up.sql failed"): mg.migrate(wh, folder=sql)
        assert [r["state"] for r in mg.status(wh, sql).rows] == ["applied"] * len(labels) + ["interrupted"]
        assert f"{nxt:04d}_broken is interrupted" in mg.verify(wh, sql).problems
        f.write_text(f.read_text().replace("Nonsense", "UInt8"))  # it was never applied, so it may be corrected
        assert mg.migrate(wh, folder=sql) == [f"{nxt:04d}_broken"] and mg.verify(wh, sql)
        f.write_text(f.read_text() + "-- changed\n")
        for act in (mg.migrate, mg.rollback):
            with pytest.raises(MigrationError, match=f"edited after it had been applied.*{nxt:04d}_broken.up.sql"): act(wh, folder=sql)
        assert not mg.verify(wh, sql)
        with pytest.raises(MigrationError, match="newer than this program"): mg.migrate(wh)
    (sql/f"{nxt+2:04d}_gap.up.sql").write_text(""); (sql/f"{nxt+2:04d}_gap.down.sql").write_text("")
    with pytest.raises(MigrationError, match="without a gap"): mg.scripts(sql)
    (sql/"six.up.sql").write_text("")
    with pytest.raises(MigrationError, match="not the name"): mg.scripts(sql)

def test_kill_a_migration(path, sql):
    (sql/f"{nxt:04d}_slow.up.sql").write_text("CREATE TABLE IF NOT EXISTS early (a UInt8) ENGINE = MergeTree ORDER BY a;\nINSERT INTO early SELECT sleepEachRow(3) FROM numbers(20);\nCREATE TABLE IF NOT EXISTS late (a UInt8) ENGINE = MergeTree ORDER BY a;\n")
    (sql/f"{nxt:04d}_slow.down.sql").write_text("DROP TABLE IF EXISTS late SYNC;\nDROP TABLE IF EXISTS early SYNC;\n")
    p = python("import sys; from somaagent.store import migrations as mg; from somaagent.store.warehouse import Warehouse\n"
               "wh = Warehouse(f'chdb://{sys.argv[1]}', mode='direct'); print('open'); mg.migrate(wh, folder=sys.argv[2])", path, sql)
    assert p.stdout.readline() == "open\n"
    end = time.monotonic() + 20
    while not list(path.glob("**/early*")) and not any("early" in f.name for f in path.rglob("*.sql")) and time.monotonic() < end: time.sleep(.05)
    p.kill(); p.communicate()
    (sql/f"{nxt:04d}_slow.up.sql").write_text((sql/f"{nxt:04d}_slow.up.sql").read_text().replace("sleepEachRow(3) FROM numbers(20)", "0"))
    with Warehouse(f"chdb://{path}", mode="direct", migrate=False) as wh:
        assert mg.status(wh, sql).rows[len(labels)]["state"] == "interrupted"
        assert mg.migrate(wh, folder=sql) == [f"{nxt:04d}_slow"] and mg.verify(wh, sql)

def test_two_processes_migrate_at_once(path):
    ensure_server(path, 60)
    code = """
        import sys; from somaagent.store import migrations as mg; from somaagent.store.warehouse import Warehouse
        wh = Warehouse(f"chdb://{sys.argv[1]}", mode="shared", migrate=False); print("ready"); sys.stdout.flush()
        print(len(mg.migrate(wh)))"""
    ps = [python(code, path) for _ in range(3)]
    assert sorted(int(done(p).split()[1]) for p in ps) == [0, 0, len(labels)]
    with Warehouse(f"chdb://{path}", mode="shared") as wh:
        assert mg.verify(wh)
        assert wh.query("SELECT count() n FROM schema_migrations WHERE action='up'")["n"][0] == len(labels)

def test_verify_names_what_was_altered(direct):
    direct.command("ALTER TABLE interactions MODIFY COLUMN category String")
    direct.command("ALTER TABLE model_usage DROP INDEX ix_status")
    direct.command("DROP VIEW model_cost SYNC")
    p = mg.verify(direct).problems
    assert any(x.startswith("column interactions.category is 'String") for x in p) and "index model_usage.ix_status is missing" in p and "table model_cost is missing" in p

# ---- a full disk -------------------------------------------------------------------------------------------------------------------------------------------

FILL = """
import sys, os, resource; from somaagent.core.errors import StoreError; from somaagent.store.warehouse import Warehouse
if sys.argv[2] == "limit":
    import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
wh = Warehouse(f"chdb://{sys.argv[1]}", mode=sys.argv[3], idle_s=60)
if sys.argv[2] == "limit": resource.setrlimit(resource.RLIMIT_FSIZE, (1<<20, 1<<20))
ok = 0
try:
    for b in range(100):
        wh.insert("interactions", [dict(id=f"{b}-{i}", app="x", prompt=os.urandom(60_000).hex()) for i in range(30 if sys.argv[2] == "limit" else 10)], token=f"f{b}"); ok += 1
    print("never full")
except StoreError as e: print(ok, e)
"""
@pytest.fixture
def small_disk(tmp_path):
    d = tmp_path/"small"; d.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(d)], capture_output=True).returncode: pytest.skip("needs the right to mount a small file system")
    yield d
    subprocess.run(["umount", "-l", str(d)], check=True)

@pytest.mark.parametrize("mode", ["direct", "shared"])
def test_full_disk(small_disk, mode):
    path = small_disk/"warehouse"
    out = done(python(FILL, path, "disk", mode))
    ok, _, text = out.strip().partition(" ")
    assert int(ok) > 0 and text.startswith("the disk of the warehouse is full; nothing of this batch is acknowledged") and "Traceback" not in text
    if mode == "shared":
        n = owner_note(path); os.kill(n["pid"], signal.SIGTERM); assert gone(n["pid"])
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)  # somebody makes room
    with Warehouse(f"chdb://{path}", mode="direct") as wh:
        assert wh.query("SELECT uniqExact(id) n FROM interactions")["n"][0] >= int(ok) * 10
        for b in range(int(ok) + 1): wh.insert("interactions", [dict(id=f"{b}-{i}", app="x", prompt="again") for i in range(10)], token=f"f{b}")
        assert wh.query("SELECT count() n, uniqExact(id) u FROM interactions").row(0) == ((int(ok) + 1) * 10,) * 2

def test_file_size_limit(tmp_path):
    out = done(python(FILL, tmp_path/"warehouse", "limit", "direct"))
    assert "the disk of the warehouse is full" in out, out

def test_full_disk_of_the_other_stores(small_disk):
    (small_disk/"ballast").write_bytes(os.urandom(36 << 20))
    a = Artifacts(small_disk/"artifacts")
    with pytest.raises(StoreError, match="disk of the artifact store is full"): a.put(os.urandom(8 << 20))
    assert not [f for f in (small_disk/"artifacts").rglob("*") if f.is_file()]
    st = State(f"sqlite:///{small_disk}/state.db")
    with pytest.raises(StoreError, match="disk of the state store is full"):
        with st.session() as s: s.add_all(RunRow(name="x" * 100_000) for _ in range(100))
    with st.session(write=False) as s: assert s.scalars(sa.select(RunRow)).all() == []
    st.close()
    c = Cache(small_disk/"cache")
    c.set("k", os.urandom(8 << 20))
    assert c.get("k") is None and c.errors == 1

# ---- state -----------------------------------------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def postgres():
    "A PostgreSQL cluster of our own"
    found = shutil.which("initdb") or next(iter(sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/initdb")))), None)
    try: import psycopg  # noqa: F401
    except ImportError: found = None
    if not found: missing("PostgreSQL (initdb) and psycopg")
    bin_, d = Path(found).resolve().parent, Path(tempfile.mkdtemp(prefix="soma-pg-"))
    as_user = {}
    if os.geteuid() == 0:
        import pwd
        try: u = pwd.getpwnam("postgres")
        except KeyError: missing("the user postgres")
        os.chown(d, u.pw_uid, u.pw_gid)
        as_user = dict(user=u.pw_uid, group=u.pw_gid, extra_groups=[])
    run = lambda *a: subprocess.run([str(bin_/a[0]), *a[1:]], cwd=d, check=True, capture_output=True, **as_user)
    run("initdb", "-D", f"{d}/data", "-U", "soma", "-A", "trust", "--no-sync", "-E", "UTF8")
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    subprocess.run([str(bin_/"pg_ctl"), "-D", f"{d}/data", "-w", "-l", f"{d}/log", "-o", f"-p {port} -h 127.0.0.1 -k {d} -c fsync=off", "start"], cwd=d, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **as_user)
    yield f"postgresql://soma@127.0.0.1:{port}/postgres"
    run("pg_ctl", "-D", f"{d}/data", "-m", "immediate", "stop")
    shutil.rmtree(d, ignore_errors=True)

@pytest.fixture(params=["sqlite", "postgres"])
def state_url(request, tmp_path):
    if request.param == "sqlite": yield f"sqlite:///{tmp_path}/state.db"; return
    url = request.getfixturevalue("postgres")
    yield url
    st = State(url, migrate=False)
    with st.engine.begin() as c: c.execute(sa.text("DROP SCHEMA public CASCADE")); c.execute(sa.text("CREATE SCHEMA public"))
    st.close()

def test_state_in_both_databases(state_url):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext
    st = State(state_url)
    with st.engine.connect() as con: assert compare_metadata(MigrationContext.configure(con, opts=dict(compare_type=True)), Base.metadata) == []
    t = dt.datetime(2026, 10, 1, 14, 0, 0, 123456, tzinfo=dt.timezone(dt.timedelta(hours=2)))
    with st.session() as s: s.add(RunRow(id="r", name="ü", metrics=dict(nan=float("nan"), deep=[dict(inf=float("inf"), ok=1.5)]), started_at=t))
    with st.session(write=False) as s:
        r = s.get(RunRow, "r")
        assert r.started_at == t and r.started_at.tzinfo is not None and r.metrics == dict(nan=None, deep=[dict(inf=None, ok=1.5)]) and r.ended_at is None
    with pytest.raises(StoreError, match="such a row already") as e:
        with st.session() as s: s.add_all([ModelVersionRow(name="a", version="1.0.0"), ModelVersionRow(name="a", version="1.0.0")])
    assert e.value.__cause__ is not None
    with pytest.raises(StoreError): 
        with st.session() as s: s.execute(sa.text("SELECT nothing FROM nowhere"))
    with st.session() as s: assert s.scalar(sa.select(sa.func.count()).select_from(ModelVersionRow)) == 0
    st.migrate("base"); assert st.revision() == ""
    st.migrate(); assert st.revision() == _revisions()[-1]
    with st.engine.begin() as c: c.execute(sa.text("UPDATE alembic_version SET version_num='9999'"))
    with pytest.raises(MigrationError, match="9999"): State(state_url)
    st.close()

COUNT = """
import sys; import sqlalchemy as sa; from somaagent.store.state import State, RunRow
st = State(sys.argv[1])
for _ in range(25):
    with st.session() as s:
        r = s.scalars(sa.select(RunRow).where(RunRow.id == "counter").with_for_update()).one_or_none()
        if r is None: 
            if sys.argv[2] == "first": s.add(RunRow(id="counter", outputs=dict(n=1)))
        else: r.outputs = dict(n=r.outputs["n"] + 1)
"""
def test_processes_count_without_losing(state_url):
    "Read, add one, write back, from several processes that also create the schema together"
    st = State(state_url)
    with st.session() as s: s.add(RunRow(id="counter", outputs=dict(n=0)))
    for p in [python(COUNT, state_url, i) for i in range(2)]: done(p)
    with st.session(write=False) as s: assert s.get(RunRow, "counter").outputs == dict(n=50)
    st.close()

def test_processes_create_the_schema_together(state_url):
    for p in [python("import sys; from somaagent.store.state import State, _revisions; assert State(sys.argv[1]).revision() == _revisions()[-1]", state_url) for _ in range(2)]: done(p)

def test_state_errors(tmp_path):
    with pytest.raises(StoreError) as e: State("postgresql://soma:secretpw@127.0.0.1:9/x")
    assert "secretpw" not in str(e.value)
    (tmp_path/"state.db").write_bytes(b"this is not a database, it only has its name" * 100)
    with pytest.raises(StoreError, match="state.db.*not a database"): State(f"sqlite:///{tmp_path}/state.db")

# ---- artifacts and cache ----------------------------------------------------------------------------------------------------------------------------------------

def test_artifacts_are_whole_or_absent(tmp_path):
    a = Artifacts(tmp_path/"a")
    src = tmp_path/"src"; (src/"deep").mkdir(parents=True)
    for i in range(50): (src/f"deep/{i}.bin").write_bytes(random.Random(i).randbytes(20_000))
    code = "import sys; from somaagent.store.artifacts import Artifacts; a = Artifacts(sys.argv[1]); print('go'); a.put(sys.argv[2]) and a.path(a.put(sys.argv[2])); print('done')"
    ps = [python(code, tmp_path/"a", src) for _ in range(3)]
    ps[0].stdout.readline(); ps[0].kill(); ps[0].communicate()
    for p in ps[1:]: done(p)
    d = a.put(src, name="latest")
    assert a.verify(d) and a.named("latest") == d and a.put(src) == d
    out = a.get(d, tmp_path/"out")
    assert sorted((f.name, f.read_bytes()) for f in out.rglob("*.bin")) == sorted((f.name, f.read_bytes()) for f in src.rglob("*.bin"))
    assert not [f for f in (tmp_path/"a"/"checkouts").iterdir() if f.name != d[7:] and not f.name.startswith(".get-")]
    with pytest.raises(StoreError, match="something already"): a.get(d, tmp_path/"out")
    with pytest.raises(StoreError, match="no such artifact"): a.get("sha256:" + "0"*64, tmp_path/"none")
    assert not (tmp_path/"none").exists()
    with pytest.raises(StoreError, match="not the name of an artifact"): a.get("../../etc/passwd", tmp_path/"none")
    with pytest.raises(StoreError, match="not a name"): a.put(b"x", name="../up")
    with pytest.raises(StoreError, match="nothing to store"): a.put(tmp_path/"missing")
    h = a.files(d)["deep/7.bin"]
    (tmp_path/"a/objects"/h[:2]/h).write_bytes(b"tampered")
    with pytest.raises(StoreError, match="damaged: 'deep/7.bin'"): a.verify(d)
    with pytest.raises(StoreError, match="damaged"): a.get(d, tmp_path/"again")
    assert not (tmp_path/"again").exists()

def test_a_tree_that_reaches_out_is_refused(tmp_path):
    a = Artifacts(tmp_path/"a")
    h = a.put(b"evil")[7:]
    d = a.put(json.dumps({"../../evil": h}).encode())
    (tmp_path/"a/trees").mkdir(); (tmp_path/"a/trees"/d[7:]).write_bytes(b"tree")
    with pytest.raises(StoreError, match="reaches out"): a.get(d, tmp_path/"x"/"y")
    assert not list(tmp_path.rglob("evil"))

@pytest.fixture
def redis_url(tmp_path):
    if not (exe := shutil.which("redis-server")): missing("redis-server")
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    p = subprocess.Popen([exe, "--port", str(port), "--save", "", "--dir", str(tmp_path)], stdout=subprocess.DEVNULL)
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try: socket.create_connection(("127.0.0.1", port), 1).close(); break
        except OSError: time.sleep(.02)
    yield f"redis://127.0.0.1:{port}/0", p
    p.kill(); p.wait()

def test_cache_in_redis(redis_url):
    url, server = redis_url
    c = Cache(url)
    c.set("k", b"\0\xff" * 1000); c.set("k", b"new")
    assert c.get("k") == b"new" and c.get(b"k") is None and Cache(url).get("k") == b"new"
    server.kill(); server.wait()
    assert c.get("k") is None and c.errors == 1  # a cache that is gone is a miss, not a failure
    c.set("k", b"x")
    with pytest.raises(StoreError, match="cannot reach the cache"): Cache(url)

def test_cache_under_two_writers(tmp_path):
    code = "import sys; from somaagent.store.cache import Cache; c = Cache(sys.argv[1])\nfor i in range(300): c.set('k', sys.argv[2].encode() * 100_000); v = c.get('k'); assert v and len(set(v)) == 1 and len(v) == 100_000"
    for p in [python(code, tmp_path/"c", x) for x in "ab"]: done(p)
