import sys

from aer_megatron.plan.command import main

sys.exit(main())
