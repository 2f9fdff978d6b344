"""The import graph, read from the source: levels, cycles, what is never imported."""

from __future__ import annotations

import ast
import functools
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
LIBRARY = ROOT / "idlora_jax"

LEVELS = (
    "__init__ types config config_codecs config_text config_upsampler config_video_vae "
    "config_vocoder files images mel sound voices sheets media settings assumed "
    "savings optimizer_config experiment sample_config monitoring commandline presets "
    "tagged axes",
    "geometry joining schedules adam8bit optimizers quantized adapters guidance "
    "accumulation norms wandb_run records solvers losses parallel shares distributed "
    "keys liveness flops compile_cache programs hosted quality",
    "streams references",
    "denoise strategies model.*",
    "training evaluation loop runs states diagnosis weights.* checkpoints",
    "prompts prompt_cache plans as_trained codecs starts pipeline continuation "
    "previews outlines phases lighter memory trajectories jobs finished batches "
    "outputs sampling sessions validation heldout run_files fitting training_outlines "
    "training_memory training_checks dry_run precompile tile_choice data.*",
    "tiny demo",
)
"""Lower first. A module imports its own level (without cycles) and lower ones."""

NETWORKS = {
    "transformer",
    "text_encoder",
    "text_connector",
    "video_vae",
    "audio_vae",
    "vocoder",
    "upsampler",
}


def name_of(path: pathlib.Path) -> str:
    """`idlora_jax/model/rope.py` -> `model.rope`, `model/__init__.py` -> `model`."""
    parts = path.relative_to(LIBRARY).with_suffix("").parts
    if parts == ("__init__",):
        return "__init__"
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def modules() -> dict[str, pathlib.Path]:
    return {name_of(path): path for path in sorted(LIBRARY.rglob("*.py"))}


def imported(path: pathlib.Path) -> set[str]:
    """Full names of what a file imports, also inside functions and under conditions.

    `from a import b` counts as `a.b` where that is a module of ours, else as `a`.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; name the module in full"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                ours = full.removeprefix("idlora_jax.") in modules()
                found.add(full if ours else str(node.module))
    return found


@functools.cache
def graph() -> dict[str, set[str]]:
    """Our module -> our modules it imports."""
    edges = {}
    for name, path in modules().items():
        package = {f for f in imported(path) if f.split(".")[0] == "idlora_jax"}
        ours = {f.partition(".")[2] or "__init__" for f in package}
        edges[name] = ours - {name}
    return edges


def reachable(name: str) -> set[str]:
    """Everything a module imports, directly or not, itself included."""
    seen, todo = set(), [name]
    while todo:
        here = todo.pop()
        if here not in seen:
            seen.add(here)
            todo += graph()[here]
    return seen


def level(name: str) -> int:
    package = name.split(".")[0]
    wanted = {name, f"{package}.*"}
    found = [i for i, row in enumerate(LEVELS) if wanted & set(row.split())]
    assert found, f"{name} stands in no level; add it to LEVELS and to docs/concepts.md"
    assert len(found) == 1, f"{name} stands in several levels: {found}"
    return found[0]


def test_every_module_has_one_level_and_every_import_a_module():
    for name, targets in graph().items():
        level(name)
        unknown = targets - set(modules())
        assert not unknown, f"{name} imports {sorted(unknown)}, which do not exist"


def test_no_module_imports_a_higher_level():
    upward = [
        f"{name} (level {level(name)}) imports {target} (level {level(target)})"
        for name, targets in graph().items()
        for target in sorted(targets)
        if level(target) > level(name)
    ]
    assert not upward, "\n".join(upward)


def test_there_is_no_import_cycle():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for target in sorted(graph()[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in graph():
        visit(name, ())


@pytest.mark.parametrize("name", ["training", "loop", "adapters", "guidance"])
def test_what_takes_the_network_as_an_argument_never_imports_one(name):
    networks = {m for m in reachable(name) if m.split(".")[0] == "model"}
    assert not networks


def test_networks_do_not_import_each_other():
    for name in NETWORKS & {m.removeprefix("model.") for m in modules()}:
        others = reachable(f"model.{name}") & {f"model.{n}" for n in NETWORKS - {name}}
        assert not others, f"model.{name} reaches {sorted(others)}"


def test_the_library_imports_neither_torch_nor_tensorflow():
    forbidden = {"torch", "tensorflow", "torchaudio", "torchvision", "diffusers"}
    forbidden |= {"transformers", "peft", "tests", "benchmarks"}
    scripts = [ROOT / "train.py", ROOT / "sample.py", *(ROOT / "convert").glob("*.py")]
    for path in [*modules().values(), *(s for s in scripts if s.exists())]:
        roots = {full.split(".")[0] for full in imported(path)}
        assert not roots & forbidden, f"{path} imports {sorted(roots & forbidden)}"


def test_benchmarks_load_jax_only_after_threads_were_set():
    """What the command line is read with must load neither jax nor torch."""
    folder = ROOT / "benchmarks"
    for name in ("__init__", "__main__", "arguments", "configs", "host"):
        tree = ast.parse((folder / f"{name}.py").read_text(encoding="utf-8"))
        heads = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        names = {a.name for n in heads if isinstance(n, ast.Import) for a in n.names}
        names |= {str(n.module) for n in heads if isinstance(n, ast.ImportFrom)}
        assert not {n.split(".")[0] for n in names} & {"jax", "torch"}, name
        ours = {n for n in names if n.startswith("idlora_jax.")}
        assert ours <= {"idlora_jax.config"}, f"{name} imports {sorted(ours)}"


@pytest.mark.parametrize(
    "name",
    [
        "config",
        "config_codecs",
        "config_vocoder",
        "config_text",
        "config_upsampler",
        "config_video_vae",
        "media",
        "experiment",
        "presets",
        "voices",
    ],
)
def test_configuration_and_media_need_no_jax(name):
    for module in reachable(name):
        roots = {full.split(".")[0] for full in imported(modules()[module])}
        heavy = roots & {"jax", "flax", "optax", "orbax", "chex"}
        assert not heavy, f"{name} reaches {module}, which imports {sorted(heavy)}"


def test_the_scripts_at_the_root_stay_thin():
    for script in ("train.py", "sample.py"):
        if (ROOT / script).exists():
            lines = (ROOT / script).read_text(encoding="utf-8").splitlines()
            assert len(lines) <= 150, f"{script} has {len(lines)} lines, at most 150"
