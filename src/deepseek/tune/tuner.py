"""MoEFineTuner: what is trained, the proof that nothing else moved, and what was gained and lost.

    1. names      expert_tune / expert_freeze through the atlas; "auto" routes the records and selects as ESFT does
    2. parts      experts that are trained become parameters of their own (model/adapter.py); all else wants no gradient
    3. before     loss on held-out records, and on general text
    4. train      deepopt's loop; checkpoints hold what is trained and nothing else
    5. after      the same two losses; SHA-256 of every tensor against the base's
    6. result     a delta, an adapter or a whole checkpoint

    OUT/experts.json            the selection of "auto", so that a continued run trains the same experts
    OUT/settings.json, checkpoint-N/, log.jsonl, loss.png      as in training (deepopt/trainer.py)
    OUT/delta | adapter | model the result
    OUT/report.json             all figures
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import sysconfig
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Unpack

import numpy as np

from ..atlas import Atlas
from ..atlas.atlas import count
from ..checkpoint import check_targets, open_checkpoint, resolve
from ..checkpoint.ready import is_folder, plain
from ..data import Document, ReadReport, RecordMap, read_documents
from ..deepopt.evaluation import HeldOut, held_out_loss
from ..deepopt.optimizers import trained
from ..deepopt.run_folder import kept_in, refuse_other_run
from ..deepopt.settings import TrainConfig
from ..errors import ConfigError, DataError, RequestError
from ..files import locked, write_json
from ..interrupts import handled, kept
from ..model import describe
from ..settings import rename
from ..tokenizer import Tokenizer
from .examples import Example
from .loop import TuneTrainer
from .lora import LoRAAdapter, named_experts, validate_experts
from .records import RecordSet, digest, each_record, places, read_records
from .report import TuneReport, paired
from .settings import DEFAULT_LR, RunOptions, TuneConfig, TuneSettings
from .show import show
from .streams import iter_new, next_round
from .tuned_model import TunedModel, TunePlan

_FILLER = Document("filler", "", response_start=None)  # beside a record that is looked at alone
# settings that older runs lack, and the values that are as theirs
LATER: dict[str, tuple[Any, ...]] = {
    "chat_template_kwargs": ({}, None), "parse_special": (False,), "reasoning": ("learn",)}
GENERAL_FILES = 40  # of Python's library, where no general text is given


class MoEFineTuner:
    """Tunes the experts that a domain uses, or all but some, or LoRA adapters; see TuneConfig for the settings.

        tuner = MoEFineTuner(model_path="v3", expert_freeze=["code_expert"], lr=1e-5)
        tuner.fit(legal_dataset, epochs=10)

    model_path: a checkpoint folder or hub id. adapter: a LoRAAdapter, or a table of its fields, to train a LoRA adapter
    alone. retain_data: general text that must not be forgotten (a path or several, or documents); Python's own library
    where none is given. replay_data: records to replay (with `replay`), such as those of an earlier tuning. map: which
    columns of records, and of those to replay, are what (a RecordMap, its keys, or a YAML file), where their names do
    not say it. out: folder of the run (MODEL-tuned-HASH if not given, the hash of where MODEL is); the same call
    continues a run that was stopped. save: "auto" writes a delta where experts are tuned, an adapter for LoRA, else a
    whole checkpoint; "delta" and "full" what they say.
    """

    def __init__(self, model_path: str | Path, *, adapter: LoRAAdapter | Mapping[str, Any] | None = None,
                 retain_data: Any = None, replay_data: Any = None,
                 map: RecordMap | Mapping[str, Any] | str | Path | None = None, out: str | Path | None = None,
                 save: Literal["auto", "delta", "full"] = "auto", general: Any = None, old: Any = None,
                 **settings: Unpack[TuneSettings]) -> None:
        """Raises ConfigError for an impossible setting, NotFoundError for a model that is nowhere, RequestError for a
        name of experts that the atlas does not have, listing those it has. No weight is read before `fit`."""
        config = TuneConfig.of(settings)
        adapter = None if adapter is None else LoRAAdapter.of(adapter)
        self.adapter, self.save = adapter, save
        self.retain_data = _renamed("general", general, "retain_data", retain_data)
        self.replay_data = _renamed("old", old, "replay_data", replay_data)
        self.config = config  # `mode` depends on it
        self.lr_given = config.lr is not None
        self.config = config = config if self.lr_given else replace(config, lr=DEFAULT_LR[self.mode])
        self.map = RecordMap.of(map)
        RunOptions(save=save)
        if adapter is not None and (save == "delta" or config.expert_tune is not None or config.expert_freeze or (
                config.shared_experts or config.non_expert_modules or config.train_router or config.balance)):
            raise ConfigError("adapter: LoRA alone is trained and kept then: give experts to LoRAAdapter"
                              "(experts=[…]), and leave out expert_tune, expert_freeze, shared_experts, "
                              "non_expert_modules, train_router, balance and save = delta")
        if self.replay_data is not None and not config.replay:
            raise ConfigError("replay_data: has a meaning only with replay, the share of old records to mix in")
        if config.threshold is not None and config.expert_tune != "auto":
            raise ConfigError(f"threshold = {config.threshold}: has a meaning only with expert_tune = auto")
        self.folder, self.model_path = resolve(model_path), str(model_path)
        self.out = Path(out) if out is not None else run_folder(self.model_path, self.folder)
        beside = self.folder / "atlas.json"
        self.atlas = Atlas.load(config.atlas or beside) if config.atlas or beside.is_file() else None
        names = adapter.experts if adapter else config.expert_freeze or config.expert_tune
        self.named = None if names is None or names == "auto" else named_experts(list(names), self.atlas)
        model_config, quant, _ = open_checkpoint(self.folder, verify=False)
        self.model_config = model_config
        if self.atlas is not None:
            self.atlas.check_fits(model_config)
        if quant is not None and adapter is None:
            raise ConfigError(f"{model_path}: is quantized, and quantized weights cannot be trained: tune "
                              f"{plain(model_path) or 'the checkpoint it was made from'}, or LoRA adapters on it "
                              "(adapter=LoRAAdapter(…))")
        if quant is not None and save == "full":
            raise ConfigError("save = 'full': LoRA adapters cannot be merged into quantized weights; leave it out, and "
                              "merge the adapter into the plain checkpoint")
        if config.balance and model_config.topk_method != "noaux_tc":
            raise ConfigError("balance: this model's gates have no bias to balance with (topk_method = "
                              f"{model_config.topk_method!r})")
        validate_experts(self.named or (), model_config)
        if adapter is not None:
            check_targets(model_config, quant, adapter.spec({}).targets)
        positions = model_config.max_position_embeddings
        self.max_length = config.max_length or min(512, positions - 1)
        if self.max_length >= positions:
            raise ConfigError(f"max_length = {config.max_length}: must be below the model's max_position_embeddings "
                              f"({positions})")
        if config.chat_template_kwargs:
            self._tokenizer.check_variables(config.chat_template_kwargs)

    def __repr__(self) -> str:
        """Describe what is tuned, of which model, how, and where the result goes."""
        config, adapter, named = self.config, self.adapter, self.named
        names = adapter.experts if adapter else config.expert_tune or config.expert_freeze
        listed = "" if named is None else (
            f"{count(len(named), 'expert')} in {count(len(named.by_layer()), 'layer')} "
            f"({', '.join(map(str, names or ()))})")
        if adapter is not None:
            targets = [*adapter.spec({}).targets, *([listed] if adapter.experts else [])]
            what = f"LoRA of rank {adapter.r} on {', '.join(targets)}"
        elif config.expert_tune is not None:
            what = listed or "the experts that the records visit most"
        else:
            what = f"everything but {listed}" if listed else "everything"
        also = [part for key, part in (("shared_experts", "the shared experts"), ("train_router", "the router"),
                                       ("non_expert_modules", "all that is neither expert nor router"))
                if getattr(config, key) and config.expert_tune is not None]
        length = count(config.steps, "step") if config.steps else f"epochs {config.epochs:g}"
        return "\n".join([
            f"MoEFineTuner of {self.model_path}: {describe(self.model_config)}",
            f"  trains: {', '.join([what, *also])}",
            f"  settings: lr {config.lr:g}, {length}, batches of {config.batch_size * config.accumulation} records of "
            f"at most {self.max_length:,} tokens, on {config.device}",
            f"  experts by name: {', '.join(self.atlas or ()) or 'none'}", f"  out: {self.out}"])

    @property
    def mode(self) -> str:
        """experts, lora or full."""
        return "lora" if self.adapter else "experts" if self.config.expert_tune is not None else "full"

    @property
    def _plan(self) -> TunePlan:
        return TunePlan(self.folder, self.model_path, self.out, self.mode, self.save, self.config, self.adapter,
                        self.atlas, self.named)

    # ---- the run ----------------------------------------------------------------------------------------------

    def fit(self, dataset: Any, epochs: float | None = None, *, steps: int | None = None) -> TuneReport:
        """Train on `dataset` and write the result; returns the report, which is also printed.

        More steps or epochs than a run in `out` was started with extend it: a further leg of the schedule with its own
        warm-up. Ctrl-C and SIGTERM: the step is finished and saved, then KeyboardInterrupt is raised.

        dataset: a path (or several), records such as {"input": …, "output": …}, documents, a Hugging Face data set, or
        any iterable of these that ends; `fit_stream` takes those that do not. Raises DataError, before any weight is
        read, for an empty data set, a record without output or an over-long one, and ConfigError when `out` holds a run
        with other settings, or one of `out` and the data lies inside the other.
        """
        with locked(self.out), handled(), kept(lambda: kept_in(self.out)):
            return self._fit(dataset, epochs, steps)

    def _fit(self, dataset: Any, epochs: float | None, steps: int | None) -> TuneReport:
        began = time.perf_counter()
        config = self._updated(epochs=epochs, steps=steps)
        self._check_apart(dataset)
        tokenizer = self._tokenizer
        report = ReadReport(strict=True)
        data = self._record_set(each_record(dataset, report, self.map), tokenizer)
        notes = _notes(report, [data])
        print(*notes, self._says_lr(), sep="\n", flush=True)
        if config.replay:
            if self.replay_data is None:
                raise ConfigError(f"replay = {config.replay}: needs old records to replay (replay_data=…)")
            data.train.extend(self._replayed(read_records(self.replay_data, mapping=self.map), data, [data], tokenizer))
        general, general_name = self._general(tokenizer)
        refuse_other_run(self.out, self._known(data, general), whole=False)
        tuned = TunedModel.load(self._plan, tokenizer, data)
        trainer = self._trainer(tuned, data, general, general_name, self.out, began, extend=True)
        before = trainer.before()
        trainer.run()
        with kept(trainer.kept):
            return self._conclude(tuned, [trainer], [data], [before], general_name, began, notes)

    def show(self, dataset: Any, count: int = 5) -> None:
        """Print what would be learnt of the first `count` records, decoded; nothing is trained. `-` begins what the
        model is shown, `+` what it learns."""
        RunOptions(show_records=count)
        report = ReadReport()
        documents = itertools.islice(each_record(dataset, report, self.map), count)
        for line in show(documents, self._tokenizer, self.max_length, parse_special=self.config.parse_special,
                         reasoning=self.config.reasoning):
            print(line)
        print(*map(str, report.problems[:count]), *_notes(report, []), sep="\n")

    def fit_stream(self, stream: Iterable[Any], *, records_a_round: int = 256, rounds: int | None = None,
                   epochs: float | None = None) -> TuneReport:
        """Tune continually: `records_a_round` records of `stream` at a time, with a share (`replay`) of all earlier
        ones, and of `replay_data`, mixed in; ends with the stream, or after `rounds`.

        Every record is written to OUT/round-N as it comes, so a killed run loses none and goes on where it was; records
        whose text an earlier round had are passed over, so a stream may begin again from its start; what cannot be used
        goes to OUT/refused.jsonl. The delta or adapter is written anew after every round. The report has the loss on
        every round's held-out records after every round, backward transfer and forgetting; "before" is the loss on a
        round's records when they arrived.
        """
        def rounds_kept() -> str:
            folders = sorted(self.out.glob("round-*"))
            return f"the records that came are in {folders[-1]}" if folders else "no record has come"

        with locked(self.out), handled(), kept(rounds_kept):
            return self._fit_stream(stream, records_a_round, rounds, epochs)

    def _fit_stream(self, stream: Iterable[Any], records_a_round: int, rounds: int | None,
                    epochs: float | None) -> TuneReport:
        began = time.perf_counter()
        RunOptions(records_a_round=records_a_round, rounds=rounds)
        self._updated(epochs=epochs)
        self._check_apart()
        tokenizer = self._tokenizer
        print(self._says_lr(), flush=True)
        general, general_name = self._general(tokenizer)
        old = read_records(self.replay_data, mapping=self.map) if self.replay_data is not None else []
        report = ReadReport(strict=True)
        seen: set[str] = set()
        refused = self.out / "refused.jsonl"

        def check(document: Document) -> None:
            self._record_set([document, _FILLER], tokenizer, valid_fraction=0.1)

        waiting = iter_new(stream, seen, refused, check, report, self.map)
        tuned: TunedModel | None = None
        sets: list[RecordSet] = []
        trainers: list[TuneTrainer] = []
        arrived: list[dict[str, Any]] = []
        losses: list[list[float]] = []
        found: list[HeldOut] = []  # after the last round, of the records of each
        while rounds is None or len(sets) < rounds:
            folder = self.out / f"round-{len(sets) + 1:04d}"
            round_began = time.perf_counter() if sets else began
            documents = next_round(folder, waiting, records_a_round, seen)
            if len(documents) < 4:
                if documents:
                    print(f"{len(documents)} records are too few for a round; they wait in {folder}")
                break
            data = self._record_set(documents, tokenizer)
            sets.append(data)
            data.train.extend(self._replayed(old, data, sets, tokenizer))
            if tuned is None:
                refuse_other_run(folder, self._known(data, general), whole=False, extend=False)
                tuned = TunedModel.load(self._plan, tokenizer, data)
            trainer = self._trainer(tuned, data, general, general_name, folder, round_began, extend=False)
            trainers.append(trainer)
            arrived.append(trainer.before())  # of the model as it is when the round arrives
            trainer.run()
            old += documents
            found = [held_out_loss(tuned.model, each, trainer.config) for each in sets]
            losses.append([each.mean or 0.0 for each in found])
            tuned.save_so_far()
        if refused.is_file():
            print(f"{len(refused.read_text(encoding='utf-8').splitlines())} records could not be used: {refused}")
        if tuned is None:
            raise DataError("stream: ended before a round was full")
        notes = _notes(report, sets)
        print(*notes, sep="\n", end="\n" if notes else "")
        return self._conclude(tuned, trainers, sets, arrived, general_name, began, notes, losses, found)

    def _says_lr(self) -> str:
        what = {"experts": "where experts are tuned", "lora": "of LoRA adapters", "full": "where all is trained"}
        return f"lr {self.config.lr:g}" + ("" if self.lr_given else f", the default {what[self.mode]} (--lr)")

    def _updated(self, **changes: Any) -> TuneConfig:
        given = {key: value for key, value in changes.items() if value is not None}
        self.config = replace(self.config, **given)
        return self.config

    def _check_apart(self, *more: Any) -> None:
        """Raise ConfigError where a run would read its own files, or overwrite its data."""
        out = self.out.resolve()
        given = [each for each in (*more, self.retain_data, self.replay_data) if each is not None]
        for place in (place for each in given for place in places(each)):
            if out.is_relative_to(where := place.resolve()):
                raise ConfigError(f"out = {self.out}: must not lie inside DATA ({place}), or a run would read its own "
                                  "files")
            if where.is_relative_to(out):
                raise ConfigError(f"out = {self.out}: must not hold DATA ({place}): the folder is the run's own")

    def _settings(self, data: RecordSet, general: RecordSet) -> dict[str, dict[str, Any]]:
        """Settings that a resumed run must share, besides those that the base decides."""
        kept = {k: v for k, v in asdict(self.config).items() if k not in ("device", "atlas", "steps", "epochs")}
        kept |= {key: None for key, values in LATER.items() if kept[key] in values}
        return {"tune": kept, "adapter": asdict(self.adapter) if self.adapter else {},
                "chosen": {"retain_data": general.fingerprint}}

    def _known(self, data: RecordSet, general: RecordSet) -> dict[str, dict[str, Any]]:
        """The settings of a run that are known before its base is read."""
        settings = self._settings(data, general)
        if self.config.expert_tune != "auto":
            settings["chosen"]["experts"] = [str(expert) for expert in self.named or ()]
        return {"train": asdict(self._train_config(data)), "model": self.model_config.to_dict(),
                "data": {"fingerprint": data.fingerprint}, **settings}

    def _trainer(self, tuned: TunedModel, data: RecordSet, general: RecordSet, general_name: str, out: Path,
                 began: float, *, extend: bool) -> TuneTrainer:
        settings = self._settings(data, general) | {"base": {"base": tuned.fingerprint}}
        settings["chosen"]["experts"] = [str(expert) for expert in tuned.experts]
        trainer = TuneTrainer(tuned, data, general, self._train_config(data), out, settings=settings, began=began,
                              extend=extend, general_name=general_name,
                              general_batches=-(-self.config.general_records // self.config.batch_size))
        # what names built in by training rest on: no group gains against another
        trainer.within_groups = self.atlas is not None and any(g.kind == "built-in" for g in self.atlas.groups)
        return trainer

    def _replayed(
        self, old: Sequence[Document], data: RecordSet, sets: Sequence[RecordSet], tokenizer: Tokenizer
    ) -> list[Example]:
        """Old examples that make up the share `replay` of both together, or all there are; none of what is held out."""
        share = self.config.replay
        wanted = round(len(data.train) * share / (1 - share))
        hidden = frozenset().union(*(each.held_out for each in sets))
        order = list(old) if wanted else []
        random.Random(f"{self.config.seed}/{len(sets)}").shuffle(order)
        drawn: list[Example] = []
        for document in order:
            if len(drawn) >= wanted:
                break
            if digest(document) not in hidden:
                drawn += self._record_set([document], tokenizer, overlong="cut", valid_fraction=0.0).train
        return drawn[:wanted]

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        try:
            return Tokenizer.load(self.folder).with_variables(self.config.chat_template_kwargs)
        except RequestError as error:
            raise ConfigError(str(error)) from None

    def _record_set(self, documents: Iterable[Document], tokenizer: Tokenizer, **changes: Any) -> RecordSet:
        names = ("overlong", "valid_fraction", "seed", "parse_special", "reasoning")
        settings = {name: getattr(self.config, name) for name in names} | changes
        return RecordSet.of(documents, tokenizer, max_length=self.max_length, **settings)

    def _general(self, tokenizer: Tokenizer) -> tuple[RecordSet, str]:
        """Return general text as held-out windows, and its name."""
        if self.retain_data is None:
            library = Path(sysconfig.get_path("stdlib"))
            documents = list(read_documents(sorted(library.glob("*.py"))[:GENERAL_FILES], ReadReport()))
            name = "sources of Python's library, as none was given"
        else:
            documents = read_records(self.retain_data, report := ReadReport())
            name = f"of {len(documents):,} documents"
            if report.problems:
                name += f"; {len(report.problems):,} could not be read, first {report.problems[0]}"
        limit = self.config.general_records
        spread = [documents[i * len(documents) // limit] for i in range(limit)] if len(documents) > limit else documents
        return RecordSet((), self._record_set(spread, tokenizer, overlong="cut", valid_fraction=0.0).train), name

    def _train_config(self, data: RecordSet) -> TrainConfig:
        config = self.config
        batches = data.batches(config.batch_size)
        steps = config.steps or max(1, math.ceil(config.epochs * batches / config.accumulation))
        return TrainConfig(
            steps=steps, batch_size=config.batch_size, seq_len=self.max_length, accumulation=config.accumulation,
            lr=config.lr or 0.0, min_lr_ratio=config.min_lr_ratio, warmup_steps=round(config.warmup * steps),
            weight_decay=config.weight_decay, clip=config.clip, precision=config.precision, mtp_weight=0.0,
            balance_weight=0.0, bias_speed=1e-3 if config.balance else 0.0, guide_weight=0.0,
            gradient_checkpointing=config.gradient_checkpointing, eval_every=config.eval_every,
            eval_batches=max(1, -(-config.eval_records // config.batch_size)), save_every=config.save_every, keep=2,
            seed=config.seed)

    def _conclude(
        self, tuned: TunedModel, trainers: Sequence[TuneTrainer], sets: Sequence[RecordSet],
        arrived: Sequence[Mapping[str, Any]], general_name: str, began: float, notes: Sequence[str] = (),
        rounds: Sequence[Sequence[float]] = (), found: Sequence[HeldOut] = (),
    ) -> TuneReport:
        """arrived: the evaluations before every round; found: of every round's records, after the last one."""
        trainer = trainers[-1]
        after = trainer.last or trainer.evaluate()
        assert trainer.found is not None
        found = found or [trainer.found]
        weights = [data.held_out_tokens for data in sets]
        error, documents = _error(trainer, sets, arrived, found)
        parameters = trained(tuned.model)
        count = sum(p.numel() for p in parameters.values())
        moments = sum(t.nbytes for state in trainer.optimizer.state.values() for k, t in state.items() if k != "step")
        result = tuned.finish()
        frozen = {name for name in tuned.hashes if name not in tuned.trainable}
        unchanged = sum(tuned.hashes[name] == tuned.hashes_after[name] for name in frozen)
        report = TuneReport(
            mode=self.mode, steps=sum(self._train_config(data).steps for data in sets),
            examples=sum(len(data.train) for data in sets), loss_tokens=sum(data.loss_tokens for data in sets),
            domain_before=_mean([each["eval_loss"] for each in arrived], weights),
            domain_after=_mean([each.mean or 0.0 for each in found], weights),
            general_before=arrived[0]["general_loss"], general_after=after["general_loss"], general_text=general_name,
            trained_parameters=count, all_parameters=tuned.parameters, optimizer_bytes=moments,
            frozen_tensors=len(frozen), frozen_unchanged=unchanged,
            changed_tensors=sum(tuned.hashes[n] != tuned.hashes_after[n] for n in tuned.hashes),
            experts={} if self.mode == "full" else {str(k): v for k, v in tuned.experts.by_layer().items()},
            seconds=time.perf_counter() - began + sum(each.seconds_before for each in trainers),
            result=str(result), result_bytes=sum(f.stat().st_size for f in result.rglob("*") if f.is_file()),
            rounds=rounds, notes=notes, lr=trainer.config.lr, standard_error=error, held_out=documents)
        write_json(self.out / "report.json", asdict(report) | {"learnt_tokens": report.loss_tokens} | {
            key: getattr(report, key) for key in ("gained", "verdict", "forgotten", "backward_transfer", "forgetting")})
        if unchanged != len(frozen):
            moved = sorted(n for n in frozen if tuned.hashes[n] != tuned.hashes_after[n])
            raise AssertionError(f"{len(moved)} frozen tensors changed, first {moved[0]}")
        print(report.table())
        return report


def _renamed(former: str, value: Any, name: str, given: Any) -> Any:
    """Return the value of an argument that may be given by its deprecated name."""
    both = {key: one for key, one in ((former, value), (name, given)) if one is not None}
    return rename(both, {former: name}).get(name)


def run_folder(model: str, folder: Path) -> Path:
    """Return the default folder of a run: one per model, the same at every call."""
    where = folder.resolve()
    local = is_folder(model)
    stem = (where.parent if where.name == "model" else where).name if local else model.rpartition("/")[2]
    digest = hashlib.sha256((str(where) if local else model).encode()).hexdigest()
    return Path(f"{stem}-tuned-{digest[:6]}")


def _notes(report: ReadReport, sets: Sequence[RecordSet]) -> list[str]:
    """Return notes about the records that were read, a line each."""
    notes = Counter[str]()
    for each in sets:
        notes.update(each.notes)
    return [*report.notes(), *(note for each in sets for note in each.split_notes),
            *(f"left out: {count:,} {kind}" for kind, count in report.skipped.items()),
            *(f"{count:,} {note}" for note, count in notes.items())]


def _error(trainer: TuneTrainer, sets: Sequence[RecordSet], arrived: Sequence[Mapping[str, Any]],
           found: Sequence[HeldOut]) -> tuple[float | None, int]:
    """(standard error of the gain, held-out documents that it rests on); (None, 2) where an old run does not tell."""
    if not all("sums" in each for each in arrived):
        return None, 2
    first, rows = 0, []
    for data in sets:  # the documents of one round after those of another
        chosen = data.evaluated(trainer.config.batch_size, trainer.config.eval_batches)
        rows.append(first + data.document_V[chosen])
        first += int(data.document_V.max(initial=0)) + 1
    before = HeldOut(*(np.concatenate([each[key] for each in arrived]) for key in ("sums", "counts")))
    return paired(before, HeldOut(*map(np.concatenate, zip(*found, strict=True))), np.concatenate(rows))


def _mean(values: Sequence[float], weights: Sequence[int]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
