import sys

from aer_megatron.replay.command import main

sys.exit(main())
