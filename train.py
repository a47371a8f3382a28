"""Train the target on λ·CLM + (1−λ)·fusion: python train.py --help"""

from fusion.launch import main
from fusion.stages import train

if __name__ == "__main__":
    main("train", train)
