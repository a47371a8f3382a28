"""Evaluate models: `python evaluate.py --help`."""

from fusion.evaluation import evaluate
from fusion.launch import main

if __name__ == "__main__":
    main("evaluate", evaluate)
