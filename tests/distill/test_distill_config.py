from __future__ import annotations

from pathlib import Path

import pytest

from tiue_cli.distill.config import DistillConfig, differences, forbidden_on_resume, recipe_sha256, to_yaml
from tiue_cli.distill.resolve import (
    Layer,
    all_recipes,
    config_layer,
    copy_recipe,
    find_recipe,
    known_keys,
    parse_overrides,
    parse_yaml,
    resolve_config,
)
from tiue_cli.errors import OutputError, UsageError

BASE = Layer("base", {"teacher": "papercut", "prompts": "p.txt"})


def resolve(*words: str) -> DistillConfig:
    return resolve_config([BASE, Layer("--set", parse_overrides(words))]).config


def test_yaml_out_and_in_is_the_same_config() -> None:
    config = resolve("lora.targets=[to_q, to_v]", "optimizer.learning_rate=1e-5", "ema=0.99", "size=[64, 64]")
    assert resolve_config([Layer("file", parse_yaml(to_yaml(config), where="file"))]).config == config


def test_later_layers_win_and_origins_say_so() -> None:
    resolved = resolve_config([BASE, Layer("a", {"kl": {"weight": 1.0}}), Layer("b", {"kl.weight": 2.0})])
    assert resolved.config.kl.weight == 2.0
    assert resolved.origins["kl.weight"] == "b"


def test_the_hint_for_an_unknown_setting_shows_all_of_them() -> None:
    with pytest.raises(UsageError, match="there is no setting 'zzz'") as caught:
        resolve("zzz=1")
    assert caught.value.hint == f"the settings are {', '.join(known_keys())}"


def test_exponents_without_a_point_are_numbers() -> None:
    assert resolve("optimizer.learning_rate=2e-5").optimizer.learning_rate == 2e-5


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["kl.weigth=1"], "did you mean kl.weight"),
        (["optimizer.betas=[0.9]"], "--set: optimizer.betas.1 is missing"),
        (["kl=3"], "kl"),
        (["kl.weight.x=3"], "kl.weight"),
        (["kl.weight=-1"], "--set: kl.weight"),
        (["kl.weight=.nan"], "kl.weight"),
        (["student.spacing=middle"], "student.spacing"),
        (["batch_size"], "key=value"),
        (["batch_size=[1"], "batch_size"),
        (["vsd.min_timestep=990"], "min_timestep is greater than max_timestep"),
    ],
)
def test_bad_settings_are_named(words: list[str], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve(*words)
    assert says in f"{caught.value.message} {caught.value.hint}"


def test_missing_teacher_names_its_option() -> None:
    with pytest.raises(UsageError, match="teacher is not set"):
        resolve_config([Layer("x", {"prompts": "p.txt"})])


def test_differences_are_listed_and_harmless_ones_allowed() -> None:
    before = resolve()
    after = resolve("batch_size=3", "checkpoint.every=7", "max_steps=20000")
    assert [str(found) for found in differences(before, after)] == [
        "max_steps: 10000 → 20000", "batch_size: 8 → 3", "checkpoint.every: 500 → 7",
    ]  # fmt: skip
    assert [found.key for found in forbidden_on_resume(before, after)] == ["batch_size"]


def test_more_steps_are_another_run_where_the_rate_decays_to_the_end() -> None:
    before, after = (resolve("optimizer.decay=cosine", f"max_steps={steps}") for steps in (10, 20))
    assert [found.key for found in forbidden_on_resume(before, after)] == ["max_steps"]


def test_recipe_hash_is_of_what_decides_the_weights() -> None:
    same = recipe_sha256(resolve(), "0") == recipe_sha256(resolve("tracking.every=3", "cache=/x"), "0")
    assert same
    assert recipe_sha256(resolve(), "0") != recipe_sha256(resolve("seed=1"), "0")
    assert recipe_sha256(resolve(), "0") != recipe_sha256(resolve(), "1")


def test_every_key_is_described_by_the_types() -> None:
    assert "warm_start.pairs" in known_keys()
    assert len(known_keys()) == len(set(known_keys()))


def test_every_recipe_is_a_valid_config_and_says_what_it_is_for() -> None:
    names = {recipe.name for recipe in all_recipes()}
    assert {"papercut", "sd15", "sd21", "sd15-24gb"} <= names
    for recipe in all_recipes():
        resolve_config([BASE, Layer(recipe.name, recipe.values)])
        assert recipe.text.startswith("# ") and recipe.summary.endswith(".")


def test_recipes_are_found_copied_and_never_overwritten(tmp_path: Path) -> None:
    path = copy_recipe("sd15", tmp_path / "mine.yaml")
    assert config_layer(str(path)).values == find_recipe("sd15").values == config_layer("sd15").values
    with pytest.raises(OutputError, match="exists"):
        copy_recipe("sd15", path)
    with pytest.raises(UsageError, match="there are: "):
        config_layer("sd99")
    with pytest.raises(UsageError, match="does not exist"):
        config_layer(str(tmp_path / "none.yaml"))


def test_authors_recipe_has_the_published_settings() -> None:
    config = resolve_config([BASE, config_layer("sd21")]).config
    assert (config.optimizer.learning_rate, config.lora.learning_rate) == (1e-6, 1e-3)
    assert (config.lora.rank, config.lora.alpha, config.lora.targets) == (64, 108, "attention-qv")
    assert (config.kl.kind, config.kl.weight, config.vsd.guidance) == ("sum", 0.1, 4.5)
    assert config.lora.loss == "alpha-noise"
