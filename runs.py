"""A run: what a recipe describes, carried out and left in one folder.

`runs/<domain>/<recipe>/s<seed>/` holds config.yaml, metrics.csv, checkpoints/, weights/, pictures/, result.json and
units.parquet. Everything the user gave is checked before a Trainer exists, so a mistake leaves no folder behind.
"""

import math
import os
import re
import shutil
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytorch_lightning as lightning
import torch
import yaml
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, RichProgressBar, Timer, TQDMProgressBar
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities import rank_zero_only
from rich.console import Console

from . import recipes
from .errors import UserError, plain_type_error
from .leaderboard.results import MetricInfo, Parameters, Result, provenance
from .tasks.base import BaseTask, TestResult
from .tasks.telemetry import RoutingMonitor
from .zoo import weights
from .zoo.base import ZooModel
from .zoo.core.flops import count_flops
from .zoo.core.statistics import parameter_counts


@dataclass(frozen=True)
class Request:
    """What the user asked for: a recipe, changes to it, and where things go."""

    config: str
    overrides: Sequence[str] = ()
    seed: int | None = None
    run_dir: Path | None = None
    resume: bool = False
    overwrite: bool = False
    weights: str | None = None
    output: Path | None = None


class _Parser(LightningArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> Any:
        """One line instead of the usage of some sixty trainer flags."""
        _raise_user_error(ex)
        line = plain_type_error(message)
        if line.endswith("is not accepted"):
            line += "; `moezoo show NAME` prints what a recipe has"
        raise UserError(line[:400]) from None


def _raise_user_error(error: BaseException | None) -> None:
    """Raise the UserError behind an error of the parser's, if there is one."""
    while error is not None:
        if isinstance(error, UserError):
            raise UserError(str(error)) from None
        error = error.__cause__ or error.__context__


def _as_typed(message: str, overrides: Sequence[str]) -> str:
    """The message with the name of an option (`top_k`) as the user typed it (`model.model.top_k`)."""
    found = re.match(r"(Option ')?(\w+)(?=['=:])", message)
    if not found:
        return message
    typed = {one.partition("=")[0].removeprefix("--") for one in overrides}
    whole = [key for key in typed if key.endswith(f".{found[2]}")]
    return f"{found[1] or ''}{whole[0]}{message[found.end() :]}" if len(whole) == 1 else message


class RecipeCLI(LightningCLI):
    """Builds the task, the data and (later) the trainer of a recipe; carries out nothing by itself."""

    def __init__(self, request: Request) -> None:
        self.name = recipes.name_of(request.config)
        recipes.metadata(request.config)
        arguments = ["--config", str(recipes.resolve(request.config)), *request.overrides]
        if request.seed is not None:
            arguments.append(f"--seed_everything={request.seed}")
        try:
            super().__init__(
                BaseTask,
                lightning.LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=None,
                auto_configure_optimizers=False,
                parser_kwargs={"allow_abbrev": False},
                args=arguments,
                run=False,
            )
        except UserError as error:
            raise UserError(_as_typed(str(error), request.overrides)) from None
        self.seed = int(self.config.seed_everything)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        parser = _Parser(**kwargs)
        parser.add_argument("-c", "--config", action="config", help="Path to a configuration file.")
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        # The parent compares with sys.argv and warns; ours are never those of the shell.
        self.config = parser.parse_args(args)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(recipes.RecipeInfo, "recipe")
        # Sizes come from the data: the user's own files then fit without a word.
        for target in ("model.init_args.schema", "model.init_args.model.init_args.schema"):
            parser.link_arguments("data", target, compute_fn=lambda data: data.schema, apply_on="instantiate")

    def instantiate_classes(self) -> None:
        """Build data and task only: a Trainer leaves folders and comes when all else is well."""
        try:
            self.config_init = self.parser.instantiate_classes(self.config)
        except Exception as error:
            _raise_user_error(error)
            raise
        self.datamodule, self.model = self._get(self.config_init, "data"), self._get(self.config_init, "model")

    def make_trainer(self, run_dir: Path | None, callbacks: Sequence[Callback] = ()) -> lightning.Trainer:
        """The recipe's Trainer, logging into `run_dir` (nowhere for None)."""
        arguments = self.config_init.trainer.as_dict()
        own = list(arguments.pop("callbacks", None) or [])
        shown = any(isinstance(callback, (RichProgressBar, TQDMProgressBar)) for callback in own)
        if not shown and arguments.get("enable_progress_bar") is not False:
            own.append(RichProgressBar() if Console().is_terminal else TQDMProgressBar(refresh_rate=50))
        arguments["logger"] = _csv_logger(run_dir) if run_dir else False
        if not any(isinstance(callback, ModelCheckpoint) for callback in callbacks):
            arguments["enable_checkpointing"] = False
        # Our loaders share out their batches themselves; Lightning's sampler would take them apart.
        arguments |= {"use_distributed_sampler": False, "enable_model_summary": False}
        arguments |= {"default_root_dir": str(run_dir or Path.cwd())}
        return lightning.Trainer(**arguments, callbacks=[*own, *callbacks])

    def config_text(self) -> str:
        """The resolved recipe as YAML, ready to be given to `--config` again."""
        config = self.config.clone()
        config.pop("config", None)
        return str(self.parser.dump(config, skip_none=False, skip_link_targets=True))


def fit(request: Request) -> int:
    """Train, test the best checkpoint once, and leave weights, metrics and pictures in the run folder."""
    console = Console(stderr=True)
    cli = RecipeCLI(request)
    task, data = cli.model, cli.datamodule
    run_dir = request.run_dir or Path("runs") / cli.name / f"s{cli.seed}"
    last = _prepare(run_dir, request, cli.config_text())
    if (run_dir / "result.json").exists():
        console.print(f"{run_dir} is finished already")
        return 0
    data.setup("fit")
    monitor, timer = RoutingMonitor(), Timer()
    trainer = cli.make_trainer(run_dir, [monitor, timer, *_checkpoints(run_dir, task)])
    if trainer.is_global_zero:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(cli.config_text())
    started = time.perf_counter()
    if _closed_form(task):
        task.model.fit(data.train_dataloader())
    else:
        _train(trainer, cli, run_dir, last)
    seconds = time.perf_counter() - started if _closed_form(task) else timer.time_elapsed("train")
    best = getattr(trainer.checkpoint_callback, "best_model_path", None) or None
    trainer.test(task, datamodule=data, ckpt_path=best, verbose=False, weights_only=True)
    if trainer.is_global_zero:
        pictures = [*task.draw(run_dir / "pictures"), *monitor.draw(run_dir / "pictures")]
        result = build_result(cli, request, trainer, seconds)
        save_weights(task.model, run_dir / "weights", result)
        result.save(run_dir, task.result.units)
        _summary(console, result, task, run_dir, pictures)
    return 0


def _closed_form(task: BaseTask) -> bool:
    """Whether the model fits itself, as rules and closed-form rivals do."""
    return callable(getattr(task.model, "fit", None))


def _checkpoints(run_dir: Path, task: BaseTask) -> list[Callback]:
    """Keeps the best epoch on validation and the last one; nothing for what has no epochs."""
    if _closed_form(task):
        return []
    folder = run_dir / "checkpoints"
    # `save_last` of the first would keep the last epoch that was the best so far.
    return [
        ModelCheckpoint(folder, "best", monitor=task.monitor, mode=task.mode, enable_version_counter=False),
        ModelCheckpoint(folder, "last", enable_version_counter=False),
    ]


def _train(trainer: lightning.Trainer, cli: RecipeCLI, run_dir: Path, last: str | None) -> None:
    try:
        trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=last, weights_only=True)
    except UserError:
        if trainer.is_global_zero and not (run_dir / "checkpoints").exists():
            shutil.rmtree(run_dir)  # nothing was learned yet: leave no folder behind
        raise
    except SystemExit:  # Lightning's way out of Ctrl-C
        if trainer.interrupted:
            raise KeyboardInterrupt from None
        raise


def validate(request: Request) -> int:
    """Metrics on the validation split."""
    cli, trainer = evaluation(request)
    trainer.validate(cli.model, datamodule=cli.datamodule)
    return 0


def test(request: Request) -> int:
    """Metrics on the test split, as the leaderboard computes them."""
    cli, trainer = evaluation(request)
    trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    print_metrics(Console(), cli.model.result)
    return 0


def predict(request: Request) -> int:
    """Write a table of predictions, Parquet or CSV by the file's ending."""
    output = request.output or Path("predictions.parquet")
    if output.suffix not in {".parquet", ".csv"}:
        raise UserError(f"--output {output}: expected a name that ends in .parquet or .csv")
    cli, trainer = evaluation(request)
    batches: Any = trainer.predict(cli.model, datamodule=cli.datamodule)
    table: pl.DataFrame = cli.datamodule.decode(pl.concat(batches))
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    table.write_parquet(partial) if output.suffix == ".parquet" else table.write_csv(partial)
    partial.replace(output)
    Console().print(f"{len(table):,} rows written to {output}")
    return 0


def evaluation(request: Request) -> tuple[RecipeCLI, lightning.Trainer]:
    """The recipe with trained weights in place, and a Trainer that leaves nothing behind."""
    cli = RecipeCLI(request)
    model = cli.model.model
    if _closed_form(cli.model) and request.weights is None:
        cli.datamodule.setup("fit")
        model.fit(cli.datamodule.train_dataloader())
    elif request.weights != "none":
        trained = weights.load(_default_weights(request, cli))
        check_fits(trained, model, cli.name)
        cli.model.model = trained
    return cli, cli.make_trainer(None)


def _default_weights(request: Request, cli: RecipeCLI) -> str:
    if request.weights is not None:
        return request.weights
    beside = recipes.resolve(request.config).parent / "weights"
    return str(beside) if beside.is_dir() else cli.name


def check_fits(trained: Any, model: ZooModel, name: str) -> None:
    """Refuse weights of another model or of other data, whose ids would mean other things.

    Raises:
        UserError: naming the argument that differs.
    """
    if type(trained) is not type(model):
        raise UserError(f"--weights: these are of {type(trained).__name__}, but {name} is {type(model).__name__}")
    for key, value in model.init_args.items():
        theirs: Any = trained.init_args.get(key)
        if key == "schema" and _same_text(theirs, value):
            continue
        if theirs != value and key == "schema":
            raise UserError(
                f"--weights: trained on {theirs['dataset']}, but the data is {value['dataset']} (other vocabulary): "
                f"train on it with `moezoo fit --config {name}`"
            )
        if theirs != value:
            raise UserError(f"--weights: trained with {key}={theirs}, but the recipe says {key}={value}")


def _same_text(trained: Any, data: Any) -> bool:
    """Whether data of texts means the same to a model, whatever file it comes from: same tokens, tasks and lengths."""
    if not (isinstance(trained, dict) and isinstance(data, dict) and "tokenizer" in trained and "tokenizer" in data):
        return False

    def meaning(schema: dict[str, Any]) -> dict[str, Any]:
        names = [task["name"] for task in schema["tasks"]]
        return {k: v for k, v in schema.items() if k not in ("dataset", "fingerprint")} | {"tasks": names}

    return meaning(trained) == meaning(data)


def _prepare(run_dir: Path, request: Request, config: str) -> str | None:
    """Check that the run folder is free, or to be resumed or replaced; the checkpoint to resume from."""
    last = run_dir / "checkpoints" / "last.ckpt"
    if getattr(rank_zero_only, "rank", 0) != 0:  # a further process of a run that rank 0 has prepared
        return str(last) if request.resume and last.exists() else None
    if not run_dir.exists() or not any(run_dir.iterdir()):
        return None
    if request.resume:
        _check_same_run(run_dir / "config.yaml", config)
        return str(last) if last.exists() else None
    if not request.overwrite:
        raise UserError(f"{run_dir} holds a run already: add --resume, --overwrite or another --run_dir")
    if not (run_dir / "config.yaml").exists():
        raise UserError(f"--overwrite {run_dir}: this is not a run folder (no config.yaml), so it is left alone")
    shutil.rmtree(run_dir)
    return None


def _check_same_run(file: Path, config: str) -> None:
    """A resumed run may train longer or elsewhere, but not another model or on other data."""
    if not file.exists():
        return
    before, now = yaml.safe_load(file.read_text()), yaml.safe_load(config)
    for key in ("seed_everything", "model", "data"):
        if before.get(key) != now[key]:
            raise UserError(
                f"--resume {file.parent}: the run was started with another '{key}' (see {file}); "
                "give the same settings, or another --run_dir"
            )


def _csv_logger(run_dir: Path) -> CSVLogger:
    """A logger that goes on with the metrics.csv of a resumed run, which Lightning's own would delete."""
    logger = CSVLogger(run_dir.parent, name="", version=run_dir.name)
    file, aside = run_dir / "metrics.csv", run_dir / ".metrics.csv"
    if file.exists():
        file.replace(aside)
    writer = logger.experiment
    if aside.exists():
        aside.replace(file)
        writer.metrics_keys = file.read_text().partition("\n")[0].strip().split(",")
    return logger


def build_result(cli: RecipeCLI, request: Request, trainer: lightning.Trainer, seconds: float) -> Result:
    """The leaderboard's record of the last test."""
    outcome: TestResult = cli.model.result
    counts = parameter_counts(cli.model.model)
    schema = cli.datamodule.schema
    return Result(
        recipe=cli.name,
        dataset=re.sub(r"[^A-Za-z0-9_.-]+", "_", schema["dataset"]).lstrip(".-") or "own",
        split="test",
        seed=cli.seed,
        metrics={name: float(value) for name, value in outcome.metrics.items() if math.isfinite(value)},
        metric_info={name: MetricInfo(**asdict(info)) for name, info in outcome.info.items()},
        dataset_fingerprint=schema["fingerprint"],
        parameters=Parameters(**counts),
        flops_per_sample=flops_per_sample(cli.model, cli.datamodule, trainer.strategy.root_device),
        train_seconds=seconds,
        recipe_hash=recipes.recipe_hash(request.config, request.overrides),
        **provenance(gpu=torch.cuda.is_available()),
    )


def flops_per_sample(task: BaseTask, data: lightning.LightningDataModule, device: torch.device) -> float:
    """Floating-point operations of one forward for one sample, counted on a test batch.

    On the trainer's device: a language model's test batch takes a CPU minutes.
    """
    before, training = task.device, task.training
    task.to(device).eval()  # what serving costs: no second view, no regulariser
    batch = data.transfer_batch_to_device(next(iter(data.test_dataloader())), device, 0)
    total = count_flops(task, lambda: task(batch))
    task.to(before).train(training)
    return total / len(batch[0])


def save_weights(model: ZooModel, folder: Path, result: Result) -> None:
    """Weights in the Hub layout: model.safetensors, config.json and a model card with the test's metrics."""
    keep = ("recipe", "dataset", "split", "seed", "metrics", "recipe_hash", "dataset_fingerprint", "git_commit")
    model.save_pretrained(folder, **{key: getattr(result, key) for key in keep})


def print_metrics(console: Console, outcome: TestResult) -> None:
    """Metrics as a table: value, whether high or low is good, over how many units."""
    from rich.table import Table

    table = Table("metric", "value", "better", "n", title="test")
    for name, value in outcome.metrics.items():
        info = outcome.info[name]
        table.add_row(name, f"{value:.4f}", {"max": "↑", "min": "↓"}[info.goal], f"{info.n:,}")
    console.print(table)


def _summary(console: Console, result: Result, task: BaseTask, run_dir: Path, pictures: Sequence[Path]) -> None:
    assert task.result is not None
    print_metrics(console, task.result)
    rows = {"weights": run_dir / "weights", "metrics": run_dir / "result.json", "history": run_dir / "metrics.csv"}
    value = result.metrics.get(task.headline, math.nan)
    console.print(f"[bold]{result.recipe}[/] on {result.dataset}: {task.headline} {value:.4f}")
    for what, where in rows.items():
        if where.exists():
            console.print(f"  {what:9} {where}", soft_wrap=True)
    for path in pictures:
        console.print(f"  {'picture':9} {path}", soft_wrap=True)


def quiet() -> None:
    """Silence what Lightning says of its own products and of loaders without workers."""
    import logging

    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*functional.all_gather is deprecated.*")
    warnings.filterwarnings("ignore", ".*Grad strides do not match bucket view strides.*")
    warnings.filterwarnings("ignore", ".*Experiment logs directory .* exists.*")
    warnings.filterwarnings("ignore", ".*Checkpoint directory .* exists and is not empty.*")
    warnings.filterwarnings("ignore", ".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")  # pretrained: dropout stays off
    warnings.filterwarnings("ignore", ".*number of training batches .* is smaller than the logging interval.*")
