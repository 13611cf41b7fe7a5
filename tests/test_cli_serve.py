"The commands of the serving part: a new user's project, served by a process, and every command against it."
import importlib, json, os, re, shlex, signal, sqlite3, subprocess, sys, threading, time
from pathlib import Path

import click, pytest
from click.testing import CliRunner

root = Path(__file__).resolve().parents[1]
SCOPE = "serve login chat route init completion agent prompt index ask capsule workflow".split()
MAIN = [sys.executable, "-c", "from somaagent.cli.app import main; main()"]

def clean(**more): return {k: v for k, v in os.environ.items() if not k.startswith("SOMA_")} | dict(SOMA_PROGRESS="none", OMP_NUM_THREADS="1", SOMA_STORES_IDLE_S="5") | more

class Gate:
    "A project as `soma init` makes it, and `soma serve` in it"
    def __init__(self, base):
        self.base, self.dir = base, base/"helpdesk"
        self.env, self.t0 = clean(XDG_CONFIG_HOME=str(base/"config")), time.monotonic()
        made = self.soma("init helpdesk --json", cwd=base)
        self.files = json.loads(made.stdout)["files"]
        self.p = subprocess.Popen([*MAIN, "serve", "--port", "0", "--grace", "3"], cwd=self.dir, env=self.env, stdout=subprocess.PIPE, stderr=open(base/"err", "w"), text=True)
        self.said = []
        for line in self.p.stdout:
            self.said.append(line)
            if line.startswith("Ready"): break
        assert self.said and self.said[-1].startswith("Ready"), (base/"err").read_text()[-3000:]
        self.ready, self.cred = time.monotonic()-self.t0, json.loads((self.dir/".soma/credentials.json").read_text())
    def soma(self, line, stdin=None, cwd=None, code=0, **env):
        "A command in a process of its own, as typed"
        r = subprocess.run([*MAIN, *shlex.split(line)], cwd=cwd or self.dir, env=self.env | env, input=stdin or "", capture_output=True, text=True, timeout=90)
        assert code is None or r.returncode == code, f"soma {line}: {r.returncode}\n{r.stdout[-1500:]}\n{r.stderr[-1500:]}"
        return r
    def here(self, line, stdin=None, **env):
        "The same in this process, which is faster: (exit code or error, stdout, stderr)"
        name, *rest = shlex.split(line)
        old = os.getcwd()
        os.chdir(self.dir)
        try:
            gone = {k: None for k in os.environ if k.startswith("SOMA_")}
            r = CliRunner().invoke(command(name), rest, input=stdin, env=gone | {k: v for k, v in self.env.items() if k.startswith(("SOMA", "XDG"))} | env)
        finally: os.chdir(old)
        return r.exception if r.exception and not isinstance(r.exception, SystemExit) else r.exit_code, r.stdout, r.stderr
    def ok(self, line, stdin=None, **env):
        code, out, err = self.here(line, stdin, **env)
        assert code == 0, f"soma {line}: {code!r}\n{out[-1500:]}\n{err[-1500:]}"
        return out
    def json(self, line, stdin=None, **env): return json.loads(self.ok(line+" --json", stdin, **env))

@pytest.fixture(scope="module")
def gate(tmp_path_factory):
    g = Gate(tmp_path_factory.mktemp("cli"))
    yield g
    g.p.send_signal(signal.SIGINT)
    try: g.p.wait(40)
    except subprocess.TimeoutExpired: g.p.kill(); g.p.wait(10); raise

def command(name):
    "A command of the top level, by what the others register it under, or by its module"
    from somaagent.cli.app import _commands
    if name in _commands: module, _, attr = _commands[name][0].partition(":")
    else: module, attr = f"somaagent.cli.{name}", name
    return getattr(importlib.import_module(module), attr)

def leaves(cmd, path):
    if isinstance(cmd, click.Group): return [l for n in cmd.list_commands(None) for l in leaves(cmd.get_command(None, n), f"{path} {n}")]
    return [(path, cmd)]

def found():
    "Every command of the serving part that is there"
    tops = [n for n in SCOPE if (root/"somaagent/cli"/f"{n}.py").exists()]
    return {p: c for n in tops for p, c in leaves(command(n), n)} | {"log tail": command("log").commands["tail"]}

# what each command is tried with, against the process: path → function of the gate
RUN = {}
def tried(*paths): return lambda f: RUN.update({p: f for p in paths}) or f

@tried("init")
def _(g):
    assert {f for f in g.files} == {str(p.relative_to(g.dir)) for p in g.dir.rglob("*") if p.is_file() and ".soma" not in p.parts and "runs" not in p.parts and p.name != "answer.txt"}
    before = {f: (g.dir/f).read_bytes() for f in g.files}
    e, out, err = g.here("init")
    assert "settings.ini" in str(e) and {f: (g.dir/f).read_bytes() for f in g.files} == before and not (g.dir/"init").exists()

@tried("serve")
def _(g):
    assert "Ready: http://127.0.0.1:" in g.said[-1] and "soma_" in "".join(g.said) and "soma_" not in (g.base/"err").read_text()
    port = g.said[-1].split()[1].rpartition(":")[2].partition("/")[0]
    assert "--port" in str(g.here(f"serve --port {port}")[0])
    told = g.json("serve --check")
    assert dict(model="local/tiny", provider="local", kind="chat", fallbacks=[], aliases=["tiny", "assistant"]) in told["models"]
    assert g.here("serve --json")[0] == 2 and "there is no such file" in str(g.here("serve --check --config nowhere.yaml")[0])

@tried("login")
def _(g):
    cred = g.cred
    out = g.ok(f"login --user --base-url {cred['base_url']} --json", cred["api_key"]+"\n")
    f = g.base/"config/somaagent/credentials.json"
    assert "local/tiny" in json.loads(out)["models"] and f.stat().st_mode & 0o777 == 0o600 and cred["api_key"] not in out
    assert cred["base_url"] in g.ok("login --show") and cred["api_key"] not in g.ok("login --show") and cred["api_key"] in g.ok("login --show --reveal") and g.json("login --show --reveal")["key"] == cred["api_key"]
    assert g.here("login --reveal", cred["api_key"])[0] == 2
    assert "does not take this key" in str(g.here(f"login --base-url {cred['base_url']}", "soma_wrong\n")[0])
    f.unlink()

@tried("chat")
def _(g):
    told = g.json('chat -m assistant --max-tokens 8 "Where is my parcel?"')
    assert told["model"] == "local/tiny" and told["answer"] and float(told["cost_usd"]) == 0
    kept = g.dir/".soma/chat.json"
    assert kept.stat().st_mode & 0o777 == 0o600 and len(json.loads(kept.read_text())["messages"]) == 2
    again = g.json('chat --continue --max-tokens 8 "And now?"')
    said = json.loads(kept.read_text())
    assert again["session"] == told["session"] and [m["role"] for m in said["messages"]] == ["user", "assistant"]*2 and said["model"] == "assistant"
    g.ok('chat -c -s "Be brief." --max-tokens 4 Thanks')
    assert [m["role"] for m in json.loads(kept.read_text())["messages"]][:2] == ["system", "user"]
    assert g.ok("chat --max-tokens 8", "Where is my parcel?").strip() == g.ok('chat --max-tokens 8 "Where is my parcel?"').strip() != ""
    assert "no such model" in str(g.here('chat -m nope Hi')[0]) and g.here("chat --json", "")[0] == 2

@tried("route explain")
def _(g):
    told = g.json('route explain "Where is my parcel?"')
    assert told["model"] == "local/tiny" and told["candidates"][0]["latency_ms"] is not None   # it has seen the answers before
    three = g.json('route explain -m openai/gpt-4o -m openai/gpt-4o-mini -m anthropic/claude-3-haiku "What is 17*23?"')
    assert three["model"] == "openai/gpt-4o-mini" and len(three["candidates"]) == 3 and three["why"]
    assert "openai/gpt-4o" in g.ok('route explain -m openai/gpt-4o -m local/tiny --tools --quality .9', "Call the function.")
    assert "over the limit" in str(g.here('route explain -m openai/gpt-4o --max-cost 0.00000001 Hi')[1:]) and g.here("route explain", "")[0] == 2 and "no such name" in "".join(map(str, g.here("route explain --name fast Hi")))

@tried("route learn")
def _(g):
    e, out, err = g.here("route learn --app nobody")
    assert "judged answers" in f"{e}{out}{err}" and not (g.dir/".soma/router/light.json").exists()

@tried("completion")
def _(g):
    for shell in ("bash", "zsh", "fish"): assert "_SOMA_COMPLETE" in g.ok(f"completion {shell}")
    assert g.json("completion", SHELL="/bin/zsh")["shell"] == "zsh" and g.here("completion", SHELL="/bin/tcsh")[0] == 2
    words = lambda text: g.soma("", code=None, _SOMA_COMPLETE="bash_complete", COMP_WORDS=text, COMP_CWORD=str(len(text.split())-(not text.endswith(" ")))).stdout
    assert {"plain,chat"} == set(words("soma cha").split()) and "plain,--follow" in words("soma log tail --f")

@tried("log tail")
def _(g):
    p = subprocess.Popen([*MAIN, "log", "tail", "--follow", "--json", "-n", "0"], cwd=g.dir, env=g.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        time.sleep(3.)
        ids = [g.json(f'chat --max-tokens 4 "question {i}"')["interaction_id"] for i in range(3)]
        got, timer = [], threading.Timer(20, p.kill)
        timer.start()
        for line in p.stdout:
            got.append(json.loads(line))
            if {r["id"] for r in got} >= set(ids): break
        timer.cancel()
        assert {r["id"] for r in got} >= set(ids) and len({r["id"] for r in got}) == len(got) and got[-1]["prompt"].startswith("question")
        p.send_signal(signal.SIGINT)
        assert p.wait(15) == 0 and "Traceback" not in p.stderr.read()
    finally: p.kill(); p.wait(10); p.stdout.close(); p.stderr.close()

GATEWAY = lambda g: dict(SOMA_API_KEY=g.cred["api_key"], SOMA_BASE_URL=g.cred["base_url"]+"/v1")   # `soma/NAME` is a model of the gateway

@tried("prompt save", "prompt list", "prompt show", "prompt label", "prompt back", "prompt diff", "prompt history", "prompt render", "prompt chain")
def _(g):
    if "support" in [p["name"] for p in g.json("prompt list")]: return   # one story for all of them
    assert g.json("prompt save prompts/support.yaml --label production")["version"] == 1 and g.json("prompt save prompts/support.yaml")["new"] is False
    (g.base/"terser.yaml").write_text((g.dir/"prompts/support.yaml").read_text().replace("Be brief", "Be terse"))
    assert g.json("prompt save ../terser.yaml")["version"] == 2 and "terse" in g.json("prompt diff support@1 support@2")["diff"] and "terse" in g.ok("prompt show support@2")
    assert g.json("prompt label support@2 production --reason better")["before"] == 1 and g.json("prompt back support production --reason worse")["version"] == 1
    assert [v["version"] for v in g.json("prompt history support")["versions"]] == [2, 1] and "support" in [p["name"] for p in g.json("prompt list")]
    assert "{{ 7*7 }}" in g.json('prompt render support@production -v question="{{ 7*7 }}"')["messages"][1]["content"]
    (g.base/"steps.yaml").write_text("- {prompt: support, as: reply}\n")
    told = g.json('prompt chain ../steps.yaml -v question="Where is my card?" --model soma/tiny', **GATEWAY(g))
    assert told[0]["prompt"] == "support@2" and told[0]["answer"]

@tried("agent create", "agent list", "agent show", "agent update", "agent run", "agent delete")
def _(g):
    if g.json("agent list --all"): return
    assert g.json("agent create helper --tool calculator -m local/tiny --max-steps 2")["revision"] == 1 and g.json("agent update helper --max-steps 1")["revision"] == 2
    assert g.json("agent show helper")["spec"]["max_steps"] == 1 and [a["name"] for a in g.json("agent list")] == ["helper"]
    run = g.json('agent run helper -m soma/tiny "What is 17% of 240?"', **GATEWAY(g))
    assert run["text"] and run["trace"] and len(run["steps"]) == 1
    g.ok("agent delete helper")
    assert g.json("agent list") == [] and "helper" in str(g.here("agent run helper Hi"))

@tried("index add", "index list", "index show", "index search", "index remove", "ask")
def _(g):
    if getattr(g, "asked", False): return
    g.asked = True
    assert g.json("index add docs --index shop --embedder hashed --store memory")["added"] == 2 and [i["name"] for i in g.json("index list")] == ["shop"] and g.json("index show -i shop")["docs"] == g.json("index show shop")["docs"] == 2
    assert "returns" in g.json("index search 'refunded on my card' -i shop -k 1")[0]["doc"]
    a = g.json("ask 'How many days do I have to send something back?' --index shop")
    assert not a["refused"] and "30 days" in a["citations"][0]["quote"]
    told = g.json("ask 'How many days do I have to send something back?' --index shop --model soma/tiny --max-tokens 8", **GATEWAY(g))
    assert told["text"]
    g.ok("index remove --index shop --all --yes")
    assert g.json("index list") == []

def capsule(folder):
    folder.mkdir(exist_ok=True)
    code = lambda i, text, **meta: dict(id=f"c{i}", cell_type="code", metadata=meta, source=text, outputs=[], execution_count=None)
    nb = dict(cells=[dict(id="t", cell_type="markdown", metadata={}, source="# Count"), code(1, "n = 3", tags=["parameters"]), code(2, "from somaagent.runs.record import current_run\ncurrent_run().output('total', sum(range(n)))")], metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")), nbformat=4, nbformat_minor=5)
    (folder/"notebook.ipynb").write_text(json.dumps(nb))
    (folder/"capsule.yaml").write_text("name: count\nversion: 1.0.0\ndescription: Counts\ninputs:\n  n: {type: int, default: 3}\noutputs:\n  total: {type: int}\n")

@tried("capsule build", "capsule install", "capsule list", "capsule show", "capsule execute", "capsule remove")
def _(g):
    "What a command installs, the process knows at once; what it executes is a run of the same home"
    if (g.base/"count").exists(): return
    capsule(g.base/"count")
    made = g.json("capsule build ../count -o .. --sign")
    assert g.json(f"capsule install {made['file']} --hash {made['hash']} --key {made['key']}")["version"] == "1.0.0"
    from somaagent.sdk import SomaAgent
    with SomaAgent(g.cred["api_key"], g.cred["base_url"]) as c: assert c.capsules.get("count").signed_by == g.json("capsule show count")["signed_by"] != ""
    assert "count" in [x["name"] for x in g.json("capsule list")] and g.here(f"capsule install {made['file']} --hash sha256:{'0'*64}")[0] != 0
    assert g.json("capsule execute count -p n=5")["outputs"]["total"] == 10
    assert g.here("capsule execute count -p m=5")[0] != 0 and g.json("capsule remove count")["version"] == "1.0.0" and "count" not in [x["name"] for x in g.json("capsule list")]

@tried("workflow list", "workflow show", "workflow start", "workflow status", "workflow cancel")
def _(g):
    if hasattr(g, "improve"): return
    assert "improve" in [w["name"] for w in g.json("workflow list")] and "seed" in g.json("workflow show improve")["params"]
    run = g.json("workflow start improve -p seed=7 --detach --again")
    g.improve = run["id"]
    assert g.json(f"workflow status {run['id']}")["name"] and run["id"] in [r["id"] for r in g.json("workflow status")]
    assert g.json(f"workflow cancel {run['id']}")["status"] in ("cancelled", "running", "interrupted")
    for _ in range(100):
        if (st := g.json(f"workflow status {run['id']}")["status"]) != "running": break
        time.sleep(.1)
    assert st == "cancelled"

ASKS = """name: asks
stages: [{id: publish, notebook: ask.ipynb, approve: "Publish it?"}]
"""

@tried("workflow draw", "workflow approve", "workflow reject", "workflow resume")
def _(g):
    import nbformat
    if (g.dir/"asks.yaml").exists(): return
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x = 1", metadata=dict(tags=["parameters"]))]), g.dir/"ask.ipynb")
    (g.dir/"asks.yaml").write_text(ASKS)
    assert "publish" in g.ok("workflow draw asks.yaml")
    run = g.json("workflow start asks.yaml --detach")["id"]
    def comes(what):
        end = time.monotonic() + 60
        while (st := g.json(f"workflow status {run}")["status"]) != what: assert time.monotonic() < end, st; time.sleep(.1)
    comes("waiting")
    assert g.here(f"workflow approve {run} nowhere")[0]
    g.json(f"workflow reject {run} publish --by ada --note 'not yet'")
    g.json(f"workflow resume {run}")
    comes("failed")
    assert "not yet" in g.ok(f"workflow status {run}")

def test_done_when_a_new_user_has_an_answer_within_a_minute(gate):
    "Two commands: `soma serve` in one terminal, `soma chat` in the other; then the log shows it"
    out = gate.soma('chat "hello"').stdout
    took = time.monotonic()-gate.t0
    assert out.strip() and took < 60, took
    for _ in range(20):   # durable within a second, in the warehouse a little later
        rows = [json.loads(l) for l in gate.soma("log tail --json").stdout.splitlines()]
        if rows: break
        time.sleep(.5)
    assert [(r["prompt"], r["answer"].strip(), r["model"], r["status"]) for r in rows] == [("hello", out.strip(), "local/tiny", "ok")]
    line = gate.soma("log tail").stdout
    assert "hello" in line and "local/tiny" in line

def test_the_experiment_of_a_new_project_runs(gate):
    from somaagent.runs.notebook import execute, explain
    run = execute(gate.dir/"experiments/first_look.ipynb", dict(questions=["Where is my parcel?"], max_tokens=6), gate.dir/"experiments/runs/1", env=dict(SOMA_STORES_HOME=str(gate.dir/".soma")))
    assert run.status == "completed", explain(run)
    assert run.metrics["answered"]["value"] == 1 and run.metrics["cost_usd"]["value"] == 0

@pytest.mark.parametrize("path", found())
def test_every_command_against_the_process(gate, path):
    assert path in RUN, f"soma {path} has no test here: write one, @tried({path!r})"
    RUN[path](gate)

@pytest.mark.parametrize("path", found())
def test_every_command_is_explained(path):
    cmd = found()[path]
    text = CliRunner().invoke(cmd, ["--help"]).output
    assert cmd.help and "Examples:" in text and f"soma {path}" in text, f"soma {path} --help has no example"
    lines = [l for l in (cmd.epilog or "").split("\n") if f"soma {path}" in l]
    assert lines and (path in ("completion",) or any(o.name == "as_json" or "--json" in o.opts for o in cmd.params)), f"soma {path} has no --json"
    for l in lines:   # the options of an example exist
        known = {o for p in cmd.params for o in [*p.opts, *p.secondary_opts]} | {"--help", "-h"}
        for w in re.findall(r"(?<=\s)-{1,2}[a-zA-Z][\w-]*", l.partition(f"soma {path}")[2].partition("|")[0].partition("&&")[0].partition("  ")[0]): assert w in known, f"{l.strip()}: no option {w}"

def documented():
    "What the guide's cells type"
    nb = json.loads((root/"nbs/sdk/guide.ipynb").read_text(encoding="utf-8"))
    return "\n".join("".join(c["source"]) for c in nb["cells"] if c["cell_type"] == "code")

@pytest.mark.parametrize("path", found())
def test_the_guide_has_an_example(path): assert re.search(rf"soma {path}\b", documented()), f"nbs/sdk/guide.ipynb types no `soma {path}`"

def test_no_gateway_and_no_key(tmp_path):
    env = clean(XDG_CONFIG_HOME=str(tmp_path), SOMA_STORES_HOME=str(tmp_path/"home"))
    r = subprocess.run([*MAIN, "chat", "hello"], env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode == 2 and "soma serve" in r.stderr and len(r.stderr.splitlines()) == 1
    r = subprocess.run([*MAIN, "chat", "hello"], env=env | dict(SOMA_API_KEY="soma_x", SOMA_BASE_URL="http://127.0.0.1:9"), stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=tmp_path)
    assert r.returncode not in (0, 2) and "no gateway answers" in r.stderr and "\x1b" not in r.stderr

def test_groups_say_what_each_command_does_in_full(gate):
    for name in ("prompt", "log", "agent"):
        out = gate.soma(f"{name} --help").stdout
        assert "..." not in out.partition("Commands:")[2] and "Examples" not in out
    assert "ships with the workbench" in gate.here("prompt history rag")[2] and "  content: |\n" in gate.ok("prompt show rag")

def test_the_log_shows_an_answer_at_once(gate):
    "Whoever asks and looks sees it, although the gateway brings it to the warehouse a second or two later"
    told = gate.json('chat --max-tokens 4 "Is alder a tree?"')
    rows = [json.loads(l) for l in gate.soma("log tail -n 3 --json").stdout.splitlines()]
    assert told["interaction_id"] in [r["id"] for r in rows], rows

def test_the_readme_says_what_works(gate, monkeypatch):
    "Every command and snippet of its part about serving, in its order; what takes minutes, and the server itself, have tests of their own"
    part = (root/"README.md").read_text(encoding="utf-8").partition("## Your application behind it")[2].partition("\n## ")[0]
    blocks = re.findall(r"```(sh|python)\n(.*?)```", part, re.S)
    assert {k for k, _ in blocks} == {"sh", "python"}
    for kind, text in [b for b in blocks if b[0] == "sh"]+[b for b in blocks if b[0] == "python"]:
        if kind == "python":
            for k in ("SOMA_API_KEY", "SOMA_BASE_URL"): monkeypatch.setenv(k, gate.cred[k[5:].lower()])
            exec(text.replace("http://127.0.0.1:8321", gate.cred["base_url"]).replace("soma_…", gate.cred["api_key"]), {})
            continue
        for line in text.splitlines():
            out = None
            for part in re.sub(r"\s+# .*", "", line).split(" | "):
                if part.startswith("sed "): out = subprocess.run(shlex.split(part), input=out, capture_output=True, text=True, check=True).stdout
                elif not part.startswith(("soma serve", "soma agent run", "soma workflow start")): out = gate.ok(part.removeprefix("soma "), out)
