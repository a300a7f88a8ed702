"""A short training under Accelerate and under Lightning is a plain loop's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import funshampoo as fs
from tests.optim.runs import assert_same
from tests.optim.test_protocol import model_of

MISSING = "needs the extra: pip install 'funshampoo[integrations]'"
EPOCHS, BATCHES = 2, 6
STEPS = EPOCHS * BATCHES


def data() -> torch.utils.data.TensorDataset:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4 * BATCHES, 5, generator=generator)
    return torch.utils.data.TensorDataset(x, torch.stack([x.sum(1), x[:, 0], -x[:, 1]], 1))


def loader() -> Any:
    return torch.utils.data.DataLoader(data(), batch_size=4)


def parts(model: torch.nn.Module) -> tuple[fs.Shampoo, Any]:
    optimizer = fs.Shampoo(model.named_parameters(), lr=0.05, every=3, momentum=0.5)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=STEPS + 1)


def plain(clip: float | None = None) -> tuple[torch.nn.Module, list[float]]:
    model = model_of()
    optimizer, scheduler = parts(model)
    losses = []
    for x, y in EPOCHS * list(loader()):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        scheduler.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    return model, losses


def assert_trained_alike(model: torch.nn.Module, other: torch.nn.Module) -> None:
    assert_same(dict(model.named_parameters()), dict(other.named_parameters()))


def test_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerate = pytest.importorskip("accelerate", reason=MISSING)
    monkeypatch.chdir(tmp_path)
    accelerator = accelerate.Accelerator(cpu=True)
    model = model_of()
    prepared, optimizer, batches, scheduler = accelerator.prepare(
        model, parts(model)[0], loader(), None
    )[:4]
    assert isinstance(optimizer.optimizer, fs.Shampoo)
    scheduler = accelerator.prepare(
        torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=STEPS + 1)
    )
    losses = []
    for step, (x, y) in enumerate(EPOCHS * list(batches)):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(prepared(x), y)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(float(loss.detach()))
        if step == 5:  # a checkpoint of everything, under way
            accelerator.save_state(str(tmp_path / "saved"))
            accelerator.load_state(str(tmp_path / "saved"))
    twin, expected = plain(clip=1.0)
    assert losses == expected
    assert_trained_alike(model, twin)


@pytest.mark.filterwarnings("ignore")  # of Lightning, on its own account
def test_lightning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lightning = pytest.importorskip("lightning", reason=MISSING)
    monkeypatch.chdir(tmp_path)
    losses: list[float] = []
    batches = list(loader())

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.inner = model_of()

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            # By the step: a resumed fit of Lightning shows a batch of the old epoch once more.
            x, y = batches[self.global_step % BATCHES]
            loss = torch.nn.functional.mse_loss(self.inner(x), y)
            losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self) -> Any:
            optimizer, scheduler = parts(self.inner)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    def trainer(steps: int) -> Any:
        return lightning.Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=-1,
            gradient_clip_val=1.0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )

    twin, expected = plain(clip=1.0)
    module = Module()
    trainer(STEPS).fit(module, loader())
    assert losses == expected
    assert_trained_alike(module.inner, twin)

    # Interrupted after seven steps, and gone on with by another trainer from the file.
    first = trainer(7)
    first.fit(Module(), loader())
    first.save_checkpoint(tmp_path / "saved.ckpt")
    resumed = Module()
    trainer(STEPS).fit(resumed, loader(), ckpt_path=tmp_path / "saved.ckpt", weights_only=True)
    assert_trained_alike(resumed.inner, twin)


class Regression(torch.nn.Module):
    """A model as the Trainer of transformers takes them: its forward gives the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = model_of().float()

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.inner(x)
        return {"loss": torch.nn.functional.mse_loss(out, labels), "logits": out}


def a_trainer(path: Path, steps: int, optimizer: tuple[Any, dict[str, Any]]) -> Any:
    transformers = pytest.importorskip("transformers", reason=MISSING)
    arguments = transformers.TrainingArguments(
        str(path),
        max_steps=steps,
        save_steps=4,
        per_device_train_batch_size=4,
        learning_rate=0.02,
        warmup_steps=2,
        weight_decay=0.1,
        max_grad_norm=1.0,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        seed=1,
    )
    xs, ys = data().tensors
    rows = [{"x": x.float(), "labels": y.float()} for x, y in zip(xs, ys)]
    return transformers.Trainer(
        Regression(), arguments, train_dataset=rows, optimizer_cls_and_kwargs=optimizer
    )


SHAMPOO_OF_TRAINER = fs.Shampoo, {"every": 3, "momentum": 0.5, "lr": 0.02}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of transformers, on its own account
def test_the_trainer_of_transformers_resumes(tmp_path: Path) -> None:
    whole = a_trainer(tmp_path / "whole", 10, SHAMPOO_OF_TRAINER)
    whole.train()
    assert isinstance(whole.optimizer.optimizer, fs.Shampoo)
    assert len(whole.optimizer.param_groups) == 2  # with and without decay
    resumed = a_trainer(tmp_path / "resumed", 10, SHAMPOO_OF_TRAINER)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert_trained_alike(whole.model, resumed.model)
    start = dict(Regression().named_parameters())
    assert all(not torch.equal(p, start[n]) for n, p in whole.model.named_parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_trainer_goes_on_from_a_checkpoint_of_adamw(tmp_path: Path) -> None:
    adamw = torch.optim.AdamW, {"lr": 0.02}
    first = a_trainer(tmp_path / "first", 4, adamw)
    first.train()
    accepts = {**SHAMPOO_OF_TRAINER[1], "accept_adamw": True, "vectors": "blocks"}
    second = a_trainer(tmp_path / "second", 5, (fs.Shampoo, accepts))
    second.train(resume_from_checkpoint=str(tmp_path / "first" / "checkpoint-4"))
    optimizer = second.optimizer.optimizer
    p = optimizer.param_groups[0]["params"][0]
    weight = optimizer.state[p]["block_0_0/blocked/graft/onto/second_weight"]
    seeded = 1 - 0.999**4  # by four steps of AdamW, and then by one with our beta2
    assert abs(float(weight) - (0.99 * seeded + 0.01)) < 1e-6
    assert optimizer.param_groups[0]["lr"] == second.lr_scheduler.get_last_lr()[0]
