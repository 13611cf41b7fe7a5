"A command that is handed on to a process that has imported everything: the same answers, and nothing is left of what is killed"
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import nbformat, psutil, pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="zygotes need Linux")
COMMAND = [sys.executable, "-c", "from somaagent.cli.app import main; main()"]

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    "A home with a process that waits for commands"
    d = tmp_path_factory.mktemp("quick")
    env = {k: v for k,v in os.environ.items() if not k.startswith("SOMA_") and k not in ("PYTHONWARNINGS", "PYTHONDEVMODE")} | dict(SOMA_STORES_HOME=str(d/"home"), SOMA_KERNELS_WARM="1", SOMA_TRACKING_BACKEND="none")
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(s, metadata=dict(tags=t)) for s,t in (("n = 1\nwait = 0", ["parameters"]), ("import time\nprint('on', n, flush=True); time.sleep(wait); 1/n", []))])
    nbformat.write(nb, d/"a.ipynb")
    start = "import os\nfrom somaagent.runs import pool\nenv = dict(os.environ)\nassert pool.start(f'run-{pool.key(env)}', env)\nassert pool.warm()"
    subprocess.run([sys.executable, "-c", start], env=env, check=True, timeout=60)
    yield d, env
    subprocess.run([sys.executable, "-c", "from somaagent.runs import pool; pool.stop()"], env=env, timeout=60)

def zygotes(d): return {p.pid: p for p in psutil.process_iter(["cmdline"]) if any("run-" in a and a.endswith(".sock") for a in p.info["cmdline"] or []) and p.cwd() == str(d/"home"/"kernels")}

def test_the_same_answers_as_without(place):
    d, env = place
    p = subprocess.run([*COMMAND, "run", "a.ipynb", "-p", "n=2", "--json"], cwd=d, env=env|dict(SOMA_COSTS_CPU_HOUR_USD="1"), capture_output=True, text=True, timeout=60)
    r = json.loads(p.stdout)
    assert p.returncode == 0 and r["status"] == "completed" and r["parameters"] == dict(n=2) and "[3/3]" in p.stderr
    assert (r["cost"]["usd"] or 0) > 0, "its caller's environment counts"
    assert len(zygotes(d)) == 1
    bad = subprocess.run([*COMMAND, "run", "a.ipynb", "-p", "n=0", "-q"], cwd=d, env=env, capture_output=True, text=True, timeout=60)
    assert bad.returncode == 1 and "ZeroDivisionError" in bad.stderr and not bad.stdout
    assert subprocess.run([*COMMAND, "run", "nowhere.ipynb"], cwd=d, env=env, capture_output=True, timeout=60).returncode == 1

@pytest.mark.parametrize("sig,code,status", [(signal.SIGKILL, -9, "interrupted"), (signal.SIGINT, 130, "cancelled")])
def test_whoever_ends_the_command_ends_the_run_and_its_kernel(place, sig, code, status):
    from somaagent.runs.record import is_alive, load_run
    d, env = place
    shutil.rmtree(d/"home"/"runs", ignore_errors=True)
    p = subprocess.Popen([*COMMAND, "run", "a.ipynb", "-p", "wait=60"], cwd=d, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 60
    while not any("on 1" in f.read_text() for f in (d/"home"/"runs").glob("*/log.txt")) and time.monotonic() < until: time.sleep(.02)
    run = load_run(next((d/"home"/"runs").glob("run_*")))
    assert run.status == "running" and run.env["process"]["pid"] != p.pid and is_alive(run.env["kernel"])
    p.send_signal(sig)
    assert p.wait(30) == code
    while (is_alive(run.env["kernel"]) or is_alive(run.env["process"])) and time.monotonic() < until: time.sleep(.02)
    assert not is_alive(run.env["kernel"]) and not is_alive(run.env["process"]) and load_run(run.path).status == status
    assert len(zygotes(d)) == 1
