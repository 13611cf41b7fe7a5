import os, shutil, subprocess, sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("SOMA_PROGRESS", "none")
os.environ.setdefault("SOMA_KERNELS_WARM_IDLE_S", "10")  # every test has a home, every home its warm kernels

first = """test_cluster test_improve test_sft test_cli_serve test_rlaif test_schedule test_gateway test_jobs test_runs test_faults test_track test_kernels test_things test_capsule test_vectors test_rag test_platform test_sdk
    test_ab_cli test_run_faults test_sweep test_replay test_records test_workflow test_lab test_train test_intake test_privacy test_data test_trace test_registry test_agent test_clients test_store""".split()  # the longest: begun last, one of them would keep a processor waiting; those that reckon beside those that wait for a process

everything = os.environ.get("CI") == "true" or os.environ.get("SOMA_TEST_SLOW") == "1"
left_out = "slow: CI runs it, and so does SOMA_TEST_SLOW=1"

def pytest_collection_modifyitems(items):
    "The longest files first; without CI or `SOMA_TEST_SLOW=1` the tests marked slow are left out"
    place = {name: k for k, name in enumerate(first)}
    items.sort(key=lambda i: place.get(i.path.stem, len(first)))
    if not everything:
        for i in items:
            if i.get_closest_marker("slow"): i.add_marker(pytest.mark.skip(reason=left_out))

def pytest_terminal_summary(terminalreporter):
    n = sum(left_out in str(r.longrepr) for r in terminalreporter.stats.get("skipped", []))
    if n: terminalreporter.write_line(f"{n} slow test{'s' * (n > 1)} left out: SOMA_TEST_SLOW=1 make pytest runs all")

def missing(what):
    "Without `what`, skip on a laptop and fail in CI"
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"{what} is not installed here")

@pytest.fixture
def home(tmp_path, monkeypatch):
    "A fresh home of the workbench"
    monkeypatch.setenv("SOMA_STORES_HOME", str(tmp_path/"home"))
    return tmp_path/"home"

@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    "A warehouse and a state store of a test file's own"
    from somaagent.store.state import State
    from somaagent.store.warehouse import Warehouse
    d = tmp_path_factory.mktemp("stores")
    with Warehouse(f"chdb://{d/'wh'}", mode="direct") as wh:
        st = State(f"sqlite:///{d/'state.db'}")
        yield wh, st
        st.close()
