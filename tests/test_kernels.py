"Kernels of runs: warm ones as clean as cold ones, whoever is killed nothing is left, and kernels behind a real gateway."
import fcntl, json, os, resource, secrets, signal, socket, subprocess, sys, threading, time
from pathlib import Path

import psutil, pytest

from conftest import missing
from somaagent.core.errors import RunError
from somaagent.runs import pool
from somaagent.runs.kernels import kernels, lease, run_sync

linux = pytest.mark.skipif(sys.platform != "linux", reason="kernels are forked on Linux only")

@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "One home, so one zygote, for all tests of this file"
    mp, d = pytest.MonkeyPatch(), tmp_path_factory.mktemp("kernels")
    for k, v in dict(SOMA_STORES_HOME=d, SOMA_KERNELS_WARM="1", SOMA_KERNELS_WARM_IDLE_S="60", SOMA_TRACKING_BACKEND="none", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1").items(): mp.setenv(k, str(v))
    yield d
    pids = [s["pid"] for s in pool.status()]
    pool.stop()
    for p in pids: assert gone(p), "a zygote that was told to end did not"
    mp.undo()

def env(**kw): return {**pool.run_env(), **{k: str(v) for k, v in kw.items()}}

def ask(k, code, timeout=30):
    "What code prints in a leased kernel"
    async def go():
        kc, said = k.km.client(), []
        kc.start_channels()
        try:
            await kc.wait_for_ready(timeout=timeout)
            sent = kc.execute(code)
            while True:
                m = await kc.get_iopub_msg(timeout=timeout)
                if m["parent_header"].get("msg_id") != sent: continue
                c = m["content"]
                assert m["msg_type"] != "error", "\n".join(c["traceback"])
                said.append(c.get("text", ""))
                if c.get("execution_state") == "idle": return said
        finally: kc.stop_channels()
    said = run_sync(go)()
    return "".join(said).strip()

def gone(pid, seconds=8):
    try: psutil.Process(pid).wait(seconds)
    except psutil.NoSuchProcess: return True
    except psutil.TimeoutExpired: return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True

def wait_for(what, seconds=20):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if r := what(): return r
        time.sleep(.02)
    raise AssertionError("waited in vain")

# --- as clean as cold ----------------------------------------------------------------------------

state = """
import json, os, random, resource, signal, sys, threading
import numpy as np
print(json.dumps(dict(hash=hash("soma"), flags=list(sys.flags), path=sys.path, argv0=os.path.basename(sys.argv[0]), cwd=os.getcwd(), env={k: v for k, v in os.environ.items() if k not in ("JPY_PARENT_PID", "IPYTHONDIR", "PATH")},
    umask=oct(os.umask(0o22)), files=resource.getrlimit(resource.RLIMIT_NOFILE), core=resource.getrlimit(resource.RLIMIT_CORE), cpus=sorted(os.sched_getaffinity(0)), nice=os.nice(0), session=os.getsid(0) == os.getpid(),
    sigs={int(s): str(signal.getsignal(s)).split(" at ")[0] for s in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)}, threads=sorted(t.name.rstrip("0123456789") for t in threading.enumerate() if not t.name.startswith("asyncio")),
    fastcore=[getattr(__import__("fastcore.imports").imports, n) for n in ("IN_IPYTHON", "IN_JUPYTER", "IN_NOTEBOOK")], handed_on=[f for f in map(int, os.listdir("/proc/self/fd")) if f > 2 and os.path.exists(f"/proc/self/fd/{f}") and os.get_inheritable(f)],
    tz=__import__("time").tzname, main=__name__, names=sorted(n for n in globals() if not n.startswith("_") and n not in ("json", "os", "random", "resource", "signal", "sys", "threading", "np")))))
"""

@linux
def test_a_warm_kernel_finds_what_a_cold_one_finds(home, tmp_path, monkeypatch):
    old, mask = resource.getrlimit(resource.RLIMIT_NOFILE), os.umask(0o27)
    resource.setrlimit(resource.RLIMIT_NOFILE, (old[0]-1, old[1]))
    hup = signal.signal(signal.SIGHUP, signal.SIG_DFL)   # who runs the tests by nohup has switched it off
    try:
        said = {}
        for warm in (True, False):
            with lease(env=env(GREETING="hi", TZ="Asia/Tokyo"), cwd=tmp_path, log=tmp_path/"log", warm=warm) as k:
                said[k.how] = json.loads(ask(k, state))
    finally:
        signal.signal(signal.SIGHUP, hup)
        resource.setrlimit(resource.RLIMIT_NOFILE, old); os.umask(mask)
    assert set(said) == {"warm", "cold"}
    for what in said["cold"]: assert said["warm"][what] == said["cold"][what], what
    assert said["warm"]["env"]["GREETING"] == "hi" and said["warm"]["files"][0] == old[0]-1 and said["warm"]["umask"] == "0o27" and said["warm"]["tz"][0] == "JST" and said["warm"]["fastcore"] == [True]*3 and said["warm"]["handed_on"] == []

@linux
def test_nothing_of_one_run_is_seen_by_the_next(home, tmp_path):
    a = "import os, sys, types, numpy as np, tempfile\nsys.modules['left_behind'] = types.ModuleType('left_behind'); np.seed_of_mine = 1; os.environ['OWN'] = '1'; open('mark', 'w').write('x'); print(np.random.random(), tempfile.mktemp(), os.urandom(4).hex())"
    b = "import os, sys, numpy as np, tempfile\nprint('left_behind' in sys.modules, hasattr(np, 'seed_of_mine'), 'OWN' in os.environ, 'SECRET_KEY' in os.environ, b'hunter2' in open('/proc/self/environ', 'rb').read())"
    drawn = []
    for secret in ("hunter2", "hunter2"):
        with lease(env=env(SECRET_KEY=secret), cwd=tmp_path) as k: drawn.append(ask(k, a)); pid = k.pid
        with lease(env=env(), cwd=tmp_path) as k:
            assert k.how == "warm" and k.pid != pid
            assert ask(k, b) == "False False False False False"
    assert len({d.split()[0] for d in drawn}) == 2, "two kernels drew the same random number"
    for z in pool.status(): assert b"hunter2" not in Path(f"/proc/{z['pid']}/environ").read_bytes()

@linux
def test_what_cannot_be_forked_starts_cold_and_says_why(home, tmp_path):
    with lease(env=env(PYTHONHASHSEED="random"), cwd=tmp_path) as k: assert (k.how, k.why) == ("cold", "the hash seed is to be random") and ask(k, "print(1)") == "1"
    assert pool.key(env(OMP_NUM_THREADS=2)) != pool.key(env()) == pool.key(env(SOMA_RUN_DIR="/a"))
    assert pool.frozen(dict(PYTHONPATH="a", PYTHON_API_KEY="hush", PYDANTIC_AI_TOKEN="hush")) == dict(PYTHONPATH="a"), "a zygote would keep a secret longer than its run"

@linux
def test_a_changed_file_ends_a_zygote(home, tmp_path):
    mine = tmp_path/"lib"; mine.mkdir()
    e = env(PYTHONPATH=mine)
    with lease(env=e, cwd=tmp_path) as k: first = k.how
    before = {s["key"]: s["pid"] for s in pool.status()}[pool.key(e)]
    (mine/"numpy_is_not_what_it_was.py").write_text("x = 1")
    with lease(env=e, cwd=tmp_path) as k: second = (k.how, ask(k, "import numpy_is_not_what_it_was as m; print(m.x)"))
    after = {s["key"]: s["pid"] for s in pool.status()}[pool.key(e)]
    assert first == "warm" and second == ("warm", "1") and before != after and gone(before)

# --- whoever is killed ---------------------------------------------------------------------------

child = "import subprocess, os; p = subprocess.Popen(['sleep', '300']); print(p.pid)"

@linux
@pytest.mark.parametrize("warm", [True, False])
def test_a_killed_kernel_takes_what_it_started_along(home, tmp_path, warm):
    with lease(env=env(), cwd=tmp_path, warm=warm) as k:
        pid = int(ask(k, child))
        os.kill(k.pid, signal.SIGKILL)
        assert wait_for(lambda: k.exit) == -signal.SIGKILL
    assert gone(pid), "a process of the kernel outlived it"
    with lease(env=env(), cwd=tmp_path) as k: assert ask(k, "print('next')") == "next"

@linux
def test_a_killed_runner_takes_its_kernels_along_even_in_a_c_function(home, tmp_path):
    code = f"""
import time
from contextlib import ExitStack
from test_kernels import *
with ExitStack() as stack:
    for k in [stack.enter_context(lease(env=env(), cwd={str(tmp_path)!r}, warm=w)) for w in (True, False)]:
        pid = ask(k, child)
        kc = k.km.client(); kc.start_channels(); run_sync(kc.wait_for_ready)(timeout=20)
        kc.execute("import ctypes; ctypes.PyDLL(None).sleep(300)")
        time.sleep(.2); print(k.how, k.pid, pid, flush=True)
    time.sleep(300)
"""
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)})
    rows = [p.stdout.readline().split() for _ in range(2)]
    p.kill(); p.wait()
    assert [r[0] for r in rows] == ["warm", "cold"] and all(gone(int(pid), 3) for r in rows for pid in r[1:])

@linux
def test_killed_at_random_points_nothing_is_left(home, tmp_path):
    "The zygote in the middle of whatever it was doing, and then the runner"
    import random
    code = f"from test_kernels import *\nwhile True:\n    with lease(env=env(), cwd={str(tmp_path)!r}) as k: print(k.pid, flush=True); ask(k, 'import subprocess; subprocess.Popen([\"sleep\", \"300\"])')"
    p = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)})
    for _ in range(2):
        p.stdout.readline()
        time.sleep(random.random()*.2)
        for z in pool.status(): os.kill(z["pid"], signal.SIGKILL)
    p.stdout.readline()
    time.sleep(random.random()*.2)
    p.kill(); p.wait()
    def left(): return [q.pid for q in psutil.process_iter(["cwd", "status"]) if q.info["cwd"] == str(tmp_path) and q.info["status"] != psutil.STATUS_ZOMBIE]
    wait_for(lambda: not left(), 8)
    with lease(env=env(), cwd=tmp_path) as k: assert ask(k, "print(1)") == "1"

@linux
def test_a_killed_zygote_leaves_its_kernels_to_their_runners(home, tmp_path):
    with lease(env=env(), cwd=tmp_path) as k:
        ask(k, "x = 41")
        z = next(s for s in pool.status() if k.pid in s["kernels"])
        os.kill(z["pid"], signal.SIGKILL)
        assert gone(z["pid"])
        assert ask(k, "print(x+1)") == "42" and k.exit is None
        with lease(env=env(), cwd=tmp_path) as other: assert other.how == "warm" and ask(other, "print(7)") == "7"
        pid = k.pid
    assert gone(pid) and k.exit is not None and k.km.provisioner.kept.lost, "nobody could know how it ended"

@linux
def test_a_zygote_is_nobodys_child(home):
    "It serves others: whoever first needed it may be ended with all its children, a notebook for instance"
    z = psutil.Process(pool.warm()["pid"])
    assert z.pid not in [p.pid for p in psutil.Process().children(recursive=True)] and z.ppid() != os.getpid()

@linux
def test_a_zygote_that_cannot_be_reached_or_started_is_a_cold_start(home, tmp_path, monkeypatch):
    e = env(OMP_NUM_THREADS="3", OPENBLAS_NUM_THREADS="1")
    hang = socket.socket(socket.AF_UNIX)  # something that listens and never answers
    os.chdir(pool.folder()); hang.bind(f"{pool.key(e)}.sock"); hang.listen(1); os.chdir("/")
    monkeypatch.setattr(pool, "patience", .3)
    with lease(env=e, cwd=tmp_path) as k: assert k.how == "cold" and k.why and ask(k, "print(1)") == "1"
    hang.close(); (pool.folder()/f"{pool.key(e)}.sock").unlink()
    with open(pool.folder()/f"{pool.key(e)}.lock", "a") as f:  # by a process that was stopped while it started a zygote
        fcntl.flock(f, fcntl.LOCK_EX)
        assert pool.fork(["ipykernel_launcher"], e, tmp_path, 1, 2) == (None, "no zygote could be started")
    monkeypatch.setattr(pool, "start", lambda *a, **kw: False)
    assert pool.fork(["ipykernel_launcher"], e, tmp_path, 1, 2) == (None, "no zygote could be started")

@linux
def test_many_at_once_come_from_one_zygote_and_leave_nothing_open(home, tmp_path):
    pool.warm()
    before, fds, got = len(psutil.Process().children()), psutil.Process().num_fds(), []
    def one(i):
        with lease(env=env(N=i), cwd=tmp_path) as k: got.append((k.how, ask(k, "import os; print(os.environ['N'])")))
    ts = [threading.Thread(target=one, args=(i,)) for i in range(6)]
    [t.start() for t in ts]; [t.join(60) for t in ts]
    assert sorted(got) == [("warm", str(i)) for i in range(6)]
    assert len(psutil.Process().children()) == before and len(pool.status()[0]["kernels"]) == 0
    assert psutil.Process().num_fds() <= fds + 30, "leases leave files open"

@linux
def test_it_ends_when_nobody_needs_it_and_when_its_home_has_gone(tmp_path, monkeypatch):
    import shutil
    monkeypatch.setenv("SOMA_KERNELS_WARM_IDLE_S", "0.3")
    ends = []
    for how in ("idle", "home"):
        monkeypatch.setenv("SOMA_STORES_HOME", str(tmp_path/how))
        if how == "home": monkeypatch.setenv("SOMA_KERNELS_WARM_IDLE_S", "60")
        z = pool.warm()
        if how == "home": shutil.rmtree(tmp_path/how)
        ends.append(gone(z["pid"]))
    assert ends == [True, True]

@linux
def test_nobody_else_may_open_the_socket(home):
    pool.warm()
    assert pool.folder().stat().st_mode & 0o777 == 0o700 and all(f.stat().st_mode & 0o777 == 0o600 for f in pool.folder().glob("*.sock"))

def test_kernels_end_politely(home, tmp_path):
    "What a notebook registered for its exit is done, and no kernel waits for ipykernel's race"
    for i in range(4):
        with lease(env=env(), cwd=tmp_path) as k: ask(k, f"import atexit, pathlib; atexit.register(pathlib.Path('bye{i}').touch); print(1)")
        assert k.exit == 0 and (tmp_path/f"bye{i}").exists()

# --- other kernels -------------------------------------------------------------------------------

@linux
def test_any_language_dies_with_its_runner(home, tmp_path, monkeypatch):
    "A kernelspec of another interpreter: bound by the same few lines"
    spec = tmp_path/"jupyter"/"kernels"/"other"; spec.mkdir(parents=True)
    (spec/"kernel.json").write_text(json.dumps(dict(argv=[sys.executable, "-Xfrozen_modules=off", "-m", "ipykernel_launcher", "-f", "{connection_file}"], display_name="Other", language="python")))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path/"jupyter"))
    assert {k["name"]: k["alive"] for k in kernels()}["other"]
    with lease("other", env=env(), cwd=tmp_path) as k:
        assert k.how == "cold" and ask(k, "print(1)") == "1"
        os.kill(k.pid, 0); k.km.provisioner.life.close()
        assert gone(k.pid)

def test_a_kernel_that_does_not_exist_is_named(home, tmp_path):
    with pytest.raises(RunError, match="no such kernel.*julia-9"), lease("julia-9", env=env(), cwd=tmp_path): pass
    with pytest.raises(RunError, match="no such gateway.*mars"), lease("mars/python3", env=env(), cwd=tmp_path): pass
    with pytest.raises(RunError, match="graphics processors are wanted"), lease(gpu=99, env=env(), cwd=tmp_path): pass

@pytest.fixture(scope="module")
def gateway(home, tmp_path_factory):
    "A real kernel gateway on loopback, with a token"
    try: import kernel_gateway  # noqa: F401
    except ImportError: missing("jupyter-kernel-gateway")
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    token, d, mp = secrets.token_hex(8), tmp_path_factory.mktemp("gateway"), pytest.MonkeyPatch()
    log = open(d/"log", "w")
    p = subprocess.Popen([sys.executable, "-m", "kernel_gateway", f"--KernelGatewayApp.port={port}", "--KernelGatewayApp.ip=127.0.0.1", f"--KernelGatewayApp.auth_token={token}", "--JupyterWebsocketPersonality.list_kernels=True"],
                         cwd=d, stdout=log, stderr=log, env={**os.environ, "JUPYTER_RUNTIME_DIR": str(d), "JUPYTER_CONFIG_DIR": str(d), "IPYTHONDIR": str(d)}, start_new_session=True)
    mp.setenv("SOMA_KERNELS_GATEWAYS", f"far=http://127.0.0.1:{port}"); mp.setenv("JUPYTER_GATEWAY_AUTH_TOKEN", token)
    wait_for(lambda: p.poll() is None and any(k["name"] == "far/python3" for k in kernels()) or time.sleep(.2), 40)
    yield p
    mp.undo()
    os.killpg(p.pid, signal.SIGTERM); p.wait(20)
    log.close()

def test_a_remote_kernel_runs_cells_and_is_ended(gateway, tmp_path):
    with lease("far/python3", env=env(SOMA_RUN_ID="run_9"), cwd=tmp_path) as k:
        assert (k.how, k.pid) == ("remote", None)
        kid, said = k.km.kernel_id, ask(k, "import os; print(os.environ['SOMA_RUN_ID'], os.getcwd())")
        assert said == f"run_9 {tmp_path}"
    from somaagent.runs.gateway import rest
    assert run_sync(rest)(f"{k.km.url}/api/kernels/{kid}")[0] == 404

def test_a_dead_remote_kernel_is_noticed_with_the_reason(gateway, tmp_path):
    with lease("far/python3", env=env(), cwd=tmp_path) as k:
        pid = int(ask(k, "import os; print(os.getpid())"))
        async def wait():
            kc, end = k.km.client(), time.monotonic() + 20
            kc.start_channels()
            await kc.wait_for_ready(timeout=10)
            kc.execute("import time; time.sleep(100)")
            os.kill(pid, signal.SIGKILL)
            while await k.km.is_alive() and time.monotonic() < end: await __import__("asyncio").sleep(.1)
            kc.stop_channels()
        run_sync(wait)()
        assert k.km.dead and "died" in k.why and "lost" in k.why

def test_a_run_on_a_gateway_succeeds_or_says_why_it_ended(gateway, tmp_path):
    import nbformat
    from somaagent.runs.notebook import execute
    def run(name, code):
        cells = [nbformat.v4.new_code_cell("n = 1", metadata=dict(tags=["parameters"])), nbformat.v4.new_code_cell(code)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path/f"{name}.ipynb")
        return execute(tmp_path/f"{name}.ipynb", dict(n=20), tmp_path/name, kernel="far/python3")
    good = run("good", "from somaagent.runs.record import current_run\ncurrent_run().metric('twice', 2*n)")
    assert good.status == "completed" and good.metrics["twice"]["value"] == 40 and good.env["kernel"]["how"] == "remote", good.error
    bad = run("bad", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    assert bad.status == "failed" and bad.env["failure"]["kind"] == "died" and "the remote kernel died" in bad.error

def test_a_wrong_token_and_a_silent_gateway_are_said(gateway, tmp_path, monkeypatch):
    monkeypatch.setenv("JUPYTER_GATEWAY_AUTH_TOKEN", "wrong")
    with pytest.raises(RunError, match="wants a token.*JUPYTER_GATEWAY_AUTH_TOKEN"), lease("far/python3", env=env(), cwd=tmp_path): pass
    monkeypatch.setenv("SOMA_KERNELS_GATEWAYS", "far=http://127.0.0.1:9")
    with pytest.raises(RunError, match="does not answer"), lease("far/python3", env=env(), cwd=tmp_path): pass
    assert [(k["name"], k["alive"]) for k in kernels() if k["where"] == "far"] == [("far/…", False)]
