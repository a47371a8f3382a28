"""From a command line to a stage: composition, typed config, one-line errors, ranks, W&B, the table after a sweep."""

import dataclasses
import json
import logging
import os
import re
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from fusion import config as schema
from fusion.config import UserError, check, nearest

CONF = Path(__file__).parents[2] / "conf"
SCHEMAS = {"precompute": "run", "train": "run", "fuse": "run", "merge": "merge", "evaluate": "evaluate"}
RESULT = "result.json"  # what a job writes into its directory, read again for the table of a sweep


def started() -> str:
    """A directory name that every rank of one launch agrees on."""
    shared = os.environ.setdefault("FUSION_STARTED", time.strftime("%Y-%m-%d_%H-%M-%S"))
    return shared


def keys(script: str) -> str:
    """The keys of a script with type, default and meaning, for --help."""
    root = schema.ROOTS[SCHEMAS[script.removesuffix(".py")]]()
    leaves = schema.walk(root)
    return "".join(f"  {name} = {value}    {item.metadata['meaning']}\n" for name, value, item in leaves)


OmegaConf.register_new_resolver("started", started, replace=True)
OmegaConf.register_new_resolver("keys", keys, replace=True)


def main(name: str, stage: Callable[[Any], dict[str, Any]]) -> None:
    """Run `stage(config)` as the command line says. Exit codes: 0 done, 1 failure, 2 the user's mistake, 130 Ctrl-C."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach us whole; we shorten those that are the user's
    try:
        arguments = preflight(name, sys.argv[1:])
        if arguments is not None:
            spawn_ranks(*arguments)
        failures: list[Exception] = []
        hydra.main(config_path=str(CONF), config_name=name, version_base="1.3")(lambda cfg: job(stage, cfg, failures))()
        if failures:
            raise failures[0]
    except KeyboardInterrupt:
        if rank() == 0:
            print("interrupted: the same command continues where it stopped", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        mistake = user_error(error)
        if mistake is None:
            traceback.print_exc()
            sys.exit(1)
        print(f"error: {mistake}", file=sys.stderr)
        sys.exit(2)


def job(stage: Callable[[Any], dict[str, Any]], composed: DictConfig, failures: list[Exception]) -> float | None:
    """One job: the typed config to the stage, its figures to `result.json`; the score goes back to a sweeper.

    A single job's error leaves by way of `failures`: Hydra would print a line of its own above ours.
    """
    quiet()
    config = typed(composed)
    folder = Path(HydraConfig.get().runtime.output_dir)
    if threads := getattr(getattr(config, "trainer", None), "threads", 0):
        import torch

        torch.set_num_threads(threads)
    try:
        with process_group(), wandb_run(config, composed, folder):
            figures = stage(config)
            if rank() == 0:
                (folder / RESULT).write_text(json.dumps(figures, indent=1, default=str) + "\n")
    except Exception as error:
        if HydraConfig.get().mode.name == "MULTIRUN":
            raise
        failures.append(error)
        return None
    return figures.get("score")


def quiet() -> None:
    """Libraries speak when something is wrong; progress and results are ours to show."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")


def typed(composed: DictConfig) -> Any:
    """The config dataclass of a composed config, checked."""
    config = OmegaConf.to_object(composed)
    check(config)
    return config


def preflight(name: str, argv: list[str]) -> tuple[Any, bool] | None:
    """Compose and check every job before the first one starts.

    Returns the first job's config and whether this is a sweep; None when nothing will run (--help, --cfg, …).
    """
    args = get_args_parser().parse_args(argv)
    idle = ("help", "hydra_help", "cfg", "info", "shell_completion", "version")
    if any(getattr(args, flag, None) for flag in idle):
        return None
    try:
        overrides = OverridesParser.create().parse_overrides(args.overrides)
    except HydraException as error:
        raise UserError(f"not KEY=VALUE: {explain(error, name)}") from error
    jobs = [args.overrides]
    if args.multirun:
        plain = [o for o in overrides if not o.is_sweep_override() or o.is_choice_sweep() or o.is_range_sweep()]
        jobs = [list(j) for batch in BasicSweeper.split_arguments(plain, None) for j in batch]
    search = [f"hydra.searchpath=[file://{Path(args.config_dir).absolute()}]"] if args.config_dir else []
    if args.config_dir and not Path(args.config_dir).is_dir():
        raise UserError(f"--config-dir {args.config_dir}: no such folder")
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        configs = [typed(compose(args.config_name or name, j + search)) for j in jobs]
    if args.multirun:
        refuse_ranks_in_sweep(configs[0], args.overrides)
    return configs[0], bool(args.multirun)


def refuse_ranks_in_sweep(config: Any, overrides: list[str]) -> None:
    """A sweep over ranks works with Hydra's own sweeper and launcher only.

    Any other sweeper draws its trials in every rank by itself, so the ranks of one run would train with different
    hyper-parameters; any other launcher starts one process a job.
    """
    trainer = getattr(config, "trainer", None)
    plugins = [o for o in overrides if o.startswith(("hydra/sweeper=", "hydra/launcher=")) and not o.endswith("=basic")]
    if plugins and trainer is not None and (trainer.strategy != "single" or world_size() > 1):
        raise UserError(
            f"{plugins[0]} cannot drive jobs of several processes: set trainer.strategy=single, or leave it out "
            "(the jobs then run one after the other, each on all devices)"
        )


def compose(name: str, overrides: list[str]) -> DictConfig:
    """hydra.compose with errors that name the key, the value and the nearest valid one."""
    try:
        composed = hydra.compose(name, overrides, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error, name)) from error
    with open_dict(composed):
        del composed["hydra"]
    parsed = OverridesParser.create().parse_overrides(overrides)
    chosen = next(
        (o.value() for o in reversed(parsed) if o.key_or_group == "sources" and isinstance(o.value(), list)), []
    )
    for option in chosen if not any(o.is_delete() for o in parsed) else []:
        if str(option) not in composed.sources:  # two files that define one name would silently become one source
            raise UserError(
                f"sources/{option}.yaml must define the key {str(option)!r}: one file, one source, one name"
            )
    return composed


def explain(error: BaseException | None, name: str) -> str:
    """One line for a composition error: Hydra puts the key in one exception and the reason in its cause."""
    text, first = "", str(error).strip().splitlines()[0]
    while error is not None:
        text, error = f"{text}\n{error}", error.__cause__
    root = schema.ROOTS[SCHEMAS.get(name, "run")]
    full = (re.search(r"full_key: (\S+)", text) or ["", ""])[1]
    override = (re.search(r"Could not override '(.+?)'|merging override [+~]*([^\s=]+)", text) or ["", "", ""])[0]
    override = re.sub(r"^.*?'?([\w./@-]+)'?$", r"\1", override)
    if found := re.search(r"Could not (?:load|find) '(.+?)'", text):
        group, _, option = found[1].rpartition("/")
        loader = GlobalHydra.instance().config_loader()
        known = loader.get_group_options(group) if group else list(SCHEMAS)
        return f"unknown option {group}={option}{nearest(option, known)}"
    if found := re.search(r"Key '(.+?)' (?:is )?not in '?(\w+)", text):
        wrong = next((name for name in (override, full) if name.endswith(found[1])), found[1])
        prefix = wrong.rpartition(".")[0]
        owner = getattr(schema, found[2], None)
        known = [f.name for f in dataclasses.fields(owner)] if owner else children(name, prefix)
        known = [f"{prefix}.{k}" if prefix else k for k in known]
        if not prefix:
            known += GlobalHydra.instance().config_loader().list_groups("")
        return f"unknown key {wrong!r}{nearest(wrong, sorted(set(known)))}"
    if override and "Could not override" in text:
        known = sorted({"experiment", "sweep", *(f.name for f in dataclasses.fields(root))} - {override})
        return f"unknown key or group {override!r}{nearest(override, known)}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reason = next((line for line in lines if "could not be converted" in line or "Invalid" in line), first)
    return f"{override or full}: {reason}" if override or full else reason


def children(name: str, prefix: str) -> list[str]:
    """Names one level below `prefix` in the default config of a script."""
    node = OmegaConf.select(hydra.compose(name), prefix) if prefix else None
    return [str(k) for k in node] if isinstance(node, DictConfig) else []


def user_error(error: BaseException | None) -> str | None:
    """The message of the UserError that `error` is or was raised from, or None."""
    while error is not None:
        if isinstance(error, UserError):
            return str(error)
        if isinstance(error, HydraException) and error.__cause__ is None:
            return explain(error, "fuse")
        error = error.__cause__
    return None


# --- ranks -----------------------------------------------------------------------------------------------------------


def rank() -> int:
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", 0)))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", 1)))


def spawn_ranks(config: Any, sweep: bool) -> None:
    """Run this same command under torchrun when it asks for several devices and is not there yet.

    One way to have several processes: Lightning's own subprocess launcher would rerun a whole sweep in the child.
    """
    trainer = getattr(config, "trainer", None)
    if trainer is None or world_size() > 1 or trainer.strategy == "single":
        return
    if trainer.nodes > 1:
        raise UserError(
            f"trainer.nodes={trainer.nodes}: start one process a device with Slurm, or on every node: torchrun "
            f"--nnodes {trainer.nodes} --nproc-per-node DEVICES --rdzv-endpoint HOST:PORT {' '.join(sys.argv)}"
        )
    import torch

    devices = int(trainer.devices) if trainer.devices.isdigit() else max(1, torch.cuda.device_count())
    if devices == 1:
        return
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}", *sys.argv]
    started()
    sys.exit(subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False).returncode)


@contextmanager
def process_group() -> Iterator[None]:
    """torch.distributed, when torchrun or Slurm made us one of several ranks."""
    if world_size() == 1:
        yield
        return
    if "MASTER_ADDR" not in os.environ:  # Slurm says who we are under names of its own
        from lightning.fabric.plugins.environments import SLURMEnvironment

        slurm = SLURMEnvironment()
        places = {"RANK": rank(), "WORLD_SIZE": world_size(), "LOCAL_RANK": slurm.local_rank()}
        os.environ |= {k: str(v) for k, v in places.items()}
        os.environ |= {"MASTER_ADDR": slurm.main_address, "MASTER_PORT": str(slurm.main_port)}
    import torch
    from torch import distributed

    if not distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    yield


# --- W&B -------------------------------------------------------------------------------------------------------------


@contextmanager
def wandb_run(config: Any, composed: DictConfig, folder: Path) -> Iterator[None]:
    """One job, one W&B run: opened with the whole resolved config, finished with the exit code, also under -m."""
    if not config.logger.wandb or rank() != 0:
        yield
        return
    import wandb

    options = config.logger
    sweep = HydraConfig.get().mode.name == "MULTIRUN"
    wandb.init(
        project=options.project,
        entity=options.entity or None,
        name=options.name or None,
        group=options.group or (Path(HydraConfig.get().sweep.dir).name if sweep else None),
        tags=options.tags or None,
        mode=options.mode,
        dir=folder,
        config=OmegaConf.to_container(composed, resolve=True),
        job_type=HydraConfig.get().job.name,
    )
    code = 1
    try:
        yield
        code = 0
    finally:
        wandb.finish(exit_code=code)


# --- sweeps ----------------------------------------------------------------------------------------------------------


class CompareJobs(Callback):
    """After a sweep: one table of its jobs, in the terminal and as Markdown in the sweep's directory."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if rank() == 0:
            compare_jobs(Path(config.hydra.sweep.dir))


def compare_jobs(folder: Path) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    rows = []
    for path in sorted(folder.glob(f"*/{RESULT}"), key=lambda p: (len(p.parent.name), p.parent.name)):
        overrides = OmegaConf.load(path.parent / ".hydra" / "overrides.yaml")
        figures = {k: v for k, v in json.loads(path.read_text()).items() if isinstance(v, (int, float))}
        rows.append((path.parent.name, " ".join(map(str, overrides)), figures))
    if not rows:
        return
    columns = list(dict.fromkeys(k for *_, figures in rows for k in figures))
    cells = [[n, o, *(f"{f[c]:.4g}" if c in f else "" for c in columns)] for n, o, f in rows]
    table = Table("job", "overrides", *columns, title=escape(str(folder)))
    for row in cells:
        table.add_row(*map(escape, row))
    Console().print(table)
    head = ["job", "overrides", *columns]
    lines = [head, ["---"] * len(head), *cells]
    (folder / "results.md").write_text("".join(f"| {' | '.join(line)} |\n" for line in lines))
