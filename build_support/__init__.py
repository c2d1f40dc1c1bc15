"""What setup.py needs to know about this machine: plain Python, so that its tests need no torch and no compiler."""
