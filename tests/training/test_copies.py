"""Copies of a teacher: equal at first, then each goes its own way; low-rank ones share the teacher's weights."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.runtime.denoiser import Denoiser
from fewstep.runtime.errors import FewstepError
from fewstep.runtime.families import Model, sana, stable_diffusion
from fewstep.runtime.schedule import VP, Flow
from fewstep.training.batches import ConditionedBatch
from fewstep.training.copies import FullCopies, LoRACopies, merged, save_adapter
from fewstep.training.method import Copy, CopyMaker, Task
from fewstep.training.methods import get_method
from fewstep.training.trainer import train
from fewstep.training.trainer_config import TrainerConfig

from ..tiny_models import tiny_transformer

pytest.importorskip("peft")
RANK = 3
TRAINER = TrainerConfig(iterations=2, warmup=1, precision="no", log_every=1, gradient_checkpointing=True)


def tiny_unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        block_out_channels=(8,),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )


@dataclass(frozen=True)
class Teacher:
    """A tiny teacher, a batch of its kind, and the layers that low-rank adapters change."""

    model: Model
    family: ModuleType
    batch: ConditionedBatch
    adapted: int

    def task(self, copies: CopyMaker, folder: Path) -> Task:
        condition = {name: value[:1] for name, value in self.batch.condition.items()}
        return Task(
            teacher=self.model.denoiser,
            negative=condition,
            guidance=2.0,
            steps=1,
            sample_shape=self.model.sample_shape,
            batches=lambda step, phase: self.batch,
            copy=copies,
            feature_block=self.family.feature_block,
            decoder=nn.Identity(),
            folder=folder,
            device=torch.device("cpu"),
        )

    def __call__(self, denoiser: Denoiser) -> Tensor:
        return denoiser(self.batch.x_0, torch.tensor([0.3, 0.9]), self.batch.condition)


@pytest.fixture(params=["sana", "stable_diffusion"])
def teacher(request: pytest.FixtureRequest) -> Teacher:
    x_0, mask = torch.randn(2, 4, 4, 4), torch.ones(2, 5)
    if request.param == "sana":
        network, family, width, adapted = tiny_transformer(), sana, 384, 2 * 4 + 2
        denoiser = Denoiser(sana.network_call(network), Flow(), "flow_prediction")
    else:
        network, family, width, adapted = tiny_unet(), stable_diffusion, 16, 4 * (2 * 4 + 2)
        denoiser = Denoiser(stable_diffusion.network_call(network), VP(torch.linspace(0.99, 0.01, 1000)), "epsilon")
    network.eval().requires_grad_(False)
    condition = {"encoder_hidden_states": torch.randn(2, 5, width), "encoder_attention_mask": mask}
    identity = nn.Identity()
    model = Model(network, denoiser, identity, identity, (4, 4, 4), refuse)
    return Teacher(model, family, ConditionedBatch(x_0, condition), adapted)


def refuse() -> Any:
    raise AssertionError("nothing here asks for a text encoder")


@pytest.fixture
def lora(teacher: Teacher) -> LoRACopies:
    return LoRACopies(teacher.model, teacher.family, RANK)


def changed(trained: Copy, scale: float = 0.1) -> Copy:
    """Random weights in the place of the copy's."""
    with torch.no_grad():
        for weight in trained.module.parameters():
            weight.add_(scale * torch.randn_like(weight))
    return trained


@pytest.mark.parametrize("kind", [FullCopies, lambda model, family: LoRACopies(model, family, RANK)])
def test_a_copy_begins_as_the_teacher_and_leaves_it_as_it_was(teacher: Teacher, kind: Callable[..., CopyMaker]) -> None:
    before = teacher(teacher.model.denoiser)
    copies = kind(teacher.model, teacher.family)
    student, fake = copies("student"), copies("fake")
    assert torch.equal(teacher(student.denoiser), before)
    changed(student)
    assert not torch.allclose(teacher(student.denoiser), before, atol=1e-4)
    assert torch.equal(teacher(fake.denoiser), before)
    assert torch.equal(teacher(teacher.model.denoiser), before)


def test_adapters_are_the_only_weights_of_their_own(teacher: Teacher, lora: LoRACopies) -> None:
    student, fake = lora("student"), lora("fake")
    weights = set(teacher.model.network.parameters())
    for each in (student, fake):
        own = set(each.module.parameters())
        assert set(each.network.parameters()) - weights == own
        assert {weight for weight in each.network.parameters() if weight.requires_grad} == own
        assert weights < set(each.network.parameters()) | own
    assert set(student.module.parameters()).isdisjoint(fake.module.parameters())


def test_every_attention_and_feed_forward_layer_has_an_adapter(teacher: Teacher, lora: LoRACopies) -> None:
    adapter = lora("student").module
    assert len(list(adapter.children())) == teacher.adapted
    layers = [teacher.model.network.get_submodule(path.replace("/", ".")) for path, _ in adapter.named_children()]
    expected = sum(RANK * (layer.weight.shape[0] + layer.weight[0].numel()) for layer in layers)  # type: ignore[index,operator,union-attr]
    assert sum(weight.numel() for weight in adapter.parameters()) == expected


def gradients(teacher: Teacher, student: Copy, between: Callable[[], object]) -> list[Tensor]:
    student.module.zero_grad()
    x_0 = teacher(student.denoiser)
    between()
    x_0.square().mean().backward()
    return [weight.grad.clone() for weight in student.module.parameters() if weight.grad is not None]


def test_calls_of_the_others_do_not_disturb_a_backward_pass(teacher: Teacher, lora: LoRACopies) -> None:
    """Nor when activations are computed again in that pass."""
    student, fake = changed(lora("student")), changed(lora("fake"))
    alone = gradients(teacher, student, lambda: None)
    assert len(alone) == 2 * teacher.adapted
    assert all(gradient.any() for gradient in alone[1::2])

    def others() -> None:
        teacher(teacher.model.denoiser)
        teacher(fake.denoiser).sum().backward()

    torch.testing.assert_close(gradients(teacher, student, others), alone, rtol=0, atol=0)
    student.module.enable_gradient_checkpointing()  # type: ignore[operator]
    assert student.network.is_gradient_checkpointing
    assert not teacher.model.network.is_gradient_checkpointing
    torch.testing.assert_close(gradients(teacher, student, others), alone)


def test_fused_is_an_ordinary_network_with_the_same_output(teacher: Teacher, lora: LoRACopies, tmp_path: Path) -> None:
    student = changed(lora("student"))
    expected = teacher(student.denoiser)
    fused: Any = merged(student)
    denoiser = replace(student.denoiser, network=teacher.family.network_call(fused))
    torch.testing.assert_close(teacher(denoiser), expected, rtol=1e-6, atol=1e-6)
    assert fused.state_dict().keys() == teacher.model.network.state_dict().keys()
    assert torch.equal(teacher(student.denoiser), expected)
    fused.save_pretrained(tmp_path)
    opened = type(fused).from_pretrained(tmp_path)
    torch.testing.assert_close(opened.state_dict(), fused.state_dict())


def test_a_full_copy_is_saved_as_it_is(teacher: Teacher) -> None:
    student = FullCopies(teacher.model, teacher.family)("student")
    assert merged(student) is student.network


def test_diffusers_reads_the_adapter_onto_the_teacher(teacher: Teacher, lora: LoRACopies, tmp_path: Path) -> None:
    student = changed(lora("student"))
    save_adapter(student, tmp_path)
    network: Any = teacher.model.network
    prefix = "unet" if teacher.family is stable_diffusion else "transformer"
    network.load_lora_adapter(tmp_path, prefix=prefix, weight_name="pytorch_lora_weights.safetensors")
    torch.testing.assert_close(teacher(teacher.model.denoiser), teacher(student.denoiser))


@pytest.mark.parametrize("method", ["dmd2", "lcm", "scott"])
def test_methods_train_adapters_and_go_on_from_checkpoints(
    teacher: Teacher, lora: LoRACopies, method: str, tmp_path: Path
) -> None:
    before = {name: value.clone() for name, value in teacher.model.network.state_dict().items()}
    config = get_method(method).Config()

    def trained(iterations: int) -> tuple[Copy, Copy | None]:
        torch.manual_seed(0)
        made: dict[str, Copy] = {}

        def copies(name: str, embed_guidance: bool = False) -> Copy:
            made[name] = lora(name, embed_guidance)
            return made[name]

        stage = next(get_method(method).stages(teacher.task(copies, tmp_path), config))
        trainer = replace(TRAINER, iterations=iterations)
        train(
            stage.phases, lambda s, p: teacher.batch, stage.student.module, trainer, tmp_path, averages=stage.averages
        )
        return stage.student, made.get("fake")

    student, fake = trained(2)
    assert student.network.is_gradient_checkpointing
    torch.testing.assert_close(teacher.model.network.state_dict(), before, rtol=0, atol=0)
    assert not torch.equal(teacher(student.denoiser), teacher(teacher.model.denoiser))
    if fake:
        assert not torch.equal(teacher(fake.denoiser), teacher(student.denoiser))
    size = sum(weight.numel() for weight in teacher.model.network.parameters())
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert sum(value.numel() for value in state["turns"][-1]["module"].values()) < size
    again, _ = trained(2)
    torch.testing.assert_close(again.module.state_dict(), student.module.state_dict(), rtol=0, atol=0)


def test_training_one_adapter_moves_no_other(teacher: Teacher, lora: LoRACopies) -> None:
    student, fake = changed(lora("student")), changed(lora("fake"))
    before = teacher(fake.denoiser).detach()
    optimizer = torch.optim.AdamW(student.module.parameters(), 1e-2)
    (teacher(student.denoiser) - before).square().mean().backward()
    optimizer.step()
    assert torch.equal(teacher(fake.denoiser), before)


def test_what_adapters_cannot_do_is_refused(teacher: Teacher, lora: LoRACopies) -> None:
    with pytest.raises(FewstepError, match="cannot add an input for the guidance scale"):
        lora("student", embed_guidance=True)
    with pytest.raises(FewstepError, match="lora_rank -1 is not possible"):
        replace(lora, rank=-1)("student")
    plain = replace(teacher.model, network=nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(FewstepError, match="Sequential has no attention that adapters fit"):
        replace(lora, model=plain)("student")
