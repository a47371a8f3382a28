"""precompute.py runs the sources over the corpus, keeps their top-K and aligns it to the target's tokens. Usage: python precompute.py --help."""

from fusion.launch import main
from fusion.stages import precompute

if __name__ == "__main__":
    main("precompute", precompute)
