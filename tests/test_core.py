"""Core: what a notebook page would not teach. Processes for real, properties by hypothesis."""
import datetime as dt, importlib, os, pkgutil, pty, subprocess, sys
from decimal import Decimal

import pytest
from hypothesis import given, settings as hyp, strategies as st

import somaagent
from somaagent.core.errors import SettingsError, SomaError
from somaagent.core.logs import redact
from somaagent.core.records import Interaction, canonical_json, content_hash, frozen_clock, id_for, new_id, utcnow
from somaagent.core.settings import find_settings, load_settings, settings

def py(code, **env):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env})

def test_a_wrong_setting_names_file_key_value_and_what_is_allowed(tmp_path):
    f = tmp_path/"settings.ini"; f.write_text("[stores]\nidle_s = -3\n")
    with pytest.raises(SettingsError) as e: load_settings(f, env={})
    for part in (str(f), "idle_s", "-3", "> 0"): assert part in str(e.value)

@pytest.mark.parametrize("text", ["[stores\nhome=x", "home = x", "[stores]\nhome = a\nhome = b", "\x00\x01"])
def test_a_broken_file_is_one_clear_error(tmp_path, text):
    f = tmp_path/"settings.ini"; f.write_text(text)
    with pytest.raises(SettingsError, match="not a readable settings file"): load_settings(f, env={})

def test_bytes_that_are_not_text(tmp_path):
    f = tmp_path/"settings.ini"; f.write_bytes(b"[stores]\nhome = \xff\xfe\n")
    with pytest.raises(SettingsError): load_settings(f, env={})

def test_missing_file_is_named(tmp_path):
    with pytest.raises(SettingsError, match="nothing-here"): load_settings(tmp_path/"nothing-here.ini", env={})

def test_found_upwards_and_foreign_files_left_alone(tmp_path):
    (tmp_path/"settings.ini").write_text("[stores]\nhome = here\n")
    inner = tmp_path/"a"/"b"; inner.mkdir(parents=True); (tmp_path/"a"/"settings.ini").write_text("[DEFAULT]\nlib_name = other\n")
    assert find_settings(inner) == (tmp_path/"settings.ini").resolve()

def test_a_changed_file_is_read_again(tmp_path):
    f = tmp_path/"settings.ini"; f.write_text("[models]\nseed = 1\n"); os.utime(f, ns=(1, 1))
    assert settings(f, env={}).models.seed == 1
    f.write_text("[models]\nseed = 2\n"); os.utime(f, ns=(2, 2))
    assert settings(f, env={}).models.seed == 2

def test_every_error_has_an_exit_code_and_one_line():
    def walk(c):
        yield c
        for s in c.__subclasses__(): yield from walk(s)
    for m in pkgutil.walk_packages(somaagent.__path__, "somaagent."):
        if not m.name.startswith("somaagent.store.alembic"): importlib.import_module(m.name)
    for c in walk(SomaError):
        e = c(*([400] if c.__name__ == "HttpError" else []), "what is wrong", value="x", hint="do this")
        assert str(e) == "what is wrong: 'x'. Do this" and c.exit_code > 0, c

secret = st.text("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789", min_size=20, max_size=60)
@hyp(max_examples=200, deadline=None)
@given(secret, st.sampled_from(["key is sk-{}", "Bearer {}", "password={}", '"api_key": "{}"', "postgresql://u:{}@h/d", "hf_{}", "SOMA_X_SECRET: '{}'", "access_token={}&x=1"]))
def test_no_shape_of_secret_survives(s, shape):
    out = redact("before " + shape.format(s) + " after")
    assert s not in out and out.startswith("before ") and redact(out) == out

def test_a_log_of_a_real_process_holds_no_key():
    r = py("from somaagent.core.logs import logger\ntry: raise RuntimeError('bad key sk-abcdefghijklmnopqrstuvwxyz')\nexcept RuntimeError: logger('x').exception('failed, password=%s', 'hunter2')")
    assert "hunter2" not in r.stderr and "abcdefghij" not in r.stderr and "RuntimeError" in r.stderr

@hyp(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2**40), min_size=2, max_size=20))
def test_ids_sort_by_time(ms):
    ids = [id_for(dt.datetime.fromtimestamp(m/1000, dt.timezone.utc), i) for i, m in enumerate(ms)]
    assert [m for _, m in sorted(zip((i[:10] for i in ids), ms))] == sorted(ms)

def test_ids_of_many_threads_differ():
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(8) as ex: ids = list(ex.map(lambda _: new_id(), range(20_000)))
    assert len(set(ids)) == len(ids)

json_like = st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda c: st.lists(c, max_size=4) | st.dictionaries(st.text(), c, max_size=4), max_leaves=12)
@hyp(max_examples=100, deadline=None)
@given(st.dictionaries(st.text(), json_like, min_size=2, max_size=5))
def test_a_hash_does_not_see_key_order(d):
    assert content_hash(d) == content_hash(dict(reversed(d.items())))

def test_times_are_utc_whole_milliseconds():
    it = Interaction(prompt="x", ts=dt.datetime(2026, 3, 29, 3, 30, tzinfo=dt.timezone(dt.timedelta(hours=2))))
    assert it.ts == dt.datetime(2026, 3, 29, 1, 30, tzinfo=dt.timezone.utc) and it.ts.utcoffset() == dt.timedelta(0)
    assert utcnow().microsecond % 1000 == 0

def test_money_is_exact_and_bounded():
    assert Interaction(prompt="x", cost_usd="0.000000001").cost_usd == Decimal("1e-9")
    for bad in ("0.0000000001", "-1", "NaN", "Infinity"):
        with pytest.raises(ValueError): Interaction(prompt="x", cost_usd=bad)

def test_the_clock_comes_back_after_an_error():
    with pytest.raises(ZeroDivisionError):
        with frozen_clock("2020-01-01"): 1/0
    assert utcnow().year > 2020

code = "from somaagent.core.progress import track\nfor i in track(range(3), 'counting'): pass"
def test_progress_in_a_pipe_is_plain_lines():
    r = py(code, SOMA_PROGRESS="")
    assert r.stdout == "" and "counting: 3/3" in r.stderr and "\x1b" not in r.stderr

def test_progress_in_a_terminal_is_a_bar():
    main, sub = pty.openpty()
    p = subprocess.Popen([sys.executable, "-c", code], stdout=sub, stderr=sub, env={**os.environ, "SOMA_PROGRESS": "", "TERM": "xterm-256color"})
    p.wait(30); os.close(sub); out = b""
    try:
        while b := os.read(main, 4096): out += b
    except OSError: pass
    assert b"counting" in out and b"3/3" in out and b"\x1b[" in out

def test_a_wrong_progress_mode_is_named():
    r = py("from somaagent.core.progress import track\nlist(track([1]))", SOMA_PROGRESS="fancy")
    assert "fancy" in r.stderr and "rich, notebook, plain, none" in r.stderr
