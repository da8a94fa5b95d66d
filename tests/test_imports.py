"""Law 7 and the one rule of imports: imports run downwards only, TensorFlow stays in the bridge."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
BRIDGE = "jaxlm.data.seqio_bridge"
MODELLING = "jaxlm.checkpoints.huggingface.modeling_jaxlm"  # travels with exported models; nothing imports it here
DEVICE_HALF = ("jaxlm.objectives.losses", "jaxlm.objectives.distillation")  # of objectives; the rest is the host's
TENSORFLOW = {"tensorflow", "tensorflow_text", "seqio", "t5", "clu", "keras"}

# What each room may import of the others (itself always). docs/architecture.md gives the reasons.
GROUND = {"jaxlm.architecture", "jaxlm.chips", "jaxlm.exit_status", "jaxlm.piecewise"}
DEVICE = {"pallas_kernels", "jaxlm.parallel", "jaxlm.layers", "jaxlm.models"}
MAY_IMPORT = {
    "pallas_kernels": set(),
    "jaxlm.architecture": set(),
    "jaxlm.chips": set(),
    "jaxlm.exit_status": set(),
    "jaxlm.piecewise": set(),
    "jaxlm.configuration": set(),
    "jaxlm.parallel": {"pallas_kernels"},
    "jaxlm.layers": {"pallas_kernels", "jaxlm.parallel"} | GROUND,
    "jaxlm.models": {"pallas_kernels", "jaxlm.parallel", "jaxlm.layers"} | GROUND,
    "jaxlm.objectives": {"pallas_kernels"} | GROUND,
    "jaxlm.data": {"jaxlm.objectives"} | GROUND,
    "jaxlm.checkpoints": DEVICE | GROUND | {"jaxlm.configuration", "jaxlm.data"},
    "jaxlm.decoding": DEVICE | GROUND | {"jaxlm.objectives", "jaxlm.data"},
    "jaxlm.training": DEVICE | GROUND | {"jaxlm.objectives", "jaxlm.data", "jaxlm.checkpoints", "jaxlm.decoding"},
    "jaxlm.run": DEVICE
    | GROUND
    | {
        "jaxlm.checkpoints",
        "jaxlm.configuration",
        "jaxlm.data",
        "jaxlm.decoding",
        "jaxlm.objectives",
        "jaxlm.training",
    },
    "jaxlm.studies": DEVICE
    | GROUND
    | {"jaxlm.checkpoints", "jaxlm.configuration", "jaxlm.evaluation", "jaxlm.training", "jaxlm.run"},
    "jaxlm.planning": DEVICE | GROUND | {"jaxlm.objectives", "jaxlm.training", "jaxlm.run"},
    "jaxlm.evaluation": DEVICE
    | GROUND
    | {"jaxlm.checkpoints", "jaxlm.objectives", "jaxlm.data", "jaxlm.decoding", "jaxlm.training"},
}


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str | None:
    """The key of MAY_IMPORT that holds `module`; None for entry points and foreign modules."""
    parts = module.split(".")
    return next((name for name in (".".join(parts[:2]), parts[0]) if name in MAY_IMPORT), None)


def sources(*folders: str) -> dict[str, ast.Module]:
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return {module_name(path): ast.parse(path.read_text(), str(path)) for path in paths}


HOUSE = sources("jaxlm", "pallas_kernels")
WITH_TOOLS = HOUSE | sources("tools", "benchmarks", "tests")


def imports(tree: ast.Module, module: str, *, at_import: bool = False) -> set[str]:
    """Modules that `tree` imports, outside `if TYPE_CHECKING`; with at_import, only those not inside functions.

    `from a import b` counts as `a.b`: whether b is a module cannot be told from here, and a prefix is enough.
    """
    found = set()

    def visit(node):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.orelse:
                visit(child)
            return
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join(filter(None, [*module.split(".")[: -node.level], base]))
            found.update(f"{base}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def test_imports_are_seen():
    tree = ast.parse(
        "import jax.numpy as jnp\nfrom . import losses\nif TYPE_CHECKING:\n  import flax\n"
        "def f():\n  from jaxlm.layers import norms"
    )
    assert imports(tree, "jaxlm.objectives.base") == {"jax.numpy", "jaxlm.objectives.losses", "jaxlm.layers.norms"}
    assert imports(tree, "jaxlm.objectives.base", at_import=True) == {"jax.numpy", "jaxlm.objectives.losses"}


def test_rooms_have_no_cycles():
    order = []
    while len(order) < len(MAY_IMPORT):
        ready = [name for name in MAY_IMPORT if name not in order and MAY_IMPORT[name] <= set(order)]
        assert ready, f"a cycle among {set(MAY_IMPORT) - set(order)}"
        order += ready


@pytest.mark.parametrize("module", HOUSE)
def test_imports_run_downwards(module):
    own = room(module)
    if own is None:
        assert module.count(".") < 2, f"{module} is in no room: add its package to MAY_IMPORT with what it may import"
        return
    for imported in imports(HOUSE[module], module):
        if imported.split(".")[0] not in ("jaxlm", "pallas_kernels"):
            continue
        other = room(imported)
        assert other == own or other in MAY_IMPORT[own], f"{module} imports {imported}, which lies above {own}"


OPTIONAL = {"pallas_kernels.backends.tokamax"}


@pytest.mark.parametrize("module", [m for m in HOUSE if room(m) in GROUND | {"pallas_kernels"}])
def test_ground_floor_needs_little(module):
    allowed = {"jax", "numpy", "pallas_kernels"} if room(module) == "pallas_kernels" else set()
    import sys

    at_import = module in OPTIONAL  # what it adapts is imported when it is used, and by it alone
    foreign = {name.split(".")[0] for name in imports(HOUSE[module], module, at_import=at_import)}
    foreign -= set(sys.stdlib_module_names)
    assert foreign <= allowed, f"{module} imports {foreign - allowed}"


@pytest.mark.parametrize("module", [m for m in HOUSE if room(m) in ("jaxlm.objectives", "jaxlm.data")])
def test_host_half_needs_no_jax(module):
    if module in (BRIDGE, *DEVICE_HALF):
        return
    foreign = {name.split(".")[0] for name in imports(HOUSE[module], module, at_import=True)}
    assert not foreign & {"jax", "jaxlib", "flax", "optax"}, f"{module} imports jax at module scope"


@pytest.mark.parametrize("module", [m for m in WITH_TOOLS if not m.startswith(("tests.", "benchmarks."))])
def test_tensorflow_is_imported_by_the_bridge_alone(module):
    foreign = {name.split(".")[0] for name in imports(WITH_TOOLS[module], module)}
    assert module == BRIDGE or not foreign & TENSORFLOW, f"{module} imports {foreign & TENSORFLOW}"


@pytest.mark.parametrize("module", WITH_TOOLS)
def test_meshes_are_made_in_one_place(module):
    """`jax.make_mesh` makes Explicit axes, under which `embedding[ids]` raises: `parallel.mesh` makes Auto ones."""
    names = {node.attr for node in ast.walk(WITH_TOOLS[module]) if isinstance(node, ast.Attribute)}
    names |= {name.split(".")[-1] for name in imports(WITH_TOOLS[module], module)}
    assert module == "jaxlm.parallel.mesh" or "make_mesh" not in names, f"{module} makes a mesh of its own"


def names_in(tree: ast.Module) -> set[str]:
    """All that a module defines, assigns or imports, wherever in it."""
    named = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    named |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    imported = (node.names for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))
    return named | {alias.asname or alias.name.partition(".")[0] for aliases in imported for alias in aliases}


@pytest.mark.parametrize("module", WITH_TOOLS)
def test_what_is_imported_from_the_repository_is_there(module):
    """Also where nothing runs the import, as in a benchmark."""
    for node in ast.walk(WITH_TOOLS[module]):
        if isinstance(node, ast.ImportFrom) and node.module in WITH_TOOLS:
            defined = names_in(WITH_TOOLS[node.module])
            missing = [
                a.name for a in node.names if a.name not in defined and f"{node.module}.{a.name}" not in WITH_TOOLS
            ]
            assert not missing, f"{module} imports {missing} from {node.module}, which has none"


@pytest.mark.parametrize("module", WITH_TOOLS)
def test_no_private_jax(module):
    private = {name for name in imports(WITH_TOOLS[module], module) if name.startswith("jax._src")}
    assert not private, f"{module} imports {private}"


def test_no_cache_of_tensorflow_at_start(run_python):
    """Importing everything but the bridge loads no TensorFlow (it costs 10 seconds), not even through a library."""
    # The adapter for lm-evaluation-harness needs an extra, and is imported by the harness alone.
    left_out = {BRIDGE, MODELLING, "jaxlm.evaluation.harness"}
    modules = [module for module in HOUSE if module not in left_out and not module.endswith("__main__")]
    code = f"import importlib, sys\nfor m in {modules}: importlib.import_module(m)\n"
    code += f"print(sorted({TENSORFLOW} & set(sys.modules)))"
    assert run_python(code).stdout.strip().splitlines()[-1] == "[]"


def test_data_workers_start_without_jax(run_python):
    rooms = {"jaxlm.objectives", "jaxlm.data", "jaxlm.configuration"} | GROUND
    modules = [m for m in HOUSE if room(m) in rooms and m not in (BRIDGE, *DEVICE_HALF)]
    modules = [m for m in modules if not m.endswith("__main__")]
    code = f"import importlib, sys\nfor m in {modules}:\n  importlib.import_module(m)\n"
    code += "  assert 'jax' not in sys.modules, m + ' imports jax (grain does so too: import it inside a function)'"
    run_python(code)
