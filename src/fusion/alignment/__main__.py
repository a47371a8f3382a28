"""See how two tokenizers align on a text.

python -m fusion.alignment "some text" --source gpt2 --target ./llama --criterion span
python -m fusion.alignment @file.txt --source A --target B --html alignment.html
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from safetensors.numpy import load_file

from fusion.alignment.normalise import encode
from fusion.alignment.project import Aligner
from fusion.alignment.statistics import Statistics
from fusion.alignment.view import look, page, terminal
from fusion.config import Alignment, UserError


def load(name: str):
    """A tokenizer by folder or hub name, or a UserError that names it."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # whatever a broken file makes transformers or tokenizers raise
        why = str(error).strip().splitlines()
        raise UserError(
            f"tokenizer {name} cannot be loaded ({why[0][:160] if why else type(error).__name__})"
        ) from error


def run(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fusion.alignment", description=__doc__.splitlines()[0])
    parser.add_argument("text", metavar="TEXT", help="the text, or @FILE")
    parser.add_argument("--source", required=True, metavar="TOKENIZER", help="folder or hub name")
    parser.add_argument("--target", required=True, metavar="TOKENIZER", help="folder or hub name")
    parser.add_argument("--criterion", default="span", choices=("em", "mined", "ms", "span"))
    parser.add_argument("--normalise", default="bytes", choices=("bytes", "reference"))
    parser.add_argument("--statistics", type=Path, help="ms: a counts file; without it, this text alone is counted")
    parser.add_argument("--store", type=Path, metavar="FILE", help="safetensors: ids and logprobs [source tokens, K]")
    parser.add_argument("--cache", type=Path, help="folder of vocabulary maps")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a self-contained page too")
    options = parser.parse_args(arguments)
    text = options.text
    if text.startswith("@"):
        try:
            text = Path(text[1:]).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{text[1:]}: cannot be read as UTF-8 text ({error})") from error
    text = text.encode("utf-8", "replace").decode()  # tokenizers refuse lone surrogates
    source, target = load(options.source), load(options.target)
    rows = []
    for tokenizer in (source, target):
        eos = tokenizer.eos_token_id
        rows.append(np.array(encode(tokenizer, [text])[0] + ([] if eos is None else [eos]), np.int64))
    config = Alignment(criterion=options.criterion, normalise=options.normalise)
    counts = None
    if options.criterion == "ms":
        if options.statistics:
            counts = Statistics.load(options.statistics)
        else:
            counting = Aligner(source, target, config)
            counting.count(*rows)
            counts = counting.statistics
    aligner = Aligner(source, target, config, statistics=counts, cache=options.cache)
    held = None
    if options.store:
        try:
            kept = load_file(options.store)
            held = kept["ids"], kept["logprobs"]
        except Exception as error:
            raise UserError(f"--store {options.store}: no safetensors file with ids and logprobs ({error})") from error
        if len(held[0]) != len(rows[0]):
            raise UserError(
                f"--store {options.store}: {len(held[0])} positions, the text has {len(rows[0])} source tokens"
            )
    view = look(aligner, *rows, held)
    console = Console()
    console.print(terminal(view, console.width))
    if options.html:
        options.html.write_text(page(view, options.source, options.target), encoding="utf-8")
        console.print(f"written: {options.html}", markup=False)


if __name__ == "__main__":
    try:
        run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
