"""Widgets of the Lab, without a browser: what a click does is what its method does."""
import json, os, re, time

import nbformat, nbformat.v4 as v4, pytest

pytest.importorskip("ipywidgets")
from somaagent.core.records import Run, new_id, utcnow
from somaagent.lab.browse import ModelBrowser, RunBrowser, SweepBrowser
from somaagent.lab.forms import RunForm, open_notebook, rerun
from somaagent.runs.sweep import run_sweep

TEXT = lambda w: re.sub("<.*?>", " ", w.value)

@pytest.fixture(scope="module")
def home(tmp_path_factory):
    h, old = tmp_path_factory.mktemp("lab"), dict(os.environ)
    os.environ |= dict(SOMA_STORES_HOME=str(h/"soma"), SOMA_TRACKING_BACKEND="none", SOMA_PROGRESS="none")
    yield h
    os.environ.clear(); os.environ.update(old)

@pytest.fixture(scope="module")
def notebook(home):
    cells = [v4.new_code_cell("x = 1.0  # where\nwait = 0.0\nfail = False", metadata=dict(tags=["parameters"])),
             v4.new_code_cell("import time\nfrom somaagent.runs.record import current_run\nprint('begun', flush=True)\ntime.sleep(wait)\nassert not fail, 'as asked'\ncurrent_run().metric('loss', (x-2)**2)")]
    nbformat.write(v4.new_notebook(cells=cells), home/"bowl.ipynb")
    return home/"bowl.ipynb"

def ended(form, s=60):
    end = time.monotonic()+s
    while form.run is None and time.monotonic() < end: time.sleep(.02)
    return form.run

def test_a_form_runs_what_stands_in_it_and_says_how_it_went(notebook):
    form = RunForm(notebook)
    form.fields["x"].value = "3"
    form.go.click()
    assert ended(form).status == "completed" and form.run.metrics["loss"]["value"] == 1 and "loss 1" in TEXT(form.message)
    bad = rerun(form.run)
    assert bad.values()["x"] == 3.0
    bad.fields["fail"].value = True
    bad.go.click()
    assert ended(bad).status == "failed" and "as asked" in TEXT(bad.message) and "b03410" in bad.message.value

def test_a_run_is_ended_by_its_button(notebook):
    form = RunForm(notebook, dict(wait=60.))
    form.go.click()
    end = time.monotonic()+60
    while "begun" not in TEXT(form.message) and time.monotonic() < end: time.sleep(.02)
    form.halt.click()
    assert ended(form).status == "cancelled" and not form.go.disabled

def test_markup_in_a_notebook_is_text_in_the_widgets(home):
    cell = v4.new_code_cell("x = '<img src=q onerror=alert(1)>'  # <script>help</script>", metadata=dict(tags=["parameters"]))
    nbformat.write(v4.new_notebook(cells=[cell]), home/"odd.ipynb")
    assert "<script>" not in RunForm(home/"odd.ipynb").help["x"].value
    from somaagent.runs.record import save_run
    rid = new_id("run")
    save_run(Run(id=rid, name="<b>odd</b>", status="failed", error="<script>alert(1)</script>", parameters=dict(x="<img>"), path=str(home/"soma"/"runs"/rid), started_at=utcnow(), ended_at=utcnow()), row=True)
    b = RunBrowser()
    b.pick.value = (rid,)
    assert not re.search("<script|<img|<b>odd", b.picture.value)

def test_a_sweep_is_followed_and_its_best_trial_run_again(home, notebook):
    import yaml
    (home/"sweep.yaml").write_text(yaml.safe_dump(dict(name="bowl", notebook="bowl.ipynb", metric="loss", goal="minimize", sampler="grid", space=dict(x=dict(choices=[0.0, 2.0, 5.0])))))
    run_sweep(home/"sweep.yaml")
    b = SweepBrowser()
    assert (b.bar.value, b.bar.max) == (3, 3) and "3 of 3 trials" in TEXT(b.message)
    assert b.rerun_best().values()["x"] == 2.0

def test_models_without_any_and_a_wrong_condition_are_said(home):
    assert "soma improve" in TEXT(ModelBrowser().message)
    assert "b03410" in RunBrowser(where="nonsense ===").message.value

def test_a_copy_of_a_notebook_overwrites_nothing(home, notebook):
    form = RunForm(notebook)
    form.go.click(); run = ended(form)
    one, two = open_notebook(run, home), open_notebook(run, home)
    assert one != two and one.exists() and json.loads(two.read_text())["cells"]
