"""Every shipped YAML composes and passes its checks; every mistake is one line that names the key and a way out."""

import subprocess
import sys
from pathlib import Path

import pytest

from fusion.config import UserError, nearest, options_of
from fusion.launch import preflight

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
NEEDS = {  # what an option leaves to the user
    "corpus/jsonl": ["corpus.path=texts.jsonl"],
    "corpus/chat": ["corpus.path=chats.jsonl"],
    "target/model": ["target.path=some/model"],
    "merge": ["base=A", "models=[B,C]", "output=D"],
    "evaluation": ["models=[A]"],
}


def script_of(group: str) -> str:
    return {"merge": "merge", "granularity": "merge", "evaluation": "evaluate"}.get(group, "train")


def options() -> list[tuple[str, str]]:
    groups = [p for p in sorted(CONF.iterdir()) if p.is_dir() and p.name != "hydra"]
    return [(g.name, y.stem) for g in groups for y in sorted(g.glob("*.yaml"))]


@pytest.mark.parametrize(("group", "option"), options(), ids=["/".join(o) for o in options()])
def test_every_option_composes(group: str, option: str) -> None:
    choice = f"{group}=[{option}]" if group == "sources" else f"{group}={option}"
    more = NEEDS.get(f"{group}/{option}", []) + NEEDS.get(script_of(group), [])
    preflight(script_of(group), [choice, *more])


@pytest.mark.parametrize("script", ["precompute", "train", "fuse"])
def test_defaults_compose(script: str) -> None:
    config, sweep = preflight(script, [])
    assert not sweep
    assert list(config.sources) == ["tiny_code", "tiny_docs", "tiny_tables"]


def test_experiments_hold_the_papers_recipes() -> None:
    fusellm, _ = preflight("train", ["experiment=fusellm_7b"])
    assert (fusellm.objective.lambda_clm, fusellm.optimizer.lr, fusellm.optimizer.betas) == (0.9, 1e-5, [0.9, 0.95])
    assert (fusellm.trainer.epochs, fusellm.trainer.global_batch, fusellm.optimizer.warmup_ratio) == (1, 128, 0.008)
    fusechat, _ = preflight("fuse", ["experiment=fusechat_7b"])
    assert (fusechat.optimizer.lr, fusechat.optimizer.betas, fusechat.trainer.epochs) == (5e-6, [0.9, 0.999], 3)
    assert (fusechat.corpus.block_size, fusechat.externalize.top_k, fusechat.optimizer.weight_decay) == (2048, 10, 0)


MISTAKES = {
    "objective.lamda_clm=0.3": "objective.lambda_clm",
    "objective.lambda_clm=1.5": "between 0 and 1",
    "objective.lambda_clm=nan": "between 0 and 1",
    "objective.lambda_clm=much": "could not be converted to Float",
    "fusion=minc": "mince",
    "fusion.levl=token": "fusion.level",
    "fusion.level=tokn": "token",
    "+fusion.levl=token": "level",
    "fuson=mince": "fusion",
    "experiment=fusell": "fusellm",
    "sources=[tiny_cod]": "tiny_code",
    "sources.tiny_code.grow.stps=3": "sources.tiny_code.grow.steps",
    "+sources={mine: {pth: X}}": "path",
    "+sources={mine: {dtype: float32}}": "sources.mine.path",
    "trainer.devicez=2": "trainer.devices",
    "trainer.devices=two": "trainer.devices",
    "trainer.micro_batch=3": "trainer.global_batch",
    "corpus=jsonl": "corpus.path",
    "seed=": "Integer",
    "seed=-1": "at least 0",
    "merges.varm.statistik=abs": "merges.varm.",
    "+merges.varm.statistik=abs": "statistic",
    "arms=[fusellm,fusechatt]": "fusechat",
    "optimizer.betas=[0.9]": "optimizer.betas",
    "alignment.criterion=e": "alignment.criterion",
    "target.path=MODEL": "target has both",
    "a b": "a b",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_one_line_with_a_way_out(override: str) -> None:
    with pytest.raises(UserError) as caught:
        preflight("train", [override])
    message = str(caught.value)
    assert MISTAKES[override] in message
    assert "\n" not in message


def test_bucket_needs_temperature_one() -> None:
    with pytest.raises(UserError, match=r"objective\.temperature=1"):
        preflight("train", ["objective.tail=bucket", "objective.temperature=2"])


def test_a_sweep_is_checked_whole_before_it_starts() -> None:
    with pytest.raises(UserError, match="between 0 and 1"):
        preflight("train", ["-m", "objective.lambda_clm=0.5,0.9,1.9"])
    _, sweep = preflight("train", ["-m", "fusion=mince,avgce", "sources=[tiny_code],[tiny_code,tiny_docs]"])
    assert sweep


def test_a_new_source_is_one_file_in_the_users_folder(tmp_path: Path) -> None:
    (tmp_path / "sources").mkdir()
    mine = tmp_path / "sources" / "mine.yaml"
    mine.write_text("mine: {path: some/model, dtype: bfloat16}\n")
    config, _ = preflight("train", ["--config-dir", str(tmp_path), "sources=[tiny_code,mine]"])
    assert config.sources["mine"].path == "some/model"
    mine.write_text("mine: {path: some/model, dtipe: bfloat16}\n")
    with pytest.raises(UserError, match=r"sources\.mine\.dtype"):
        preflight("train", ["--config-dir", str(tmp_path), "sources=[mine]"])
    mine.write_text("tiny_code: {path: some/model}\n")  # a name that is taken
    with pytest.raises(UserError, match="must define the key 'mine'"):
        preflight("train", ["--config-dir", str(tmp_path), "sources=[tiny_code,mine]"])
    with pytest.raises(UserError, match="no such folder"):
        preflight("train", ["--config-dir", str(tmp_path / "nowhere")])


def test_an_experiment_with_a_typo_is_refused(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "e.yaml").write_text("# @package _global_\nobjective: {lamda_clm: 0.3}\n")
    with pytest.raises(UserError, match=r"objective\.lambda_clm"):
        preflight("train", ["--config-dir", str(tmp_path), "experiment=e"])


def example(x: list, *, density: float = 0.5, seeds: list[int] | None = None, names: list[str] = ()) -> None:
    """A method of a user's."""


def test_options_are_the_functions_keywords() -> None:
    where = f"{__name__}.example"
    function, options = options_of("merge", {"method": where, "density": 1}, "method")
    assert function is sys.modules[__name__].example
    assert options == {"density": 1.0}
    for wrong in ({"densty": 1}, {"density": "x"}, {"density": True}, {"seeds": [1, "a"]}, {"method": "no.where"}):
        with pytest.raises(UserError, match="merge"):
            options_of("merge", {"method": where} | wrong, "method")


def test_nearest() -> None:
    assert "did you mean 'lambda_clm'" in nearest("lamda", ["lambda_clm", "tail"])
    assert "one of: a, b" in nearest("zzz", ["b", "a"])


@pytest.mark.parametrize("script", ["precompute", "train", "fuse", "merge", "evaluate"])
def test_help_shows_groups_keys_and_examples(script: str) -> None:
    done = subprocess.run([sys.executable, f"{script}.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"python {script}.py") + done.stdout.count(f"{script}.py") >= 3
    assert "== Options" in done.stdout
    assert "logger.wandb" in done.stdout


def test_a_mistake_ends_with_code_two_and_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train.py"), "objective.lamda_clm=0.3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown key 'objective.lamda_clm' (did you mean 'objective.lambda_clm'?)")
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir()), "nothing is written before the command line is understood"
