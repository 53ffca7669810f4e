"""Numbers that cannot be are refused where a recipe is made, by the name of the option."""

from typing import Any

import pytest

from fewstep.runtime.errors import FewstepError
from fewstep.training.autoencoder import AutoencoderConfig
from fewstep.training.collapse import WatchdogConfig
from fewstep.training.teacher import TeacherConfig
from fewstep.training.trainer_config import TrainerConfig

IMPOSSIBLE: list[tuple[type[Any], dict[str, Any], str]] = [
    (TrainerConfig, {"precision": "fp8"}, "'fp8' is not supported in training: choose one of no, bf16, fp16"),
    (TrainerConfig, {"iterations": 0}, "iterations 0 is not possible: give at least 1"),
    (TrainerConfig, {"accumulation": 0}, "accumulation 0 is not possible: give at least 1"),
    (TrainerConfig, {"log_every": 0}, "log every 0 is not possible"),
    (TrainerConfig, {"minutes": -1.0}, "minutes -1 is not possible"),
    (TrainerConfig, {"warmup": -1}, "warmup -1 is not possible"),
    (TrainerConfig, {"checkpoint_minutes": float("nan")}, "checkpoint minutes nan is not possible"),
    (TrainerConfig, {"weight_decay": -0.1}, "weight decay -0.1 is not possible"),
    (TrainerConfig, {"gradient_norm": 0.0}, "gradient norm 0 is not possible: give more than 0"),
    (TrainerConfig, {"decay": 1.5}, "decay 1.5 is not possible: give 0 to 1"),
    (TrainerConfig, {"ema_decay": 1.0}, "ema decay 1 is not possible: give at least 0 and less than 1"),
    (WatchdogConfig, {"check_every": 0}, "check every 0 is not possible"),
    (WatchdogConfig, {"samples": 1}, "samples 1 is not possible: give at least 2"),
    (WatchdogConfig, {"patience": 0}, "patience 0 is not possible"),
    (WatchdogConfig, {"weak_iterations": 0}, "weak iterations 0 is not possible"),
    (WatchdogConfig, {"mean_drift": 0.0}, "mean drift 0 is not possible"),
    (WatchdogConfig, {"distance_factor": 1.0}, "distance factor 1 is not possible: give more than 1"),
    (WatchdogConfig, {"weight_growth": 0.5}, "weight growth 0.5 is not possible"),
    (WatchdogConfig, {"least_diversity": 1.2}, "least diversity 1.2 is not possible"),
    (WatchdogConfig, {"saturated_accuracy": -0.2}, "saturated accuracy -0.2 is not possible"),
    (TeacherConfig, {"layers": 0}, "layers 0 is not possible"),
    (TeacherConfig, {"heads": 3}, "3 heads are not possible: give an even number"),
    (TeacherConfig, {"guidance": -1.0}, "guidance -1 is not possible"),
    (AutoencoderConfig, {"latent_channels": 0}, "latent channels 0 is not possible"),
    (AutoencoderConfig, {"channels": (32, 64)}, "2 channels, 4 encoder layers and 4 decoder layers are not possible"),
    (AutoencoderConfig, {"channels": (0, 8, 8, 8)}, "channels 0 is not possible"),
    (AutoencoderConfig, {"decoder_layers": (0, 1, 1, -1)}, "decoder layers -1 is not possible"),
    (AutoencoderConfig, {"latent_noise": -0.1}, "latent noise -0.1 is not possible"),
    (AutoencoderConfig, {"learning_rate": 0.0}, "learning rate 0 is not possible"),
]


@pytest.mark.parametrize(
    ("config", "fields", "message"), IMPOSSIBLE, ids=[f"{kind.__name__}-{next(iter(f))}" for kind, f, _ in IMPOSSIBLE]
)
def test_a_number_that_cannot_be_is_refused(config: type[Any], fields: dict[str, Any], message: str) -> None:
    config()
    with pytest.raises(FewstepError, match=message):
        config(**fields)
