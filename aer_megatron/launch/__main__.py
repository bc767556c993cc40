import sys

from aer_megatron.launch.command import main

sys.exit(main())
