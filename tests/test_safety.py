"""What reads other people's files runs nothing of theirs: the package's sources hold no call that could."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = [
    *(
        file
        for part in ("tokenpref", "recipes", "scripts", "benchmarks")
        for file in (ROOT / part).rglob("*.py")
    ),
    ROOT / "_tokenpref_tune.py",
]
# Reads the index of a distributed checkpoint, which is a pickle, with an unpickler that imports nothing.
MAY_UNPICKLE = {ROOT / "tokenpref/distributed/safe_reading.py"}
# Replaces the resolver that reads environment variables, so that their values stay out of files.
MAY_RESOLVE = {ROOT / "tokenpref/training/config/written.py"}
PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
RUNS = {"eval", "exec", "compile", "__import__", "execfile"}
ASKS = {"AutoConfig.from_pretrained"}
PLAIN_YAML = {
    "safe_load",
    "safe_load_all",
    "safe_dump",
    "compose",
    "SafeLoader",
    "YAMLError",
    "Node",
    "ScalarNode",
}


def dangers(source: str, *, may_unpickle: bool = False, may_resolve: bool = False) -> Iterator[str]:
    """Calls and imports that can run what a file says."""
    for node in ast.walk(ast.parse(source)):
        where = f"line {getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            names = [alias.name for alias in node.names]
            found = PICKLES & {name.split(".")[0] for name in ([module] if module else names)}
            if found and not may_unpickle:
                yield f"{where}: imports {', '.join(found)}"
            if module in ("yaml", "jinja2") and set(names) - {*PLAIN_YAML, "nodes"}:
                yield f"{where}: imports {', '.join(names)} of {module}"
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name.startswith("yaml.") and name.count(".") == 1 and node.attr not in PLAIN_YAML | {"nodes"}:
                yield f"{where}: {name}"
            if name in ("os.system", "os.popen", "jinja2.Environment", "jinja2.Template"):
                yield f"{where}: {name}"
            if node.attr == "register_new_resolver" and not may_resolve:
                yield f"{where}: {name} lets configs call functions"
        elif isinstance(node, ast.Call):
            name, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name in RUNS:
                yield f"{where}: {name}"
            if name == "torch.load" and given.get("weights_only") != "True":
                yield f"{where}: torch.load without weights_only=True"
            if given.get("shell", "False") != "False":
                yield f"{where}: {name} by way of a shell"
            if any(given.get(word, "False") != "False" for word in ("allow_pickle", "trust_remote_code")):
                yield f"{where}: {name} with allow_pickle or trust_remote_code"
            if name in ASKS and "trust_remote_code" not in given:
                yield f"{where}: {name} without trust_remote_code=False may ask on the terminal whether to run code"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import yaml\nyaml.load(text)",
        "from yaml import load",
        "import yaml\nyaml.unsafe_load(text)",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoConfig.from_pretrained(name)",
        "eval(text)",
        "exec(text)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "jinja2.Template(text)",
        "from jinja2 import Environment",
        "OmegaConf.register_new_resolver('eval', eval)",
    ],
)
def test_every_danger_is_seen(source):
    assert list(dangers(source))


def test_what_is_safe_passes():
    safe = (
        "import re, yaml, torch\nre.compile('a')\nyaml.safe_load(text)\nmodel.eval()\ntorch.load(p, weights_only=True)\n"
        "np.load(path, allow_pickle=False)\n"
        "AutoConfig.from_pretrained(path, trust_remote_code=False)\nfrom jinja2 import nodes\nfrom yaml import YAMLError\n"
    )
    assert not list(dangers(safe))


@pytest.mark.parametrize("file", SOURCES, ids=[str(file.relative_to(ROOT)) for file in SOURCES])
def test_sources_run_nothing_that_they_read(file):
    assert not list(
        dangers(file.read_text(), may_unpickle=file in MAY_UNPICKLE, may_resolve=file in MAY_RESOLVE)
    )
