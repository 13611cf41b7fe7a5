"""Turn a language-model application's traffic into a better model, with the proof that it is better

Modules:

- `somaagent.core.errors`: One hierarchy for the whole house: every error names the offending value and the way out.
- `somaagent.core.logs`: Logging that never writes a secret down.
- `somaagent.core.progress`: One call that is a Rich bar in a terminal, a tqdm bar in a notebook, and a plain line in a log.
- `somaagent.core.records`: The five nouns, sortable ids, a clock that tests can stop, and hashes of content.
- `somaagent.core.settings`: One file of typed, validated settings; every value overridable from the environment; every mistake named.
- `somaagent.runs.record`: What a notebook found, written down so that a report, a registry or the next stage can read it."""

__version__ = "0.1.0"
