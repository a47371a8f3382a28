"""`python -m fusion.merging verify DIR`: are a merge's files what its manifest says, do its inputs still give them?"""

import argparse
import sys

from fusion.config import UserError
from fusion.merging.verify import verify

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m fusion.merging", description=__doc__)
    parser.add_argument("command", choices=["verify"])
    parser.add_argument("folder", help="folder that merge.py wrote")
    parser.add_argument("--tensors", type=int, default=8, help="how many tensors, drawn at random, are merged again")
    parser.add_argument("--seed", type=int, default=None, help="of the draw; empty: another one every time")
    arguments = parser.parse_args()
    try:
        problems = verify(arguments.folder, arguments.tensors, arguments.seed)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    for problem in problems:
        print(f"DAMAGED: {problem}")
    print("damaged" if problems else "whole: files, checksums and the sample agree")
    sys.exit(1 if problems else 0)
