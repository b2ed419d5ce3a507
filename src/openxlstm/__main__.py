"""``python -m openxlstm`` is the ``openxlstm`` command."""

import sys

from openxlstm.cli.main import main

sys.exit(main())
