"""The parts of ``python bench/gpu.py``: what stages are, and the programs that they run."""
