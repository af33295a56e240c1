"""One declaration per option: the check, the flag and the row of docs/options.md follow from it.

`python -m tests.test_settings` writes docs/options.md anew.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from deepseek.cli.atlas import ProfileOptions, SampleOptions
from deepseek.cli.chat import ChatOptions
from deepseek.cli.common import AnswerOptions, MachineOptions, ModelOptions
from deepseek.cli.experts import CalibrationOptions, ExportOptions, FolderOptions, SignatureOptions
from deepseek.cli.infer import PromptOptions
from deepseek.cli.info import InfoOptions
from deepseek.cli.knowledge import AddOptions, SearchOptions
from deepseek.cli.merge import MergeOptions
from deepseek.cli.pull import PullOptions
from deepseek.cli.quantize import QuantizeOptions
from deepseek.cli.route import RouteOptions, SeedOptions
from deepseek.cli.train import PredictOptions, RanksOptions
from deepseek.cli.upcycle import UpcycleOptions
from deepseek.data.settings import (
    DedupSettings,
    LabelSettings,
    PackSettings,
    PipelineConfig,
    SplitSettings,
    StageOptions,
    ValidateSettings,
)
from deepseek.deepopt.settings import Line, RunConfig, TrainConfig
from deepseek.deepopt.trainer import Trainer
from deepseek.engine.options import EngineOptions
from deepseek.engine.sampling_params import SamplingParams
from deepseek.errors import ConfigError, RequestError
from deepseek.evaluate.options import EvalOptions
from deepseek.model.adapter import LoraSpec
from deepseek.serve.options import ServeOptions
from deepseek.settings import COUNT, Option, Settings, check, declared, is_number, table
from deepseek.tune.lora import LoRAAdapter
from deepseek.tune.settings import RunOptions, TuneConfig
from deepseek.upcycling.carve_settings import CalibrationConfig, CarveConfig, HealConfig, LatentConfig
from deepseek.upcycling.settings import GrowConfig
from deepseek.watch.options import TerminalOptions, WatchOptions
from tests.helpers import ROOT

PAGE = ROOT / "docs" / "options.md"
TITLES = {
    RunConfig: "Training: `Trainer`, `deepseek train`", TuneConfig: "Tuning: `MoEFineTuner`, `deepseek tune`",
    RunOptions: "Runs and streams of tuning: `MoEFineTuner`, `deepseek tune`",
    LoRAAdapter: "Adapters: `LoRAAdapter`, `deepseek tune --adapter FIELD=VALUE`",
    EngineOptions: "Engine: `LLM`, `deepseek infer`, `chat`, `serve`",
    ModelOptions: "Loading: `LLM`, `deepseek infer`, `chat`, `serve`", SamplingParams: "Sampling: `SamplingParams`",
    ServeOptions: "Serving: `ServeOptions`, `deepseek serve`",
    WatchOptions: "Monitoring: `WatchOptions`, `deepseek serve`",
    TerminalOptions: "`deepseek watch`", PromptOptions: "`deepseek infer`", ChatOptions: "`deepseek chat`",
    AnswerOptions: "Experts of an answer: `deepseek infer`, `chat`", InfoOptions: "`deepseek info`",
    ProfileOptions: "`deepseek atlas profile`; the sample: `compare`, too", QuantizeOptions: "`deepseek quantize`",
    MergeOptions: "`deepseek merge`", UpcycleOptions: "`deepseek upcycle`",
    PullOptions: "`deepseek pull`",
    GrowConfig: "Named experts beside the dense FFN: `grow`, `deepseek upcycle --grow`",
    LatentConfig: "A compressed latent, lossy: `latent_form`, `deepseek upcycle --latent`",
    CarveConfig: "Experts out of the dense FFN: `carve`, `deepseek upcycle --carve`",
    EvalOptions: "`deepseek eval`",
    HealConfig: "Their training: `carve`, `latent_form`, `deepseek upcycle --carve|--latent --heal`",
    FolderOptions: "`deepseek experts install`, `remove`",
    SignatureOptions: "`deepseek experts install`, `verify`", CalibrationOptions: "`deepseek experts install`",
    ExportOptions: "`deepseek experts export`", AddOptions: "`deepseek knowledge add`",
    SearchOptions: "`deepseek knowledge search`", RouteOptions: "`deepseek route text`",
    SeedOptions: "`deepseek route distill`", ValidateSettings: "`deepseek data validate`",
    DedupSettings: "`deepseek data dedup`", LabelSettings: "`deepseek data label`",
    SplitSettings: "`deepseek data split`", PackSettings: "`deepseek data pack`",
    MachineOptions: "Machine: commands that run a model", RanksOptions: "`deepseek train`: processes",
    PredictOptions: "`deepseek train`: prediction", Line: "`deepseek train --predict`, `Trainer.predict`: the line"}


def page() -> str:
    tables = [f"## {title}\n\n{table(settings)}" for settings, title in TITLES.items()]
    about = ("Each is a flag, spelled with underscores or hyphens, of the commands that its title names, a key in the "
             "file of their `--config FILE.yaml` (train, tune, serve) or in a step's table of `deepseek data run`, and "
             "a keyword argument of the class.")
    return "\n\n".join(["# Options", about, *tables]) + "\n"


@dataclass(frozen=True)
class Example:
    size: Annotated[int | None, Option("how many", COUNT)] = None
    kind: Annotated[Literal["a", "b"], Option("which")] = "a"
    deep: Annotated[bool, Option("whether")] = False
    text: Annotated[int | str, Option("what", metavar="SIZE")] = ""
    other: int = 3

    def __post_init__(self) -> None:
        check(self)


@pytest.mark.parametrize(("given", "message"), [
    ({"size": 0}, "size = 0: must be an integer >= 1"), ({"size": True}, "size = True"),
    ({"kind": "c"}, "kind = 'c': must be a or b"), ({"kind": None}, "kind = None"), ({"kind": []}, "kind = []"),
    ({"deep": 1}, "deep = 1: must be true or false"), ({"deep": None}, "deep = None")])
def test_what_breaks_its_rule_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Example(**given)
    assert str(caught.value).startswith(message)
    assert Example(size=3, kind="b", deep=True, text=4, other=-1).size == 3


def test_no_class_of_options_is_left_out_of_the_page() -> None:
    def under(kind: type) -> set[type]:
        return {kind}.union(*map(under, kind.__subclasses__()))

    bases = {Settings, CalibrationConfig, TrainConfig, SampleOptions, StageOptions, PipelineConfig, LoraSpec, Trainer}
    assert {kind for kind in under(Settings) if kind.__module__.startswith("deepseek.")} - bases == {*TITLES} - {
        SamplingParams}


def test_what_a_declaration_says_of_flags() -> None:
    assert [(one.name, one.kind, one.choices) for one in declared(Example)] == [
        ("size", int, None), ("kind", str, ("a", "b")), ("deep", bool, None), ("text", str, None)]


@pytest.mark.parametrize("settings", TITLES, ids=lambda settings: settings.__name__)
def test_every_option_is_declared_and_its_default_keeps_its_rule(settings: Any) -> None:
    assert {one.name for one in declared(settings)} == set(settings.__dataclass_fields__) - {"watch", "map"}
    assert all(one.option.help for one in declared(settings))
    settings()  # checks itself


@pytest.mark.parametrize("settings", TITLES, ids=lambda settings: settings.__name__)
def test_text_is_no_number_and_a_number_is_no_text(settings: Any) -> None:
    """The command line leaves it to the settings to say so."""
    for one in declared(settings):
        if not one.choices and (one.kind in (int, float) or (one.kind is str and one.name != "expert_memory")):
            with pytest.raises((ConfigError, RequestError), match=rf"{one.name}.*: must "):
                settings(**{one.name: 3.5 if one.kind is str else "x"})


@pytest.mark.parametrize(("settings", "value", "error"), [
    (EngineOptions, {"policy": "lifo"}, ConfigError), (EngineOptions, {"prefetch": 1}, ConfigError),
    (EngineOptions, {"warmup_experts": [3]}, ConfigError), (EngineOptions, {"warmup_experts": 3}, ConfigError),
    (EngineOptions, {"age_limit": -1}, ConfigError), (EngineOptions, {"cache_tokens": 0}, ConfigError),
    (SamplingParams, {"experts": 3}, RequestError), (SamplingParams, {"logit_bias": {"x": 1}}, RequestError),
    (SamplingParams, {"top_p": float("nan")}, RequestError), (SamplingParams, {"min_tokens": 300}, RequestError),
    (SamplingParams, {"stop": [""]}, RequestError), (SamplingParams, {"n": 129}, RequestError),
    (TuneConfig, {"lr": 0}, ConfigError), (TuneConfig, {"chat_template_kwargs": {"a": {1}}}, ConfigError),
    (TuneConfig, {"valid_fraction": 1}, ConfigError), (TuneConfig, {"shared_experts": "yes"}, ConfigError),
    (TrainConfig, {"seed": -1}, ConfigError), (TrainConfig, {"precision": "fp64"}, ConfigError),
    (TrainConfig, {"tensorboard": None}, ConfigError), (DedupSettings, {"threshold": 0.4}, ConfigError),
    (ValidateSettings, {"min_characters": 9, "max_characters": 8}, ConfigError), (LabelSettings, {"texts": 19},
                                                                                 ConfigError),
    (PackSettings, {"vocab_size": 256}, ConfigError), (SplitSettings, {"valid_fraction": 1}, ConfigError)])
def test_impossible_values_are_refused_by_name(settings: Any, value: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"{[*value][-1]} = .*must "):
        settings(**value)


def test_the_page_of_options_is_what_is_declared() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tests.test_settings writes it"


@pytest.mark.parametrize(("value", "holds"), [
    (10**400, False), (-(10**400), False), (float("nan"), False), (float("inf"), False), (True, False), ("1", False),
    (0, True), (10**300, True), (-1.5, True)], ids=lambda value: f"{value!r:.8}")
def test_a_number_is_one_that_a_float_can_hold(value: Any, holds: bool) -> None:
    assert is_number(value) is holds


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
