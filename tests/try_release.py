"""Try another release of SGLang: install it beside, and say what moved under the plugin.

    python -m tests.try_release 0.5.23 --folder .venv-0.5.23

Both releases describe themselves, each in its own environment: versions, the functions that are
hooked, overridden or called, the bodies of the first two, every name of SGLang in our code, options
and their defaults, whether a hook on the checks of options is still called, and the part of
FlashInfer's kernels that stores scores. What differs is printed by what it breaks; then the
end-to-end tests run on the new release, on a CPU. The exit code is 1 if anything moved.
`docs/upgrading.md` says what to do about each kind.
"""

import argparse
import ast
import hashlib
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from difflib import unified_diff
from pathlib import Path
from typing import Any

from lim_sglang import compat
from lim_sglang.environment import installed_versions
from lim_sglang.plugin import activate_cpu_platform

ROOT = Path(__file__).parent.parent
SERVER_ARGS = "sglang.srt.server_args.ServerArgs"
NEW_STEPS = {
    f"{SERVER_ARGS}.resolve_once": "options are what the user gave until it ran, so checks that "
    "read what SGLang makes of them read too early",
    "sglang.srt.runtime_context.assert_published": "a process has to publish its options before it "
    "makes a model runner, as `lim bench` does",
}
"""Functions by which newer releases show that a process begins in another way."""
STORES_SCORES = ("data/include/flashinfer/attention/prefill.cuh", "logits_transform")
"""FlashInfer's file and the function in it that calls our variant for each score."""
BROUGHT_BY_SGLANG = {"sglang", "torch", "triton", "flashinfer-python", "transformers", "openai"}
NO_NAME = re.compile(r"[^\w.]")


class HookCalledError(Exception):
    """Raised by a hook of ours, in place of what it hooks."""


def describe() -> dict[str, Any]:
    """Describe the installed release, as JSON."""
    activate_cpu_platform()
    checked = {*map(str, compat.HOOKED), *compat.USED_ON_GPU}
    named, ours = set(names_in_code()), set(overridden_methods())
    return {
        "versions": installed_versions(),
        "checked": {path: _signature(path) for path in sorted(checked)},
        "called": {path: _signature(path) for path in sorted((named | ours) - checked)},
        "bodies": {path: _body(path) for path in sorted({*map(str, compat.HOOKED), *ours})},
        "buffers": compat.missing_attributes(compat.WRAPPER, compat.WRAPPER_BUFFERS),
        "missing_names": [name for name in sorted(named) if not _exists(name)],
        "options": _options(),
        "new_steps": [name for name in NEW_STEPS if _exists(name)],
        "checks_are_hooked": checks_are_hooked(),
        "stores_scores": stores_scores(),
    }


def _signature(path: str) -> list[str] | None:
    """Return the names of a callable's parameters; None if it is none, or is not there."""
    try:
        return list(inspect.signature(compat.resolve(path)).parameters)
    except Exception:  # noqa: BLE001 - whatever keeps it from loading, it is not there
        return None


def _body(path: str) -> str | None:
    """Return a digest of a function's source; None if it has none."""
    try:
        source = inspect.getsource(inspect.unwrap(compat.resolve(path)))
    except Exception:  # noqa: BLE001 - as above
        return None
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def names_in_code() -> Iterator[str]:
    """Yield every module and name of SGLang and FlashInfer that our code imports or names."""
    for file in sorted((ROOT / "lim_sglang").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.ImportFrom(module=str(module), names=names) if _is_theirs(module):
                    yield from (f"{module}.{each.name}" for each in names)
                case ast.Import(names=names):
                    yield from (each.name for each in names if _is_theirs(each.name))
                case ast.Constant(value=str(text)) if _is_theirs(text) and not NO_NAME.search(text):
                    yield text.rstrip(".")
                case ast.Attribute(value=ast.Call(args=[ast.Constant(value=str(text))]), attr=attr):
                    if _is_theirs(text):  # importlib.import_module("sglang.srt.layers.moe").name
                        yield f"{text}.{attr}"


def overridden_methods() -> Iterator[str]:
    """Yield the methods of SGLang's classes that have one of the same name in a class of ours, and
    methods of ours that no class of SGLang has."""
    for file in sorted((ROOT / "lim_sglang").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            for base in node.bases if isinstance(node, ast.ClassDef) else ():
                name = base.attr if isinstance(base, ast.Attribute) else getattr(base, "id", "")
                if module := compat._INTERNALS.get(name):
                    methods = (each for each in node.body if isinstance(each, ast.FunctionDef))
                    yield from (f"{module}.{name}.{each.name}" for each in methods)


def _is_theirs(name: str) -> bool:
    return name.startswith(("sglang.", "flashinfer."))


def _exists(name: str) -> bool:
    try:
        compat.resolve(name)
    except Exception:  # noqa: BLE001 - as above
        return False
    return True


def _options() -> dict[str, str]:
    """Return SGLang's options with their defaults, as text."""
    found: Any = compat.resolve(SERVER_ARGS)
    parameters = inspect.signature(found).parameters.values()
    return {
        each.name: "" if each.default is each.empty else repr(each.default) for each in parameters
    }


def checks_are_hooked() -> bool:
    """Return True if a hook on the function that checks options is called where they are made."""
    registry: Any = compat.resolve("sglang.srt.plugins.hook_registry.HookRegistry")
    kinds: Any = compat.resolve("sglang.srt.plugins.hook_registry.HookType")
    registry._hooks.clear()
    registry.register(str(compat.Target.POST_INIT), _raise, kinds.BEFORE)
    registry.apply_hooks()
    options: Any = compat.resolve(SERVER_ARGS)
    try:
        options(model_path="no-such-model")
    except HookCalledError:
        return True
    except Exception:  # noqa: BLE001 - SGLang's own checks came first
        return False
    return False


def _raise(*_arguments: object) -> None:
    raise HookCalledError


def stores_scores() -> str | None:
    """Return the text of the function that calls our variant, without comments and spaces."""
    file, function = STORES_SCORES
    try:
        folder = Path(str(compat.resolve("flashinfer").__file__)).parent
        text = (folder / file).read_text()
    except Exception:  # noqa: BLE001 - as above
        return None
    start = text.find(f"void {function}(")
    end = text.find("\n}\n", start)
    lines = (re.sub(r"//.*", "", line).strip() for line in text[start:end].splitlines())
    return "\n".join(line for line in lines if line)


def moved(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return what differs between two descriptions, by what it breaks."""
    gone = sorted({*new["missing_names"]} - {*old["missing_names"]})
    silent = [
        f"{name}: {NEW_STEPS[name]}" for name in new["new_steps"] if name not in old["new_steps"]
    ]
    if old["checks_are_hooked"] and not new["checks_are_hooked"]:
        silent.append(
            f"{compat.Target.POST_INIT}: a hook on it is not called where options are made, so "
            "nothing that we refuse would be refused"
        )
    if old["stores_scores"] != new["stores_scores"]:
        texts = [(each["stores_scores"] or "").splitlines() for each in (old, new)]
        change = unified_diff(*texts, "old", "new", n=1, lineterm="")
        silent.append("FlashInfer calls our variant otherwise:\n    " + "\n    ".join(change))
    silent += [f"FlashInfer: {each}" for each in new["buffers"]]
    bodies = [path for path, here in old["bodies"].items() if here and new["bodies"][path] != here]
    here, there = old["options"], new["options"]
    return {
        "Signatures that are checked: a start is refused": _changed(old["checked"], new["checked"]),
        "Further signatures of what our code names": _changed(old["called"], new["called"]),
        "Names that our code uses and that are gone: it fails when it comes to them": gone,
        "Breaks in silence": silent,
        "Options that are gone: a refusal that reads one lets everything pass": [
            f"{name} (was {here[name]})" for name in here if name not in there
        ],
        "Options that are new: serve them, or refuse them": [
            f"{name} = {there[name]}" for name in there if name not in here
        ],
        "Options with another default": [
            f"{name} = {there[name]}, was {here[name]}"
            for name in here
            if name in there and here[name] != there[name]
        ],
        "Hooked or overridden functions with another body: does ours still fit?": bodies,
    }


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [
        f"{path}: gone"
        if there is None
        else f"{path}: ({', '.join(there)}), was ({', '.join(here)})"
        for path, here in old.items()
        if here is not None and (there := new.get(path)) != here
    ]


def install(version: str, folder: Path) -> Path:
    """Install a release beside this one, with what else we need; return its Python."""
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = [re.split(r"[=<>~]", each)[0] for each in ours]
    needed = [name for name in names if name.split("[")[0] not in BROUGHT_BY_SGLANG]
    pip = [str(python), "-m", "pip", "install", "-q"]
    subprocess.run([*pip, f"sglang=={version}", *needed], check=True)
    subprocess.run([*pip, "--no-deps", "-e", str(ROOT)], check=True)
    return python


def described_by(python: Path) -> dict[str, Any]:
    """Return the description of the release that another Python has."""
    command = [str(python), "-m", "tests.try_release", "--describe"]
    environment = {**os.environ, compat.CPU_ENGINE_VAR: "1", compat.PLUGINS_VAR: "none"}
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if found.returncode:
        raise SystemExit(f"{python} cannot describe its SGLang:\n{found.stderr[-2000:]}")
    description: dict[str, Any] = json.loads(found.stdout.splitlines()[-1])
    return description


def say(text: str) -> None:
    """Show a text at once: what follows takes minutes."""
    sys.stdout.write(text)
    sys.stdout.flush()


def main() -> None:
    """Install, compare, test."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("version", nargs="?", help="of SGLang, as 0.5.23")
    parser.add_argument("--folder", type=Path, help="its environment; default: .venv-VERSION")
    parser.add_argument("--describe", action="store_true", help="describe this release as JSON")
    parser.add_argument("--tests", default="e2e and not gpu and not slow", help="pytest's -m")
    given = parser.parse_args()
    if given.describe:
        sys.stdout.write("\n" + json.dumps(describe()) + "\n")
        return
    if not given.version:
        parser.error("name the version to try")
    folder = given.folder or ROOT / f".venv-{given.version}"
    say(f"Installing SGLang {given.version} in {folder}\n")
    python = install(given.version, folder)
    old, new = described_by(Path(sys.executable)), described_by(python)
    for package, version in new["versions"].items():
        if version != old["versions"][package]:
            say(f"{package}: {old['versions'][package]} → {version}\n")
    found = moved(old, new)
    for title, items in found.items():
        say(f"\n{title}: {len(items) or 'none'}\n" + "".join(f"  {each}\n" for each in items))
    say(f"\nTests: {given.tests}\n")
    allowed = {**os.environ, "LIM_ALLOW_SGLANG": given.version}
    tests = subprocess.run(
        [str(python), "-m", "pytest", "-q", "-m", given.tests], cwd=ROOT, env=allowed
    )
    raise SystemExit(1 if any(found.values()) or tests.returncode else 0)


if __name__ == "__main__":
    main()
