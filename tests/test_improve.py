"The main job under faults: killed and resumed, two at once, no network, bad input, full disk. Real processes, a small log, few steps."
import contextlib, gzip, json, os, signal, subprocess, sys, time
from pathlib import Path

import psutil, pytest

from somaagent.core.settings import data_dir, experiments_dir
from somaagent.runs.record import is_alive, load_run

SOMA = [sys.executable, "-c", "from somaagent.cli.app import main; main()"]
SMALL = ["--max-steps", "4", "--limit", "30", "--json"]

def env(home, **more):
    keep = {k: v for k, v in os.environ.items() if not k.startswith("SOMA_")}
    return keep | dict(SOMA_STORES_HOME=str(home), SOMA_STORES_IDLE_S="5", SOMA_KERNELS_WARM_IDLE_S="10", OMP_NUM_THREADS="1", SOMA_TRACKING_BACKEND="none") | more

def soma(args, home, at=(), **more): return subprocess.Popen([*at, *SOMA, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env(home, **more))

def wait_for(what, seconds=240, every=.05):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (r := what()): return r
        time.sleep(every)
    raise AssertionError("waited in vain")

def kernels(home, run=""):
    "Kernels that work under this home, or only those of one run: those that its records name (a forked one has its parent's command line), and those that say so themselves"
    out = set()
    for f in Path(run or home/"runs").rglob("run.json"):
        with contextlib.suppress(OSError, ValueError):
            if (k := json.loads(f.read_text())["env"].get("kernel")) and is_alive(k): out.add(k["pid"])
    for p in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "ipykernel_launcher" in " ".join(p.cmdline()) and p.environ().get("SOMA_STORES_HOME") == str(home) and p.environ().get("SOMA_RUN_DIR", "").startswith(str(run)): out.add(p.pid)
    return out

def run_of(home, name): return next((p for p in sorted((home/"runs").glob("run_*")) if (p/"run.json").exists() and load_run(p).parameters["name"] == name), None)

def rows(home, at=()):
    "Interactions that were imported, counted in the warehouse"
    code = "from somaagent.store.warehouse import warehouse\nwith warehouse(mode='shared') as wh: print(wh.query(\"SELECT count() AS n, uniqExact(id) AS ids FROM interactions WHERE experiment = ''\").rows()[0])"
    return subprocess.run([*at, sys.executable, "-c", code], env=env(home), capture_output=True, text=True, timeout=60).stdout.strip()

def result(home, name):
    "What a finished job came to, without ids, times, and what follows from its name: who of the users was in which arm"
    run = load_run(run_of(home, name))
    out = {(s, k): v for s, o in run.outputs.items() for k, v in o.items() if k in ("dataset_hash", "adapter_hash", "version", "version_hash", "decision", "primary")}
    met = {(s.name, k): v for s in sorted(Path(run.path).glob("0*")) for k, v in json.loads((s/"run.json").read_text())["metrics"].items() if k not in ("seconds", "peak_mb", "ab_diff", "power", "srm_p")}
    return run.status, {str(k): v for k, v in (out | met).items()}

@pytest.fixture(scope="session")
def log(tmp_path_factory):
    "The first lines of the sample, broken ones included"
    f = tmp_path_factory.mktemp("log")/"traffic.jsonl"
    with gzip.open(data_dir()/"support_desk"/"traffic.jsonl.gz", "rb") as src: f.write_bytes(b"".join(src.readlines()[:700]))
    return f

def job(log, name="desk"): return ["improve", "--log", log, "--name", name, "--rubric", data_dir()/"support_desk"/"rubric.yaml", *SMALL]

@pytest.fixture(scope="session")
def nowhere():
    "How to start a process in a network that has nothing but loopback; [] where the system does not allow it"
    user = [] if os.geteuid() == 0 else ["-r"]
    if os.name != "posix" or subprocess.run(["unshare", "-n", *user, "true"], capture_output=True).returncode: yield []; return
    up = """import fcntl, socket, struct, sys
fcntl.ioctl(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), 0x8914, struct.pack("16sh14s", b"lo", 0x41, b""))
try: socket.create_connection(("192.0.2.1", 80), 1); print("reached", flush=True)
except OSError as e: print("offline" if e.errno == 101 else e, flush=True)
sys.stdin.read()"""
    p = subprocess.Popen(["unshare", "-n", *user, sys.executable, "-c", up], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline().strip() == "offline"
    yield ["nsenter", "-t", str(p.pid), "-n", *(["-U", "--preserve-credentials"] if user else [])]
    p.communicate("")

@pytest.fixture(scope="session")
def begun(log, nowhere, tmp_path_factory):
    "A job that nobody disturbs, still going on"
    home = tmp_path_factory.mktemp("calm")/"home"
    p = subprocess.Popen([*nowhere, *SOMA, *map(str, job(log))], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env(home, SOMA_TRACKING_BACKEND="wandb"))
    yield home, p
    if p.poll() is None: p.kill()

@pytest.fixture(scope="session")
def calm(begun):
    "The same, finished"
    home, p = begun
    out, err = p.communicate(timeout=400)
    assert p.returncode == 0, err
    return home, out, err

@pytest.mark.slow
def test_killed_three_times_beside_another_job_then_started_twice_it_ends_as_if_nothing_had_happened(begun, log, nowhere, request):
    home, _ = begun
    run = lambda: run_of(home, "other")
    begins = lambda d: (d/"run.json").exists() and json.loads((d/"run.json").read_text())["env"].get("kernel")
    at = dict(curate=lambda d: d.joinpath("01_curate", "log.txt").exists() and begins(d/"01_curate"),
              finetune=lambda d: list(d.glob("02_finetune/sft/checkpoints/checkpoint-*")) or (d/"02_finetune"/"sft"/"adapter").exists(),
              evaluate=lambda d: begins(d/"03_evaluate"))
    for stage, there in at.items():
        p = soma(job(log, "other"), home, nowhere)
        wait_for(lambda: p.poll() is not None or (run() and there(run())))
        assert p.poll() is None, p.stderr.read()
        p.kill(); p.wait()
        wait_for(lambda: not kernels(home, run()), 10)
        assert load_run(run()).status == "interrupted"
    same = dict(log=log, name="other", rubric=data_dir()/"support_desk"/"rubric.yaml", max_steps=4, limit=30)
    start = ["workflow", "start", experiments_dir()/"improve.yaml", *(x for k, v in same.items() for x in ("-p", f"{k}={v}")), "--json"]
    ps = [soma(args, home, nowhere) for args in (job(log, "other"), start)]
    outs = [p.communicate(timeout=300) for p in ps]
    assert [p.returncode for p in ps] == [0, 0], outs
    says = [err for _, err in outs]
    assert sum("goes on where it was interrupted" in s for s in says) == 1 and sum("waiting for its result" in s and "pid" in s for s in says) == 1
    one, two = (json.loads(o) for o, _ in outs)
    assert one["run"] == two["id"] and one["model"] == "other" and one["decision"] == two["outputs"]["release"]["decision"] in ("promoted", "refused")
    calm = request.getfixturevalue("calm")
    assert len(list((home/"runs").glob("run_*"))) == 2
    assert result(home, "other") == result(home, "desk")
    read = json.loads(calm[1])["rows"]
    assert rows(home, nowhere) == str((read["read"]-read["quarantined"],)*2), "both read the same log: every row is there once"

def test_two_different_jobs_at_once_both_finish(calm):
    home, out, err = calm
    r = json.loads(out)
    assert r["model"] == "desk" and r["decision"] in ("promoted", "refused")
    page = Path(r["report"]).read_text()
    assert r["sentence"].split(":")[0] and "<h1>" in page and "https://" not in page.replace("http://www.w3.org", "")
    assert "waiting" not in err and not kernels(home)

def test_it_needs_no_network(calm, nowhere):
    home, out, err = calm
    if not nowhere: pytest.skip("this system does not allow a network namespace")
    assert list((home/"tracking").rglob("*.wandb")), "tracking offline left nothing"
    assert "warning" not in err.lower(), err

@pytest.mark.slow
def test_replayed_it_is_the_same_to_the_last_bit_and_a_changed_row_is_named(calm, tmp_path):
    import polars as pl
    home = calm[0]
    run = run_of(home, "desk")
    def replay(*args):
        p = soma(["replay", run.name, "--json", *args], home)
        out, err = p.communicate(timeout=400)
        return p.returncode, json.loads(out), err
    code, r, err = replay("--keep", tmp_path/"again")
    assert code == 0 and r["equal"] and not r["tolerance"] and "tolerance" not in r["rules"], (r["first"], err)
    assert [s["id"] for s in r["stages"]] == ["curate", "finetune", "evaluate", "abtest", "release"] and all(c["state"] == "same" for s in r["stages"] for c in s["cells"])
    weights = "02_finetune/sft/adapter/adapter_model.safetensors"
    assert (run/weights).read_bytes() == (tmp_path/"again"/"runs"/run.name/weights).read_bytes() and not kernels(tmp_path/"again")
    f = Path(load_run(run).outputs["curate"]["dataset"])/"train.parquet"
    old, df = f.read_bytes(), pl.read_parquet(f)
    try:
        f.chmod(0o644)
        df.with_columns(answer=pl.when(pl.col("id") == df["id"][7]).then(pl.lit("I do not know.")).otherwise("answer")).write_parquet(f)
        code, r, err = replay("--with", tmp_path/"again")
    finally: f.write_bytes(old); f.chmod(0o444)
    first = r["first"]
    assert code == 1 and (first["stage"], first["what"], first["name"], first["expected"]) == ("curate", "dataset", "dataset", "I do not know.")
    assert f"row 8 (id {df['id'][7]}), column answer" in first["difference"] and "changed after the run had written it" in first["note"]

COMMANDS = ["runs list", "runs list --all --json", "runs show last", "runs show last --json", "runs open", "runs report", "log stats", "log stats --json", "log tail", "model list", "model show desk",
            "model history desk", "db status", "db verify", "doctor", "--version"]

@pytest.fixture(scope="session")
def said(calm, nowhere):
    "What each command says to a finished home; one interpreter for all of them"
    code = """import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from somaagent.cli.app import main
got = {}
for line in json.loads(sys.argv[1]):
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try: main(line.split())
        except SystemExit as e: got[line] = [e.code, out.getvalue(), err.getvalue()]
print(json.dumps(got))"""
    p = subprocess.run([*nowhere, sys.executable, "-c", code, json.dumps(COMMANDS)], capture_output=True, text=True, env=env(calm[0], DISPLAY="", WAYLAND_DISPLAY=""), timeout=120)
    assert p.returncode == 0, p.stderr
    return json.loads(p.stdout)

@pytest.mark.parametrize("args", COMMANDS)
def test_every_command_reads_a_finished_home(said, args):
    code, out, err = said[args]
    assert code == 0 and out.strip() and "Traceback" not in err, err
    if "--json" in args: json.loads(out)

def test_terminated_it_says_so_and_leaves_no_kernel(log, tmp_path):
    home = tmp_path/"home"
    p = soma(job(log), home)
    wait_for(lambda: kernels(home))
    p.send_signal(signal.SIGTERM)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and "goes on from here" in err and "Traceback" not in err and not out
    wait_for(lambda: not kernels(home), 10)
    assert load_run(next((home/"runs").glob("run_*"))).status == "cancelled"

def no_version(home): return not (home/"state.db").exists() or subprocess.run([sys.executable, "-c", "import sqlite3,sys; print(sqlite3.connect(sys.argv[1]).execute('select count(*) from model_versions').fetchone()[0])", str(home/"state.db")], capture_output=True, text=True).stdout.strip() == "0"

@pytest.mark.parametrize("pair", [("missing", "empty"), ("nothing", "broken"), *(pytest.param(p, marks=pytest.mark.slow) for p in (("model", "options"), ("header", "one")))], ids="-".join)
def test_bad_input_is_one_clear_error(tmp_path, pair):
    one = "\n".join(json.dumps(dict(prompt=f"Where is order {i}?", answer="On its way.", category="order", user_id=f"u{i}", rating=5)) for i in range(80))
    nothing = "\n".join(json.dumps(dict(prompt=f"Where is order {i}?", answer="", category="abc"[i%3], user_id=f"u{i}")) for i in range(80))
    files = dict(empty="", header="text,category\n", one=one, nothing=nothing, broken="\n".join(["{"]*20))
    for k, v in files.items(): (tmp_path/f"{k}.{'csv' if k == 'header' else 'jsonl'}").write_text(v)
    cases = dict(missing=(["--log", tmp_path/"nowhere.jsonl"], "no such file"), empty=(["--log", tmp_path/"empty.jsonl"], "empty"), model=(["--base", "./nowhere"], "no such model"), options=(["--prompt", "text"], "no log is given"),
                 header=(["--log", tmp_path/"header.csv", "--prompt", "text", "--answer", "category"], ""), one=(["--log", tmp_path/"one.jsonl"], "one|single|same|class|categor"), nothing=(["--log", tmp_path/"nothing.jsonl"], ""), broken=(["--log", tmp_path/"broken.jsonl"], ""))
    import re
    home = tmp_path/"home"
    ps = {k: soma(["improve", *cases[k][0], *SMALL], home) for k in pair}
    for k, p in ps.items():
        out, err = p.communicate(timeout=200)
        errors = [l for l in err.splitlines() if l.startswith("error: ")]
        assert p.returncode not in (0, None) and len(errors) == 1 and "Traceback" not in err and not out, (k, p.returncode, err)
        assert "This was not expected" not in err and re.search(cases[k][1], errors[0]), (k, err)
        assert no_version(home) and not list(home.glob("datasets/*/manifest.json")), k

def test_a_full_disk_is_one_clear_error(log, tmp_path):
    disk = tmp_path/"disk"; disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", disk], capture_output=True).returncode: pytest.skip("needs to mount a tmpfs")
    try:
        p = soma(job(log), disk/"home")
        out, err = p.communicate(timeout=200)
        errors = [l for l in err.splitlines() if l.startswith("error: ")]
        assert p.returncode == 1 and len(errors) == 1 and "full" in errors[0] and "Traceback" not in err and not out, err
        assert not kernels(disk/"home") and no_version(disk/"home")
    finally: subprocess.run(["umount", "-l", disk])

CHROMIUM = next((p for p in ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome") if os.path.exists(p)), None)
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync".split()

@pytest.mark.browser
def test_the_report_reads_in_a_browser(calm):
    "Wide and narrow, light and dark: no script error, nothing fetched, nothing wider than the screen, charts that answer the pointer"
    if not CHROMIUM: pytest.skip("no Chromium here")
    from playwright.sync_api import sync_playwright
    page_file = json.loads(calm[1])["report"]
    with sync_playwright() as pw:
        browser = pw.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        seen = {}
        for width in (1280, 420):
            for scheme in ("light", "dark"):
                page, faults, asked = browser.new_page(viewport=dict(width=width, height=900), color_scheme=scheme), [], []
                page.on("console", lambda m: faults.append(m.text)); page.on("pageerror", lambda e: faults.append(str(e))); page.on("request", lambda r: asked.append(r.url))
                page.goto(f"file://{page_file}")
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                assert not faults and all(u.startswith(("file:", "data:")) for u in asked), (faults, asked)
                seen[width, scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert seen[1280, "light"] != seen[1280, "dark"]
        page.hover(".plot"); assert page.locator(".plot .tip").first.inner_text().startswith("step")
        page.click("button.theme"); assert page.evaluate("getComputedStyle(document.body).backgroundColor") == seen[1280, "light"]
        total, worse = page.locator(".sample").count(), page.locator(".sample[data-change=same]").count()
        if page.locator(".filters button[data-show=same]").count():
            page.click(".filters button[data-show=same]")
            assert page.locator(".sample:visible").count() == worse <= total
        for section in ("data", "training", "evaluation", "abtest", "decision", "cost", "lineage"): assert page.locator(f"#{section} h2").count() == 1, section
        browser.close()
