"""Run the sources over the corpus, keep their top-K, align it to the target: python precompute.py --help"""

from fusion.launch import main
from fusion.stages import precompute

if __name__ == "__main__":
    main("precompute", precompute)
