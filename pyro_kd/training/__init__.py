"""The training loop: one for teachers and students, with checkpoints that lose nothing."""

from pyro_kd.training.cached_draws import TeacherCache
from pyro_kd.training.callbacks import Callback, CSVLogger, ProgressBar
from pyro_kd.training.compiled import CompiledELBO
from pyro_kd.training.continual import LifelongELBO, Replay, continual_objectives, generative_replay, lifelong_replay
from pyro_kd.training.curriculum import in_turn
from pyro_kd.training.distillation_objective import DistillationObjective
from pyro_kd.training.distiller import Distiller
from pyro_kd.training.elbo_objective import ELBOObjective
from pyro_kd.training.evaluation import Evaluation
from pyro_kd.training.history import History
from pyro_kd.training.layer_fitting import fit_layers
from pyro_kd.training.objectives import Objective
from pyro_kd.training.options import Checkpoints, Validation
from pyro_kd.training.schedules import cosine, linear, switch
from pyro_kd.training.several_teachers import averaged_objectives
from pyro_kd.training.starts import best_start
from pyro_kd.training.teacher_cache import cache_teacher
from pyro_kd.training.trackers import FigureLogger, MLflowLogger, TensorBoardLogger, WandbLogger
from pyro_kd.training.trainer import Trainer
from pyro_kd.training.weight_selection import select_weights

__all__ = [
    "CSVLogger",
    "Callback",
    "Checkpoints",
    "CompiledELBO",
    "DistillationObjective",
    "Distiller",
    "ELBOObjective",
    "Evaluation",
    "FigureLogger",
    "History",
    "LifelongELBO",
    "MLflowLogger",
    "Objective",
    "ProgressBar",
    "Replay",
    "TeacherCache",
    "TensorBoardLogger",
    "Trainer",
    "Validation",
    "WandbLogger",
    "averaged_objectives",
    "best_start",
    "cache_teacher",
    "continual_objectives",
    "cosine",
    "fit_layers",
    "generative_replay",
    "in_turn",
    "lifelong_replay",
    "linear",
    "select_weights",
    "switch",
]
