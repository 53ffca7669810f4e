"""`fewstep train`: autoencoder, teacher and students."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Train an autoencoder, a teacher or a student; run the same command again to go on.", no_args_is_help=True
)

Data = Annotated[Path, typer.Option(help="Captioned pictures: a built data set, a folder, or WebDataset shards.")]
Out = Annotated[
    Path, typer.Option(help="Directory to write; its folder training/ holds checkpoint, curve and samples.")
]
Minutes = Annotated[float, typer.Option(min=0, help="Budget of training time, resumed time included; 0: no limit.")]
Iterations = Annotated[int, typer.Option(min=1, help="Stop after this many iterations.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Samples an iteration.")]
Seed = Annotated[int, typer.Option(min=0, help="Of weights, order, noise.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto.")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0: torch's choice.")]


@app.command()
def autoencoder(
    data: Data,
    out: Out,
    minutes: Minutes = 15,
    iterations: Iterations = 1_000_000,
    batch_size: BatchSize = 16,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """The small autoencoder whose latents the built-in teacher works in."""
    from ..training.autoencoder import AutoencoderConfig
    from ..training.train_autoencoder import train_autoencoder
    from ..training.trainer import TrainerConfig, training_device

    trainer = TrainerConfig(iterations=iterations, minutes=minutes, seed=seed, warmup=100, ema_decay=0.99)
    train_autoencoder(data, out, AutoencoderConfig(), trainer, batch_size, training_device(device, threads))


@app.command()
def teacher(
    data: Data,
    autoencoder: Annotated[Path, typer.Option(help="Directory that `fewstep train autoencoder` wrote.")],
    out: Out,
    minutes: Minutes = 60,
    iterations: Iterations = 1_000_000,
    batch_size: BatchSize = 32,
    learning_rate: Annotated[float, typer.Option(min=0, help="Peak rate of AdamW.")] = 1e-3,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """A text-conditional flow-matching teacher."""
    from ..training.methods.flow_matching import FlowMatchingConfig
    from ..training.train_teacher import TeacherConfig, train_teacher
    from ..training.trainer import TrainerConfig, training_device

    trainer = TrainerConfig(iterations=iterations, minutes=minutes, seed=seed)
    method = FlowMatchingConfig(learning_rate=learning_rate)
    train_teacher(
        data, autoencoder, out, TeacherConfig(), method, trainer, batch_size, training_device(device, threads)
    )


@app.command()
def dmd2(
    teacher: Annotated[Path, typer.Option(help="Directory of the teacher.")],
    data: Data,
    out: Out,
    steps: Annotated[int, typer.Option(min=1, max=8, help="Network evaluations of the student.")] = 1,
    minutes: Minutes = 40,
    iterations: Iterations = 1_000_000,
    batch_size: BatchSize = 16,
    guidance: Annotated[
        float | None, typer.Option(help="Teacher's guidance scale; default: the teacher's own.")
    ] = None,
    student_every: Annotated[
        int, typer.Option(min=1, help="Fake-score updates per student update (paper: 5 to 10).")
    ] = 2,
    learning_rate: Annotated[float, typer.Option(min=0, help="Of student and fake score.")] = 1e-4,
    seed: Seed = 0,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """A one- to eight-step student by improved distribution matching distillation (arXiv 2405.14867)."""
    from ..runtime.artefact import read_card
    from ..training.methods.dmd2 import DMD2Config
    from ..training.train_student import train_dmd2
    from ..training.trainer import TrainerConfig, training_device

    method = DMD2Config(
        guidance=read_card(teacher).guidance if guidance is None else guidance,
        student_every=student_every,
        student_learning_rate=learning_rate,
        fake_learning_rate=learning_rate,
    )
    trainer = TrainerConfig(
        iterations=iterations, minutes=minutes, seed=seed, warmup=50, decay=0.3, ema_decay=0.995, weight_decay=0.0
    )
    train_dmd2(teacher, data, out, steps, method, trainer, batch_size, training_device(device, threads))
