"""Claims about what the world's trainings and figures are made of; no training runs here."""

from __future__ import annotations

from pathlib import Path

import checkpoints
import numpy as np
import torch
import train_teacher
from diffusers import AutoencoderTiny
from layout_head import CHANNELS, LayoutHead, layout_map
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from silhouettes import plain_things, silhouette_score
from train_autoencoder import revive
from train_checker import cell_targets

from tiue_cli.papercut.world.captions import COLORS, OBJECTS, random_specs
from tiue_cli.papercut.world.scenes import compositions, render


def test_a_lump_costs_a_silhouette_and_grain_does_not():
    spec = plain_things(1)[0]  # a red star in the snow
    picture = render([spec], 4)[0]
    clean = silhouette_score(picture, spec, np.random.default_rng(0))
    rows, columns = np.nonzero(np.abs(picture.astype(int) - (224, 41, 43)).max(-1) < 40)
    lumpy = picture.copy()
    top, side = int(rows.mean()), int(columns.max())
    lumpy[top - 9 : top + 9, side - 6 : side + 10] = (224, 41, 43)
    assert clean > 0.93
    assert silhouette_score(lumpy, spec, np.random.default_rng(0)) < clean - 0.05
    assert silhouette_score(np.zeros_like(picture), spec, np.random.default_rng(0)) == 0


def test_cells_know_the_things_whose_middles_they_hold():
    drawn = compositions(random_specs(30, 5), 1)
    cells = cell_targets(drawn)
    for row, composition in enumerate(drawn):
        known = cells["object"][row] != len(OBJECTS)
        assert known.sum() == composition.scene.things  # no two middles share a cell of eight units
        assert set(cells["slot"][row][known].tolist()) == set(range(len(composition.scene.groups)))
        for slot, group in enumerate(composition.scene.slots):
            objects = cells["object"][row][cells["slot"][row] == slot]
            assert objects.tolist() == [OBJECTS.index(group.object)] * group.count


def test_reviving_wakes_dead_units_and_changes_no_picture():
    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(0, 1), num_decoder_blocks=(1, 0),
    ).eval()  # fmt: skip
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    block = next(module for module in vae.encoder.modules() if type(module).__name__ == "AutoencoderTinyBlock")
    with torch.no_grad():
        block.conv[0].bias[:3] = -100.0
        before = vae.decode(vae.encode(images).latents).sample
        assert revive(vae, images) >= 3
        torch.testing.assert_close(vae.decode(vae.encode(images).latents).sample, before)
        entering: list[torch.Tensor] = []
        block.conv[0].register_forward_hook(lambda module, inputs, output: entering.append(output))
        vae.encode(images)
    assert ((entering[0] > 0).float().mean((0, 2, 3))[:3] > 0.01).all()


def test_kept_weights_are_taken_up_again_by_every_training(tmp_path: Path, monkeypatch):
    work, kept, elsewhere = tmp_path / "work", tmp_path / "kept", tmp_path / "elsewhere"
    tensors = {"a": torch.tensor([0.5, 2.0]), "steps": torch.tensor([3])}
    for name in checkpoints.FOLDERS:
        (work / name).mkdir(parents=True)
        (work / name / "config.json").write_text("{}")
    save_file(tensors, work / "vae" / "model.safetensors", metadata={"format": "pt"})
    save_file(tensors, work / "checker.safetensors")
    metadata = {"step": "70", "spent_s": "12.5"}
    save_file(
        {"model/a": tensors["a"], "optimizer/0.step": torch.ones(1)}, work / "autoencoder.pt.safetensors", metadata
    )
    save_file({"model/a": torch.zeros(2), "ema/a": tensors["a"]}, work / "teacher.pt.safetensors", metadata)
    monkeypatch.setattr(checkpoints, "KEPT", kept)
    monkeypatch.setattr(checkpoints, "WORK", work)
    checkpoints.keep()
    assert load_file(kept / "vae" / "model.safetensors")["a"].dtype == torch.float16
    monkeypatch.setattr(checkpoints, "WORK", elsewhere)
    checkpoints.take()
    assert {path.name for path in elsewhere.iterdir()} == {path.name for path in work.iterdir()}
    for name, parts in (("autoencoder", {"model/a"}), ("teacher", {"model/a", "ema/a"})):
        taken = load_file(elsewhere / f"{name}.pt.safetensors")
        assert set(taken) == parts
        assert all(torch.equal(value, tensors["a"]) for value in taken.values())
        with safe_open(elsewhere / f"{name}.pt.safetensors", "pt") as file:
            assert file.metadata() == metadata


def test_latents_and_states_are_made_anew_where_what_they_are_made_of_changes(tmp_path: Path, monkeypatch):
    work, data = tmp_path / "work", tmp_path / "pictures"
    for folder in (data, work / "tokenizer", work / "text_encoder"):
        folder.mkdir(parents=True)
    (work / "tokenizer" / "tokenizer.json").write_text("{}")
    (work / "text_encoder" / "model.safetensors").write_bytes(b"one")
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(0, 1), num_decoder_blocks=(1, 0),
    )  # fmt: skip
    vae.save_pretrained(work / "vae")
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    for name in ("images.npy", "held_out.npy"):
        np.save(data / name, images)
    (data / "captions.txt").write_text("a\nbb\nccc\n")
    monkeypatch.setattr(train_teacher, "WORK", work)
    monkeypatch.setattr(train_teacher, "Text", lambda device: lambda said: torch.tensor([len(each) for each in said]))

    first, states = (np.array(each) for each in train_teacher.cached_inputs("cpu", data))
    assert states.tolist() == [1, 2, 3]
    (data / "captions.txt").write_text("a\nbb\ncccc\n")
    assert train_teacher.cached_inputs("cpu", data)[1].tolist() == [1, 2, 4]
    np.save(data / "images.npy", 255 - images)
    other = np.array(train_teacher.cached_inputs("cpu", data)[0])
    assert np.abs(other - first).max() > 0
    with torch.no_grad():
        vae.encoder.layers[0].weight.mul_(2)
    vae.save_pretrained(work / "vae")
    assert np.abs(train_teacher.cached_inputs("cpu", data)[0] - other).max() > 0
    assert len(list(work.glob("*.npy"))) == 2


def test_layouts_say_what_the_picture_shows():
    specs = [spec for spec in random_specs(300, 6) if spec.things == 1 and spec.groups[0].pattern is None][:20]
    pictures, drawn = render(specs, 9), compositions(specs, 9)
    for picture, composition in zip(pictures, drawn, strict=True):
        group = composition.scene.slots[0]
        layout = layout_map(composition).astype(int)
        said = {OBJECTS.index(group.object), len(OBJECTS) + tuple(COLORS).index(group.color)}
        assert set(np.flatnonzero(layout.max((1, 2)))) == said
        covered = layout[OBJECTS.index(group.object)].repeat(8, 0).repeat(8, 1)
        # Most of the paper has the group's colour, and it lies where the thing was laid, in its size.
        paper = picture[covered == 255].astype(int)
        shade = 255 * np.asarray(composition.groups[0][0].color).reshape(3)
        assert (np.abs(paper - shade).max(1) < 60).mean() > 0.45, group
        piece = composition.groups[0][0]
        rows, columns = np.nonzero(covered)
        assert abs(rows.mean() - 2 * piece.y) < piece.radius and abs(columns.mean() - 2 * piece.x) < piece.radius
        assert 0.2 < covered.sum() / 255 / (np.pi * (2 * piece.radius) ** 2) < 1.1


def test_the_layout_head_teaches_the_unet_and_leaves_nothing_in_it():
    torch.manual_seed(0)
    unet = train_teacher.make_unet(train_teacher.CONFIG | {"block_out_channels": (8, 16, 16)})
    names = list(unet.state_dict())
    head = LayoutHead(unet)
    latents, states = torch.randn(2, 12, 16, 16), torch.randn(2, 24, 160)
    truth = torch.zeros(2, CHANNELS, 16, 16)
    truth[:, 3, 4:12, 4:12] = 1
    optimizer = torch.optim.Adam([*unet.parameters(), *head.parameters()], 3e-3)
    losses = []
    for _ in range(12):
        unet(latents, 500, states)
        loss = head.loss(truth)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
    unet(latents, 500, states)
    head.loss(truth).backward()
    assert unet.down_blocks[0].resnets[0].conv1.weight.grad.abs().max() > 0
    assert list(unet.state_dict()) == names
    head.eval()
    unet(latents, 500, states)
    assert head._features is None  # drawing keeps no features
