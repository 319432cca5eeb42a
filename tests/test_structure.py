"""The house rules: imports run one way, and ``import moe_interp`` is light."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "moe_interp"
# From the top of the house to its foundation: a room imports rooms of later floors, or of its own.
FLOORS = (
    ("cli", "zoo"),
    ("views",),
    ("scale",),
    ("analyses",),
    ("files",),
    ("data", "stats", "results"),
    ("audit",),
    ("checkpoint",),
    ("bridge",),
    ("opening", "restart"),
    ("remote",),
    ("model",),
    ("generation",),
    ("encode", "measured"),
    ("hosts",),
    ("interventions",),
    ("adapters", "run"),
    ("points",),
    ("options", "paths", "untrusted", "untrusted_reader"),
    ("arguments",),
    ("dims", "errors"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
HEAVY = ("nnsight", "transformer_lens", "plotly", "ray", "torch", "transformers", "xarray", "datasets")


def room(name: str) -> str | None:
    """The room of ``moe_interp.room.…``; None for anything else."""
    parts = name.split(".")
    return parts[1] if parts[0] == "moe_interp" and len(parts) > 1 else None


def imports(path: Path) -> list[str]:
    """Rooms that a file imports when it is imported or when it runs, but not for type checking alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom):
            found += [node.module or ""]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return [name for name in map(room, found) if name]


def test_imports_run_one_way():
    upwards = []
    for path in PACKAGE.rglob("*.py"):
        here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if here == "__init__":
            continue
        assert here in FLOOR, f"{path.name} has no floor"
        lazy = {("model", "audit")}  # model.audit() is a door to a module that checks the model from outside
        upwards += [
            f"{path.relative_to(PACKAGE)} imports {target}"
            for target in imports(path)
            if FLOOR[target] < FLOOR[here] and (here, target) not in lazy
        ]
    assert not upwards


def loaded(code: str) -> set[str]:
    """Heavy modules that are loaded after running some code in a fresh interpreter."""
    report = f"{code}\nimport sys\nprint(*[name for name in {HEAVY!r} if name in sys.modules])"
    return set(
        subprocess.run([sys.executable, "-c", report], check=True, capture_output=True, text=True).stdout.split()
    )


def test_importing_the_package_loads_nothing_heavy():
    assert loaded("import moe_interp") == set()


def test_the_help_of_the_commands_loads_nothing_heavy():
    help_only = "from moe_interp import cli\ntry: cli.main(['routing', '--help'])\nexcept SystemExit: print()"
    assert loaded(f"{help_only}\nprint()").isdisjoint(HEAVY)


def test_the_check_above_can_fail():
    assert loaded("import moe_interp, xarray") == {"xarray"}


def test_opening_a_model_loads_no_other_host_and_no_plotting():
    assert loaded("import moe_interp; moe_interp.wrap").isdisjoint({"nnsight", "transformer_lens", "plotly", "ray"})


PUBLIC = """
    KL LogProbability LogitDifference NLL Probability
    POINTS ByToken Corpus EditsElsewhere Family Intervention MoEError MoEModel Routing RoutingCallback RoutingWatch Run
    TunedLens ablate activation_patching apply attach attribution_patching bias causal_trace coactivation
    coalitions collect decompose_resid ensemble_similarity expert_effects expert_lens expert_profiles
    expert_similarity force from_json get_act_patch_expert_out load logit_attribution logit_attrs
    logit_directions mask mean_contributions neuron_lens noise norm_and_weight patch patch_route path_patching
    perplexity profile profile_page randomize read_corpus reference_saturation register_adapter replace report
    router_saturation routing routing_by_label routing_from_counts routing_health routing_map sample scale
    score_audit select share shared_experts spans stack_expert_results steer super_experts swap to_json
    to_tensorboard token_identity top_k trace_points train_tuned_lens transitions tuned_lens tuned_lens_quality
    vocabulary_specialization wrap
"""


def test_the_public_names_are_these_and_all_are_there():
    import moe_interp as moe

    assert set(moe.__all__) == set(PUBLIC.split())
    for name in moe.__all__:
        assert getattr(moe, name) is not None
