"""fuse.py runs the main job: precompute, train, merge, evaluate, report. What is done already is found again. Usage: python fuse.py --help."""

from fusion.launch import main
from fusion.stages import fuse

if __name__ == "__main__":
    main("fuse", fuse)
