"""``python -m alphaext``: the command ``alphaext`` as torchrun can start it (``torchrun ... -m alphaext extract ...``)."""

import sys

from .commands.main import main

sys.exit(main())
