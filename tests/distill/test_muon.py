"""Muon: what it makes of an update, against singular values; what it leaves to AdamW; and going on from its state."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tiue_cli.distill.config import OptimizerSettings
from tiue_cli.distill.muon import ADAMW_SIZE, Muon, orthogonal
from tiue_cli.distill.optimizer_state import load_optimizer, save_optimizer
from tiue_cli.distill.student_trainer import make_optimizer


@pytest.mark.parametrize("shape", [(16, 144), (64, 16), (24, 24)])
def test_an_update_is_made_orthogonal(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    left, values, right = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    matrix = left @ torch.diag(torch.linspace(1, 0.2, len(values))) @ right
    made = left.T @ orthogonal(matrix) @ right.T  # in the matrix's own directions
    torch.testing.assert_close(made, torch.diag(made.diagonal()), rtol=0, atol=1e-3)
    assert ((made.diagonal() > 0.65) & (made.diagonal() < 1.25)).all()


def test_updates_of_matrices_have_the_size_of_adamws_whatever_the_gradients_size() -> None:
    for factor in (1e-4, 1e4):
        weight = torch.nn.Parameter(torch.zeros(32, 16, 3, 3))
        weight.grad = factor * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        Muon([weight], lr=0.1).step()
        assert weight.square().mean().sqrt().item() == pytest.approx(0.1 * ADAMW_SIZE, rel=0.2)


def test_vectors_and_small_matrices_are_adamws() -> None:
    def moved(optimizer: type[torch.optim.Optimizer]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((64,), (8, 8))]
        made = optimizer(parameters, lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)  # type: ignore[call-arg]
        for step in range(3):
            for parameter in parameters:
                parameter.grad = torch.sin(parameter.detach() + step)
            made.step()
        return [parameter.detach() for parameter in parameters]

    for ours, theirs in zip(moved(Muon), moved(torch.optim.AdamW), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_it_goes_on_from_its_saved_state_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    def training() -> tuple[torch.nn.Module, Muon]:
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Conv2d(8, 32, 3, padding=1), torch.nn.GELU(), torch.nn.Conv2d(32, 8, 3))
        return network, make_optimizer(network.parameters(), OptimizerSettings(name="muon", learning_rate=1e-3))

    def steps(network: torch.nn.Module, optimizer: Muon, numbers: range) -> None:
        for number in numbers:
            images = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(number))
            network(images).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    whole, optimizer = training()
    steps(whole, optimizer, range(6))
    halved, optimizer = training()
    steps(halved, optimizer, range(3))
    save_optimizer(optimizer.state_dict(), tmp_path)
    resumed, optimizer = training()
    resumed.load_state_dict(halved.state_dict())
    optimizer.load_state_dict(load_optimizer(tmp_path))
    steps(resumed, optimizer, range(3, 6))
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name
