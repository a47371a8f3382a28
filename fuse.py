"""The main job, end to end: python fuse.py --help"""

from fusion.launch import main
from fusion.mainjob import fuse

if __name__ == "__main__":
    main("fuse", fuse)
