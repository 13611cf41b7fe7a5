"Capsules and their archives under bad input: what is refused, what is whole, what is the same; workflows in the background, killed. Real files and processes."
import base64, csv, gzip, hashlib, io, json, os, shutil, signal, stat, struct, subprocess, sys, tarfile, threading, time, warnings, zipfile
from pathlib import Path

import nbformat, pytest, yaml
from hypothesis import HealthCheck, given, settings, strategies as st

from somaagent.core.errors import RunError
from somaagent.release.manifest import public_text, signing_key
from somaagent.runs.archive import Limits, files_in, pack, safe_name, unpack
from somaagent.runs.capsule import Capsules, build, version_key
from somaagent.runs.guard import environment
from somaagent.runs.manifest import Manifest, capsule_hash, verify

@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SOMA_STORES_HOME", str(tmp_path/"home")); monkeypatch.setenv("SOMA_TRACKING_BACKEND", "none")
    return tmp_path/"home"

def capsule(folder, code="run.output('total', sum(xs))", first="xs = [1, 2]  # what to add", **more):
    folder.mkdir(parents=True, exist_ok=True)
    cells = [nbformat.v4.new_code_cell(first or "", metadata=dict(tags=["parameters"])), nbformat.v4.new_code_cell(f"from somaagent.runs.record import current_run\nrun = current_run()\n{code}")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells[first is None:]), folder/"notebook.ipynb")
    (folder/"capsule.yaml").write_text(yaml.safe_dump(dict(name="adder", version="1.0.0", outputs=dict(total=dict(type="int"))) | more))
    return folder

def left(cs): return [p for p in cs.root.rglob("*") if ".staging" in p.parts and p.name != ".staging"] if cs.root.exists() else []

# --- archives ------------------------------------------------------------------------------------

names = st.text("abcXYZäß.-_ 0", min_size=1, max_size=8).filter(lambda s: not s.startswith(".") and s not in ("", "__pycache__"))
def fine(paths):
    try:
        for p in paths: safe_name(p)
    except RunError: return False
    low = [p.casefold() for p in paths]
    return len(set(low)) == len(low) and not any(a != b and b.startswith(a+"/") for a in low for b in low)

@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.lists(names, min_size=1, max_size=3).map("/".join), st.binary(max_size=300), min_size=1, max_size=6))
def test_what_is_packed_comes_back_and_is_packed_the_same(tmp_path_factory, files):
    if not fine(files): return
    d = tmp_path_factory.mktemp("box")
    for n, raw in files.items(): (d/"in"/n).parent.mkdir(parents=True, exist_ok=True); (d/"in"/n).write_bytes(raw)
    a = pack(d/"in", d/"a.tar.gz")
    assert unpack(a, d/"out") == sorted(files) and {n: p.read_bytes() for n, p in files_in(d/"out").items()} == files
    assert pack(d/"out", d/"b.tar.gz").read_bytes() == a.read_bytes()

@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.booleans())
def test_a_damaged_archive_is_an_error_and_never_another_content(tmp_path_factory, data, as_zip):
    "Bytes changed, cut or added anywhere: what is unpacked is what was packed, or nothing is"
    d = tmp_path_factory.mktemp("cut")
    files = {"capsule.yaml": b"name: x\n"*40, "sub/notebook.ipynb": bytes(range(256))*4}
    if as_zip:
        with zipfile.ZipFile(d/"a", "w", zipfile.ZIP_DEFLATED) as z:
            for n, raw in files.items(): z.writestr(n, raw)
    else:
        for n, raw in files.items(): (d/"in"/n).parent.mkdir(parents=True, exist_ok=True); (d/"in"/n).write_bytes(raw)
        pack(d/"in", d/"a")
    raw = bytearray((d/"a").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at, how = data.draw(st.integers(0, len(raw)-1)), data.draw(st.sampled_from(["flip", "cut", "add"]))
        if how == "flip": raw[at] ^= data.draw(st.integers(1, 255))
        elif how == "cut": raw = raw[:max(1, at)]
        else: raw[at:at] = data.draw(st.binary(min_size=1, max_size=40))
        if len(raw) < 2: break
    (d/"bad").write_bytes(raw); (d/"out").mkdir()
    try: got = unpack(d/"bad", d/"out")
    except RunError: return
    assert all((d/"out"/n).read_bytes() in files.values() for n in got) and all(p.resolve().is_relative_to(d/"out") for p in (d/"out").rglob("*"))

def tar(f, *members, gz=True):
    with tarfile.open(f, "w:gz" if gz else "w") as t:
        for name, kind, raw in members:
            i = tarfile.TarInfo(name); i.type, i.size, i.linkname = kind, len(raw), "../../etc/passwd"
            t.addfile(i, io.BytesIO(raw))
    return f

def zipped(f, *members):
    with zipfile.ZipFile(f, "w", zipfile.ZIP_DEFLATED) as z:
        for name, mode, raw in members:
            i = zipfile.ZipInfo("x"); i.filename, i.external_attr, i.compress_type = name, mode << 16, zipfile.ZIP_DEFLATED
            with warnings.catch_warnings(): warnings.simplefilter("ignore"); z.writestr(i, raw)
    return f

R = tarfile.REGTYPE
BAD = dict(up=(("../x", R, b"x"), "leads out"), deep=(("a/../../x", R, b"x"), "leads out"), absolute=(("/tmp/x", R, b"x"), "absolute"), drive=(("C:/x", R, b"x"), "absolute"), backslash=(("a\\..\\x", R, b"x"), "characters"),
    symlink=(("x", tarfile.SYMTYPE, b""), "no file"), hardlink=(("x", tarfile.LNKTYPE, b""), "no file"), device=(("x", tarfile.CHRTYPE, b""), "no file"), block=(("x", tarfile.BLKTYPE, b""), "no file"), fifo=(("x", tarfile.FIFOTYPE, b""), "no file"),
    bomb=(("x", R, bytes(3_000_000)), "bomb"), long=(("x"*400, R, b"x"), "too long"), null=(("aux.txt", R, b"x"), "device"), control=(("a\nb", R, b"x"), "characters"), dot=(("x. ", R, b"x"), "dot"))

@pytest.mark.parametrize("what", BAD)
def test_a_bad_member_is_refused_and_nothing_is_left(tmp_path, what):
    (name, kind, raw), says = BAD[what]
    cs = Capsules()
    good = [(n, R, p.read_bytes()) for n, p in files_in(capsule(tmp_path/"good")).items()]
    files = [tar(tmp_path/"a.tar.gz", *good, (name, kind, raw))]
    if kind in (R, tarfile.SYMTYPE, tarfile.CHRTYPE): files.append(zipped(tmp_path/"a.zip", *[(n, stat.S_IFREG | 0o644, b) for n, _, b in good], (name, {R: stat.S_IFREG, tarfile.SYMTYPE: stat.S_IFLNK}.get(kind, stat.S_IFCHR) | 0o644, raw)))
    for f in files:
        with pytest.raises(RunError, match=says): cs.install(f)
        assert not left(cs) and not [c for c in cs.list() if not c.builtin] and not (tmp_path/"x").exists()

def test_counts_sizes_and_collisions(tmp_path):
    out = lambda: Path(shutil.rmtree(tmp_path/"o", ignore_errors=True) or (tmp_path/"o").mkdir() or tmp_path/"o")
    noise = os.urandom(300_000)
    for members, says, limits in (([(f"f{i}", R, b"") for i in range(60)], "too many files", Limits(files=50)), ([("a", R, noise)], "too big", Limits(file_mb=.2)), ([("a", R, noise), ("b", R, noise)], "too much", Limits(total_mb=.5)), ([("a", R, noise)], "is too big", Limits(archive_mb=.1)),
                                  ([("Read", R, b"1"), ("read", R, b"2")], "case does not count", Limits()), ([("ﬁle", R, b"1"), ("file", R, b"2")], "case does not count", Limits()), ([("a", R, b"1"), ("a", R, b"2")], "one file", Limits()),
                                  ([("a", R, b"1"), ("A/b", R, b"2")], "file and a folder", Limits()), ([("A/b", R, b"1"), ("a", R, b"2")], "file and a folder", Limits())):
        with pytest.raises(RunError, match=says): unpack(tar(tmp_path/"a.tar.gz", *members), out(), limits)
        with pytest.raises(RunError, match=says): unpack(zipped(tmp_path/"a.zip", *[(n, 0, b) for n, _, b in members]), out(), limits)

def test_lies_in_headers(tmp_path):
    "A zip that declares less than it holds, one with a million entries by its own word, a tar header that wants gigabytes, something after the end"
    raw = bytearray(zipped(tmp_path/"a.zip", ("a", 0, bytes(5_000_000))).read_bytes())
    i = raw.rindex(b"PK\x01\x02"); raw[i+24:i+28] = struct.pack("<I", 10)
    (tmp_path/"lie.zip").write_bytes(raw)
    (tmp_path/"o").mkdir()
    with pytest.raises(RunError, match="bomb|too much|damaged"): unpack(tmp_path/"lie.zip", tmp_path/"o")
    raw[raw.rindex(b"PK\x05\x06")+10:][:2]; j = raw.rindex(b"PK\x05\x06"); raw[j+10:j+12] = struct.pack("<H", 60_000); (tmp_path/"many.zip").write_bytes(raw)
    with pytest.raises(RunError, match="too many"): unpack(tmp_path/"many.zip", tmp_path/"o")
    size = bytearray((tmp_path/"a.zip").read_bytes()); j = size.rindex(b"PK\x05\x06"); size[j+12:j+16] = struct.pack("<I", 60_000); (tmp_path/"before.zip").write_bytes(size)
    with pytest.raises(RunError, match="damaged"): unpack(tmp_path/"before.zip", tmp_path/"o")  # a directory that begins before the file does
    head = tarfile.TarInfo("pax"); head.type, head.size = tarfile.XHDTYPE, 8 << 30
    (tmp_path/"pax.tar.gz").write_bytes(gzip.compress(head.tobuf() + bytes(4_000_000)))
    with pytest.raises(RunError): unpack(tmp_path/"pax.tar.gz", tmp_path/"o")
    two = pack(capsule(tmp_path/"c"), tmp_path/"two.tar.gz")
    two.write_bytes(two.read_bytes() + gzip.compress(b"more"))
    with pytest.raises(RunError, match="follows the archive's end"): unpack(two, tmp_path/"o2")

# --- installing ----------------------------------------------------------------------------------

MANIFESTS = [("- 1", "not a manifest"), ("a: [", "not valid YAML"), ("name: adder\nname: other\nversion: 1.0.0", "twice"), ("name: Adder\nversion: 1.0.0", "name"), ("name: adder\nversion: '1'", "version"), ("name: ../x\nversion: 1.0.0", "name"), ("name: adder\nversion: 1.0.0\nspeed: 1", "speed"),
    ("name: adder\nversion: 1.0.0\nnotebook: ../notebook.ipynb", "leads out"), ("name: adder\nversion: 1.0.0\nnotebook: none.ipynb", "no such notebook"), ("name: adder\nversion: 1.0.0\ninputs: {ys: {}}", "ys"), ("name: adder\nversion: 1.0.0\ninputs: {xs: {type: int}}", "xs"),
    ("name: adder\nversion: 1.0.0\nresources: {time_s: -1}", "time_s"), ("name: adder\nversion: 1.0.0\npermissions: {secrets: ['sk-123']}", "sk-123"), ("a: &a [1]\nname: *a", "liases"), ("name: 01_curate\nversion: 1.0.0", "built-in"), ("name: adder\nversion: 1.0.0\n? [1, 2]\n: 3", "YAML")]

@pytest.mark.parametrize("text,says", MANIFESTS)
def test_a_bad_manifest_is_refused(tmp_path, text, says):
    capsule(tmp_path/"c"); (tmp_path/"c"/"capsule.yaml").write_text(text)
    with pytest.raises(RunError, match=says): Capsules().install(tmp_path/"c")
    assert not left(Capsules())

def test_bad_folders(tmp_path):
    cs = Capsules()
    (tmp_path/"empty").mkdir()
    for path, says in ((tmp_path/"empty", "no capsule.yaml"), (tmp_path/"nowhere", "nothing to install"), (capsule(tmp_path/"np", first=None), "no parameters cell")):
        with pytest.raises(RunError, match=says): cs.install(path)
    (capsule(tmp_path/"link")/"l").symlink_to("/etc/passwd")
    with pytest.raises(RunError, match="only files and folders"): cs.install(tmp_path/"link")
    for members, says in (([("a/capsule.yaml", R, b"x"), ("b/capsule.yaml", R, b"x")], "more than one"), ([("a/capsule.yaml", R, b"x"), ("b", R, b"x")], "beside"), ([("readme", R, b"x")], "no capsule.yaml"), ([("capsule.yaml", R, b"x"), (".hidden", R, b"x")], "hidden")):
        with pytest.raises(RunError, match=says): cs.install(tar(tmp_path/"a.tar.gz", *members))
    (tmp_path/"text").write_text("hello")
    with pytest.raises(RunError, match="no archive"): cs.install(tmp_path/"text")
    assert not left(cs)

def wheel(f, folder, spoil=False):
    files = {f"adder_pkg/{n}": p.read_bytes() for n, p in files_in(folder).items()} | {"adder_pkg/__init__.py": b"", "adder_pkg-1.0.0.dist-info/METADATA": b"Name: adder-pkg\n"}
    rows = io.StringIO()
    csv.writer(rows).writerows([[n, "sha256="+base64.urlsafe_b64encode(hashlib.sha256(b).digest()).rstrip(b"=").decode(), len(b)] for n, b in files.items()] + [["adder_pkg-1.0.0.dist-info/RECORD", "", ""]])
    if spoil: files["adder_pkg/capsule.yaml"] += b"\n"
    return zipped(f, *[(n, 0, b) for n, b in files.items()], ("adder_pkg-1.0.0.dist-info/RECORD", 0, rows.getvalue().encode()))

def test_every_kind_of_package_is_the_same_capsule(tmp_path):
    src, hashes = capsule(tmp_path/"adder"), set()
    one = tar(tmp_path/"b.tar.gz", *[(f"adder-1.0.0/{n}", R, p.read_bytes()) for n, p in files_in(src).items()])
    z = zipped(tmp_path/"c.zip", *[(n, 0, p.read_bytes()) for n, p in files_in(src).items()])
    for k, f in enumerate((src, build(src, tmp_path/"a.tar.gz"), one, z)):
        c = Capsules(tmp_path/f"root{k}").install(f)
        hashes.add(c.hash); assert (c.name, c.version, c.source) == ("adder", "1.0.0", f.name)
    assert hashes == {capsule_hash(src)}
    assert Capsules(tmp_path/"w").install(wheel(tmp_path/"adder_pkg-1.0.0-py3-none-any.whl", src)).version == "1.0.0"
    with pytest.raises(RunError, match="RECORD"): Capsules(tmp_path/"w2").install(wheel(tmp_path/"adder_pkg-1.0.0-py3-none-any.whl", src, spoil=True))

def test_an_archive_does_not_become_part_of_its_capsule(tmp_path, monkeypatch):
    src = capsule(tmp_path/"adder")
    before = capsule_hash(src)
    monkeypatch.chdir(src)
    for folder, out in ((".", "."), (src, src/"dist"), (src, "adder.tar.gz"), (src, "sub/../x.tar.gz")):
        with pytest.raises(RunError, match="lie in the capsule"): build(folder, out)
    assert capsule_hash(src) == before and build(".", "..") and capsule_hash(src) == before

def test_secrets_that_a_capsule_does_not_name_are_hidden(monkeypatch):
    hidden = "OPENAI_API_KEY", "openai_api_key", "DB_PASSWORDS", "API_KEYS", "SSH_PASSPHRASE", "AWS_SECRET_ACCESS_KEY", "GOOGLE_APPLICATION_CREDENTIALS", "PGPASSWORD"
    for k in (*hidden, "MINE_TOKEN", "KEYBOARD", "LANGUAGE"): monkeypatch.setenv(k, "x")
    env = environment(Manifest(name="a", version="1.0.0", permissions=dict(secrets=["MINE_TOKEN"])))
    assert {k: env.get(k) for k in hidden} == dict.fromkeys(hidden, "") and not {"MINE_TOKEN", "KEYBOARD", "LANGUAGE"} & env.keys()

def test_hash_and_signature(tmp_path, home):
    cs, src = Capsules(), capsule(tmp_path/"adder")
    mine, other = signing_key(home/"keys"), signing_key(tmp_path/"other")
    plain, signed, theirs = build(src, tmp_path/"p.tar.gz"), build(src, tmp_path/"s.tar.gz", mine), build(src, tmp_path/"t.tar.gz", other)
    assert build(src, tmp_path/"s2.tar.gz", mine).read_bytes() == signed.read_bytes()
    with pytest.raises(RunError, match="hash is another"): cs.install(plain, hash="sha256:"+"0"*64)
    with pytest.raises(RunError, match="not trusted"): cs.install(theirs)
    with pytest.raises(RunError, match="not trusted"): cs.install(signed, key=public_text(other))
    with pytest.raises(RunError, match="not signed"): cs.install(plain, key=public_text(mine))
    with pytest.raises(RunError, match="not signed"): Capsules(tmp_path/"strict", signed=True).install(plain)
    for change in ("notebook.ipynb", "capsule.yaml", "more.txt"):
        d = tmp_path/f"changed-{change}"; d.mkdir()
        unpack(signed, d); (d/change).write_bytes(((d/change).read_bytes() if (d/change).exists() else b"") + b"\n")
        with pytest.raises(RunError, match="not what was signed"): cs.install(pack(d, tmp_path/"x.tar.gz"))
    d = tmp_path/"sig"; d.mkdir(); unpack(signed, d)
    s = json.loads((d/"capsule.sig").read_text())
    for sig in (dict(manifest={}), [], dict(s, signature="AAAA"), dict(s, manifest=s["manifest"] | dict(version="2.0.0")), dict(s, manifest=s["manifest"] | dict(kind="model"))):
        (d/"capsule.sig").write_text(json.dumps(sig))
        with pytest.raises(RunError): cs.install(pack(d, tmp_path/"x.tar.gz"))
    assert not left(cs) and not [c for c in cs.list() if not c.builtin]
    a, b = cs.install(signed), Capsules(tmp_path/"second").install(theirs, key=public_text(other))
    assert a.signed_by and b.signed_by and a.signed_by != b.signed_by and a.hash == b.hash == capsule_hash(src)
    assert verify(a.folder, None) == public_text(mine)

def test_versions_side_by_side(tmp_path):
    cs = Capsules()
    order = ["0.9.0", "1.0.0-alpha.1", "1.0.0-alpha.2", "1.0.0-alpha.10", "1.0.0-beta", "1.0.0", "1.2.0", "1.10.0", "2.0.0-rc.1"]
    assert sorted(reversed(order), key=version_key) == order
    for v in order: cs.install(capsule(tmp_path/v, version=v))
    assert [c.version for c in cs.list(every=True) if not c.builtin] == order[::-1] and cs.get("adder").version == "1.10.0" and cs.get("adder@1.0.0").version == "1.0.0"
    assert cs.install(tmp_path/"1.0.0").hash == cs.get("adder", "1.0.0").hash
    with pytest.raises(RunError, match="never changes"): cs.install(capsule(tmp_path/"1.0.0", code="1", version="1.0.0"))
    assert cs.remove("adder") == "1.10.0" and cs.get("adder").version == "1.2.0"
    for bad in ("adder@7.0.0", "nobody", "../adder", "", "ADDER"):
        with pytest.raises(RunError, match="no such"): cs.get(bad)
    with pytest.raises(RunError, match="built-in"): cs.remove("01_curate")
    assert {"01_curate", "02_finetune", "06_release"} <= {c.name for c in cs.list()} and cs.get("finetune").name == "02_finetune"

KILL = """import os, sys, signal
from somaagent.runs import capsule
at, n = int(sys.argv[2]), 0
def hook(name, args):
    global n
    if name in ("os.rename", "os.mkdir", "shutil.copyfile", "shutil.rmtree", "os.remove", "tempfile.mkdtemp", "open"):
        n += sys.argv[3] in str(args[0])
        if n == at: os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(hook)
capsule.Capsules(sys.argv[3]).install(sys.argv[1])"""

def test_killed_anywhere_it_is_there_whole_or_not_and_goes_on(tmp_path):
    "Five processes, each killed at another of its own steps; afterwards nothing half-written is left"
    src = build(capsule(tmp_path/"adder"), tmp_path/"a.tar.gz")
    root, want = tmp_path/"root", capsule_hash(tmp_path/"adder")
    ends = []
    for at in (1, 4, 8, 11, 99):
        p = subprocess.run([sys.executable, "-c", KILL, str(src), str(at), str(root)], capture_output=True, text=True)
        assert p.returncode in (0, -signal.SIGKILL), p.stderr
        there = [Capsules(root).get("adder")] if (root/"adder"/"1.0.0").exists() else []
        assert all(c.hash == want and capsule_hash(c.folder) == want for c in there)
        ends.append(p.returncode)
    assert ends[0] == -signal.SIGKILL and ends[-1] == 0
    Capsules(root).install(src)
    assert not left(Capsules(root)) and sorted(p.name for p in root.glob("adder/1.0.0/*")) == [".installed.json", "capsule.yaml", "notebook.ipynb"]

def test_many_at_once_install_it_once(tmp_path):
    src, got, bad = build(capsule(tmp_path/"adder"), tmp_path/"a.tar.gz"), [], []
    def go():
        try: got.append(Capsules().install(src).hash)
        except Exception as e: bad.append(e)
    ts = [threading.Thread(target=go) for _ in range(8)]
    for t in ts: t.start()
    for t in ts: t.join()
    assert not bad and len(got) == 8 and len(set(got)) == 1 and not left(Capsules())

# --- executing -----------------------------------------------------------------------------------

def test_it_runs_within_its_limits_and_its_outputs_are_looked_at(tmp_path, home, monkeypatch):
    from somaagent.runs.record import find_run
    monkeypatch.setenv("MY_API_KEY", "hush-hush"); monkeypatch.setenv("OTHER_TOKEN", "not yours")
    code = """import os, time
if how == 'wrong': run.output('total', 'three')
elif how == 'none': pass
elif how == 'slow': time.sleep(60)
elif how == 'big': keep = b'x'*500_000_000; time.sleep(60)
else: run.output('total', sum(xs)); run.output('seen', [len(os.environ['MY_API_KEY']), os.environ['OTHER_TOKEN']]); print(os.environ['MY_API_KEY'])"""
    cs = Capsules()
    cs.install(capsule(tmp_path/"c", code, "xs = [1, 2]\nhow = ''", resources=dict(time_s=6, memory_mb=400), permissions=dict(secrets=["MY_API_KEY"]), outputs=dict(total=dict(type="int"))))
    r = cs.execute("adder", dict(xs=[3, 4]))
    assert (r.status, r.outputs["total"], r.outputs["seen"]) == ("completed", 7, [9, ""]) and r.inputs["capsule"] == "adder" and find_run(r.id).status == "completed"
    assert not any(b"hush-hush" in f.read_bytes() for f in Path(r.path).rglob("*") if f.is_file())
    for how, says in (("wrong", "promises int"), ("slow", "longer than the 6 s"), ("big", "more than the 400 MB")):
        r = cs.execute("adder", dict(how=how))
        assert r.status == "failed" and says in r.error and find_run(r.id).status == "failed", (how, r.status, r.error)
    f = cs.get("adder").notebook
    f.write_text(f.read_text() + " ")
    with pytest.raises(RunError, match="was changed"): cs.execute("adder")
    monkeypatch.delenv("MY_API_KEY")
    f.write_text(f.read_text()[:-1])
    with pytest.raises(RunError, match="secret that is not set"): cs.execute("adder")
    assert len(list((home/"runs").glob("run_*"))) == 4

# --- workflows -----------------------------------------------------------------------------------

def test_the_main_job_is_this_workflow():
    "`soma improve` and `soma workflow start improve` are one job: the same key"
    from somaagent.cli.improve import parameters_from
    from somaagent.core.settings import experiments_dir
    from somaagent.runs.background import find_workflow, workflows
    from somaagent.runs.workflow import check_params, job_key, load_workflow
    wf = find_workflow("improve")
    assert wf.path == (experiments_dir()/"improve.yaml").resolve() and "improve" in [w["name"] for w in workflows()]
    assert job_key(wf, check_params(wf, {})) == job_key(load_workflow(experiments_dir()/"improve.yaml"), check_params(wf, parameters_from({})))

def soma(*args):
    "A command, as `soma workflow` runs it"
    from click.testing import CliRunner
    from somaagent.cli.workflow import workflow
    r = CliRunner().invoke(workflow, list(map(str, args)))
    return r.exit_code, r.stdout, r.stderr

def test_started_killed_and_cancelled_from_the_command_line(tmp_path, home):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("gate = ''", metadata=dict(tags=["parameters"])), nbformat.v4.new_code_cell("from pathlib import Path\nimport time\nprint('waiting', flush=True)\nwhile not Path(gate).exists(): time.sleep(.02)"),
                                                   nbformat.v4.new_code_cell("from somaagent.runs.record import current_run\ncurrent_run().output('done', True)")]), tmp_path/"a.ipynb")
    (tmp_path/"w.yaml").write_text("name: waits\nparams: {gate: {type: str, default: ''}}\nstages: [{id: a, notebook: a.ipynb, params: {gate: '${gate}'}, outputs: [done]}]\n")
    code, out, err = soma("start", tmp_path/"w.yaml", "-p", f"gate={tmp_path/'gate'}", "--detach", "--json")
    assert code == 0, err
    s, end = json.loads(out), time.monotonic()+60
    from somaagent.runs.background import cancel, start, status
    while status(s["id"])["stages"][0].get("cell") != 3: assert time.monotonic() < end, status(s["id"]); time.sleep(.05)
    now = status(s["id"])
    assert now["status"] == "running" and now["pid"] and now["beat_s"] < 30 and now["stages"][0]["cells"] == 4
    os.kill(now["pid"], signal.SIGKILL)
    while status(s["id"])["status"] == "running": assert time.monotonic() < end+60; time.sleep(.02)
    code, out, _ = soma("status", s["id"])
    assert code == 0 and "interrupted" in out and "goes on from here" in out
    again = start(tmp_path/"w.yaml", dict(gate=str(tmp_path/"gate")))
    code, out, err = soma("start", tmp_path/"w.yaml", "-p", f"gate={tmp_path/'gate'}", "--detach")
    assert code == 0 and out.strip() == again.id and "running already" in err
    assert again.status == "running" and (gone := cancel(again.id)).status == "cancelled" and gone.error == ""
    time.sleep(1.5)     # a second start that waited for the end of the first would have taken over by now
    assert status(again.id)["status"] == "cancelled"
    with pytest.raises(RunError, match="not running"): cancel(again.id)
    (tmp_path/"gate").touch()
    code, out, err = soma("start", tmp_path/"w.yaml", "-p", f"gate={tmp_path/'gate'}")
    assert code == 0 and "a.done = True" in out and "[1/1]" in err
    code, out, err = soma("start", tmp_path/"w.yaml", "-p", "speed=3", "--detach")
    assert code != 0 and "no such parameter" in err and "Traceback" not in err

def test_what_ships_is_read_again_only_when_it_changes(tmp_path, monkeypatch):
    from somaagent.runs import capsule
    read, plain = [], capsule.read_cells
    monkeypatch.setattr(capsule, "experiments_dir", lambda: tmp_path)
    monkeypatch.setattr(capsule, "read_cells", lambda p: read.append(p.name) or plain(p))
    cell = nbformat.v4.new_code_cell("n = 3", metadata=dict(tags=["parameters"]))
    def put(name, says): nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# T\n\n> {says}"), cell]), tmp_path/name)
    put("01_one.ipynb", "first"); put("02_two.ipynb", "second")
    a = capsule.builtins()
    a[0].manifest.description = "spoilt by a caller"
    assert [c.manifest.description for c in capsule.builtins()] == ["first", "second"] and read == ["01_one.ipynb", "02_two.ipynb"]
    put("02_two.ipynb", "another text")
    assert capsule.builtins()[1].manifest.description == "another text" and read[2:] == ["02_two.ipynb"]
    (tmp_path/"01_one.ipynb").unlink()
    assert [c.name for c in capsule.builtins()] == ["02_two"]
