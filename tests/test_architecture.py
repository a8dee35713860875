"""The rooms of the package: which may import from which, and every public name."""

import ast
import importlib
import re

import pytest

import pyro_kd
from tests.support.package_files import ROOT

PACKAGE = ROOT / "pyro_kd"

# A room imports from itself and from the rooms above it.
ROOMS = (
    "errors",
    "utils",
    "noise",
    "isolation",
    "capture",
    "divergences",
    "sites",
    "teachers",
    "losses",
    "metrics",
    "datasets",
    "training",
    "diagnosis",
    "export",
    "plots",
)

# Rooms that stand side by side, and know nothing of each other.
APART = [
    ("capture", "noise"),
    ("capture", "divergences"),
    ("divergences", "isolation"),
    ("sites", "isolation"),
    ("sites", "capture"),
    ("teachers", "capture"),
    ("teachers", "divergences"),
    ("teachers", "sites"),
    ("metrics", "capture"),
    ("training", "diagnosis"),
    ("export", "diagnosis"),
    ("export", "metrics"),
    ("plots", "export"),
    *(("datasets", room) for room in ROOMS if room not in ("errors", "utils", "datasets")),
]

PUBLIC = {
    "pyro_kd": "Distiller DrawsKD LocalKD MarginalKD MultiSampleKD NoiseRecord OnPolicyKD PyroKDError SiteTerm SurrogateKD TeacherCache bound_report cache_teacher check datasets divergences errors freeze metrics mixture_of plots posterior_predictive record_noise register_sampler replay_noise site_report stored_draws teachers to_inference_data training",
    "pyro_kd.capture": "Capture DeferredReads MAX_GRAPHS Outputs Run",
    "pyro_kd.datasets": "Digits DiscreteNetwork IMAGES Images OldFaithful STROKES Standardisation Strokes bif celeba cifar10 digits digits_32 "
    "hershey_strokes iam_ondb iam_ondb_forms idx images_npz journey load_images load_strokes old_faithful stroke3 "
    "svhn",
    "pyro_kd.diagnosis": "BoundReport CheckReport InferencePair SiteReport bound_report check site_report to_inference_data",
    "pyro_kd.divergences": "Divergence DivergenceFunction cross_entropy jensen_shannon kl reverse_kl wasserstein2",
    "pyro_kd.errors": "ArchitectureMismatchError BatchesExhaustedError CheckError CheckpointError CorruptDataError "
    "CorruptExportError ExportMismatchError "
    "FolderInUseError InvalidParameterError InvalidProgramError MissingDataError MissingDeviceError "
    "NoParametersError NoTargetsError NoiseMismatchError NonFiniteLossError ObservedValueError "
    "OptimiserMismatchError PlateMismatchError ProcessGroupError ProcessMismatchError PyroKDError RunMismatchError SharedParameterError "
    "SupportMismatchError TeacherCacheError UnknownTargetError UnpairedSiteError UnsupportedDivergenceError "
    "UnsupportedExportError UnsupportedGradientError UnsupportedNoiseError WeightSelectionError ",
    "pyro_kd.export": "Description ExportReport Exported NoiseInput OnnxProgram Value draw_noise export_density export_sampler load load_onnx",
    "pyro_kd.losses": "DistillationLoss DistillationModule DrawsKD LocalKD MarginalKD MultiSampleKD OnPolicyKD PairedRun Particle SiteTerm SiteTerms SurrogateKD "
    "run_pair terms_of",
    "pyro_kd.metrics": "Classifier Estimate KLEstimate PrincipalComponents count_kl density_ratio_kl emd fid "
    "frechet_distance gaussian histogram_kl laplacian marginal_kl marginal_log_prob mmd "
    "nearest_neighbour_accuracy rational_quadratic",
    "pyro_kd.plots": "densities loss_curves paired_images pairs sample_grid site_bars",
    "pyro_kd.teachers": "UniformIndex mixture_of on_device posterior_predictive stored_draws",
    "pyro_kd.training": "CSVLogger Callback Checkpoints CompiledELBO DistillationObjective Distiller ELBOObjective Evaluation "
    "FigureLogger History LifelongELBO MLflowLogger Objective ProgressBar Replay TeacherCache TensorBoardLogger Trainer Validation WandbLogger "
    "averaged_objectives best_start cache_teacher continual_objectives cosine fit_layers generative_replay in_turn lifelong_replay linear "
    "select_weights switch",
}


def imports():
    """(file, importing room, imported room) for each import of the package in the package."""
    for path in sorted(PACKAGE.rglob("*.py")):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "pyro_kd":
                names = [node.module] if "." in node.module else [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name.split(".")[0] == "pyro_kd"]
            for name in names:
                if "." in name:
                    yield path.relative_to(ROOT), room, name.split(".")[1]


def test_every_folder_is_a_room():
    found = {
        path.name.removesuffix(".py")
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert found - {"__init__"} == set(ROOMS)


def test_imports_go_one_way():
    wrong = [
        f"{file}: {room} imports from {other}"
        for file, room, other in imports()
        if room != "__init__" and ROOMS.index(other) > ROOMS.index(room)
    ]
    assert not wrong, "\n".join(wrong)


def test_neighbours_do_not_import_each_other():
    wrong = [f"{file}: {room} imports from {other}" for file, room, other in imports() if (room, other) in APART]
    assert not wrong, "\n".join(wrong)


def test_no_circular_imports():
    graph = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        graph[name] = {
            node.module
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pyro_kd")
        } - {name, "pyro_kd"}
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done or name not in graph:
            return
        path.append(name)
        for other in graph[name]:
            visit(other)
        path.pop()
        done.add(name)

    for name in graph:
        visit(name)


def test_no_module_of_tests_imports_a_test_module():
    wrong = [
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("*.py")
        if re.search(
            r"^\s*(from tests[\w.]*\.test_\w+ import|from tests[\w.]* import test_\w+|import tests[\w.]*\.test_)",
            path.read_text("utf-8"),
            re.M,
        )
    ]
    assert not wrong


def test_every_room_has_tests_and_every_folder_of_tests_a_reason():
    folders = {path.name for path in (ROOT / "tests").iterdir() if (path / "__init__.py").exists()}
    rooms = {room for room in ROOMS if (PACKAGE / room / "__init__.py").exists()}
    assert folders == rooms | {"benchmarks", "examples", "integration", "models", "programs", "support", "third_party"}


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_change_only_on_purpose(module):
    """The whole interface: a name added, removed or renamed changes this list, the docs and CHANGELOG.md."""
    found = importlib.import_module(module)
    assert sorted(found.__all__) == sorted(PUBLIC[module].split())
    for name in found.__all__:
        assert hasattr(found, name), name


def test_every_public_module_is_listed():
    packages = {f"pyro_kd.{path.name}" for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    public = {name for name in packages if getattr(importlib.import_module(name), "__all__", None)}
    assert public | {"pyro_kd", "pyro_kd.errors", "pyro_kd.plots"} == set(PUBLIC)


def test_files_are_short_or_say_why():
    """A file above 360 lines gives the reason in its docstring."""
    reason = re.compile("in one file|file is long because")
    for path in [path for folder in ("pyro_kd", "examples", "models", "tests") for path in (ROOT / folder).rglob("*.py")]:
        text = path.read_text(encoding="utf-8")
        is_long = len(text.splitlines()) > 360
        assert not is_long or reason.search(ast.get_docstring(ast.parse(text)) or ""), (
            f"{path} is long, and does not say why"
        )


def test_the_version_is_a_string():
    assert re.fullmatch(r"\d+\.\d+\.\d+", pyro_kd.__version__)
