"""merge.py merges fine-tuned models into one, streamed from disk to disk. Usage: python merge.py --help."""

from fusion.launch import main
from fusion.merging import stage

if __name__ == "__main__":
    main("merge", stage)
